"""tiny-attn and its induction circuit: the sequences, the scores, the two kinds of heads, and what hangs on them."""

import pytest
import torch
import transformers as tf

from tensorlens_utils import linearize
from tensorlens_utils.models import card, load_model
from tensorlens_utils.recipes.induction import (
    FIRST,
    LENGTH,
    WORDS,
    attention_maps,
    induction_scores,
    previous_token_scores,
    repeated_words,
)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-attn")[0]


def twice(n, period, between, seed=7):
    """n sequences of <s>, a stretch of distinct words, other words, and the stretch again."""
    generator = torch.Generator().manual_seed(seed)
    words = FIRST + torch.rand(n, len(WORDS), generator=generator).argsort(1)
    block, others = words[:, :period], words[:, period:period + between]
    return torch.cat([torch.ones(n, 1, dtype=torch.long), block, others, block], 1)


def test_sequences_begin_again_after_periods_of_every_length():
    ids = repeated_words(2000, torch.Generator().manual_seed(0))
    assert ids.shape == (2000, 1 + LENGTH) and (ids[:, 0] == 1).all() and len(set(WORDS)) == len(WORDS) == 65
    assert ids[:, 1:].unique().tolist() == [*range(FIRST, FIRST + len(WORDS))]
    words = ids[:, 1:]
    again = torch.stack([(words[:, k:] == words[:, :-k]).all(1) for k in range(8, 33)], 1)  # the first is the period
    assert again.any(1).all() and again.int().argmax(1).bincount(minlength=25).min() > 40


def test_scores_of_an_attention_that_is_known(monkeypatch):
    ids = torch.tensor([[9, 4, 5, 6, 4, 5, 6]])
    maps = torch.zeros(1, 1, 2, 7, 7)  # one layer, one sequence, two heads
    for token, after in ((4, 2), (5, 3), (6, 4)):  # from a token of the second copy to what followed it
        maps[0, 0, 0, token, after] = 0.9
    for token in range(1, 7):
        maps[0, 0, 1, token, token - 1] = 0.6
    monkeypatch.setattr("tensorlens_utils.recipes.induction.attention_maps", lambda model, input_ids: maps)
    torch.testing.assert_close(induction_scores(None, ids, 3), torch.tensor([[[0.9, 0.0]]]))
    torch.testing.assert_close(previous_token_scores(None, ids), torch.tensor([[[0.0, 0.6]]]))
    with pytest.raises(ValueError, match="here the last 2 are not. Build input_ids as torch.cat"):
        induction_scores(None, ids, 2)


def test_attention_maps_are_those_of_any_causal_model_and_leave_it_as_it_was():
    torch.manual_seed(0)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, intermediate_size=8,
                                               num_attention_heads=4, num_key_value_heads=2)).eval()
    before = llama.config._attn_implementation
    with torch.no_grad():
        maps = attention_maps(llama, torch.arange(12).view(2, 6))
    assert maps.shape == (3, 2, 4, 6, 6) and llama.config._attn_implementation == before != "eager"
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 4, 6))
    assert (maps.triu(1) == 0).all()


def test_a_previous_token_head_in_layer_0_and_induction_heads_in_layer_1():
    numbers = {key: m for key, m in card("tiny-attn").items() if isinstance(m, dict)}
    previous = {key: m["low"] for key, m in numbers.items() if key.startswith("previous token, layer 0")}
    induction = {key: m["low"] for key, m in numbers.items() if key.startswith("induction, layer 1")}
    print({key: m["value"] for key, m in numbers.items()})
    assert max(previous.values()) > 0.5 and max(induction.values()) > 0.5
    assert max(m["high"] for key, m in numbers.items() if key.startswith("induction, layer 0")) < 0.05
    assert numbers["accuracy, second copy"]["low"] > 0.95
    assert numbers["loss, second copy"]["high"] < 0.1 < 4 < numbers["loss, first copy"]["low"]


@torch.no_grad()
@pytest.mark.parametrize("between", [0, 5, 16])
def test_it_finds_the_word_and_not_a_place_a_fixed_distance_back(model, between):
    """No sequence of the training had words between its copies."""
    ids, period = twice(200, 20, between), 20
    right = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert right[:, 1 - period:].float().mean() > 0.95
    scores = attention_maps(model, ids).diagonal(1 - period - between, -2, -1)[..., -period:].mean((1, 3))
    assert scores[1].min() > 0.5


@torch.no_grad()
def test_induction_hangs_on_the_previous_token_head(model):
    ids = twice(100, 30, 0)
    head = previous_token_scores(model, ids).mean(0)[0].argmax().item()
    written = model.model.decoder.layers[0].self_attn.out_proj.weight  # (channels, heads × channels of a head)
    whole = written.clone()
    try:
        written.view(64, 4, 16)[:, head] = 0
        assert induction_scores(model, ids, 30).mean(0)[1].max() < 0.1
    finally:
        written.copy_(whole)
    assert induction_scores(model, ids, 30).mean(0)[1].min() > 0.5


def test_nothing_but_attention_and_norms_moves_the_stream(model):
    """The MLPs have no hidden units and no bias: what they add is exactly zero, in the model and in its operator."""
    added = []
    handles = [block.fc2.register_forward_hook(lambda module, args, output: added.append(output))
               for block in model.model.decoder.layers]
    with torch.no_grad():
        model(twice(3, 8, 2))
    for handle in handles:
        handle.remove()
    assert len(added) == 2 and all((output == 0).all() for output in added)
    assert not [name for name, p in model.named_parameters() if "bias" in name or "norm" in name and p.numel()]
    linearize(model, {"input_ids": twice(2, 8, 2)}, at="tokens", to="logits").certificate().check()


def test_its_tokenizer_reads_words(model):
    _, tokenizer = load_model("tiny-attn")
    inputs = tokenizer("ba ke su ba ke", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist()) == ["<s>", "ba", "ke", "su", "ba", "ke"]
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == "su"
    assert tokenizer("zebra").input_ids == [1, tokenizer.unk_token_id]
