"""Every rival against its formula written out in loops, entry by entry, in float64; then what all maps must obey.

The loops take weights from the modules by name, and attention and hidden states from the model's own outputs; they run
on one example alone, without padding, while the method sees it in a padded batch.
"""

import copy
import functools
import math
import sys

import numpy as np
import pytest
import torch
from families import FAMILIES
from scipy.stats import spearmanr

from tensorlens_utils import attentions, baselines
from tensorlens_utils.attentions import parts, run
from tensorlens_utils.baselines import METHODS
from tensorlens_utils.data import load_data
from tensorlens_utils.models import find_blocks, load_model, token_embedding

NAMES = ["bert", "gpt2", "llama", "vit"]  # post-LN; pre-LN; pre-LN, grouped heads, RMS norm; pre-LN, images
TARGETED = ["chefer", "attention × gradient", "gradient × input", "integrated gradients", "feature ablation"]
every_model = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize("method", METHODS)


@functools.cache
def family(name):
    return FAMILIES[name]()


@functools.cache
def target(name):
    model, inputs = family(name)
    with torch.no_grad():
        return model(**inputs).logits.flatten(1).argmax(1) % model(**inputs).logits.shape[-1]


def alone(inputs, n):
    """Example n without its padding, as a batch of one."""
    if "pixel_values" in inputs:
        return {"pixel_values": inputs["pixel_values"][n : n + 1]}
    kept = inputs["attention_mask"][n].bool()
    return {key: value[n : n + 1, kept] for key, value in inputs.items()}


@functools.cache
def scores(name, method):
    """The method on the padded batch at the default position."""
    return METHODS[method](*family(name), target(name))


def agrees(name, method, expected, bar=1e-6):
    """`expected(n)` (L_n,), a loop over example n alone, against the batch; padding must have exactly 0."""
    inputs, given = family(name)[1], scores(name, method)
    for n in range(len(given)):
        mask = inputs["attention_mask"][n].bool() if "attention_mask" in inputs else torch.ones(4, dtype=torch.bool)
        right = expected(n)
        assert right.shape == given[n, mask].shape and right.norm() > 0
        assert float((given[n, mask] - right).norm() / right.norm()) < bar
        assert not given[n, ~mask].any()


# ----------------------------------------------------------------------------------------------- the loops' ingredients


def layer_norm(module, v, at=None):
    """γ ⊙ (v − m(v)) / s(at), β left out; the module's own, less β, where at is v."""
    at = v if at is None else at
    s = math.sqrt(sum((a - at.mean()) ** 2 for a in at) / len(at) + module.eps)
    return module.weight * (v - v.mean()) / s


def values(name, block, x):
    """The value vectors of one token's x (D,), one for each query head: [(d,)]."""
    if name == "bert":
        v = block.attention.self.value(x)
    elif name == "gpt2":
        v = (layer_norm(block.ln_1, x) + block.ln_1.bias) @ block.attn.c_attn.weight[:, -16:]
        v = v + block.attn.c_attn.bias[-16:]
    elif name == "vit":
        v = block.attention.v_proj(layer_norm(block.layernorm_before, x) + block.layernorm_before.bias)
    else:
        rms = x / math.sqrt(float((x**2).mean()) + block.input_layernorm.variance_epsilon)
        v = block.self_attn.v_proj(rms * block.input_layernorm.weight)
        return [v[4 * (h // 2) : 4 * (h // 2) + 4] for h in range(4)]  # two query heads to each pair of key and value
    return [v[4 * h : 4 * h + 4] for h in range(4)]


def output(name, block):
    """W_O (16, D) and b_O (D,)."""
    if name == "gpt2":
        return block.attn.c_proj.weight, block.attn.c_proj.bias
    linear = {"bert": lambda: block.attention.output.dense, "vit": lambda: block.attention.o_proj,
              "llama": lambda: block.self_attn.o_proj}[name]()  # fmt: skip
    return linear.weight.T, linear.bias if linear.bias is not None else torch.zeros(16, dtype=torch.float64)


@functools.cache
@torch.no_grad()
def traced(name, n):
    """Layer by layer: (block, A (H, S, S), x (S, D), moved[i][j] = Σ_h α^h_ij f^h(x_j), e (S, D))."""
    model, inputs = copy.deepcopy(family(name)[0]), alone(family(name)[1], n)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    layers = []
    for block, A, x in zip(find_blocks(model)[1], out.attentions, out.hidden_states, strict=False):
        A, x = A[0], x[0]
        W, b = output(name, block)
        S, f = len(x), [[v @ W[4 * h : 4 * h + 4] for h, v in enumerate(values(name, block, row))] for row in x]
        moved = [[sum(A[h, i, j] * f[j][h] for h in range(4)) for j in range(S)] for i in range(S)]
        e = torch.stack([x[i] + sum(moved[i]) + b for i in range(S)])
        layers.append((block, A, x, moved, e))
    return layers


def product(name, n, step):
    """The row that is read of the product of step(layer) (S, S), over the layers; prefix left out."""
    R = None
    for layer in traced(name, n):
        M = step(*layer)
        R = M if R is None else M @ R
    return R[reads(name), prefix(name) :]


def reads(name):
    return 0 if name in ("bert", "vit") else -1


def prefix(name):
    return 1 if name == "vit" else 0


def table(S, entry):
    return torch.tensor([[float(entry(i, j)) for j in range(S)] for i in range(S)], dtype=torch.float64)


# ---------------------------------------------------------------------------------- the formulas, against written loops


@every_model
def test_the_loops_rebuild_the_models_own_stream(name):
    """What the references stand on: x + Σ moved + b_O leads to the next layer's input."""
    (block, _, _, _, e), (_, _, x, _, _) = traced(name, 0)[:2]
    with torch.no_grad():
        if name == "bert":
            y = block.attention.output.LayerNorm(e)
            y = block.output.LayerNorm(block.output.dense(block.intermediate(y)) + y)
        else:
            norm = {"gpt2": "ln_2", "llama": "post_attention_layernorm", "vit": "layernorm_after"}[name]
            y = e + block.mlp(getattr(block, norm)(e))
    assert float((y - x).norm() / x.norm()) < 1e-6


@every_model
def test_raw_attention(name):
    def expected(n):
        A = traced(name, n)[-1][1]
        return torch.stack([sum(A[h, reads(name), j] for h in range(4)) / 4 for j in range(prefix(name), A.shape[1])])

    agrees(name, "raw attention", expected)


@every_model
def test_rollout(name):
    def step(block, A, x, moved, e):
        M = table(len(x), lambda i, j: sum(A[h, i, j] for h in range(4)) / 4 + (i == j))
        return M / M.sum(1, keepdim=True)  # as the paper has it

    agrees(name, "rollout", lambda n: product(name, n, step))


@every_model
def test_norm_based(name):
    def expected(n):
        _, _, x, moved, _ = traced(name, n)[-1]
        return torch.stack([moved[reads(name)][j].norm() for j in range(prefix(name), len(x))])

    agrees(name, "norm-based", expected)


def brought(moved, x, i, j):
    return moved[i][j] + (x[i] if i == j else 0)


@every_model
def test_norm_based_with_residual_and_norm(name):
    def expected(n):
        block, _, x, moved, e = traced(name, n)[-1]
        i = reads(name)
        i = i % len(x)
        parts = [brought(moved, x, i, j) for j in range(prefix(name), len(x))]
        if name == "bert":
            parts = [layer_norm(block.attention.output.LayerNorm, v, e[i]) for v in parts]
        return torch.stack([v.norm() for v in parts])

    with torch.no_grad():
        agrees(name, "norm-based + norm", expected)


@every_model
def test_globenc(name):
    def step(block, A, x, moved, e):
        if name != "bert":
            M = table(len(x), lambda i, j: brought(moved, x, i, j).norm())
            return M / M.sum(1, keepdim=True)
        first, second = block.attention.output.LayerNorm, block.output.LayerNorm
        y = first(e)
        u = block.output.dense(block.intermediate(y)) + y
        return table(len(x), lambda i, j: layer_norm(second, layer_norm(first, brought(moved, x, i, j), e[i]), u[i])
                     .norm())  # fmt: skip

    with torch.no_grad():
        agrees(name, "globenc", lambda n: product(name, n, step))


@every_model
def test_alti(name):
    def step(block, A, x, moved, e):
        norm = block.attention.output.LayerNorm if name == "bert" else None
        y = norm(e) if norm else e

        def near(i, j):
            T = brought(moved, x, i, j)
            T = layer_norm(norm, T, e[i]) if norm else T
            return max(0.0, float(sum(abs(a) for a in y[i]) - sum(abs(a - t) for a, t in zip(y[i], T, strict=True))))

        M = table(len(x), near)
        return M / M.sum(1, keepdim=True)

    with torch.no_grad():
        agrees(name, "alti", lambda n: product(name, n, step))


@functools.cache
def attention_slopes(name, n):
    """∂(logit)/∂A for each layer (H, S, S): eager attention written anew, with a zero added to every weight."""
    model, inputs = copy.deepcopy(family(name)[0]), alone(family(name)[1], n)
    model.set_attn_implementation("eager")
    room, zeros = sys.modules[type(model).__module__], []
    original = room.eager_attention_forward

    def attention(module, q, k, v, mask, **kwargs):
        A = original(module, q, k, v, mask, **kwargs)[1]
        zeros.append(torch.zeros_like(A).requires_grad_())
        v = v.repeat_interleave(A.shape[1] // v.shape[1], 1)
        return torch.einsum("nhij,nhjd->nihd", A + zeros[-1], v), A

    room.eager_attention_forward = attention
    try:
        y = answer(model, inputs, int(target(name)[n]))
        return [g[0] for g in torch.autograd.grad(y, zeros)]
    finally:
        room.eager_attention_forward = original


def answer(model, inputs, c):
    logits = model(**inputs).logits
    return (logits[0, -1] if logits.dim() == 3 else logits[0])[c]


def test_the_slopes_are_what_the_logit_changes_by():
    """The reference's derivative against differences of the logit when one weight is moved (BERT, every entry)."""
    model, inputs = copy.deepcopy(family("bert")[0]), alone(family("bert")[1], 1)
    model.set_attn_implementation("eager")
    room, c = sys.modules[type(model).__module__], int(target("bert")[1])
    original, slopes = room.eager_attention_forward, attention_slopes("bert", 1)

    @torch.no_grad()
    def moved(layer, h, i, j, step):
        calls = []

        def attention(module, q, k, v, mask, **kwargs):
            A = original(module, q, k, v, mask, **kwargs)[1].clone()
            calls.append(None)
            if len(calls) == layer + 1:
                A[0, h, i, j] += step
            return torch.einsum("nhij,nhjd->nihd", A, v), A

        room.eager_attention_forward = attention
        try:
            return float(answer(model, inputs, c))
        finally:
            room.eager_attention_forward = original

    for layer in range(2):
        for h, i, j in np.ndindex(*slopes[layer].shape):
            slope = (moved(layer, h, i, j, 1e-5) - moved(layer, h, i, j, -1e-5)) / 2e-5
            assert abs(slope - float(slopes[layer][h, i, j])) < 1e-7


@every_model
def test_chefer(name):
    def expected(n):
        R = None
        for (_, A, x, _, _), G in zip(traced(name, n), attention_slopes(name, n), strict=True):
            bar = table(len(x), lambda i, j, A=A, G=G: sum(max(0.0, G[h, i, j] * A[h, i, j]) for h in range(4)) / 4)
            R = torch.eye(len(x), dtype=torch.float64) if R is None else R
            R = R + bar @ R
        return R[reads(name), prefix(name) :]

    agrees(name, "chefer", expected)


@every_model
def test_attention_times_gradient(name):
    def expected(n):
        A, G = traced(name, n)[-1][1], attention_slopes(name, n)[-1]
        S = A.shape[1]
        return torch.stack([sum(A[h, i, j] * G[h, i, j] for h in range(4) for i in range(S))
                            for j in range(prefix(name), S)])  # fmt: skip

    agrees(name, "attention × gradient", expected)


# the methods on the inputs: texts by inputs_embeds, images by their pixels, so neither as baselines.py does it


def at_inputs(name, n):
    """(X, y): (L, D) embeddings or the pixels of (L, C, p, p) patches, and the explained logit as their function."""
    model, inputs = family(name)[0], alone(family(name)[1], n)
    c = int(target(name)[n])
    if name == "vit":  # 8 × 8 pixels, patches of 4 × 4
        image = inputs["pixel_values"][0]
        X = torch.stack([image[:, r : r + 4, s : s + 4] for r in (0, 4) for s in (0, 4)])

        def y(X):
            rows = [torch.cat([X[r], X[r + 1]], 2) for r in (0, 2)]
            return answer(model, {"pixel_values": torch.cat(rows, 1)[None]}, c)

        return X, y
    X = token_embedding(model)(inputs["input_ids"])[0].detach()
    return X, lambda X: answer(model, {"inputs_embeds": X[None], "attention_mask": inputs["attention_mask"]}, c)


def slope(y, X):
    X = X.clone().requires_grad_()
    return torch.autograd.grad(y(X), X)[0]


@every_model
def test_gradient_times_input(name):
    def expected(n):
        X, y = at_inputs(name, n)
        return (X * slope(y, X)).flatten(1).sum(1)

    agrees(name, "gradient × input", expected)


@every_model
def test_integrated_gradients(name):
    def expected(n):
        X, y = at_inputs(name, n)
        nodes, weights = np.polynomial.legendre.leggauss(32)
        return sum(w / 2 * X * slope(y, (t + 1) / 2 * X) for t, w in zip(nodes, weights, strict=True)).flatten(1).sum(1)

    agrees(name, "integrated gradients", expected)


@every_model
def test_feature_ablation(name):
    @torch.no_grad()
    def expected(n):
        X, y = at_inputs(name, n)
        each = []
        for j in range(len(X)):
            without = X.clone()
            without[j] = 0
            each.append(y(X) - y(without))
        return torch.stack(each)

    agrees(name, "feature ablation", expected)


@every_model
def test_integrated_gradients_sum_to_the_change_of_the_logit(name):
    """From zero, or for Llama from another point: a zero without position is where its norm is all but broken."""
    empty = 0.1 * torch.arange(16) if name == "llama" else torch.zeros(())
    given = METHODS["integrated gradients"](*family(name), target(name), steps=200, empty=empty).sum(1)
    with torch.no_grad():
        for n, total in enumerate(given):
            X, y = at_inputs(name, n)
            start = y(empty.to(X).expand_as(X))
            assert abs(float(total - (y(X) - start))) < 1e-3 * float(abs(y(X)) + abs(start))


def test_an_empty_input_may_be_another():
    X, y = at_inputs("vit", 0)
    with torch.no_grad():
        given = METHODS["integrated gradients"](*family("vit"), target("vit"), empty=-0.8, steps=200)[0]
        assert abs(float(given.sum() - (y(X) - y(torch.full_like(X, -0.8))))) < 1e-3
        for name, empty in (("vit", torch.tensor(-0.8)), ("gpt2", torch.linspace(-1, 1, 16))):
            X, y = at_inputs(name, 0)
            without = X.clone()
            without[2] = empty
            given = METHODS["feature ablation"](*family(name), target(name), empty=empty)[0]
            assert abs(float(given[2] - (y(X) - y(without)))) < 1e-6


@pytest.mark.parametrize("method", ["integrated gradients", "feature ablation"])
def test_how_many_go_through_at_once_changes_nothing(method):
    one = METHODS[method](*family("bert"), target("bert"), batch=1)
    many = METHODS[method](*family("bert"), target("bert"), batch=7)
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6 * float(one.abs().max()))


def test_maps_in_pieces_are_maps_at_once(monkeypatch):
    layer = run(*family("gpt2")).layers[0]
    whole = torch.cat([v for _, v in parts(layer, True)], 1)
    S, pieces = whole.shape[1], []
    monkeypatch.setattr(attentions, "PIECE", whole[:, :4].numel())
    for i, v in parts(layer, True):
        pieces.append(v)
        assert v.shape[1] == i.stop - i.start <= 4
    assert len(pieces) == math.ceil(S / 4) > 1 and torch.equal(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(whole.sum(2) + family("gpt2")[0].transformer.h[0].attn.c_proj.bias, layer.x + layer.o)


# ------------------------------------------------------------------------------------------- which row the output reads


def test_the_attention_that_is_found_is_the_one_that_the_model_reports():
    for name in ("bert", "gpt2", "llama", "vit", "gptj", "bloom", "opt", "phi", "deberta-v2", "modernbert", "albert"):
        model, inputs = FAMILIES[name]()
        found = run(model, inputs).layers
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        with torch.no_grad():
            reported = model(**inputs, output_attentions=True).attentions
        for layer, A in zip(found, reported, strict=True):
            assert float((layer.A - A).abs().max()) < 1e-7, name  # eager ViT and Llama take the softmax in float32


@pytest.mark.parametrize("name, read", [
    ("bert", [[0], [0]]), ("vit", [[0], [0]]), ("gpt2", [[5], [3]]), ("beit", [[1, 2, 3, 4], [1, 2, 3, 4]]),
])  # fmt: skip
def test_rows_that_the_output_reads(name, read):
    model, inputs = FAMILIES[name]()
    if name == "beit":
        assert model.config.use_mean_pooling
    rows = run(model, inputs).rows
    for n, kept in enumerate(read):
        assert rows[n].nonzero().flatten().tolist() == kept
        assert torch.allclose(rows[n, kept], torch.ones(len(kept), dtype=rows.dtype) / len(kept))


@every_method
def test_a_position_is_explained_by_what_comes_before_it(method):
    model, inputs = family("gpt2")
    at = torch.tensor([2, 1])
    given = METHODS[method](model, inputs, target("gpt2"), at)
    if method != "random":
        assert given[0, :3].any() and not given[0, 3:].any()
        assert given[1, :2].any() and not given[1, 2:].any()
    assert torch.equal(METHODS[method](model, inputs, target("gpt2"), torch.tensor([5, 3])), scores("gpt2", method))
    assert torch.equal(METHODS[method](model, inputs, target("gpt2"), 1), METHODS[method](
        model, inputs, target("gpt2"), torch.tensor([1, 1])))  # fmt: skip


@every_method
def test_only_methods_with_a_target_take_notice_of_it(method):
    other = (target("bert") + 1) % 2
    changed = not torch.equal(METHODS[method](*family("bert"), other), scores("bert", method))
    assert changed == (method in TARGETED)


# ---------------------------------------------------------------------- batches, padding, determinism; models that ship


@functools.cache
def shipped(name, count=4):
    """(model in float64, inputs, the model's own predictions)."""
    model, processor = load_model(name, dtype="float64")
    data = load_data("digits" if name == "tiny-vit" else "reviews")[:count]
    inputs = (processor(data["image"], return_tensors="pt").to(model.dtype) if name == "tiny-vit" else
              processor(data["text"], padding=True, return_tensors="pt"))  # fmt: skip
    with torch.no_grad():
        return model, dict(inputs), model(**inputs).logits.argmax(-1)


@every_method
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-bert"])
def test_an_examples_map_depends_on_no_other(name, method):
    model, inputs, target = shipped(name)
    given = METHODS[method](model, inputs, target)
    L = 16 if name == "tiny-vit" else inputs["input_ids"].shape[1]
    assert given.shape == (4, L) and given.isfinite().all()
    assert torch.equal(METHODS[method](model, inputs, target), given)
    wider = inputs
    if name == "tiny-bert":
        assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
        assert not given[inputs["attention_mask"] == 0].any()
        wider = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in inputs.items()}
    padded = METHODS[method](model, wider, target)
    for n in range(4):
        single = METHODS[method](model, alone(inputs, n), target[n : n + 1])[0]
        for other in (given, padded):
            assert float((other[n, : len(single)] - single).abs().max()) < 1e-9 * max(1, float(single.abs().max()))


@every_method
def test_padding_on_the_left(method):
    """Llama's positions are relative, so the model's answer, and with it the map, moves along."""
    model, inputs = family("llama")
    left = {key: value.roll(2, 1) if key == "attention_mask" else value.clone() for key, value in inputs.items()}
    left["input_ids"][1] = inputs["input_ids"][1].roll(2)
    left["attention_mask"][0] = 1
    given = METHODS[method](model, left, target("llama"))
    assert not given[1, :2].any()
    right = scores("llama", method)
    assert float((given[1, 2:] - right[1, :4]).norm() / right[1].norm()) < 3e-6  # norms and rotations in float32


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-bert"])
def test_maps_of_a_model_with_random_weights_differ(name):
    """Adebayo et al. 2018: the ranks of the tokens must not survive when the weights are drawn anew."""
    model, inputs, target = shipped(name, 12)
    torch.manual_seed(0)
    drawn = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
    for method in METHODS:
        trained, other = (METHODS[method](m, inputs, target) for m in (model, drawn))
        if method == "random":
            assert torch.equal(trained, other)
            continue
        keep = inputs.get("attention_mask", torch.ones_like(trained)).bool()
        ranks = [spearmanr(a[k], b[k]).statistic for a, b, k in zip(trained, other, keep, strict=True)]
        assert np.mean(ranks) < 0.75, (method, np.mean(ranks))


def test_random_is_uniform_and_its_seed_counts():
    model, inputs, _ = shipped("tiny-vit", 64)
    given = METHODS["random"](model, inputs)
    assert 0 <= given.min() and given.max() < 1 and abs(float(given.mean()) - 0.5) < 4 / math.sqrt(12 * 64 * 16)
    assert len(given.unique()) > 1000
    assert not torch.equal(given, baselines.random(model, inputs, seed=1))


# ------------------------------------------------------------------------------------------------- manners and refusals


@every_method
def test_the_model_is_left_as_it_was(method):
    model, inputs = FAMILIES["bert"]()
    model.train()
    implementation, weights = model.config._attn_implementation, copy.deepcopy(model.state_dict())
    before = {key: value.clone() for key, value in inputs.items()}
    given = METHODS[method](model, inputs, target("bert"))
    assert not given.requires_grad
    assert model.training and model.config._attn_implementation == implementation
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in inputs.items())
    with torch.no_grad():
        assert torch.equal(METHODS[method](model, inputs, target("bert")), given)


def test_inputs_are_what_a_processor_gives():
    for method in ("random", "rollout", "feature ablation"):
        with pytest.raises(ValueError, match=r"inputs must hold input_ids or pixel_values, and have \['ids'\]"):
            METHODS[method](family("bert")[0], {"ids": torch.ones(2, 3)}, [0, 0])


def test_implementation_comes_back_after_an_error():
    model, inputs = FAMILIES["bert"]()
    implementation = model.config._attn_implementation
    assert implementation != "eager"
    with pytest.raises(ValueError, match=r"ints in \[0, 2\)"):  # by then the model has run
        METHODS["chefer"](model, inputs, [0, 2])
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("wrong, match", [
    (torch.tensor([0]), r"target must be \(2,\) ints, one logit for each input, or pairs \(2, 2\), .*, not \[0\]"),
    (torch.tensor([0.0, 1.0]), r"target must be \(2,\) ints"),
    (torch.tensor([0, 16]), r"target must be \(N,\) ints in \[0, 16\).* from 0 to 16"),
    ([-1, 0], r"target must be \(N,\) ints in \[0, 16\).* from -1 to 0"),
])  # fmt: skip
@pytest.mark.parametrize("method", TARGETED)
def test_a_target_is_one_logit_for_each_input(method, wrong, match):
    with pytest.raises(ValueError, match=match):
        METHODS[method](*family("gpt2"), wrong)


@pytest.mark.parametrize("position", [6, -7, torch.tensor([0]), torch.tensor([0, 6]), 0.5])
def test_a_position_is_one_of_the_tokens(position):
    for method in ("alti", "gradient × input"):
        with pytest.raises(ValueError, match=r"position must be an int or \(2,\) ints in \[-6, 6\)"):
            METHODS[method](*family("gpt2"), target("gpt2"), position)


@pytest.mark.parametrize("name, methods, match", [
    ("clip", ["rollout", "gradient × input"], "explains a logit, and CLIPVisionModel has none"),
    ("rwkv", ["raw attention", "chefer", "alti"], "RwkvForCausalLM shows none in 2 of its 2 blocks"),
    ("gemma2", ["globenc", "alti", "norm-based + norm"], "defined for post-LN blocks"),  # norms o before it is added
    ("dinov2", ["globenc", "alti", "norm-based + norm"], "defined for post-LN blocks"),  # scales o before it is added
])  # fmt: skip
def test_what_has_no_such_map_is_refused(name, methods, match):
    for method in methods:
        with pytest.raises(ValueError, match=match):
            METHODS[method](*FAMILIES[name](), torch.tensor([0, 0]))


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "gptj", "bloom", "falcon", "opt", "mixtral", "roberta", "albert",
                                  "distilbert", "deberta-v2", "modernbert", "deit", "gemma2",
                                  "longformer"])  # fmt: skip
def test_other_families(name):
    """Parallel blocks, shared blocks, other attentions: every rival is finite and not all zero, or refuses."""
    model, inputs = FAMILIES[name]()
    refused = {"gemma2": {"norm-based + norm", "globenc", "alti"},
               "falcon": set(METHODS) - {"random", "gradient × input", "integrated gradients", "feature ablation"},
               }  # fmt: skip
    refused["longformer"] = refused["falcon"]
    for method in METHODS:
        if method in refused.get(name, ()):
            with pytest.raises(ValueError):
                METHODS[method](model, inputs, torch.tensor([0, 1]))
        else:
            given = METHODS[method](model, inputs, torch.tensor([0, 1]))
            assert given.isfinite().all() and given.any(1).all(), method
