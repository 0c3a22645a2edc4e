"""One run of a transformer, and in it every layer's attention with the vectors that it moves: A, V, W_O, norms.

No family is named: attention is found by what flows (see `_Attentions`), the row that the output reads by which rows of
the last layer the logits have a derivative. This is what the published maps of baselines.py are made of.

>>> from tensorlens_utils import load_data, load_model
>>> model, processor = load_model("tiny-vit")
>>> inputs = processor(load_data("digits")[:2]["image"], return_tensors="pt")
>>> r = run(model, inputs)
>>> r.layers[-1].A.shape, r.rows[0].nonzero().flatten()
(torch.Size([2, 4, 17, 17]), tensor([0]))
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .linearize import untouched
from .models import find_blocks, n_blocks, token_embedding

# --------------------------------------------------------------------------------------------------------- what is kept


@dataclass
class Layer:
    """One block of one run: x (N, S, D) enters it and `out` leaves it; `A` (N, H, S, S), `V` (N, H, S, d), W (H·d, D)
    and `o` (N, S, D) are its attention, values (b_V in them), W_O and what the attention writes (b_O in it); `weights`
    is A as the model has it, in its graph; `norms` lists the norms that ran after it: (module, input, output)."""

    x: Tensor
    weights: Tensor | None = None
    A: Tensor | None = None
    V: Tensor | None = None
    W: Tensor | None = None
    o: Tensor | None = None
    out: Tensor | None = None
    norms: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)


@dataclass
class Run:
    """One run: its layers; `answer` (N,), the entry of the output; `rows` (N, S), how much the output reads of each."""

    layers: list[Layer]
    answer: Tensor
    rows: Tensor
    tokens: int
    mask: Tensor | None

    def read(self, r: Tensor) -> Tensor:
        """(N, S) over the stream -> (N, L) over the tokens: prefixes left out, padding 0."""
        return unpadded(r[:, -self.tokens :], self.mask)

    def row(self, M: Tensor) -> Tensor:
        """The row of a map (N, S, S) that the output reads, over the tokens."""
        return self.read((self.rows[:, None] @ M)[:, 0])

    def rollout(self, maps: list[Tensor]) -> Tensor:
        """That row of M_n ⋯ M_1, for one map a layer, first to last: one row through one matrix at a time."""
        r = self.rows[:, None]
        for M in reversed(maps):
            r = r @ M
        return self.read(r[:, 0])

    def gradients(self, layers: list[Layer]) -> list[Tensor]:
        """∂(answer)/∂A, (N, H, S, S) for each layer; of a run with its graph, once."""
        ones = torch.ones_like(self.answer)
        G = torch.autograd.grad(self.answer, [layer.weights for layer in layers], ones)
        return [g.reshape(layer.A.shape) for g, layer in zip(G, layers, strict=True)]


# -------------------------------------------------------------------------------------------------------------- the run


PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


class _Attentions(TorchFunctionMode):
    """Finds each layer's attention while the model runs: a product A·V of two activations whose result, its heads laid
    side by side, is what the next linear layer (W_O) reads. So no family is named, and grouped heads come repeated."""

    def __init__(self):
        super().__init__()
        self.layers, self.product = [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.softmax and args[0].dtype == torch.float64:  # some models ask for float32, where the mask's lowest
            kwargs = {**kwargs, "dtype": None}  # float64 is −∞, and a row of padding NaN
        out = func(*args, **kwargs)
        if func in PRODUCTS and args[1].dim() > 2:
            self.product = (*args[:2], out)
        elif func in (F.linear, torch.addmm) and self.product and self.layers:
            (A, V, heads), (read, W) = self.product, (args[0], args[1].mT) if func is F.linear else args[1:3]
            layer, (N, S) = self.layers[-1], self.layers[-1].x.shape[:2]
            if A.shape[-2:] == (S, S) and heads.numel() == read.numel():
                if torch.equal(heads.reshape(N, -1, S, heads.shape[-1]).transpose(1, 2).flatten(), read.flatten()):
                    if layer.weights is not None:
                        raise ValueError("a block must hold one attention, and this model's hold several: hand over "
                                         "an encoder or a decoder without cross-attention")  # fmt: skip
                    layer.weights, layer.A, layer.W = A, A.detach().reshape(N, -1, S, S), W.detach()
                    layer.V, layer.o = V.detach().reshape(N, -1, S, V.shape[-1]), out.detach().view(N, S, -1)
            self.product = None
        return out


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention written out as matrix products inside; the implementation that was set, afterwards."""
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def run(model: nn.Module, inputs, target: Tensor | None = None, position: int | Tensor = -1, *,
        graph: bool = False) -> Run:  # fmt: skip
    """Run the model once and keep what the maps below are made of; with `graph`, so that `answer` can be derived by A.

    Without a target, `answer` is the sum of the logits. Raises ValueError where a block's attention is not found.
    """
    inputs, reader, n, tokens = dict(inputs.items()), _Attentions(), n_blocks(model), []
    target, at = None if target is None else checked_target(inputs, target), output_position(inputs, position)
    layers = reader.layers

    def enter(module, args, kwargs):
        layers.append(Layer((args[0] if args else kwargs["hidden_states"]).detach()))

    def leave(module, args, out):
        layers[-1].out = out = out if isinstance(out, Tensor) else out[0]
        if len(layers) == n and not out.requires_grad:
            out.requires_grad_()  # the head alone is recorded: a few rows of it tell which ones it reads

    def norm(module, args, out):
        layer = layers[-1]
        if layer.A is not None and layer.out is None and args[0].numel() == layer.x.numel():
            layer.norms.append((module, args[0].detach().view_as(layer.x), out.detach().view_as(layer.x)))

    def embedded(module, args, out):
        tokens.append(out.flatten(2).shape[2] if out.dim() == 4 else out.shape[1])
        return out.detach().requires_grad_().clone() if graph else out

    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        stack.callback(token_embedding(model).register_forward_hook(embedded).remove)
        for block in set(find_blocks(model)[1]):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
            for module in block.modules():
                if "norm" in type(module).__name__.lower() and not any(module.children()):  # no block named for it
                    stack.callback(module.register_forward_hook(norm).remove)
        stack.enter_context(untouched(model))
        stack.enter_context(torch.enable_grad())
        with reader:
            answer = explained(logits(model, inputs), target, at)
        if not answer.isfinite().all():
            raise ValueError(f"a map is read off a finite answer, and {type(model).__name__}'s logits are not: load it "
                             "in a wider dtype, or pad on the right")  # fmt: skip
        missing = [k for k, layer in enumerate(layers) if layer.A is None]
        if missing or len(layers) != n:
            raise ValueError(f"an attention map is read off a product A·V that a linear layer W_O reads, and "
                             f"{type(model).__name__} shows none in {len(missing) or 'all'} of its {n} blocks. If it "
                             "has attention, load it with attn_implementation='eager'; or use a gradient method or "
                             "feature ablation, which need none")  # fmt: skip
        reads = torch.autograd.grad(answer.sum(), layers[-1].out, retain_graph=graph)[0].ne(0).any(-1)
    if not reads.any(1).all():
        raise ValueError("an input's logits do not depend on what leaves the last block: no row of a map is read")
    rows = reads.to(layers[-1].A) / reads.sum(1, keepdim=True)
    return Run(layers, answer, rows, tokens[0], inputs.get("attention_mask"))


PIECE = 2**24  # entries of the largest tensor that a map is made of


def parts(layer: Layer, residual: bool) -> Iterator[tuple[slice, Tensor]]:
    """What each source j brings to row i: Σ_h α^h_ij f^h(x_j), plus δ_ij x_i with `residual`: (rows, (N, k, S, D)) for
    k rows at a time, so that the (N, S, S, D) whole is never held."""
    N, H, S, d = layer.V.shape
    f = torch.einsum("nhjd,hde->nhje", layer.V, layer.W.reshape(H, d, -1))
    D = f.shape[-1]
    for start in range(0, S, step := max(1, PIECE // (N * S * D))):
        i = slice(start, min(start + step, S))
        v = torch.einsum("nhij,nhje->nije", layer.A[:, :, i], f)
        if residual:
            k = torch.arange(i.start, i.stop, device=v.device)
            v[:, k - i.start, k] += layer.x[:, k]
        yield i, v


# --------------------------------------------------------------------------------------------------- inputs and answers


def main_input(inputs: dict) -> Tensor:
    """What the tokens are of: input_ids (N, L) or pixel_values (N, C, height, width)."""
    for key in ("pixel_values", "input_ids"):
        if key in inputs:
            return inputs[key]
    raise ValueError(f"inputs must hold input_ids or pixel_values, and have {list(inputs)}: hand over what the "
                     "tokenizer or image processor gives")  # fmt: skip


def logits(model: nn.Module, inputs: dict) -> Tensor:
    """The logits (N, C) or (N, L, C)."""
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    found = getattr(model(**{**cache, **inputs}), "logits", None)
    if found is None:
        raise ValueError(f"an attribution explains a logit, and {type(model).__name__} has none: load the checkpoint "
                         'with its head, load_model(..., task="causal-lm" or "sequence-classification" or ...)')
    return found


def output_position(inputs: dict, position: int | Tensor) -> Tensor:
    """The output positions (N,), counted from 0; all 0 for images."""
    main = main_input(inputs)
    N, L, at = len(main), 1 if main.dim() > 2 else main.shape[1], torch.as_tensor(position, device=main.device)
    if at.dim() == 0 and at == -1 and L > 1 and (mask := inputs.get("attention_mask")) is not None:
        at = (mask * torch.arange(1, L + 1, device=mask.device)).argmax(1)
    at = at.expand(N) if at.dim() == 0 else at
    if at.shape != (N,) or at.is_floating_point() or at.min() < -L or at.max() >= L:
        raise ValueError(f"position must be an int or ({N},) ints in [-{L}, {L}), the tokens, not {position}")
    return at % L


def checked_target(inputs: dict, target) -> Tensor:
    """The entries to explain (N,), or pairs of them (N, 2), on the inputs' device; whether the model has them,
    `explained` sees."""
    main = main_input(inputs)
    target, N = torch.as_tensor(target, device=main.device), len(main)
    if target.shape not in ((N,), (N, 2)) or target.is_floating_point():
        raise ValueError(f"target must be ({N},) ints, one logit for each input, or pairs ({N}, 2), for their contrast,"
                         f" not {target.tolist()}")  # fmt: skip
    return target


def explained(logits: Tensor, target: Tensor | None, at: Tensor) -> Tensor:
    """The entry of each input's logits that is explained, or of a pair the first less the second, (N,)."""
    logits = logits[torch.arange(len(logits), device=logits.device), at] if logits.dim() == 3 else logits
    if target is None:
        return logits.sum(-1)
    if target.min() < 0 or target.max() >= logits.shape[1]:
        raise ValueError(f"target must be (N,) ints in [0, {logits.shape[1]}), the logits, and they range from "
                         f"{int(target.min())} to {int(target.max())}")  # fmt: skip
    if target.dim() == 2:
        first, second = logits.gather(1, target).unbind(1)
        return first - second
    return logits.gather(1, target[:, None])[:, 0]


def unpadded(r: Tensor, mask: Tensor | None) -> Tensor:
    """Relevance (N, L) with 0 where the mask has padding."""
    return r if mask is None else r.masked_fill(mask == 0, 0)
