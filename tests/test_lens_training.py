"""Training lenses: what it reaches, runs that are killed (really), several processes, streams of text, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tensorlens_utils import load_data, load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses.data import Examples, Rows
from tensorlens_utils.lenses.families import FAMILIES
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.regression import OBJECTIVES, losses
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
from tensorlens_utils.lenses.training import Run, train

torch.set_num_threads(1)
folder, step = sys.argv[1], Run.step
fork = multiprocessing.get_context("fork")
began, done = fork.Value("i", 0), fork.Value("i", 0)

model, tokenizer = load_model("tiny-attn")
heads, g = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer), torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(3, 68, (4, 24), generator=g)} for _ in range(7)]

# the first process has long texts, the second short ones, none of which comes to position 9
short = torch.ones(4, 24, dtype=torch.long)
short[1::2, 7:] = 0
uneven = [{"input_ids": batch["input_ids"] * short, "attention_mask": short} for batch in batches]

def run(name, family, objective, pause=0.0, accelerator=None, text=batches, **options):
    began.value = done.value = 0

    def counted(self, *args):
        began.value = began.value or self.done + 1
        time.sleep(pause)
        step(self, *args)
        done.value = self.done

    Run.step = counted
    train(heads, text[2:], held_out=text[:2], family=family, objective=objective, steps=24, warm=3,
          path=f"{folder}/{name}", save_every=3, progress=False, accelerator=accelerator, **options)

def start(*args):
    process = fork.Process(target=run, args=args)
    process.start()
    return process

def shared(name):
    run(name, "full", "kl", accelerator=Accelerator(cpu=True))
    for what, options in UNEVEN.items():
        run(f"{what}, {name}", "full", "kl", accelerator=Accelerator(cpu=True), text=uneven, **options)

UNEVEN = {"all": {}, "at 9": {"positions": 9}}
for what, options in UNEVEN.items():
    run(f"{what}, one", "full", "kl", text=uneven, **options)
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


@pytest.mark.parametrize(("what", "positions"), [("all", 2 * (24 + 7)), ("at 9", 2)])
def test_two_processes_of_which_one_has_less_to_read_or_nothing_give_the_lenses_of_one(runs, what, positions):
    folder, _ = runs
    a, b = (load_file(folder / f"{what}, {how}") for how in ("one", "two"))
    for name in a:
        assert float((a[name] - b[name]).norm()) < 1e-4 * float(a[name].norm()), name
    about = [json.loads(safe_open(folder / f"{what}, {how}", "pt").metadata()["lens"]) for how in ("one", "two")]
    assert about[0]["tokens"] == about[1]["tokens"] == 24 * positions
    assert about[0]["held_out"]["alpha"] == about[1]["held_out"]["alpha"]


def test_nothing_but_the_lenses_stays_behind(runs):
    made = [f"{family}, {how}" for family in runs[1] for how in ("whole", "killed")]
    made += ["two", *(f"{what}, {how}" for what in ("all", "at 9") for how in ("one", "two"))]
    assert sorted(os.listdir(runs[0])) == sorted(made)


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
    later = [*batches[:3], batches[5], *batches[4:]]  # the first batch is the same, and so is the second
    square = [{"input_ids": batch["input_ids"].view(8, 12)} for batch in batches]
    for other in (batches[1:], later, square, [heads.capture(batch) for batch in batches]):
        with pytest.raises(ValueError, match="text was"):
            train(heads, other, steps=2, warm=3, path=path, progress=False)
    m, m_too = (Moments.of(heads.capture(batch) for batch in some) for some in (batches[1:4], later[1:4]))
    for changed, what in (({"held_out": batches[:1]}, "held_out_text was None"), ({"moments": m}, "moments was None")):
        with pytest.raises(ValueError, match=what):
            train(heads, batches, steps=2, warm=3, path=path, progress=False, **changed)
    train(heads, batches, steps=2, moments=m, held_out=batches[:1], path=tmp_path / "two", progress=False)
    train(heads, batches, steps=2, moments=m, held_out=batches[:1], path=tmp_path / "two", progress=False)
    for changed, what in (({"held_out": batches[:2]}, "held_out_text was"), ({"moments": m_too}, "moments was")):
        with pytest.raises(ValueError, match=what):
            train(heads, batches, path=tmp_path / "two", progress=False,
                  **{"steps": 2, "moments": m, "held_out": batches[:1]} | changed)  # fmt: skip
    changed, _ = load_model("tiny-attn")
    next(changed.parameters()).data *= 1 + 0.05 * torch.randn(68, 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="this one is another: its weights are others"):
        train(Heads(changed, heads.example, heads.processor), batches, steps=2, warm=3, path=path, progress=False)


def test_a_run_knows_how_a_captured_batch_was_captured(tmp_path):
    heads, batches = case()
    seen = [heads.capture(batch) for batch in batches]
    made = train(heads, seen, steps=1, warm=3, path=tmp_path / "a", progress=False)
    assert all(s.p is not None for s in seen), "a number that was made from others since"
    assert train(heads, seen, steps=1, warm=3, path=tmp_path / "a", progress=False).about == made.about
    other = [replace(s, log_p=s.log_p.roll(1, 1)) for s in seen]
    with pytest.raises(ValueError, match="text was"):
        train(heads, other, steps=1, warm=3, path=tmp_path / "a", progress=False)


def test_moments_that_do_not_fit_are_refused():
    heads, batches = case()
    seen = [heads.capture(batch) for batch in batches]
    kl, logits = Moments.of(seen), Moments.of(seen, of_logits=True)
    for m, objective in ((kl, "logits"), (logits, "kl"), (kl, "sum")):
        with pytest.raises(ValueError, match="moments are of what is learned from.*leave them out"):
            train(heads, batches, objective=objective, moments=m, progress=False)
    with pytest.raises(ValueError, match="captured without it"):
        train(heads, batches, family="translator", moments=kl, progress=False)
    scaled = Moments.of(heads.capture(batch, scale=True) for batch in batches[1:4])
    for family, objective, m in (("translator", "kl", scaled), ("full", "logits", Moments.of(seen[1:4], True))):
        lenses = [train(heads, batches, family=family, objective=objective, steps=2, warm=3, progress=False, **extra)
                  for extra in ({}, {"moments": m})]  # fmt: skip
        for name, p in lenses[0].family.parameters.items():
            assert torch.equal(p, lenses[1].family.parameters[name]) and p.isfinite().all()


def test_a_batch_without_the_positions_asked_for_is_passed_over_but_not_the_first():
    heads, batches = case()
    short = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    a, b = (train(heads, text, positions=3, steps=5, warm=2, progress=False)
            for text in ([*batches[:4], short], [*batches[:4], {"input_ids": short["input_ids"].flip(1)}]))
    assert a.about["tokens"] == 4 * 4 and torch.equal(a.family.parameters["W"], b.family.parameters["W"])
    with pytest.raises(ValueError, match="none of the positions asked for, 3: begin"):
        train(heads, [short, *batches], positions=3, progress=False)
    with pytest.raises(ValueError, match="held out, and it has none of the positions asked for, 3"):
        train(heads, batches, held_out=[short], positions=3, progress=False)


def test_products_in_bfloat16_and_batches_in_bfloat16_train():
    heads, batches = case()
    a, b = (train(heads, batches, steps=20, warm=6, precision=p, progress=False) for p in (None, torch.bfloat16))
    gap = (a.family.parameters["W"] - b.family.parameters["W"]).norm() / a.family.parameters["W"].norm()
    assert 1e-5 < gap < 0.1 and b.about["precision"] == "torch.bfloat16"
    model, processor = load_model("tiny-vit", dtype="bfloat16")
    images = [{k: v.bfloat16() for k, v in batch.items()}
              for batch in Examples(load_data("digits").select(range(60)), processor, 20, "image")]
    found = train(Heads(model, images[0], processor), images, positions=0, steps=2, warm=2, progress=False)
    assert found.family.parameters["W"].isfinite().all() and found.about["dtype"] == "torch.bfloat16"


def test_refusals():
    heads, batches = case()
    with pytest.raises(ValueError, match="family must be one of full, .*'fulll'"):
        train(heads, batches, family="fulll")
    with pytest.raises(ValueError, match="at least one batch, and there is none: is the text shorter"):
        train(heads, Rows(["too short"], heads.processor))
    with pytest.raises(ValueError, match="there is none held out: is the text shorter"):
        train(heads, batches, held_out=Rows(["too short"], heads.processor))
    with pytest.raises(ValueError, match="the first batch settles α and the next `warm` the moments"):
        train(heads, batches[:1])
    for family in ("shared by layer", "shared by model"):
        with pytest.raises(ValueError, match="a shared lens reads what each head writes by itself"):
            train(heads, batches, family=family, objective="sum")
    for wrong in ({"steps": -1}, {"save_every": 0}, {"warm": -1}):
        with pytest.raises(ValueError, match="steps and warm are counted from 0, save_every from 1"):
            train(heads, batches, **wrong)
    for once in ((batch for batch in batches), iter(batches), batches[0], heads.processor(["a"])):
        with pytest.raises(ValueError, match="^batches are gone through more than once"):
            train(heads, once)
        with pytest.raises(ValueError, match="^batches held out are gone through more than once"):
            train(heads, batches, held_out=once)

    class Spent:
        rest = iter(batches)

        def __iter__(self):
            yield from self.rest

    with pytest.raises(ValueError, match="there are none any more"):
        train(heads, Spent(), warm=20)
    with pytest.raises(TypeError, match="'Captured' object is not iterable"):
        train(heads, heads.capture(batches[0]))
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


@pytest.mark.parametrize("kind", [Rows, Examples])
def test_one_text_splits_and_streams_that_end_are_no_data(kind):
    _, tokenizer = load_model("tiny-gpt")
    for wrong in ("the capital of france is", {"train": ["a"], "test": ["b"]}, iter(["a"])):
        with pytest.raises(ValueError, match="data are gone through more than once"):
            kind(wrong, tokenizer)
    with pytest.raises(ValueError, match="the column is one of 'kind', 'words'; 'text' is none"):
        next(iter(kind([{"kind": 1, "words": "a"}], tokenizer)))


def test_rows_of_one_long_text_are_those_of_its_tokens():
    _, tokenizer = load_model("tiny-gpt")
    text = " ".join(load_data("stories")["text"][:30])
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    rows = [batch["input_ids"] for batch in Rows([text], tokenizer, 2, 10)]
    assert len(rows) == len(ids) // 20 > 10 and torch.cat(rows).flatten().tolist() == ids[:20 * len(rows)]


def test_examples_are_padded_and_cut():
    _, tokenizer = load_model("tiny-bert")
    batches = [*Examples(load_data("reviews").select(range(5)), tokenizer, rows=2)]
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1] and not batches[0]["attention_mask"].all()
    assert next(iter(Examples(["a " * 1000], tokenizer)))["input_ids"].shape == (1, 64)
