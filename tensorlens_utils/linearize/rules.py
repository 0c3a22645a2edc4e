"""How each torch operation becomes linear at a fixed input X: one short rule per operation, with its equation.

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
    a quotient                                 its denominator constant at X             quotient       norm
    topk, sort, argmax, comparison             the choice made at X                      choice
    composite torch functions                  run with the interception re-entered      composite
    anything else                              an error that says how to add a rule

A rule is a function of the recorder (recorder.py) and the call (values.py, with the kinds of value: linear, pending,
stat, scale, scores) that returns the output; above it stand the names of the torch functions and methods it is for.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .tape import leaves, map_leaves
from .values import Call, Tag, common_base, dependent, title

TILE = 2**22  # entries of an attention pattern above which it is recomputed, by rows of queries, instead of kept
RULES: dict[str, Callable] = {}


def rule(names: str) -> Callable:
    """Enter a rule in the table for the torch functions and methods of these names, in place or not."""

    def enter(f: Callable) -> Callable:
        RULES.update(dict.fromkeys(names.split(), f))
        return f

    return enter


def _addends(signature: str) -> tuple:
    """Positions and names of a signature's starred arguments."""
    starred = [(i, s[1:].split("|")) for i, s in enumerate(signature.split()) if s[0] == "*"]
    return (*(i for i, _ in starred), *(name for _, names in starred for name in names))


# Which arguments (*) of an affine operation are added and not multiplied: T·V is the replay without them.
ADDENDS = {name: _addends(signature) for signature, names in {
    "*input *other": "add sub subtract rsub",
    "*tensors": "cat concat concatenate stack hstack vstack",
    "input weight *bias": "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d",
    "*input a b": "addmm addmv addbmm baddbmm",
    "condition *input *other": "where",
    "*input mask *value|source": "masked_fill masked_scatter",
    "*input index *value|values": "setitem index_put",
    "*input dim index *src|source|value": "scatter scatter_add index_add index_copy index_fill",
    "*input *src": "slice_scatter copy",
    "input n dim *prepend *append": "diff",
    "input pad mode *value": "pad",
    "input weight *bias *running_mean": "batch_norm",
}.items() for name in names.split()}  # fmt: skip
# How many tensors, and the scalars that torch's deprecated order has between them: add(input, alpha, other) and
# addmm(beta, input, alpha, a, b).
SCALED = dict.fromkeys("add sub".split(), (2, ("alpha",)))
SCALED |= dict.fromkeys("addmm addmv addbmm baddbmm".split(), (3, ("beta", "alpha")))
# Matrix products: what comes out of one has passed no nonlinearity since.
PRODUCTS = set(
    "matmul mm bmm mv dot inner outer tensordot einsum linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "addmm addmv addbmm baddbmm grouped_mm _grouped_mm transformers::grouped_mm_fallback".split()
)
SCALINGS = set("mul multiply div divide true_divide neg negative to float double half bfloat16 type type_as".split())
ROOTS = set("rsqrt sqrt reciprocal pow float_power div divide true_divide".split())


# ---------------------------------------------------------------------------------------------------- linear maps


@rule(
    " ".join((*ADDENDS, *PRODUCTS)) + " view reshape flatten unflatten transpose permute t T mT swapaxes swapdims "
    "movedim moveaxis squeeze unsqueeze ravel expand broadcast_to clone contiguous getitem narrow select split "
    "split_with_sizes tensor_split chunk unbind unfold as_strided gather index_select take take_along_dim "
    "masked_select diagonal diag diag_embed tril triu flip roll rot90 repeat repeat_interleave tile cumsum trace "
    "avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d "
    "upsample_bicubic2d fold col2im im2col pixel_shuffle pixel_unshuffle view_as_real view_as_complex real imag "
    "conj resolve_conj"
)
def linear(rec, call: Call):
    """L(x) + b: itself. What is not settled yet stays so."""
    kinds = {t._tag.kind for t in call.deps}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=True)
    if kinds & {"stat", "scale"} and "linear" not in kinds and call.name not in PRODUCTS:
        return rec.carry(call, "scale" if "scale" in kinds else "stat", affine=True)
    return settled_linear(rec, call)


def settled_linear(rec, call: Call):
    """L(x) + b on the tape; a product of two values that depend on X, such as q·kᵀ, are scores."""
    addends = ADDENDS.get(call.name, ())
    factors = [x for key, x in (*enumerate(call.args), *call.kwargs.items()) if key not in addends]
    if sum(map(dependent, leaves(factors))) > 1:
        if rec.options["attention"] == "tangent" and any(t._tag.gate for t in call.deps):  # A·v: no scores any more
            return rec.tangent(call, gate=False)
        return rec.carry(call, "scores", affine=False, origin=two_factors(rec, call))
    if call.name in PRODUCTS and not any(map(dependent, leaves(factors))):  # X comes in by what is added alone
        addends = tuple(k for k, x in (*enumerate(call.args), *call.kwargs.items()) if isinstance(x, Tensor))
    gate = call.name not in PRODUCTS and all(rec.settled(t)._tag.gate for t in call.deps)
    return rec.record(call.func, call.args, call.kwargs, addends, gate=gate)


@rule("add sub subtract rsub where masked_fill neg negative positive float double half bfloat16 type")
def pointwise(rec, call: Call):
    """φ(z) + c stays pending where φ(z) is; and c·z knows that it is a multiple of z."""
    base = common_base(call.deps)
    if base is not None and any(t._tag.kind == "pending" for t in call.deps):
        return elementwise(rec, call)
    scalars = not any(isinstance(x, Tensor) and x.dim() for x in call.args[1:])
    fn = call.composed() if scalars and call.name in SCALINGS and len(call.deps) == 1 and base is not None else None
    out = linear(rec, call)
    if fn is not None and out is not base and dependent(out):
        out._tag.base, out._tag.fn = base, fn
        rec.based[out] = True
    return out


def in_order(call: Call) -> Call:
    """The call with its scalars by name, where they stand between the tensors."""
    n, names = SCALED[call.name]
    if len(call.args) <= n or not isinstance(call.args[-1], Tensor):
        return call
    scalars = [x for x in call.args if not isinstance(x, Tensor)]
    tensors = tuple(x for x in call.args if isinstance(x, Tensor))
    return replace(call, args=tensors, kwargs={**call.kwargs, **dict(zip(names, scalars, strict=False))})


def two_factors(rec, call: Call) -> str:
    return (f"{title(call.func)} in {rec.module()} multiplies two values that depend on X, and neither or both have "
            "passed a nonlinearity: that is not linear, and no softmax took it in; it was used")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- activations


@rule(
    "relu relu6 gelu silu mish elu celu selu leaky_relu prelu hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid log_sigmoid sigmoid expit tanh erf erfc exp exp2 expm1 log log2 log10 "
    "log1p sin cos tan atan sinh cosh asinh abs absolute square sqrt rsqrt reciprocal pow float_power clamp clip "
    "clamp_min clamp_max threshold nan_to_num round floor ceil trunc frac sign sgn logit sinc"
)
def elementwise(rec, call: Call):
    """φ(z) = φ(0) + z⊙r, r = (φ(z) − φ(0))/z: pending, since tanh inside a GELU is only part of an activation."""
    kinds = {t._tag.kind for t in call.deps}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=False)
    if kinds & {"stat", "scale"}:
        return rec.carry(call, "scale" if "scale" in kinds or call.name in ROOTS else "stat", affine=False)
    base, out = common_base(call.deps), call.run()
    if base is None or out.shape != base.shape:
        rec.refuse(f"{title(call.func)} is nonlinear, and mixes or broadcasts values that depend on X")
    if not out.requires_grad:  # a cast to integers
        rec.constant(call.deps[0], "choice", call.name)
        return out
    return rec.tag(out, Tag("pending", gate=True, base=base, fn=call.composed()))


def ratio(fn, z, y):
    """r = (φ(z) − φ(0))/z; near 0, where the difference cancels, φ′(z/2), which is r up to z²φ‴/24."""
    zero = fn(torch.zeros_like(z[(slice(1),) * z.dim()]))
    zero = zero if zero.numel() == 1 else fn(torch.zeros_like(z))  # φ may hold constants of z's shape
    if zero.any():
        small = z.abs() < torch.finfo(z.dtype).eps ** (1 / 3)
        r = torch.where(small, derivative(fn, z / 2).to(y), (y - zero) / z)
        return r, y - z * r
    r = y / z
    return (r if z.all() else torch.where(z == 0, derivative(fn, torch.zeros_like(z)).to(r), r)), None


def slope(fn, z, y):
    """r = φ′(z), the tangent."""
    r = derivative(fn, z)
    return r, y - r * z


def derivative(fn, z):
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        return torch.autograd.grad(fn(z).sum(), z)[0]


def diagonal(z, r, c):
    return z * r if c is None else z * r + c


# ---------------------------------------------------------------------------------------------------- products


@rule("mul multiply")
def product(rec, call: Call):
    """g·u: a norm where one is a scale, an activation where both are of one z, else the gate is constant at X."""
    if len(call.deps) == 1:
        return pointwise(rec, call)
    a, b = call.deps
    kinds, how = {a._tag.kind, b._tag.kind}, rec.options["gate"]
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=False)
    if common_base(call.deps) is not None:
        return elementwise(rec, call)
    if kinds <= {"stat", "scale"}:
        return rec.carry(call, "scale" if "scale" in kinds else "stat", affine=False)
    if "scale" in kinds:
        return hold(rec, call, a if a._tag.kind == "scale" else b, "norm")
    if how == "tangent":
        return rec.tangent(call)
    if a._tag.gate == b._tag.gate:
        return rec.carry(call, "scores", affine=False, origin=two_factors(rec, call))
    gate, value = (a, b) if a._tag.gate else (b, a)
    halves = [hold(rec, call, t, "gate") for t in {"gate": (gate,), "value": (value,), "split": (gate, value)}[how]]
    return halves[0] if how != "split" else rec.record(lambda x, y: (x + y) / 2, tuple(halves))


@rule("div divide true_divide")
def quotient(rec, call: Call):
    """a/b: b is constant at X, as a norm's σ is; exp(S)/sum(exp(S)) is a softmax."""
    (a, b), rounded = call.operands(), call.kwargs.get("rounding_mode")
    if not dependent(b) and not rounded:
        return pointwise(rec, call)
    if rounded or not dependent(a) or common_base(call.deps) is not None:
        return elementwise(rec, call)
    if a._tag.kind == "scores":
        return softmax(rec, call) if b._tag.summed is a._tag else rec.carry(call, "scores", affine=False)
    if a._tag.kind in ("stat", "scale"):
        return rec.carry(call, "scale", affine=False)
    return hold(rec, call, b, "gate" if b._tag.gate and b._tag.kind in ("linear", "pending") else "norm")


def hold(rec, call: Call, factor: Tensor, option: str):
    """``call`` with one factor constant at X, or, where the option says tangent, with its own derivative."""
    if rec.options[option] == "tangent":
        return rec.tangent(call)
    return settled_linear(rec, call.hold(factor, rec.constant(factor, option, call.name)))


# ---------------------------------------------------------------------------------------------------- norms


@rule("sum mean")
def reduction(rec, call: Call):
    """Σx: linear where x is; Σφ(z): a statistic."""
    t = call.deps[0]
    if t._tag.kind == "pending":
        return rec.carry(call, "stat", affine=True)
    out = linear(rec, call)
    out._tag.summed = t._tag if t._tag.kind == "scores" and call.name == "sum" else None
    return out


@rule("var std norm vector_norm")
def statistic(rec, call: Call):
    """σ², σ and ‖x‖: constant at X where they scale."""
    scores = any(t._tag.kind == "scores" for t in call.deps)
    return rec.carry(call, "scores" if scores else "stat" if call.name == "var" else "scale", affine=False)


@rule("var_mean std_mean")
def moments(rec, call: Call):
    """(σ², μ): each by its own rule."""
    mean = {k: v for k, v in call.kwargs.items() if k in ("dim", "keepdim")}
    with rec:
        spread = getattr(torch, call.name.removesuffix("_mean"))
        return spread(*call.args, **call.kwargs), torch.mean(*call.args[:2], **mean)


@rule("layer_norm rms_norm")
def norm(rec, call: Call):
    """(x − mean(x))·γ/σ + β, γ/σ constant at X; RMS norm does not centre."""
    if rec.options["norm"] == "tangent":
        return rec.tangent(call)
    centre = call.name == "layer_norm"
    more = {"bias": None, "eps": 1e-5} if centre else {"eps": None}
    a = call.bind(input=None, normalized_shape=(), weight=None, **more)
    if dependent(a["weight"]):
        rec.refuse(f"{title(call.func)} with a weight that depends on X")
    x, dims = rec.settled(a["input"]), tuple(range(-len(a["normalized_shape"]), 0))
    with torch.no_grad():
        at = rec.constant(x, "norm", call.name)
        at = at.float() if at.dtype in (torch.float16, torch.bfloat16) else at
        at = at - at.mean(dims, keepdim=True) if centre else at
        square = at.square().mean(dims, keepdim=True)
        scale = torch.rsqrt(square + (torch.finfo(at.dtype).eps if a["eps"] is None else a["eps"]))
        scale = scale if a["weight"] is None else scale * a["weight"]
    return rec.record(normalised, (x, scale, a.get("bias"), dims if centre else None), addends=(2,), gate=x._tag.gate)


def normalised(x, scale, bias, centre):
    y = (x if centre is None else x - x.mean(centre, keepdim=True)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- attention


@rule("softmax _safe_softmax")
def softmax(rec, call: Call):
    """softmax(S) = A, constant at X, which settles the scores too; of anything but scores it is a router's."""
    option, why = ("attention", "softmax") if any(t._tag.kind == "scores" for t in call.deps) else ("gate", "router")
    if rec.options[option] == "tangent":
        return rec.tangent(call, gate=True)
    return call.run(lambda t: rec.constant(t, why, call.name))


@rule("scaled_dot_product_attention")
def attention(rec, call: Call):
    """softmax(q·kᵀ/√d + mask)·v = A·v, A constant at X; grouped heads and masks included."""
    optional = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    a = call.bind(query=None, key=None, value=None, **optional)
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"]:
        rec.refuse("attention with dropout is random")
    scale = q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    frozen = rec.options["attention"] == "frozen"
    if frozen:
        q, k, mask = (rec.constant(t, "softmax", call.name) if dependent(t) else t for t in (q, k, mask))
    with rec:
        if a["enable_gqa"]:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        if not frozen or q.shape[:-1].numel() * k.shape[-2] <= TILE or not dependent(v):
            return pattern(q, k, mask, a["is_causal"], scale, scores=marked) @ v
    return rec.record(attend, (v, q, k, mask, a["is_causal"], scale))


def marked(S):
    """Scores are scores where q or k alone depends on X, too, which makes them linear in it."""
    if dependent(S):
        S._tag.kind = "scores"
    return S


def pattern(q, k, mask, causal, scale, rows=slice(None), scores=lambda S: S):
    """A = softmax(q·kᵀ·scale + mask) for some rows of queries; a row that may see nothing is zero, as in torch."""
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    S = scores(q[..., rows, :].to(wide) @ k.mT.to(wide) * scale)
    if mask is None:
        return S.softmax(-1).to(q.dtype)
    mask = mask[..., rows, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
    S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask
    return S.softmax(-1).masked_fill((S == -torch.inf).all(-1, keepdim=True), 0).to(q.dtype)


def attend(v, q, k, *how):
    """A·v with the pattern made tile by tile of rows, in the backward pass too, so that it is never held whole."""
    tile, out = max(1, TILE * q.shape[-2] // (q.shape[:-1].numel() * k.shape[-2])), []
    for start in range(0, q.shape[-2], tile):
        A = functools.partial(pattern, q, k, *how, rows=slice(start, start + tile))
        recompute = (lambda t, A=A: (A, t.shape)), (lambda saved: saved[0]().view(saved[1]))
        with torch.autograd.graph.saved_tensors_hooks(*recompute):
            out.append(A() @ v)
    return torch.cat(out, -2)


# ---------------------------------------------------------------------------------------------------- discrete choices


@rule(
    "topk sort argsort argmax argmin max min amax amin median kthvalue gt ge lt le eq ne greater greater_equal less "
    "less_equal not_equal isnan isinf isfinite nonzero any all logical_not bool int long isclose allclose equal "
    "bucketize searchsorted is_nonzero signbit __bool__ count_nonzero"
)
def choice(rec, call: Call):
    """argmax(x): the one made at X; the values that come with it (topk, sort, max) are x at these indices."""
    out = call.run(lambda t: rec.constant(t, "choice", call.name))
    if isinstance(out, Tensor) and not out.is_floating_point():
        return out
    a = call.bind(**dict.fromkeys(("input", "k", "dim") if call.name in ("topk", "kthvalue") else ("input", "dim")))
    x, dim, keep = a["input"], a["dim"], isinstance(out, Tensor) or out[1].dim() == a["input"].dim()
    if isinstance(dim, Tensor):  # torch.max(a, b)
        return larger(rec, call)
    if isinstance(out, tuple):
        dim = -1 if dim is None or isinstance(dim, bool) else dim
        index = out[1] if keep else out[1].unsqueeze(dim)
    elif call.name in ("max", "min", "amax", "amin"):
        dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
        index = (torch.argmin if "min" in call.name else torch.argmax)(x.detach(), dim, keepdim=True)
    else:
        rec.refuse(f"{title(call.func)} without an axis")
    with rec:
        values = x.gather(dim, index) if dim is not None else x.flatten().gather(0, index.flatten())
        values = values.reshape((out if isinstance(out, Tensor) else out[0]).shape)
    return values if isinstance(out, Tensor) else type(out)((values, out[1]))


@rule("maximum minimum fmax fmin")
def larger(rec, call: Call):
    """max(a, b): at each entry the one that was taken at X."""
    a, b = call.operands()
    mask = a.detach() >= b.detach() if "max" in call.name else a.detach() <= b.detach()
    with rec:
        return torch.where(mask, a, b)


# ---------------------------------------------------------------------------------------------------- everything else


@rule("dropout alpha_dropout feature_dropout batch_norm")
def inactive(rec, call: Call):
    """dropout and batch norm: affine in eval mode; random, or of the whole batch, in training."""
    a = call.bind(input=None, p=0.5, train=call.func is F.dropout)  # whose default is training
    if a.get("training", a["train"]) if "dropout" in call.name else call.args[5]:
        rec.refuse(f"{title(call.func)} in training mode is no function of X alone; call it with training=False")
    return a["input"] if "dropout" in call.name else linear(rec, call)


@rule("type_as to expand_as view_as reshape_as")
def like(rec, call: Call):
    """x.type_as(y): y lends its dtype or shape alone."""
    x, *others = call.args
    lent = map_leaves(lambda t: t.detach() if dependent(t) else t, (others, call.kwargs))
    alone = replace(call, args=(x, *lent[0]), kwargs=lent[1], deps=[x] if dependent(x) else [])
    if not alone.deps:
        return alone.run()
    return (pointwise if call.name in SCALINGS else linear)(rec, alone)


@rule("zero fill")
def filled(rec, call: Call):
    """zeros_like(x), x.new_tensor(3): of x the shape, dtype and device alone; in place, what forgets its old value."""
    if any(t is not call.args[0] for t in call.deps):
        rec.refuse(f"linearize has no rule for {title(call.func)} with a value that depends on X")
    return call.func(*call.args, **call.kwargs)


@rule(
    "size dim numel nelement ndimension stride storage_offset get_device element_size result_type untyped_storage "
    "_nested_tensor_from_mask_left_aligned __len__ __hash__ __repr__ __format__"
)
def shape_only(rec, call: Call):
    """What asks a tensor for its shape, dtype or device, not for its values."""
    return call.func(*call.args, **call.kwargs)


@rule("item tolist numpy detach data register_hook __float__ __int__ __index__ __array__ __complex__ data_ptr")
def escape(rec, call: Call):
    """.item(), .detach(): the value would go on unseen, and what is made of it would silently be constant."""
    rec.refuse(f"{title(call.func)} takes a value that depends on X out of torch's sight")


@rule("__iter__")
def composite(rec, call: Call):
    """A torch function written in Python: its body, with the interception on."""
    with rec:
        return reentered(call.func)(*call.args, **call.kwargs)


@functools.cache
def reentered(func: types.FunctionType) -> types.FunctionType:
    """``func`` without its first step, which hands the call to the interception that it came from."""
    overridden = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**func.__globals__, **dict.fromkeys(overridden, lambda *_: False)}
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


# ---------------------------------------------------------------------------------------------------- the table

REGISTERED: dict = {"transformers.models.bloom.modeling_bloom.BloomGelu": elementwise}  # an autograd.Function inside


def register_rule(target, rule: Callable) -> None:
    """Teach ``linearize`` an operation: ``target`` is a torch function, or a module class whose whole forward it is.

    ``rule`` is one of this module's (``linear``, ``elementwise``, ``softmax``, ``choice``, ...) or your own
    function ``rule(recorder, call)`` that returns the output; ``REGISTERED.pop(target)`` takes it back.

    >>> import torch
    >>> from tensorlens_utils.linearize import linearize_function
    >>> from tensorlens_utils.linearize.rules import elementwise, register_rule
    >>> register_rule(torch.special.i0, elementwise)
    >>> T = linearize_function(lambda x: torch.special.i0(x).flip(1), torch.ones(1, 2, 3))
    >>> bool(torch.allclose(T @ T.input + T.bias, T.output))
    True
    """
    if not callable(target) or not callable(rule):
        raise TypeError(f"register_rule takes a function or module class and a rule function, not {target!r}, {rule!r}")
    REGISTERED[target] = rule
    rule_of.cache_clear()


def registered(module: type) -> Callable | None:
    """The rule that stands for the whole forward of a module class, if there is one."""
    return next((REGISTERED[key] for key in _keys(module) if key in REGISTERED), None)


@functools.cache
def _keys(module: type) -> tuple:
    """What a module class may be registered under: itself, a class that it inherits from, the path of either."""
    return tuple(key for c in module.__mro__ for key in (c, f"{c.__module__}.{c.__qualname__}"))


@functools.cache
def rule_of(func) -> tuple[Callable | None, str, bool]:
    """(rule, plain name, in place?) of an intercepted torch function; rule None if there is none."""
    if isinstance(func, types.MethodWrapperType) and func.__name__ == "__get__":
        return RULES.get(func.__self__.__name__, shape_only), func.__self__.__name__, False
    name = getattr(func, "_qualified_op_name", func.__name__)
    name = name.removeprefix("aten::").removeprefix("special_").removeprefix("linalg_")
    if name.startswith("__") and name not in RULES:
        name = name.strip("_") + "_" * (name == "__setitem__")
    inplace = name.endswith("_") and not name.endswith("__")
    name = name[:-1] if inplace else name
    if func in REGISTERED:
        return REGISTERED[func], name, inplace
    python = isinstance(func, types.FunctionType)
    if python and not (func.__module__ or "").startswith("torch"):
        return None, name, inplace
    if name not in RULES and name.startswith("is_"):
        return shape_only, name, inplace
    if name not in RULES and (name.startswith("new_") or name.endswith("_like")):
        return filled, name, inplace
    opened = python and ("inplace" in func.__code__.co_varnames or name not in RULES or func is F.batch_norm)
    if opened and func is not F.dropout:  # which every block calls, to no effect
        return composite, name, False
    return RULES.get(name), name, inplace
