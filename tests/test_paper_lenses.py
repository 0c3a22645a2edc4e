"""Notebook 07 with the paper's model and data: its whole code path, on a checkpoint and data sets made on the spot.

They are what the hub has, but for size and weights, which are random, so nothing that is found is asserted: GPT-2 with
the files of its tokenizer, which has no token for padding; OpenWebText, documents in shards; BookCorpus, a sentence a
row. Both are streamed. Of the notebook the opening and the sections that study this model are run, 1, 3 and 4; the
others have their own models, whatever the profile.
"""

import itertools
import json
import os
import re
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from paper import ROOT, outputs, paper_series
from safetensors import safe_open

from tensorlens_utils import load_data, load_model
from tensorlens_utils.lenses import load_lens
from tensorlens_utils.lenses.data import Rows
from tensorlens_utils.lenses.families import FAMILIES
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.training import train
from tensorlens_utils.notebooks import Series

NAME = "07_attention_lens"
STUDIED, BOTH = (0, 1, 3, 4), ("listen-figure",)  # sections, 0 the opening; cells there that need another section, too
WORDS = "the film actor was made saw king river war became station carried won sank left in it not".split()


def sentences(n, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(5, 25))) + " ." for _ in range(n)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(sentences(60, 3), vocab_size=300, special_tokens=["<|endoftext|>"])
    for seed, name in enumerate(("gpt2", "gpt2-other")):
        (folder / name).mkdir()
        made.save_model(str(folder / name))
        special = {f"{token}_token": "<|endoftext|>" for token in ("bos", "eos", "unk")}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64} | special))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0)).save_pretrained(folder / name)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """In the schema of Skylion007/openwebtext and of bookcorpus, as the hub's parquet branches lay them out."""
    made = {}
    for name, documents in {"openwebtext": ["\n\n".join(sentences(4, seed)) for seed in range(120)],
                            "bookcorpus": sentences(400, 9)}.items():  # fmt: skip
        folder = made[name] = tmp_path_factory.mktemp(name)
        (folder / "plain_text" / "train").mkdir(parents=True)
        rows = datasets.Dataset.from_dict({"text": documents})
        for k in range(2):
            rows.shard(2, k, contiguous=True).to_parquet(folder / "plain_text" / "train" / f"{k:04}.parquet")
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: plain_text\n  data_files:\n"
                                          "  - split: train\n    path: plain_text/train/*\n---\n")
    return made


def streamed(folder):
    return load_data(folder, "train", subset="plain_text", streaming=True)


def heads_of(folder):
    model, tokenizer = load_model(folder)
    return Heads(model, tokenizer(["the film"], return_tensors="pt"), tokenizer)


@pytest.mark.parametrize("name", ["openwebtext", "bookcorpus"])
def test_a_stream_of_text_is_read_no_further_than_it_is_needed(hub, texts, name):
    _, tokenizer = load_model(hub / "gpt2")
    whole, read = load_data(texts[name], "train", subset="plain_text"), []
    assert whole.column_names == ["text"] and tokenizer.pad_token is None
    first = [*itertools.islice(Rows(streamed(texts[name]).map(lambda row: read.append(1) or row), tokenizer, 4, 16), 3)]
    assert len(first) == 3 and 0 < len(read) < len(whole) // 2
    for a, b in zip(first, Rows(whole, tokenizer, 4, 16), strict=False):
        assert torch.equal(a["input_ids"], b["input_ids"])
    joined = torch.cat([batch["input_ids"].flatten() for batch in first]).tolist()
    beginning = [i for row in whole.select(range(30)) for i in [*tokenizer(row["text"]).input_ids, 0]]
    assert joined == beginning[:len(joined)] and 0 in joined, "texts follow one another, the end of text between them"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_was_stopped_ends_in_the_same_file_and_the_file_says_what_it_is(hub, texts, family, tmp_path):
    heads = heads_of(hub / "gpt2")
    data = streamed(texts["openwebtext"])
    text, held_out = Rows(data.skip(20), heads.processor, 4, 16), [*Rows(data.take(20), heads.processor, 4, 16)]
    options = {"held_out": held_out, "family": family, "steps": 8, "warm": 3, "save_every": 2, "progress": False}

    class Stopped(Exception):
        pass

    class Cable:
        """A stream that breaks once there is a state to go on from, and a batch later."""

        def __iter__(self):
            for batch in text:
                broken = Path(f"{paths[1]}.state").exists()
                yield batch
                if broken:
                    raise Stopped

    paths = [tmp_path / f"{how}.safetensors" for how in ("whole", "stopped")]
    train(heads, text, path=paths[0], **options)
    with pytest.raises(Stopped):
        train(heads, Cable(), path=paths[1], **options)
    assert not paths[1].exists() and Path(f"{paths[1]}.state").exists()
    train(heads, text, path=paths[1], **options)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["stopped.safetensors", "whole.safetensors"]

    with safe_open(paths[0], "pt") as file:
        about, names = json.loads(file.metadata()["lens"]), {*file.keys()}
    assert about["model"] == "gpt2" and about["class"] == "GPT2LMHeadModel" and "revision" in about
    assert (about["family"], about["objective"], about["tokens"]) == (family, "kl", 8 * 4 * 16)
    assert {len(about["held_out"][name]) for name in ("unigram", "start", "end")} == {4}
    assert names == {"mu", *(f"parameters.{name}" for name in load_lens(paths[0], heads).family.parameters)}

    lens = load_lens(paths[0], heads_of(hub / "gpt2"))
    seen = lens.capture(held_out[0])
    assert torch.equal(lens.kl(seen), load_lens(paths[1], heads).kl(seen))
    assert len(lens.top_tokens("the king was", 1, 1, k=3)) == 3
    with pytest.raises(ValueError, match="'gpt2', and this one is another: its weights are others"):
        load_lens(paths[0], heads_of(hub / "gpt2-other"))
    load_lens(paths[0], heads_of(hub / "gpt2-other"), transfer=True)


def studied(notebook):
    """The cells of code in the opening and in the sections that study the model which the parameters name."""
    section = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and section in STUDIED and cell.id not in BOTH:
            yield cell
        elif cell.cell_type == "markdown":
            section = int(([section] + re.findall(r"(?m)^## (\d+)\.", cell.source))[-1])


def test_the_notebook_runs_through_with_the_papers_model_and_data(hub, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORLENS_FIGURES", os.environ.get("TENSORLENS_FIGURES", ""))  # which a run changes
    paper, path = Series(ROOT).table[NAME]["paper"], tmp_path / "notebooks" / f"{NAME}.ipynb"
    changed = {
        "model_name": str(hub / "gpt2"), "data_name": str(texts["openwebtext"]), "n_first": 30, "n_rows": 16,
        "n_held_out": 8, "length": 24, "batch_rows": 2, "steps": 6, "n_texts": 4, "n_facts": 12, "n_steered": 2,
        "n_prompts": 8, "n_resamples": 100, "device": "cpu"}  # fmt: skip
    assert "/" in paper["model_name"] and paper["data_subset"] == "plain_text" and paper["resume"]
    measured = (str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "measurements").glob("lenses*"))
    series = paper_series(tmp_path, NAME, changed, measured)
    notebook = nbformat.read(path, 4)
    notebook.cells = [*studied(notebook)]
    nbformat.write(notebook, path)
    series.run(NAME)

    _, printed = outputs(tmp_path, NAME)
    assert "the median head" in printed and "full ahead of translator by" in printed
    kept = {path.stem for path in (tmp_path / "build" / "paper" / "07_lenses").iterdir()}
    assert kept >= {*FAMILIES}
    for path in (tmp_path / "build" / "paper" / "07_lenses").iterdir():
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["lens"])["model"] == "gpt2"
