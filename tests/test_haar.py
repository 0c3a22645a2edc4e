"""Haar bases on trees: against the vectors written down folder by folder, and by the laws of an orthonormal basis."""

import math
import pickle

import pytest
import torch

from tensorlens_utils import haar as room
from tensorlens_utils.haar import Haar, largest, soft
from tensorlens_utils.trees import Tree

NESTED = Tree.from_nested([[[0, 1, 2], [3, 4]], [5, [6, [7, 8, 9, 10]]]])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def any_tree(seed):
    """Unbalanced with single-child chains; all children of one size; a star; a caterpillar; one leaf, or two."""
    n = 1 + (seed * 7919) % 90
    kind = seed % 5
    if kind == 0:
        return Tree.dyadic(n)
    if kind == 1:
        return Tree(torch.stack([torch.zeros(n).long()] * 3 + [torch.arange(n)]))
    if kind == 2:
        return Tree(torch.stack([torch.arange(n).clamp(max=level) for level in range(max(n, 1))]))
    return Tree.random(n, seed)


def vectors(tree):
    """{(level, folder): its vectors}, from their definition, by loops over folders and children; and the constant."""
    found = {(-1, 0): [torch.full((tree.n,), tree.n**-0.5, dtype=torch.float64)]}
    for level in range(tree.depth):
        for folder in range(tree.counts[level]):
            children = [(tree.levels[level + 1] == c).double() for c in tree.children(level, folder)]
            children.sort(key=lambda child: -child.sum())  # stable
            for i, child in enumerate(children[:-1]):
                rest = sum(children[i + 1 :])
                v = rest.sum() * child - child.sum() * rest
                found.setdefault((level, folder), []).append(v / v.norm())
    return found


def dense(tree):
    return torch.stack([v for _, group in sorted(vectors(tree).items()) for v in group], 1)


@pytest.mark.parametrize("seed", range(30))
def test_the_basis_is_the_one_defined(seed):
    tree = NESTED if seed == 0 else any_tree(seed)
    assert (Haar(tree).matrix() - dense(tree)).abs().max() < 1e-13


def test_orthonormal_on_a_thousand_trees():
    worst, kinds = 0, set()
    for seed in range(1000):
        tree = any_tree(seed)
        Psi = Haar(tree).matrix()
        worst = max(worst, float((Psi.mT @ Psi - torch.eye(tree.n)).abs().max()))
        sizes = tree.sizes(min(1, tree.depth)).tolist()
        kinds |= {"chain"} if any(len(tree.children(0, 0)) == 1 for _ in range(tree.depth > 0)) else set()
        kinds |= {"repeated"} if len(set(sizes)) < len(sizes) else set()
        kinds |= {"unbalanced"} if max(sizes) > 3 * min(sizes) else set()
    assert worst < 1e-12
    assert kinds == {"chain", "repeated", "unbalanced"}


@pytest.mark.parametrize("block, limit", [(2, 1), (5, 1), (32, 64), (32, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_fast_is_dense_along_any_axis(monkeypatch, block, limit, seed):
    monkeypatch.setattr(room, "BLOCK", block)
    monkeypatch.setattr(room, "DENSE", limit)
    trees = [Tree.random(70, seed), any_tree(5 * seed + 2), Tree.dyadic(67)]
    Psi = [dense(tree) for tree in trees]
    for dim in range(3):
        x = noise(*(tree.n if d == dim else 3 for d, tree in enumerate(trees)), 2, seed=seed)
        haar = Haar(*(tree if d == dim else None for d, tree in enumerate(trees)), None)
        c = torch.tensordot(Psi[dim].mT, x, ([1], [dim])).movedim(0, dim)
        assert (haar.analysis(x) - c).abs().max() < 1e-12
        assert (haar.synthesis(c) - x).abs().max() < 1e-12
    x = noise(2, *(tree.n for tree in trees))
    c = torch.einsum("nabc,ai,bj,ck->nijk", x, *Psi)
    haar = Haar(*trees)
    assert (haar.analysis(x) - c).abs().max() < 1e-12
    assert (haar.synthesis(haar.analysis(x)) - x).abs().max() < 1e-12


def test_blocks_are_orthogonal_and_bounded(monkeypatch):
    monkeypatch.setattr(room, "DENSE", 1)
    for tree in (Tree.random(500, 1), Tree.dyadic(500), Tree.from_labels(range(500))):
        blocks = room._Axis(tree).blocks()
        assert sum(len(matrix) - 1 for *_, matrix in blocks) == tree.n - 1
        assert max(len(matrix) for *_, matrix in blocks) <= room.BLOCK
        assert len(blocks) < 4 * tree.n / room.BLOCK  # blocks that are mostly full, or the gain would be lost
        for places, _, matrix in blocks:
            assert (torch.from_numpy(matrix @ matrix.T) - torch.eye(len(places))).abs().max() < 1e-13


def test_the_memory_of_x_does_not_matter_and_gradients_are_the_inverse():
    tree = Tree.random(100, 3)
    x = noise(100, 6).mT
    assert torch.equal(Haar(tree).analysis(x), Haar(tree).analysis(x.contiguous()))
    x = noise(100, 4).requires_grad_()
    haar, g = Haar(tree, None), noise(100, 4, seed=1)
    (got,) = torch.autograd.grad(haar.analysis(x), x, g)
    assert (got - haar.synthesis(g)).abs().max() < 1e-12


def test_float32_is_float32_exact():
    haar, x = Haar(Tree.random(1000, 0), Tree.random(90, 1)), noise(1000, 90)
    c = haar.analysis(x.float())
    assert c.dtype == torch.float32
    assert (c - haar.analysis(x)).norm() < 3e-7 * c.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_in_float32(dtype):
    haar, x = Haar(Tree.random(100, 0), Tree.random(90, 1)), (300 * noise(100, 90)).to(dtype)
    c = haar.analysis(x)
    assert c.dtype == torch.float32 and torch.equal(c, haar.analysis(x.float()))
    assert (haar.synthesis(c) - x).abs().max() < 1e-3  # of a thousand, as float32 rounds


def test_a_basis_is_pickled_by_its_trees():
    haar, x = Haar(Tree.random(100, 0), None), noise(100, 3)
    haar.analysis(x)  # what it has made so far is not what is kept
    again = pickle.loads(pickle.dumps(haar))
    assert again.trees == haar.trees and torch.equal(again.analysis(x), haar.analysis(x))
    assert len(pickle.dumps(haar)) < 2 * len(pickle.dumps(haar.trees))


def test_complex_numbers_are_two_real_ones():
    haar, x, y = Haar(Tree.random(100, 0)), noise(3, 100), noise(3, 100, seed=1)
    assert (haar.analysis(torch.complex(x, y)) - torch.complex(haar.analysis(x), haar.analysis(y))).abs().max() < 1e-12


def test_which_coefficient_is_which():
    haar, names = Haar(NESTED, Tree.dyadic(4)), sorted(vectors(NESTED).items())
    i = 0
    for (level, folder), group in names:
        for v in group:
            wavelet = haar.where(i, 0)[0]
            assert (wavelet.level, wavelet.folder) == (level, folder)
            assert sorted(wavelet.plus.tolist()) == (v > 0).nonzero().flatten().tolist()
            assert sorted(wavelet.minus.tolist()) == (v < 0).nonzero().flatten().tolist()
            assert int(haar.levels[0][i]) == level
            assert torch.equal(haar.support[i], int((v != 0).sum()) * torch.tensor([4, 4, 2, 2]))
            i += 1
    assert haar.wavelets.sum() == 10 * 3 and not haar.wavelets[0].any() and not haar.wavelets[:, 0].any()
    assert Haar(None, Tree.dyadic(2)).where(5, 1)[0].plus.tolist() == [5]


def test_block_constant_tensors_have_few_coefficients():
    """A tensor that is constant on the folders of level 1 × level 1 has as many coefficients as these."""
    trees = [Tree.random(40, 5), Tree.random(30, 6)]
    at = [tree.levels[1] for tree in trees]
    x = noise(*(tree.counts[1] for tree in trees))[at[0][:, None], at[1]]
    c = Haar(*trees).analysis(x)
    assert int((c.abs() > 1e-12).sum()) <= trees[0].counts[1] * trees[1].counts[1]
    coarse = torch.stack([torch.isin(level, torch.tensor([-1, 0])) for level in Haar(trees[0]).levels]).squeeze()
    assert c[~coarse].abs().max() < 1e-12


def test_kept_are_the_largest_and_the_error_is_what_is_left():
    haar, x = Haar(Tree.random(20, 1), Tree.random(9, 2)), noise(3, 20, 9)
    c = haar.analysis(x)
    kept = largest(c, 50)
    assert ((kept != 0).flatten(1).sum(1) == 50).all()
    assert (kept.abs().flatten(1).sort(1)[0][:, -50] >= (c - kept).abs().flatten(1).amax(1)).all()
    error = (haar.synthesis(kept) - x).flatten(1).norm(dim=1)
    assert torch.allclose(error, (c - kept).flatten(1).norm(dim=1), atol=1e-12)
    assert torch.equal(largest(c, 0), torch.zeros_like(c)) and torch.equal(largest(c, 180), c)
    assert soft(torch.tensor([-3.0, 0.5, 2.0]), 1).tolist() == [-2, 0, 1]
    fine = haar.coarse(c, 0.1)
    assert torch.equal(fine != 0, (haar.support >= 18).expand_as(c))
    for n in (7, 14, 28, 55, 56):  # a folder with exactly the share, however it is rounded
        tree = Haar(Tree.from_nested([[*range(n)], *range(n, 100)]))
        assert torch.equal(tree.coarse(torch.ones(100), n / 100) != 0, tree.support >= n) and (tree.support == n).any()
    some = Haar(None, Tree.random(9, 2))  # an axis without a tree counts nothing
    assert torch.equal(some.coarse(c, 0.5) != 0, (some.support >= 4.5).expand_as(c))


@pytest.mark.parametrize("call, error, words", [
    (lambda: Haar(), ValueError, "one tree or more"),
    (lambda: Haar(None, None), ValueError, "one tree or more"),
    (lambda: Haar(Tree.dyadic(2), 3), TypeError, "Tree, or None"),
    (lambda: Haar(Tree.dyadic(4)).analysis(noise(4, 5)), ValueError, r"\(4,\).*\(4, 5\)"),
    (lambda: Haar(*[Tree.dyadic(4)] * 2).analysis(noise(4)), ValueError, "the last axes"),
    (lambda: Haar(Tree.dyadic(4)).analysis(torch.arange(4)), TypeError, "int64"),
    (lambda: Haar(Tree.dyadic(4)).where(1, 2), ValueError, "one number for each"),
    (lambda: Haar(Tree.dyadic(4), None).matrix(1), ValueError, "no tree"),
    (lambda: Haar(Tree.dyadic(4), None).where(4, 0), ValueError, r"numbered from 0, \(4, None\)"),
    (lambda: Haar(Tree.dyadic(4), None).where(0, -1), ValueError, "numbered from 0"),
    (lambda: largest(noise(2, 2), 5), ValueError, "0 to as many"),
    (lambda: largest(noise(4), 2), ValueError, "last 2 axes.*give dims"),
    (lambda: soft(noise(4), -1), ValueError, "0 or more.*not -1"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_tree_of_one_leaf():
    haar = Haar(Tree([[0]]), Tree([[0], [0]]))
    x = noise(1, 1)
    assert torch.equal(haar.analysis(x), x) and haar.support.tolist() == [[1]] and math.isclose(haar.matrix()[0, 0], 1)
