"""Editing through decoders: every editor against its definition, targets, what is chosen, edits of a model of few bits.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tensorlens_utils import load_model
from tensorlens_utils.linearize import crossings
from tensorlens_utils.models import n_blocks
from tensorlens_utils.relations import Sample, world_relations
from tensorlens_utils.relations.decoders import examples_of, fit
from tensorlens_utils.relations.editing import EDITORS, Edit, _targets, evaluate_causality, key
from tensorlens_utils.relations.faithfulness import STANDARD, Trial, ahead, choose, evaluate_relations, overall, scores
from tensorlens_utils.relations.subjects import Asked

ANTONYM = {"adjective_antonym": world_relations()["adjective_antonym"]}


@pytest.fixture(scope="module")
def gpt():
    return load_model("tiny-gpt")


@pytest.fixture(scope="module")
def traced(gpt):
    """A table, and all that was put in the place of subjects meanwhile: (boundary, states)."""
    put_in, answer = [], Asked.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "answer", lambda self, s, layer: put_in.append((layer, s)) or answer(self, s, layer))
        table = evaluate_causality(*gpt, ANTONYM, seeds=2, layers=[0, 1], ranks=[4, 32], template=None, progress=False)
    return table, put_in


@pytest.fixture(scope="module")
def table(traced):
    return traced[0]


def put(model, ids, p, layer, state):
    """The word that the whole model goes on with, `state` standing at position p of boundary `layer`."""

    def meet(k, hidden):
        return torch.cat([hidden[:, :p], state[None, None], hidden[:, p + 1 :]], 1) if k == layer else hidden

    with torch.no_grad(), crossings(model, meet):
        return int(model(ids[None], use_cache=False).logits[0, -1].argmax())


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("layer, rank", [(0, 32), (1, 4)])
def test_an_editor_puts_in_what_its_name_says(gpt, traced, editor, layer, rank):
    """Written out sample by sample under the second seed, which with template=None asks in the second wording."""
    (model, tokenizer), (table, put_in) = gpt, traced
    (name, relation), = ANTONYM.items()
    train, test = relation.split(5, seed=1)
    trial = Trial(model, tokenizer, relation, 1, template=1)
    asked, said = trial.asked, [tokenizer.decode(token) for token in trial.asked.logits.argmax(-1)]
    to = _targets(test, [a == x.object for a, x in zip(said, test, strict=True)], random.Random(f"1 {name} targets"))
    W = {"translation": torch.eye(128)}
    if editor in ("tensor", "lre", "ridge"):
        W[editor] = fit(editor, examples_of(trial.learned(), [layer], [editor])[layer]).W
    row, = table.where(seed=1, decoder=editor)
    at = row["settings"].index([layer, 1.0, rank if editor in ("tensor", "lre") else 0])
    edited = [i for i, hit in enumerate(row["causal"][at]) if hit is not None]
    assert edited == [i for i, j in enumerate(to.tolist()) if i != j] and len(edited) > 10
    wanted = []
    for i in edited[:6]:
        j = int(to[i])
        s, o, s_j, o_j = asked.s[layer, i], asked.o[i], asked.s[layer, j], asked.o[j]
        word = model.lm_head.weight.detach()[tokenizer.convert_tokens_to_ids(said[j])]
        if editor in W:
            U, S, V = torch.linalg.svd(W[editor])
            r = rank if editor in ("tensor", "lre") else int(torch.linalg.matrix_rank(W[editor]))
            assert editor != "ridge" or r == (3 if layer == 0 else 4)  # two of the five examples end in "up"
            change = V[:r].T @ ((U[:, :r].T @ (o_j - o)) / S[:r])
        state = {"subject": s_j, "object state": o_j, "object embedding": word * s.norm() / word.norm()}.get(
            editor, s + change if editor in W else None)  # fmt: skip
        now = put(model, asked.ids[i], asked.position[i], layer, state)
        assert row["causal"][at][i] == (tokenizer.decode(now) == test[j].object)
        wanted.append(state)
    made = [s[edited[:6]] for k, s in put_in if k == layer and len(s) == len(test)]
    assert sum(torch.allclose(s, torch.stack(wanted), rtol=1e-3, atol=1e-3) for s in made) == 1


def test_targets_are_right_and_of_another_subject_and_object():
    samples = [Sample(*pair.split(":")) for pair in ("a:x", "b:y", "b:z", "c:x", "d:y", "e:w")]
    right = [True, True, True, True, True, False]
    found = {tuple(_targets(samples, right, random.Random(seed)).tolist()) for seed in range(200)}
    drawn = [{row[i] for row in found} for i in range(6)]
    assert drawn == [{1, 2, 4}, {0, 3}, {0, 3, 4}, {1, 2, 4}, {0, 2, 3}, {5}]
    assert _targets(samples[:1], [True], random.Random(0)).tolist() == [0]  # no other: itself


def test_of_equal_states_an_editor_is_not_chosen(gpt):
    """Subjects of one last word are one state at boundary 0: there ridge knows of no edit, so that no example flips,
    and is not taken to be sure of itself."""
    capital = world_relations()["country_capital"]
    samples = tuple(Sample(f"{x.subject} egypt", x.object) for x in capital.samples if " " not in x.subject)
    relation = {"r": replace(capital, name="r", samples=samples)}
    table = evaluate_causality(*gpt, relation, seeds=3, n_examples=4, layers=[0, 1, 3], editors=["ridge"],
                               progress=False)
    logs = [row["left_out_log"] for row in table.rows if any(row["left_out_log"])]  # where two examples differ
    assert logs and all(log[0] < -1 for log in logs) and all(row["left_out"][0] == 0 for row in table.rows)


def test_what_cannot_be_tried_is_refused_before_work(gpt):
    for options, message in [({"ranks": [129]}, r"in \[1, 128\].* not 129"), ({"layers": []}, "more of the layers"),
                             ({"ranks": []}, "more of the ranks"), ({"editors": []}, "more of the editors"),
                             ({"n_examples": 1}, "chosen by edits between examples, two or more, and n_examples is 1"),
                             ({"template": 9}, "asked for by its number")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate_causality(*gpt, ANTONYM, progress=False, **{"seeds": 1, **options})
    one = evaluate_causality(*gpt, ANTONYM, seeds=1, n_examples=1, layers=[0], ranks=[32], progress=False)
    assert overall(scores(one, "tensor", "causal")["adjective_antonym"]) > 0.2 and len(one.rows) == len(EDITORS)


def test_causality_is_compared_at_the_ranks_that_examples_choose(table):
    ahead_by, values = ahead(table, "tensor", "lre", "causal"), []
    for name in ("tensor", "lre"):
        values.append(scores(table, name, "causal", choose(table, name, rank=None))["adjective_antonym"])
    assert np.array_equal(ahead_by["adjective_antonym"], values[0] - values[1], equal_nan=True)
    with pytest.raises(ValueError, match="measure is one of 'causal'; 'faithful' is none"):
        scores(table, "tensor")


def test_trials_run_in_few_bits(gpt):
    """bfloat16, in which the paper's models are kept: all decoders, ranks and editors; about as in float32."""
    few = (load_model("tiny-gpt", dtype="bfloat16")[0], gpt[1])
    options = {"seeds": 1, "layers": [0], "progress": False}
    tables = [evaluate_relations(*m, ANTONYM, betas=[2], ranks=[16], **options) for m in (few, gpt)]
    for d in STANDARD:
        a, b = (overall(scores(t, d)["adjective_antonym"]) for t in tables)
        assert abs(a - b) < 0.15, d
    a, b = (overall(scores(evaluate_causality(*m, ANTONYM, ranks=[32], **options), "tensor", "causal")
                    ["adjective_antonym"]) for m in (few, gpt))  # fmt: skip
    assert abs(a - b) < 0.2


def test_an_edit_works_in_few_bits_and_at_every_boundary_there_is(gpt):
    model, ids = load_model("tiny-gpt", dtype="bfloat16")[0], torch.tensor([[5, 6, 7]])
    k, delta = torch.full((128,), 0.1), torch.ones(128)
    with torch.no_grad():
        before = model(ids).logits
        for layer in range(n_blocks(model) + 1):
            with Edit(layer, k, delta).applied(model):
                assert (model(ids).logits - before).abs().max() > 0.01
    for layer in (-1, 5, 99):
        with pytest.raises(ValueError, match=f"at a boundary of the model, 0 to 4; not at {layer}"):
            with Edit(layer, k, delta).applied(model):
                pass


def test_a_key_answers_to_something(gpt):
    states = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = key(states[0].bfloat16(), states.bfloat16())
    assert found.dtype == torch.float32 and float(found @ states[0].bfloat16().float()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="s is zero"):
        key(torch.zeros(8), states)
    with pytest.raises(ValueError, match="of 20 states none is other than zero"):
        key(states[0], torch.zeros(20, 8))
