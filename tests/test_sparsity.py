"""Measures of sparsity and regularity against their formulas by loops, against planted exponents, and by their laws."""

import math

import pytest
import torch

from tensorlens_utils.haar import Haar, largest
from tensorlens_utils.haar.sparsity import (
    besov,
    dct,
    energy,
    gini,
    holder,
    hoyer,
    l1_entropy,
    l1_over_l2,
    n_term_error,
    rivals,
    svd_error,
)  # fmt: skip
from tensorlens_utils.trees import Tree

SCALE_FREE = (l1_over_l2, hoyer, gini)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(haar, alpha, *batch, seed=0):
    """Coefficients of random signs and modulus |I×J|^(α + ½), of shares of the entries."""
    return noise(*batch, *haar.support.shape, seed=seed).sign() * (haar.support / haar.support.numel()) ** (alpha + 0.5)


@pytest.mark.parametrize("measure", SCALE_FREE)
def test_scale_free_measures(measure):
    c = noise(5, 200)
    assert torch.allclose(measure(-3e4 * c), measure(c))
    assert torch.allclose(measure(c[:, torch.randperm(200)]), measure(c))
    sparser = c * (c.abs() > 1)
    up = -1 if measure is l1_over_l2 else 1
    assert (up * (measure(sparser) - measure(c)) > 0.05).all()
    one = torch.eye(200, dtype=torch.float64)[0]
    assert math.isclose(measure(one), {l1_over_l2: 1, hoyer: 1, gini: 1 - 1 / 200}[measure])
    assert abs(measure(torch.ones(200).double()) - {l1_over_l2: 200**0.5, hoyer: 0, gini: 0}[measure]) < 1e-12


def test_gini_is_half_the_mean_difference_over_the_mean():
    c = noise(30).abs()
    assert math.isclose(gini(c), float((c[:, None] - c).abs().mean() / 2 / c.mean()))


def test_energy_and_error_are_of_the_best_terms():
    c = noise(4, 6, 10)
    for k in (0, 1, 17, 60):
        left = (c - largest(c, k)).flatten(1).norm(dim=1) / c.flatten(1).norm(dim=1)
        assert torch.allclose(n_term_error(c.flatten(1), k), left, atol=1e-14)
        if k:
            assert torch.allclose(energy(c.flatten(1))[:, k - 1], 1 - left**2)
    assert torch.equal(n_term_error(c.flatten(1), [3, 9]),
                       torch.stack([n_term_error(c.flatten(1), k) for k in (3, 9)], 1))  # fmt: skip


def test_of_zeros_all_is_told_by_nothing_and_how_sparse_they_are_is_not_asked():
    c = torch.zeros(2, 30)
    c[0, 0] = 3
    assert n_term_error(c, [0, 4]).tolist() == [[1, 0], [0, 0]] and (energy(c) == 1).all()
    for measure in SCALE_FREE:
        assert measure(c).isnan().tolist() == [False, True]
    lost = torch.tensor([1.0, torch.nan])
    assert energy(lost).isnan().any() and n_term_error(lost, 1).isnan()
    for rival, found in rivals(torch.zeros(4, 4), [Tree.dyadic(4)] * 2, 3, draws=1).items():
        assert found == 0, rival


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_is_refused(dtype):
    big, many, x = torch.tensor([300.0, 1, 2]).to(dtype), torch.ones(65536).to(dtype), noise(12, 8).to(dtype)
    assert math.isclose(n_term_error(big, 1), 5**0.5 / 90005**0.5, rel_tol=1e-5)
    assert math.isclose(energy(big)[0], 1 - 5 / 90005, rel_tol=1e-6)
    assert math.isclose(hoyer(many), 0, abs_tol=1e-4) and math.isclose(l1_over_l2(many), 256, rel_tol=1e-4)
    assert math.isclose(gini(many), 0, abs_tol=1e-4)
    trees = [Tree.random(12, 0), Tree.random(8, 1)]
    haar, errors, wide = Haar(*trees), rivals(x, trees, 20, draws=1), rivals(x.float(), trees, 20, draws=1)
    assert all(torch.equal(errors[name], wide[name]) for name in wide)
    for measure in (lambda c: l1_entropy(c, haar), lambda c: besov(c, haar, 0.3)):
        assert torch.equal(measure(400 * x), measure((400 * x).float()))


def test_the_papers_entropy():
    haar = Haar(Tree.random(30, 0), Tree.random(25, 1))
    c = haar.analysis(noise(3, 30, 25))
    by_hand = sum(c[:, i, j].abs() for i in range(10) for j in range(10))
    assert torch.allclose(l1_entropy(c, haar), by_hand)
    assert torch.allclose(l1_entropy(7 * c, haar), 7 * by_hand)
    flat = sorted(range(750), key=lambda i: -int(haar.support.flatten()[i]))[:40]
    assert torch.allclose(l1_entropy(c, haar, 40, by="support"), c.flatten(1)[:, flat].abs().sum(1))


@pytest.mark.parametrize("p, q", [(1, 1), (2, 1), (1.5, 3), (math.inf, 2), (math.inf, math.inf)])
def test_besov_norm_by_loops(p, q):
    haar, alpha = Haar(Tree.random(13, 0), Tree.random(11, 1)), 0.3
    c = haar.analysis(noise(2, 13, 11))
    of_levels = {}
    for i in range(1, 13):
        for j in range(1, 11):
            share = int(haar.support[i, j]) / 143
            term = share ** -(alpha + 0.5 - 1 / p) * c[:, i, j].abs() / 143**0.5
            of_levels.setdefault((int(haar.levels[0][i]), int(haar.levels[1][j])), []).append(term)
    scales = torch.stack([torch.stack(terms).norm(p, dim=0) for terms in of_levels.values()])
    assert torch.allclose(besov(c, haar, alpha, p, q), scales.norm(q, dim=0))


@pytest.mark.parametrize("trees", [[Tree.dyadic(128), Tree.dyadic(64)], [Tree.random(128, 1), Tree.random(100, 3)],
                                   [Tree.random(40, 1), Tree.random(30, 3), Tree.dyadic(16)]])  # fmt: skip
@pytest.mark.parametrize("alpha", [-0.5, 0.2, 0.5, 1.0])
def test_a_planted_exponent_is_found(trees, alpha):
    haar = Haar(*trees)
    c = planted(haar, alpha, 3)
    for statistic in ("rms", "max"):
        found = holder(5 * c, haar, statistic)
        assert (found.alpha - alpha).abs().max() < 0.04 and found.error.max() < 0.04
    found = holder(c * noise(*c.shape, seed=9), haar)  # of random size
    assert (found.alpha - alpha).abs().max() < 0.1
    assert ((found.alpha - alpha).abs() < 5 * found.error).all()
    assert found.size.shape == (3, len(found.share)) and (found.share.diff() > 0).all()
    assert torch.allclose(besov(c, haar, alpha), torch.tensor(haar.support.numel() ** -0.5).double())


def test_white_noise_has_no_smoothness_on_any_tree():
    haar = Haar(Tree.random(100, 1), Tree.random(120, 3))
    assert (holder(haar.analysis(noise(20, 100, 120)), haar).alpha.mean() + 0.5).abs() < 0.02


def test_where_coefficients_vanish_there_is_no_exponent():
    """Noise in blocks of 8 × 8: nothing below them but what rounding leaves, which is no smoothness of any order."""
    haar, x = Haar(*[Tree.dyadic(64)] * 2), noise(2, 64, 64)
    x[1] = x[1, :8, :8].repeat_interleave(8, 0).repeat_interleave(8, 1)
    for statistic in ("rms", "max"):
        found = holder(haar.analysis(x), haar, statistic)
        assert found.alpha.isnan().tolist() == found.error.isnan().tolist() == [False, True]
    assert holder(torch.zeros(64, 64), haar).alpha.isnan()


def test_svd_error_counts_what_a_triplet_costs():
    A = noise(3, 12, 8)
    U, S, V = torch.linalg.svd(A, full_matrices=False)
    for budget, rank in [(19, 0), (20, 1), (65, 3), (10**6, 8)]:
        rest = A - (U[..., :rank] * S[:, None, :rank]) @ V[:, :rank]
        want = rest.flatten(1).norm(dim=1) / A.flatten(1).norm(dim=1)
        assert torch.allclose(svd_error(A, budget), want, atol=1e-12)
    shared = (A.square().sum() - S.flatten().sort(descending=True)[0][:5].square().sum()).sqrt() / A.norm()
    assert torch.allclose(svd_error(A, 100, dims=3), shared)


def test_trees_that_fit_beat_every_null():
    trees = [Tree.random(60, 1), Tree.random(50, 2)]
    haar = Haar(*trees)
    x = haar.synthesis(planted(haar, 0.5, 4))
    errors = rivals(x, trees, [30, 120], draws=3)
    assert {*errors} == {"organised", "shuffled", "random", "natural", "dct", "entries", "svd"}
    assert all(error.shape == (4, 2) for error in errors.values())
    assert torch.allclose(errors["organised"], n_term_error(haar.analysis(x).flatten(1), [30, 120]))
    assert all((errors["organised"] < 0.8 * error).all() for name, error in errors.items() if name != "organised")
    again = rivals(x, trees, [30, 120], draws=3)
    assert all(torch.equal(errors[name], again[name]) for name in errors)
    other = rivals(noise(4, 60, 50), trees, 120, draws=5)
    assert (other["organised"] / other["shuffled"] - 1).abs().max() < 0.02  # on noise no tree is better than another
    one, two, both = (rivals(noise(60, 50), trees, 120, *how) for how in ((1, 0), (1, 2), (2, 0)))  # draws, seed
    for name in ("shuffled", "random"):  # the second draw of one seed is not the first of another
        assert not torch.isclose(2 * both[name] - one[name], two[name])
    assert "svd" not in rivals(noise(5, 6, 4), [Tree.dyadic(n) for n in (5, 6, 4)], 10)


def test_the_cosine_transform_is_orthonormal():
    x = noise(2, 7, 5)
    assert torch.allclose(dct(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert torch.allclose(dct(torch.ones(4, 4))[0, 0], torch.tensor(4.0))


@pytest.mark.parametrize("call, words", [
    (lambda: n_term_error(noise(5), 6), "0 to as many"),
    (lambda: hoyer(noise(5, 1)), "two or more"),
    (lambda: l1_entropy(noise(4, 5), Haar(*[Tree.dyadic(4)] * 2)), r"\(4, 4\) on the last axes; not.*\(4, 5\)"),
    (lambda: l1_entropy(noise(4, 4), Haar(*[Tree.dyadic(4)] * 2), first=-3), "first=-3"),
    (lambda: besov(noise(1, 4), Haar(Tree([[0]]), Tree.dyadic(4)), 0.3), "one leaf has none"),
    (lambda: rivals(noise(4, 4), [Tree.dyadic(4)] * 2, 3, draws=0), "one draw or more"),
    (lambda: rivals(noise(4, 4), [None, Tree.dyadic(4)], 3), "a tree for each.*None"),
    (lambda: l1_entropy(noise(4, 4), Haar(*[Tree.dyadic(4)] * 2), by="size"), "order"),
    (lambda: l1_entropy(noise(4, 4), Haar(Tree.dyadic(4), None)), "every axis"),
    (lambda: holder(noise(4, 4), Haar(*[Tree.dyadic(4)] * 2)), "three octaves"),
    (lambda: holder(noise(64, 64), Haar(*[Tree.dyadic(64)] * 2), "mean"), "rms"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
