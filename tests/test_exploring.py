"""Explorers: what a menu sets is what is shown, with the numbers of the rooms below; a still where no kernel runs."""

import base64
import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from families import FAMILIES
from matplotlib.figure import Figure
from matplotlib.image import imread
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook

from tensorlens_utils import baselines, collapse, explore, linearize, load_data, load_model
from tensorlens_utils.collapse import class_map, collapsed
from tensorlens_utils.menus import Explorer
from tensorlens_utils.notebooks import main, normal, text_of
from tensorlens_utils.perturbation import area, curves, evaluate
from tensorlens_utils.plotting import DIVERGING

TEXTS = ["the plot was far from dull .", "the plot was moving , but above all the film was dull ."]


# ------------------------------------------------------------------------------------------------------------ the menus


def dots(n):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(range(n + 1), "o")
    return figure


def toy(render=lambda pet, n: f"{pet} {n}", still=lambda pet, n: dots(n)):
    """A menu of its own, and one that follows it."""
    menus = {"pet": ["cat", "dog", "cow"], "n": lambda pet: [1, 2] if pet == "cow" else [("one", 1), ("three", 3)]}
    return Explorer(menus, render, still, "a pet")


def test_a_menu_changes_the_picture_and_those_that_follow_it():
    made = []
    board = toy(lambda pet, n: made.append((pet, n)) or f"{pet} {n}")
    assert board.view.value == "cat 1"
    board.controls["n"].value = 3
    board.controls["pet"].value = "dog"  # the same options: the choice stays
    assert board.view.value == "dog 3" and board.choices == {"pet": "dog", "n": 3}
    board.controls["pet"].value = "cow"  # others: the first
    assert board.view.value == "cow 1" and board.controls["n"].options == (1, 2)
    assert made == [("cat", 1), ("cat", 3), ("dog", 3), ("cow", 1)], "one picture for each choice"


def test_the_menus_are_disabled_while_the_picture_is_made():
    seen = []

    def render(pet, n):
        seen.append([control.disabled for control in board.controls.values()] if n == 3 else None)
        assert n != 3 or "computing" in board.status.value
        return ""

    board = toy(render)
    board.controls["n"].value = 3
    assert seen == [None, [True, True]] and not any(c.disabled for c in board.controls.values())
    assert board.status.value == ""


@pytest.mark.parametrize("error", [ZeroDivisionError("5 < 7 > 3"), KeyboardInterrupt("5 < 7 > 3")])
def test_an_error_is_shown_and_passes(error):
    def render(pet, n):
        if pet == "dog":
            raise error
        return f"{pet} {n}"

    board = toy(render, lambda pet, n: render(pet, n) and dots(n))
    board.controls["pet"].value = "dog"
    shown = board.status.value
    assert type(error).__name__ in shown and "5 &lt; 7 &gt; 3" in shown and "in render" in shown
    assert board.view.value == "" and not any(c.disabled for c in board.controls.values())
    assert board._repr_mimebundle_()["image/png"], "the still is of what was shown last"
    board.controls["pet"].value = "cow"
    assert board.view.value == "cow 1" and board.status.value == ""


def test_an_error_in_the_first_picture_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        toy(lambda pet, n: 1 // 0)
    with pytest.raises(ValueError, match="one option at least, and 'n' has none for {'pet': 'cat'}"):
        Explorer({"pet": ["cat"], "n": lambda pet: []}, lambda **choices: "", dots, "nothing")


def test_the_bundle_has_the_view_a_still_and_a_fixed_text():
    mpl.rcParams["lines.linewidth"] = 7
    board = toy()
    first = board._repr_mimebundle_()
    assert first.keys() == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    assert first["application/vnd.jupyter.widget-view+json"]["model_id"] == board.model_id
    assert board._repr_mimebundle_() == first and mpl.rcParams["lines.linewidth"] == 7
    board.controls["n"].value = 3
    later = board._repr_mimebundle_()
    assert later["text/plain"] == first["text/plain"] and later["image/png"] != first["image/png"]
    picture = imread(io.BytesIO(base64.b64decode(later["image/png"])))
    assert picture.shape == (100, 200, 4) and picture.std() > 0.05
    mpl.rcdefaults()


CELL = """from matplotlib.figure import Figure
from tensorlens_utils.menus import Explorer

def still(n):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(range(n + 1))
    return figure

board = Explorer({"n": [1, 2]}, lambda n: f"<b>{n}</b>", still, "a number")
board"""


def test_a_notebook_is_run_unattended_kept_compared_and_published(tmp_path):
    """`make` twice, nbval on what it wrote, nbconvert: the still is in the notebook, the widget's state is not."""
    cells = [new_code_cell("points = 3", metadata={"tags": ["parameters"]}), new_code_cell(CELL)]
    for folder in ("notebooks", "tests"):
        (tmp_path / folder).mkdir()
    config = Path(__file__).with_name("nbval_sanitize.cfg")
    (tmp_path / "tests" / config.name).write_text(config.read_text())
    (tmp_path / "notebooks" / "parameters.toml").write_text("[01_toy.tiny]\npoints = 3\n[01_toy.paper]\npoints = 3\n")
    path = tmp_path / "notebooks" / "01_toy.ipynb"
    path.write_text(text_of(normal(new_notebook(cells=cells))))
    assert main(["--root", str(tmp_path)]) == 0
    kept = path.read_bytes()
    (output,) = nbformat.reads(kept.decode(), 4).cells[1].outputs
    assert output.data.keys() == {"text/plain", "image/png"} and b"widget" not in kept
    (tmp_path / "build" / "nb" / "01_toy.json").unlink()
    assert main(["--root", str(tmp_path)]) == 0 and path.read_bytes() == kept
    page, _ = HTMLExporter().from_notebook_node(nbformat.reads(kept.decode(), 4))
    assert output.data["image/png"] in page
    nbval = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider",
             f"--nbval-sanitize-with={config}", str(path)]  # fmt: skip
    done = subprocess.run(nbval, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


# ------------------------------------------------------------------------------------------------------- attributions


@pytest.fixture(scope="module")
def bert():
    return load_model("tiny-bert")


@pytest.fixture(scope="module")
def vit():
    return load_model("tiny-vit")


@pytest.fixture(scope="module")
def gpt():
    return load_model("tiny-gpt")


def scores(board):
    """The numbers in the tooltips, and the colours: (L,), (L, 2) of red and opacity."""
    html = board.view.value
    titles = re.findall(r'title="([^"]+)">|<title>([-+\d.]+)</title>', html)
    colours = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", html)
    return np.array([float(a or b) for a, b in titles]), np.array(colours, dtype=float)


def said(board):
    return re.sub(r"<[^>]+>", " ", board.view.value.replace("\N{MINUS SIGN}", "-"))


def agrees(board, expected):
    """That the coloured text or image shows these scores (L,), the red ones above zero and the largest the fullest."""
    expected = torch.as_tensor(expected).detach().double().numpy()
    shown, colours = scores(board)
    np.testing.assert_allclose(shown, expected, atol=5.1e-4)
    assert ((colours[:, 0] == 178) == (expected > 0)).all()
    np.testing.assert_allclose(colours[:, 1], 0.75 * abs(expected) / abs(expected).max(), atol=2e-3)


@pytest.mark.parametrize("method", ["class", "in_out", "norm", "rollout", "chefer", "integrated gradients"])
def test_a_text_is_coloured_by_the_method_that_is_chosen(bert, method):
    model, tokenizer = bert
    board = explore(model, tokenizer, TEXTS)
    board.controls["method"].value, board.controls["example"].index = method, 1
    inputs = tokenizer(TEXTS[1], return_tensors="pt")
    target = model(**inputs).logits.argmax(1)
    agrees(board, (collapse.METHODS | baselines.METHODS)[method](model, inputs, target)[0])
    assert re.findall(r'<span style="[^"]*" title="[^"]*">([^<]*)<', board.view.value)[1:-1] == TEXTS[1].split()
    assert board.status.value == "" and f"{method}" in said(board)


def test_the_sum_is_shown_where_it_is_one(bert):
    model, tokenizer = bert
    board = explore(model, tokenizer, TEXTS)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    split, logit = class_map(linearize(model, inputs)), float(model(**inputs).logits.detach().max())
    assert f"logit {logit:+.2f} = {float(split.scores.sum()):+.2f} of the tokens {float(split.bias):+.2f} of the bias" \
        in said(board)  # fmt: skip
    gap = float(re.search(r"logit by (\S+) of what was added up", said(board))[1])
    assert gap <= 1e-6, "measured: 3e-8"
    board.controls["method"].value = "in_out"
    split = collapsed("in_out", model, inputs)
    assert f"‖Y‖² {float(split.total):+.2f} = {float(split.scores.sum()):+.2f} of the tokens" in said(board)
    board.controls["method"].value = "norm"
    assert f"no exact split: logit {logit:+.2f}, scores {float(scores(board)[0].sum()):+.2f} in sum" in said(board)


@pytest.mark.parametrize("method", ["class", "in_out", "in"])
def test_a_map_of_the_tensor_is_read_at_a_boundary(vit, method):
    model, processor = vit
    images = load_data("digits").select(range(2))
    board = explore(model, processor, images)
    assert list(board.controls["example"].options) == ["image 0", "image 1"] and "text" not in board.controls
    board.controls["method"].value, board.controls["layer"].value = method, 2
    inputs = processor(images[:1]["image"], return_tensors="pt")
    given = collapsed(method, model, inputs, model(**inputs).logits.argmax(1), at=2)
    agrees(board, getattr(given, "scores", given)[0, 1:])  # what the class token holds by then is no patch
    assert "before block 2" in said(board)
    if method != "in":
        for part, whose in [(given.scores[0, 1:].sum(), "patches"), (given.scores[0, 0], "class token"),
                            (given.bias[0], "bias")]:  # fmt: skip
            assert f"{float(part):+.2f} of the {whose}" in said(board)


def test_a_method_without_layers_says_so(vit):
    board = explore(*vit, load_data("digits")[:1]["image"])
    assert [value for _, value in board.controls["layer"].options] == ["tokens", 0, 1, 2, 3, 4]
    board.controls["layer"].value = 4
    assert "0.00 of the patches" in said(board), "at the end all is in the class token"
    board.controls["method"].value = "rollout"
    assert board.controls["layer"].label == "none, no map of the tensor"
    board.controls["method"].value = "class"
    assert board.controls["layer"].value == "tokens"


def test_a_contrast_is_the_map_of_a_model_that_answers_with_it(vit):
    """The reference has one class, whose row of weights is the difference of two."""
    model, processor = vit
    image = load_data("digits")[3]["image"]
    inputs = processor([image], return_tensors="pt")
    a, b = model(**inputs).logits[0].topk(2).indices.tolist()
    one = copy.deepcopy(model)
    one.classifier = torch.nn.Linear(model.config.hidden_size, 1)
    with torch.no_grad():
        one.classifier.weight.copy_(model.classifier.weight[a] - model.classifier.weight[b])
        one.classifier.bias.copy_(model.classifier.bias[a] - model.classifier.bias[b])
    board = explore(model, processor, [image])
    board.controls["target"].value = (a, b)
    difference = float(one(**inputs).logits.detach())
    assert f"difference of logits {difference:+.2f} = " in said(board) and f"“{a} less {b}”" in said(board)
    names = ["class", "in_out", "chefer", "attention × gradient", "integrated gradients", "feature ablation"]
    methods = collapse.METHODS | baselines.METHODS
    for name in names:
        board.controls["method"].value = name
        agrees(board, methods[name](one, inputs, torch.tensor([0]))[0])
    assert model(**inputs).logits.shape == (1, 10), "the model has its own logits again"


def test_what_the_targets_are(bert, gpt):
    board = explore(*bert, TEXTS)
    assert [value for _, value in board.controls["target"].options] == [(1,), (0,), (1, 0)]
    board.controls["example"].index = 1
    assert board.controls["target"].value == (0,) and "negative (" in board.controls["target"].label
    model, tokenizer = gpt
    board = explore(model, tokenizer, ["the capital of france is"], targets=["rome", ("paris", "rome")], top=2)
    labels = [label.split(" (")[0] for label, _ in board.controls["target"].options]
    assert labels[0] == "paris" and labels[2:] == [f"paris less {labels[1]}", "rome", "paris less rome"]
    rome, paris = (tokenizer.convert_tokens_to_ids(word) for word in ("rome", "paris"))
    board.controls["target"].value = (paris, rome)
    inputs = tokenizer("the capital of france is", return_tensors="pt")
    w = torch.zeros(1, model.config.vocab_size)
    w[0, paris], w[0, rome] = 1, -1
    agrees(board, class_map(linearize(model, inputs), w).scores[0])


def test_a_method_that_takes_no_notice_of_the_target_is_told(bert):
    board = explore(*bert, TEXTS)
    for method, heeds in {"rollout": False, "class": True, "norm": False, "gradient × input": True}.items():
        board.controls["method"].value, board.controls["target"].value = method, (1,)
        board.controls["target"].value = (0,)
        assert (f"{method} takes no notice of the target: “positive” has the same map" in said(board)) != heeds


@pytest.mark.parametrize("name, column", [("bert", "text"), ("vit", "image")])
def test_the_curves_are_those_of_perturbation(name, column, request):
    model, processor = request.getfixturevalue(name)
    data = load_data("reviews" if column == "text" else "digits").select([3])
    board = explore(model, processor, data, {"rollout": baselines.rollout})
    for remover in board.controls["remover"].options:
        board.controls["remover"].value = remover
        table = evaluate(model, processor, data, {"m": baselines.rollout}, removers=[remover])
        for order, words in (("morf", "most"), ("lerf", "least")):
            value = float(area(curves(table, "probability", order=order)["m"], table.settings["fractions"])[0])
            shown = float(re.search(rf"{words} relevant first: area (\S+)", said(board))[1])
            assert shown == pytest.approx(value, abs=5.1e-3)
    assert board.controls["remover"].options[0] == ("mask" if name == "bert" else "zero")


def test_the_curve_of_a_contrast_is_of_its_value(bert):
    """It begins at the difference of the logits, and ends at that of the empty text."""
    model, tokenizer = bert
    board = explore(model, tokenizer, TEXTS[:1])
    board.controls["target"].value = (1, 0)
    maps = board._render.__self__
    curve = maps.curve((board.choices["example"], ""), (1, 0), "class", "tokens", "mask")
    empty = tokenizer(" ".join(["[MASK]"] * 7), return_tensors="pt")
    for at, inputs in ((0, tokenizer(TEXTS[0], return_tensors="pt")), (-1, empty)):
        y = model(**inputs).logits[0].detach()
        np.testing.assert_allclose(curve[:, at], float(y[1] - y[0]), atol=1e-5)
    assert "difference of logits" in said(board) and curve.shape == (2, 11)


def test_a_text_can_be_typed_and_goes_when_an_example_is_chosen(gpt):
    model, tokenizer = gpt
    board = explore(model, tokenizer, {"france": "the capital of france is", "peru": "the capital of peru is"})
    assert board.controls["target"].label.startswith("paris") and board.controls["remover"].value == "drop"
    before = board.view.value
    board.controls["text"].value = "  the capital of italy is "
    assert board.controls["target"].label.startswith("rome") and board.view.value != before and "italy" in said(board)
    inputs = tokenizer("the capital of italy is", return_tensors="pt")
    agrees(board, class_map(linearize(model, inputs)).scores[0])
    board.controls["example"].value = "peru"
    assert board.controls["text"].value == "" and "peru" in said(board) and "italy" not in said(board)
    board.controls["text"].value = "rome " * 500  # is cut, as everywhere, at the tokenizer's limit
    assert board.status.value == "" and len(scores(board)[0]) == tokenizer.model_max_length


def test_what_was_computed_is_remembered_and_drawn_from_one_seed(bert):
    calls = []

    def method(model, inputs, target):
        calls.append(int(target))
        assert not model.training
        return torch.rand(inputs["input_ids"].shape)

    model, tokenizer = bert
    state = torch.manual_seed(7).get_state()
    model.train()
    try:
        board = explore(model, tokenizer, TEXTS, {"mine": method, "again": method})
        for control, index in [("target", 1), ("example", 1), ("remover", 1), ("example", 0), ("target", 1)]:
            board.controls[control].index = index
        assert calls == [1, 0, 0] and model.training and torch.equal(torch.get_rng_state(), state)
        first = scores(board)[0]
        torch.manual_seed(8)
        board.controls["method"].value = "again"
        np.testing.assert_array_equal(scores(board)[0], first)
    finally:
        model.eval()


@pytest.mark.parametrize("family, prefix", [("deit", "other tokens"), ("vit", "class token")])
def test_positions_before_the_patches_have_their_share(family, prefix):
    model, inputs = FAMILIES[family]()

    def processor(image, return_tensors):
        return {"pixel_values": inputs["pixel_values"][:1]}

    board = explore(model, processor, [None], {"class": collapse.METHODS["class"]}, top=1)
    assert prefix not in said(board)
    board.controls["layer"].value = 1
    split = class_map(linearize(model, {"pixel_values": inputs["pixel_values"][:1]}, at=1))
    assert len(scores(board)[0]) == 4 and f"{float(split.scores[0, :-4].sum()):+.2f} of the {prefix}" in said(board)


# ------------------------------------------------------------------------------------------------------- what is still


def test_the_still_of_a_text_has_its_words_their_scores_and_the_sum(bert):
    model, tokenizer = bert
    board = explore(model, tokenizer, TEXTS)
    board.controls["example"].index = 1
    figure = board._still(**board.choices)
    split = class_map(linearize(model, tokenizer(TEXTS[1], return_tensors="pt")))
    words = [t.get_text() for t in figure.axes[0].texts if t.get_text()]
    assert [w.split("\n")[0] for w in words] == ["[CLS]", *TEXTS[1].split(), "[SEP]"]
    shown = [float(w.split("\n")[1].replace("\N{MINUS SIGN}", "-")) for w in words]
    np.testing.assert_allclose(shown, split.scores[0], atol=5.1e-3)
    assert f"logit +{float(split.total):.2f} = " in figure.get_suptitle() and len(figure.axes[1].lines) == 2
    picture = imread(io.BytesIO(base64.b64decode(board._repr_mimebundle_()["image/png"])))
    assert picture.shape[1] == 675 and 200 < len(picture) < 400 and picture.std() > 0.05


def test_a_dollar_is_no_formula(bert):
    board = explore(*bert, TEXTS, {"$x_{$": collapse.METHODS["class"]})
    maps = board._render.__self__
    maps.case((board.choices["example"], "")).shown["tokens"][1] = "$x_{$ & <b>"
    assert board._repr_mimebundle_()["image/png"]
    board.controls["target"].index = 1
    assert "$x_{$ &amp; &lt;b&gt;" in board.view.value and board.status.value == ""


def test_the_still_of_an_image_has_its_patches(vit):
    board = explore(*vit, load_data("digits").select(range(2)))
    image, patches, curve = board._still(**board.choices).axes
    assert image.images[0].get_array().shape == (8, 8) and len(curve.lines) == 2
    np.testing.assert_allclose(patches.images[0].get_array().ravel(), scores(board)[0], atol=5.1e-4)


def test_the_still_of_a_long_text_keeps_to_its_beginning(gpt):
    board = explore(*gpt, ["the capital of france is " * 30])
    figure = board._still(**board.choices)
    assert len([t for t in figure.axes[0].texts if t.get_text()]) == 96 and figure.get_figheight() < 8
    board.controls["method"].value = "norm"  # without a negative score: red all the same, as in the live text
    assert board._still(**board.choices).axes[0].images[0].cmap.name == DIVERGING


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("change, error", [
    ({"examples": []}, "one or more, in a list or by name"),
    ({"examples": TEXTS[0]}, "one or more, in a list or by name"),
    ({"methods": {}}, "methods must hold one at least"),
    ({"targets": ["good"]}, "target must be one of 'negative', 'positive'; not 'good'"),
    ({"targets": [2]}, "one of the model's 2 outputs; 2 is none"),
    ({"examples": [["a film", "a plot"]]}, "an example is one text or image"),
    ({"methods": {"short": lambda model, inputs, target: torch.zeros(1, 3)}}, r"\(1, 9\); 'short' gave \(1, 3\)"),
    ({"methods": {"nan": lambda model, inputs, target: torch.full((1, 9), torch.nan)}}, "9 of them not finite"),
])  # fmt: skip
def test_impossible_requests_are_refused(bert, change, error):
    with pytest.raises(ValueError, match=error):
        explore(**{"model": bert[0], "processor": bert[1], "examples": TEXTS, **change})


def test_a_model_without_an_answer_is_refused(bert):
    with pytest.raises(ValueError, match="an attribution explains a logit, and BertModel has none"):
        explore(bert[0].bert, bert[1], TEXTS)


def test_a_method_that_fails_leaves_model_and_menus_as_they_were(bert):
    model, tokenizer = bert

    def fails(model, inputs, target):
        raise RuntimeError("no attention here")

    board = explore(model, tokenizer, TEXTS, {"class": collapse.METHODS["class"], "fails": fails})
    board.controls["target"].value = (1, 0)
    board.controls["method"].value = "fails"
    assert "RuntimeError: no attention here" in board.status.value and board.view.value == ""
    assert model(**tokenizer(TEXTS[0], return_tensors="pt")).logits.shape == (1, 2), "no hook is left"
    board.controls["method"].value = "class"
    assert "positive less negative" in said(board)
