"""How a partition tree is grown: affinities between the leaves, their diffusion embedding, three ways to a tree.

An affinity K (n, n) is symmetric, from 0 (nothing in common) to 1 (the same, as each leaf is to itself). All of it is
deterministic, and runs in float64 on the CPU once the affinity is made: n² numbers are small beside the tensor that
they came from. (Intrinsic and Extrinsic Organized Attention, arXiv 2506.15541, and the questionnaire line before it:
Ankenman 2014, Mishne et al. 2016.)

>>> x = torch.tensor([[0.0, 1], [5, 1], [0, 1.1], [5, 1.2], [5, 0.8]])
>>> sorted(sorted(folder.tolist()) for folder in linkage_tree(gaussian(x)).folders(1))
[[0, 2], [1, 3, 4]]
"""

import numpy as np
import torch
from torch import Tensor

from . import Tree


def cosine(x: Tensor) -> Tensor:
    """⟨x_i, x_j⟩ / (‖x_i‖·‖x_j‖) between the slices of x (n, ...) along its first axis, 0 where it is negative: (n, n).

    Zeros are data here: what a causal mask leaves out is as alike in two heads as what it lets through, and two slices
    of nothing else are alike: 1.

    >>> cosine(torch.tensor([[1.0, 0], [3, 0], [1, 1], [-2, 0]]))[0]
    tensor([1.0000, 1.0000, 0.7071, 0.0000])
    """
    rows = _rows(x)
    norms = rows.norm(dim=1, keepdim=True)
    rows, nothing = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny), (norms == 0).to(rows)
    return (rows @ rows.T + nothing @ nothing.T).clamp(0, 1).fill_diagonal_(1)


def gaussian(x: Tensor, neighbours: int = 5, scale: float = 1.0) -> Tensor:
    """exp(−‖x_i − x_j‖² / (m_i·m_j)) between the slices of x (n, ...) along its first axis: (n, n).

    m_i is ``scale`` times the median distance from i to its ``neighbours`` nearest, so that the kernel is as wide where
    leaves are few as where they are many; the product keeps it symmetric (Zelnik-Manor and Perona, 2004). Where that is
    0, of leaves that are there several times, it is the smallest distance that is not.

    >>> gaussian(torch.tensor([[0.0], [1.0], [9.0]]), neighbours=1)[1]
    tensor([3.6788e-01, 1.0000e+00, 3.3546e-04])
    """
    _above_0(neighbours=neighbours, scale=scale)
    rows = _rows(x)
    d = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # products would leave twins apart
    near = d.sort(1).values[:, 1 : 1 + neighbours].median(1).values if len(d) > 1 else d[0]
    widths = scale * torch.where(near > 0, near, d[d > 0].min() if d.any() else 1.0)
    return (-d * d / (widths[:, None] * widths)).exp()


def from_distances(d: Tensor, scale: float = 1.0) -> Tensor:
    """exp(−d / (scale·m)) for distances d (n, n), m the median of those between two leaves.

    >>> from_distances(torch.tensor([[0.0, 2], [2, 0]]))
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """
    _above_0(scale=scale)
    away = d[~torch.eye(len(d), dtype=torch.bool, device=d.device)]
    away = away if (away > 0).any() else d.new_ones(1)
    middle = away.median()
    return (-d / (scale * torch.where(middle > 0, middle, away[away > 0].min()))).exp()


def diffusion(affinity: Tensor, n_eigs: int = 12, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """The eigenvalues (k,) and eigenvectors ψ (n, k) of the walk on the leaves that an affinity defines, the constant
    one left out: λ falls, and the diffusion map at time t is ψ·λᵗ, here ``psi * lam ** t``.

    K̃ = K / (q_i·q_j)^α with q the sums of K, which for α = 1 takes out how densely the leaves lie; then the walk
    D⁻¹K̃, D the sums of K̃ (Coifman and Lafon, 2006). ψ is real, has mean 0 and mean square 1 under the walk's
    stationary weights, and each column's largest entry is positive. k is ``n_eigs``, or n − 1 if that is less.
    Eigenvalues below 0, of kernels that are not positive, count as 0.

    >>> lam, psi = diffusion(gaussian(torch.tensor([[0.0], [1.0], [5.0], [6.0]])))
    >>> lam.shape, (psi[:, 0] > 0).tolist() in ([True, True, False, False], [False, False, True, True])
    (torch.Size([3]), True)
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackError, eigsh

    _above_0(n_eigs=n_eigs)
    K = _affinity(affinity)
    q = K.sum(1)
    K = K / (q[:, None] * q) ** alpha
    d = K.sum(1)
    weights = (d / d.sum()).sqrt()  # of norm 1: the eigenvector to eigenvalue 1 of D^{-1/2} K̃ D^{-1/2}
    S = K / (d[:, None] * d).sqrt() - torch.outer(weights, weights)  # and without it, whatever shares its eigenvalue
    k = min(n_eigs, len(K) - 1)
    if k == 0:
        return S.new_zeros(0), S.new_zeros(1, 0)
    S += torch.eye(len(K))  # for ARPACK, which stumbles over a matrix of zeros
    try:
        if len(K) <= 512:
            lam, phi = eigh(S.numpy(), subset_by_index=[len(K) - k, len(K) - 1])
        else:
            start = np.random.default_rng(0).standard_normal(len(K))
            lam, phi = eigsh(S.numpy(), k, which="LA", v0=start, rng=0)  # rng: which of many equal ones
    except ArpackError:
        lam = []
    if len(lam) < k:  # of an eigenvalue that comes many times both may find too few vectors; this finds all
        lam, phi = (x[..., -k:] for x in eigh(S.numpy(), driver="evd"))
    lam, psi = torch.from_numpy(lam - 1).flip(0).clamp(0, 1), torch.from_numpy(phi).flip(1) / weights[:, None]
    largest = psi.abs().argmax(0)
    return lam, psi * psi[largest, torch.arange(k)].sign()


def linkage_tree(affinity: Tensor, ratio: float = 4 / 3) -> Tree:
    """Average linkage of 1 − K, whose merges are gathered in levels: the default of the questionnaire.

    A level stands where merging on would cost much, where the height of the merges jumps: the greatest jump gives the
    first level, then the next that is no nearer to any level than by a factor ``ratio`` in the number of folders, root
    and leaves included. So there are at most log n / log ratio levels, and a partition that is there in the data is
    one of them. Where no height jumps (by 1e-6, which float32 resolves) there is no level.

    >>> linkage_tree(cosine(torch.eye(6).repeat_interleave(2, 0)))
    Tree(12 leaves; 1, 6, 12 folders)
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    K = _affinity(affinity)
    if len(K) == 1:
        return Tree.dyadic(1)
    Z = linkage(squareform(1 - K.numpy(), checks=False), "average")
    jumps = np.diff(Z[:, 2], prepend=0)[::-1]  # jumps[c - 2]: from c folders to c − 1 costs that more than to c
    counts = [1, len(K)]
    for count in (-jumps).argsort(kind="stable") + 2:
        if jumps[count - 2] > 1e-6 and all(max(count, c) >= ratio * min(count, c) for c in counts):
            counts.append(count)
    return _ordered(Tree.from_linkage(Z, counts), K)


def flexible_tree(affinity: Tensor, constant: float = 1.0, n_eigs: int = 12) -> Tree:
    """The paper's tree: from the leaves up, in diffusion distance, whose time doubles from level to level.

    At time t the distance of two folders is the mean of ‖ψ_i·λᵗ − ψ_j·λᵗ‖ over their leaves i and j. Folders are gone
    through by the distance to their nearest, the closest first, and each joins a group: with its nearest alone, or the
    group that its nearest is in, if it is there on average within (median distance / constant)·2^(1 − size of the
    group). So groups stay small where distances are alike, and grow where some are much smaller. From the median on, a
    folder waits for the next level. A larger constant gives a taller tree.
    """
    lam, psi = diffusion(affinity, n_eigs)
    labels = torch.arange(len(psi))
    levels, t = [labels], 1
    while (m := int(labels.max()) + 1) > 1:
        at = psi * lam**t
        D = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")
        for _ in range(2):  # means over the leaves of one side, then of the other
            D = (D.new_zeros(m, D.shape[1]).index_add_(0, labels, D) / labels.bincount()[:, None]).T
        labels = torch.from_numpy(_groups(D.numpy(), constant))[labels]
        levels, t = [labels, *levels], 2 * t
    return _ordered(Tree(torch.stack(levels)), affinity)


def binary_tree(affinity: Tensor, share: float = 0.25) -> Tree:
    """From the root down: each folder is cut in two where that costs least, along its own first diffusion coordinate.

    The cost is the normalised cut, the affinity between the parts over that of each part with the folder (Shi and
    Malik, 2000), among the cuts that leave each part its ``share`` of the leaves; 0.5 halves all folders.

    >>> binary_tree(cosine(torch.eye(2).repeat_interleave(3, 0)), share=0.5)
    Tree(6 leaves; 1, 2, 4, 6 folders)
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"a part has a share of the leaves above 0 and up to 0.5; not {share}")
    K = _affinity(affinity)
    levels, folders = [torch.zeros(len(K), dtype=torch.int64)], [torch.arange(len(K))]
    while max(map(len, folders)) > 1:
        folders = [part for folder in folders for part in (_halves(K, folder, share) if len(folder) > 1 else [folder])]
        levels.append(torch.repeat_interleave(torch.tensor([*map(len, folders)]))[torch.cat(folders).argsort()])
    return _ordered(Tree(torch.stack(levels)), K)


def _halves(K: Tensor, folder: Tensor, share: float) -> list[Tensor]:
    """A folder's leaves in two parts."""
    if (n := len(folder)) == 2:
        return [folder[:1], folder[1:]]
    own = K[folder][:, folder]
    own, folder = own[order := diffusion(own, 1)[1][:, 0].argsort(stable=True)][:, order], folder[order]
    within = own.cumsum(0).cumsum(1).diagonal()[:-1]  # of the first r leaves among themselves, r from 1 to n − 1
    volume = own.sum(1).cumsum(0)
    cost = (volume[:-1] - within) * (1 / volume[:-1] + 1 / (volume[-1] - volume[:-1]))
    least = min(max(int(np.ceil(share * n)), 1), n // 2)
    r = least + int(cost[least - 1 : n - least].argmin())
    return [folder[:r], folder[r:]]


def _groups(D: np.ndarray, constant: float) -> np.ndarray:
    """The group that each folder joins, from their distances D (m, m): one level of the flexible tree."""
    m = len(D)
    if m == 2:
        return np.zeros(2, dtype=np.int64)
    median = np.median(D[~np.eye(m, dtype=bool)])
    away = np.where(np.eye(m, dtype=bool), np.inf, D)
    nearest, closest = away.argmin(1), away.min(1)
    group, groups = np.full(m, -1), []
    for i in closest.argsort(kind="stable"):
        mates = groups[group[nearest[i]]] if group[nearest[i]] >= 0 else []
        if group[i] >= 0 or closest[i] > median and len(groups) > 0:
            continue
        if not mates:
            group[[i, nearest[i]]] = len(groups)
            groups.append([i, nearest[i]])
        elif D[i, mates].mean() < median / constant * 2.0 ** (1 - len(mates)):
            group[i] = group[nearest[i]]
            mates.append(i)
    alone = group < 0
    group[alone] = len(groups) + np.arange(alone.sum())
    return group


def _ordered(tree: Tree, affinity: Tensor) -> Tree:
    """The tree, the children of each folder ordered by the first diffusion coordinate, so that neighbours are alike."""
    coordinate = diffusion(affinity, 1)[1].sum(1)  # a single leaf has none, and the sum is 0
    levels = []
    for level, labels in enumerate(tree.levels):
        means = coordinate.new_zeros(tree.counts[level]).index_add_(0, labels, coordinate) / tree.sizes(level)
        levels.append(means.argsort(stable=True).argsort()[labels])
    return Tree(torch.stack(levels))


def _rows(x: Tensor) -> Tensor:
    if x.dim() < 2 or not x.numel() or not x.isfinite().all():
        raise ValueError("leaves are compared by finite numbers (n, ...), and this tensor of shape "
                         f"{tuple(x.shape)} has others, or none: cut out or replace what a mask has set to −inf")
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def _above_0(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is above 0; not {value!r}")


def _affinity(K: Tensor) -> Tensor:
    """In float64 on the CPU, when it is one."""
    if K.dim() != 2 or K.shape[0] != K.shape[1] or not len(K):
        raise ValueError(f"an affinity is a matrix (n, n), not of shape {tuple(K.shape)}")
    K = K.detach().cpu().double()
    if not (K >= 0).all() or not (K <= 1 + 1e-6).all() or not (K.diagonal() >= 1 - 1e-6).all():
        raise ValueError("an affinity has numbers from 0 to 1, and 1 on its diagonal, but this one goes from "
                         f"{K.min():.3g} to {K.max():.3g}, on its diagonal from {K.diagonal().min():.3g}; "
                         "from_distances makes one from distances")  # fmt: skip
    if (apart := (K - K.T).abs().max()) > 1e-5:
        raise ValueError(f"an affinity is symmetric, and this one differs from its transpose by up to {apart:.3g}: if "
                         "it is an attention pattern or a walk, hand over (K + K.T) / 2, or cosine of it")  # fmt: skip
    return (K + K.T).clamp_max(2) / 2
