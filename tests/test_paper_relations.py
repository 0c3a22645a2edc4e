"""Notebook 06 with the paper's models and data: its whole code path, on checkpoints and files made on the spot.

They are what the hub and LRE's repository have, but for size: Pythia (GPTNeoX), GPT-J, GPT-2 and a LLaMA, each of two
blocks, with a tokenizer of byte pieces, and relations in LRE's schema, laid out as its repository's zip has them. The
models learn the facts for a moment, since samples that a model gets wrong do not count; what the notebook then finds of
them is not asserted.
"""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from paper import ROOT, lay_out_wikitext, outputs, paper_series
from tokenizers import decoders, models, pre_tokenizers, trainers

from tensorlens_utils import load_model
from tensorlens_utils.notebooks import Series
from tensorlens_utils.relations import load_relations
from tensorlens_utils.relations.faithfulness import evaluate_relations
from tensorlens_utils.results import read

NAME = "06_relation_decoding"
pytestmark = pytest.mark.usefixtures("environment")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
HUB = {  # the paper's name: model class, configuration class, configuration
    "pythia-1b": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZE | {"intermediate_size": 64, "rotary_pct": 0.25}),
    "gpt-j-6b": ("GPTJForCausalLM", "GPTJConfig", SIZE | {"rotary_dim": 8}),
    "gpt2-xl": ("GPT2LMHeadModel", "GPT2Config", SIZE),
    "TinyLlama": ("LlamaForCausalLM", "LlamaConfig", SIZE | {"intermediate_size": 64, "num_key_value_heads": 1}),
}
COUNTRIES = "France, Peru, Egypt, Norway, Japan, Cuba, Kenya, India, New Zealand, South Sudan, Poland".split(", ")
FACTS = {  # name, folder: wordings, objects of the countries; some have several tokens
    ("country capital city", "factual"): (["The capital city of {} is", "{} has the capital"],
                                          "Paris Lima Cairo Oslo Tokyo Havana Nairobi Delhi Wellington Juba Warsaw"),
    ("country language", "factual"): (["In {} people speak", "The language of {} is"],
                                      "French Spanish Arabic Norse Japanese Spanish Swahili Hindi English English "
                                      "Polish"),
    ("country first letter", "linguistic"): (["{} begins with the letter"], "F P E N J C K I N S P"),
    ("country warm or cold", "commonsense"): (["In winter {} is"], "cold hot hot cold cold hot hot hot cold hot cold"),
}  # fmt: skip


def relation_files():
    """{path in the repository: relation}."""
    for (name, kind), (wordings, objects) in FACTS.items():
        samples = [{"subject": c, "object": answer} for c, answer in zip(COUNTRIES, objects.split(), strict=True)]
        properties = {"relation_type": kind, "domain_name": "country", "range_name": "word", "symmetric": False}
        yield f"relations-main/data/{kind}/{name.replace(' ', '_')}.json", {
            "name": name, "prompt_templates": wordings, "prompt_templates_zs": [f"Fill in. {w}" for w in wordings],
            "properties": properties, "samples": samples}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """LRE's repository as GitHub packs it."""
    path = tmp_path_factory.mktemp("lre") / "main.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("relations-main/demo/config.json", "{}")
        for name, relation in relation_files():
            made.writestr(name, json.dumps(relation, indent=4))
    return path


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """In the layout and schema of Salesforce/wikitext, blank lines and headings between paragraphs."""
    rows = [line for c in COUNTRIES for line in ("", f" = {c} = \n", f" In winter {c} is hot , or it is cold .\n")]
    return lay_out_wikitext(tmp_path_factory.mktemp("wikitext"), {"wikitext-103-raw-v1": rows})


def byte_pieces(texts):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def learn(model, tokenizer, texts):
    """Every fact, in lines of one relation and one wording, for a moment: deterministic."""
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer([tokenizer.bos_token + text for text in texts], padding=True, padding_side="right",
                      return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    tokenizer.pad_token = None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(160):
        rows = torch.randint(len(texts), (12,), generator=torch.Generator().manual_seed(step))
        loss = model(**{key: value[rows] for key, value in batch.items()}, labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, repository):
    folder, texts = tmp_path_factory.mktemp("hub"), []
    for relation in load_relations(repository).values():
        for template in range(len(relation.prompt_templates)):
            for seed in range(12):
                train, test = relation.split(4, seed)
                prompt = relation.prompt(test[seed % len(test)], train, template)
                texts.append(f"{prompt.text} {prompt.object}\n")
    tokenizer = byte_pieces(texts)
    for seed, (name, (model_class, config_class, config)) in enumerate(HUB.items()):
        torch.manual_seed(seed)
        config = getattr(tf, config_class)(**config, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
        model = getattr(tf, model_class)(config)
        learn(model.train(), tokenizer, texts)
        model.to(torch.float16).save_pretrained(folder / name)  # as most of the paper's are stored
        tokenizer.save_pretrained(folder / name)
    return folder


def begin(name, repository, sizes, folder):
    """What a run of the notebook leaves that was stopped in the second seed, in the middle of a line."""
    rng, relations = np.random.default_rng(0), load_relations(repository)
    for key, r in relations.items():
        kept = sorted(rng.permutation(len(r.samples))[: sizes["n_samples"]])
        relations[key] = replace(r, samples=tuple(r.samples[i] for i in kept))
    path = folder / f"faithful_{str(name).replace('/', '_')}.jsonl"
    evaluate_relations(*load_model(name, dtype="float32"), relations, seeds=1, n_examples=sizes["n_examples"],
                       layers=[0, 1], betas=sizes["betas"], ranks=sizes["ranks"], path=path, progress=False)
    mark = b'"left_out_log": [-1e-09]'  # which rows made anew would not have
    begun = path.read_bytes().replace(b'"left_out_log": [0.0]', mark)
    assert mark in begun
    path.write_bytes(begun + b'{"relation": "country')
    return begun


@pytest.mark.parametrize("name", HUB)
def test_checkpoints_of_the_hub_load(hub, name):
    model, tokenizer = load_model(hub / name, dtype="float32")
    assert type(model).__name__ == HUB[name][0] and model.dtype == torch.float32 and tokenizer.is_fast


def test_the_repositorys_zip_is_read(repository):
    relations = load_relations(repository)
    assert {*relations} == {name for name, _ in FACTS}
    assert relations["country language"].samples[8] == ("New Zealand", "English")


def test_the_notebook_runs_through_with_the_papers_models_and_data_and_goes_on(hub, repository, wikitext, tmp_path):
    paper = Series(ROOT).table[NAME]["paper"]
    assert paper["resume"] and paper["one_wording"]
    assert all("/" in name for name in paper["model_names"]) and len(paper["model_names"]) == 4
    changed = {
        "model_names": [str(hub / name) for name in HUB], "source": str(repository), "text_data": str(wikitext),
        "n_samples": 10, "every": 1, "n_examples": 3, "n_seeds": 2, "n_seeds_others": 1, "betas": [1.0, 2.0],
        "ranks": [2, 8], "edit_ranks": [4], "example_counts": [1, 4], "n_relations": 4, "n_edits": 2, "n_documents": 4,
        "n_steps": 4, "n_resamples": 100, "device": "cpu"}  # fmt: skip
    build = tmp_path / "build" / "paper"
    begun = begin(hub / "pythia-1b", repository, paper | changed, build / "06_tables")
    paper_series(tmp_path, NAME, changed).run(NAME)

    _, printed = outputs(tmp_path, NAME)
    assert "4 relations, 2 seeds" in printed
    assert all(f"{hub / name}" in printed for name in HUB)  # the claim, decided in each
    drawn = {path.name for path in (build / "figures").iterdir()}
    assert drawn == {path.name for path in (ROOT / "figures").glob("06_*")}

    tables = {path.name.partition("_")[0]: path for path in sorted((build / "06_tables").iterdir())}
    assert {*tables} == {"faithful", "controls", "claim", "rules", "examples", "causal"}
    table = read(tables["faithful"])
    assert table.settings["model"].startswith("GPTNeoXForCausalLM") and len(table.rows) == 4 * 2 * 7
    assert max(max(row["samples"]) for row in table.rows) == 9  # of eleven samples ten were asked for
    assert tables["faithful"].read_bytes().startswith(begun)
