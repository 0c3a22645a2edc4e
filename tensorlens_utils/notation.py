"""Tensor diagrams: one object that is contracted, priced, printed (printing.py) and drawn (drawing.py), so that none of
these can disagree.

A tensor is a node, each of its axes a leg with a name. A leg that two tensors share is summed over, and drawn as a line
between them; a leg of the output is free, and reaches out to the side. A leg with more ends than two is a copy tensor,
drawn as a dot: at all its ends the index is the same. (Graphical tensor notation for interpretability, 2402.01790.)

>>> A, B = torch.randn(2, 3), torch.randn(3, 4)
>>> d = diagram("i j, j k -> i k", A=A, B=B)
>>> bool(torch.allclose(d.contract(), A @ B))
True
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    inner: "Diagram | None" = None
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


class Diagram:
    """A network of tensors: ``nodes``, the ``output`` legs in order, the ``sizes`` of all legs, the ``grouped`` ones.

    Raises ValueError where a leg has two sizes or none, or an output leg no end.
    """

    def __init__(self, nodes: Iterable[Node], output: Sequence[str], sizes: Mapping[str, int] | None = None,
                 grouped: Iterable[str] = ()):  # fmt: skip
        self.nodes, self.grouped = _primed(tuple(nodes)), frozenset(grouped)
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
        self.sizes = {leg: size for leg, size in self.sizes.items() if leg in ends}  # others are no legs of this one

    # -- reading

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"the tensors are {', '.join(node.name for node in self.nodes)}; there is no {name!r}")

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
        return f"Diagram({parts} -> {' '.join(self.output)})"

    def describe(self) -> str:
        """The diagram in words, for those who cannot see it."""
        ends, tensors = self.ends(), [n for n in self.nodes if n.kind not in ("wire", "joint")]
        inside = [f"{' and '.join(dict.fromkeys(names))} share {leg} ({self.sizes[leg]})"
                  for leg, names in ends.items() if len(names) > 1]  # fmt: skip
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
        missing = set(self.output) - {stands[leg] for node in nodes for leg in node.legs}
        if missing or not nodes:  # nothing but wires: a trace of the identity, say
            return list(self.nodes), {leg: leg for leg in self.sizes}
        return nodes, stands

    def path(self, order="best") -> list[tuple[int, ...]]:
        """``order`` as opt_einsum's list of positions: "best", "left to right", or pairs such as ["A B", "AB C"]."""
        nodes, stands = self.operands()
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
        held = [node.numbers(self.sizes) for node in nodes]
        if empty := [node.name for node, tensor in zip(nodes, held, strict=True) if tensor is None]:
            raise ValueError(f"a contraction needs numbers, and {', '.join(empty)} has none; d.fill({empty[0]}=...) "
                             "gives them, and d.cost() and code(d) need none")  # fmt: skip
        like = next((node.tensor for node in nodes if node.tensor is not None), held[0])
        held = [tensor.to(like) if node.tensor is None else tensor for node, tensor in zip(nodes, held, strict=True)]
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

    # -- a reader's moves; each gives another diagram

    def _with(self, nodes: Iterable[Node], output: Sequence[str] | None = None, /, **sizes: int) -> "Diagram":
        nodes = tuple(nodes)
        output = self.output if output is None else output
        used = {*output, *(leg for node in nodes for leg in node.legs)}
        kept = {leg: size for leg, size in {**self.sizes, **sizes}.items() if leg in used}
        return Diagram(nodes, output, kept, self.grouped & kept.keys())

    def _replaced(self, name: str, /, *nodes: Node, **sizes: int) -> "Diagram":
        self[name]
        new = [n for node in self.nodes for n in (nodes if node.name == name else (node,))]
        return self._with(new, **sizes)

    def fill(self, /, **tensors: Tensor) -> "Diagram":
        """The same diagram with numbers."""
        for name in tensors:
            self[name]
        return self._with(replace(node, tensor=tensors.get(node.name, node.tensor)) for node in self.nodes)

    def look(self, /, **kinds: str) -> "Diagram":
        """The same diagram with tensors drawn as another kind: "tensor" (a circle) or "matrix" (a square)."""
        return self._with(replace(node, kind=kinds.get(node.name, node.kind)) for node in self.nodes)

    def rename(self, /, **legs: str) -> "Diagram":
        """The same diagram with legs of other names; an inner leg that is called so already gets a prime."""
        new = {leg: legs.get(leg, leg) for leg in self.sizes}
        for leg in self.sizes.keys() - legs.keys() - {*self.output}:
            while Counter(new.values())[new[leg]] > 1:
                new[leg] += "′"
        if len(set(new.values())) < len(new):
            raise ValueError("a free leg's new name is not another's; two legs are joined by trace() or join()")
        nodes = [replace(node, legs=tuple(new[leg] for leg in node.legs), tip=tuple(new[leg] for leg in node.tip))
                 for node in self.nodes]  # fmt: skip
        sizes = {new[leg]: n for leg, n in self.sizes.items()}
        return Diagram(nodes, [new[leg] for leg in self.output], sizes, [new[leg] for leg in self.grouped])

    def transpose(self, *legs: str) -> "Diagram":
        """The output's legs in another order: all of them, by name."""
        if sorted(legs) != sorted(self.output):
            raise ValueError(f"a transpose names the output's legs, {' '.join(self.output)}, each once; not {legs}")
        return self._with(self.nodes, legs)

    def trace(self, a: str, b: str) -> "Diagram":
        """Two output legs joined, and summed over."""
        if a == b or not {a, b} <= set(self.output):
            raise ValueError(f"a trace joins two of the output's legs, {' '.join(self.output)}; not {a!r} and {b!r}")
        return self._with([*self.nodes, Node("1", (a, b), kind="wire")], [x for x in self.output if x not in (a, b)])

    def pin(self, leg: str, index: int) -> "Diagram":
        """One value of a leg, such as one head: the leg is gone, and every tensor on it shows that slice alone."""
        if leg not in self.sizes or not -self.sizes[leg] <= index < self.sizes[leg]:
            raise ValueError(f"a pin takes a leg of {' '.join(self.sizes)} and a place on it, not {leg!r} and {index}")
        nodes = []
        for node in self.nodes:
            tensor = node.numbers(self.sizes) if leg in node.legs else node.tensor
            for axis in reversed([k for k, x in enumerate(node.legs) if x == leg] if tensor is not None else []):
                tensor = tensor.select(axis, index)
            if leg in node.legs:
                kept, tip = (tuple(x for x in legs if x != leg) for legs in (node.legs, node.tip))
                node = replace(node, legs=kept, tensor=tensor, kind="tensor", tip=tip, inner=None, fn=None)
            nodes.append(node)
        return self._with(nodes, [x for x in self.output if x != leg])

    def join(self, other: "Diagram", output: Sequence[str] | None = None) -> "Diagram":
        """Both diagrams side by side; an output leg of both is summed over, unless ``output`` names it."""
        taken = {*self.sizes, *other.sizes}
        first, other = self._apart({*other.output}, taken), other._apart({*self.sizes}, taken)
        both = [leg for leg in (*first.output, *other.output) if (leg in first.output) != (leg in other.output)]
        sizes, grouped = {**other.sizes, **first.sizes}, first.grouped | other.grouped
        return Diagram((*first.nodes, *other.nodes), both if output is None else output, sizes, grouped)

    def _apart(self, others: set[str], taken: set[str]) -> "Diagram":
        """Inner legs that are called like some of another diagram get primes; what is ``taken`` grows."""
        names = {}
        for leg in self.sizes:
            if leg in others and leg not in self.output:
                names[leg] = leg
                while names[leg] in taken:
                    names[leg] += "′"
                taken.add(names[leg])
        return self.rename(**names)

    def merge(self, *names: str, name: str | None = None) -> "Diagram":
        """Some of the tensors contracted into one."""
        inside = [self[n] for n in names]
        outside = {*self.output, *(leg for node in self.nodes if node.name not in names for leg in node.legs)}
        legs = tuple(dict.fromkeys(leg for node in inside for leg in node.legs if leg in outside))
        part = self._with(inside, legs)
        known = all(node.numbers(self.sizes) is not None for node in inside)
        new = Node(name or "".join(names), legs, part.contract() if known else None)
        rest = [node for node in self.nodes if node.name not in names]
        at = min(i for i, node in enumerate(self.nodes) if node.name in names)
        return self._with([*rest[:at], new, *rest[at:]])

    def group(self, legs: str, into: str) -> "Diagram":
        """Some legs as one, the first slowest: by reshaping the tensors that have them all, else by a joint on output
        legs."""
        parts = tuple(legs.split())
        size = math.prod(self.sizes[leg] for leg in parts)
        whole = [node for node in self.nodes if set(parts) <= set(node.legs)]
        inside = all(len(names) == sum(leg in node.legs for node in whole) for leg in parts
                     for names in [self.ends()[leg]])  # fmt: skip
        free = [leg in self.output for leg in parts]
        if inside and (all(free) or not any(free)):
            nodes = [_grouped(node, parts, into) if node in whole else node for node in self.nodes]
        elif all(free):
            nodes = [*self.nodes, Node("", (*parts, into), kind="joint")]
        else:
            raise ValueError(f"grouped legs are all output legs, or all join the same tensors; {legs!r} do neither")
        first = next((i for i, leg in enumerate(self.output) if leg in parts), 0)
        output = [leg for leg in self.output if leg not in parts]
        if all(free):
            output.insert(first, into)
        found = self._with(nodes, output, **{into: size})
        return Diagram(found.nodes, found.output, found.sizes, found.grouped | {into})

    def split(self, leg: str, /, **parts: int) -> "Diagram":
        """One leg as several, the first slowest."""
        if math.prod(parts.values()) != self.sizes[leg]:
            raise ValueError(f"the parts of a leg multiply to its size: {leg!r} has {self.sizes[leg]}, not {parts}")
        joint = next((node for node in self.nodes if node.kind == "joint" and node.legs[-1] == leg), None)
        if joint and self.ends()[leg] == [joint.name] and [self.sizes[x] for x in joint.legs[:-1]] == [*parts.values()]:
            output = [x for old in self.output for x in (joint.legs[:-1] if old == leg else (old,))]
            apart = self._with([node for node in self.nodes if node is not joint], output)  # grouping, undone
            return apart.rename(**dict(zip(joint.legs, parts, strict=False)))
        if clash := [x for x in parts if x in self.sizes and x != leg]:
            raise ValueError(f"the parts of a leg have names of their own, and {clash[0]!r} is a leg already")
        nodes = []
        for node in self.nodes:
            legs = tuple(x for old in node.legs for x in (tuple(parts) if old == leg else (old,)))
            tip = tuple(x for old in node.tip for x in (tuple(parts) if old == leg else (old,)))
            sizes = {**self.sizes, **parts}
            tensor = node.tensor if node.tensor is None else node.tensor.reshape([sizes[x] for x in legs])
            nodes.append(replace(node, legs=legs, tip=tip, tensor=tensor) if leg in node.legs else node)
        output = [x for old in self.output for x in (tuple(parts) if old == leg else (old,))]
        return self._with(nodes, output, **parts)

    def insert(self, leg: str, *matrices: tuple[str, Tensor]) -> "Diagram":
        """Matrices (name, numbers) on a line, from its first end to its second or to the output; none: an identity."""
        new = [f"{leg}{'′' * (k + 1)}" for k in range(max(1, len(matrices)))]
        chain = [leg, *new]
        if leg in self.output and len(self.ends()[leg]) == 1:
            nodes, output = list(self.nodes), [new[-1] if x == leg else x for x in self.output]
        else:
            name = self.ends()[leg][-1]
            nodes, output = [node for node in self.nodes if node.name != name], self.output
            last = self[name]
            at = len(last.legs) - 1 - last.legs[::-1].index(leg)
            legs = (*last.legs[:at], new[-1], *last.legs[at + 1:])
            tip = tuple(new[-1] if x == leg else x for x in last.tip)
            nodes.insert([n.name for n in self.nodes].index(name), replace(last, legs=legs, tip=tip))
        sizes = {x: M.shape[1] for x, (_, M) in zip(new, matrices, strict=False)} or {new[0]: self.sizes[leg]}
        put = [Node(n, (chain[k], chain[k + 1]), M, "matrix") for k, (n, M) in enumerate(matrices)]
        return self._with([*nodes, *(put or [Node("1", (leg, new[0]), kind="wire")])], output, **sizes)

    def gauge(self, leg: str, X: Tensor, name: str = "X") -> "Diagram":
        """X·X⁻¹ on a line, which changes nothing of the whole. X (rows, columns) may have more columns than rows: its
        pseudo-inverse then undoes it, and the bond grows."""
        if X.dim() != 2 or X.shape[0] > X.shape[1] or X.shape[0] != self.sizes[leg]:
            raise ValueError(f"a gauge on {leg!r} is ({self.sizes[leg]}, at least as many), not {tuple(X.shape)}")
        return self.insert(leg, (name, X), (f"{name}⁻¹", torch.linalg.pinv(X)))

    def hole(self, name: str) -> list["Diagram"]:
        """The derivative by a tensor: the diagram with that tensor taken out, whose legs become free, one such diagram
        for each place where the same tensor (by its name up to primes) stands. Their contractions add up to it."""
        holes = []
        for node in self.nodes:
            if node.name.rstrip("′") != name.rstrip("′"):
                continue
            rest, freed = [n for n in self.nodes if n.name != node.name], []
            sizes = dict(self.sizes)
            for k, leg in enumerate(node.legs):
                if leg in (*self.output, *node.legs[:k]):  # both ends are free now: they are joined by a wire
                    freed.append(leg + "*" * (1 + node.legs[:k].count(leg)))
                    sizes[freed[-1]] = self.sizes[leg]
                    rest.append(Node("1", (leg, freed[-1]), kind="wire"))
                else:
                    freed.append(leg)
                    if not any(leg in other.legs for other in rest):  # it was summed over by this tensor alone
                        rest.append(Node("1s", (leg,), torch.ones(self.sizes[leg], dtype=node.tensor.dtype)))
            holes.append(self._with(rest, (*self.output, *freed), **sizes))
        if not holes:
            self[name]
        return holes

    def decompose(self, name: str, legs: str, how: str = "svd", rank: int | None = None, bond: str | None = None,
                  names: str | None = None) -> "Diagram":  # fmt: skip
        """A tensor split in two by SVD, U·diag(S)·V, or by QR, with ``legs`` on the first side and all others on the
        second; ``rank`` keeps the largest singular values alone (Eckart-Young: no other choice is nearer)."""
        node = self[name]
        left = tuple(legs.split())
        right = tuple(leg for leg in node.legs if leg not in left)
        if not left or not right or not set(left) <= set(node.legs):
            raise ValueError(f"a decomposition splits the legs {' '.join(node.legs)} of {name} in two; not {legs!r}")
        if node.tensor is None:
            raise ValueError(f"a decomposition needs numbers, and {name} has none; d.fill({name}=...) gives them")
        if rank is not None and (rank < 1 or how != "svd"):
            raise ValueError(f'a rank is 1 or more, and goes with "svd"; not {rank!r} with {how!r}')
        bond = bond or f"{name.lower()}{len(self.sizes)}"
        if bond in self.sizes:
            raise ValueError(f"a new bond has a name of its own, and {bond!r} is a leg already; name it by bond=")
        M = node.tensor.permute([node.legs.index(leg) for leg in (*left, *right)])
        shape, M = M.shape, M.reshape(math.prod(self.sizes[leg] for leg in left), -1)
        if how == "svd":
            U, S, V = torch.linalg.svd(M, full_matrices=False)
            U, S, V = U[:, :rank], S[:rank], V[:rank]
            u, s, v = (names or "U S V").split()
            middle = [Node(s, (bond,), S)]
            ends = (bond,)
        elif how == "qr":
            U, V = torch.linalg.qr(M)
            u, v = (names or "Q R").split()
            middle, ends = [], ()
        else:
            raise ValueError(f'a decomposition is by "svd" or "qr", not {how!r}')
        first = Node(u, (*left, bond), U.reshape(*shape[:len(left)], -1), tip=(bond,))
        second = Node(v, (bond, *right), V.reshape(-1, *shape[len(left):]), tip=ends)
        return self._replaced(name, first, *middle, second, **{bond: U.shape[1]})

    def canonical(self, centre: str) -> "Diagram":
        """The same network, a tree, every tensor but the ``centre`` made an isometry with its tip towards it: by QR,
        leaves first. The norm of the whole is then the centre's, and the best cut there is the best of the whole."""
        found, reached, queue = self, {centre: None}, [self[centre].name]
        for name in queue:
            for leg in self[name].legs:
                others = [n for n in self.ends()[leg] if n != name]
                if len(others) > 1 or others and others[0] in reached and others[0] != reached[name]:
                    raise ValueError(f"only a tree has a canonical form, and this has a loop through {leg!r}")
                if others and others[0] not in reached:
                    reached[others[0]] = name
                    queue.append(others[0])
        spare, bond = (max(names, key=len) + "*" for names in ((node.name for node in self.nodes), self.sizes))
        for name in reversed(queue[1:]):
            leg = found.bond(name, reached[name])
            rest = " ".join(x for x in found[name].legs if x != leg)
            found = found.decompose(name, rest, "qr", bond=bond, names=f"{name} {spare}")
            found = found.merge(reached[name], spare, name=reached[name]).rename(**{bond: leg})
        return found


# ---------------------------------------------------------------------------------------------------- making them


def diagram(expression: str, *tensors: Tensor | None, names: str | None = None, sizes: Mapping[str, int] | None = None,
            **named: Tensor | None) -> Diagram:  # fmt: skip
    """A diagram from an einsum expression, "ij,jk->ik", or, with blanks between the legs, einops': "i j, j k -> i k".

    Tensors come by name, in order, or by position, when ``names`` (or A, B, C, ...) name them; None is a tensor without
    numbers, whose legs have their ``sizes``. Without "->" the legs that come once are free, as einsum sorts them.

    >>> diagram("seq d_model, d_model vocab -> seq vocab", E=None, U=None, sizes={"seq": 5, "d_model": 8, "vocab": 11})
    Diagram(E(seq d_model), U(d_model vocab) -> seq vocab)
    """
    left, arrow, right = expression.partition("->")
    blanks = any(" " in part.strip() for part in (*left.split(","), right))
    operands = [tuple(part.split() if blanks else part.strip()) for part in left.split(",")]
    given = [*zip(names.split() if names else _alphabet(), tensors, strict=False), *named.items()]
    if len(given) != len(operands):
        raise ValueError(f"an expression has one operand for each tensor; {expression!r} has {len(operands)}, not "
                         f"{len(given)}")  # fmt: skip
    count = Counter(leg for legs in operands for leg in legs)
    output = tuple(right.split() if blanks else right.strip()) if arrow else sorted(x for x in count if count[x] == 1)
    nodes = [Node(name, legs, tensor if tensor is None else torch.as_tensor(tensor))
             for (name, tensor), legs in zip(given, operands, strict=True)]  # fmt: skip
    return Diagram(nodes, output, sizes)


def bubble(inner: Diagram, fn: Callable[[Tensor], Tensor], name: str, frozen: bool = False) -> Diagram:
    """fn(inner) as one tensor of a diagram: what the bubble holds is contracted before the nonlinearity ``fn`` can act.
    ``frozen`` computes it now and for good, drawn as a dashed frame."""
    tensor = fn(inner.contract()) if frozen else None
    return Diagram([Node(name, inner.output, tensor, inner=inner, fn=fn, frozen=frozen)], inner.output, inner.sizes)


# ---------------------------------------------------------------------------------------------------- names and legs


def _aside(node: Node) -> str:
    """What else a description says of a tensor."""
    inner = f", which takes in {' '.join(n.name for n in node.inner.nodes)}" if node.inner else ""
    return (", an isometry" if node.tip else "") + (", frozen" if node.frozen else "") + inner


def _alphabet() -> Iterator[str]:
    for k in range(26 * 26):
        yield chr(65 + k % 26) + (str(k // 26) if k >= 26 else "")


def _primed(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Names that come twice get primes: V, V′."""
    seen: set[str] = set()
    out = []
    for node in nodes:
        name = node.name
        while name in seen:
            name += "′"
        seen.add(name)
        out.append(node if name == node.name else replace(node, name=name))
    return tuple(out)


def _joined(nodes: Sequence[Node], groups: Iterable[tuple[int, ...]]) -> tuple[str, ...]:
    return tuple("".join(nodes[k].name for k in group) for group in groups)


def _grouped(node: Node, parts: tuple[str, ...], into: str) -> Node:
    at = min(node.legs.index(leg) for leg in parts)
    rest = [leg for leg in node.legs if leg not in parts]
    before = [leg for leg in node.legs[:at] if leg not in parts]
    order = [*before, *parts, *rest[len(before):]]
    legs = (*before, into, *rest[len(before):])
    tensor = node.tensor
    if tensor is not None:
        tensor = tensor.permute([node.legs.index(leg) for leg in order])
        tensor = tensor.flatten(len(before), len(before) + len(parts) - 1)
    tip = tuple(dict.fromkeys(into if leg in parts else leg for leg in node.tip))
    return replace(node, legs=legs, tensor=tensor, tip=tip)
