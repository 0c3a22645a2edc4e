"""The maps against the dense tensor, their laws, and the two bars of the class map and of Hutchinson's estimate."""

import functools

import pytest
import scipy.stats
import torch
import transformers as tf
from families import FAMILIES, FLOAT32, TINY, _random

from tensorlens_utils import linearize, linearize_function, load_data, load_model
from tensorlens_utils.collapse import METHODS, Split, class_map, collapsed, in_map, in_out_map, norm_map, out_map
from tensorlens_utils.tensor import AttentionTensor

NAMES = ["gpt2", "llama", "bert", "vit", "mixtral"]
every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def operator(name, to=None):
    return linearize(*FAMILIES[name](), to=to)


@functools.cache
def dense(name, to=None):
    return operator(name, to).dense()


def close(a, b, bar=1e-10):
    assert a.shape == b.shape
    assert float((a - b).norm()) <= bar * float(b.norm())


def bar(name):
    """Float64's, but for families in which transformers itself computes norms in float32: see tests/families.py."""
    return 3e-6 if name in FLOAT32 else 1e-10


def written_out(T, D, w):
    """The five formulas, sum by sum, of a dense T (N, M, D', L, D) and output vectors w (N, M, D')."""
    X, Y = T.input, T.output
    return {
        "norm": torch.einsum("nicjd,nicjd->nij", D, D).sqrt(),
        "in": torch.einsum("nicjd,njd->nijc", D, X).square().sum(-1).sqrt(),
        "out": torch.einsum("nic,nicjd->nijd", Y, D).square().sum(-1).sqrt(),
        "in_out": torch.einsum("nic,nicjd,njd->nij", Y, D, X),
        "class": torch.einsum("nic,nicjd,njd->nij", w, D, X),
    }


def test_the_maps_of_an_operator_worked_by_hand():
    """T over two tokens of two channels to one output of two: all five maps are sums that one can do in the head."""
    A = torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]])  # A[j, c, d]
    X = torch.tensor([[[1.0, 1.0], [2.0, 1.0]]])
    T = linearize_function(lambda x: torch.einsum("jcd,njd->nc", A, x)[:, None] + torch.tensor([1.0, -1.0]), X)
    # A₀x₀ = (3, 1), A₁x₁ = (3, 2), F = (3 + 3 + 1, 1 + 2 − 1) = (7, 2); Yᵀ·A₀ = (7, 16), Yᵀ·A₁ = (2, 21)
    close(norm_map(T), torch.tensor([[6.0, 10.0]]).double().sqrt(), 1e-6)
    close(in_map(T), torch.tensor([[10.0, 13.0]]).sqrt(), 1e-6)
    close(out_map(T), torch.tensor([[305.0, 445.0]]).sqrt(), 1e-6)
    in_out, one = in_out_map(T), class_map(T, torch.tensor([1]))
    assert in_out.scores.tolist() == [[23.0, 25.0]] and in_out.bias.tolist() == [5.0]
    assert in_out.total.tolist() == [53.0]
    assert one.scores.tolist() == [[1.0, 2.0]] and one.bias.tolist() == [-1.0] and one.total.tolist() == [2.0]


@every_model
@pytest.mark.parametrize("to", [None, "last_hidden_state"])
def test_every_map_is_that_of_the_dense_tensor(name, to):
    """At every position, at one of each input, at the last unmasked one, and the whole map."""
    T, D = operator(name, to), dense(name, to)
    N, M, C = T.output.shape
    target = torch.arange(N) % C
    truth = written_out(T, D, torch.nn.functional.one_hot(target, C).double()[:, None].expand(N, M, C))
    made = {"norm": norm_map, "in": in_map, "out": out_map, "in_out": in_out_map,
            "class": lambda T, position: class_map(T, target, position)}  # fmt: skip
    for kind, f in made.items():
        def scores(position, f=f):
            found = f(T, position=position)
            return found.scores if isinstance(found, Split) else found

        b = bar(name)
        close(scores(None), truth[kind], b)
        each = torch.tensor([M - 1, 0])
        close(scores(each), truth[kind][torch.arange(N), each], b)
        close(scores(0), truth[kind][:, 0], b)
        last = torch.tensor([5, 3]) if M == 6 else torch.tensor([M - 1, M - 1])  # the second text has two paddings
        close(scores(-1), truth[kind][torch.arange(N), last], b)


@every_model
def test_the_two_splits_are_complete(name):
    """Σ_j + bias = ⟨w, Y⟩ and ‖Y‖², at one position and at all, the bias from a replay at 0 and not from the rest."""
    T = operator(name, "last_hidden_state")
    Y, n = T.output, torch.arange(2)
    at = T.positions(-1)
    close(in_out_map(T).total, Y[n, at].square().sum(-1), bar(name))
    close(in_out_map(T, None).total, Y.square().sum(-1), bar(name))
    close(class_map(T).total, Y[n, at].amax(-1), bar(name))
    close(class_map(T, position=None).total, Y.amax(-1), bar(name))
    w = torch.randn(2, Y.shape[-1], dtype=Y.dtype, generator=torch.Generator().manual_seed(0))
    split = class_map(T, w)
    close(split.total, (Y[n, at] * w).sum(-1), bar(name))
    close(split.bias, (T.bias[n, at] * w).sum(-1), bar(name))


def test_a_contrast_is_the_difference_of_two_classes():
    T = operator("gpt2")
    w = torch.zeros(2, 16).double()
    w[:, 3], w[:, 5] = 1, -1
    both = [class_map(T, torch.tensor([c, c])) for c in (3, 5)]
    close(class_map(T, w).scores, both[0].scores - both[1].scores)


@pytest.mark.parametrize("model, data, rows", [("tiny-vit", "digits", 500), ("tiny-bert", "reviews", 400)])
def test_scores_and_bias_are_the_logit_in_float32(model, data, rows):
    """Within 1e-5 of Σ|scores| + |bias share|, on every example; measured: 3e-7."""
    model, processor = load_model(model)
    data = load_data(data)[:rows]
    inputs = (processor(data["image"], return_tensors="pt") if "image" in data else
              processor(data["text"], return_tensors="pt", padding=True))  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits
    for target in (logits.argmax(-1), logits.argmin(-1)):
        split = class_map(linearize(model, inputs), target)
        gap = (split.total - logits[torch.arange(len(logits)), target]).abs()
        assert len(gap) == rows
        assert (gap <= 1e-5 * (split.scores.abs().sum(-1) + split.bias.abs())).all()


@pytest.mark.parametrize("probes", [16, 64])
def test_hutchinsons_squares_are_unbiased_with_honest_errors(probes):
    """100 digits of 16 patches: the mean z-score, and how often |z| > 3 beside Student's t, over 5 draws of probes,
    since the share is small. With the spread of the probes as the error it is above twice the law's."""
    model, processor = load_model("tiny-vit")
    T = linearize(model, processor(load_data("digits")[:100]["image"], return_tensors="pt"), to="last_hidden_state")
    truth, shares = norm_map(T, 0).square(), []
    for seed in range(5):
        squares, errors = norm_map(T, 0, probes, seed)
        z = (squares - truth) / errors
        assert z.shape == (100, 16) and abs(z.mean()) < 0.3
        assert 0.8 < z.std() < 1.2  # the errors are as large as they need be
        shares.append((z.abs() > 3).double().mean())
    assert sum(shares) / 5 <= 2 * 2 * scipy.stats.t.sf(3, probes - 1)
    assert torch.equal(norm_map(T, 0, probes, 4)[0], squares) and torch.equal(norm_map(T, 0, probes, 4)[1], errors)


def test_hutchinsons_whole_map_is_that_of_its_rows():
    T = operator("gpt2")
    squares, errors = norm_map(T, None, probes=5)
    assert squares.shape == errors.shape == (2, 6, 6)
    close(squares[:, 2], norm_map(T, 2, probes=5)[0])
    close(errors[:, 2], norm_map(T, 2, probes=5)[1])


def test_no_map_forms_the_slice_and_each_costs_what_it_says(monkeypatch):
    """One cotangent for a row of class, in_out and out; D' for norm; none and L replays for in."""
    T = operator("vit", "last_hidden_state")
    T.bias  # noqa: B018  cached
    counted = {"rmatvec": 0, "matvec": 0}
    products = {name: getattr(AttentionTensor, name) for name in counted}
    for name in counted:
        def spy(self, V, name=name):
            counted[name] += len(V) if V.dim() == 4 else 1
            return products[name](self, V)

        monkeypatch.setattr(AttentionTensor, name, spy)
    for name in ("slice", "dense", "_rows"):
        monkeypatch.setattr(AttentionTensor, name, lambda *a, **k: pytest.fail("the slice was formed"))
    costs = {class_map: (1, 0), in_out_map: (1, 0), out_map: (1, 0), in_map: (0, 4), norm_map: (16, 0)}
    for f, cost in costs.items():
        counted.update(rmatvec=0, matvec=0)
        f(T, position=0)
        assert (counted["rmatvec"], counted["matvec"]) == cost
        counted.update(rmatvec=0, matvec=0)
        f(T, position=None)
        assert (counted["rmatvec"], counted["matvec"]) == (cost[0] * 5, cost[1])


# ------------------------------------------------------------------------------------------------------- attributions


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_method_changes_with_neither_batch_nor_padding(name, method):
    model, inputs = FAMILIES[name]()
    target = torch.tensor([1, 0])
    both = METHODS[method](model, inputs, target)
    assert both.shape == (2, 6) and not both.requires_grad
    assert not both[1, 4:].any() and both[:, :4].all()
    alone = METHODS[method](model, {k: v[1:, :4] for k, v in inputs.items()}, target[1:])
    close(both[1:, :4], alone, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_padding_gets_0_even_where_the_model_reads_it(method):
    """RWKV has no mask: what is padded on the left goes through its state."""
    model, inputs = FAMILIES["rwkv"]()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    assert class_map(linearize(model, inputs)).scores[1, :2].all()
    scores = METHODS[method](model, inputs, torch.tensor([1, 0]))
    assert not scores[1, :2].any() and scores[1, 2:].all()


@pytest.mark.parametrize("method", METHODS)
def test_only_the_class_map_heeds_the_target(method):
    model, inputs = FAMILIES["vit"]()
    one, other = (METHODS[method](model, inputs, torch.tensor([c, c])) for c in (0, 1))
    assert torch.equal(one, other) == (method != "class")


def test_methods_read_the_hidden_state_where_the_head_does():
    """BERT's at [CLS], a GPT-2 classifier's at the last unmasked token, a language model's where one asks; and the
    class vector where the head takes a mean."""
    def in_out(model, inputs, **position):
        return METHODS["in_out"](model, inputs, None, **position)

    bert, inputs = FAMILIES["bert"]()
    close(in_out(bert, inputs), in_out_map(linearize(bert, inputs, to="last_hidden_state"), 0).scores)
    config = tf.GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=16, n_positions=32, pad_token_id=0)
    gpt = _random(tf.GPT2ForSequenceClassification, config)
    inputs["input_ids"][1, 4:] = 0
    T = linearize(gpt, inputs, to="last_hidden_state")
    close(in_out(gpt, inputs), in_out_map(T, torch.tensor([5, 3])).scores)
    lm, inputs = FAMILIES["gpt2"]()
    T = linearize(lm, inputs, to="last_hidden_state")
    close(in_out(lm, inputs), in_out_map(T, torch.tensor([5, 3])).scores)
    close(in_out(lm, inputs, position=2), in_out_map(T, 2).scores)
    mean, inputs = FAMILIES["dinov2"]()  # its head reads [CLS] and the mean of the patches
    close(in_out(mean, inputs), in_out_map(linearize(mean, inputs)).scores)
    modern = tf.ModernBertConfig(**TINY, cls_token_id=1, sep_token_id=2, classifier_pooling="mean")
    mean, inputs = _random(tf.ModernBertForSequenceClassification, modern), FAMILIES["bert"]()[1]
    close(in_out(mean, inputs), in_out_map(linearize(mean, inputs)).scores)


@pytest.mark.parametrize("at", ["tokens", 0, 1])
def test_a_map_is_read_from_any_boundary_on(at):
    """And is a split where it is one; a vision model's class token stands before its patches."""
    model, inputs = FAMILIES["vit"]()
    T = linearize(model, inputs, at=at, to="last_hidden_state")
    maps = {"class": class_map(linearize(model, inputs, at=at)), "in_out": in_out_map(T, 0), "in": in_map(T, 0),
            "out": out_map(T, 0), "norm": norm_map(T, 0)}  # fmt: skip
    for name, expected in maps.items():
        given = collapsed(name, model, inputs, at=at)
        pairs = [(given.scores, expected.scores), (given.bias, expected.bias)] if name in ("class", "in_out") else []
        for one, other in pairs or [(given, expected)]:
            close(one, other)
        assert pairs or given.shape == (2, 4 + (at != "tokens"))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("call, error", [
    (lambda T: norm_map(T, probes=1), "at least 2 probes"),
    (lambda T: class_map(T, torch.tensor([0, 16])), r"target must be \(2,\) output entries in \[0, 16\)"),
    (lambda T: class_map(T, torch.tensor([0])), r"target must be"),
    (lambda T: class_map(T, torch.zeros(2, 15)), r"target must be .* output vectors \(2, 16\)"),
    (lambda T: in_map(T, 6), r"position must be .* \[-6, 6\)"),
])  # fmt: skip
def test_impossible_requests_are_refused(call, error):
    with pytest.raises(ValueError, match=error):
        call(operator("gpt2"))


def test_an_unknown_map_is_refused():
    with pytest.raises(ValueError, match="a collapse is one of 'class', 'in_out', 'in', 'out', 'norm', not 'rollout'"):
        collapsed("rollout", *FAMILIES["vit"]())


def test_pixels_are_no_tokens():
    model, inputs = FAMILIES["vit"]()
    with pytest.raises(ValueError, match="at='tokens'"):
        class_map(linearize(model, inputs, at="inputs"))
