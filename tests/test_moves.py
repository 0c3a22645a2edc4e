"""Moves on diagrams, in random sequences: after each of them, a diagram is what dense linear algebra makes of it.

The diagrams are small and awkward: legs with one to four ends, repeated on a tensor, called like those that a move
would make (j′, j*), wires between them, bubbles. Beside each one goes its value, computed without the moves.
"""

import random

import pytest
import torch

from tensorlens_utils.notation import Diagram, Node, bubble

POOL = ["j", "j′", "j′′", "j*", "i", "i′", "k"]  # what insert, join and hole would call their legs


def dense(d):
    """What a diagram stands for, by one einsum over all its legs: wires are identities, bubbles contracted by it."""
    place = {leg: k for k, leg in enumerate(d.sizes)}
    operands = []
    for node in d.nodes:
        shape = [d.sizes[leg] for leg in node.legs]
        tensor = torch.eye(shape[-1]).view(shape) if node.kind in ("wire", "joint") else node.tensor
        tensor = node.fn(dense(node.inner)) if tensor is None else tensor
        operands += [tensor.double(), [place[leg] for leg in node.legs]]
    return torch.einsum(*operands, [place[leg] for leg in d.output])


def scribble(r, most=4):
    """A random diagram: up to four tensors, up to two wires, now and then a bubble."""
    pool = r.sample(POOL, r.randint(2, 6))
    sizes = {leg: r.choice([1, 2, 2, 3]) for leg in POOL}
    seeded = torch.Generator().manual_seed(r.randrange(10**9))
    nodes = []
    for name in "ABCD"[:r.randint(1, most)]:
        legs = [r.choice(pool) for _ in range(r.choice([1, 2, 2, 3]))]
        nodes.append(Node(name, tuple(legs), torch.randn([sizes[leg] for leg in legs], generator=seeded).double()))
    if most > 1 and r.random() < 0.2:  # the same tensor a second time
        legs = [r.choice([x for x in POOL if sizes[x] == sizes[leg]]) for leg in nodes[0].legs]
        nodes.append(Node("A", tuple(legs), nodes[0].tensor))
    for _ in range(r.choice([0, 0, 1, 2])):
        a, b = r.choice(nodes[0].legs), r.choice([leg for leg in POOL if leg not in nodes[0].legs])
        sizes[b] = sizes[b] if any(b in node.legs for node in nodes) else sizes[a]
        if sizes[a] == sizes[b]:
            nodes.append(Node("1", (a, b), kind="wire"))
    used = sorted({leg for node in nodes for leg in node.legs})
    d = Diagram(nodes, r.sample(used, r.randint(0, min(3, len(used)))), {leg: sizes[leg] for leg in used})
    if most > 1 and d.output and r.random() < 0.2:
        inner = scribble(r, 1)
        if inner.output and all(d.sizes.get(leg, inner.sizes[leg]) == inner.sizes[leg] for leg in inner.output):
            return d.join(bubble(inner, torch.tanh, "tanh", frozen=r.random() < 0.3))
    return d


# Each takes a generator, a diagram and its value, and gives the next ones; None where there is nothing to do.


def insert(r, d, value):
    return d.insert(r.choice([*d.sizes])), value


def gauge(r, d, value):
    leg = r.choice([*d.sizes])
    return d.gauge(leg, torch.randn(d.sizes[leg], d.sizes[leg] + r.randint(0, 1)).double()), value


def decompose(r, d, value):
    node = r.choice([n for n in d.nodes if len({*n.legs}) == len(n.legs) > 1 and n.tensor is not None] or d.nodes)
    return d.decompose(node.name, " ".join(node.legs[:r.randint(1, 2)]), r.choice(["svd", "qr"]),
                       bond=r.choice([None, "j′′′"])), value  # fmt: skip


def merge(r, d, value):
    return d.merge(*r.sample([node.name for node in d.nodes], min(len(d.nodes), r.randint(1, 3)))), value


def join(r, d, value):
    other = scribble(r)
    joined = d.join(other)
    place = {leg: k for k, leg in enumerate(dict.fromkeys(d.output + other.output))}
    once = [leg for leg in d.output + other.output if (leg in d.output) != (leg in other.output)]
    own, others, left = ([place[leg] for leg in legs] for legs in (d.output, other.output, once))
    return joined, torch.einsum(value, own, dense(other), others, left)


def rename(r, d, value):
    return d.rename(**{r.choice([*d.sizes]): r.choice([*d.sizes, *POOL, "z"])}), value


def transpose(r, d, value):
    legs = r.sample(d.output, len(d.output))
    return d.transpose(*legs), value.permute([d.output.index(leg) for leg in legs])


def pin(r, d, value):
    leg = r.choice([*d.sizes])
    k = r.randrange(d.sizes[leg])
    if leg in d.output:
        return d.pin(leg, k), value.select(d.output.index(leg), k)
    assert torch.allclose(sum(dense(d.pin(leg, k)) for k in range(d.sizes[leg])), value, atol=1e-6, rtol=1e-4)
    return None


def trace(r, d, value):
    pairs = [(a, b) for a in d.output for b in d.output if a != b and d.sizes[a] == d.sizes[b]]
    a, b = r.choice(pairs or [(*d.output, "i", "j")[:2]])
    traced = d.trace(a, b)
    return traced, value.diagonal(dim1=d.output.index(a), dim2=d.output.index(b)).sum(-1)


def split(r, d, value):
    leg = r.choice([*d.sizes])
    n, names = d.sizes[leg], r.sample(["j", "p", "p′", "q"], 2)
    parts = d.split(leg, **dict(zip(names, r.choice([(1, n), (n, 1), (n, 1)]), strict=True)))
    return parts, value.reshape(parts.shape())  # of the same entries in the same order


def group(r, d, value):
    legs = r.choice([[*d.sizes], d.output or [*d.sizes]])
    legs = r.sample(legs, min(len(legs), r.randint(1, 3)))
    grouped = d.group(" ".join(legs), r.choice(["g", "j′", legs[0]]))
    if legs[0] not in d.output:
        return grouped, value
    order = []
    for leg in d.output:
        order += [leg] if leg not in legs else [] if set(legs) & set(order) else legs
    value = value.permute([d.output.index(leg) for leg in order])
    return grouped, value.reshape(grouped.shape())


def hole(r, d, value):
    node = r.choice(d.nodes)
    alike = [n for n in d.nodes if n.name.rstrip("′") == node.name.rstrip("′")]
    holes = d.hole(node.name)
    if node.tensor is None or value.numel() * node.tensor.numel() > 2000:
        return None
    same = [n.name for n in alike if n.tensor is not None and torch.equal(n.tensor, node.tensor)]
    want = torch.autograd.functional.jacobian(lambda x: dense(d.fill(**dict.fromkeys(same, x))), node.tensor.double())
    assert torch.allclose(sum(h.contract().double() for h in holes), want, atol=1e-5, rtol=1e-4)
    return (holes[0], want) if len(holes) == 1 else None


MOVES = [insert, gauge, decompose, merge, join, rename, transpose, pin, trace, split, group, hole]


@pytest.mark.parametrize("block", range(10))
def test_moves_are_exact_or_refused(block):
    made = refused = 0
    for seed in range(32 * block, 32 * block + 32):
        r = random.Random(seed)
        torch.manual_seed(seed)
        d = scribble(r)
        value, told = dense(d), [d]
        for _ in range(6):
            if not d.sizes or len(d.sizes) > 16 or value.numel() > 2000:
                break
            move = r.choice(MOVES)
            told.append(move.__name__)
            try:
                moved = move(r, d, value)
            except ValueError as error:
                assert len(str(error)) > 30 and " " in str(error), (seed, told)
                refused += 1
                continue
            d, value = moved or (d, value)
            found = d.contract().double()
            assert found.shape == value.shape == d.shape(), (seed, told, d)
            assert torch.allclose(found, value, atol=1e-5, rtol=1e-4), (seed, told, d)
            made += 1
    assert made > 1.5 * refused, (made, refused)
