"""What the operator costs, in ratios to a named alternative measured in the same run (GPT-2 small, random weights).

Each bar is asserted, and its figure is kept beside the times in the results file (``extra_info``).
"""

import resource
import statistics

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tensorlens_utils import linearize
from tensorlens_utils.costs import WAYS, machine, seconds


@pytest.fixture(scope="module")
def gpt2(device):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device).eval()


def ids(L, device):
    return torch.randint(0, 50257, (1, L), generator=torch.Generator().manual_seed(L)).to(device)


@pytest.mark.parametrize("L", [64, 128, 256])
def test_in_out_row_costs_at_most_2_6_forwards(benchmark, device, gpt2, L):
    """linearize and one rmatvec, against a plain forward; taken in turn, the median of the pairs' ratios."""
    x = ids(L, device)

    def forward():
        with torch.no_grad():
            gpt2(x, use_cache=False)

    def row():
        T = linearize(gpt2, x)
        U = torch.zeros_like(T.output)
        U[:, -1] = T.output[:, -1]
        return (T.rmatvec(U) * T.input).sum(-1)

    row(), forward()
    ratios = [seconds(row, device) / seconds(forward, device) for _ in range(9)]
    benchmark.pedantic(row, rounds=3)
    ratio = statistics.median(ratios)
    benchmark.extra_info |= {"forwards_per_row": ratio, "quartiles": statistics.quantiles(ratios, n=4)}
    assert ratio <= 2.6


def test_exact_slice_against_jacfwd_and_autograd(benchmark, device, gpt2):
    """T[-1] (768 x 64 x 768) by batched cotangents, against two ways to differentiate the same frozen network."""
    T = linearize(gpt2, ids(64, device), to="last_hidden_state")
    D, X = T.output.shape[-1], T.input

    def frozen(V):  # the frozen network, as a plain function
        return T.tape(V)[:, -1]

    before, memory = machine(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counter:
        T._pull(T._Y[:, -1], torch.eye(D, device=device)[:1, None], batched=True)
    benchmark.pedantic(lambda: T.slice(-1), rounds=2)  # as often as the others, and the shorter counts
    ours = benchmark.stats.stats.min
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e6
    rate = (before["gigaflops_per_second"] + machine(device)["gigaflops_per_second"]) / 2

    some, (tangents, products, _) = 32, WAYS["forward mode"]  # of the 64 x 768 that jacfwd takes, vectorised like it
    jacfwd = min(seconds(lambda: tangents(T, some), device) for _ in range(2)) * products(T) / some

    rows = 16  # outputs, of the 768 that autograd.functional.jacobian takes, one backward pass each
    def by_rows():
        torch.autograd.functional.jacobian(lambda V: frozen(V)[:, :rows], X)

    def once():
        frozen(X.clone().requires_grad_())

    forward = min(seconds(once, device) for _ in range(3))
    jacobian = (min(seconds(by_rows, device) for _ in range(2)) - forward) * D / rows + forward

    share = counter.get_total_flops() * D / ours / rate / 1e9
    benchmark.extra_info |= {
        "slice_seconds": ours, "times_jacfwd": jacfwd / ours, "times_autograd_jacobian": jacobian / ours,
        "share_of_matmul_rate": share, "matmul_gflops": rate, "chunk": T.chunk, "peak_memory_growth_gb": memory,
        "slice_gb": D * X.numel() * 4 / 1e9,
    }  # fmt: skip
    assert jacfwd / ours >= 20
    assert jacobian / ours >= 1.5
    assert share >= 0.6


def test_memory_of_the_slice_is_bounded_by_the_chunk(benchmark, device, gpt2):
    """Peak memory over the slice itself, in units of the largest value of one chunk of cotangents."""
    if device.type != "cuda":
        pytest.skip("peak memory of one call is counted on a GPU only; on a CPU see peak_memory_growth_gb")
    T = linearize(gpt2, ids(64, device), to="last_hidden_state")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    benchmark.pedantic(lambda: T.slice(-1), rounds=1)
    peak = torch.cuda.max_memory_allocated() - start
    slice_bytes, chunk_bytes = T.input.numel() * 768 * 4, T.chunk * T.tape.widest
    benchmark.extra_info |= {"peak_gb": peak / 1e9, "slice_gb": slice_bytes / 1e9, "chunk_gb": chunk_bytes / 1e9}
    assert peak - slice_bytes < 12 * chunk_bytes


def test_long_sequence_keeps_no_attention_pattern(benchmark, device, gpt2):
    """At L = 1024 the patterns of 12 layers are recomputed by tiles where they would take more than ``rules.TILE``."""
    from tensorlens_utils.linearize import rules

    x, old = ids(1024, device), rules.TILE

    def row():
        T = linearize(gpt2, x, to="last_hidden_state")
        return T.rmatvec(T.output)

    whole = row()
    kept = seconds(row, device)
    rules.TILE = 2**20
    try:
        tiled = benchmark.pedantic(row, rounds=1)
        assert (tiled - whole).norm() < 1e-5 * whole.norm()
        benchmark.extra_info["tiled_over_kept"] = seconds(row, device) / kept
    finally:
        rules.TILE = old


