"""The tape: the frozen network F̃(V) = T·V + B, written down as a list of affine calls that can be replayed at any V."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NESTS = (tuple, list, dict)  # made once: a union that stands where it is used is made at every call


class Ref(NamedTuple):
    """Where a replay finds a value: the output of node ``index`` (-1: the input), or its member ``item``."""

    index: int
    item: int | None = None


class Node(NamedTuple):
    """One recorded call, affine in its ``Ref`` arguments; the arguments at ``addends`` are added, not multiplied."""

    fn: Callable
    args: tuple
    kwargs: dict
    addends: tuple = ()
    inplace: bool = False

    @property
    def leaves(self) -> list:
        """All that it is called with, ``Ref`` and constant."""
        return leaves((*self.args, *self.kwargs.values()))

    def arguments(self, value: Callable, linear: bool) -> tuple[list, dict]:
        """What to call ``fn`` with, given each value of a ``Ref``; for its linear part, constant addends are zero."""
        read = dict.fromkeys(self.addends, lambda x: value(x) if isinstance(x, Ref) else _zero(x)) if linear else {}
        args = [map_leaves(read.get(i, value), x) for i, x in enumerate(self.args)]
        return args, {k: map_leaves(read.get(k, value), x) for k, x in self.kwargs.items()}


def leaves(x) -> list:
    """The leaves of nested lists, tuples and dicts; a ``Ref`` is a leaf."""
    out = []
    for y in x.values() if isinstance(x, dict) else x if _nested(x) else (x,):
        if isinstance(y, _NESTS) and type(y) is not Ref:  # _nested(y), without the call: these are the busiest lines
            out += leaves(y)
        else:
            out.append(y)
    return out


def map_leaves(f, x):
    """``f`` on every leaf, the nesting kept."""
    if isinstance(x, dict):
        return {k: map_leaves(f, y) if _nested(y) else f(y) for k, y in x.items()}
    return type(x)([map_leaves(f, y) if _nested(y) else f(y) for y in x]) if _nested(x) else f(x)


def _nested(x) -> bool:
    return isinstance(x, _NESTS) and type(x) is not Ref


def _zero(x):
    """The zero of an addend; masks, flags, axes and indices are not added."""
    if isinstance(x, Tensor):
        return torch.zeros_like(x) if x.is_floating_point() or x.is_complex() else x
    return 0.0 if isinstance(x, int | float) and not isinstance(x, bool) else x


class Tape:
    """The frozen network F̃: ``tape(V)`` is T·V + B, and ``tape(V, linear=True)``, its addends left out, is T·V."""

    def __init__(self):
        self.nodes: list[Node | None] = []
        self.sizes: dict[int, tuple[int, float]] = {}

    def append(self, *node) -> int:
        self.nodes.append(Node(*node))
        return len(self.nodes) - 1

    def keep(self, target: Tensor) -> None:
        """A constant is about to be written to: the calls that have read it keep what they read."""
        at = target.untyped_storage().data_ptr()

        def shares(x):
            return isinstance(x, Tensor) and x.untyped_storage().data_ptr() == at

        for i, node in enumerate(self.nodes):
            if any(map(shares, node.leaves)):
                args, kwargs = map_leaves(lambda x: x.clone() if shares(x) else x, (node.args, node.kwargs))
                self.nodes[i] = node._replace(args=args, kwargs=kwargs)

    def met(self, index: int, value: Tensor) -> None:
        """Note how large and how precise a value of node ``index`` is."""
        self.sizes[index] = value.numel() * value.element_size(), torch.finfo(value.dtype).eps

    def close(self, output: Ref) -> None:
        """Keep what ``output`` needs, and every in-place write, since another value may see it through a view."""
        self.output, live, self.last = output, {output.index}, {output.index: len(self.nodes)}
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            if i in live or node.inplace:
                for x in node.leaves:
                    if isinstance(x, Ref):
                        live.add(x.index)
                        self.last.setdefault(x.index, i)
            else:
                self.nodes[i] = None
        constants = {id(x): x for n in self.nodes if n for x in n.leaves if isinstance(x, Tensor)}
        self.versions = [(x, x._version) for x in constants.values() if not x.is_inference()]
        sizes = [self.sizes[i] for i in live if i in self.sizes]
        self.widest, self.precision = (max(column, default=0) for column in zip(*sizes, strict=True))

    def __call__(self, V: Tensor, linear: bool = False) -> Tensor:
        if any(x._version != version for x, version in self.versions):
            raise RuntimeError("the model's weights have changed since it was linearised; call linearize again")
        values = {-1: V.clone()}

        def value(x):
            return (values[x.index] if x.item is None else values[x.index][x.item]) if isinstance(x, Ref) else x

        for i, node in enumerate(self.nodes):
            if node is None:
                continue
            args, kwargs = node.arguments(value, linear)
            out = node.fn(*args, **kwargs)
            values[i] = args[0] if node.inplace else out
            for x in node.leaves:
                if isinstance(x, Ref) and self.last[x.index] == i:
                    values.pop(x.index, None)
        return value(self.output)
