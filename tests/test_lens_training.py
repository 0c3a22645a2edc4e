"""Training lenses: what it reaches, runs that are killed (really), several processes, streams of text, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tensorlens_utils import load_data, load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses.data import Examples, Rows
from tensorlens_utils.lenses.families import FAMILIES
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.regression import OBJECTIVES
from tensorlens_utils.lenses.training import train

# Runs of 24 steps, a state at every third: undisturbed, killed three times, and by two processes. Those are forked from
# one process that has everything imported, so that they start at once.
SCRIPT = """
import json, os, signal, sys, time
import multiprocessing

import torch
from accelerate import Accelerator, debug_launcher
from tensorlens_utils import load_model
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.training import _Run, train

torch.set_num_threads(1)
folder, step = sys.argv[1], _Run.step
fork = multiprocessing.get_context("fork")
began, done = fork.Value("i", 0), fork.Value("i", 0)

model, tokenizer = load_model("tiny-attn")
heads, g = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer), torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(3, 68, (4, 24), generator=g)} for _ in range(7)]

def run(name, family, objective, pause=0.0, accelerator=None):
    began.value = done.value = 0

    def counted(self, *args):
        began.value = began.value or self.done + 1
        time.sleep(pause)
        step(self, *args)
        done.value = self.done

    _Run.step = counted
    train(heads, batches[2:], held_out=batches[:2], family=family, objective=objective, steps=24, warm=3,
          path=f"{folder}/{name}", save_every=3, progress=False, accelerator=accelerator)

def start(*args):
    process = fork.Process(target=run, args=args)
    process.start()
    return process

def shared(name):
    run(name, "full", "kl", accelerator=Accelerator(cpu=True))

g, told = torch.Generator().manual_seed(0), {}
for family, objective in (("full", "kl"), ("translator", "reverse"), ("low rank", "sum"), ("shared by layer", "next")):
    run(f"{family}, whole", family, objective)
    killed = []
    for at in torch.randint(1, 23, (3,), generator=g).sort().values.tolist():
        done.value = 0
        process = start(f"{family}, killed", family, objective, 0.01)
        while done.value < at and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed.append((done.value, process.exitcode))
    last = start(f"{family}, killed", family, objective)
    last.join()
    told[family] = {"killed": killed, "went on from": began.value, "exit": last.exitcode}
print(json.dumps(told), flush=True)
debug_launcher(shared, ("two",), num_processes=2)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with all files, and what the runs told."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[0])


def case():
    model, tokenizer = load_model("tiny-attn")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    g = torch.Generator().manual_seed(1)
    return heads, [{"input_ids": torch.randint(3, 68, (4, 24), generator=g)} for _ in range(12)]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_starts_from_more_than_the_unigram(family):
    model, tokenizer = load_model("tiny-gpt")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    through = FAMILIES[family].through_unembedding
    batches = [heads.capture({"input_ids": world.Text(k).rows(1)}, scale=through) for k in range(16)]
    held = batches[1:5]  # it is to learn these
    found = train(heads, batches, held_out=held, family=family, steps=16, warm=15, progress=False)
    kl = {name: torch.tensor(found.about["held_out"][name]).median() for name in ("unigram", "start", "end")}
    assert kl["end"] < kl["start"] < kl["unigram"]
    mean = torch.cat([found.kl(seen) for seen in held], 1).mean(1)
    assert torch.allclose(mean, torch.tensor(found.about["held_out"]["end"]), rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_what_training_makes_small(objective):
    from tensorlens_utils.lenses.regression import losses

    heads, batches = case()
    seen = [heads.capture(batch) for batch in batches]
    seen = [s[s.following >= 0] for s in seen]
    before, after = (train(heads, seen, objective=objective, steps=steps, warm=6, progress=False) for steps in (0, 30))
    mean = [sum(losses(found.family, s, objective).mean() for s in seen[:6]) for found in (before, after)]
    assert mean[1] < mean[0] - (1e-6 if objective == "logits" else 1e-2)


def test_the_sum_over_a_layers_heads_is_learned_at_the_last_position_and_taken_apart():
    heads, batches = case()
    found = train(heads, batches, objective="sum", steps=5, warm=6, progress=False)
    assert found.about["positions"] == "last" and found.about["tokens"] == 5 * 4
    seen = heads.capture(batches[0]).at("last")
    together = found.family.parameters["b"][0] + sum(found.said(seen)[:4])
    W = found.family.parameters["W"]
    assert W.shape == (8, 68, 16) and torch.equal(found.family.parameters["b"][0], found.family.parameters["b"][3])
    kl = (seen.p * (seen.log_p - together.log_softmax(-1))).sum(-1).mean()
    flat = (seen.p * (seen.log_p - found.family.parameters["b"][0].log_softmax(-1))).sum(-1).mean()
    assert kl < flat


def test_captured_batches_and_inputs_give_the_same_lenses():
    heads, batches = case()
    lenses = [train(heads, given, steps=4, warm=3, progress=False)
              for given in (batches, [heads.capture(batch) for batch in batches])]
    assert all(torch.equal(*(found.family.parameters[k] for found in lenses)) for k in "Wb")


def test_moments_from_another_run_are_taken_as_they_are():
    from tensorlens_utils.lenses.families import Moments

    heads, batches = case()
    m = Moments()
    for batch in batches[1:4]:
        m.add(heads.capture(batch))
    m.close()
    lenses = [train(heads, batches, steps=2, warm=3, progress=False, **extra) for extra in ({}, {"moments": m})]
    assert torch.equal(*(found.family.parameters["W"] for found in lenses))


# ------------------------------------------------------------------------------------------------------- killed, shared


@pytest.mark.parametrize("family", ["full", "translator", "low rank", "shared by layer"])
def test_a_run_killed_three_times_ends_in_the_same_file(runs, family):
    folder, told = runs
    killed, went_on = told[family]["killed"], told[family]["went on from"]
    assert [code for _, code in killed] == [-signal.SIGKILL] * 3 and told[family]["exit"] == 0
    assert 1 < went_on <= 24 and went_on > killed[-1][0] - 3  # it went on, and did not begin again
    assert (folder / f"{family}, killed").read_bytes() == (folder / f"{family}, whole").read_bytes()


def test_two_processes_give_the_lenses_of_one(runs):
    folder, _ = runs
    a, b = load_file(folder / "full, whole"), load_file(folder / "two")
    for name in a:
        assert float((a[name] - b[name]).norm()) < 1e-5 * float(a[name].norm()), name
    about = [json.loads(safe_open(folder / name, "pt").metadata()["lens"]) for name in ("full, whole", "two")]
    assert about[0]["tokens"] == about[1]["tokens"] == 24 * 4 * 24
    measured = [torch.tensor([*one["held_out"]["end"]]) for one in about]
    assert torch.allclose(*measured, rtol=1e-4)


def test_nothing_but_the_lenses_stays_behind(runs):
    assert sorted(os.listdir(runs[0])) == sorted([f"{family}, {how}" for family in runs[1]
                                                  for how in ("whole", "killed")] + ["two"])  # fmt: skip


def test_a_finished_file_is_given_back_and_anothers_is_refused(tmp_path):
    heads, batches = case()
    path = tmp_path / "lens"
    made = train(heads, batches, steps=2, warm=3, path=path, progress=False)
    stamp = path.stat().st_mtime_ns
    time.sleep(0.01)
    again = train(heads, batches, steps=2, warm=3, path=path, progress=False)
    assert path.stat().st_mtime_ns == stamp and again.about == made.about
    with pytest.raises(ValueError, match="steps was 2, now is 3.*remove the file"):
        train(heads, batches, steps=3, warm=3, path=path, progress=False)
    with pytest.raises(ValueError, match="text was"):
        train(heads, batches[1:], steps=2, warm=3, path=path, progress=False)


def test_refusals():
    heads, batches = case()
    with pytest.raises(ValueError, match="family must be one of full, .*'fulll'"):
        train(heads, batches, family="fulll")
    with pytest.raises(ValueError, match="at least one batch"):
        train(heads, Rows(["too short"], heads.processor))
    with pytest.raises(ValueError, match="rank of a lens lies in 1..16"):
        train(heads, batches, family="low rank", rank=17)


def test_progress_tells_the_held_out_kl(capsys):
    heads, batches = case()
    train(heads, batches, held_out=batches[:1], steps=4, warm=3, save_every=2)
    assert capsys.readouterr().out.startswith("full, kl              2 of 4 steps   held-out KL, median head: ")


# ----------------------------------------------------------------------------------------------------------------- text


def test_rows_follow_one_another_without_a_gap():
    _, tokenizer = load_model("tiny-gpt")
    texts = load_data("stories")["text"][:40]
    rows = torch.cat([batch["input_ids"] for batch in Rows(texts, tokenizer, rows=2, length=10)])
    whole = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert rows.flatten().tolist() == whole[:rows.numel()] and 0 <= len(whole) - rows.numel() < 20
    stream = load_data("stories").select(range(40)).to_iterable_dataset()
    twice = [torch.cat([b["input_ids"] for b in Rows(stream, tokenizer, rows=2, length=10)]) for _ in range(2)]
    assert torch.equal(twice[0], rows) and torch.equal(twice[1], rows)


def test_examples_are_padded_and_cut():
    _, tokenizer = load_model("tiny-bert")
    batches = [*Examples(load_data("reviews").select(range(5)), tokenizer, rows=2)]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1] and not batches[0]["attention_mask"].all()
    assert next(iter(Examples(["a " * 1000], tokenizer)))["input_ids"].shape == (1, 64)
