"""The telescoping identity, exact; the paraproduct against its formula by loops over the scales; what it says of α."""

import pytest
import torch

from tensorlens_utils.costs import peak_gigabytes
from tensorlens_utils.haar import Haar
from tensorlens_utils.haar.paraproducts import folder_means, paraproduct, partitions, telescoped
from tensorlens_utils.haar.sparsity import holder
from tensorlens_utils.trees import Tree

NONLINEAR = {"exp": torch.exp, "tanh": torch.tanh, "gaussian": lambda x: torch.exp(-x.square()),
             "potential": lambda x: 1 / (x + 9), "gelu": torch.nn.functional.gelu}  # fmt: skip
TREES = {"one": [Tree.random(40, 1)], "two": [Tree.random(37, 2), Tree.random(29, 3)],
         "three": [Tree.random(12, 4), Tree.random(9, 5), Tree.dyadic(6)],
         "a leaf": [Tree([[0]]), Tree.random(20, 6)]}  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(tree, level):
    """P_level (n, n): the mean over the folder of each leaf."""
    same = (tree.levels[level][:, None] == tree.levels[level]).double()
    return same / same.sum(1)


@pytest.mark.parametrize("A", NONLINEAR)
@pytest.mark.parametrize("case", TREES)
def test_the_identity_is_exact(case, A):
    f = noise(2, *(tree.n for tree in TREES[case]))
    assert (telescoped(f, TREES[case], NONLINEAR[A]) - NONLINEAR[A](f)).abs().max() < 1e-10


def test_the_identity_is_exact_for_a_row_softmax():
    f = 3 * noise(37, 29)
    assert (telescoped(f.log_softmax(-1), TREES["two"]) - f.softmax(-1)).abs().max() < 1e-10


@pytest.mark.parametrize("A", ["exp", "tanh"])
def test_the_paraproduct_by_loops(A):
    trees, A = TREES["two"], NONLINEAR[A]
    f = noise(2, 37, 29)
    first, second = {torch.exp: (torch.exp, torch.exp), torch.tanh: (
        lambda x: 1 - x.tanh() ** 2, lambda x: -2 * x.tanh() * (1 - x.tanh() ** 2))}[A]  # fmt: skip
    P, R = ([projection(tree, j) for j in range(tree.depth + 1)] for tree in trees)
    boundary = A(P[0] @ f) + A(f @ R[0]) - A(P[0] @ f @ R[0])
    total = boundary
    for j in range(trees[0].depth):
        for k in range(trees[1].depth):
            p, q, dp, dq = P[j], R[k], P[j + 1] - P[j], R[k + 1] - R[k]
            a, u, v, w = p @ f @ q, dp @ f @ q, p @ f @ dq, dp @ f @ dq
            total = total + first(a) * w + second(a) * u * v
    found = paraproduct(f, trees, A)
    assert (found.boundary - boundary).abs().max() < 1e-12
    assert (found.approximation - total).abs().max() < 1e-11
    assert (found.approximation + found.residual - A(f)).abs().max() < 1e-12


def test_one_axis_and_three():
    f, tree = noise(40), TREES["one"][0]
    P = [projection(tree, j) @ f for j in range(tree.depth + 1)]
    assert (paraproduct(f, [tree]).approximation - P[0].exp() - sum(
        a.exp() * (b - a) for a, b in zip(P[:-1], P[1:], strict=True))).abs().max() < 1e-12  # fmt: skip
    f = noise(12, 9, 6)
    assert paraproduct(f, TREES["three"], lambda x: 3 * x - 2).residual.abs().max() < 1e-12
    assert len([*partitions((0, 1, 2))]) == 5 and len([*partitions((0, 1, 2, 3))]) == 15  # Bell's numbers


def test_a_square_leaves_the_squares_of_the_differences():
    """On one axis (a + δ)² − a² − 2aδ = δ²: the residual is known in closed form."""
    f, tree = noise(40), TREES["one"][0]
    P = [projection(tree, j) @ f for j in range(tree.depth + 1)]
    residual = sum((b - a) ** 2 for a, b in zip(P[:-1], P[1:], strict=True))
    assert (paraproduct(f, [tree], torch.square).residual - residual).abs().max() < 1e-12


def test_parts_have_no_derivatives_by_f_that_would_be_wrong():
    f = noise(37, 29).requires_grad_()
    assert not any(part.requires_grad for part in paraproduct(f, TREES["two"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_half_precision_and_whole_numbers_are_taken_in_float32(dtype):
    f = (3 * noise(37, 29)).to(dtype)
    for part, wide in zip(paraproduct(f, TREES["two"]), paraproduct(f.float(), TREES["two"]), strict=True):
        assert part.dtype == torch.float32 and torch.equal(part, wide)
    assert torch.equal(telescoped(f, TREES["two"]), telescoped(f.float(), TREES["two"]))


def test_deep_trees_are_not_held_at_every_resolution():
    """Two chains of 24 leaves have 576 pairs of levels, on each of which f has another resolution: 156 times f."""
    chain = Tree(torch.stack([torch.arange(24).clamp(max=level) for level in range(24)]))
    f = noise(24, 24)
    assert peak_gigabytes(lambda: paraproduct(f, [chain, chain]), torch.device("cpu")) < 40 * f.nbytes / 1e9


def test_folder_means():
    f, (tree, other) = noise(3, 37, 29), TREES["two"]
    for level in range(tree.depth + 1):
        means = folder_means(f, tree, level, 1)
        assert torch.allclose(means[:, tree.levels[level]], projection(tree, level) @ f)
    assert folder_means(f, other, 1, -1).shape == (3, 37, other.counts[1])


def test_the_residual_of_a_rough_series_is_smoother_than_the_series():
    """Random-sign Haar series of exponent α on one axis: the residual's exponent is 2α or more (derived, and proved in
    one dimension by the papers); a residual without its boundary terms is not small."""
    for alpha in (0.2, 0.4):
        tree = Tree.dyadic(1024)
        haar = Haar(tree)
        f = haar.synthesis(noise(8, 1024).sign() * (haar.support / 1024) ** (alpha + 0.5))
        f = 2 * f / f.abs().amax(-1, keepdim=True)
        found = paraproduct(f, [tree])
        smooth = holder(haar.analysis(found.residual), haar, least=4).alpha
        assert (smooth > 2 * alpha).all()
        assert found.residual.norm() < 0.5 * (found.residual + found.boundary).norm()


def test_scores_with_a_mask_on_are_refused():
    f = noise(37, 29).masked_fill(torch.ones(37, 29).triu(1).bool(), -torch.inf).log_softmax(-1)
    for of in (paraproduct, telescoped):
        with pytest.raises(ValueError, match="406 of f are not: take scores before the mask"):
            of(f, TREES["two"])


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(37, 29\)"):
        paraproduct(noise(29, 37), TREES["two"])
    with pytest.raises(ValueError, match="leaves"):
        telescoped(noise(3), [])
