"""Real text: what notebook 05 draws of a real model on real stories, and rationales that people gave for real reviews.

The files are not part of the repository (conftest.py says where they are looked for); without them all but the first
test is skipped.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from measurements.stories260K import FRACTIONS, LENGTH, METHODS, STORIES, TASKS, measure, model_and_stories

from tensorlens_utils import linearize
from tensorlens_utils.collapse import class_map
from tensorlens_utils.perturbation import compare
from tensorlens_utils.perturbation.batches import answers
from tensorlens_utils.perturbation.evidence import areas, evaluate_evidence, load_rationales

MEASURED = json.loads((Path(__file__).parent / "measurements" / "stories260K.json").read_text(encoding="utf-8"))
FILES = [("SST", 263), ("dynasent", 471)]  # texts for whose label some annotator gave a rationale


def test_the_table_that_the_notebook_draws_is_complete():
    assert (MEASURED["stories"], MEASURED["tokens"], MEASURED["fractions"]) == (STORIES, LENGTH, FRACTIONS)
    assert len(MEASURED["right"]) == STORIES and MEASURED["tasks"].keys() == TASKS.keys()
    for orders in MEASURED["tasks"].values():
        assert [*orders] == ["morf", "lerf"]
        for found in orders.values():
            assert found.keys() == METHODS.keys()
            values = np.array([*found.values()])
            assert values.shape == (len(METHODS), STORIES) and values.min() > 0 and values.max() < 1
            assert len(np.unique(values)) > STORIES


@pytest.fixture(scope="module")
def stories(shared_data):
    return model_and_stories(shared_data)


@pytest.mark.parametrize("task", TASKS)
def test_the_table_says_what_is_measured_again(stories, task):
    model, tokenizer, rows = stories
    places = range(3, STORIES, 25)
    methods = {name: METHODS[name] for name in ("class", "norm", "rollout", "gradient × input", "random")}
    found = measure(model, tokenizer, rows.select(places), methods, {task: TASKS[task]})[task]
    for order, of_order in found.items():
        for name, values in of_order.items():
            expected = np.array(MEASURED["tasks"][task][order][name])[places]
            assert np.allclose(values, expected, atol=2e-4), (order, name)


def test_a_real_models_answers_are_split_exactly(stories):
    model, tokenizer, rows = stories
    inputs = tokenizer(rows[:16]["text"], truncation=True, max_length=LENGTH, return_tensors="pt")
    T, logits = linearize(model, inputs), answers(model, inputs)
    pairs = logits.topk(2).indices
    for target, true in ((pairs[:, 0], logits.amax(1)), (pairs, logits.gather(1, pairs) @ torch.tensor([1.0, -1.0]))):
        split = class_map(T, target)
        added = split.scores.abs().sum(1) + split.bias.abs()
        assert ((split.total - true).abs() <= 1e-5 * added).all()
    assert (split.scores.abs().sum(1) > 0.1).all()


@pytest.mark.parametrize(("file", "n"), FILES)
def test_rationales_are_found_by_who_knows_them_through_any_pieces(shared_data, tmp_path, file, n):
    """A tokenizer of pieces, trained on these very texts, and a random BERT of the user's. Which word a token belongs
    to is asked of the tokenizer in its own way, given the words one by one."""
    rows = load_rationales(shared_data / "fair_rationales" / f"{file}_rationales_no_demographics.json")
    rows = rows.filter(lambda row: row["annotators"] > 0)
    assert len(rows) == n
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(rows["text"][:], vocab_size=600, show_progress=False)
    made.save_model(str(tmp_path))
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path, model_max_length=256)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=8)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    marks, pieces = {}, 0
    for row in rows:
        given = tokenizer(row["text"].split(), is_split_into_words=True)
        marks[tuple(given.input_ids)] = [-1 if word is None else row["evidence"][word] for word in given.word_ids()]
        pieces += len(given.input_ids) - 2 - len(row["evidence"])
    assert pieces > len(rows)  # many words come in several

    def known(model, inputs, target):
        return torch.tensor([marks[tuple(ids[mask.bool()].tolist())] + [-1] * int((mask == 0).sum())
                             for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]).float()

    methods = {m: METHODS[m] for m in ("rollout", "random")} | {"known": known, "opposite": lambda *x: -known(*x)}
    table = evaluate_evidence(model, tokenizer, rows, methods, target="label", progress=False)
    found = areas(table)
    assert (found["known"] == 1).all() and len(found["known"]) > 0.9 * n
    assert [s.name for s in compare(found)][0] == "known" and [s.name for s in compare(found)][-1] == "opposite"
    assert [row["target"] for row in table.where(method="known")] == rows["label"][:]
