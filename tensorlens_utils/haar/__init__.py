"""Orthonormal Haar-like bases on partition trees, one for each axis of a tensor, and the fast way through them.

A folder with children of n_1 ≥ … ≥ n_k leaves has k − 1 wavelets. The i-th tells its i-th child from those after it:

    ψ_i = √(N/(n(n + N))) on child i,   −√(n/(N(n + N))) on children i + 1 … k,   n = n_i, N = Σ_{j>i} n_j

With the constant 1/√n these are n orthonormal vectors (Gavish, Nadler and Coifman; arXiv 2506.15541 has them as the
Haar basis of a head's queries and keys). On several axes the basis is the products ψ_I ⊗ ψ_J ⊗ …: bi-Haar on a matrix,
tri-Haar on queries × keys × heads.

Laid out in the tree's order, every wavelet is one cut of an interval [a, b) at a place m, each m = 1 … n − 1 is cut
once, and with σ = (sum over an interval)/√(its leaves) the wavelet's coefficient is a rotation of two numbers:

    σ[a, b) = (√n σ[a, m) + √N σ[m, b)) / √(n + N)        ⟨x, ψ⟩ = (√N σ[a, m) − √n σ[m, b)) / √(n + N)

n − 1 rotations, from the leaves up, are the whole transform, however deep the tree. They are done BLOCK at a time: cuts
that hang together act on as many numbers by one orthogonal matrix, a matrix product. So an axis costs O(n·BLOCK)
products for each number on the other axes, where the dense basis costs n², and both directions are exact to rounding.

>>> import torch
>>> from tensorlens_utils.trees import Tree
>>> haar = Haar(Tree.from_nested([[0, 1], [2, 3]]), Tree.dyadic(2))
>>> A = torch.tensor([[5.0, 5.0], [5.0, 5.0], [1.0, 1.0], [1.0, 3.0]])
>>> C = haar.analysis(A)
>>> torch.allclose(haar.synthesis(C), A)
True
>>> int((C.abs() > 1e-6).sum())
6
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..trees import Tree

BLOCK = 32  # cuts done by one matrix product
DENSE = 64  # leaves up to which the whole basis is: tests/benchmarks/test_haar.py shows where the two cross


class Wavelet(NamedTuple):
    """A basis vector of one axis: the folder that it divides, by level and number there, and the leaves on either side.

    The constant divides nothing: level −1, every leaf in ``plus``. An axis without a tree has level −1 too, and one
    leaf.
    """

    level: int
    folder: int
    plus: Tensor
    minus: Tensor


class Haar:
    """The product of the Haar bases of some trees, over the last axes of a tensor, one tree for each.

    ``None`` in a tree's place leaves that axis as it is. Axes before these are a batch.

    Attributes:
        trees: as given.
        shape: their leaves; None where an axis has no tree.

    >>> from tensorlens_utils.trees import Tree
    >>> haar = Haar(Tree.dyadic(4), Tree.dyadic(2))
    >>> haar.support.tolist()
    [[8, 8], [8, 8], [4, 4], [4, 4]]
    """

    def __init__(self, *trees: Tree | None):
        if not trees or not any(isinstance(tree, Tree) for tree in trees):
            raise ValueError(f"a Haar basis stands on one tree or more, one for each of the last axes; not {trees}")
        if not all(tree is None or isinstance(tree, Tree) for tree in trees):
            raise TypeError(f"each axis has a Tree, or None to leave it as it is; not {[*map(type, trees)]}")
        self.trees = trees
        self.axes = [tree and _Axis(tree) for tree in trees]
        self.shape = tuple(tree.n if tree else None for tree in trees)

    def analysis(self, x: Tensor) -> Tensor:
        """The coefficients ⟨x, ψ_I ⊗ ψ_J ⊗ …⟩ (..., n, m, …) of x (..., n, m, …), in float32 or wider.

        Along an axis, index 0 is the constant, then come the wavelets of the root, of the folders of level 1, and so
        on; those of one folder stand together.
        """
        return self._each(x)

    def synthesis(self, c: Tensor) -> Tensor:
        """The tensor with these coefficients: the inverse of ``analysis``, and its transpose."""
        return self._each(c, inverse=True)

    def _each(self, x: Tensor, inverse: bool = False) -> Tensor:
        last = tuple(x.shape[-len(self.axes) :])
        if len(last) < len(self.axes) or any(n not in (None, m) for n, m in zip(self.shape, last, strict=True)):
            raise ValueError(f"the last axes must be {self.shape}, the leaves of the trees, and the tensor is "
                             f"{tuple(x.shape)}; move them last, or give None for an axis without a tree")  # fmt: skip
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"coefficients are no whole numbers, and the tensor is {x.dtype}; call .double() on it")
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would lose more than it has on the way
        for dim, axis in enumerate(self.axes, -len(self.axes)):
            if axis:
                x = axis.apply(x, dim, inverse)
        return x

    # -- which coefficient is which

    @functools.cached_property
    def support(self) -> Tensor:
        """How many entries each basis vector covers, int64 of the shape of the coefficients.

        An axis without a tree counts 1 and is an axis of length 1 here.
        """
        return _outer([axis.support if axis else torch.ones(1, dtype=torch.int64) for axis in self.axes])

    @functools.cached_property
    def wavelets(self) -> Tensor:
        """Which coefficients are of wavelets on every axis that has a tree, none of them constant: a bool tensor."""
        return _outer([axis.level >= 0 if axis else torch.ones(1, dtype=torch.bool) for axis in self.axes])

    @functools.cached_property
    def levels(self) -> tuple[Tensor, ...]:
        """For each axis, the level of the folder that each of its vectors divides, (n,); −1 for the constant."""
        return tuple(axis.level if axis else torch.tensor([-1]) for axis in self.axes)

    def where(self, *index: int) -> tuple[Wavelet, ...]:
        """What the coefficient at an index, counted from 0, stands for: on each axis the wavelet, or the constant.

        >>> from tensorlens_utils.trees import Tree
        >>> q, k = Haar(Tree.from_nested([[0, 1], [2, 3]]), Tree.dyadic(2)).where(3, 0)
        >>> q.level, q.folder, q.plus.tolist(), q.minus.tolist(), k.level
        (1, 1, [2], [3], -1)
        """
        if len(index) != len(self.axes):
            raise ValueError(f"an index has one number for each of the {len(self.axes)} axes; not {index}")
        if any(i < 0 or n is not None and i >= n for i, n in zip(index, self.shape, strict=True)):
            raise ValueError(f"coefficients are numbered from 0, {self.shape} of them on the axes; not {index}")
        none = torch.tensor([], dtype=torch.int64)
        return tuple(axis.wavelet(i) if axis else Wavelet(-1, i, torch.tensor([i]), none)
                     for axis, i in zip(self.axes, index, strict=True))  # fmt: skip

    def matrix(self, axis: int = 0) -> Tensor:
        """The dense basis of one axis, Ψ (n, n) in float64, a vector in each column: analysis is Ψᵀ x."""
        if self.axes[axis] is None:
            raise ValueError(f"axis {axis} has no tree, and so no basis")
        return self.axes[axis].matrix().mT

    # -- what is kept

    def coarse(self, c: Tensor, share: float) -> Tensor:
        """The coefficients whose vectors cover at least this share of the leaves' products; the others 0.

        The thesis behind the questionnaire denoises so, with shares of 0.005 and 0.01.
        """
        return c * (self.support >= share * math.prod(n or 1 for n in self.shape)).to(c)

    def __reduce__(self):  # pickled by what it was made from
        return Haar, self.trees

    def __repr__(self):
        return f"Haar({', '.join(map(repr, self.trees))})"


def largest(c: Tensor, n_terms: int, dims: int = 2) -> Tensor:
    """The n_terms coefficients of the largest modulus over the last ``dims`` axes, the others 0: the best n-term
    approximation, the basis being orthonormal. Among equals, those that come first.

    >>> largest(torch.tensor([3.0, -5.0, 1.0, 4.0]), 2, dims=1).tolist()
    [0.0, -5.0, 0.0, 4.0]
    """
    if not 1 <= dims <= c.dim():
        raise ValueError(f"the coefficients are on the last {dims} axes, and the tensor is {tuple(c.shape)}; give dims")
    flat = c.flatten(-dims)
    if not 0 <= n_terms <= flat.shape[-1]:
        raise ValueError(f"of {flat.shape[-1]} coefficients 0 to as many can be kept; not {n_terms}")
    size = flat.abs()
    if n_terms == 0:
        return torch.zeros_like(c)
    least = size.kthvalue(flat.shape[-1] - n_terms + 1, -1, keepdim=True)[0]
    above, equal = size > least, size == least
    kept = above | equal & (equal.cumsum(-1) <= n_terms - above.sum(-1, keepdim=True))
    return (flat * kept).view_as(c)


def soft(c: Tensor, threshold: float) -> Tensor:
    """Soft thresholding, sign(c)·max(|c| − t, 0): less noise, at the price of shrinking what is kept."""
    if not threshold >= 0:
        raise ValueError(f"a threshold is 0 or more, or coefficients would grow; not {threshold!r}")
    return c.sign() * (c.abs() - threshold).clamp_min(0)


# ------------------------------------------------------------------------------------------------------------ one axis


class _Step(NamedTuple):
    """One matrix product along an axis: out[to] = matrix · (what is given at ``given``, then out[made])."""

    given: Tensor
    made: Tensor
    to: Tensor
    matrix: Tensor


class _Axis:
    """The Haar basis of one tree: ``cuts`` (n, 3) has the interval and the place (a, m, b) of each basis vector, by
    coefficient; ``order`` the leaf at each place; ``index`` the coefficient of each, the constant's place being 0."""

    def __init__(self, tree: Tree):
        levels, found = tree.levels.numpy(), [np.array([[-1, 0, 0, 0, tree.n]])]
        keys = [key for labels in levels for key in (-np.bincount(labels)[labels], labels)]
        self.order = np.lexsort(keys[::-1])  # children by size, largest first, then as in the tree
        for level, (folder, child) in enumerate(zip(levels[:-1, self.order], levels[1:, self.order], strict=True)):
            start, end, stop = _starts(child), _ends(child), _ends(folder)
            last = np.flatnonzero((end == np.arange(tree.n) + 1) & (end < stop))  # a child ends here, its folder not
            found.append(np.stack([np.full(len(last), level), folder[last], start[last], end[last], stop[last]], 1))
        found = np.concatenate(found)
        found = found[np.lexsort((found[:, 3], found[:, 1], found[:, 0]))]
        self.cuts, self.index = found[:, 2:], found[:, 3].argsort()
        self.level, self.folder = (torch.from_numpy(column) for column in found[:, :2].T.copy())
        self.support = torch.from_numpy(found[:, 4] - found[:, 2])
        self.n, self.steps = tree.n, functools.cache(self._steps)

    def wavelet(self, i: int) -> Wavelet:
        a, m, b = self.cuts[i]
        sides = (self.order[a:b], self.order[:0]) if self.level[i] < 0 else (self.order[a:m], self.order[m:b])
        return Wavelet(int(self.level[i]), int(self.folder[i]), *(torch.from_numpy(side.copy()) for side in sides))

    def matrix(self) -> Tensor:
        """Ψᵀ (n, n): the basis vectors in rows, the leaves in columns."""
        rows = np.empty((self.n, self.n))
        rows[:, self.order] = _vectors(self.cuts, np.arange(self.n), np.ones(self.n))
        return torch.from_numpy(rows)

    def apply(self, x: Tensor, dim: int, inverse: bool = False) -> Tensor:
        """Ψᵀ along an axis, or its inverse, Ψ."""
        steps = self.steps(x.dtype, x.device)[inverse]
        if len(steps) == 1:
            return _product(steps[0].matrix, x, dim)
        if dim == -1:  # rows are gathered faster than columns
            return self.apply(x.reshape(-1, self.n).mT.contiguous(), 0, inverse).mT.reshape(x.shape)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for given, made, to, matrix in steps:
            part = x.index_select(dim, given)
            if len(made):
                part = torch.cat([part, out.index_select(dim, made)], dim)
            out.index_copy_(dim, to, _product(matrix, part, dim))
        return out

    def _steps(self, dtype, device) -> tuple[list[_Step], list[_Step]]:
        """The steps of analysis and of synthesis. A σ waits in ``out`` where the coefficient, or the leaf, of the place
        at which its interval starts will be."""

        def step(given, made, to, matrix):
            given, made, to = (torch.from_numpy(indices).to(device) for indices in (given, made, to))
            return _Step(given, made, to, torch.from_numpy(matrix).to(device, dtype))

        if self.n <= DENSE:
            every, none, matrix = np.arange(self.n), np.arange(0), self.matrix().numpy()
            return [step(every, none, every, matrix)], [step(every, none, every, matrix.T)]
        leaf, coefficient, there, back = self.order, self.index, [], []
        blocks = self.blocks()
        for places, single, matrix in blocks:
            columns = np.argsort(~single, kind="stable")
            there.append(step(leaf[places[single]], coefficient[places[~single]], coefficient[places],
                              matrix[:, columns]))  # fmt: skip
            n = len(places) - (places is not blocks[-1][0])  # all that the root's block needs is given
            rows = np.roll(np.arange(len(places)), -1)
            back.append(step(coefficient[places[rows[:n]]], leaf[places[rows[n:]]], leaf[places], matrix[rows].T))
        return there, back[::-1]

    def blocks(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All cuts, in blocks of at most BLOCK numbers, from the leaves up: (places (k,), single (k,), matrix (k, k)).

        The cuts of a block hang together. With the start of their interval they are the places of k numbers σ, those
        of single leaves or of blocks before; the matrix, orthogonal, takes these to the interval's own σ, at the first
        place, and the cuts' coefficients.
        """
        of = {m: (a, m, b) for a, m, b in self.cuts[1:].tolist()}
        hanging, blocks = [[] for _ in range(self.n)], []  # by the start of an interval: its cuts not yet in a block

        def close(start):
            if hanging[start]:
                cuts = np.array([of[m] for m in hanging[start]])
                places, end = np.r_[start, cuts[:, 1]], cuts[:, 2].max()
                widths = np.diff(np.r_[places, end])
                blocks.append((places, widths == 1, _vectors(np.r_[[[start, start, end]], cuts], places, widths)))
                hanging[start] = []

        for i in 1 + self.support[1:].argsort(stable=True):  # what an interval is cut into comes before it
            a, m, _ = self.cuts[i].tolist()
            for start in sorted((a, m), key=lambda start: -len(hanging[start])):
                if len(hanging[a]) + len(hanging[m]) + 2 > BLOCK:
                    close(start)
            hanging[a] = [*hanging[a], m, *hanging[m]]
        close(0)
        return blocks


def _vectors(cuts: np.ndarray, places: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The basis vectors of some cuts (a, m, b), a row each, on intervals of these widths at these places, each with
    its unit vector. A cut at a is none: it stands for the constant."""
    a, m, b = cuts.T[..., None]
    n, N = m - a, b - m
    values = np.where(places < m, np.sqrt(N / np.maximum(n, 1)), -np.sqrt(n / N))
    inside = (a <= places) & (places < b)
    return np.where(n == 0, 1, values) * inside * np.sqrt(widths / (b - a))


def _starts(labels: np.ndarray) -> np.ndarray:
    """For each place, where the run of equal labels that it lies in starts."""
    new = np.r_[True, labels[1:] != labels[:-1]]
    return np.flatnonzero(new)[new.cumsum() - 1]


def _ends(labels: np.ndarray) -> np.ndarray:
    """For each place, where the run of equal labels that it lies in ends."""
    return len(labels) - _starts(labels[::-1])[::-1]


def _outer(factors: list[Tensor]) -> Tensor:
    return functools.reduce(lambda a, b: a[..., None] * b, factors)


def _product(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """The matrix product along one axis of x."""
    if dim == -1:
        return x @ matrix.mT
    return (matrix @ x.reshape(x.shape[:dim].numel(), x.shape[dim], -1)).view(x.shape)
