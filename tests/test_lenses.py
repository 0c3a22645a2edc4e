"""Lenses: their gradients and closed form against autograd, what is captured, read and kept in files."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from families import FAMILIES as MODELS
from safetensors import safe_open
from safetensors.torch import save_file

from tensorlens_utils import load_data, load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses import Lens, bias_only, load_lens, regression, unembedding
from tensorlens_utils.lenses.checks import together
from tensorlens_utils.lenses.data import Examples
from tensorlens_utils.lenses.families import FAMILIES, Full
from tensorlens_utils.lenses.heads import NEVER, Heads, replaced
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.regression import OBJECTIVES, ROWS, blocks, damped, gradient, losses
from tensorlens_utils.lenses.training import train

EVERY = slice(None)


@functools.cache
def tiny(dtype="float64"):
    model, tokenizer = load_model("tiny-gpt", dtype=dtype)
    example = tokenizer(["the capital of france is"], return_tensors="pt")
    return Heads(model, example, tokenizer, getattr(torch, dtype))


@functools.cache
def some(dtype="float64"):
    """Positions of two texts that have a next one."""
    seen = tiny(dtype).capture({"input_ids": world.Text(5).rows(2)}, scale=True)
    return seen[seen.following >= 0]


@functools.cache
def moments(of_logits=False):
    m = Moments(of_logits)
    return m.add(some()[:100]).add(some()[100:]).close()


def start(family, of_logits=False, rank=3):
    return FAMILIES[family].start(moments(of_logits), tiny(), rank)


def dense(family, seen, parameters):
    """The lenses' logits written out from the table in families.py, with features for z itself."""
    mu, s, p = family.mu[:, None], seen.scale[:, None], parameters
    z = seen.z - mu
    z = z if family.white is None else z @ family.white
    match type(family).__name__:
        case "Full":
            return z @ p["W"].mT + p["b"][:, None]
        case "LowRank":
            return z @ p["A"].mT @ p["B"].mT + p["b"][:, None]
        case "Translator":
            return s * ((z @ p["T"].mT + p["c"][:, None]) @ family.M.T) + family.beta
        case _:
            return z @ family.F.mT @ p["L"][family.unit].mT + p["b"][family.unit, None]


def close(a, b, bar=1e-12):
    assert a.shape == b.shape
    assert float((a - b).norm()) <= bar * float(b.norm())


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_by_hand_is_autograds_whatever_the_pieces(family, objective, monkeypatch):
    monkeypatch.setattr(regression, "ROWS", 8)  # of 20 positions
    lenses, seen = start(family, objective == "logits"), some()[::13]
    for p in lenses.parameters.values():
        p.requires_grad_()
        p.grad = torch.zeros_like(p)
    x = dense(lenses, seen, lenses.parameters)
    target = seen.p, seen.log_p, seen.following
    written_out = {
        "kl": lambda p, log_p, y: (p * (log_p - x.log_softmax(-1))).sum(-1),
        "reverse": lambda p, log_p, y: (x.softmax(-1) * (x.log_softmax(-1) - log_p)).sum(-1),
        "next": lambda p, log_p, y: torch.nn.functional.cross_entropy(x.mT, y.expand(len(x), -1), reduction="none"),
        "logits": lambda p, log_p, y: ((x - log_p) - (x - log_p).mean(-1, keepdim=True)).square().mean(-1) / 2,
    }[objective](*target)
    close(losses(lenses, seen, objective), written_out.detach())
    wanted = torch.autograd.grad(written_out.mean(1).sum(), [*lenses.parameters.values()])
    all_at_once, a_head, in_chunks, made_twice = (2**30, 2**30), (30_000, 2**30), (1000, 2**30), (1000, 5_000)
    for pieces in (all_at_once, a_head, in_chunks, made_twice):
        for p in lenses.parameters.values():
            p.grad.zero_()
        gradient(lenses, seen, objective, 1 / len(seen), pieces=pieces)
        for p, g in zip(lenses.parameters.values(), wanted, strict=True):
            close(p.grad, g)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_logits_in_the_hundreds_are_finite_and_right(objective):
    """In float32, where e^89 is too large; the greatest logits lie in some chunks of the vocabulary only."""
    found, full = [], start("full").parameters
    for dtype in (torch.float64, torch.float32):
        names = ("z", "log_p")
        seen = replace(some(), **{name: getattr(some(), name).to(dtype) for name in names})[::13]
        lens = Full({"W": 40 * full["W"].to(dtype), "b": full["b"].to(dtype)}, moments().mu.to(dtype))
        for p in lens.parameters.values():
            p.grad = torch.zeros_like(p)
        x = lens.features(seen.z, None, EVERY) @ lens.parameters["W"].mT
        assert x.amax() > 300
        gradient(lens, seen, objective, 1 / len(seen), pieces=(2000, 2**24))
        found.append(lens.parameters["W"].grad.double())
    close(found[1], found[0], 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_position_is_read_as_it_is_among_many(family):
    lens, seen = Lens(tiny(), start(family).folded(tiny()), {}), some()[::13]
    close(lens.kl(seen[[7]]), lens.kl(seen)[:, [7]])
    close(lens.said(seen[[7]]), lens.said(seen)[:, [7]])


def test_blocks_cover_all_heads_and_positions_once_and_are_small():
    for A, n, V, piece in [(5, 300, 11, 2000), (3, 7, 1000, 100), (4, 64, 50, 10**9)]:
        seen = torch.zeros(A, n)
        for heads, rows in blocks(A, n, V, piece):
            seen[heads, rows] += 1
            size = (heads.stop - heads.start) * (rows.stop - rows.start)
            assert size * V <= max(piece, min(n, ROWS) * V)
        assert (seen == 1).all()


def test_products_in_bfloat16_give_nearly_the_same_gradient():
    lenses = {}
    for precision in (None, torch.bfloat16):
        lenses[precision] = start("full")
        for p in lenses[precision].parameters.values():
            p.grad = torch.zeros_like(p)
        gradient(lenses[precision], some(), "kl", 1 / len(some()), precision)
    a, b = (lens.parameters["W"].grad for lens in lenses.values())
    assert b.dtype == torch.float64 and 1e-5 < float((a - b).norm() / a.norm()) < 0.02


# --------------------------------------------------------------------------------------------------------- closed form


def test_newtons_step_is_that_of_autograds_gradient_and_hessian():
    """On one head and a handful of tokens, with the Hessian of all V·d + V parameters in full."""
    torch.manual_seed(0)
    V, d, n = 7, 3, 50
    z, p = torch.randn(n, d, dtype=torch.float64) + 2, torch.randn(n, V, dtype=torch.float64).mul(2).softmax(-1)
    pi, centred = p.mean(0), z - z.mean(0)

    def loss(theta):
        W, b = theta[: V * d].view(V, d), theta[V * d :]
        return -(p * (centred @ W.T + b).log_softmax(-1)).sum(-1).mean()

    at = torch.cat([torch.zeros(V * d, dtype=torch.float64), pi.log()])
    g, H = torch.autograd.functional.jacobian(loss, at), torch.autograd.functional.hessian(loss, at)
    S, C = centred.T @ centred / n, (p - pi).T @ centred / n
    close(g[: V * d], -C.flatten())
    close(H[: V * d, : V * d], torch.kron(torch.diag(pi) - torch.outer(pi, pi), S))
    assert g[V * d :].norm() < 1e-15 and H[: V * d, V * d :].norm() < 1e-15
    step = -torch.linalg.pinv(H, hermitian=True, rcond=1e-10) @ g
    newton = C @ torch.linalg.inv(S) / pi[:, None]
    a, b = (W - W.mean(0) for W in (step[: V * d].view(V, d), newton))  # a number more for all tokens changes nothing
    close(a, b)


def test_the_start_is_newtons_step_from_the_moments():
    m, seen = moments(), some()
    h = 13
    z, p = seen.z[h] - seen.z[h].mean(0), seen.p
    close(m.mu[h], seen.z[h].mean(0))
    close(m.S[h], z.T @ z / len(seen), 1e-10)
    W = (p - p.mean(0)).T @ z / len(seen) @ torch.linalg.inv(m.S[h]) / p.mean(0)[:, None]
    full = start("full").folded(tiny())
    close(full.parameters["W"][h], W, 1e-8)
    close(full.parameters["b"][h], p.mean(0).log())


def test_logit_regression_starts_at_its_solution():
    lenses = start("full", of_logits=True)
    for p in lenses.parameters.values():
        p.grad = torch.zeros_like(p)
    gradient(lenses, some(), "logits", 1 / len(some()))
    scale = Full.unigram(moments(True))
    assert lenses.parameters["W"].grad.abs().max() < 1e-12 and lenses.parameters["b"].grad.abs().max() < 1e-12
    assert (losses(lenses, some(), "logits").mean(1) < losses(scale, some(), "logits").mean(1)).all()


@pytest.mark.parametrize(("family", "rank"), [("low rank", 16), ("low rank", 3), ("translator", 3),
                                              ("shared by layer", 3)])
def test_other_families_start_from_the_same_step_as_near_as_they_come(family, rank):
    """In the Hessian's norm: the gradient of ½‖full's step − theirs‖² by their own parameters is zero."""
    m, full, theirs = moments(), start("full").parameters["W"], start(family, rank=rank)
    for p in theirs.parameters.values():
        p.requires_grad_()
    W = theirs.weight(slice(0, 32), slice(0, 953))[..., :16] * (m.scale if family == "translator" else 1)
    if rank == 16:
        close(W, full, 1e-6)
    gap = W - full
    gap = gap - torch.einsum("v,avk->ak", m.weights, gap)[:, None] * (family == "translator")
    distance = (m.weights[:, None] * gap.square()).sum()
    slopes = torch.autograd.grad(distance, theirs.parameters[theirs.linear], retain_graph=True)[0]
    bar = torch.autograd.grad((m.weights[:, None] * W.square()).sum(), theirs.parameters[theirs.linear])[0]
    assert slopes.norm() < 1e-6 * bar.norm()


def test_one_lens_for_a_layers_heads_holds_any_full_lenses_but_their_biases():
    heads, W = tiny(), torch.randn(32, 953, 16, generator=torch.Generator().manual_seed(0)).double()
    L = torch.stack([torch.cat([*W[k:k + 8]], 1) @ torch.cat([*heads.W_O[k:k + 8]]).inverse().mT
                     for k in range(0, 32, 8)])
    lenses = FAMILIES["shared by layer"].of({"L": L, "b": L.new_zeros(4, 953)}, moments().mu, heads)
    close(lenses.weight(EVERY, EVERY), W, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_damping_takes_the_best_of_its_grid_for_each_lens(family):
    """And scales what multiplies z alone: a translator's c is no part of it."""
    lenses, grid, table = start(family), (0.003, 0.03, 0.1), []
    seen = tiny().capture({"input_ids": world.Text(6).rows(1)}, scale=True)

    def measured(some):
        lost = losses(some, seen).sum(1)
        return lost.new_zeros(len(some.parameters[some.linear])).index_add_(0, some.unit, lost)

    for alpha in grid:
        scaled = start(family)
        scaled.parameters[scaled.linear] *= alpha
        table.append(measured(scaled))
    best = torch.stack(table)
    assert torch.equal(damped(lenses, seen, grid=grid), torch.tensor(grid, dtype=torch.float64)[best.argmin(0)])
    close(measured(lenses), best.amin(0))
    assert family.startswith("shared") or len({*best.argmin(0).tolist()}) > 1


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "llama", "gemma3", "mixtral", "bert", "albert",
                                  "deberta-v2", "modernbert", "vit", "longformer"])  # fmt: skip
def test_what_heads_write_is_what_their_layer_writes(name):
    """Σ_h z_h W_O,h is the output projection's answer, less its bias, in models of many makes."""
    model, inputs = MODELS[name]()
    heads, wrote = Heads(model, inputs, dtype=torch.float64), []
    for path in dict.fromkeys(heads.paths):
        module = model.get_submodule(path)
        bias = 0 if getattr(module, "bias", None) is None else module.bias.detach()
        module.register_forward_hook(lambda module, args, out, bias=bias: wrote.append(out.detach() - bias))
    seen = heads.capture(inputs)
    mask = inputs.get("attention_mask", torch.ones(2, seen.z.shape[1] // 2)).bool()
    for layer in range(len(heads.paths)):
        mine = [a for a, (k, _) in enumerate(heads.names) if k == layer]
        ours = torch.einsum("and,adm->nm", seen.z[mine], heads.W_O[mine])
        theirs = wrote[layer].reshape(*mask.shape, -1)[mask]
        close(ours, theirs, 1e-6 if name in ("llama", "gemma3", "mixtral") else 1e-12)
    assert heads.names == [(k, h) for k in range(2) for h in range(4)]


def test_positions_are_the_models_own_and_padding_is_left_out():
    heads = tiny()
    texts = ["the capital of france is", "a duck is a"]
    batch, alone = heads.capture(heads.inputs(texts), scale=True), heads.capture(heads.inputs(texts[1]), scale=True)
    assert len(batch) == 11 and batch.text.tolist() == [0] * 6 + [1] * 5
    close(batch[6:].z, alone.z, 1e-10)
    close(batch[6:].log_p, alone.log_p, 1e-10)
    close(batch[6:].scale, alone.scale, 1e-8)
    assert batch.following[:6].tolist() == [*heads.inputs(texts[0])["input_ids"][0, 1:].tolist(), -1]
    assert batch.at("last").position.tolist() == [5, 4] and batch.at(0).text.tolist() == [0, 1]


def test_a_tokenizer_that_pads_on_the_left_is_read_as_others_and_other_inputs_are_refused():
    model, tokenizer = load_model("tiny-gpt", dtype="float64")
    tokenizer.padding_side, texts = "left", ["the capital of france is", "a duck is a"]
    heads = Heads(model, tokenizer(texts[:1], return_tensors="pt"), tokenizer, torch.float64)
    both, alone = (heads.capture(heads.inputs(given)) for given in (texts, texts[1]))
    close(both[both.text == 1].z, alone.z)
    assert torch.equal(next(iter(Examples(texts, tokenizer)))["input_ids"], heads.inputs(texts)["input_ids"])
    with pytest.raises(ValueError, match="padded on the right"):
        heads.capture(tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mpt"])
def test_text_behind_padding_is_refused_before_the_model_runs_whatever_its_place_ids(name, monkeypatch):
    """Of these gemma2 and mpt would answer NaN."""
    model, inputs = MODELS[name]()
    heads = Heads(model, inputs, dtype=torch.float64)
    monkeypatch.setattr(model, "forward", lambda *args, **options: pytest.fail("it ran"))
    places = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="padded on the right.*whatever their position_ids"):
        heads.capture({**inputs, "attention_mask": inputs["attention_mask"].flip(1), "position_ids": places})


@pytest.mark.parametrize("positions", ["all", "last", 0, 4])
def test_some_positions_are_captured_as_they_are_found_among_all(positions):
    inputs = tiny().inputs(["the capital of france is", "a duck is"])
    some, all_of_them = tiny().capture(inputs, scale=True, positions=positions), tiny().capture(inputs, scale=True)
    for name, value in vars(all_of_them.at(positions)).items():
        close(getattr(some, name).double(), value.double())
    assert some.text.tolist() == {"all": [0] * 6 + [1] * 4, 4: [0]}.get(positions, [0, 1])


@pytest.mark.parametrize("positions", ["lst", -1, None, 1.0])
def test_positions_that_there_are_not_are_refused(positions):
    for call in (some().at, lambda k: tiny().capture({"input_ids": torch.tensor([[1, 5]])}, positions=k)):
        with pytest.raises(ValueError, match=f'"all", the "last" one of each text, or one.*{positions!r}'):
            call(positions)


def test_a_word_that_the_model_rules_out_costs_a_lens_nothing():
    """A logit of −∞: p log p is 0 there, and the lens's KL that over the other words."""
    model, tokenizer = load_model("tiny-gpt", dtype="float64")
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([9]), -torch.inf))
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer, torch.float64)
    seen, full = heads.capture({"input_ids": world.Text(5).rows(1)}), some()[:127]
    assert (seen.log_p[:, 9] == NEVER).all() and not seen.p[:, 9].any()
    lens = Lens(heads, start("full").folded(heads), {})
    log_q = lens.log_probs(seen[:127])
    p = full.p.index_fill(-1, torch.tensor([9]), 0)
    p = p / p.sum(-1, keepdim=True)
    close(lens.kl(seen[:127]), (torch.xlogy(p, p) - p * log_q).sum(-1))
    with pytest.raises(ValueError, match="rules some words out.*'reverse'.*take \"kl\""):
        train(heads, [seen] * 3, objective="reverse", steps=0, progress=False)


def test_moments_are_of_positions_that_are_finite_and_the_first_batch_may_have_none():
    whole, late = Moments.of([some()]), Moments.of([some()[:0], some()])
    for name in ("mu", "S", "C", "offset"):
        close(getattr(late, name), getattr(whole, name), 1e-10)
    for batches in ([], [some()[:0]]):
        with pytest.raises(ValueError, match="means over positions, and there is none"):
            Moments.of(batches)
    with pytest.raises(ValueError, match="made from finite numbers"):
        Moments.of([replace(some(), log_p=some().log_p * torch.nan)])


def test_the_norms_scale_is_asked_for_where_it_is_needed():
    plain = replace(some(), scale=None)
    m = Moments.of([plain, some()])
    assert m.scale is None and isinstance(Moments.of([some()]).scale, float)
    for call in (lambda: FAMILIES["translator"].start(m, tiny(), 3),
                 lambda: unembedding(tiny(), m).kl(plain)):  # fmt: skip
        with pytest.raises(ValueError, match=r"capture\(inputs, scale=True\)"):
            call()
    close(FAMILIES["full"].start(m, tiny(), 3).parameters["b"][0], m.offset)


def test_damping_over_processes_counts_positions_not_processes():
    lenses, parts = [start("full") for _ in range(3)], [some()[:20], some()[20:]]
    whole, sums = damped(lenses[0], some()), []
    damped(lenses[1], parts[0], reduce=lambda x: sums.append(x) or x)
    left = iter(sums)
    assert torch.equal(damped(lenses[2], parts[1], reduce=lambda x: x + next(left)), whole)


def test_lenses_without_training_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="made in a moment"):
        bias_only(tiny(), moments()).save(tmp_path / "a.safetensors")


def test_the_readout_gives_the_models_logits_and_is_refused_where_there_is_none():
    heads, seen = tiny(), some()
    run = heads._run({"input_ids": world.Text(5).rows(1)})
    ours = heads.readout.scale(run.stream[0], run.logits[0])[:, None] * (run.stream[0] @ heads.readout.M.T)
    close(ours + heads.readout.beta, run.logits[0], 1e-10)
    assert seen.scale.std() > 0.01
    for name, ends in (("bert", "pooler"), ("vit", "class")):
        with pytest.raises(ValueError, match="take a family that needs none"):
            print(ends, Heads(*MODELS[name]()).readout)
    model, inputs = MODELS["gemma2"]()  # whose logits are capped
    with pytest.raises(ValueError, match="ends otherwise"):
        print(Heads(model, inputs, dtype=torch.float64).readout)


def test_a_head_replaced_changes_the_model_as_taking_its_write_away_does():
    heads = tiny()
    inputs, model = heads.inputs("the capital of france is"), heads.model
    edited = heads.capture(inputs, edit=replaced(3, 5, 0.0))
    full = heads.capture(inputs)
    write, module = full.z[29] @ heads.W_O[29], model.get_submodule(heads.paths[3])
    handle = module.register_forward_hook(lambda module, args, out: out - write.view(out.shape))
    close(edited.log_p, heads.capture(inputs).log_p, 1e-10)
    handle.remove()
    assert not edited.z[29].any() and torch.equal(edited.z[28], full.z[28])
    assert (heads.capture(inputs).log_p - edited.log_p).abs().max() > 1e-4
    assert torch.equal(heads.capture(inputs).log_p, full.log_p)  # nothing stays behind


def test_heads_say_what_they_miss():
    with pytest.raises(ValueError, match="tokenizer or image processor"):
        Heads(*MODELS["gpt2"]()).inputs("a text")
    with pytest.raises(ValueError, match="one text or image at least"):
        tiny().inputs([])
    with pytest.raises(ValueError, match="an attention with a softmax"):
        Heads(*MODELS["rwkv"]())


# ------------------------------------------------------------------------------------------------- reading and keeping


@functools.cache
def lens():
    batches = [{"input_ids": world.Text(k).rows(2)} for k in range(6)]
    return train(tiny("float32"), batches, steps=0, warm=5, progress=False)


def test_a_lens_reads_a_text():
    read = lens().top_tokens("the capital of france is", 3, 2, k=4)
    seen = lens().capture("the capital of france is")
    q = lens().log_probs(seen)[3 * 8 + 2, -1].exp()
    assert [word for word, _ in read] == lens().words(q.topk(4).indices)
    assert [p for _, p in read] == pytest.approx(q.topk(4).values.tolist())
    table = lens().table("the capital of france is", 3)
    assert len(table) == 8 and len(table[2]) == 6 and table[2][-1] == read[0][0]
    grid = lens().grid("the capital of france is", k=2)
    assert [len(row) for row in grid] == [8] * 4 and grid[3][2] == read[:2]
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        lens().top_tokens("the", 4, 0)
    with pytest.raises(ValueError, match="layers are 0 to 3; layer is 9"):
        lens().table("the", 9)
    with pytest.raises(ValueError, match="positions 0 to 1, or −1 to -2 from its end; position is 50"):
        lens().top_tokens("the", 3, 0, position=50)
    with pytest.raises(ValueError, match="1 to 953, as many as the model has logits; not 954"):
        lens().top_tokens("the", 3, 0, k=954)


def test_one_example_is_read_at_a_time():
    for read in (lens().top_tokens, lens().table, lens().grid):
        with pytest.raises(ValueError, match="one text or image is read at a time, and these are 2"):
            read(["the capital of france is", "a duck is a"], *{"grid": []}.get(read.__name__, [3, 0][:2]))


def test_some_heads_are_read_without_the_others(monkeypatch):
    seen, which, heads = some("float32")[:5], slice(13, 16), []
    values, ids = lens().tokens(seen, 3)
    some_of_them = lens().tokens(seen, 3, which=which)
    assert torch.equal(some_of_them[0], values[which]) and torch.equal(some_of_them[1], ids[which])
    close(lens().kl(seen, which), lens().kl(seen)[which], 1e-6)
    monkeypatch.setattr(Lens, "log_probs", lambda self, seen, which, read=Lens.log_probs: (
        heads.append(which), read(self, seen, which))[1])  # fmt: skip
    lens().top_tokens("the capital of france is", 3, 2)
    assert heads == [slice(26, 27)]


def test_logits_without_a_token_are_named_by_their_number():
    model, tokenizer = load_model("tiny-gpt")
    model.resize_token_embeddings(960, mean_resizing=False)
    found = Lens(Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer), None, {})
    assert found.words(torch.tensor([[952, 953], [959, 0]])) == [[found.words(torch.tensor(952)), "[953]"],
                                                                ["[959]", "<pad>"]]  # fmt: skip
    assert Lens(Heads(model, {"input_ids": torch.tensor([[1]])}), None, {}).words(torch.tensor([7])) == ["[7]"]


def test_what_a_head_says_is_the_difference_to_its_mean():
    for found in (lens(), unembedding(tiny("float32"), moments32())):
        seen = some("float32")[:9]
        mean = found.family.mu[:, None].expand(-1, 9, -1).clone()
        at_mean = type(seen)(mean, seen.log_p, seen.following, seen.text, seen.position, seen.scale)
        gap = found.log_probs(seen) - found.log_probs(at_mean)
        close(found.said(seen) - found.said(seen).mean(-1, keepdim=True), gap - gap.mean(-1, keepdim=True), 1e-4)


@functools.cache
def moments32():
    return Moments().add(some("float32")).close()


def test_the_unembedding_as_a_lens_is_direct_logit_attribution():
    """Over all heads and what else is written, the attributions add up to the logits; here, of one head, in numbers."""
    heads, seen = tiny(), some()[:5]
    found = unembedding(heads, moments())
    x = found.log_probs(seen)[20]
    a, norm = seen.z[20] @ heads.W_O[20], heads.model.transformer.ln_f
    run = heads._run({"input_ids": world.Text(5).rows(1)})
    stream = run.stream[0, :5]
    sigma = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    written = ((a - a.mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias) @ heads.model.lm_head.weight.T
    close(x, written.log_softmax(-1).detach(), 1e-8)


def test_the_scaled_unembedding_is_at_least_as_good_as_its_bias():
    heads, seen = tiny("float32"), some("float32")
    scaled, flat = unembedding(heads, moments32(), seen), bias_only(heads, moments32())
    assert (scaled.kl(seen).mean(1) < flat.kl(seen).mean(1) + 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_lens_back_and_holds_no_model(tmp_path, family):
    batches = [{"input_ids": world.Text(k).rows(2)} for k in range(3)]
    made = train(tiny("float32"), batches, family=family, steps=1, warm=2, progress=False)
    made.save(tmp_path / "lens.safetensors")
    back = load_lens(tmp_path / "lens.safetensors", tiny("float32"))
    seen = some("float32")
    assert torch.equal(back.kl(seen), made.kl(seen)) and back.about == made.about
    with safe_open(tmp_path / "lens.safetensors", "pt") as file:
        about, names = json.loads(file.metadata()["lens"]), {*file.keys()}
    assert names == {"mu", *(f"parameters.{name}" for name in made.family.parameters)}
    assert about["model"] == "tiny-gpt" and about["family"] == family and about["tokens"] == 256


def test_a_lens_is_refused_by_a_model_that_it_does_not_fit(tmp_path):
    file = tmp_path / "lens.safetensors"
    lens().save(file)
    planted, tokenizer = load_model("tiny-gpt-planted")
    example = tokenizer(["a"], return_tensors="pt")
    other = Heads(planted, example, tokenizer)
    with pytest.raises(ValueError, match="transfer=True reads it all the same"):
        load_lens(file, other)
    assert load_lens(file, other, transfer=True).top_tokens("the capital of france is", 0, 0)
    half = Heads(load_model("tiny-gpt", dtype="bfloat16")[0], example, tokenizer)  # the same in another precision
    assert load_lens(file, half).heads is half
    for part in ("h.2.attn.c_attn", "h.1.mlp", "wte"):  # nothing that the heads write by
        changed, parts = copy.deepcopy(tiny("float32").model), 0
        for name, p in changed.named_parameters():
            if part in name and p.dim() > 1:
                parts += 1
                p.data += 0.03 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(parts))
        with pytest.raises(ValueError, match="its weights are others; transfer=True"):
            print(part, parts, load_lens(file, Heads(changed, example, tokenizer)))
    small, _ = load_model("tiny-attn")
    with pytest.raises(ValueError, match=r"heads was \[8, 8, 8, 8\], now is \[4, 4\]; V was 953, now is 68"):
        load_lens(file, Heads(small, {"input_ids": torch.tensor([[1, 5]])}), transfer=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="Lens.save wrote"):
        load_lens(tmp_path / "other.safetensors", tiny("float32"))


@pytest.mark.parametrize(("name", "data", "column"), [("tiny-bert", "reviews", "text"),
                                                      ("tiny-vit", "digits", "image")])
def test_lenses_into_class_labels(name, data, column):
    model, processor = load_model(name)
    batches = [*Examples(load_data(data, "train").select(range(160)), processor, 32, column)]
    heads = Heads(model, batches[0], processor)
    found = train(heads, batches, positions=0, steps=10, warm=4, progress=False)
    example = load_data(data)[0][column]
    word, p = found.top_tokens(example, 3, 1, position=0, k=1)[0]
    seen = found.capture([example])
    assert len(seen) > 1 and (seen.log_p == seen.log_p[0]).all()  # one answer, and lenses read it at the class token
    x = ((seen.z[13, 0] - found.family.mu[13]) @ found.family.parameters["W"][13].T + found.family.parameters["b"][13])
    assert word == model.config.id2label[int(x.argmax())] and p == pytest.approx(float(x.softmax(0).max()))
    assert isinstance(found, Lens) and found.about["positions"] == 0 and found.about["tokens"] == 10 * 32
    seen = together(heads.capture(b, positions=0) for b in Examples(load_data(data).select(range(40)), processor,
                                                                    20, column))  # fmt: skip
    flat = bias_only(heads, Moments.of(heads.capture(b, positions=0) for b in batches[1:]))
    kl, right = found.kl(seen).mean(1), (found.tokens(seen)[1][..., 0] == seen.log_p.argmax(-1)).double().mean(1)
    assert kl[13] < flat.kl(seen).mean() / 3 and right[13] > 0.8
    with pytest.raises(ValueError, match="'all', that a word follows"):
        train(heads, batches, objective="next", progress=False)
