"""What a slice costs by four ways, against L and D, for notebook 03: rows of ``costs.measure`` in the results file."""

import pytest
import torch
import transformers

from tensorlens_utils import costs, load_model


def gpt2(D):
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=D, n_head=D // 64))


POINTS = [*(("tiny-gpt", 128, L) for L in (16, 32, 64, 128)), *(("GPT-2 small", 768, L) for L in (16, 32, 64, 128)),
          *(("GPT-2 small, narrower", D, 64) for D in (192, 384))]  # fmt: skip


@pytest.fixture(scope="module")
def machine(device):
    return costs.machine(device)


@pytest.mark.parametrize(("name", "D", "L"), POINTS)
def test_four_ways_to_a_slice(benchmark, device, machine, name, D, L):
    """No bar: the rows say what each way takes; work is counted, so that time over work tells the rate."""
    model = (load_model(name)[0] if name == "tiny-gpt" else gpt2(D)).to(device).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, L), generator=torch.Generator().manual_seed(0)).to(device)
    benchmark.group = "slices"
    rows = benchmark.pedantic(lambda: costs.measure(model, ids, name), rounds=1)
    benchmark.extra_info |= {"costs": rows, "machine": machine}
    seconds = {row["way"]: row["seconds"] for row in rows}
    assert seconds["outputs in chunks"] < seconds["forward mode"]
