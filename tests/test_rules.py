"""Rule by rule, each against a small dense reference.

Three laws carry most of it. An affine f has T = ∂f/∂X and B = f(0), whatever the options. With all options tangent the
same holds of any f, with B = f(X) − T·X. And T·X + B = f(X), always.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from dense import EYE, TANGENT, W2, C, D, L, N, W, X, apply, close, inplace, jacobian, mask, noise, operator, rowwise

from tensorlens_utils.linearize import linearize_function, rules

# ---------------------------------------------------------------------------------------------- affine maps: themselves


index = torch.tensor([2, 0])
conv1, conv2 = noise(5, D, 2, seed=4), noise(2, 1, 2, 2, seed=5)
running = (
    torch.rand(L, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5,
    noise(L, seed=6),
    noise(L, seed=7),
)



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
    "deprecated order": lambda x: torch.add(C, 2, x @ W) + x.sub(3, C) + x.clone().add_(2, C) - torch.sub(x, 3, 2),
    "addmm in the deprecated order": lambda x: torch.addmm(0.5, W[:1], 2, x.flatten(0, 1), W).view(N, L, D),
    "addmm with β alone": lambda x: torch.addmm(0.5, x.flatten(0, 1), C.flatten(0, 1), W).view(N, L, D),
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


@pytest.mark.parametrize("divisor", [0.5, C.abs() + 1, None], ids=["by a number", "by a tensor", "by itself"])
def test_a_rounded_quotient_is_an_activation(divisor):
    """Its derivative is zero, and its ratio is not."""
    def f(x):
        return torch.div(x, 1 + x.square() if divisor is None else divisor, rounding_mode="floor")

    close(operator(f).dense(), torch.diag_embed((f(X) / X).flatten(1)).view(N, L, D, L, D))


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


# ---------------------------------------------------------------------------------------------- one option at a time


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tangent", [(), ("attention",), ("norm",), ("activation", "gate")], ids=str)
def test_one_tangent_option_leaves_the_others_frozen(tangent, fused):
    """Norm, attention, norm, gated FFN: the Jacobian of the block with all that is held constant detached."""

    def block(x, hold=lambda option, t: t, fused=fused):
        def norm(x):
            return x * hold("norm", torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

        def attend(q, k, v):
            if fused and hold("attention", q) is q:  # as a model calls it
                return F.scaled_dot_product_attention(q, k, v)
            return hold("attention", (q @ k.mT / 2).softmax(-1)) @ v

        y = norm(x)
        x = x + attend(y @ W, y @ W2, y @ (W + W2))
        y = norm(x)
        g = y @ W2
        r = hold("activation", F.silu(g) / g)  # silu(g) = g·r, all of it the gate's where that is held
        return x + hold("gate", g * r) * (y @ W)

    def detached(x):
        return block(x, lambda option, t: t if option in tangent else t.detach(), fused=False)

    T = operator(block, **dict.fromkeys(tangent, "tangent"))
    close(T.dense(), jacobian(detached, X), 1e-12)


def test_attention_over_kept_keys_is_attention_though_the_query_is_constant():
    """Scores are linear in k alone; with attention tangent their softmax is differentiated, and is no router."""

    def f(x):
        return F.scaled_dot_product_attention(C, torch.cat([C, x @ W], 1), torch.cat([C, x @ W2], 1))

    T = operator(f, attention="tangent")
    close(T.dense(), jacobian(f, X))
    assert not T.cuts and {cut.rule for cut in operator(f).cuts} == {"softmax"}
