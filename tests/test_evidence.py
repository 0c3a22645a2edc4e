"""The evidence area against scikit-learn and a written-out sum; evidence from words to tokens; human rationales."""

import json

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from tensorlens_utils import load_data, load_model
from tensorlens_utils.perturbation import compare
from tensorlens_utils.perturbation.evidence import areas, average_precision, evaluate_evidence, load_rationales


def gradient_times_input(model, inputs, target):
    """x ⊙ ∂y_target/∂x, summed over a token's channels."""
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    y = model(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits
    return (x * torch.autograd.grad(y.gather(1, target[:, None]).sum(), x)[0]).sum(-1).detach()


def precision_recall_by_hand(scores, evidence):
    """Σ (R_t − R_{t−1}) P_t, one threshold after another."""
    total, before = 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = [e for s, e in zip(scores, evidence, strict=True) if s >= t]
        recall = sum(chosen) / sum(evidence)
        total, before = total + (recall - before) * sum(chosen) / len(chosen), recall
    return total


def test_the_evidence_area_is_the_average_precision():
    generator = np.random.default_rng(0)
    for n in range(2, 60):
        scores = generator.integers(0, 9, n).astype(float) if n % 2 else generator.normal(size=n)
        evidence = generator.integers(0, 2, n)
        evidence[:2] = 0, 1
        found = average_precision(scores, evidence)
        assert found == pytest.approx(precision_recall_by_hand(scores.tolist(), evidence.tolist()), abs=1e-12)
        assert found == pytest.approx(average_precision_score(evidence, scores), abs=1e-12)
    assert average_precision([1, 2], [0, 0]) is None and average_precision([1, 2], [1, 1]) is None


def test_evidence_of_the_reviews_is_found_by_who_knows_it():
    rows, kinds = load_data("reviews").select(range(48)), set()
    model, processor = load_model("tiny-bert", dtype="float64")
    marks = {tuple(processor(row["text"]).input_ids): row["evidence"] for row in rows}

    def known(model, inputs, target):
        out = torch.zeros(inputs["input_ids"].shape)
        for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            evidence = marks[tuple(ids[mask.bool()].tolist())]
            out[i, 1:len(evidence) + 1] = torch.tensor(evidence)
        return out - 5 * (inputs["input_ids"] == processor.pad_token_id)

    methods = {"known": known, "opposite": lambda *given: -known(*given), "gradient": gradient_times_input}
    table = evaluate_evidence(model, processor, rows, methods, batch_size=7, progress=False)
    assert {row["area"] for row in table.where(method="known")} == {1.0}
    for row in table.where(method="opposite"):
        n, m = len(rows[row["example"]]["evidence"]), sum(rows[row["example"]]["evidence"])
        assert row["area"] == pytest.approx(m / n)  # found together with all the rest, at the last threshold
    for row in table.where(method="gradient"):
        given = rows[row["example"]]
        inputs = processor([given["text"]], return_tensors="pt")
        scores = gradient_times_input(model, inputs, torch.tensor([row["target"]]))
        assert row["area"] == pytest.approx(average_precision_score(given["evidence"], scores[0, 1:-1]), abs=1e-9)
        assert row["kind"] == given["kind"] and row["label"] == given["label"]
        kinds.add(row["kind"])
    assert len(kinds) > 4
    negated = areas(table, kind="negated")["gradient"]
    assert negated.tolist() == [row["area"] for row in table.where(method="gradient") if "negated" in row["kind"]]
    assert compare(areas(table))[0].name == "known" and compare(areas(table))[0].best


def test_evidence_words_become_evidence_tokens(tmp_path):
    """With a tokenizer of pieces: "unlovely" is three tokens, the comma a token of the word "plot,"."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "plot", ",", "un", "##love", "##ly", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    processor = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=16)
    model = BertForSequenceClassification(BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1,
                                                     num_attention_heads=2, intermediate_size=8)).eval()
    texts = [" a  plot, unlovely film", "unlovely"]
    rows = datasets.Dataset.from_dict({"text": texts, "evidence": [[0, 1, 0, 0], [1]]})
    assert processor.convert_ids_to_tokens(processor(texts[0]).input_ids)[1:-1] == [
        "a", "plot", ",", "un", "##love", "##ly", "film"]
    seen = iter([torch.tensor([[9, 0, 5, 4, 0, 0, 0, 3, 9], [9, 1, 1, 1, 9, 0, 0, 0, 0]]).float()])
    table = evaluate_evidence(model, processor, rows, {"m": lambda *given: next(seen)}, progress=False)
    # scores of a . plot and comma . un love ly . film: 0 | 5 4 | 0 0 0 | 3, so both evidence tokens come first
    assert [row["area"] for row in table.rows] == [1.0, None]  # in the second all is evidence: nothing to find
    seen = iter([torch.tensor([[0, 0, 5, 0, 0, 0, 0, 3, 0], [0] * 9]).float()])
    table = evaluate_evidence(model, processor, rows, {"m": lambda *given: next(seen)}, progress=False)
    assert table.rows[0]["area"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 7)
    wrong = rows.map(lambda row: {"evidence": row["evidence"] + [0]})
    with pytest.raises(ValueError, match="example 0 has 4 words and 5 marks"):
        evaluate_evidence(model, processor, wrong, {"m": gradient_times_input}, progress=False)


RATIONALE = {"text_id": "1", "sentence": "a fine film , barely", "original_label": "positive", "annotations": [
    {"label": "positive", "rationale": [0, 1, 1, 0, 0]}, {"label": "positive", "rationale": [0, 1, 0, 0, 0]},
    {"label": "positive", "rationale": [0, 1, 0, 0, 1]}, {"label": "negative", "rationale": [0, 0, 0, 0, 1]}]}


def test_human_rationales_are_read_by_majority_of_those_who_agree(tmp_path):
    path = tmp_path / "rationales.json"
    nobody = RATIONALE | {"original_label": "negative", "annotations": RATIONALE["annotations"][:3]}
    path.write_text(json.dumps([RATIONALE, nobody]))
    rows = load_rationales(path)
    assert rows[0] == {"text": "a fine film , barely", "label": 1, "evidence": [0, 1, 0, 0, 0], "annotators": 3}
    assert rows[1] == {"text": "a fine film , barely", "label": 0, "evidence": [0] * 5, "annotators": 0}


@pytest.mark.parametrize(("change", "message"), [
    ({"original_label": "bored"}, "'bored'"), ({"sentence": "a fine film"}, "text 0 and its 3 words"),
    ({"annotations": [{}]}, "'label'"), ({"annotations": None}, "not iterable")])
def test_rationales_in_another_format_are_refused(tmp_path, change, message):
    path = tmp_path / "rationales.json"
    path.write_text(json.dumps([RATIONALE | change]))
    with pytest.raises(ValueError, match=f"list of texts.*rationales.json' is not: .*{message}"):
        load_rationales(path)
    path.write_text("text\n")
    with pytest.raises(ValueError, match="FairRationales is a list"):
        load_rationales(path)
    with pytest.raises(FileNotFoundError, match="local file"):
        load_rationales(tmp_path / "missing.json")


@pytest.mark.parametrize(("file", "texts", "disowned"), [("SST", 263, 0), ("dynasent", 480, 9)])
def test_the_real_rationales_can_be_evaluated(shared_data, file, texts, disowned):
    rows = load_rationales(shared_data / "fair_rationales" / f"{file}_rationales_no_demographics.json")
    assert len(rows) == texts and sum(n == 0 for n in rows["annotators"]) == disowned
    assert all(len(row["evidence"]) == len(row["text"].split()) for row in rows)
    model, processor = load_model("tiny-bert", dtype="float64")  # which knows few of these words
    some = rows.select(range(30))
    table = evaluate_evidence(model, processor, some, {"gradient": gradient_times_input}, progress=False)
    assert len(table.rows) == 30
    for row, given in zip(table.rows, some, strict=True):
        assert (row["area"] is None) == (len(set(given["evidence"])) == 1) and row["label"] == given["label"]
