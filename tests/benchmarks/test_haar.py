"""What Haar transforms cost, in ratios to the product with the dense basis, measured in turn with it.

Each bar is asserted, and its figure is kept beside the times in the results file (``extra_info``). Seconds stand beside
the rate of matrix products in the same run, so that machines compare. All of it runs on one thread: the transform is
many small steps, and two threads that are not alone on a machine wait for one another at each.
"""

import statistics

import pytest
import torch

from tensorlens_utils import haar as room
from tensorlens_utils.costs import machine, seconds
from tensorlens_utils.haar import Haar
from tensorlens_utils.trees import Tree

pytestmark = pytest.mark.usefixtures("single_thread")
REFERENCE = 320  # GF/s, the rate of matrix products that a bar in seconds is stated for


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("sizes of blocks were chosen on a CPU, where the bars are stated")


def noise(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def rate(device):
    return machine(device)["gigaflops_per_second"]


def ratio(slow, fast, device, rounds=7):
    """The median of the times of ``slow`` over those of ``fast``, taken in turn, and its quartiles."""
    slow(), fast()
    ratios = [seconds(slow, device) / seconds(fast, device) for _ in range(rounds)]
    return statistics.median(ratios), statistics.quantiles(ratios, n=4)


def case(n, tree, rest, last, device):
    """An axis of n leaves, first or last, with ``rest`` numbers on the other: (x, the transform, the dense product)."""
    haar = Haar(tree) if last else Haar(tree, None)
    Psi = haar.matrix().to(device, torch.float32)
    x = noise(*((rest, n) if last else (n, rest)), device=device)
    return x, haar, (lambda: x @ Psi) if last else (lambda: Psi.mT @ x)


@pytest.mark.parametrize("last", [False, True], ids=["first axis", "last axis"])
@pytest.mark.parametrize("kind", ["dyadic", "random"])
def test_an_axis_of_4096_leaves_is_10_times_faster_than_the_dense_basis(benchmark, device, kind, last):
    tree = Tree.dyadic(4096) if kind == "dyadic" else Tree.random(4096, 0)
    x, haar, dense = case(4096, tree, 1024, last, device)
    assert torch.allclose(haar.analysis(x), dense(), atol=1e-4)
    faster, quartiles = ratio(dense, lambda: haar.analysis(x), device)
    inverse, _ = ratio(dense, lambda: haar.synthesis(x), device, rounds=3)
    benchmark.pedantic(lambda: haar.analysis(x), rounds=5)
    benchmark.extra_info |= {"times_dense": faster, "quartiles": quartiles, "times_dense_inverse": inverse}
    assert faster >= 10
    assert inverse >= 10


def test_all_coefficients_of_256_256_128(benchmark, device):
    """With the bases made anew, as for a tensor just organised; and whichever of the two ways is the faster."""
    trees = [Tree.random(n, k) for k, n in enumerate((256, 256, 128))]
    x = noise(256, 256, 128, device=device)
    before, c = rate(device), Haar(*trees).analysis(x)
    Psi = [Haar(*trees).matrix(k).to(x) for k in range(3)]

    def dense():
        y = (Psi[0].mT @ x.flatten(1)).view(256, 256, 128)
        return Psi[1].mT @ y @ Psi[2]

    assert torch.allclose(c, dense(), atol=1e-3)
    haar = Haar(*trees)
    faster, quartiles = ratio(dense, lambda: haar.analysis(x), device)
    benchmark.pedantic(lambda: Haar(*trees).analysis(x), rounds=7)
    gflops = (before + rate(device)) / 2
    took = benchmark.stats.stats.median
    error = (haar.synthesis(haar.analysis(x.double())) - x.double()).abs().max().item()
    benchmark.extra_info |= {
        "seconds": took, "seconds_at_reference": took * gflops / REFERENCE, "matmul_gflops": gflops,
        "times_dense": faster, "quartiles": quartiles, "round_trip_error_float64": error,
    }  # fmt: skip
    assert took * gflops / REFERENCE < 0.5
    assert error < 1e-12
    assert faster >= 0.8  # the faster of the two on most axes, and near it on the others


def test_where_the_fast_transform_and_the_dense_basis_cross(benchmark, device, monkeypatch):
    """Times of both against the leaves of an axis, first and last, with 2²¹ numbers in all. At DENSE leaves the dense
    basis is the faster on one axis at least; with twice as many the blocks win on the first, with four times on both.
    """
    rows = []
    for n in (16, 32, 64, 128, 256, 512, 1024, 2048):
        for last in (False, True):
            monkeypatch.setattr(room, "DENSE", 1)
            x, haar, dense = case(n, Tree.random(n, 0), 2**21 // n, last, device)
            faster, quartiles = ratio(dense, lambda haar=haar, x=x: haar.analysis(x), device, rounds=15)
            rows.append({"leaves": n, "last": last, "times_dense": faster, "quartiles": quartiles})
    monkeypatch.undo()
    benchmark.pedantic(lambda: haar.analysis(x), rounds=1)  # of the longest axis
    benchmark.extra_info |= {"rows": rows, "DENSE": room.DENSE, "BLOCK": room.BLOCK}
    times = {(row["leaves"] // room.DENSE, row["last"]): row["times_dense"] for row in rows}
    assert min(times[1, False], times[1, True]) < 1 < times[2, False]
    assert min(faster for (size, _), faster in times.items() if size >= 4) > 1
