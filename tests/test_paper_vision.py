"""Notebook 04 with the paper's models and data: its whole code path, on checkpoints and a data set made on the spot.

They are what the hub has, but for size and weights, which are random, so nothing that the notebook finds is asserted:
ViT; DeiT, whose plain checkpoints (facebook/deit-{tiny,small,base}-patch16-224) are ViTs by class and configuration and
carry an image processor's file of 2021, without a type and with a number for a size; distilled DeiT, of a class of its
own that answers by two tokens; and ImageNet-1K, parquet in three splits of which one is to be downloaded.
"""

import io
import json
import os

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import transformers
from paper import ROOT, outputs, paper_series
from PIL import Image

from tensorlens_utils import explain, linearize, load_data, load_model
from tensorlens_utils.baselines import METHODS as RIVALS
from tensorlens_utils.collapse import METHODS, class_map, collapsed, in_out_map
from tensorlens_utils.collapse.drivers import by_source, by_writer
from tensorlens_utils.notebooks import Series
from tensorlens_utils.results import read

NAME = "04_vision_perturbation"
pytestmark = pytest.mark.usefixtures("environment")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
         "image_size": 32, "num_labels": 12, "id2label": {i: f"fish {i}, Piscis {i}" for i in range(12)},
         "initializer_range": 0.3}  # fmt: skip
OF_2021 = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}
OF_DEIT = {"feature_extractor_type": "DeiTFeatureExtractor", "crop_size": 32, "do_center_crop": True,
           "do_normalize": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
           "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 36}  # fmt: skip
HUB = {  # name: class, configuration, preprocessor_config.json
    "deit-base": ("ViTForImageClassification", "ViTConfig", OF_2021),
    "deit-tiny": ("ViTForImageClassification", "ViTConfig", OF_2021),
    "vit-base": ("ViTForImageClassification", "ViTConfig", OF_2021 | {"image_processor_type": "ViTImageProcessor"}),
    "deit-base-distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", OF_DEIT),
}


def photographs(n):
    """Smooth noise of several sizes and modes, most of them RGB, as the files of ImageNet: (mode, bytes) each."""
    generator = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        mode = {3: "L", 5: "RGBA", 7: "CMYK"}.get(i, "RGB")
        file, picture = io.BytesIO(), coarse.resize((40 + i, 50), Image.Resampling.BICUBIC).convert(mode)
        picture.save(file, "PNG" if mode == "RGBA" else "JPEG")
        yield mode, file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The validation split in the layout and schema of ILSVRC/imagenet-1k; what stands for the others is no parquet."""
    folder = tmp_path_factory.mktemp("imagenet-1k")
    (folder / "data").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(
        names=[*SIZES["id2label"].values()])})  # fmt: skip
    images = [{"bytes": data, "path": f"ILSVRC2012_val_{i:08d}.JPEG"} for i, (_, data) in enumerate(photographs(40))]
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 12 for i in range(40)]}, features)
    rows.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    for other in ("train", "test"):
        (folder / "data" / f"{other}-00000-of-00001.parquet").write_text("not to be read")
    sizes = {"train": 1281167, "validation": 50000, "test": 100000}  # which a part of the splits does not have
    splits = "".join(f"  - name: {name}\n    num_bytes: 1\n    num_examples: {n}\n" for name, n in sizes.items())
    (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, imagenet):
    folder = tmp_path_factory.mktemp("hub")
    for seed, (name, (model_class, config_class, processor)) in enumerate(HUB.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, config_class)(**SIZES)
        getattr(transformers, model_class)(config).save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    speak(folder / "deit-base", imagenet)
    return folder


def speak(path, imagenet):
    """Give a model a head that answers 0 to one half of the images and 1 to the other: some section needs two answers.
    """
    model, processor = load_model(path)
    inputs = processor(validation(imagenet)[:]["image"], return_tensors="pt")
    with torch.no_grad():
        h = model.vit(**inputs).last_hidden_state[:, 0]
        w = torch.linalg.svd(h - h.mean(0), full_matrices=False).Vh[0]
        model.classifier.weight[:2] = torch.stack([w, -w])
        model.classifier.bias[:] = -100
        model.classifier.bias[:2] = (h @ w).median() * torch.tensor([-1, 1])
    model.save_pretrained(path)


def validation(imagenet):
    return load_data(imagenet, "validation", data_files={"validation": "data/validation-*"},
                     verification_mode="no_checks", cache_dir=str(imagenet / "cache"))  # fmt: skip


def test_one_split_of_imagenet_is_read_and_no_other(imagenet):
    rows = validation(imagenet)
    assert rows.column_names == ["image", "label"] and rows.features["label"].names[3] == "fish 3, Piscis 3"
    assert [rows[i]["image"].mode for i in (0, 3, 5, 7)] == ["RGB", "L", "RGBA", "CMYK"]
    with pytest.raises(pyarrow.lib.ArrowInvalid, match="not a parquet file"):
        load_data(imagenet, "validation", cache_dir=str(imagenet / "cache"))


@pytest.mark.parametrize("name", HUB)
def test_checkpoints_of_the_hub_load_as_their_own_class_and_take_any_photograph(hub, imagenet, name):
    model, processor = load_model(hub / name)
    assert type(model).__name__ == HUB[name][0] and json.loads((hub / name / "config.json").read_text())[
        "model_type"] == ("deit" if "distilled" in name else "vit")  # fmt: skip
    images = validation(imagenet)[:10]["image"]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (10, 3, 32, 32) and pixels[3].ne(pixels[2]).any()
    grey = np.asarray(images[3].resize((32, 32)), dtype=float)  # of a grey image all channels are alike
    shown = pixels[3] * torch.tensor(processor.image_std).view(3, 1, 1) + torch.tensor(processor.image_mean).view(
        3, 1, 1)  # fmt: skip
    assert (shown - shown[0]).abs().max() < 1e-6 and np.corrcoef(shown[0].flatten(), grey.flatten())[0, 1] > 0.8


def test_a_distilled_deit_is_explained_by_both_of_its_tokens(hub, imagenet):
    """Its answer is the mean of two heads, which read the class token and the distillation token. Both are prefixes of
    the sixteen patches; no row of T is the output's own, so In+Out and the like take the class vector for F."""
    model, processor = load_model(hub / "deit-base-distilled", dtype="float64")
    torch.nn.init.normal_(model.requires_grad_(False).deit.embeddings.distillation_token)  # zero in a new model
    inputs = {k: v.double() for k, v in processor(validation(imagenet)[:3]["image"], return_tensors="pt").items()}
    logits = model(**inputs).logits
    target = logits.argmax(1)
    for at, n in (("tokens", 16), ("embeddings", 18)):
        split = class_map(linearize(model, inputs, at=at), target)
        assert split.scores.shape == (3, n) and torch.allclose(split.total, logits.amax(1))
    for at in ("tokens", "embeddings"):
        whole = in_out_map(linearize(model, inputs, at=at))
        assert torch.allclose(collapsed("in_out", model, inputs, target, at=at).scores, whole.scores)
    for name, method in (METHODS | RIVALS).items():
        scores = method(model, inputs, target)
        assert scores.shape == (3, 16) and scores.isfinite().all(), name
    for shares in (by_source(model, inputs, target), by_writer(model, inputs, target)):
        assert torch.allclose(shares.total, logits.amax(1))
    assert by_source(model, inputs, target)["deit.embeddings.distillation_token"].any()
    answer = explain(model, validation(imagenet)[1]["image"], processor)
    assert answer.grid == (4, 4) and answer.total == pytest.approx(float(logits[1].max()))
    assert answer.target == model.config.id2label[int(target[1])]


def test_the_notebook_runs_through_with_the_papers_models_and_data(hub, imagenet, tmp_path):
    paper = Series(ROOT).table[NAME]["paper"]
    changed = {
        "model_name": str(hub / "deit-base"), "data_name": str(imagenet), "device": "cpu",
        "other_models": [str(hub / name) for name in HUB if name != "deit-base"], "batch_size": 5, "first": 2,
        "n_images": 8, "n_fewer": 4, "n_maps": 4, "n_checked": 5, "n_draws": 2, "n_parts": 3, "n_removed": 2,
        "n_simulated": 24, "n_resamples": 200}  # fmt: skip
    assert "/" in paper["model_name"]
    os.environ["HF_DATASETS_CACHE"] = str(imagenet / "cache")
    paper_series(tmp_path, NAME, changed).run(NAME)
    _, printed = outputs(tmp_path, NAME)
    assert f"{hub / 'deit-base'} names" in printed and "curves of 19 methods on 8 images" in printed
    drawn = {path.name for path in (tmp_path / "build" / "paper" / "figures").iterdir()}
    assert drawn == {path.name for path in (ROOT / "figures").glob("04_*")}
    table = read(tmp_path / "build" / "paper" / "04_black.jsonl")
    assert len(table.rows) == 19 * 8 * 3 and table.settings["model"].startswith("ViTForImageClassification")
    assert {row["target"] for row in table.rows} == {0, 1}
