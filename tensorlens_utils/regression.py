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
positions in blocks, and where even a block of few positions has too many logits (`PIECES`), through the vocabulary in
chunks: once for what the derivative needs to know of the whole row (log Σ_v e^l_v, or a mean), which is put together
from the chunks' own; and once, the logits made anew, for the derivative itself.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Captured

# logits of a block, such as a CPU's inner cache holds, and the most that there may be at once, as its last cache holds
PIECES = {"cpu": (2**18, 2**22), "cuda": (2**27, 2**28)}
ROWS = 32  # positions that a block has at least: with fewer, products no longer run at a machine's rate

DAMPING = (0.01, 0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.0)


class Target(NamedTuple):
    """What is to be predicted at n positions, of a chunk of the vocabulary: (n, Vc), (n, Vc), (n,) counted from it."""

    p: Tensor
    log_p: Tensor
    following: Tensor


class Objective(NamedTuple):
    """A loss by its derivative: `row` folds one chunk of logits (A, n, Vc) into what the derivative needs to know of
    whole rows, `slope` gives ∂ loss/∂l of a chunk, in the logits' place; `loss` is the whole, (A, n), for measuring."""

    loss: Callable[[Tensor, Target], Tensor]
    row: Callable[[Tensor, Target, tuple | None], tuple]
    slope: Callable[[Tensor, Target, tuple], Tensor]


def _log_sum(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return (x - top).exp_().sum(-1, keepdim=True).log_().add_(top)


def _normaliser(x, target, old):
    lse = _log_sum(x)
    return (lse if old is None else torch.logaddexp(old[0], lse),)


def _q(x: Tensor, row) -> Tensor:
    """The probabilities, in the logits' place; torch's own softmax where the chunk is the whole row."""
    return torch.softmax(x, -1, out=x) if row is None else x.sub_(row[0]).exp_()


def _kl(x, target):
    return (target.p * (target.log_p - x.log_softmax(-1))).sum(-1)


def _kl_slope(x, target, row):
    return _q(x, row).sub_(target.p)


def _next(x, target):
    index = target.following.expand(*x.shape[:-1])[..., None]
    return -x.log_softmax(-1).gather(-1, index)[..., 0]


def _next_slope(x, target, row):
    q, here = _q(x, row), (0 <= target.following) & (target.following < x.shape[-1])
    at = here.nonzero()[:, 0]
    q[:, at, target.following[at]] -= 1
    return q


def _reverse(x, target):
    log_q = x.log_softmax(-1)
    return (log_q.exp() * (log_q - target.log_p)).sum(-1)


def _reverse_row(x, target, old):
    """log Σ e^l, and the mean of l − log p under q."""
    lse = _log_sum(x)
    mean = ((x - lse).exp_() * (x - target.log_p)).sum(-1, keepdim=True)
    if old is None:
        return lse, mean
    both = torch.logaddexp(old[0], lse)
    return both, (old[0] - both).exp() * old[1] + (lse - both).exp() * mean


def _reverse_slope(x, target, row):
    lse, mean = row or _reverse_row(x, target, None)
    return (x - lse).exp_() * x.sub_(target.log_p).sub_(mean)


def _logits(x, target):
    gap = x - target.log_p
    return 0.5 * (gap - gap.mean(-1, keepdim=True)).square().mean(-1)


def _logits_row(x, target, old):
    """The sum of l − log p, and over how many."""
    total = (x - target.log_p).sum(-1, keepdim=True)
    return (total, x.shape[-1]) if old is None else (old[0] + total, old[1] + x.shape[-1])


def _logits_slope(x, target, row):
    total, V = row or _logits_row(x, target, None)
    return x.sub_(target.log_p).sub_(total / V).div_(V)


OBJECTIVES = {
    "kl": Objective(_kl, _normaliser, _kl_slope),
    "reverse": Objective(_reverse, _reverse_row, _reverse_slope),
    "next": Objective(_next, _normaliser, _next_slope),
    "logits": Objective(_logits, _logits_row, _logits_slope),
}


def blocks(A: int, n: int, V: int, piece: int) -> Iterator[tuple[slice, slice]]:
    """Heads and positions, a block of at most `piece` logits after the other; positions go fastest."""
    rows = min(n, max(ROWS, piece // V))
    heads = max(1, piece // (rows * V))
    for a in range(0, A, heads):
        for t in range(0, n, rows):
            yield slice(a, min(A, a + heads)), slice(t, min(n, t + rows))


def _target(seen: Captured, rows: slice, chunk: slice) -> Target:
    return Target(seen.p[rows, chunk], seen.log_p[rows, chunk], seen.following[rows] - chunk.start)


def _product(family, f: Tensor, heads: slice, chunk: slice, out: Tensor | None = None) -> Tensor:
    """The logits (A', n, Vc), in float32 or wider, whatever precision the features have."""
    W, b = family.weight(heads, chunk), family.bias(heads, chunk)
    if f.dtype != W.dtype:
        x = f @ W.mT.to(f.dtype)
        return (x.to(W) if out is None else out.view(x.shape).copy_(x)).add_(b)
    return torch.baddbmm(b, f, W.mT, **({} if out is None else {"out": out.view(*f.shape[:2], -1)}))


def _features(family, seen: Captured, heads: slice, rows: slice, precision: torch.dtype | None = None) -> Tensor:
    f = family.features(seen.z[heads, rows], None if seen.scale is None else seen.scale[rows], heads)
    return f if precision is None else f.to(precision)


@torch.no_grad()
def gradient(family, seen: Captured, objective: str, share: float, precision: torch.dtype | None = None,
             pieces: tuple[int, int] | None = None) -> None:  # fmt: skip
    """Add `share` times the sum over positions of ∂ loss/∂parameters to the family's gradients.

    Args:
        family: of `lens_families`.
        seen: the positions, with z of all heads.
        objective: one of `OBJECTIVES`.
        share: 1 over the number of positions, for a mean.
        precision: of the products, as torch.bfloat16; None: that of `seen`. Sums and parameters keep theirs.
        pieces: logits of a block, and the most at once; None: as suits the device.
    """
    goal, (n, V), A = OBJECTIVES[objective], seen.log_p.shape, len(seen.z)
    piece, most = pieces or PIECES.get(seen.z.device.type, PIECES["cuda"])
    out = seen.z.new_empty(max(min(most, A * n * V), min(n, ROWS)))
    for heads, rows in blocks(A, n, V, piece):
        f = _features(family, seen, heads, rows, precision)
        size = f.shape[0] * f.shape[1]
        width = max(1, min(V, len(out) // size))
        chunks = [slice(c, min(V, c + width)) for c in range(0, V, width)]

        def logits(chunk, f=f, heads=heads, size=size):
            return _product(family, f, heads, chunk, out[:size * (chunk.stop - chunk.start)])

        row = None
        for chunk in chunks if len(chunks) > 1 else ():
            row = goal.row(logits(chunk), _target(seen, rows, chunk), row)
        for chunk in chunks:
            slope = goal.slope(logits(chunk), _target(seen, rows, chunk), row)
            family.pull(heads, chunk, slope.to(f).mT, f * share, share)


@torch.no_grad()
def predict(family, seen: Captured, heads: slice, rows: slice = slice(None)) -> Tensor:
    """The logits (A', n', V) that the lenses of some heads predict."""
    return _product(family, _features(family, seen, heads, rows), heads, slice(0, seen.log_p.shape[1]))


@torch.no_grad()
def losses(family, seen: Captured, objective: str = "kl") -> Tensor:
    """The loss of every head at every position, (A, n)."""
    (n, V), A = seen.log_p.shape, len(seen.z)
    found = seen.z.new_empty(A, n)
    for heads, rows in blocks(A, n, V, PIECES.get(seen.z.device.type, PIECES["cuda"])[0]):
        target = _target(seen, rows, slice(0, V))
        found[heads, rows] = OBJECTIVES[objective].loss(predict(family, seen, heads, rows), target)
    return found


def damped(family, seen: Captured, objective: str = "kl", grid=DAMPING, reduce=lambda x: x) -> Tensor:
    """Scale what multiplies z by the α of `grid` with the least loss on these positions, and return it for each lens.

    `reduce` sums over processes, of which each has its own positions. The loss is convex in α for forward KL, the next
    token and logit regression.
    """
    linear, before, found = family.parameters[family.linear].detach(), 1.0, []
    for alpha in grid:
        linear *= alpha / before
        before, mean = alpha, losses(family, seen, objective).double().mean(1)
        found.append(reduce(mean.new_zeros(len(linear)).index_add_(0, family.unit, mean)))
    alphas = linear.new_tensor(grid)[torch.stack(found).argmin(0)]
    linear *= (alphas / before).view(-1, *[1] * (linear.dim() - 1))
    return alphas
