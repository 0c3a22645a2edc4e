"""Tree distances against their definition, written out folder by folder, and the questionnaire by its laws and on
tensors whose trees are known."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform

from tensorlens_utils.trees import Tree
from tensorlens_utils.trees import questionnaire as room
from tensorlens_utils.trees.growing import binary_tree, cosine, flexible_tree, from_distances, gaussian, linkage_tree
from tensorlens_utils.trees.questionnaire import distances, plant, questionnaire, weighted_means

NESTED = [((4, 8, 16), (64, 64, 64)), ((4, 8, 16), (80, 64, 24)), ((3, 9, 27), (54, 81, 60))]


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def folders(tree, alpha, beta):
    """(leaves, weight) of every folder of every level, however often it is there."""
    return [(leaves, (len(leaves) / tree.n) ** beta * 2.0 ** (-alpha * level))
            for level in range(tree.depth + 1) for leaves in tree.folders(level)]  # fmt: skip


def by_definition(x, y, trees, alpha, beta):
    """Σ_{I × J × ...} w(I)·w(J)·...·|mean_{I × J × ...} (x − y)|, one product of folders after the other."""
    if not trees:
        return abs(x - y)
    return sum(w * by_definition(x[leaves].mean(0), y[leaves].mean(0), trees[1:], alpha, beta)
               for leaves, w in folders(trees[0], alpha, beta))  # fmt: skip


def unfolded(x, metric="euclidean"):
    """What the trees are measured by: scipy's average linkage of the slices along each axis, all else unfolded."""
    slices = [x.movedim(axis, 0).flatten(1).double().numpy() for axis in range(x.dim())]
    return [linkage(pdist(rows, metric), "average") for rows in slices]


# ---------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.7), (-1.0, 2.0)])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 5, 3)])
def test_distances_are_those_of_the_definition(shape, alpha, beta, monkeypatch):
    x = tensor(5, *shape)
    trees = [Tree.random(n, seed) for seed, n in enumerate(shape)]
    assert any(len(weighted_means(tree)) < sum(tree.counts) for tree in trees)  # some have chains
    truth = [[by_definition(a, b, trees, alpha, beta) for b in x] for a in x]
    truth = torch.tensor(truth, dtype=torch.float64)
    found = distances(x, trees, alpha, beta)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.T) and (found.diagonal() == 0).all()
    torch.testing.assert_close(distances(x.float(), trees, alpha, beta), truth.float(), rtol=1e-5, atol=1e-5)
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)  # other strides, the same numbers
    assert torch.equal(distances(turned, trees, alpha, beta), found)
    monkeypatch.setattr(room, "BLOCK", 1)  # one folder after the other
    torch.testing.assert_close(distances(x, trees, alpha, beta), truth, rtol=1e-12, atol=1e-12)


def test_many_folders_are_taken_in_pieces():
    """More columns than pdist is given at once, against scipy on all the weighted means together."""
    x = tensor(6, 1500, seed=1)
    means = weighted_means(Tree.dyadic(1500)).numpy()
    assert len(means) == 2999
    truth = squareform(pdist(x.numpy() @ means.T, "cityblock"))
    np.testing.assert_allclose(distances(x, [Tree.dyadic(1500)]), truth, rtol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_folder_means_are_weighted_means_over_different_folders(seed):
    tree = Tree.random(20, seed)
    means = weighted_means(tree, 0.5, 0.7)
    truth = {}
    for leaves, w in folders(tree, 0.5, 0.7):
        row = torch.zeros(20, dtype=torch.float64)
        row[leaves] = w / len(leaves)
        key = tuple(sorted(leaves.tolist()))
        truth[key] = truth.get(key, 0) + row
    rows = {tuple(torch.nonzero(row).ravel().tolist()): row for row in means}
    assert rows.keys() == truth.keys() and len(means) == len(rows) < 2 * 20
    for key, row in rows.items():
        torch.testing.assert_close(row, truth[key], rtol=1e-13, atol=0)


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 5\) were given trees of \[4\] leaves"):
        distances(tensor(3, 4, 5), [Tree.dyadic(4)])
    with pytest.raises(ValueError, match=r"trees of \[5, 4\] leaves"):
        distances(tensor(3, 4, 5), [Tree.dyadic(5), Tree.dyadic(4)])


# ---------------------------------------------------------------------------------------------------- the iteration


@pytest.mark.parametrize("shape", [(24, 30), (20, 16, 12), (8, 9, 7, 6)])
def test_every_tree_stands_in_the_geometry_of_the_others(shape):
    """Once settled, each tree is what grows from the distances in the final trees of the others: every axis is really
    updated, the last one included, whose tree the released code never changes."""
    x = plant(shape, (2, 4), snr_db=20.0)[0]
    found = questionnaire(x, rounds=50)
    assert found.ended == "settled" and found.history[-1] == found.history[-2]
    assert len(found.history) > 2
    for axis, tree in enumerate(found.trees):
        others = [*found.trees[:axis], *found.trees[axis + 1 :]]
        assert tree == linkage_tree(from_distances(distances(x.movedim(axis, 0), others)))
        assert tree == linkage_tree(found.affinities[axis])
        assert tree != found.history[0][axis]


def test_a_change_on_one_axis_reaches_all_others():
    x = tensor(16, 14, 12)
    start = questionnaire(x, rounds=1)
    for axis in range(3):  # a tree on this axis alone is grown otherwise: the others' next trees differ
        other = questionnaire(x, rounds=1, grow=lambda K, n=x.shape[axis]: Tree.dyadic(n) if len(K) == n else
                              linkage_tree(K))  # fmt: skip
        assert all(other.trees[k] != start.trees[k] for k in range(3) if k != axis)


def test_the_rounds_follow_the_stated_order():
    """At the start from the slices alone; then the last axis, the first, the second."""
    x = tensor(10, 12, 14)
    asked = []

    def grow(K):
        asked.append(len(K))
        return linkage_tree(K)

    found = questionnaire(x, grow=grow, rounds=2, alpha=0.5, beta=0.8, scale=0.6)
    assert asked == [10, 12, 14] + 2 * [14, 10, 12]
    q, k, h = (linkage_tree(cosine(x.movedim(axis, 0))) for axis in range(3))
    assert found.history[0] == (q, k, h)
    for trees in found.history[1:]:
        h = linkage_tree(from_distances(distances(x.movedim(2, 0), [q, k], 0.5, 0.8), 0.6))
        q = linkage_tree(from_distances(distances(x, [k, h], 0.5, 0.8), 0.6))
        k = linkage_tree(from_distances(distances(x.movedim(1, 0), [q, h], 0.5, 0.8), 0.6))
        assert trees == (q, k, h)
    assert questionnaire(x, start=gaussian, rounds=1).history[0][1] == linkage_tree(gaussian(x.movedim(1, 0)))


def test_how_it_ends():
    x = plant((16, 20), (2, 4))[0]
    assert questionnaire(x).ended == "settled"
    noise = questionnaire(tensor(30, 30, 10), rounds=2)
    assert noise.ended == "rounds" and len(noise.history) == 3
    turn = [0]

    def grow(K):  # two trees by turns
        turn[0] += 1
        return Tree.dyadic(len(K)).shuffled((turn[0] - 1) // 2 % 2)

    cycle = questionnaire(x, grow=grow)
    assert cycle.ended == "cycle" and cycle.trees == cycle.history[-3] != cycle.history[-2]


@pytest.mark.parametrize("grow", [linkage_tree, flexible_tree, binary_tree])
def test_trees_follow_their_slices_and_are_the_same_each_time(grow):
    x, random = tensor(18, 15, 12), np.random.default_rng(0)
    found = questionnaire(x, grow=grow, rounds=2)
    assert found.history == questionnaire(x.clone().requires_grad_(), grow=grow, rounds=2).history
    p = [torch.from_numpy(random.permutation(n)) for n in x.shape]
    dealt = questionnaire(x[np.ix_(*p)], grow=grow, rounds=2)
    assert dealt.trees == tuple(Tree(tree.levels[:, own]) for tree, own in zip(found.trees, p, strict=True))
    a = questionnaire(3.0 * x, grow=grow, rounds=2)  # nor does the unit of x matter
    assert a.trees == found.trees


def test_any_real_numbers_will_do():
    x = (plant((12, 14, 16), (2, 4))[0] * 1000).round()
    double = questionnaire(x.double())
    for other in (x, x.to(torch.int32), x.movedim(0, 2).contiguous().movedim(2, 0)):
        assert questionnaire(other).trees == double.trees
    organised = double.organised(x)
    assert torch.equal(organised, x[np.ix_(*(tree.order for tree in double.trees))])
    assert organised.diff(dim=0).abs().sum() < x.diff(dim=0).abs().sum() / 2
    with pytest.raises(ValueError, match=r"trees of \[12, 14, 16\] leaves"):
        double.organised(torch.ones(12, 14, 17))


def test_what_no_questionnaire_can_take():
    for x, message in [(tensor(4), "two axes or more"), (torch.ones(3, 3, dtype=torch.complex64), "complex64"),
                       (torch.ones(4, 4).fill_diagonal_(-float("inf")), "4 of them not finite.*mask")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            questionnaire(x)
    with pytest.raises(ValueError, match="one round or more, not 0"):
        questionnaire(tensor(4, 4), rounds=0)


def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = plant((32, 40, 24), (2, 4, 8), snr_db=10.0)[0].double()
    ours, theirs = questionnaire(x, rounds=3), questionnaire(x.cuda(), rounds=3)
    assert ours.history == theirs.history
    torch.testing.assert_close(theirs.affinities[0].cpu(), ours.affinities[0])


# ---------------------------------------------------------------------------------------------------- planted trees


def test_planted_tensors_are_what_they_say():
    x, trees = plant((24, 32, 40), (2, 8), decay=0.5, seed=3)
    assert [tree.counts for tree in trees] == [(1, 2, 8, 24), (1, 2, 8, 32), (1, 2, 8, 40)]
    blocks = sum((tree.levels[2] * 8 ** k).reshape([-1 if k == j else 1 for j in range(3)]) for k, tree in
                 enumerate(trees))  # fmt: skip
    assert all(x[blocks == block].std() < 1e-6 for block in blocks.unique())
    assert len(x.unique()) == 8**3
    assert plant((16, 16, 16), (16,))[0].std() == pytest.approx(1, abs=0.05)  # the first of the levels
    assert all(tree.order.tolist() != [*range(tree.n)] for tree in trees)
    noisy, again = plant((24, 32, 40), (2, 8), -6.0, 0.5, 3)[0], plant((24, 32, 40), (2, 8), -6.0, 0.5, 3)
    assert torch.equal(noisy, again[0]) and again[1] == trees
    assert 10 * torch.log10(x.var() / (noisy - x).var()) == pytest.approx(-6.0, abs=0.1)


@pytest.mark.parametrize("counts", [(), (1, 2), (4, 2), (2, 3), (2, 2), (8,)])
def test_folders_that_cannot_be_planted_are_refused(counts):
    with pytest.raises(ValueError, match=r"rise from 2 on.*at most 4, the smallest size; not \("):
        plant((4, 16), counts)


@pytest.mark.parametrize("decay", [0.5, 0.7])
@pytest.mark.parametrize("counts, shape", NESTED)
def test_planted_trees_are_found_without_noise(counts, shape, decay):
    x, planted = plant(shape, counts, decay=decay, seed=20)
    found = questionnaire(x)
    assert found.ended == "settled"
    for tree, true in zip(found.trees, planted, strict=True):
        for count in counts:
            assert count in tree.counts and tree.adjusted_rand(true, count) >= 0.95


def scores(trees, planted, counts):
    """The adjusted Rand index at each number of folders, averaged over the axes."""
    return np.mean([[tree.adjusted_rand(true, count) for count in counts]
                    for tree, true in zip(trees, planted, strict=True)], 0)  # fmt: skip


@pytest.mark.parametrize("snr_db", [0.0, -5.0, -10.0])
def test_in_noise_they_are_found_at_least_as_well_as_by_plain_linkage(snr_db):
    counts = (4, 8, 16)
    x, planted = plant((64, 64, 64), counts, snr_db, seed=21)
    ours = scores(questionnaire(x, rounds=3).trees, planted, counts)
    for metric in ("euclidean", "cosine", "cityblock"):
        plain = scores([Tree.from_linkage(Z, counts) for Z in unfolded(x, metric)], planted, counts)
        assert (ours >= plain).all()
    assert ours.mean() > 0.95 if snr_db == 0 else ours[:2].min() > 0.95


@pytest.mark.parametrize("snr_db", [None, 0.0])
def test_matrices_too(snr_db):
    """Two axes show less: 4 × 4 blocks may be alike by chance, and then nothing tells the coarse folders."""
    counts, ours, plain = (4, 8, 16), [], []
    for seed in range(30, 36):
        x, planted = plant((64, 80), counts, snr_db, seed=seed)
        ours.append(scores(questionnaire(x, rounds=5).trees, planted, counts))
        plain.append(scores([Tree.from_linkage(Z, counts) for Z in unfolded(x)], planted, counts))
        assert ours[-1][2] == 1 or snr_db is not None
    assert np.mean(ours) >= np.mean(plain)


def test_nothing_is_found_in_random_numbers():
    """Trees from two halves of a random tensor agree no better than one of them with the other shuffled: among 16
    tensors, their place among 19 shuffled ones is even. On a planted tensor the halves agree."""
    ranks = []
    for seed in range(16):
        halves = tensor(24, 20, 16, seed=seed).split(8, 2)
        one, other = (questionnaire(half, rounds=1).trees[0] for half in halves)
        ranks.append(sum(one.agreement(other.shuffled(s)) < one.agreement(other) for s in range(19)) / 19)
    assert abs(np.mean(ranks) - 0.5) < 3 * (1 / 12 / 16) ** 0.5
    halves = plant((24, 20, 16), (2, 4), 0.0, seed=22)[0].split(8, 2)
    one, other = (questionnaire(half).trees[0] for half in halves)
    assert one.agreement(other) > max(one.agreement(other.shuffled(s)) for s in range(99))
