"""How a token or a patch is removed from an input: what stands in its place is a choice, by name in `REMOVERS`.

    text     mask, unk, pad    that token of the tokenizer's, attended as the removed one was
             drop              nothing: the rest is closed up, and the attention mask says where it ends
    image    zero              black, intensity zero before the processor's normalisation
             mean              the patch's own mean colour
             blur              the image under a Gaussian of half a patch
             grey              the data's mean colour, zero after normalisation

All change the answer for two reasons, because information is gone and because such inputs are new to the model; which
model met which in training is on the cards of the zoo.

>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.perturbation.removers import REMOVERS, removable
>>> model, processor = load_model("tiny-bert")
>>> inputs = processor(["the plot was not good ."], return_tensors="pt")
>>> can = removable(model, processor, inputs)
>>> can.int().tolist()
[[0, 1, 1, 1, 1, 1, 1, 0]]
>>> masked = REMOVERS["text"]["mask"](model, processor, inputs, can & (inputs["input_ids"] > 200))
>>> processor.decode(masked["input_ids"][0])
'[CLS] [MASK] [MASK] [MASK] [MASK] good . [SEP]'
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


def _token(name: str, model: nn.Module, processor: Any, inputs: Inputs, removed: Tensor) -> Inputs:
    """A special token in the place of each removed one, which is attended as it was."""
    token = getattr(processor, f"{name}_token_id", None)
    if token is None:
        raise ValueError(f'The remover "{name}" puts a token in the place of the removed, and this tokenizer has no '
                         f'{name}_token. Use another of {", ".join(REMOVERS["text"])}; "drop" needs none.')
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(removed, token)}


def _drop(model: nn.Module, processor: Any, inputs: Inputs, removed: Tensor) -> Inputs:
    """The removed taken out and the rest closed up to the left; the attention mask tells where it ends. Where nothing
    is left at all, one token stands for the empty text: the first that the tokenizer has of bos, eos, unk and pad."""
    kept = inputs["attention_mask"].bool() & ~removed
    order = (~kept).int().argsort(dim=1, stable=True)[:, :max(1, int(kept.sum(1).max()))]
    closed = {name: value.gather(1, order) for name, value in inputs.items()}
    ids = [getattr(processor, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")]
    ids = [i for i in ids if i is not None] or [0]
    mask = kept.gather(1, order)
    closed["input_ids"] = closed["input_ids"].masked_fill(~mask, ids[-1])
    empty = ~mask.any(1)
    closed["input_ids"][empty, 0], mask[empty, 0] = ids[0], True
    return {**closed, "attention_mask": mask.to(inputs["attention_mask"])}


def _repaint(paint: Callable, model: nn.Module, processor: Any, inputs: Inputs, removed: Tensor) -> Inputs:
    """The removed patches shown as they are in another image of the same size, which `paint` makes."""
    pixels = inputs["pixel_values"]
    grid, patch = _patches(model, pixels)
    where = _enlarge(removed.view(-1, 1, *grid), patch)
    return {**inputs, "pixel_values": torch.where(where, paint(processor, pixels, patch), pixels)}


def _patches(model: nn.Module, pixels: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many patches an image has and how large they are: (rows, columns), (height, width)."""
    size, sides = model.config.patch_size, pixels.shape[-2:]
    patch = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] % patch[0] or sides[1] % patch[1]:
        raise ValueError(f"Patches of {patch} cover an image, and they do not cover one of {tuple(sides)}: let the "
                         "processor resize or crop images to a multiple.")
    return (sides[0] // patch[0], sides[1] // patch[1]), patch


def _enlarge(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """A value for each patch as one for each pixel: (N, C, rows, columns) -> (N, C, H, W)."""
    return x.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


def _black(processor: Any, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Intensity zero, as the processor writes it: (0 − mean) / std."""
    if not getattr(processor, "do_normalize", False):
        return torch.zeros_like(pixels)
    mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (-mean / std).expand_as(pixels)


def _patch_mean(processor: Any, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Each patch's own mean colour."""
    return _enlarge(nn.functional.avg_pool2d(pixels, patch), patch)


def _blur(processor: Any, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """The image under a Gaussian of σ = half a patch, which leaves less than 1 % of any wave as short as a patch; at
    the borders over what there is."""
    def average(side: int, p: int) -> Tensor:
        x = torch.arange(side, dtype=pixels.dtype, device=pixels.device)
        weights = torch.exp(-((x[:, None] - x) / (p / 2)) ** 2 / 2)
        return weights / weights.sum(1, keepdim=True)

    return average(pixels.shape[2], patch[0]) @ pixels @ average(pixels.shape[3], patch[1]).T


# What stands in the place of the removed: (model, processor, inputs, removed (N, L)) -> inputs. Add your own by name.
REMOVERS: dict[str, dict[str, Callable]] = {
    "text": {"mask": partial(_token, "mask"), "unk": partial(_token, "unk"), "pad": partial(_token, "pad"),
             "drop": _drop},
    "image": {"zero": partial(_repaint, _black), "mean": partial(_repaint, _patch_mean),
              "blur": partial(_repaint, _blur),
              "grey": partial(_repaint, lambda processor, pixels, patch: torch.zeros_like(pixels))},  # the data's mean
}


def kind_of(model: nn.Module) -> str:
    """What a model takes: "image" or "text"."""
    return "image" if model.main_input_name == "pixel_values" else "text"


def removable(model: nn.Module, processor: Any, inputs: Inputs) -> Tensor:
    """Which tokens can be removed, (N, L): every patch of an image; of a text all but padding and the tokens that a
    tokenizer adds (cls, sep, bos, eos, pad). A [MASK] or [UNK] in the text is a token of the text."""
    if kind_of(model) == "image":
        pixels = inputs["pixel_values"]
        (rows, columns), _ = _patches(model, pixels)
        return torch.ones(len(pixels), rows * columns, dtype=torch.bool, device=pixels.device)
    added = [getattr(processor, f"{name}_token_id", None) for name in ("cls", "sep", "bos", "eos", "pad")]
    ids = inputs["input_ids"]
    special = torch.isin(ids, torch.tensor([i for i in added if i is not None], dtype=ids.dtype, device=ids.device))
    return inputs["attention_mask"].bool() & ~special
