"""Hierarchical paraproducts: what a nonlinearity does to a function on trees, scale by scale, and what is left over.

P_j f has in each entry the mean of f over its folder of level j; P_0 is the mean of all, P_J f = f at the leaves;
Δ_j = P_{j+1} − P_j. On two axes (queries j, keys j′) the telescoping identity

    A(f) = Σ_{j<J, j′<J′} [A(a + u + v + w) − A(a + u) − A(a + v) + A(a)]
           + A(P_0 P′_J′ f) + A(P_J P′_0 f) − A(P_0 P′_0 f)
    a = P_j P′_j′ f,    u = Δ_j P′_j′ f,    v = P_j Δ′_j′ f,    w = Δ_j Δ′_j′ f

is exact, its last line being the boundary. The paraproduct Ã(f) has A′(a)·w + A″(a)·u·v in place of the bracket: smooth
multiples of f's own Haar coefficients. On D axes the bracket is the mixed difference of A(f) over all of them, and in
its place stands Σ_π A^(|π|)(a) Π_{S∈π} δ_S over the partitions π of the axes, δ_S f being the mixed difference over S.
The claim (hierarchical paraproducts, arXiv 2602.16644, as arXiv 2506.15541 uses it) is that the rest Δ = A(f) − Ã(f) is
twice as smooth as f, Δ ∈ Λ_2α for f ∈ Λ_α, so that softmax leaves the organised structure as it is but for something
smoother. ``sparsity.holder`` measures whether it is.

The released code multiplies running sums over the scales in place of one scale's differences, and leaves the boundary
out; neither is done here.

A softmax over the keys is exp of f̂ = f − log Σ_k exp f, in which each query's number is taken off its row: so
``paraproduct(log_softmax(f), ..., A=torch.exp)`` is that of the row softmax, row sums and all, without approximation.

>>> import torch
>>> from tensorlens_utils.trees import Tree
>>> f = torch.tensor([[0.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
>>> p = paraproduct(f, [Tree.dyadic(2)] * 2)
>>> torch.allclose(p.approximation + p.residual, f.exp())
True
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..trees import Tree


class Paraproduct(NamedTuple):
    """A(f) in two parts: ``approximation`` Ã(f), the boundary in it, and ``residual`` Δ; ``boundary`` alone."""

    approximation: Tensor
    residual: Tensor
    boundary: Tensor


def paraproduct(f: Tensor, trees: Sequence[Tree], A: Callable[[Tensor], Tensor] = torch.exp) -> Paraproduct:
    """A(f) = Ã(f) + Δ on trees over the last axes of f (..., n, m, …); axes before these are a batch.

    ``A`` works on each entry by itself and is differentiable as often as there are trees; its derivatives are
    autograd's. The parts themselves have none by f. The time is that of one pass over f for each choice of a level on
    each axis, so trees of few levels are quick.

    Raises:
        ValueError: where the last axes of f are not the leaves of the trees, or f is not finite, as scores with a mask
            on are not.
    """
    f = _checked(f, trees).detach()
    derivatives = _derivatives(A, len(trees))
    boundary = _boundary(f, trees, A)
    inner = _telescope(f, trees, lambda parts: _bracket(parts, derivatives))
    exact = A(f)
    return Paraproduct(boundary + inner, exact - boundary - inner, boundary)


def telescoped(f: Tensor, trees: Sequence[Tree], A: Callable[[Tensor], Tensor] = torch.exp) -> Tensor:
    """A(f) by the right side of the identity: the boundary, and every scale's exact bracket. Raises as ``paraproduct``.

    >>> f = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> trees = [Tree.random(3, 0), Tree.random(5, 1)]
    >>> torch.allclose(telescoped(f, trees, torch.tanh), torch.tanh(f))
    True
    """
    f = _checked(f, trees)

    def difference(parts):
        return sum((-1) ** (len(trees) - len(fine)) * A(x) for fine, x in parts.items())

    return _boundary(f, trees, A) + _telescope(f, trees, difference)


Parts = dict[tuple[int, ...], Tensor]  # of one scale: P f, finer by one level on the axes of the key, coarser on others


def _telescope(f: Tensor, trees: Sequence[Tree], bracket: Callable[[Parts], Tensor]) -> Tensor:
    """Σ over all scales of a bracket of f there; the sums are kept at the resolution that they have come to."""
    dims = len(trees)

    def total(parts: Parts, d: int) -> Tensor:
        """Of the parts on the axes before d, which have come to their level there and have all their leaves from d."""
        if d == dims:
            return bracket(parts)
        out = 0
        fine = {S: folder_means(x, trees[d], 0, d - dims) for S, x in parts.items()}
        for j in range(trees[d].depth):
            coarse = {S: _refined(x, trees[d], j + 1, d - dims) for S, x in fine.items()}
            fine = {S: folder_means(x, trees[d], j + 1, d - dims) for S, x in parts.items()}
            both = coarse | {(*S, d): x for S, x in fine.items()}
            out = total(both, d + 1) + (_refined(out, trees[d], j + 1, d - dims) if j else 0)
        return out

    out = total({(): f}, 0) + torch.zeros_like(f)
    for d, tree in enumerate(trees):  # folders of the last level are leaves in the tree's order
        out = out.index_select(d - dims, tree.levels[-1].to(f.device))
    return out


def _bracket(parts: Parts, derivatives: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Σ_π A^(|π|)(a) Π_{S∈π} δ_S f for one scale."""
    axes = max(parts, key=len)
    delta = {S: sum((-1) ** (len(S) - len(fine)) * parts[fine] for fine in subsets(S)) for S in subsets(axes)}
    at = derivatives(parts[()])
    return sum(at[len(pi)] * math.prod(delta[S] for S in pi) for pi in partitions(axes))


def _boundary(f: Tensor, trees: Sequence[Tree], A: Callable) -> Tensor:
    """Σ_{S not empty} (−1)^{|S|+1} A(f averaged over all of the axes S)."""
    dims = len(trees)
    terms = [(-1) ** (len(S) + 1) * A(f.mean([d - dims for d in S], keepdim=True)) for S in subsets(range(dims)) if S]
    return sum(terms).expand_as(f)


def folder_means(x: Tensor, tree: Tree, level: int, dim: int) -> Tensor:
    """The average of x over each folder of a level, along one axis: P_j x, an entry a folder."""
    labels, sizes = tree.levels[level].to(x.device), tree.sizes(level).to(x)
    shape = [*x.shape]
    shape[dim] = len(sizes)
    return x.new_zeros(shape).index_add(dim, labels, x).movedim(dim, -1).div(sizes).movedim(-1, dim)


def _refined(x: Tensor, tree: Tree, level: int, dim: int) -> Tensor:
    """What is constant on the folders of level − 1, written on those of ``level``."""
    return x.index_select(dim, tree.parents(level).to(x.device))


def _derivatives(A: Callable, order: int) -> Callable[[Tensor], list[Tensor]]:
    """x -> [A(x), A′(x), … A^(order)(x)]."""

    def at(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = [A(x)]
            for _ in range(order):
                y = found[-1]
                g = torch.autograd.grad(y.sum(), x, create_graph=True)[0] if y.requires_grad else torch.zeros_like(x)
                found.append(g)
        return [y.detach() for y in found]

    return at


def subsets(axes: Sequence[int]) -> list[tuple[int, ...]]:
    return [*chain.from_iterable(combinations(axes, k) for k in range(len(axes) + 1))]


def partitions(axes: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All ways to divide the axes into parts.

    >>> [*partitions((0, 1))]
    [[(0, 1)], [(0,), (1,)]]
    """
    if not axes:
        yield []
        return
    for others in subsets(axes[1:])[::-1]:
        for rest in partitions(tuple(d for d in axes[1:] if d not in others)):
            yield [(axes[0], *others), *rest]


def _checked(f: Tensor, trees: Sequence[Tree]) -> Tensor:
    """f, in float32 or wider."""
    leaves = tuple(tree.n for tree in trees)
    if not trees or tuple(f.shape[-len(trees) :]) != leaves:
        raise ValueError(f"the last axes of f must be the leaves of its trees, {leaves}, and f is {tuple(f.shape)}")
    if not f.isfinite().all():
        raise ValueError(f"means over folders are of finite numbers, and {(~f.isfinite()).sum()} of f are not: take "
                         "scores before the mask, or put numbers where it put −inf")  # fmt: skip
    return f.to(torch.promote_types(f.dtype, torch.float32))
