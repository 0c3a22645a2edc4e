"""Diagrams: contraction against torch.einsum, the code that they print, a reader's moves, decompositions, refusals."""
import random

import einops
import pytest
import torch
from pictures import numbers, showcase

from tensorlens_utils.notation import Diagram, Node, bubble, diagram
from tensorlens_utils.notation.decompositions import train
from tensorlens_utils.notation.drawing import describe, draw, stages
from tensorlens_utils.notation.printing import _identifiers, code

A, B = numbers(2, 3), numbers(3, 4)
PRODUCT = diagram("i j, j k -> i k", A=A, B=B)


def close(a, b):
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))
                                       if a.numel() else True)


def expression(seed):
    """Two to ten tensors of up to six legs: repeated legs, scalars, outer products, legs of many ends, sums alone."""
    r = random.Random(seed)
    n = r.randint(2, 10)
    pool = [chr(97 + k) for k in range(r.randint(2, min(16, 3 * n)))]
    sizes = {leg: r.choice([1, 2, 2, 3]) for leg in pool}
    legs = [[r.choice(pool) for _ in range(r.choice([0, 1, 1, 2, 2, 3, 3, 4, 6]))] for _ in range(n)]
    legs[0] = legs[0] or pool[:1]
    used = sorted({leg for own in legs for leg in own})
    output = r.sample(used, r.randint(0, min(4, len(used))))
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn([sizes[leg] for leg in own], generator=generator, dtype=torch.float64) for own in legs]
    return legs, output, tensors


@pytest.mark.parametrize("block", range(10))
def test_contraction_and_printed_code_give_what_einsum_gives(block):
    for seed in range(100 * block, 100 * block + 100):
        legs, output, tensors = expression(seed)
        spaced = ", ".join(" ".join(own) for own in legs) + " -> " + " ".join(output)
        d = diagram(spaced, *tensors)
        want = torch.einsum(",".join("".join(own) for own in legs) + "->" + "".join(output), *tensors)
        held = {node.name: tensor for node, tensor in zip(d.nodes, tensors, strict=True)}
        space = {**held, "torch": torch, "einops": einops}
        steps = code(d, "torch")
        exec(steps, space)
        found = {"best": d.contract(), "left to right": d.contract("left to right"),
                 "einsum": eval(code(d, "einsum"), dict(space)), "einops": eval(code(d, "einops"), dict(space)),
                 "torch": space[steps.splitlines()[-1].split(" =")[0]]}  # fmt: skip
        wrong = [how for how, tensor in found.items() if not close(tensor, want)]
        assert not wrong, (seed, spaced, wrong)


@pytest.mark.parametrize("kind", ["einsum", "einops", "torch"])
def test_printed_names_are_told_apart(kind):
    """AB is a tensor of its own, and what A and B contract to; j′ and jp would both be spelt jp."""
    d = diagram("i j′, j′ jp, jp k -> i k", numbers(2, 3), numbers(3, 4), numbers(4, 2), names="A B AB")
    space = {node.name: node.tensor for node in d.nodes} | {"torch": torch, "einops": einops}
    lines = code(d, kind, "left to right").splitlines()
    for line in lines[:-1]:
        exec(line, space)
    assert close(eval(lines[-1].partition(" = ")[2] or lines[-1], space), d.contract())


def test_expressions_are_read_in_both_ways():
    assert repr(diagram("ij,jk->ik", A, B)) == repr(PRODUCT) == "Diagram(A(i j), B(j k) -> i k)"
    assert diagram("kj,ij", numbers(4, 3), A).output == ("i", "k"), "as einsum sorts free legs"
    assert [n.name for n in diagram("i, i, i -> i", *[numbers(2)] * 3, names="v v v").nodes] == ["v", "v′", "v′′"]
    assert diagram("i j -> i", M=None, sizes={"i": 2, "j": 3, "unused": 5}).sizes == {"i": 2, "j": 3}


def test_the_price_is_counted_step_by_step():
    chain = diagram("i j, j k, k l -> i l", A=None, B=None, C=None, sizes={"i": 2, "j": 3, "k": 4, "l": 5})
    cost = chain.cost(["B C", "A BC"])
    assert (cost.flops, cost.largest) == (2 * 60 + 2 * 30, 15) and "B · C" in str(cost)
    assert sum(chain.price(step)[0] for step in chain.steps()) == chain.cost().flops <= cost.flops
    assert [step.name for step in chain.steps(["B C", "BC A"])] == ["BC", "ABC"]
    assert chain.cost("left to right").flops == 2 * 24 + 2 * 40


def test_the_ladder_is_cheap_one_way_and_dear_the_other():
    ladder = showcase()["ladder"]
    rail = ["A1 A2", "A1A2 A3", "A1A2A3 A4", "A1A2A3A4 A5"]
    rail += [f"{'A1A2A3A4A5' + ''.join(f'B{j}' for j in range(1, k))} B{k}" for k in range(1, 6)]
    assert ladder.cost(rail).largest == 2**5 and ladder.cost().largest <= 2**3


def test_moves_change_the_picture_and_not_the_tensor():
    want = PRODUCT.contract()
    assert close(want, A @ B)
    for moved in (PRODUCT.insert("j"), PRODUCT.insert("i"), PRODUCT.gauge("j", numbers(3, 3)),
                  PRODUCT.gauge("j", numbers(3, 5)), PRODUCT.merge("A", "B"), PRODUCT.look(A="matrix"),
                  PRODUCT.group("i k", "both").split("both", i=2, k=4)):  # fmt: skip
        assert close(moved.contract(), want)
    assert PRODUCT.gauge("j", numbers(3, 5)).sizes["j′"] == 5, "a rectangular gauge makes the bond larger"
    assert close(PRODUCT.transpose("k", "i").contract(), want.T)
    assert close(PRODUCT.group("i k", "both").contract(), want.flatten())
    assert close(PRODUCT.rename(i="a").contract(), want) and PRODUCT.rename(i="a").output == ("a", "k")
    assert close(PRODUCT.insert("k", ("M", numbers(4, 2))).contract(), want @ numbers(4, 2))
    assert close(PRODUCT.join(diagram("k", v=numbers(4))).contract(), want @ numbers(4))


def test_grouped_legs_of_a_bond_are_reshaped():
    d = diagram("a b c, b c -> a", C=numbers(2, 3, 4), D=numbers(3, 4))
    grouped = d.group("b c", "bc")
    assert repr(grouped) == "Diagram(C(a bc), D(bc) -> a)" and grouped.grouped == {"bc"}
    assert close(grouped.contract(), d.contract()) and close(grouped.split("bc", b=3, c=4).contract(), d.contract())


def test_legs_may_have_any_name():
    d = diagram("output self, self leg -> output leg", A=A, B=B)
    assert close(d.group("output leg", "name").split("name", output=2, leg=4).contract(), A @ B)


def test_joined_diagrams_keep_their_inner_legs_apart():
    cube, P = PRODUCT.join(diagram("k j′, j′ l -> k l", C=numbers(4, 5), D=numbers(5, 2))), (A @ B)
    assert {"j", "j′"} < set(cube.sizes)
    again = diagram("l j, j k, k m -> l m", E=numbers(2, 3), F=numbers(3, 4), G=numbers(4, 6))
    joined = cube.join(again)  # its j meets a j and a j′, its k a k, and none of them is the same leg
    assert len(joined.sizes) == 8 and joined.output == ("i", "m")
    assert close(joined.contract(), P @ numbers(4, 5) @ numbers(5, 2) @ numbers(2, 3) @ numbers(3, 4) @ numbers(4, 6))


def test_a_pin_takes_one_value_of_a_leg():
    T, v = numbers(2, 3, 2), numbers(3)
    d = diagram("i j i′, j, j k -> i i′ k", T=T, v=v, M=numbers(3, 4))
    whole = sum(d.pin("j", k).contract() for k in range(3))
    assert close(whole, d.contract()) and close(d.pin("i", -1).contract(), d.contract()[-1])
    square = bubble(PRODUCT, torch.square, "square")
    assert close(square.pin("i", 1).contract(), (A @ B)[1] ** 2)
    assert diagram("i j, j -> i", A=None, v=None, sizes={"i": 2, "j": 3}).pin("j", 0)["A"].legs == ("i",)
    with pytest.raises(ValueError, match="a pin takes a leg of i j k and a place on it, not 'j' and 3"):
        PRODUCT.pin("j", 3)


def test_a_joint_may_be_split_otherwise():
    d = PRODUCT.group("i k", "both")
    assert close(d.split("both", a=4, b=2).contract(), (A @ B).reshape(4, 2))
    assert len(d.split("both", a=2, b=4).nodes) == 2, "grouping, undone"


def test_traces_and_wires():
    M = numbers(3, 3)
    assert close(Diagram([Node("M", ("i", "j"), M)], "ij").trace("i", "j").contract(), M.trace())
    wire = Diagram([Node("1", ("i", "j"), kind="wire")], ("i", "j"), {"i": 3, "j": 3})
    assert torch.equal(wire.contract(), torch.eye(3)) and wire.trace("i", "j").contract() == 3
    assert wire.join(diagram("j k", M=M)).contract().dtype == torch.float64


@pytest.mark.parametrize("expression, shapes, name", [
    ("i j, j k -> i k", [(2, 3), (3, 4)], "A"), ("i j, j k -> i k", [(2, 3), (3, 4)], "B"),
    ("i i, i -> i", [(3, 3), (3,)], "A"), ("i j -> i", [(2, 3)], "A"), ("i i ->", [(3, 3)], "A"),
    ("i, i* k, i* -> i k", [(2,), (2, 3), (2,)], "A"),
    ("i r, j r, k r -> i j k", [(2, 3), (2, 3), (4, 3)], "B")])  # fmt: skip
def test_a_hole_is_the_derivative(expression, shapes, name):
    tensors = [numbers(*shape) for shape in shapes]
    d = diagram(expression, *tensors)
    at = "AB".index(name)

    def value(x):
        return d.fill(**{name: x}).contract()

    holes = d.hole(name)
    assert close(sum(hole.contract() for hole in holes), torch.autograd.functional.jacobian(value, tensors[at]))


def test_a_tensor_that_stands_twice_has_two_holes():
    v = numbers(3).requires_grad_()
    d = diagram("i, i j, j ->", v, numbers(3, 3), v, names="v M v")
    gradient, = torch.autograd.grad(d.contract(), v)
    assert len(d.hole("v")) == 2 and close(sum(hole.contract() for hole in d.hole("v")), gradient)


def test_decompositions_multiply_back_and_truncate_optimally():
    d = Diagram([Node("M", ("i", "j", "k"), numbers(3, 4, 5))], "ijk")
    M = d.contract()
    for how, legs in (("svd", "i k"), ("svd", "j"), ("qr", "j"), ("qr", "i j")):
        assert close(d.decompose("M", legs, how).contract(), M)
    cut = d.decompose("M", "i", rank=2)
    dropped = torch.linalg.svdvals(M.reshape(3, -1))[2:]
    assert torch.isclose((cut.contract() - M).norm(), dropped.norm()), "the discarded weight (Eckart-Young)"


def test_trains_are_exact_and_their_canonical_form_has_isometries_towards_the_centre():
    T = numbers(2, 3, 4, 5, 2)
    d = train(T, "a b c d e")
    assert close(d.contract(), T)
    for centre in ("A1", "A3", "A5"):
        form = d.canonical(centre)
        assert close(form.contract(), T) and torch.isclose(form[centre].tensor.norm(), T.norm())
        assert [node.name for node in form.nodes if not node.tip] == [centre]
        for node in form.nodes:
            if node.tip:
                rest = [leg for leg in node.legs if leg not in node.tip]
                V = node.tensor.permute([node.legs.index(leg) for leg in (*rest, *node.tip)]).flatten(0, len(rest) - 1)
                assert close(V.T @ V, torch.eye(V.shape[1], dtype=V.dtype))


def test_a_bubble_is_contracted_first():
    W, x, U = numbers(4, 3), numbers(3), numbers(4, 2)
    d = bubble(diagram("i j, j -> i", W=W, x=x), torch.relu, "relu").join(diagram("i k -> i k", U=U))
    assert d.output == ("k",) and close(d.contract(), torch.relu(W @ x) @ U)
    frozen = bubble(diagram("i j, j -> i", W=W, x=x), torch.relu, "relu", frozen=True)
    assert frozen["relu"].frozen and close(frozen.contract(), torch.relu(W @ x))


SHARED = diagram("i j, j k, k l -> i l", numbers(2, 3), numbers(3, 4), numbers(4, 2), names="A B AB")
WIRED = PRODUCT.insert("j")  # A(i j), a wire (j j′), B(j′ k)
LOOP = Diagram([Node("1", ("i", "j"), kind="wire"), Node("1", ("j", "i"), kind="wire"), Node("A", ("k", "l"), A)],
               "kl", {"i": 3, "j": 3})  # fmt: skip
BUBBLE = bubble(diagram("i j, j -> i", W=numbers(4, 3), x=numbers(3)), torch.tanh, "tanh")
V = numbers(3)


@pytest.mark.parametrize("d, want", [
    (lambda: PRODUCT.gauge("j", numbers(3, 3)).gauge("j", numbers(3, 5)), A @ B),
    (lambda: PRODUCT.gauge("i", numbers(2, 2)).gauge("i", A), A @ B),
    (lambda: PRODUCT.insert("j").insert("j").insert("j′"), A @ B),
    (lambda: diagram("i j, j j′, j′ k -> i k", A, numbers(3, 3), B).gauge("j", numbers(3, 3)), A @ numbers(3, 3) @ B),
    (lambda: LOOP, 3 * A), (lambda: LOOP.merge("1", "1′"), 3 * A),
    (lambda: WIRED.merge("1"), A @ B), (lambda: WIRED.merge("1", "A"), A @ B),
    (lambda: WIRED.split("j", a=1, b=3), A @ B), (lambda: WIRED.split("j′", a=3, b=1), A @ B),
    (lambda: WIRED.group("j", "g"), A @ B), (lambda: PRODUCT.insert("i").group("i′ k", "g"), (A @ B).flatten()),
    (lambda: PRODUCT.insert("i").split("i′", a=2, b=1), (A @ B).view(2, 1, 4)),
    (lambda: diagram("i j", numbers(3, 3)).trace("i", "j").group("i j", "g"), numbers(3, 3).trace()),
    (lambda: BUBBLE.join(diagram("i k", M=torch.ones(4, 2, dtype=torch.int64))), BUBBLE.contract().sum().expand(2)),
    (lambda: BUBBLE.join(diagram("i", z=numbers(4) + 1j)), (BUBBLE.contract() * (numbers(4) + 1j)).sum()),
    (lambda: diagram("i ->", V).merge("A").hole("A")[0], torch.ones(()))])  # fmt: skip
def test_moves_that_once_went_wrong(d, want):
    assert close(d().contract().to(want.dtype), want)


def test_another_tensor_of_the_same_name_has_no_part_in_a_hole():
    d = diagram("i j", A=A).join(diagram("j k", A=B))
    assert [hole.shape() for hole in d.hole("A")] == [(2, 4, 2, 3)]
    assert close(d.hole("A")[0].contract(), torch.autograd.functional.jacobian(lambda x: x @ B, A))


def test_what_stands_twice_stands_twice_also_after_a_split():
    v = numbers(4)
    twice = diagram("i, i, k -> k", v, v, numbers(4), names="v v w")
    for moved in (twice.split("k", a=2, b=2), twice.split("i", a=2, b=2), twice.group("i", "g")):
        assert len(moved.hole("v")) == 2


def test_steps_are_told_apart_where_their_names_would_be_the_same():
    shown = [part[0] for part in stages(SHARED, "left to right") if isinstance(part, tuple)]
    assert [[node.name for node in d.nodes] for d in shown] == [["AB′", "AB"], ["ABAB"]]
    assert all(close(d.contract(), SHARED.contract()) for d in shown)


@pytest.mark.parametrize("name", "X⁻¹,V†,A′,W₁,σ²,in,lambda,torch,1/σ,½,a b,µ,*,éA".split(","))
@pytest.mark.parametrize("kind", ["einsum", "einops", "torch"])
def test_code_with_odd_names_runs(name, kind):
    C = numbers(4, 5)
    d = Diagram([Node(name, ("in", "x₁"), A), Node("Ap", ("x₁", "x1"), B), Node("μ", ("x1", "def"), C)], ["in", "def"])
    d = d.group("in def", "g")  # by a joint, which has no name
    names = _identifiers(node.name for node in d.operands()[0]).values()
    space = {"torch": torch, "einops": einops, **dict(zip(names, (A, B, C), strict=False))}
    lines = code(d, kind).splitlines()
    exec("\n".join(lines[:-1]), space)
    assert close(eval(lines[-1].rpartition(" = ")[2], space), (A @ B @ C).flatten())


def test_a_diagram_is_told_in_words():
    assert describe(PRODUCT.group("i k", "ik")) == PRODUCT.group("i k", "ik").describe() == (
        "Tensors: A, B. A and B share j (3); i and k are grouped into ik. Free legs: ik (8).")
    assert WIRED.describe() == "Tensors: A, B. j and j′ are joined. Free legs: i (2), k (4)."
    assert PRODUCT.describe() == "Tensors: A, B. A and B share j (3). Free legs: i (2), k (4)."
    assert diagram("i i ->", numbers(3, 3)).describe().endswith("No free leg: a number.")
    assert "A1, an isometry" in train(numbers(2, 2), "i j").describe()
    assert "relu, frozen, which takes in W x." in bubble(diagram("i j, j -> i", W=numbers(4, 3), x=numbers(3)),
                                                         torch.relu, "relu", frozen=True).describe()  # fmt: skip


@pytest.mark.parametrize("refused, message", [
    (lambda: diagram("i j, j k -> i k", A=A, B=A), "one size at all its ends; 'j' has 3 and, at B, 2"),
    (lambda: diagram("i -> j", A=numbers(2)), "belongs to a tensor; 'j' is on none of A"),
    (lambda: diagram("i -> i i", A=numbers(2)), "comes once, and i i repeats one"),
    (lambda: diagram("i, j", A), "one operand for each tensor; 'i, j' has 2, not 1"),
    (lambda: diagram("i j k", A), "one leg for each axis; A of shape"),
    (lambda: diagram("i j", A=None), "'i' has neither"),
    (lambda: diagram("i j", A=None, sizes={"i": 2, "j": 3}).contract(), "A has none; d.fill"),
    (lambda: PRODUCT["Z"], "the tensors are A, B; there is no 'Z'"),
    (lambda: PRODUCT.fill(Z=A), "there is no 'Z'"),
    (lambda: PRODUCT.path(["A Z"]), "there is no 'Z' to contract by then"),
    (lambda: PRODUCT.path("worst"), "not 'worst'"),
    (lambda: diagram("i j, j k, k l", A, B, numbers(4, 2)).path(["A B"]), "ends with C, AB still apart"),
    (lambda: code(PRODUCT, "numpy"), "not 'numpy'"),
    (lambda: PRODUCT.rename(i="k"), "is not another's"),
    (lambda: PRODUCT.transpose("i"), "each once"),
    (lambda: PRODUCT.trace("i", "j"), "not 'i' and 'j'"),
    (lambda: PRODUCT.group("i j", "x"), "'i j' do neither"),
    (lambda: PRODUCT.split("i", a=2, b=2), "'i' has 2"),
    (lambda: PRODUCT.split("k", i=2, b=2), "'i' is a leg already"),
    (lambda: PRODUCT.gauge("j", numbers(3, 2)), "at least as many"),
    (lambda: PRODUCT.hole("Z"), "there is no 'Z'"),
    (lambda: PRODUCT.decompose("A", "i j"), "in two; not 'i j'"),
    (lambda: PRODUCT.decompose("A", "i", "lu"), "not 'lu'"),
    (lambda: PRODUCT.bond("A", "A"), "share 2 legs"),
    (lambda: train(numbers(2, 2, 2), "a b c").join(diagram("a c", numbers(2, 2), names="Z")).canonical("A1"),
     "only a tree has a canonical form"),
    (lambda: diagram("i, j -> i j", V, V).canonical("A"), "of a connected network, and B is not joined to A"),
    (lambda: diagram("i j, j k -> k", A, B).canonical("B"), "each leg joins two tensors or is free, and 'i' does not"),
    (lambda: diagram("b i, b j -> b i j", A, A).canonical("B"), "each leg joins two .* 'b' does not"),
    (lambda: diagram("i i j, j k -> k", numbers(2, 2, 3), B).canonical("A"), "each leg joins two .* 'i' does not"),
    (lambda: PRODUCT.merge("A", "A"), "each once; not A A"), (lambda: PRODUCT.merge(), "each once; not none"),
    (lambda: PRODUCT.path(["A A"]), "a step takes each tensor once; not A A"),
    (lambda: PRODUCT.trace("i", "k"), "a wire joins legs of one size"),
    (lambda: PRODUCT.gauge("j", torch.ones(3, 3)), "X has dependent rows"),
    (lambda: PRODUCT.gauge("j", torch.eye(3).int()), "a gauge is of float32, .* and X is torch.int32"),
    (lambda: PRODUCT.group("i k", "j"), "'j' is a leg already"),
    (lambda: PRODUCT.group("i i", "g"), "some of i j k, each once; not 'i i'"),
    (lambda: BUBBLE.join(diagram("i k", W=numbers(4, 2))).hole("W"), "linear, and W is in the bubble tanh; freeze it"),
    (lambda: BUBBLE.split("i", a=2, b=2), "the legs of a bubble are those that leave what it holds"),
    *[(move, "the legs are i, j, k; there is no 'z'") for move in (
        lambda: PRODUCT.rename(z="q"), lambda: PRODUCT.split("z", a=1), lambda: PRODUCT.insert("z"),
        lambda: PRODUCT.insert("z", ("M", A)), lambda: PRODUCT.gauge("z", numbers(3, 3)))],
    (lambda: PRODUCT.look(Z="matrix"), "the tensors are A, B; there is no 'Z'"),
    (lambda: PRODUCT.look(A="hexagon"), "the kinds are tensor, matrix; there is no 'hexagon'"),
    (lambda: PRODUCT.pin("i", 0.5), "not 'i' and 0.5"), (lambda: PRODUCT.pin("i", True), "not 'i' and True"),
    (lambda: diagram("ij,jk", A, B, names="A B C"), "a name for each tensor; 'A B C' has 3, not 2"),
    (lambda: diagram("ij,jk", A, B, names="A"), "a name for each tensor; 'A' has 1, not 2"),
    (lambda: PRODUCT.decompose("A", "i", rank=1.5), "a rank is 1 or more, a whole number.*not 1.5"),
    (lambda: PRODUCT.decompose("A", "i", names="U V"), "one for each tensor that svd gives; not 'U V'"),
    (lambda: PRODUCT.fill(A=A.int()).decompose("A", "i"), "of float32, .* and A is torch.int32; A.double"),
    (lambda: train(A.half(), "i j"), "of float32, float64 or complex numbers, and A1 is torch.float16"),
    (lambda: draw(), "a figure is of diagrams.*not of nothing"), (lambda: draw(PRODUCT, 3), "not of 3"),
    (lambda: draw([PRODUCT]), "not of \\[Diagram"), (lambda: draw((PRODUCT, "a", "b")), "not of \\(Diagram"),
    (lambda: draw(PRODUCT, colours={"A": "red"}), "a place in plotting.PALETTE, such as 2; not 'red'")])  # fmt: skip
def test_refusals_state_rule_and_offender(refused, message):
    with pytest.raises((ValueError, KeyError), match=message):
        refused()
