"""Data sets by name: embedded ones that need no network, the hub's, and local files.

All come as a `datasets.Dataset`, whose rows are dictionaries.

>>> from tensorlens_utils.data import load_data
>>> digits = load_data("digits")
>>> digits.num_rows, digits[0]["image"].size
(500, (8, 8))
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

RUNNING_DIGIT = 0  # the digit of the series: load_data("digits")[RUNNING_DIGIT], a 4, held out, that tiny-vit reads
RUNNING_SENTENCE = "the capital of france is"  # the sentence of the series, that tiny-gpt goes on with
RUNNING_REVIEW = 508  # load_data("reviews")[RUNNING_REVIEW], negated and contrasted, which tiny-bert reads as negative
HELD_OUT = 500  # of the 1797 digits: an accuracy of 0.98 is then known to about one percent either way
REVIEWS = {"train": 8000, "test": 2000}  # generated in a second or two
STORIES = 100  # documents of each kind
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet",
           ".arrow": "arrow"}


@cache
def _digits() -> datasets.DatasetDict:
    """scikit-learn's digits: real handwriting (UCI's "Optical Recognition of Handwritten Digits", test part), 8×8
    pixels of intensity 0..16."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target
    rows = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"]),
                                  "row": datasets.Value("int32")})
    return datasets.DatasetDict({
        split: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(images[i]) for i in chosen], "label": labels[chosen], "row": chosen}, features)
        for split, chosen in zip(("train", "test"), rows, strict=True)})


class _Splits(dict):
    """Splits by name, each of which is made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], datasets.Dataset]):
        super().__init__(dict.fromkeys(names))
        self.make = cache(make)

    def __getitem__(self, split: str) -> datasets.Dataset:
        return self.make(split)


@cache
def _reviews() -> _Splits:
    """Generated film reviews that say which words decide: see `reviews.py`."""
    import datasets

    from .reviews import LABELS, reviews

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=[*LABELS]),
                                  "evidence": datasets.List(datasets.Value("int8")), "kind": datasets.Value("string")})
    return _Splits(REVIEWS, lambda split: datasets.Dataset.from_list(reviews(REVIEWS[split], split=split), features))


@cache
def _facts() -> datasets.DatasetDict:
    """The facts of the micro-world as prompts, in the wordings of the training text and in held-out ones: see
    `world.py`."""
    import datasets

    from .world import prompts

    return datasets.DatasetDict({split: datasets.Dataset.from_list(prompts(held_out=split == "test"))
                                 for split in ("train", "test")})


@cache
def _stories() -> datasets.DatasetDict:
    """Text of the micro-world that no model was trained on: see `world.py`."""
    import datasets

    from .world import held_out_documents

    return datasets.DatasetDict({"test": datasets.Dataset.from_list(held_out_documents(STORIES))})


EMBEDDED = {"digits": _digits, "reviews": _reviews, "facts": _facts, "stories": _stories}
# What stands in, offline, for a hub data set, by a word in its id.
STAND_INS = {
    "digits": r"mnist|digit|cifar|imagenet|svhn|image|vision|food|flowers",
    "reviews": r"imdb|sst|review|sentiment|rotten|yelp|amazon|polarity",
    "facts": r"\blre\b|relation|fact",
    "stories": r"stories|wikitext|pile|webtext|bookcorpus|\bc4\b|fineweb",
}


def data_sets() -> list[str]:
    """Names of the embedded data sets.

    >>> "digits" in data_sets()
    True
    """
    return sorted(EMBEDDED)


def load_data(name: str | Path, split: str | None = None, *, subset: str | None = None,
              **options: Any) -> datasets.Dataset:
    """A data set by name: an embedded one (see `data_sets()`), a local file (csv, tsv, json, jsonl, txt, parquet,
    arrow) or folder, or a hub id.

    `split` None is "test" where there is one, else the only one there is. `subset` is the hub's name for one of
    several data sets under one id; further `options` go to `datasets.load_dataset`.

    - "digits", split "train" (1297 rows) or "test" (500, held out from every recipe of the zoo; a fixed, stratified
      split): `image`, a PIL image of 8×8 pixels with intensity 0..16 (`np.asarray` gives uint8); `label`; `row`, its
      place in scikit-learn's table.
    - "reviews", split "train" (8000 rows) or "test" (2000; no recipe trains on a text of that split): generated film
      reviews, words between blanks: `text`; `label`, 0 negative or 1 positive; `evidence`, a 0 or 1 for each word of
      `text.split()`, 1 for those that decide; `kind`, what the review needs of negation, contrast and hearsay. Word i
      is token i + 1 of tiny-bert.
    - "facts", split "train" or "test" (wordings held out from every recipe): the facts of a micro-world: `prompt`,
      which `object` goes on; `subject`; `relation`; `wording`; `subject_span`, where the subject stands among the
      prompt's words, [first, last + 1]. Word i is token i + 1 of the zoo's language models. Few-shot prompts are
      `world.prompts(relation, n_shot=...)`.
    - "stories", split "test" (400 rows): text of the same world that no model was trained on: `text`; `kind`, "facts",
      "few_shot", "story" or "repeat".

    Raises ValueError for a name or split that is not there, FileNotFoundError for a missing path, and ConnectionError
    for a hub data set that is not cached when there is no network (at once with HF_HUB_OFFLINE=1).

    >>> load_data("digits", "train").num_rows
    1297
    """
    text = str(name)
    if text in EMBEDDED:
        return _split(EMBEDDED[text](), split, text)
    import datasets

    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"A file's ending tells how to read it, of {', '.join(READERS)}; {path.name!r} has none "
                             "of them. Save it as one of these.")
        if path.suffix == ".tsv":
            options.setdefault("sep", "\t")
        return _split(datasets.load_dataset(READERS[path.suffix], data_files=str(path), **options), split, text)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
            return _split(datasets.load_from_disk(str(path)), split, text)
        return _split(datasets.load_dataset(str(path), subset, **options), split, text)
    kinds = f"an embedded data set ({_listing()}), a hub id 'owner/name', or the path of a file or folder"
    if isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1 or path.suffix in READERS:
        raise FileNotFoundError(f"No file or folder at {text!r}. A data set is {kinds}.")
    if "/" not in text and (near := difflib.get_close_matches(text, data_sets(), n=1, cutoff=0.8)):
        raise ValueError(f"No data set is named {text!r}; did you mean {near[0]!r}? A data set is {kinds}.")
    try:
        return _split(datasets.load_dataset(text, subset, **options), split, text)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"No data set is named {text!r}. A data set is {kinds}.") from error
    except ConnectionError as error:
        stand_in = next((tiny for tiny, words in STAND_INS.items() if re.search(words, text.lower())), None)
        remedy = (f"load_data({stand_in!r}) stands in for it offline" if stand_in else
                  "no embedded data set of its kind stands in for it")
        raise ConnectionError(f"{text!r} is a hub data set that is not in the local cache, and the hub cannot be "
                              f"reached (no network, or HF_HUB_OFFLINE=1): {remedy}. Embedded are {_listing()}. Or "
                              "give the path of a file or folder.") from error


def _listing() -> str:
    return ", ".join(map(repr, data_sets()))


def _split(found: datasets.Dataset | datasets.DatasetDict | _Splits, split: str | None, name: str) -> datasets.Dataset:
    if not isinstance(found, dict):
        if split is not None:
            raise ValueError(f"{name!r} was saved without splits, so split must be None, not {split!r}.")
        return found
    if split is None:
        split = "test" if "test" in found else next(iter(found)) if len(found) == 1 else None
    if split not in found:
        raise ValueError(f"split must be one of {', '.join(map(repr, found))} for {name!r}, not {split!r}.")
    return found[split]


def digit_text(image: Any) -> str:
    """A digit as text: its 64 intensities, row by row, as words "0".."16", for the zoo's models of tokens.

    `image` is a PIL image of 8×8 pixels or an (8, 8) array of whole numbers 0..16.

    >>> digit_text(np.eye(8) * 16).split()[:10]
    ['16', '0', '0', '0', '0', '0', '0', '0', '0', '16']
    """
    pixels = np.asarray(image)
    if pixels.shape != (8, 8) or not np.isin(pixels, np.arange(17)).all():
        raise ValueError("A digit is (8, 8) whole numbers 0..16; got " + (
            f"shape {pixels.shape}" if pixels.shape != (8, 8) else f"values from {pixels.min()} to {pixels.max()}")
            + '. Take one from load_data("digits")[i]["image"].')
    return " ".join(str(int(value)) for value in pixels.ravel())
