"""Lenses on real text: what notebook 07 draws of long training and of a real pretrained model is what is measured.

The second half needs stories260K and TinyStories, which are not part of the repository (conftest.py says where they are
looked for); without them it is skipped.
"""

import json
from pathlib import Path

import numpy as np
import torch
from measurements import lenses_grid
from measurements.lenses import HELD_OUT, STEPS, STORIES, TEXT, real, rounded, tiny

from tensorlens_utils import load_model
from tensorlens_utils.intervals import interval
from tensorlens_utils.lenses.data import Rows
from tensorlens_utils.lenses.families import FAMILIES
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.training import train

HERE = Path(__file__).parent / "measurements"
MEASURED, GRID = (json.loads((HERE / name).read_text(encoding="utf-8")) for name in ("lenses.json", "lenses_grid.json"))


def test_the_table_that_the_notebook_draws_is_complete():
    far = MEASURED["tiny-gpt"]
    assert [*far["closed form"]] == [str(n) for n in TEXT] and [*far["full"]] == [str(n) for n in STEPS]
    assert [*far["translator"]] == ["1000"]
    rows = [far["unigram"], *(x for name in ("closed form", "full", "translator") for x in far[name].values())]
    assert {len(x) for x in rows} == {HELD_OUT} and all(len({*x}) == HELD_OUT for x in rows)
    found = MEASURED["stories260K"]
    assert {len(x) for x in found["kl"].values()} == {STORIES} and (found["layers"], found["heads"]) == (5, 40)
    assert found["ablation"].keys() == found["kl"].keys() - {"bias only"}
    assert {len(x) for table in found["ablation"].values() for x in table.values()} == {STORIES}


def test_the_closed_form_closes_more_than_half_of_the_gap():
    far = {name: np.array([*x.values()]) if isinstance(x, dict) else np.array(x)
           for name, x in MEASURED["tiny-gpt"].items()}  # fmt: skip
    assert interval(far["unigram"] - far["closed form"][-1], of=far["unigram"] - far["full"][-1])[1] > 0.5
    assert interval(far["full"][-2] - far["full"][-1])[0] < 0.02  # four times as many steps: there is little to come
    assert interval(far["translator"][0] - far["full"][1])[1] > -0.02


def test_the_table_says_what_is_measured_again():
    again = rounded(tiny(TEXT[:1], families=()))
    assert np.allclose(again["closed form"][80], MEASURED["tiny-gpt"]["closed form"]["80"], atol=2e-3)


def test_the_grid_has_every_family_under_every_objective_that_it_can_take():
    goals = lenses_grid.OBJECTIVES
    taken = {f"{family} | {goal}" for family in FAMILIES for goal in goals if lenses_grid.goes(family, goal)}
    assert len(taken) == 5 * 4 + 3 * 2 and {*GRID} == taken | {"unembedding", "bias only", "torch", "steps", "rows"}
    for name in taken | {"unembedding", "bias only"}:
        assert {key: len(values) for key, values in GRID[name].items()} == {
            "kl": lenses_grid.HELD_OUT, **dict.fromkeys(("named", "correlation", "weighted"), lenses_grid.TEXTS)}
    assert (GRID["steps"], GRID["rows"]) == (lenses_grid.STEPS, lenses_grid.BATCHES * lenses_grid.ROWS)


def test_the_grid_says_what_is_measured_again():
    goals = {"sum, last": lenses_grid.OBJECTIVES["sum, last"]}
    for name, one in lenses_grid.rounded(lenses_grid.grid(["full"], goals)).items():
        for key, values in one.items():
            assert np.allclose(values, GRID[name][key], atol=5e-3), (name, key)


def test_a_real_models_lenses_are_what_the_table_says_and_hear_a_story(shared_data):
    again = real(shared_data, steps=0)
    for name in ("unembedding", "bias only", "closed form"):
        assert np.allclose(again["kl"][name], MEASURED["stories260K"]["kl"][name], atol=2e-3), name
    for name in ("unembedding", "closed form"):
        for key, values in MEASURED["stories260K"]["ablation"][name].items():
            assert np.allclose(again["ablation"][name][key], values, atol=5e-3), (name, key)


def test_lenses_of_a_real_model_are_trained_kept_and_read(shared_data, tmp_path):
    model, tokenizer = load_model(shared_data / "stories260K", dtype="float32")
    tokenizer.pad_token = tokenizer.eos_token
    heads = Heads(model, tokenizer(["Once upon a time"], return_tensors="pt"), tokenizer)
    text = (shared_data / "text" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    batches = [batch for _, batch in zip(range(60), Rows(text, tokenizer, 4, 64), strict=False)]
    options = {"held_out": batches[40:], "steps": 40, "warm": 20, "path": tmp_path / "lens.safetensors"}
    lens = train(heads, batches[:40], progress=False, **options)
    way = {name: torch.tensor(lens.about["held_out"][name]).median() for name in ("unigram", "start", "end")}
    assert way["end"] < way["start"] < way["unigram"] - 0.1
    assert lens.about["model"] == "stories260K" and len(heads.names) == 40
    first = lens.top_tokens("Once upon a time, there was a little", layer=4, head=0, k=3)
    assert all(isinstance(word, str) and 0 < p < 1 for word, p in first)
    table = lens.table("Once upon a time", layer=2)
    assert [len(row) for row in table] == [len(tokenizer("Once upon a time").input_ids)] * 8
