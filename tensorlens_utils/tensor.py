"""``AttentionTensor``: a transformer at a fixed input as one linear operator T of order four, never formed.

    F(X) = T·X + B,      (T·V)[i, c] = Σ_{j,d} T[i, c, j, d] V[j, d]                        (TensorLens, §3)

T·V and B come from replaying the *tape*, the frozen network as a list of affine calls; Uᵀ·T is one backward pass
through the graph that was recorded beside it. The two are independent, so each checks the other (``certificate``).

Letters: N inputs in a batch, L tokens, D channels, M output positions, D' output channels, K cotangents at once.
"""

import functools
import html
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- the certificate


class Cut(NamedTuple):
    """An operation whose X-dependent input became constant: module path, operation, and the rule that says why."""

    module: str
    operation: str
    rule: str


@dataclass(frozen=True)
class Certificate:
    """How exact an operator is. Errors are relative to the norms of what they compare.

    forward     ‖F̃(X) − F(X)‖, F the model's own forward, run again without interception, F̃ as recorded and as replayed
    adjoint_x   |⟨U, F̃(X) − F̃(0)⟩ − ⟨Uᵀ·T, X⟩| at a random U: left by replay, right by one backward pass
    adjoint_v   the same at a random V
    cuts        every operation whose X-dependent input became constant, by module path, with its rule
    """

    forward: float
    adjoint_x: float
    adjoint_v: float
    tolerance: float
    cuts: tuple[Cut, ...] = field(repr=False)

    def __str__(self):
        rules = ", ".join(f"{n} {rule}" for rule, n in sorted(Counter(c.rule for c in self.cuts).items()))
        exact = "exact" if self.worst <= self.tolerance else "NOT EXACT"
        return (
            f"{exact} to {self.tolerance:.0e}: forward {self.forward:.1e}, adjoint at X {self.adjoint_x:.1e}, "
            f"at a random V {self.adjoint_v:.1e}; held constant at X: {rules or 'nothing'}"
        )

    @property
    def worst(self) -> float:
        return max(np.nan_to_num([self.forward, self.adjoint_x, self.adjoint_v], nan=np.inf))

    def check(self) -> "Certificate":
        """Itself if every error is within ``tolerance``; otherwise ``ArithmeticError``."""
        if not self.worst <= self.tolerance:
            raise ArithmeticError(
                f"the operator must equal the model at X to {self.tolerance:.0e}, but is {self}. Linearise in float64 "
                "to tell rounding from error; an error that stays is a bug: please report the model's class"
            )
        return self


# ---------------------------------------------------------------------------------------------------- random probes


def hutchinson(R: Tensor) -> tuple[Tensor, Tensor]:
    """‖A‖²_F from K random probes: R (..., K, n) holds uᵀA for K sign vectors u; (estimate, its standard error), (...).

        E‖uᵀA‖² = tr G = ‖A‖²_F        Var‖uᵀA‖² = 2(‖G‖²_F − Σ_c G_cc²) ≤ 2‖G‖²_F        E⟨uᵀA, vᵀA⟩² = ‖G‖²_F

    with G = A·Aᵀ. The error is √(2‖G‖²_F/K), ‖G‖²_F from all pairs u ≠ v: a little too large. The probes' own spread
    would be too small whenever the estimate is too low, and its z-scores run away.
    """
    K = R.shape[-2]
    products = R @ R.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    G = (products.square().sum((-2, -1)) - squares.square().sum(-1)) / (K * (K - 1))
    return squares.mean(-1), (2 * G / K).sqrt()


# ---------------------------------------------------------------------------------------------------- the operator


class AttentionTensor:
    """T of shape (N, M, D', L, D), matrix-free, with F(X) = T·X + B(X); made by ``linearize``.

    Attributes: ``input`` X (N, L, D); ``output`` F(X) (N, M, D'); ``bias`` B(X) (N, M, D'); ``shape``; ``cuts``.
    For pixels at ``at="inputs"``, "L, D" stands for whatever shape the pixels have.

    >>> import torch
    >>> from tensorlens_utils import linearize_function
    >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> T = linearize_function(lambda x: torch.relu(x @ W), torch.ones(1, 3, 2))
    >>> T.shape
    (1, 3, 2, 3, 2)
    >>> torch.equal(T @ T.input + T.bias, T.output)
    True
    """

    def __init__(self, X, Y, tape, forward, cuts, rules, mask, budget_gb):
        self._X, self._Y, self.tape, self._forward = X, Y, tape, forward
        self.input, self.output = X.detach(), Y.detach()
        self.shape = (*Y.shape, *X.shape[1:])
        self.cuts, self.rules, self.mask, self.budget_gb = tuple(cuts), dict(rules), mask, budget_gb

    # -- products

    @torch.no_grad()
    def matvec(self, V: Tensor) -> Tensor:
        """T·V for V (N, L, D) → (N, M, D'): one replay without its additive terms."""
        return self.tape(self._like(V, self._X.shape, "V"), linear=True)

    @torch.no_grad()
    def replay(self, V: Tensor) -> Tensor:
        """F̃(V) = T·V + B, the frozen network at V (N, L, D) → (N, M, D')."""
        return self.tape(self._like(V, self._X.shape, "V"))

    def rmatvec(self, U: Tensor) -> Tensor:
        """Uᵀ·T for U (N, M, D') → (N, L, D), one backward pass; for K at once, (K, N, M, D') → (K, N, L, D)."""
        if U.dim() == self._Y.dim():
            return self._pull(self._Y, self._like(U, self._Y.shape, "U"))
        U = self._like(U, (len(U), *self._Y.shape), "U")
        return torch.cat([self._pull(self._Y, u, batched=True) for u in U.split(self.chunk)])

    def _pull(self, y: Tensor, U: Tensor, batched: bool = False) -> Tensor:
        return torch.autograd.grad(y, self._X, U, retain_graph=True, is_grads_batched=batched)[0]

    def _like(self, V: Tensor, shape: tuple, name: str) -> Tensor:
        if tuple(V.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have the shape {tuple(shape)}, not {tuple(V.shape)}; T has (outputs) x (inputs) "
                f"{tuple(self._Y.shape)} x {tuple(self._X.shape[1:])}"
            )
        return torch.empty_like(self._X).copy_(V) if name == "V" else V.to(self._Y)

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.matvec(V)

    def __rmatmul__(self, U: Tensor) -> Tensor:
        return self.rmatvec(U)

    @functools.cached_property
    def bias(self) -> Tensor:
        """B(X) (N, M, D'): the replay at X = 0."""
        return self.replay(torch.zeros_like(self.input))

    # -- slices and the dense tensor

    @property
    def chunk(self) -> int:
        """Cotangents that go back together: as many as keep the largest value of the network near the cache, 16 MB."""
        return max(1, int(16e6 / max(1, self.tape.widest)))

    def positions(self, position: int | Tensor = -1) -> Tensor:
        """One output position of each input, (N,): an int means the same for all, −1 each input's last unmasked token;
        an (N,) tensor counts masked positions too.
        """
        N, M = self._Y.shape[:2]
        at = torch.as_tensor(position, device=self._Y.device)
        mask = self.mask
        if at.dim() == 0 and at == -1 and mask is not None and mask.dim() == 2 and mask.shape[1] >= M > 1:
            at = (mask[:, -M:] * torch.arange(1, M + 1, device=mask.device)).argmax(1).to(self._Y.device)
        at = at.expand(N) if at.dim() == 0 else at
        if at.shape != (N,) or at.is_floating_point() or at.min() < -M or at.max() >= M:
            raise ValueError(f"position must be an int or ({N},) ints in [-{M}, {M}), the outputs, not {position}")
        return at

    @torch.enable_grad()
    def slice(self, position: int | Tensor = -1) -> Tensor:
        """T[:, position] (N, D', L, D), exact: D' cotangents, in chunks. ``position`` as in ``positions``."""
        at = self.positions(position)
        return self._rows(self._Y[torch.arange(len(at), device=at.device), at])

    def _rows(self, rows: Tensor) -> Tensor:
        """The gradients of every entry of ``rows`` (N, R) by X, as (N, R, L, D)."""
        N, R = rows.shape
        self.afford(N * R * self._X[0].numel(), "this part of T")
        out = self._X.new_empty((R, *self._X.shape))
        for k, U in self._units(R):
            out[k] = self._pull(rows, U[:, None].expand(-1, N, -1), batched=True)
        return out.transpose(0, 1)

    @functools.cached_property
    def _separate(self) -> bool:
        """Whether each output depends on its own input alone: one backward pass from the outputs of the first."""
        U = torch.zeros_like(self.output)
        U[0] = torch.randn(U[0].shape, generator=torch.Generator().manual_seed(0)).to(U)
        if len(U) > 1 and len(self._X) == len(U) and self.rmatvec(U)[1:].any():
            raise ValueError("the inputs of the batch mix, so T is not one operator for each: put the batch axis first "
                             "(batch_first=True), or linearise one input at a time")  # fmt: skip
        return True

    def _units(self, R: int):
        """The unit cotangents e_1..e_R in chunks: (their numbers k, their rows (K, R))."""
        assert self._separate
        for k in torch.arange(R, device=self._Y.device).split(self.chunk):
            yield k, self._Y.new_zeros((len(k), R)).scatter_(1, k[:, None], 1)

    @torch.enable_grad()
    def dense(self) -> Tensor:
        """T itself (N, M, D', L, D). Refused, with the size, where it is over ``budget_gb``."""
        self.afford(int(np.prod(self.shape)), "T")
        return self._rows(self._Y.flatten(1)).reshape(self.shape)

    def afford(self, entries: int, what: str) -> None:
        """Refuse a tensor of that many entries where it exceeds ``budget_gb``, before any work is done."""
        gb = entries * self._X.element_size() / 1e9
        if gb > self.budget_gb:
            raise MemoryError(
                f"{what} would take {gb:,.3g} GB, over the budget of {self.budget_gb:g} GB. Use products (T @ V, U @ T)"
                ", T.slice(position), T.norm() or T.svd(k), none of which forms T; or raise T.budget_gb"
            )

    # -- norms and singular values

    @torch.enable_grad()
    def norm(self, probes: int | None = None, seed: int = 0):
        """‖T‖_F per input, (N,): exact, streaming over the cotangents; or, with ``probes``, Hutchinson's estimate.

        With ``probes`` the *square* is estimated: (estimate of ‖T‖²_F, its standard error) of ``hutchinson``, each
        (N,), deterministic given ``seed``.
        """
        N = len(self._Y)
        if probes is None:
            total, y = 0, self._Y.flatten(1)
            for _, U in self._units(y.shape[1]):
                rows = self._pull(y, U[:, None].expand(-1, N, -1), batched=True)
                total += rows.double().flatten(2).square().sum((0, 2))
            return total.sqrt()
        if probes < 2:
            raise ValueError(f"a standard error needs at least 2 probes, not {probes}; probes=None is exact")
        signs = torch.randint(0, 2, (probes, *self._Y.shape), generator=torch.Generator().manual_seed(seed))
        return hutchinson(self.rmatvec((2.0 * signs - 1).to(self._Y)).double().flatten(2).transpose(0, 1))

    def to_scipy(self, n: int = 0) -> LinearOperator:
        """The unfolding of input ``n``'s T, (M·D') × (L·D), as scipy's LinearOperator (float64 outside)."""
        Y, X = self._Y, self._X

        def one(v, like):
            full = like.detach().new_zeros(like.shape)
            full[n] = torch.as_tensor(np.asarray(v).reshape(like.shape[1:])).to(like)
            return full

        def out(t):
            return t[n].detach().flatten().double().cpu().numpy()

        return LinearOperator(
            (Y[0].numel(), X[0].numel()), dtype=np.float64,
            matvec=lambda v: out(self.matvec(one(v, X))), rmatvec=lambda u: out(self.rmatvec(one(u, Y))),
        )  # fmt: skip

    def svd(self, k: int = 6, n: int = 0, seed: int = 0):
        """The ``k`` largest singular triplets of input ``n``'s unfolding: U (k, M, D'), S (k,) descending, V (k, L, D).

        Matrix-free: Lanczos (ARPACK) on ``to_scipy``. Signs make each V's largest entry positive; deterministic given
        ``seed``.
        """
        op, _ = self.to_scipy(n), self._separate
        if not 1 <= k < min(op.shape):
            raise ValueError(f"k must be in [1, {min(op.shape) - 1}] for an unfolding {op.shape}, not {k}; use dense()")
        u, s, vt = svds(op, k, v0=np.random.default_rng(seed).standard_normal(min(op.shape)))
        order = np.argsort(-s)
        u, s, vt = u.T[order], s[order], vt[order]
        sign = np.sign(vt[np.arange(k), np.abs(vt).argmax(1)])[:, None]
        U, V = torch.as_tensor(u * sign), torch.as_tensor(vt * sign)
        return U.view(k, *self._Y.shape[1:]), torch.as_tensor(s.copy()), V.view(k, *self._X.shape[1:])

    def operator_norm(self, n: int = 0) -> float:
        """‖T‖ of input ``n``, the largest singular value: the Lipschitz constant of the frozen network."""
        return float(self.svd(1, n)[1])

    # -- certificate and display

    def certificate(self, seed: int = 0) -> Certificate:
        """Measure how exact T is (see ``Certificate``); deterministic given ``seed``.

        The tolerance is what the lowest precision met on the way deserves (transformers computes some norms in float32
        even in a float64 model): 500 roundings, that is 1e-13 in float64, 6e-5 in float32, 4 % at most in bfloat16.
        """
        generator = torch.Generator().manual_seed(seed)

        def random(like):
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

        zero, U = self.bias.double(), random(self._Y)
        UT = self.rmatvec(U).double()

        def adjoint(V):
            move = self.replay(V).double() - zero
            left, right = (U.double() * move).flatten(1).sum(1), (UT * V.double()).flatten(1).sum(1)
            scale = U.double().flatten(1).norm(dim=1) * (move.flatten(1).norm(dim=1) + zero.flatten(1).norm(dim=1))
            gap = (self.matvec(V).double() - move).norm() / (move.norm() + zero.norm()).clamp_min(1e-300)
            return max(float(gap), float(((left - right).abs() / scale.clamp_min(1e-300)).max()))

        F = self._forward().double()
        ours = (self.output.double(), self.replay(self.input).double())  # as recorded, and as replayed
        forward = max(float((y - F).norm() / F.norm().clamp_min(1e-300)) for y in ours)
        V = random(self._X) * self.input.std()
        tolerance = min(500 * self.tape.precision, 0.04)
        return Certificate(forward, adjoint(self.input), adjoint(V), tolerance, self.cuts)

    def __repr__(self):
        return f"AttentionTensor{self.shape}, {self._gb:,.3g} GB if dense, rules {self.rules}"

    @property
    def _gb(self) -> float:
        return float(np.prod(self.shape, dtype=float)) * self._X.element_size() / 1e9

    def _repr_html_(self):
        rows = {
            "shape (N, M, D′, L, D)": self.shape,
            "if dense": f"{self._gb:,.3g} GB",
            "rules": ", ".join(f"{k} {v if isinstance(v, str) else v.__name__}" for k, v in self.rules.items()),
            "certificate": self.certificate(),
        }
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        return f"<table><caption>AttentionTensor: F(X) = T·X + B(X)</caption>{cells}</table>"
