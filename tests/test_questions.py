"""Questions with seeds: well-posed, the same each time, right answers pass and wrong ones get a hint."""
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from pictures import clashes

from tensorlens_utils.notation.drawing import page
from tensorlens_utils.notation.geometry import tangles
from tensorlens_utils.notation.questions import KINDS, _orders, question, sheet
from tensorlens_utils.notebooks import exercise
from tensorlens_utils.plotting import PAGE_WIDTH


def hundred(kind):
    """(its level, a question) for a hundred seeds, the levels in turn."""
    return [(1 + seed % 3, question(kind, seed, 1 + seed % 3)) for seed in range(100)]


def refused(asked, answer):
    """The hint for a wrong answer."""
    with pytest.raises(AssertionError) as error:
        asked.check(answer)
    return str(error.value)


def facts(asked):
    return asked.text, repr(asked.parts), asked.answer, asked.explanation, {x: T.tolist() for x, T in
                                                                            asked.tensors.items()}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_the_same_each_time_and_its_own_answer_right(kind):
    seen, made = [], hundred(kind)
    torch.set_default_dtype(torch.float64)  # as a notebook may have it
    try:
        again = hundred(kind)
    finally:
        torch.set_default_dtype(torch.float32)
    for seed, (_, asked) in enumerate(made):
        assert facts(asked) == facts(again[seed][1]), seed
        assert asked.check(asked.answer) is None and exercise(asked.check)(asked.answer) is True
        assert len(asked.text) > 50 and len(asked.explanation) > 20 and str(asked).split() == asked.text.split()
        assert refused(asked, None) == "not answered yet"
        seen.append(repr(facts(asked)[:3]))
    assert len(set(seen)) > 85


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_clear(kind):
    for seed, (_, asked) in enumerate(hundred(kind)):
        found = page(*asked.parts, labels=asked.labels)
        assert not clashes(found) and found.box[2] - found.box[0] <= PAGE_WIDTH, seed
        assert not tangles([line.points for line in found.lines]), seed
        assert max(len(node.legs) for part in asked.parts if part != "=" for node in part.nodes) <= 4, "a cross at most"


def test_questions_do_not_change():
    """Sheets that are handed out stay what they are, whatever the session's hash seed."""
    assert [question(kind, "Ada Lovelace", 2).answer for kind in KINDS] == [
        2, "emx,bex,hm->bh", ["C D", "B CD", "A BCD"], {"B": "i"}, [[-2, 1, 2], [-1, 1, 0], [-2, 1, 1]], "qy,jq->jy"]


# ------------------------------------------------------------------------------------------------- each kind


def wrong_einsums(d, answer):
    """(another answer, words of its hint)"""
    left, _, right = answer.partition("->")
    operands, letters = left.split(","), dict.fromkeys(left.replace(",", ""))
    yield ",".join(operands[1:]) + "->" + right, "an operand for each of" if len(operands) > 1 else "letters, commas"
    yield f"{left}x->{right}", "legs, and here"
    yield f"{left}->{right}ß", "letters, commas and one ->"
    yield f"{left}->{right}Z", "behind the arrow stands before"
    if right:
        yield f"{left}->{right}{right[0]}", "once at most"
        yield f"{left}->{right[1:]}", f"{right[0]} has a loose end"
    if len(right) > 1:
        yield f"{left}->{right[::-1]}", "in another order"
    for x in [x for x in letters if x not in right][:1]:
        yield f"{left}->{right}{x}", f"{x} has no loose end"
    for x in [x for x in letters if left.count(x) > 1][:1]:
        yield left.replace(x, "Z", 1) + "->" + right, f"{x} is one leg, .* Z and"
    for x, y in [*combinations(letters, 2)][:1]:
        if x not in right:
            yield f"{left.replace(x, y)}->{right}", f"{y} stands for two legs"
    for own in [own for own in operands if len(set(own)) > 1][:1]:
        yield left.replace(own, own[::-1], 1) + "->" + right, "in alphabetical order"


@pytest.mark.parametrize("kind", ["einsum", "hole"])
def test_einsums_are_judged_by_what_they_compute(kind):
    hints = 0
    for _, asked in [(level, asked) for level, asked in hundred(kind) if kind == "einsum" or level > 1]:
        letters = {c: chr(ord("A") + k) for k, c in enumerate(dict.fromkeys(asked.answer.replace(",", "")))}
        asked.check("".join(letters[c] if c.isalpha() else c for c in asked.answer).replace(",", " , "))
        for answer, hint in wrong_einsums(asked.parts[0], asked.answer):
            with pytest.raises(AssertionError, match=hint):
                asked.check(answer)
            hints += 1
        assert "is a text such as" in refused(asked, 3) and refused(asked, "->")
        left, _, right = asked.answer.partition("->")
        if right == "".join(sorted(c for c in left if c != "," and left.count(c) == 1)):
            asked.check(left)  # without an arrow, as torch.einsum has it
    assert hints > 400


def test_free_legs_are_counted():
    for _, asked in hundred("legs"):
        d, = asked.parts
        assert asked.answer == d.contract().dim()
        for answer in range(12):
            assert answer == asked.answer or refused(asked, answer).startswith(("too many", "too few", "these are all"))
        asked.check(torch.tensor(asked.answer))
        asked.check(float(asked.answer))
        assert "a whole number" in refused(asked, asked.answer + 0.5) and "a whole number" in refused(asked, "2")
    assert {asked.answer for _, asked in hundred("legs")} >= {0, 1, 2, 3}


def test_the_cheapest_order_is_the_only_one():
    assert [len({*map(tuple, _orders("ABCD"[:n]))}) for n in (2, 3, 4)] == [1, 3, 18]
    for _, asked in hundred("order"):
        d, = asked.parts
        least, ways = d.cost(asked.answer).flops, {}
        for order in _orders([node.name for node in d.nodes]):
            ways.setdefault(d.cost(order).flops, []).append(order)
            if d.cost(order).flops > least:
                assert "another one takes fewer" in refused(asked, order)
        assert min(ways) == least == d.cost("best").flops and len({frozenset(order) for order in ways[least]}) == 1
        asked.check(least)
        asked.check([pair.split()[::-1] for pair in asked.answer])
        assert "half of it" in refused(asked, least // 2) and "no order takes so many" in refused(asked, 10 * max(ways))
        assert "another order takes fewer" in refused(asked, max(ways))
        assert "no order yet" in refused(asked, asked.answer[:-1]) and "no order yet" in refused(asked, ["A Z"])
        assert "two at a time" in refused(asked, ["A B C"]) and "two at a time" in refused(asked, ["A A"])


def test_isometries_are_those():
    for _, asked in hundred("isometry"):
        for name, T in asked.tensors.items():
            legs = "ijk"[:T.dim()]
            assert torch.allclose(T, T.round(decimals=2), rtol=0, atol=1e-12), "what is printed is all there is"
            for leg in legs:
                twice = torch.einsum(f"{legs},{legs.replace(leg, 'z')}->{leg}z", T, T)
                is_one = torch.allclose(twice, torch.eye(len(twice), dtype=T.dtype))
                assert is_one == (leg in asked.answer.get(name, "")), (name, leg)
                if not is_one:
                    assert f"{name} has no tip at {leg}" in refused(asked, {**asked.answer, name: leg})
        name, legs = next(iter(asked.answer.items()))
        rest = {x: y for x, y in asked.answer.items() if x != name}
        assert "more to be found" in refused(asked, rest) and "more to be found" in refused(asked, rest | {name: None})
        if len(legs) > 1:
            assert "name both" in refused(asked, rest | {name: legs[0]})
        asked.check({x: [*y.replace(" ", "")] for x, y in asked.answer.items()})
        assert "has the legs" in refused(asked, {"A": "q"}) and "and not Z" in refused(asked, {"Z": "i"})
        assert 'a dict, such as' in refused(asked, "A")


def test_a_gauge_is_undone_by_its_right_inverses_alone():
    for level, asked in hundred("gauge"):
        X, Y = asked.tensors["X"], torch.tensor(asked.answer, dtype=torch.float64)
        assert torch.equal(X @ Y, torch.eye(len(X), dtype=torch.float64))
        asked.check(torch.linalg.pinv(X))
        asked.check(Y.float() if level < 3 else (Y + torch.linalg.svd(X).Vh[-1:].T).numpy())
        for wrong in [torch.eye(*Y.shape), X.T, 2 * Y, 0 * Y] + [X] * (level < 3):
            assert "must be the identity" in refused(asked, wrong)
        if level == 3:
            assert "3 rows and 2 columns" in refused(asked, Y.T)
        elif not torch.equal(Y, Y.T):
            assert "the transpose" in refused(asked, Y.T)


def test_a_hole_is_the_derivative():
    for level, asked in hundred("hole"):
        d, = asked.parts
        if level == 1:
            name = asked.text.split(" by ")[1][0]
            assert asked.answer == len(d.hole(name)) and f"{name}{'′' * (asked.answer - 1)}" in asked.tensors
            for answer in {0, 1, 5, len(d.nodes)}:
                assert name in refused(asked, answer)
            continue
        name = asked.text.split(" by ")[1][0]
        want = torch.autograd.functional.jacobian(lambda T, d=d, name=name: d.fill(**{name: T}).contract(),
                                                  d[name].tensor)  # fmt: skip
        rest = [node.tensor for node in d.nodes if node.name != name]
        assert torch.allclose(torch.einsum(asked.answer, *rest), want)


BAD = [True, False, float("nan"), float("inf"), 1 + 0j, object(), torch.tensor([1.0, 2.0]), [1, 2], [None], [["A", 1]],
       "", "abc", "ab,bc->ac->", {}, {"A": 3}, {"A": ["j", 2]}, {"A": True}, {1: "j"}, [[1, 2], [3]],
       [[1 + 1j, 0], [0, 1]]]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_answered_is_judged(kind):
    for level in (1, 2, 3):
        asked = question(kind, "x", level)
        for answer in BAD:
            assert len(refused(asked, answer)) > 15, (kind, level, answer)
    one = next(asked for _, asked in hundred("legs") if asked.answer == 1)
    assert one.check(1) is None and "a whole number, such as 3; not True" in refused(one, True)


# ------------------------------------------------------------------------------------------------- sheets


def test_a_sheet_is_a_students_own():
    mine, again, other = sheet("Zoë  Müller", 8), sheet("zoe\u0308 mu\u0308ller ", 8), sheet(7, 8)
    assert [facts(a) for a in mine] == [facts(b) for b in again]
    assert all(facts(a)[1:3] != facts(b)[1:3] for a, b in combinations([*mine, *other], 2))
    assert len(sheet(1)) == len(KINDS) and [asked.labels for asked in sheet(1, 2, 1, ["order"])] == ["all", "all"]


def test_a_question_shows_itself(capsys):
    plt.close("all")
    asked = question("order", 1)
    asked.show(solution=False)
    assert capsys.readouterr().out.startswith(str(asked)) and max(map(len, str(asked).split("\n"))) <= 100
    assert '["A B", "AB C", ...]' in str(asked).replace(",\n", ", ") and len(plt.get_fignums()) == 1
    plt.close("all")
    told = question("einsum", 1).solution().data
    assert told.startswith("<details>") and question("einsum", 1).answer.replace(">", "&gt;") in told


@pytest.mark.parametrize("refused, message", [
    (lambda: question("rank", 0), "one of the kinds legs, .*; there is no 'rank'"),
    (lambda: question("legs", 0, 4), "a level is 1, 2 or 3, not 4"),
    (lambda: sheet("Ada", kinds=["rank"]), "there is no 'rank'"),
    (lambda: sheet(" "), "somebody's, by a name or a number; not ' '"),
    (lambda: sheet("Ada", 0), "at least one question.*not 0"),
    (lambda: sheet("Ada", kinds="legs"), "a list of kinds.*'legs'")])  # fmt: skip
def test_refusals_state_rule_and_offender(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
