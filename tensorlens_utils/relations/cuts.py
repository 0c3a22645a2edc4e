"""A language model in two parts: from a subject's state to o, which leaves the last block, and from o to the words."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..linearize import crossings, linearize_function
from ..models import find_blocks, n_blocks


class Cut(nn.Module):
    """N prompts of one length, cut at their subjects, which end at `position`: o as a function of s (N, d).

    What stands before the subject runs once, and what all prompts begin with once for all. Behind it the rows go in
    two calls, those before the last position and those from it on, so that a cotangent of o meets of the last block
    only what the last position reads.
    """

    def __init__(self, model: nn.Module, ids: Sequence[Sequence[int]], position: int, steps: int):
        super().__init__()
        self.model, self.layer, self.steps, self.kept = model, 0, steps, True
        self.ids = torch.tensor(ids, device=next(model.parameters()).device)
        with torch.no_grad():
            for _ in range(steps - 1):
                following = model(self.ids, **uncached(model)).logits[:, -1].argmax(-1)
                self.ids = torch.cat([self.ids, following[:, None]], 1)
            self.prefix = self._keys_and_values(position)
        first, last = 0 if self.prefix is None else position, len(ids[0]) - 1
        self.row, stop = position - first, self.ids.shape[1]
        cuts = [first, stop] if self.prefix is None or last == first else [first, last, stop]
        self.calls = [slice(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
        self.last = last - self.calls[-1].start

    def _keys_and_values(self, position: int):
        """What the model keeps of the tokens before the subject; None where it keeps no keys and values."""
        from transformers import DynamicCache

        ids, n = self.ids[:, :position], 0
        first = self.model.base_model(self.ids[:1, :1], **dict.fromkeys(uncached(self.model), True))
        if not isinstance(getattr(first, "past_key_values", None), DynamicCache):
            alone, seen = (self._run(self.ids[:1, :n], None)[0][0, 0] for n in (1, 2))
            if (alone - seen).norm() > max(1e-3, torch.finfo(alone.dtype).eps ** 0.5) * alone.norm():
                raise ValueError("prompts are asked of a language model, whose tokens do not see what follows them, "
                                 f"and those of {type(self.model).__name__} do: load one that goes on with a text")
            return None
        while n < position and (ids[:, n] == ids[0, n]).all():
            n += 1
        kept = DynamicCache(config=self.model.config)
        if n:
            kept = self._run(ids[:1, :n], kept).past_key_values
        if n and len(ids) > 1:
            kept.batch_repeat_interleave(len(ids))
        return kept if n == position else self._run(ids[:, n:], kept).past_key_values

    def _run(self, ids: Tensor, kept):
        cache = uncached(self.model) if kept is None else {"past_key_values": kept, "use_cache": True}
        return self.model.base_model(ids, **cache)

    def entering(self, layer: int) -> Cut:
        """The same cut, s being what stands at boundary `layer`; a new one, so that each operator keeps its own."""
        if not self.kept:
            raise ValueError("what stands before the subjects was let go of (keep=False), and is needed here: ask with "
                             "keep=True")
        if layer not in range(n_blocks(self.model)):
            raise ValueError(f"a subject's state is replaced at a boundary before a block, 0 to "
                             f"{n_blocks(self.model) - 1}; not at {layer!r}")
        found = copy.copy(self)
        found.layer = layer
        return found

    def forward(self, s: Tensor | None = None) -> Tensor:
        """o, (N, d) or (N, steps, d); without an s, with the states that the model has. What crossed the boundaries
        with the subject is in `states`, o in `o`, each in its graph."""
        kept, n = copy.deepcopy(self.prefix), n_blocks(self.model)  # a cache grows with every call: each has its own
        self.states = {}

        def meet(k: int, hidden: Tensor) -> Tensor:
            if call is self.calls[0] and k < n:
                if s is not None and k == self.layer:
                    rows = [hidden[:, : self.row], s[:, None].to(hidden.dtype), hidden[:, self.row + 1 :]]
                    hidden = torch.cat([x for x in rows if x.shape[1]], 1)
                self.states[k] = hidden
            if call is self.calls[-1] and k == n:
                self.o = hidden[:, self.last : self.last + self.steps]
            return hidden

        with crossings(self.model, meet), _Parted() if s is not None and s.requires_grad else nullcontext():
            for call in self.calls:
                self._run(self.ids[:, call], kept)
        self.o = self.o[:, 0] if self.steps == 1 else self.o
        return self.o

    def pulled(self, s: Tensor, layers: Sequence[int], step: int, chunk: int | None, rules: dict[str, str],
               n: int | None = None) -> list[Tensor]:  # fmt: skip
        """The first n rows, or all, of T's block at each of these boundaries: (N, n, d) each, T taken at s."""
        cut = self.entering(min(layers))
        T = linearize_function(cut, s, **rules)
        states, o, parts = [cut.states[k] for k in layers], cut.o if self.steps == 1 else cut.o[:, step], []
        chunk = chunk or max(T.chunk // 4, -(-128 // len(s)))  # small enough for the cache, or 128 rows of products
        with torch.enable_grad():
            for U in torch.eye(o.shape[-1], dtype=o.dtype, device=o.device)[:n].split(chunk):
                U = U[:, None].expand(-1, len(s), -1)
                back = torch.autograd.grad(o, states, U, retain_graph=True, is_grads_batched=True)
                parts.append([x[:, :, self.row] for x in back])
        cut.states, cut.o = {}, None  # and with them the graph
        return [torch.cat(found).transpose(0, 1) for found in zip(*parts, strict=True)]


class _Parted(TorchFunctionMode):
    """Inside, a product x·W + b that is split at once, as GPT-2's into q, k and v, is made anew for each part: where q
    and k are held constant, a cotangent then passes W's columns for v alone, and not a third of a product of zeros."""

    def __init__(self):
        super().__init__()
        self.products = WeakIdKeyDictionary()  # what came out whole: b, x, W, and the version of x then

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name, kwargs = func(*args, **(kwargs or {})), func.__name__, kwargs or {}
        whole = self.products.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if func is torch.addmm and len(args) == 3 and not kwargs:
            self.products[out] = (*args, args[1]._version)
        elif whole is not None and name in ("view", "reshape") and out.shape[-1] == args[0].shape[-1]:
            self.products[out] = whole
        elif whole is not None and name in ("split", "chunk") and sum(x.shape[-1] for x in out) == whole[2].shape[1]:
            b, x, W, version = whole
            if x._version == version and args[0]._version == 0:
                ends = [0, *itertools.accumulate(part.shape[-1] for part in out)]
                return tuple(torch.addmm(b[i:j], x, W[:, i:j]).view(part.shape)
                             for part, i, j in zip(out, ends, ends[1:], strict=False))  # fmt: skip
        return out


def uncached(model: nn.Module) -> dict[str, bool]:
    """What a model is called with that it keeps nothing of what it reads."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


# ---------------------------------------------------------------------------------------------------------- the head


class Head:
    """A model's own final norm and head, live: o (..., d), what leaves the last block -> logits (..., words).

    The model runs on one word, its blocks replaced by what hands o on, so that no family's norm or head is named.
    """

    def __init__(self, model: nn.Module):
        self.model, self.blocks, made = model, [*dict.fromkeys(find_blocks(model)[1])], []
        hook = self.blocks[-1].register_forward_hook(lambda module, args, out: made.append(out))
        try:
            with torch.no_grad():
                self._run(1)
        finally:
            hook.remove()
        self.parts = None if isinstance(made[-1], Tensor) else len(made[-1])  # a block gives a tensor, or a tuple

    def _run(self, n: int) -> Tensor:
        config = self.model.config
        word = int(getattr(config, "pad_token_id", None) == 0)  # any but padding, of which models warn
        words = torch.full((n, 1), word, device=next(self.model.parameters()).device)
        logits = getattr(self.model(words, **uncached(self.model)), "logits", None)
        if logits is None or logits.dim() != 3:
            raise ValueError(f"a language model has a head that scores each word at each position, and "
                             f"{type(self.model).__name__} has none: load it as an AutoModelForCausalLM does")
        return logits[:, 0]

    @torch.no_grad()
    def __call__(self, o: Tensor) -> Tensor:
        rows = o.reshape(-1, 1, o.shape[-1]).to(next(self.model.parameters()))
        given = rows if self.parts is None else (rows, *[None] * (self.parts - 1))
        before = {block: block.__dict__.get("forward") for block in self.blocks}
        try:
            for block in self.blocks:
                block.forward = lambda *args, **kwargs: given
            logits = self._run(len(rows))
        finally:
            for block, forward in before.items():
                del block.forward
                if forward is not None:
                    block.forward = forward
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(*o.shape[:-1], -1)
