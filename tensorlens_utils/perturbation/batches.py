"""A data set as a model sees it, batch by batch: its inputs, the outputs that are explained, and a method's scores.

perturbation.py and evidence.py both run over these. Which outputs are explained is named: "prediction", the model's own
first choice; a column of whole numbers; or two of these, for their contrast, the second also "runner-up", the largest
logit beside the first's.

>>> from tensorlens_utils import load_data, load_model
>>> rows = load_data("reviews").select(range(3))
>>> batch = Batches(*load_model("tiny-bert"), rows, "text", ("prediction", "runner-up")).batch(0)
>>> batch.target.tolist(), batch.explained(0)
([[0, 1], [1, 0], [1, 0]], {'target': 0, 'against': 1})
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import fingerprint
from .removers import Inputs, kind_of, removable

if TYPE_CHECKING:
    import datasets

Method = Callable[[nn.Module, Inputs, Tensor], Tensor]


class Batch(NamedTuple):
    examples: range
    inputs: Inputs
    can: Tensor  # (N, L): what can be removed
    target: Tensor  # (N,), or (N, 2) of a contrast
    label: list[int]
    logits: Tensor  # (N, C), of the whole inputs

    def explained(self, i: int) -> dict[str, int]:
        """What of example i is explained, as columns of a table."""
        return dict(zip(("target", "against"), self.target[i].view(-1).tolist(), strict=False))


class Batches:
    """The examples of a data set, `size` at a time; the last batch is kept, for the next method.

    Texts are padded on the right, since in many models positions count from the left, and cut at `max_length` tokens,
    the tokenizer's own limit unless given. Raises ValueError for a column that is not there.
    """

    def __init__(self, model: nn.Module, processor: Any, dataset: datasets.Dataset, column: str,
                 target: str | tuple[str, str] = "prediction", size: int = 32, max_length: int | None = None):
        self.model, self.processor, self.dataset, self.column = model, processor, dataset, column
        self.target = [target] if isinstance(target, str) else [*target]
        choose("column", [column], dataset.column_names)
        choose("target", self.target[:1], ["prediction", *dataset.column_names])
        choose("target's rival", self.target[1:], ["prediction", "runner-up", *dataset.column_names])
        limit = getattr(processor, "model_max_length", None)
        self.size, self.max_length = size, max_length or (limit if limit and limit < 1e6 else None)
        self.starts = range(0, len(dataset), size)
        self.batch = lru_cache(1)(self._batch)

    def examples(self, start: int) -> range:
        return range(start, min(start + self.size, len(self.dataset)))

    def inputs(self, rows: Mapping[str, list], **options: Any) -> dict[str, Tensor]:
        if kind_of(self.model) == "text":
            options |= {"padding": True, "padding_side": "right"}
            options |= {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        return self.processor(rows[self.column], return_tensors="pt", **options)

    def _batch(self, start: int) -> Batch:
        rows, model = self.dataset[self.examples(start)], self.model
        inputs = {name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                  for name, value in self.inputs(rows).items()}
        logits = answers(model, inputs)
        target = self._targets(rows, logits)
        labelled = "label" in rows and isinstance(rows["label"][0], int)
        label = rows["label"] if labelled else target[:, 0].tolist()
        return Batch(self.examples(start), inputs, removable(model, self.processor, inputs),
                     target.squeeze(1) if len(self.target) == 1 else target, label, logits)

    def _targets(self, rows: Mapping[str, list], logits: Tensor) -> Tensor:
        """(N, 1) or (N, 2)."""
        found = []
        for name in self.target:
            if name in ("prediction", "runner-up"):
                free = logits if name == "prediction" else logits.scatter(1, found[0][:, None], -torch.inf)
                found.append(free.argmax(1))
                continue
            found.append(torch.tensor(rows[name]).to(logits.device))
            if found[-1].is_floating_point() or found[-1].min() < 0 or found[-1].max() >= logits.shape[1]:
                raise ValueError(f"Targets are whole numbers from 0 to {logits.shape[1] - 1}, the model's outputs; the "
                                 f"column {name!r} holds {found[-1].min()} to {found[-1].max()}.")
        if len(found) > 1 and (found[0] == found[1]).any():
            raise ValueError(f"A contrast is of two outputs, and {' and '.join(map(repr, self.target))} name the same "
                             f'in {int((found[0] == found[1]).sum())} of {len(logits)} examples: leave these out, or '
                             'contrast with "runner-up".')
        return torch.stack(found, 1)

    def scores(self, start: int, name: str, method: Method, seed: int) -> Tensor:
        """A method's scores of a batch, (N, L), under torch's random numbers of that seed and batch."""
        batch = self.batch(start)
        with torch.random.fork_rng(devices=[batch.can.device] if batch.can.is_cuda else []):
            torch.manual_seed(seed + start)
            scores = method(self.model, batch.inputs, batch.target).detach().to(batch.can.device)
        if scores.shape != batch.can.shape or not scores[batch.can].isfinite().all():
            raise ValueError(f"A method gives a finite score for each token, {tuple(batch.can.shape)}; {name!r} gave "
                             f"{tuple(scores.shape)}, {int((~scores.isfinite()).sum())} of them not finite.")
        return scores

    def settings(self) -> dict[str, Any]:
        """What tells one model and one data set from others: digests of the one, and of three examples."""
        picked = self.dataset.select([0, len(self.dataset) // 2, len(self.dataset) - 1])
        shown = b"".join(value.numpy().tobytes() for value in self.inputs(picked[:]).values())
        return {"model": fingerprint(self.model),
                "data": f"{len(self.dataset)} rows {hashlib.sha256(shown).hexdigest()[:12]}", "column": self.column,
                "target": self.target if len(self.target) > 1 else self.target[0], "max_length": self.max_length}


@torch.no_grad()
def answers(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits (N, C), of a language model those at the last unmasked token, in float32 or better."""
    y = model(**inputs).logits
    if y.dim() == 3:
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        y = y[torch.arange(len(y), device=y.device), last]
    return y.to(torch.promote_types(y.dtype, torch.float32))


def choose(what: str, names: Iterable[str], of: Iterable[str]) -> None:
    """ValueError for a name that is not one of these."""
    for name in names:
        if name not in of:
            raise ValueError(f"The {what} is one of {', '.join(map(repr, of))}; {name!r} is none.")
