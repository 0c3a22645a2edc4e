"""Tensor diagrams as pictures, drawn with matplotlib from their layouts.

>>> from tensorlens_utils.notation import diagram
>>> d = diagram("i j, j k -> i k", A=None, B=None, sizes={"i": 2, "j": 3, "k": 4})
>>> figure = draw(d, "=", (d.merge("A", "B"), "the matrix product"))
"""

import math
import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from IPython.core.pylabtools import print_figure
from IPython.display import display
from matplotlib import patches
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..plotting import PAGE_WIDTH, PALETTE
from . import Diagram, fresh
from .geometry import FONT, NAME_PT, Label, Layout, Shape, points_of, typeset
from .layouts import GAP, held, layout


class Picture(Figure):
    """A figure that says in words what it shows: a notebook holds them as its text, and as what screen readers read."""

    words = ""

    def _ipython_display_(self):
        plt.close(self)  # pyplot would show it a second time, at the end of the cell
        data = {"image/png": print_figure(self, "png", base64=True), "text/plain": self.words}
        display(data, metadata={"image/png": {"alt": self.words}}, raw=True)


def draw(*parts, positions: Mapping[str, tuple[float, float]] | None = None, scale: float = 1.0, labels: str = "free",
         colours: Mapping[str, int] | None = None, ax=None) -> Figure:  # fmt: skip
    """Diagrams and signs between them, as one figure no wider than a page.

    Args:
        parts: diagrams, layouts, texts such as "=" or "→", or any of these as (part, "caption").
        positions, scale, labels: as `layout` takes them, for every diagram; each has the positions of what is in it.
        colours: {name: place in `plotting.PALETTE`} for tensors, where the order of appearance is not wanted. Names
            that differ in numbers and primes alone have one colour.
        ax: matplotlib axes to draw into, such as one of several panels; texts shrink where it is narrow.

    Returns:
        A matplotlib figure; `describe` gives its caption for `plotting.save_figure`.

    >>> from tensorlens_utils.notation import diagram
    >>> trace = diagram("i i ->", M=None, sizes={"i": 3})
    >>> figure = draw((trace, "the trace"), "=", (trace.merge("M"), "a number"))
    """
    if wrong := [place for place in (colours or {}).values() if not hasattr(place, "__index__")]:
        raise ValueError(f"a colour is a place in plotting.PALETTE, such as 2; not {wrong[0]!r}")
    found = page(*parts, positions=positions, scale=scale, labels=labels)
    left, bottom, right, top = found.box
    left, bottom, right, top = left - GAP, bottom - GAP, right + GAP, top + GAP
    width, height = right - left, top - bottom
    if ax is None:
        shrink = min(1.0, PAGE_WIDTH / width)
        figure = plt.figure(figsize=(width * shrink, height * shrink), layout="constrained", FigureClass=Picture)
        figure.set_layout_engine("none")  # none from the start would become the style's once it is saved
        figure.words = describe(*parts)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        ax.set(xlim=(left, right), ylim=(bottom, top))
    else:
        figure = ax.figure
        ax.axis("off")
        figure.draw_without_rendering()  # only now is it known how large the axes are
        wide, high = ax.get_position().size * figure.get_size_inches()
        shrink = min(1.0, wide / width, high / height)
        x, y, half, tall = (left + right) / 2, (bottom + top) / 2, wide / shrink / 2, high / shrink / 2
        ax.set(xlim=(x - half, x + half), ylim=(y - tall, y + tall))
        ax.set_aspect("equal")
    tensors = [shape for shape in found.shapes if shape.kind in ("circle", "square", "triangle")]
    names = dict.fromkeys(_family(shape.name) for shape in tensors)
    order = {name: k for k, name in enumerate(names)} | {_family(name): k for name, k in (colours or {}).items()}
    for shape in found.shapes:
        _draw_shape(ax, shape, PALETTE[order.get(_family(shape.name), 0) % len(PALETTE)], shrink)
    for line in found.lines:
        ax.plot(*line.points.T, color="0.15", lw=(3.2 if line.thick else 1.2) * shrink, zorder=3,
                solid_capstyle="round", scalex=False, scaley=False)  # fmt: skip
    for text in found.labels:
        _write(ax, text.text, text.x, text.y, points_of(text.role) * shrink, "0.25" if text.role == "bond" else "black")
    return figure


def page(*parts, positions=None, scale: float = 1.0, labels: str = "free") -> Layout:
    """The layout of a whole figure: its parts in rows, each about one line, captions below."""
    pairs = [part if isinstance(part, tuple) and len(part) == 2 else (part, "") for part in parts]
    wrong = [part for part, _ in pairs if not isinstance(part, Diagram | Layout | str)]
    if wrong or not pairs:
        raise ValueError("a figure is of diagrams, layouts and texts, each alone or as (part, caption); not of "
                         + (repr(wrong[0]) if wrong else "nothing"))  # fmt: skip
    blocks, pins = [], iter(held([part for part, _ in pairs if isinstance(part, Diagram)], positions))
    for part, caption in pairs:
        block = (layout(part, next(pins), scale, labels) if isinstance(part, Diagram) else
                 part if isinstance(part, Layout) else Layout((), (), (Label(part, 0, 0, "sign"),)))  # fmt: skip
        left, bottom, right, top = block.box
        if caption:
            below = (Label(line, (left + right) / 2, bottom - 0.14 - 0.12 * k, "caption")
                     for k, line in enumerate(caption.split("\n")))  # fmt: skip
            block += Layout((), (), (*below,))
        blocks.append(block)
    rows, room = [[]], PAGE_WIDTH - 2 * GAP
    for block in blocks:
        if rows[-1] and _wide(*rows[-1], block) > room:
            last = rows[-1][-1]
            sign = len(rows[-1]) > 1 and not (last.shapes or last.lines) and _wide(last, block) <= room
            rows.append([rows[-1].pop()] if sign else [])  # what comes before a part goes on with it
        rows[-1].append(block)
    found, y = Layout(), 0.0
    for row in rows:
        whole, x = Layout(), 0.0
        for block in row:
            whole += block.moved(x - block.box[0], 0)
            x = whole.box[2] + 0.16
        y -= whole.box[3]
        found += whole.moved(0, y)
        y += whole.box[1] - 0.2
    return found


def _wide(*blocks: Layout) -> float:
    return sum(block.box[2] - block.box[0] + 0.16 for block in blocks) - 0.16


def describe(*parts) -> str:
    """The parts of a figure in words: the caption that `save_figure` and screen readers take.

    >>> from tensorlens_utils.notation import diagram
    >>> describe(diagram("i j, j -> i", A=None, v=None, sizes={"i": 2, "j": 3}), "=", "v′")
    'Tensors: A, v. A and v share j (3). Free legs: i (2). = v′'
    """
    words = []
    for part in parts:
        part, caption = part if isinstance(part, tuple) else (part, "")
        words += [part.describe() if isinstance(part, Diagram) else part if isinstance(part, str) else "", caption]
    return " ".join(" ".join(filter(None, words)).split())


def strip(diagram: Diagram, order="best", **how) -> Figure:
    """A contraction as a row of pictures, one for each step, with what the step costs beneath.

    >>> from tensorlens_utils.notation import diagram
    >>> d = diagram("i j, j k, k -> i", A=None, B=None, v=None, sizes={"i": 2, "j": 3, "k": 4})
    >>> figure = strip(d, ["B v", "A Bv"])
    """
    return draw(*stages(diagram, order), **how)


def stages(diagram: Diagram, order="best") -> list:
    """The parts of `strip`, for `draw` and `describe`."""
    parts, names = [diagram], [node.name for node in diagram.operands()[0]]
    for step in [*diagram.steps(order)]:
        work, entries = diagram.price(step)
        taken = [names.pop(k) for k in reversed(step.positions)][::-1]
        names.append(fresh(step.name, {node.name for node in diagram.nodes} - {*taken}))
        diagram = diagram.merge(*taken, name=names[-1])
        parts += ["→", (diagram, f"{work:,} operations\n{entries:,} {'entry' if entries == 1 else 'entries'}")]
    return parts


def _family(name: str) -> str:
    return re.sub(r"[\d_′⁻¹*]+$", "", name) or name


def _tint(colour: str, share: float) -> tuple[float, ...]:
    return tuple(1 - share * (1 - c) for c in to_rgb(colour))


def _draw_shape(ax, shape: Shape, colour: str, shrink: float):
    left, bottom, right, top = shape.box
    x, y, half = (left + right) / 2, (bottom + top) / 2, (right - left) / 2
    style = {"facecolor": _tint(colour, 0.28), "edgecolor": tuple(0.75 * c for c in to_rgb(colour)), "zorder": 4,
             "lw": 1.1 * shrink, "ls": "--" if shape.frozen else "-"}  # fmt: skip
    if shape.kind == "bubble":
        face, edge = (_tint(PALETTE[0], 0.1), PALETTE[0]) if shape.frozen else ("0.95", "0.45")
        style |= {"facecolor": face, "edgecolor": edge, "zorder": 1 + 0.1 * len(shape.within)}
        rounded = f"round,pad=0,rounding_size={0.02 if shape.frozen else 0.14}"
        ax.add_patch(patches.FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=rounded, **style))
        return
    if shape.kind == "dot":
        ax.add_patch(patches.Circle((x, y), half, color="0.15", zorder=4))
    if shape.kind in ("joint", "dot"):
        return
    if shape.kind == "square":
        ax.add_patch(patches.Rectangle((left, bottom), right - left, top - bottom, **style))
    elif shape.kind == "triangle":
        c, s = math.cos(shape.angle), math.sin(shape.angle)
        corners = half * np.array([(1.1, 0), (-0.72, 0.82), (-0.72, -0.82)])
        ax.add_patch(patches.Polygon(corners @ [[c, s], [-s, c]] + (x, y), joinstyle="round", **style))
    else:
        turns, r = np.linspace(-math.pi / 2, math.pi / 2, 40), (top - bottom) / 2
        side = np.column_stack([half - r + r * np.cos(turns), r * np.sin(turns)])
        ax.add_patch(patches.Polygon(np.concatenate([side, -side]) + (x, y), **style))
    _write(ax, typeset(shape.name), x, y, NAME_PT * shrink)


def _write(ax, text: str, x: float, y: float, points: float, colour: str = "black"):
    """A text about its centre, by the height of its capitals, so that all texts of a row stand on one line."""
    ax.text(x, y - 0.36 * points / 72, text, size=points, color=colour, ha="center", va="baseline", zorder=5,
            family=FONT.get_family())  # fmt: skip
