"""How a transformer becomes linear at a fixed input: the table of rules, and ``linearize``.

While the model runs once at X, torch's own functions are intercepted (``torch.overrides.TorchFunctionMode``) and each
call on a value that depends on X meets one rule. No model class is copied, patched or subclassed: whatever a model is
written with, its operations are torch's.

    operation                                  becomes                                   rule           option
    ---------                                  -------                                   ----           ------
    linear maps, sums, reshapes, indexing      themselves                                linear
    softmax(S)                                 A, constant at X                          softmax        attention, gate
    attention(q, k, v)                         A·v, A constant at X                      attention      attention
    layer norm, RMS norm, fused or by hand     centring kept, γ/σ constant at X          norm, product  norm
    φ(z) elementwise, fused or by hand         φ(0) + z⊙r, r = (φ(z) − φ(0))/z at X      elementwise    activation
    g·u, one factor past a nonlinearity        that factor constant at X                 product        gate
    topk, sort, argmax, comparison             the choice made at X                      choice
    composite torch functions                  run with the interception re-entered      composite
    anything else                              an error that says how to add a rule

A value that depends on X is one that requires grad, so autograd keeps the books through views, in-place writes and
foreign code, and one backward pass through the recorded graph is Uᵀ·T. Beside it each call goes to a *tape*
(tensor.py), whose replay at another V is the frozen network's own forward.

x² opens a norm, a handwritten GELU and a squared ReLU, so nothing is decided before it must be. A value is

    linear    affine in X: it has a place on the tape
    pending   φ(z), elementwise in one linear z; becomes φ(0) + z⊙r once a linear map wants it
    stat      a statistic such as mean(x²), to be settled by what it turns into
    scale     a statistic that was rooted or inverted: where it multiplies or divides, a norm
    scores    any other product of two values that depend on X, such as q·kᵀ: only a softmax may swallow it
"""

import copy
import functools
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .models import find_blocks, n_blocks, token_embedding
from .tensor import AttentionTensor, Cut, Ref, Tape, leaves, map_leaves

OPTIONS = {
    "attention": ("frozen", "tangent"),
    "norm": ("frozen", "tangent"),
    "activation": ("ratio", "tangent"),
    "gate": ("gate", "value", "split", "tangent"),
}
TILE = 2**24  # entries of an attention pattern above which it is recomputed, by rows of queries, instead of kept


class UnsupportedOperation(RuntimeError):
    """A value that depends on X met an operation that no rule makes linear."""


@dataclass(slots=True)
class Tag:
    """What the recorder knows of one tensor that depends on X."""

    kind: str
    ref: Ref | None = None  # its place on the tape, if it has an affine form
    gate: bool = False  # it has passed a nonlinearity since its last matrix product
    base: Tensor | None = None  # it is the elementwise function ``fn`` of this linear tensor (None: of itself)
    fn: Callable | None = None
    form: Callable | None = None  # makes the affine form of a pending value or a statistic, should one be wanted
    origin: str = ""  # where it stopped being affine, for the error
    summed: "Tag | None" = None  # what this is the sum of: exp(S) / sum(exp(S)) is a softmax
    version: int = 0


@dataclass(slots=True)
class Call:
    """One intercepted call; ``deps`` are its tensors that depend on X."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict
    deps: list[Tensor]

    def run(self, f=lambda t: t):
        """The call itself, with ``f`` on each tensor that depends on X."""

        def on(x):
            return f(x) if dependent(x) else x

        return self.func(*map_leaves(on, self.args), **map_leaves(on, self.kwargs))

    def swap(self, old: Tensor, new: Tensor) -> "Call":
        def on(x):
            return new if x is old else x

        deps = [t for t in map_leaves(on, self.deps) if dependent(t)]
        return replace(self, args=map_leaves(on, self.args), kwargs=map_leaves(on, self.kwargs), deps=deps)

    def bind(self, **defaults) -> dict:
        """The arguments by name, given the names in order with their defaults."""
        return {**defaults, **dict(zip(defaults, self.args, strict=False)), **self.kwargs}


# ---------------------------------------------------------------------------------------------------- the recorder


class Recorder(TorchFunctionMode):
    """Meets each torch call on a value that depends on X with its rule, and writes the tape."""

    def __init__(self, model: nn.Module | None, **options):
        super().__init__()
        self.options = options
        self.names = {m: n for n, m in model.named_modules()} if model is not None else {}
        self.tape, self.cuts, self.bent = Tape(), [], set()
        self.X, self.paused, self.one_hot = None, False, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding and self.one_hot is not None and args[1] is self.one_hot:
            ids, weight = args[:2]  # at="inputs": the embedding is one more linear map, of one-hot rows
            self.one_hot = None
            rows = self.enter(F.one_hot(ids, len(weight)).to(weight.dtype))
            return self.record(torch.matmul, (rows, weight))
        if self.X is None or self.paused:
            return func(*args, **kwargs)
        deps = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not deps:
            return func(*args, **kwargs)
        rule, name, inplace = rule_of(func)
        if name in LIKE and len(args) > 1 and isinstance(args[1], Tensor):  # x.type_as(y): y lends its dtype or shape only
            args = (args[0], args[1].detach(), *args[2:])
            deps = deps[:1] if args[0].requires_grad else []
        if rule is shape_only or not deps:
            return func(*args, **kwargs)
        with torch.enable_grad():
            for t in deps:
                self.check(t)
            if rule is None:
                self.refuse(f"linearize has no rule for {title(func)}")
            call = Call(functional(name) if inplace else func, name, args, kwargs, deps)
            return self.write(args[0], rule(self, call)) if inplace else rule(self, call)

    # -- where X enters, and what may follow

    def enter(self, value: Tensor) -> Tensor:
        """Make ``value`` the X of the operator: what is computed from it from now on is recorded."""
        if self.X is not None:
            raise ValueError("X must enter the model once, but the module that makes it ran twice; choose another `at`")
        with torch.enable_grad():
            X = value.detach().clone().requires_grad_()
            x = self.tag(X.clone(), Tag("linear", Ref(-1)))
        self.X = X
        return x

    def tag(self, t: Tensor, tag: Tag) -> Tensor:
        tag.version, t._tag = t._version, tag
        return t

    def check(self, t: Tensor) -> None:
        """Refuse what came to depend on X unseen: by foreign code, a write through a view, or round the boundary."""
        tag = getattr(t, "_tag", None)
        found, functions = ancestry(t) if tag is None else ((), ())
        if tag is not None:
            if tag.version != t._version and t.untyped_storage().data_ptr() in self.bent:
                self.refuse("a value was made nonlinear in place through a view, which a replay cannot follow")
        elif not any(x is self.X for x in found):
            self.refuse("a value from before the boundary `at` is used behind it, carried round the hidden state, so "
                        "what follows is no function of X alone; linearize from at=\"tokens\"")  # fmt: skip
        else:
            how = f"the autograd.Function {functions[0]}" if functions else "a write into a view of a constant"
            self.refuse(f"a value depends on X through {how}, which interception cannot see")

    # -- what rules are made of

    def settled(self, x):
        """The affine form of a value that depends on X (an error where there is none); anything else as it is."""
        if not dependent(x) or x._tag.ref is not None:
            return x
        tag = x._tag
        if tag.kind == "pending" and tag.form is None:
            tag.form = functools.cache(lambda: self.force(x, self.options["activation"]))
        if tag.form is None:
            self.refuse(tag.origin or "a statistic of X is used outside a norm")
        return tag.form()

    def record(self, fn, args, kwargs=None, addends=(), **tag):
        """Run ``fn``, affine in the values that depend on X, and write it to the tape."""
        args, kwargs = map_leaves(self.settled, args), map_leaves(self.settled, kwargs or {})
        out = fn(*args, **kwargs)
        if any(out is x for x in args):
            return out
        return self.place(out, self.tape.append(fn, map_leaves(to_ref, args), map_leaves(to_ref, kwargs), addends), **tag)

    def place(self, out, index: int, **tag):
        """Tag the output of node ``index``."""
        for item, t in [(None, out)] if isinstance(out, Tensor) else enumerate(out):
            if isinstance(t, Tensor) and t.requires_grad:
                self.tape.met(index, t)
                self.tag(t, Tag("linear", Ref(index, item), **tag))
        return out

    def tangent(self, call: Call, **tag) -> Tensor:
        """The call's own derivative: y(X) + J·(x − X), on the tape as c + J·x with c = y(X) − J·X."""
        call = replace(call, args=map_leaves(self.settled, call.args), kwargs=map_leaves(self.settled, call.kwargs))
        deps = {id(t): t for t in leaves((call.args, call.kwargs)) if dependent(t)}
        at = tuple(t.detach() for t in deps.values())

        def f(*xs):
            given = dict(zip(deps, xs, strict=True))
            return call.run(lambda t: given[id(t)])

        def affine(c, *xs):  # what a mask set to −∞ is constant, and J does not read it: 0 in its stead keeps ∞ − ∞ out
            return c + torch.func.jvp(f, at, tuple(x.masked_fill(x.isinf(), 0) for x in xs))[1]

        y = call.run()
        c = y.detach() - affine(0, *at)
        index = self.tape.append(affine, (c, *(t._tag.ref for t in deps.values())), {}, (0,))
        return self.place(y, index, **{"gate": any(t._tag.gate for t in deps.values()), **tag})

    def force(self, t: Tensor, how) -> Tensor:
        """φ(z) as z⊙r + c: the ratio r = (φ(z) − φ(0))/z, c = φ(0), or the slope r = φ′(z), c = φ(z) − z⊙r."""
        z, fn = t._tag.base, t._tag.fn
        how = {"ratio": ratio, "tangent": slope}.get(how, how)
        with torch.no_grad():
            r, c = how(fn, z.detach(), t.detach(), self.module) if how not in (ratio, slope) else how(fn, z.detach(), t.detach())
        return self.record(diagonal, (z, r, c), addends=(2,), gate=True)

    def carry(self, call: Call, kind: str, affine: bool, origin: str = "") -> Tensor:
        """A value that only its use will settle stays of ``kind`` through an operation that is affine, or is not."""
        if self.options["attention" if kind == "scores" else "norm"] == "tangent":
            out = settled_linear(self, call) if affine else self.tangent(call)
        else:
            out, tags = call.run(), [t._tag for t in call.deps]
            origin = origin or next((tag.origin for tag in tags if tag.origin), "")
            open_ = affine and all(tag.ref or tag.form or tag.kind == "pending" for tag in tags)
            form = functools.cache(lambda: settled_linear(self, call)) if open_ and isinstance(out, Tensor) else None
            for t in leaves(out):
                if isinstance(t, Tensor) and t.requires_grad:
                    self.tag(t, Tag(kind, gate=True, form=form, origin=origin))
        for t in leaves(out):
            if isinstance(t, Tensor) and t.requires_grad:
                t._tag.kind = kind
        return out

    def constant(self, t, rule: str, operation: str):
        """``t`` held at its value at X: a cut, with the rule that says why."""
        if not dependent(t):
            return t
        self.cuts.append(Cut(self.module(), operation, rule))
        return t.detach()

    def write(self, target: Tensor, result: Tensor) -> Tensor:
        """An in-place operation is its functional form, then a copy into the target, whose views see it."""
        if result.requires_grad and result._tag.kind == "pending":
            result = self.settled(result)
        before = target._tag.ref if dependent(target) else None
        if before is None:  # so far the target was a constant, or had no affine form
            before = Ref(self.tape.append(torch.clone, (target.detach().clone(),), {}, (0,)))
        target.copy_(result)
        if result.requires_grad and result._tag.ref is None:
            self.bent.add(target.untyped_storage().data_ptr())
            return self.tag(target, copy.copy(result._tag))
        source = to_ref(result) if result.requires_grad else result.clone()
        index = self.tape.append(Tensor.copy_, (before, source), {}, (1,), True)
        kind, gate = (result._tag.kind, result._tag.gate) if result.requires_grad else ("linear", False)
        return self.tag(target, Tag(kind, Ref(index), gate))

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
            f"{what} (in {self.module()}). Nothing is guessed here; teach it with register_rule(function_or_module_class, "
            "rule), the rule one of linear, elementwise, softmax, choice, or your own function of (recorder, call)"
        )

    def origin(self, call: Call) -> str:
        return (
            f"{title(call.func)} multiplies two values that depend on X, and neither or both have passed a nonlinearity "
            f"(in {self.module()}): the product is not linear, and no softmax took it in"
        )


def dependent(x) -> bool:
    """Whether x is a tensor that depends on X: it carries a tag."""
    return isinstance(x, Tensor) and hasattr(x, "_tag")


def to_ref(x):
    return x._tag.ref if dependent(x) else x


def title(func) -> str:
    module = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{module}.{func.__name__}".replace("torch._C._", "torch.").replace("_VariableFunctionsClass", "torch")


def ancestry(t: Tensor) -> tuple[list[Tensor], list[str]]:
    """The leaves that ``t`` was computed from, and the autograd.Functions on the way."""
    stack, seen, found, functions = [t.grad_fn], set(), [t] if t.is_leaf else [], []
    while stack:
        fn = stack.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        if hasattr(fn, "variable"):
            found.append(fn.variable)
        if isinstance(fn, torch.autograd.function.BackwardCFunction):
            functions.append(type(fn).__name__.removesuffix("Backward"))
        stack.extend(f for f, _ in fn.next_functions)
    return found, functions


# ---------------------------------------------------------------------------------------------------- linear maps


def linear(rec: Recorder, call: Call):
    """Linear maps, sums, reshapes, indexing: themselves. What is not settled yet stays so."""
    kinds = {t._tag.kind for t in call.deps}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=True)
    if kinds <= {"stat", "scale"} or (kinds <= {"stat", "scale", "pending"} and kinds != {"pending"}):
        return rec.carry(call, "scale" if "scale" in kinds else "stat", affine=True)
    return settled_linear(rec, call)


def settled_linear(rec: Recorder, call: Call):
    addends = ADDENDS.get(call.name, ())
    factors = [x for key, x in (*enumerate(call.args), *call.kwargs.items()) if key not in addends]
    if sum(map(dependent, leaves(factors))) > 1:
        return rec.carry(call, "scores", affine=False, origin=rec.origin(call))  # q·kᵀ
    args, kwargs = map_leaves(rec.settled, call.args), map_leaves(rec.settled, call.kwargs)
    gate = call.name not in PRODUCTS and all(x._tag.gate for x in leaves((args, kwargs)) if dependent(x))
    return rec.record(call.func, args, kwargs, addends, gate=gate)


def pointwise(rec: Recorder, call: Call):
    """Elementwise and affine: a pending φ(z) stays pending, c·z keeps its z."""
    base = common_base(call.deps)
    if base is not None and any(t._tag.kind == "pending" for t in call.deps):
        return elementwise(rec, call)
    chain = compose(call) if base is not None and len(call.deps) == 1 and call.name in HOMOGENEOUS else None
    out = linear(rec, call)
    if chain and out.shape == base.shape and out is not base and not any(isinstance(x, Tensor) and x.dim() for x in call.args[1:]):
        out._tag.base, out._tag.fn = base, chain
    return out


def common_base(deps: list[Tensor]) -> Tensor | None:
    """The one linear tensor of which all of ``deps`` are elementwise functions, if there is one."""
    bases = [(t if t._tag.base is None else t._tag.base) if t._tag.kind in ("linear", "pending") else None for t in deps]
    return bases[0] if all(b is bases[0] for b in bases) else None


def compose(call: Call) -> Callable:
    inner = {id(t): t._tag.fn for t in call.deps}
    return lambda z: call.run(lambda t: inner[id(t)](z) if inner[id(t)] else z)


# ---------------------------------------------------------------------------------------------------- activations


def elementwise(rec: Recorder, call: Call):
    """φ(z): pending, since x·sigmoid(x), or tanh inside a GELU, is only part of an activation."""
    kinds = {t._tag.kind for t in call.deps}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=False)
    if kinds & {"stat", "scale"}:
        rooted = "scale" in kinds or call.name in ROOTS
        return rec.carry(call, "scale" if rooted else "stat", affine=False)
    base = common_base(call.deps)
    if base is None:  # an elementwise function of the settled values together
        rec.refuse(f"{title(call.func)} mixes two values that depend on X")
    fn, out = compose(call), call.run()
    if out.shape != base.shape:
        rec.refuse(f"{title(call.func)} is nonlinear and broadcasts {tuple(base.shape)} to {tuple(out.shape)}")
    return rec.tag(out, Tag("pending", gate=True, base=base, fn=fn))


def diagonal(z, r, c):
    return z * r if c is None else z * r + c


def derivative(fn, z):
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        return torch.autograd.grad(fn(z).sum(), z)[0]


def slope(fn, z, y):
    r = derivative(fn, z)
    return r, y - r * z


def ratio(fn, z, y):
    """r = (φ(z) − φ(0))/z; near 0, where the difference cancels, φ′(z/2), which is r up to z²φ‴/24."""
    zero = fn(torch.zeros_like(z[(slice(1),) * z.dim()]))
    zero = zero if zero.numel() == 1 else fn(torch.zeros_like(z))  # φ may hold constants of z's shape
    if not zero.any():
        small, r = z == 0, y / z
        return (torch.where(small, derivative(fn, torch.zeros_like(z)).to(r), r) if small.any() else r), None
    small = z.abs() < torch.finfo(z.dtype).eps ** (1 / 3)
    r = torch.where(small, derivative(fn, z / 2).to(y), (y - zero) / z)
    return r, y - z * r


# ---------------------------------------------------------------------------------------------------- products


def product(rec: Recorder, call: Call):
    """a·b: a norm where one is a scale, an activation where both are of one z, else the gate rule."""
    if len(call.deps) == 1:
        return pointwise(rec, call)
    a, b = call.deps
    kinds = {a._tag.kind, b._tag.kind}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=False)
    if common_base(call.deps) is not None:
        return elementwise(rec, call)
    if kinds <= {"stat", "scale"}:
        return rec.carry(call, "scale" if "scale" in kinds else "stat", affine=False)
    if "scale" in kinds:
        return hold(rec, call, a if a._tag.kind == "scale" else b, "norm")
    how = rec.options["gate"]
    if how == "tangent":
        return rec.tangent(call)
    if a._tag.gate == b._tag.gate:
        return rec.carry(call, "scores", affine=False, origin=rec.origin(call))
    gate, value = (a, b) if a._tag.gate else (b, a)
    if how != "split":
        return hold(rec, call, gate if how == "gate" else value, "gate")
    halves = [hold(rec, call, factor, "gate") for factor in (gate, value)]
    return rec.record(lambda x, y: (x + y) / 2, tuple(halves), gate=any(h._tag.gate for h in halves))


def hold(rec: Recorder, call: Call, factor: Tensor, option: str):
    """``call`` with one factor constant at X; with its own derivative where the option says tangent."""
    if rec.options[option] == "tangent":
        return rec.tangent(call)
    return settled_linear(rec, call.swap(factor, rec.constant(factor, option, call.name)))


def quotient(rec: Recorder, call: Call):
    """a/b: the denominator is constant at X, as a norm's scale is; exp(S)/sum(exp(S)) is a softmax."""
    a, b = [*call.args, *call.kwargs.values()][:2]
    if call.kwargs.get("rounding_mode") is not None:
        return elementwise(rec, call)
    if not dependent(b):
        return pointwise(rec, call)
    if not dependent(a):
        return elementwise(rec, call)
    if b._tag.summed is not None and b._tag.summed is a._tag:
        return softmax(rec, call)
    kinds = {a._tag.kind, b._tag.kind}
    if a._tag.kind == "scores":
        return rec.carry(call, "scores", affine=False)
    if common_base(call.deps) is not None:
        return elementwise(rec, call)
    if kinds <= {"stat", "scale"}:
        return rec.carry(call, "scale", affine=False)
    return hold(rec, call, b, "gate" if b._tag.gate and b._tag.kind in ("linear", "pending") else "norm")


def reduction(rec: Recorder, call: Call):
    """sum and mean: of x², a statistic; of a linear value, linear."""
    t = call.deps[0]
    if t._tag.kind == "pending":
        if rec.options["norm"] == "tangent":
            call = call.swap(t, rec.force(t, "tangent"))
        return rec.carry(call, "stat", affine=True)
    out = linear(rec, call)
    out._tag.summed = t._tag if call.name == "sum" and t._tag.kind == "scores" else None
    return out


def statistic(rec: Recorder, call: Call):
    """var, std and ‖·‖ of X."""
    if call.deps[0]._tag.kind == "scores":
        return rec.carry(call, "scores", affine=False)
    return rec.carry(call, "stat" if call.name == "var" else "scale", affine=False)


# ---------------------------------------------------------------------------------------------------- attention


def softmax(rec: Recorder, call: Call):
    """softmax: constant at X, which settles the scores too; of anything but scores it is a router's."""
    option = "attention" if any(t._tag.kind == "scores" for t in call.deps) else "gate"
    if rec.options[option] == "tangent":
        return rec.tangent(call, gate=True)
    return call.run(lambda t: rec.constant(t, "softmax" if option == "attention" else "router", call.name))


def pattern(query, key, mask, causal, scale, rows=slice(None)):
    """A = softmax(q·kᵀ·scale + mask) for some rows of queries; a row that may see nothing is zero, as in torch."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    scores = (query[..., rows, :].float() if half else query[..., rows, :]) @ key.mT.to(torch.float32 if half else key.dtype)
    scores = scores * scale
    if causal:
        L, S = query.shape[-2], key.shape[-2]
        mask = torch.ones(L, S, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return scores.softmax(-1).to(query.dtype)
    mask = mask[..., rows, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0).to(query.dtype)


def attend(value, query, key, *how):
    """A·v, the pattern recomputed by tiles of rows, in the backward pass too, so that it is never held whole."""
    tile = max(1, TILE * query.shape[-2] // (query.shape[:-1].numel() * key.shape[-2]))
    out = []
    for start in range(0, query.shape[-2], tile):
        again = functools.partial(pattern, query, key, *how, rows=slice(start, start + tile))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda A, again=again: (again, A.shape), lambda saved: saved[0]().reshape(saved[1])
        ):
            out.append(again() @ value)
    return torch.cat(out, -2)


def attention(rec: Recorder, call: Call):
    """scaled_dot_product_attention(q, k, v): A·v with A constant at X; grouped heads and masks included."""
    a = call.bind(query=None, key=None, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
    if a["dropout_p"]:
        rec.refuse("attention with dropout is random; call model.eval()")
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    scale = query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    repeat = query.shape[-3] // key.shape[-3] if a["enable_gqa"] else 1
    if rec.options["attention"] == "tangent":
        with rec:
            key, value = (t.repeat_interleave(repeat, -3) if repeat > 1 else t for t in (key, value))
            return pattern(query, key, mask, a["is_causal"], scale) @ value
    query, key, mask = (rec.constant(t, "softmax", call.name) for t in (query, key, mask))
    key = key.repeat_interleave(repeat, -3) if repeat > 1 else key
    if dependent(value):
        if repeat > 1:
            value = rec.record(Tensor.repeat_interleave, (value, repeat, -3))
        if query.shape[:-1].numel() * key.shape[-2] > TILE:
            return rec.record(attend, (value, query, key, mask, a["is_causal"], scale))
        return rec.record(torch.matmul, (pattern(query, key, mask, a["is_causal"], scale), value))
    return call.func(query, a["key"].detach(), value, mask, 0.0, a["is_causal"], scale=scale, enable_gqa=a["enable_gqa"])


# ---------------------------------------------------------------------------------------------------- norms, choices


def norm(rec: Recorder, call: Call):
    """layer_norm, rms_norm: (x − mean(x))·γ/σ + β with γ/σ constant at X; RMS norm does not centre."""
    if rec.options["norm"] == "tangent":
        return rec.tangent(call)
    centre = call.name == "layer_norm"
    more = {"bias": None, "eps": 1e-5} if centre else {"eps": None}
    a = call.bind(input=None, normalized_shape=None, weight=None, **more)
    x = rec.settled(a["input"])
    dims = tuple(range(-len(a["normalized_shape"]), 0))
    with torch.no_grad():
        wide = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
        eps = torch.finfo(wide.dtype).eps if a["eps"] is None else a["eps"]
        moment = wide.var(dims, correction=0, keepdim=True) if centre else wide.square().mean(dims, keepdim=True)
        scale = torch.rsqrt(moment + eps) * (1.0 if a["weight"] is None else a["weight"])
    rec.cuts.append(Cut(rec.module(), call.name, "norm"))
    return rec.record(scaled, (x, scale, a.get("bias"), dims if centre else None), addends=(2,), gate=x._tag.gate)


def scaled(x, scale, bias, centred):
    y = x if centred is None else x - x.mean(centred, keepdim=True)
    y = y * scale
    return (y if bias is None else y + bias).to(x.dtype)


def moments(rec: Recorder, call: Call):
    """var_mean, std_mean: each by its own rule."""
    mean_kwargs = {k: v for k, v in call.kwargs.items() if k in ("dim", "keepdim")}
    spread = call.name.removesuffix("_mean")
    return (
        statistic(rec, replace(call, func=getattr(torch, spread), name=spread)),
        reduction(rec, replace(call, func=torch.mean, name="mean", args=call.args[:2], kwargs=mean_kwargs)),
    )


def choice(rec: Recorder, call: Call):
    """A discrete choice is the one made at X; values that come with it (topk, sort, max) are taken at its indices."""
    out = call.run(lambda t: rec.constant(t, "choice", call.name))
    if isinstance(out, tuple):
        names = {"topk": ("input", "k", "dim")}.get(call.name, ("input", "dim", "keepdim"))
        a = call.bind(**{**dict.fromkeys(names), "dim": -1})
        squeezed = out[0].dim() < a["input"].dim()
        index = out[1].unsqueeze(a["dim"]) if squeezed else out[1]
        gather = Call(torch.gather, "gather", (a["input"], a["dim"], index), {}, call.deps)
        values = linear(rec, gather)
        if squeezed:
            values = linear(rec, Call(torch.squeeze, "squeeze", (values, a["dim"]), {}, [values]))
        return type(out)((values, out[1]))
    if isinstance(out, Tensor) and out.is_floating_point():
        a = call.bind(input=None, dim=None, keepdim=False)
        if isinstance(a["dim"], Tensor):  # torch.max(a, b)
            return larger(rec, call)
        x = a["input"] if a["dim"] is not None else linear(rec, Call(torch.flatten, "flatten", (a["input"],), {}, call.deps))
        dim = 0 if a["dim"] is None else a["dim"][0] if isinstance(a["dim"], list | tuple) and len(a["dim"]) == 1 else a["dim"]
        if not isinstance(dim, int):
            rec.refuse(f"{title(call.func)} over several axes")
        pick = torch.argmin if "min" in call.name else torch.argmax
        index = pick(x.detach(), dim, keepdim=True)
        values = linear(rec, Call(torch.gather, "gather", (x, dim, index), {}, [x]))
        return values if a["keepdim"] else linear(rec, Call(torch.squeeze, "squeeze", (values, dim), {}, [values]))
    return out


def larger(rec: Recorder, call: Call):
    """maximum(a, b), minimum(a, b): at each entry the one that was taken at X."""
    a, b = (x if isinstance(x, Tensor) else torch.as_tensor(x) for x in [*call.args, *call.kwargs.values()][:2])
    mask = a.detach() >= b.detach() if "max" in call.name else a.detach() <= b.detach()
    return pointwise(rec, Call(torch.where, "where", (mask, a, b), {}, [t for t in (a, b) if dependent(t)]))


# ---------------------------------------------------------------------------------------------------- everything else


def shape_only(rec: Recorder, call: Call):
    """What asks a tensor for its shape, dtype or device, not for its values."""


def leaves_torch(rec: Recorder, call: Call):
    """.item(), .numpy(), .detach(): the value would go on unseen."""
    rec.refuse(
        f"{title(call.func)} takes a value that depends on X out of sight, and what is made of it would silently be constant"
    )


def composite(rec: Recorder, call: Call):
    """A torch function written in Python: its body, with the interception on."""
    with rec:
        return reentered(call.func)(*call.args, **call.kwargs)


@functools.cache
def reentered(func: types.FunctionType) -> types.FunctionType:
    """``func`` without its first step, which hands the call to the interception that it came from."""
    off = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False)
    body = types.FunctionType(func.__code__, {**func.__globals__, **off}, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _words(text: str, value) -> dict:
    return dict.fromkeys(text.split(), value)


# Which arguments of an affine operation are added and not multiplied: T·V is the replay without them.
ADDENDS = {
    **_words("add sub rsub", (0, 1, "other")),
    **_words("cat concat concatenate stack hstack vstack", (0, "tensors")),
    **_words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d", (2, "bias")),
    **_words("addmm addmv addbmm baddbmm", (0, "input")),
    **_words("where", (1, 2, "input", "other")),
    **_words("masked_fill", (0, 2, "value")),
    **_words("masked_scatter", (0, 2, "source")),
    **_words("setitem index_put", (0, 2, "values")),
    **_words("scatter scatter_add", (0, 3, "src", "value")),
    **_words("index_add index_copy index_fill", (0, 3, "source", "value")),
    **_words("copy", (0, 1)),
    **_words("pad", (3, "value")),
    **_words("batch_norm", (2, 3, "bias", "running_mean")),
}
# Matrix products: what comes out of one has passed no nonlinearity since.
PRODUCTS = set(
    "matmul mm bmm mv dot inner outer tensordot einsum linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d addmm "
    "addmv addbmm baddbmm bilinear kron grouped_mm _grouped_mm transformers::grouped_mm_fallback".split()
)
HOMOGENEOUS = set("mul multiply div divide true_divide neg negative to float double half bfloat16 type type_as dropout".split())
LIKE = {"type_as", "expand_as", "view_as", "reshape_as", "to"}
ROOTS = set("rsqrt sqrt reciprocal pow float_power div divide true_divide".split())

RULES = {
    **_words(
        "view reshape flatten unflatten transpose permute t T mT swapaxes swapdims movedim moveaxis squeeze unsqueeze ravel "
        "expand expand_as broadcast_to view_as reshape_as clone contiguous getitem narrow select split split_with_sizes "
        "tensor_split chunk unbind hsplit vsplit unfold as_strided gather index_select take take_along_dim masked_select "
        "diagonal diag diag_embed diagonal_scatter tril triu flip fliplr flipud roll rot90 repeat repeat_interleave tile cumsum "
        "trace diff avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d interpolate fold pixel_shuffle "
        "pixel_unshuffle channel_shuffle upsample_bilinear2d view_as_real view_as_complex real imag conj "
        "slice_scatter select_scatter broadcast_tensors meshgrid batch_norm _conj resolve_conj atleast_2d atleast_3d",
        linear,
    ),
    **dict.fromkeys(ADDENDS, linear),
    **dict.fromkeys(PRODUCTS, linear),
    **_words("add sub subtract rsub where masked_fill neg negative positive to float double half bfloat16 type type_as", pointwise),
    **_words("dropout alpha_dropout feature_dropout dropout1d dropout2d", pointwise),
    **_words(
        "relu relu6 gelu silu mish elu celu selu leaky_relu prelu rrelu hardtanh hardswish hardsigmoid hardshrink softshrink "
        "tanhshrink softplus softsign logsigmoid log_sigmoid sigmoid expit tanh erf erfc exp exp2 expm1 log log2 log10 log1p "
        "sin cos tan atan sinh cosh asinh abs absolute square sqrt rsqrt reciprocal pow float_power clamp clip clamp_min "
        "clamp_max threshold nan_to_num xlogy round floor ceil trunc frac sign sgn logit sinc celu atan2",
        elementwise,
    ),
    **_words("mul multiply", product),
    **_words("div divide true_divide", quotient),
    **_words("sum mean nansum nanmean", reduction),
    **_words("var std norm vector_norm", statistic),
    **_words("var_mean std_mean", moments),
    **_words("softmax _safe_softmax", softmax),
    **_words("scaled_dot_product_attention", attention),
    **_words("layer_norm rms_norm", norm),
    **_words(
        "topk sort argsort argmax argmin max min amax amin median kthvalue mode cummax gt ge lt le eq ne greater "
        "greater_equal less less_equal not_equal isnan isinf isfinite nonzero any all logical_not bool int long isclose "
        "allclose equal bucketize searchsorted signbit __bool__ multinomial count_nonzero",
        choice,
    ),
    **_words("maximum minimum fmax fmin", larger),
    **_words("item tolist numpy detach data __float__ __int__ __index__ __array__ data_ptr __complex__", leaves_torch),
    **_words(
        "shape size dim ndim numel nelement dtype device layout is_floating_point is_complex is_cuda is_cpu is_mps is_sparse "
        "is_nested is_quantized is_leaf is_contiguous is_pinned requires_grad grad_fn grad stride storage_offset get_device "
        "element_size itemsize nbytes __len__ zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones "
        "new_empty new_full new_tensor new_empty_strided zero fill _is_view _base _version is_inference is_same_size __hash__ "
        "__repr__ __format__ is_tensor is_conj is_neg names has_names result_type __dlpack_device__ is_xpu is_meta is_mtia "
        "is_xla is_mkldnn is_sparse_csr is_maia is_vulkan is_ipu is_hpu is_distributed is_signed is_storage __dir__ retain_grad "
        "register_hook output_nr untyped_storage storage _backward_hooks volatile __setstate__ __deepcopy__ untyped_storage",
        shape_only,
    ),
    "__iter__": composite,
}
REGISTERED: dict = {}


def register_rule(target, rule: Callable) -> None:
    """Teach ``linearize`` an operation: ``target`` is a torch function, or a module class whose whole forward it is.

    ``rule`` is one of this module's (``linear``, ``elementwise``, ``softmax``, ``choice``, ...) or your own
    function ``rule(recorder, call)`` that returns the output; ``REGISTERED.pop(target)`` takes it back.

    >>> import torch
    >>> from tensorlens_utils import linearize_function, register_rule
    >>> from tensorlens_utils.linearize import elementwise
    >>> register_rule(torch.special.i0, elementwise)
    >>> T = linearize_function(lambda x: torch.special.i0(x).flip(1), torch.ones(1, 2, 3))
    >>> bool(torch.allclose(T @ T.input + T.bias, T.output))
    True
    """
    if not callable(target) or not callable(rule):
        raise TypeError(f"register_rule takes a function or module class and a rule function, not {target!r}, {rule!r}")
    REGISTERED[target] = rule
    rule_of.cache_clear()


@functools.cache
def rule_of(func) -> tuple[Callable | None, str, bool]:
    """(rule, plain name, in place?) of an intercepted torch function."""
    if isinstance(func, types.MethodWrapperType) and func.__name__ == "__get__":
        name = func.__self__.__name__
        return RULES.get(name), name, False
    name = getattr(func, "_qualified_op_name", func.__name__).removeprefix("aten::")
    name = name.removeprefix("special_").removeprefix("linalg_")
    if name.startswith("__") and name not in RULES:
        name = name.strip("_") + "_" * (name == "__setitem__")
    inplace = name.endswith("_") and not name.endswith("__")
    name = name[:-1] if inplace else name
    if func in REGISTERED:
        return REGISTERED[func], name, inplace
    if isinstance(func, types.FunctionType):
        if not (func.__module__ or "").startswith("torch"):
            return None, name, inplace
        if "inplace" in func.__code__.co_varnames or name not in RULES:
            return composite, name, False
    return RULES.get(name), name, inplace


def functional(name: str) -> Callable:
    """The operation that ``name_`` does in place."""
    own = {"setitem": _setitem, "copy": _copy, "fill": torch.full_like, "zero": torch.zeros_like}
    return own.get(name) or getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name)


def _setitem(t, index, value):
    t = t.clone()
    t[index] = value
    return t


def _copy(t, source, non_blocking=False):
    return source.to(t.dtype).expand_as(t).clone()


# ---------------------------------------------------------------------------------------------------- linearize


class _Reached(Exception):
    """The forward got to ``to``; what follows need not run."""


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
        for m, flag in training.items():
            m.training = flag
        for p, flag in grads.items():
            p.requires_grad_(flag)


def linearize(model: nn.Module, inputs, at="tokens", to=None, *, attention="frozen", norm="frozen", activation="ratio",
              gate="gate", budget_gb: float = 8.0) -> AttentionTensor:  # fmt: skip
    """The transformer at these inputs as one exact linear operator T: F(X) = T·X + B(X)  (TensorLens, arXiv 2601.17958, §3).

    model       any torch module, unmodified; one of the transformers library, or one that takes a float tensor
    inputs      what it is called with: a tokenizer's or image processor's output, a dict, or one tensor
    at          what X is: "inputs" (one-hot rows, pixels), "tokens" (token or patch embeddings), "embeddings" (what
                enters the first block) or k (what enters block k; n_blocks: what leaves the last)
    to          what F(X) is: a boundary k, "last_hidden_state" or "logits"; None: logits if the model has them
    attention   "frozen" (A constant at X) or "tangent" (its derivative)
    norm        "frozen" (1/σ constant) or "tangent"
    activation  "ratio" (φ(0) + z⊙r), "tangent", or your own function (φ, z, φ(z), module_path()) → (r, c): φ(z) = z⊙r + c
    gate        what is constant in act(g)·u: "gate", "value", "split" (half of each) or "tangent" (neither)
    budget_gb   the largest tensor that slice and dense may form

    All tangent is the Jacobian: T = J, B = F(X) − J·X. The model is in eval mode meanwhile, and left as it was. Raises
    ``UnsupportedOperation`` where no rule makes an operation linear: an operator that is returned is exact.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11))
    >>> T = linearize(model, torch.tensor([[1, 2, 3]]))
    >>> T.shape
    (1, 3, 11, 3, 8)
    >>> bool(torch.allclose(T @ T.input + T.bias, T.output, atol=1e-5))
    True
    """
    options = _checked(attention=attention, norm=norm, activation=activation, gate=gate)
    kwargs = _as_kwargs(model, inputs)
    rec = Recorder(model, **options)
    with untouched(model), torch.enable_grad(), _module_rules(model, rec), rec:
        Y = _forward(model, kwargs, at, to, rec)

    def forward():
        with untouched(model), torch.no_grad():
            return _forward(model, kwargs, at, to, None)

    mask = kwargs.get("attention_mask")
    return _operator(rec, Y, forward, mask, options, budget_gb)


def linearize_function(fn: Callable[[Tensor], Tensor], x: Tensor, *, attention="frozen", norm="frozen", activation="ratio",
                       gate="gate", budget_gb: float = 8.0) -> AttentionTensor:  # fmt: skip
    """``linearize`` for any callable on a tensor x (N, ..., ): T·x + B = fn(x), T of shape (*fn(x).shape, *x.shape[1:]).

    Parameters that ``fn`` closes over must not require grad, lest they be taken for X; a module's are seen to.
    """
    options = _checked(attention=attention, norm=norm, activation=activation, gate=gate)
    model = fn if isinstance(fn, nn.Module) else nn.Module()
    rec = Recorder(model, **options)
    with untouched(model), torch.enable_grad(), _module_rules(model, rec), rec:
        Y = rec.settled(fn(rec.enter(x)))

    def forward():
        with untouched(model), torch.no_grad():
            return fn(x)

    return _operator(rec, Y, forward, None, options, budget_gb)


def _checked(**options) -> dict:
    for name, value in options.items():
        if value not in OPTIONS[name] and not (name == "activation" and callable(value)):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, OPTIONS[name]))}, not {value!r}")
    return options


def _as_kwargs(model: nn.Module, inputs) -> dict:
    if isinstance(inputs, Tensor):
        return {getattr(model, "main_input_name", "") if hasattr(model, "config") else "": inputs}
    if not hasattr(inputs, "items"):
        raise TypeError(f"inputs must be what the model takes: a dict, a tokenizer's output or a tensor, not {type(inputs)}")
    return dict(inputs.items())


def _operator(rec, Y, forward, mask, options, budget_gb) -> AttentionTensor:
    if rec.X is None or not isinstance(Y, Tensor) or not Y.requires_grad:
        raise ValueError("the output does not depend on X: `at` lies behind `to`, or the module that makes X never ran")
    rec.tape.close(Y._tag.ref)
    last = None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        last = (mask.to(torch.int64) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1), mask.shape[1]
    return AttentionTensor(rec.X, Y, rec.tape, forward=forward, cuts=rec.cuts, last=last,
                           rules=options, budget_gb=budget_gb)  # fmt: skip


@contextmanager
def _module_rules(model: nn.Module, rec: Recorder):
    """Hooks on the modules that have a registered rule: their forward runs unseen, and the rule gives the output."""

    def pause(module, args, kwargs):
        rec.paused = True

    def answer(module, args, kwargs, out):
        deps = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if rec.X is not None and deps:
            for t in deps:
                rec.check(t)
            rule = next(REGISTERED[c] for c in type(module).__mro__ if c in REGISTERED)
            out = rule(rec, Call(module.forward, type(module).__name__, args, kwargs, deps))
        rec.paused = False
        return out

    with ExitStack() as stack:
        for m in model.modules():
            if any(c in REGISTERED for c in type(m).__mro__):
                stack.callback(m.register_forward_pre_hook(pause, with_kwargs=True).remove)
                stack.callback(m.register_forward_hook(answer, with_kwargs=True).remove)
        yield


def _forward(model: nn.Module, kwargs: dict, at, to, rec: Recorder | None) -> Tensor:
    """Run the model, X entering at ``at``, up to ``to``: (N, M, D'). Without a recorder it is the model's own forward."""
    kwargs = {k: v if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in kwargs.items()}
    enter = rec.enter if rec else lambda x: x
    main = next((k for k in ("", "inputs_embeds", "pixel_values", "input_ids") if k in kwargs), next(iter(kwargs)))
    floating = kwargs[main].is_floating_point()
    at, to = 0 if at == "embeddings" else at, 0 if to == "embeddings" else to
    if floating and (at == "inputs" or (at == "tokens" and main in ("", "inputs_embeds"))):
        kwargs[main] = enter(kwargs[main])
    boundaries = [b for b in (at, to) if isinstance(b, int)]
    if not boundaries and at not in ("inputs", "tokens"):
        raise ValueError(f'`at` must be "inputs", "tokens", "embeddings" or a boundary k, not {at!r}')
    if boundaries and not all(0 <= b <= n_blocks(model) for b in boundaries):
        raise ValueError(f"a boundary lies in 0..{n_blocks(model)}, the number of blocks; at={at!r}, to={to!r}")
    if len(boundaries) == 2 and to < at:
        raise ValueError(f"`to` must not lie before `at`; at={at}, to={to}")

    with ExitStack() as stack:
        if not floating and at == "inputs" and rec:
            rec.one_hot = token_embedding(model).weight
        elif at == "tokens" and not (floating and main != "pixel_values"):
            stack.callback(token_embedding(model).register_forward_hook(lambda m, a, out: _patches(enter, out)).remove)
        elif isinstance(at, int) and rec:  # what depends on the tokens and gets past the boundary must be noticed
            stack.callback(token_embedding(model).register_forward_hook(lambda m, a, out: out.detach().requires_grad_()).remove)
        if boundaries:
            _watch(model, stack, at, to, enter)
        if to == "last_hidden_state" and getattr(model, "base_model", model) is not model:
            stack.callback(model.base_model.register_forward_hook(_stop).remove)
        try:
            call = dict(kwargs)
            positional = (call.pop(""),) if "" in call else ()
            if hasattr(getattr(model, "config", None), "use_cache") and "past_key_values" not in call:
                call.setdefault("use_cache", False)
            out = model(*positional, **call)
        except _Reached as reached:
            out = reached.args[0]
    if isinstance(to, int) and not isinstance(out, Tensor):
        raise ValueError(f"the model never came to boundary {to}")
    Y = _read(out, to)
    if rec:
        rec.paused = True
        Y = rec.settled(Y)
    return Y


def _patches(enter, out: Tensor) -> Tensor:
    """Patch embeddings that leave a convolution as (N, D, rows, columns) are tokens (N, L, D) all the same."""
    if out.dim() != 4:
        return enter(out)
    return enter(out.flatten(2).mT).mT.reshape(out.shape)


def _watch(model: nn.Module, stack: ExitStack, at, to, enter) -> None:
    """Hooks that let X enter at boundary ``at`` and stop the forward at boundary ``to``, counting the calls of blocks."""
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


def _stop(module, args, out):
    raise _Reached(out)


def _read(out, to) -> Tensor:
    """F(X) from what the model returns, as (N, M, D'): M = 1 where it is a class vector."""
    Y = out if isinstance(out, Tensor) else None
    if Y is None and to in (None, "logits"):
        Y = getattr(out, "logits", None)
    if Y is None and to in (None, "last_hidden_state"):
        Y = getattr(out, "last_hidden_state", None)
        Y = out[0] if Y is None and isinstance(out, tuple | list) else Y
    if Y is None:
        raise ValueError(f'`to` must be a boundary k, "last_hidden_state" or "logits", and the model must return it; {to!r} '
                         f"is not among {list(out.keys()) if hasattr(out, 'keys') else type(out).__name__}")  # fmt: skip
    return Y.unsqueeze(1) if Y.dim() == 2 else Y
