"""Captured attention against what the models report, for every family; masks taken off; other patterns put in."""

import pytest
import torch
from torch import nn

from tensorlens_utils import load_data, load_model
from tensorlens_utils.models import find_blocks
from tensorlens_utils.patterns import capture
from tests.families import FAMILIES

NONE = {"longformer", "rwkv", "mamba"}  # attention in bands, or none


def eager(model):
    """A copy's attention written out, as far as the family has a choice."""
    for m in model.modules():
        if hasattr(getattr(m, "config", None), "_attn_implementation"):
            m.config._attn_implementation_internal = "eager"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NONE])
@torch.no_grad()
def test_every_family(name):
    model, inputs = FAMILIES[name]()
    fused, before = capture(model, inputs), model(**inputs)
    assert (fused.output[0] - before[0]).abs().max() < 1e-13  # the run is the model's own
    eager(model)
    p = capture(model, inputs)
    reported = torch.stack(model(**inputs, output_attentions=True).attentions, 1)
    assert torch.equal(p.probabilities, reported) and p.layers == (0, 1)
    # fused and written out are the same attention, masked entries too; some take the softmax in float32
    assert (fused.probabilities - p.probabilities).abs().max() < 1e-6
    assert (fused.logits - p.logits).abs().max() < 1e-5
    assert p.logits.isfinite().all() and p.logits.abs().max() < 100  # no mask is left in them
    seen = torch.where(p.probabilities > 0, p.logits, -torch.inf).softmax(-1)
    rows = torch.ones(p.probabilities.shape[:-1], dtype=torch.bool)
    if "attention_mask" in inputs:
        rows &= inputs["attention_mask"].bool()[:, None, None]  # of a padded query nothing is asked
    assert (seen - p.probabilities)[rows].abs().max() < 1e-6


@torch.no_grad()
def test_logits_are_those_before_the_mask():
    """Of two models that differ in the mask alone, the first layer's logits are the same, masked or not."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x, mask=None):
            return self.encoder(x, mask)

    x, causal = torch.randn(3, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    free, masked = capture(Masked(), {"x": x}), capture(Masked(), {"x": x, "mask": causal})
    assert torch.allclose(free.logits[:, 0], masked.logits[:, 0], atol=1e-6)
    assert not masked.probabilities.triu(1).any() and free.probabilities.triu(1).any()
    assert torch.allclose(masked.output, Masked().eval()(x, causal), atol=1e-6)
    low, model = capture(Masked(), {"x": x, "mask": causal.clamp_min(-1e4)}), Masked()
    assert torch.allclose(low.logits[:, 0], free.logits[:, 0], atol=1e-6)
    assert model.training  # left as it was


@pytest.fixture(scope="module")
def digits():
    model, processor = load_model("tiny-vit")
    return model, processor(load_data("digits")[:6]["image"], return_tensors="pt")


@torch.no_grad()
def test_what_is_put_in_is_what_the_model_goes_on_with(digits):
    model, inputs = digits
    plain = capture(model, inputs)
    same = capture(model, inputs, lambda layer, A: A)
    assert torch.equal(same.output.logits, plain.output.logits) and torch.equal(same.probabilities, plain.probabilities)
    assert torch.allclose(plain.output.logits, model(**inputs).logits, atol=1e-4)
    uniform = capture(model, inputs, lambda layer, A: torch.full_like(A, 1 / 17) if layer == 2 else A)
    assert torch.equal(uniform.probabilities[:, :3], plain.probabilities[:, :3])  # of layer 2 what it had
    assert not torch.allclose(uniform.probabilities[:, 3], plain.probabilities[:, 3], atol=1e-3)
    # a head without its pattern is a head without its output
    attention = model.vit.layers[1].attention
    silent = capture(model, inputs, lambda layer, A: A * (torch.arange(4) != 3).float().view(4, 1, 1) ** (layer == 1))
    hook = attention.o_proj.register_forward_pre_hook(
        lambda m, args: (args[0].unflatten(-1, (4, -1)).mul((torch.arange(4) != 3)[:, None]).flatten(-2),))
    assert torch.allclose(silent.output.logits, model(**inputs).logits, atol=1e-5)
    hook.remove()


@pytest.mark.parametrize("name, projection", [("llama", "self_attn.o_proj"), ("gpt_neox", "attention.dense"),
                                              ("bert", "attention.output.dense")])  # fmt: skip
@torch.no_grad()
def test_put_in_under_grouped_heads_a_parallel_residual_and_a_mask(name, projection):
    """A head silenced by its pattern is one silenced where W_O reads it; the second text of each batch is padded."""
    model, inputs = FAMILIES[name]()
    assert not inputs["attention_mask"].all()
    W_O = find_blocks(model)[1][1].get_submodule(projection)
    kept = (torch.arange(4) != 2).double()[:, None]
    silent = capture(model, inputs, lambda layer, A: A * kept[..., None] if layer == 1 else A).output.logits
    hook = W_O.register_forward_pre_hook(lambda m, args: ((args[0].unflatten(-1, (4, -1)) * kept).flatten(-2),))
    by_hand = model(**inputs).logits
    hook.remove()
    assert (silent - by_hand).abs().max() < 1e-5 < (model(**inputs).logits - by_hand).abs().max()


def test_inputs_are_by_name(digits):
    with pytest.raises(TypeError, match="by name.*not with a Tensor"):
        capture(digits[0], digits[1]["pixel_values"])


def test_derivatives_by_what_is_put_in(digits):
    """∂L/∂gate of one head, by autograd, against the difference of two runs in float64."""
    model, inputs = digits
    model, inputs = model.double(), {k: v.double() for k, v in inputs.items()}

    def loss(gate):
        out = capture(model, inputs, lambda layer, A: A * gate[layer][:, None, None]).output
        return out.logits[:, 3].sum()

    gate = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(gate), gate)
    step = torch.zeros_like(g)
    step[1, 2] = 1e-6
    with torch.no_grad():
        difference = (loss(gate + step) - loss(gate - step)) / 2e-6
    assert abs(float(g[1, 2] - difference)) < 1e-6 * max(1, abs(float(difference)))
    model.float()


@torch.no_grad()
def test_the_network_tensor_is_layer_major(digits):
    p = capture(*digits)
    network = p.network("probabilities")
    assert network.shape == (6, 17, 17, 16)
    assert torch.equal(network[2, :, :, 3 * 4 + 1], p.probabilities[2, 3, 1])


@pytest.mark.parametrize("name", ["longformer", "rwkv"])
def test_without_queries_by_keys_it_says_so(name):
    with pytest.raises(ValueError, match="none in its 2 blocks"):
        capture(*FAMILIES[name]())


def test_a_decoder_with_cross_attention_is_refused():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, x):
            return self.decoder(x, x)

    with pytest.raises(ValueError, match="block 0 has several"):
        capture(Decoder(), {"x": torch.randn(2, 5, 8)})
