"""Perturbation: which map tells the truth? Tokens or patches are removed in the order of a map, and the answer watched.

A *method* is a callable `method(model, inputs, target) -> scores (N, L)`, larger for what matters more, `inputs` being
the processor's dictionary on the model's device and `target` (N,) the class or next token that is explained, or (N, 2)
the two whose contrast is. Of the n tokens of an example that can be removed (all but padding and special tokens), the
fraction f names k = ⌊f·n + ½⌋:

    order     removed at the fraction f                    a good map makes the answer
    morf      the k most relevant                          fall early: small area
    lerf      the k least relevant                         stay: large area
    insert    all but the k most relevant                  come back early: large area

Equal scores count as falling from left to right, in all three, so that insert at f is lerf at 1 − f wherever no k is
rounded. What stands in the place of the removed is a choice, `REMOVERS`; what is measured is another, `MEASURES`:

    accuracy       whether the model's first choice is the label (the target, where the data have none in numbers)
    probability    of the target t, softmax(y)[t]; of a contrast, that it is t and not c, of the two: σ(y[t] − y[c])
    logit          of the target, y[t]; of a contrast, y[t] − y[c]
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

On several GPUs, or processes, the same script runs in each, and fills the same table; with accelerate it is perturb.py:

    from accelerate import PartialState

    model, processor = load_model("tiny-vit", device=PartialState().device)     # each process has a GPU of its own
    table = evaluate(model, processor, load_data("digits"), methods, removers=["zero"], path="digits.jsonl")

and `accelerate launch perturb.py` starts it; without a GPU `PartialState(cpu=True)` and `torchrun --nproc-per-node 2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..intervals import interval
from ..results import Job, Table, fill
from .batches import Batch, Batches, Method, answers, choose
from .removers import REMOVERS, kind_of

if TYPE_CHECKING:
    import datasets

ORDERS = ("morf", "lerf", "insert")
MEASURES = ("accuracy", "probability", "logit", "change")
FRACTIONS = tuple(i / 10 for i in range(11))
ERASER_BINS = (0.01, 0.05, 0.1, 0.2, 0.5)


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
             target: str | tuple[str, str] = "prediction", column: str | None = None, path: str | Path | None = None,
             batch_size: int = 32, max_length: int | None = None, seed: int = 0, progress: bool = True) -> Table:
    """Perturbation curves of every example, method, remover and order, as a table that can be stopped and gone on with.

    A row holds `example`, `method`, `remover`, `order`, `target`, `label`, for a contrast `against`, and at each
    fraction `prediction` (the first choice), `probability`, `logit` and `change`, to seven digits. Read it with
    `curves`. The answer is the logits of a classifier, or of a language model at the last token. Copies that are equal
    (the whole input, the empty one, lerf and insert) run once per method. `torch`'s random state is set for each batch,
    from `seed`, and restored. Texts are padded on the right.

    Args:
        removers: names of `REMOVERS["text"]` or `["image"]`; orders: of `ORDERS`.
        fractions: rising, from 0 to at most 1; for the paper's range `[0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]`.
        target: "prediction", the model's own first choice; or a column of whole numbers; or two of these, whose
            contrast is explained and watched, the second also "runner-up", the largest logit beside the first's:
            `("prediction", "runner-up")`. Methods are given (N, 2), as those of `collapse` and `baselines` take it.
        column: what the processor takes, "image" or "text" unless named.
        path: where the table is kept (see results.py); methods may be added to it later, and several processes may
            fill it.
        batch_size: examples at a time, and copies at a time. `max_length`: tokens at which texts are cut, the
            tokenizer's own limit unless given.

    Raises ValueError for a name or a number that is not one of these, a column that is not there, a method whose scores
    are not finite or not (N, L), and a table at `path` that was made with other settings.
    """
    kind = kind_of(model)
    choose("remover", removers, REMOVERS[kind])
    choose("order", orders, ORDERS)
    fractions = [float(f) for f in fractions]
    if fractions[0] != 0 or fractions[-1] > 1 or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"Fractions rise from 0, the whole input, to at most 1; not {fractions}.")
    batches = Batches(model, processor, dataset, column or kind, target, batch_size, max_length)

    def run(start: int, name: str) -> list[dict[str, Any]]:
        batch = batches.batch(start)
        scores = batches.scores(start, name, methods[name], seed)
        blocks = torch.cat([removals(scores, batch.can, fractions, order) for order in orders], 1)
        rows = []
        for remover in removers:
            measured = watched(model, processor, batch, blocks, REMOVERS[kind][remover], batch_size)
            for i, example in enumerate(batch.examples):
                for j, order in enumerate(orders):
                    points = slice(j * len(fractions), (j + 1) * len(fractions))
                    curve = {key: [_short(x) for x in values[i, points].tolist()] for key, values in measured.items()}
                    rows.append({"example": example, "method": name, "remover": remover, "order": order,
                                 **batch.explained(i), "label": batch.label[i], **curve})
        return rows

    jobs = [Job([(e, name, r, o) for e in batches.examples(start) for r in removers for o in orders],
                partial(run, start, name)) for start in batches.starts for name in methods]
    settings = {**batches.settings(), "removers": [*removers], "orders": [*orders], "fractions": fractions,
                "seed": seed}
    return fill(path, jobs, key=("example", "method", "remover", "order"), settings=settings, progress=progress)


def _short(x: float | int) -> float | int:
    return x if isinstance(x, int) else float(f"{x:.7g}")  # what a float32 holds


def watched(model: nn.Module, processor: Any, batch: Batch, removed: Tensor, remover: Callable,
             batch_size: int) -> dict[str, Tensor]:
    """The answers where `removed` (N, K, L) says what is not there: prediction, probability, logit, change, (N, K)."""
    N, K, _ = removed.shape
    which = torch.arange(N, device=removed.device).repeat_interleave(K)[:, None]
    copies, back = torch.cat([which, removed.flatten(0, 1).long()], 1).unique(dim=0, return_inverse=True)
    found = []
    for some in copies.split(batch_size):
        i = some[:, 0]
        inputs, gone = {k: v[i] for k, v in batch.inputs.items()}, some[:, 1:].bool()
        if "attention_mask" in inputs:  # without the padding that these need not have
            L = int(inputs["attention_mask"].sum(1).max())
            inputs, gone = {k: v[:, :L] for k, v in inputs.items()}, gone[:, :L]
        y = answers(model, remover(model, processor, inputs, gone))
        z = y.gather(1, batch.target[i].view(len(i), -1))
        if z.shape[1] == 1:
            probability, logit = (z[:, 0] - y.logsumexp(1)).exp(), z[:, 0]
        else:  # of a contrast
            probability, logit = z.softmax(1)[:, 0], z[:, 0] - z[:, 1]
        found.append({"prediction": y.argmax(1), "probability": probability, "logit": logit,
                      "change": (y - batch.logits[i]).square().sum(1)})
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


def band(values: np.ndarray, n: int = 4000) -> np.ndarray:
    """The mean curve with its 95 % bootstrap interval over examples, of n draws: (examples, F) -> (3, F), value, low,
    high."""
    return interval(np.asarray(values).T, n=n)


def eraser(table: Table, remover: str | None = None, bins: Sequence[float] = ERASER_BINS) -> dict[str, dict]:
    """Comprehensiveness and sufficiency (DeYoung et al. 2020, ERASER, §4.2): of each method, (examples,).

        comprehensiveness = mean over bins b of p(x) − p(x without its top b)       larger is better
        sufficiency       = mean over bins b of p(x) − p(the top b of x alone)      smaller is better

    with p the target's probability. The bins are among the fractions of `table`, which has the orders morf and insert.
    This is the mean that the benchmark's released code takes; the paper's formula counts a bin of no tokens too. The k
    of a bin is rounded as everywhere here, so that 1 % of a short text is no token. ValueError for a bin that the table
    has not.
    """
    fractions = table.settings["fractions"]
    missing = [b for b in bins if b not in fractions]
    if missing:
        raise ValueError(f"Bins are among the fractions that were evaluated, {fractions}, and {missing} are not: "
                         "evaluate with fractions=[0, *bins], or name other bins.")
    at = [fractions.index(b) for b in bins]
    without = curves(table, "probability", order="morf", remover=remover)
    alone = curves(table, "probability", order="insert", remover=remover)
    return {"comprehensiveness": {m: (p[:, :1] - p[:, at]).mean(1) for m, p in without.items()},
            "sufficiency": {m: (without[m][:, :1] - p[:, at]).mean(1) for m, p in alone.items()}}


class Standing(NamedTuple):
    """A method's mean with its interval; how far behind the best it is, with the interval of the paired difference; and
    whether it is the best, told apart from every other."""

    name: str
    mean: np.ndarray  # (3,): value, low, high
    behind: np.ndarray  # (3,): of best − this, or this − best where smaller is better; zeros for the best
    best: bool


def compare(values: Mapping[str, np.ndarray], larger: bool = True, n: int = 4000) -> list[Standing]:
    """Methods from best to worst, by the mean of their values on the same examples, each (m,); intervals of n draws.

    `best` is marked on the first where every other's paired difference has an interval that excludes zero; where some
    do not, on none. That interval is of one pair: none is widened for the number of methods.

    >>> [(s.name, s.best) for s in compare({"a": np.arange(9.0), "b": np.arange(9.0) - 1})]
    [('a', True), ('b', False)]
    """
    _paired(dict(values))
    sign = 1 if larger else -1
    names = sorted(values, key=lambda name: -sign * np.mean(values[name]))
    top = values[names[0]]
    behind = {name: interval(sign * (np.asarray(top) - values[name]), n=n) for name in names}
    clear = all(behind[name][1] > 0 for name in names[1:])
    return [Standing(name, interval(values[name], n=n), behind[name], clear and name == names[0]) for name in names]
