"""Softmax regression for many heads at once: gradients written out by hand, a piece of the logits at a time.

From the k features f of a head at a position (A heads, n positions) a lens predicts the logits l = W f + b, and
q = softmax(l). With p the model's own distribution there, y the next token, and c(x) = x − mean x:

    objective   loss of one position                     ∂ loss/∂l                      convex in l
    kl          Σ_v p_v (log p_v − log q_v)              q − p                          yes
    reverse     Σ_v q_v (log q_v − log p_v)              q ⊙ (log q − log p − loss)     no
    next        −log q_y                                 q − e_y                        yes
    logits      ½ mean_v (c(l) − c(log p))²_v            (c(l) − c(log p)) / V          yes

and ∂/∂W = Σ_t (∂ loss_t/∂l) f_tᵀ. The forward KL is that of Attention Lens (2310.16270), which leaves open what else
might serve. The logits of all heads at all positions, A·n·V numbers, never exist: `gradient` goes through heads and
positions in blocks, and through a block's vocabulary in chunks, twice: once for what the derivative needs to know of
the whole column (Σ_v e^l_v, or a mean), which is put together from the chunks' own; and once for the derivative itself,
in the logits' place. Only where a block of few positions has too many logits to be kept (`PIECES`) are they made anew.

A block's logits stand as (A', V, n'): the vocabulary before the positions, so that W f and (∂ loss/∂l) fᵀ are products
of tall matrices laid out as they are multiplied, and a chunk of the vocabulary is one piece of memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Captured

# logits of a chunk, such as a CPU's inner cache holds, and the most that are kept at once
PIECES = {"cpu": (2**18, 2**24), "cuda": (2**27, 2**28)}
ROWS = 128  # positions that a block has at least: with fewer, products no longer run at a machine's rate

DAMPING = (0.01, 0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.0)


class Objective(NamedTuple):
    """A loss of logits, and its derivative a chunk (A', Vc, n') of the vocabulary at a time.

    loss    the loss of logits (A', n', V) at all positions of `seen`, (A', n'), for measuring
    model   what the derivative compares with, (V, n)
    part    what it needs to know of a chunk, from the logits and that of `model`; it may leave other numbers in the
            logits' place
    whole   of the parts of all chunks: what it needs to know in each
    slope   ∂ loss/∂l from what `part` left, in its place
    """

    loss: Callable[[Tensor, Captured], Tensor]
    model: Callable[[Captured], Tensor]
    part: Callable[[Tensor, Tensor], tuple]
    whole: Callable[[list[tuple]], list[tuple]]
    slope: Callable[[Tensor, Tensor, tuple], Tensor]


def _exp(x: Tensor, top: Tensor, out: Tensor | None = None) -> Tensor:
    """e^(x − top), through 2^x, which torch computes several times as fast on a CPU."""
    log2_e = 1 / math.log(2)
    return torch.add(top * -log2_e, x, alpha=log2_e, out=out).exp2_()


# --- kl and next: q less a distribution, whose negative is `model`


def _kl(x, seen):
    return (seen.p * (seen.log_p - x.log_softmax(-1))).sum(-1)


def _next(x, seen):
    index = seen.following.expand(*x.shape[:-1])[..., None]
    return -x.log_softmax(-1).gather(-1, index)[..., 0]


def _minus_next(seen):
    y = seen.following[None]
    return torch.zeros_like(seen.log_p.mT, memory_format=torch.contiguous_format).scatter_(0, y, -1.0)


def _softmax_part(x, model):
    """The greatest logit, and Σ e^(l − greatest); these e^… are left."""
    top = x.amax(-2, keepdim=True)
    return top, _exp(x, top, out=x).sum(-2, keepdim=True)


def _softmax_whole(parts):
    """What makes each chunk's e^… probabilities."""
    tops, sums = (torch.stack(values) for values in zip(*parts, strict=True))
    scales = (tops - tops.amax(0)).exp()
    return [(scale,) for scale in scales / (scales * sums).sum(0)]


def _softmax_slope(x, model, whole):
    return torch.addcmul(model, x, *whole, out=x)


# --- reverse


def _reverse(x, seen):
    log_q = x.log_softmax(-1)
    return (log_q.exp() * (log_q - seen.log_p)).sum(-1)


def _reverse_part(x, model):
    """The greatest logit, Σ e^(l − greatest), and Σ e^(l − greatest) (l − log p)."""
    top = x.amax(-2, keepdim=True)
    e = _exp(x, top)
    return top, e.sum(-2, keepdim=True), e.mul_(x - model).sum(-2, keepdim=True)


def _reverse_whole(parts):
    """log Σ e^l, and the mean of l − log p under q."""
    tops, sums, products = (torch.stack(values) for values in zip(*parts, strict=True))
    scales = (tops - tops.amax(0)).exp()
    total = (scales * sums).sum(0)
    return [(tops.amax(0) + total.log(), (scales * products).sum(0) / total)] * len(parts)


def _reverse_slope(x, model, whole):
    lse, mean = whole
    return _exp(x, lse).mul_(x.sub_(model).sub_(mean))


# --- logits


def _logits(x, seen):
    gap = x - seen.log_p
    return 0.5 * (gap - gap.mean(-1, keepdim=True)).square().mean(-1)


def _logits_part(x, model):
    """The sum of l − log p, and over how many; these differences are left."""
    return x.sub_(model).sum(-2, keepdim=True), x.shape[-2]


def _logits_whole(parts):
    sums, counts = zip(*parts, strict=True)
    return [(sum(sums) / sum(counts), sum(counts))] * len(parts)


def _logits_slope(x, model, whole):
    mean, V = whole
    return x.sub_(mean).div_(V)


def _log_p(seen):
    return seen.log_p.mT.contiguous()


OBJECTIVES = {
    "kl": Objective(_kl, lambda seen: seen.log_p.mT.exp().neg_(), _softmax_part, _softmax_whole, _softmax_slope),
    "reverse": Objective(_reverse, _log_p, _reverse_part, _reverse_whole, _reverse_slope),
    "next": Objective(_next, _minus_next, _softmax_part, _softmax_whole, _softmax_slope),
    "logits": Objective(_logits, _log_p, _logits_part, _logits_whole, _logits_slope),
}


def same(x: Tensor) -> Tensor:
    """The sum over processes, where there is one."""
    return x


def blocks(A: int, n: int, V: int, piece: int) -> Iterator[tuple[slice, slice]]:
    """Heads and positions, a block of at most `piece` logits after the other; heads go fastest."""
    rows = max(1, min(n, max(ROWS, piece // V)))
    heads = max(1, piece // (rows * V))
    for t in range(0, n, rows):
        for a in range(0, A, heads):
            yield slice(a, min(A, a + heads)), slice(t, min(n, t + rows))


def _features(family, seen: Captured, heads: slice, rows: slice, precision: torch.dtype | None = None) -> Tensor:
    f = family.features(seen.z[heads, rows], None if seen.scale is None else seen.scale[rows], heads)
    return f if precision is None else f.to(precision)


def _into(out: Tensor, family, f: Tensor, heads: slice, chunk: slice) -> Tensor:
    """The logits (A', Vc, n'), in float32 or wider, whatever precision the features have."""
    W, b = family.weight(heads, chunk), family.bias(heads, chunk).mT
    if f.dtype != W.dtype:
        return out.copy_(W.to(f) @ f.mT).add_(b)
    return torch.baddbmm(b, W, f.mT, out=out)


@torch.no_grad()
def gradient(family, seen: Captured, objective: str, share: float, precision: torch.dtype | None = None,
             pieces: tuple[int, int] | None = None) -> None:  # fmt: skip
    """Add `share` times the sum over positions of ∂ loss/∂parameters to the family's gradients.

    Args:
        family: of `families`.
        seen: the positions, with z of all heads.
        objective: one of `OBJECTIVES`.
        share: 1 over the number of positions, for a mean.
        precision: of the products, as torch.bfloat16; None: that of `seen`. Sums and parameters keep theirs.
        pieces: logits of a chunk, and the most that are kept; None: as suits the device.
    """
    goal, (n, V), A = OBJECTIVES[objective], seen.log_p.shape, len(seen.z)
    piece, most = pieces or PIECES.get(seen.z.device.type, PIECES["cuda"])
    out = seen.z.new_empty(max(min(most, A * n * V), min(n, ROWS)))
    for heads, rows in blocks(A, n, V, piece):
        if not heads.start:
            model = goal.model(seen[rows]).contiguous()
        f = _features(family, seen, heads, rows, precision)
        A_, n_ = f.shape[:2]
        kept = A_ * n_ * V <= len(out)
        width = max(1, min(V, piece // (A_ * n_), len(out) // (A_ * n_)))
        chunks = [slice(c, min(V, c + width)) for c in range(0, V, width)]

        def place(chunk, A_=A_, n_=n_, kept=kept):
            if kept:
                return out[:A_ * V * n_].view(A_, V, n_)[:, chunk]
            return out[:A_ * (chunk.stop - chunk.start) * n_].view(A_, -1, n_)

        def part(chunk, f=f, heads=heads, model=model, place=place):
            return goal.part(_into(place(chunk), family, f, heads, chunk), model[chunk])

        wholes = goal.whole([part(chunk) for chunk in chunks])
        for chunk, whole in zip(chunks, wholes, strict=True):
            if not kept:
                part(chunk)
            slope = goal.slope(place(chunk), model[chunk], whole)
            family.pull(heads, chunk, slope.to(f), f * share, share)


@torch.no_grad()
def predict(family, seen: Captured, heads: slice, rows: slice = slice(None)) -> Tensor:
    """The logits (A', n', V) that the lenses of some heads predict."""
    f, every = _features(family, seen, heads, rows), slice(0, seen.log_p.shape[1])
    return family.raised(f, heads, every).add_(family.bias(heads, every))


@torch.no_grad()
def losses(family, seen: Captured, objective: str = "kl", which: slice = slice(None)) -> Tensor:
    """The loss of every head, or of some, at every position, (A', n)."""
    (n, V), (first, stop, _) = seen.log_p.shape, which.indices(len(seen.z))
    found = seen.z.new_empty(max(0, stop - first), n)
    for heads, rows in blocks(len(found), n, V, PIECES.get(seen.z.device.type, PIECES["cuda"])[0]):
        if not heads.start:
            part = seen[rows]  # its p is made once for all heads
        x = predict(family, seen, slice(first + heads.start, first + heads.stop), rows)
        found[heads, rows] = OBJECTIVES[objective].loss(x, part)
    return found


@torch.no_grad()
def damped(family, seen: Captured, objective: str = "kl", grid=DAMPING, reduce=same) -> Tensor:
    """Scale what multiplies z by the α of `grid` with the least loss on these positions, and return it for each lens.

    The logits go along a line, l(α) = l(0) + α (l(1) − l(0)), l(0) those at the mean of z. `reduce` sums over
    processes, of which each has its own positions. The loss is convex in α for forward KL, the next token and logit
    regression.
    """
    (n, V), A, linear = seen.log_p.shape, len(seen.z), family.parameters[family.linear].detach()
    at_mean, found = replace(seen, z=family.mu[:, None].expand_as(seen.z)), seen.z.new_zeros(len(grid), A).double()
    for heads, rows in blocks(A, n, V, PIECES.get(seen.z.device.type, PIECES["cuda"])[0]):
        if not heads.start:
            part = seen[rows]
        start, whole = (predict(family, s, heads, rows) for s in (at_mean, seen))
        for total, alpha in zip(found, grid, strict=True):
            x = torch.lerp(start, whole, alpha)
            total[heads] += OBJECTIVES[objective].loss(x, part).double().sum(1)
    found = reduce(found.new_zeros(len(grid), len(linear)).index_add_(1, family.unit, found))
    alphas = linear.new_tensor(grid)[found.argmin(0)]
    linear *= alphas.view(-1, *[1] * (linear.dim() - 1))
    return alphas
