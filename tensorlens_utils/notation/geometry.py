"""What a picture of tensors is made of: shapes, lines and texts, in inches, before any of it is drawn.

Since these are data, whether texts overlap is computed and not looked for.

>>> overlap(Label("query", 0, 0, "bond").box, Label("key", 0.2, 0, "bond").box)
True
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

NAME_PT, LEG_PT, SIGN_PT = 8.5, 7, 12  # font sizes in points
FONT = FontProperties(family="DejaVu Sans")
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Shape:
    """A tensor's outline: "circle", "square", "triangle", "dot" (a copy tensor), "joint", "wire" (nothing) or "bubble".

    ``angle`` is where a triangle's tip points; ``within``: the names of the bubbles that hold it, outermost first.
    """

    name: str
    kind: str
    box: Box
    angle: float = 0.0
    frozen: bool = False
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A leg, or one of a copy tensor's ends: a polyline. ``free``: its name where it reaches out."""

    leg: str
    points: np.ndarray
    thick: bool = False
    free: str = ""


@dataclass(frozen=True)
class Label:
    """A text about its centre; ``role`` is "free", "bond", "bubble", "sign" or "caption"."""

    text: str
    x: float
    y: float
    role: str

    @property
    def box(self) -> Box:
        width, height = extent(self.text, points_of(self.role))
        return self.x - width / 2, self.y - height / 2, self.x + width / 2, self.y + height / 2


@dataclass(frozen=True)
class Layout:
    """The geometry of a diagram, in inches; tensors lie about y = 0."""

    shapes: tuple[Shape, ...] = ()
    lines: tuple[Line, ...] = ()
    labels: tuple[Label, ...] = ()

    @property
    def box(self) -> Box:
        boxes = [item.box for item in (*self.shapes, *self.labels)]
        boxes += [(*line.points.min(0), *line.points.max(0)) for line in self.lines]
        return around(boxes) if boxes else (0, 0, 0, 0)

    def moved(self, x: float, y: float, within: tuple[str, ...] = (), mirror: int = 1) -> "Layout":
        """The same elsewhere; ``mirror`` -1 turns left and right round first."""

        def moved(box):
            a, b = sorted((mirror * box[0], mirror * box[2]))
            return a + x, box[1] + y, b + x, box[3] + y

        shapes = [replace(s, box=moved(s.box), within=(*within, *s.within),
                          angle=s.angle if mirror > 0 else math.pi - s.angle) for s in self.shapes]  # fmt: skip
        lines = [replace(line, points=line.points * (mirror, 1) + (x, y)) for line in self.lines]
        return Layout((*shapes,), (*lines,), (*(replace(t, x=mirror * t.x + x, y=t.y + y) for t in self.labels),))

    def __add__(self, other: "Layout") -> "Layout":
        return Layout(self.shapes + other.shapes, self.lines + other.lines, self.labels + other.labels)


# ------------------------------------------------------------------------------------------------- text and boxes


@cache
def extent(text: str, points: float) -> tuple[float, float]:
    """Width and height of a text in inches, without a renderer."""
    shown = typeset(text) if points == NAME_PT else text
    width = TextPath((0, 0), shown, size=points, prop=FONT).get_extents().x1 / 72 if text.strip() else 0
    return width + 0.01, 1.12 * points / 72


def typeset(name: str) -> str:
    """A tensor's name with its number, or what follows a letter's underscore, lowered: A1, W_Q; but lm_head stays."""
    found = re.fullmatch(r"([^\W\d_][̇]?)_([^\W_]+)([′⁻¹]*)|([^\W\d_]+)(\d+)([′⁻¹]*)", name)
    if not found:
        return name
    base, low, rest = [part or "" for part in (found.groups()[:3] if found[1] else found.groups()[3:])]
    return rf"{base}$_{{\mathdefault{{{low}}}}}${rest}"


def points_of(role: str) -> float:
    return {"name": NAME_PT, "sign": SIGN_PT}.get(role, LEG_PT)


def around(boxes: Sequence[Box]) -> Box:
    a = np.array(boxes)
    return *a[:, :2].min(0), *a[:, 2:].max(0)


def overlap(a: Box, b: Box, gap: float = 0.0) -> bool:
    """Do two boxes share more than an edge, or come nearer than ``gap``?"""
    return bool(a[0] < b[2] + gap - 1e-9 and b[0] < a[2] + gap - 1e-9
                and a[1] < b[3] + gap - 1e-9 and b[1] < a[3] + gap - 1e-9)  # fmt: skip


def dense(points: np.ndarray) -> np.ndarray:
    return points if len(points) > 2 else points[:1] + np.linspace(0, 1, 24)[:, None] * (points[1:] - points[:1])


def inside(points: np.ndarray, box: Box, gap: float = 0.0) -> int:
    """How many points of a line lie in a box."""
    low, high = np.array(box[:2]) - gap, np.array(box[2:]) + gap
    return int(((points > low) & (points < high)).all(1).sum())


def crossings(a: np.ndarray, b: np.ndarray) -> int:
    """How often two polylines cross, meeting at an end left out."""
    p, q = a[:-1, None], b[None, :-1]
    r, s = a[1:, None] - p, b[None, 1:] - q
    det = r[..., 0] * s[..., 1] - r[..., 1] * s[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = ((q - p)[..., 0] * s[..., 1] - (q - p)[..., 1] * s[..., 0]) / det
        u = ((q - p)[..., 0] * r[..., 1] - (q - p)[..., 1] * r[..., 0]) / det
    meet = (t > 1e-6) & (t <= 1 + 1e-9) & (u > 1e-6) & (u <= 1 + 1e-9) & (np.abs(det) > 1e-12)
    where = (p + np.where(meet, t, 0)[..., None] * r)[meet]
    ends = np.array([a[0], a[-1], b[0], b[-1]])
    return sum(bool((np.hypot(*(ends - w).T) > 1e-3).all()) for w in where)


def tangles(lines: Sequence[np.ndarray]) -> int:
    """How often some polylines cross one another."""
    boxes = [(*points.min(0), *points.max(0)) for points in lines]
    return sum(crossings(lines[i], lines[j]) for i, j in combinations(range(len(lines)), 2)
               if overlap(boxes[i], boxes[j], 1e-6))  # fmt: skip
