"""Trials of relation decoders: what a row holds, how settings are chosen, intervals; causality, edits; hub models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tensorlens_utils import load_model
from tensorlens_utils.relations import Relation, Sample, faithfulness, load_relations, world_relations
from tensorlens_utils.relations.decoders import examples_of, fit
from tensorlens_utils.relations.editing import EDITORS, Edit, evaluate_causality, key
from tensorlens_utils.relations.faithfulness import (
    Setting,
    Trial,
    agrees,
    ahead,
    choose,
    crossed,
    evaluate_relations,
    fingerprints,
    overall,
    scores,
)
from tensorlens_utils.relations.subjects import Asked
from tensorlens_utils.results import Table, read

SOME = {name: world_relations()[name] for name in ("element_symbol", "fruit_colour")}


@pytest.fixture(scope="module")
def gpt():
    return load_model("tiny-gpt")


@pytest.fixture(scope="module")
def table(gpt, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "faithful.jsonl"
    return evaluate_relations(*gpt, SOME, seeds=2, n_examples=3, betas=[0, 1, 2], layers=[0, 2], ranks=[1, 8],
                              decoders=["tensor", "lre", "bias"], controls=["shuffled", "zero-shot", "other relation"],
                              path=path, progress=False), path  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ a table


@pytest.mark.parametrize("name, rank", [("fruit_colour", 0), ("element_symbol", 1)])
def test_a_row_is_what_decoder_and_model_say(gpt, table, name, rank):
    """Each column of one row, computed again sample by sample, with W whole and cut to a rank."""
    (model, tokenizer), (table, _) = gpt, table
    relation = SOME[name]
    train, test = relation.split(3, seed=1)
    learned = Asked(model, tokenizer, [relation.prompt(x, train) for x in train])
    asked = Asked(model, tokenizer, [relation.prompt(x, train) for x in test])
    row, = table.where(relation=name, seed=1, decoder="lre")
    truth, = table.where(relation=name, seed=1, decoder="model")
    layer, beta, _ = setting = next(s for s in row["settings"] if s[2] == rank and (rank or s[:2] == [2, 2.0]))
    at, cut = row["settings"].index(setting), rank or None
    assert beta > 0  # W counts
    examples = examples_of(learned, [layer], ["lre"])[layer]
    decoder = fit("lre", examples, beta=beta, rank=cut)
    for i, sample in enumerate(test):
        logits = asked.head(decoder.decode(asked.s[layer, i : i + 1]))[0]
        words = [tokenizer.decode(token) for token in logits.topk(3).indices]
        own = asked.logits[i]
        assert relation.samples[row["samples"][i]] == sample
        assert row["truth"][at][i] == (words[0] == sample.object) and row["top3"][at][i] == (sample.object in words)
        assert row["agreement"][at][i] == (logits.argmax() == own.argmax())
        p, q = own.double().softmax(-1), logits.double().softmax(-1)
        assert row["kl"][at][i] == pytest.approx(float((p * (p / q).log()).sum()), rel=2e-3, abs=1e-5)
        assert truth["truth"][0][i] == (tokenizer.decode(own.argmax()) == sample.object)
    left = [asked.head(fit("lre", examples.without(i), beta, cut).decode(examples.s[i : i + 1]))[0] for i in range(3)]
    own = learned.logits.argmax(-1)
    assert row["left_out"][at] == pytest.approx(np.mean([int(y.argmax() == t) for y, t in zip(left, own, strict=True)]))
    logs = [float(y.log_softmax(-1)[t]) for y, t in zip(left, own, strict=True)]
    assert row["left_out_log"][at] == pytest.approx(np.mean(logs), rel=1e-3)


@pytest.mark.parametrize("rows", [1, 90])
def test_how_many_settings_the_head_takes_in_one_call_changes_nothing(gpt, table, monkeypatch, rows):
    """One by one; and two of the three β, then the third."""
    monkeypatch.setattr(faithfulness, "ROWS", rows)
    table, _ = table
    again = evaluate_relations(*gpt, SOME, seeds=1, n_examples=3, betas=[0, 1, 2], layers=[0, 2], ranks=[1, 8],
                               decoders=["tensor"], progress=False)  # fmt: skip
    for row in again.rows:
        before, = table.where(relation=row["relation"], seed=0, decoder=row["decoder"])
        assert 2 * (3 + len(row["samples"])) <= 90 < 3 * (3 + len(row["samples"]))
        for column in ("kl", "left_out_log"):
            assert np.allclose(row.pop(column), before[column], rtol=2e-3, atol=1e-5)
        assert row == {name: before[name] for name in row}


def test_settings_controls_and_resumption(gpt, table):
    table, path = table
    whole = [[k, b, 0] for k in (0, 2) for b in (0.0, 1.0, 2.0)]
    for row in table.rows:
        if row["decoder"] in ("tensor", "lre"):
            assert row["settings"][:6] == whole and [s[2] for s in row["settings"][6:]] == [1, 8]
            best = max(range(6), key=lambda i, row=row: (row["left_out"][i], row["left_out_log"][i]))
            assert all(s[:2] == row["settings"][best][:2] for s in row["settings"][6:])  # where the examples do best
        elif row["decoder"] == "bias":
            assert row["settings"] == [[0, 1.0, 0], [2, 1.0, 0]]
        elif row["decoder"] != "model":
            assert row["settings"] == whole
    assert {row["decoder"] for row in table.rows} == {"model", "tensor", "lre", "bias", *(
        f"{d}, {c}" for d in ("tensor", "lre") for c in ("shuffled", "zero-shot", "other relation"))}  # fmt: skip
    again = evaluate_relations(*gpt, SOME, seeds=1, n_examples=3, betas=[0, 1, 2], layers=[0, 2], ranks=[1, 8],
                               decoders=["bias"], path=path, progress=False)  # fmt: skip
    assert again.rows == [row for row in table.rows if row["seed"] == 0 and row["decoder"] in ("model", "bias")]
    assert len(read(path).rows) == len(table.rows)
    with pytest.raises(ValueError, match="another"):
        evaluate_relations(*gpt, SOME, seeds=1, n_examples=2, betas=[0, 1, 2], layers=[0, 2], ranks=[1, 8], path=path)


def test_w_decodes_and_without_it_nothing_does(table):
    table, _ = table

    def mean(name, **options):
        at = choose(table, name, **options)
        return np.mean([overall(x) for x in scores(table, name, at=at).values()])

    assert mean("tensor") > 0.7 > 0.4 > mean("tensor", beta=0.0) and mean("bias") < 0.3
    assert all(setting.beta == 0 for setting in choose(table, "tensor", beta=0.0).values())


def test_controls_learn_from_what_their_names_say(gpt, table):
    (model, tokenizer), (table, _) = gpt, table
    relation, other = SOME["element_symbol"], SOME["fruit_colour"]
    train, test = relation.split(3, seed=0)
    asked = Asked(model, tokenizer, [relation.prompt(x, train) for x in test])
    dealt = relation.shuffled(0).split(3, 0)[0]

    def learned(relation, samples, shots):
        prompts = [relation.prompt(x, shots) for x in samples]
        return examples_of(Asked(model, tokenizer, prompts), [0], ["tensor"])[0]

    others = other.split(3, 0)[0]
    expected = {
        "zero-shot": learned(relation, train, ()), "shuffled": learned(relation, dealt, dealt),
        "other relation": learned(relation, train, train).of_other(learned(other, others, others)),
    }  # fmt: skip
    assert [x.subject for x in dealt] == [x.subject for x in train] and dealt != train
    for control, examples in expected.items():
        row, = table.where(relation="element_symbol", seed=0, decoder=f"tensor, {control}")
        said = asked.head(fit("tensor", examples).decode(asked.s[0])).argmax(-1)
        hits = [int(tokenizer.decode(token) == x.object) for token, x in zip(said, test, strict=True)]
        assert hits == row["truth"][row["settings"].index([0, 1.0, 0])]


def test_nothing_is_chosen_by_what_is_reported(table):
    """Other test scores, and the same choices; other scores of the examples, and others."""
    table, _ = table
    blind = copy.deepcopy(table.rows)
    for row in blind:
        for column in ("truth", "top3", "agreement", "kl"):
            row[column] = [[1 - x for x in values] for values in row[column]]
    assert choose(Table(table.key, table.settings, blind), "tensor") == choose(table, "tensor")
    for row in blind:
        row["left_out"] = [-x for x in row["left_out"]]
        row["left_out_log"] = [-x for x in row["left_out_log"]]
    assert choose(Table(table.key, table.settings, blind), "tensor") != choose(table, "tensor")


def test_choices_are_made_together_or_apart(table):
    table, _ = table
    together, apart = choose(table, "lre"), choose(table, "lre", pooled=False)
    for seed in (0, 1):
        assert len({together[name, seed] for name in SOME}) == 1
        rows = table.where(seed=seed, decoder="lre")
        totals = np.mean([[row["left_out"][:6], row["left_out_log"][:6]] for row in rows], 0)
        best = max(range(6), key=lambda i, totals=totals: tuple(totals[:, i]))
        assert together["fruit_colour", seed] == Setting(*rows[0]["settings"][best])
    for (name, seed), setting in apart.items():
        row, = table.where(relation=name, seed=seed, decoder="lre")
        assert setting == Setting(*max(row["settings"][:6], key=lambda s, row=row: (
            row["left_out"][row["settings"].index(s)], row["left_out_log"][row["settings"].index(s)])))  # fmt: skip
    assert {s.rank for s in choose(table, "lre", rank=8).values()} == {8}
    assert {s.layer for s in choose(table, "lre", layer=2).values()} == {2}
    with pytest.raises(ValueError, match="'lre' was not evaluated at layer 1"):
        choose(table, "lre", layer=1)
    with pytest.raises(ValueError, match="decoder is one of .*; 'lra' is none"):
        choose(table, "lra")


def test_scores_leave_out_what_was_learned_from_and_what_the_model_gets_wrong(table):
    table, _ = table
    right = scores(table, "model", "truth")
    for name, relation in SOME.items():
        truth, faithful = (scores(table, "tensor", measure)[name] for measure in ("truth", "faithful"))
        assert truth.shape == faithful.shape == (2, len(relation.samples))
        for seed in (0, 1):
            learned = [relation.samples.index(x) for x in relation.split(3, seed)[0]]
            assert np.isnan(truth[seed]).nonzero()[0].tolist() == sorted(learned)
            assert np.array_equal(np.isnan(faithful[seed]), ~(right[name][seed] == 1))
    difference = ahead(table, "tensor", "lre", "kl")
    for name in SOME:
        expected = scores(table, "tensor", "kl")[name] - scores(table, "lre", "kl")[name]
        assert np.array_equal(difference[name], expected, equal_nan=True)
    with pytest.raises(ValueError, match="measure is one of"):
        scores(table, "tensor", "faith")
    with pytest.raises(ValueError, match="measure is one of 'faithful', 'top3', 'truth', .*; 'causal' is none"):
        scores(table, "tensor", "causal")


def test_scores_have_a_place_for_every_sample(gpt):
    """The relation's last one too, if every seed learned from it; a sample that was given twice counts once."""
    few = SOME["element_symbol"].samples[:5]
    made = (Relation(f"r{i}", ("the symbol of {} is",), few + few[:2], between=" . ") for i in range(100))
    relation = next(r for r in made if r.split(1, 0)[0][0] == few[-1])
    table = evaluate_relations(*gpt, {"r": relation}, seeds=1, n_examples=1, layers=[0], betas=[1], decoders=["bias"],
                               progress=False)
    values = scores(table, "bias", "truth")["r"]
    assert values.shape == (1, 5) and np.isnan(values[0]).tolist() == [False] * 4 + [True]
    assert ahead(table, "bias", "model", "truth")["r"].shape == (1, 5)


def test_another_model_or_other_data_is_noticed(gpt):
    """By one weight far in, by a buffer, by what the configuration says, by precision; of relations by every field."""
    model, relation = copy.deepcopy(gpt[0]), SOME["fruit_colour"]
    own = fingerprints(gpt[0], SOME)
    assert fingerprints(model, SOME) == own == fingerprints(load_model("tiny-gpt")[0], SOME)
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[77, 200] += 1e-3
    models = [model, load_model("tiny-gpt", dtype="bfloat16")[0], copy.deepcopy(gpt[0])]
    models[2].config.activation_function = "relu"
    assert len({fingerprints(m, SOME)["model"] for m in [gpt[0], *models]}) == 4
    relations = [replace(relation, **change) for change in (
        {}, {"between": "; "}, {"prompt_templates_zs": ("{} is",)}, {"prompt_templates": ("{} is",)},
        {"samples": relation.samples[1:]}, {"properties": {}})]  # fmt: skip
    assert len({fingerprints(gpt[0], {"r": r})["data"] for r in relations}) == len(relations)


def test_the_crossed_interval_counts_both_seeds_and_samples():
    random = np.random.default_rng(0)
    values = random.normal(size=(6, 1)) + random.normal(size=(1, 40)) + random.normal(size=(6, 40))
    values[random.random(values.shape) < 0.2] = np.nan
    value, low, high = crossed(values)
    assert value == np.nanmean(values) and np.array_equal(crossed(values), crossed(values))
    draws = []
    for _ in range(2000):  # written out: rows and columns drawn again
        rows, columns = random.integers(6, size=6), random.integers(40, size=40)
        draws.append(np.nanmean(values[rows][:, columns]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.06)
    assert high - low > 2 * 1.96 * np.nanstd(values) / np.sqrt(values.size)  # far wider than if all were independent
    for n in (0, 1):  # scores of no sample, or of one under every seed
        few = np.where(np.arange(3) < n, 1.0, np.full((2, 3), np.nan))
        with pytest.raises(ValueError, match=f"two samples or more, and here are {n}"):
            crossed(few)
    one = crossed(values[:1])  # a seed alone: an interval over samples
    alone = 2 * 1.96 * np.nanstd(values[0]) / np.isfinite(values[0]).sum() ** 0.5
    assert one[2] - one[1] == pytest.approx(alone, rel=0.15)


def test_a_token_agrees_by_its_beginning_or_whole():
    words = load_model("tiny-gpt")[1]
    symbol = words.convert_tokens_to_ids("c")
    assert agrees(words)(symbol, "c") and not agrees(words)(symbol, "ca")
    pieces = hub_tokenizer()
    check = agrees(pieces)
    par = pieces(" Par").input_ids[-1]
    assert check(par, pieces.decode([par]).strip().upper() + "IS")
    blank = pieces.convert_tokens_to_ids("Ġ")
    assert pieces.decode([blank]).strip() == "" and not check(blank, "Paris")  # it begins everything, and says nothing


def test_names_that_are_none_are_refused(gpt):
    for options, message in [({"decoders": ["tensors"]}, "decoder is one of"), ({"layers": [4]}, "layer is one of"),
                             ({"controls": ["none"]}, "control is one of"), ({"n_examples": 40}, "40"),
                             ({"controls": ["other relation"]}, "give two or more"), ({"template": 9}, "has 0 to"),
                             ({"layers": []}, "one or more of the layers"), ({"betas": []}, "one or more of the betas"),
                             ({"seeds": 0}, "one or more of the seeds"),
                             ({"ranks": [129]}, r"in \[1, 128\].* not 129")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate_relations(*gpt, {"element_symbol": SOME["element_symbol"]}, progress=False,
                               **{"seeds": 1, **options})  # fmt: skip
    with pytest.raises(ValueError, match="one or more of the relations"):
        evaluate_relations(*gpt, {})
    with pytest.raises(ValueError, match="editor is one of"):
        evaluate_causality(*gpt, SOME, editors=["lra"])


# ---------------------------------------------------------------------------------------------------- causality, edits


def test_causality_is_what_the_patched_model_says(gpt):
    model, tokenizer = gpt
    some = {"element_symbol": SOME["element_symbol"]}
    table = evaluate_causality(model, tokenizer, some, seeds=1, n_examples=3, layers=[0], ranks=[4, 64],
                               editors=EDITORS, progress=False)
    values = {name: scores(table, name, "causal")["element_symbol"] for name in EDITORS}
    assert overall(values["subject"]) == 1  # at boundary 0, one-word subjects: it is the other prompt
    assert overall(values["tensor"]) > 0.2 > overall(values["translation"])
    row, = table.where(decoder="tensor")
    assert row["settings"] == [[0, 1.0, 4], [0, 1.0, 64]] and sum(x is not None for x in row["causal"][0]) > 20
    asked = Trial(model, tokenizer, some["element_symbol"], 0, 3).learned()
    W, said = fit("tensor", examples_of(asked, [0], ["tensor"])[0]).truncated(64).W, []
    for i, j in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]:  # from each example to each other, written out
        s = asked.s[0].clone()
        s[i] += torch.linalg.pinv(W, rtol=1e-6) @ (asked.o[j] - asked.o[i])
        said.append(asked.head(asked.answer(s, 0))[i].argmax() == asked.logits[j].argmax())
    assert row["left_out"][1] == pytest.approx(np.mean(said))
    best = max((0, 1), key=lambda i: (row["left_out"][i], row["left_out_log"][i]))
    assert choose(table, "tensor", rank=None)["element_symbol", 0] == Setting(*row["settings"][best])


def test_an_edit_is_rank_one_and_answers_to_its_key(gpt):
    model, tokenizer = gpt
    relation = SOME["fruit_colour"]
    prompts = [relation.prompt(x) for x in relation.samples[:3]]
    states = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(128, generator=torch.Generator().manual_seed(1))
    asked = Asked(model, tokenizer, prompts)
    s = asked.s[1, 0]
    k, C = key(s, states), states.T @ states / 300
    assert float(k @ s) == pytest.approx(1, abs=1e-4)
    assert k @ C @ k < (s @ C @ s) / (s @ s) ** 2  # it answers less to the others than s itself would
    with Edit(1, k, delta).applied(model):
        edited = Asked(model, tokenizer, prompts)
    expected = asked.s[1] + (asked.s[1] @ k)[:, None] * delta
    assert torch.allclose(edited.s[1], expected, atol=1e-4) and torch.allclose(edited.s[0], asked.s[0], atol=1e-5)
    assert (edited.o - asked.o).abs().max() > 0.1 and torch.equal(Asked(model, tokenizer, prompts).o, asked.o)


# ------------------------------------------------------------------------------- models in hub layout, made on the spot


def hub_tokenizer():
    """Byte pieces, as the models of the paper profile have them, learned from a few of LRE's words."""
    text = [" The capital city of France is Paris", " People in Peru speak Spanish", " The opposite of hot is cold"] * 4
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


HUB = {
    "EleutherAI/pythia-1b": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig),
    "EleutherAI/gpt-j-6b": (tf.GPTJForCausalLM, tf.GPTJConfig),
    "openai-community/gpt2-xl": (tf.GPT2LMHeadModel, tf.GPT2Config),
    "a LLaMA": (tf.LlamaForCausalLM, tf.LlamaConfig),
}


@pytest.mark.parametrize("name", HUB)
def test_the_paper_profile_runs_on_checkpoints_in_hub_layout(name, tmp_path):
    """The four classes of the paper profile with random weights, on a relation in LRE's files, stopped and gone on."""
    cls, config = HUB[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    sizes |= {"rotary_dim": 4} if cls is tf.GPTJForCausalLM else {}
    sizes |= {"intermediate_size": 24} if "LLaMA" in name or "pythia" in name else {}
    cls(config(**sizes)).save_pretrained(tmp_path / "model")
    hub_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model")
    samples = tuple(Sample(f"Place {i}x", ["Paris", "Lima"][i % 2]) for i in range(7))
    relations = {"r": Relation("r", ("The capital city of {} is", "{} is"), samples)}
    options = {"seeds": 2, "n_examples": 2, "betas": [1, 2], "ranks": [2], "path": tmp_path / "t.jsonl",
               "progress": False}  # fmt: skip
    first = evaluate_relations(model, tokenizer, relations, **{**options, "seeds": 1})
    table = evaluate_relations(model, tokenizer, relations, **options)
    assert table.rows[0] == first.rows[0] and len(table.rows) == 2 * 7
    for row in table.rows:
        assert np.isfinite(np.array(row["kl"])).all() and np.shape(row["truth"]) == (len(row["settings"]), 5)
    causal = evaluate_causality(model, tokenizer, relations, seeds=1, n_examples=2, ranks=[2], progress=False)
    assert len(causal.rows) == len(EDITORS)


def test_the_real_relations_run_through_a_byte_tokenizer(shared_data):
    relations = load_relations(shared_data / "lre_relations")
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=1024)).eval()
    tokenizer = hub_tokenizer()
    for relation in relations.values():
        train, test = relation.split(2, seed=0)
        prompts = [relation.prompt(x, train) for x in test[:2]]
        asked = Asked(model, tokenizer, prompts)
        for ids, at, prompt in zip(asked.ids, asked.position, prompts, strict=True):
            before, with_it = (tokenizer.decode(ids[1:k]).rstrip("\ufffd") for k in (at, at + 1))  # no half letters
            assert prompt.text.startswith(with_it) and len(before) < prompt.end <= len(with_it)
            assert ids[0] == tokenizer.bos_token_id
