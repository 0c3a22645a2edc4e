"""What a tensor diagram is, and how it is contracted: step by step, in any order, at a price.

The moves that turn one diagram into another are in notation.py, where ``Diagram`` is.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One tensor of a diagram: its name, its legs in the order of its axes, and its numbers where it has any.

    ``kind``    "tensor", a circle; "matrix", a square; "wire", an identity, which is drawn as a line alone; "joint",
                an identity that groups legs into its last one, drawn as the place where lines merge into a thick one
    ``tip``     of an isometry, a triangle: the legs at its tip. Contracted with itself over all others it is the
                identity there.
    ``inner``   what a nonlinearity ``fn`` takes in, drawn in a bubble: the numbers are fn(inner.contract())
    ``frozen``  the numbers were computed once and stay: a dashed edge
    """

    name: str
    legs: tuple[str, ...]
    tensor: Tensor | None = None
    kind: str = "tensor"
    tip: tuple[str, ...] = ()
    inner: "Contraction | None" = None
    fn: Callable[[Tensor], Tensor] | None = None
    frozen: bool = False

    def numbers(self, sizes: Mapping[str, int]) -> Tensor | None:
        if self.tensor is None and self.kind in ("wire", "joint"):
            shape = [sizes[leg] for leg in self.legs]
            return torch.eye(math.isqrt(math.prod(shape))).view(shape)
        return self.fn(self.inner.contract()) if self.tensor is None and self.inner is not None else self.tensor


class Step(NamedTuple):
    """One step of a contraction: the tensors that it takes, the legs of each, the legs that are left, and the name of
    what it gives: those of its tensors, as the diagram has them in order."""

    names: tuple[str, ...]
    taken: tuple[tuple[str, ...], ...]
    legs: tuple[str, ...]
    positions: tuple[int, ...]
    name: str


class Cost(NamedTuple):
    """What a contraction takes: floating-point operations, the entries of the largest intermediate, and a table."""

    flops: int
    largest: int
    table: str

    def __str__(self):
        return self.table


class Contraction:
    """A network of tensors: ``nodes``, the ``output`` legs in order, the ``sizes`` of all legs, the ``grouped`` ones.

    Raises ValueError where a leg has two sizes or none, or an output leg no end.
    """

    def __init__(self, nodes: Iterable[Node], output: Sequence[str], sizes: Mapping[str, int] | None = None,
                 grouped: Iterable[str] = ()):  # fmt: skip
        self.nodes = _primed(tuple(nodes))
        self.output, self.sizes = tuple(output), dict(sizes or {})
        for node in self.nodes:
            given = node.tensor.shape if node.tensor is not None else ()
            if node.inner is not None:
                given = [node.inner.sizes[leg] for leg in node.inner.output]
            if node.tensor is not None and node.tensor.dim() != len(node.legs):
                raise ValueError(f"a tensor has one leg for each axis; {node.name} of shape {tuple(node.tensor.shape)} "
                                 f"has the legs {' '.join(node.legs) or 'none'}")  # fmt: skip
            if node.inner is not None and len(given) != len(node.legs):
                raise ValueError(f"the legs of a bubble are those that leave what it holds, and {node.name} holds a "
                                 f"tensor with {' '.join(node.inner.output)}; insert a joint behind it, or merge it")
            for leg, size in zip(node.legs, given, strict=False):
                if self.sizes.setdefault(leg, size) != size:
                    raise ValueError(f"a leg has one size at all its ends; {leg!r} has {self.sizes[leg]} and, at "
                                     f"{node.name}, {size}")  # fmt: skip
        ends = self.ends()
        if len(set(self.output)) < len(self.output):
            raise ValueError(f"an output leg comes once, and {' '.join(self.output)} repeats one; join two by a wire")
        if stray := [leg for leg in self.output if leg not in ends]:
            raise ValueError(f"an output leg belongs to a tensor; {stray[0]!r} is on none of "
                             f"{', '.join(node.name for node in self.nodes)}")  # fmt: skip
        if unknown := [leg for leg in ends if leg not in self.sizes]:
            raise ValueError(f"a leg has a size, from its tensor's shape or from sizes=; {unknown[0]!r} has neither")
        for node in self.nodes:
            *parts, last = (self.sizes[leg] for leg in node.legs) if node.kind in ("wire", "joint") else (1,)
            if math.prod(parts) != last:
                raise ValueError(f"a wire joins legs of one size, a joint all its legs into the last; here {node.legs} "
                                 f"have {parts} and {last}")
        self.sizes = {leg: size for leg, size in self.sizes.items() if leg in ends}  # others are no legs of this one
        self.grouped = frozenset(grouped) & self.sizes.keys()

    # -- reading

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"the tensors are {', '.join(node.name for node in self.nodes)}; there is no {name!r}")

    def _check_legs(self, *legs: str):
        known("legs", legs, self.sizes)

    def ends(self) -> dict[str, list[str]]:
        """The names of the tensors at the ends of each leg."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for leg in node.legs:
                found.setdefault(leg, []).append(node.name)
        return found

    def bond(self, *names: str) -> str:
        """The one leg that joins these tensors."""
        shared = [leg for leg in self[names[0]].legs if all(leg in self[name].legs for name in names[1:])]
        if len(shared) != 1:
            raise ValueError(f"{' and '.join(names)} share {len(shared)} legs ({' '.join(shared)}), not one; name it")
        return shared[0]

    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[leg] for leg in self.output)

    def __repr__(self):
        parts = ", ".join(f"{node.name}({' '.join(node.legs)})" for node in self.nodes)
        return f"{type(self).__name__}({parts} -> {' '.join(self.output)})"

    def describe(self) -> str:
        """The diagram in words, for those who cannot see it."""
        tensors = [n for n in self.nodes if n.kind not in ("wire", "joint")]
        ends = {leg: [n.name for n in tensors for x in n.legs if x == leg] for leg in self.sizes}
        inside = [f"{' and '.join(dict.fromkeys(names))} share {leg} ({self.sizes[leg]})"
                  for leg, names in ends.items() if len(names) > 1]  # fmt: skip
        inside += [f"{' and '.join(n.legs)} are joined" if n.kind == "wire" else
                   f"{' and '.join(n.legs[:-1])} are grouped into {n.legs[-1]}"
                   for n in self.nodes if n.kind in ("wire", "joint")]  # fmt: skip
        free = [f"{leg} ({self.sizes[leg]})" for leg in self.output]
        return ". ".join(filter(None, (
            f"Tensors: {', '.join(n.name + _aside(n) for n in tensors)}",
            "; ".join(inside), f"Free legs: {', '.join(free)}" if free else "No free leg: a number",
        ))) + "."  # fmt: skip

    # -- contraction

    def operands(self) -> tuple[list[Node], dict[str, str]]:
        """The tensors that a contraction multiplies, and what each leg is called in it: a wire renames, if it can."""
        stands = {leg: leg for leg in self.sizes}
        nodes = []
        for node in self.nodes:
            a, *others = {stands[leg]: None for leg in node.legs} if node.kind == "wire" else (None, None)
            free = [leg for leg in (a, *others) if leg in self.output]
            if node.kind == "wire" and len(free) < 2 and others:
                keep = free[0] if free else a
                stands = {leg: keep if other in (a, *others) else other for leg, other in stands.items()}
            elif node.kind != "wire" or others:
                nodes.append(node)
        if set(stands.values()) - {stands[leg] for node in nodes for leg in node.legs} or not nodes:  # wires alone
            return list(self.nodes), {leg: leg for leg in self.sizes}
        return nodes, stands

    def path(self, order="best") -> list[tuple[int, ...]]:
        """``order`` as opt_einsum's list of positions: "best", "left to right", or pairs such as ["A B", "AB C"]."""
        nodes, stands = self.operands()
        if not nodes:
            return []
        if order == "best":
            letters = {leg: opt_einsum.get_symbol(i) for i, leg in enumerate(self.sizes)}
            inputs = ["".join(letters[stands[leg]] for leg in node.legs) for node in nodes]
            expression = ",".join(inputs) + "->" + "".join(letters[leg] for leg in self.output)
            shapes = [tuple(self.sizes[leg] for leg in node.legs) for node in nodes]
            return opt_einsum.contract_path(expression, *shapes, shapes=True, optimize="auto")[0]
        if order == "left to right":
            return [(0,)] if len(nodes) == 1 else [(0, 1), *((0, k) for k in range(len(nodes) - 2, 0, -1))]
        if isinstance(order, str):
            raise ValueError(f'order is "best", "left to right" or a list of pairs such as ["A B"], not {order!r}')
        held, path = [(k,) for k in range(len(nodes))], []
        for pair in order:
            names = _joined(nodes, held)
            pair = pair.split() if isinstance(pair, str) else pair
            if len({*pair}) < len(pair):
                raise ValueError(f"a step takes each tensor once; not {' '.join(pair)}")
            if unknown := [name for name in pair if name not in names]:
                raise ValueError(f"there is no {unknown[0]!r} to contract by then; there are {', '.join(names)}")
            path.append(tuple(sorted(names.index(name) for name in pair)))
            held.append(tuple(sorted(k for i in reversed(path[-1]) for k in held.pop(i))))
        if len(held) > 1:
            raise ValueError(f"the order ends with {', '.join(_joined(nodes, held))} still apart; add a pair for each")
        return path or [(0,)]

    def steps(self, order="best") -> Iterator[Step]:
        """The contraction, step by step."""
        nodes, stands = self.operands()
        held = [((k,), tuple(stands[leg] for leg in node.legs)) for k, node in enumerate(nodes)]
        path = self.path(order)
        for k, positions in enumerate(path):
            positions = tuple(sorted(positions))
            taken = [held.pop(i) for i in reversed(positions)][::-1]
            wanted = {*self.output, *(leg for _, legs in held for leg in legs)}
            legs = tuple(dict.fromkeys(leg for _, own in taken for leg in own if leg in wanted))
            legs = self.output if k == len(path) - 1 else legs
            parts, own = zip(*taken, strict=True)
            held.append((tuple(sorted(k for part in parts for k in part)), legs))
            yield Step(_joined(nodes, parts), own, legs, positions, *_joined(nodes, [held[-1][0]]))

    def contract(self, order="best") -> Tensor:
        """The tensor that the diagram stands for, its axes in the order of ``output``."""
        nodes, _ = self.operands()
        if not nodes:
            return torch.ones(())  # a product of nothing
        held = [node.numbers(self.sizes) for node in nodes]
        if empty := [node.name for node, tensor in zip(nodes, held, strict=True) if tensor is None]:
            raise ValueError(f"a contraction needs numbers, and {', '.join(empty)} has none; d.fill({empty[0]}=...) "
                             "gives them, and d.cost() and code(d) need none")  # fmt: skip
        given = [x for node, x in zip(nodes, held, strict=True) if node.kind not in ("wire", "joint")] or held
        dtype = reduce(torch.promote_types, (x.dtype for x in given))
        held = [x.to(given[0].device, dtype) for x in held]
        for step in self.steps(order):
            tensors = [held.pop(i) for i in reversed(step.positions)][::-1]
            number = {leg: i for i, leg in enumerate(dict.fromkeys(leg for legs in step.taken for leg in legs))}
            pairs = [part for tensor, legs in zip(tensors, step.taken, strict=True)
                     for part in (tensor, [number[leg] for leg in legs])]  # fmt: skip
            held.append(torch.einsum(*pairs, [number[leg] for leg in step.legs]))
        return held[0]

    def price(self, step: Step) -> tuple[int, int]:
        """The floating-point operations of one step, and the entries of what it gives."""
        union = {leg for legs in step.taken for leg in legs}
        products, size = (math.prod(self.sizes[leg] for leg in legs) for legs in (union, step.legs))
        return products * (len(step.names) - 1) + (products if len(union) > len(step.legs) else 0), size

    def cost(self, order="best") -> Cost:
        """What contracting takes in that order, step by step: a multiplication and an addition for each product."""
        rows, flops, largest = [], 0, 0
        for step in self.steps(order):
            work, size = self.price(step)
            flops, largest = flops + work, max(largest, size)
            rows.append(f"{' · '.join(step.names):28}{' '.join(step.legs) or 'a number':28}{work:>16,}{size:>14,}")
        return Cost(flops, largest, "\n".join([
            f"{'contract':28}{'legs left':28}{'operations':>16}{'entries':>14}", *rows,
            f"{'in all; the largest':56}{flops:>16,}{largest:>14,}"]))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- names


def _aside(node: Node) -> str:
    """What else a description says of a tensor."""
    inner = f", which takes in {' '.join(n.name for n in node.inner.nodes)}" if node.inner else ""
    return (", an isometry" if node.tip else "") + (", frozen" if node.frozen else "") + inner


def _primed(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Names that come twice get primes: V, V′."""
    seen: set[str] = set()
    out = []
    for node in nodes:
        name = fresh(node.name, seen)
        seen.add(name)
        out.append(node if name == node.name else replace(node, name=name))
    return tuple(out)


def known(what: str, names: Iterable[str], among: Iterable[str]):
    """Refuses names that are none of those."""
    if unknown := [name for name in names if name not in among]:
        raise ValueError(f"the {what} are {', '.join(among) or 'none'}; there is no {unknown[0]!r}")


def fresh(name: str, taken: Container[str]) -> str:
    """A name that is not taken: this one, with as many primes as that needs."""
    while name in taken:
        name += "′"
    return name


def _joined(nodes: Sequence[Node], groups: Iterable[tuple[int, ...]]) -> tuple[str, ...]:
    return tuple("".join(nodes[k].name for k in group) for group in groups)
