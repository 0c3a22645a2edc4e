"""Values and constants that are written to after they were used, and what is added by whatever name."""

import pytest
import torch
import torch.nn.functional as F
from dense import TANGENT, W2, D, W, X, close, noise, operator

from tensorlens_utils.linearize import linearize_function
from tensorlens_utils.linearize.values import UnsupportedOperation


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


def _multiple_written_through_a_view(x, inplace):
    s, other = (x @ W) * 0.5, x @ W2
    if inplace:
        s[..., :2].copy_(other[..., :2])
    else:
        s = torch.cat([other[..., :2], s[..., 2:]], -1)
    return torch.sigmoid(s) @ W


@pytest.mark.parametrize("rules", [{}, TANGENT], ids=["frozen", "tangent"])
@pytest.mark.parametrize(
    "f", [_add_after_sigmoid, _gelu_then_masked, _multiple_then_shift, _multiple_written_through_a_view]
)
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
