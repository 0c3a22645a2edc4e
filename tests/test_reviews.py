"""The generated film reviews, whose label and evidence follow from rules, and tiny-bert, which reads them."""

import dataclasses
import random
import re
from collections import Counter

import pytest
import torch

from tensorlens_utils.data import reviews as room
from tensorlens_utils.data.reviews import GRAMMAR, KINDS, LABELS, WORDS, reviews, unseen, vocabulary
from tensorlens_utils.models import card, load_model
from tensorlens_utils.recipes.reviews import LENGTH, RECIPES, measure
from tensorlens_utils.recipes.training import train

RECIPE, = RECIPES
POLARITY = {word: label for lists in GRAMMAR["polar"].values() for label, name in enumerate(LABELS)
            for word in lists[name]}
NEGATORS = r"\b(not|never|hardly|nothing|nobody|by no means|far from|anything but)\b"
SOURCES = rf"\b({'|'.join(GRAMMAR['words']['some'])})\b"


def opinions(text):
    """What the rules of the room's docstring say of a text, read without its grammar: for each opinion whether it
    counts, whether it is hearsay, its polarity, and the words that decide it."""
    found = []
    for sentence in text.split(" ."):
        parts = sentence.strip().split(" , ")
        turn = next((i for i, part in enumerate(parts) if re.match(r"(but|yet)\b", part)), 0)
        for i, part in enumerate(parts):
            for word in set(part.split()) & POLARITY.keys():
                negator = re.findall(NEGATORS, part)
                conceded, hearsay = i < turn or part.startswith("while "), bool(re.search(SOURCES, part))
                found.append((conceded, hearsay, POLARITY[word] ^ len(negator), [*negator, word]))
    alone = sum(not hearsay for _, hearsay, *_ in found) == 1
    return [(not hearsay and (alone or not conceded), hearsay, *rest) for conceded, hearsay, *rest in found]


def evidence_words(row):
    return [word for word, decides in zip(row["text"].split(), row["evidence"], strict=True) if decides]


# --- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_and_evidence_follow_from_the_stated_rules_alone(split):
    for row in reviews(2400, 3, split):
        said = opinions(row["text"])
        (_, _, polarity, words), = (opinion for opinion in said if opinion[0])
        assert polarity == row["label"] and " ".join(words) == " ".join(evidence_words(row)), row
        assert (len(words) == 2) == ("negated" in row["kind"]), row
        assert any(hearsay for _, hearsay, *_ in said) == ("hearsay" in row["kind"]), row
        assert len(said) == (1 if row["kind"] in ("plain", "negated") else 2), row


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_label_changes_one_word_of_evidence_and_nothing_else(kind):
    for seed in range(100):
        (negative, same), (positive, also) = (room._compose(random.Random(seed), kind, label) for label in (0, 1))
        (words, decides), (others, decide) = room._read(negative), room._read(positive)
        changed = [i for i, pair in enumerate(zip(words, others, strict=True)) if pair[0] != pair[1]]
        assert decides == decide and len(changed) == 1 and decides[changed[0]] == 1 and same == also
        assert {POLARITY[words[changed[0]]], POLARITY[others[changed[0]]]} == {0, 1}


def test_every_polar_word_has_a_counterpart_and_no_second_polarity():
    for lists in GRAMMAR["polar"].values():
        assert len(lists["positive"]) == len(lists["negative"]) == len({*lists["positive"], *lists["negative"]}) / 2
    twin = {word: other for lists in GRAMMAR["polar"].values()
            for pair in zip(lists["positive"], lists["negative"], strict=True)
            for word, other in (pair, pair[::-1])}
    assert len(twin) == sum(len(lists[name]) for lists in GRAMMAR["polar"].values() for name in LABELS)
    for negator, words in GRAMMAR["unseen"].items():
        assert {twin[word] for word in words} == set(words), f"a counterpart is missing after {negator!r}"


@pytest.mark.parametrize("split", ["train", "test"])
def test_kinds_and_labels_are_balanced_and_a_seed_settles_all(split):
    rows = reviews(240, 0, split)
    count = Counter((row["kind"], row["label"]) for row in rows)
    assert count == {(kind, label): 10 if "negated" in kind else 20 for kind in KINDS for label in (0, 1)}
    assert rows == reviews(240, 0, split) != reviews(240, 1, split)
    for row in rows:
        assert 2 <= row["text"].count(" .") <= 5 and len(row["evidence"]) == len(row["text"].split()) <= WORDS
    with pytest.raises(ValueError, match='split must be "train" or "test", not \'validation\''):
        reviews(1, split="validation")


def test_no_text_is_in_both_splits_and_no_unseen_pair_in_training():
    rows = {split: reviews(6000, 5, split) for split in ("train", "test")}
    texts = {split: {row["text"] for row in mine} for split, mine in rows.items()}
    assert not texts["train"] & texts["test"] and all(len(mine) > 5900 for mine in texts.values())
    met = {split: {tuple(words) for row in mine for *_, words in opinions(row["text"])} for split, mine in rows.items()}
    listed = {(negator, word) for negator, words in GRAMMAR["unseen"].items() for word in words}
    assert not met["train"] & listed and met["test"] >= listed  # none is listed that no text could hold
    assert {word for pair in listed for word in pair} <= {word for words in met["train"] for word in words}
    novel = [row for row in rows["test"] if unseen(row["text"].split(), row["evidence"])]
    assert 100 < len(novel) < 600


# --- words and tokens ------------------------------------------------------------------------------------------------


def test_word_i_is_token_i_plus_1():
    tokenizer = RECIPE.build()[1]
    rows = reviews(6000, 6)
    assert {word for row in rows for word in row["text"].split()} == set(vocabulary())
    assert 250 <= len(vocabulary()) <= 400 and len(tokenizer) == len(vocabulary()) + 5
    for row in rows[:500]:
        ids = tokenizer(row["text"]).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *row["text"].split(), "[SEP]"]
        assert len(ids) <= LENGTH and tokenizer.unk_token_id not in ids
    assert tokenizer("the plot was [MASK] good .").input_ids[4] == tokenizer.mask_token_id


# --- tiny-bert -------------------------------------------------------------------------------------------------------


def test_training_batches_are_reviews_with_words_masked():
    tokenizer = RECIPE.build()[1]
    batch = RECIPE.batch(600, torch.Generator().manual_seed(0))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    masked = ids == tokenizer.mask_token_id
    share = masked.sum(1) / (mask.sum(1) - 2)
    assert 0.15 < (share > 0).float().mean() < 0.3 and 0.2 < share[share > 0].mean() < 0.3
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and torch.equal(ids == tokenizer.pad_token_id, ~mask)
    assert ((ids == tokenizer.sep_token_id).sum(1) == 1).all() and batch["labels"].sum() == 300


def test_a_few_steps_of_the_recipe_lower_the_loss(tmp_path):
    batch = RECIPE.batch(24, torch.Generator().manual_seed(1))
    once = dataclasses.replace(RECIPE, warmup=5, batch=lambda n, generator: batch)  # the same batch in every step
    before, after = (train(dataclasses.replace(once, steps=steps), tmp_path, progress=False).model(**batch).loss
                     for steps in (0, 40))
    assert after < before - 0.1


def test_the_shipped_model_keeps_its_bars_on_fresh_reviews():
    model, tokenizer = load_model("tiny-bert")
    fresh, stated = measure(model, tokenizer, n=4008, seed=2), card("tiny-bert")
    for key, number in fresh.items():
        print(f"{key}: {number['value']:.3f} ({number['low']:.3f} to {number['high']:.3f}, n = {number['n']})")
    assert fresh["accuracy"]["value"] >= 0.97
    assert min(fresh[f"accuracy, {need}"]["value"] for need in ("negated", "contrasted", "hearsay")) >= 0.95
    assert fresh["accuracy, negator and polar word never seen together"]["value"] >= 0.9
    assert fresh["accuracy, evidence masked"]["value"] < 0.6
    assert fresh["accuracy, as many other words masked"]["value"] > 0.85
    assert fresh["accuracy of a bag of words"]["value"] < 0.7
    assert fresh.keys() == {key for key, number in stated.items() if isinstance(number, dict)}
    for key, number in fresh.items():  # other reviews, so the two intervals need only meet
        assert number["low"] <= stated[key]["high"] and stated[key]["low"] <= number["high"], key
