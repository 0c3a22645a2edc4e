"""What organising a tensor costs: time beside the rate of matrix products measured with it, memory, and how both grow.

Each bar is asserted, and its figure is kept beside the times in the results file (``extra_info``), with the arithmetic
that explains them: of a round, the operations of the folder means' matrix products and the absolute differences of the
distances, both proportional to n³·heads, and the seconds that growing the trees takes.
"""

import resource

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from tensorlens_utils.costs import machine, peak_gigabytes, seconds
from tensorlens_utils.trees import Tree
from tensorlens_utils.trees.growing import binary_tree, flexible_tree, from_distances, linkage_tree
from tensorlens_utils.trees.questionnaire import distances, plant, questionnaire, weighted_means

BAR = 3200  # 10 s at 320 GF/s
SIZES = [(64, 32), (128, 32), (256, 32), (384, 32), (128, 16), (128, 64), (128, 128), (128, 256)]  # tokens, heads


def noise(*shape, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def work(trees):
    """(operations of the matrix products, absolute differences) of one round with these trees, both / 1e9."""
    products = differences = 0
    for axis, tree in enumerate(trees):
        (first, last), n = (weighted_means(other) for k, other in enumerate(trees) if k != axis), tree.n
        products += 2 * n * len(first) * last.shape[1] * (first.shape[1] + len(last))
        differences += n * (n - 1) / 2 * len(first) * len(last)
    return products / 1e9, differences / 1e9


@pytest.mark.parametrize("snr_db", [None, 0.0], ids=["no noise", "0 dB"])
def test_three_rounds_on_256_x_256_x_128(benchmark, device, snr_db):
    """Seconds times the rate measured before and after: under 10 s · 320 GF/s, and under 2 GB."""
    x, planted = plant((256, 256, 128), (4, 8, 16), snr_db)
    x = x.to(device)
    questionnaire(x[:32, :32, :32], rounds=1)
    before, memory = machine(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = benchmark.pedantic(lambda: questionnaire(x, rounds=3), rounds=2)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e6
    rate = (before["gigaflops_per_second"] + machine(device)["gigaflops_per_second"]) / 2
    products, differences = work(found.trees)
    scores = [[tree.adjusted_rand(true, count) for count in (4, 8, 16)]
              for tree, true in zip(found.trees, planted, strict=True)]  # fmt: skip
    tensors = peak_gigabytes(lambda: questionnaire(x, rounds=1), device)
    cost = benchmark.stats.stats.min * rate
    benchmark.extra_info |= {
        "gigaflops": cost, "matmul_gflops": rate, "rounds": len(found.history) - 1, "ended": found.ended,
        "peak_memory_growth_gb": memory, "tensors_gb": tensors, "adjusted_rand": scores,
        "products_a_round": products, "differences_a_round": differences,
    }  # fmt: skip
    assert memory < 2 and tensors < 2
    assert all(min(row) >= 0.95 for row in scores)
    if device.type == "cpu":  # a bar for two cores
        assert cost < BAR


@pytest.fixture(scope="module")
def times():
    """What was measured in this run: (what, size) -> seconds."""
    return {}


def exponent(at):
    """The power with which seconds grow, by least squares through {size: seconds}."""
    return float(np.polyfit(*np.log([*zip(*at.items(), strict=True)]), 1)[0])


@pytest.mark.parametrize("n, heads", SIZES)
def test_a_round_against_n_and_heads(benchmark, device, times, n, heads):
    """The start and a round on n × n × heads random numbers, the hardest to organise: trees have the most folders. Of
    tokens the time takes less than the cube, which is the law of its count, and of heads about the first power."""
    x = noise(n, n, heads, device=device)
    found = benchmark.pedantic(lambda: questionnaire(x, rounds=1), rounds=4, warmup_rounds=1)
    growing = min(seconds(lambda: [linkage_tree(K) for K in found.affinities], device) for _ in range(4))
    products, differences = work(found.trees)
    benchmark.extra_info |= {
        "n": n, "heads": heads, "seconds": benchmark.stats.stats.min, "seconds_growing_trees": 2 * growing,
        "products_a_round": products, "differences_a_round": differences,
        "matmul_gflops": machine(device)["gigaflops_per_second"],
    }  # fmt: skip
    times[n, heads] = benchmark.stats.stats.min
    if all(size in times for size in SIZES):
        of_tokens = exponent({n: times[n, heads] for n, heads in SIZES if heads == 32})
        of_heads = exponent({heads: times[n, heads] for n, heads in SIZES if n == 128})
        benchmark.extra_info |= {"exponent_of_tokens": of_tokens, "exponent_of_heads": of_heads}
        assert of_tokens < 3 and of_heads < 1.2


def test_distances_against_pdist_and_cdist_on_all_means_at_once(benchmark, device):
    """The same weighted means of 256 slices of 128 × 64, in one matrix: scipy's pdist, torch's cdist, ours."""
    x, trees = noise(256, 128, 64, device=device), [Tree.dyadic(128), Tree.dyadic(64)]
    first, last = (weighted_means(tree).to(x) for tree in trees)

    def means():
        return (first @ x @ last.T).flatten(1)

    def scipy():
        return pdist(means().double().cpu().numpy(), "cityblock")

    def torch_cdist():
        return torch.cdist(means(), means(), p=1)

    torch.testing.assert_close(distances(x, trees), torch_cdist(), rtol=1e-4, atol=1e-4)
    benchmark.pedantic(lambda: distances(x, trees), rounds=5, warmup_rounds=1)
    ours = benchmark.stats.stats.min
    benchmark.extra_info |= {
        f"times_{name}": min(seconds(run, device) for _ in range(2)) / ours
        for name, run in {"scipy_pdist": scipy, "torch_cdist": torch_cdist}.items()
    } | {"tensors_gb": peak_gigabytes(lambda: distances(x, trees), device), "means_gb": 4e-9 * means().numel()}
    assert benchmark.extra_info["times_scipy_pdist"] >= 2 and benchmark.extra_info["times_torch_cdist"] >= 2


@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("grow", [linkage_tree, flexible_tree, binary_tree])
def test_growing_a_tree(benchmark, times, grow, n):
    """Time grows no faster than n³, as that of eigenvectors does."""
    x = noise(n, 16)
    K = from_distances(distances(x, [Tree.dyadic(16)]))
    tree = benchmark.pedantic(lambda: grow(K), rounds=2)
    benchmark.extra_info |= {"n": n, "depth": tree.depth, "folders": len(weighted_means(tree))}
    times[grow, n] = benchmark.stats.stats.min
    if (grow, 256) in times and n > 256:
        assert exponent({size: times[grow, size] for size in (256, n)}) < 3
