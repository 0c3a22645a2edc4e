"""Relation decoders: from a subject's state s to an estimate of o, the last state before the final norm and head.

Every decoder is an affine map, fitted to a few examples (s_i, o_i) of a relation, with the model's own norm and head
applied to what it gives (Hernandez et al., arXiv 2308.09124, "LRE", §3; TensorLens, 2601.17958, its relation decoding):

    decode(s) = β·W·s + b

    name          W                                    b                       needs
    ----          -                                    -                       -----
    tensor        mean of T_i, all frozen              mean of o_i − W_i·s_i   a linearisation for each example
    lre           mean of J_i = ∂o_i/∂s_i              mean of o_i − W_i·s_i   the same, all tangent
    tensor, ...   mean of T_i, one rule of it tangent  mean of o_i − W_i·s_i   the same, so
    ridge         argmin Σ‖o_i − W·s_i − b‖² + λ‖W‖²   from the same           states only
    translation   the identity                         mean of o_i − s_i       states only
    bias          0                                    mean of o_i             states only
    identity      the identity                         0 (the logit lens)      nothing

For "tensor", b is T's own bias and what all positions but the subject's contribute. `examples_of` says where s, o and W
come from; what it is given makes the controls: prompts without examples (zero-shot), objects dealt anew, another
relation's W (`Examples.of_other`).

>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.relations import world_relations
>>> from tensorlens_utils.relations.subjects import Asked
>>> model, tokenizer = load_model("tiny-gpt")
>>> capital = world_relations()["country_capital"]
>>> train, test = capital.split(5, seed=0)
>>> learned = Asked(model, tokenizer, [capital.prompt(x, train) for x in train])
>>> examples = examples_of(learned, [0])[0]
>>> asked = Asked(model, tokenizer, [capital.prompt(x, train) for x in test])
>>> decoder = fit("tensor", examples)
>>> guesses = asked.head(decoder.decode(asked.s[0])).argmax(-1)
>>> bool((guesses == asked.logits.argmax(-1)).float().mean() > 0.2)
True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .subjects import FROZEN, TANGENT, Asked, check_ranks

# Decoders with a W from the model itself, and the rules that give it; between the two, those with one rule tangent.
RULES = {"tensor": FROZEN, "lre": TANGENT, "tensor, attention tangent": {"attention": "tangent"},
         "tensor, norm tangent": {"norm": "tangent"},
         "tensor, FFN tangent": {"activation": "tangent", "gate": "tangent"}}  # fmt: skip
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of ridge, in units of the mean squared spread of s


@dataclass(frozen=True)
class Examples:
    """What n prompts give a decoder to learn from, at one boundary: s (n, d), o (n, d) and, by the decoder's name, W
    (n, d, d), one matrix for each example."""

    s: Tensor
    o: Tensor
    W: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.s)

    def without(self, i: int) -> Examples:
        """All but example i."""
        keep = torch.arange(len(self)) != i
        return Examples(self.s[keep], self.o[keep], {name: W[keep] for name, W in self.W.items()})

    def of_other(self, other: Examples) -> Examples:
        """These s and o with the mean W of another relation: a control, which keeps the bias that is its own."""
        W = {name: W.mean(0).expand(len(self), *W.shape[1:]) for name, W in other.W.items()}
        return replace(self, W=W)


def examples_of(asked: Asked, layers: Sequence[int], decoders: Sequence[str] = ("tensor", "lre"),
                **options) -> dict[int, Examples]:  # fmt: skip
    """Examples at each of these boundaries, with the W that each of these decoders asks for (others ask for none);
    `options` are those of `Asked.matrices`. All boundaries come from the same passes, and are held at once: n·d²
    numbers for each boundary and decoder (with 5 examples, d = 4096, in float32: 0.3 GB each)."""
    W = {name: asked.matrices(layers, **options, **RULES[name]) for name in decoders if name in RULES}
    o = asked.o if asked.steps == 1 else asked.o[:, options.get("step", 0)]
    return {k: Examples(asked.s[k], o, {name: found[k] for name, found in W.items()}) for k in layers}


# ------------------------------------------------------------------------------------------------------- the decoders


@dataclass(frozen=True)
class Decoder:
    """decode(s) = β·W·s + b, with W (d, d) and b (d,)."""

    W: Tensor
    b: Tensor
    beta: float = 1.0

    def decode(self, s: Tensor) -> Tensor:
        """Estimates of o, (n, d), from s (n, d)."""
        return self.beta * s @ self.W.T + self.b

    def truncated(self, rank: int) -> Decoder:
        """With W_r, the r largest singular values of W, in its place; b stays, as in LRE."""
        U, S, V = self._svd(rank)
        return replace(self, W=(U * S) @ V)

    def edit(self, difference: Tensor, rank: int) -> Tensor:
        """Δs = W†_r·(o' − o) for differences (n, d), W†_r = V_r·S_r⁻¹·U_rᵀ: the smallest change of s that, as W_r has
        it, changes o so (LRE, §3.4). Singular values that are zero but for rounding are left out, as `pinv` does."""
        U, S, V = self._svd(rank)
        there = S > torch.finfo(S.dtype).eps * max(self.W.shape) * S[0]
        return difference @ (U / S.where(there, torch.inf)) @ V

    def _svd(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        check_ranks([rank], min(self.W.shape))
        U, S, V = self._whole_svd
        return U[:, :rank], S[:rank], V[:rank]

    @functools.cached_property
    def _whole_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(self.W)


def _by_matrix(s: Tensor, o: Tensor, W: Tensor) -> Decoder:
    return Decoder(W.mean(0), (o - (W @ s[..., None])[..., 0]).mean(0))


def _ridge(x: Examples) -> Decoder:
    """The λ of `PENALTIES` is chosen by leaving out one example after the other, which the hat matrix gives at once:
    what is left is (o_i − ô_i)/(1 − H_ii)."""
    s, o = x.s - x.s.mean(0), x.o - x.o.mean(0)
    if s.norm() <= 4 * len(x) * torch.finfo(s.dtype).eps * x.s.norm():  # all equal: what is left is rounding
        s = torch.zeros_like(s)
    kernel, eye = s @ s.T, torch.eye(len(x), dtype=x.s.dtype, device=x.s.device)
    unit = kernel.diagonal().mean() or 1.0  # of one example nothing is learned but its o
    best = None
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(kernel + penalty * unit * eye)
        hat = kernel @ inverse + 1 / len(x)
        error = ((o - hat @ o) / (1 - hat.diagonal())[:, None].clamp_min(1e-6)).square().sum()
        if best is None or error < best[0]:
            best = error, (inverse @ o).T @ s
    return Decoder(best[1], x.o.mean(0) - x.s.mean(0) @ best[1].T)


def _identity(x: Examples) -> Tensor:
    return torch.eye(x.s.shape[1], dtype=x.s.dtype, device=x.s.device)


DECODERS: dict[str, Callable[[Examples], Decoder]] = {
    **{name: lambda x, name=name: _by_matrix(x.s, x.o, x.W[name]) for name in RULES},
    "ridge": _ridge,
    "translation": lambda x: Decoder(_identity(x), (x.o - x.s).mean(0)),
    "bias": lambda x: Decoder(torch.zeros_like(_identity(x)), x.o.mean(0)),
    "identity": lambda x: Decoder(_identity(x), torch.zeros_like(x.o[0])),
}


def fit(name: str, examples: Examples, beta: float = 1.0, rank: int | None = None) -> Decoder:
    """A decoder of `DECODERS`, fitted to examples; β scales W alone, and `rank` cuts it after b was taken, as LRE does.

    Raises ValueError for a name that is none, for a matrix that the examples do not have, and for a rank out of bounds.
    """
    if name not in DECODERS:
        raise ValueError(f"a decoder is one of {', '.join(map(repr, DECODERS))}, not {name!r}")
    if name in RULES and name not in examples.W:
        raise ValueError(f"the decoder {name!r} needs its matrix of each example, and these have "
                         f"{', '.join(map(repr, examples.W)) or 'none'}: examples_of(..., decoders=[{name!r}])")
    found = replace(DECODERS[name](examples), beta=beta)
    return found if rank is None else found.truncated(rank)
