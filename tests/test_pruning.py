"""Pruning by gates: against heads silenced by hand, gradients by differences, and a head without effect."""

import pytest
import torch

from tensorlens_utils import load_data, load_model
from tensorlens_utils.data.world import HELD_OUT, Text
from tensorlens_utils.haar import Haar
from tensorlens_utils.haar import pruning as room
from tensorlens_utils.haar.pruning import (
    coefficient_scores,
    cross_entropy,
    error,
    head_scores,
    keep,
    next_token,
    pruned_coefficients,
    pruned_heads,
)
from tensorlens_utils.haar.sparsity import l1_entropy
from tensorlens_utils.patterns import capture
from tensorlens_utils.trees import Tree

HAAR = Haar(Tree.random(17, 0), Tree.random(17, 1))


@pytest.fixture(scope="module")
def digits():
    model, processor = load_model("tiny-vit", dtype="float64")
    rows = load_data("digits")[:12]
    inputs = processor(rows["image"], return_tensors="pt").to(torch.float64)
    return model, inputs, torch.tensor(rows["label"])


@pytest.fixture(scope="module")
def text():
    model, _ = load_model("tiny-gpt")
    ids = Text(HELD_OUT).rows(3)[:, :40]
    return model, {"input_ids": ids}, ids


def test_losses_are_the_models_own(digits, text):
    model, inputs, labels = digits
    everything = torch.ones(4, 4, dtype=torch.bool)
    with torch.no_grad():
        logits = model(**inputs).logits
        loss = text[0](**text[1], labels=text[2]).loss
    assert torch.allclose(pruned_heads(model, inputs, cross_entropy(labels), everything),
                          torch.nn.functional.cross_entropy(logits, labels, reduction="none"))  # fmt: skip
    assert torch.equal(pruned_heads(model, inputs, error(labels), everything), (logits.argmax(-1) != labels).float())
    plain = pruned_heads(text[0], text[1], next_token(text[2]), torch.ones(4, 8))
    assert plain.shape == (3,) and abs(float(plain.mean() - loss)) < 1e-5


def test_a_removed_head_writes_nothing(digits):
    model, inputs, labels = digits
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[1, 2] = kept[3, 0] = False
    hooks = [model.vit.layers[layer].attention.o_proj.register_forward_pre_hook(
        lambda m, args, head=head: (args[0].unflatten(-1, (4, -1)).mul((torch.arange(4) != head)[:, None]).flatten(-2),)
    ) for layer, head in ((1, 2), (3, 0))]  # fmt: skip
    with torch.no_grad():
        want = cross_entropy(labels)(model(**inputs))
    for hook in hooks:
        hook.remove()
    assert torch.allclose(pruned_heads(model, inputs, cross_entropy(labels), kept), want, atol=1e-10)


def test_head_scores(digits):
    model, inputs, labels = digits
    loss, scores = cross_entropy(labels), head_scores(*digits[:2], cross_entropy(labels), HAAR)
    assert {*scores} == {"magnitude", "gradient", "entropy", "energy"}
    one = torch.zeros(4, 4, dtype=torch.float64)
    one[2, 1] = 1e-6
    slope = (pruned_heads(model, inputs, loss, 1 + one) - pruned_heads(model, inputs, loss, 1 - one)) / 2e-6
    assert abs(float(slope.abs().mean() - scores["gradient"][2, 1])) < 1e-6
    with torch.no_grad():
        c = HAAR.analysis(capture(model, inputs).probabilities)
    assert torch.allclose(scores["entropy"], l1_entropy(c, HAAR).mean(0))
    attention = model.vit.layers[2].attention
    seen = []
    hook = attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    write = seen[0].unflatten(-1, (4, 16))[:, :, 1] @ attention.o_proj.weight.T[16:32].detach()
    assert abs(float(write.flatten(1).norm(dim=1).mean() - scores["magnitude"][2, 1])) < 1e-10


def test_a_head_without_effect_has_no_score_and_its_loss_costs_nothing(digits):
    model, inputs, labels = digits
    weight = model.vit.layers[1].attention.o_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, 32:48] = 0  # what head 2 of block 1 writes through
    scores = head_scores(model, inputs, cross_entropy(labels))
    kept = keep(scores["gradient"], 15 / 16)
    costs = pruned_heads(model, inputs, cross_entropy(labels), kept)
    free = pruned_heads(model, inputs, cross_entropy(labels), torch.ones(4, 4))
    with torch.no_grad():
        weight.copy_(before)
    assert (~kept).nonzero().tolist() == [[1, 2]] == (scores["magnitude"] == 0).nonzero().tolist()
    assert torch.allclose(costs, free, atol=1e-12)


@pytest.mark.parametrize("share", [-0.25, 12])
def test_a_share_is_no_count(share, digits):
    with pytest.raises(ValueError, match=r"a share is in \[0, 1\]"):
        keep(torch.rand(8), share)
    with pytest.raises(ValueError, match=r"a share is in \[0, 1\]"):
        pruned_coefficients(*digits[:2], cross_entropy(digits[2]), share)


def test_scores_that_are_no_numbers_are_not_kept_first():
    with pytest.raises(ValueError, match="1 of these 3 are not finite"):
        keep(torch.tensor([0.1, torch.nan, 0.3]), 0.5)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4), (4, 1), (4, 4, 17)])
def test_what_is_kept_is_of_this_model(digits, shape):
    model, inputs, labels = digits
    with pytest.raises(ValueError, match=r"\(4,\) a layer, and here it is of shape"):
        pruned_heads(model, inputs, cross_entropy(labels), torch.ones(shape))
    with pytest.raises(ValueError, match=r"\(4, 17, 17\) a layer, and here"):
        pruned_coefficients(model, inputs, cross_entropy(labels), torch.ones(shape))


def padded(ids, lengths, left):
    """The first so many tokens of texts (N, 20), and padding before or after: the inputs by name."""
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    ids = ids * mask
    if left:
        ids, mask = (torch.stack([row.roll(20 - n) for row, n in zip(x, lengths, strict=True)]) for x in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_no_text(implementation):
    """Texts by themselves, padded on the right and padded on the left: the same losses, scores and costs."""
    model, _ = load_model("tiny-llama")
    model.set_attn_implementation(implementation)
    lengths, ids = (9, 14, 20), torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    kept = torch.rand(model.config.num_hidden_layers, model.config.num_attention_heads,
                      generator=torch.Generator().manual_seed(1)) < 0.6  # fmt: skip
    alone = [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)]
    costs = torch.cat([pruned_heads(model, one, next_token(one["input_ids"]), kept) for one in alone])
    each = [head_scores(model, one, next_token(one["input_ids"])) for one in alone]
    for left in (False, True):
        batch = padded(ids, lengths, left)
        loss = next_token(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(pruned_heads(model, batch, loss, kept), costs, atol=1e-4, rtol=1e-4)
        for name, score in head_scores(model, batch, loss).items():
            mean = torch.stack([scores[name] for scores in each]).mean(0)
            torch.testing.assert_close(score, mean, atol=1e-4, rtol=1e-3)
        haar = Haar(*[Tree.dyadic(20)] * 2)
        for of, *options in ((head_scores, haar), (coefficient_scores, haar), (pruned_coefficients, 0.5, haar)):
            with pytest.raises(ValueError, match="2 of these 3 texts are padded"):
                of(model, batch, loss, *options)


def test_only_what_is_told_is_counted():
    output = type("Output", (), {"logits": torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))})
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 3, -100, 2, -100, 1]])
    nats = torch.nn.functional.cross_entropy(output.logits[1, [0, 2, 4]], torch.tensor([3, 2, 1]))
    assert torch.isclose(next_token(ids)(output)[1], nats)
    with pytest.raises(ValueError, match="text 1 of 2 has none"):
        next_token(ids[:, :1].expand(2, 6), torch.tensor([[1] * 6, [0, 0, 0, 0, 0, 1]]))
    with pytest.raises(ValueError, match="text 0 of 2 has none"):
        next_token(ids[:, :1])


def test_scores_are_taken_where_gradients_are_off(digits):
    model, inputs, labels = digits
    loss = cross_entropy(labels)
    with torch.no_grad():
        for scores in (head_scores, coefficient_scores):
            assert all(score.any() and not score.requires_grad for score in scores(model, inputs, loss).values())


def test_what_the_mask_forbids_stays_forbidden(text, monkeypatch):
    """A few Haar coefficients of a row spread over all keys; what the model goes on with does not."""
    model, inputs, ids = text
    seen = []

    def watched(model, inputs, replace):
        def replaced(layer, A):
            seen.append(replace(layer, A))
            return seen[-1]

        return capture(model, inputs, replaced)

    monkeypatch.setattr(room, "capture", watched)
    pruned_coefficients(model, inputs, next_token(ids), 0.2, Haar(None, Tree.random(40, 1)), over=1)
    later = torch.ones(40, 40).triu(1).bool()
    assert len(seen) == 4 and all(A.any() and not A[..., later].any() for A in seen)


def test_gradients_of_coefficients_know_the_mask(text):
    """Of a causal model: by differences of what pruning does, the mask taken off again."""
    model, (_, inputs, ids) = load_model("tiny-gpt", dtype="float64")[0], text
    loss, haar, where = next_token(ids), Haar(None, Tree.random(40, 1)), (0, 1, 12, 0)

    def shifted(step):
        def replace(layer, A):
            c = haar.analysis(A)
            if layer == where[0]:
                c[:, where[1], where[2], where[3]] *= 1 + step
            return haar.synthesis(c) * (A > 0)

        with torch.no_grad():
            return loss(capture(model, inputs, replace).output)

    slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    score = coefficient_scores(model, inputs, loss, haar)["gradient"]
    assert abs(float(slope.abs().mean() - score[where])) < 1e-6 < float(score[where])


@pytest.mark.parametrize("haar", [HAAR, None])
def test_coefficients(digits, haar):
    model, inputs, labels = digits
    loss, all_ = cross_entropy(labels), torch.ones(4, 4, 17, 17, dtype=torch.bool)
    free = pruned_heads(model, inputs, loss, torch.ones(4, 4))
    assert torch.allclose(pruned_coefficients(model, inputs, loss, all_, haar), free, atol=1e-10)
    assert torch.allclose(pruned_coefficients(model, inputs, loss, 1.0, haar), free, atol=1e-10)
    silent = pruned_heads(model, inputs, loss, torch.zeros(4, 4))
    assert torch.allclose(pruned_coefficients(model, inputs, loss, 0.0, haar), silent, atol=1e-10)
    scores = coefficient_scores(model, inputs, loss, haar)
    assert all(score.shape == all_.shape for score in scores.values())
    # ∂L/∂c of one coefficient, by differences
    where = (1, 3, 5, 4)

    def shifted(step):
        def replace(layer, A):
            c = haar.analysis(A) if haar else A.clone()
            if layer == where[0]:
                c[:, where[1], where[2], where[3]] *= 1 + step
            return haar.synthesis(c) if haar else c

        with torch.no_grad():
            return loss(capture(model, inputs, replace).output)

    slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert abs(float(slope.abs().mean() - scores["gradient"][where])) < 1e-6


@pytest.mark.parametrize("kept", ["the same", "its own"])
def test_on_the_keys_alone_no_token_hears_of_a_later_one(text, kept):
    """A truncated basis spreads over the mask, where it is taken off again; a tree on the queries would tell."""
    model, inputs, ids = text
    on_keys, on_both = Haar(None, Tree.random(40, 1)), Haar(Tree.random(40, 0), Tree.random(40, 1))
    later = torch.cat([ids[:, :20], ids.flip(0)[:, 20:]], 1)
    mask = keep(torch.rand(4, 8, 40, 40, generator=torch.Generator().manual_seed(0)), 0.2)

    def early(tokens, haar):
        seen = []

        def loss(output):
            seen.append(output.logits[:, :20])
            return next_token(tokens)(output)

        share = mask if kept == "the same" else 0.2
        pruned_coefficients(model, {"input_ids": tokens}, loss, share, haar, over=1)
        return seen[0]

    assert torch.allclose(early(ids, on_keys), early(later, on_keys), atol=1e-5)
    assert not torch.allclose(early(ids, on_both), early(later, on_both), atol=1e-2)


def test_keep_takes_the_largest():
    assert keep(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 0.5).tolist() == [[True, False], [True, False]]
    assert not keep(torch.ones(3, 3), 0).any() and keep(torch.ones(3, 3), 1).all()
