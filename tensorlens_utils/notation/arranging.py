"""Arranging a graph on the plane as one would by hand: rows straight, ladders square, trees tidy, rings round.

A few candidates (a row with the rest hung below, layers, springs, planar drawings) are improved by small moves and
judged by one measure: lines that cross or run through a vertex first, then lengths, right angles and straight chains.

>>> arrange(nx.path_graph(3), (0, 2))
array([[-1.,  0.],
       [ 0.,  0.],
       [ 1.,  0.]])
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, islice

import networkx as nx
import numpy as np


def _turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Positive where b lies to the left of a."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


class Measure:
    """How bad a straight-line drawing of a graph is, neighbours one apart; many drawings (..., n, 2) at once."""

    def __init__(self, graph: nx.Graph, ends: tuple[int, int], columns: float):
        self.edges = np.array(list(graph.edges), int).reshape(-1, 2)
        self.level = np.array([level or False for *_, level in graph.edges.data("level")], float)  # those of bubbles
        self.ends, self.columns = ends, columns
        pairs = [(i, j) for i, j in combinations(range(len(self.edges)), 2)
                 if not set(self.edges[i]) & set(self.edges[j])]  # fmt: skip
        self.pairs = np.array(pairs, int).reshape(-1, 2).T
        near = [(v, k) for v in graph for k, edge in enumerate(self.edges) if v not in edge]
        self.near = np.array(near, int).reshape(-1, 2).T
        self.apart = np.array(list(combinations(range(len(graph)), 2)), int).reshape(-1, 2).T
        fans = [(u, v, w, graph.degree[v] == 2) for v in graph for u, w in combinations(graph[v], 2)]
        self.fans = np.array(fans, int).reshape(-1, 4).T

    def crossed(self, P: np.ndarray) -> np.ndarray:
        """How many pairs of lines cross."""
        A, B = P[..., self.edges[:, 0], :], P[..., self.edges[:, 1], :]
        D, (i, j) = B - A, self.pairs
        sides = [_turn(D[..., a, :], X[..., b, :] - A[..., a, :]) for a, b in ((i, j), (j, i)) for X in (A, B)]
        return ((sides[0] * sides[1] < 0) & (sides[2] * sides[3] < 0)).sum(-1)

    def crowded(self, P: np.ndarray) -> np.ndarray:
        """How near vertices are to one another and to lines that pass by."""
        A = P[..., self.edges[:, 0], :]
        D = P[..., self.edges[:, 1], :] - A
        v, k = self.near
        along = ((P[..., v, :] - A[..., k, :]) * D[..., k, :]).sum(-1) / ((D[..., k, :] ** 2).sum(-1) + 1e-9)
        foot = A[..., k, :] + along.clip(0, 1)[..., None] * D[..., k, :]
        hit = (1 - np.linalg.norm(P[..., v, :] - foot, axis=-1) / 0.55).clip(0).sum(-1)
        v, w = self.apart
        close = (0.95 - np.linalg.norm(P[..., v, :] - P[..., w, :], axis=-1)).clip(0).sum(-1)
        return 20 * hit + 40 * close

    def __call__(self, P: np.ndarray) -> np.ndarray:
        D = P[..., self.edges[:, 1], :] - P[..., self.edges[:, 0], :]
        length = np.linalg.norm(D, axis=-1) + 1e-9
        slanted = (2 * D[..., 0] * D[..., 1] / length**2) ** 2
        slanted = slanted * (2.6 - 1.2 * slanted)  # a diagonal is hardly worse than what is a little aslant
        u, v, w, straight = self.fans
        a, b = P[..., u, :] - P[..., v, :], P[..., w, :] - P[..., v, :]
        cos = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-9)
        span = P.max(-2) - P.min(-2)
        backwards = (P[..., self.ends[0], 0] - P[..., self.ends[1], 0]).clip(0)
        shape = 0.24 * span[..., 1] + 0.04 * span[..., 0] + 6 * (span[..., 0] - self.columns).clip(0) + 0.3 * backwards
        looks = (2 * np.hypot(1, length - 1) - 2 + slanted).sum(-1) + (0.6 * straight * (1 + cos)).sum(-1)
        looks += (3 * self.level * np.abs(D[..., 1]) / length).sum(-1)
        looks += 0.5 * np.abs(2 * P - np.round(2 * P)).mean((-1, -2))  # a grid, where it does no harm
        return 30 * self.crossed(P) + self.crowded(P) + looks + (4 * (cos - 0.75).clip(0)).sum(-1) + shape


def arrange(graph: nx.Graph, ends: tuple[int, int], outside: bool = False, columns: float = 99,
            pinned: Mapping[int, np.ndarray] | None = None) -> np.ndarray:  # fmt: skip
    """Places (n, 2) for the vertices 0..n-1 of a connected graph, neighbours about one apart.

    ``ends`` are the tensors of the first and the last output leg, which go left and right; ``outside``: all free
    legs are at the leaves, of a ring at the ends; ``columns`` bounds the width; ``pinned`` vertices stay where they
    are put.
    """
    n, measure = len(graph), Measure(graph, ends, columns)
    if n <= 1:
        return np.array([pinned[0]] if pinned else np.zeros((n, 2)), float)
    if not pinned and n > 2 and all(d == 2 for _, d in graph.degree):
        P, near = _ring(graph), ends[1] in (ends[0], *graph[ends[0]])
        if outside and not near:  # one end to the left and one to the right, where they are opposite
            x, y = P[ends[1]] - P[ends[0]]
            P = P @ np.array([[x, -y], [y, x]]) / math.hypot(x, y)
        return P if near else _upright(P, ends)
    if not pinned and outside and nx.is_tree(graph) and max(d for _, d in graph.degree) > 2:
        return _tidy(graph)
    found = list(_candidates(graph, ends, columns))
    if pinned:
        found = [P - np.mean([P[v] - place for v, place in pinned.items()], 0) for P in found]
        for P in found:
            P[list(pinned)] = list(pinned.values())
    found = [Q for P in found for Q in ([P, np.round(2 * P) / 2] if not pinned else [P])]

    def badness(P, slack=0.0):
        return int(measure.crossed(P)), round(float(measure(P)) - slack, 6)

    loose = [v for v in graph if v not in (pinned or ())]
    found = [_improved(P, measure, loose) for P in sorted(found, key=badness)[:5]]
    best = min(found, key=badness)
    if pinned:
        return best
    square = np.column_stack([_ranks(best[:, 0]), _ranks(best[:, 1])])
    return _upright(min(best, square, key=lambda P: badness(P, 0.4 * (P is square))), ends)


def _candidates(graph: nx.Graph, ends: tuple[int, int], columns: float):
    """Drawings to start from."""
    a, b = ends
    far = nx.periphery(graph)
    paths = [nx.shortest_path(graph, far[0], far[-1])]
    if a != b:
        paths.append(nx.shortest_path(graph, a, b))
    paths += [max(islice(nx.all_simple_paths(graph, *pair), 300), key=len)
              for pair in {(a, b), (far[0], far[-1]), (0, len(graph) - 1)} if len(set(pair)) == 2]  # fmt: skip
    for path in paths:
        yield _hung(graph, path, columns)
    layers = _layers(graph, a)
    yield layers
    P = _springs(graph, layers)
    D = np.array([P[v] - P[u] for u, v in graph.edges])
    angles = np.arctan2(D[:, 1], D[:, 0])
    level = np.angle(np.exp(4j * angles).sum()) / 4  # the turn that lays most lines level or upright
    for turn in (level, level + math.pi / 4):
        Q = P @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        Q = Q / np.linalg.norm(D, axis=1).mean()
        Q = Q if np.ptp(Q[:, 0]) >= np.ptp(Q[:, 1]) - 0.3 else Q[:, ::-1]
        yield Q
        yield np.column_stack([_ranks(Q[:, 0]), _ranks(Q[:, 1])])  # ladders and grids
    planar, embedding = nx.check_planarity(graph)
    if planar:
        places = nx.combinatorial_embedding_to_pos(embedding)
        P = np.array([places[v] for v in graph], float)
        yield P
        faces = {tuple(sorted(face)): face for u, v in embedding.edges for face in [embedding.traverse_face(u, v)]}
        for face in sorted(faces.values(), key=lambda face: -len(face))[:2]:
            if len(set(face)) == len(face) > 2:
                yield _tutte(graph, face)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Numbers as the columns that they fall into: a gap begins another."""
    order = np.argsort(x, kind="stable")
    ranks = np.zeros(len(x))
    ranks[order] = np.concatenate([[0], np.cumsum(np.diff(x[order]) > 0.4)])
    return ranks


def _hung(graph: nx.Graph, path: Sequence[int], columns: float) -> np.ndarray:
    """A path in a row, folded where it is too long, and all else hung below it or set above."""
    row = max(2, int(columns) + 1)
    P = {v: np.array([k % row if k // row % 2 == 0 else row - 1 - k % row, -(k // row)], float)
         for k, v in enumerate(path)}  # fmt: skip
    while len(P) < len(graph):
        v = next(v for v in graph if v not in P and any(u in P for u in graph[v]))
        near = np.array([P[u] for u in graph[v] if u in P])
        x, deep = near[:, 0].mean(), near[np.abs(near[:, 1]).argmax(), 1]
        rows = [deep - 1, deep + 1] if deep <= 0 else [deep + 1, deep - 1]
        places = (np.array([x + dx, y]) for dx in (0, 0.5, -0.5, 1, -1, 1.5, -1.5, *range(2, 30)) for y in rows)
        P[v] = next(p for p in places if all(np.hypot(*(p - q)) > 0.9 for q in P.values()))
    return np.array([P[v] for v in range(len(graph))])


def _layers(graph: nx.Graph, first: int) -> np.ndarray:
    """Columns by the distance from the first, each ordered by the mean of its neighbours."""
    P, before = np.zeros((len(graph), 2)), {first}
    for x, layer in enumerate(nx.bfs_layers(graph, [first])):
        back = {v: np.mean([P[u, 1] for u in {v, *graph[v]} & before]) for v in layer}
        layer = sorted(layer, key=lambda v: (-round(float(back[v]), 6), v))
        for k, v in enumerate(layer):
            P[v] = x, (len(layer) - 1) / 2 - k
        before = set(layer)
    return P


def _springs(graph: nx.Graph, P: np.ndarray) -> np.ndarray:
    """Distances on paper near those in the graph (Kamada and Kawai 1989), by majorising their stress."""
    d = np.asarray(nx.floyd_warshall_numpy(graph, nodelist=range(len(graph))))
    w = 1 / (d + np.eye(len(d))) ** 2 - np.eye(len(d))
    inverse = np.linalg.pinv(np.diag(w.sum(1)) - w)
    for _ in range(150):
        pull = w * d / (np.linalg.norm(P[:, None] - P, axis=-1) + 1e-9)
        P = inverse @ ((np.diag(pull.sum(1)) - pull) @ P)
    return P


def _tutte(graph: nx.Graph, face: Sequence[int]) -> np.ndarray:
    """One face as a regular polygon, every other vertex at the mean of its neighbours: no crossing (Tutte 1963)."""
    n, m = len(graph), len(face)
    turns = 2 * math.pi * np.arange(m) / m + math.pi / 2 + math.pi / m * (m % 2 == 0)
    L, target = np.eye(n), np.zeros((n, 2))
    target[face] = np.column_stack([np.cos(turns), np.sin(turns)]) * (0.8 * math.sqrt(n))
    for v in set(graph) - set(face):
        L[v, list(graph[v])] = -1 / graph.degree[v]
    return np.linalg.solve(L, target)


def _ring(graph: nx.Graph) -> np.ndarray:
    order = [0, min(graph[0])]
    while len(order) < len(graph):
        order.append(next(v for v in graph[order[-1]] if v not in order[-2:] and v not in order))
    n = len(order)
    turns = math.pi / 2 + math.pi / n * (n % 2 == 0) - 2 * math.pi * np.arange(n) / n
    P = np.zeros((n, 2))
    P[order] = np.column_stack([np.cos(turns), np.sin(turns)]) / (2 * math.sin(math.pi / n))
    return P


def _tidy(graph: nx.Graph) -> np.ndarray:
    """A tree from its centre down, parents over the middle of their children, leaves in a row."""
    P, roots = np.zeros((len(graph), 2)), sorted(nx.center(graph))
    column = iter(range(len(graph)))

    def place(v, parents, depth):
        children = sorted(u for u in graph[v] if u not in parents)
        xs = [place(u, (v,), depth + 1) for u in children]
        P[v] = (np.mean([xs[0], xs[-1]]) if xs else next(column)), -depth
        return P[v, 0]

    for root in roots:
        place(root, roots, 0)
    return P


def _improved(P: np.ndarray, measure: Measure, free: Sequence[int]) -> np.ndarray:
    """Small moves, and swaps, for as long as one helps."""
    steps = np.array([(x, y) for x in (-1, -0.5, 0, 0.5, 1) for y in (-1, -0.5, 0, 0.5, 1)] + [(2, 0), (-2, 0)], float)
    value = float(measure(P))
    for _ in range(12):
        before = value
        for v in free:
            tried = np.repeat(P[None], len(steps) + len(free), 0)
            tried[:len(steps), v] += steps
            for k, w in enumerate(free):
                tried[len(steps) + k, [v, w]] = P[[w, v]]
            values = measure(tried)
            if values.min() < value - 1e-6:
                P, value = tried[values.argmin()], float(values.min())
        if value > before - 1e-6:
            break
    return P


def _upright(P: np.ndarray, ends: tuple[int, int]) -> np.ndarray:
    """Turned over so that it reads from the first to the last, left to right and top down."""
    rank = np.arange(len(P)) - (len(P) - 1) / 2
    wide, high = (len(np.unique(np.round(x, 3))) for x in P.T)
    aside, deep = np.abs(P[ends[1]] - P[ends[0]]).round(6)
    written = abs(rank @ P[:, 1]) - abs(rank @ P[:, 0])  # a square grid by its rows, or by its columns
    if wide == high > 1 and wide * high == len(P) and (aside, written) < (deep, 0):
        P = P[:, ::-1]
    sideways = P[ends[1], 0] - P[ends[0], 0]
    x = sideways if abs(sideways) > 1e-6 else rank @ P[:, 0]
    P = P * (1 if x >= -1e-6 else -1, -1 if rank @ P[:, 1] > 1e-6 else 1)
    return P - P.mean(0)
