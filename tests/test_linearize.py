"""Rule by rule, each against a small dense reference; what no rule covers raises; nothing is left changed.

Three laws carry most of it. An affine f has T = ∂f/∂X and B = f(0), whatever the options. With all options tangent the
same holds of any f, with B = f(X) − T·X. And T·X + B = f(X), always.
"""

import importlib
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import nn

from tensorlens_utils import rules
from tensorlens_utils.linearize import OPTIONS, UnsupportedOperation, linearize, linearize_function
from tensorlens_utils.rules import REGISTERED, elementwise, linear, register_rule

TANGENT = dict.fromkeys(OPTIONS, "tangent")
N, L, D = 2, 3, 4


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W, W2, C = noise(N, L, D), noise(D, D, seed=1), noise(D, D, seed=2), noise(N, L, D, seed=3)
EYE, EYE_L = torch.eye(D, dtype=torch.float64), torch.eye(L, dtype=torch.float64)


def close(a, b, bar=1e-13):
    assert a.shape == b.shape
    scale = max(float(b.abs().max()), 1.0) if b.numel() else 1.0
    assert float((a - b).abs().max() if b.numel() else 0) <= bar * scale, (a - b).abs().max()


def jacobian(f, x):
    """∂f/∂x as (N, *out, *in), for a function that does not mix the inputs of a batch."""
    J = torch.autograd.functional.jacobian(lambda x: f(x).sum(0), x)
    return J.movedim(f(x).dim() - 1, 0).detach()


def apply(T, V):
    """T·V for a dense T (N, *out, *in) and V (N, *in)"""
    k = T.dim() - V.dim() + 1
    return (T.flatten(k) * V.flatten(1).view(len(V), *[1] * (k - 1), -1)).sum(-1)


def operator(f, x=X, **options):
    """The operator, seen to be exact: its certificate, f(X) by its dense matrix, one matrix both ways."""
    T = linearize_function(f, x, **options)
    T.certificate().check()
    dense, V = T.dense(), noise(*x.shape, seed=9)
    close(apply(dense, x) + T.bias, f(x).detach())
    close(T.matvec(V), apply(dense, V))
    close(T.replay(V), T.matvec(V) + T.bias)
    return T


def rowwise(per_token):
    """A map of channels at each token, (N, L, D', D), as T (N, L, D', L, D)."""
    return torch.einsum("nlcd,lm->nlcmd", per_token, EYE_L)


# ---------------------------------------------------------------------------------------------- affine maps: themselves

mask = C > 0
index = torch.tensor([2, 0])
conv1, conv2 = noise(5, D, 2, seed=4), noise(2, 1, 2, 2, seed=5)
running = (
    torch.rand(L, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5,
    noise(L, seed=6),
    noise(L, seed=7),
)


def inplace(start, *steps):
    """x → start(x), then each step on it in place."""

    def f(x):
        y = start(x)
        for step in steps:
            step(y, x)
        return y

    return f


def zeros(x):
    return torch.zeros(N, L, D, dtype=torch.float64)


def ones(x):
    return zeros(x) + 1


def swapped_in_place(x):
    y = x * 2
    view = y[:, 0]
    view.add_(1)
    view.mul_(3)
    y[:, 1] += x[:, 2]
    return y


def constant_changed_later(x):
    c = zeros(x)
    y = x + c
    c.add_(5)
    return y + c


def buffer_used_twice(x):
    c = zeros(x)
    c.add_(x)
    first = c.clone()
    c[:, 0] = 7.0
    return first + 2 * c


AFFINE = {
    "matmul": lambda x: x @ W,
    "constant on the left": lambda x: W[:L, :L] @ x,
    "linear": lambda x: F.linear(x, W, W[0]),
    "linear by keyword": lambda x: F.linear(input=x, weight=W, bias=W[0]),
    "einsum": lambda x: torch.einsum("nld,de,lm->nme", x, W, W[:L, :L]),
    "einsum as a list": lambda x: torch.einsum("nld,de->nle", [x, W]),
    "addmm": lambda x: torch.addmm(W[0], x.flatten(0, 1), W).view(N, L, D),
    "addmm of a value": lambda x: torch.addmm(x.flatten(0, 1), C.flatten(0, 1), W, beta=0.5, alpha=2).view(N, L, D),
    "addmm of two values": lambda x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), W, beta=0.5, alpha=2).view(N, L, D),
    "baddbmm": lambda x: torch.baddbmm(C, x, W.expand(N, D, D)),
    "baddbmm of a value": lambda x: torch.baddbmm(x, C, W.expand(N, D, D), beta=3.0),
    "conv1d": lambda x: F.conv1d(x.mT, conv1, conv1[:, 0, 0]).mT,
    "conv2d": lambda x: F.conv2d(x[:, None], conv2, conv2[:, 0, 0, 0], padding=1),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.mT, noise(D, 3, 2), W[0, :3]).mT,
    "batch_norm": lambda x: F.batch_norm(x, running[1], running[0], running[2], running[1], False),
    "bilinear interpolation": lambda x: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"),
    "avg_pool2d": lambda x: F.avg_pool2d(x[:, None], 2, 1),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
    "sum and difference": lambda x: (2 - x) + torch.sub(1, x, alpha=3) + torch.add(C, x, alpha=2) - torch.rsub(x, 4),
    "mean and sum": lambda x: x - x.mean(-1, keepdim=True) + x.sum((1, 2), keepdim=True) + torch.mean(x, [1], True),
    "quotient by a constant": lambda x: -x / C / 2,
    "cat": lambda x: torch.cat([C[:, :1], x, 2 * x, C[:, 1:]], dim=1),
    "stack": lambda x: torch.stack((x, C), -1),
    "where": lambda x: torch.where(mask, x, C) + torch.where(mask, 3.0, x),
    "where by keyword": lambda x: torch.where(input=2 * x, condition=mask, other=C),
    "masked_fill": lambda x: x.masked_fill(mask, 5.0) + torch.masked_fill(x, ~mask, torch.tensor(2.0).double()),
    "masked_fill of a constant": lambda x: C.masked_fill(mask, 5.0) + x,
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x, (2, 1)),
    "circular pad": lambda x: F.pad(x, (1, 1), mode="circular"),
    "scatter_add": lambda x: torch.scatter_add(C, 1, torch.zeros(N, L, D).long(), x),
    "scatter": lambda x: C.scatter(1, torch.tensor([2, 1, 0])[None, :, None].expand(N, L, D), x),
    "index_add": lambda x: C.index_add(1, index, x[:, :2], alpha=2),
    "index_copy": lambda x: x.index_copy(1, index, C[:, :2]),
    "index_put": lambda x: C.index_put((torch.tensor([0, 1]), torch.tensor([1, 1])), x[:, 0]),
    "gather": lambda x: x.gather(1, torch.tensor([2, 2, 0])[None, :, None].expand(N, L, D)),
    "indexing": lambda x: x[:, index] + x[:, [0, 1]] + x[..., 1:, :] + x[:, mask[0].any(-1)][:, :2] + x[:, None, 0],
    "iteration": lambda x: torch.stack([row * (i + 1.0) for i, row in enumerate(x.unbind(1))], 1) + sum(x.mT.mT[0]) * 0,
    "reshapes": lambda x: x.view(N, L, 2, 2).permute(0, 2, 1, 3).flatten(2).unflatten(2, (3, 2)).reshape(N, -1),
    "movement": lambda x: x.roll(1, 1) + x.flip(1) + x.tril() + x.cumsum(2) + x.repeat(1, 2, 1)[:, L:] + x.expand_as(C),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1) + x.repeat_interleave(torch.tensor([1, 2, 3]), 1),
    "chunk and split": lambda x: torch.cat([*reversed(x.chunk(2, -1)), *x.split([1, 3], -1)], -1),
    "diff and trace": lambda x: x.diff(dim=1) + torch.diagonal(x, dim1=1, dim2=2).sum(-1)[:, None, None],
    "casts": lambda x: x.to(torch.float64).double().type_as(C).to(C).contiguous().clone(),
    "type_as of a value": lambda x: (x + C.type_as(x)).to(x) + torch.zeros_like(x) + x.new_ones(D),
    "setitem": inplace(lambda x: x.clone(), lambda y, x: y.__setitem__((slice(None), 0), 2 * x[:, 1])),
    "setitem of a constant": inplace(lambda x: x * 1, lambda y, x: y.__setitem__((slice(None), 0), 3.0)),
    "setitem in a constant": inplace(ones, lambda y, x: y.__setitem__((slice(None), slice(1, 3)), x[:, :2])),
    "add_ to a constant": inplace(ones, lambda y, x: y.add_(x), lambda y, x: y.mul_(2).sub_(C)),
    "iadd to a constant": inplace(ones, lambda y, x: y.__iadd__(x)),
    "index_add_ to a constant": inplace(zeros, *[lambda y, x: y.index_add_(1, index, x[:, :2])] * 2),
    "masked_fill_": inplace(lambda x: x + 1, lambda y, x: y.masked_fill_(mask, 9.0)),
    "masked_fill_ of a constant, then add_": inplace(ones, lambda y, x: y.masked_fill_(mask, 0).add_(x)),
    "copy_ into a constant": inplace(ones, lambda y, x: y.copy_(x), lambda y, x: y.add_(1)),
    "zero_ and fill_": inplace(lambda x: x * 2, lambda y, x: y.zero_(), lambda y, x: y.add_(x).add_(C)),
    "writes through views": swapped_in_place,
    "a constant that changes later": constant_changed_later,
    "a buffer that takes in X": buffer_used_twice,
    "topk": lambda x: x.topk(2, -1).values,
    "topk along tokens": lambda x: torch.topk(x, 2, dim=1)[0],
    "sort": lambda x: x.sort(-1, descending=True)[0] + torch.sort(x, dim=1).values,
    "max and min along an axis": lambda x: x.max(-1).values + torch.min(x, dim=-1)[0] + x.amax(-1) - x.amin(dim=-1),
    "max with its axis kept": lambda x: x - x.max(1, keepdim=True)[0] - x.amax(-1, keepdim=True),
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "a comparison": lambda x: torch.where(x > 0.1, x, -2 * x) * (x < 1),
    "maximum": lambda x: torch.maximum(x, C) + torch.minimum(x, x @ W),
    "nonzero rows": lambda x: x[:, (x[0, :, 0] > 0).nonzero().squeeze(-1)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_map_is_itself(name):
    """T is its Jacobian, and what it adds is B: gone from T·V, all there in T·V + B. A choice is the one at X."""
    f = AFFINE[name]
    T, J = operator(f), jacobian(f, X)
    close(T.dense(), J)
    close(T.bias, f(X) - apply(J, X))
    close(operator(f, **TANGENT).dense(), J)
    V = noise(*X.shape, seed=5)  # another point, at which choices and masks would be others
    close(T.replay(V), f(X) + apply(J, V - X))


def test_replays_do_not_disturb_one_another():
    """In-place writes are done again at each replay, on its own values."""
    T = operator(AFFINE["a buffer that takes in X"])
    first = T.replay(X)
    T.matvec(C), T.replay(2 * X)
    assert torch.equal(T.replay(X), first)


# ---------------------------------------------------------------------------------------------------------- activations

Z = torch.tensor([0.0, 1e-9, -1e-9, 3e-7, -2e-5, 4e-4, 0.3, -2.0, 5.0, -0.1, 40.0, -40.0]).double().view(1, 3, 4)
RATIOS = {  # (φ(z) − φ(0))/z, written so that nothing cancels
    torch.relu: lambda z: (z > 0).double(),
    F.gelu: lambda z: (1 + torch.erf(z / math.sqrt(2))) / 2,
    F.silu: torch.sigmoid,
    torch.tanh: lambda z: torch.tanh(z) / z,
    torch.sigmoid: lambda z: torch.tanh(z / 2) / 2 / z,
    F.softplus: lambda z: torch.where(z > 30, 1 - math.log(2) / z, torch.log1p(torch.expm1(z) / 2) / z),
    torch.exp: lambda z: torch.expm1(z) / z,
    torch.cos: lambda z: -2 * torch.sin(z / 2) ** 2 / z,
    torch.square: lambda z: z,
    F.leaky_relu: lambda z: 0.01 + 0.99 * (z > 0).double(),
}
AT_ZERO = {torch.relu: 0.0, F.gelu: 0.5, F.silu: 0.5, torch.tanh: 1.0, torch.sigmoid: 0.25, F.softplus: 0.5,
           torch.exp: 1.0, torch.cos: 0.0, torch.square: 0.0, F.leaky_relu: 0.01}  # fmt: skip


@pytest.mark.parametrize("phi", RATIOS, ids=lambda f: f.__name__)
def test_an_activation_is_its_ratio_and_its_value_at_zero_is_bias(phi):
    z = Z.clamp(-5, 5) if phi is torch.exp else Z
    T = linearize_function(phi, z)
    T.certificate().check()
    r = torch.where(z == 0, AT_ZERO[phi], RATIOS[phi](z)).flatten()
    close(T.dense().view(12, 12), torch.diag(r), 1e-11)  # measured 1.4e-12, where the difference φ(z) − φ(0) cancels
    close(T.bias, phi(torch.zeros_like(z)), 1e-11)
    close(T @ z + T.bias, phi(z))
    tangent = linearize_function(phi, z, activation="tangent")
    close(tangent.dense().view(12, 12), torch.diag(jacobian(phi, z).view(12, 12).diag()))
    close(tangent.bias, phi(z) - tangent @ z)


FUSED = {
    "silu": (lambda z: z * torch.sigmoid(z), F.silu),
    "quick gelu": (lambda z: torch.sigmoid(1.702 * z) * z, lambda z: z * (1.702 * z).sigmoid()),
    "tanh gelu": (lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3)))),
                  lambda z: F.gelu(z, approximate="tanh")),
    "gelu": (lambda z: z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))), F.gelu),
    "squared relu": (lambda z: F.relu(z) ** 2, lambda z: torch.square(torch.relu(z))),
    "mish": (lambda z: z * torch.tanh(F.softplus(z)), F.mish),
    "relu": (lambda z: z.clamp(min=0), lambda z: F.relu(z + 0, inplace=True)),
    "relu in place": (lambda z: (z * 1).relu_(), F.relu),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_an_activation_by_hand_is_the_fused_one(name):
    def through(phi):
        return lambda x: phi(x @ W) @ W2

    for options in ({}, TANGENT):
        by_hand, fused = (operator(through(phi), **options) for phi in FUSED[name])
        close(by_hand.dense(), fused.dense())
        close(by_hand.bias, fused.bias)
    close(fused.dense(), jacobian(through(FUSED[name][0]), X))


def test_an_activation_of_ones_own_is_a_secant():
    """(φ, z, φ(z), module_path) → (r, c): here the secant to a baseline, φ(z) = r·z + c with c from the point z = 1."""

    def secant(phi, z, y, module_path):
        r = (y - phi(torch.ones_like(z))) / (z - 1)
        assert module_path() == "the function"
        return r, y - r * z

    T = operator(torch.tanh, activation=secant)
    r = (X.tanh() - math.tanh(1)) / (X - 1)
    close(T.dense(), torch.diag_embed(r.flatten(1)).view(T.shape))
    close(T.bias, X.tanh() - r * X)


# ---------------------------------------------------------------------------------------------------------------- norms


def layer_norm_matrix(x, gain, eps=1e-5):
    """(diag(γ)·C) ⊗ diag(1/σ)"""
    centre = EYE - 1 / D
    sigma = (x.var(-1, correction=0) + eps).sqrt()
    return rowwise(torch.einsum("c,cd,nl->nlcd", gain, centre, 1 / sigma))


def rms_norm_matrix(x, gain, eps=1e-6):
    return rowwise(torch.einsum("c,cd,nl->nlcd", gain, EYE, (x.square().mean(-1) + eps).rsqrt()))


def var_mean_norm(x, g, b):
    var, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * g + b


def mean_and_square_norm(x, g, b):  # σ² = mean(x²) − mean(x)²
    mean = x.mean(-1, keepdim=True)
    return g * (x - mean) * torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5) + b


LAYER_NORMS = {
    "fused": lambda x, g, b: F.layer_norm(x, (D,), g, b),
    "var": lambda x, g, b: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * g + b
    ),
    "var_mean": var_mean_norm,
    "mean of squares less the mean's": mean_and_square_norm,
    "std": lambda x, g, b: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.std(-1, correction=0, keepdim=True) ** 2 + 1e-5) * g + b
    ),
}
RMS_NORMS = {
    "fused": lambda x, g: F.rms_norm(x, (D,), g, 1e-6),
    "pow, mean": lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g,
    "square, quotient": lambda x, g: g * (x / torch.sqrt(torch.mean(torch.square(x), -1, True) + 1e-6)),
    "norm": lambda x, g: x / (x.norm(dim=-1, keepdim=True) ** 2 / D + 1e-6) ** 0.5 * g,
    "product with itself": lambda x, g: x * ((x * x).sum(-1, keepdim=True) / D + 1e-6).pow(-0.5) * g,
}
g, b = noise(D, seed=11), noise(D, seed=12)


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_keeps_its_centring_and_freezes_its_scale(name):
    def f(x):
        return LAYER_NORMS[name](x, g, b)

    T = operator(f)
    close(T.dense(), layer_norm_matrix(X, g))
    close(T.bias, b.expand_as(X))
    assert {cut.rule for cut in T.cuts} == {"norm"}
    close(operator(f, norm="tangent").dense(), jacobian(f, X))


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm_freezes_its_scale_and_centres_nothing(name):
    def f(x):
        return RMS_NORMS[name](x, g)

    T = operator(f)
    close(T.dense(), rms_norm_matrix(X, g))
    assert T.bias.abs().max() < 1e-15
    assert {cut.rule for cut in T.cuts} == {"norm"}
    close(operator(f, norm="tangent").dense(), jacobian(f, X))


@pytest.mark.parametrize("normalise", [
    lambda x: x / x.norm(dim=-1, keepdim=True),
    lambda x: F.normalize(x, dim=-1),
    lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-9),
    lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt(),
])  # fmt: skip
def test_normalising_divides_by_a_constant(normalise):
    T = operator(normalise)
    close(T.dense(), rowwise(EYE / X.norm(dim=-1)[..., None, None]))
    close(operator(normalise, **TANGENT).dense(), jacobian(normalise, X))


# ------------------------------------------------------------------------------------------------------------ attention


def test_softmax_is_constant_and_settles_its_scores():
    """A·X·W with A = softmax(X·W·W2ᵀ·Xᵀ): T = A ⊗ Wᵀ."""

    def f(x):
        return torch.softmax(((x @ W) @ (x @ W2).mT) / 2 + C[..., :L], -1) @ (x @ W)

    A = torch.softmax((X @ W @ W2.T @ X.mT) / 2 + C[..., :L], -1)
    T = operator(f)
    close(T.dense(), torch.einsum("nml,dc->nmcld", A, W))
    assert not T.bias.any()
    assert [cut.rule for cut in T.cuts] == ["softmax"]
    close(operator(f, attention="tangent").dense(), jacobian(f, X))


@pytest.mark.parametrize("clip", [lambda S: S, lambda S: S * 0.5, lambda S: 30 * torch.tanh(S / 30), lambda S: S.relu(),
                                  lambda S: S - S.amax(-1, keepdim=True), lambda S: S.float().double(),
                                  lambda S: torch.cat([S, C[..., :1]], -1)])  # fmt: skip
def test_whatever_is_done_to_scores_ends_in_the_softmax(clip):
    def weights(x):
        return torch.softmax(clip((x @ W) @ (x @ W2).mT), -1)[..., :L]

    def f(x):
        return weights(x) @ x

    close(operator(f).dense(), torch.einsum("nml,dc->nmcld", weights(X), EYE), 1e-13)
    close(linearize_function(f, X, **TANGENT).dense(), jacobian(f, X))


def heads(x, n, seed):
    return (x @ noise(D, n * 2, seed=seed)).view(len(x), -1, n, 2).transpose(1, 2)


FLOAT_MASK = torch.where(torch.ones(L, L).tril().bool(), noise(L, L, seed=8), -torch.inf)
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(L, L).tril().bool()},
    "bool per input": {"attn_mask": torch.tensor([[True, True, True], [True, True, False]])[:, None, None]},
    "float": {"attn_mask": FLOAT_MASK},
    "float per head": {"attn_mask": FLOAT_MASK + noise(N, 4, L, L, seed=9)},
    "a row that sees nothing": {"attn_mask": torch.tensor([[False] * 3, [True] * 3, [True, False, True]])},
    "scale": {"scale": 0.3, "is_causal": True},
}


def sdpa(how, kv=2):
    """Attention with 4 heads of queries over ``kv`` of keys and values, and its weights by the definition."""

    def f(x):
        q, k, v = heads(x, 4, 1), heads(x, kv, 2), heads(x, kv, 3)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=kv < 4, **how).transpose(1, 2).flatten(2)

    def weights(x):
        S = heads(x, 4, 1) @ heads(x, kv, 2).repeat_interleave(4 // kv, 1).mT * how.get("scale", 2**-0.5)
        m = torch.ones(L, L).tril().bool() if how.get("is_causal") else how.get("attn_mask", torch.tensor(0.0))
        S = S.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else S + m
        return torch.softmax(S, -1).nan_to_num()

    return f, weights


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_fused_attention_is_its_pattern_times_its_values(name, kv):
    """Grouped heads and masks included: T[n, m, (h, e), l, d] = A[n, h, m, l]·Wv[d, (h, e)]."""
    f, weights = sdpa(MASKS[name], kv)
    Wv = noise(D, kv * 2, seed=3).view(D, kv, 2).repeat_interleave(4 // kv, 1)
    T = operator(f)
    close(T.dense(), torch.einsum("nhml,dhe->nmheld", weights(X), Wv).flatten(2, 3))
    assert {cut.rule for cut in T.cuts} == {"softmax"}
    if "nothing" not in name:  # where torch's own derivative is nan
        close(linearize_function(f, X, attention="tangent").dense(), jacobian(f, X))


@pytest.mark.parametrize("name", MASKS)
def test_tiled_attention_is_the_untiled_one(name, monkeypatch):
    f, _ = sdpa(MASKS[name])
    whole, U = linearize_function(f, X), noise(5, N, L, 8)
    for tile in (1, 2 * 4 * 3, 2 * 2 * 4 * 3):  # rows of queries at a time: 1, 1, 2
        monkeypatch.setattr(rules, "TILE", tile)
        tiled = operator(f)
        close(tiled.output, whole.output)
        close(tiled.rmatvec(U[0]), whole.rmatvec(U[0]))
        close(tiled.rmatvec(U), whole.rmatvec(U))
        close(tiled.dense(), whole.dense())


def test_attention_over_constant_values_has_nothing_to_move():
    """Keys and values that do not depend on X, as from a cache: what they give is bias."""

    def f(x):
        return x + F.scaled_dot_product_attention(x, C, C @ W)

    T = operator(f)
    close(T.dense(), rowwise(EYE.expand(N, L, D, D)))
    close(T.bias, F.scaled_dot_product_attention(X, C, C @ W))


# ---------------------------------------------------------------------------------------------------- gates and routers


def gated(act):
    return lambda x: act(x @ W) * (x @ W2)


@pytest.mark.parametrize("act", [F.silu, torch.sigmoid, F.gelu], ids=lambda f: f.__name__)
def test_gate_options_are_their_formulas(act):
    """act(g)·u with g = Wᵀx, u = W2ᵀx; value holds u fixed, so that act(g) = φ(0) + g⊙r, and φ(0)⊙u is its bias."""
    f, (G, U) = gated(act), (X @ W, X @ W2)
    r = (act(G) - act(torch.zeros(()).double())) / G
    by_value = rowwise(act(G)[..., None] * W2.T)
    by_gate = rowwise((U * r)[..., None] * W.T)
    slope = torch.autograd.grad(act(G.requires_grad_()).sum(), G)[0]
    G = G.detach()
    expected = {
        "gate": (by_value, 0 * G),
        "value": (by_gate, U * act(torch.zeros(()).double())),
        "split": ((by_value + by_gate) / 2, U * act(torch.zeros(()).double()) / 2),
    }
    for gate, (matrix, bias) in expected.items():
        T = operator(f, gate=gate)
        close(T.dense(), matrix)
        close(T.bias, bias)
        assert {cut.rule for cut in T.cuts} == {"gate"}
    T = operator(f, gate="tangent", activation="tangent")
    close(T.dense(), by_value + rowwise((U * slope)[..., None] * W.T))
    close(T.dense(), jacobian(f, X))
    assert not T.cuts


def test_the_gate_mark_survives_sums_slices_reshapes_and_constants():
    def f(x):
        gate = (2 * F.silu(x @ W) + 1).view(N, L, 2, 2).flip(-1).flatten(2)[..., :4]
        return torch.cat([(x @ W2)[..., :2], (x @ W2)[..., 2:]], -1) * gate

    gate = (2 * F.silu(X @ W) + 1).view(N, L, 2, 2).flip(-1).flatten(2)
    close(operator(f).dense(), rowwise(gate[..., None] * W2.T))


def test_experts_weights_are_a_router():
    """Softmax over experts, the best two renormalised: constant, or differentiated with gate="tangent"."""

    def f(x):
        weights = torch.softmax(x @ W, -1)
        best, which = weights.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        experts = torch.stack([x @ W2 * (i + 1.0) for i in range(4)], -2)
        return (experts.gather(2, which[..., None].expand(*which.shape, D)) * best[..., None]).sum(2)

    best, which = torch.softmax(X @ W, -1).topk(2, -1)
    scale = ((which + 1.0) * best / best.sum(-1, keepdim=True)).sum(-1)
    T = operator(f)
    close(T.dense(), rowwise(scale[..., None, None] * W2.T))
    assert "router" in {cut.rule for cut in T.cuts}
    close(operator(f, **TANGENT).dense(), jacobian(f, X))


# ------------------------------------------------------------------------------------------ raise, never silently wrong


class Reversed(torch.autograd.Function):
    """Linear, and its backward pass is not its transpose."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Fused(torch.autograd.Function):
    """A kernel's attention, its backward pass the true derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.softmax(x @ x.mT, -1) @ x

    @staticmethod
    def backward(ctx, grad):
        return torch.func.vjp(lambda x: torch.softmax(x @ x.mT, -1) @ x, *ctx.saved_tensors)[1](grad)[0]


class Sine(torch.autograd.Function):
    """An activation; nothing but its own backward pass could be wrong, and an elementwise rule has no need of that."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Reversal(nn.Module):
    def forward(self, x):
        return Reversed.apply(x)


def through_a_view(x):
    buffer = torch.zeros(N, L, D, dtype=torch.float64)
    buffer[:, 0].add_(x[:, 0])
    return buffer + x


def product_through_a_view(x):
    y = x @ W
    y[..., :2].mul_((x @ W2)[..., :2])
    return y


RAISES = {
    "a product of two bare values": (lambda x: (x @ W) * (x @ W2), r"mul.*multiplies two values that depend on X"),
    "a product of two gates": (lambda x: torch.sigmoid(x @ W) * torch.tanh(x @ W2), "mul.*multiplies two values"),
    "linear attention": (lambda x: ((x @ W) @ (x @ W2).mT) @ x, "matmul.*multiplies two values"),
    "kernel attention": (lambda x: ((F.elu(x @ W) + 1) @ (F.elu(x @ W2) + 1).mT) @ x, "matmul.*multiplies two values"),
    "detach": (lambda x: x * x.detach(), "detach"),
    "data": (lambda x: x * x.data, "data"),
    "item": (lambda x: x * x.sum().item(), "item"),
    "float": (lambda x: x * float(x.sum()), "item|float"),
    "tolist": (lambda x: x * x[0, 0, 0].tolist(), "tolist"),
    "numpy": (lambda x: x * torch.as_tensor(x.numpy()), "numpy"),
    "fft": (lambda x: torch.fft.fft(x).real, "fft"),
    "cumprod": (lambda x: x.cumprod(-1), "cumprod"),
    "prod": (lambda x: x.prod(-1, keepdim=True) + x, "prod"),
    "inverse": (lambda x: torch.linalg.inv(x[:, :, :3]), "inv"),
    "a linear autograd.Function": (lambda x: Reversed.apply(x @ W), r"autograd\.Function Reversed"),
    "a fused autograd.Function": (lambda x: Fused.apply(x @ W) + x, r"autograd\.Function Fused"),
    "a write into a view of a constant": (through_a_view, "view of a constant"),
    "a product written through a view": (product_through_a_view, "in place through a view"),
    "a statistic outside a norm": (lambda x: x + x.var(-1, keepdim=True), "statistic"),
    "a mean of squares outside a norm": (
        lambda x: x + (x @ W).pow(2).mean(-1, keepdim=True) * x.square(),
        "two values|stat",
    ),
}


@pytest.mark.parametrize("name", RAISES)
def test_what_no_rule_covers_raises_and_says_what_to_do(name):
    f, words = RAISES[name]

    class Deep(nn.Module):
        def forward(self, x):
            return f(x)

    model = nn.Sequential(nn.Identity(), nn.Sequential(Deep(), nn.Identity()))
    with pytest.raises(UnsupportedOperation, match=rf"(?s){words}.*register_rule") as error:
        linearize_function(model, X)
    assert "1.0" in str(error.value)  # the module's path
    with pytest.raises(UnsupportedOperation, match=words):
        linearize_function(lambda x: f(x) + 0, X)


X1, C1 = X[:1], C[:1]  # one input: several of these mix what is in a batch
SUSPICIOUS = {
    "full_like": lambda x: x + torch.full_like(x, x.mean()),
    "new_full": lambda x: x + x.new_full((D,), x[0, 0, 0]),
    "new_tensor": lambda x: x * C1.new_tensor(x),
    "torch.tensor": lambda x: x * torch.tensor(x),
    "torch.as_tensor": lambda x: x * torch.as_tensor(x @ W),
    "from a list": lambda x: x + torch.tensor([x[0, 0, 0], x[0, 0, 1], 0.0, 0.0]),
    "fill_": inplace(lambda x: x * 2, lambda y, x: y.fill_(x[0, 0, 0])),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), x.sum()),
    "index_fill_": inplace(lambda x: C1 + 1, lambda y, x: y.index_fill_(1, torch.tensor([0]), x[0, 0, 0])),
    "masked_fill": lambda x: x.masked_fill(mask[:1], x[0, 0, 0]),
    "a view of X, overwritten": inplace(lambda x: x * 1, lambda y, x: y[:, 0].copy_(C1[:, 0])),
    "a nonlinear write through a view": inplace(lambda x: x * 1, lambda y, x: y[:, 0].relu_(), lambda y, x: y.add_(1)),
    "sigmoid_ through a view, read through the base": inplace(lambda x: x @ W, lambda y, x: y[..., :2].sigmoid_()),
    "an exponent": lambda x: torch.pow(2.0, x),
    "a power of two values": lambda x: torch.pow(x.abs() + 1, x @ W),
    "addcmul": lambda x: torch.addcmul(C1, x, x @ W),
    "lerp": lambda x: torch.lerp(x, C1, torch.sigmoid(x)),
    "bilinear": lambda x: F.bilinear(x, x, noise(3, D, D)),
    "outer product": lambda x: torch.einsum("nld,nle->nlde", x, x),
    "cosine similarity": lambda x: F.cosine_similarity(x, C1, dim=-1)[..., None] + x,
    "cdist": lambda x: torch.cdist(x, C1),
    "glu": lambda x: F.glu(x @ W, -1),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3]).double()),
    "rrelu": lambda x: F.rrelu(x),
    "group_norm": lambda x: F.group_norm(x.mT, 2).mT,
    "instance_norm": lambda x: F.instance_norm(x),
    "batch_norm with the batch's moments": lambda x: F.batch_norm(x, None, None, training=True),
    "weight_norm": lambda x: x @ (W / W.norm(dim=0)),
    "log_softmax": lambda x: F.log_softmax(x @ W, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1, keepdim=True) + x,
    "softmax of one value as a gate": lambda x: torch.softmax(x @ W, -1) * (x @ W2),
    "softmin": lambda x: F.softmin(x @ x.mT, -1) @ x,
    "gumbel": lambda x: F.softmax((x @ W) @ x.mT, dim=1) @ x,
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "unique": lambda x: x * len(torch.unique(x)),
    "nested branches": lambda x: x * 2 if x.sum() > 0 else x * 3,
    "nearest interpolation": lambda x: F.interpolate(x, size=7, mode="nearest"),
    "a constant's bias": lambda x: F.linear(C1, W, x[0, 0]),
    "round": lambda x: torch.round(x * 3) + x,
    "a loop over entries": lambda x: x * sum(1.0 for v in x.flatten() if v > 0),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(lambda y: torch.relu(y @ W), x, use_reentrant=False),
    "vmap": lambda x: x + torch.vmap(lambda row: row @ W)(x),
    "dropout in training": lambda x: F.dropout(x, 0.5, training=True),
    "complex rotation": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(1, L, 2, 2)) * torch.exp(1j * C1[..., :2])).flatten(2),
    "an elementwise autograd.Function": lambda x: Sine.apply(x @ W) @ W2,
    "multi-head attention": lambda x: F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, D, 2, torch.cat([W, W, W2]), None, None, None, False, 0.0, W, W[0], False
    )[0].transpose(0, 1),
    "ratio of two values": lambda x: (x @ W) / (1 + (x @ W2).abs()),
    "reciprocal": lambda x: x * (1 + x.square().mean(-1, keepdim=True)).reciprocal(),
    "quotient of sums": lambda x: x / x.abs().sum(-1, keepdim=True),
    "softmax without its maximum": lambda x: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp((x @ W) @ x.mT)) @ x,
    "l1 norm": lambda x: x / x.norm(p=1, dim=-1, keepdim=True),
    "square of a norm": lambda x: x * x.norm(dim=-1, keepdim=True),
    "logits of a mixture": lambda x: torch.log(torch.softmax(x @ W, -1)),
    "tanh of a statistic": lambda x: x * torch.tanh(x.mean(-1, keepdim=True)),
    "temperature": lambda x: torch.softmax((x @ x.mT) / x.norm(), -1) @ x,
    "clamp by values": lambda x: torch.clamp(x, min=x @ W),
    "where of two values": lambda x: torch.where(x > 0, x @ W, torch.tanh(x)),
    "mul_ of a gate": inplace(lambda x: x @ W, lambda y, x: y.mul_(torch.sigmoid(x @ W2))),
    "mul_ of itself": inplace(lambda x: x @ W, lambda y, x: y.mul_(y)),
    "div_ by a norm": inplace(lambda x: x * 1, lambda y, x: y.div_(x.norm(dim=-1, keepdim=True))),
    "softmax in place": lambda x: torch.softmax(((x @ W) @ x.mT).mul_(0.5).add_(C1[..., :L]), -1) @ x,
    "scores masked in place": lambda x: torch.softmax(((x @ W) @ x.mT).masked_fill_(mask[:1, :, :L], -9.0), -1) @ x,
    "scores written into a buffer": lambda x: torch.softmax(
        inplace(lambda x: torch.zeros(1, L, L).double(), lambda y, x: y.copy_((x @ W) @ x.mT))(x), -1) @ x,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, TANGENT], ids=["frozen", "tangent"])
@pytest.mark.parametrize("name", SUSPICIOUS)
def test_whatever_is_written_it_is_exact_or_raises(name, options):
    """Where an operator comes back, it reproduces f, and its products agree; all tangent, T is the derivative."""
    f = SUSPICIOUS[name]
    try:
        T = linearize_function(f, X1, **options)
    except (UnsupportedOperation, RuntimeError, TypeError):
        return
    except ValueError as error:  # all of it became constant
        assert "does not depend on X" in str(error)
        return
    T.certificate().check()
    V, U = noise(*X1.shape, seed=5), noise(*T.output.shape, seed=6)
    close(T.output, f(X1))
    close(T @ X1 + T.bias, f(X1))
    close(T.replay(V), T @ V + T.bias)
    left, right = (U * (T @ V)).sum(), (T.rmatvec(U) * V).sum()
    assert abs(left - right) <= 1e-12 * max(1.0, abs(left))
    if options:  # a central difference, which torch's rules of differentiation have no part in; measured: 2.3e-10
        close(T @ V, (f(X1 + 1e-6 * V) - f(X1 - 1e-6 * V)) / 2e-6, 1e-8)


def test_an_output_without_X_is_refused():
    for f in (lambda x: C * 2, lambda x: (x > 0).double(), lambda x: torch.zeros_like(x)):
        with pytest.raises((ValueError, UnsupportedOperation), match="does not depend on X|depends on X"):
            linearize_function(f, X)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x, carried=None):
        return x + torch.tanh(self.inner(x)) + (0 if carried is None else carried)


class Toy(nn.Module):
    """Embeddings and three blocks; the last one may use what the embeddings gave, carried round the others."""

    def __init__(self, carry):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.carry = nn.Embedding(7, D), nn.ModuleList(Block() for _ in range(3)), carry

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        first = x = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            x = block(x, first if self.carry and i == 2 else None)
        return x


def test_state_carried_round_a_boundary_raises():
    ids = torch.tensor([[1, 2, 3]])
    for at in (1, 2):
        assert linearize(Toy(False).double(), ids, at=at).certificate().check()
        with pytest.raises(UnsupportedOperation, match="(?s)carried round.*blocks.2"):
            linearize(Toy(True).double(), ids, at=at)
    with pytest.raises(UnsupportedOperation, match="carried round"):  # X enters behind the embeddings
        linearize(Toy(True).double(), ids, at=0)
    for at in ("tokens", "inputs"):
        assert linearize(Toy(True).double(), ids, at=at).certificate().check()
    assert linearize(Toy(True).double(), ids, at=1, to=2).certificate().check()  # what is carried lies behind


# -------------------------------------------------------------------------------------------------------- register_rule


@pytest.fixture
def registered():
    before = dict(REGISTERED)
    yield register_rule
    REGISTERED.clear()
    REGISTERED.update(before)
    rules.rule_of.cache_clear()


def test_a_torch_function_is_taught_in_three_lines(registered):
    def f(x):
        return torch.special.i0(x @ W) @ W2

    with pytest.raises(UnsupportedOperation, match="i0.*register_rule"):
        linearize_function(f, X)
    register_rule(torch.special.i0, elementwise)
    T = operator(f)
    close(T.dense(), rowwise(W2.T @ torch.diag_embed((torch.special.i0(X @ W) - 1) / (X @ W)) @ W.T))
    close(T.bias, torch.ones(N, L, D).double() @ W2)


def test_a_linear_function_is_taught_in_one(registered):
    def f(x):
        return torch.fft.fft(x).real

    register_rule(torch.fft.fft, linear)
    close(operator(f).dense(), jacobian(f, X))


def test_a_module_with_an_opaque_forward_is_taught_in_three_lines(registered):
    """An autograd.Function, whose backward pass interception cannot see, in a module of its own; here x → 2x."""
    model = nn.Sequential(nn.Linear(D, D), Reversal(), nn.Linear(D, D)).double()
    with pytest.raises(UnsupportedOperation, match="autograd.Function Reversed.*register_rule"):
        linearize_function(model, X)

    def doubled(rec, call):
        return linear(rec, rules.Call(torch.mul, "mul", (call.args[0], 2), {}, call.deps))

    register_rule(Reversal, doubled)
    T = operator(model)
    weights = 2 * model[2].weight.detach() @ model[0].weight.detach()
    close(T.dense(), rowwise(weights.expand(N, L, D, D)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_registering_is_taken_back(registered):
    register_rule(torch.special.i0, elementwise)
    REGISTERED.pop(torch.special.i0)
    rules.rule_of.cache_clear()
    with pytest.raises(UnsupportedOperation):
        linearize_function(torch.special.i0, X)


@pytest.mark.parametrize("target, rule", [("relu", elementwise), (torch.relu, "elementwise")])
def test_a_rule_that_is_none_is_refused(target, rule, registered):
    with pytest.raises(TypeError, match="register_rule takes"):
        register_rule(target, rule)


# ------------------------------------------------------------------------------------------------- nothing left changed


def state(model):
    """All that a model is, to be compared before and after."""
    return {
        "training": {n: m.training for n, m in model.named_modules()},
        "grads": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "hooks": {
            n: [len(d) for k, d in sorted(vars(m).items()) if k.endswith("_hooks")] for n, m in model.named_modules()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "tensors": {
            n: (t.data_ptr(), t._version, t.clone(), sorted(vars(t)))
            for n, t in model.state_dict(keep_vars=True).items()
        },
        "buffers": {n: (b.data_ptr(), b.detach().clone(), b.requires_grad) for n, b in model.named_buffers()},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "mode": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def unusual(model):
    """In a state that a restore could get wrong: training in part, some weights frozen, a hook of the user's own."""
    model.train()
    next(model.children()).eval()
    for p in itertools.islice(model.parameters(), 0, None, 2):
        p.requires_grad_(False)
    model.register_forward_hook(lambda *a: None)
    return model


@pytest.mark.parametrize("at, to", [("tokens", None), ("inputs", None), (1, 2), ("tokens", "last_hidden_state")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "bert", "mixtral"])
def test_the_model_is_left_as_it_was(name, at, to):
    model, inputs = FAMILIES[name]()
    before = state(unusual(model))
    T = linearize(model, inputs, at=at, to=to)
    assert same(state(model), before)
    T.certificate(), T.bias, T.slice(0)
    assert same(state(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_as_it_was_when_an_error_is_raised_midway():
    for name, options in [("mamba", {}), ("gpt2", {"to": "attentions"}), ("gpt2", {"at": 9})]:
        model, inputs = FAMILIES[name]()
        before = state(unusual(model))
        with pytest.raises((UnsupportedOperation, ValueError)):
            linearize(model, inputs, **options)
        assert same(state(model), before), name
    model, ids = Toy(True).double(), torch.tensor([[1, 2]])
    before = state(unusual(model))
    with pytest.raises(UnsupportedOperation):
        linearize(model, ids, at=1)
    model.blocks[2].forward = lambda x, carried: 1 / 0
    with pytest.raises(ZeroDivisionError):
        linearize(model, ids)
    del model.blocks[2].forward
    assert same(state(model), before)


def test_the_interception_ends_with_the_call():
    for f in (lambda x: x * 2, lambda x: x.cumprod(-1)):
        try:
            linearize_function(f, X)
        except UnsupportedOperation:
            pass
        assert torch.overrides._get_current_function_mode() is None
        y = X.clone().requires_grad_() * 2
        assert not hasattr(y, "_tag") and torch.is_grad_enabled()


def test_inside_no_grad_it_works_too():
    with torch.no_grad():
        T = operator(lambda x: torch.relu(x @ W))
        assert not torch.is_grad_enabled()
    close(T.dense(), rowwise((X @ W > 0).double()[..., None] * W.T))


def test_what_the_user_passes_is_left_as_it_was():
    model, inputs = FAMILIES["gpt2"]()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    before = {k: (id(v), v.detach().clone(), v.requires_grad, v._version) for k, v in given.items()}
    T = linearize(model, given)
    T.rmatvec(torch.ones_like(T.output))
    assert same({k: (id(v), v.detach().clone(), v.requires_grad, v._version) for k, v in given.items()}, before)
    assert embeds.grad is None and not hasattr(embeds, "_tag")
    close(T.dense(), linearize(model, inputs).dense())
    x = X.clone()
    T = linearize_function(lambda x: x.mul_(2).add_(1), x)  # the function writes into its argument
    assert torch.equal(x, X) and torch.equal(T.input, X)
    close(T.output, 2 * X + 1)


def test_a_cache_of_the_users_is_left_as_it_was():
    """Keys and values of past tokens are constants: what they bring is bias."""
    from transformers import DynamicCache

    model, inputs = FAMILIES["llama"]()
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        cache = model(ids[:, :4], past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
        want = model(ids).logits[:, 4:]
    keys = [layer.keys.clone() for layer in cache.layers]
    T = linearize(model, {"input_ids": ids[:, 4:], "past_key_values": cache})
    T.certificate().check()
    assert cache.get_seq_length() == 4 and all(torch.equal(k, c.keys) for k, c in zip(keys, cache.layers, strict=True))
    close(T.output, want, 1e-6)
    close(T @ T.input + T.bias, want, 1e-6)


def test_a_weight_that_requires_grad_is_not_taken_for_X():
    model = nn.Linear(D, D).double()
    T = linearize_function(model, X)
    close(T.dense(), rowwise(model.weight.detach().expand(N, L, D, D)))
    close(T.bias, model.bias.detach().expand(N, L, D))


# ---------------------------------------------------------------------------------------------------------- the package


@pytest.mark.parametrize(
    "first", ["", "import tensorlens_utils.linearize; ", "from tensorlens_utils.linearize import OPTIONS; "]
)
def test_the_functions_come_from_the_package_whatever_was_imported_before(first):
    code = first + "from tensorlens_utils import linearize; import tensorlens_utils; "
    code += "assert linearize is tensorlens_utils.linearize and not hasattr(linearize, 'Recorder'), linearize"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(importlib.import_module("tensorlens_utils").linearize_function)


# --------------------------------------------------------------------------------------------------------- a real model


def test_a_real_bias_free_model_is_its_operator(shared_data):
    """stories260K: T·X = F(X), T·X by the backward pass alone, each logit of the last token. Measured: 1.5e-6."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_data / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
    T = linearize(model, inputs)
    T.certificate().check()
    assert logits.norm() > 1 and not T.bias.any()
    TX = torch.einsum("ncld,nld->nc", T.slice(-1), T.input)
    assert (TX - logits[:, -1]).norm() <= 1e-5 * logits[:, -1].norm()
    U = torch.randn(4, *logits.shape, generator=torch.Generator().manual_seed(0))
    pulled = (T.rmatvec(U) * T.input).flatten(1).sum(1)
    assert ((pulled - (U * logits).flatten(1).sum(1)).abs() <= 1e-5 * U.flatten(1).norm(dim=1) * logits.norm()).all()


# ----------------------------------------------------------------------------------- values that are overwritten later


def _add_after_sigmoid(x, inplace):
    h = x @ W
    g = torch.sigmoid(h)
    h = h.add_(1) if inplace else h + 1
    return g @ W.T + h


def _gelu_then_masked(x, inplace):
    h = x @ W
    a = F.gelu(h)
    if inplace:
        h[:, 0] = 0
    else:
        h = torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1)
    return h + a


def _multiple_then_shift(x, inplace):
    h = x @ W
    s = h * 0.5
    h = h.add_(2) if inplace else h + 2
    return torch.sigmoid(s) @ W + h


@pytest.mark.parametrize("rules", [{}, TANGENT], ids=["frozen", "tangent"])
@pytest.mark.parametrize("f", [_add_after_sigmoid, _gelu_then_masked, _multiple_then_shift])
def test_writing_over_a_value_leaves_what_was_made_of_it(f, rules):
    ours, twin = operator(lambda x: f(x, True), **rules), operator(lambda x: f(x, False), **rules)
    close(ours.dense(), twin.dense())
    close(ours.bias, twin.bias)


def test_a_constant_that_a_pending_value_has_read_may_not_change():
    def f(x):
        c = torch.ones(D, dtype=x.dtype)
        p = torch.sigmoid(x @ W) + c
        c.mul_(7)
        return p @ W

    with pytest.raises(UnsupportedOperation, match="overwritten"):
        linearize_function(f, X)


@pytest.mark.parametrize("f", [
    lambda x, c: torch.add(input=c, other=x),
    lambda x, c: torch.slice_scatter(x, c[:, :1], dim=1, start=0, end=1),
    lambda x, c: torch.diff(x, dim=1, prepend=c[:, :1]),
], ids=["add by keyword", "slice_scatter", "diff"])  # fmt: skip
def test_what_is_added_stays_out_of_t_v_however_it_is_passed(f):
    c = noise(*X.shape, seed=3)
    T = operator(lambda x: f(x, c))
    close(T @ X + T.bias, f(X, c))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_no_grad_inside_the_model_cuts_nothing(quiet):
    def f(x):
        with quiet():
            y = torch.relu(x @ W)
        return x + y

    close(operator(f).dense(), jacobian(lambda x: x + torch.relu(x @ W), X))


def test_inputs_that_mix_across_the_batch_are_refused_where_t_would_be_wrong():
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8).double()  # not batch_first: axis 0 is the sequence
    T = linearize_function(layer, noise(3, 2, 4, seed=5))
    with pytest.raises(ValueError, match="batch_first"):
        T.slice(0)
    with pytest.raises(ValueError, match="mix"):
        T.norm()


def test_the_strides_of_v_do_not_matter():
    def f(x):
        y = x * 1
        y.flatten(1)[:, 3:].mul_(2)
        return y

    T, V = operator(f), noise(N, D, L, seed=8).mT
    close(T @ V, T @ V.contiguous())


def test_a_model_that_keeps_x_in_a_buffer_is_left_clean():
    class Cache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k", torch.zeros(N, L, D, dtype=X.dtype))

        def forward(self, x):
            self.k[:, :L] = x @ W
            return self.k * 2

    model = Cache()
    first = linearize_function(model, X)
    assert not model.k.requires_grad
    close(linearize_function(model, X).dense(), first.dense())
