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


class Rows:
    """A text data set as rows of token ids that are full to the end, (rows, length) a batch, the same at every pass.

    Texts follow one another as the tokenizer gives them, the end-of-text token between them where there is one; what
    does not fill a last batch is left out.

    Args:
        data: of texts, or rows with a column of texts; a `datasets` stream, too.
        tokenizer: of the model.
        rows, length: of a batch.
        column: where the text is.

    >>> from tensorlens_utils import load_data, load_model
    >>> _, tokenizer = load_model("tiny-gpt")
    >>> next(iter(Rows(load_data("stories"), tokenizer, rows=2, length=16)))["input_ids"].shape
    torch.Size([2, 16])
    """

    def __init__(self, data: Iterable, tokenizer: Any, rows: int = 8, length: int = 128, column: str = "text"):
        self.data, self.tokenizer, self.rows, self.length, self.column = data, tokenizer, rows, length, column

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        ids, size = [], self.rows * self.length
        for row in self.data:
            new = self.tokenizer(row if isinstance(row, str) else row[self.column], verbose=False).input_ids
            end = self.tokenizer.eos_token_id
            ids += new if end is None or new[-1:] == [end] else [*new, end]
            while len(ids) >= size:
                yield {"input_ids": torch.tensor(ids[:size]).view(self.rows, self.length)}
                ids = ids[size:]


class Examples:
    """A data set as batches of whole texts, padded, or of images: for encoders, classifiers and vision.

    >>> from tensorlens_utils import load_data, load_model
    >>> _, processor = load_model("tiny-vit")
    >>> next(iter(Examples(load_data("digits"), processor, rows=2, column="image")))["pixel_values"].shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, data: Iterable, processor: Any, rows: int = 32, column: str = "text"):
        self.data, self.processor, self.rows, self.column = data, processor, rows, column

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        values = (row[self.column] if isinstance(row, dict) else row for row in self.data)
        while some := [*itertools.islice(values, self.rows)]:
            words = {"padding": True, "padding_side": "right", "truncation": True}
            text = words if isinstance(some[0], str) else {}
            yield dict(self.processor(some, return_tensors="pt", **text).items())
