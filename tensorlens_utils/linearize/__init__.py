"""``linearize``: run a transformer once at X, and hand back the exact linear operator T that it is there.

Here are the two functions that make an operator, and the boundaries at which X enters a model and F(X) leaves it. The
run itself is the recorder's (recorder.py), and what each operation becomes is told by its rule (rules.py).
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models import find_blocks, n_blocks, token_embedding
from ..tensor import AttentionTensor
from .recorder import Recorder, module_rules
from .values import dependent

OPTIONS = {
    "attention": ("frozen", "tangent"),
    "norm": ("frozen", "tangent"),
    "activation": ("ratio", "tangent"),
    "gate": ("gate", "value", "split", "tangent"),
}


def linearize(model: nn.Module, inputs, at="tokens", to=None, *, attention="frozen", norm="frozen", activation="ratio",
              gate="gate", budget_gb: float = 8.0) -> AttentionTensor:  # fmt: skip
    """The transformer at these inputs as one exact linear operator: F(X) = T·X + B(X)  (TensorLens, 2601.17958, §3).

    model       any torch module, unmodified: of the transformers library, or one that takes a float tensor
    inputs      what it is called with: a tokenizer's or image processor's output, a dict, or one tensor
    at          what X is: "inputs" (one-hot rows, pixels), "tokens" (token or patch embeddings), "embeddings" (what
                enters the first block) or k (what enters block k; n_blocks: what leaves the last)
    to          what F(X) is: a boundary k, "last_hidden_state" or "logits"; None: logits if the model has them
    attention   "frozen" (A constant at X) or "tangent" (its derivative)
    norm        "frozen" (1/σ constant) or "tangent"
    activation  "ratio" (φ(0) + z⊙r), "tangent", or your own (φ, z, φ(z), module_path) → (r, c) with φ(z) = z⊙r + c
    gate        what is constant in act(g)·u: "gate", "value", "split" (half of each) or "tangent" (neither)
    budget_gb   the largest tensor that ``slice`` and ``dense`` may form

    All tangent is the Jacobian: T = J, B = F(X) − J·X. The model is in eval mode meanwhile, and left as it was. Raises
    ``UnsupportedOperation`` where no rule makes an operation linear; how exact the rest is, ``T.certificate()`` tells.
    Out of sight is only what bypasses both torch's functions and its autograd, such as a compiled extension.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=1))
    >>> T = linearize(model, torch.tensor([[1, 2, 3]]))
    >>> T.shape
    (1, 3, 11, 3, 8)
    >>> bool(torch.allclose(T @ T.input + T.bias, T.output, atol=1e-5))
    True
    """
    if isinstance(inputs, Tensor):
        inputs = {getattr(model, "main_input_name", ""): inputs}
    elif not hasattr(inputs, "items"):
        raise TypeError(f"inputs must be a dict, a tokenizer's or processor's output, or a tensor, not {type(inputs)}")
    inputs = dict(inputs.items())
    options = {"attention": attention, "norm": norm, "activation": activation, "gate": gate}
    mask = inputs.get("attention_mask")
    return _operator(lambda rec: _forward(model, inputs, at, to, rec), model, options, budget_gb, mask)


def linearize_function(fn: Callable[[Tensor], Tensor], x: Tensor, *, attention="frozen", norm="frozen",
                       activation="ratio", gate="gate", budget_gb: float = 8.0) -> AttentionTensor:  # fmt: skip
    """``linearize`` for any callable on a tensor x (N, ...): T·x + B = fn(x), T of shape (*fn(x).shape, *x.shape[1:]).

    ``fn`` may be a module; what a bare function closes over must not require grad, lest it be taken for X.
    """
    options = {"attention": attention, "norm": norm, "activation": activation, "gate": gate}
    model = fn if isinstance(fn, nn.Module) else nn.Module()
    return _operator(lambda rec: fn(rec.enter(x) if rec else x.clone()), model, options, budget_gb)


def _operator(run: Callable, model: nn.Module, options: dict, budget_gb: float, mask=None) -> AttentionTensor:
    for name, value in options.items():
        if value not in OPTIONS[name] and not (name == "activation" and callable(value)):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, OPTIONS[name]))}, not {value!r}")
    rec = Recorder(model, options)
    with untouched(model), torch.enable_grad(), module_rules(model, rec):
        with rec:
            Y = run(rec)
        if isinstance(Y, Tensor) and Y.requires_grad:
            rec.check(Y)
        Y = rec.settled(Y)
    if rec.X is None or not dependent(Y):
        raise ValueError("the output does not depend on X: `at` lies behind `to`, or the module that makes X never ran")
    rec.tape.close(Y._tag.ref)

    def forward():  # under an idle mode, lest torch's encoder take its fast path, which blanks the padding
        with untouched(model), torch.no_grad(), Recorder(model, options):
            return run(None)

    return AttentionTensor(rec.X, Y, rec.tape, forward, rec.cuts, options, mask, budget_gb)


@contextmanager
def untouched(model: nn.Module):
    """``model`` in eval mode and without weight gradients inside, and as it was afterwards, whatever happens."""
    training = {m: m.training for m in model.modules()}
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        for m in training:
            m.training = False
        for p in grads:
            p.requires_grad_(False)
        yield
    finally:
        for b in model.buffers():
            if dependent(b):  # a cache that took in X
                del b.detach_()._tag
        for m, flag in training.items():
            m.training = flag
        for p, flag in grads.items():
            p.requires_grad_(flag)


class _Reached(Exception):
    """The forward got to ``to``; what follows need not run."""


def _forward(model: nn.Module, inputs: dict, at, to, rec: Recorder | None) -> Tensor:
    """Run the model, X entering at ``at``, up to ``to``: (N, M, D'). Without a recorder, it is the model's own forward.
    """
    enter = rec.enter if rec else lambda x: x
    kwargs = {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in inputs.items()}
    main = next((k for k in ("", "inputs_embeds", "pixel_values", "input_ids") if k in kwargs), next(iter(kwargs)))
    pixels, floating = main == "pixel_values", kwargs[main].is_floating_point()
    at, to = (0 if b == "embeddings" else b for b in (at, to))
    boundaries = [b for b in (at, to) if isinstance(b, int)]
    if at not in ("inputs", "tokens") and not isinstance(at, int):
        raise ValueError(f'`at` must be "inputs", "tokens", "embeddings" or a boundary k, not {at!r}')
    if not all(0 <= b <= n_blocks(model) for b in boundaries) or boundaries != sorted(boundaries):
        raise ValueError(f"boundaries lie in 0..{n_blocks(model)}, `at` before `to`; they are at={at!r}, to={to!r}")

    def hook(module, f):
        return module.register_forward_hook(lambda m, args, out: f(out)).remove

    def stop(out):
        raise _Reached(out)

    with ExitStack() as stack:
        if floating and (at == "inputs" or at == "tokens" and not pixels):
            kwargs[main] = enter(kwargs[main])
        elif at == "inputs" and rec:
            rec.one_hot = token_embedding(model).weight
        elif at == "tokens":
            stack.callback(hook(token_embedding(model), lambda out: _patches(enter, out)))
        elif rec and floating and not pixels:  # what gets past the boundary must be noticed: see Recorder.check
            kwargs[main].requires_grad_()
        elif rec and hasattr(model, "get_input_embeddings"):
            stack.callback(hook(token_embedding(model), lambda out: out.detach().requires_grad_().clone()))
        if boundaries:
            _watch(model, stack, at, to, enter)
        if to == "last_hidden_state" and getattr(model, "base_model", model) is not model:
            for base in {model.base_model, getattr(model, "get_decoder", lambda: model.base_model)()}:
                stack.callback(hook(base, stop))  # OPT's head calls the decoder, and never its base model
        if hasattr(getattr(model, "config", None), "use_cache") and "past_key_values" not in kwargs:
            kwargs.setdefault("use_cache", False)
        try:
            out = model(*([kwargs.pop("")] if "" in kwargs else []), **kwargs)
        except _Reached as reached:
            out = reached.args[0]
    Y = out if isinstance(out, Tensor) else None
    if Y is None and to in (None, "logits"):
        Y = getattr(out, "logits", None)
    if Y is None and to in (None, "last_hidden_state"):
        Y = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
    if Y is None:
        has = list(out.keys()) if hasattr(out, "keys") else type(out).__name__
        raise ValueError(f'`to` must be a boundary k, "last_hidden_state" or "logits"; {to!r} is not among {has}')
    return Y.unsqueeze(1) if Y.dim() == 2 else Y


def _patches(enter: Callable, out: Tensor) -> Tensor:
    """Patch embeddings that leave a convolution as (N, D, rows, columns) are tokens (N, L, D) all the same."""
    return enter(out) if out.dim() != 4 else enter(out.flatten(2).mT).mT.reshape(out.shape)


def _watch(model: nn.Module, stack: ExitStack, at, to, enter: Callable) -> None:
    """Hooks that let X enter at boundary ``at`` and stop the forward at boundary ``to``."""

    def meet(k: int, hidden: Tensor) -> Tensor:
        hidden = enter(hidden) if k == at else hidden
        if k == to:
            raise _Reached(hidden)
        return hidden

    stack.enter_context(crossings(model, meet))


@contextmanager
def crossings(model: nn.Module, meet: Callable[[int, Tensor], Tensor]):
    """Inside, ``meet(k, hidden)`` sees what crosses boundary k, in every forward of ``model``, and gives what goes on.
    """
    blocks, n, calls = find_blocks(model)[1], n_blocks(model), [0]

    def before(module, args, kwargs):
        k, calls[0] = calls[0] % n, calls[0] + 1
        if args:
            return (meet(k, args[0]), *args[1:]), kwargs
        name = next(name for name in ("hidden_states", "src", "x", *kwargs) if name in kwargs)
        return args, {**kwargs, name: meet(k, kwargs[name])}

    def after(module, args, out):
        if calls[0] % n == 0:
            return meet(n, out) if isinstance(out, Tensor) else (meet(n, out[0]), *out[1:])

    with ExitStack() as stack:
        for block in set(blocks):
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        yield
