"""Four families of lenses on z, and where each one begins: a damped Newton step from the unigram, in closed form.

A head writes a = z W_O, z in R^d_head: a linear lens on a in R^d_model is one on z, and d_model / d_head times smaller.
With μ the mean of z, s and M those of `heads.Readout`, a lens of head h predicts the logits

    family               logits                              is
    full                 W_h (z − μ_h) + b_h                  Attention Lens' class (2310.16270), convex
    low rank             B_h A_h (z − μ_h) + b_h              full, of rank r, not convex
    translator           s M (T_h (z − μ_h) + c_h) + β        Tuned Lens' (2303.08112) for a head; s is held at the
                                                              model's value, so that it is convex
    shared by layer,     L_g W_O,hᵀ (z − μ_h) + b_g           full on a less its mean, one lens for a layer's heads, or
    shared by model                                           one for all

Where the W_O,h of a layer, one above the other, are an invertible matrix W_O (H·d_head = d_model, as is usual), shared
by layer is full with one bias: L = [W_1 … W_H] W_O⁻ᵀ holds any W_h. Shared by model is a restriction.

**The start.** Let π = E p, S = E (z−μ)(z−μ)ᵀ and C = E (p−π)(z−μ)ᵀ. At W = 0, b = log π the mean forward KL has

    gradient   ∂/∂W = E (π − p)(z−μ)ᵀ = −C,   ∂/∂b = E (π − p) = 0
    Hessian    (diag π − ππᵀ) ⊗ S in W,  none between W and b, since E (z−μ) = 0

and the columns of C add up to 0, on which diag(1/π) inverts diag π − ππᵀ. So Newton's step is W = diag(1/π) C S⁻¹, and
that is Cov(p/π, z) S⁻¹; b stays log π. It is damped by α, one number for a lens, chosen on training data. The same step
in the other families: low rank, its best approximation in the Hessian's norm, ‖diag(π)^½ W S^½‖; translator, the step
of s M T, with s at its mean, and for c that from β to log π; shared, the step on all heads of the group. For logit
regression the same moments, with log p less its mean for p and 1/V for π, give the solution itself.

Parameters are learned in coordinates in which z is white, (z − μ) S^−½, and M and W_O are scaled to match, so that one
step length fits all directions and all families; `folded` gives them back for z − μ itself. Gradients are written out:
with δ = ∂ loss/∂logits it is δᵀf for the matrix on f, and the chain rule of a product of matrices from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import Heads
from .moments import EPS, Moments, power

NO_SCALE = ("a lens through the unembedding needs what the final norm divides by at each position, and these were "
            "captured without it: Heads.capture(inputs, scale=True)")  # fmt: skip


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, the product in the factors' precision."""
    if total.dtype == a.dtype and a.dim() == 3:
        total.baddbmm_(a, b)
    else:
        total += a @ b


class Family:
    """Lenses of A heads: logits = weight·f + bias on the features f of one head at one position.

    parameters   what is learned, by name
    mu           (A, d), the mean of z
    white        (A, d, d): f = (z − μ)·white while they are learned; None once they are `folded`, where f = z − μ
    unit         (A,) which lens is each head's: its own, or its group's
    linear       the parameter that multiplies z; its first axis is the lenses
    """

    linear, through_unembedding = "W", False

    def __init__(self, parameters: dict[str, Tensor], mu: Tensor, white: Tensor | None = None,
                 unit: Tensor | None = None):  # fmt: skip
        self.parameters, self.mu, self.white = parameters, mu, white
        self.unit = torch.arange(len(mu), device=mu.device) if unit is None else unit

    @classmethod
    def start(cls, m: Moments, heads: Heads, rank: int) -> Family:
        """The lenses after Newton's undamped step, in white coordinates."""
        raise NotImplementedError

    @classmethod
    def of(cls, parameters: dict[str, Tensor], mu: Tensor, heads: Heads) -> Family:
        """Folded lenses from their parameters."""
        return cls(parameters, mu)

    def features(self, z: Tensor, scale: Tensor | None, heads: slice) -> Tensor:
        """f (A', n, k) of z (A', n, d) and the scales (n,)."""
        f = z - self.mu[heads, None]
        return f if self.white is None else f @ self.white[heads]

    def weight(self, heads: slice, chunk: slice) -> Tensor:
        """(A', Vc, k)."""
        return self.parameters["W"][heads, chunk]

    def raised(self, f: Tensor, heads: slice, chunk: slice) -> Tensor:
        """weight·f, (A', n, Vc)."""
        return f @ self.weight(heads, chunk).mT

    def bias(self, heads: slice, chunk: slice) -> Tensor:
        """(A' or 1, 1, Vc)."""
        return self.parameters["b"][self.unit[heads], None, chunk]

    def pull(self, heads: slice, chunk: slice, slope: Tensor, f: Tensor, share: float) -> None:
        """Add share·∂/∂parameters to the gradients: slope (A', Vc, n) is ∂ loss/∂logits of a chunk of the vocabulary,
        and f (A', n, k) the features times share already."""
        g = self.parameters["b"].grad
        g[:, chunk].index_add_(0, self.unit[heads], slope.sum(-1, dtype=g.dtype), alpha=share)

    def folded(self, heads: Heads) -> Family:
        """The same lenses, with parameters for z − μ itself."""
        linear = self.parameters[self.linear] @ self.white
        return self.of(self.parameters | {self.linear: linear}, self.mu, heads)


class Full(Family):
    """W (A, V, d), b (A, V)."""

    @classmethod
    def unigram(cls, m: Moments) -> Full:
        """W = 0, b = log π: what the start starts from, and the least that a lens can know."""
        A, d = m.mu.shape
        return cls({"W": m.mu.new_zeros(1, 1, 1).expand(A, len(m.offset), d), "b": m.offset.expand(A, -1)}, m.mu)

    @classmethod
    def start(cls, m, heads, rank):
        W = torch.stack([m.newton(h) for h in range(len(m.mu))])
        return cls({"W": W, "b": m.offset.repeat(len(W), 1)}, m.mu, m.white)

    def pull(self, heads, chunk, slope, f, share):
        super().pull(heads, chunk, slope, f, share)
        add_product(self.parameters["W"].grad[heads, chunk], slope, f)


class LowRank(Family):
    """B (A, V, r), A (A, r, d), b (A, V)."""

    linear = "A"

    @classmethod
    def start(cls, m, heads, rank):
        if not 1 <= rank <= m.mu.shape[1]:
            raise ValueError(f"the rank of a lens lies in 1..{m.mu.shape[1]}, a head's width, and is {rank}")
        B, A = [], []
        for W in map(m.newton, range(len(m.mu))):
            squares, vectors = (x[..., -rank:] for x in torch.linalg.eigh(W.mT @ (m.weights[:, None] * W)))
            vectors = vectors * squares.clamp_min(EPS * squares[-1]) ** 0.25  # singular values, half to each factor
            B.append(W @ vectors / squares.clamp_min(EPS * squares[-1]).sqrt())
            A.append(vectors.mT)
        return cls({"B": torch.stack(B), "A": torch.stack(A), "b": m.offset.repeat(len(B), 1)}, m.mu, m.white)

    def weight(self, heads, chunk):
        return self.parameters["B"][heads, chunk] @ self.parameters["A"][heads]

    def raised(self, f, heads, chunk):
        return f @ self.parameters["A"][heads].mT @ self.parameters["B"][heads, chunk].mT

    def pull(self, heads, chunk, slope, f, share):
        super().pull(heads, chunk, slope, f, share)
        B, A = self.parameters["B"], self.parameters["A"]
        add_product(B.grad[heads, chunk], slope, f @ A[heads].mT.to(f))
        add_product(A.grad[heads], B[heads, chunk].mT.to(f) @ slope, f)


class Translator(Family):
    """T (A, D, d), c (A, D); M (V, D) and beta (V,) are the model's. While T and c are learned, M is M·root, in
    coordinates in which the Hessian at the unigram is the identity."""

    linear, through_unembedding = "T", True

    def __init__(self, parameters, mu, white, M: Tensor, beta: Tensor, root: Tensor | None = None):
        super().__init__(parameters, mu, white)
        self.M, self.beta, self.root = M, beta, root

    @classmethod
    def of(cls, parameters, mu, heads):
        return cls(parameters, mu, None, heads.readout.M, heads.readout.beta)

    @classmethod
    def start(cls, m, heads, rank):
        M, beta = heads.readout.M, heads.readout.beta
        if m.scale is None:
            raise ValueError(NO_SCALE)
        mean = M.mT @ m.weights
        root = power((M.mT * m.weights) @ M - torch.outer(mean, mean), -0.5).to(M) / (m.scale * M.shape[1] ** 0.5)
        M = M @ root
        inverse = M.mT * (m.scale * M.shape[1])  # of s M, from the left, in the Hessian's norm
        T = torch.stack([inverse @ C @ white for C, white in zip(m.C, m.white, strict=True)])
        gap = m.offset - beta
        c = inverse @ (m.weights * (gap - m.weights @ gap))
        return cls({"T": T, "c": c.repeat(len(T), 1)}, m.mu, m.white, M, beta, root)

    def features(self, z, scale, heads):
        if scale is None:
            raise ValueError(NO_SCALE)
        f = super().features(z, scale, heads)
        return torch.cat([f, torch.ones_like(f[..., :1])], -1) * scale[:, None]

    def _into_stream(self, heads):
        return torch.cat([self.parameters["T"][heads], self.parameters["c"][heads, :, None]], -1)

    def weight(self, heads, chunk):
        return self.M[chunk] @ self._into_stream(heads)

    def raised(self, f, heads, chunk):
        if f.shape[-2] < f.shape[-1]:  # by way of the stream, which is the less work the fewer positions there are
            return f @ self._into_stream(heads).mT @ self.M[chunk].mT
        return super().raised(f, heads, chunk)

    def bias(self, heads, chunk):
        return self.beta[None, None, chunk]

    def pull(self, heads, chunk, slope, f, share):
        both = (self.M[chunk].mT.to(f) @ slope) @ f
        self.parameters["T"].grad[heads] += both[..., :-1]
        self.parameters["c"].grad[heads] += both[..., -1]

    def folded(self, heads):
        T, c = self.root @ self.parameters["T"] @ self.white, self.parameters["c"] @ self.root
        return self.of({"T": T, "c": c}, self.mu, heads)


class Shared(Family):
    """L (G, V, D), b (G, V); F (A, D, d) carries a head's features into the residual stream, where L reads them. While
    L is learned, F's are white over each group together."""

    linear = "L"

    def __init__(self, parameters, mu, white, unit, F: Tensor, root: Tensor | None = None):
        super().__init__(parameters, mu, white, unit)
        self.F, self.root = F, root

    @staticmethod
    def groups(heads: Heads) -> list[int]:
        """The group of each head, counted from 0."""
        raise NotImplementedError

    @classmethod
    def of(cls, parameters, mu, heads):
        return cls(parameters, mu, None, torch.tensor(cls.groups(heads), device=mu.device), heads.W_O.mT)

    @classmethod
    def start(cls, m, heads, rank):
        unit = torch.tensor(cls.groups(heads), device=m.mu.device)
        F = heads.W_O.mT @ power(m.S, 0.5).to(m.mu)
        members = [torch.nonzero(unit == g)[:, 0].tolist() for g in range(int(unit.max()) + 1)]
        root = torch.stack([power(sum(F[h] @ F[h].mT for h in group) / len(group), -0.5).to(F) for group in members])
        root *= (F.shape[2] / F.shape[1]) ** 0.5
        F = root[unit] @ F
        L = torch.stack([sum(m.newton(h) @ F[h].mT for h in group) / len(group) for group in members])
        L *= F.shape[1] / F.shape[2]
        return cls({"L": L, "b": m.offset.repeat(len(L), 1)}, m.mu, m.white, unit, F, root)

    def weight(self, heads, chunk):
        L = self.parameters["L"]
        return torch.stack([L[g, chunk] @ F for g, F in zip(self.unit[heads].tolist(), self.F[heads], strict=True)])

    def raised(self, f, heads, chunk):
        if f.shape[-2] < f.shape[-1]:  # by way of the stream, as a translator
            return torch.stack([x @ F.mT @ self.parameters["L"][g, chunk].mT
                                for g, x, F in zip(self.unit[heads].tolist(), f, self.F[heads], strict=True)])
        return super().raised(f, heads, chunk)

    def pull(self, heads, chunk, slope, f, share):
        super().pull(heads, chunk, slope, f, share)
        for g, *parts in zip(self.unit[heads].tolist(), slope, f, self.F[heads], strict=True):
            s, x, F = parts
            add_product(self.parameters["L"].grad[g, chunk], s, x @ F.mT.to(x))

    def folded(self, heads):
        return self.of(self.parameters | {"L": self.parameters["L"] @ self.root}, self.mu, heads)


class SharedByLayer(Shared):
    @staticmethod
    def groups(heads):
        return [layer for layer, _ in heads.names]


class SharedByModel(Shared):
    @staticmethod
    def groups(heads):
        return [0 for _ in heads.names]


FAMILIES = {"full": Full, "low rank": LowRank, "translator": Translator, "shared by layer": SharedByLayer,
            "shared by model": SharedByModel}  # fmt: skip
