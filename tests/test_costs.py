"""The four ways to a slice give the same slice, and what is said of their cost is counted right."""

import platform

import pytest
import torch
import transformers

from tensorlens_utils import costs, linearize


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).double().eval()


IDS = torch.tensor([[1, 2, 3, 4]])


def test_all_ways_lead_to_the_slice(gpt):
    T = linearize(gpt, IDS, to="last_hidden_state")
    whole = T.slice(-1)[0]  # (D', L, D)
    for way, (run, count, _) in costs.WAYS.items():
        part = run(T, count(T))
        part = torch.stack(part) if isinstance(part, list) else part
        part = part[:, 0].view(4, 8, 8).movedim(2, 0) if way == "forward mode" else part[:, 0]
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14, msg=way)


def test_work_is_counted_in_products_with_T(gpt):
    rows = {row["way"]: row for row in costs.measure(gpt, IDS, "toy", repeat=1)}
    # per token and layer 2·12·D² and, of both attention products, 2·2·L·D; two layers, four tokens
    forward = 2 * 4 * (24 * 8**2 + 4 * 4 * 8) / 1e9
    assert rows["one forward pass"]["gigaflops"] == pytest.approx(forward)
    product = rows["one output at a time"]["gigaflops"] / 8
    assert rows["outputs in chunks"]["gigaflops"] == pytest.approx(8 * product)
    assert rows["forward mode"]["gigaflops"] == pytest.approx(4 * 8 * product)
    assert rows["one row"]["gigaflops"] == pytest.approx(forward + product)
    assert 0.7 * forward < product <= forward  # the frozen network has no q·kᵀ
    for row in rows.values():
        assert row["seconds"] > 0 and row["gigabytes"] > 0


def test_memory_is_of_tensors_that_live_at_once():
    kept = torch.zeros(1000, dtype=torch.float64)

    def run():
        a = kept + 1  # 8 kB
        b = a * 2  # 16 kB at once
        a = b.view(10, 100)  # a view takes nothing; the first 8 kB are free again
        return a + 1

    assert costs.peak_gigabytes(run, kept.device) == pytest.approx(16e-6)


def test_sizes_are_those_of_the_tensors(gpt):
    T = linearize(gpt, IDS, to="last_hidden_state")
    sizes = costs.dense_gigabytes(4, 8, bytes=8)
    assert sizes["T"] == pytest.approx(T.dense().nbytes / 1e9)
    assert sizes["slice"] == pytest.approx(T.slice(-1).nbytes / 1e9)
    assert sizes["row"] == pytest.approx(T.rmatvec(T.output).nbytes / 1e9)


TOLD = [("cores\t: 2\nmodel name\t: A Fine CPU\n", "A Fine CPU"), ("cores\t: 2\n", "some-arch"), (None, "some-arch")]


@pytest.mark.parametrize(("told", "name"), TOLD)
def test_a_machine_is_named_by_its_cpu(monkeypatch, told, name):
    def read_text(path):
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(costs.Path, "read_text", read_text)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "some-arch")
    assert costs.machine()["device"] == name
