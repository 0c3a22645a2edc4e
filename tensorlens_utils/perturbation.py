"""Perturbation: which map tells the truth? Tokens or patches are removed in the order of a map, and the answer watched.

A *method* is a callable `method(model, inputs, target) -> scores (N, L)`, larger for what matters more, `inputs` being
the processor's dictionary on the model's device and `target` (N,) the class or next token that is explained. Of the n
tokens of an example that can be removed (all but padding and special tokens), the fraction f names k = ⌊f·n + ½⌋:

    order     removed at the fraction f                    a good map makes the answer
    morf      the k most relevant                          fall early: small area
    lerf      the k least relevant                         stay: large area
    insert    all but the k most relevant                  come back early: large area

Equal scores count as falling from left to right, in all three, so that insert at f is lerf at 1 − f wherever no k is
rounded. What stands in the place of the removed is a choice, `REMOVERS`; what is measured is another, `MEASURES`:

    accuracy       whether the model's first choice is the label (the target, where the data have none in numbers)
    probability    of the target, softmax(y)[target]
    logit          of the target, y[target]
    change         ‖y − y₀‖², y₀ the answer to the whole input (Ali et al. 2022, AU-MSE)

At k = 0 the input is whole, and the curve's 0 % point belongs to the area (as Chefer et al. 2021 have it):

    area = ∫ curve df / (f_last − f_first), by the trapezoid

>>> import torch
>>> from tensorlens_utils import load_data, load_model
>>> from tensorlens_utils.perturbation import area, compare, curves, evaluate
>>> model, processor = load_model("tiny-vit")
>>> def dark(model, inputs, target):
...     return -torch.nn.functional.avg_pool2d(inputs["pixel_values"], 2).flatten(1)
>>> methods = {"ink": lambda *given: -dark(*given), "dark": dark}
>>> table = evaluate(model, processor, load_data("digits").select(range(40)), methods, removers=["zero"])
>>> fall = curves(table, "accuracy", order="lerf")
>>> fall["ink"].shape
(40, 11)
>>> [row.name for row in compare({name: area(curve, table.settings["fractions"]) for name, curve in fall.items()})]
['ink', 'dark']
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .intervals import interval
from .removers import REMOVERS, Inputs, kind_of, removable
from .results import Job, Table, fill

if TYPE_CHECKING:
    import datasets

ORDERS = ("morf", "lerf", "insert")
MEASURES = ("accuracy", "probability", "logit", "change")
FRACTIONS = tuple(i / 10 for i in range(11))
ERASER_BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
Method = Callable[[nn.Module, Inputs, Tensor], Tensor]


def removals(scores: Tensor, can: Tensor, fractions: Sequence[float], order: str) -> Tensor:
    """What is removed at each fraction, (N, F, L), for scores (N, L) and `can` (N, L), what can be removed.

    >>> scores = torch.tensor([[9.0, 1.0, 3.0, 2.0]])
    >>> removals(scores, torch.tensor([[False, True, True, True]]), [1 / 3], "morf").int()
    tensor([[[0, 0, 1, 0]]], dtype=torch.int32)
    """
    n = can.sum(1)[:, None, None]
    # ⌊f·n + ½⌋ in float64, which not every device has, with a billionth for fractions such as 0.7 that no float is
    k = (torch.tensor(fractions, dtype=torch.float64)[:, None] * n.cpu() + 0.5 + 1e-9).long().to(n.device)
    falling = scores.masked_fill(~can, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = falling.argsort(1)[:, None]  # 0 for the most relevant; what cannot be removed has n and more
    return {"morf": rank < k, "lerf": rank >= n - k, "insert": rank >= k}[order] & can[:, None]


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluate(model: nn.Module, processor: Any, dataset: datasets.Dataset, methods: Mapping[str, Method], *,
             removers: Sequence[str], orders: Sequence[str] = ORDERS, fractions: Sequence[float] = FRACTIONS,
             target: str = "prediction", column: str | None = None, path: str | Path | None = None,
             batch_size: int = 32, max_length: int | None = None, seed: int = 0, progress: bool = True) -> Table:
    """Perturbation curves of every example, method, remover and order, as a table that can be stopped and gone on with.

    A row holds `example`, `method`, `remover`, `order`, `target`, `label`, and at each fraction `prediction` (the first
    choice), `probability`, `logit` and `change`, to seven digits. Read it with `curves`. The answer is the logits of a
    classifier, or of a language model at the last token. Copies that are equal (the whole input, the empty one, lerf
    and insert) run once per method. `torch`'s random state is set for each batch, from `seed`, and restored.

    Args:
        removers: names of `REMOVERS["text"]` or `["image"]`; orders: of `ORDERS`.
        fractions: rising, from 0 to at most 1; for the paper's range `[0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]`.
        target: "prediction", the model's own first choice; or a column of whole numbers.
        column: what the processor takes, "image" or "text" unless named.
        path: where the table is kept (see results.py); methods may be added to it later, and several processes may
            fill it, each with the model on its own device: `model.to(accelerate.PartialState().device)`.
        batch_size: examples at a time, and copies at a time. `max_length`: tokens at which texts are cut, the
            tokenizer's own limit unless given.

    Raises ValueError for a name or a number that is not one of these, a column that is not there, a method whose scores
    are not finite or not (N, L), and a table at `path` that was made with other settings.
    """
    kind, column = kind_of(model), column or kind_of(model)
    choose("remover", removers, REMOVERS[kind])
    choose("order", orders, ORDERS)
    choose("column", [column, *([target] if target != "prediction" else [])], dataset.column_names)
    fractions = [float(f) for f in fractions]
    if fractions[0] != 0 or fractions[-1] > 1 or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"Fractions rise from 0, the whole input, to at most 1; not {fractions}.")
    batches = Batches(model, processor, dataset, column, target, batch_size, max_length)

    def run(start: int, name: str) -> list[dict[str, Any]]:
        batch = batches.batch(start)
        scores = batches.scores(start, name, methods[name], seed)
        blocks = torch.cat([removals(scores, batch.can, fractions, order) for order in orders], 1)
        rows = []
        for remover in removers:
            measured = _measure(model, processor, batch, blocks, REMOVERS[kind][remover], batch_size)
            for i, example in enumerate(batch.examples):
                for j, order in enumerate(orders):
                    points = slice(j * len(fractions), (j + 1) * len(fractions))
                    curve = {key: [_short(x) for x in values[i, points].tolist()] for key, values in measured.items()}
                    rows.append({"example": example, "method": name, "remover": remover, "order": order,
                                 "target": int(batch.target[i]), "label": batch.label[i], **curve})
        return rows

    jobs = [Job([(e, name, r, o) for e in batches.examples(start) for r in removers for o in orders],
                partial(run, start, name)) for start in batches.starts for name in methods]
    settings = {**batches.settings(), "removers": [*removers], "orders": [*orders], "fractions": fractions,
                "seed": seed}
    return fill(path, jobs, key=("example", "method", "remover", "order"), settings=settings, progress=progress)


class Batch(NamedTuple):
    examples: range
    inputs: Inputs
    can: Tensor  # (N, L)
    target: Tensor  # (N,)
    label: list[int]
    logits: Tensor  # (N, C), of the whole inputs


class Batches:
    """The examples of a data set as inputs, so many at a time; the last batch is kept, for the next method."""

    def __init__(self, model, processor, dataset, column, target, size, max_length):
        self.model, self.processor, self.dataset, self.column, self.target = model, processor, dataset, column, target
        limit = getattr(processor, "model_max_length", None)
        self.size, self.max_length = size, max_length or (limit if limit and limit < 1e6 else None)
        self.starts = range(0, len(dataset), size)
        self.batch = lru_cache(1)(self._batch)

    def examples(self, start: int) -> range:
        return range(start, min(start + self.size, len(self.dataset)))

    def inputs(self, rows: Mapping[str, list], **options: Any) -> dict[str, Tensor]:
        if kind_of(self.model) == "text":
            options |= {"padding": True}
            options |= {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        return self.processor(rows[self.column], return_tensors="pt", **options)

    def _batch(self, start: int) -> Batch:
        rows, model = self.dataset[self.examples(start)], self.model
        inputs = {name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                  for name, value in self.inputs(rows).items()}
        logits = _logits(model, inputs)
        target = logits.argmax(1) if self.target == "prediction" else torch.tensor(rows[self.target]).to(logits.device)
        if target.is_floating_point() or target.min() < 0 or target.max() >= logits.shape[1]:
            raise ValueError(f"Targets are whole numbers from 0 to {logits.shape[1] - 1}, the model's outputs; the "
                             f"column {self.target!r} holds {target.min()} to {target.max()}.")
        labelled = "label" in rows and isinstance(rows["label"][0], int)
        return Batch(self.examples(start), inputs, removable(model, self.processor, inputs), target,
                     rows["label"] if labelled else target.tolist(), logits)

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
        """What tells one model and one data set from others: digests of some of the weights, and of three examples."""
        weights = b"".join(p.detach().flatten()[:16].cpu().double().numpy().tobytes() for p in self.model.parameters())
        picked = self.dataset.select([0, len(self.dataset) // 2, len(self.dataset) - 1])
        shown = b"".join(value.numpy().tobytes() for value in self.inputs(picked[:]).values())
        return {"model": f"{type(self.model).__name__} {hashlib.sha256(weights).hexdigest()[:12]}",
                "data": f"{len(self.dataset)} rows {hashlib.sha256(shown).hexdigest()[:12]}",
                "column": self.column, "target": self.target, "max_length": self.max_length}


def choose(what: str, names: Iterable[str], of: Iterable[str]) -> None:
    for name in names:
        if name not in of:
            raise ValueError(f"The {what} is one of {', '.join(map(repr, of))}; {name!r} is none.")


def _short(x: float | int) -> float | int:
    return x if isinstance(x, int) else float(f"{x:.7g}")  # what a float32 holds


@torch.no_grad()
def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """The answers (N, C), of a language model those at the last unmasked token, in float32 or better."""
    y = model(**inputs).logits
    if y.dim() == 3:
        mask = inputs["attention_mask"]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        y = y[torch.arange(len(y), device=y.device), last]
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _measure(model: nn.Module, processor: Any, batch: Batch, removed: Tensor, remover: Callable,
             batch_size: int) -> dict[str, Tensor]:
    """The answers where `removed` (N, K, L) says what is not there: prediction, probability, logit, change, (N, K)."""
    N, K, _ = removed.shape
    which = torch.arange(N, device=removed.device).repeat_interleave(K)[:, None]
    copies, back = torch.cat([which, removed.flatten(0, 1).long()], 1).unique(dim=0, return_inverse=True)
    found = []
    for some in copies.split(batch_size):
        i = some[:, 0]
        y = _logits(model, remover(model, processor, {k: v[i] for k, v in batch.inputs.items()}, some[:, 1:].bool()))
        at = batch.target[i][:, None]
        found.append({"prediction": y.argmax(1), "probability": y.softmax(1).gather(1, at)[:, 0],
                      "logit": y.gather(1, at)[:, 0], "change": (y - batch.logits[i]).square().sum(1)})
    return {key: torch.cat([f[key] for f in found])[back].view(N, K).cpu() for key in found[0]}


# --------------------------------------------------------------------------------------------------- curves and areas


def curves(table: Table, measure: str, *, order: str, remover: str | None = None) -> dict[str, np.ndarray]:
    """The curves of each method, (examples, fractions), from a table of `evaluate`. `remover` may be left out where
    the table has only one."""
    choose("measure", [measure], MEASURES)
    if remover is None:
        remover, *others = table.settings["removers"]
        if others:
            raise ValueError(f"This table has several removers, {', '.join([remover, *others])}: name one.")
    choose("remover", [remover], table.settings["removers"])
    choose("order", [order], table.settings["orders"])
    found: dict[str, list] = {}
    for row in table.where(order=order, remover=remover):
        found.setdefault(row["method"], []).append(
            [p == row["label"] for p in row["prediction"]] if measure == "accuracy" else row[measure])
    return _paired({name: np.array(rows, dtype=float) for name, rows in found.items()})


def _paired(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if len({len(v) for v in values.values()}) > 1:
        raise ValueError("Methods are compared on the same examples, and here are of each: "
                         f"{ {name: len(v) for name, v in values.items()} }. Let the run finish.")
    return values


def area(values, fractions: Sequence[float], upto: float = 1.0) -> np.ndarray:
    """Areas under curves (..., F), by the trapezoid from the 0 % point on, over the range: a mean height.

    `upto` cuts the range, at a fraction that is one of `fractions` or beyond them.

    >>> float(area([1.0, 0.5, 0.0], [0, 0.5, 1]))
    0.5
    """
    x, y = np.asarray(fractions, float), np.asarray(values, float)
    if y.shape[-1:] != x.shape or x[0] != 0 or (upto < x[-1] and not np.isclose(x, upto).any()):
        raise ValueError(f"An area takes a value for each fraction, from 0 on, up to one of them: values {y.shape}, "
                         f"fractions {[*x]}, upto {upto}.")
    use = x <= upto + 1e-9
    return np.trapezoid(y[..., use], x[use], axis=-1) / x[use][-1]


def band(values: np.ndarray) -> np.ndarray:
    """The mean curve with its 95 % bootstrap interval over examples: (examples, F) -> (3, F), value, low, high."""
    return np.stack([interval(column) for column in values.T], -1)


def eraser(table: Table, remover: str | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Comprehensiveness and sufficiency of each example (DeYoung et al. 2020, ERASER, §4.2), by method.

        comprehensiveness = mean over bins b of p(x) − p(x without its top b)       larger is better
        sufficiency       = mean over bins b of p(x) − p(the top b of x alone)      smaller is better

    with p the target's probability and the fractions of `table` beyond 0 as bins (`ERASER_BINS`: evaluate with
    `fractions=[0, *ERASER_BINS]` and the orders morf and insert). This is the mean that the benchmark's released code
    takes; the paper's formula counts a bin of no tokens too. The k of a bin is rounded as everywhere here, so that
    1 % of a short text is no token.
    """
    without = curves(table, "probability", order="morf", remover=remover)
    alone = curves(table, "probability", order="insert", remover=remover)
    return {"comprehensiveness": {m: (p[:, :1] - p[:, 1:]).mean(1) for m, p in without.items()},
            "sufficiency": {m: (without[m][:, :1] - p[:, 1:]).mean(1) for m, p in alone.items()}}


class Standing(NamedTuple):
    """A method's mean with its interval; how far behind the best it is, with the interval of the paired difference; and
    whether it is the best, told apart from every other."""

    name: str
    mean: np.ndarray  # (3,): value, low, high
    behind: np.ndarray  # (3,): of best − this, or this − best where smaller is better; zeros for the best
    best: bool


def compare(values: Mapping[str, np.ndarray], larger: bool = True) -> list[Standing]:
    """Methods from best to worst, by the mean of their values on the same examples, each (m,).

    `best` is marked on the first where every other's paired difference has an interval that excludes zero; where some
    do not, on none. That interval is of one pair: none is widened for the number of methods.

    >>> [(s.name, s.best) for s in compare({"a": np.arange(9.0), "b": np.arange(9.0) - 1})]
    [('a', True), ('b', False)]
    """
    _paired(dict(values))
    sign = 1 if larger else -1
    names = sorted(values, key=lambda name: -sign * np.mean(values[name]))
    top = values[names[0]]
    behind = {name: interval(sign * (np.asarray(top) - values[name])) for name in names}
    clear = all(behind[name][1] > 0 for name in names[1:])
    return [Standing(name, interval(values[name]), behind[name], clear and name == names[0]) for name in names]
