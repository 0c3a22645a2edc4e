"""The explorer of heads: what the menus choose is shown, with the numbers of lenses; a still where no kernel runs."""

import base64
import functools
import html
import io
import re

import numpy as np
import pytest
from matplotlib.image import imread

from tensorlens_utils import load_data, load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses import unembedding
from tensorlens_utils.lenses.exploring import explore_heads
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.training import train

TEXTS = ["the capital of france is", "the capital of peru is"]


@functools.cache
def two():
    model, tokenizer = load_model("tiny-gpt")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    text = [heads.capture({"input_ids": world.Text(seed).rows(2)}, scale=True) for seed in range(6)]
    m = Moments.of(text)
    return {"lens": train(heads, text, steps=0, moments=m, progress=False), "unembedding": unembedding(heads, m)}


def board(lenses=None, examples=TEXTS, **options):
    return explore_heads(lenses or two(), examples, **options)


def grid(shown):
    """What the cells of the grid say, layer by layer: [[(word, tooltip, how blue, whether framed)]]."""
    rows = re.findall(r"<tr>(.*?)</tr>", shown.view.value, re.S)
    cell = r'<td title="(.*?)" style="border:(.).*?,([\d.]+)\)">(.*?)</td>'
    return [[(html.unescape(word), html.unescape(told), float(blue), border == "2")
             for told, border, blue, word in re.findall(cell, row, re.S)] for row in rows]  # fmt: skip


def beside(shown):
    """The columns under the grid: {title: [(word, number)]}."""
    parts = re.findall(r'<div style="flex:1 1 150px"><b>(.*?)</b>(.*?</div>)</div>', shown.view.value, re.S)
    return {html.unescape(title): [(html.unescape(word), number) for word, number in
                                   re.findall(r">([^<>]*) <small[^>]*>(.*?)</small>", column)]
            for title, column in parts}  # fmt: skip


@pytest.mark.parametrize("show", ["probability", "against its mean"])
@pytest.mark.parametrize("name", ["lens", "unembedding"])
def test_the_grid_and_the_columns_are_what_the_lenses_say(name, show):
    shown, said = board(k=5), show != "probability"
    shown.controls["lens"].value, shown.controls["show"].value, shown.controls["head"].value = name, show, (2, 3)
    expected, cells = two()[name].grid(TEXTS[0], k=5, said=said), grid(shown)
    assert [[word for word, *_ in row] for row in cells] == [[head[0][0] for head in row] for row in expected]
    title = "the word that each head raises most" if said else "the first word of each head"
    assert f"<div>{name}: {title}, by layer" in shown.view.value
    assert shown._still(**shown.choices).axes[0].get_title() == f"{name}: {title}"
    assert [(r, c) for r, row in enumerate(cells) for c, cell in enumerate(row) if cell[3]] == [(2, 3)]
    first = np.array([[head[0][1] for head in row] for row in expected])
    blue = np.array([[blue for *_, blue, _ in row] for row in cells])
    assert blue == pytest.approx(0.6 * first / first.max(), abs=1e-3)

    columns = beside(shown)
    assert [title.split(",")[0] for title in columns] == ["lens", "unembedding", "the model itself"]
    for title, words in columns.items():
        if lens := two().get(title.split(",")[0]):
            wanted = lens.top_tokens(TEXTS[0], 2, 3, k=5, said=said)
            assert words == [(word, f"{x:+.2f}" if said else f"{x:.3f}") for word, x in wanted]
            kl = float(lens.kl(lens.capture(TEXTS[0]))[2 * 8 + 3, -1])
            assert title.endswith(f", KL {kl:.2f} nats")
            assert all(f"{word} {x}" in cells[2][3][1] for word, x in words), "the tooltip has them, too"
    assert columns["the model itself"][0][0] == "paris"


def test_a_position_is_chosen_and_a_text_typed():
    shown = board()
    assert shown.controls["position"].options[0] == ("5: is", 5) and "at “is”" in shown.view.value
    shown.controls["position"].value = 2
    assert "at “capital”" in shown.view.value
    expected = two()["lens"].grid(TEXTS[0], position=2)
    assert [word for word, *_ in grid(shown)[0]] == [head[0][0] for head in expected[0]]
    shown.controls["text"].value = "the capital of spain is"
    assert shown.controls["position"].value == 5, "other tokens: the last of them"
    assert next(iter(beside(shown)["the model itself"]))[0] == "madrid"
    shown.controls["example"].value = "1: the capital of peru is"
    assert shown.controls["text"].value == "" and beside(shown)["the model itself"][0][0] == "lima"


def test_what_was_computed_is_remembered(monkeypatch):
    runs, capture = [], Heads.capture
    monkeypatch.setattr(Heads, "capture", lambda *args, **options: runs.append(1) or capture(*args, **options))
    shown = board()
    for head in ((1, 2), (3, 7)):
        shown.controls["head"].value = head
    shown.controls["position"].value = 1
    assert len(runs) == 1


def test_the_still_is_a_picture_of_what_is_chosen():
    shown = board()
    before = shown._repr_mimebundle_()
    assert before["text/plain"].startswith("[interactive: choose the text, position, lens and head")
    picture = imread(io.BytesIO(base64.b64decode(before["image/png"])))
    assert picture.shape[1] == 675 and picture.std() > 0.1
    shown.controls["head"].value = (3, 0)
    assert shown._repr_mimebundle_()["image/png"] != before["image/png"]
    assert board()._repr_mimebundle_()["image/png"] == before["image/png"]


def test_words_that_are_no_words_for_a_page_or_a_formula():
    model, tokenizer = load_model("tiny-gpt")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    lens = two()["lens"]
    odd = type(lens)(heads, lens.family, lens.about)
    odd.words = lambda ids: [odd.words(i) for i in ids] if ids.dim() else ["<b>&", "$x$ $", "Ġa", "▁a"][int(ids) % 4]
    shown = board({"<lens>": odd}, k=4)
    assert {word for row in grid(shown) for word, *_ in row} <= {"<b>&", "$x$ $", "␣a"}
    assert "<b>&<" not in shown.view.value and "<lens>" not in shown.view.value
    shown._repr_mimebundle_()


def test_a_model_with_more_logits_than_tokens_is_explored():
    model, tokenizer = load_model("tiny-gpt")
    model.resize_token_embeddings(960, mean_resizing=False)
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    text = [{"input_ids": world.Text(seed).rows(2)} for seed in range(4)]
    shown = board({"lens": train(heads, text, steps=0, warm=3, progress=False)}, k=960)
    assert "[953]" in {word for words in beside(shown).values() for word, _ in words}


def test_images_are_read_into_labels():
    model, processor = load_model("tiny-vit")
    images = load_data("digits")[:20]["image"]
    heads = Heads(model, processor(images[:1], return_tensors="pt"), processor)
    text = [heads.capture(processor(images[i:i + 5], return_tensors="pt")) for i in range(0, 20, 5)]
    shown = board({"lens": train(heads, text, steps=0, warm=3, progress=False)}, images[:2])
    assert [*shown.controls] == ["example", "position", "lens", "head", "show"]
    assert shown.controls["position"].value == heads.capture(processor(images[:1], return_tensors="pt")).position.max()
    assert {word for row in grid(shown) for word, *_ in row} <= {*model.config.id2label.values()}
    assert len(beside(shown)["the model itself"]) == 8 and shown._repr_mimebundle_()["image/png"]


def test_refusals():
    with pytest.raises(ValueError, match="one or more of one model's heads.*of 0"):
        explore_heads({}, TEXTS)
    with pytest.raises(ValueError, match="examples are texts or images, one or more"):
        board(examples=[])
    model, tokenizer = load_model("tiny-gpt")
    other = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    lens = two()["lens"]
    with pytest.raises(ValueError, match="of 2 such objects"):
        board({"one": lens, "other": type(lens)(other, lens.family, lens.about)})
    with pytest.raises(ValueError, match="examples are texts"):
        board(examples="the capital of france is")
