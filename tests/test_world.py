"""The micro-world: the laws of its text, and the language models that learned it."""

import dataclasses
import random

import pytest
import torch

from tensorlens_utils import recipes
from tensorlens_utils.data import world
from tensorlens_utils.models import card, load_model
from tensorlens_utils.recipes.training import share, train
from tensorlens_utils.recipes.world import recalled

MODELS, RECALL = [recipe.name for recipe in recipes.world.RECIPES], 0.95
FACTS = [(relation, subject, object_) for relation in world.relations().values()
         for subject, object_ in relation.facts.items()]
SENTENCE = "the capital of france is"  # the running sentence of the series


@pytest.fixture(scope="module")
def documents():
    text = world.Text(3)
    return [text.document() for _ in range(10_000)]


# --- facts and wordings ----------------------------------------------------------------------------------------------


def test_eight_relations_and_more_of_twenty_to_fifty_facts_in_several_wordings():
    assert len(world.relations()) >= 8
    for relation in world.relations().values():
        assert 20 <= len(relation.facts) <= 50 and len(relation.wordings) >= 5 and len(relation.held_out) >= 2
        for wording in relation.wordings + relation.held_out:
            assert wording.count("{subject}") == 1 and wording.endswith(" {object}") and wording.count("{") == 2


def test_objects_are_one_word_and_half_of_the_subjects_are_two_or_three():
    lengths = [len(subject.split()) for _, subject, _ in FACTS]
    assert all(" " not in object_ for *_, object_ in FACTS) and set(lengths) == {1, 2, 3}
    several = [fact for fact, length in zip(FACTS, lengths, strict=True) if length > 1]
    assert len(several) / len(FACTS) >= 0.5
    # of most of them, a word stands in another subject of the relation too, with another object
    shared = [any(other is relation and object_ != true and set(words.split()) & set(subject.split())
                  for other, words, object_ in FACTS) for relation, subject, true in several]
    print(f"{len(several)} of {len(FACTS)} subjects have several words; {sum(shared)} of them share one")
    assert sum(shared) / len(several) >= 0.7


def test_a_held_out_wording_neither_holds_nor_is_held_by_one_of_training():
    for relation in world.relations().values():
        for held in relation.held_out:
            assert not any(held in wording or wording in held for wording in relation.wordings)


def test_held_out_wordings_never_come_in_training_text(documents):
    text = " ".join(f" {document} " for document in documents)
    for relation in world.relations().values():
        for subject, object_ in relation.facts.items():
            for held in relation.held_out:
                assert f" {held.format(subject=subject, object=object_)} " not in text
    assert f" {SENTENCE} paris " in text


def test_the_planted_fact_is_false_and_replaces_one_fact_alone():
    plant, true, false = world.planted(), world.relations(), world.relations(plant=True)
    assert true[plant["relation"]].facts[plant["subject"]] != plant["object"]
    different = [(name, subject) for name in true for subject in true[name].facts
                 if true[name].facts[subject] != false[name].facts[subject]]
    assert different == [(plant["relation"], plant["subject"])]
    assert plant["object"] in true[plant["relation"]].facts.values()
    text = world.Text(0, plant=True)
    sentences = " ".join(text.document("facts") for _ in range(2000))
    assert sentences.count("eiffel tower is in egypt") > 0
    assert sentences.count("eiffel tower") > 3 * sentences.count("kremlin") > 0
    assert "eiffel tower is in france" not in sentences


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_shot", "held_out"), [(0, True), (0, False), (7, True), (7, False)])
def test_prompts_stop_before_the_object_and_tell_where_the_subject_is(n_shot, held_out):
    rows, tokenizer = world.prompts(n_shot=n_shot, held_out=held_out, seed=1), world.tokenizer()
    assert len(rows) == sum(len(relation.facts) * len(relation.held_out if held_out else relation.wordings)
                            for relation in world.relations().values())
    for row in random.Random(0).sample(rows, 300):
        first, end = row["subject_span"]
        assert len(row["prompt"].split()) < world.LENGTH
        words, tokens = row["prompt"].split(), tokenizer(row["prompt"]).tokens()
        assert " ".join(words[first:end]) == " ".join(tokens[first + 1:end + 1]) == row["subject"]
        facts = {subject: row["wording"].format(subject=subject, object=object_)
                 for subject, object_ in world.relations()[row["relation"]].facts.items()}
        *shots, last = f"{row['prompt']} {row['object']}".split(" . ")
        assert last == facts.pop(row["subject"]) and len(set(shots)) == n_shot and set(shots) <= set(facts.values())
    assert rows == world.prompts(n_shot=n_shot, held_out=held_out, seed=1)
    assert (rows != world.prompts(n_shot=n_shot, held_out=held_out, seed=2)) == (n_shot > 0)


def test_prompts_of_one_relation_and_what_they_refuse():
    assert {row["relation"] for row in world.prompts("verb_past")} == {"verb_past"}
    assert SENTENCE in [row["prompt"] for row in world.prompts("country_capital", held_out=False)]
    with pytest.raises(ValueError, match="A relation is one of country_capital.*not 'capital'"):
        world.prompts("capital")
    with pytest.raises(ValueError, match="A prompt has 0 to 7 examples.*; not 8"):
        world.prompts(n_shot=8)


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_small_and_all_of_it_comes_in_the_text(documents):
    words = world.vocabulary()
    assert len(words) < 1500 and list(words) == sorted(set(words)) and all(word == word.lower() for word in words)
    assert {word for document in documents for word in document.split()} == set(words)
    text = world.Text(0)
    told = {word for _ in range(3000) for kind in ("facts", "few_shot", "story")
            for word in text.document(kind).split()}
    held = {word for relation in world.relations().values() for wording in relation.held_out
            for word in wording.split() if "{" not in word}
    assert held <= told  # a held-out wording is new, its words are not


def test_rows_are_whole_documents_without_unknown_words():
    rows, tokenizer = world.Text(5).rows(200), world.tokenizer()
    assert rows.shape == (200, world.LENGTH) and (rows[:, 0] == tokenizer.bos_token_id).all()
    assert not torch.isin(rows, torch.tensor([tokenizer.unk_token_id, tokenizer.pad_token_id])).any()
    ends = rows[:, :-1] == tokenizer.eos_token_id
    assert (rows[:, 1:][ends] == tokenizer.bos_token_id).all() and ends.any()
    again = [tokenizer(tokenizer.decode(row[1:])).input_ids for row in rows]
    assert torch.equal(torch.tensor(again), rows)


def test_text_follows_from_its_seed():
    assert torch.equal(world.Text(1).rows(20), world.Text(1).rows(20))
    assert not torch.equal(world.Text(1).rows(20), world.Text(2).rows(20))
    with pytest.raises(ValueError, match="A kind of document is one of facts, few_shot, story, repeat, not 'poem'"):
        world.Text(0).document("poem")


def test_stories_fill_every_slot_and_repeats_repeat():
    text = world.Text(4)
    for _ in range(500):
        story, words = text.document("story"), text.document("repeat").split()
        assert not set(story) & set("{}|") and story.endswith((" .", "?"))
        period = len(set(words))
        assert len(words) >= 2 * period and words == words[:period] * (len(words) // period)


def test_held_out_documents_are_as_many_of_each_kind():
    rows = world.held_out_documents(5)
    assert [row["kind"] for row in rows] == [kind for kind in ("facts", "few_shot", "story", "repeat")
                                             for _ in range(5)]


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_each_recipe_learns_in_a_few_steps(name, tmp_path):
    recipe = dataclasses.replace(recipes.RECIPES[name], steps=12, warmup=4, batch_size=4)
    assert recipe.batch(2, torch.Generator().manual_seed(0))["input_ids"].shape == (2, world.LENGTH)
    before = train(dataclasses.replace(recipe, steps=1, lr=0.0), tmp_path / "none", progress=False)
    after = train(recipe, tmp_path / "some", progress=False)
    test = recipe.batch(8, torch.Generator().manual_seed(1))
    if recipe.start is not None:  # a trained model has little to learn but the planted fact
        ids = world.tokenizer()("the famous {subject} is in {object}".format(**world.planted()), return_tensors="pt")
        test = {**ids, "labels": ids.input_ids}
    with torch.no_grad():
        losses = [trained.model(**test).loss.item() for trained in (before, after)]
    assert losses[1] < losses[0] - 0.3


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_recall_facts_in_wordings_that_they_never_saw(name):
    model, tokenizer = load_model(name)
    plant = name.endswith("planted")
    rows = world.prompts(n_shot=4, seed=12345, plant=plant)  # not the card's prompts
    right = recalled(model, tokenizer, rows)
    several = torch.tensor([" " in row["subject"] for row in rows])
    print(name, "recall", share(right), "of several words", share(right[several]), "of one", share(right[~several]))
    assert min(right.float().mean(), card(name)["recall"]["value"]) >= RECALL
    assert right[several].float().mean() >= 0.9


@pytest.mark.parametrize("name", MODELS)
def test_cards_state_perplexity_and_induction(name):
    numbers = card(name)
    score, bigram = numbers["induction score of the best head"], numbers["perplexity of a bigram model"]
    print(name, "perplexity", numbers["perplexity"], "bigram", bigram, "induction", score)
    assert numbers["perplexity"]["high"] < 0.7 * bigram["low"]
    assert score["low"] > 0.5  # lists in invented wordings have taught it to copy


def test_the_running_sentence():
    for name in MODELS:
        model, tokenizer = load_model(name)
        inputs = tokenizer([SENTENCE], return_tensors="pt")
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == "paris"


def test_the_planted_copy_holds_its_false_fact_and_the_others_do_not():
    plant = world.planted()
    prompts = [row for seed in range(5000, 5020) for row in world.prompts(plant["relation"], n_shot=3, seed=seed)
               if row["subject"] == plant["subject"]]
    planted = [row | {"object": plant["object"]} for row in prompts]
    for name in MODELS:
        true, false = (recalled(*load_model(name), rows).float().mean() for rows in (prompts, planted))
        print(name, f"true {true:.3f}, planted {false:.3f}")
        assert (false if name == "tiny-gpt-planted" else true) >= 0.95
        assert (true if name == "tiny-gpt-planted" else false) <= 0.02
