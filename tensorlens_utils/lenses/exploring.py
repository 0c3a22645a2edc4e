"""The explorer of heads: choose a text, a position and a head, and read what every head says there, by several lenses.

    explore_heads({"lens": lens, "unembedding": unembedding(heads, moments)}, ["the capital of france is"])

A grid of layers × heads shows the first word of each head by one lens, or the word that it raises most; beneath it
stand such words of the chosen head by all lenses, side by side, and the model's first words. The menus and the still
picture are those of menus.py.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ..menus import Explorer, by_name, typed, typed_or_chosen
from ..plotting import PAGE_WIDTH, PALETTE, cells, signed
from . import Lens, heads_of
from .heads import Captured, Heads

SHOW = {"probability": False, "against its mean": True}  # as Lens.tokens takes it
GRID = {"probability": "the first word of each head", "against its mean": "the word that each head raises most"}
BLUE = "0,114,178"


def explore_heads(lenses: Mapping[str, Lens], examples: Sequence | Mapping[str, Any], *, k: int = 8) -> Explorer:
    """Choose an example and a position: what each head says there, and one head by several lenses side by side.

    The grid has the first word of each head, the bluer the more the lens gives to it; the tooltip of a cell has the
    first `k` words by every lens. Numbers are probabilities; or, "against its mean", how many logits a word is raised
    here above what this head says of it on average (`Lens.said`), and words are those that are raised most. Whatever
    was computed is remembered.

    Args:
        lenses: name -> lenses of one model, such as trained ones and `lenses.unembedding`.
        examples: texts or images in a list, or by name in a dict; a `datasets` column will do. A text can also be
            typed.
        k: words of each head.

    Raises ValueError for no lenses, no examples, or lenses of different models.

    >>> from tensorlens_utils import load_model
    >>> from tensorlens_utils.data import world
    >>> from tensorlens_utils.lenses.heads import Heads
    >>> from tensorlens_utils.lenses.training import train
    >>> model, tokenizer = load_model("tiny-gpt")
    >>> heads = Heads(model, tokenizer(["a story"], return_tensors="pt"), tokenizer)
    >>> text = [{"input_ids": world.Text(seed).rows(4)} for seed in range(9)]
    >>> board = explore_heads({"lens": train(heads, text, steps=0)}, ["the capital of france is"])
    >>> board.controls["position"].value, "layer 0, head 0, at “is”" in board.view.value
    (5, True)
    """
    heads, examples = heads_of(lenses), by_name(examples)
    said, is_text = _Said(heads, lenses, examples, k), isinstance(next(iter(examples.values())), str)
    menus = {"example": [*examples]} | ({"text": typed()} if is_text else {})
    menus |= {"position": said.positions, "lens": [*lenses], "head": said.heads, "show": [*SHOW]}
    return typed_or_chosen(Explorer(menus, said.html, said.figure, "choose the text, position, lens and head"))


class _Case(NamedTuple):
    """An example as the heads see it, with a name for each position."""

    seen: Captured
    names: list[str]


class _Words(NamedTuple):
    """The first k words of every head by one lens at one position, (A, k) each, and its KL to the model, (A,)."""

    words: list[list[str]]
    numbers: np.ndarray
    kl: list[float]


class _Said:
    """What the explorer of heads shows: computed when asked for, and remembered."""

    def __init__(self, heads: Heads, lenses: Mapping[str, Lens], examples: Mapping[str, Any], k: int):
        self.of, self.lenses, self.examples, self.one = heads, dict(lenses), examples, next(iter(lenses.values()))
        self.k = min(k, self.of.V)
        self.case, self.words = cache(self._case), cache(self._words)

    # -- the menus

    def positions(self, example: str, text: str = "") -> list[tuple[str, int]]:
        names = self.case(example, text.strip()).names
        return [(f"{i}: {name}", i) for i, name in enumerate(names)][::-1]

    def heads(self, **others) -> list[tuple[str, tuple[int, int]]]:
        return [(f"layer {layer}, head {head}", (layer, head)) for layer, head in self.of.names]

    # -- the numbers

    def _case(self, example: str, text: str) -> _Case:
        inputs = self.of.inputs([text or self.examples[example]])
        through = any(lens.family.through_unembedding for lens in self.lenses.values())
        seen = self.of.capture(inputs, scale=through)
        if "input_ids" not in inputs:
            return _Case(seen, [f"position {i}" for i in range(len(seen))])
        ids = inputs["input_ids"][0, seen.position].tolist()
        return _Case(seen, [_plain(token) for token in self.of.processor.convert_ids_to_tokens(ids)])

    def _words(self, example: str, text: str, position: int, name: str, show: str) -> _Words:
        lens, seen = self.lenses[name], self.case(example, text).seen[[position]]
        numbers, ids = lens.tokens(seen, self.k, SHOW[show])
        words = [[_plain(word) for word in row] for row in lens.words(ids[:, 0].cpu())]
        return _Words(words, numbers[:, 0].cpu().numpy(), lens.kl(seen)[:, 0].tolist())

    def model(self, example: str, text: str, position: int) -> tuple[list[str], np.ndarray]:
        p, ids = self.case(example, text).seen.log_p[position].exp().topk(self.k)
        return [_plain(word) for word in self.one.words(ids.cpu())], p.cpu().numpy()

    def look(self, example: str, position: int, lens: str, head: tuple[int, int], show: str, text: str = ""):
        """All that a picture shows: a title; each lens's `_Words`; and columns of (title, words, numbers)."""
        which, a = (example, text.strip()), self.of.names.index(head)
        found = {name: self.words(*which, position, name, show) for name in self.lenses}
        title = f"layer {head[0]}, head {head[1]}, at “{self.case(*which).names[position]}”"
        columns = [(f"{name}, KL {w.kl[a]:.2f} nats", w.words[a], w.numbers[a], show) for name, w in found.items()]
        return title, found, [*columns, ("the model itself", *self.model(*which, position), "probability")]

    # -- the pictures

    def html(self, **choices) -> str:
        title, found, columns = self.look(**choices)
        show, (words, numbers, _) = choices["show"], found[choices["lens"]]
        top, rows = max(numbers[:, 0].max(), 1e-30), {}
        for a, (layer, head) in enumerate(self.of.names):
            told = "\n".join(f"{name} (KL {w.kl[a]:.2f}): " + ", ".join(
                f"{word} {_number(x, show)}" for word, x in zip(w.words[a], w.numbers[a], strict=True))
                for name, w in found.items())  # fmt: skip
            frame = "2px solid #d55e00" if (layer, head) == choices["head"] else "1px solid #ddd"
            rows.setdefault(layer, []).append(
                f'<td title="{escape(f"layer {layer}, head {head}")}&#10;{escape(told)}" style="border:{frame};padding:'
                f'1px 5px;background:rgba({BLUE},{0.6 * max(0, numbers[a, 0]) / top:.3f})">{escape(words[a][0])}</td>')
        width = max(map(len, rows.values()))
        above = "<th></th>" + "".join(f"<th>{head}</th>" for head in range(width))
        grid = "".join(f"<tr><th>{layer}</th>{''.join(row)}</tr>" for layer, row in rows.items())
        beside = "".join(f'<div style="flex:1 1 150px"><b>{escape(name)}</b>{_bars(*column)}</div>'
                         for name, *column in columns)  # fmt: skip
        return ('<div style="background:white;color:black;padding:6px;line-height:1.5">'
                f"<div>{escape(choices['lens'])}: {GRID[show]}, by layer (down) and head (across)</div>"
                f'<table style="border-collapse:collapse;font-size:90%;margin:4px 0 8px">{above}{grid}</table>'
                f'<div><b>{escape(title)}</b></div><div style="display:flex;flex-wrap:wrap;gap:6px 24px">{beside}</div>'
                "</div>")  # fmt: skip

    def figure(self, **choices) -> Figure:
        title, found, columns = self.look(**choices)
        words, numbers, _ = found[choices["lens"]]
        layers = sorted({layer for layer, _ in self.of.names})
        R, C = len(layers), 1 + max(head for _, head in self.of.names)
        values, texts, room = np.full((R, C), np.nan), [[""] * C for _ in layers], int(PAGE_WIDTH / C / 0.06)
        for (layer, head), word, number in zip(self.of.names, words, numbers, strict=True):
            values[layer, head], texts[layer][head] = max(0, number[0]), _short(word[0], room)
        figure = Figure(figsize=(PAGE_WIDTH, 0.24 * R + 0.17 * self.k + 1.1))
        axes = figure.subplot_mosaic([["grid"] * len(columns), [*range(len(columns))]],
                                     height_ratios=[0.24 * R, 0.17 * self.k])  # fmt: skip
        cells(axes["grid"], values, range(C), layers, texts, fontsize=7)
        layer, head = choices["head"]
        axes["grid"].add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=PALETTE[3], lw=2, zorder=3))
        axes["grid"].set_ylabel("layer")
        axes["grid"].set_title(f"{choices['lens']}: {GRID[choices['show']]}", fontsize=9)
        for i, (name, some, x, show) in enumerate(columns):
            ax, y = axes[i], range(self.k)
            ax.barh(y, x, color=PALETTE[5] if i < len(columns) - 1 else "0.7")
            ax.set_yticks(y, [_short(word, 14) for word in some], fontsize=7)
            ax.set_title(name, fontsize=8)
            ax.set(xlim=(0, None), ylim=(self.k - 0.5, -0.5))
            ax.set_xlabel("probability" if not SHOW[show] else "logits above its mean", fontsize=7)
            ax.tick_params(axis="x", labelsize=7)
        axes[0].set_title(f"{title}\n{columns[0][0]}", fontsize=8)
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # a token may be a dollar
        return figure


def _bars(words: list[str], numbers: np.ndarray, show: str) -> str:
    """Words in a column, each on a bar as long as its number."""
    top = max(float(numbers.max()), 1e-30)
    return "".join(
        f'<div style="margin:1px 0;background:linear-gradient(90deg,rgba({BLUE},0.3) {100 * max(0, x) / top:.0f}%,'
        f'transparent 0)">{escape(word)} <small style="color:#555">{_number(x, show)}</small></div>'
        for word, x in zip(words, numbers.tolist(), strict=True))  # fmt: skip


def _number(x: float, show: str) -> str:
    return signed(x, 2) if SHOW[show] else f"{x:.3f}"


def _plain(token: str) -> str:
    """A token with its space, which vocabularies write as one of two letters of their own, as one that reads."""
    return token.replace("Ġ", "␣").replace("▁", "␣")


def _short(word: str, room: int) -> str:
    return word if len(word) <= room else word[:max(1, room - 1)] + "…"
