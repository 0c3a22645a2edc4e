"""Notebook 08 with the paper's kinds of models and data: its whole code path, on checkpoints and data made on the spot.

They are what the hub has, but for size and weights, which are random, so nothing that the notebook finds is asserted:
Pythia-1B (GPTNeoX, 16 layers × 8 heads, which are the paper's 128), ViT-B/16 (12 × 12 heads, and a class token, so that
no length is a power of two), BERT and a LLaMA; WikiText and ImageNet-1K.
"""

import io
import os

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from paper import ROOT, lay_out_wikitext, outputs, paper_series
from PIL import Image

from tensorlens_utils import load_data, load_model
from tensorlens_utils.haar import Haar
from tensorlens_utils.notebooks import Series
from tensorlens_utils.patterns import capture
from tensorlens_utils.trees.questionnaire import questionnaire

NAME = "08_haar_sparsity"
pytestmark = pytest.mark.usefixtures("environment")
WORDS = [f"w{i}" for i in range(150)]
HUB = {  # name: model class, configuration class, configuration
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {
        "hidden_size": 64, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 64,
        "max_position_embeddings": 64, "use_parallel_residual": True, "rotary_pct": 0.25}),
    "bert": ("BertForMaskedLM", "BertConfig", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32,
        "max_position_embeddings": 64}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 32, "max_position_embeddings": 64}),
    "vit": ("ViTForImageClassification", "ViTConfig", {
        "hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 48,
        "patch_size": 8, "image_size": 40, "num_labels": 10}),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    vocab = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", "<pad>", "[CLS]", "[SEP]", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for seed, (name, (model_class, config_class, config)) in enumerate(HUB.items()):
        torch.manual_seed(seed)
        sizes = {"initializer_range": 0.2} | ({} if name == "vit" else {"vocab_size": len(vocab)}) | config
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
        model.save_pretrained(folder / name)
        if name == "vit":
            transformers.ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(folder / name)
        else:
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=made, unk_token="<unk>", eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                model_max_length=64, **({"cls_token": "[CLS]", "sep_token": "[SEP]"} if name == "bert" else {}),
            ).save_pretrained(folder / name)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """In the layout and schema of Salesforce/wikitext: several sets under one name, and blank lines among paragraphs,
    some of them longer than a model's context."""
    random = np.random.default_rng(0)
    rows = [line for _ in range(120) for line in ("", " ".join(random.choice(WORDS, random.integers(3, 90))) + " \n")]
    return lay_out_wikitext(tmp_path_factory.mktemp("wikitext"), dict.fromkeys(
        ("wikitext-103-raw-v1", "wikitext-2-v1"), rows))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The validation split in the layout and schema of ILSVRC/imagenet-1k; what stands for the others is no parquet."""
    folder, random = tmp_path_factory.mktemp("imagenet-1k"), np.random.default_rng(0)
    (folder / "data").mkdir()
    images = []
    for _ in range(40):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (44, 50, 3), dtype=np.uint8)).save(file, "JPEG")
        images.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(40)]}, features)
    rows.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    for other in ("train", "test"):
        (folder / "data" / f"{other}-00000-of-00001.parquet").write_text("not to be read")
    return folder


@pytest.mark.parametrize("name, length", [("pythia", 37), ("vit", 26)])
def test_any_length_and_as_many_heads_as_the_papers_are_organised(hub, wikitext, name, length):
    """128 and 144 heads, lengths that are no power of two: trees of every axis, and coefficients that are all of it."""
    model, processor = load_model(hub / name)
    inputs = {"pixel_values": torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))}
    if name == "pythia":
        words = " ".join(load_data(wikitext, subset="wikitext-103-raw-v1")["text"][:20])
        inputs = processor(words, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        x = capture(model, inputs).network()[0]
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    assert x.shape == (length, length, heads) and heads >= 128
    found = questionnaire(x, rounds=2)
    assert [tree.n for tree in found.trees] == [length, length, heads]
    haar = Haar(*found.trees)
    assert (haar.synthesis(haar.analysis(x.double())) - x).abs().max() < 1e-12


def test_the_notebook_runs_through_with_the_papers_models_and_data(hub, wikitext, imagenet, tmp_path):
    paper = Series(ROOT).table[NAME]["paper"]
    changed = {
        "text_model": str(hub / "pythia"), "text_data": str(wikitext), "image_model": str(hub / "vit"),
        "image_data": str(imagenet), "other_models": [str(hub / "bert"), str(hub / "llama")],
        "other_data": [str(wikitext)] * 2, "length": 37, "n_texts": 4, "n_heads": 3, "n_pruned": 2, "n_images": 12,
        "n_compared": 2, "n_slices": 2, "n_resamples": 50, "device": "cpu"}  # fmt: skip
    assert paper["text_subset"] == "wikitext-103-raw-v1"
    assert all("/" in paper[key] for key in ("text_model", "image_model", "text_data", "image_data"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    paper_series(tmp_path, NAME, changed).run(NAME)
    _, printed = outputs(tmp_path, NAME)
    for name in HUB:
        assert f"{hub / name}" in printed
    drawn = {path.name for path in (tmp_path / "build" / "paper" / "figures").iterdir()}
    training = {"08_training.png", "08_training.svg"}  # these checkpoints have no training behind them
    assert drawn == {path.name for path in (ROOT / "figures").glob("08_*")} - training
