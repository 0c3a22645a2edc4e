"""Notebook 05 with the paper's models and data: its whole code path, on checkpoints and data sets made on the spot.

They are what the hub has, but for size and weights, which are random, so nothing that the notebook finds is asserted:
BERT and RoBERTa with a head of two classes and IMDB; Pythia (GPTNeoX), Phi-1.5, GPT-2 and a LLaMA with WikiText. Each
tokenizer is of its model's class and in the files that the hub has for it; GPT-2's and Phi's have no token for padding,
and the LLaMA's pads on the left.
"""

import json

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from paper import ROOT, lay_out_wikitext, outputs, paper_series

from tensorlens_utils import load_data, load_model
from tensorlens_utils.baselines import METHODS as RIVALS
from tensorlens_utils.collapse import METHODS
from tensorlens_utils.notebooks import Series
from tensorlens_utils.perturbation import evaluate
from tensorlens_utils.perturbation.batches import answers
from tensorlens_utils.results import read

NAME = "05_language_perturbation"
pytestmark = pytest.mark.usefixtures("environment")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "initializer_range": 0.3}  # fmt: skip
HUB = {  # name: model class, configuration class, configuration, the tokenizer's class, its special tokens
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL | {"max_position_embeddings": 32}, "BertTokenizer",
             {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
              "mask_token": "[MASK]"}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig",
                SMALL | {"max_position_embeddings": 34, "type_vocab_size": 1}, "RobertaTokenizer",
                {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
                 "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | {"use_parallel_residual": True, "rotary_pct": 0.25},
               "GPTNeoXTokenizer", {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}),
    "phi": ("PhiForCausalLM", "PhiConfig", SMALL | {"partial_rotary_factor": 0.5}, "CodeGenTokenizer",
            {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
             "GPT2Tokenizer", {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 1}, "LlamaTokenizer",
              {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}),
}  # fmt: skip
CLASSIFIERS, LANGUAGE_MODELS = [*HUB][:2], [*HUB][2:]
NOUNS = "film actor plot music scene river king war station album".split()
VERBS = "was made saw became carried won built sank played left".split()


def sentences(n, seed, between=" "):
    generator = np.random.default_rng(seed)
    return [between.join(f"The {generator.choice(NOUNS)} {generator.choice(VERBS)} the {generator.choice(NOUNS)} , in "
                         f"{generator.integers(1900, 2000)} it was not {generator.choice(VERBS)} ." for _ in range(k))
            for k in generator.integers(1, 4, n)]  # fmt: skip


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    """In the layout and schema of stanfordnlp/imdb: parquet by split, negative reviews before positive ones."""
    folder = tmp_path_factory.mktemp("imdb")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for seed, (split, n) in enumerate({"train": 4, "test": 40, "unsupervised": 4}.items()):
        texts, labels = sentences(n, seed, "<br /><br />"), [int(2 * i >= n) for i in range(n)]
        rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features)
        (folder / "plain_text").mkdir(exist_ok=True)
        rows.to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    parts = "".join(f"  - split: {split}\n    path: plain_text/{split}-*\n"
                    for split in ("train", "test", "unsupervised"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{parts}---\n")
    return folder


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """In the layout and schema of Salesforce/wikitext: several sets under one name; blank lines and headings between
    paragraphs."""
    rows = {name: [line for text in sentences(12, 10 + seed) for line in ("", " = War = \n", f" {text} \n")]
            for seed, name in enumerate(("wikitext-103-raw-v1", "wikitext-2-v1"))}
    return lay_out_wikitext(tmp_path_factory.mktemp("wikitext"), rows)


def tokenizer_files(folder, kind, special):
    """The files of a tokenizer as the hub has them: vocab.txt, or vocab.json with merges.txt, or tokenizer.json."""
    texts, names = sentences(60, 3) + sentences(60, 4, "<br />"), [*dict.fromkeys(special.values())]
    config = {"tokenizer_class": kind, "model_max_length": 32, **special}
    if kind == "BertTokenizer":
        made = tokenizers.BertWordPieceTokenizer()
        made.train_from_iterator(texts, vocab_size=200, special_tokens=names)
        made.save_model(str(folder))
    elif kind == "LlamaTokenizer":
        made = tokenizers.SentencePieceBPETokenizer()
        made.train_from_iterator(texts, vocab_size=200, special_tokens=names)
        made.save(str(folder / "tokenizer.json"))
        config |= {"add_bos_token": True, "padding_side": "left"}
    else:
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(texts, vocab_size=320, special_tokens=names)
        made.save_model(str(folder)) if kind != "GPTNeoXTokenizer" else made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, imdb):
    folder = tmp_path_factory.mktemp("hub")
    for seed, (name, (model_class, config_class, config, kind, special)) in enumerate(HUB.items()):
        (folder / name).mkdir()
        tokenizer_files(folder / name, kind, special)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "bos", "eos")}
        config = getattr(transformers, config_class)(**{"vocab_size": len(tokenizer)} | config | ids)
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        if name in LANGUAGE_MODELS:
            model = model.to(torch.float16)  # as Pythia's and Phi's are stored
        else:
            even(model, tokenizer, imdb)
        model.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def even(model, tokenizer, imdb):
    """Let a classifier give each answer to one half of the texts: some section needs two answers."""
    inputs = tokenizer(load_data(imdb)["text"][:], padding=True, truncation=True, max_length=24, return_tensors="pt")
    y = model.eval()(**inputs).logits
    (model.classifier.bias if hasattr(model.classifier, "bias") else model.classifier.out_proj.bias)[0] -= (
        y[:, 0] - y[:, 1]).median()


def test_data_of_the_hub_are_read_by_split_and_by_set(imdb, wikitext):
    rows = load_data(imdb)
    assert rows.column_names == ["text", "label"] and len(rows) == 40 and "<br />" in rows[0]["text"]
    assert rows["label"][:] == [0] * 20 + [1] * 20
    texts = [load_data(wikitext, subset=name)["text"][:] for name in ("wikitext-103-raw-v1", "wikitext-2-v1")]
    assert texts[0] != texts[1] and texts[0][:2] == ["", " = War = \n"]


@pytest.mark.parametrize("name", HUB)
def test_checkpoints_of_the_hub_load_with_their_tokenizers_and_are_explained_by_every_method(hub, imdb, name):
    model, tokenizer = load_model(hub / name, dtype="float64")
    assert type(model).__name__ == HUB[name][0]
    text = load_data(imdb)[0]["text"]
    pieces = tokenizer(text, truncation=True, max_length=24).input_ids
    assert len(pieces) == 24 and tokenizer.unk_token_id not in pieces[2:-1]
    assert (tokenizer.pad_token is None) == (name in ("phi", "gpt2"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer([text, "The king won ."], padding=True, padding_side="right", truncation=True, max_length=24,
                       return_tensors="pt")
    target = answers(model, inputs).topk(2).indices
    for label, method in (METHODS | RIVALS).items():
        for wanted in (target[:, 0], target):
            scores = method(model, inputs, wanted)
            assert scores.shape == inputs["input_ids"].shape and scores.isfinite().all(), label
            assert not scores[inputs["attention_mask"] == 0].any() and scores.any(), label


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_texts_of_several_lengths_are_answered_as_if_each_came_alone(hub, wikitext, name):
    """Whatever the tokenizer pads with, and on whichever side it would."""
    model, tokenizer = load_model(hub / name, dtype="float64")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_data(wikitext, subset="wikitext-103-raw-v1").filter(lambda row: len(row["text"]) > 20)
    rows = rows.add_column("n", [len(tokenizer(text).input_ids) for text in rows["text"]]).sort("n")
    rows = rows.select([0, len(rows) // 2, len(rows) - 1])
    assert len(set(rows["n"])) == 3
    options = {"removers": ["drop"], "orders": ["morf"], "progress": False, "max_length": 100}
    one, many = (evaluate(model, tokenizer, rows, {"rollout": RIVALS["rollout"]}, batch_size=n, **options)
                 for n in (1, 3))
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a["target"] == b["target"] and a["logit"] == pytest.approx(b["logit"], rel=1e-6, abs=1e-9)


RATIONALES = [{"sentence": text, "original_label": ("negative", "positive")[i % 2], "annotations": [
    {"label": ("negative", "positive")[i % 2], "rationale": [int(j == i) for j in range(len(text.split()))]}] * 6}
    for i, text in enumerate(sentences(4, 9))]  # fmt: skip


def test_the_notebook_runs_through_with_the_papers_models_and_data(hub, imdb, wikitext, tmp_path):
    (tmp_path / "rationales.json").write_text(json.dumps(RATIONALES))
    paper = Series(ROOT).table[NAME]["paper"]
    changed = {
        "classifiers": [str(hub / name) for name in CLASSIFIERS], "data_name": str(imdb),
        "language_models": [str(hub / name) for name in LANGUAGE_MODELS], "language_data": str(wikitext),
        "rationales": str(tmp_path / "rationales.json"), "n_texts": 16, "every": 2, "max_length": 24, "n_prompts": 4,
        "prompt_length": 8, "facts_per_relation": 1, "n_repeats": 3, "n_drivers": 2, "n_simulated": 30, "n_sanity": 4,
        "n_draws": 2, "n_resamples": 100, "batch_size": 8, "device": "cpu"}  # fmt: skip
    assert paper["language_subset"] == "wikitext-103-raw-v1"
    assert all("/" in name for key in ("classifiers", "language_models") for name in paper[key])
    paper_series(tmp_path, NAME, changed).run(NAME)

    found, printed = outputs(tmp_path, NAME)
    shown = "".join(output["data"].get("text/html", "") for output in found if "data" in output)
    for name in CLASSIFIERS:
        assert f"{hub / name}: 16 texts, of which it answers" in printed
        assert shown.count(f">{hub / name}<") == 2  # the table of areas, and that of the rationales
    assert all(f"{hub / name}, morf" in shown for name in LANGUAGE_MODELS)
    drawn = {path.name for path in (tmp_path / "build" / "paper" / "figures").iterdir()}
    assert drawn == {path.name for path in (ROOT / "figures").glob("05_*")} | {"05_curves_2.png", "05_curves_2.svg"}
    for k, name in enumerate(CLASSIFIERS + LANGUAGE_MODELS):
        path = f"mask_{k}" if name in CLASSIFIERS else f"text_{k - 2}"
        table = read(tmp_path / "build" / "paper" / "05_tables" / f"{path}.jsonl")
        assert table.settings["model"].startswith(HUB[name][0])
        assert len(table.rows) == 17 * (16 * 3 if name in CLASSIFIERS else 4 * 2)
