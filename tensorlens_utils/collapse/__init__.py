"""From T to maps over tokens: how much, or how, each token j of the input enters output position i.

    norm     M[i, j] = ‖T[i, :, j, :]‖_F
    in       M[i, j] = ‖Σ_d T[i, :, j, d] X[j, d]‖
    out      M[i, j] = ‖Σ_c Y[i, c] T[i, c, j, :]‖                  Y = F(X)
    in_out   M[i, j] = Σ_{c,d} Y[i, c] T[i, c, j, d] X[j, d]        Σ_j M[i, j] + ⟨Y_i, B_i⟩ = ‖Y_i‖²
    class    r[j]    = Σ_{c,d} w[c] T[i, c, j, d] X[j, d]           Σ_j r[j] + ⟨w, B_i⟩ = ⟨w, Y_i⟩

These are TensorLens's collapses (arXiv 2601.17958; its T_IO and T_CLS are in_out and class) as products with T, which
is never formed, nor is a slice of it: out, in_out and class take one backward pass for the whole batch, norm D' of them
or as many as it has random probes, in L replays with one token kept. They are for one output position i of each input,
or, with ``position=None``, for every i, the whole map (N, M, L), which takes M times as much (but for in, as much).

The last two are exact splits: what they leave to the bias is handed over beside the scores, as a ``Split``. For a map
from a layer on, or through part of the depth, choose ``at`` and ``to`` where T is made. As everywhere, an input's
outputs must not depend on the others of its batch, which ``T.slice`` verifies at the price of one more backward pass.

``METHODS`` holds the five as attributions, which is how perturbation.py compares them with the rivals of baselines.py.

>>> from tensorlens_utils import linearize, load_data, load_model
>>> model, processor = load_model("tiny-vit")
>>> T = linearize(model, processor(load_data("digits")[:2]["image"], return_tensors="pt"))
>>> split = class_map(T)
>>> split.scores.shape, bool(torch.allclose(split.total, T.output[:, 0].amax(-1), atol=1e-4))
(torch.Size([2, 16]), True)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..linearize import linearize
from ..models import n_blocks
from ..tensor import AttentionTensor, hutchinson


@dataclass(frozen=True)
class Split:
    """A number, or a map of them, split exactly over the tokens and the bias: ``scores`` (..., L) and ``bias`` (...).
    """

    scores: Tensor
    bias: Tensor

    @property
    def total(self) -> Tensor:
        """What was split, (...): the scores' sum and the bias."""
        return self.scores.sum(-1) + self.bias


def norm_map(T: AttentionTensor, position: int | Tensor | None = -1, probes: int | None = None, seed: int = 0):
    """‖T[i, :, j, :]‖_F, (N, L), or (N, M, L) where ``position`` is None: exact, streaming over D' cotangents.

    With ``probes`` the *square* is estimated, by ``tensor.hutchinson`` with A = T[i, :, j, :]: returns (estimate, its
    standard error), deterministic given ``seed``.
    """
    if position is None:
        rows = [norm_map(T, i, probes, seed) for i in range(T.output.shape[1])]
        stacked = torch.stack([torch.stack(row) if probes else row for row in rows], -2)
        return tuple(stacked) if probes else stacked
    (N, M, C), at = T.output.shape, _positions(T, position)

    def pulled(u):  # uᵀ·T[i], (K, N, L, D), for K output vectors u (K, N, D') at the positions i
        U = T.output.new_zeros(len(u), N, M, C)
        U[:, torch.arange(N, device=at.device), at] = u.to(U)
        return T.rmatvec(U).double()

    if probes is None:
        units = torch.eye(C, device=at.device)
        return sum(pulled(u[:, None].expand(-1, N, -1)).square().sum((0, -1)) for u in units.split(T.chunk)).sqrt()
    if probes < 2:
        raise ValueError(f"a standard error needs at least 2 probes, not {probes}; probes=None is exact")
    signs = 2.0 * torch.randint(0, 2, (probes, N, C), generator=torch.Generator().manual_seed(seed)) - 1
    return hutchinson(torch.cat([pulled(u) for u in signs.split(T.chunk)]).movedim(0, -2))


def in_map(T: AttentionTensor, position: int | Tensor | None = -1) -> Tensor:
    """‖Σ_d T[i, :, j, d] X[j, d]‖, (N, L), or (N, M, L) where ``position`` is None: L replays with one token kept."""
    at, columns = _positions(T, -1 if position is None else position), []
    for j in range(T.input.shape[1]):
        V = torch.zeros_like(T.input)
        V[:, j] = T.input[:, j]
        columns.append(_at(T.matvec(V).norm(dim=-1), None if position is None else at))
    return torch.stack(columns, -1)


def out_map(T: AttentionTensor, position: int | Tensor | None = -1) -> Tensor:
    """‖Σ_c Y[i, c] T[i, c, j, :]‖ with Y = F(X), (N, L), or (N, M, L) where ``position`` is None."""
    return _rows(T, T.output, position, lambda G: G.norm(dim=-1))


def in_out_map(T: AttentionTensor, position: int | Tensor | None = -1) -> Split:
    """Σ_{c,d} Y[i, c] T[i, c, j, d] X[j, d] with Y = F(X): the scores (N, L) and ⟨Y_i, B_i⟩ (N,), ‖Y_i‖² in total; or
    (N, M, L) and (N, M) where ``position`` is None."""
    return _split(T, T.output, position)


def class_map(T: AttentionTensor, target: Tensor | None = None, position: int | Tensor | None = -1) -> Split:
    """Σ_{c,d} w[c] T[i, c, j, d] X[j, d]: the scores (N, L) and ⟨w, B_i⟩ (N,), ⟨w, F(X)_i⟩ in total; or (N, M, L) and
    (N, M) where ``position`` is None.

    ``target`` says what is split: output entries (N,), such as classes or tokens; pairs of them (N, 2), for their
    contrast, the first less the second (with ``position=None`` an (N, M) is an entry for each position); w itself, real
    numbers (N, D'); None: the largest entry at the position, the model's own prediction.
    """
    return _split(T, directions(T, target, position), position)


def directions(T: AttentionTensor, target: Tensor | None, position: int | Tensor | None = -1) -> Tensor:
    """The output vectors w that ``target`` stands for (see ``class_map``), at every position: (N, M, D')."""
    N, M, C = T.output.shape
    if target is None:
        best = T.output.argmax(-1)
        target = best if position is None else _at(best, T.positions(position))
    w = torch.as_tensor(target, device=T.output.device)
    pairs = position is not None and w.shape == (N, 2)
    if not w.is_floating_point() and (pairs or w.shape in ((N,), (N, M))) and 0 <= w.min() and w.max() < C:
        w = nn.functional.one_hot(w.long(), C)
        w = w[:, 0] - w[:, 1] if pairs else w
    elif not w.is_floating_point() or w.shape != (N, C):
        raise ValueError(f"target must be ({N},) output entries in [0, {C}), or pairs of them ({N}, 2), or output "
                         f"vectors ({N}, {C}), or None for the model's prediction; not {w.dtype} of the shape "
                         f"{tuple(w.shape)}, such as {target}")
    return (w if w.dim() == 3 else w[:, None].expand(N, M, C)).to(T.output)


def _split(T: AttentionTensor, U: Tensor, position) -> Split:
    at = None if position is None else _positions(T, position)
    return Split(_rows(T, U, position, lambda G: (G * T.input).sum(-1)), _at((U * T.bias).sum(-1), at))


def _rows(T: AttentionTensor, U: Tensor, position, collapse: Callable) -> Tensor:
    """``collapse`` of U[:, i]ᵀ·T[:, i], (N, L, D), at one position i: (N, L); or at each in turn: (N, M, L)."""
    if position is None:
        return torch.stack([_rows(T, U, i, collapse) for i in range(U.shape[1])], 1)
    kept, at, n = torch.zeros_like(U), _positions(T, position), torch.arange(len(U), device=U.device)
    kept[n, at] = U[n, at]
    return collapse(T.rmatvec(kept))


def _at(values: Tensor, at: Tensor | None) -> Tensor:
    """``values`` (N, M) at one position of each input, (N,); all of them for None."""
    return values if at is None else values[torch.arange(len(at), device=at.device), at]


def _positions(T: AttentionTensor, position: int | Tensor) -> Tensor:
    if T.input.dim() != 3 or T.output.dim() != 3:
        raise ValueError(f"a map over tokens needs an X of tokens (N, L, D) and an F(X) (N, M, D'), not "
                         f"{tuple(T.input.shape)} and {tuple(T.output.shape)}; linearize at='tokens', not at pixels")
    return T.positions(position)


# ------------------------------------------------------------------------------------------------------ attributions


def _class(model: nn.Module, inputs, target, position=-1) -> Tensor:
    """The class map of the logits."""
    T = linearize(model, inputs)
    return _unpadded(_rows(T, directions(T, target, position), position, lambda G: (G * T.input).sum(-1)), inputs)


def collapsed(name: str, model: nn.Module, inputs, target=None, position=-1, at="tokens") -> Split | Tensor:
    """One of ``METHODS``, from the boundary ``at`` on (as in ``linearize``), as it comes: a ``Split`` where it is one.

    Its tokens (N, L) are those of X there: behind the embeddings a vision model's class token stands before its
    patches. ``target`` and ``position`` are those of ``METHODS``.

    All but the class map are of the last hidden state at the position that the logits are read from. That is the
    paper's operator, of tokens and hidden states; the head enters the class map alone. Where a classifier reads more
    than one position (a mean over them), no row is its own, and F is its class vector instead.

    >>> from tensorlens_utils import load_data, load_model
    >>> model, processor = load_model("tiny-vit")
    >>> inputs = processor(load_data("digits")[:2]["image"], return_tensors="pt")
    >>> collapsed("in_out", model, inputs, at=2).scores.shape  # 16 patches, and the class token
    torch.Size([2, 17])
    """
    if name == "class":
        return class_map(linearize(model, inputs, at=at), target, position)
    if name not in COLLAPSES:
        raise ValueError(f"a collapse is one of {', '.join(map(repr, METHODS))}, not {name!r}")
    head = linearize(model, inputs, at=n_blocks(model))  # from the last block's output to the logits
    if head.output.shape[1] > 1:
        T, row = linearize(model, inputs, at=at, to="last_hidden_state"), head.positions(position)
    else:
        read = head.rmatvec(torch.ones_like(head.output)).abs().sum(-1) > 0
        one = bool((read.sum(1) == 1).all())
        T = linearize(model, inputs, at=at, to="last_hidden_state" if one else None)
        row = read.int().argmax(1) if one else 0
    return COLLAPSES[name](T, row)


def _hidden(name: str, model: nn.Module, inputs, target, position=-1) -> Tensor:
    scores = collapsed(name, model, inputs, target, position)
    return _unpadded(scores.scores if isinstance(scores, Split) else scores, inputs)


def _unpadded(scores: Tensor, inputs) -> Tensor:
    mask = dict(inputs).get("attention_mask")
    return scores if mask is None or mask.shape != scores.shape else scores * mask


COLLAPSES: dict[str, Callable] = {"in_out": in_out_map, "in": in_map, "out": out_map, "norm": norm_map}
METHODS: dict[str, Callable] = {"class": _class} | {name: partial(_hidden, name) for name in COLLAPSES}
"""name: method(model, inputs, target, position=-1) -> relevance (N, L) of each token, 0 for padding. ``inputs`` is the
processor's output; ``target`` (N,) the output entries, which the class map alone heeds; ``position`` an int (-1: the
last unmasked) or (N,), for models that answer at every token."""
