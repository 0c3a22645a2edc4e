"""``linearize`` leaves the model as it was, works wherever it is called, and is exact on a real model."""

import importlib
import itertools
import subprocess
import sys

import pytest
import torch
from dense import D, L, N, Toy, W, X, close, jacobian, noise, operator, rowwise
from families import FAMILIES
from torch import nn

from tensorlens_utils.linearize import linearize, linearize_function
from tensorlens_utils.linearize.values import UnsupportedOperation

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
