"""The attention patterns of one run: what each softmax reads before the mask, what it gives, and the run with others.

Attention is met where ``linearize`` meets it, at torch's own functions (rules.py): a softmax whose result is queries ×
keys, or the fused attention, which is written out. No family is named, and no model is patched.

>>> from tensorlens_utils import load_data, load_model
>>> model, processor = load_model("tiny-vit")
>>> inputs = processor(load_data("digits")[:2]["image"], return_tensors="pt")
>>> p = capture(model, inputs)
>>> p.logits.shape, bool((p.logits.softmax(-1) - p.probabilities).abs().max() < 1e-6)
(torch.Size([2, 4, 4, 17, 17]), True)
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .linearize import untouched
from .linearize.rules import attention, rule_of, softmax
from .linearize.values import Call
from .models import find_blocks, n_blocks

MASKED = -9e3  # below it is what forbids a key: the lowest number of a kind, or −10⁴ in old models


@dataclass(frozen=True)
class Patterns:
    """All heads' attention, queries × keys.

    logits          (N, layers, H, S, S): what softmax reads, before the mask. Where the mask forbids a key, the score
                    without whatever else was added together with the mask
    probabilities   the same shape: what softmax gives, 0 where masked; in a padded query's row, whatever the model has
    output          the model's answer
    layers          the blocks that they are of: all, but in models that have other blocks too
    """

    logits: Tensor
    probabilities: Tensor
    output: Any
    layers: tuple[int, ...]

    def network(self, of: str = "logits") -> Tensor:
        """The network 3-tensors (N, S, S, layers·H), queries × keys × heads; head h of layer l is number l·H + h."""
        return getattr(self, of).flatten(1, 2).movedim(1, -1)


class _Softmaxes(TorchFunctionMode):
    """Meets every softmax that gives S × S while the model runs, and knows the scores behind those with a mask on."""

    options = {"attention": "tangent"}  # with which rules.attention writes the fused one out, under this mode

    def __init__(self, replace: Callable | None):
        super().__init__()
        self.replace, self.unmasked, self.met = replace, WeakIdKeyDictionary(), []
        self.shape, self.layer = None, -1  # (N, S) and the number of the block that runs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule, name, inplace = rule_of(func)
        if rule is attention or func is F.multi_head_attention_forward:
            return rule(self, Call(func, name, args, kwargs, []))  # written out, under this mode
        with torch.no_grad():
            behind = [self.unmasked.get(x, x.clone() if inplace else x) if isinstance(x, Tensor) else x for x in args]
        out = func(*args, **kwargs)
        if self.shape is None or not isinstance(out, Tensor) or not out.is_floating_point() or out.dim() < 3:
            return out
        if out.shape[-2:] != (self.shape[1], self.shape[1]):
            return out
        if rule is softmax:
            return self.meet(behind[0] if behind else kwargs["input"], out)
        with torch.no_grad():
            known = any(a is not b for a, b in zip(args, behind, strict=True))
            scores = [x for x in behind if isinstance(x, Tensor) and x.is_floating_point() and x.shape == out.shape]
            raw = func(*behind, **kwargs) if known else out
            low = raw < MASKED
            if scores and low.any():
                known, raw = True, torch.where(low, scores[0].to(raw), raw)
            if known:
                self.unmasked[out] = raw
        return out

    def meet(self, scores: Tensor, A: Tensor) -> Tensor:
        """Keep one softmax's input and output, and hand on the output, or what comes in its place."""
        logits, heads = (x.reshape(self.shape[0], -1, *A.shape[-2:]) for x in (scores, A.nan_to_num(0)))
        if any(layer == self.layer for layer, *_ in self.met):
            raise ValueError(f"a block holds one attention, and block {self.layer} has several: hand over an encoder, "
                             "or a decoder without cross-attention")  # fmt: skip
        self.met.append((self.layer, logits.detach(), heads.detach()))
        return A if self.replace is None else self.replace(len(self.met) - 1, heads).reshape(A.shape).to(A.dtype)


def capture(model: nn.Module, inputs, replace: Callable[[int, Tensor], Tensor] | None = None) -> Patterns:
    """Run the model once, in eval mode, and keep every head's attention.

    Args:
        model: any torch transformer with full self-attention, queries × keys, in its blocks (``models.find_blocks``).
        inputs: what it is called with, by name.
        replace: (number of the attention, A (N, H, S, S)) -> what the model goes on with in place of A: what is kept is
            what it had. Under autograd the answer has derivatives by all that ``replace`` brings in, such as a factor
            of 1 on each head.

    Raises:
        ValueError: where a block has several attentions, or none has one of queries × keys.
    """
    if not hasattr(inputs, "items"):
        raise TypeError("a model is called with inputs by name, as a tokenizer or image processor gives them, such as "
                        f'{{"input_ids": ids}}; not with a {type(inputs).__name__}')  # fmt: skip
    inputs, softmaxes = dict(inputs.items()), _Softmaxes(replace)

    def enter(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        softmaxes.shape, softmaxes.layer = x.shape[:2], softmaxes.layer + 1

    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with ExitStack() as stack:
        for block in set(find_blocks(model)[1]):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(untouched(model))
        with softmaxes:
            output = model(**{**cache, **inputs})
    if not softmaxes.met:
        raise ValueError(f"a pattern is a softmax inside a block that gives queries × keys, and {type(model).__name__} "
                         f"shows none in its {n_blocks(model)} blocks: attention in bands, or by a compiled kernel, is "
                         "not seen. Load it with full attention and attn_implementation='eager'")  # fmt: skip
    layers, logits, probabilities = zip(*softmaxes.met, strict=True)
    return Patterns(torch.stack(logits, 1), torch.stack(probabilities, 1), output, layers)
