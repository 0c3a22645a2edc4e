"""CP, Tucker and tensor trains: what they multiply back to, what they promise of their tensors, what they refuse."""
import math

import numpy as np
import pytest
import torch
from pictures import numbers

from tensorlens_utils.notation import Diagram, Node, diagram
from tensorlens_utils.notation.decompositions import cp, train, tucker
from tensorlens_utils.notation.layouts import layout

LEGS = "i j k l m"


def relative(d, tensor):
    return float((d.contract() - tensor).norm() / tensor.norm())


def sum_of_products(*shape, rank, seed):
    """A tensor of a known CP rank, and its factors, with columns of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape]
    factors = [factor / factor.norm(dim=0) for factor in factors]
    weights = torch.arange(rank, 0, -1, dtype=torch.float64)
    letters = "abcde"[:len(shape)]
    equation = ",".join(f"{x}z" for x in letters) + f",z->{letters}"
    return torch.einsum(equation, *factors, weights), factors, weights


def unfoldings(tensor):
    """One matrix for each leg, against all others."""
    return [tensor.movedim(k, 0).flatten(1) for k in range(tensor.dim())]


def identity(V):
    return torch.allclose(V.T @ V, torch.eye(V.shape[1], dtype=V.dtype), atol=1e-10)


# ── CP ──

@pytest.mark.parametrize("shape, rank", [((2, 3, 4), 1), ((2, 3, 4), 2), ((4, 5, 6), 4), ((3, 3, 3, 3), 4),
                                         ((2, 3, 2, 3, 2), 2), ((5, 1, 4), 1)])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_cp_finds_a_known_rank(shape, rank, seed):
    T, _, _ = sum_of_products(*shape, rank=rank, seed=seed)
    assert relative(cp(T, LEGS[:2 * len(shape)], rank), T) < 1e-6


def test_cp_finds_the_terms_themselves():
    """Up to signs: a sum of outer products of three legs is unique where a matrix's is not (Kruskal)."""
    T, factors, weights = sum_of_products(5, 6, 7, rank=4, seed=1)
    d = cp(T, "i j k", 4)
    assert torch.allclose(d["λ"].tensor, weights, atol=1e-6), "positive, and the largest first"
    for k, want in enumerate(factors, 1):
        found = d[f"A{k}"].tensor
        assert torch.allclose(found.norm(dim=0), torch.ones(4, dtype=torch.float64))
        assert torch.allclose((found * want).sum(0).abs(), torch.ones(4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cp_of_the_papers_shape_and_rank(seed):
    """Rank 9 of (2, 3, 4) is more than it needs: the normal equations of tensorly's parafac are then singular."""
    T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = cp(T, "i j k", 9, seed)
    assert torch.allclose(d.contract(), T, rtol=1e-3) and relative(d, T) < 1e-6
    assert d["λ"].tensor.max() < 100 * T.norm(), "no large terms that cancel"


def test_cp_at_full_rank_is_exact_and_improves_with_rank():
    T = numbers(3, 4, 5)
    errors = [relative(cp(T, "i j k", rank), T) for rank in (1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[-2]


def test_cp_of_rank_1_is_no_better_than_any_unfolding_allows():
    T = numbers(3, 4, 5)
    bound = max(float((T.norm() ** 2 - torch.linalg.svdvals(M)[0] ** 2).sqrt() / T.norm()) for M in unfoldings(T))
    assert relative(cp(T, "i j k", 1), T) >= bound - 1e-9


def test_cp_is_the_same_for_a_seed_and_another_for_another():
    T = numbers(3, 4, 5)
    one, same, other = (cp(T, "i j k", 3, seed, starts=1) for seed in (0, 0, 1))
    assert all(torch.equal(one[name].tensor, same[name].tensor) for name in ("A1", "A2", "A3", "λ"))
    assert not torch.equal(one["A1"].tensor, other["A1"].tensor)


def test_more_starts_are_never_worse_and_leave_numpys_own_numbers_alone():
    T = numbers(4, 5, 6)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    errors = [relative(cp(T, "i j k", 5, starts=n), T) for n in (1, 3)]
    assert errors[1] <= errors[0] + 1e-12 and (np.random.get_state()[1] == before).all()


def test_cp_scales_with_the_tensor():
    T, _, weights = sum_of_products(3, 4, 5, rank=2, seed=0)
    for scale in (1e-9, 1e9):
        d = cp(scale * T, "i j k", 2)
        assert relative(d, scale * T) < 1e-6 and torch.allclose(d["λ"].tensor, scale * weights, rtol=1e-5)


def test_cp_is_drawn_as_the_papers_picture():
    d = cp(numbers(2, 3, 4), "i j k", 2, name="C")
    found = layout(d)
    assert sorted(s.kind for s in found.shapes) == ["circle", "dot", "square", "square", "square"]
    assert d.ends()["r"] == ["C1", "λ", "C2", "C3"] and len(found.lines) == 7


# ── Tucker ──

def test_tucker_is_exact_at_the_ranks_of_the_unfoldings():
    core = numbers(2, 3, 4)
    T = torch.einsum("abc,ia,jb,kc->ijk", core, numbers(6, 2), numbers(5, 3), numbers(7, 4))
    assert relative(tucker(T, "i j k", [2, 3, 4]), T) < 1e-10 < 1e-3 < relative(tucker(T, "i j k", [2, 2, 4]), T)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (9, 2, 3), (2, 3, 2, 3), (1, 4, 1)])
def test_tucker_at_full_size_is_exact(shape):
    T = numbers(*shape)
    assert relative(tucker(T, LEGS[:2 * len(shape)], shape), T) < 1e-10


@pytest.mark.parametrize("shape, ranks", [((10, 10, 10), (5, 5, 5)), ((6, 5, 4), (1, 2, 3)), ((9, 2, 2), (6, 2, 1)),
                                          ((3, 4, 3, 4), (2, 2, 2, 2))])  # fmt: skip
def test_tucker_has_isometries_and_the_core_that_belongs_to_them(shape, ranks):
    T = numbers(*shape)
    d = tucker(T, LEGS[:2 * len(shape)], ranks)
    projected = T
    for k in range(len(shape)):
        node = d[f"U{k + 1}"]
        assert node.tensor.shape == (shape[k], ranks[k]) and identity(node.tensor) and node.tip == (node.legs[1],)
        projected = torch.tensordot(projected, node.tensor, ([0], [0]))  # its new axis comes last
    assert torch.allclose(d["G"].tensor, projected, atol=1e-10)
    kept, error = d["G"].tensor.norm() ** 2, (d.contract() - T).norm() ** 2
    assert torch.isclose(kept + error, T.norm() ** 2), "what is kept and the error are at right angles"


def test_tucker_is_within_the_bounds_of_the_unfoldings():
    """No better than the worst unfolding allows, no worse than all of them together (de Lathauwer)."""
    T, ranks = numbers(6, 7, 8), (3, 3, 3)
    discarded = [float(torch.linalg.svdvals(M)[r:].square().sum()) for M, r in zip(unfoldings(T), ranks, strict=True)]
    error = float((tucker(T, "i j k", ranks).contract() - T).norm() ** 2)
    assert max(discarded) <= error <= sum(discarded)


def test_tucker_is_the_svd_of_a_matrix():
    M = numbers(6, 5)
    d = tucker(M, "i j", [3, 3])
    assert torch.isclose((d.contract() - M).norm(), torch.linalg.svdvals(M)[3:].norm())


def test_tucker_is_the_same_every_time_and_of_zeros_zero():
    T = numbers(9, 2, 2)
    one, same = tucker(T, "i j k", [6, 2, 2]), tucker(T, "i j k", [6, 2, 2])
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(one.nodes, same.nodes, strict=True))
    zero = tucker(torch.zeros(3, 4, 5), "i j k", [2, 2, 2])
    assert not zero.contract().any() and zero["U1"].tensor.isfinite().all()


def test_tucker_is_drawn_with_triangles_that_point_to_the_core():
    found = layout(tucker(numbers(2, 3, 4), "i j k", [2, 2, 2]))
    at = {s.name: np.array([s.box[0] + s.box[2], s.box[1] + s.box[3]]) / 2 for s in found.shapes}
    assert sorted(s.kind for s in found.shapes) == ["circle", "triangle", "triangle", "triangle"]
    for s in found.shapes:
        if s.kind == "triangle":
            towards = at["G"] - at[s.name]
            assert towards @ (math.cos(s.angle), math.sin(s.angle)) > 0.99 * np.hypot(*towards)


# ── trains ──

@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 4, 5, 2), (1, 3, 1), (2,) * 5])
def test_a_train_is_the_tensor_with_isometries_on_the_left(shape):
    T = numbers(*shape)
    d = train(T, LEGS[:2 * len(shape)])
    assert relative(d, T) < 1e-12 and d.output == tuple(LEGS.split()[:len(shape)])
    for node in d.nodes[:-1]:
        assert node.tip == node.legs[-1:] and identity(node.tensor.flatten(0, -2))
    assert not d.nodes[-1].tip


def test_a_trains_error_is_the_weight_that_its_svds_discard():
    T = numbers(3, 4, 4, 3)
    for rank in (1, 2, 3, 6):
        discarded, rest = 0.0, T.flatten(1)
        for n in (4, 4, 3):
            U, S, V = torch.linalg.svd(rest, full_matrices=False)
            discarded += float(S[rank:].square().sum())
            rest = S[:rank, None] * V[:rank]
            rest = rest.reshape(rest.shape[0] * n, -1)
        d = train(T, "i j k l", rank)
        assert float((d.contract() - T).norm() ** 2) == pytest.approx(discarded)
        assert max(d.sizes[b] for b in ("b1", "b2", "b3")) <= rank
        best = max(float(torch.linalg.svdvals(T.flatten(0, k).flatten(1))[rank:].square().sum()) for k in range(3))
        assert best <= discarded + 1e-12, "no train of that rank is nearer than the worst cut allows"


def test_a_train_of_a_product_and_of_a_state_with_memory():
    v = [numbers(3) for _ in range(4)]
    product = torch.einsum("i,j,k,l->ijkl", *v)
    assert relative(train(product, "i j k l", 1), product) < 1e-12
    chain = torch.einsum("ia,ajb,bkc,cl->ijkl", numbers(3, 2), numbers(2, 3, 2), numbers(2, 3, 2), numbers(2, 3))
    assert relative(train(chain, "i j k l", 2), chain) < 1e-12 < 1e-3 < relative(train(chain, "i j k l", 1), chain)


def test_truncation_at_the_centre_costs_what_is_discarded():
    T = numbers(3, 4, 4, 3)
    d = train(T, "i j k l")
    d = d.gauge("b2", numbers(12, 12)).merge("A2", "X").merge("X⁻¹", "A3").rename(**{"b2′": "b2"})
    for form, at_centre in ((d.canonical("A2X"), True), (d, False)):
        cut = form.decompose("A2X", "b1 j", rank=5, names="A2 S V")
        node = form["A2X"]
        M = node.tensor.movedim(node.legs.index("b2"), 0).flatten(1)
        local, error = torch.linalg.svdvals(M)[5:].norm(), (cut.contract() - T).norm()
        best = torch.linalg.svdvals(T.flatten(0, 1).flatten(1))[5:].norm()
        assert (torch.isclose(error, local) and torch.isclose(error, best)) == at_centre and error > best - 1e-9


def test_a_canonical_form_whatever_the_names():
    """R, and legs with stars, are names that a reader may use as well."""
    T = [numbers(4, 5), numbers(4, 2, 3), numbers(5, 2, 2)]
    d = diagram("a a*, a i j, a* k l -> i j k l", *T, names="R A R*")
    for centre in ("R", "A", "R*"):
        form = d.canonical(centre)
        assert torch.allclose(form.contract(), d.contract()) and form.sizes.keys() == d.sizes.keys()
        assert [node.name for node in form.nodes if not node.tip] == [centre]


# ── what all have in common ──

def three(T, legs):
    return {"cp": cp(T, legs, 2, starts=1), "tucker": tucker(T, legs, [2, 2, 2]), "train": train(T, legs)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    T = numbers(3, 4, 5).to(dtype)
    made = three(T, "i j k") if dtype.itemsize > 2 else {"cp": cp(T, "i j k", 2), "tucker": tucker(T, "i j k", [2] * 3)}
    for how, d in made.items():
        assert {node.tensor.dtype for node in d.nodes} == {dtype} and d.contract().dtype == dtype, how


def test_a_tensor_that_is_a_view_or_wants_a_gradient():
    T = numbers(5, 4, 3).permute(2, 0, 1).requires_grad_()
    for how, d in three(T, "i j k").items():
        assert d.shape() == (3, 5, 4), how
    assert train(T, "i j k").contract().requires_grad, "SVDs have gradients"


def test_legs_with_the_names_of_bonds():
    for how, d in three(numbers(3, 4, 5), "r r1 b1").items():
        assert d.output == ("r", "r1", "b1") and d.shape() == (3, 4, 5), how
    assert relative(train(numbers(3, 4, 5), "b2 x b1"), numbers(3, 4, 5)) < 1e-12


def test_a_diagram_goes_on_from_there():
    """Each is a diagram like any other: its tensors are merged, cut and moved."""
    T = numbers(4, 4, 4)
    d = tucker(T, "i j k", [3, 3, 3])
    assert relative(d.merge("G", "U1").decompose("GU1", "i"), d.contract()) < 1e-12
    assert d.canonical("G")["G"].tensor.norm().isclose(d["G"].tensor.norm())


def twos(T, legs):
    return tucker(T, legs, [2] * len(legs.split()))


@pytest.mark.parametrize("how", [lambda T, legs: cp(T, legs, 2), twos, train], ids=["cp", "tucker", "train"])
@pytest.mark.parametrize("tensor, legs, message", [
    (numbers(2, 3, 4), "i j", "one leg for each axis, here 3, and 'i j' names 2"),
    (numbers(2, 3, 4), "ijk", "names 1; put blanks between them"),
    (numbers(3), "i", "two legs or more, and 'i' names 1"),
    (numbers(2, 2, 2), "i j i", "'i j i' repeats one"),
    (numbers(2, 3, 4).int(), "i j k", r"not torch.int32; tensor.double\(\) makes them"),
    (torch.complex(numbers(2, 2, 2), numbers(2, 2, 2)), "i j k", "not torch.complex128; decompose the real"),
    (np.zeros((2, 2, 2)), "i j k", "takes a torch tensor, not a ndarray; torch.as_tensor makes one"),
    (torch.tensor([[[1.0, torch.nan], [torch.inf, 0]]] * 2), "i j k", "has 4 that are not"),
    (torch.zeros(2, 0, 3), "i j k", r"shape \(2, 0, 3\) has none")])  # fmt: skip
def test_what_cannot_be_taken_apart_is_said(how, tensor, legs, message):
    with pytest.raises(ValueError, match=message):
        how(tensor, legs)


@pytest.mark.parametrize("refused, message", [
    (lambda: cp(numbers(2, 3), "i j", 1), "three legs or more, and 'i j' names 2; Diagram.decompose"),
    (lambda: cp(torch.zeros(2, 2, 2), "i j k", 1), "some entry other than 0"),
    (lambda: cp(numbers(2, 2, 2), "i j k", 0), "a rank of CP is a whole number, 1 or more; not 0"),
    (lambda: cp(numbers(2, 2, 2), "i j k", 1.5), "not 1.5"),
    (lambda: cp(numbers(2, 2, 2), "i j k", 1, starts=0), "the number of starts is a whole number, 1 or more; not 0"),
    (lambda: tucker(numbers(2, 2, 2), "i j k", [2, 2]), r"a rank for each leg, and 'i j k' names 3; not \[2, 2\]"),
    (lambda: tucker(numbers(2, 2, 2), "i j k", 2), "a rank for each leg, and 'i j k' names 3; not 2"),
    (lambda: tucker(numbers(2, 2, 2), "i j k", [2, 3, 2]), "of 'j', is a whole number, from 1 to 2, the leg's size"),
    (lambda: tucker(numbers(2, 2, 2), "i j k", [2, 2, 0]), "here of 'k'"),
    (lambda: train(numbers(2, 2, 2), "i j k", 0), "the rank of a train is a whole number, 1 or more; not 0"),
    (lambda: train(numbers(2, 2, 2), "i j k", True), "not True"),
    (lambda: train(numbers(2, 2), "i j").decompose("A2", "j", rank=0), "a rank is 1 or more"),
    (lambda: train(numbers(2, 2), "i j").decompose("A2", "j", "qr", rank=1), "not 1 with 'qr'"),
    (lambda: train(numbers(2, 2), "i j").decompose("A2", "j", bond="i"), "'i' is a leg already; name it by bond="),
    (lambda: Diagram([Node("M", ("i", "j"))], "ij", {"i": 2, "j": 2}).decompose("M", "i"), "M has none; d.fill")])
def test_refusals_state_rule_offender_and_remedy(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
