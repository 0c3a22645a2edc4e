"""Partition trees by their definition, and trees grown from affinities against dense references in float64."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr

from tensorlens_utils.trees import Tree
from tensorlens_utils.trees.growing import (
    _groups,
    binary_tree,
    cosine,
    diffusion,
    flexible_tree,
    from_distances,
    gaussian,
    linkage_tree,
)

RANDOM = [Tree.random(n, seed) for seed in range(40) for n in (1, 2, 3, 5, 17, 40)]
GROWN = [linkage_tree, flexible_tree, binary_tree]


def sets(tree, level):
    """The folders of a level as sets of leaves, read off the labels."""
    labels = tree.levels[level].tolist()
    return [{i for i, label in enumerate(labels) if label == folder} for folder in range(max(labels) + 1)]


def points(n, seed=0, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- the tree itself


def test_random_trees_have_all_that_makes_a_basis_difficult():
    chains = sum((tree.parents(level).bincount() == 1).sum() for tree in RANDOM for level in range(1, tree.depth + 1))
    sizes = [tree.sizes(level).tolist() for tree in RANDOM for level in range(tree.depth)]
    assert chains > 100
    assert sum(len(set(s)) < len(s) for s in sizes) > 100  # repeated sizes
    assert sum(max(s) > 5 * min(s) for s in sizes) > 100  # unbalanced
    assert max(tree.parents(level).bincount().max() for tree in RANDOM for level in range(1, tree.depth + 1)) == 5


@pytest.mark.parametrize("tree", RANDOM[::7] + [Tree.dyadic(n) for n in (1, 2, 6, 13, 16)])
def test_folders_children_sizes_and_order_say_the_same(tree):
    assert sorted(tree.order.tolist()) == [*range(tree.n)]
    assert tree.counts == tuple(len(sets(tree, level)) for level in range(tree.depth + 1))
    for level in range(tree.depth + 1):
        folders = [folder.tolist() for folder in tree.folders(level)]
        assert [*map(set, folders)] == sets(tree, level)
        assert sum(folders, []) == tree.order.tolist()  # each an interval of the order, one after the other
        assert tree.sizes(level).tolist() == [*map(len, folders)]
        if level < tree.depth:
            children = [tree.children(level, folder) for folder in range(len(folders))]
            assert [child for run in children for child in run] == [*range(tree.counts[level + 1])]
            for folder, run in enumerate(children):
                assert set(folders[folder]) == set().union(*(sets(tree, level + 1)[child] for child in run))
                assert (tree.parents(level + 1)[run.start : run.stop] == folder).all()
    assert tree.levels[-1][tree.order].tolist() == [*range(tree.n)]


def test_labels_may_be_any_numbers_and_give_the_order_of_children():
    tree = Tree([[5, 5, 5, 5], [9, -1, 9, -1], [0, 7, 1, 3]])
    assert tree.levels.tolist() == [[0, 0, 0, 0], [1, 0, 1, 0], [2, 1, 3, 0]]
    assert tree.order.tolist() == [3, 1, 0, 2]
    assert Tree(tree.levels) == tree and torch.equal(Tree(tree.levels).levels, tree.levels)
    assert Tree(tree.levels.to(torch.int32)) == Tree(tree.levels.numpy()) == tree


def test_trees_are_equal_when_their_folders_are():
    tree, mirrored = Tree.from_nested([[0, 1], [2, [3, 4]]]), Tree.from_nested([[[4, 3], 2], [1, 0]])
    assert tree == mirrored and hash(tree) == hash(mirrored)
    assert not torch.equal(tree.levels, mirrored.levels)
    assert tree != Tree.from_nested([[0, 1], [[2, 3], 4]])
    assert tree != Tree.from_nested([[[0, 1]], [[2, [3, 4]]]])  # a chain more
    assert tree != "a tree"
    assert len({*RANDOM}) > 100  # of 240, those of one to three leaves mostly the same


@pytest.mark.parametrize("levels, message", [
    ([[0, 1], [0, 1]], "level 0 of a tree is one folder.*here it has 2"),
    ([[0, 0, 0], [0, 1, 1]], "last level.*one holds 2"),
    ([[0, 0, 0], [0, 0, 1], [3, 3, 2], [0, 1, 2]], None),
    ([[0, 0, 0], [0, 0, 1], [2, 3, 3], [0, 1, 2]], "folder 3 of level 2 has leaves of two folders"),
    ([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 3]], "folder 0 of level 2"),
    ([[0, 0], [0]], r"same leaves; here \[2, 1\]"),
    ([[0.0, 0.0], [0.0, 1.0]], "whole numbers.*not float64 of shape"),
    ([0, 1], r"\(depth \+ 1, n\).*shape \(2,\)"),
    ([[]], "whole numbers"),
])  # fmt: skip
def test_levels_that_make_no_tree_are_refused(levels, message):
    if message is None:
        Tree(levels)
        return
    with pytest.raises(ValueError, match=message):
        Tree(levels)


def test_nested_lists():
    tree = Tree.from_nested([[3, [0, 4]], 1, [[2]]])
    assert [[f.tolist() for f in tree.folders(level)] for level in range(4)] == [
        [[3, 0, 4, 1, 2]], [[3, 0, 4], [1], [2]], [[3], [0, 4], [1], [2]], [[3], [0], [4], [1], [2]],
    ]  # fmt: skip
    deep = 0
    for leaf in range(1, 1500):
        deep = [deep, leaf]
    assert Tree.from_nested(deep).depth == 1499
    assert Tree.from_nested([0]).counts == (1, 1)
    for bad, message in [([[0, 1], []], "empty list"), ([0, [1, 0]], "0 twice"), ([0, 2], "left out: the largest is 2"),
                         ([0, "a"], "not 'a'"), (0, "not 0"), ([0, 1.0], "not 1.0"),
                         (np.array([0, 1]), r"not array\(\[0, 1\]\)")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Tree.from_nested(bad)


def test_labels_per_level():
    assert Tree.from_labels([0, 0, 1, 1], [0, 1, 2, 2]) == Tree.from_nested([[[0], [1]], [[2, 3]]])
    assert Tree.from_labels([0, 0], [0, 1]) == Tree.from_labels([0, 1]) == Tree.dyadic(2)
    with pytest.raises(ValueError, match="one partition or more"):
        Tree.from_labels()
    with pytest.raises(ValueError, match="refines"):
        Tree.from_labels([0, 0, 1, 1], [0, 1, 1, 0])


@pytest.mark.parametrize("method", ["average", "single", "ward"])
def test_linkage_has_the_folders_that_scipy_cuts(method):
    x = points(30).numpy()
    Z = linkage(x, method)
    every = Tree.from_linkage(Z, range(1, 31))
    assert every.counts == tuple(range(1, 31)) and every.depth == 29
    merges = Tree.from_linkage(Z)
    assert merges.order.tolist() == every.order.tolist() == leaves_list(Z).tolist()
    folders = {frozenset(s) for level in range(merges.depth + 1) for s in sets(merges, level)}
    for count in range(1, 31):
        theirs = fcluster(Z, count, "maxclust")
        parts = {frozenset(np.flatnonzero(theirs == label).tolist()) for label in theirs}
        assert parts == {*map(frozenset, sets(every, count - 1))}
        assert parts <= folders
    assert Tree.from_linkage(Z, [4, 12]).counts == Tree.from_linkage(Z, (c for c in (12, 4))).counts == (1, 4, 12, 30)
    with pytest.raises(ValueError, match="1 to 30 folders; not"):
        Tree.from_linkage(Z, [31])
    with pytest.raises(ValueError):
        Tree.from_linkage(Z[1:])


def test_linkage_with_ties_cuts_to_any_number():
    Z = linkage(np.repeat(np.eye(3), 4, 0), "average")  # 9 merges at height 0, two at one height
    for count in range(1, 13):
        assert count in Tree.from_linkage(Z, [count]).counts


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 16, 100])
def test_dyadic_halves_the_natural_order(n):
    tree = Tree.dyadic(n)
    assert tree.order.tolist() == [*range(n)]
    assert tree.depth == int(np.ceil(np.log2(n)))
    for level in range(tree.depth + 1):
        assert tree.sizes(level).max() - tree.sizes(level).min() <= 1
        assert tree.counts[level] == min(2**level, n)
    with pytest.raises(ValueError, match="one leaf or more; not 0"):
        Tree.dyadic(0)


def test_random_and_shuffled_trees_are_the_same_for_a_seed():
    assert Tree.random(50, 3) == Tree.random(50, 3) != Tree.random(50, 4)
    tree = Tree.random(50, 3)
    assert tree.shuffled(1) == tree.shuffled(1) != tree.shuffled(2)
    for level in range(tree.depth + 1):
        assert tree.shuffled(1).sizes(level).tolist() == tree.sizes(level).tolist()
    with pytest.raises(ValueError, match="one leaf or more; not True"):
        Tree.random(True)


@pytest.mark.parametrize("tree", [tree for tree in RANDOM[::5] if tree.n > 4])
def test_cuts_are_partitions_into_folders_of_the_tree(tree):
    folders = {frozenset(s) for level in range(tree.depth + 1) for s in sets(tree, level)}
    for level, count in enumerate(tree.counts):
        assert torch.equal(tree.cut(count), tree.levels[level]) or count in tree.counts[:level]
    for count in range(1, tree.n + 1):
        labels = tree.cut(count)
        parts = [frozenset(torch.nonzero(labels == label).ravel().tolist()) for label in labels.unique()]
        assert folders.issuperset(parts) and sum(map(len, parts)) == tree.n
        below = max(c for c in tree.counts if c <= count)
        above = min(c for c in tree.counts if c >= count)
        assert abs(len(parts) - count) <= min(count - below, above - count)  # no level is nearer


def test_cut_between_levels_splits_the_largest_folder_first():
    tree = Tree.from_nested([[0, 1, 2, 3, 4], [[5, 6], [7, 8]], [9, 10]])
    assert [sorted(tree.cut(k).bincount().tolist()) for k in (1, 2, 3)] == [[11], [2, 4, 5], [2, 4, 5]]
    assert [sorted(tree.cut(k).bincount().tolist()) for k in (4, 5)] == [[2, 2, 2, 5], [1, 1, 1, 1, 1, 2, 4]]
    assert len(tree.cut(7).unique()) == 7  # the five leaves alone, and the other two folders whole
    for count in (0, 12):
        with pytest.raises(ValueError, match=f"1 to 11 folders; not {count}"):
            tree.cut(count)


def test_shared_is_the_size_of_the_smallest_common_folder():
    for tree in (tree for tree in RANDOM[:60] if tree.n < 40):
        folders, shared = [s for level in range(tree.depth + 1) for s in sets(tree, level)], tree.shared().tolist()
        for i, j in np.ndindex(tree.n, tree.n):
            assert shared[i][j] == min(len(s) for s in folders if {i, j} <= s)


def test_agreement_is_one_with_itself_and_none_with_shuffled_trees():
    tree = Tree.random(60, 0)
    again = Tree(tree.levels.flip(1)).levels.flip(1)
    assert tree.agreement(Tree(again)) == 1 == tree.adjusted_rand(tree, 8)
    null = [tree.agreement(tree.shuffled(seed)) for seed in range(64)]
    rand = [tree.adjusted_rand(tree.shuffled(seed), 8) for seed in range(64)]
    assert abs(np.mean(null)) < 4 * np.std(null) / 8 and abs(np.mean(rand)) < 4 * np.std(rand) / 8
    assert np.std(null) < 0.2
    near = tree.levels.clone()
    near[:, [0, 1]] = near[:, [1, 0]]  # two leaves change places
    assert max(null) < tree.agreement(Tree(near)) < 1
    one, pairs = Tree.random(60, 1), np.triu_indices(60, 1)
    ranked = spearmanr(tree.shared().numpy()[pairs], one.shared().numpy()[pairs]).statistic
    assert tree.agreement(one) == pytest.approx(ranked, abs=1e-10)
    assert np.isnan(tree.agreement(Tree.from_labels([0] * 60)))
    with pytest.raises(ValueError, match="60 and 4"):
        tree.agreement(Tree.dyadic(4))
    with pytest.raises(ValueError, match="60 and 4"):
        tree.adjusted_rand(Tree.dyadic(4), 2)


def test_drawing():
    tree = Tree.from_nested([[4, 0], [[2, 1]], 3])
    fig, ax = plt.subplots()
    tree.draw(ax, labels="abcde", colors=["r", "g", "b", "k", "w"], color="C1")
    lines = ax.collections[0].get_segments()
    assert len(lines) == sum(tree.counts[1:])  # one from each folder up to its parent
    below = {tuple(line[0]) for line in lines}
    assert {(float(x), 3.0) for x in range(5)} <= below
    assert {(0.5, 1.0), (2.5, 1.0), (4.0, 1.0)} == {end for end in below if end[1] == 1}
    assert {tuple(line[2]) for line in lines if line[0][1] == 1} == {((0.5 + 2.5 + 4) / 3, 0.0)}
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [*"eacbd"]
    dots = ax.collections[1]
    assert dots.get_offsets().tolist() == [[x, 3] for x in range(5)]
    assert dots.get_facecolor()[0].tolist() == [1, 1, 1, 1]  # leaf 4, white
    assert ax.yaxis_inverted()
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------- growing


def test_affinities_are_what_they_say():
    x = points(12).reshape(12, 3, 1) + 1
    flat = x.flatten(1).numpy()
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(cosine(x), np.maximum(flat @ flat.T / np.outer(norms, norms), 0), atol=1e-14)
    d = np.linalg.norm(flat[:, None] - flat, axis=-1)
    width = 0.7 * np.sort(d, 1)[:, [3]]  # the median of the five nearest
    np.testing.assert_allclose(gaussian(x, 5, 0.7), np.exp(-(d**2) / (width * width.T)), atol=1e-10)
    median = np.sort(d[np.triu_indices(12, 1)])[65 // 2]
    np.testing.assert_allclose(from_distances(torch.from_numpy(d), 0.5), np.exp(-d / median / 0.5), atol=1e-14)


def test_zeros_are_data():
    """Two heads that share a causal mask and nothing else have something in common; the released code sees none."""
    heads = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    both = cosine(heads)[0, 1]
    assert both == pytest.approx(float((heads[0] * heads[1]).sum() / heads[0].norm() / heads[1].norm()))
    assert cosine(torch.stack([heads[0], heads[0].T]))[0, 1] < both  # which masks cover, not only what is left


def test_leaves_that_are_the_same_or_nothing_have_affinities_too():
    for x in (torch.ones(7, 3), torch.zeros(7, 3), torch.eye(3).repeat_interleave(4, 0), torch.ones(1, 3)):
        for K in (cosine(x), gaussian(x), from_distances(torch.cdist(x, x))):
            assert K.isfinite().all() and (K.diagonal() == 1).all() and torch.equal(K, K.T)
            for grow in GROWN:
                assert grow(K).n == len(x)
    same = gaussian(torch.eye(3).repeat_interleave(8, 0))
    assert same[0, 7] == 1 and same[0, 8] < 1
    half = torch.tensor([[1.0, 2], [0, 0], [0, 0], [2, 4]])  # two heads, or keys, of which nothing is left
    assert cosine(half).round(decimals=6).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twins_are_the_same_and_what_all_leaves_share_does_not_blur_them(dtype):
    """Distances by products would leave rounding between twins, and lose small distances at an offset."""
    base = 10 * points(1, d=1000) + 0.1 * torch.arange(4)[:, None]
    K = gaussian(base.repeat_interleave(8, 0).to(dtype))
    d = torch.cdist(base, base)
    truth = (-((d / d[d > 0].min()) ** 2)).exp().repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(K.double(), truth, atol=1e-4, rtol=0)
    assert (K[:8, :8] == 1).all()
    x = (points(30, d=50) + 1000).to(dtype)
    torch.testing.assert_close(gaussian(x).double(), gaussian(x.double()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, n_eigs", [(1, 12), (2, 12), (9, 12), (40, 5), (600, 8)])
def test_diffusion_is_the_walks_largest_eigenvectors_but_the_constant(n, n_eigs):
    K = gaussian(points(n, 1))
    q = K.sum(1)
    walk = K / torch.outer(q, q) ** 0.5
    stationary = walk.sum(1)
    walk = walk / stationary[:, None]
    lam, psi = diffusion(K, n_eigs, alpha=0.5)
    assert lam.shape == (min(n_eigs, n - 1),) and psi.shape == (n, len(lam))
    theirs = torch.linalg.eigvals(walk).real.sort(descending=True).values
    assert theirs[0] == pytest.approx(1)
    torch.testing.assert_close(lam, theirs[1 : len(lam) + 1].clamp_min(0), atol=1e-10, rtol=0)
    kept = lam > 1e-10  # the rest are not told apart
    torch.testing.assert_close((walk @ psi)[:, kept], (psi * lam)[:, kept], atol=1e-9, rtol=0)
    weights = stationary / stationary.sum()
    torch.testing.assert_close(psi.T @ (weights[:, None] * psi), torch.eye(len(lam)).double(), atol=1e-9, rtol=0)
    assert (weights @ psi).abs().max() < 1e-9 if len(lam) else True
    assert all(column.max() == column.abs().max() for column in psi.T)


@pytest.mark.parametrize("n", [12, 600])
def test_diffusion_of_parts_that_nothing_joins(n):
    """The constant shares its eigenvalue 1 there, and is left out all the same; so where all is the same."""
    lam, psi = diffusion(torch.block_diag(*[torch.ones(n // 3, n // 3)] * 3), 4)
    torch.testing.assert_close(lam, torch.tensor([1.0, 1, 0, 0]).double(), atol=1e-12, rtol=0)
    assert psi[:, :2].mean(0).abs().max() < 1e-9
    parts = psi[:, :2].reshape(3, -1, 2)
    assert (parts - parts[:, :1]).abs().max() < 1e-9
    lam, psi = diffusion(torch.ones(n, n), 2)
    assert lam.abs().max() < 1e-12 and psi.isfinite().all()


@pytest.mark.parametrize("grow", GROWN)
def test_trees_find_clusters_and_are_the_same_each_time(grow):
    centres = 20 * points(4, 2)
    p = torch.randperm(32, generator=torch.Generator().manual_seed(4))
    x = (centres.repeat_interleave(8, 0) + points(32, 3))[p]
    label = (x[:, None] - centres).norm(dim=-1).argmin(1)
    for kernel in (gaussian(x, 12), from_distances(torch.cdist(x, x))):
        tree = grow(kernel)
        folders = [s for level in range(tree.depth + 1) for s in sets(tree, level)]
        assert all(set(torch.nonzero(label == k).ravel().tolist()) in folders for k in range(4))
        assert tree == grow(kernel) and torch.equal(tree.levels, grow(kernel).levels)
        if grow is not binary_tree:  # of which each level halves each folder, whatever the clusters
            assert tree.counts.count(4) and tree.adjusted_rand(Tree.from_labels(label), 4) == 1


@pytest.mark.parametrize("grow", GROWN)
def test_trees_follow_their_leaves(grow):
    K, p = gaussian(points(50, 5)), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert grow(K[p][:, p]) == Tree(grow(K).levels[:, p])


def test_linkage_tree_has_the_partitions_before_jumps():
    K = gaussian(points(60, 6))
    Z = linkage(squareform((1 - K).numpy(), checks=False), "average")
    tree = linkage_tree(K)
    assert all(b >= 4 / 3 * a for a, b in zip(tree.counts, tree.counts[1:], strict=False))
    jumps = {c: Z[60 - c, 2] - (Z[59 - c, 2] if c < 60 else 0) for c in range(2, 61)}
    for c in range(2, 60):  # each number of folders is a level, or too near the leaves or one with as great a jump
        assert any(b == c or max(b, c) < 4 / 3 * min(b, c) and (b == 60 or jumps[b] >= jumps[c])
                   for b in tree.counts[1:])  # fmt: skip
    for level, count in enumerate(tree.counts):
        theirs = fcluster(Z, count, "maxclust")
        assert len({*zip(theirs, tree.levels[level].tolist(), strict=True)}) == count
    assert len(linkage_tree(K, 3).counts) < len(tree.counts) < len(linkage_tree(K, 1.1).counts)
    assert linkage_tree(torch.eye(30)).counts == (1, 30)  # no structure, no level


def on_a_line(*x):
    return np.abs(np.subtract.outer(x, x))


def test_flexible_tree_one_level_by_hand():
    # the median of the 15 distances is 5.0. 0 and 1 join; 2 is 0.2 from both on average, within 5/2; 3 and 4 join;
    # 5 is on average 5.9 from these two, not within 5/2, and stays alone
    D = on_a_line(0.0, 0.1, 0.25, 5.0, 5.2, 11.0)
    assert _groups(D, 1.0).tolist() == [0, 0, 0, 1, 1, 2]
    assert _groups(D, 30.0).tolist() == [0, 0, 2, 1, 1, 3]  # 0.2 is not within 5/30/2: the taller tree
    # most distances are small, and what is further than the median from all others waits, even from one another
    labels = _groups(on_a_line(0.0, 0.01, 0.2, 0.21, 0.4, 0.41, 20.0, 26.5), 1.0).tolist()
    assert labels[6] != labels[7] and labels.count(labels[6]) == labels.count(labels[7]) == 1
    assert labels[0] == labels[1] and labels[2] == labels[3] and labels[4] == labels[5]
    assert _groups(on_a_line(0.0, 3.0), 1.0).tolist() == [0, 0]


def test_flexible_tree_goes_up_in_mean_diffusion_distances_at_doubled_times():
    K = gaussian(points(60, 7))
    tree, (lam, psi) = flexible_tree(K, 0.7, 6), diffusion(K, 6)
    assert tree.depth >= 4
    for k, level in enumerate(range(tree.depth, 0, -1)):
        at = psi * lam ** (2**k)
        far = (at[:, None] - at).norm(dim=-1)
        D = torch.tensor([[far[a][:, b].mean() for b in tree.folders(level)] for a in tree.folders(level)]).numpy()
        groups = _groups(D, 0.7)  # of equal folders, whatever their order
        assert len({*groups}) == tree.counts[level - 1]
        assert len({*zip(groups, tree.parents(level).tolist(), strict=True)}) == tree.counts[level - 1]


def test_flexible_tree_is_taller_for_a_larger_constant():
    K = gaussian(points(80, 7))
    depth = [flexible_tree(K, c).depth for c in (0.2, 1.0, 4.0)]
    assert depth[0] < depth[2] and depth == sorted(depth)
    assert flexible_tree(torch.block_diag(*[torch.ones(4, 4)] * 3)).counts[-2] == 3  # duplicates join at once
    assert flexible_tree(torch.eye(64)).depth < 32


def test_binary_tree_takes_the_best_cut_along_its_coordinate():
    K = gaussian(points(24, 8))
    tree = binary_tree(K, 0.25)
    _, psi = diffusion(K, 1)
    order = psi[:, 0].argsort()
    cost = {}
    for r in range(6, 19):
        a, b = order[:r], order[r:]
        across = K[a][:, b].sum()
        cost[r] = float(across / K[a].sum() + across / K[b].sum())
    r = min(cost, key=cost.get)
    assert {frozenset(order[:r].tolist()), frozenset(order[r:].tolist())} == {*map(frozenset, sets(tree, 1))}
    for share in (0.5, 0.3):
        tree = binary_tree(K, share)
        for level in range(tree.depth):
            for folder, size in enumerate(tree.sizes(level).tolist()):
                children = tree.children(level, folder)
                assert len(children) == min(size, 2)
                assert size < 2 or min(tree.sizes(level + 1)[[*children]]) >= min(np.ceil(share * size), size // 2)
    for share in (0, 0.6):
        with pytest.raises(ValueError, match="above 0 and up to 0.5"):
            binary_tree(K, share)


def test_neighbours_in_the_order_are_alike():
    """On a noisy line each tree's order, folder by folder, runs along the line."""
    x = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    p = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for grow in GROWN:
        place = x[p][grow(gaussian(x[p])).order, 0]
        assert abs(np.corrcoef(place, np.arange(64))[0, 1]) > 0.99
        assert place.diff().abs().mean() < 2 / 63


@pytest.mark.parametrize("grow", [diffusion, *GROWN])
def test_what_is_no_affinity_is_refused(grow):
    for K in (torch.rand(3, 4), torch.eye(3)[0], torch.zeros(0, 0)):
        with pytest.raises(ValueError, match=r"matrix \(n, n\), not of shape"):
            grow(K)
    for K in (-torch.eye(3), 2 * torch.eye(3), torch.zeros(3, 3), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="from 0 to 1, and 1 on its diagonal"):
            grow(K)
    with pytest.raises(ValueError, match="finite numbers.*−inf"):
        cosine(torch.full((2, 2), -float("inf")).triu(1))
    with pytest.raises(ValueError, match="finite numbers"):
        gaussian(torch.ones(3))
    with pytest.raises(ValueError, match="symmetric.*by up to 0.8"):
        grow(torch.eye(4) + 0.8 * torch.ones(4, 4).triu(1))


@pytest.mark.parametrize("call, words", [
    (lambda: gaussian(points(4), neighbours=0), "neighbours is above 0; not 0"),
    (lambda: gaussian(points(4), scale=0), "scale"),
    (lambda: from_distances(torch.ones(3, 3), scale=-1), "scale is above 0; not -1"),
    (lambda: diffusion(torch.eye(4), 0), "n_eigs"),
    (lambda: flexible_tree(torch.eye(4), n_eigs=0), "n_eigs"),
])  # fmt: skip
def test_options_that_would_measure_nothing_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("n", [200, 300, 700])
@pytest.mark.parametrize("grow", [flexible_tree, binary_tree])
def test_leaves_that_are_all_unlike_give_a_tree(grow, n):
    """The affinities have one eigenvalue n times over, of which some solvers find too few vectors."""
    assert grow(torch.eye(n)).n == n


def test_diffusion_is_the_same_each_time_where_eigenvalues_are():
    K = torch.block_diag(*[torch.ones(5, 5)] * 104)
    first = diffusion(K, 5)[1]
    assert all(torch.equal(diffusion(K, 5)[1], first) for _ in range(3))
