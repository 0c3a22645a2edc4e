"""The recorder: runs a model at X, meets each torch call with its rule (rules.py), and writes the tape (tape.py).

A value depends on X exactly if it requires grad; ``Recorder.check`` is where that mark and the recorder's own tag must
agree, and what came to depend on X unseen is refused.
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

from ..tensor import Cut
from .rules import SCALED, diagonal, in_order, ratio, registered, rule_of, settled_linear, shape_only, slope
from .tape import Ref, Tape, leaves, map_leaves
from .values import Call, Tag, UnsupportedOperation, base_of, dependent, title, to_ref


class Recorder(TorchFunctionMode):
    """Meets each torch call on a value that depends on X with its rule, and writes the tape."""

    def __init__(self, model: nn.Module, options: dict):
        super().__init__()
        self.options, self.names = options, {m: n for n, m in model.named_modules()}
        self.tape, self.cuts, self.nonlinear_in_place = Tape(), [], set()
        self.X, self.paused, self.one_hot = None, False, None
        self.based = WeakIdKeyDictionary()  # tensors that are known as functions of another, their base

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.one_hot is not None and func is F.embedding and args[1] is self.one_hot:
            return self.enter_one_hot(args[0])
        if self.X is None or self.paused:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return None  # under no_grad a value would lose its mark of depending on X
        rule, name, inplace = rule_of(func)
        if rule is shape_only:
            return func(*args, **kwargs)
        deps = [t for t in leaves((*args, *kwargs.values())) if isinstance(t, Tensor) and t.requires_grad]
        if not deps:
            if inplace or "out" in kwargs:
                self.tape.keep(kwargs.get("out", args[0]))
            return func(*args, **kwargs)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self.meet(Call(func, name, args, kwargs, deps), rule, inplace)
        with torch.inference_mode(False), torch.enable_grad():
            return self.meet(Call(func, name, args, kwargs, deps), rule, inplace)

    def meet(self, call: Call, rule: Callable | None, inplace: bool):
        """The call's output by its rule; in place, written to what it overwrites."""
        if call.name in SCALED:
            call = in_order(call)
        for t in call.deps:
            self.check(t)
        if rule is None:
            self.refuse(f"linearize has no rule for {title(call.func)}")
        if not inplace:
            return rule(self, call)
        call.func, old = functional(call.name), call.args[0]
        if dependent(old):  # what is overwritten may be wanted by a backward pass
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

    def enter_one_hot(self, ids: Tensor) -> Tensor:
        """at="inputs": the embedding is one more linear map, of the one-hot rows that are X."""
        weight, self.one_hot = self.one_hot, None
        rows = self.enter(F.one_hot(ids, len(weight)).to(weight.dtype))
        return self.record(torch.matmul, (rows, weight))

    def tag(self, t: Tensor, tag: Tag) -> Tensor:
        tag.version, tag.recorder, t._tag = t._version, self, tag
        if tag.base is not None:
            self.based[t] = True
        return t

    def check(self, t: Tensor) -> None:
        """Refuse what came to depend on X unseen: by foreign code, a write through a view, or round the boundary."""
        tag = t._tag if dependent(t) and t._tag.recorder is self else None
        if tag is not None and (tag.vouched or not foreign(t)):
            affine, version = tag.settled or (None, 0)
            if affine is not None and affine._version != version:
                self.refuse("a view of a nonlinear value was written to, which the value itself does not show")
            if tag.version != t._version and t.untyped_storage().data_ptr() in self.nonlinear_in_place:
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
        tag = x._tag
        if tag.kind == "pending" and tag.settle is None:
            tag.settle = functools.cache(lambda: self.force(x, self.options["activation"]))
        if tag.settle is None:
            self.refuse(tag.origin or "a statistic of X is used outside a norm")
        affine = tag.settle()
        tag.settled = tag.settled or (affine, affine._version)
        return affine

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
        tags, settle = [t._tag for t in call.deps], None
        origin = origin or next((t.origin for t in tags if t.origin), "")
        if self.options["attention" if kind == "scores" else "norm"] == "tangent":
            if kind != "scores":  # x² is no activation here, but part of a norm
                call = call.mapped(lambda t: self.force(t, "tangent") if t._tag.kind == "pending" else t)
            out = settled_linear(self, call) if affine else self.tangent(call)
        else:
            out = call.run()
            if affine and isinstance(out, Tensor) and all(t.ref or t.settle or t.kind == "pending" for t in tags):
                settle = functools.cache(call.unless_overwritten(lambda: settled_linear(self, call)))
        for t in leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                ref = t._tag.ref if dependent(t) else None
                self.tag(t, Tag(kind, ref, gate=True, settle=settle, origin=origin))
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
            self.nonlinear_in_place.add(target.untyped_storage().data_ptr())
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


def functional(name: str) -> Callable:
    """What ``name_`` does in place, as a function of the old value."""
    own = {"setitem": _setitem, "zero": torch.zeros_like, "fill": torch.full_like,
           "copy": lambda t, source, *_: source.to(t.dtype).expand_as(t).clone()}  # fmt: skip
    return own.get(name) or getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name)


def _setitem(t, index, value):
    t = t.clone()
    t[index] = value
    return t


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
                t._tag.vouched = True
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
