"""What no rule covers raises and says what to do, or is taught by ``register_rule``: never silently wrong."""

import pytest
import torch
import torch.nn.functional as F
from dense import TANGENT, W2, C, D, L, N, Toy, W, X, close, inplace, jacobian, mask, noise, operator, rowwise
from torch import nn

from tensorlens_utils.linearize import linearize, linearize_function, rules
from tensorlens_utils.linearize.rules import REGISTERED, elementwise, linear, register_rule
from tensorlens_utils.linearize.values import Call, UnsupportedOperation

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


def foreign_without_grad(x):
    with torch.no_grad():
        y = Reversed.apply(x @ W)
    return x + y


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
    "an autograd.Function under no_grad": (foreign_without_grad, r"autograd\.Function Reversed"),
    "a write into a view of a constant": (through_a_view, "view of a constant"),
    "a product written through a view": (product_through_a_view, "in place through a view"),
    "a rounded quotient of two values": (lambda x: (x @ W).div(x @ W2, rounding_mode="floor"), "div.*nonlinear"),
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
    "dropout in training, by default": lambda x: F.dropout(x, 0.5),
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
        return linear(rec, Call(torch.mul, "mul", (call.args[0], 2), {}, call.deps))

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
