"""Pruning attention: which heads, and which coefficients inside heads, a model can do without, by several measures.

A head whose pattern A is 0 writes nothing; inside a head, coefficients of A in the Haar basis of two trees are set to 0
or, as a rival, entries of A itself. The model goes on with what is left (``patterns.capture``), the patterns of later
layers included. Scores are taken on some inputs, and what removal costs is measured on others.

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
from ..patterns import capture
from . import Haar, largest
from .sparsity import l1_entropy

Loss = Callable[[Any], Tensor]  # from a model's output to the loss of each input, (N,)


def cross_entropy(labels: Tensor) -> Loss:
    """The loss of a classifier on labels (N,), in nats."""
    return lambda output: F.cross_entropy(output.logits, labels, reduction="none")


def error(labels: Tensor) -> Loss:
    """1 where a classifier's first choice is not the label (N,), else 0."""
    return lambda output: (output.logits.argmax(-1) != labels).float()


def next_token(ids: Tensor) -> Loss:
    """The mean loss of a language model over the tokens of each text (N, L) but the first, in nats: log perplexity."""
    return lambda output: F.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


def keep(scores: Tensor, share: float) -> Tensor:
    """A bool tensor with the ``share`` of the largest scores, over all of them; of equals, those that come first."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share is in [0, 1], not {share!r}; of a count, take count / scores.numel()")
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
    p = _capture(model, inputs)
    N, layers, H = p.probabilities.shape[:3]
    gate = torch.ones(N, layers, H, device=p.probabilities.device, requires_grad=True)
    output = capture(model, inputs, lambda layer, A: A * gate[:, layer, :, None, None]).output
    (gradient,) = torch.autograd.grad(loss(output).sum(), gate)
    magnitude = []
    for layer in run(model, inputs).layers:
        W = layer.W.reshape(H, -1, layer.W.shape[1])
        magnitude.append((layer.A @ layer.V @ W).flatten(2).norm(dim=-1).mean(0))
    scores = {"magnitude": torch.stack(magnitude), "gradient": gradient.abs().mean(0)}
    if haar is not None:
        c = haar.analysis(p.probabilities)
        scores["entropy"] = l1_entropy(c, haar).mean(0)
        scores["energy"] = l1_entropy(c.square(), haar).mean(0)
    return {name: score.detach().cpu() for name, score in scores.items()}


def pruned_heads(model: nn.Module, inputs, loss: Loss, kept: Tensor) -> Tensor:
    """The loss of each input (N,) with the heads that ``kept`` (layers, H) does not tell written out of the model."""
    return _loss(model, inputs, loss, lambda layer, A: A * kept[layer].to(A)[:, None, None])


# ------------------------------------------------------------------------------------------------ coefficients of heads


def coefficient_scores(model: nn.Module, inputs, loss: Loss, haar: Haar | None = None) -> dict[str, Tensor]:
    """How much each coefficient of each pattern does, (layers, H, S, S): "magnitude", its mean modulus over the inputs,
    and "gradient", that of c·∂L/∂c. Coefficients are those in ``haar``, or without it the entries of A.
    """
    p = _capture(model, inputs)
    change = torch.zeros_like(p.probabilities, requires_grad=True)
    output = capture(model, inputs, lambda layer, A: A + change[:, layer]).output
    (g,) = torch.autograd.grad(loss(output).sum(), change)
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

    Entries that the mask forbids stay 0.
    """

    def pruned(layer: int, A: Tensor) -> Tensor:
        c = haar.analysis(A) if haar else A
        if isinstance(kept, Tensor):
            c = c * kept[layer].to(c)
        else:
            c = largest(c, round(kept * c.shape[-over:].numel()), over)
        return (haar.synthesis(c) if haar else c) * (A > 0)

    return _loss(model, inputs, loss, pruned)


@torch.no_grad()
def _capture(model, inputs):
    return capture(model, inputs)


@torch.no_grad()
def _loss(model: nn.Module, inputs, loss: Loss, replace: Callable) -> Tensor:
    return loss(capture(model, inputs, replace).output).cpu()
