"""One text or image explained in one call: each token's share of the answer, exact, and the bias's beside them.

    explain("tiny-bert", "the plot was far from dull .")

In a notebook the result shows itself: the coloured text or image, red where a token speaks for the answer, blue where
against it, and the sum that they make with the bias.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from ..linearize import linearize
from ..models import _processor, load_model
from . import class_map

RED, BLUE = "178,24,43", "33,102,172"  # the ends of plotting's colour map
WIDTH = 240  # of an image, in pixels of the screen


@dataclass(frozen=True, repr=False)
class Explanation:
    """An output split over its tokens: ``scores`` (L,), one of each of ``tokens``, and ``bias`` are ``total`` in sum.

    ``target`` names what was split. For an image ``grid`` is its (rows, columns) of patches, and ``pixels`` are what
    the model was shown, (height, width, 1 or 3), of 0..255.
    """

    tokens: list[str]
    scores: Tensor
    bias: float
    total: float
    target: str
    grid: tuple[int, int] | None = None
    pixels: Tensor | None = None

    @property
    def bias_share(self) -> float:
        """How much of Σ|scores| + |bias| is the bias's, 0..1."""
        return abs(self.bias) / max(float(self.scores.abs().sum()) + abs(self.bias), 1e-300)

    def __repr__(self):
        return (f"{self.target}: {self.total:+.2f} = {float(self.scores.sum()):+.2f} of {len(self.tokens)} tokens "
                f"{self.bias:+.2f} of the bias")  # fmt: skip

    def _repr_html_(self):
        words = (f"{self.total:+.2f} = {float(self.scores.sum()):+.2f} of the tokens {self.bias:+.2f} of the bias, "
                 f"{self.bias_share:.0%} of what was added up")  # fmt: skip
        body = coloured(self.scores, self.tokens, self.grid, self.pixels)
        return (f'<div style="background:white;color:black;padding:4px;line-height:1.9"><div>{body}</div>'
                f"<div><b>{escape(self.target)}</b> {words.replace('-', chr(0x2212))}</div></div>")  # fmt: skip


def coloured(scores: Tensor, tokens: list[str], grid: tuple[int, int] | None = None, pixels: Tensor | None = None
             ) -> str:  # fmt: skip
    """HTML of a text's tokens, or of an image's patches (see ``Explanation``), coloured by scores (L,): red is for the
    answer, blue against it, the largest in size has the full colour. The numbers stand in the tooltips."""
    top = max(float(scores.abs().max()), 1e-300)
    colours = [f"rgba({RED if s > 0 else BLUE},{0.75 * abs(s) / top:.3f})" for s in scores.tolist()]
    if grid is None:
        style = "padding:1px 2px;background:"
        return " ".join(f'<span style="{style}{colour}" title="{s:+.3f}">{escape(token)}</span>'
                        for token, s, colour in zip(tokens, scores.tolist(), colours, strict=True))  # fmt: skip
    from PIL import Image

    file, (rows, columns) = io.BytesIO(), grid
    Image.fromarray(pixels.squeeze(-1).numpy()).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    cells = "".join(f'<rect x="{j % columns}" y="{j // columns}" width="1" height="1" fill="{colour}">'
                    f"<title>{s:+.3f}</title></rect>" for j, (s, colour) in
                    enumerate(zip(scores.tolist(), colours, strict=True)))  # fmt: skip
    frame = f'<svg width="{WIDTH}" viewBox="0 0 {columns} {rows}" role="img" aria-label='
    image = (f'<image href="data:image/png;base64,{picture}" width="{columns}" height="{rows}" '
             'preserveAspectRatio="none" style="image-rendering:pixelated"')  # fmt: skip
    faded = f'{image} opacity="0.15"/>'  # colours are lost on a dark picture
    return f'{frame}"what the model sees">{image}/></svg> {frame}"shares of its patches">{faded}{cells}</svg>'


def explain(model: nn.Module | str | Path, text_or_image, processor=None, target=None) -> Explanation:
    """The model's answer to one text or image (a PIL image or array), split over its tokens by the class map.

    model       a model, or a name, path or hub id for ``load_model``
    processor   its tokenizer or image processor; None: the one that was saved beside it
    target      what to split: None, the model's own prediction (of a language model, the next token); a class or token,
                by number or name; or a pair of these, for their contrast, the first less the second

    >>> split = explain("tiny-bert", "the plot was far from dull .")
    >>> split
    positive: +4.13 = +4.89 of 9 tokens -0.76 of the bias
    >>> abs(float(split.scores.sum()) + split.bias - split.total) < 1e-4
    True
    """
    if not isinstance(model, nn.Module):
        model, own = load_model(model)
        processor = processor or own
    processor = processor or _processor(model.name_or_path, model, {})
    is_image = model.main_input_name == "pixel_values"
    inputs = processor(text_or_image, return_tensors="pt").to(model.device)
    inputs = inputs.to(model.dtype) if is_image else inputs
    T = linearize(model, inputs)
    classes = T.output.shape[1] == 1
    if len(T.output) > 1:
        raise ValueError(f"explain takes one text or image, not {len(T.output)}; of a batch, take class_map")
    if target is None:
        target = int(T.output[0, T.positions(-1)[0]].argmax())
    chosen = entries(model, processor, target, classes)
    w = torch.zeros(1, T.output.shape[-1])
    for sign, entry in zip((1, -1), chosen, strict=False):
        w[0, entry] += sign
    split = class_map(T, w)
    return Explanation(scores=split.scores[0].cpu(), bias=float(split.bias), total=float(split.total),
                       target=named(model, processor, chosen, classes),
                       **shown(model, processor, inputs, T.input.shape[1]))  # fmt: skip


def entries(model: nn.Module, processor, target, classes: bool) -> list[int]:
    """The one or two output entries that a target stands for, as ``explain`` takes it; of ``classes``, or tokens."""
    labels = getattr(model.config, "label2id", None) or {}

    def number(entry) -> int:
        if not isinstance(entry, str):
            return int(entry)
        ids = [labels[entry]] if classes and entry in labels else []
        if not classes:
            ids = processor(entry, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            rule = f"one of {', '.join(map(repr, labels))}" if classes else f"one token, but {entry!r} is {len(ids)}"
            raise ValueError(f"target must be {rule}; not {entry!r}. Or give its number")
        return ids[0]

    found = [number(entry) for entry in (target if isinstance(target, tuple | list) else [target])]
    if len(found) > 2:
        raise ValueError(f"target must be an entry or a pair of them, for their contrast, not {target!r}")
    return found


def named(model: nn.Module, processor, entries: Sequence[int], classes: bool) -> str:
    """A target in words: a class, a token, or "the first less the second"."""
    return " less ".join(str(model.config.id2label.get(entry, entry)) if classes else processor.decode([entry]).strip()
                         for entry in entries)  # fmt: skip


def shown(model: nn.Module, processor, inputs, L: int) -> dict:
    """What a picture of one input shows, as ``Explanation`` has it: the names of its L tokens; of an image also its
    patches' grid, and its pixels."""
    if model.main_input_name == "pixel_values":
        return _patches(model, inputs["pixel_values"][0], L)
    ids = inputs["input_ids"][0].tolist()
    return {"tokens": [processor.decode([i]).strip() or str(t)
                       for i, t in zip(ids, processor.convert_ids_to_tokens(ids), strict=True)]}  # fmt: skip


def _patches(model: nn.Module, pixels: Tensor, L: int) -> dict:
    """The names of an image's patches, their rows and columns, and the pixels (C, H, W) as a picture."""
    size = getattr(model.config, "patch_size", None) or round((pixels[0].numel() / L) ** 0.5)
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = pixels.shape[1] // height, pixels.shape[2] // width
    if rows * columns != L:
        raise ValueError(f"an image's tokens must be its patches, {rows} x {columns} by the model's patch_size, and "
                         f"there are {L}; class_map(linearize(model, inputs)) gives scores without a picture")
    low, high = pixels.min(), pixels.max()
    picture = ((pixels - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).movedim(0, -1).cpu()
    return {"tokens": [f"patch {r},{c}" for r in range(rows) for c in range(columns)], "grid": (rows, columns),
            "pixels": picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1]}  # fmt: skip
