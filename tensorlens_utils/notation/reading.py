"""Reading the tape of ``linearize`` as diagrams: each recorded call, on symbols in place of numbers.

A value is a sum of diagrams; each of its axes is a list of legs, so that a reshape is bookkeeping and no tensor. One
rule per kind of call (below) says what stands in the picture:

    call                                     in the picture
    ----                                     --------------
    sum of two values                        both diagrams, side by side; a constant addend belongs to B
    linear, addmm, matmul                    a matrix W, or an attention pattern A with its heads, frozen at X
    norm                                     the centring C, and the scale 1/σ or γ/σ on dots, frozen at X
    activation, gate                         its ratio r on dots, frozen at X: a diagonal matrix
    reshape, transpose, cast                 nothing: legs are split, grouped or renamed
    split, index, repeat                     rows of the tensor before, else a selection S
    anything else                            the dense matrix that the call is, under its own name
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from ..linearize.rules import diagonal
from ..linearize.tape import Node as Recorded
from ..linearize.tape import Ref, Tape, leaves
from ..linearize.values import title
from . import Diagram, Node, fresh

LARGEST = 2**26  # entries of a dense matrix for a call that no rule knows


@dataclass(frozen=True)
class Value:
    """A sum of diagrams with the same free legs. Each axis is a list of legs, slowest first; one of length 1 has none.

    Legs are called base#number, so that no two are the same; ``tidy`` gives them names for a reader.
    """

    terms: tuple[Diagram, ...]
    axes: tuple[tuple[str, ...], ...]

    @property
    def sizes(self) -> dict[str, int]:
        return self.terms[0].sizes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[leg] for leg in axis) for axis in self.axes)

    def times(self, node: Node, axes: Sequence[Sequence[str]], **sizes: int) -> "Value":
        """Multiplied by one more tensor; a leg that the new axes leave out is summed over."""
        output = [leg for axis in axes for leg in axis]
        terms = (Diagram((*d.nodes, node), output, {**d.sizes, **sizes}) for d in self.terms)
        return Value(tuple(terms), tuple(map(tuple, axes)))

    def split(self, leg: str, *parts: tuple[str, int]) -> "Value":
        axes = [tuple(x for old in axis for x in ([name for name, _ in parts] if old == leg else [old]))
                for axis in self.axes]  # fmt: skip
        return Value(tuple(d.split(leg, **dict(parts)) for d in self.terms), tuple(axes))

    def arranged(self, axes: Sequence[Sequence[str]]) -> "Value":
        """The same legs on other axes."""
        output = [leg for axis in axes for leg in axis]
        return Value(tuple(d.transpose(*output) for d in self.terms), tuple(map(tuple, axes)))

    def renamed(self, **legs: str) -> "Value":
        axes = tuple(tuple(legs.get(leg, leg) for leg in axis) for axis in self.axes)
        return Value(tuple(d.rename(**legs) for d in self.terms), axes)


def tidy(d: Diagram) -> Diagram:
    """Legs by their bases, the free ones plain and the others with as many primes as tell them apart."""
    bases = {leg: leg.partition("#")[0] for leg in (*d.output, *d.sizes)}
    names: dict[str, str] = {}
    for leg, base in bases.items():
        names[leg] = fresh(base, names.values())
    return d.rename(**names)


def _thick(d: Diagram, axis: tuple[str, ...], into: str) -> Diagram:
    """An axis of several legs as one: by a joint, where they are the stage's, which has no numbers to permute."""
    own = d.nodes[0].legs
    if {*axis} <= {*own} and axis not in [own[k:k + len(axis)] for k in range(len(own))]:
        d, axis = reduce(Diagram.insert, axis, d), [fresh(f"{leg}′", d.sizes) for leg in axis]
    return d.group(" ".join(axis), into)


def called(node: Recorded) -> str:
    return "rules.diagonal" if node.fn is diagonal else title(node.fn).rpartition(".")[2]


def refs(node: Recorded) -> list[Ref]:
    return [x for x in leaves((node.args, node.kwargs)) if isinstance(x, Ref)]


def _sent(node: Recorded, value: Callable[[Ref], Tensor]):
    """What the linear part of a call makes of these values."""
    args, kwargs = node.arguments(lambda x: value(x) if isinstance(x, Ref) else x, linear=True)
    return node.fn(*args, **kwargs)


def _in_order(node: Recorded) -> Recorded:
    """The operands by their places, also those that are given by name."""
    named = [k for k in ("input", "mat1", "mat2", "weight", "other") if k in node.kwargs]
    rest = {k: x for k, x in node.kwargs.items() if k not in named}
    return node._replace(args=(*node.args, *(node.kwargs[k] for k in named)), kwargs=rest)


class Reader:
    """Walks a tape and fills ``stages``, {name: the diagrams that add up to it}; the last one, "Y", is T·X."""

    def __init__(self, tape: Tape, X: Tensor, weights: dict[int, str], unembedding: int | None = None):
        self.weights, self.unembedding, self.like, self.legs, self.names = weights, unembedding, X, 0, Counter()
        self.stages: dict[str, tuple[Diagram, ...]] = {}
        self.d_model = X.shape[-1]
        readers = defaultdict(list)
        for node in filter(None, tape.nodes):
            for ref in refs(node):
                readers[ref.index].append(called(node))
        self.values: dict[int, Value | list[Value]] = {-1: self.symbol("X", X.shape)}
        self.overwritten: set[int] = set()
        kin = {-1: {-1}}  # calls whose outputs may share memory: views, and what is written in place
        for i, node in enumerate(tape.nodes):
            if node is not None:
                value = self.read(node)
                kin[i] = kin[refs(node)[0].index] if refs(node) and (called(node) in VIEWS or node.inplace) else set()
                self.overwritten |= kin[i] if node.inplace else set()
                kin[i].add(i)
                summed = len(readers[i]) == 1 and readers[i][0] in SUMS | {"copy_"}  # it is itself part of a sum
                if isinstance(value, Value) and len(value.terms) > 1 and not summed and i != tape.output.index:
                    value = self.closed(f"x{len(self.stages) + 1}", value)
                self.values[i] = value
        self.closed("Y", self.value(tape.output))

    def value(self, ref: Ref) -> Value:
        if ref.index in self.overwritten:
            raise ValueError("the model writes into a value, then reads another view of it, which no diagram can show")
        found = self.values[ref.index]
        return found if ref.item is None else found[ref.item]

    def leg(self, base: str) -> str:
        self.legs += 1
        return f"{base}#{self.legs}"

    def number(self, kind: str) -> str:
        self.names[kind] += 1
        return f"{kind}{self.names[kind]}"

    def symbol(self, name: str, shape: Sequence[int]) -> Value:
        """A stage as a tensor without numbers: what comes after it is a product with it."""
        bases = ["batch", *["seq"] * (len(shape) - 2), "d_model"][-len(shape):]
        axes = [(self.leg(base),) if n > 1 else () for base, n in zip(bases, shape, strict=True)]
        sizes = {leg: n for axis, n in zip(axes, shape, strict=True) for leg in axis}
        return Value((Diagram([Node(name, (*sizes,))], [*sizes], sizes),), tuple(axes))

    def closed(self, name: str, value: Value) -> Value:
        """A sum becomes a stage, and from here on a symbol."""
        terms = value.terms
        for axis in value.axes:
            if len(axis) > 1:
                terms = [_thick(d, axis, self.leg("d_model")) for d in terms]
        self.stages[name] = tuple(map(tidy, terms))
        return self.symbol(name, value.shape)

    def name(self, tensor: Tensor, kind: str) -> str:
        """A weight's module and block, where the model is known; else its kind and a number."""
        path = self.weights.get(id(tensor), "").removesuffix(".weight").split(".")
        block = next((part for part in path if part.isdigit()), "")
        return f"{path[-1]}.{block}".rstrip(".") if path[-1] else self.number(kind)

    def read(self, node: Recorded) -> Value | list[Value]:
        """One call, by its rule; as the dense matrix that it is, where it has none or the rule does not fit."""
        name = called(node)
        rule = RULES.get(name)
        found = rule(self, _in_order(node)) if rule and (len(refs(node)) == 1 or name in SUMS or node.inplace) else None
        return self.dense(node) if found is None else found

    # -- what rules are made of

    def matrix(self, x: Value, axis: int, W: Tensor, name: str, base: str) -> Value:
        """W (out, in) on one axis."""
        axes, new = [*x.axes], self.leg(base)
        axes[axis] = (new,) if len(W) != 1 else ()
        sizes = [x.sizes[leg] for leg in x.axes[axis]]
        W = W.detach().to(self.like).reshape([len(W)] * len(axes[axis]) + sizes)
        return x.times(Node(name, (*axes[axis], *x.axes[axis]), W), axes)

    def scaled(self, x: Value, factor, name: str) -> Value | None:
        """A factor that broadcasts over x, on dots: a diagonal matrix. None where it makes x larger."""
        weight = isinstance(factor, nn.Parameter)
        factor = torch.as_tensor(factor, dtype=self.like.dtype, device=self.like.device).detach()
        factor = factor[(None,) * (len(x.shape) - factor.dim())] if factor.dim() < len(x.shape) else factor
        if any(n not in (1, m) for n, m in zip(factor.shape, x.shape, strict=True)):
            return None
        legs = [leg for n, axis in zip(factor.shape, x.axes, strict=True) if n != 1 for leg in axis]
        factor = factor.reshape([x.sizes[leg] for leg in legs])
        return x.times(Node(name, tuple(legs), factor, frozen=bool(legs) and not weight), x.axes)

    def reshaped(self, x: Value, shape: Sequence[int]) -> Value | None:
        """Legs dealt out to new axes in order; one that is too long for its axis is split."""
        queue, axes = [leg for axis in x.axes for leg in axis], []
        for n in shape:
            axis: list[str] = []
            while n > 1:
                leg, size = queue[0], x.sizes[queue[0]]
                if n % size and size % n:
                    return None
                if n < size:
                    pair = (self.leg(leg.partition("#")[0]), self.leg("d_head"))
                    x = x.split(leg, (pair[0], n), (pair[1], size // n))
                    queue[:1] = pair
                    continue
                axis.append(queue.pop(0))
                n //= size
            axes.append(axis)
        return x.arranged(axes)

    def selected(self, x: Value, axis: int, rows: Tensor, S: Tensor) -> Value:
        """Some entries along one axis: of the one tensor whose leg it is, else by a matrix S of ones and zeros."""
        (leg,) = x.axes[axis] if len(x.axes[axis]) == 1 else (None,)
        owners = [[node for node in d.nodes if leg in node.legs] for d in x.terms]
        alone = all(len(own) == 1 and own[0].tensor is not None for own in owners)
        if leg and alone and len(rows) > 1 and (rows >= 0).all():
            new = self.leg(leg.partition("#")[0])
            axes = [tuple(new if old == leg else old for old in legs) for legs in x.axes]
            terms = []
            for d, (own,) in zip(x.terms, owners, strict=True):
                kept = own.tensor.index_select(own.legs.index(leg), rows.to(own.tensor.device))
                cut = replace(own, legs=tuple(new if old == leg else old for old in own.legs), tensor=kept)
                nodes = [cut if node is own else node for node in d.nodes]
                sizes = {**d.sizes, new: len(rows)}
                terms.append(Diagram(nodes, [a for legs in axes for a in legs], sizes))
            return Value(tuple(terms), tuple(axes))
        return self.matrix(x, axis, S, "S", x.axes[axis][0].partition("#")[0] if x.axes[axis] else "seq")

    def dense(self, node: Recorded) -> Value:
        """A call as a tensor with the legs of its output and its input: each unit is sent through it."""
        found = None
        for ref in dict.fromkeys(refs(node)):
            x = self.value(ref)
            n = math.prod(x.shape)

            def run(v, ref=ref, x=x):
                return _sent(node, lambda r: v.view(x.shape) if r == ref else self.like.new_zeros(self.value(r).shape))

            out = run(self.like.new_zeros(n))
            if not isinstance(out, Tensor) or not out.numel():
                raise ValueError(f"{title(node.fn)} gives a part without entries, which no diagram shows; leave it out")
            shape = out.shape
            if math.prod(shape) * n > LARGEST:
                raise MemoryError(f"{title(node.fn)} has no picture of its own, and as a matrix it would have "
                                  f"{math.prod(shape):,} × {n:,} entries; take a shorter input")  # fmt: skip
            W = torch.stack([run(unit) for unit in torch.eye(n).to(self.like)], -1)
            axes = [(self.leg("out"),) if m > 1 else () for m in shape]
            legs, inner = ([leg for axis in part for leg in axis] for part in (axes, x.axes))
            sizes = [m for m in shape if m > 1] + [x.sizes[leg] for leg in inner]
            term = x.times(Node(called(node), (*legs, *inner), W.reshape(sizes)), axes)
            found = term if found is None else self.added(found, term)
        return found

    def added(self, a: Value, b: Value) -> Value | None:
        """Two sums as one."""
        if a.shape != b.shape:
            return None
        for mine, other in zip(a.axes, b.axes, strict=True):  # the coarser is split like the finer
            if len(mine) != len(other):
                coarse, fine = (a, b) if len(mine) < len(other) else (b, a)
                finer = self.reshaped(coarse, [fine.sizes[leg] for axis in fine.axes for leg in axis])
                if finer is None:
                    return None
                queue = iter(finer.axes)
                finer = finer.arranged([[leg for _ in axis for leg in next(queue)] for axis in fine.axes])
                return self.added(finer, b) if coarse is a else self.added(a, finer)
        new = {leg: self.leg(leg.partition("#")[0]) for axis in a.axes for leg in axis}
        old = [leg for axis in b.axes for leg in axis]
        a, b = a.renamed(**new), b.renamed(**dict(zip(old, new.values(), strict=True)))
        return Value(tuple(d for d in a.terms + b.terms if 0 not in d.sizes.values()) or a.terms[:1], a.axes)


# ----------------------------------------------------------------------------------------------------------- the rules

RULES: dict[str, Callable[[Reader, Recorded], Value | list[Value] | None]] = {}


def rule(names: str):
    def enter(f):
        RULES.update(dict.fromkeys(names.split(), f))
        return f

    return enter


@rule("add sub rsub __add__ __radd__ __sub__ __rsub__")
def total(reader: Reader, node: Recorded):
    """a ± b: both, side by side; a constant belongs to B."""
    if node.kwargs or len(node.args) > 2:
        return None
    a, b = node.args[::-1] if "rsub" in called(node) else node.args
    negative = "sub" in called(node)
    if not isinstance(a, Ref) or not isinstance(b, Ref):
        x, constant = (reader.value(a), b) if isinstance(a, Ref) else (reader.value(b), a)
        if torch.broadcast_shapes(x.shape, getattr(constant, "shape", ())) != x.shape:
            return None
        return reader.scaled(x, -1.0, "−1") if negative and isinstance(b, Ref) else x
    b = reader.value(b)
    return reader.added(reader.value(a), reader.scaled(b, -1.0, "−1") if negative else b)


SUMS = frozenset(RULES)


@rule("mul multiply __mul__ __rmul__ rules.diagonal")
def product(reader: Reader, node: Recorded):
    """r ⊙ z: a diagonal matrix, a vector on dots."""
    a, b = node.args[:2]
    x, factor = (a, b) if isinstance(a, Ref) else (b, a)
    name = reader.name(factor, "r") if isinstance(factor, Tensor) else f"{factor:g}"
    return reader.scaled(reader.value(x), factor, name)


@rule("div true_divide __truediv__")
def quotient(reader: Reader, node: Recorded):
    """z / c."""
    x, c = node.args[:2]
    if not isinstance(x, Ref) or node.kwargs:
        return None
    if isinstance(c, Tensor):
        return reader.scaled(reader.value(x), 1 / c.to(reader.like), reader.number("r"))  # not in an integer's float32
    return reader.scaled(reader.value(x), 1 / c, f"1/{c:g}")


@rule("neg negative __neg__")
def negated(reader: Reader, node: Recorded):
    """−z."""
    return reader.scaled(reader.value(node.args[0]), -1.0, "−1")


@rule("normalised")
def norm(reader: Reader, node: Recorded):
    """(x − mean x) ⊙ γ/σ: the matrix C = 1 − 𝟙𝟙ᵀ/D on the channels, and the scale on dots."""
    x, scale, _, centre = node.args
    x = reader.value(x)
    if centre is not None:
        if centre not in (-1, (-1,), [-1]):
            return None
        D = x.shape[-1]
        x = reader.matrix(x, -1, torch.eye(D, dtype=torch.float64) - 1 / D, "C", "d_model")
    return reader.scaled(x, scale, "1/σ" if scale.shape[-1] == 1 else "γ/σ")


@rule("linear")
def weight(reader: Reader, node: Recorded):
    """x Wᵀ."""
    return _weighted(reader, node.args[0], node.args[1], node.args[1])


@rule("addmm")
def weight_added(reader: Reader, node: Recorded):
    """b + x W."""
    _, x, W = node.args
    return _weighted(reader, x, W.T, W) if isinstance(x, Ref) and not node.kwargs else None


def _weighted(reader: Reader, x, W: Tensor, known: Tensor):
    base = "vocab" if id(known) == reader.unembedding else "d_model" if len(W) == reader.d_model else "d"
    return reader.matrix(reader.value(x), -1, W, reader.name(known, "W"), base) if isinstance(x, Ref) else None


@rule("matmul __matmul__ bmm mm")
def patterned(reader: Reader, node: Recorded):
    """A v or v A, one matrix for each index of the axes before: heads share a leg, which is a dot."""
    left = isinstance(node.args[1], Ref)
    A, x = node.args[:2] if left else node.args[1::-1]
    if A.dim() == 2 and not left:
        return _weighted(reader, x, A.T, A)
    x, A = reader.value(x), A.detach().to(reader.like)
    ndim = len(x.shape)
    if not 2 <= A.dim() <= ndim:
        return None
    A = (A if left else A.mT)[(None,) * (ndim - A.dim())]  # (..., new, summed)
    batch = [*zip(A.shape[:-2], x.shape, strict=False)]
    if any(n not in (1, m) and m > 1 for n, m in batch):
        return None
    x = x.renamed(**{leg: reader.leg("head") for (n, _), axis in zip(batch, x.axes, strict=False) if n > 1
                     for leg in axis})  # fmt: skip
    at = -2 if left else -1
    summed, axes, sizes = x.axes[at], [*x.axes], dict(x.sizes)
    new = {at: "seq" if left else "d_model"} | {k: "head" for k, (n, m) in enumerate(batch) if n > m}  # all read one v
    for k, base in new.items():
        n = A.shape[-2 if k == at else k]
        axes[k] = (reader.leg(base),) if n > 1 else ()
        sizes |= dict.fromkeys(axes[k], n)
    legs = (*(leg for k, (n, _) in enumerate(batch) if n > 1 for leg in axes[k]), *axes[at], *summed)
    return x.times(Node(reader.number("A"), legs, A.reshape([sizes[leg] for leg in legs]), frozen=True), axes)


@rule("view reshape flatten unflatten ravel squeeze unsqueeze contiguous clone to type type_as float double half "
      "bfloat16 view_as reshape_as")
def reshape(reader: Reader, node: Recorded):
    """The same numbers on other axes: no tensor at all."""
    x = reader.value(refs(node)[0])
    return reader.reshaped(x, _sent(node, lambda _: reader.like.new_zeros(x.shape)).shape)


@rule("copy_")
def written(reader: Reader, node: Recorded):
    """The place of a value that is overwritten: what is written there, a constant being none of X."""
    before, new = node.args[:2]
    return reader.value(new) if isinstance(new, Ref) else reader.scaled(reader.value(before), 0.0, "0")


@rule("transpose permute t T mT swapaxes swapdims movedim moveaxis")
def transpose(reader: Reader, node: Recorded):
    """Axes in another order."""
    x = reader.value(refs(node)[0])
    places = _sent(node, lambda _: torch.empty(*range(2, 2 + len(x.shape)))).shape  # each axis is known by its length
    return x.arranged([x.axes[place - 2] for place in places])


VIEWS = frozenset(name for name, f in RULES.items() if f in (reshape, transpose)) | set(
    "__getitem__ split chunk narrow select unbind expand diagonal split_with_sizes tensor_split".split())


@rule("__getitem__ split split_with_sizes tensor_split chunk narrow select unbind repeat_interleave flip roll "
      "index_select expand cat concat concatenate pad")
def selection(reader: Reader, node: Recorded):
    """Some of the entries along one axis, and zeros: which, the entries' own numbers tell when sent through."""
    x = reader.value(refs(node)[0])
    sent = _sent(node, lambda _: _numbers(x).to(reader.like.device))
    found = [_along_one_axis(reader, x, out.cpu()) for out in ([sent] if isinstance(sent, Tensor) else sent)]
    if any(value is None for value in found):
        return None
    return found[0] if isinstance(sent, Tensor) else found


def _numbers(x: Value) -> Tensor:
    return torch.arange(1.0, math.prod(x.shape) + 1, dtype=torch.float64).view(x.shape)


def _along_one_axis(reader: Reader, x: Value, out: Tensor) -> Value | None:
    """x with the entries numbered in ``out``, if these differ from all of them along one axis alone."""
    if torch.equal(out.flatten(), _numbers(x).flatten()):
        return reader.reshaped(x, out.shape)
    for axis in range(min(len(x.shape), out.dim() + 1)):
        full = out if out.dim() == len(x.shape) else out.unsqueeze(axis)
        if full.dim() == len(x.shape) and full.numel():
            first = full.movedim(axis, 0).flatten(1)[:, 0].long() - 1  # -1 where zero
            rows = torch.where(first < 0, -1, first // math.prod(x.shape[axis + 1:]) % x.shape[axis])
            S = (rows[:, None] == torch.arange(x.shape[axis])).double()
            if torch.equal(torch.tensordot(S, _numbers(x), ([1], [axis])).movedim(0, axis), full):
                return reader.reshaped(reader.selected(x, axis, rows, S), out.shape)
    return None
