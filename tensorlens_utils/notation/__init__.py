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
from dataclasses import replace

import torch
from torch import Tensor

from .contracting import Contraction, Node, fresh, known


class Diagram(Contraction):
    """A network of tensors: ``nodes``, the ``output`` legs in order, the ``sizes`` of all legs, the ``grouped`` ones.

    Each of its methods here is a move that a reader makes by hand, and gives another diagram; how it is read and
    contracted is told by its base, ``Contraction``.
    """

    # -- a reader's moves; each gives another diagram

    def _with(self, nodes: Iterable[Node], output: Sequence[str] | None = None, /, **sizes: int) -> "Diagram":
        return Diagram(nodes, self.output if output is None else output, {**self.sizes, **sizes}, self.grouped)

    def fill(self, /, **tensors: Tensor) -> "Diagram":
        """The same diagram with numbers."""
        for name in tensors:
            self[name]
        return self._with(replace(node, tensor=tensors.get(node.name, node.tensor)) for node in self.nodes)

    def look(self, /, **kinds: str) -> "Diagram":
        """The same diagram with tensors drawn as another kind: "tensor" (a circle) or "matrix" (a square)."""
        known("tensors", kinds, [node.name for node in self.nodes])
        known("kinds", kinds.values(), ["tensor", "matrix"])
        return self._with(replace(node, kind=kinds.get(node.name, node.kind)) for node in self.nodes)

    def rename(self, /, **legs: str) -> "Diagram":
        """The same diagram with legs of other names; an inner leg that is called so already gets a prime."""
        self._check_legs(*legs)
        new = {leg: legs.get(leg, leg) for leg in self.sizes}
        for leg in self.sizes:
            if leg not in legs and leg not in self.output:
                new[leg] = fresh(leg, {new[x] for x in new if x != leg})
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
        whole = hasattr(index, "__index__") and not isinstance(index, bool)
        if leg not in self.sizes or not whole or not -self.sizes[leg] <= index < self.sizes[leg]:
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
                names[leg] = fresh(leg, taken)
                taken.add(names[leg])
        return self.rename(**names)

    def merge(self, *names: str, name: str | None = None) -> "Diagram":
        """Some of the tensors contracted into one."""
        if not names or len({*names}) < len(names):
            raise ValueError(f"a merge takes some of the tensors, each once; not {' '.join(names) or 'none'}")
        inside = [self[n] for n in names]
        outside = {*self.output, *(leg for node in self.nodes if node.name not in names for leg in node.legs)}
        legs = tuple(dict.fromkeys(leg for node in inside for leg in node.legs if leg in outside))
        part = self._with(inside, legs)
        known = all(node.numbers(self.sizes) is not None for node in inside)
        new = Node(name or "".join(names), legs, part.contract() if known else None)
        rest = [node for node in self.nodes if node.name not in names]
        at = min(i for i, node in enumerate(self.nodes) if node.name in names)
        return self._with([*rest[:at], new, *rest[at:]])

    def _solid(self, node: Node) -> Node:
        """A wire or a joint as the tensor that it is."""
        return replace(node, tensor=node.numbers(self.sizes), kind="tensor") if node.kind in ("wire", "joint") else node

    def group(self, legs: str, into: str) -> "Diagram":
        """Some legs as one, the first slowest: by reshaping the tensors that have them all, else by a joint on output
        legs."""
        parts = tuple(legs.split())
        if not parts or len({*parts}) < len(parts) or not {*parts} <= self.sizes.keys():
            raise ValueError(f"grouped legs are some of {' '.join(self.sizes)}, each once; not {legs!r}")
        if into in self.sizes.keys() - {*parts}:
            raise ValueError(f"a group has a name of its own, and {into!r} is a leg already")
        size = math.prod(self.sizes[leg] for leg in parts)
        whole = [node for node in self.nodes if set(parts) <= set(node.legs)]
        inside = all(len(names) == sum(leg in node.legs for node in whole) for leg in parts
                     for names in [self.ends()[leg]])  # fmt: skip
        free = [leg in self.output for leg in parts]
        if inside and (all(free) or not any(free)):
            nodes = [_grouped(self._solid(node), parts, into) if node in whole else node for node in self.nodes]
        elif all(free):
            nodes = [*self.nodes, Node("", (*parts, into), kind="joint")]
        else:
            raise ValueError(f"grouped legs are all output legs, or all join the same tensors; {legs!r} do neither")
        first = next((i for i, leg in enumerate(self.output) if leg in parts), 0)
        output = [leg for leg in self.output if leg not in parts]
        if all(free):
            output.insert(first, into)
        return Diagram(nodes, output, {**self.sizes, into: size}, self.grouped | {into})

    def split(self, leg: str, /, **parts: int) -> "Diagram":
        """One leg as several, the first slowest."""
        self._check_legs(leg)
        if math.prod(parts.values()) != self.sizes[leg]:
            raise ValueError(f"the parts of a leg multiply to its size: {leg!r} has {self.sizes[leg]}, not {parts}")
        joint = next((node for node in self.nodes if node.kind == "joint" and node.legs[-1] == leg), None)
        if joint and self.ends()[leg] == [joint.name] and [self.sizes[x] for x in joint.legs[:-1]] == [*parts.values()]:
            output = [x for old in self.output for x in (joint.legs[:-1] if old == leg else (old,))]
            undone = self._with([node for node in self.nodes if node is not joint], output)
            return undone.rename(**dict(zip(joint.legs, parts, strict=False)))
        if clash := [x for x in parts if x in self.sizes and x != leg]:
            raise ValueError(f"the parts of a leg have names of their own, and {clash[0]!r} is a leg already")

        def apart(legs):
            return tuple(x for old in legs for x in (parts if old == leg else (old,)))

        sizes, nodes = {**self.sizes, **parts}, list(self.nodes)
        for k, node in enumerate(self.nodes):
            if leg in node.legs:
                node, legs = self._solid(node), apart(node.legs)
                tensor = node.tensor if node.tensor is None else node.tensor.reshape([sizes[x] for x in legs])
                nodes[k] = replace(node, legs=legs, tip=apart(node.tip), tensor=tensor)
        return self._with(nodes, apart(self.output), **parts)

    def insert(self, leg: str, *matrices: tuple[str, Tensor]) -> "Diagram":
        """Matrices (name, numbers) on a line, from its first end to its second or to the output; none: an identity."""
        self._check_legs(leg)
        new: list[str] = []
        for _ in matrices or (None,):
            new.append(fresh(f"{leg}′", {*self.sizes, *new}))
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
        self._check_legs(leg)
        _check_dtype("a gauge", name, X)
        if X.dim() != 2 or X.shape[0] > X.shape[1] or X.shape[0] != self.sizes[leg]:
            raise ValueError(f"a gauge on {leg!r} is ({self.sizes[leg]}, at least as many), not {tuple(X.shape)}")
        if torch.linalg.matrix_rank(X) < len(X):
            raise ValueError(f"a gauge has an inverse on its right, and {name} has dependent rows; take another")
        return self.insert(leg, (name, X), (f"{name}⁻¹", torch.linalg.pinv(X)))

    def hole(self, name: str) -> list["Diagram"]:
        """The derivative by a tensor: the diagram with that tensor taken out, whose legs become free, one such diagram
        for each place where the same tensor (by its name up to primes) stands. Their contractions add up to it."""
        holes, tensor = [], self[name].tensor
        if inside := [node.name for node in self.nodes if node.inner and not node.frozen and _holds(node.inner, name)]:
            raise ValueError(f"a hole is where a diagram is linear, and {name} is in the bubble {inside[0]}; freeze it")
        for node in self.nodes:
            if node.name.rstrip("′") != name.rstrip("′") or not _same(node.tensor, tensor):
                continue
            rest, freed = [n for n in self.nodes if n.name != node.name], []
            sizes = dict(self.sizes)
            for k, leg in enumerate(node.legs):
                if leg in (*self.output, *node.legs[:k]):  # both ends are free now: they are joined by a wire
                    freed.append(fresh(leg + "*", {*sizes, *freed}))
                    sizes[freed[-1]] = self.sizes[leg]
                    rest.append(Node("1", (leg, freed[-1]), kind="wire"))
                else:
                    freed.append(leg)
                    if not any(leg in other.legs for other in rest):  # it was summed over by this tensor alone
                        rest.append(Node("1s", (leg,), torch.ones(self.sizes[leg]) if tensor is None else
                                         tensor.new_ones(self.sizes[leg])))
            holes.append(self._with(rest, (*self.output, *freed), **sizes))
        return holes

    def decompose(self, name: str, legs: str, how: str = "svd", rank: int | None = None, bond: str | None = None,
                  names: str | None = None) -> "Diagram":  # fmt: skip
        """A tensor split in two by SVD, U·diag(S)·V, or by QR, with ``legs`` on the first side and all others on the
        second; ``rank`` keeps the largest singular values alone (Eckart-Young: no other choice is nearer)."""
        node = self[name]
        left = tuple(legs.split())
        right = tuple(leg for leg in node.legs if leg not in left)
        if not right or sorted((*left, *right)) != sorted(node.legs) or not left or len({*node.legs}) < len(node.legs):
            raise ValueError(f"a decomposition splits the legs {' '.join(node.legs)} of {name} in two; not {legs!r}")
        if node.tensor is None:
            raise ValueError(f"a decomposition needs numbers, and {name} has none; d.fill({name}=...) gives them")
        if rank is not None and (not hasattr(rank, "__index__") or rank < 1 or how != "svd"):
            raise ValueError(f'a rank is 1 or more, a whole number, and goes with "svd"; not {rank!r} with {how!r}')
        if how not in ("svd", "qr"):
            raise ValueError(f'a decomposition is by "svd" or "qr", not {how!r}')
        made = (names or ("U S V" if how == "svd" else "Q R")).split()
        if len(made) != (3 if how == "svd" else 2):
            raise ValueError(f"the names are one for each tensor that {how} gives; not {names!r}")
        _check_dtype("a decomposition", name, node.tensor)
        bond = bond or f"{name.lower()}{len(self.sizes)}"
        if bond in self.sizes:
            raise ValueError(f"a new bond has a name of its own, and {bond!r} is a leg already; name it by bond=")
        M = node.tensor.permute([node.legs.index(leg) for leg in (*left, *right)])
        rows, columns = M.shape[:len(left)], M.shape[len(left):]
        M = M.reshape(math.prod(rows), math.prod(columns))
        if how == "svd":
            U, S, V = torch.linalg.svd(M, full_matrices=False)
            U, S, V = U[:, :rank], S[:rank], V[:rank]
            u, s, v = made
            middle = [Node(s, (bond,), S)]
            ends = (bond,)
        else:
            U, V = torch.linalg.qr(M)
            u, v = made
            middle, ends = [], ()
        put = [Node(u, (*left, bond), U.reshape(*rows, U.shape[1]), tip=(bond,)), *middle,
               Node(v, (bond, *right), V.reshape(len(V), *columns), tip=ends)]
        return self._with(n for old in self.nodes for n in (put if old is node else (old,)))

    def canonical(self, centre: str) -> "Diagram":
        """The same network, a tree, every tensor but the ``centre`` made an isometry with its tip towards it: by QR,
        leaves first. The norm of the whole is then the centre's, and the best cut there is the best of the whole."""
        found, reached, queue = self, {centre: None}, [self[centre].name]
        for name in queue:
            for leg in self[name].legs:
                ends = self.ends()[leg]
                others = [n for n in ends if n != name]
                if len(ends) + (leg in self.output) != 2 or ends.count(name) > 1:
                    raise ValueError(f"in a canonical form each leg joins two tensors or is free, and {leg!r} does not")
                if others and others[0] in reached and others[0] != reached[name]:
                    raise ValueError(f"only a tree has a canonical form, and this has a loop through {leg!r}")
                if others and others[0] not in reached:
                    reached[others[0]] = name
                    queue.append(others[0])
        if apart := [node.name for node in self.nodes if node.name not in reached]:
            raise ValueError(f"a canonical form is of a connected network, and {apart[0]} is not joined to {centre}")
        spare, bond = (max(names, key=len) + "*" for names in ((node.name for node in self.nodes), self.sizes))
        for name in reversed(queue[1:]):
            leg = found.bond(name, reached[name])
            rest = " ".join(x for x in found[name].legs if x != leg)
            if not rest:  # a vector: all of it goes to the centre
                found = found.merge(reached[name], name, name=reached[name])
                continue
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
    if names and len(names.split()) != len(tensors):
        raise ValueError(f"there is a name for each tensor; {names!r} has {len(names.split())}, not {len(tensors)}")
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


def _check_dtype(what: str, name: str, tensor: Tensor):
    if tensor.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise ValueError(f"{what} is of float32, float64 or complex numbers, and {name} is {tensor.dtype}; "
                         f"{name}.double() makes them")  # fmt: skip


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """One tensor in two places, also where a move has reshaped it in both."""
    if a is None or b is None or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return a is b
    return a is b or torch.equal(a, b)


def _holds(d: Diagram, name: str) -> bool:
    return any(n.name.rstrip("′") == name.rstrip("′") or n.inner and _holds(n.inner, name) for n in d.nodes)


def _alphabet() -> Iterator[str]:
    for k in range(26 * 26):
        yield chr(65 + k % 26) + (str(k // 26) if k >= 26 else "")


def _grouped(node: Node, parts: tuple[str, ...], into: str) -> Node:
    axes = [node.legs.index(leg) for leg in parts]
    at = min(axes)
    after = [k for k in range(at, len(node.legs)) if k not in axes]
    legs = (*node.legs[:at], into, *(node.legs[k] for k in after))
    tensor = node.tensor
    if tensor is not None:
        tensor = tensor.permute(*range(at), *axes, *after).flatten(at, at + len(axes) - 1)
    tip = tuple(dict.fromkeys(into if leg in parts else leg for leg in node.tip))
    return replace(node, legs=legs, tensor=tensor, tip=tip)
