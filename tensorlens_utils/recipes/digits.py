"""tiny-vit, which sees scikit-learn's digits, and the pair tiny-preln and tiny-postln, which read them as text."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import digit_text, load_data
from ..models import word_tokenizer
from .training import Recipe, share

PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of intensity / 16 over the training digits; a pixel value of 0 is the mean grey
BASELINES = {"black": -PIXEL_MEAN / PIXEL_STD, "grey": 0.0}  # what a masked patch holds: intensity 0, or the mean
INITIAL = 0.1  # of the initial weights: near 1/√d at d = 48 or 64, where the usual 0.02 learns far more slowly
GRID, PATCH = 4, 2  # tiny-vit's 4×4 patches of 2×2 pixels


# --- tiny-vit -----------------------------------------------------------------------------------------------


@cache
def _train_digits() -> tuple[Tensor, Tensor]:
    """The training digits: intensities (n, 8, 8), labels (n,)."""
    digits = load_data("digits", "train")
    return torch.from_numpy(np.stack([np.asarray(image) for image in digits["image"]])), torch.tensor(digits["label"])


def shifted_digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n training digits, a quarter of them moved by up to a pixel: intensities (n, 8, 8), labels (n,)."""
    images, labels = _train_digits()
    chosen = torch.randint(len(images), (n,), generator=generator)
    moved = torch.rand(n, generator=generator) < 0.25
    dy, dx = torch.where(moved, torch.randint(3, (2, n), generator=generator), 1)
    views = F.pad(images[chosen], (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)  # (n, 3, 3, 8, 8)
    return views[torch.arange(n), dy, dx], labels[chosen]


def mask_patches(pixel_values: Tensor, masked: Tensor, baseline: Tensor | float) -> Tensor:
    """Pixels (N, 1, 8, 8) with the masked patches, (N, 16) booleans, set to a baseline: a number or (N, 1, 1, 1)."""
    pixels = masked.view(-1, 1, GRID, GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.where(pixels, baseline, pixel_values)


def _vit_build() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = dict(enumerate("0123456789"))
    config = ViTConfig(image_size=8, patch_size=PATCH, num_channels=1, hidden_size=64, num_hidden_layers=4,
                       num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, initializer_range=INITIAL, id2label=names,
                       label2id={digit: i for i, digit in names.items()})
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}, rescale_factor=1 / 16,
                                     image_mean=[PIXEL_MEAN], image_std=[PIXEL_STD])
    return ViTForImageClassification(config), processor


def _vit_batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    images, labels = shifted_digits(n, generator)
    pixel_values = (images[:, None] / 16 - PIXEL_MEAN) / PIXEL_STD
    fraction = 0.75 * torch.rand(n, 1, generator=generator)
    masked = torch.rand(n, GRID * GRID, generator=generator) < fraction
    black = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    baseline = torch.where(black, BASELINES["black"], BASELINES["grey"])
    return {"pixel_values": mask_patches(pixel_values, masked, baseline), "labels": labels}


@torch.no_grad()
def _vit_measure(model: nn.Module, processor: Any) -> dict[str, dict]:
    digits = load_data("digits", "test")
    pixel_values = processor(digits[:]["image"], return_tensors="pt").pixel_values
    labels = torch.tensor(digits["label"])
    order = torch.rand(len(labels), GRID * GRID, generator=torch.Generator().manual_seed(0)).argsort(1)
    measured = {"accuracy": share(model(pixel_values).logits.argmax(-1) == labels)}
    for hidden in (4, 8):
        for word, baseline in BASELINES.items():
            masked = mask_patches(pixel_values, order < hidden, baseline)
            measured[f"accuracy, {hidden} of 16 patches {word}"] = share(model(masked).logits.argmax(-1) == labels)
    return measured


# --- tiny-preln and tiny-postln -----------------------------------------------------------------------------


def _token_processor() -> Any:
    """A tokenizer of intensities: "0 0 5 13 ..." to the class token and one token a word."""
    return word_tokenizer(map(str, range(17)), 65, template="<s> $A", pad_token="<pad>", cls_token="<s>",
                          unk_token="<unk>")


def _pair_build(pre_norm: bool) -> tuple[nn.Module, Any]:
    import transformers

    shape = dict(vocab_size=20, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                 max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=INITIAL,
                 id2label=dict(enumerate("0123456789")),
                 label2id={digit: int(digit) for digit in "0123456789"})
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**shape))
    if pre_norm:
        post, config = model, transformers.RobertaPreLayerNormConfig(**shape)
        model = transformers.RobertaPreLayerNormForSequenceClassification(config)
        # The two start from the same weights: only the norms, which start as 1 and 0, stand elsewhere.
        for mine, theirs in zip(*([p for name, p in m.named_parameters() if "LayerNorm" not in name]
                                  for m in (model, post)), strict=True):
            mine.data.copy_(theirs.data)
    return model, _token_processor()


def _pair_batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    images, labels = shifted_digits(n, generator)
    return {"input_ids": F.pad(images.flatten(1).long() + 3, (1, 0), value=1), "labels": labels}


@torch.no_grad()
def _pair_measure(model: nn.Module, processor: Any) -> dict[str, dict]:
    digits = load_data("digits", "test")
    inputs = processor([digit_text(image) for image in digits["image"]], return_tensors="pt")
    return {"accuracy": share(model(**inputs).logits.argmax(-1) == torch.tensor(digits["label"]))}


_VIT = """A vision transformer for scikit-learn's real 8×8 digits: 16 patches of 2×2 pixels and a class token, 4 layers,
4 heads, 64 channels. Trained on 1297 digits, a quarter of them moved by up to a pixel and all with up to three quarters
of their patches masked: in every digit a random share of them is set to black (intensity 0) or, as often, to the mean
grey (a pixel value of 0), so that masked inputs are no surprise. 500 digits held out; of their patches 4 or 8 were
masked at random, with a fixed seed."""
_PAIR = """A {} transformer (RoBERTa's, with {}) that reads scikit-learn's real 8×8 digits as text: a class token, then
64 words, the intensities 0..16 row by row; 3 layers, 4 heads, 48 channels. One of a pair: tiny-preln and tiny-postln
differ in the place of LayerNorm alone, start from the same weights and see the same data in the same order. Trained on
1297 digits, a quarter of them moved by up to a pixel; 500 held out."""
_PRE = _PAIR.format("pre-LN", "a norm before each part and one at the end")
_POST = _PAIR.format("post-LN", "a norm after each sum")

RECIPES = (
    Recipe("tiny-vit", _VIT, _vit_build, _vit_batch, _vit_measure, steps=4000,
           checkpoints=(0, 10, 30, 100, 300, 1000, 2000, 4000), storage="float32"),
    Recipe("tiny-preln", _PRE, partial(_pair_build, True), _pair_batch, _pair_measure, steps=2000,
           storage="float32"),
    Recipe("tiny-postln", _POST, partial(_pair_build, False), _pair_batch, _pair_measure, steps=2000,
           storage="float32"),
)
