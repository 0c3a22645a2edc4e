"""The two splits of a logit against the dense tensor, a model written out and one that is really cut; every family."""

import copy
import functools

import pytest
import torch
from families import ADDED, FAMILIES, FLOAT32, UNSUPPORTED, without_additions

from tensorlens_utils import linearize, load_data, load_model
from tensorlens_utils.collapse.drivers import CONSTANTS, TOKENS, by_source, by_writer, removal
from tensorlens_utils.models import find_blocks


def bar(name):
    return 3e-6 if name in FLOAT32 else 1e-10


def close(a, b, bar=1e-10):
    assert a.shape == b.shape
    assert float((a - b).norm()) <= bar * float(b.norm())


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def case(name):
    """(model, inputs, w, U): a random output vector w for each text, and U, w at its last unmasked position."""
    model, inputs = FAMILIES[name]()
    T = linearize(model, inputs)
    w, U = noise(2, T.output.shape[-1]), torch.zeros_like(T.output)
    U[torch.arange(2), T.positions(-1)] = w
    return model, inputs, w, U


def pull(name, U, at, to=None):
    """Uᵀ·T(at → to), (N, L, D), from the dense tensor."""
    model, inputs, *_ = case(name)
    return torch.einsum("nic,nicjd->njd", U, linearize(model, inputs, at=at, to=to).dense())


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("split", [by_source, by_writer])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNSUPPORTED])
def test_the_shares_of_every_family_add_up_to_the_logit(name, split):
    model, inputs, w, U = case(name)
    shares = split(model, inputs, w)
    logit = (linearize(model, inputs).output * U).flatten(1).sum(1)
    size = sum(share.abs().reshape(2, -1).sum(1) for share in shares.values())
    assert ((shares.total - logit).abs() <= bar(name) * size).all()
    assert shares[TOKENS].shape[0] == 2 and not any(share.requires_grad for share in shares.values())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNSUPPORTED])
def test_each_block_has_its_writers(name):
    """One attention with a share for each head, and one FFN, whatever they are called and however they are wired."""
    model, inputs, w, _ = case(name)
    shares, blocks = by_writer(model, inputs, w), find_blocks(model)[0] + "."
    params = dict(model.named_parameters())
    writers = {k: v for k, v in shares.items() if k.startswith(blocks) and k not in params}
    heads = [v for v in writers.values() if v.dim() == 2]
    calls = 1 if name == "albert" else 2  # whose one group of weights is called twice
    assert len(writers) == 2 * calls
    assert [v.shape for v in heads] == ([] if name == "rwkv" else [(2, 4)] * calls)
    inside = {k for k in shares if k.startswith(blocks)} - set(writers)
    assert all(k.endswith(("bias", "weight")) for k in inside), inside  # biases, and norms' β by any name


# --------------------------------------------------------------------------------------------------------------- source


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "mixtral"])
def test_a_tokens_share_is_the_class_maps(name):
    model, inputs, w, U = case(name)
    T = linearize(model, inputs)
    shares = by_source(model, inputs, w)
    close(shares[TOKENS], torch.einsum("nic,nicjd,njd->nj", U, T.dense(), T.input), bar(name))
    rest = sum(share.reshape(2, -1).sum(1) for k, share in shares.items() if k != TOKENS)
    assert (rest - (U * T.bias).flatten(1).sum(1)).norm() <= bar(name) * T.output.norm()


def test_gpt2s_additions_have_the_shares_that_the_dense_tensor_gives_them():
    model, inputs, w, U = case("gpt2")
    shares, p = by_source(model, inputs, w), dict(model.named_parameters())
    entered = pull("gpt2", U, 0)
    close(shares["transformer.wpe.weight"], (entered * p["transformer.wpe.weight"][:6].detach()).sum(-1))
    for k in (0, 1):  # what the FFN of block k adds enters block k + 1
        name = f"transformer.h.{k}.mlp.c_proj.bias"
        close(shares[name], (pull("gpt2", U, k + 1).sum(1) * p[name].detach()).sum(-1))
    last = p["transformer.wte.weight"] @ p["transformer.ln_f.bias"]
    close(shares["transformer.ln_f.bias"], w @ last.detach())


def test_berts_additions_have_the_shares_that_the_dense_tensor_gives_them():
    """Post-LN: β of a block's last norm enters the next block; position and type embeddings pass the embeddings' norm.
    """
    model, inputs, w, U = case("bert")
    shares, p = by_source(model, inputs, w), {k: v.detach() for k, v in model.named_parameters()}
    T = linearize(model, inputs)
    at_tokens = torch.einsum("nic,nicjd->njd", U, T.dense())  # they are added where the tokens enter
    for kind, rows in (("position", slice(0, 6)), ("token_type", [0] * 6)):
        name = f"bert.embeddings.{kind}_embeddings.weight"
        close(shares[name], (at_tokens * p[name][rows]).sum(-1))
    for k, name in enumerate(["embeddings.LayerNorm", "encoder.layer.0.output.LayerNorm",
                              "encoder.layer.1.output.LayerNorm"]):  # fmt: skip
        close(shares[f"bert.{name}.bias"], (pull("bert", U, k).sum(1) * p[f"bert.{name}.bias"]).sum(-1))
    close(shares["classifier.bias"], w @ p["classifier.bias"])


def test_a_class_token_has_its_share():
    model, inputs, w, U = case("vit")
    shares, p = by_source(model, inputs, w), {k: v.detach() for k, v in model.named_parameters()}
    entered = pull("vit", U, 0)
    close(shares["vit.embeddings.cls_token"], (entered[:, 0] * p["vit.embeddings.cls_token"][0]).sum(-1))
    close(shares["vit.embeddings.position_embeddings"], (entered * p["vit.embeddings.position_embeddings"]).sum(-1))


SCORES_ONLY = ("query", "key.", "q_proj", "k_proj")  # which A took in; GPT-2 and NeoX have theirs in one with v


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "opt", "gpt_neox", "clip"])
def test_every_additive_parameter_has_a_share_unless_A_took_it_in(name):
    model, inputs, w, _ = case(name)
    shares = by_source(model, inputs, w)
    added = {k for k, _ in model.named_parameters() if any(part in ADDED for part in k.split("."))}
    absent = {k for k in added - set(shares) if not any(part in k for part in SCORES_ONLY)}
    assert absent == {"vit": {"vit.embeddings.patch_embeddings.projection.bias"},  # of which the tokens are made
                      "clip": {"post_layernorm.bias"}}.get(name, set())  # of the pooled output
    assert set(shares) - {TOKENS} - added <= {"embeddings.position_embedding.weight"}


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mixtral"])
def test_what_adds_nothing_leaves_all_to_the_tokens(name):
    model, inputs = FAMILIES[name]()
    shares = by_source(without_additions(model), inputs)
    assert shares[TOKENS].all(0).any() and not any(v.any() for k, v in shares.items() if k != TOKENS)


def test_numbers_and_phi_of_0_are_constants():
    """x + 2 in a norm's stead, and softplus: what they add has a share, and no parameter's name."""
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(5, 4).double(), torch.nn.Linear(4, 3).double()

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids):
            return self.out(torch.nn.functional.softplus(self.embed(input_ids)) + 2)

    torch.manual_seed(0)
    model, ids = Toy(), {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    shares, W = by_source(model, ids, torch.tensor([0, 1])), model.out.weight.detach()
    each = (torch.log(torch.tensor(2.0).double()) + 2) * W.sum(1)
    close(shares[CONSTANTS], each[:2])
    close(shares["out.bias"], model.out.bias.detach()[:2])
    close(shares.total, model(ids["input_ids"]).detach()[torch.arange(2), -1, torch.arange(2)])


# --------------------------------------------------------------------------------------------------------------- writer


def test_gpt2s_writers_are_those_written_out():
    """w·W_U·diag(γ/σ)·C times what each part writes at the last position: pre-LN, no norm on the way."""
    model, inputs, w, _ = case("gpt2")
    seen, at = {}, torch.tensor([5, 3])
    hooks = [m.register_forward_hook(lambda m, args, out, k=k: seen.update({k: (args[0], out)}))
             for k, m in model.named_modules() if k.endswith(("c_proj", "ln_f", "wte", "wpe"))]  # fmt: skip
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        shares, n, H = by_writer(model, inputs, w), torch.arange(2), 4
        final = seen["transformer.ln_f"][0][n, at]
        scale = model.transformer.ln_f.weight / (final.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        carried = w @ model.lm_head.weight * scale
        carried = carried - carried.mean(-1, keepdim=True)  # Cᵀ
        for k in (0, 1):
            name = f"transformer.h.{k}.attn.c_proj"
            z, W = seen[name][0][n, at], model.get_submodule(name).weight
            for h in range(H):
                part = slice(4 * h, 4 * h + 4)
                close(shares[name][:, h], (carried * (z[:, part] @ W[part])).sum(-1))
            close(shares[name + ".bias"], carried @ model.get_submodule(name).bias)
            name = f"transformer.h.{k}.mlp.c_proj"
            close(shares[name], (carried * seen[name][1][n, at]).sum(-1))
        for j in range(2):  # of all the positions, the last alone has embeddings that the stream carries there
            expected = torch.zeros(6).double()
            expected[at[j]] = carried[j] @ seen["transformer.wpe"][1][0, at[j]]
            close(shares["transformer.wpe.weight"][j], expected)


def test_berts_writers_pass_every_later_norm():
    """Post-LN, written out: a write of block 0 at [CLS] passes three frozen norms, then pooler and classifier."""
    model, inputs, w, _ = case("bert")
    seen = {}
    names = [k for k, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear)]
    hooks = [model.get_submodule(k).register_forward_hook(
             lambda m, args, out, k=k: seen.update({k: (args[0], out)})) for k in names]  # fmt: skip
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        shares = by_writer(model, inputs, w)

        def back(g, name):
            """gᵀ·LN at [CLS], its scale as it was."""
            norm, x = model.get_submodule(name), seen[name][0][:, 0]
            g = g * norm.weight / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            return g - g.mean(-1, keepdim=True)

        z = seen["bert.pooler.dense"][1]
        g = (w @ model.classifier.weight * z.tanh() / z) @ model.bert.pooler.dense.weight
        for k in (1, 0):
            layer = f"bert.encoder.layer.{k}"
            g = back(g, f"{layer}.output.LayerNorm")
            close(shares[f"{layer}.output.dense"], (g * seen[f"{layer}.output.dense"][1][:, 0]).sum(-1))
            g = back(g, f"{layer}.attention.output.LayerNorm")
            dense = model.get_submodule(f"{layer}.attention.output.dense")
            heads = seen[f"{layer}.attention.output.dense"][0][:, 0].view(2, 4, 4)
            writes = torch.einsum("nhd,ehd->nhe", heads, dense.weight.view(16, 4, 4))
            close(shares[f"{layer}.attention.output.dense"], torch.einsum("ne,nhe->nh", g, writes))


def test_the_layers_of_albert_go_by_one_name():
    model, inputs, w, _ = case("albert")
    shares, path = by_writer(model, inputs, w), "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert shares[f"{path}.attention.dense"].shape == (2, 4) and shares[f"{path}.ffn_output"].shape == (2,)


# -------------------------------------------------------------------------------------------------------------- removal


def really(model, inputs, w, change):
    """How the logit changes in a copy of the model in which ``change`` has zeroed weights."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        change(cut)
        at = linearize(model, inputs).positions(-1)
        before, after = (m(**inputs).logits for m in (model, cut))
    moved = after - before
    return ((moved[torch.arange(2), at] if moved.dim() == 3 else moved) * w).sum(-1)


def test_an_ffn_removed():
    """Predicted: −⟨w, T(k → logits)·write⟩ of the dense tensor; answered: its weights and bias zeroed."""
    model, inputs, w, U = case("gpt2")
    name = "transformer.h.0.mlp.c_proj"
    predicted, answered = removal(model, inputs, name, w)
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    close(predicted, -(pull("gpt2", U, 1) * seen[0]).flatten(1).sum(1))

    def change(cut):
        for p in cut.get_submodule(name).parameters():
            p.zero_()

    close(answered, really(model, inputs, w, change))


@pytest.mark.parametrize("name, path, columns", [("gpt2", "transformer.h.0.attn.c_proj", False),
                                                 ("bert", "bert.encoder.layer.0.attention.output.dense", True)])
def test_a_head_removed(name, path, columns):
    """Answered: its rows of W_O zeroed. Predicted: for the whole attention, the sum of its heads."""
    model, inputs, w, _ = case(name)
    found = [removal(model, inputs, (path, h), w) for h in range(4)]
    for h, (_, answered) in enumerate(found):
        def change(cut, h=h):
            W = cut.get_submodule(path).weight
            (W.T if columns else W)[4 * h : 4 * h + 4] = 0

        close(answered, really(model, inputs, w, change))
    close(removal(model, inputs, path, w)[0], sum(p for p, _ in found))


def test_a_head_removed_as_T_predicts_it():
    """In a GPT-2 whose first FFN is silent, a head's write enters block 1 as it is: −⟨w, T(1 → logits)·z_h·W_h⟩."""
    model, inputs, w, U = case("gpt2")
    model = copy.deepcopy(model)
    path = "transformer.h.0.attn.c_proj"
    with torch.no_grad():
        for p in model.transformer.h[0].mlp.c_proj.parameters():
            p.zero_()
        seen = []
        hook = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(args[0]))
        model(**inputs)
        hook.remove()
        D = linearize(model, inputs, at=1).dense()
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            write = seen[0][..., part] @ model.get_submodule(path).weight[part]
            predicted, _ = removal(model, inputs, (path, h), w)
            close(predicted, -torch.einsum("nic,nicjd,njd->n", U, D, write))


def test_the_experts_are_removed_together():
    model, inputs, w, _ = case("mixtral")
    name = "model.layers.0.mlp.experts"
    _, answered = removal(model, inputs, name, w)

    def change(cut):
        cut.get_submodule(name).down_proj.zero_()

    close(answered, really(model, inputs, w, change), 1e-6)


@pytest.mark.parametrize("writer", ["transformer.h.0.attn.c_attn", "lm_head", ("transformer.h.0.attn.c_proj", 4),
                                    ("transformer.h.0.mlp.c_proj", 0)])  # fmt: skip
def test_what_writes_nothing_is_refused(writer):
    model, inputs, w, _ = case("gpt2")
    with pytest.raises(ValueError, match=r"writer must be one of transformer\.h\.0\.attn\.c_proj, transformer.*not"):
        removal(model, inputs, writer, w)


# ------------------------------------------------------------------------------------------------------- trained models


@pytest.mark.parametrize("split", [by_source, by_writer])
@pytest.mark.parametrize("name, data, rows", [("tiny-vit", "digits", 60), ("tiny-bert", "reviews", 60)])
def test_the_shares_are_the_logit_in_float32(name, data, rows, split):
    model, processor = load_model(name)
    data = load_data(data)[:rows]
    inputs = (processor(data["image"], return_tensors="pt") if "image" in data else
              processor(data["text"], return_tensors="pt", padding=True))  # fmt: skip
    shares = split(model, inputs)
    with torch.no_grad():
        logit = model(**inputs).logits.amax(-1)
    size = sum(share.abs().reshape(rows, -1).sum(1) for share in shares.values())
    assert ((shares.total - logit).abs() <= 1e-5 * size).all()
    assert all(p.requires_grad for p in model.parameters()) and not any(p.grad is not None for p in model.parameters())
