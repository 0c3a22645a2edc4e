"""Partition trees: a set of leaves, cut into folders, the folders into smaller ones, down to single leaves.

A tree organises one axis of a tensor: its leaves are the indices, the leaves of a folder are alike, and in the tree's
order every folder is an interval. (Intrinsic and Extrinsic Organized Attention, arXiv 2506.15541.)

>>> tree = Tree.from_nested([[3, 1], [0, [2, 4]]])
>>> tree
Tree(5 leaves; 1, 2, 4, 5 folders)
>>> tree.order.tolist(), [folder.tolist() for folder in tree.folders(1)]
([3, 1, 0, 2, 4], [[3, 1], [0, 2, 4]])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Tree:
    """A partition tree on n leaves; levels (depth + 1, n) int64 on the CPU: the folder of each leaf, level by level.

    Level 0 is the root, one folder of all leaves; the last level has each leaf in a folder of its own; each level
    refines the one above. A folder may have a single child, itself one level further down: so leaves that are alone
    early reach the last level. Labels may be any whole numbers; they are renumbered, with the children of a folder in
    the order of their labels, so that afterwards, on every tree,

    - the folders of a level are 0, 1, ... along the order of the leaves: levels[l][order] never falls;
    - levels[-1] is the place of each leaf, a folder is an interval of places, and the children of a folder are
      consecutive.

    Levels count from the root, negative ones from the leaves. Two trees are equal that have the same folders on the
    same levels, in whatever order of children.

    Raises:
        ValueError: for levels of another shape or kind, a root of several folders, a last level with two leaves in one
            folder, and a level that does not refine the one above.

    >>> Tree([[0, 0, 0], [7, 2, 7], [0, 1, 2]]).levels.tolist()
    [[0, 0, 0], [1, 0, 1], [1, 0, 2]]
    """

    levels: Tensor

    def __post_init__(self):
        object.__setattr__(self, "levels", _renumbered(self.levels))

    @classmethod
    def from_nested(cls, nested: Sequence) -> "Tree":
        """A list is a folder, a number a leaf; each of 0 .. n − 1 is there once.

        >>> Tree.from_nested([[0, 1], [2, [3]]]).levels.tolist()
        [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
        """
        paths, stack = {}, [(nested, ())]
        while stack:  # no recursion, which a linkage of many leaves would exhaust
            item, path = stack.pop()
            if isinstance(item, Sequence) and not isinstance(item, str):
                if not item:
                    raise ValueError("a folder has leaves, and this nest has an empty list; leave it out")
                stack += [(child, (*path, k)) for k, child in enumerate(item)]
            elif path and isinstance(item, int | np.integer) and item not in paths:
                paths[int(item)] = path
            else:
                twice = isinstance(item, int | np.integer) and item in paths
                raise ValueError("a nest holds lists and, once each, the numbers of its leaves; not "
                                 f"{item!r}{' twice' * twice}")  # fmt: skip
        if sorted(paths) != [*range(len(paths))]:
            raise ValueError(f"the leaves are numbered 0 to n − 1, and of these {len(paths)} some number is left out: "
                             f"the largest is {max(paths)}")  # fmt: skip
        depth = max(map(len, paths.values()))
        levels = [np.zeros(len(paths), dtype=int)]
        for step in range(depth):
            child = [paths[i][step] if step < len(paths[i]) else 0 for i in range(len(paths))]
            levels.append(levels[-1] * (max(child) + 1) + child)
            levels[-1] = np.unique(levels[-1], return_inverse=True)[1]
        return cls(levels)

    @classmethod
    def from_labels(cls, *labels) -> "Tree":
        """The partitions of the leaves (n,), coarse to fine; the root and the level of the leaves are added.

        >>> Tree.from_labels([0, 0, 1, 1, 1])
        Tree(5 leaves; 1, 2, 5 folders)
        """
        levels = [np.asarray(partition) for partition in labels]
        if not levels:
            raise ValueError("a tree is made from one partition or more; Tree.dyadic(n) makes one of n leaves alone")
        if len(np.unique(levels[0])) > 1:
            levels = [np.zeros_like(levels[0]), *levels]
        if len(np.unique(levels[-1])) < len(levels[-1]):
            levels = [*levels, np.arange(len(levels[-1]))]
        return cls(levels)

    @classmethod
    def from_linkage(cls, Z, counts: Sequence[int] | None = None) -> "Tree":
        """The hierarchy Z (n − 1, 4) of scipy.cluster.hierarchy: a level for each of ``counts``, the numbers of folders
        between 1 and n, in any order; without them, all its merges, the children of a folder always one level down.

        >>> from scipy.cluster.hierarchy import linkage
        >>> Tree.from_linkage(linkage([[0.0], [1.0], [5.0], [6.5]], "average"))
        Tree(4 leaves; 1, 2, 4 folders)
        """
        from scipy.cluster.hierarchy import is_valid_linkage, leaves_list

        Z = np.asarray(Z, dtype=float)
        is_valid_linkage(Z, throw=True)
        if counts is not None:
            n, labels, counts = len(Z) + 1, leaves_list(Z).argsort(), {*counts}  # a folder goes by its first place
            if not all(1 <= count <= n for count in counts):
                raise ValueError(f"a level of {n} leaves has 1 to {n} folders; not {sorted(counts)}")
            levels, names = [labels.copy()], [*labels]
            for k, (left, right) in enumerate(Z[:, :2].astype(int)):
                names.append(names[left])
                labels[labels == names[right]] = names[left]
                if n - 1 - k in counts:
                    levels.append(labels.copy())
            return cls.from_labels(*reversed(levels))
        nested = [*range(len(Z) + 1)]
        for left, right in Z[:, :2].astype(int):
            nested.append([nested[left], nested[right]])
        return cls.from_nested(nested[-1])

    @classmethod
    def dyadic(cls, n: int) -> "Tree":
        """The natural order, halved down to the leaves; where n is no power of two, sizes differ by one.

        >>> Tree.dyadic(6).sizes(2).tolist()
        [2, 1, 2, 1]
        """
        _check_leaves(n)
        depth = (n - 1).bit_length()
        return cls([[(i << level) // n for i in range(n)] for level in range(depth + 1)])

    @classmethod
    def random(cls, n: int, seed: int = 0) -> "Tree":
        """Unbalanced, of two to five children, with single-child chains; the same for the same n and seed."""
        _check_leaves(n)
        random = np.random.default_rng(seed)
        places, starts = random.permutation(n), np.arange(n) == 0  # of folders, by place
        levels = [starts.cumsum()]
        while not starts.all() or random.random() < 0.2:
            starts = starts.copy()
            edges = [*np.flatnonzero(starts), n]
            for left, right in zip(edges[:-1], edges[1:], strict=True):
                if random.random() < 0.8:  # else it is passed on whole
                    cuts = min(int(random.integers(1, 5)), right - left - 1)
                    starts[random.choice(np.arange(left + 1, right), cuts, replace=False)] = True
            levels.append(starts.cumsum())
        return cls(np.stack(levels)[:, places])

    @property
    def n(self) -> int:
        return self.levels.shape[1]

    @property
    def depth(self) -> int:
        """How many levels there are below the root."""
        return len(self.levels) - 1

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of folders of each level, from 1 to n."""
        return tuple((self.levels.amax(1) + 1).tolist())

    @property
    def order(self) -> Tensor:
        """The leaves (n,) in the tree's order: ``A[tree.order]`` is A organised."""
        return self.levels[-1].argsort()

    def sizes(self, level: int) -> Tensor:
        """The number of leaves of each folder of a level (counts[level],)."""
        return self.levels[level].bincount()

    def parents(self, level: int) -> Tensor:
        """For each folder of a level, the folder of the level above that holds it (counts[level],)."""
        level = range(self.depth + 1)[level]
        if level == 0:
            raise ValueError("the root has no parent; ask for a level from 1 on")
        size = self.sizes(level)
        return self.levels[level - 1][self.order[size.cumsum(0) - size]]  # that of its first leaf

    def children(self, level: int, folder: int) -> range:
        """The folders of the level below that a folder is cut into."""
        level = range(self.depth + 1)[level]
        if level == self.depth:
            raise ValueError(f"a leaf has no children; ask for a level up to {self.depth - 1}")
        inside = self.levels[level + 1][self.levels[level] == range(self.counts[level])[folder]]
        return range(int(inside.min()), int(inside.max()) + 1)

    def folders(self, level: int) -> list[Tensor]:
        """The leaves of each folder of a level, in the tree's order."""
        return [*self.order.split(self.sizes(level).tolist())]

    def cut(self, n_folders: int) -> Tensor:
        """A partition (n,) into that many folders of the tree, or about as many: a level, where one has this number.

        Where none has, the folders of the finest level that has fewer are cut into their children, the largest folder
        first, each where that brings their number no further away.

        >>> Tree.dyadic(8).cut(3).tolist()
        [0, 0, 1, 1, 2, 2, 2, 2]
        """
        if not 1 <= n_folders <= self.n:
            raise ValueError(f"{self.n} leaves are cut into 1 to {self.n} folders; not {n_folders}")
        level = max(level for level, count in enumerate(self.counts) if count <= n_folders)
        count = self.counts[level]
        if count == n_folders:
            return self.levels[level].clone()
        born = self.parents(level + 1).bincount()  # children of each folder
        split = torch.zeros_like(born, dtype=torch.bool)
        for folder in self.sizes(level).argsort(descending=True, stable=True):
            if abs(count + born[folder] - 1 - n_folders) <= n_folders - count:
                split[folder], count = True, count + int(born[folder]) - 1
        fine = torch.where(split[self.levels[level]], self.levels[level + 1], -1)
        return torch.stack([self.levels[level], fine]).unique(dim=1, return_inverse=True)[1]

    def shared(self) -> Tensor:
        """(n, n) int64: how many leaves the smallest folder has that holds both; a distance (an ultrametric) but for
        its diagonal of ones.

        >>> Tree.from_nested([[0, 1], 2]).shared().tolist()
        [[1, 2, 3], [2, 1, 3], [3, 3, 1]]
        """
        shared = torch.full((self.n, self.n), self.n)
        for labels in self.levels[1:]:
            shared = torch.where(labels[:, None] == labels, labels.bincount()[labels], shared)
        return shared

    def agreement(self, other: "Tree") -> float:
        """How far two trees put the same leaves together: Spearman's correlation of ``shared`` over the pairs.

        1 for trees with the same folders, about 0 for ``other.shuffled(seed)``; not a number where a tree has no folder
        between its root and its leaves, and so tells no pair from another.

        >>> Tree.dyadic(8).agreement(Tree.dyadic(8))
        1.0
        """
        from scipy.stats import rankdata

        self._check_same_leaves(other)
        pairs = np.triu_indices(self.n, 1)
        mine, others = (rankdata(tree.shared().numpy()[pairs]) for tree in (self, other))
        mine, others = mine - mine.mean(), others - others.mean()
        norms = np.sqrt((mine @ mine) * (others @ others))
        return round(float(mine @ others / norms), 12) if norms else float("nan")

    def adjusted_rand(self, other: "Tree", n_folders: int) -> float:
        """The adjusted Rand index of two trees' cuts: 1 for the same partition, 0 on average by chance.

        >>> Tree.dyadic(16).adjusted_rand(Tree.dyadic(16), 4)
        1.0
        """
        from sklearn.metrics import adjusted_rand_score

        self._check_same_leaves(other)
        return float(adjusted_rand_score(self.cut(n_folders), other.cut(n_folders)))

    def shuffled(self, seed: int = 0) -> "Tree":
        """The same shape, its leaves dealt anew: the null that leaves depth and sizes as they are."""
        return Tree(self.levels[:, torch.from_numpy(np.random.default_rng(seed).permutation(self.n))])

    def draw(self, ax, labels: Sequence[str] | None = None, colors: Sequence | None = None, **line) -> None:
        """Draw the tree on matplotlib axes, its root on top: leaf i at x = levels[-1, i], level l at y = l.

        A folder stands in the middle of its children.

        Args:
            ax: matplotlib axes.
            labels: (n,) texts, by leaf, set below.
            colors: (n,) colours, by leaf, of a dot at each leaf.
            line: of the lines, as matplotlib's LineCollection takes it: color, lw.
        """
        from matplotlib.collections import LineCollection

        lines = []
        x = np.arange(self.n, dtype=float)
        for level in range(self.depth, 0, -1):
            above = np.bincount(parents := self.parents(level).numpy(), x) / np.bincount(parents)
            for mine, its in zip(x, above[parents], strict=True):
                lines.append([(mine, level), (mine, level - 1), (its, level - 1)])
            x = above
        ax.add_collection(LineCollection(lines, **{"color": "0.35", "lw": 0.8, "capstyle": "round"} | line))
        if colors is not None:
            ax.scatter(range(self.n), [self.depth] * self.n, c=[colors[i] for i in self.order], s=9, zorder=3)
        ax.set_xticks(range(self.n), ["" if labels is None else labels[i] for i in self.order], rotation=90, fontsize=6)
        ax.set(xlim=(-1, self.n), ylim=(self.depth + 0.3, -0.3), yticks=range(self.depth + 1), ylabel="level")
        ax.tick_params(axis="x", length=0)
        ax.spines["bottom"].set_visible(False)

    def __eq__(self, other):
        if not isinstance(other, Tree):
            return NotImplemented
        return self.levels.shape == other.levels.shape and all(map(torch.equal, self._named(), other._named()))

    def __hash__(self):
        return hash(tuple(named.numpy().tobytes() for named in self._named()))

    def __repr__(self):
        return f"Tree({self.n} leaves; {', '.join(map(str, self.counts))} folders)"

    def _named(self) -> Iterator[Tensor]:
        """Each level with a folder named by its leaf of the lowest number, whatever the order."""
        for labels, count in zip(self.levels, self.counts, strict=True):
            lowest = torch.full((count,), self.n).scatter_reduce(0, labels, torch.arange(self.n), "amin")
            yield lowest[labels]

    def _check_same_leaves(self, other: "Tree") -> None:
        if self.n != other.n:
            raise ValueError(f"trees are compared on the same leaves, and these have {self.n} and {other.n}")


def _check_leaves(n: int) -> None:
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"a tree has one leaf or more; not {n!r}")


def _renumbered(levels) -> Tensor:
    """The levels, when they are those of a tree, with the folders of each numbered along one order of the leaves."""
    if isinstance(levels, Tensor):
        levels = levels.detach().cpu().numpy()
    try:
        levels = np.asarray(levels)
    except ValueError:
        raise ValueError(f"the levels of a tree have the same leaves; here {[len(x) for x in levels]}") from None
    if levels.ndim != 2 or not levels.size or not np.issubdtype(levels.dtype, np.integer):
        raise ValueError("the levels of a tree are whole numbers (depth + 1, n), a folder for each leaf on each; not "
                         f"{levels.dtype} of shape {levels.shape}")  # fmt: skip
    root, leaves = np.unique(levels[0]), np.bincount(np.unique(levels[-1], return_inverse=True)[1].ravel())
    if len(root) > 1:
        raise ValueError(f"level 0 of a tree is one folder, its root, and here it has {len(root)}; Tree.from_labels "
                         "adds a root")  # fmt: skip
    if leaves.max() > 1:
        raise ValueError(f"the last level of a tree has each leaf in a folder of its own, and here one holds "
                         f"{leaves.max()}; Tree.from_labels adds that level")  # fmt: skip
    order = np.lexsort(levels[::-1])  # by the root's label, then by the next, down to the leaves'
    starts, numbered = np.zeros(levels.shape[1], dtype=bool), np.empty(levels.shape, dtype=np.int64)
    for level, labels in enumerate(levels):
        starts[1:] |= np.diff(labels[order]) != 0
        numbered[level, order] = starts.cumsum()
        first = labels[order][np.r_[True, starts[1:]]]
        if len(np.unique(first)) < len(first):
            twice = next(label for label in first if (first == label).sum() > 1)
            raise ValueError(f"each level of a tree refines the one above, and folder {twice} of level {level} has "
                             "leaves of two folders above it")  # fmt: skip
    return torch.from_numpy(numbered)
