"""What the rules are tested on and against: small inputs in float64, dense references, and a model of three blocks."""

import torch
from torch import nn

from tensorlens_utils.linearize import OPTIONS, linearize_function

TANGENT = dict.fromkeys(OPTIONS, "tangent")
N, L, D = 2, 3, 4


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W, W2, C = noise(N, L, D), noise(D, D, seed=1), noise(D, D, seed=2), noise(N, L, D, seed=3)
mask = C > 0
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


def inplace(start, *steps):
    """x → start(x), then each step on it in place."""

    def f(x):
        y = start(x)
        for step in steps:
            step(y, x)
        return y

    return f


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
