"""Data sets as a model's inputs, batch after batch, the same at every pass.

>>> from tensorlens_utils import load_data, load_model
>>> _, tokenizer = load_model("tiny-gpt")
>>> first, *_ = Rows(load_data("stories"), tokenizer, rows=2, length=8)
>>> tokenizer.batch_decode(first["input_ids"][:1, :5])
['<bos> people find now as']
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def repeated(data: Iterable, what: str = "data") -> Iterable:
    """`data`, if it can be gone through again and again, one example or batch after the other.

    >>> repeated(row for row in ["a text"])
    Traceback (most recent call last):
    ValueError: data are gone through more than once, one after the other: give a list or a split of a data set, or of \
these Rows or Examples, and not a generator
    """
    if isinstance(data, str) or hasattr(data, "items") or iter(data) is data:
        raise ValueError(f"{what} are gone through more than once, one after the other: give a list or a split of a "
                         f"data set, or of these Rows or Examples, and not a {type(data).__name__}")  # fmt: skip
    return data


def _values(data: Iterable, column: str) -> Iterator:
    for row in data:
        if hasattr(row, "keys") and column not in row:
            raise ValueError(f"the column is one of {', '.join(map(repr, row))}; {column!r} is none")
        yield row[column] if hasattr(row, "keys") else row


class Rows:
    """A text data set as rows of token ids that are full to the end, (rows, length) a batch, the same at every pass.

    Texts follow one another as the tokenizer gives them, the end-of-text token between them where there is one; what
    does not fill a last batch is left out.

    Args:
        data: of texts, or rows with a column of texts; a `datasets` stream, too.
        tokenizer: of the model.
        rows, length: of a batch.
        column: where the text is.

    Raises:
        ValueError: for data that are one text, several splits, or gone after one pass; for a column that is not there.

    >>> from tensorlens_utils import load_data, load_model
    >>> _, tokenizer = load_model("tiny-gpt")
    >>> next(iter(Rows(load_data("stories"), tokenizer, rows=2, length=16)))["input_ids"].shape
    torch.Size([2, 16])
    """

    def __init__(self, data: Iterable, tokenizer: Any, rows: int = 8, length: int = 128, column: str = "text"):
        self.data, self.tokenizer, self.rows, self.length, self.column = repeated(data), tokenizer, rows, length, column

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        ids, size = [], self.rows * self.length
        for text in _values(self.data, self.column):
            new = self.tokenizer(text, verbose=False).input_ids
            end = self.tokenizer.eos_token_id
            ids += new if end is None or new[-1:] == [end] else [*new, end]
            full = len(ids) - len(ids) % size
            for start in range(0, full, size):
                yield {"input_ids": torch.tensor(ids[start:start + size]).view(self.rows, self.length)}
            del ids[:full]


class Examples:
    """A data set as batches of whole texts, padded, or of images: for encoders, classifiers and vision.

    >>> from tensorlens_utils import load_data, load_model
    >>> _, processor = load_model("tiny-vit")
    >>> next(iter(Examples(load_data("digits"), processor, rows=2, column="image")))["pixel_values"].shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, data: Iterable, processor: Any, rows: int = 32, column: str = "text"):
        self.data, self.processor, self.rows, self.column = repeated(data), processor, rows, column

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        values = _values(self.data, self.column)
        while some := [*itertools.islice(values, self.rows)]:
            words = {"padding": True, "padding_side": "right", "truncation": True}
            text = words if isinstance(some[0], str) else {}
            yield dict(self.processor(some, return_tensors="pt", **text).items())
