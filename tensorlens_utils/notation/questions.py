"""Exercises that are drawn: one for each seed, so that every student has their own, and each judges its own answers.

    kind        asks for                                   its answer
    ----        --------                                   ----------
    legs        the axes of what a diagram stands for      a number
    einsum      the diagram as an einsum                   "ij,jk->ik"
    order       the cheapest order of contraction          ["A B", "AB C"], or its operations
    isometry    which tensors are isometries, and how      {"A": "j"}: the leg at the tip
    gauge       what undoes a gauge                        a matrix
    hole        the derivative by a tensor                 an einsum; at level 1, how many diagrams it is

>>> asked = question("einsum", "Ada Lovelace", level=1)
>>> figure = asked.draw()
>>> asked.check(asked.answer)
>>> asked.check("i,i,i,i->")
Traceback (most recent call last):
AssertionError: an operand for each of A, B, C, with commas between: 3, not 4
"""

import random
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import combinations, pairwise

import numpy as np
import torch
from IPython.display import HTML, display
from matplotlib.figure import Figure
from torch import Tensor

from . import Diagram, Node, diagram
from .drawing import draw

KINDS = ("legs", "einsum", "order", "isometry", "gauge", "hole")


@dataclass(frozen=True, eq=False)
class Question:
    """A question in words, ``text``, about a picture, ``parts`` and ``labels`` as `drawing.draw` takes them; its
    ``answer``, and how one gets there."""

    text: str
    parts: tuple
    answer: object
    explanation: str
    judge: Callable[[object], None] = field(repr=False)  # raises AssertionError, with a hint, for a wrong answer
    labels: str = "names"

    def __str__(self):
        text = re.sub('"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), self.text)  # is not broken
        return "\n".join(textwrap.fill(line, 100) for line in text.split("\n")).replace("\0", " ")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The numbers of what is drawn, by name."""
        nodes = [node for part in self.parts if isinstance(part, Diagram) for node in part.nodes]
        return {node.name: node.tensor for node in nodes if node.tensor is not None}

    def draw(self, **how) -> Figure:
        """The picture; ``how`` as in `drawing.draw`."""
        return draw(*self.parts, **{"labels": self.labels, **how})

    def check(self, answer):
        """Pass over a right answer, raise AssertionError with a hint for a wrong one, as `notebooks.exercise` has it.

        >>> question("legs", 0).check(None)
        Traceback (most recent call last):
        AssertionError: not answered yet
        """
        _must(answer is not None, "not answered yet")
        try:
            self.judge(answer)
        except Exception as error:  # of whatever kind: an answer may be anything
            if isinstance(error, AssertionError):
                raise
            raise AssertionError(f"an answer of another form is asked for, and this one cannot be judged: {error}"
                                 ) from None  # fmt: skip

    def solution(self) -> HTML:
        """The answer and how one gets there, folded away, for a notebook."""
        words = escape(f"{self.answer}\n{self.explanation}").replace("\n", "<br>")
        return HTML(f"<details><summary>answer</summary>{words}</details>")

    def show(self, solution: bool = True):
        """In a notebook: the text, the picture and the folded solution, one below the other."""
        print(self)
        display(self.draw(), *[self.solution()] * solution)


def question(kind: str, seed: int | str, level: int = 2) -> Question:
    """The question that belongs to a seed, on every machine the same.

    Args:
        kind: "legs", "einsum", "order", "isometry", "gauge" or "hole".
        seed: a number, or a name, whose capitals and blanks make no difference.
        level: 1, 2 or 3, the hardest.

    >>> print(question("legs", "Ada Lovelace"))
    How many axes has the tensor that this diagram stands for?
    """
    if kind not in KINDS:
        raise ValueError(f"a question is of one of the kinds {', '.join(KINDS)}; there is no {kind!r}")
    if level not in (1, 2, 3):
        raise ValueError(f"a level is 1, 2 or 3, not {level!r}")
    seed = " ".join(unicodedata.normalize("NFKC", str(seed)).casefold().split())
    r = random.Random(f"{kind} {level} {seed}")  # by a hash of the text, which no session or machine changes
    while not (found := _MAKERS[kind](r, level)):
        pass  # a degenerate one, such as two orders that cost the same: the next
    return found


def sheet(student: int | str, n: int = len(KINDS), level: int = 2, kinds: Sequence[str] = KINDS) -> list[Question]:
    """``n`` questions for a student, by name or number: the ``kinds`` in turn.

    >>> [asked.text for asked in sheet("Ada Lovelace", 2)] == [asked.text for asked in sheet(" ada  lovelace", 2)]
    True
    """
    if not str(student).strip():
        raise ValueError(f"a sheet is somebody's, by a name or a number; not {student!r}")
    if n < 1 or not kinds or isinstance(kinds, str):
        raise ValueError(f"a sheet has at least one question, of a list of kinds; not {n} of {kinds!r}")
    return [question(kinds[k % len(kinds)], f"{student} : {k + 1}", level) for k in range(n)]


# ------------------------------------------------------------------------------------------------- legs and einsums

_ENDS = {"free": 1, "sum": 1, "trace": 1, "loop": 2, "batch": 2, "copy": 3}  # the tensors that a leg is on
_KEPT = ("free", "batch")
_ODD = {1: [""], 2: ["loop", "trace", "batch", "sum"],  # by level
        3: ["loop batch", "loop copy", "trace batch", "trace copy", "sum batch", "sum copy"]}  # fmt: skip
_LETTERS = "abcdefghijkmnpqrstuvwxyz"
_FORM = 'Answer with a text such as "ij,jk->ik"; its letters may be others than the picture\'s.'


def _random(r: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(32)), dtype=torch.float64)


def _network(r: random.Random, n: int, *further: str, sizes: Sequence[int] = (3,)) -> Diagram:
    """A tree of n tensors, and ``further`` legs, by what becomes of them; no tensor has more than four."""
    names, letters = "ABCD"[:n], r.sample(_LETTERS, 12)
    ends = [names[k] + r.choice(names[:k]) for k in range(1, n)]
    ends += ["".join(r.sample(names, _ENDS[what])) * (1 + (what == "trace")) for what in further]
    legs = dict(zip(letters, ends, strict=False))
    own = {name: sorted("".join(leg * at.count(name) for leg, at in legs.items())) for name in names}
    if max(map(len, own.values())) > 4:
        return _network(r, n, *further, sizes=sizes)
    size = {leg: r.choice(sizes) for leg in legs}
    nodes = [Node(name, tuple(own[name]), _random(r, *(size[leg] for leg in own[name]))) for name in names]
    return Diagram(nodes, sorted(x for x, what in zip(letters[n - 1:], further, strict=False) if what in _KEPT))


def _any_network(r: random.Random, level: int) -> Diagram:
    free = ["free"] * r.randint(level > 1, 2)
    return _network(r, r.choice((2, 3)) if level == 1 else level + 1, *free, *r.choice(_ODD[level]).split())


def _names(d: Diagram) -> str:
    return ", ".join(node.name for node in d.nodes)


def _fates(d: Diagram) -> str:
    """What becomes of each leg."""
    told = {leg: f"{leg} (at {', '.join(names)})" for leg, names in sorted(d.ends().items())}
    kept, summed = ([told[leg] for leg in told if (leg in d.output) == free] for free in (True, False))
    return f"Summed over: {', '.join(summed) or 'none'}. With a loose end: {', '.join(kept) or 'none'}."


def _must(right: bool, hint: str):
    """An assertion that neither python -O nor pytest changes."""
    if not right:
        raise AssertionError(hint)


def _whole(answer) -> int:
    answer = answer.item() if hasattr(answer, "item") else answer
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and np.isfinite(answer)
    _must(number and answer == int(answer), f"a whole number, such as 3; not {answer!r}")
    return int(answer)


def _legs(r: random.Random, level: int) -> Question:
    d = _any_network(r, level)
    axes = len(d.output)

    def judge(answer):
        answer = _whole(answer)
        _must(answer == axes or answer != len(d.sizes), "these are all legs; one without a loose end is summed over")
        _must(answer <= axes, "too many: a leg without a loose end is summed over, also where it stops at a dot")
        _must(answer == axes, "too few: each loose end is an axis, also one that comes from a dot")

    return Question("How many axes has the tensor that this diagram stands for?", (d,), axes, "Every loose end is an "
                    f"axis, also that of a dot. A leg without one is summed over. {_fates(d)}", judge)  # fmt: skip


def _einsum(r: random.Random, level: int) -> Question:
    d = _any_network(r, level)
    text = (f"Write this diagram as an einsum of {_names(d)}, in this order. The axes of each tensor, and those of the "
            f"result, are in the alphabetical order of their legs. {_FORM}")  # fmt: skip
    return Question(text, (d,), _written(d), "A leg is one letter at all its ends, also where it goes through a dot; "
                    f"it stands behind the arrow if it has a loose end. {_fates(d)}", partial(_judge_einsum, d))


def _written(d: Diagram) -> str:
    return ",".join("".join(node.legs) for node in d.nodes) + "->" + "".join(d.output)


def _judge_einsum(d: Diagram, answer, when: str = ""):
    _must(isinstance(answer, str), 'an einsum is a text such as "ij,jk->ik"')
    left, arrow, right = answer.replace(" ", "").partition("->")
    plain, operands = left.replace(",", ""), left.split(",")
    _must((plain + right).isalpha() and answer.isascii(), "an einsum is made of letters, commas and one ->")
    right = right if arrow else "".join(sorted(c for c in plain if plain.count(c) == 1))  # as torch.einsum has it
    n = len(d.nodes)
    _must(len(operands) == n, f"an operand for each of {_names(d)}, with commas between: {n}, not {len(operands)}")
    for node, own in zip(d.nodes, operands, strict=True):
        _must(len(own) == len(node.legs), f"{node.name} has {len(node.legs)} legs, and here {len(own)} letters")
    _must(set(right) <= set(plain), "a letter behind the arrow stands before it as well")
    _must(len(set(right)) == len(right), "a letter stands behind the arrow once at most")
    found, want = torch.einsum(f"{left}->{right}", *[node.tensor for node in d.nodes]), d.contract()
    if found.shape == want.shape and torch.allclose(found, want):
        return
    letter: dict[str, str] = {}
    leg: dict[str, str] = {}
    for node, own in zip(d.nodes, operands, strict=True):
        turned = sorted(own) == sorted(node.legs) and own != "".join(node.legs) and set(plain) <= d.sizes.keys()
        _must(not turned, f"the axes of {node.name} are in alphabetical order, and {own} is not")
        for x, c in zip(node.legs, own, strict=True):
            _must(letter.setdefault(x, c) == c, f"{x} is one leg, with one letter at all its ends, and here it is "
                  f"{letter[x]} and, at {node.name}, {c}")  # fmt: skip
            _must(leg.setdefault(c, x) == x, f"{c} stands for two legs, {leg[c]} and, at {node.name}, {x}")
    for x in d.sizes:
        _must(x not in d.output or letter[x] in right, f"{x} has a loose end{when}: it stands behind the arrow as well")
        _must(x in d.output or letter[x] not in right, f"{x} has no loose end{when}: it is summed over, and does not "
              "stand behind the arrow")  # fmt: skip
    raise AssertionError("the axes of the result are in another order than was asked for")


# ------------------------------------------------------------------------------------------------- orders


def _orders(names: Sequence[str]) -> Iterator[list[str]]:
    """All orders in which tensors are contracted pair by pair; a name has a letter for each that went into it."""
    for a, b in combinations(names, 2):
        rest = [name for name in names if name not in (a, b)]
        for order in _orders(sorted([*rest, "".join(sorted(a + b))])) if rest else [[]]:
            yield [f"{a} {b}", *order]


def _order(r: random.Random, level: int) -> Question | None:
    n, *further = {1: (3, "free"), 2: (4, "free", "free"), 3: (4, "free", "free", "loop")}[level]
    d = _network(r, n, *further, sizes=(2, 3, 4, 5, 6, 8, 10))
    costs = {frozenset(order): (d.cost(order).flops, order) for order in _orders("ABCD"[:n])}
    (least, best), (second, _), *_, (most, _) = sorted(costs.values())
    bonds = [tuple(names) for names in d.ends().values() if len(names) == 2]
    if second < 1.1 * least or most < 2 * least or len(set(bonds)) < len(bonds):
        return None  # nearly a tie, or sizes beside parallel lines

    def judge(answer):
        if not isinstance(answer, list | tuple):
            answer = _whole(answer)
            _must(2 * answer != least, "half of it: the additions count as well")
            _must(answer == least or answer not in dict(costs.values()), "another order takes fewer")
            _must(answer == least, "no order takes so many: add up what its steps take, by the rule above")
            return
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in answer]
        _must(all(len(pair) == len(set(pair)) == 2 for pair in pairs), 'two at a time, as in ["A B", "AB C"]')
        try:
            cost = d.cost(pairs).flops
        except ValueError as wrong:
            raise AssertionError(f"this is no order yet: {wrong}") from None
        _must(cost == least, f"this order takes {cost:,} operations, and another one takes fewer")

    text = ("In which order does this diagram take the fewest operations, pair by pair? The sizes of the legs stand "
            "beside their names. A step multiplies as often as the product of the sizes of all legs of its two tensors "
            'says, and adds as often if it sums over any. Answer with the pairs in order, such as ["A B", "AB C"'
            + ", ..." * (n > 3) + "] (A and B give AB), or with the operations of the best order.")
    steps = ", then ".join(f"{' with '.join(step.names)}: {d.price(step)[0]:,}" for step in d.steps(best))
    return Question(text, (d,), best, f"{steps}; in all {least:,} operations. Of the {len(costs)} ways to do it, the "
                    f"second best takes {second:,} and the worst {most:,}.", judge, "all")  # fmt: skip


# ------------------------------------------------------------------------------------------------- isometries, gauges


def _matrix(r: random.Random, what: str, n: int) -> Tensor:
    """A matrix that may be an isometry, with entries that are easily multiplied."""
    turn, plus = torch.tensor([[[6, -8], [8, 6]], [[10, 10], [10, -10]]], dtype=torch.float64) / 10
    Q = torch.kron(plus, plus) / 2 if n == 4 else torch.block_diag(turn, torch.ones(1, 1).to(turn))
    Q = Q[r.sample(range(n), n)][:, r.sample(range(n), n)] * torch.tensor(r.choices((-1, 1), k=n))
    V = Q[:, :r.randrange(2, n)].clone()
    if what == "flipped":
        V[r.randrange(n), 0] *= -1
    return {"wide": V.T, "square": Q, "doubled": 2 * V, "projector": V @ V.T}.get(what, V)


def _with_itself(node: Node, leg: str) -> Tensor:
    """A tensor contracted with itself over all legs but one."""
    M = node.tensor.movedim(node.legs.index(leg), 0).flatten(1)
    return M @ M.T


def _is_one(M: Tensor) -> bool:
    return torch.allclose(M, torch.eye(len(M), dtype=M.dtype))


def _printed(T: Tensor) -> str:
    return np.array2string(T.numpy().round(2) + 0.0, separator=", ").replace("\n\n", "\n")


def _isometry(r: random.Random, level: int) -> Question | None:
    good, bad = ["tall", "wide", "square"], ["flipped", "doubled", "projector"]
    whats = r.sample([r.choice(good), r.choice(bad)], 2) if level == 1 else r.sample(good + bad, 3)
    tensors = [_matrix(r, what, r.choice((3, 4))) for what in whats]
    if level == 3:
        tensors.append(_matrix(r, r.choice(("tall", "flipped")), 4).view(2, 2, -1).movedim(2, r.randrange(3)))
    nodes = [Node("ABCD"[k], tuple("ijk"[:T.dim()]), T) for k, T in enumerate(tensors)]
    tips = {node.name: [leg for leg in node.legs if _is_one(_with_itself(node, leg))] for node in nodes}
    right = {name: " ".join(legs) for name, legs in tips.items() if legs}
    if not 0 < len(right) < len(nodes) or len(tips.get("D", "")) > 1:
        return None

    def judge(answer):
        _must(isinstance(answer, dict), 'a dict, such as {"A": "j"}')
        given = {name: set("".join(legs or "")) - set(" ,") for name, legs in answer.items()}
        _must(given.keys() <= tips.keys(), f"the tensors are {', '.join(tips)}, and not {', '.join(map(str, given))}")
        for node in nodes:
            for leg in sorted(given.get(node.name, ())):
                _must(leg in node.legs, f"{node.name} has the legs {', '.join(node.legs)}, and not {leg}")
                _must(leg in tips[node.name], f"{node.name} has no tip at {leg}: contracted with itself over all other "
                      f"legs it is no identity, but\n{_printed(_with_itself(node, leg))}")  # fmt: skip
        missing = [name for name in right if not given.get(name)]
        _must(not missing, f"right so far; {len(missing)} more to be found")
        _must(all(given[name] == {*tips[name]} for name in right), "one may have its tip at either leg: name both")

    text = ("Which of these tensors are isometries, and at which leg is the tip? Their axes are in the order of the "
            'alphabet. Answer with a dict of the isometries alone, such as {"A": "j"}, or {"A": "i j"} if either leg '
            "may be the tip.\n" + "\n".join(f"{node.name} =\n{_printed(node.tensor)}" for node in nodes))
    why = ("Contracted with itself over all legs but the one at its tip, an isometry is the identity. A matrix has its "
           "tip at j if its columns have length 1 and are at right angles, at i if its rows are so, and may have it at "
           "either if it is square.")
    return Question(text, tuple(Diagram([node], node.legs) for node in nodes), right, why, judge, "all")


def _gauge(r: random.Random, level: int) -> Question | None:
    rows, n = {1: (2, 2), 2: (3, 3), 3: (2, 3)}[level]
    U = torch.tensor(r.choices(range(-2, 4), k=n * n), dtype=torch.float64).view(n, n)
    if U.det().abs().round() != 1:
        return None
    X, Y = U[:rows], U.inverse()[:, :rows].round() + 0.0  # of integers both
    if _is_one(X @ X.T) or _is_one(X[:, :rows] @ X[:, :rows]):
        return None  # Xᵀ would do, or X
    bond = r.choice("ab")
    d = diagram("i a, a j b, b k -> i j k", *[_random(r, *[rows] * k) for k in (2, 3, 2)])
    after = d.insert(bond, ("X", X), ("Y", Y))
    axes = after["Y"].legs

    def judge(answer):
        given = torch.as_tensor(answer, dtype=torch.float64)
        _must(given.shape == Y.shape, f"Y is a matrix of {n} rows and {rows} columns; not {tuple(given.shape)}")
        if not torch.allclose(after.fill(Y=given).contract(), d.contract(), atol=1e-6):
            _must(n > rows or not _is_one(X @ given.T), f"{axes[0]} is the first of the axes: give the transpose")
            raise AssertionError(f"the whole has changed: X·Y must be the identity, and is\n{_printed(X @ given)}")

    text = (f"A gauge puts X on the bond {bond} of a train. Which Y, right behind it, leaves the whole what it was? "
            f"Answer with a list of its rows, or a tensor, {axes[0]} down and {axes[1]} across."
            f"{' Many a Y will do.' * (level > 2)}\nX =\n{_printed(X)}")  # fmt: skip
    why = "With X·Y = 1 on the bond, X and Y are an identity there, which is a line alone: " + (
        "Y is the inverse of X." if level < 3 else "each right inverse of X does, such as its pseudo-inverse.")
    return Question(text, (d, "=", after.fill(Y=None)), Y.tolist(), why, judge)


# ------------------------------------------------------------------------------------------------- holes


def _hole(r: random.Random, level: int) -> Question | None:
    if level == 1:
        return _repeated(r)
    d = _network(r, 3, *["loop"] * r.randint(0, 1)) if level == 2 else _network(
        r, 4, "free", r.choice(("loop", "batch", "copy")))  # fmt: skip
    inner = [node for node in d.nodes if not set(node.legs) & set(d.output)]  # a free leg would leave an identity
    if not inner:
        return None
    node = r.choice(inner)
    hole, = d.hole(node.name)
    text = (f"What is the derivative of this diagram by {node.name}, as an einsum of {_names(hole)} in this order? The "
            "axes of each tensor are in the alphabetical order of their legs. The result has "
            f"{'first the axes of the whole, then ' * (level > 2)}those of {node.name}, in that order too. {_FORM}")
    why = f"Take {node.name} out; its legs, {', '.join(node.legs)}, have a loose end now. {_fates(hole)}"
    judge = partial(_judge_einsum, hole, when=f" once {node.name} is out")
    return Question(text, (d,), _written(hole), why, judge)


def _repeated(r: random.Random) -> Question:
    """A chain or ring in which a tensor stands in several places."""
    name, k, letters = r.choice("PQRVW"), r.randint(2, 4), r.sample(_LETTERS, 7)
    names = [name] * k + ["B", "C"][:r.randint(1, 2)]
    path = letters[:len(names)] + [r.choice((letters[0], letters[len(names)]))]
    numbers = {x: _random(r, 3, 3) for x in sorted(set(names))}
    output = () if path[0] == path[-1] else (path[0], path[-1])
    places = zip(r.sample(names, len(names)), pairwise(path), strict=True)
    d = Diagram([Node(x, legs, numbers[x]) for x, legs in places], output)

    def judge(answer):
        answer = _whole(answer)
        _must(answer != 1, f"a hole in one place is one term of the product rule; {name} stands in others as well")
        _must(answer != len(d.nodes), f"a hole is poked where {name} stands, and not where the others do")
        _must(answer == k, f"a diagram for each place where {name} stands: how many are there?")

    again = [node.name for node in d.nodes if node.name.startswith(name + "′")]
    text = (f"The derivative of this diagram by {name} is a sum of diagrams, by the product rule. Of how many? "
            f"({', '.join(again)} {'is' if k == 2 else 'are'} {name} again.)")  # fmt: skip
    return Question(text, (d,), k, f"One for each place where {name} stands, with a hole there and {name} in all other "
                    "places.", judge)  # fmt: skip


_MAKERS = dict(zip(KINDS, (_legs, _einsum, _order, _isometry, _gauge, _hole), strict=True))
