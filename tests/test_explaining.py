"""`explain`: the same split as the class map's, said in tokens, colours and one sum."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tensorlens_utils import explain, linearize, load_data, load_model
from tensorlens_utils.collapse import class_map

TEXT = "the plot was far from dull ."


@pytest.fixture(scope="module")
def bert():
    return load_model("tiny-bert")


def colours(html):
    """(red, green, blue, opacity) of every coloured token or patch."""
    return [tuple(map(float, found)) for found in re.findall(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", html)]


def test_a_text_is_split_by_the_class_map(bert):
    model, tokenizer = bert
    split = explain(model, TEXT, tokenizer)
    truth = class_map(linearize(model, tokenizer(TEXT, return_tensors="pt")), torch.tensor([1]))
    assert torch.equal(split.scores, truth.scores[0]) and split.bias == float(truth.bias)
    assert split.tokens == ["[CLS]", *TEXT.split(), "[SEP]"] and split.target == "positive"
    assert abs(float(split.scores.sum()) + split.bias - split.total) < 1e-5
    share = abs(split.bias) / (split.scores.abs().sum().item() + abs(split.bias))
    assert split.bias_share == pytest.approx(share)


def test_a_model_comes_by_name_and_finds_its_own_processor(bert):
    by_name = explain("tiny-bert", TEXT)
    assert torch.equal(by_name.scores, explain(bert[0], TEXT).scores)
    assert repr(by_name) == repr(explain(*[bert[0], TEXT, bert[1]]))


def test_a_target_by_number_name_and_contrast(bert):
    model, tokenizer = bert
    negative, positive = (explain(model, TEXT, tokenizer, target=c) for c in ("negative", 1))
    both = explain(model, TEXT, tokenizer, target=("positive", "negative"))
    assert (negative.target, both.target) == ("negative", "positive less negative")
    assert both.total == pytest.approx(positive.total - negative.total, abs=1e-5)
    torch.testing.assert_close(both.scores, positive.scores - negative.scores, atol=1e-5, rtol=0)


def test_a_language_model_is_asked_for_its_next_token():
    model, tokenizer = load_model("tiny-gpt")
    split = explain(model, "the capital of france is", tokenizer)
    assert split.target == "paris" and split.tokens[1:] == "the capital of france is".split()
    assert explain(model, "the capital of france is", tokenizer, target="paris").total == split.total
    contrast = explain(model, "the capital of france is", tokenizer, target=("paris", "rome"))
    assert contrast.target == "paris less rome" and contrast.total > 0


def test_the_text_is_coloured_by_sign_and_size_and_the_sum_is_shown(bert):
    split = explain(*[bert[0], TEXT, bert[1]])
    html = split._repr_html_()
    found = colours(html)
    assert len(found) == 9
    for (red, _, blue, opacity), score in zip(found, split.scores.tolist(), strict=True):
        assert (red > blue) == (score > 0)
        assert opacity == pytest.approx(0.75 * abs(score) / split.scores.abs().max().item(), abs=1e-3)
    for number in (split.total, float(split.scores.sum()), split.bias):
        assert f"{number:+.2f}".replace("-", "−") in html
    assert f"{split.bias_share:.0%}" in html and "<script" not in html


def test_what_a_token_holds_is_escaped(bert):
    model, tokenizer = bert
    split = explain(model, TEXT, tokenizer)
    split.tokens[1] = "<img onerror=x>"
    assert "<img onerror" not in split._repr_html_() and "&lt;img onerror" in split._repr_html_()


def test_an_image_is_drawn_as_the_model_sees_it_under_its_patches():
    model, processor = load_model("tiny-vit")
    image = load_data("digits")[0]["image"]
    split = explain(model, image, processor)
    html = split._repr_html_()
    assert split.grid == (4, 4) and split.target == "4" and split.tokens[5] == "patch 1,1"
    pictures = re.findall(r"base64,([^\"]+)\"", html)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))), dtype=float)
    raw = np.asarray(image, dtype=float)
    assert len(pictures) == 2 and shown.shape == (8, 8)
    np.testing.assert_allclose(shown, (raw - raw.min()) / (raw.max() - raw.min()) * 255, atol=0.51)
    cells = re.findall(r'<rect x="(\d)" y="(\d)"[^>]*rgba\((\d+)[^>]*><title>([^<]+)', html)
    assert [(int(y), int(x)) for x, y, *_ in cells] == [(r, c) for r in range(4) for c in range(4)]
    assert [float(text) for *_, text in cells] == pytest.approx(split.scores.tolist(), abs=6e-4)


@pytest.mark.parametrize("change, error", [
    ({"target": "good"}, "target must be one of 'negative', 'positive'; not 'good'"),
    ({"target": (0, 1, 1)}, "an entry or a pair"),
    ({"text_or_image": [TEXT, TEXT]}, "one text or image, not 2"),
])  # fmt: skip
def test_impossible_requests_are_refused(bert, change, error):
    with pytest.raises(ValueError, match=error):
        explain(**{"model": bert[0], "text_or_image": TEXT, "processor": bert[1], **change})


def test_a_target_of_several_tokens_is_refused():
    with pytest.raises(ValueError, match="one token, but 'new york' is 2"):
        explain("tiny-gpt", "the capital of france is", target="new york")
