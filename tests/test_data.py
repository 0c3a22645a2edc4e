"""Data sets by name: the embedded ones and their splits, local files, and what is said when there is no network."""

from collections import Counter

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tensorlens_utils import data
from tensorlens_utils.data import RUNNING_DIGIT, RUNNING_REVIEW, RUNNING_SENTENCE, data_sets, digit_text, load_data

POEM = [{"line": line, "label": label} for line, label in (("so much depends", 0), ("upon", 1), ("a red wheel", 0))]


def test_digits_are_scikit_learns_in_two_disjoint_parts():
    bunch, (train, test) = load_digits(), (load_data("digits", split) for split in ("train", "test"))
    assert (train.num_rows, test.num_rows) == (1297, 500)
    assert sorted([*train["row"], *test["row"]]) == list(range(1797))
    for part in (train, test):
        pixels = np.stack([np.asarray(image) for image in part["image"]])
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, bunch.images[part["row"]])
        assert np.array_equal(part["label"], bunch.target[part["row"]])
        shares = np.bincount(part["label"]) / np.bincount(bunch.target)
        assert np.ptp(shares) < 0.01
    pictures = [{np.asarray(image).tobytes() for image in part["image"]} for part in (train, test)]
    assert not pictures[0] & pictures[1]  # and no picture is there twice


def test_the_split_is_the_same_each_time():
    again = data._digits.__wrapped__()
    for split in ("train", "test"):
        assert again[split]["row"][:] == load_data("digits", split)["row"][:]
    assert load_data("digits")["row"][:] == load_data("digits", "test")["row"][:]
    assert load_data("digits")["row"][:5] == [87, 1037, 28, 1118, 904]  # what the cards' numbers were measured on


def test_running_digit_is_held_out_and_read_with_confidence():
    import torch

    from tensorlens_utils.models import load_model

    digit = load_data("digits")[RUNNING_DIGIT]
    model, processor = load_model("tiny-vit")
    with torch.no_grad():
        odds = model(**processor(digit["image"], return_tensors="pt")).logits.softmax(-1)[0]
    assert odds.argmax() == digit["label"] and odds.max() > 0.99


def test_digit_text():
    image = load_data("digits")[0]["image"]
    words = digit_text(image).split(" ")
    assert np.array_equal(np.array(words, int).reshape(8, 8), np.asarray(image))
    assert digit_text(np.asarray(image).astype(float)) == digit_text(image)
    with pytest.raises(ValueError, match=r"\(8, 8\) whole numbers 0..16; got shape \(3, 8, 8\)"):
        digit_text(np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="got values from 0.0 to 17.0"):
        digit_text(np.eye(8) * 17)
    with pytest.raises(ValueError, match="whole numbers"):
        digit_text(np.eye(8) / 2)


def test_reviews_are_two_balanced_parts_with_the_words_that_decide():
    train, test = (load_data("reviews", split) for split in ("train", "test"))
    assert (train.num_rows, test.num_rows) == (8000, 2000) and not {*train["text"]} & {*test["text"]}
    for part in (train, test):
        assert abs(np.mean(part["label"]) - 0.5) < 0.01
        assert part.features["label"].names == ["negative", "positive"]
    for row in test.select(range(200)):
        assert len(row["evidence"]) == len(row["text"].split()) and 1 <= sum(row["evidence"]) and row["kind"]


def test_facts_are_prompts_in_training_wordings_and_in_others():
    train, test = (load_data("facts", split) for split in ("train", "test"))
    assert not {*train["wording"]} & {*test["wording"]} and {*train["relation"]} == {*test["relation"]}
    for row in (*train, *test):
        first, end = row["subject_span"]
        assert row["prompt"].split()[first:end] == row["subject"].split()
        assert row["wording"].format(subject=row["subject"], object=row["object"]) == f"{row['prompt']} {row['object']}"
    running, = (row for row in train if row["prompt"] == RUNNING_SENTENCE)
    assert running["object"] == "paris"


def test_stories_are_as_many_of_each_kind():
    stories = load_data("stories")
    assert Counter(stories["kind"]) == dict.fromkeys(("facts", "few_shot", "story", "repeat"), 100)
    assert len({*stories["text"]}) > 390


def test_tiny_gpt_goes_on_with_the_running_sentence():
    import torch

    from tensorlens_utils.models import load_model

    model, tokenizer = load_model("tiny-gpt")
    with torch.no_grad():
        odds = model(**tokenizer(RUNNING_SENTENCE, return_tensors="pt")).logits[0, -1].softmax(-1)
    print(f"{RUNNING_SENTENCE} {tokenizer.decode(odds.argmax())}: {odds.max():.3f}")
    assert tokenizer.decode(odds.argmax()) == "paris" and odds.max() > 0.9


@pytest.fixture
def cache(monkeypatch, tmp_path):
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{name}", str(tmp_path / "cache"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "arrow"])
def test_local_files(ending, tmp_path, cache):
    rows, path = datasets.Dataset.from_list(POEM), tmp_path / f"poem.{ending}"
    if ending == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=rows.features) as writer:
            for row in POEM:
                writer.write(row)
            writer.finalize()
    else:
        write = {"csv": rows.to_csv, "tsv": lambda p: rows.to_csv(p, sep="\t"), "parquet": rows.to_parquet}
        write.get(ending, rows.to_json)(str(path))
    assert load_data(path).to_list() == load_data(str(path), "train").to_list() == POEM


def test_a_text_file_is_one_row_a_line(tmp_path, cache):
    (tmp_path / "poem.txt").write_text("so much depends\nupon\n")
    assert load_data(tmp_path / "poem.txt").to_list() == [{"text": "so much depends"}, {"text": "upon"}]


def test_local_folders(tmp_path, cache):
    rows = datasets.Dataset.from_list(POEM)
    rows.save_to_disk(tmp_path / "one")
    assert load_data(tmp_path / "one").to_list() == POEM
    with pytest.raises(ValueError, match="without splits, so split must be None, not 'test'"):
        load_data(tmp_path / "one", "test")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_data(tmp_path / "two").to_list() == POEM[1:2]
    (tmp_path / "files").mkdir()
    rows.to_csv(tmp_path / "files" / "train.csv")
    rows.select([2]).to_csv(tmp_path / "files" / "validation.csv")
    assert load_data(tmp_path / "files", "validation").to_list() == POEM[2:]
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation' for .*, not None"):
        load_data(tmp_path / "files")


@pytest.fixture
def offline(monkeypatch, cache):
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("name", "says"), [
    ("ylecun/mnist", r"load_data\('digits'\) stands in for it offline"),
    ("stanfordnlp/imdb", r"load_data\('reviews'\) stands in"), ("azhx/counterfact", r"load_data\('facts'\) stands in"),
    ("Salesforce/wikitext", r"load_data\('stories'\) stands in"),
    ("someone/weather", "no embedded data set of its kind stands in for it")])
def test_a_hub_data_set_offline_names_its_stand_in(offline, name, says):
    with pytest.raises(ConnectionError, match=f"'{name}' is a hub data set.*cannot be reached.*{says}.*'digits'"):
        load_data(name)


def test_what_cannot_be_loaded_says_the_rule_the_offender_and_the_remedy(offline, tmp_path):
    assert data_sets() == ["digits", "facts", "reviews", "stories"]
    with pytest.raises(ValueError, match="split must be one of 'train', 'test' for 'digits', not 'validation'"):
        load_data("digits", "validation")
    with pytest.raises(FileNotFoundError, match="No file or folder at './poem.csv'"):
        load_data("./poem.csv")
    with pytest.raises(FileNotFoundError, match="No file or folder at 'poem.csv'"):
        load_data("poem.csv")
    (tmp_path / "poem.doc").write_text("so much depends")
    with pytest.raises(ValueError, match="A file's ending tells how to read it.*'poem.doc' has none"):
        load_data(tmp_path / "poem.doc")
    with pytest.raises(ValueError, match="No data set is named 'digit'; did you mean 'digits'"):
        load_data("digit")


def test_the_running_review_is_decided_by_not_inventive():
    review = load_data("reviews")[RUNNING_REVIEW]
    words = review["text"].split()
    assert [word for word, decides in zip(words, review["evidence"], strict=True) if decides] == ["not", "inventive"]
    assert review["label"] == 0 and review["kind"] == "negated contrasted" and "but" in words
