"""``linearize``: run a transformer once at X, and hand back the exact linear operator T that it is there.

The ``Recorder`` intercepts torch's functions while the model runs, meets each call on a value that depends on X with
its rule (rules.py), and writes the tape (tape.py) that the ``AttentionTensor`` (tensor.py) replays.
"""

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .models import find_blocks, n_blocks, token_embedding
from .rules import (
    LIKE,
    Call,
    Tag,
    UnsupportedOperation,
    base_of,
    dependent,
    diagonal,
    functional,
    ratio,
    registered,
    rule_of,
    settled_linear,
    shape_only,
    slope,
    title,
    to_ref,
)
from .tape import Ref, Tape, leaves, map_leaves
from .tensor import AttentionTensor, Cut

OPTIONS = {
    "attention": ("frozen", "tangent"),
    "norm": ("frozen", "tangent"),
    "activation": ("ratio", "tangent"),
    "gate": ("gate", "value", "split", "tangent"),
}


# ---------------------------------------------------------------------------------------------------- the recorder


class Recorder(TorchFunctionMode):
    """Meets each torch call on a value that depends on X with its rule, and writes the tape."""

    def __init__(self, model: nn.Module, options: dict):
        super().__init__()
        self.options, self.names = options, {m: n for n, m in model.named_modules()}
        self.tape, self.cuts, self.bent = Tape(), [], set()
        self.X, self.paused, self.one_hot = None, False, None
        self.based = WeakIdKeyDictionary()  # tensors that are known as functions of another, their base

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled and self.X is not None:
            return None  # under no_grad a value would lose its mark of depending on X
        if self.one_hot is not None and func is F.embedding and args[1] is self.one_hot:
            self.one_hot = None  # at="inputs": the embedding is one more linear map, of one-hot rows
            rows = self.enter(F.one_hot(args[0], len(args[1])).to(args[1].dtype))
            return self.record(torch.matmul, (rows, args[1]))
        if self.X is None or self.paused:
            return func(*args, **kwargs)
        deps = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        rule, name, inplace = rule_of(func) if deps else (shape_only, "", False)
        if name in LIKE and len(args) > 1 and isinstance(args[1], Tensor):  # x.type_as(y): y lends its dtype or shape
            args, deps = (args[0], args[1].detach(), *args[2:]), deps[:1] if args[0].requires_grad else []
        if not deps and (rule_of(func)[2] or "out" in kwargs):
            self.tape.keep(kwargs.get("out", args[0]))
        if rule is shape_only and (name.startswith("new_") or name.endswith("_like")):
            deps = [t for t in deps if not args or t is not args[0]]  # of the first, only the shape is read
            rule = None
        if rule is shape_only and not inplace or not deps:
            return func(*args, **kwargs)
        with torch.inference_mode(False), torch.enable_grad():
            for t in deps:
                self.check(t)
            if rule is None:
                self.refuse(f"linearize has no rule for {title(func)}")
            if not inplace:
                return rule(self, Call(func, name, args, kwargs, deps))
            call = Call(functional(name), name, args, kwargs, deps)
            if dependent(old := args[0]):  # what is overwritten may be wanted by a backward pass
                call = call.hold(old, self.tag(old.clone(), replace(old._tag, base=base_of(old))))
            return self.write(old, rule(self, call))

    # -- where X enters, and what may follow

    def enter(self, value: Tensor) -> Tensor:
        """Make ``value`` the X of the operator: what is computed from it from now on is recorded."""
        if self.X is not None:
            raise ValueError("X must enter the model once, but the module that makes it ran twice; choose another `at`")
        with torch.enable_grad():
            X = value.detach().clone().requires_grad_()
            x = self.tag(X.clone(), Tag("linear", Ref(-1)))
        self.X = X
        self.tape.met(-1, X)
        return x

    def tag(self, t: Tensor, tag: Tag) -> Tensor:
        tag.version, tag.recorder, t._tag = t._version, self, tag
        if tag.base is not None:
            self.based[t] = True
        return t

    def check(self, t: Tensor) -> None:
        """Refuse what came to depend on X unseen: by foreign code, a write through a view, or round the boundary."""
        tag = t._tag if dependent(t) and t._tag.recorder is self else None
        if tag is not None and (tag.taught or not foreign(t)):
            form, version = tag.settled or (None, 0)
            if form is not None and form._version != version:
                self.refuse("a view of a nonlinear value was written to, which the value itself does not show")
            if tag.version != t._version and t.untyped_storage().data_ptr() in self.bent:
                self.refuse("a value was made nonlinear in place through a view, which a replay cannot follow")
            return
        found, functions = ancestry(t)
        if not any(x is self.X for x in found):
            self.refuse("a value that is no function of X requires grad: one from before the boundary `at`, carried "
                        "round the hidden state (linearize from at='tokens'), or a bare function's weight (detach it)")
        how = f"the autograd.Function {functions[0]}" if functions else "a write into a view of a constant"
        self.refuse(f"a value depends on X through {how}, which interception cannot see")

    # -- what rules are made of

    def settled(self, x):
        """The affine form of a value that depends on X (an error where there is none); anything else as it is."""
        if not dependent(x) or x._tag.ref is not None:
            return x
        if x._tag.kind == "pending" and x._tag.form is None:
            x._tag.form = functools.cache(lambda: self.force(x, self.options["activation"]))
        if x._tag.form is None:
            self.refuse(x._tag.origin or "a statistic of X is used outside a norm")
        form = x._tag.form()
        x._tag.settled = x._tag.settled or (form, form._version)
        return form

    def record(self, fn, args, kwargs=None, addends=(), **tag):
        """Run ``fn``, affine in the values that depend on X, and write it to the tape."""
        args, kwargs = map_leaves(self.settled, args), map_leaves(self.settled, kwargs) if kwargs else {}
        if self.X is not None and torch.is_autocast_enabled(self.X.device.type):
            fn = torch.autocast(self.X.device.type, torch.get_autocast_dtype(self.X.device.type))(fn)
        out = fn(*args, **kwargs)
        if any(out is x for x in args):
            return out
        if isinstance(out, Tensor) and not out.requires_grad:  # a cast to integers
            if out.is_floating_point() or out.is_complex():
                self.refuse(f"{title(fn)} gives a value that autograd does not follow")
            self.cuts.append(Cut(self.module(), title(fn), "choice"))
            return out
        index = self.tape.append(fn, map_leaves(to_ref, args), map_leaves(to_ref, kwargs), addends)
        return self.place(out, index, **tag)

    def place(self, out, index: int, **tag):
        """Tag the output of node ``index``."""
        for item, t in [(None, out)] if isinstance(out, Tensor) else enumerate(out):
            if isinstance(t, Tensor) and t.requires_grad:
                self.tape.met(index, t)
                self.tag(t, Tag("linear", Ref(index, item), **tag))
        return out

    def tangent(self, call: Call, **tag) -> Tensor:
        """The call's own derivative: y(X) + J·(x − X), on the tape as c + J·x with c = y(X) − J·X."""
        call = call.mapped(self.settled)
        deps = {id(t): t for t in call.deps}
        at = tuple(t.detach().contiguous() for t in deps.values())

        def f(*xs):
            given = dict(zip(deps, xs, strict=True))
            return call.run(lambda t: given[id(t)])

        def affine(c, *xs):  # J does not read what a mask has set to −∞: 0 in its stead keeps ∞ − ∞ out
            xs = tuple(x.masked_fill(x.abs() > torch.finfo(x.dtype).max / 8, 0).contiguous() for x in xs)
            return c + torch.func.jvp(f, at, xs)[1]

        if torch.is_autocast_enabled(self.X.device.type):
            self.refuse("a derivative under autocast cannot be replayed; call the model in one precision")
        y = call.run()
        c = y.detach() - affine(0, *at)
        index = self.tape.append(affine, (c, *map(to_ref, deps.values())), {}, (0,))
        return self.place(y, index, **{"gate": any(t._tag.gate for t in call.deps), **tag})

    def force(self, t: Tensor, how) -> Tensor:
        """φ(z) as z⊙r + c: the ratio r = (φ(z) − φ(0))/z, c = φ(0), or the slope r = φ′(z), c = φ(z) − z⊙r."""
        with torch.no_grad():
            at = (t._tag.fn, t._tag.base.detach(), t.detach())
            r, c = {"ratio": ratio, "tangent": slope}[how](*at) if isinstance(how, str) else how(*at, self.module)
        return self.record(diagonal, (t._tag.base, r, c), addends=(2,), gate=True)

    def carry(self, call: Call, kind: str, affine: bool, origin: str = "") -> Tensor:
        """A value that only its use will settle stays of ``kind`` through an operation that is affine, or is not."""
        tags, form = [t._tag for t in call.deps], None
        if self.options["attention" if kind == "scores" else "norm"] == "tangent":
            if kind != "scores":  # x² is no activation here, but part of a norm
                call = call.mapped(lambda t: self.force(t, "tangent") if t._tag.kind == "pending" else t)
            out = settled_linear(self, call) if affine else self.tangent(call)
        else:
            out = call.run()
            if affine and isinstance(out, Tensor) and all(t.ref or t.form or t.kind == "pending" for t in tags):
                form = functools.cache(call.unless_overwritten(lambda: settled_linear(self, call)))
        origin = origin or next((t.origin for t in tags if t.origin), "")
        for t in leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                ref = t._tag.ref if dependent(t) else None
                self.tag(t, Tag(kind, ref, gate=True, form=form, origin=origin))
        return out

    def constant(self, t: Tensor, rule: str, operation: str) -> Tensor:
        """``t`` held at its value at X: a cut, with the rule that says why."""
        self.cuts.append(Cut(self.module(), operation, rule))
        return t.detach()

    def write(self, target: Tensor, result: Tensor) -> Tensor:
        """An in-place operation is its functional form, then a copy into the target, whose views see it."""
        if dependent(result) and result._tag.kind == "pending":
            result = self.settled(result)
        self.keep_bases(target)
        before = target._tag.ref if dependent(target) else None
        if before is None:  # so far the target was a constant, or had no affine form
            before = Ref(self.tape.append(torch.clone, (target.detach().clone(),), {}, (0,)))
            self.tape.keep(target)
        target.copy_(result)
        new = result._tag if dependent(result) else Tag("linear", Ref(-1))
        if new.ref is None:
            self.bent.add(target.untyped_storage().data_ptr())
            return self.tag(target, copy.copy(new))
        source = new.ref if dependent(result) else result.clone()
        index = self.tape.append(Tensor.copy_, (before, source), {}, (1,), True)
        return self.tag(target, Tag(new.kind, Ref(index), new.gate))

    def keep_bases(self, target: Tensor) -> None:
        """``target`` is about to be written to: what is known as a function φ(z) of it goes on with a copy of z."""
        at, copies = target.untyped_storage().data_ptr(), {}
        for t in list(self.based):
            base = t._tag.base
            if base is not None and base._tag.ref is not None and base.untyped_storage().data_ptr() == at:
                if id(base) not in copies:
                    copies[id(base)] = self.record(torch.clone, (base,), gate=base._tag.gate)
                t._tag.base = copies[id(base)]

    # -- what errors and cuts say

    def module(self) -> str:
        """The path of the module whose forward is running, read off the stack: nothing is hung on the model for it."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self.names:
                return self.names[owner] or type(owner).__name__
            frame = frame.f_back
        return "the function"

    def refuse(self, what: str):
        raise UnsupportedOperation(
            f"{what} (in {self.module()}). Nothing is guessed: teach it by register_rule(function_or_module_class, "
            "rule), the rule being linear, elementwise, softmax, choice or your own function of (recorder, call)"
        )


def foreign(t: Tensor) -> bool:
    """Whether an autograd.Function made it: its backward is its author's, not that of what interception saw."""
    return isinstance(t.grad_fn, torch.autograd.function.BackwardCFunction)


def ancestry(t: Tensor) -> tuple[list[Tensor], list[str]]:
    """The leaves that ``t`` was computed from, and the autograd.Functions on the way."""
    stack, seen, found, functions = [t.grad_fn], set(), [t] if t.is_leaf else [], []
    while stack:
        fn = stack.pop()
        if fn is not None and fn not in seen:
            seen.add(fn)
            stack.extend(f for f, _ in fn.next_functions)
            if hasattr(fn, "variable"):
                found.append(fn.variable)
            if isinstance(fn, torch.autograd.function.BackwardCFunction):
                functions.append(type(fn).__name__.removesuffix("Backward"))
    return found, functions


# ---------------------------------------------------------------------------------------------------- linearize


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


@contextmanager
def module_rules(model: nn.Module, rec: Recorder):
    """Hooks, taken off again: a module with a registered rule runs unseen and the rule gives its output; what any other
    returns is checked for foreign code."""

    def pause(module, args, kwargs):
        rec.paused = True

    def answer(module, args, kwargs, out):
        deps = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if rec.X is not None and deps:
            for t in deps:
                rec.check(t)
            out = registered(type(module))(rec, Call(module.forward, type(module).__name__, args, kwargs, deps))
            for t in filter(dependent, leaves(out)):
                t._tag.taught = True
        rec.paused = False
        return out

    def check(module, args, out):  # foreign code is found where it was called
        for t in leaves(out) if rec.X is not None and not rec.paused else ():
            if isinstance(t, Tensor) and (dependent(t) or foreign(t)):
                rec.check(t)

    with ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_hook(check).remove)
        for m in model.modules():
            if registered(type(m)):
                stack.callback(m.register_forward_pre_hook(pause, with_kwargs=True).remove)
                stack.callback(m.register_forward_hook(answer, with_kwargs=True).remove)
        yield


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
            stack.callback(hook(model.base_model, stop))
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
    """Hooks that let X enter at boundary ``at`` and stop the forward at boundary ``to``, counting the blocks' calls."""
    blocks, n, calls = find_blocks(model)[1], n_blocks(model), [0]

    def meet(k: int, hidden: Tensor) -> Tensor:
        hidden = enter(hidden) if k == at else hidden
        if k == to:
            raise _Reached(hidden)
        return hidden

    def before(module, args, kwargs):
        k, calls[0] = calls[0], calls[0] + 1
        if args:
            return (meet(k, args[0]), *args[1:]), kwargs
        name = next(name for name in ("hidden_states", "src", "x", *kwargs) if name in kwargs)
        return args, {**kwargs, name: meet(k, kwargs[name])}

    def after(module, args, out):
        if calls[0] == n:
            return meet(n, out) if isinstance(out, Tensor) else (meet(n, out[0]), *out[1:])

    for block in set(blocks):
        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(after).remove)
