"""The questionnaire: the axes of a tensor, organised by one another.

As the answers to a questionnaire group the people, and the people group the questions, a tree on each axis is grown
from distances that the trees on the other axes define, in turn, until no tree changes. Between the slices x and y of a
tensor along one axis, with a tree on each other axis, the distance is

    d(x, y) = Σ_I w(I)·|mean_I x − mean_I y|,     w(I) = (|I| / n)^β · 2^(−α·level(I)),

over the folders I of all levels, that of the root being 0; with two other axes and more, over all products I × J × ...
of folders, weighed by the product of their weights. So a difference counts at every scale at which it is seen: noise
cancels in the large folders, and structure does not. (Intrinsic and Extrinsic Organized Attention, arXiv 2506.15541;
the distances: Coifman and Leeb, 2013; the iteration: Ankenman, 2014, and Mishne et al., 2016.)

>>> x, planted = plant((16, 24, 32), (2, 4), snr_db=0.0)
>>> found = questionnaire(x)
>>> [tree.adjusted_rand(true, 4) for tree, true in zip(found.trees, planted)]
[1.0, 1.0, 1.0]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import Tree
from .growing import cosine, from_distances, linkage_tree

BLOCK = 2**24  # numbers: about the largest piece of folder means that is held at once
COLUMNS = 4096  # of them compared at once: enough to fill the threads, and few enough to stay in the cache


@dataclass(frozen=True, eq=False)
class Organisation:
    """What a questionnaire found.

    ``history``: the trees, one for each axis, at the start and after each round. ``affinities``: for each axis (n, n),
    what its last tree was grown from. ``ended``: "settled", "cycle" or "rounds", as ``questionnaire`` says.
    """

    history: tuple[tuple[Tree, ...], ...]
    affinities: tuple[Tensor, ...]
    ended: str

    @property
    def trees(self) -> tuple[Tree, ...]:
        return self.history[-1]

    def organised(self, x: Tensor) -> Tensor:
        """x, each of its axes in the order of its tree. Raises ValueError for axes that are of another length."""
        if x.shape[: len(self.trees)] != tuple(tree.n for tree in self.trees):
            raise ValueError(f"axes are put in the order of trees of {[tree.n for tree in self.trees]} leaves, here is "
                             f"a tensor of shape {tuple(x.shape)}: give one like that which was organised")
        for axis, tree in enumerate(self.trees):
            x = x.index_select(axis, tree.order.to(x.device))
        return x


def questionnaire(x: Tensor, start: Callable = cosine, grow: Callable = linkage_tree, rounds: int = 10,
                  alpha: float = 0.0, beta: float = 1.0, scale: float = 1.0) -> Organisation:  # fmt: skip
    """A tree for each axis of a tensor, grown in the geometry of the trees on all others.

    At the start each tree is grown from the slices alone. In each round every axis, the last one first and then from
    the first on, gets a new tree, from the distances in the newest trees of the others. This ends when a round changes
    no tree ("settled"), when it brings back the trees of an earlier round ("cycle"), or after so many ("rounds"): where
    there is little to find, the small folders go on changing. The same tensor gives the same trees.

    Args:
        x: (n_1, n_2), (n_1, n_2, n_3) or of higher order, finite, on any device; such as query × key × head. Float64
            is kept, all else is taken in float32.
        start: from the slices along an axis (n, ...) to their affinity (n, n): ``cosine`` or ``gaussian``.
        grow: from an affinity to a tree: ``linkage_tree``, or the paper's ``flexible_tree`` or ``binary_tree``.
        rounds: at most; the paper takes 3.
        alpha, beta: of the distances; 0 and 1, as in the paper, let each level count alike.
        scale: of the affinities, as in ``from_distances``.

    Raises:
        ValueError: for a tensor of one axis, of complex numbers, or of some that are not finite, and for no rounds.

    >>> x = torch.tensor([[0.0, 3, 0, 3, 3], [2, 0, 2, 0, 0], [0, 3, 0, 3, 4]])
    >>> questionnaire(x).organised(x)
    tensor([[4., 3., 3., 0., 0.],
            [3., 3., 3., 0., 0.],
            [0., 0., 0., 2., 2.]])
    """
    if x.dim() < 2 or x.is_complex() or not x.isfinite().all():
        raise ValueError(f"a questionnaire takes finite real numbers on two axes or more, not {x.dtype} of shape "
                         f"{tuple(x.shape)}" + ("" if x.is_complex() else f", {(~x.isfinite()).sum()} of them not "
                         "finite: take scores before the mask, or put numbers where it put −inf"))  # fmt: skip
    if rounds < 1:
        raise ValueError(f"a questionnaire takes one round or more, not {rounds}")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    affinities = [start(x.movedim(axis, 0)) for axis in range(x.dim())]
    trees, ended = [grow(affinity) for affinity in affinities], "rounds"
    history = [tuple(trees)]
    while ended == "rounds" and len(history) <= rounds:
        for axis in (x.dim() - 1, *range(x.dim() - 1)):
            d = distances(x.movedim(axis, 0), trees[:axis] + trees[axis + 1 :], alpha, beta)
            affinities[axis] = from_distances(d, scale)
            trees[axis] = grow(affinities[axis])
        if tuple(trees) in history:
            ended = "settled" if tuple(trees) == history[-1] else "cycle"
        history.append(tuple(trees))
    return Organisation(tuple(history), tuple(affinities), ended)


def distances(x: Tensor, trees: Sequence[Tree], alpha: float = 0.0, beta: float = 1.0) -> Tensor:
    """The tree distances (n, n) between the slices of x (n, m_1, ...), with a tree on each axis but the first.

    x is in float32 or float64, on any device. The weighted means over the folders are matrix products. They are made
    and compared in pieces of about ``BLOCK`` numbers: beside x and a copy of it nothing is held but these and n²
    numbers.

    Raises:
        ValueError: for trees of another number or other sizes than the axes.

    >>> x = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    >>> distances(x, [Tree.dyadic(4)])  # the root sees no difference, its halves that of the first two, leaves each
    tensor([[0., 2., 1.],
            [2., 0., 1.],
            [1., 1., 0.]])
    """
    if [tree.n for tree in trees] != [*x.shape[1:]]:
        raise ValueError(f"each axis but the first has a tree of its size, and slices of shape {tuple(x.shape[1:])} "
                         f"were given trees of {[tree.n for tree in trees]} leaves")  # fmt: skip
    n, matrices = len(x), [weighted_means(tree, alpha, beta).to(x) for tree in trees]
    if x.dim() == 2:
        x, matrices = x[:, None], [x.new_ones(1, 1), *matrices]
    first, *middle, last = matrices
    slices = x.movedim(0, -2)  # (m_1, ..., n, m_last)
    shape, slices = slices.shape, slices.flatten(1)
    total = x.new_zeros(n * (n - 1) // 2)
    width = n * math.prod(max(means.shape) for means in (*middle, last))
    for rows in first.split(max(BLOCK // width, 1)):
        piece = rows @ slices
        for axis, means in enumerate(middle, 1):
            piece = piece.reshape(-1, shape[axis], math.prod(shape[axis + 1 :]))
            piece = torch.bmm(means.expand(len(piece), -1, -1), piece)
        for part in piece.reshape(-1, n, last.shape[1]).split(max(COLUMNS // len(last), 1)):
            means = part.transpose(0, 1).reshape(-1, last.shape[1]) @ last.T  # (n · products of folders, F_last)
            for columns in means.reshape(n, -1).split(COLUMNS, 1):
                total += torch.pdist(columns, 1)
    d = x.new_zeros(n, n)
    one, other = torch.triu_indices(n, n, 1, device=x.device)
    d[one, other] = total
    return d + d.T


def weighted_means(tree: Tree, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
    """The weighted means over the folders of a tree as a matrix (F, n) in float64: w(I) / |I| on the leaves of I.

    A folder is one row, on however many levels it is, its weights added up: so there are at most 2n − 1.

    >>> weighted_means(Tree.from_nested([[0, 1], [2, 3]])) * 4
    tensor([[1., 0., 0., 0.],
            [1., 1., 0., 0.],
            [1., 1., 1., 1.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.],
            [0., 0., 1., 1.],
            [0., 0., 0., 1.]], dtype=torch.float64)
    """
    everywhere = []
    for level in range(tree.depth + 1):
        size = tree.sizes(level)
        everywhere.append(torch.stack([size.cumsum(0) - size, size, torch.full_like(size, level)]))
    *intervals, level = torch.cat(everywhere, 1)  # of places in the tree's order
    (first, size), row = torch.stack(intervals).unique(dim=1, return_inverse=True)
    weights = torch.zeros(len(size), dtype=torch.float64).index_add_(0, row, 2.0 ** (-alpha * level.double()))
    weights *= (size.double() / tree.n) ** beta / size
    after = tree.levels[-1] - first[:, None]
    return weights[:, None] * ((after >= 0) & (after < size[:, None]))


def plant(shape: Sequence[int], counts: Sequence[int], snr_db: float | None = None, decay: float = 0.5,
          seed: int = 0) -> tuple[Tensor, tuple[Tree, ...]]:  # fmt: skip
    """A tensor with trees to be found, and those trees: a sum over levels of block-constant tensors, and noise.

    The tree of each axis has these ``counts`` of folders between its root and its leaves, of sizes as equal as can be,
    and its leaves in random order. On the k-th of these levels, from 0, each product of folders adds a normal number
    of standard deviation decay^k. The noise is normal, and independent from entry to entry.

    Args:
        shape: of the tensor.
        counts: from 2 on, rising, each a multiple of the one before, and at most the smallest size.
        snr_db: 10·log10 of the variance of the signal over that of the noise; None: no noise.
        decay: how strong a level is beside the one above.
        seed: of all random numbers.

    >>> x, trees = plant((4, 6, 8), (2, 4))
    >>> x.shape, trees[2]
    (torch.Size([4, 6, 8]), Tree(8 leaves; 1, 2, 4, 8 folders))
    """
    rising = counts and all(a < b and b % a == 0 for a, b in zip([1, *counts], counts, strict=False))
    if not rising or counts[-1] > min(shape):
        raise ValueError(f"planted numbers of folders rise from 2 on, each a multiple of the one before, up to at most "
                         f"{min(shape)}, the smallest size; not {tuple(counts)}")
    random = np.random.default_rng(seed)
    seeds = random.integers(2**32, size=len(shape)).tolist()
    trees = tuple(Tree.from_labels(*(np.arange(n) * count // n for count in counts)).shuffled(own)
                  for n, own in zip(shape, seeds, strict=True))  # fmt: skip
    x = np.zeros(shape)
    for k, count in enumerate(counts):
        blocks = decay**k * random.standard_normal((count,) * len(shape))
        x += blocks[np.ix_(*(tree.levels[k + 1].numpy() for tree in trees))]
    if snr_db is not None:
        x += x.std() * 10 ** (-snr_db / 20) * random.standard_normal(shape)
    return torch.from_numpy(x).float(), trees
