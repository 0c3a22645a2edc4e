"""Maps against a known truth: the evidence that generated reviews come with, and the rationales of human readers.

A map finds the evidence if its largest scores are on it. How well it does is the area under the precision-recall curve
of the example's tokens, which needs no threshold.

>>> from tensorlens_utils import load_data, load_model
>>> from tensorlens_utils.perturbation.evidence import areas, evaluate_evidence
>>> model, processor = load_model("tiny-bert")
>>> def length(model, inputs, target):
...     return model.get_input_embeddings()(inputs["input_ids"]).norm(dim=-1)
>>> table = evaluate_evidence(model, processor, load_data("reviews").select(range(50)), {"length": length})
>>> areas(table)["length"].shape, areas(table, kind="negated")["length"].shape
((50,), (12,))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ..results import Job, Table, fill
from .batches import Batches, Method, choose

if TYPE_CHECKING:
    import datasets


def average_precision(scores, evidence) -> float | None:
    """The area under the precision-recall curve of scores (n,) that are to find the evidence (n,), 0 or 1:

        Σ_t (R_t − R_{t−1}) P_t    over the thresholds t, falling; equal scores are found together

    None where all or nothing is evidence, so that there is nothing to find.

    >>> average_precision([3.0, 2.0, 1.0], [1, 0, 1])
    0.8333333333333333
    """
    scores, evidence = np.asarray(scores, float), np.asarray(evidence, bool)
    if evidence.all() or not evidence.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equals
    found = np.cumsum(evidence[order])[ends]
    return float((np.diff(found, prepend=0) / found[-1] * found / (ends + 1)).sum())


def evaluate_evidence(model: nn.Module, processor: Any, dataset: datasets.Dataset, methods: Mapping[str, Method], *,
                      evidence: str = "evidence", target: str | tuple[str, str] = "prediction", column: str = "text",
                      path: str | Path | None = None, batch_size: int = 32, max_length: int | None = None,
                      seed: int = 0, progress: bool = True) -> Table:
    """How well each method's scores find the evidence of each text: rows of `example`, `method`, `target`, `label`,
    `kind` (where the data have such a column) and `area`, the average precision, None where there is nothing to find.

    The column `evidence` has a 0 or 1 for each word of `text.split()`; a token is evidence if the word is to which its
    last character belongs. Needs a fast tokenizer. Other arguments and errors are those of `evaluate`; ValueError too
    where evidence and words differ in number.
    """
    choose("column", [evidence], dataset.column_names)
    batches = Batches(model, processor, dataset, column, target, batch_size, max_length)

    def run(start: int, name: str) -> list[dict[str, Any]]:
        batch, rows = batches.batch(start), dataset[batches.examples(start)]
        scores = batches.scores(start, name, methods[name], seed).cpu().double()
        ends = batches.inputs(rows, return_offsets_mapping=True)["offset_mapping"][..., 1]
        found = []
        for i, example in enumerate(batch.examples):
            words = _words(rows[column][i], rows[evidence][i], example)  # by character; -1 is a blank
            decides = np.array([words[end - 1] if end else -1 for end in ends[i].tolist()])
            use = batch.can[i].cpu().numpy() & (decides >= 0)
            found.append({"example": example, "method": name, **batch.explained(i), "label": batch.label[i],
                          **({"kind": rows["kind"][i]} if "kind" in rows else {}),
                          "area": average_precision(scores[i].numpy()[use], decides[use])})
        return found

    jobs = [Job([(e, name) for e in batches.examples(start)], partial(run, start, name))
            for start in batches.starts for name in methods]
    settings = {**batches.settings(), "evidence": evidence, "seed": seed}
    return fill(path, jobs, key=("example", "method"), settings=settings, progress=progress)


def areas(table: Table, kind: str | None = None) -> dict[str, np.ndarray]:
    """The areas of each method, (examples,), as `perturbation.compare` takes them, where there is something to find; of
    the examples of a kind, if one is named: "negated" means every kind with that word in it."""
    found: dict[str, list] = {}
    for row in table.rows:
        if row["area"] is not None and (kind is None or kind in row["kind"].split()):
            found.setdefault(row["method"], []).append(row["area"])
    return {name: np.array(values) for name, values in found.items()}


def _words(text: str, evidence: Sequence[int], example: int) -> list[int]:
    """For each character of a text whether its word is evidence, -1 for blanks."""
    words = text.split()
    if len(words) != len(evidence):
        raise ValueError(f"Evidence is a 0 or 1 for each word between blanks; example {example} has {len(words)} words "
                         f"and {len(evidence)} marks.")
    marks, seen, inside = [], -1, False
    for character in text:
        seen, inside = seen + (not inside and not character.isspace()), not character.isspace()
        marks.append(int(evidence[seen]) if inside else -1)
    return marks


def load_rationales(path: str | Path) -> datasets.Dataset:
    """Human rationales in the format of FairRationales (Thorn Jakobsen et al. 2023), a local JSON file: rows of `text`;
    `label`, 0 negative or 1 positive; `evidence`, 1 for the words of `text.split()` that at least half of those
    annotators marked who gave that label; `annotators`, how many these are (of six; with none, nothing is evidence).

    Raises FileNotFoundError for a missing file, ValueError for one in another format.
    """
    import datasets

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Rationales are a local file, and there is none at {str(path)!r}. FairRationales is "
                                "on GitHub: terne/Being_Right_for_Whose_Right_Reasons.")
    names, rows = ["negative", "positive"], []
    try:
        for n, given in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            text, label = given["sentence"], given["original_label"]
            marks = [a["rationale"] for a in given["annotations"] if a["label"] == label]
            if {len(mark) for mark in marks} - {len(text.split())}:
                raise ValueError(f"the masks of text {n} and its {len(text.split())} words differ in length")
            votes = [sum(word) for word in zip(*marks, strict=True)] or [-1] * len(text.split())
            evidence = [int(2 * n >= len(marks)) for n in votes]
            rows.append({"text": text, "label": names.index(label), "evidence": evidence, "annotators": len(marks)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"FairRationales is a list of texts, each with sentence, original_label ({' or '.join(names)})"
                         f" and annotations of label and rationale; {path.name!r} is not: {error}.") from error
    return datasets.Dataset.from_list(rows, datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=names),
        "evidence": datasets.List(datasets.Value("int8")), "annotators": datasets.Value("int8")}))
