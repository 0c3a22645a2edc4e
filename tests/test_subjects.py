"""From subject to object: T's block and its mean against dense references, in families with and without a cache."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.utils.flop_counter import FlopCounterMode

from tensorlens_utils import linearize, load_model
from tensorlens_utils.costs import peak_gigabytes
from tensorlens_utils.models import n_blocks, word_tokenizer
from tensorlens_utils.relations import Relation, Sample, world_relations
from tensorlens_utils.relations.cuts import Cut, Head
from tensorlens_utils.relations.decoders import examples_of, fit
from tensorlens_utils.relations.subjects import FROZEN, TANGENT, Asked, encode
from tests.families import FAMILIES, FLOAT32, V

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = word_tokenizer([f"w{i}" for i in range(V - 4)], 32, template="<bos> $A", **SPECIAL)
RELATION = Relation("r", ("w0 w1 {} w2 w3",), tuple(
    Sample(f"w{i}" if i % 2 else f"w{i} w{i + 1}", f"w{i + 5}") for i in range(4, 7)), between=" w11 ")  # fmt: skip
PROMPTS = [RELATION.prompt(sample, RELATION.samples[:1]) for sample in RELATION.samples]  # of different lengths
CAUSAL = [name for name, build in FAMILIES.items() if name in set(
    "gpt2 gpt_neo gptj gpt_neox opt bloom mpt falcon llama mistral qwen2 qwen3 gemma gemma2 gemma3 phi phi3 olmo olmo2 "
    "cohere starcoder2 nemotron mixtral qwen3_moe rwkv".split())]  # fmt: skip


def tolerance(name):
    """Float32 is met in some families' norms, and in the softmax of three that are float64 elsewhere: over fewer or
    more keys, such as kept ones, it rounds otherwise."""
    return 3e-5 if name in FLOAT32 else 3e-7 if name in ("gpt_neo", "gptj", "mpt") else 1e-11


def close(a, b, bar):
    assert a.shape == b.shape and float((a - b).abs().max()) <= bar * max(1.0, float(b.abs().max()))


@pytest.fixture(scope="module")
def gpt():
    return load_model("tiny-gpt", dtype="float64")


@pytest.fixture(scope="module")
def capitals(gpt):
    """Three prompts, two of one length and one of another, whose subjects have one word and two."""
    relation = world_relations()["country_capital"]
    train = relation.samples[:2]
    return [relation.prompt(sample, train, 4) for sample in relation.samples[2:4] + relation.samples[24:25]]


# -------------------------------------------------------------------------------------------------------- all families


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("rules", [FROZEN, TANGENT], ids=["frozen", "tangent"])
def test_states_answers_and_blocks_are_those_of_the_model_run_whole(name, rules):
    if name == "bloom" and rules:
        pytest.skip("bloom's GELU is an opaque autograd.Function, whose registered rule is the ratio")
    model, n = FAMILIES[name]()[0], 2
    asked = Asked(model, WORDS, PROMPTS)
    assert len(asked.groups) > 1 and all((cut.prefix is None) == (name == "rwkv") for _, cut in asked.groups)
    matrices = asked.matrices(range(n), **rules)
    assert n == n_blocks(model)
    for i, (ids, p) in enumerate(encode(WORDS, PROMPTS)):
        inputs = {"input_ids": torch.tensor([ids])}
        with torch.no_grad():
            close(asked.logits[i], model(**inputs).logits[0, -1], tolerance(name))
        for k in range(n):
            T = linearize(model, inputs, at=k, to=n, **rules)
            close(asked.s[k, i], T.input[0, p], tolerance(name))
            close(asked.o[i], T.output[0, -1], tolerance(name))
            close(matrices[k][i], T.slice(-1)[0, :, p], tolerance(name))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_head_is_the_models_own_and_the_blocks_come_back(name):
    model = FAMILIES[name]()[0]
    head, o = Head(model), torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = [{**block.__dict__} for block in head.blocks]
    T = linearize(model, {"input_ids": torch.full((6, 1), 5)}, at=n_blocks(model), to="logits", norm="tangent")
    with torch.no_grad():
        found = head(o)
    assert found.shape == (2, 3, V) and [block.__dict__ for block in head.blocks] == before
    close(head(T.input[:, 0]), T.output[:, 0], tolerance(name))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        head(torch.randn(2, 15))  # of another width
    assert [block.__dict__ for block in head.blocks] == before


# ------------------------------------------------------------------------------------------- against other definitions


def lre(model, ids, p, k):
    """LRE's estimator written out: ∂o/∂s by torch.func.jacrev, of the model run whole, with boundary k patched."""
    blocks = model.transformer.h
    kept = {}

    def o_of(s):
        def patch(module, args):
            hidden = torch.cat([args[0][:, :p], s[None, None], args[0][:, p + 1 :]], 1)
            return (hidden, *args[1:])

        hooks = [blocks[k].register_forward_pre_hook(patch),
                 blocks[-1].register_forward_hook(lambda module, args, out: kept.update(o=out))]  # fmt: skip
        try:
            model(ids[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        o = kept.pop("o")
        return (o[0] if isinstance(o, tuple) else o)[0, -1]

    read = []
    hook = blocks[k].register_forward_pre_hook(lambda module, args: read.append(args[0][0, p]))
    with torch.no_grad():
        model(ids[None], use_cache=False)
    hook.remove()
    s = read[0]
    o = o_of(s).detach()
    return torch.func.jacrev(o_of)(s).detach(), s, o


def test_all_tangent_is_lre_written_out_with_jacrev(gpt, capitals):
    """The bar: 1e-6 in float64, W and b of the mean over examples."""
    model, tokenizer = gpt
    asked = Asked(model, tokenizer, capitals)
    matrices = asked.matrices([0, 2], **TANGENT)
    for k in (0, 2):
        Js, bs = [], []
        for i, (ids, p) in enumerate(encode(tokenizer, capitals)):
            J, s, o = lre(model, torch.tensor(ids), p, k)
            close(asked.s[k, i], s, 1e-12)
            close(asked.o[i], o, 1e-12)
            close(matrices[k][i], J, 1e-6)
            Js.append(J), bs.append(o - J @ s)
        W, b = matrices[k].mean(0), (asked.o - (matrices[k] @ asked.s[k][..., None])[..., 0]).mean(0)
        close(W, torch.stack(Js).mean(0), 1e-6)
        close(b, torch.stack(bs).mean(0), 1e-6)
        decoder, s = fit("lre", examples_of(asked, [k], ["lre"])[k], beta=2.25), asked.s[k].flip(0)
        close(decoder.decode(s), 2.25 * s @ torch.stack(Js).mean(0).T + torch.stack(bs).mean(0), 1e-6)


def test_answers_to_other_states_are_those_of_the_patched_model(gpt, capitals):
    """At boundary 0 a one-word subject's state is its word's: with another's there, the model answers as to it."""
    model, tokenizer = gpt
    asked = Asked(model, tokenizer, capitals)
    swapped = asked.s[0].clone()
    swapped[:2] = asked.s[0][[1, 0]]
    close(asked.answer(swapped, 0)[:2], asked.o[[1, 0]], 1e-12)
    close(asked.answer(swapped, 0)[2], asked.o[2], 1e-12)
    close(asked.answer(asked.s[3], 3), asked.o, 1e-12)
    close(asked.answer(asked.s[3], 3), asked.o, 1e-12)  # again: a cache that had grown would tell
    assert (asked.answer(asked.s[3].flip(0), 3) - asked.o).abs().max() > 1e-3


def test_the_operator_is_exact_and_its_mean_is_the_matrices(gpt, capitals):
    model, tokenizer = gpt
    asked = Asked(model, tokenizer, capitals)
    vectors = torch.randn(3, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rules in (TANGENT, FROZEN):
        for T in asked.tensors(1, **rules):
            T.certificate().check()
        W, mean = asked.matrices([1], **rules)[1].mean(0), asked.operator(1, **rules)
        close(mean.matvec(vectors), vectors @ W.T, 1e-12)
        close(mean.rmatvec(vectors), vectors @ W, 1e-12)
    (U, S, V), (u, s, v) = torch.linalg.svd(W), mean.svd(4, rounds=3)
    close(s, S[:4], 1e-4)
    close((u * s) @ v, (U[:, :4] * S[:4]) @ V[:4], 1e-2)
    assert torch.equal(s, mean.svd(4, rounds=3)[1])
    with pytest.raises(ValueError, match=r"a rank is in \[1, 128\].* not 129"):
        mean.svd(129)


def test_more_steps_are_the_models_own_next_tokens(gpt, capitals):
    model, tokenizer = gpt
    asked, one = Asked(model, tokenizer, capitals, steps=4), Asked(model, tokenizer, capitals)
    assert asked.o.shape == (3, 4, 128) and asked.logits.shape == (3, 4, 953)
    close(asked.s, one.s, 1e-12)
    close(asked.o[:, 0], one.o, 1e-12)
    for i, (ids, p) in enumerate(encode(tokenizer, capitals)):
        assert asked.ids[i][: len(ids)].tolist() == ids and len(asked.ids[i]) == len(ids) + 3
        assert asked.ids[i][len(ids) :].tolist() == asked.logits[i, :3].argmax(-1).tolist()
        T = linearize(model, {"input_ids": asked.ids[i][None]}, at=1, to=4)
        close(asked.matrices([1], step=2)[1][i], T.slice(len(ids) + 1)[0, :, p], 1e-11)
    close(asked.matrices([0], step=0)[0], one.matrices([0])[0], 1e-12)


def test_an_operator_keeps_its_boundary(gpt, capitals):
    """Whatever boundaries are asked for after it, and whoever answers in between."""
    asked = Asked(*gpt, capitals)
    early = asked.tensors(1)
    asked.tensors(3), asked.matrices([0, 2]), asked.answer(asked.s[2].flip(0), 2)
    for T in early:
        T.certificate().check()


def test_what_is_put_behind_the_text_is_taken_off(gpt, capitals):
    """A tokenizer that ends every text with a token: o is still read where the text ends."""
    model, tokenizer = gpt
    ending = copy.deepcopy(tokenizer)
    ids = [(name, ending.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    assert ending("france").input_ids[-1] == ending.eos_token_id
    assert encode(ending, capitals) == encode(tokenizer, capitals)
    assert torch.equal(Asked(model, ending, capitals).o, Asked(model, tokenizer, capitals).o)


def test_a_model_of_few_bits_is_read_in_float32(gpt, capitals):
    """In bfloat16, as large models are kept, everything works that works in float32, and gives about the same."""
    model = load_model("tiny-gpt", dtype="bfloat16")[0]
    few, whole = Asked(model, gpt[1], capitals), Asked(*gpt, capitals)
    W, right = few.matrices([1])[1], whole.matrices([1])[1]
    for found in (few.s, few.o, few.logits, few.answer(few.s[2], 2), W):
        assert found.dtype == torch.float32
    assert (few.o - whole.o).norm() < 0.03 * whole.o.norm() and (W - right).norm() < 0.05 * right.norm()
    close(few.answer(few.s[2], 2), few.o, 1e-6)  # the states are the model's own: nothing is lost on the way
    mean = few.operator(1)
    U, S, V = mean.svd(3, rounds=3)
    close(S.double(), torch.linalg.svdvals(right.mean(0))[:3], 0.03)
    close(mean.matvec(V), V @ W.mean(0).T, 0.03)


# ------------------------------------------------------------------------------------------------------ what it costs


def test_prompts_run_in_batches_and_need_not_be_kept(gpt, capitals, monkeypatch):
    model, tokenizer = gpt
    prompts = capitals[:2] * 3
    whole = Asked(model, tokenizer, prompts)
    monkeypatch.setattr("tensorlens_utils.relations.subjects.BATCH", 4)
    some, brief = (Asked(model, tokenizer, prompts, keep=keep) for keep in (True, False))
    assert len(whole.groups) == 1 and [len(rows) for rows, _ in some.groups] == [4, 2]
    for asked in (some, brief):
        close(asked.s, whole.s, 1e-12)
        close(asked.logits, whole.logits, 1e-12)
    close(some.matrices([1])[1], whole.matrices([1])[1], 1e-12)
    close(some.answer(some.s[1].flip(0), 1), whole.answer(whole.s[1].flip(0), 1), 1e-12)
    assert all(cut.prefix is None and not cut.states for _, cut in brief.groups)
    for use in (lambda: brief.answer(brief.s[1], 1), lambda: brief.matrices([1]), lambda: brief.tensors(1)):
        with pytest.raises(ValueError, match="ask with keep=True"):
            use()


def test_no_pass_meets_a_token_before_the_subject(gpt):
    """Eight examples more before the subject add nothing to a backward pass but what attention reads of them."""
    model, tokenizer = gpt
    relation = world_relations()["element_symbol"]
    weights, work = [], []
    for n in (0, 8):
        T, = Asked(model, tokenizer, [relation.prompt(relation.samples[20], relation.samples[:n])]).tensors(0)
        with FlopCounterMode(display=False) as counter:
            T.dense()
        weights.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
        work.append(counter.get_total_flops())
    assert weights[1] == weights[0] > 0 and work[1] < 1.1 * work[0]


def test_the_chunk_bounds_the_memory_and_changes_nothing(gpt, capitals):
    model, tokenizer = gpt
    asked = Asked(model, tokenizer, capitals)
    found, peaks = [], []
    for chunk in (4, 128):
        run = partial(lambda chunk: found.append(asked.matrices([0], chunk=chunk)[0]), chunk)
        peaks.append(peak_gigabytes(run, torch.device("cpu")))
    close(*found, 1e-12)
    assert peaks[0] < peaks[1] / 8


def test_matrices_leave_no_graph_behind(gpt, capitals, monkeypatch):
    """Nor the states in it, which would stay until the collector of cycles comes by."""
    asked, forward, crossed = Asked(*gpt, capitals), Cut.forward, []

    def traced(cut, s):
        o = forward(cut, s)
        crossed.extend(weakref.ref(x) for x in [o, *cut.states.values()])
        return o

    monkeypatch.setattr(Cut, "forward", traced)
    gc.disable()
    try:
        asked.matrices([0, 2])
        assert crossed and all(x() is None for x in crossed)
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_told_so(gpt):
    model, tokenizer = gpt
    relation = world_relations()["country_capital"]
    with pytest.raises(ValueError, match="one prompt or more"):
        Asked(model, tokenizer, [])
    with pytest.raises(ValueError, match="128 tokens that the model reads, and here are 1[0-9][0-9]: give it fewer ex"):
        Asked(model, tokenizer, [relation.prompt(relation.samples[20], relation.samples[:12])])
    asked = Asked(model, tokenizer, [relation.prompt(relation.samples[20])])
    for layer in (-1, 4, 99):
        with pytest.raises(ValueError, match=f"before a block, 0 to 3; not at {layer}"):
            asked.answer(asked.s[0], layer)
    for s, shape in ((asked.s, r"\(4, 1, 128\)"), (asked.s[0, 0], r"\(128,\)")):
        with pytest.raises(ValueError, match=rf"by one each, \(1, 128\), not by {shape}"):
            asked.answer(s, 0)
    for layers, options in (([], {}), ([0], {"step": 1}), ([0], {"step": -1}), ([0], {"chunk": 0})):
        with pytest.raises(ValueError, match="one boundary or more, at a step of 0 to 0 and by chunks of 1 or more"):
            asked.matrices(layers, **options)
    with pytest.raises(ValueError, match="steps is 1, 2, ..., not 0"):
        Asked(model, tokenizer, [relation.prompt(relation.samples[0])], steps=0)
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="only a fast tokenizer tells, and Slow is none"):
        Asked(model, slow, [relation.prompt(relation.samples[0])])


@pytest.mark.parametrize("kind, message", [
    ("GPT2Model", "has a head that scores each word.* GPT2Model has none"),
    ("GPT2ForSequenceClassification", "GPT2ForSequenceClassification has none"),
    ("BertForMaskedLM", "do not see what follows them, and those of BertForMaskedLM do"),
])  # fmt: skip
def test_models_that_do_not_go_on_with_a_text_are_refused(kind, message):
    torch.manual_seed(0)
    config = (transformers.BertConfig if "Bert" in kind else transformers.GPT2Config)(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, bos_token_id=1)
    with pytest.raises(ValueError, match=message):
        Asked(getattr(transformers, kind)(config), WORDS, PROMPTS)


def test_the_model_is_left_as_it_was(gpt, capitals):
    model, tokenizer = gpt
    model.train()
    assert all(p.requires_grad for p in model.parameters())
    asked = Asked(model, tokenizer, capitals)
    asked.matrices([0])
    again = Asked(model, tokenizer, capitals)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(asked.s, again.s) and not any(m._forward_hooks for m in model.modules())
    model.eval()
