"""Pruning attention: which heads, and which coefficients inside heads, a model can do without, by several measures.

A head whose pattern A is 0 writes nothing; inside a head, coefficients of A in the Haar basis of two trees are set to 0
or, as a rival, entries of A itself. The model goes on with what is left (``patterns.capture``), the patterns of later
layers included. Scores are taken on some inputs, and what removal costs is measured on others. Padding counts
nowhere: ``next_token`` is told of it, heads' scores leave it out, coefficients, which stand at positions, refuse it.

>>> from tensorlens_utils import load_data, load_model
>>> model, processor = load_model("tiny-vit")
>>> rows = load_data("digits")[:8]
>>> inputs = processor(rows["image"], return_tensors="pt")
>>> loss = cross_entropy(torch.tensor(rows["label"]))
>>> kept = keep(head_scores(model, inputs, loss)["gradient"], 12 / 16)
>>> int(kept.sum()), pruned_heads(model, inputs, loss, kept).shape
(12, torch.Size([8]))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attentions import run
from ..patterns import Patterns, capture
from . import Haar, largest
from .sparsity import l1_entropy

Loss = Callable[[Any], Tensor]  # from a model's output to the loss of each input, (N,)


def cross_entropy(labels: Tensor) -> Loss:
    """The loss of a classifier on labels (N,), in nats."""
    return lambda output: F.cross_entropy(output.logits, labels, reduction="none")


def error(labels: Tensor) -> Loss:
    """1 where a classifier's first choice is not the label (N,), else 0."""
    return lambda output: (output.logits.argmax(-1) != labels).float()


def next_token(ids: Tensor, mask: Tensor | None = None) -> Loss:
    """The mean loss of a language model over the tokens of each text (N, L) but the first, in nats: log perplexity.

    ``mask`` (N, L) is the inputs' attention_mask; padded batches need it, or padding counts as text. Tokens −100 are
    left out too. Raises ValueError for a text without two tokens that follow one another.
    """
    told = ids[:, 1:] != -100
    if mask is not None:
        told = told & mask[:, 1:].bool() & mask[:, :-1].bool()
    if not told.any(1).all():
        raise ValueError("the loss is of a token after another, and text "
                         f"{told.any(1).int().argmin()} of {len(ids)} has none; leave it out")  # fmt: skip

    def loss(output):
        nats = F.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:], reduction="none")
        return nats.masked_fill(~told, 0).sum(1) / told.sum(1)

    return loss


def keep(scores: Tensor, share: float) -> Tensor:
    """A bool tensor with the ``share`` of the largest scores, over all of them; of equals, those that come first."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share is in [0, 1], not {share!r}; of a count, take count / scores.numel()")
    if not scores.isfinite().all():
        raise ValueError(f"scores are compared, and {(~scores.isfinite()).sum()} of these {scores.numel()} are not "
                         "finite: see what they were taken on")  # fmt: skip
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]] = True
    return kept.view(scores.shape)


# ---------------------------------------------------------------------------------------------------------- whole heads


def head_scores(model: nn.Module, inputs, loss: Loss, haar: Haar | None = None) -> dict[str, Tensor]:
    """How much each head does, by measure, (layers, H) each, a mean over the inputs; the lowest are removed first.

    magnitude  ‖A V W_O‖_F, what the head writes
    gradient   |∂L/∂ξ|, ξ a factor on the head, 1 (Michel, Levy and Neubig 2019)
    entropy    the papers' bi-Haar 'ℓ1 entropy' of A, with ``haar`` on queries × keys: low is sparse, as they propose
    energy     Σ c² of the same coefficients
    """
    if haar is not None:
        _check_unpadded(inputs)
    p, gradient = _by_replaced(model, inputs, loss, _factors, torch.mul)
    H, real, magnitude = p.probabilities.shape[2], _real(inputs), []
    for layer in run(model, inputs).layers:
        write = layer.A @ layer.V @ layer.W.reshape(H, -1, layer.W.shape[1])
        if real is not None:
            write = write.masked_fill(~real[:, None, :, None], 0)
        magnitude.append(write.flatten(2).norm(dim=-1).mean(0))
    scores = {"magnitude": torch.stack(magnitude), "gradient": gradient[..., 0, 0].abs().mean(0)}
    if haar is not None:
        c = haar.analysis(p.probabilities)
        scores["entropy"] = l1_entropy(c, haar).mean(0)
        scores["energy"] = l1_entropy(c.square(), haar).mean(0)
    return {name: score.detach().cpu() for name, score in scores.items()}


def pruned_heads(model: nn.Module, inputs, loss: Loss, kept: Tensor) -> Tensor:
    """The loss of each input (N,) with the heads that ``kept`` (layers, H) does not tell written out of the model."""
    return _loss(model, inputs, loss, kept, 2, lambda A, kept: A * kept[:, None, None])


# ------------------------------------------------------------------------------------------------ coefficients of heads


def coefficient_scores(model: nn.Module, inputs, loss: Loss, haar: Haar | None = None) -> dict[str, Tensor]:
    """How much each coefficient of each pattern does, (layers, H, S, S): "magnitude", its mean modulus over the inputs,
    and "gradient", that of c·∂L/∂c. Coefficients are those in ``haar``, or without it the entries of A. Of texts of one
    length, without padding.
    """
    _check_unpadded(inputs)
    p, g = _by_replaced(model, inputs, loss, torch.zeros_like, torch.add)
    g = g * (p.probabilities > 0)  # what the mask forbids stays 0 when coefficients go
    c, g = (haar.analysis(x) if haar else x for x in (p.probabilities, g))  # ∂L/∂c, the basis being orthonormal
    return {"magnitude": c.abs().mean(0).cpu(), "gradient": (c * g).abs().mean(0).cpu()}


def pruned_coefficients(model: nn.Module, inputs, loss: Loss, kept: Tensor | float, haar: Haar | None = None,
                        over: int = 3) -> Tensor:  # fmt: skip
    """The loss of each input (N,) with some coefficients of every pattern removed.

    Args:
        kept: (layers, H, S, S) bool, which stay, the same for every input; or the share that stays of each input's own.
        haar: the basis on queries × keys; None: the entries of A. A causal model calls for ``Haar(None, tree)``, on the
            keys alone: with a tree on the queries too, what is left of a row has heard of later rows, and so of later
            tokens.
        over: with a share, the largest of each query (1), of each head (2) or of all heads of a layer (3).

    Entries that the mask forbids stay 0. Texts are of one length, without padding.
    """
    _check_unpadded(inputs)
    if not isinstance(kept, Tensor) and not 0 <= kept <= 1:
        raise ValueError(f"a share is in [0, 1], not {kept!r}")

    def pruned(A: Tensor, kept: Tensor | float) -> Tensor:
        c = haar.analysis(A) if haar else A
        c = c * kept if isinstance(kept, Tensor) else largest(c, round(kept * c.shape[-over:].numel()), over)
        return (haar.synthesis(c) if haar else c) * (A > 0)

    return _loss(model, inputs, loss, kept, 4, pruned)


def _factors(A: Tensor) -> Tensor:
    """1 for each head, in float32 or wider: (N, H, 1, 1)."""
    return torch.ones_like(A[..., :1, :1], dtype=torch.promote_types(A.dtype, torch.float32))


@torch.enable_grad()
def _by_replaced(model: nn.Module, inputs, loss: Loss, start: Callable, join: Callable) -> tuple[Patterns, Tensor]:
    """The model's own run, and the derivatives (N, layers, …) of the losses by what is joined to each pattern A; A is
    left as it is by its value, ``start(A)``."""
    joined = []

    def replace(layer, A):
        joined.append(start(A.detach()).requires_grad_())
        return join(A, joined[-1])

    p = capture(model, inputs, replace)
    return p, torch.stack(torch.autograd.grad(loss(p.output).sum(), joined), 1)


@torch.no_grad()
def _loss(model: nn.Module, inputs, loss: Loss, kept: Tensor | float, dims: int, pruned: Callable) -> Tensor:
    """The loss with each pattern A replaced by pruned(A, its row of ``kept``), where that is a tensor of ``dims``."""

    each = isinstance(kept, Tensor)

    def refuse(A):
        raise ValueError(f"what is kept is told for each attention of the model, {tuple(A.shape[1:dims])} a layer, and "
                         f"here it is of shape {tuple(kept.shape)}: take it from scores of this model on such inputs")

    def replace(layer, A):
        if each and (layer >= len(kept) or kept.shape[1:] != A.shape[1:dims]):
            refuse(A)
        return pruned(A, kept[layer].to(A) if each else kept)

    p = capture(model, inputs, replace)
    if each and len(kept) > len(p.layers):
        refuse(p.probabilities[:, 0])
    return loss(p.output).cpu()


def _real(inputs) -> Tensor | None:
    """Which positions (N, S) are no padding, where the inputs say so."""
    mask = dict(inputs.items()).get("attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def _check_unpadded(inputs) -> None:
    real = _real(inputs)
    if real is not None and not real.all():
        raise ValueError(f"coefficients stand at positions, and {int((~real).any(1).sum())} of these {len(real)} texts "
                         "are padded: cut all to one length, or take them one at a time")  # fmt: skip
