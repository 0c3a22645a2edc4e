"""The explorer of attributions: choose an example, a target, a map of it, and see whether the map tells the truth.

    explore(model, tokenizer, ["the plot was far from dull .", "a dull film"])

The menus and the still picture are those of menus.py, the coloured text or image that of explaining.py, the curves
those of perturbation.py.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

from . import baselines, collapse
from .attentions import logits
from .collapse.explaining import coloured, entries, named, shown
from .linearize import untouched
from .menus import Explorer, by_name, svg, typed, typed_or_chosen
from .models import n_blocks
from .perturbation import FRACTIONS, area, removals, watched
from .perturbation.batches import Batch, answers
from .perturbation.removers import REMOVERS, kind_of, removable
from .plotting import PAGE_WIDTH, PALETTE, cells, diverging, signed

MANY = 96  # tokens of a text in a still picture
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1)}  # a legend


def explore(model: nn.Module, processor: Any, examples: Sequence | Mapping[str, Any],
            methods: Mapping[str, Callable] | None = None, *, targets: Sequence = (), top: int = 5) -> Explorer:
    """Choose an example, a target, a map: see the text or the image coloured, the sum, and the test by perturbation.

    It shows the tokens or patches, red where they speak for the target and blue where against it; the exact sum of
    scores and bias where the map is such a split (class: the logit; in_out: ‖Y‖²); and this one example's curves, what
    becomes of the target's probability (of a contrast: of the difference of two logits) while tokens are removed, the
    most relevant first and the least relevant first. Whatever was computed is remembered.

    Args:
        model: a classifier of texts or images, or a language model, whose next token is explained.
        processor: its tokenizer or image processor.
        examples: texts or images (PIL or arrays) in a list; or by name, in a dict; or a `datasets` data set with a
            column "text" or "image". A text can also be typed. Texts are cut at the tokenizer's own limit.
        methods: name -> method(model, inputs, target) -> scores (1, L), as in `perturbation`; None: the five maps of
            the tensor and their rivals. Maps of the tensor can be read at any boundary between blocks, where X is
            what the positions hold by then.
        targets: classes or tokens, by number or name, or pairs of these for their contrast, to be offered beside the
            model's own first choices, which are `top` in number. Methods are given a contrast as (1, 2).

    Raises ValueError for no examples, no methods, or a target that is none of the model's outputs.

    >>> from tensorlens_utils import load_model
    >>> board = explore(*load_model("tiny-bert"), ["the plot was far from dull ."])
    >>> "+4.13 = +4.89 of the tokens" in board.view.value
    True
    >>> board.controls["method"].value = "rollout"
    >>> "no exact split" in board.view.value
    True
    """
    examples = by_name(examples[kind_of(model)] if hasattr(examples, "column_names") else examples)
    methods = dict(collapse.METHODS | baselines.METHODS if methods is None else methods)
    if not methods:
        raise ValueError("methods must hold one at least, by name; None stands for those of collapse and of baselines")
    maps = _Maps(model, processor, examples, methods, targets, top)
    menus = {"example": [*examples]} | ({"text": typed()} if maps.kind == "text" else {})
    menus |= {"target": maps.targets, "method": [*methods], "layer": maps.layers, "remover": maps.removers}
    what = "choose the example, target, method, layer and remover of a map"
    return typed_or_chosen(Explorer(menus, maps.html, maps.figure, what))


class _Case(NamedTuple):
    """An example as the model sees it, and what it answers."""

    inputs: dict[str, Tensor]
    can: Tensor  # (1, L), which tokens can be removed
    logits: Tensor  # (C,)
    classes: bool  # whether they are of classes; of tokens otherwise
    shown: dict  # names of the tokens, and of an image its grid and pixels


class _Map(NamedTuple):
    """Scores of the tokens, and of what stands before them (class token, registers); of a split also its bias."""

    all: Tensor
    L: int
    bias: float | None

    @property
    def scores(self) -> Tensor:
        return self.all[-self.L:]

    @property
    def before(self) -> Tensor:
        return self.all[:-self.L]

    @property
    def total(self) -> float:
        return float(self.all.sum()) + self.bias


class _Maps:
    """What the explorer of attributions shows: computed when asked for, and remembered.

    An example goes by `which`, its name and a typed text or "", a target by its entries, one or two.
    """

    def __init__(self, model, processor, examples, methods, targets, top):
        self.model, self.processor, self.examples, self.methods, self.top = model, processor, examples, methods, top
        self.kind = kind_of(model)
        self.case, self.curve, self.found = cache(self._case), cache(self._curve), defaultdict(dict)
        first = self.case((next(iter(examples)), ""))
        self.asked = [tuple(entries(model, processor, target, first.classes)) for target in targets]
        for entry in (entry for target in self.asked for entry in target):
            if not 0 <= entry < len(first.logits):
                raise ValueError(f"a target is one of the model's {len(first.logits)} outputs; {entry} is none")

    def _case(self, which: tuple[str, str]) -> _Case:
        name, typed = which
        options, limit = {}, getattr(self.processor, "model_max_length", None)
        if self.kind == "text" and limit and limit < 1e6:
            options = {"truncation": True, "max_length": limit}
        inputs = self.processor(typed or self.examples[name], return_tensors="pt", **options)
        inputs = {key: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
                  for key, value in inputs.items()}  # fmt: skip
        can = removable(self.model, self.processor, inputs)
        if len(can) != 1:
            raise ValueError(f"an example is one text or image; {name!r} is {len(can)}")
        with untouched(self.model), torch.no_grad():
            y = logits(self.model, inputs)[0].double().cpu()
        return _Case(inputs, can, y if y.dim() == 1 else y[-1], y.dim() == 1,
                     shown(self.model, self.processor, inputs, can.shape[1]))  # fmt: skip

    # -- the menus

    def targets(self, example: str, text: str = "") -> list[tuple[str, tuple]]:
        case = self.case((example, text.strip()))
        best, shares = case.logits.topk(min(self.top, len(case.logits))).indices.tolist(), case.logits.softmax(0)
        listed = dict.fromkeys([(b,) for b in best] + [(best[0], b) for b in best[1:]] + self.asked)
        return [(self.name(case, t) + (f" ({float(shares[t]):.0%})" if len(t) == 1 else ""), t) for t in listed]

    def layers(self, method: str, **others) -> list[tuple[str, Any]]:
        if self.tensor_map(method) is None:
            return [("none, no map of the tensor", "tokens")]
        n = n_blocks(self.model)
        return [(f"at the {self.unit}", "tokens"), *((f"before block {k}", k) for k in range(n)),
                (f"after block {n - 1}", n)]  # fmt: skip

    def removers(self, **others) -> list[str]:
        """Those that the tokenizer has a token for: its mask first, then the one that needs none."""
        names = [name for name in REMOVERS[self.kind] if self.kind == "image" or name not in ("mask", "unk", "pad")
                 or getattr(self.processor, f"{name}_token_id", None) is not None]  # fmt: skip
        return names if self.kind == "image" else sorted(names, key=lambda name: name not in ("mask", "drop"))

    @property
    def unit(self) -> str:
        return {"image": "patches", "text": "tokens"}[self.kind]

    def name(self, case: _Case, target: tuple) -> str:
        return named(self.model, self.processor, target, case.classes)

    def tensor_map(self, method: str) -> str | None:
        """Which map of the tensor a method is, whatever it is called here; None if it is none."""
        return next((name for name, of in collapse.METHODS.items() if of is self.methods[method]), None)

    # -- the numbers

    def aim(self, target: tuple) -> Tensor:
        """What is explained, as methods take it: an entry (1,), or a pair of them (1, 2)."""
        return torch.tensor([target if len(target) == 2 else target[0]], device=self.model.device)

    def map(self, which: tuple, target: tuple, method: str, layer) -> _Map:
        found = self.found[which, method, layer]
        if target not in found:
            case, name = self.case(which), self.tensor_map(method)
            aim, device = self.aim(target), self.model.device
            with untouched(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                given = (self.methods[method](self.model, case.inputs, aim) if name is None else
                         collapse.collapsed(name, self.model, case.inputs, aim, at=layer))  # fmt: skip
            split, L = isinstance(given, collapse.Split), case.can.shape[1]
            scores = (given.scores if split else given).detach().double().cpu()
            if scores.dim() != 2 or len(scores) != 1 or scores.shape[1] < L or not scores.isfinite().all():
                raise ValueError(f"a method gives a finite score for each token, (1, {L}); {method!r} gave "
                                 f"{tuple(scores.shape)}, {int((~scores.isfinite()).sum())} of them not finite")
            found[target] = _Map(scores[0], L, float(given.bias) if split else None)
        return found[target]

    def _curve(self, which: tuple, target: tuple, method: str, layer, remover: str) -> np.ndarray:
        """(2, fractions): the answer while tokens go, the most and the least relevant first."""
        case = self.case(which)
        scores = self.map(which, target, method, layer).scores[None].to(case.can.device)
        removed = torch.cat([removals(scores, case.can, FRACTIONS, order) for order in ("morf", "lerf")], 1)
        with untouched(self.model), torch.no_grad():
            batch = Batch(range(1), case.inputs, case.can, self.aim(target), [0], answers(self.model, case.inputs))
            found = watched(self.model, self.processor, batch, removed, REMOVERS[self.kind][remover], 32)
        return found["probability" if len(target) == 1 else "logit"].view(2, -1).double().numpy()

    # -- the pictures

    def look(self, example: str, target: tuple, method: str, layer, remover: str, text: str = ""):
        """All that a picture shows: what the model sees, scores, curve, and the words beside."""
        which = example, text.strip()
        curve, m = self.curve(which, target, method, layer, remover), self.map(which, target, method, layer)
        return self.case(which).shown, m.scores, curve, self.words(which, target, method, layer)

    def words(self, which: tuple, target: tuple, method: str, layer) -> tuple[str, str, list[str]]:
        """What is shown; what its scores add up to; and what was measured beside."""
        case, found, of = self.case(which), self.found[which, method, layer], self.tensor_map(method)
        m, (first, *second) = found[target], case.logits[[*target]].tolist()
        answer, what = first - sum(second), "difference of logits" if second else "logit"
        labels = {value: f", {label}" for label, value in self.layers(method)} if of else {layer: ""}
        title = f"{method}{labels[layer]}: “{self.name(case, target)}”"
        beside = [f"{method} takes no notice of the target: “{self.name(case, other)}” has the same map"
                  for other, its in found.items() if other != target and torch.equal(its.all, m.all)][:1]
        if m.bias is None:
            scores = signed(float(m.scores.sum()), 2)
            return title, f"no exact split: {what} {signed(answer, 2)}, scores {scores} in sum", beside
        prefix = "class token" if len(m.before) == 1 else "other tokens"
        parts = {self.unit: m.scores, prefix: m.before, "bias": torch.tensor([m.bias])}
        added = " ".join(f"{signed(float(part.sum()), 2)} of the {whose}" for whose, part in parts.items() if len(part))
        if of == "class":
            gap = abs(answer - m.total) / (float(m.all.abs().sum()) + abs(m.bias))
            beside.append(f"the sum is apart from the model's own {what} by {gap:.0e} of what was added up")
        return title, f"{what if of == 'class' else '‖Y‖²'} {signed(m.total, 2)} = {added}", beside

    def draw(self, ax, curve: np.ndarray, target: tuple, **legend):
        """The two curves, with their areas, which are mean heights."""
        for y, order, colour, line in zip(curve, ("most", "least"), (PALETTE[3], PALETTE[0]), ("-", "--"), strict=True):
            mean = f"{area(y, FRACTIONS):.2f}".replace("-", "\N{MINUS SIGN}")
            ax.plot(FRACTIONS, y, line, color=colour, label=f"{order} relevant first: area {mean}")
        ax.set(xlabel=f"share of {self.unit} removed", xlim=(0, 1))
        ax.set_ylabel("probability" if len(target) == 1 else "difference of logits")
        if len(target) == 1:
            ax.set_ylim(0, 1.03)
        ax.legend(borderpad=0, **legend)

    def html(self, **choices) -> str:
        picture, scores, curve, (title, added, beside) = self.look(**choices)
        figure = Figure(figsize=(3.3, 2.3))
        self.draw(figure.subplots(), curve, choices["target"], **ABOVE)
        said = "<br>".join([f"<b>{escape(title)}</b>", escape(added), *(f"<small>{escape(b)}</small>" for b in beside)])
        width = "100%" if self.kind == "text" else "auto"  # a text above the curve, an image beside it
        return ('<div style="background:white;color:black;padding:6px;display:flex;flex-wrap:wrap;gap:6px 24px">'
                f'<div style="flex:0 0 {width};line-height:1.9">{coloured(scores, **picture)}</div>'
                f'<div style="flex:1 1 315px;line-height:1.5"><div>{said}</div>{svg(figure)}</div></div>')  # fmt: skip

    def figure(self, **choices) -> Figure:
        picture, scores, curve, (title, added, _) = self.look(**choices)
        if self.kind == "image":
            figure = Figure(figsize=(PAGE_WIDTH, 2.0))
            image, patches, ax = figure.subplots(1, 3, width_ratios=[1, 1, 2])
            image.imshow(picture["pixels"].squeeze(-1).numpy(), cmap="gray")
            patches.imshow(scores.view(picture["grid"]).numpy(), **diverging(scores))
            for panel in (image, patches):
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_visible(True)
        else:
            tokens, scores = picture["tokens"][:MANY], scores[:MANY].tolist()
            columns = max(4, min(12, int(PAGE_WIDTH / (0.065 * max(map(len, tokens)) + 0.1))))
            rows = -(-len(tokens) // columns)
            figure = Figure(figsize=(PAGE_WIDTH, 0.36 * rows + 2.0))
            words, ax = figure.subplots(2, height_ratios=[0.36 * rows, 1.4])
            blank = columns * rows - len(scores)
            texts = [f"{token}\n{signed(s, 2)}" for token, s in zip(tokens, scores, strict=True)] + [""] * blank
            cells(words, np.reshape(scores + [np.nan] * blank, (rows, columns)), [""] * columns, [""] * rows,
                  [texts[i:i + columns] for i in range(0, len(texts), columns)], fontsize=7, both=True)  # fmt: skip
        legend = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if self.kind == "image" else ABOVE | {"ncols": 2}
        self.draw(ax, curve, choices["target"], **legend)
        figure.suptitle(f"{title}\n{added}", x=0.01, ha="left", fontsize=9)
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # a token may be a dollar
        return figure
