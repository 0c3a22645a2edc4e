"""Perturbation curves against loops that are written out: one example, one fraction, one forward at a time."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from tensorlens_utils import baselines, collapse, load_data, load_model
from tensorlens_utils.intervals import interval
from tensorlens_utils.perturbation import ERASER_BINS, area, band, compare, curves, eraser, evaluate, removals
from tensorlens_utils.perturbation.removers import REMOVERS, removable
from tensorlens_utils.results import Table, read

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.8, 1.0)
DATA = {"tiny-vit": ("digits", "image"), "tiny-bert": ("reviews", "text"), "tiny-gpt": ("facts", "prompt")}
every_model = pytest.mark.parametrize("name", DATA)


@functools.cache
def loaded(name):
    return load_model(name, dtype="float64")


def data(name, n=9):
    rows = load_data(DATA[name][0])
    return rows.select(range(0, len(rows), len(rows) // n)).select(range(n))


def run(name, methods, dataset=None, **options):
    model, processor = loaded(name)
    options = {"removers": ["zero" if name == "tiny-vit" else "unk"], "column": DATA[name][1]} | options
    return evaluate(model, processor, dataset or data(name), methods, progress=False, **options)


def gradient_times_input(model, inputs, target, position=-1):
    """x ⊙ ∂y_target/∂x, summed over a patch's pixels or a token's channels."""
    if "pixel_values" in inputs:
        x = inputs["pixel_values"].clone().requires_grad_()
        y = model(pixel_values=x).logits
    else:
        x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        y = model(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits
    if y.dim() == 3:
        y = y[torch.arange(len(y)), inputs["attention_mask"].sum(1) - 1]
    scores = x * torch.autograd.grad(y.gather(1, target[:, None]).sum(), x)[0]
    return scores.unfold(2, 2, 2).unfold(3, 2, 2).sum((1, 4, 5)).flatten(1) if x.dim() == 4 else scores.sum(-1)


def by_content(model, inputs, target, position=-1):
    """Scores without rhyme, but the same for the same token or patch, whatever stands beside it in the batch."""
    if "pixel_values" in inputs:
        return (1e3 * inputs["pixel_values"]).sin().unfold(2, 2, 2).unfold(3, 2, 2).sum((1, 4, 5)).flatten(1)
    return (inputs["input_ids"] * 12.9898 + torch.arange(inputs["input_ids"].shape[1])).double().sin()


METHODS = {"gradient": gradient_times_input, "content": by_content}


# ------------------------------------------------------------------------------------------------------ what is removed


def removed_by_hand(scores, can, fraction, order):
    """One example: the set of places, by Python's own sort (stable, so equals stay from left to right)."""
    places = sorted((j for j in range(len(scores)) if can[j]), key=lambda j: -scores[j])
    k = math.floor(len(places) * fraction + 0.5 + 1e-9)
    return {"morf": places[:k], "lerf": places[len(places) - k:], "insert": places[k:]}[order]


@pytest.mark.parametrize("order", ["morf", "lerf", "insert"])
def test_what_is_removed_is_what_a_sort_says(order):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (20, 90), generator=generator).double()  # many equals, and too many for a short sort
    can = torch.rand(20, 90, generator=generator) < 0.7
    can[0] = False
    fractions = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    removed = removals(scores, can, fractions, order)
    for i in range(20):
        for f, fraction in enumerate(fractions):
            places = removed_by_hand(scores[i].tolist(), can[i].tolist(), fraction, order)
            assert sorted(places) == removed[i, f].nonzero()[:, 0].tolist()


def test_an_awkward_fraction_is_rounded_as_written():
    can = torch.ones(1, 45, dtype=torch.bool)
    assert 0.7 * 45 < 31.5  # in floats
    assert removals(can.double(), can, [0.1, 0.3, 0.5, 0.7], "morf").sum(-1).tolist() == [[5, 14, 23, 32]]


def test_insert_is_lerf_from_the_other_end():
    table = run("tiny-vit", METHODS, fractions=[i / 8 for i in range(9)])
    for measure in ("accuracy", "probability", "logit", "change"):
        lerf, insert = curves(table, measure, order="lerf"), curves(table, measure, order="insert")
        assert all(np.array_equal(lerf[m], insert[m][:, ::-1]) for m in METHODS)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt"])
def test_special_tokens_and_padding_are_never_removed(name):
    model, processor = loaded(name)
    texts = data(name)[:][DATA[name][1]]
    inputs = processor(texts, padding=True, return_tensors="pt")
    inputs["input_ids"][0, 2] = processor.unk_token_id  # a word that the tokenizer does not know is still a word
    can = removable(model, processor, inputs)
    assert can.sum(1).tolist() == [len(text.split()) for text in texts] and can[0, 2]
    removed = removals(by_content(model, inputs, None), can, [1], "morf")[:, 0]
    all_gone = REMOVERS["text"]["unk"](model, processor, inputs, removed)
    words = {"tiny-bert": "[CLS] [SEP] [PAD] [UNK]", "tiny-gpt": "<bos> <pad> <unk>"}[name].split()
    assert set(processor.convert_ids_to_tokens(all_gone["input_ids"].unique().tolist())) == set(words)
    seen = []
    run(name, {"spy": lambda model, inputs, target: seen.append(inputs) or by_content(model, inputs, target)})
    assert set(seen[0]) == set(inputs)


# ------------------------------------------------------------------------------------------------------------- removers


def pick(can, seed=0):
    return can & (torch.rand(can.shape, generator=torch.Generator().manual_seed(seed)) < 0.4)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt"])
def test_dropping_words_is_the_text_without_them(name):
    model, processor = loaded(name)
    texts = data(name)[:][DATA[name][1]]
    for side in ("right", "left"):
        inputs = processor(texts, padding=True, padding_side=side, return_tensors="pt")
        can = removable(model, processor, inputs)
        removed = pick(can)
        dropped = REMOVERS["text"]["drop"](model, processor, dict(inputs), removed)
        shorter = [" ".join(w for w, gone in zip(text.split(), removed[i][can[i]], strict=True) if not gone)
                   for i, text in enumerate(texts)]
        expected = processor(shorter, padding=True, return_tensors="pt")
        assert {k: v.tolist() for k, v in dropped.items()} == {k: v.tolist() for k, v in expected.items()}
        assert inputs["input_ids"].shape != dropped["input_ids"].shape


def test_dropping_everything_leaves_one_token():
    model, processor = loaded("tiny-gpt")
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    removed = inputs["attention_mask"].bool().clone()
    removed[0, 1] = False
    dropped = REMOVERS["text"]["drop"](model, processor, inputs, removed)
    assert dropped["input_ids"].tolist() == [[6], [processor.bos_token_id]] and dropped["attention_mask"].all()
    dropped = REMOVERS["text"]["drop"](model, processor, inputs, inputs["attention_mask"].bool())
    assert dropped["input_ids"].tolist() == [[processor.bos_token_id]] * 2


@pytest.mark.parametrize("token", ["mask", "unk", "pad"])
def test_a_token_in_the_place_of_the_removed(token):
    model, processor = loaded("tiny-bert")
    inputs = dict(processor(data("tiny-bert")[:]["text"], padding=True, return_tensors="pt"))
    before, removed = inputs["input_ids"].clone(), pick(removable(model, processor, inputs))
    after = REMOVERS["text"][token](model, processor, inputs, removed)
    assert (after["input_ids"][removed] == processor.convert_tokens_to_ids(f"[{token.upper()}]")).all()
    assert torch.equal(after["input_ids"][~removed], before[~removed]) and torch.equal(inputs["input_ids"], before)
    assert after["attention_mask"] is inputs["attention_mask"]


def digits(n=4):
    model, processor = loaded("tiny-vit")
    images = data("tiny-vit", n)[:]["image"]
    inputs = processor(images, return_tensors="pt").to(model.dtype)
    return model, processor, images, dict(inputs), pick(removable(model, processor, inputs))


def painted(images, removed, paint):
    """The images with 2×2 patches repainted, pixel by pixel; `paint(image)` is what shows in the removed ones."""
    out = []
    for image, gone in zip(images, removed, strict=True):
        pixels = np.asarray(image).astype(float)
        other = paint(pixels)
        for j in range(16):
            if gone[j]:
                rows, columns = slice(j // 4 * 2, j // 4 * 2 + 2), slice(j % 4 * 2, j % 4 * 2 + 2)
                pixels[rows, columns] = other[rows, columns]
        out.append(pixels)
    return np.stack(out)


@pytest.mark.parametrize("remover", ["zero", "mean", "blur", "grey"])
def test_patches_are_repainted_as_their_intensities_would_be(remover):
    model, processor, images, inputs, removed = digits()
    before = inputs["pixel_values"].clone()

    def blur(pixels):  # σ = 1; every weight is normalised over what there is, as a filter over ones tells
        weights = gaussian_filter(np.ones((8, 8)), 1, mode="constant", truncate=20)
        return gaussian_filter(pixels, 1, mode="constant", truncate=20) / weights

    paint = {
        "zero": np.zeros_like,
        "grey": lambda pixels: np.full_like(pixels, 0.305 * 16),
        "mean": lambda pixels: np.kron(pixels.reshape(4, 2, 4, 2).mean((1, 3)), np.ones((2, 2))),
        "blur": blur,
    }[remover]
    pixels = REMOVERS["image"][remover](model, processor, inputs, removed)["pixel_values"]
    expected = (painted(images, removed, paint) / 16 - 0.305) / 0.376
    assert np.allclose(pixels[:, 0], expected, atol=2e-7)  # the processor itself computes in float32
    assert torch.equal(inputs["pixel_values"], before) and not torch.equal(pixels, before)


def test_black_is_what_the_processor_makes_of_a_black_image():
    model, processor, images, inputs, removed = digits()
    black = processor([Image.new("L", (8, 8))], return_tensors="pt").to(model.dtype)["pixel_values"]
    all_gone = REMOVERS["image"]["zero"](model, processor, inputs, torch.ones_like(removed))["pixel_values"]
    assert torch.allclose(all_gone, black.expand_as(all_gone), atol=1e-6)


@pytest.mark.parametrize("remover", ["zero", "mean"])
def test_colours_and_oblong_patches(remover):
    model = SimpleNamespace(main_input_name="pixel_values", config=SimpleNamespace(patch_size=(2, 4)))
    processor = SimpleNamespace(do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4])
    pixels = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    removed = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(removable(model, processor, {"pixel_values": pixels}), torch.ones(2, 4).bool())
    expected = pixels.clone()
    for n, j in removed.nonzero().tolist():
        for c in range(3):
            part = expected[n, c, j // 2 * 2:j // 2 * 2 + 2, j % 2 * 4:j % 2 * 4 + 4]
            part[:] = part.mean() if remover == "mean" else -processor.image_mean[c] / processor.image_std[c]
    after = REMOVERS["image"][remover](model, processor, {"pixel_values": pixels}, removed)["pixel_values"]
    assert torch.allclose(after, expected, atol=1e-7)


def test_a_remover_can_be_added(monkeypatch):
    monkeypatch.setitem(REMOVERS["image"], "nothing", lambda model, processor, inputs, removed: inputs)
    table = run("tiny-vit", METHODS, removers=["nothing"])
    assert max(max(row["change"]) for row in table.rows) < 1e-20


# ----------------------------------------------------------------------------------------------- curves, written out


def remove_by_hand(name, processor, inputs, places):
    """One example with places removed: black patches, or [UNK]."""
    if name == "tiny-vit":
        pixels = inputs["pixel_values"].clone()
        for j in places:
            pixels[0, :, j // 4 * 2:j // 4 * 2 + 2, j % 4 * 2:j % 4 * 2 + 2] = -0.305 / 0.376
        return {"pixel_values": pixels}
    ids = inputs["input_ids"].clone()
    ids[0, list(places)] = processor.unk_token_id
    return {**inputs, "input_ids": ids}


def answer(model, inputs):
    y = model(**inputs).logits.detach()
    return y.flatten(0, -2)[-1]


@every_model
def test_curves_are_those_of_one_forward_at_a_time(name):
    model, processor = loaded(name)
    rows, column = data(name), DATA[name][1]
    table = run(name, METHODS, rows, fractions=FRACTIONS)
    assert len(table.rows) == len(rows) * 2 * 3
    for row in table.rows:
        inputs = processor([rows[row["example"]][column]], return_tensors="pt")
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        whole = answer(model, inputs)
        target = int(whole.argmax())
        scores = METHODS[row["method"]](model, inputs, torch.tensor([target]))[0].tolist()
        can = [True] * 16
        if name != "tiny-vit":
            can = [int(i) not in processor.all_special_ids for i in inputs["input_ids"][0]]
        assert row["target"] == target and row["label"] == rows[row["example"]].get("label", target)
        for f, fraction in enumerate(FRACTIONS):
            places = removed_by_hand(scores, can, fraction, row["order"])
            y = answer(model, remove_by_hand(name, processor, inputs, places))
            assert row["prediction"][f] == int(y.argmax())
            assert row["probability"][f] == pytest.approx(float(y.softmax(0)[target]), rel=1e-6)
            assert row["logit"][f] == pytest.approx(float(y[target]), rel=1e-6, abs=1e-6)
            assert row["change"][f] == pytest.approx(float((y - whole).square().sum()), rel=1e-6, abs=1e-9)
    for measure in ("prediction", "probability", "logit", "change"):
        assert len({tuple(row[measure]) for row in table.rows}) > len(rows)


@every_model
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_curves_do_not_change_with_the_batch(name, batch_size):
    removers = ["mean", "blur"] if name == "tiny-vit" else ["unk", "drop"]
    tables = [run(name, METHODS, batch_size=size, removers=removers) for size in (9, batch_size)]
    for one, other in zip(*(table.rows for table in tables), strict=True):
        for key, value in one.items():
            assert other[key] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, list) else value)


def test_a_column_can_be_the_target():
    rows = data("tiny-vit")
    table = run("tiny-vit", METHODS, rows.map(lambda row: {"nine": 9}), target="nine", orders=["morf"])
    assert {row["target"] for row in table.rows} == {9} and table.settings["target"] == "nine"
    assert all("against" not in row for row in table.rows)
    first = [row["probability"][0] for row in table.where(method="content")]
    model, processor = loaded("tiny-vit")
    y = model(**processor(rows[:]["image"], return_tensors="pt").to(model.dtype)).logits.softmax(1)[:, 9]
    assert first == pytest.approx(y.tolist(), rel=1e-6)
    accuracy = curves(table, "accuracy", order="morf")["content"]
    assert np.array_equal(accuracy, [[p == rows[i]["label"] for p in row["prediction"]]
                                     for i, row in enumerate(table.where(method="content"))])


# --------------------------------------------------------------------------------------------------- contrasts of two


def test_a_contrast_is_watched_as_the_choice_between_two():
    model, processor = loaded("tiny-gpt")
    rows = data("tiny-gpt").map(lambda row: {"right": processor.convert_tokens_to_ids(row["object"])})
    seen = []

    def spy(model, inputs, target):
        seen.append(target)
        return by_content(model, inputs, target)

    table = run("tiny-gpt", {"spy": spy}, rows, target=("prediction", "runner-up"), fractions=FRACTIONS)
    assert table.settings["target"] == ["prediction", "runner-up"] and seen[0].shape == (9, 2)
    for row in table.rows:
        inputs = processor([rows[row["example"]]["prompt"]], return_tensors="pt")
        whole = answer(model, inputs)
        t, c = sorted(range(len(whole)), key=lambda i: -float(whole[i]))[:2]
        assert (row["target"], row["against"]) == (t, c) == tuple(seen[0][row["example"]].tolist())
        assert row["label"] == t
        scores = by_content(model, inputs, None)[0].tolist()
        can = [int(i) not in processor.all_special_ids for i in inputs["input_ids"][0]]
        for f, fraction in enumerate(FRACTIONS):
            places = removed_by_hand(scores, can, fraction, row["order"])
            y = answer(model, remove_by_hand("tiny-gpt", processor, inputs, places))
            assert row["logit"][f] == pytest.approx(float(y[t] - y[c]), rel=1e-6, abs=1e-6)
            assert row["probability"][f] == pytest.approx(1 / (1 + math.exp(float(y[c] - y[t]))), rel=1e-6)
            assert row["change"][f] == pytest.approx(float((y - whole).square().sum()), rel=1e-6, abs=1e-9)
            assert row["prediction"][f] == int(y.argmax())


def test_a_runner_up_is_the_best_beside_the_first_and_columns_can_be_contrasted():
    nine = data("tiny-vit").map(lambda row: {"nine": 9, "eight": 8})
    model, processor = loaded("tiny-vit")
    y = model(**processor(nine[:]["image"], return_tensors="pt").to(model.dtype)).logits.detach()
    table = run("tiny-vit", {"content": by_content}, nine, target=("nine", "runner-up"), orders=["morf"])
    others = y.clone()
    others[:, 9] = -torch.inf
    assert [row["against"] for row in table.rows] == others.argmax(1).tolist()
    table = run("tiny-vit", {"content": by_content}, nine, target=("nine", "eight"), orders=["morf"])
    assert [row["logit"][0] for row in table.rows] == pytest.approx((y[:, 9] - y[:, 8]).tolist(), rel=1e-6)
    assert {(row["target"], row["against"]) for row in table.rows} == {(9, 8)}
    but_one = [int(z.argmax() if i == 4 else z.argmin()) for i, z in enumerate(y)]
    with pytest.raises(ValueError, match="'least' and 'prediction' name the same in 1 of 9 examples"):
        run("tiny-vit", {"content": by_content}, nine.add_column("least", but_one), target=("least", "prediction"))


@pytest.mark.parametrize("name", DATA)
def test_maps_that_are_linear_in_the_output_explain_a_contrast_as_the_difference(name):
    model, processor = loaded(name)
    given = data(name, 2)[:][DATA[name][1]]
    inputs = processor(given, return_tensors="pt", **({} if name == "tiny-vit" else {"padding": True}))
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    pairs = torch.tensor([[0, 1], [1, 0]])
    linear = ["class", "attention × gradient", "gradient × input", "integrated gradients", "feature ablation"]
    for method, map_of in (collapse.METHODS | baselines.METHODS).items():
        first, second, both = (map_of(model, inputs, target).detach() for target in (*pairs.T, pairs))
        if method in linear:
            assert torch.allclose(both, first - second, atol=1e-6 * float(first.abs().max())), method
            assert both.abs().max() > 0
        elif method != "chefer":  # which takes the positive part; the others heed no target
            assert torch.equal(both, first), method
        else:
            assert not torch.allclose(both, first)


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_says(monkeypatch):
    model, processor = loaded("tiny-gpt")
    rows = run("tiny-gpt", METHODS).rows
    monkeypatch.setattr(processor, "padding_side", "left")
    assert run("tiny-gpt", METHODS).rows == rows


def test_texts_are_cut_at_the_length_given():
    rows = datasets.Dataset.from_list([{"text": "the film was good . " * 30, "label": 1}] * 2)
    whole, cut = (run("tiny-bert", {"content": by_content}, rows, max_length=n, orders=["morf"]) for n in (None, 10))
    model, processor = loaded("tiny-bert")
    for table, n in ((whole, 64), (cut, 10)):
        inputs = processor([rows[0]["text"]], truncation=True, max_length=n, return_tensors="pt")
        assert table.rows[0]["logit"][0] == pytest.approx(float(model(**inputs).logits.detach().max()), rel=1e-6)


def test_equal_copies_run_once():
    model, processor = loaded("tiny-vit")
    copies = []
    hook = model.register_forward_pre_hook(lambda m, args, given: copies.append(len(given["pixel_values"])),
                                           with_kwargs=True)
    try:
        run("tiny-vit", {"content": by_content}, fractions=[i / 8 for i in range(9)])
    finally:
        hook.remove()
    assert sum(copies) == 9 * (1 + 2 + 7 + 7)  # for the target; whole and empty; morf and lerf between, insert is lerf


# ------------------------------------------------------------------------------------- curves, areas and comparisons


def by_hand(predictions, **values):
    """A table of one method, "m", whose label is always 1."""
    rows = [{"example": i, "method": "m", "remover": "zero", "order": order, "target": 1, "label": 1, "prediction": p,
             **{key: given[order][i] for key, given in values.items()}}
            for order, lists in predictions.items() for i, p in enumerate(lists)]
    return Table(("example", "method", "remover", "order"),
                 {"removers": ["zero"], "orders": [*predictions], "fractions": [0, 0.25, 0.5, 1]}, rows)


def test_areas_are_those_of_a_curve_worked_by_hand():
    probability = {"morf": [[1, 0.8, 0.2, 0], [0.9, 0.5, 0.5, 0.7]]}
    table = by_hand({"morf": [[1, 1, 0, 0], [1, 0, 2, 1]]}, probability=probability)
    accuracy, = curves(table, "accuracy", order="morf").values()
    assert accuracy.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    # 0.25·1 + 0.25·0.5 + 0.5·0 and 0.25·0.5 + 0 + 0.5·0.5
    assert area(accuracy, [0, 0.25, 0.5, 1]).tolist() == [0.375, 0.375]
    p, = curves(table, "probability", order="morf", remover="zero").values()
    # 0.25·0.9 + 0.25·0.5 + 0.5·0.1 = 0.4 and 0.25·0.7 + 0.25·0.5 + 0.5·0.6 = 0.6
    assert area(p, [0, 0.25, 0.5, 1]) == pytest.approx([0.4, 0.6])
    # the same up to one half, over that range: (0.225 + 0.125) / 0.5 and (0.175 + 0.125) / 0.5
    assert area(p, [0, 0.25, 0.5, 1], upto=0.5) == pytest.approx([0.7, 0.6])
    assert area(np.ones((3, 4)), [0, 0.1, 0.2, 0.3], upto=0.3).tolist() == [1, 1, 1]  # its height
    assert area([1, 0], [0, 0.3]) == pytest.approx(0.5)
    value, low, high = band(p)
    assert value == pytest.approx([0.95, 0.65, 0.35, 0.35]) and (low <= value).all() and (value <= high).all()
    assert np.allclose(band(p)[:, 1], interval(p[:, 1])) and np.allclose(band(p, n=50)[:, 1], interval(p[:, 1], n=50))


def test_comprehensiveness_and_sufficiency_by_hand():
    p = {"morf": [[0.9, 0.8, 0.5, 0.2], [0.6, 0.6, 0.6, 0.0]], "insert": [[0.1, 0.4, 0.8, 0.9], [0.0, 0.3, 0.6, 0.6]]}
    table = by_hand({order: [[1] * 4] * 2 for order in p}, probability=p)
    found = eraser(table, bins=[0.25, 0.5, 1])
    assert found["comprehensiveness"]["m"] == pytest.approx([(0.1 + 0.4 + 0.7) / 3, (0 + 0 + 0.6) / 3])
    assert found["sufficiency"]["m"] == pytest.approx([(0.5 + 0.1 + 0.0) / 3, (0.3 + 0 + 0) / 3])
    fewer = eraser(table, bins=[0.5])  # of a table that has more
    assert fewer["comprehensiveness"]["m"] == pytest.approx([0.4, 0])
    with pytest.raises(ValueError, match=r"Bins are among the fractions.*\[0, 0.25, 0.5, 1\], and \[0.01, 0.05"):
        eraser(table)


def test_comprehensiveness_of_texts_without_their_first_words():
    """ERASER's five bins on real reviews, tokens dropped as there; against texts that are shortened by hand."""
    model, processor = loaded("tiny-bert")
    table = run("tiny-bert", METHODS, removers=["drop"], orders=["morf", "insert"], fractions=[0, *ERASER_BINS])
    found = eraser(table)
    for i, row in enumerate(data("tiny-bert")):
        words, inputs = row["text"].split(), processor([row["text"]], return_tensors="pt")
        target = table.where(example=i)[0]["target"]

        def probability(words, target=target):
            return float(answer(model, processor([" ".join(words)], return_tensors="pt")).softmax(0)[target])

        for m, method in METHODS.items():
            scores = method(model, inputs, torch.tensor([target]))[0, 1:-1].tolist()
            tops = [removed_by_hand(scores, [True] * len(words), b, "morf") for b in ERASER_BINS]
            whole = probability(words)
            without = [whole - probability([w for j, w in enumerate(words) if j not in top]) for top in tops]
            alone = [whole - probability([w for j, w in enumerate(words) if j in top]) for top in tops]
            assert found["comprehensiveness"][m][i] == pytest.approx(np.mean(without), abs=1e-6)
            assert found["sufficiency"][m][i] == pytest.approx(np.mean(alone), abs=1e-6)


def test_a_paired_difference_tells_apart_what_two_intervals_do_not():
    generator = np.random.default_rng(0)
    difficulty = generator.uniform(0, 1, 80)
    values = {"b": difficulty, "a": difficulty + generator.normal(0.03, 0.05, 80), "c": difficulty - 0.5}
    a, b, c = compare(values)
    assert (a.name, b.name, c.name) == ("a", "b", "c") and (a.best, b.best, c.best) == (True, False, False)
    assert a.mean[1] < b.mean[2]  # the two intervals overlap
    assert np.array_equal(b.behind, interval(values["a"] - values["b"])) and b.behind[1] > 0
    assert not a.behind.any() and np.array_equal(a.mean, interval(values["a"]))
    assert np.array_equal(compare(values, n=50)[1].behind, interval(values["a"] - values["b"], n=50))


def test_no_best_is_marked_where_one_may_be_as_good():
    generator = np.random.default_rng(0)
    values = {"a": generator.normal(0, 1, 50), "b": generator.normal(0, 1, 50), "c": generator.normal(-9, 1, 50)}
    assert not any(standing.best for standing in compare(values))
    smaller = compare(values, larger=False)
    assert [s.name for s in smaller][0] == "c" and [s.best for s in smaller] == [True, False, False]
    assert smaller[1].behind[0] == pytest.approx(values[smaller[1].name].mean() - values["c"].mean())


def test_paired_intervals_hold_the_true_difference_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        shared = generator.normal(0, 3, 40)
        standings = compare({"a": shared + generator.normal(5, 1, 40), "b": shared + generator.normal(0, 1, 40)})
        hits.append(standings[1].behind[1] < 5 < standings[1].behind[2])
    assert 0.89 < np.mean(hits) < 0.98, np.mean(hits)


# --------------------------------------------------------------------------------------------- stopped and gone on with

SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from tensorlens_utils import load_data, load_model
from tensorlens_utils.perturbation import evaluate

path, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
model, processor = load_model("tiny-vit")

def method(name):
    def scores(model, inputs, target):
        time.sleep(seconds)
        with open(log, "a") as stream:
            stream.write(name + chr(10))
        return torch.rand(len(target), 16)
    return scores

evaluate(model, processor, load_data("digits").select(range(20)), {"a": method("a"), "b": method("b")}, path=path,
         removers=["zero", "blur"], batch_size=4)
"""


def evaluation(path, log, seconds):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, path, log, str(seconds)])


def test_killed_half_way_and_started_again_an_evaluation_gives_the_same_table(tmp_path):
    whole, path, log = (tmp_path / name for name in ("whole.jsonl", "table.jsonl", "log"))
    run, undisturbed = evaluation(path, log, 0.1), evaluation(whole, tmp_path / "all", 0)
    limit = time.monotonic() + 90
    while not (path.exists() and path.read_bytes().count(b"\n") > 80):  # of 240 rows, 24 a job
        assert time.monotonic() < limit and run.poll() is None
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and undisturbed.wait() == 0
    had = len(read(path).rows)
    assert 80 <= had < 240
    begun = len(log.read_text().split())
    assert evaluation(path, log, 0).wait() == 0
    assert path.read_bytes() == whole.read_bytes()
    assert len(log.read_text().split()) - begun == 10 - had // 24  # only the jobs whose rows were not there


ACCELERATED = """
import sys, time, torch
from accelerate import PartialState
from tensorlens_utils import load_data, load_model
from tensorlens_utils.baselines import METHODS
from tensorlens_utils.perturbation import evaluate

path, state = sys.argv[1], PartialState(cpu=True)
torch.set_num_threads(1)  # accelerate has just set as many as there are cores, in each process
model, processor = load_model("tiny-bert", dtype="float64", device=state.device)

def noted(name):
    def scores(*given):
        with open(f"{path}.{state.process_index}", "a") as stream:
            stream.write(name + chr(10))
        time.sleep(0.05)  # so that no process is through before the other begins
        return METHODS[name](*given)
    return scores

state.wait_for_everyone()
evaluate(model, processor, load_data("reviews").select(range(24)), {m: noted(m) for m in ("random", "rollout")},
         removers=["mask", "drop"], path=path, batch_size=4, progress=False)
"""


def test_two_processes_of_accelerate_give_the_table_of_one(tmp_path):
    script, path = tmp_path / "perturb.py", tmp_path / "table.jsonl"
    script.write_text(ACCELERATED)
    # as `accelerate launch` starts them where there are GPUs; its debug_launcher is tested in test_results.py
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                            script, path])
    model, processor = loaded("tiny-bert")
    methods = {name: baselines.METHODS[name] for name in ("random", "rollout")}
    one = evaluate(model, processor, load_data("reviews").select(range(24)), methods, removers=["mask", "drop"],
                   batch_size=4, progress=False)
    assert two.wait() == 0 and read(path) == one and len(one.rows) == 24 * 2 * 2 * 3
    done = [log.read_text().split() for log in tmp_path.glob("table.jsonl.[01]")]
    assert len(done) == 2 and sum(map(len, done)) == 12, done  # both worked, and nothing was done twice


def test_a_method_can_be_added_to_a_table_and_other_settings_are_refused(tmp_path):
    calls, path = [], tmp_path / "table.jsonl"
    counted = {m: (lambda *given, m=m: calls.append(m) or METHODS[m](*given)) for m in METHODS}
    run("tiny-vit", {"content": counted["content"]}, path=path)
    table = run("tiny-vit", counted, path=path)
    assert calls == ["content", "gradient"] and table == run("tiny-vit", METHODS) == read(path)
    for other, what in (({"fractions": [0, 1]}, "fractions"), ({"removers": ["blur"]}, "removers"),
                        ({"dataset": data("tiny-vit", 8)}, "data"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"rows of one setting.*{what} was .*another path"):
            run("tiny-vit", METHODS, path=path, **other)
    model, processor = load_model("tiny-vit", dtype="float64", revision="step100")
    with pytest.raises(ValueError, match="model was 'ViTForImageClassification"):
        evaluate(model, processor, data("tiny-vit"), METHODS, removers=["zero"], path=path)


def test_chance_is_seeded_for_each_batch_and_left_as_it_was():
    def chance(model, inputs, target):
        return torch.rand(len(target), 16)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    table = run("tiny-vit", {"chance": chance}, batch_size=3)
    assert torch.equal(before, torch.get_rng_state())
    beside = run("tiny-vit", {"content": by_content, "chance": chance}, batch_size=3)
    assert table.rows == beside.where(method="chance")
    assert table.rows != run("tiny-vit", {"chance": chance}, batch_size=3, seed=5).rows


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("options", "message"), [
    ({"removers": ["mask"]}, "The remover is one of 'zero', 'mean', 'blur', 'grey'; 'mask' is none"),
    ({"orders": ["most"]}, "The order is one of 'morf', 'lerf', 'insert'; 'most' is none"),
    ({"fractions": [0.1, 1]}, "Fractions rise from 0"), ({"fractions": [0, 0.5, 0.5]}, "Fractions rise from 0"),
    ({"fractions": [0, 2]}, "at most 1"), ({"target": "class"}, "The target is one of 'prediction', 'image', 'label'"),
    ({"target": "row"}, "Targets are whole numbers from 0 to 9"), ({"column": "text"}, "The column is one of 'image'"),
    ({"target": "runner-up"}, "The target is one of 'prediction'.*'runner-up' is none"),
    ({"target": ("prediction", "class")}, "target's rival is one of 'prediction', 'runner-up'.*'class' is none"),
    ({"target": ("prediction", "prediction")}, "contrast is of two outputs, and 'prediction' and .* 9 of 9 examples"),
    ({"methods": {"short": lambda *_: torch.ones(9, 15)}}, r"score for each token, \(9, 16\); 'short' gave \(9, 15\)"),
    ({"methods": {"nan": lambda *_: torch.full((9, 16), torch.nan)}}, "'nan' gave .* 144 of them not finite")])
def test_what_cannot_be_evaluated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run("tiny-vit", **({"methods": METHODS} | options))


def test_a_tokenizer_without_the_token_is_refused():
    with pytest.raises(ValueError, match='"mask" puts a token .* has no mask_token.*"drop" needs none'):
        run("tiny-gpt", METHODS, removers=["mask"])


def test_images_that_patches_do_not_cover_are_refused():
    model, processor = loaded("tiny-vit")
    with pytest.raises(ValueError, match=r"Patches of \(2, 2\) cover an image.*\(8, 9\)"):
        removable(model, processor, {"pixel_values": torch.zeros(1, 1, 8, 9)})


def test_what_cannot_be_read_off_a_table_is_refused():
    table = run("tiny-vit", METHODS, removers=["zero", "mean"], orders=["morf"])
    with pytest.raises(ValueError, match="several removers, zero, mean: name one"):
        curves(table, "logit", order="morf")
    with pytest.raises(ValueError, match="The order is one of 'morf'; 'lerf' is none"):
        curves(table, "logit", order="lerf", remover="zero")
    with pytest.raises(ValueError, match="The measure is one of 'accuracy'"):
        curves(table, "loss", order="morf", remover="zero")
    unfinished = Table(table.key, table.settings, table.rows[:-1])
    with pytest.raises(ValueError, match="same examples.*'content': 9, 'gradient': 8"):
        curves(unfinished, "logit", order="morf", remover="zero")
    for given in (([1, 0], [0.1, 1]), ([1, 0, 0], [0, 1])):
        with pytest.raises(ValueError, match="An area takes a value for each fraction"):
            area(*given)
    with pytest.raises(ValueError, match="up to one of them"):
        area([1, 0.5, 0], [0, 0.5, 1], upto=0.3)
