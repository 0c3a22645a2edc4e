"""Moments of what heads read and what the model answers, from which all lenses begin (see `families`).

They are sums over positions until they are closed, so that batches and processes can be added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .heads import Captured
from .regression import same

Reduce = Callable[[Tensor], Tensor]
EPS = 1e-6  # of the largest eigenvalue: directions with less variance are noise, and left out


def power(S: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices (..., d, d), their null space left out."""
    values, vectors = torch.linalg.eigh(S.double())
    kept = values > EPS * values[..., -1:]
    values = torch.where(kept, values.clamp_min(1e-300) ** exponent, 0)
    return (vectors * values[..., None, :]) @ vectors.mT


class Moments:
    """What all starts follow from: means over positions, `of` a list of batches, or of those `add`ed before `close`.

    n          positions
    weights    (V,) π, the diagonal of the Hessian in the logits; for logit regression 1/V
    offset     (V,) where biases begin: log π, or the mean of log p less its own mean
    mu, S, C   (A, d), (A, d, d), (A, V, d); for logit regression C is that of log p, over V
    white      (A, d, d) S^−½
    scale      the mean s; None unless it was captured
    """

    def __init__(self, of_logits: bool = False):
        self.of_logits, self.n, self.C = of_logits, 0, None

    @classmethod
    def of(cls, batches: Iterable[Captured], of_logits: bool = False) -> Moments:
        m = cls(of_logits)
        for seen in batches:
            m.add(seen)
        return m.close()

    def add(self, seen: Captured, reduce: Reduce = same) -> Moments:
        """`reduce` sums a tensor over processes, of which each has its own positions, or none."""
        y, (A, _, d) = seen.log_p - seen.log_p.mean(-1, keepdim=True) if self.of_logits else seen.p, seen.z.shape
        if self.C is None:
            count, V = reduce(seen.z.new_tensor(float(len(seen)), dtype=torch.float64)), y.shape[1]
            self.near = (reduce(seen.z.double().sum(1)) / count.clamp_min(1))[:, None]  # taken off, lest digits cancel
            self.z, self.zz, self.y, self.scale = (self.near.new_zeros(n) for n in ((A, d), (A, d, d), V, ()))
            self.C = seen.z.new_zeros(A, V, d)
        z = seen.z - self.near
        self.n += len(seen)
        self.z += z.sum(1)
        self.zz += z.mT @ z
        self.y += y.sum(0)
        self.scale = None if self.scale is None or seen.scale is None else self.scale + seen.scale.sum()
        for total, x in zip(self.C, z.to(seen.z), strict=True):
            total.addmm_(y.mT, x)
        return self

    def close(self, reduce: Reduce = same) -> Moments:
        """From one process's sums to everyone's means. Raises ValueError where they are of nothing, or not finite."""
        self.n = 0 if self.C is None else float(reduce(self.z.new_tensor(float(self.n))))
        if not self.n:
            raise ValueError("moments are means over positions, and there is none: in training the first batch settles "
                             "α and the next `warm` the moments, so give two, with the positions asked for")
        z, zz, y = (reduce(x) / self.n for x in (self.z, self.zz, self.y))
        self.scale = None if self.scale is None else float(reduce(self.scale) / self.n)
        if not (z.isfinite().all() and y.isfinite().all()):
            raise ValueError("lenses are made from finite numbers, and what heads read or models answer here is none")
        self.C, like = reduce(self.C).div_(self.n), self.C
        for C, mean in zip(self.C, z.to(like), strict=True):
            C.addr_(y.to(like), mean, alpha=-1)
        self.mu, self.S = (z + self.near[:, 0]).to(like), zz - z[:, :, None] * z[:, None]
        self.white = power(self.S, -0.5).to(like)
        self.weights = torch.full_like(y, 1 / len(y)).to(like) if self.of_logits else y.to(like).clamp_min(1e-30)
        self.offset = y.to(like) if self.of_logits else self.weights.log()
        if self.of_logits:
            self.C /= len(y)
        return self

    def newton(self, h: int) -> Tensor:
        """Newton's step for head h in white coordinates, (V, d)."""
        return self.C[h] @ self.white[h] / self.weights[:, None]
