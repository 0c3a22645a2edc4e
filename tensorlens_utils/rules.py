"""How each torch operation becomes linear at a fixed input X: the rules, and the table of them.

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

A value that depends on X is one that requires grad, so autograd keeps the books through views, in-place writes and
foreign code, and one backward pass through the recorded graph is Uᵀ·T. Beside it each call goes to a *tape*
(tape.py), whose replay at another V is the frozen network's own forward.

x² opens a norm, a handwritten GELU and a squared ReLU, so nothing is decided before it must be. A value is

    linear    affine in X: it has a place on the tape
    pending   φ(z), elementwise in one linear z; becomes φ(0) + z⊙r once a linear map wants it
    stat      a statistic such as mean(x²), to be settled by what it turns into
    scale     a statistic that was rooted or inverted: where it multiplies or divides, a norm
    scores    any other product of two values that depend on X, such as q·kᵀ: only a softmax may swallow it
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .tape import Ref, leaves, map_leaves

TILE = 2**22  # entries of an attention pattern above which it is recomputed, by rows of queries, instead of kept


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
    taught: bool = False  # a registered rule vouches for the foreign code that made it
    version: int = 0
    recorder: object = None  # whose: a model may carry a value from one run into the next
    settled: tuple | None = None  # the affine form that was made, and its version then


def dependent(x) -> bool:
    """Whether x is a tensor that depends on X: it carries a tag."""
    return isinstance(x, Tensor) and hasattr(x, "_tag")


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
        args, kwargs = map_leaves(lambda x: f(x) if dependent(x) else x, (self.args, self.kwargs))
        return self.func(*args, **kwargs)

    def mapped(self, f) -> "Call":
        """The call with ``f`` on each tensor that depends on X."""
        args, kwargs = map_leaves(lambda x: f(x) if dependent(x) else x, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, deps=[t for t in leaves((args, kwargs)) if dependent(t)])

    def hold(self, old: Tensor, new: Tensor) -> "Call":
        return self.mapped(lambda t: new if t is old else t)

    def unless_overwritten(self, f: Callable) -> Callable:
        """``f``, which will read the call's constants later, guarded against their being written to meanwhile."""
        constants = [x for x in leaves((self.args, self.kwargs)) if isinstance(x, Tensor) and not dependent(x)]
        seen = [(x, x._version) for x in constants if not x.is_inference()]

        def checked(*z):
            if any(x._version != v for x, v in seen):
                raise UnsupportedOperation(f"{title(self.func)} read a constant that was overwritten before its result "
                                           "was used; give the model a copy to write to")  # fmt: skip
            return f(*z)

        return checked

    def bind(self, **defaults) -> dict:
        """The arguments by name, given the names in order with their defaults."""
        return {**defaults, **dict(zip(defaults, self.args, strict=False)), **self.kwargs}


def to_ref(x):
    return x._tag.ref if dependent(x) else x


def base_of(t: Tensor) -> Tensor:
    """What t is an elementwise function of: itself, too, once it was written to through a view."""
    return t if t._tag.base is None or t._tag.version != t._version else t._tag.base


def title(func) -> str:
    func = func.__self__ if func.__name__ == "__get__" else func
    owner = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{owner}.{func.__name__}".replace("torch._C._", "torch.").replace("TensorBase", "torch.Tensor")


# ---------------------------------------------------------------------------------------------------- linear maps


def linear(rec, call: Call):
    """Linear maps, sums, reshapes, indexing: themselves. What is not settled yet stays so."""
    kinds = {t._tag.kind for t in call.deps}
    if "scores" in kinds:
        return rec.carry(call, "scores", affine=True)
    if kinds & {"stat", "scale"} and "linear" not in kinds and call.name not in PRODUCTS:
        return rec.carry(call, "scale" if "scale" in kinds else "stat", affine=True)
    return settled_linear(rec, call)


def settled_linear(rec, call: Call):
    addends = ADDENDS.get(call.name, ())
    factors = [x for key, x in (*enumerate(call.args), *call.kwargs.items()) if key not in addends]
    if sum(map(dependent, leaves(factors))) > 1:  # q·kᵀ
        return rec.carry(call, "scores", affine=False, origin=two_factors(rec, call))
    if call.name in PRODUCTS and not any(map(dependent, leaves(factors))):  # X comes in by what is added alone
        addends = tuple(k for k, x in (*enumerate(call.args), *call.kwargs.items()) if isinstance(x, Tensor))
    gate = call.name not in PRODUCTS and all(rec.settled(t)._tag.gate for t in call.deps)
    return rec.record(call.func, call.args, call.kwargs, addends, gate=gate)


def pointwise(rec, call: Call):
    """Elementwise and affine: a pending φ(z) stays pending, and c·z knows that it is a multiple of z."""
    base = common_base(call.deps)
    if base is not None and any(t._tag.kind == "pending" for t in call.deps):
        return elementwise(rec, call)
    scalars = not any(isinstance(x, Tensor) and x.dim() for x in call.args[1:])
    fn = compose(call) if scalars and call.name in HOMOGENEOUS and len(call.deps) == 1 and base is not None else None
    out = linear(rec, call)
    if fn is not None and out is not base and dependent(out):
        out._tag.base, out._tag.fn = base, fn
        rec.based[out] = True
    return out


def common_base(deps: list[Tensor]) -> Tensor | None:
    """The one linear tensor of which all of ``deps`` are elementwise functions, if there is one."""
    bases = [base_of(t) if t._tag.kind in ("linear", "pending") else None for t in deps]
    return bases[0] if all(b is bases[0] for b in bases) else None


def compose(call: Call) -> Callable:
    inner = {id(t): None if base_of(t) is t else t._tag.fn for t in call.deps}
    return call.unless_overwritten(lambda z: call.run(lambda t: inner[id(t)](z) if inner[id(t)] else z))


def two_factors(rec, call: Call) -> str:
    return (f"{title(call.func)} in {rec.module()} multiplies two values that depend on X, and neither or both have "
            "passed a nonlinearity: that is not linear, and no softmax took it in; it was used")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- activations


def elementwise(rec, call: Call):
    """φ(z): pending, since x·sigmoid(x), or tanh inside a GELU, is only part of an activation."""
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
    return rec.tag(out, Tag("pending", gate=True, base=base, fn=compose(call)))


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
    if zero.any():
        small = z.abs() < torch.finfo(z.dtype).eps ** (1 / 3)
        r = torch.where(small, derivative(fn, z / 2).to(y), (y - zero) / z)
        return r, y - z * r
    small, r = z == 0, y / z
    return (torch.where(small, derivative(fn, torch.zeros_like(z)).to(r), r) if small.any() else r), None


# ---------------------------------------------------------------------------------------------------- products


def product(rec, call: Call):
    """a·b: a norm where one is a scale, an activation where both are of one z, else the gate rule."""
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


def hold(rec, call: Call, factor: Tensor, option: str):
    """``call`` with one factor constant at X, or, where the option says tangent, with its own derivative."""
    if rec.options[option] == "tangent":
        return rec.tangent(call)
    return settled_linear(rec, call.hold(factor, rec.constant(factor, option, call.name)))


def quotient(rec, call: Call):
    """a/b: the denominator is constant at X, as a norm's scale is; exp(S)/sum(exp(S)) is a softmax."""
    a, b = [*call.args, *call.kwargs.values()][:2]
    if call.kwargs.get("rounding_mode"):
        return elementwise(rec, call)
    if not dependent(b):
        return pointwise(rec, call)
    if not dependent(a) or common_base(call.deps) is not None:
        return elementwise(rec, call)
    if a._tag.kind == "scores":
        return softmax(rec, call) if b._tag.summed is a._tag else rec.carry(call, "scores", affine=False)
    if a._tag.kind in ("stat", "scale"):
        return rec.carry(call, "scale", affine=False)
    return hold(rec, call, b, "gate" if b._tag.gate and b._tag.kind in ("linear", "pending") else "norm")


# ---------------------------------------------------------------------------------------------------- norms


def reduction(rec, call: Call):
    """sum and mean: of x², a statistic; of a linear value, linear."""
    t = call.deps[0]
    if t._tag.kind == "pending":
        return rec.carry(call, "stat", affine=True)
    out = linear(rec, call)
    out._tag.summed = t._tag if t._tag.kind == "scores" and call.name == "sum" else None
    return out


def statistic(rec, call: Call):
    """var, std and ‖·‖ of X."""
    scores = any(t._tag.kind == "scores" for t in call.deps)
    return rec.carry(call, "scores" if scores else "stat" if call.name == "var" else "scale", affine=False)


def moments(rec, call: Call):
    """var_mean, std_mean: each by its own rule."""
    mean = {k: v for k, v in call.kwargs.items() if k in ("dim", "keepdim")}
    with rec:
        spread = getattr(torch, call.name.removesuffix("_mean"))
        return spread(*call.args, **call.kwargs), torch.mean(*call.args[:2], **mean)


def norm(rec, call: Call):
    """layer_norm, rms_norm: (x − mean(x))·γ/σ + β with γ/σ constant at X; RMS norm does not centre."""
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
        square = at.var(dims, correction=0, keepdim=True) if centre else at.square().mean(dims, keepdim=True)
        scale = torch.rsqrt(square + (torch.finfo(at.dtype).eps if a["eps"] is None else a["eps"]))
        scale = scale if a["weight"] is None else scale * a["weight"]
    return rec.record(normalised, (x, scale, a.get("bias"), dims if centre else None), addends=(2,), gate=x._tag.gate)


def normalised(x, scale, bias, centre):
    y = (x if centre is None else x - x.mean(centre, keepdim=True)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- attention


def softmax(rec, call: Call):
    """softmax: constant at X, which settles the scores too; of anything but scores it is a router's."""
    option, rule = ("attention", "softmax") if any(t._tag.kind == "scores" for t in call.deps) else ("gate", "router")
    if rec.options[option] == "tangent":
        return rec.tangent(call, gate=True)
    return call.run(lambda t: rec.constant(t, rule, call.name))


def attention(rec, call: Call):
    """scaled_dot_product_attention(q, k, v): A·v with A constant at X; grouped heads and masks included."""
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
            return pattern(q, k, mask, a["is_causal"], scale) @ v
    return rec.record(attend, (v, q, k, mask, a["is_causal"], scale))


def pattern(q, k, mask, causal, scale, rows=slice(None)):
    """A = softmax(q·kᵀ·scale + mask) for some rows of queries; a row that may see nothing is zero, as in torch."""
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    S = q[..., rows, :].to(wide) @ k.mT.to(wide) * scale
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


# ---------------------------------------------------------------------------------------------------- everything else


def choice(rec, call: Call):
    """A discrete choice is the one made at X; values that come with it (topk, sort, max) are taken at its indices."""
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


def larger(rec, call: Call):
    """maximum(a, b), minimum(a, b): at each entry the one that was taken at X."""
    a, b = [*call.args, *call.kwargs.values()][:2]
    mask = a.detach() >= b.detach() if "max" in call.name else a.detach() <= b.detach()
    with rec:
        return torch.where(mask, a, b)


def evaluation(rec, call: Call):
    """dropout and batch norm: affine in eval mode; random, or of the whole batch, in training."""
    dropout = "dropout" in call.name
    if call.bind(input=None, p=0.0, train=False)["train"] if dropout else call.args[5]:
        rec.refuse(f"{title(call.func)} in training mode is no function of X alone; call it with training=False")
    return pointwise(rec, call) if dropout else linear(rec, call)


def shape_only(rec, call: Call):
    """What asks a tensor for its shape, dtype or device, not for its values (in place: what forgets its value)."""
    return call.func(*call.args, **call.kwargs)


def out_of_sight(rec, call: Call):
    """.item(), .numpy(), .detach(): the value would go on unseen, and what is made of it would silently be constant."""
    rec.refuse(f"{title(call.func)} takes a value that depends on X out of torch's sight")


def composite(rec, call: Call):
    """A torch function written in Python: its body, with the interception on."""
    with rec:
        return reentered(call.func)(*call.args, **call.kwargs)


@functools.cache
def reentered(func: types.FunctionType) -> types.FunctionType:
    """``func`` without its first step, which hands the call to the interception that it came from."""
    names = {**func.__globals__}
    names.update(_each(lambda *_: False, "has_torch_function has_torch_function_unary has_torch_function_variadic"))
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _each(value, names: str) -> dict:
    return dict.fromkeys(names.split(), value)


# Which arguments of an affine operation are added and not multiplied: T·V is the replay without them.
ADDENDS = {
    **_each((0, 1, "input", "other"), "add sub subtract rsub"),
    **_each((0, "tensors"), "cat concat concatenate stack hstack vstack"),
    **_each((2, "bias"), "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d"),
    **_each((0, "input"), "addmm addmv addbmm baddbmm"),
    **_each((1, 2, "input", "other"), "where"),
    **_each((0, 2, "input", "value", "values", "source"), "masked_fill masked_scatter setitem index_put"),
    **_each((0, 3, "input", "src", "source", "value"), "scatter scatter_add index_add index_copy index_fill"),
    **_each((0, 1, "input", "src"), "slice_scatter"),
    **_each((3, 4, "prepend", "append"), "diff"),
    **_each((0, 1), "copy"),
    **_each((3, "value"), "pad"),
    **_each((2, 3, "bias", "running_mean"), "batch_norm"),
}
# Matrix products: what comes out of one has passed no nonlinearity since.
PRODUCTS = set(
    "matmul mm bmm mv dot inner outer tensordot einsum linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "addmm addmv addbmm baddbmm grouped_mm _grouped_mm transformers::grouped_mm_fallback".split()
)
HOMOGENEOUS = set("mul multiply div divide true_divide neg negative to float double half bfloat16 type type_as".split())
LIKE = set("type_as expand_as view_as reshape_as to".split())
ROOTS = set("rsqrt sqrt reciprocal pow float_power div divide true_divide".split())
RULES = {
    **dict.fromkeys((*ADDENDS, *PRODUCTS), linear),
    **_each(
        linear,
        "view reshape flatten unflatten transpose permute t T mT swapaxes swapdims movedim moveaxis squeeze unsqueeze "
        "ravel expand expand_as broadcast_to view_as reshape_as clone contiguous getitem narrow select split "
        "split_with_sizes tensor_split chunk unbind unfold as_strided gather index_select take take_along_dim "
        "masked_select diagonal diag diag_embed tril triu flip roll rot90 repeat repeat_interleave tile cumsum trace "
        "diff avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d "
        "upsample_bicubic2d fold col2im im2col pixel_shuffle pixel_unshuffle view_as_real view_as_complex real imag "
        "conj resolve_conj",
    ),
    **_each(
        pointwise,
        "add sub subtract rsub where masked_fill neg negative positive to float double half bfloat16 type type_as",
    ),
    **_each(evaluation, "dropout alpha_dropout feature_dropout batch_norm"),
    **_each(
        elementwise,
        "relu relu6 gelu silu mish elu celu selu leaky_relu prelu hardtanh hardswish hardsigmoid hardshrink "
        "softshrink tanhshrink softplus softsign logsigmoid log_sigmoid sigmoid expit tanh erf erfc exp exp2 expm1 "
        "log log2 log10 log1p sin cos tan atan sinh cosh asinh abs absolute square sqrt rsqrt reciprocal pow "
        "float_power clamp clip clamp_min clamp_max threshold nan_to_num round floor ceil trunc frac sign sgn logit "
        "sinc",
    ),
    **_each(product, "mul multiply"),
    **_each(quotient, "div divide true_divide"),
    **_each(reduction, "sum mean"),
    **_each(statistic, "var std norm vector_norm"),
    **_each(moments, "var_mean std_mean"),
    **_each(norm, "layer_norm rms_norm"),
    **_each(softmax, "softmax _safe_softmax"),
    **_each(attention, "scaled_dot_product_attention"),
    **_each(
        choice,
        "topk sort argsort argmax argmin max min amax amin median kthvalue gt ge lt le eq ne greater greater_equal "
        "less less_equal not_equal isnan isinf isfinite nonzero any all logical_not bool int long isclose allclose "
        "equal bucketize searchsorted is_nonzero signbit __bool__ count_nonzero",
    ),
    **_each(larger, "maximum minimum fmax fmin"),
    **_each(
        out_of_sight,
        "item tolist numpy detach data register_hook __float__ __int__ __index__ __array__ __complex__ data_ptr",
    ),
    **_each(
        shape_only,
        "size dim numel nelement ndimension stride storage_offset get_device element_size result_type "
        "zero fill untyped_storage _nested_tensor_from_mask_left_aligned __len__ __hash__ __repr__ __format__",
    ),
    "__iter__": composite,
}
REGISTERED: dict = {"transformers.models.bloom.modeling_bloom.BloomGelu": elementwise}  # an autograd.Function inside


def registered(module: type) -> Callable | None:
    """The rule that stands for the whole forward of a module class, if there is one."""
    found = (REGISTERED.get(c) or REGISTERED.get(f"{c.__module__}.{c.__qualname__}") for c in module.__mro__)
    return next(filter(None, found), None)


def register_rule(target, rule: Callable) -> None:
    """Teach ``linearize`` an operation: ``target`` is a torch function, or a module class whose whole forward it is.

    ``rule`` is one of this module's (``linear``, ``elementwise``, ``softmax``, ``choice``, ...) or your own
    function ``rule(recorder, call)`` that returns the output; ``REGISTERED.pop(target)`` takes it back.

    >>> import torch
    >>> from tensorlens_utils.linearize import linearize_function
    >>> from tensorlens_utils.rules import elementwise, register_rule
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
    if isinstance(func, types.FunctionType) and not (func.__module__ or "").startswith("torch"):
        return None, name, inplace
    if name not in RULES and (name.startswith(("is_", "new_")) or name.endswith("_like")):
        return shape_only, name, inplace
    if isinstance(func, types.FunctionType) and ("inplace" in func.__code__.co_varnames or name not in RULES
                                                or func is F.batch_norm):  # fmt: skip
        return composite, name, False
    return RULES.get(name), name, inplace


def functional(name: str) -> Callable:
    """What ``name_`` does in place, as a function of the old value."""
    own = {"setitem": _setitem, "zero": torch.zeros_like, "fill": torch.full_like,
           "copy": lambda t, source, *_: source.to(t.dtype).expand_as(t).clone()}  # fmt: skip
    return own.get(name) or getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name)


def _setitem(t, index, value):
    t = t.clone()
    t[index] = value
    return t
