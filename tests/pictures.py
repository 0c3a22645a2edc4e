"""Diagrams to draw: one for each shape that the series shows, and as many random ones as one asks for."""
import random
from itertools import combinations

import torch

from tensorlens_utils.notation import Diagram, Node, bubble, diagram
from tensorlens_utils.notation.decompositions import train
from tensorlens_utils.notation.geometry import overlap


def sketch(expression, names, sizes=2):
    """A diagram without numbers; ``sizes`` is one for all legs, or a dict."""
    legs = expression.replace(",", " ").replace("->", " ").split()
    sizes = sizes if isinstance(sizes, dict) else dict.fromkeys(legs, sizes)
    return diagram(expression, *[None] * len(names.split()), names=names, sizes=sizes)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def graph(edges):
    """The network with a tensor at each vertex of a graph."""
    edges = list(edges)
    vertices = sorted({v for edge in edges for v in edge})
    nodes = [Node(f"A{vertices.index(v)}", tuple(f"e{k}" for k, edge in enumerate(edges) if v in edge))
             for v in vertices]
    return Diagram(nodes, (), {f"e{k}": 2 for k in range(len(edges))})


def scribble(seed):
    """A random diagram of at most six tensors: legs of one to many ends, long names, scalars, parts of its own."""
    r = random.Random(seed)
    pool = [f"{r.choice(['d_model', 'head', 'i', 'k'])}{k}" for k in range(r.randint(2, 12))]
    legs = [[r.choice(pool) for _ in range(r.choice([0, 1, 2, 2, 3, 3, 4]))] for _ in range(r.randint(1, 6))]
    used = sorted({leg for own in legs for leg in own})
    nodes = [Node("ABCDEF"[k] * r.choice([1, 1, 3]), tuple(own), kind=r.choice(["tensor", "tensor", "matrix"]),
                  tip=tuple(own[:1]) if r.random() < 0.2 else ()) for k, own in enumerate(legs)]
    return Diagram(nodes, r.sample(used, r.randint(0, min(4, len(used)))), {leg: r.choice([2, 768]) for leg in pool})


def showcase():
    """{name: diagram}"""
    sites = train(numbers(2, 2, 2, 2, 2, 2), "i j k l m n")
    product = diagram("i j, j k -> i k", A=numbers(3, 3), B=numbers(3, 3))
    wire = Diagram([Node("1", ("i", "j"), kind="wire")], ("i", "j"), {"i": 3, "j": 3})
    sizes = {"seq": 10, "query": 5, "key": 5, "head": 2, "d_model": 8, "d_mlp": 32, "d_out": 8, "d_head": 4}
    hidden = bubble(sketch("d_mlp d_model, seq d_model -> seq d_mlp", "W_in x", sizes), torch.relu, "relu")
    mlp = hidden.join(sketch("d_mlp d_out -> d_mlp d_out", "W_out", sizes), ["seq", "d_out"])
    scores = diagram("query m, m d_head, d_head n, key n -> query key", numbers(5, 8), numbers(8, 4), numbers(4, 8),
                     numbers(5, 8), names="X W_Q W_K X")
    pattern = bubble(scores, lambda s: s.softmax(-1), "softmax", frozen=True)
    return {
        "vector": sketch("i", "v"), "matrix": sketch("i j", "M"), "tensor": sketch("i j k", "T"),
        "long_tensor": sketch("a b c d e f", "T"), "scalar": sketch(" ->", "s"), "dot": sketch("i, i ->", "a b"),
        "matvec": sketch("i j, j -> i", "M v"), "outer": sketch("i, j -> i j", "a b"),
        "trace": sketch("i i ->", "M"), "cyclic": sketch("i j, j i ->", "A B"), "sum": sketch("i j -> i", "M"),
        "cyclic_three": sketch("i j, j k, k i ->", "A B C"), "AvB": sketch("i α β, β, α β j -> i j", "A v B"),
        "ten": sketch("a b c, b d e, a f g, c d h f, e h g k, k l, l m, m n o, n p, o p ->", "A B C D E V W X Y Z"),
        "svd": Diagram([Node("M", ("i", "j"), numbers(6, 4), "matrix")], ["i", "j"]).decompose("M", "i", bond="r"),
        "isometry": Diagram([Node("V", ("i", "j"), tip=("j",))], "ij", {"i": 4, "j": 2}),
        "train": sites, "canonical": sites.canonical("A3"), "gauge": sites.gauge("b3", numbers(8, 8)),
        "ladder": sketch("a b, a c d, c e f, e g h, g i, b j, d j k, f k l, h l m, i m ->",
                         "A1 A2 A3 A4 A5 B1 B2 B3 B4 B5"),
        "cp": sketch("i r, j r, k r -> i j k", "A B C"), "tucker": sketch("a b c, i a, j b, k c -> i j k", "G U V W"),
        "gauge_matrix": product.gauge("j", numbers(3, 3)), "hole": product.hole("A")[0],
        "hole_train": sites.hole("A3")[0], "mlp": mlp, "frozen": pattern.join(sketch("key n, n d_out", "X W_OV", {
            "key": 5, "n": 8, "d_out": 8})),
        "nested": bubble(mlp, torch.relu, "norm").join(sketch("d_out vocab -> d_out vocab", "U", {
            "d_out": 8, "vocab": 50}), ["seq", "vocab"]),
        "head": sketch("query key head, key d_model, head d_model d_head, head d_head d_out -> query d_out",
                       "A X W_V W_O", sizes),
        "grouped": sketch("i j k", "T").group("i k", "ik"), "parallel": sketch("a b c, b c d -> a d", "A B"),
        "joint": sketch("i a, a j -> i j", "A B").group("i j", "ij"),
        "grouped_bond": sketch("a b c, b c d -> a d", "A B").group("b c", "bc"),
        "tree": sketch("a b, a c d, b e f, c i j, d k l, e m n, f o p -> i j k l m n o p", "R A1 A2 B1 B2 B3 B4"),
        "ring": sketch("a i b, b j c, c k d, d l e, e m f, f n a -> i j k l m n", "A1 A2 A3 A4 A5 A6"),
        "grid": sketch("a c i, a b d j, b e k, c f h l, d f g m p, e g q n, h r o, p r s t, q s u -> i j k l m n o t u",
                       "A B C D E F G H I"),
        "operator": sketch("i1 j1 a, i2 j2 a b, i3 j3 b c, i4 j4 c -> i1 j1 i2 j2 i3 j3 i4 j4", "W1 W2 W3 W4"),
        "wire": wire, "wire_trace": wire.trace("i", "j"), "copy": sketch("i, i, i -> i", "a b c"),
        "long_chain": sketch("a b, b c, c d, d e, e f, f g, g h, h i, i j, j k, k l, l m, m n, n o -> a o",
                             "A B C D E F G H I J K L M N"),
    }  # fmt: skip


def clashes(found):
    """Boxes that overlap, and must not: a bubble holds what is within it, and its own name."""
    shapes = [(a.name, b.name) for a, b in combinations(found.shapes, 2)
              if a.name not in b.within and b.name not in a.within and overlap(a.box, b.box)]
    texts = [(a.text, b.text) for a, b in combinations(found.labels, 2) if overlap(a.box, b.box)]
    return shapes + texts + [(t.text, s.name) for t in found.labels for s in found.shapes
                             if s.kind != "bubble" and overlap(t.box, s.box)]  # fmt: skip
