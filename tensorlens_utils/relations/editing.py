"""Editing through a decoder: is the subject changed as W asks for, does the model say the other object?

If W leads from s to o, the smallest change of s that makes o into another subject's o' is

    Δs = W†_r·(o' − o)        W†_r = V_r·S_r⁻¹·U_rᵀ        (Hernandez et al., arXiv 2308.09124, "LRE", §3.4)

and the decoder is *causal* where the model, with s + Δs in the place of s, says the object of o'. `evaluate_causality`
asks that of every decoder beside what needs none; the rank, and the layer, are chosen on the examples alone, as β is.

An `Edit` makes it a change of the model: whatever x crosses the boundary becomes x + ⟨k, x⟩·Δs, with a key k that
answers 1 to s and as little as it can to all other states (a rank-one edit, as ROME's: Meng et al. 2022, eq. 2).

>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.relations.faithfulness import overall, scores
>>> from tensorlens_utils.relations import world_relations
>>> model, tokenizer = load_model("tiny-gpt")
>>> some = {"element_symbol": world_relations()["element_symbol"]}
>>> table = evaluate_causality(model, tokenizer, some, seeds=1, layers=[0], ranks=[8, 32], progress=False,
...                            editors=["tensor", "subject"])
>>> overall(scores(table, "subject", "causal")["element_symbol"]) > 0.9
True
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..linearize import crossings
from ..models import n_blocks
from ..perturbation.batches import choose as one_of
from ..results import Job, Table, fill
from . import Relation, Sample
from .decoders import RULES, examples_of, fit
from .faithfulness import Trial, agrees, fingerprints, something
from .subjects import Asked, check_ranks

# by W†_r: "tensor", "lre"; by another W: "ridge", "translation" (whose W is the identity); in the place of s: the other
# subject's s, its o, or the row of the output embedding that stands for its object, as long as s
EDITORS = ("tensor", "lre", "ridge", "translation", "subject", "object state", "object embedding")


def evaluate_causality(model: nn.Module, tokenizer: Any, relations: Mapping[str, Relation], *, seeds: int = 5,
                       n_examples: int = 5, layers: Sequence[int] | None = None, ranks: Sequence[int] = (8, 32, 128),
                       editors: Sequence[str] = EDITORS, template: int | None = 0, path: str | Path | None = None,
                       progress: bool = True) -> Table:  # fmt: skip
    """Trials as in `faithfulness.evaluate_relations`, of which `choose` and `scores(table, editor, "causal")` read.

    Each sample that was not learned from, and that the model gets right, gets as target another such sample with
    another object, drawn by the seed. A row is one editor in one trial, with `settings` [layer, 1, rank] (rank 0 where
    none is used), and `causal` for each sample, 1 where the edited model's first choice agrees with the target's object
    and None where there is no target. `left_out` and `left_out_log` are of edits from each example to each other, by a
    decoder that learned from both; 0 where nothing is to be chosen: an editor has one setting only, or the model goes
    on with one word for all examples.

    Raises ValueError as `evaluate_relations` does, and for one example where there is something to be chosen.
    """
    layers = [*range(n_blocks(model))] if layers is None else [*layers]
    one_of("editor", editors, EDITORS)
    one_of("layer", layers, range(n_blocks(model)))
    something(relations=relations, seeds=range(seeds), layers=layers, editors=editors, ranks=ranks)
    tried = {e: ranks if e in RULES else [max(1, n_examples - 1)] if e == "ridge" else [0] for e in editors}
    if n_examples < 2 and max(len(layers) * len(of) for of in tried.values()) > 1:
        raise ValueError("layers and ranks are chosen by edits between examples, two or more, and n_examples is "
                         f"{n_examples}: give more, or one layer and one rank")
    check = agrees(tokenizer)

    def edits(editor: str, asked: Asked, to: Tensor, decoder, k: int, rank: int) -> Tensor:
        """What stands in the place of each s at boundary k, (n, d), for targets `to` (n,)."""
        s, o = asked.s[k], asked.o
        if editor == "subject":
            return s[to]
        if editor == "object state":
            return o[to]
        if editor == "object embedding":
            row = model.get_output_embeddings().weight.detach()[asked.logits.argmax(-1)[to]].to(s)
            return row * (s.norm(dim=1) / row.norm(dim=1))[:, None]
        return s + (o[to] - o if editor == "translation" else decoder.edit(o[to] - o, rank))

    def run(name: str, seed: int) -> Iterator[dict[str, Any]]:
        trial = Trial(model, tokenizer, relations[name], seed, n_examples, template)
        check_ranks(ranks if {*RULES} & {*editors} else (), trial.asked.o.shape[-1])
        learned, asked, head = trial.learned(), trial.asked, trial.asked.head
        examples = examples_of(learned, layers, editors)
        right = [check(token, x.object) for token, x in zip(asked.logits.argmax(-1), trial.test, strict=True)]
        to = _targets(trial.test, right, random.Random(f"{seed} {name} targets"))
        pairs = [torch.arange(n_examples).roll(shift) for shift in range(1, n_examples)]
        for editor in editors:
            rows: dict[str, list] = {"settings": [], "causal": [], "left_out": [], "left_out_log": []}
            choices = len(layers) * len(tried[editor])
            for k in layers:
                decoder = fit(editor, examples[k]) if editor in (*RULES, "ridge") else None
                for rank in tried[editor]:
                    said = head(asked.answer(edits(editor, asked, to, decoder, k, rank), k)).argmax(-1)
                    hits = [int(check(token, trial.test[j].object)) if j != i else None
                            for i, (token, j) in enumerate(zip(said, to.tolist(), strict=True))]
                    log, own = [], learned.logits.argmax(-1)
                    for pair in pairs if choices > 1 else ():  # those with one object are left as they are
                        other = own[pair] != own
                        made = head(learned.answer(edits(editor, learned, pair, decoder, k, rank), k)).log_softmax(-1)
                        log += [*zip((made.argmax(-1) == own[pair])[other].tolist(),
                                     made.gather(1, own[pair][:, None])[other, 0].tolist(), strict=True)]  # fmt: skip
                    means = torch.tensor(log or [(0.0, 0.0)], dtype=torch.float64).mean(0).tolist()
                    values = ([k, 1.0, rank if editor in RULES else 0], hits, *means)
                    for column, value in zip(rows, values, strict=True):
                        rows[column].append(value)
            yield trial.row(name, editor, rows)

    jobs = [Job([(name, seed, editor) for editor in editors], functools.partial(run, name, seed))
            for seed in range(seeds) for name in relations]  # fmt: skip
    settings = {**fingerprints(model, relations), "n_examples": n_examples, "layers": layers, "ranks": [*ranks],
                "template": template}  # fmt: skip
    return fill(path, jobs, key=("relation", "seed", "decoder"), settings=settings, progress=progress)


def _targets(samples: Sequence[Sample], right: Sequence[bool], rng: random.Random) -> Tensor:
    """For each sample that is right another such one with another object and subject; for all others itself."""
    to = []
    for i, sample in enumerate(samples):
        others = [j for j, other in enumerate(samples)
                  if right[j] and other.object != sample.object and other.subject != sample.subject]  # fmt: skip
        to.append(rng.choice(others) if right[i] and others else i)
    return torch.tensor(to)


# ------------------------------------------------------------------------------------------------- edits of the model


@dataclass(frozen=True)
class Edit:
    """x + ⟨key, x⟩·delta in the place of every x (d,) that crosses boundary `layer`, 0 to n_blocks."""

    layer: int
    key: Tensor
    delta: Tensor

    @contextmanager
    def applied(self, model: nn.Module):
        """Inside, the model is edited. Raises ValueError for a boundary that it has not."""
        if self.layer not in range(n_blocks(model) + 1):
            raise ValueError(f"an edit is made at a boundary of the model, 0 to {n_blocks(model)}; not at "
                             f"{self.layer!r}")

        def meet(k: int, hidden: Tensor) -> Tensor:
            if k != self.layer:
                return hidden
            return (hidden + (hidden.to(self.key) @ self.key)[..., None] * self.delta).to(hidden.dtype)

        with crossings(model, meet):
            yield


def key(s: Tensor, states: Tensor, ridge: float = 1e-3) -> Tensor:
    """The key that answers 1 to s (d,) and least, in the mean square, to `states` (n, d):

        k = C⁻¹·s / sᵀ·C⁻¹·s        C = Σ x·xᵀ/n + ridge·tr(C)/d·I

    in float32 or better. Raises ValueError for an s of zeros, and where there are no states but zeros.

    >>> states = torch.eye(3, dtype=torch.float64)[:2].repeat(5, 1)
    >>> k = key(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), states)
    >>> [round(float(x), 3) for x in k]
    [0.001, 0.0, 0.999]
    """
    if not s.any() or not states.any():
        raise ValueError("a key is the answer to a state among others, and here " +
                         ("s is zero" if not s.any() else f"of {len(states)} states none is other than zero"))
    s, states = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, states))
    C = states.mT @ states / len(states)
    C = C + ridge * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype, device=C.device)
    found = torch.linalg.solve(C, s)
    return found / (s @ found)
