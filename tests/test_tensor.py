"""The operator's methods against its dense matrix, which is made column by column from replays, and laws among them."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from families import FAMILIES, FLOAT32
from scipy.sparse.linalg import LinearOperator

from tensorlens_utils.linearize import linearize, linearize_function
from tensorlens_utils.models import n_blocks
from tensorlens_utils.tensor import AttentionTensor

NAMES = ["gpt2", "llama", "albert", "vit"]
TIGHT = 1e-13  # float64; measured: below 3e-15


@functools.cache
def operator(name, **options):
    return linearize(*FAMILIES[name](), **options)


@functools.cache
def brute(name):
    """T (N, M, D', L, D), every column a difference of two replays: slow, and without the backward pass."""
    T = operator(name)
    basis = torch.eye(T.input[0].numel(), dtype=T.input.dtype).view(-1, *T.input.shape[1:])
    zero = T.replay(torch.zeros_like(T.input))
    columns = [T.replay(e.expand_as(T.input)) - zero for e in basis]
    return torch.stack(columns, -1).view(T.shape)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, bar=TIGHT):
    assert a.shape == b.shape
    assert float((a - b).norm()) <= bar * float(b.norm())


def bar(name):
    return 3e-6 if name in FLOAT32 else TIGHT


every_model = pytest.mark.parametrize("name", NAMES)


# ------------------------------------------------------------------------------------------------------------- products


@every_model
def test_products_are_those_of_the_dense_matrix(name):
    T, D = operator(name), brute(name)
    V, U = noise(*T.input.shape), noise(*T.output.shape, seed=1)
    close(T.matvec(V), torch.einsum("nmcld,nld->nmc", D, V), bar(name))
    close(T.rmatvec(U), torch.einsum("nmcld,nmc->nld", D, U), bar(name))
    close(T.replay(V), T.matvec(V) + T.bias, bar(name))
    close(T.dense(), D, bar(name))
    assert T.shape == D.shape and T.dense().dtype == T.input.dtype


@every_model
def test_the_operator_reproduces_the_model_at_X(name):
    T = operator(name)
    close(T.matvec(T.input) + T.bias, T.output, bar(name))
    close(T.replay(T.input), T.output, bar(name))
    close(T.bias, T.replay(torch.zeros_like(T.input)), bar(name))


@every_model
def test_the_products_are_linear_and_adjoint(name):
    T = operator(name)
    V, W = noise(*T.input.shape), noise(*T.input.shape, seed=1)
    U = noise(*T.output.shape, seed=2)
    close(T.matvec(2 * V - 3 * W), 2 * T.matvec(V) - 3 * T.matvec(W), bar(name))
    close(T.rmatvec(-2 * U), -2 * T.rmatvec(U))
    assert not T.matvec(torch.zeros_like(V)).any() and not T.rmatvec(torch.zeros_like(U)).any()
    left, right = (U * T.matvec(V)).sum(), (T.rmatvec(U) * V).sum()
    assert abs(left - right) <= bar(name) * U.norm() * T.matvec(V).norm()


@every_model
def test_matvec_is_the_transpose_of_rmatvec(name):
    """The forward product from the backward pass alone: differentiate Uᵀ·T by U."""
    T = operator(name)
    V, U = noise(*T.input.shape), torch.zeros_like(T.output, requires_grad=True)
    UT = torch.autograd.grad(T._Y, T._X, U, create_graph=True)[0]
    close(torch.autograd.grad(UT, U, V)[0], T.matvec(V), bar(name))


@every_model
def test_cotangents_together_are_cotangents_one_by_one(name, monkeypatch):
    T = operator(name)
    U = noise(7, *T.output.shape)
    one_by_one = torch.stack([T.rmatvec(u) for u in U])
    close(T.rmatvec(U), one_by_one, 1e-14)
    monkeypatch.setattr(AttentionTensor, "chunk", 3)
    close(T.rmatvec(U), one_by_one, 1e-14)


def test_at_signs_are_the_products():
    T = operator("gpt2")
    V, U = noise(*T.input.shape), noise(*T.output.shape)
    assert torch.equal(T @ V, T.matvec(V))
    assert torch.equal(U @ T, T.rmatvec(U))
    assert torch.equal(U[None] @ T, T.rmatvec(U[None]))


def test_products_leave_the_operator_and_their_arguments_alone():
    T = operator("llama")
    V, U = noise(*T.input.shape), noise(*T.output.shape)
    V0, U0, X0, Y0, first = V.clone(), U.clone(), T.input.clone(), T.output.clone(), T.matvec(V)
    T.rmatvec(U), T.replay(V), T.norm(probes=2), T.slice(0)
    assert torch.equal(T.matvec(V), first)
    assert all(torch.equal(a, b) for a, b in [(V, V0), (U, U0), (T.input, X0), (T.output, Y0)])
    assert not any(t.requires_grad for t in (first, T.bias, T.input, T.output, T.rmatvec(U), T.slice(0)))


def test_inputs_of_a_batch_do_not_mix():
    T = operator("gpt2")
    V = noise(*T.input.shape)
    V[1] = 0
    assert not T.matvec(V)[1].any() and T.matvec(V)[0].any()


# --------------------------------------------------------------------------------------------------------------- slices


@every_model
def test_a_slice_is_a_row_of_the_dense_tensor(name):
    T, D = operator(name), brute(name)
    N, M = T.output.shape[:2]
    for position in range(-M, M):
        if position != -1:
            close(T.slice(position), D[:, position], bar(name))
    each = torch.arange(N) % M
    close(T.slice(each), D[torch.arange(N), each], bar(name))
    assert T.slice(0).shape == (N, *T.shape[2:])


@pytest.mark.parametrize("padding, last", [("right", [5, 3]), ("left", [5, 5]), ("none", [5, 5]), ("no mask", [5, 5])])
def test_position_minus_one_is_the_last_unmasked_token(padding, last):
    model, inputs = FAMILIES["gpt2"]()
    if padding == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    if padding == "none":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    if padding == "no mask":
        del inputs["attention_mask"]
    T = linearize(model, inputs)
    assert torch.equal(T.slice(-1), T.slice(torch.tensor(last)))
    assert torch.equal(T.slice(), T.slice(-1))
    assert not torch.equal(T.slice(-1), T.slice(torch.tensor([4, 2])))


def test_position_minus_one_is_the_last_output_where_outputs_are_not_tokens():
    T, D = operator("albert"), brute("albert")  # M = 1, its inputs padded
    close(T.slice(-1), D[:, 0])
    T = operator("vit")
    close(T.slice(-1), brute("vit")[:, -1])


def test_chunks_do_not_change_a_slice(monkeypatch):
    """And none is larger than ``chunk``, which keeps the widest value of the network under 64 MB."""
    T = operator("gpt2")
    whole, dense, norm = T.slice(2), T.dense(), T.norm()
    assert T.chunk >= 1 and T.chunk * T.tape.widest <= 64e6
    sizes, pull = [], AttentionTensor._pull

    def spy(self, y, U, batched=False):
        sizes.append(len(U) if batched else 1)
        return pull(self, y, U, batched)

    monkeypatch.setattr(AttentionTensor, "_pull", spy)
    monkeypatch.setattr(AttentionTensor, "chunk", 5)
    close(T.slice(2), whole, 1e-14)
    assert sizes == [5, 5, 5, 1]
    close(T.dense(), dense, 1e-14)
    close(T.norm(), norm, 1e-14)
    assert max(sizes) == 5


# -------------------------------------------------------------------------------------------- norms and singular values


@every_model
def test_the_norm_is_the_dense_norm(name):
    T, D = operator(name), brute(name)
    close(T.norm(), D.flatten(1).norm(dim=1), bar(name))


@every_model
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hutchinson_estimates_the_square_of_the_norm(name, seed):
    T, D = operator(name), brute(name)
    square, error = T.norm(probes=64, seed=seed)
    truth = D.flatten(1).square().sum(1)
    assert square.shape == error.shape == truth.shape
    assert ((square - truth).abs() <= 4 * error).all() and (error < truth).all()
    again = T.norm(probes=64, seed=seed)
    assert torch.equal(again[0], square) and torch.equal(again[1], error)
    assert not torch.equal(T.norm(probes=64, seed=seed + 9)[0], square)


def test_the_standard_error_shrinks_as_the_root_of_the_probes():
    few, many = (operator("gpt2").norm(probes=p)[1] for p in (100, 1600))
    assert (few / many - 4).abs().max() < 1.2  # a standard error from 100 probes is itself known to 7 %, or so


@pytest.mark.parametrize("n", [0, 1])
@every_model
def test_singular_triplets_are_those_of_the_dense_unfolding(name, n):
    T, D = operator(name), brute(name)
    k = min(3, T.output[0].numel() - 1)
    U, S, V = T.svd(k, n)
    left, truth, right = torch.linalg.svd(D[n].flatten(2).flatten(0, 1), full_matrices=False)
    assert U.shape == (k, *T.output.shape[1:]) and V.shape == (k, *T.input.shape[1:])
    close(S, truth[:k], 10 * bar(name))
    for i in range(k):
        assert abs(U[i].flatten() @ left[:, i]) > 1 - 10 * bar(name)
        assert abs(V[i].flatten() @ right[i]) > 1 - 10 * bar(name)
        assert V[i].flatten()[V[i].abs().argmax()] > 0
        close(T.matvec(V[i].expand_as(T.input))[n], S[i] * U[i], 100 * bar(name))
    assert all(torch.equal(a, b) for a, b in zip(T.svd(k, n), (U, S, V), strict=True))
    assert abs(T.operator_norm(n) - truth[0]) <= 10 * bar(name) * truth[0]


def test_scipy_sees_the_unfolding():
    T, D = operator("gpt2"), brute("gpt2")
    for n in range(2):
        op, A = T.to_scipy(n), D[n].flatten(2).flatten(0, 1).numpy()
        assert isinstance(op, LinearOperator) and op.shape == A.shape
        rng = np.random.default_rng(0)
        v, u, W = rng.standard_normal(A.shape[1]), rng.standard_normal(A.shape[0]), rng.standard_normal((A.shape[1], 2))
        np.testing.assert_allclose(op @ v, A @ v, rtol=0, atol=1e-12 * np.linalg.norm(A @ v))
        np.testing.assert_allclose(op.T @ u, A.T @ u, rtol=0, atol=1e-12 * np.linalg.norm(A.T @ u))
        np.testing.assert_allclose(op @ W, A @ W, rtol=0, atol=1e-12 * np.linalg.norm(A @ W))


# ---------------------------------------------------------------------------------------------------------- composition


def paths(name):
    boundaries = range(n_blocks(FAMILIES[name]()[0]) + 1)
    outputs = ["last_hidden_state"] if name == "siglip" else ["last_hidden_state", "logits"]
    return [(*ab, c) for c in outputs for ab in itertools.combinations(["tokens", *boundaries], 2)] + [("tokens", 0, 1)]


COMPOSED = ["gpt2", "llama", "gemma2", "bert", "albert", "vit", "siglip", "bloom"]


@pytest.mark.parametrize("name", COMPOSED)
def test_operators_and_biases_compose(name):
    """T(a→c) = T(b→c)·T(a→b) and B(a→c) = T(b→c)·B(a→b) + B(b→c), between all boundaries."""
    model, inputs = FAMILIES[name]()
    T = functools.cache(lambda a, c: linearize(model, inputs, at=a, to=c))
    for a, b, c in paths(name):
        whole, first, then = T(a, c), T(a, b), T(b, c)
        assert first.output.shape == then.input.shape
        close(first.output, then.input, bar(name))
        V, U = noise(*whole.input.shape), noise(*whole.output.shape, seed=1)
        close(then @ (first @ V), whole @ V, bar(name))
        close((U @ then) @ first, U @ whole, bar(name))
        assert (then @ first.bias + then.bias - whole.bias).norm() <= bar(name) * whole.output.norm()


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma"])
def test_inputs_are_one_hot_rows_times_the_embedding(name):
    model, inputs = FAMILIES[name]()
    by_rows, by_tokens = linearize(model, inputs, at="inputs"), linearize(model, inputs)
    one_hot = torch.nn.functional.one_hot(inputs["input_ids"], model.config.vocab_size).double()
    assert torch.equal(by_rows.input, one_hot)
    V, U = noise(*one_hot.shape), noise(*by_rows.output.shape)
    weight = model.get_input_embeddings().weight.detach()
    factor = getattr(model.get_input_embeddings(), "embed_scale", torch.tensor(1.0)).double()
    close(by_rows @ V, by_tokens @ (V @ weight * factor), bar(name))
    close(U @ by_rows, (U @ by_tokens) @ weight.T * factor, bar(name))
    assert (by_rows.bias - by_tokens.bias).norm() <= bar(name) * by_rows.output.norm()


def test_pixels_go_through_the_patch_embedding():
    model, inputs = FAMILIES["vit"]()
    by_pixels, by_tokens = linearize(model, inputs, at="inputs"), linearize(model, inputs)
    assert by_pixels.shape == (*by_tokens.output.shape, 3, 8, 8)
    V = noise(*by_pixels.input.shape)
    projection = model.vit.embeddings.patch_embeddings.projection
    moved = torch.conv2d(V, projection.weight.detach(), stride=4).flatten(2).mT
    close(by_pixels @ V, by_tokens @ moved)


def test_clip_tokens_are_patches():
    """Its embedding is a convolution's output (N, D, rows, columns); a token is a patch all the same."""
    model, inputs = FAMILIES["clip"]()
    T = linearize(model, inputs)
    assert torch.equal(T.input, model.embeddings.patch_embedding(inputs["pixel_values"]).flatten(2).mT)


def test_embeddings_is_boundary_zero():
    model, inputs = FAMILIES["bert"]()
    U = noise(2, 1, 2)
    assert torch.equal(U @ linearize(model, inputs, at="embeddings"), U @ linearize(model, inputs, at=0))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    for k in range(3):
        assert torch.equal(linearize(model, inputs, at=k).input, hidden[k])
    close(linearize(model, inputs, to="embeddings").output, hidden[0])


def test_the_last_boundary_lies_before_the_final_norm():
    model, inputs = FAMILIES["gpt2"]()
    T = linearize(model, inputs, at=2, to="last_hidden_state")
    with torch.no_grad():
        close(model.transformer.ln_f(T.input), T.output)
    assert [cut.module for cut in T.cuts] == ["transformer.ln_f"]
    assert not linearize(model, inputs, at=2, to=2).bias.any()  # from a boundary to itself: the identity
    V = noise(*T.input.shape)
    assert torch.equal(linearize(model, inputs, at=2, to=2) @ V, V)


# --------------------------------------------------------------------------------------------------- errors and display


@pytest.mark.parametrize("product, shape", [
    ("matvec", (2, 6, 15)), ("matvec", (6, 16)), ("replay", (1, 6, 16)),
    ("rmatvec", (2, 5, 16)), ("rmatvec", (3, 1, 6, 16)), ("rmatvec", (6, 16)),
])  # fmt: skip
def test_a_wrong_shape_is_told_with_the_right_one(product, shape):
    with pytest.raises(ValueError, match=r"must have the shape \((\d, )?2, 6, 16\)"):
        getattr(operator("gpt2"), product)(torch.zeros(shape))


@pytest.mark.parametrize("position", [6, -7, torch.tensor([0, 6]), torch.tensor([0, 1, 2]), torch.zeros(1, 2).long()])
def test_a_position_that_is_none_is_refused(position):
    with pytest.raises(ValueError, match=r"position must be .* \[-6, 6\)"):
        operator("gpt2").slice(position)


def test_what_is_over_the_budget_is_refused_with_its_size_before_any_work(monkeypatch):
    T = linearize(*FAMILIES["gpt2"](), budget_gb=1e-6)
    monkeypatch.setattr(AttentionTensor, "_pull", lambda *a, **k: pytest.fail("work was done"))
    entries = 2 * 6 * 16 * 6 * 16
    with pytest.raises(MemoryError, match=r"0\.000147 GB.*budget of 1e-06 GB.*slice"):
        T.dense()
    with pytest.raises(MemoryError, match="GB"):
        T.slice(0)
    T.budget_gb = 8.0
    monkeypatch.undo()
    assert T.dense().numel() == entries
    big = linearize_function(lambda x: x.cumsum(1).repeat(1, 40, 1), torch.zeros(1, 1000, 10))
    with pytest.raises(MemoryError, match=r"\b16(\.0)? GB"):  # 400000 x 10000 x 4 bytes
        big.dense()


@pytest.mark.parametrize("call, error", [
    (lambda T: T.norm(probes=1), "at least 2 probes"),
    (lambda T: T.svd(0), r"k must be in \[1, 95\]"),
    (lambda T: T.svd(96), r"k must be in \[1, 95\]"),
])  # fmt: skip
def test_impossible_requests_are_refused(call, error):
    with pytest.raises(ValueError, match=error):
        call(operator("gpt2"))


@pytest.mark.parametrize("options, error", [
    ({"attention": "linear"}, "attention must be one of 'frozen', 'tangent', not 'linear'"),
    ({"norm": "ratio"}, "norm must be one of"),
    ({"activation": "secant"}, "activation must be one of 'ratio', 'tangent'"),
    ({"gate": "both"}, "gate must be one of 'gate', 'value', 'split', 'tangent'"),
    ({"at": "logits"}, "`at` must be"),
    ({"at": 3}, r"0\.\.2"),
    ({"to": -1}, r"0\.\.2"),
    ({"to": "attentions"}, "`to` must be"),
    ({"at": 2, "to": 1}, "`at` before `to`|`to` must not lie before `at`"),
])  # fmt: skip
def test_a_wrong_option_is_told_with_the_right_ones(options, error):
    with pytest.raises(ValueError, match=error):
        linearize(*FAMILIES["gpt2"](), **options)


def test_the_display_says_shape_size_rules_and_certificate():
    T = operator("gpt2")
    for text in (repr(T), T._repr_html_()):
        assert "(2, 6, 16, 6, 16)" in text and "0.000147" in text and "frozen" in text and "ratio" in text
    assert "exact to 1e-13" in T._repr_html_() and "5 norm, 4 softmax" in T._repr_html_()
    assert T.dense().numel() * 8 / 1e9 == pytest.approx(0.000147, rel=1e-2)


# ------------------------------------------------------------------------------------------------------ the certificate


def test_a_certificate_is_deterministic_and_prints_in_one_line():
    T = operator("gpt2")
    assert T.certificate() == T.certificate()
    assert T.certificate().check() == T.certificate()
    assert "\n" not in str(T.certificate()) and str(T.certificate()).startswith("exact to 1e-13")


@pytest.mark.parametrize("break_it", ["bias", "factor", "cut"])
def test_a_certificate_notices_a_broken_operator(break_it):
    """The three ways to be wrong: a constant lost from the tape, another product in it, a cut in the backward pass."""
    W = noise(8, 8)

    def fresh():
        return linearize_function(lambda x: torch.relu(x @ W + 1) @ W + 3, noise(2, 5, 8))

    fresh().certificate().check()
    T = fresh()
    nodes = T.tape.nodes
    if break_it == "bias":
        i = next(i for i, node in enumerate(nodes) if node and isinstance(node.args[-1], int) and node.args[-1] == 3)
        nodes[i] = nodes[i]._replace(args=(nodes[i].args[0], 4))
    elif break_it == "factor":
        i = next(i for i, node in enumerate(nodes) if node and torch.equal(torch.as_tensor(node.args[1]), W))
        nodes[i] = nodes[i]._replace(args=(nodes[i].args[0], 1.01 * W))
    else:
        T._Y = T._Y + 0 * T._Y.detach() - 0.01 * (T._X @ W)
    c = T.certificate()
    assert c.worst > 1e-4 and "NOT EXACT" in str(c)
    with pytest.raises(ArithmeticError, match="must equal the model at X"):
        c.check()


def test_a_certificate_notices_a_forward_that_is_not_the_models():
    """A function that answers differently the second time: what was recorded is not the model's own forward."""
    calls = itertools.count()
    T = linearize_function(lambda x: x * (2.0 + next(calls)), noise(1, 2, 3))
    assert T.certificate().forward > 0.1


@pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 0.04)])
def test_products_in_every_precision_are_those_of_float64(dtype, bar):
    """Weights rounded alike; measured: 4.2e-7 in float32, 0.0104 in bfloat16."""
    model, inputs = FAMILIES["gpt2"]()
    rounded = model.to(dtype)
    T, exact = linearize(rounded, inputs), linearize(copy.deepcopy(rounded).double(), inputs)
    U = noise(*T.output.shape).to(dtype)
    assert T.rmatvec(U).dtype == T.matvec(T.input).dtype == T.dense().dtype == dtype
    close(T.rmatvec(U).double(), exact.rmatvec(U.double()), bar)
    close(T.bias.double(), exact.bias, bar)
