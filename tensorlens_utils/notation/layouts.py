"""From a tensor diagram to the geometry of its picture.

>>> from tensorlens_utils.notation import diagram
>>> found = layout(diagram("i j, j k -> i k", A=None, B=None, sizes={"i": 2, "j": 3, "k": 4}))
>>> [(shape.name, shape.kind) for shape in found.shapes], [label.text for label in found.labels]
([('A', 'circle'), ('B', 'circle')], ['i 2', 'k 4', 'j'])
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import networkx as nx
import numpy as np

from ..plotting import PAGE_WIDTH
from . import Diagram, Node
from .arranging import arrange
from .geometry import (
    LEG_PT,
    NAME_PT,
    Box,
    Label,
    Layout,
    Line,
    Shape,
    around,
    crossings,
    dense,
    extent,
    inside,
    overlap,
    tangles,
)

# inches: a circle's radius, the distance of neighbours, a free leg's length, the room between boxes, a dot's radius
RADIUS, BOND, LEG, GAP, DOT = 0.16, 0.62, 0.22, 0.06, 0.04
DIAGONAL = math.sqrt(0.5)
DIRECTIONS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), *((x * DIAGONAL, y * DIAGONAL) for y in (-1, 1)
                                                           for x in (1, -1))])  # fmt: skip


@dataclass
class Vertex:
    """A tensor, or a dot with its leg's name, before it has a place: its box about (0, 0), and, of a bubble, where the
    legs of ``inner`` leave it."""

    name: str
    kind: str
    box: Box
    node: Node | None = None
    inner: Layout = Layout()
    ports: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # by axis: place and direction


class Leg(NamedTuple):
    """A line to draw: (vertex, axis) at one end or both; ``free`` is its name where it has one."""

    name: str
    ends: tuple[tuple[int, int], ...]
    thick: bool
    free: str = ""


def _picture(diagram: Diagram) -> tuple[list[Vertex], list[Leg]]:
    """Wires become one leg with what they join; a leg of other than two ends gets a dot, as its copy tensor."""
    vertices, ends, root = [], {}, {leg: leg for leg in diagram.ends()}
    for node in diagram.nodes:
        if node.kind == "wire":
            joined = {root[leg] for leg in node.legs}
            root = {leg: root[node.legs[0]] if at in joined else at for leg, at in root.items()}
    for node in diagram.nodes:
        if node.kind != "wire":
            for axis, leg in enumerate(node.legs):
                ends.setdefault(root[leg], []).append((len(vertices), axis))
            vertices.append(_vertex(node))
    taken = {vertex.name for vertex in vertices}
    thick = diagram.grouped | {node.legs[-1] for node in diagram.nodes if node.kind == "joint"}
    legs = []
    for leg in dict.fromkeys(root.values()):
        at, out = ends.get(leg, []), [x for x in diagram.output if root[x] == leg]
        wide = any(root[x] == leg for x in thick)
        if len(at) + len(out) != 2 or not at:
            kind, r = ("wire", 0.0) if len(at) + len(out) in (0, 2) else ("dot", DOT)
            own = len(vertices)
            name = leg if kind == "dot" and leg not in taken else ""
            vertices.append(Vertex(name, kind, (-r, -r, r, r)))
            legs += [Leg(leg, (end, (own, 0)), wide) for end in at or [(own, 0)] * (not out)]
            legs += [Leg(leg, ((own, 0),), wide, x) for x in out]
        else:
            legs.append(Leg(leg, (*at,), wide, *out))
    return vertices, legs


def _vertex(node: Node) -> Vertex:
    if node.inner is not None:
        return _bubble(node)
    kind = {"matrix": "square", "joint": "joint"}.get(node.kind, "triangle" if node.tip else "circle")
    width = extent(node.name, NAME_PT)[0]
    if kind == "triangle":
        half = max(0.25, 0.14 + width / 2)
        return Vertex(node.name, kind, (-half, -half, half, half), node)
    height = 0 if kind == "joint" else RADIUS if kind == "circle" else 0.9 * RADIUS
    half = max(height, width / 2 + 0.05) if height else 0
    return Vertex(node.name, kind, (-half, -height, half, height), node)


def _bubble(node: Node) -> Vertex:
    """A frame about what the nonlinearity takes in, its name at the top; the legs inside go on to the frame."""
    inner = layout(node.inner, labels="inner")
    width, height = extent(node.name, LEG_PT)
    bodies = [shape.box for shape in inner.shapes] + [label.box for label in inner.labels]
    bodies += [(*line.points.min(0), *line.points.max(0)) for line in inner.lines if not line.free]
    left, bottom, right, top = around(bodies)
    wider = max(0, width + 0.1 - (right - left) - 0.3) / 2
    frame = (left - 0.15 - wider, bottom - 0.12, right + 0.15 + wider, top + 0.08 + height)
    ports, lines = {}, []
    for line in inner.lines:
        if line.free:
            a, b = line.points[0], line.points[-1]
            d = (b - a) / np.hypot(*(b - a))
            reach = [((frame[2] if d[0] > 0 else frame[0]) - b[0]) / d[0] if abs(d[0]) > 1e-6 else 99,
                     ((frame[3] if d[1] > 0 else frame[1]) - b[1]) / d[1] if abs(d[1]) > 1e-6 else 99]  # fmt: skip
            line = replace(line, points=np.array([a, b + min(reach) * d]))
            ports[node.inner.output.index(line.free)] = line.points[-1], np.round(d * (np.array(reach) == min(reach)))
        lines.append(replace(line, free=""))
    name = Label(node.name, frame[0] + 0.06 + width / 2, frame[3] - height / 2 - 0.02, "bubble")
    return Vertex(node.name, "bubble", frame, node, Layout(inner.shapes, (*lines,), (*inner.labels, name)), ports)


# ------------------------------------------------------------------------------------------------- laying out


def layout(diagram: Diagram, positions: Mapping[str, tuple[float, float]] | None = None, scale: float = 1.0,
           labels: str = "free") -> Layout:  # fmt: skip
    """The geometry of a diagram: shapes, lines and labels, none of which overlap.

    Args:
        diagram: what to draw.
        positions: {name: (x, y)} of tensors, or of dots by their leg's name, to hold in place, neighbours about one
            apart; all others find theirs.
        scale: of the distances between tensors; texts keep their size.
        labels: "free": all legs have their names, the free ones their sizes also; "all": all have both; "names": names
            alone; "none": nothing but tensors' names.

    Raises:
        ValueError: for a position of what is not there, or labels of another word.

    >>> from tensorlens_utils.notation import diagram
    >>> d = diagram("i j, j k -> i k", A=None, B=None, sizes={"i": 2, "j": 3, "k": 4})
    >>> len(layout(d, positions={"A": (0, 0), "B": (0, -2)}).lines)
    3
    """
    if labels not in ("free", "all", "names", "none", "inner"):
        raise ValueError(f'labels are "free", "all", "names" or "none", not {labels!r}')
    vertices, legs = _picture(diagram)
    (positions,) = held([diagram], positions)
    whole = nx.Graph([(leg.ends[0][0], leg.ends[-1][0]) for leg in legs])
    whole.add_nodes_from(range(len(vertices)))
    parts = [sorted(part) for part in nx.connected_components(whole)] if not positions else [[*range(len(vertices))]]
    found = Layout()
    for part in sorted(parts):
        number = {v: i for i, v in enumerate(part)}
        own = [leg._replace(ends=tuple((number[v], k) for v, k in leg.ends)) for leg in legs
               if leg.ends[0][0] in number]  # fmt: skip
        pinned = {number[v]: np.array(positions[vertices[v].name], float) for v in part
                  if vertices[v].name in positions}  # fmt: skip
        piece = _Piece([vertices[v] for v in part], own, diagram, labels).laid(pinned, scale)
        found += piece.moved(found.box[2] + 0.25 - piece.box[0] if found.shapes or found.lines else 0, 0)
    return found


def held(diagrams: Sequence[Diagram], positions: Mapping | None) -> list[dict[str, tuple[float, float]]]:
    """Of ``positions``, those that each diagram has."""
    if not positions:
        return [{} for _ in diagrams]
    names = [[vertex.name for vertex in _picture(d)[0] if vertex.name] for d in diagrams]
    known = dict.fromkeys(sum(names, []))
    if stray := [name for name in positions if name not in known]:
        raise ValueError(f"a position is a tensor's, or a dot's by its leg, one of {', '.join(known)}; there is no "
                         f"{stray[0]!r}")  # fmt: skip
    return [{name: positions[name] for name in own if name in positions} for own in names]


class _Piece:
    """A connected part of a diagram on its way to a layout."""

    def __init__(self, vertices: list[Vertex], legs: list[Leg], diagram: Diagram, labels: str):
        self.vertices, self.legs, self.diagram, self.labels = vertices, legs, diagram, labels
        self.pairs = [leg for leg in legs if len(leg.ends) == 2 and leg.ends[0][0] != leg.ends[1][0]]
        self.graph = nx.Graph()
        self.graph.add_nodes_from(range(len(vertices)))
        for leg in self.pairs:
            ports = [vertices[v].ports[axis][1] for v, axis in leg.ends if vertices[v].ports]
            self.graph.add_edge(*(v for v, _ in leg.ends), level=any(d[0] for d in ports))
        order = [leg.ends[0][0] for name in diagram.output for leg in legs if leg.free == name]
        self.ends = (order[0], order[-1]) if order else (0, len(vertices) - 1)
        leaves = {v for v in self.graph if self.graph.degree[v] == 1}
        self.outside = set(order) == (leaves or {*self.ends})
        self.tidy = nx.is_tree(self.graph) and len(leaves) > 2 and self.outside  # as a tree, its legs down
        alone = len(vertices) == 1 and vertices[0].node is not None and not vertices[0].ports
        if alone and len(legs) > 4 and all(leg.free for leg in legs):  # a long tensor, its legs in a row
            step = 0.1 + max(0.15, *(extent(self.text(leg), LEG_PT)[0] for leg in legs))
            half, top = step * len(legs) / 2, vertices[0].box[3]
            ports = {leg.ends[0][1]: (np.array([step * (k + 0.5) - half, -top]), DIRECTIONS[2])
                     for k, leg in enumerate(sorted(legs, key=lambda leg: diagram.output.index(leg.free)))}
            self.vertices = [replace(vertices[0], box=(-half, -top, half, top), ports=ports)]

    def text(self, leg: Leg) -> str:
        sized = self.labels == "all" or self.labels == "free" and leg.free
        name = leg.free or leg.name
        return "" if self.labels == "none" or self.labels == "inner" and leg.free else (
            f"{name} {self.diagram.sizes[name]}" if sized else name)  # fmt: skip

    def laid(self, pinned: dict[int, np.ndarray], scale: float) -> Layout:
        """Tried with more and more room, until all texts have a place; folded where it is wider than a page."""
        columns, tries = 99.0, []
        for attempt in range(6):
            unit = BOND * scale * 1.15**attempt
            if not attempt or columns < 99:
                P = self.arranged(pinned, columns)
                self.face_bubbles(P)
                arms = self.arms(P)
            even = pinned or attempt % 2  # columns drawn apart unevenly can bring lines to cross
            C = P * unit * 1.1**attempt if even else self.spread(P, unit, arms)
            made, faults = self.made(C - (C[:, 0].mean(), np.median(C[:, 1])), arms)  # the longest row on the line
            straight = [P[[leg.ends[0][0], leg.ends[1][0]]] for leg in self.pairs]
            faults += max(0, tangles([line.points for line in made.lines]) - tangles(straight))
            width = made.box[2] - made.box[0]
            tries.append((faults + 100 * max(0, width - PAGE_WIDTH), attempt, made))
            if not tries[-1][0]:
                break
            if width > PAGE_WIDTH and not pinned:
                columns = max(2.0, math.floor(np.ptp(P[:, 0]) * PAGE_WIDTH / width * (1 - 0.1 * attempt)))
        return min(tries, key=lambda made: made[:2])[2]

    def arranged(self, pinned: dict[int, np.ndarray], columns: float) -> np.ndarray:
        """Places for the vertices, neighbours one apart; several parts, where some are pinned, side by side."""
        P, right = np.zeros((len(self.graph), 2)), 0.0
        for part in sorted(nx.connected_components(self.graph), key=lambda part: (not part & pinned.keys(), min(part))):
            own = sorted(part)
            number = {v: i for i, v in enumerate(own)}
            ends = number.get(self.ends[0], 0), number.get(self.ends[1], len(own) - 1)
            pins = {number[v]: place for v, place in pinned.items() if v in part}
            P[own] = arrange(nx.relabel_nodes(self.graph.subgraph(own), number), ends, self.outside, columns, pins)
            if pinned and not pins:
                P[own] += right + 1 - P[own, 0].min(), 0
            right = max(right, P[own, 0].max())
        return P

    def face_bubbles(self, P: np.ndarray):
        """Turn left and right round in a bubble whose legs go more directly then."""
        for v, vertex in enumerate(self.vertices):
            ways = [vertex.ports[k][1][0] * (P[leg.ends[1 - e][0]] - P[v])[0] for leg in self.pairs
                    for e, (w, k) in enumerate(leg.ends) if w == v and vertex.ports]  # fmt: skip
            if sum(ways) < 0:
                left, bottom, right, top = vertex.box
                ports = {k: (p * (-1, 1), d * (-1, 1)) for k, (p, d) in vertex.ports.items()}
                self.vertices[v] = replace(vertex, box=(-right, bottom, -left, top), ports=ports,
                                           inner=vertex.inner.moved(0, 0, mirror=-1))  # fmt: skip

    # -- free legs and loops

    def arms(self, P: np.ndarray) -> dict[int, np.ndarray]:
        """The direction of each free leg or loop, by its place in ``legs``: away from lines, the first output leg to
        the left and the last to the right, those of a train all down, those of a grid all aslant."""
        towards: dict[int, list[np.ndarray]] = {v: [] for v in self.graph}
        segments = [(leg.ends[0][0], leg.ends[1][0]) for leg in self.pairs]
        for u, v in segments:
            d = (P[v] - P[u]) / (np.hypot(*(P[v] - P[u])) + 1e-9)
            towards[u].append(d)
            towards[v].append(-d)
        busy = {v: {k for k, d in enumerate(DIRECTIONS[:4]) if any(a @ d > 0.8 for a in ways)}
                for v, ways in towards.items()}  # fmt: skip
        free = {leg.ends[0][0] for leg in self.legs if leg.free and self.vertices[leg.ends[0][0]].kind != "dot"}
        count = Counter(leg.ends[0][0] for leg in self.legs if leg.free)
        like, plain = np.array([0.4, 0.4, 0.2, 0.3, 0.8, 0.8, 0.85, 0.85]), False
        if any(len(busy[v]) == 4 for v in free):
            like = np.array([0.6, 0.6, 0.6, 0.6, 0.3, 0, 0.3, 0.3])
        elif any({0, 1} <= busy[v] for v in free):
            like = np.array([0.7, 0.7, 0, 0.3 if min(count.values()) > 1 else 0.9, 1.1, 1.1, 1.2, 1.2])
        elif self.tidy:
            like = np.array([0.5, 0.5, 0, 0.9, 0.4, 0.38, 1, 1])
        else:
            plain = True
        found = {}
        names = [x for x in self.diagram.output if any(leg.free == x for leg in self.legs)]
        wanted = [i for x in names for i, leg in enumerate(self.legs) if leg.free == x]
        for i in wanted + [i for i, leg in enumerate(self.legs) if len(set(leg.ends)) < len(leg.ends) or
                           not leg.free and leg.ends[0][0] == leg.ends[1][0]]:  # fmt: skip
            leg = self.legs[i]
            v, axis = leg.ends[0]
            vertex = self.vertices[v]
            if vertex.ports and leg.free:
                found[i] = vertex.ports[axis][1]
                continue
            cost = like.copy() if leg.free else np.array([0.6, 0.6, 0.2, 0, 1, 1, 1, 1])
            cost[4:6] -= self.tidy and count[v] == 2  # two legs of a leaf: a fan
            if leg.free and plain:
                last = self.diagram.output[-1] if len(self.diagram.output) > 1 else ""  # also of several parts
                cost[0] -= 0.6 * (leg.free == names[0] != last)
                cost[1] -= 0.6 * (leg.free == names[-1]) * (len(names) > 1 or leg.free == last)
                if len(towards[v]) == count[v] == 1:  # the end of a chain: straight on
                    cost -= 0.3 * (DIRECTIONS @ towards[v][0] < -0.99)
                if vertex.node is not None and vertex.node.tip:
                    cost[1 if vertex.node.legs[axis] in vertex.node.tip else 0] -= 0.5
            for k, d in enumerate(DIRECTIONS):
                cost[k] += sum(8 * max(0.0, a @ d - 0.72) for a in towards[v])
                for reach, weight in ((0.8, 6), (6.0, 0 if like[5] == 0 else 1)):
                    ray = np.array([P[v], P[v] + reach * d])
                    cost[k] += weight * sum(crossings(ray, P[[a, b]]) for a, b in segments if v not in (a, b))
                    cost[k] += weight * sum(inside(dense(ray), (*(P[w] - 0.3), *(P[w] + 0.3))) > 0
                                            for w in self.graph if w != v)  # fmt: skip
            found[i] = DIRECTIONS[int(np.round(cost, 6).argmin())]
            towards[v].append(found[i])
        return found

    def arm(self, i: int, d: np.ndarray) -> tuple[Line, Label | None]:
        """A free leg of a vertex at (0, 0), and its label."""
        leg = self.legs[i]
        vertex = self.vertices[leg.ends[0][0]]
        start = vertex.ports[leg.ends[0][1]][0] if vertex.ports else np.zeros(2)
        reach = 0.0
        if not vertex.ports:
            left, bottom, right, top = vertex.box
            reach = min(side / abs(x) for side, x in zip((right, top), d, strict=True) if abs(x) > 1e-6)
            reach = min(reach, right) if vertex.kind == "circle" and top == right else reach
            if vertex.kind == "triangle" and vertex.node.legs[leg.ends[0][1]] not in vertex.node.tip:
                reach *= RADIUS / 0.25  # the box is that of the tip
        tip = start + d * (reach + LEG)
        if not self.text(leg):
            return Line(leg.name, np.array([start, tip]), leg.thick, leg.free), None
        w, h = extent(self.text(leg), LEG_PT)
        gap = 0.01 + 0.025 * leg.thick
        x, y = tip + np.sign(np.round(d, 9)) * (w / 2 + 0.02 + gap, h / 2 + gap) * (np.abs(d) > 0.1)
        return Line(leg.name, np.array([start, tip]), leg.thick, leg.free), Label(self.text(leg), x, y, "free")

    def spread(self, P: np.ndarray, unit: float, arms: dict[int, np.ndarray]) -> np.ndarray:
        """Places in inches: columns and rows drawn apart, in their order, until all boxes have room."""
        boxes = [[vertex.box] for vertex in self.vertices]
        for i, d in arms.items():
            v = self.legs[i].ends[0][0]
            if not self.legs[i].free:
                boxes[v].append(around([(*p, *p) for p in _loop(d)]))
                continue
            line, label = self.arm(i, d)
            boxes[v] += [(*line.points.min(0), *line.points.max(0))] + ([label.box] if label else [])
        level = {frozenset(end[0] for end in leg.ends): extent(self.text(leg), LEG_PT)[0] + 0.08 for leg in self.pairs
                 if self.text(leg)}  # fmt: skip
        C = P * unit
        for axis in (0, 1):
            other, values = 1 - axis, np.unique(np.round(P[:, axis], 6))
            place = np.zeros(len(values))
            column = np.searchsorted(values, np.round(P[:, axis], 6))
            for k in range(1, len(values)):
                place[k] = place[k - 1] + unit * (values[k] - values[k - 1])
                for v in np.flatnonzero(column == k):
                    for u in np.flatnonzero(column < k):
                        gap = np.abs(P[v] - P[u])
                        if gap[axis] < gap[other] or gap[axis] == gap[other] and axis:
                            continue
                        needs = [a[2 + axis] - b[axis] + GAP for a in boxes[u] for b in boxes[v]
                                 if a[2 + other] + C[u, other] + GAP > b[other] + C[v, other]
                                 and b[2 + other] + C[v, other] + GAP > a[other] + C[u, other]]  # fmt: skip
                        if not axis and gap[1] < 0.2:
                            room = level.get(frozenset((int(u), int(v))), 0)
                            needs.append(self.vertices[u].box[2] - self.vertices[v].box[0] + room)
                        place[k] = max([place[k], *(place[column[u]] + need for need in needs)])
            C[:, axis] = place[column]
        return C

    # -- lines and labels

    def made(self, C: np.ndarray, arms: dict[int, np.ndarray]) -> tuple[Layout, float]:
        """The layout at these places, and its faults: texts without a place of their own."""
        inner, shapes, lines, labels = Layout(), [], [], []
        boxes = [(b[0] + x, b[1] + y, b[2] + x, b[3] + y) for b, (x, y) in zip((v.box for v in self.vertices), C,
                                                                              strict=True)]  # fmt: skip
        for i, d in arms.items():
            leg = self.legs[i]
            if leg.free:
                line, label = self.arm(i, d)
                moved = Layout((), (line,), (label,) if label else ()).moved(*C[leg.ends[0][0]])
                lines += moved.lines
                labels += moved.labels
            else:
                loop = _loop(d, round=self.vertices[leg.ends[0][0]].kind == "wire")
                lines.append(Line(leg.name, loop + C[leg.ends[0][0]], leg.thick))
        same: dict[frozenset, list[Leg]] = {}
        for leg in self.pairs:
            same.setdefault(frozenset(v for v, _ in leg.ends), []).append(leg)
        for pair, legs in same.items():
            others = [box for v, box in enumerate(boxes) if v not in pair]
            for k, leg in enumerate(legs):
                middle = 0.3 * (k - (len(legs) - 1) / 2)
                bends = [middle, *(middle + s * b for b in (0.25, 0.4, 0.6, 0.9) for s in (1, -1))]
                curves = [self.curve(leg, C, bend) for bend in bends]
                cost = [20 * sum(inside(dense(curve), box, 0.02) > 0 for box in others) + abs(bend - middle)
                        + 8 * sum(crossings(curve, line.points) for line in lines)
                        for curve, bend in zip(curves, bends, strict=True)]  # fmt: skip
                lines.append(Line(leg.name, curves[int(np.argmin(cost))], leg.thick))
        for v, vertex in enumerate(self.vertices):
            if vertex.kind != "wire":
                frozen = vertex.node is not None and vertex.node.frozen
                shapes.append(Shape(vertex.name, vertex.kind, boxes[v], self.tip(v, C, arms), frozen))
            if vertex.kind == "bubble":
                inner += vertex.inner.moved(*C[v], (vertex.name,))
        faults = sum(overlap(a, b) for a, b in combinations([*boxes, *(t.box for t in labels)], 2))
        for leg in {leg.name: leg for leg in self.legs if not leg.free}.values():
            if self.text(leg) and not any(x.name == leg.name and x.free for x in self.legs):
                label, bad = _labelled(self.text(leg), [x for x in lines if x.leg == leg.name], lines, boxes, labels)
                faults += bad
                labels += [label] if label else []
        return Layout((*shapes,), (*lines,), (*labels,)) + inner, faults

    def curve(self, leg: Leg, C: np.ndarray, bend: float) -> np.ndarray:
        """From one end to the other: straight, bent to a side, or leaving a bubble at its port."""
        (u, j), (v, k) = leg.ends
        ports = [self.vertices[w].ports.get(axis, (np.zeros(2), np.zeros(2))) for w, axis in leg.ends]
        a, b = C[u] + ports[0][0], C[v] + ports[1][0]
        way = b - a
        far = np.hypot(*way) + 1e-9
        side = np.array([-way[1], way[0]]) / far * (1 if u < v else -1)
        if not bend and all(abs(d @ way) > 0.999 * far or not d.any() for _, d in ports):
            return np.array([a, b])
        t = np.linspace(0, 1, 25)[:, None]
        p, q = (x + (d * 0.4 * far if d.any() else s * way / 3) + side * bend * 4 / 3
                for x, (_, d), s in ((a, ports[0], 1), (b, ports[1], -1)))  # fmt: skip
        return (1 - t)**3 * a + 3 * (1 - t)**2 * t * p + 3 * (1 - t) * t**2 * q + t**3 * b

    def tip(self, v: int, C: np.ndarray, arms: dict[int, np.ndarray]) -> float:
        """Where an isometry points: to the mean of the legs at its tip."""
        node, way = self.vertices[v].node, np.zeros(2)
        for i, leg in enumerate(self.legs):
            for e, (w, k) in enumerate(leg.ends):
                if w == v and node is not None and node.tip and node.legs[k] in node.tip:
                    d = arms[i] if i in arms else C[leg.ends[1 - e][0]] - C[v]
                    way += d / np.hypot(*d)
        return math.atan2(way[1], way[0])


def _loop(d: np.ndarray, round: bool = False) -> np.ndarray:
    """A line from (0, 0) out to a side and back; ``round`` where nothing hides its beginning."""
    t = np.linspace(0, 1, 33)[:, None]
    if round:
        return 0.2 * np.column_stack([np.cos(2 * math.pi * t), np.sin(2 * math.pi * t)])
    out, side = 0.66 * d, 1.3 * np.array([d[1], -d[0]])
    return 3 * (1 - t)**2 * t * (out - side) + 3 * (1 - t) * t**2 * (out + side)


def _labelled(text: str, own: list[Line], lines: list[Line], boxes: list[Box],
              labels: list[Label]) -> tuple[Label | None, float]:  # fmt: skip
    """A text beside one of its lines, clear of tensors and texts, and of other lines where it can be."""
    w, h = extent(text, LEG_PT)
    best, least = None, math.inf
    for line in own:
        points = dense(line.points)
        for t in (0.5, 0.47, 0.53, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74):
            k = min(int(t * (len(points) - 1)), len(points) - 2)
            way = points[k + 1] - points[k]
            x, y = points[0] + t * (points[-1] - points[0]) if len(line.points) == 2 else points[k]
            normal = np.array([-way[1], way[0]]) / (np.hypot(*way) + 1e-9)
            normal = normal if (round(normal[1], 6), normal[0]) > (0, 0) else -normal
            for side in (1, -1):
                gap = 0.01 + 0.025 * line.thick
                off = (abs(normal[0]) * (w / 2 + 0.02 + gap) + abs(normal[1]) * (h / 2 + gap)) * side
                label = Label(text, x + off * normal[0], y + off * normal[1], "bond")
                if any(overlap(label.box, box, 0.01) for box in (*boxes, *(other.box for other in labels))):
                    continue
                cost = abs(t - 0.5) + 0.1 * (side < 0) + sum(
                    (inside(dense(x.points), label.box) > 0) + (x.leg != line.leg and
                     inside(dense(x.points), label.box, 0.04) > 0) for x in lines)
                if cost < least:
                    best, least = label, cost
    return best, 0 if best else 1
