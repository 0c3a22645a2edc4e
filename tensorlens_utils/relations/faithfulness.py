"""How well relation decoders decode: trials over relations, seeds, layers, β and ranks, and what they have shown.

In a trial, a seed draws the n examples that a decoder learns from; each stands in a prompt after the others, and every
other sample of the relation in a prompt after all n (LRE, §4). For each sample that was not learned from:

    faithful     the decoder's first choice agrees with the object, on the samples that the model itself gets right
    top3         one of its first three does, on the same samples
    truth        its first choice agrees with the object, on all samples
    agreement    its first choice is the model's own next token, on all samples
    kl           KL(model's next token ‖ decoder's), nats, on all samples

A token agrees with an object that it is a beginning of, in whichever case, since objects may have several tokens; where
the tokenizer has whole words only, it must be the object's first. β and the layer are chosen on the examples alone,
each decoded by what the others give (`choose`); b is never refitted to the test.

>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.relations import world_relations
>>> model, tokenizer = load_model("tiny-gpt")
>>> some = {name: world_relations()[name] for name in ("element_symbol", "fruit_colour")}
>>> table = evaluate_relations(model, tokenizer, some, seeds=2, betas=[1, 2], layers=[0], decoders=["tensor", "bias"],
...                            progress=False)
>>> by_relation = {name: float(overall(values)) for name, values in scores(table, "tensor").items()}
>>> by_relation["element_symbol"] > 0.9 > 0.2 > float(overall(scores(table, "bias")["element_symbol"]))
True
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..models import fingerprint, n_blocks
from ..perturbation.batches import choose as one_of
from ..results import Job, Table, fill
from . import Relation
from .decoders import DECODERS, RULES, Examples, examples_of, fit
from .subjects import Asked, check_ranks

BETAS = tuple(x / 4 for x in range(21))  # LRE's grid, 0 to 5
STANDARD = ("tensor", "lre", "ridge", "translation", "bias", "identity")
MEASURES = ("faithful", "top3", "truth", "agreement", "kl", "causal")
CONTROLS = ("zero-shot", "shuffled", "other relation")
ROWS = 256  # guesses of o that the head takes in one call, at most, where one setting has fewer


class Setting(NamedTuple):
    """Where a decoder takes s, and its β and rank; rank 0 is W whole."""

    layer: int
    beta: float = 1.0
    rank: int = 0


def agrees(tokenizer) -> Callable[[int, str], bool]:
    """Whether a token agrees with an object: it is a beginning of it, or, where tokens are whole words, its first word.
    A token that is a part of a letter, as byte tokenizers have for "Ō", agrees with none.

    >>> from tensorlens_utils.data.world import tokenizer
    >>> words = tokenizer()
    >>> [agrees(words)(words.convert_tokens_to_ids(word), "ca") for word in ("ca", "c")]
    [True, False]
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = type(getattr(backend, "model", None)).__name__ == "WordLevel"
    text = functools.cache(lambda token: tokenizer.decode([token]).strip().lower())

    def check(token: int, target: str) -> bool:
        said, target = text(int(token)), target.strip().lower()
        return target.split()[0] == said if words else bool(said) and target.startswith(said)

    return check


# ---------------------------------------------------------------------------------------------------------- one trial


class Trial:
    """One relation under one seed: what its examples and its other samples give at these boundaries.

    template: the wording by its number; None: the seed's, one after the other (LRE takes the first). keep: as `Asked`
    has it, of the other samples.
    """

    def __init__(self, model: nn.Module, tokenizer, relation: Relation, seed: int, n_examples: int = 5,
                 template: int | None = 0, keep: bool = True):  # fmt: skip
        self.model, self.tokenizer, self.relation, self.seed, self.n = model, tokenizer, relation, seed, n_examples
        self.template = seed % len(relation.prompt_templates) if template is None else template
        self.train, self.test = relation.split(n_examples, seed)
        prompts = [relation.prompt(x, self.train, self.template) for x in self.test]
        self.asked = Asked(model, tokenizer, prompts, keep=keep)

    def row(self, name: str, decoder: str, columns: Mapping[str, Sequence]) -> dict[str, Any]:
        """A table's row of one decoder, with the places that the samples tested have in the relation."""
        return {"relation": name, "seed": self.seed, "decoder": decoder, **columns,
                "samples": [self.relation.samples.index(sample) for sample in self.test],
                "n_samples": len(self.relation.samples)}  # fmt: skip

    def learned(self, shots: bool = True, dealt_anew: bool = False) -> Asked:
        """The examples, each asked after the others, or after none; or with their objects dealt anew."""
        source = self.relation.shuffled(self.seed) if dealt_anew else self.relation
        train, _ = source.split(self.n, self.seed)
        prompts = [source.prompt(x, train if shots else (), self.template) for x in train]
        return Asked(self.model, self.tokenizer, prompts)


def _judged(trial: Trial, check: Callable, logits: Tensor) -> dict[str, list]:
    """What the logits (n, words) of the test samples come to, by measure."""
    top, own = logits.topk(3).indices.tolist(), trial.asked.logits
    hits = [[check(token, sample.object) for token in row] for row, sample in zip(top, trial.test, strict=True)]
    p = own.log_softmax(-1)
    kl = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
    return {"truth": [int(row[0]) for row in hits], "top3": [int(any(row)) for row in hits],
            "agreement": [int(row[0] == token) for row, token in zip(top, own.argmax(-1).tolist(), strict=True)],
            "kl": [float(f"{x:.4g}") for x in kl.tolist()]}  # fmt: skip


def _sweep(trial: Trial, check: Callable, name: str, examples: dict[int, Examples], own: Tensor,
           betas: Sequence[float], ranks: Sequence[int]) -> list[dict[str, Any]]:  # fmt: skip
    """A decoder at every layer and β, and then, where these do best on its examples, at every rank."""
    rows, asked = [], trial.asked

    def measured(k: int, betas: Sequence[float], ranks: Sequence[int]) -> None:
        """By all examples, and by all but each; by all again where there is one."""
        x = examples[k]
        at = [fit(name, x), *(fit(name, x.without(i) if len(x) > 1 else x) for i in range(len(x)))]
        settings, guesses = [Setting(k, float(beta), rank) for rank in ranks for beta in betas], []
        for _, beta, rank in settings:
            whole, *parts = (replace(d.truncated(rank) if rank else d, beta=beta) for d in at)
            left_out = [d.decode(s[None]) for d, s in zip(parts, x.s, strict=True)]
            guesses.append(torch.cat([*left_out, whole.decode(asked.s[k])]))
        some = torch.stack(guesses).split(max(1, ROWS // len(guesses[0])))
        for setting, logits in zip(settings, (one for part in some for one in asked.head(part)), strict=True):
            log = logits[: len(x)].log_softmax(-1)
            rows.append({"setting": setting,
                         "left_out": float((log.argmax(-1) == own).double().mean()),
                         "left_out_log": float(log.gather(1, own[:, None]).mean()),
                         **_judged(trial, check, logits[len(x) :])})  # fmt: skip

    for k in examples:
        measured(k, betas, [0])
    best = max(rows, key=_on_examples)["setting"]
    if ranks:
        measured(best.layer, [best.beta], ranks)
    return rows


def _on_examples(row: Mapping[str, float]) -> tuple[float, float]:
    """What a setting is chosen by: how many examples it decodes when it has not learned from them, then how well."""
    return row["left_out"], row["left_out_log"]


def evaluate_relations(model: nn.Module, tokenizer: Any, relations: Mapping[str, Relation], *, seeds: int = 5,
                       n_examples: int = 5, layers: Sequence[int] | None = None,
                       decoders: Sequence[str] = STANDARD, betas: Sequence[float] = BETAS,
                       ranks: Sequence[int] = (), controls: Sequence[str] = (), template: int | None = 0,
                       path: str | Path | None = None, progress: bool = True) -> Table:  # fmt: skip
    """Trials of all relations under seeds 0, 1, ..., as a table that can be stopped and gone on with (results.py).

    A row is one decoder in one trial. Its `settings` are [layer, β, rank], and for each of them it has a value for each
    test sample, `truth`, `top3`, `agreement` (0 or 1) and `kl`; and for the examples, each decoded by what the others
    give, the averages `left_out` and `left_out_log`, which `choose` goes by. The decoder "model" is the model itself,
    whose `truth` says which samples it gets right, and whose `samples` which of the relation's these are.

    Args:
        relations: of relations.py. n_examples: that a decoder learns from, and that stand in a prompt; two or more,
            but for 1 nothing is left out and the example itself is what settings are chosen by.
        layers: boundaries, of 0 to n_blocks − 1; None: all, which cost no more passes than the first of them.
        decoders: of `DECODERS`. betas: for those with a W from the model (`RULES`) and their controls; others have 1.
        ranks: of W, for the same, at the layer and β that the trial's own examples choose.
        controls: of "zero-shot" (W and b from prompts without examples), "shuffled" (from prompts whose objects are
            dealt anew) and "other relation" (the W of the next relation, b refitted): "tensor, shuffled" and so on.
        template: as in `Trial`. path: where the table is kept.

    Raises ValueError for names that are none, layers, wordings and ranks that are not there, nothing to try, a relation
    with too few subjects, and a table at `path` made with other settings.
    """
    layers = [*range(n_blocks(model))] if layers is None else [*layers]
    for what, given, allowed in (("decoder", decoders, DECODERS), ("control", controls, CONTROLS),
                                 ("layer", layers, range(n_blocks(model)))):  # fmt: skip
        one_of(what, given, allowed)
    something(relations=relations, seeds=range(seeds), layers=layers, betas=betas)
    if "other relation" in controls and len(relations) < 2:
        raise ValueError("the control 'other relation' takes the W of another relation, and here is one alone: give "
                         "two or more, or leave it out")
    names, check, matrix = [*relations], agrees(tokenizer), [name for name in decoders if name in RULES]

    @functools.lru_cache(2 if "other relation" in controls else 1)
    def learned(name: str, seed: int) -> tuple[Trial, dict[int, Examples], Tensor]:
        trial = Trial(model, tokenizer, relations[name], seed, n_examples, template, keep=False)
        check_ranks(ranks, trial.asked.o.shape[-1])
        asked = trial.learned()
        return trial, examples_of(asked, layers, matrix), asked.logits.argmax(-1)

    def controlled(control: str, name: str, seed: int) -> tuple[dict[int, Examples], Tensor]:
        trial, examples, own = learned(name, seed)
        if control == "other relation":
            other = learned(names[(names.index(name) + 1) % len(names)], seed)[1]
            return {k: examples[k].of_other(other[k]) for k in layers}, own
        asked = trial.learned(shots=control != "zero-shot", dealt_anew=control == "shuffled")
        return examples_of(asked, layers, matrix), asked.logits.argmax(-1)

    def run(name: str, seed: int) -> Iterator[dict[str, Any]]:
        trial, examples, own = learned(name, seed)
        found = {"model": [{"setting": Setting(0), "left_out": 1.0, "left_out_log": 0.0,
                            **_judged(trial, check, trial.asked.logits)}]}  # fmt: skip
        for decoder in decoders:
            grid = (betas, ranks) if decoder in RULES else ([1.0], ())
            found[decoder] = _sweep(trial, check, decoder, examples, own, *grid)
        for control in controls:
            changed = controlled(control, name, seed)
            for decoder in matrix:
                found[f"{decoder}, {control}"] = _sweep(trial, check, decoder, *changed, betas, ())
        for decoder, rows in found.items():
            columns = {("settings" if c == "setting" else c): [row[c] for row in rows] for c in rows[0]}
            yield trial.row(name, decoder, columns)

    made = ["model", *decoders, *(f"{decoder}, {control}" for control in controls for decoder in matrix)]
    jobs = [Job([(name, seed, decoder) for decoder in made], functools.partial(run, name, seed))
            for seed in range(seeds) for name in names]  # fmt: skip
    settings = {**fingerprints(model, relations), "n_examples": n_examples, "layers": layers,
                "betas": [float(b) for b in betas], "ranks": [*ranks], "template": template}  # fmt: skip
    return fill(path, jobs, key=("relation", "seed", "decoder"), settings=settings, progress=progress)


def something(**given: Collection) -> None:
    """ValueError where there is none of what trials need."""
    for what, values in given.items():
        if not values:
            raise ValueError(f"trials take one or more of the {what}, and here is none: {values!r}")


def fingerprints(model: nn.Module, relations: Mapping[str, Relation]) -> dict[str, Any]:
    """What tells one model and one set of relations from others: digests of the one and of all that the others hold."""
    data = hashlib.sha256(repr([*relations.values()]).encode()).hexdigest()
    return {"model": fingerprint(model), "relations": [*relations], "data": data[:12]}


# --------------------------------------------------------------------------------------------------- what was shown


def choose(table: Table, decoder: str, *, layer: int | None = None, beta: float | None = None, rank: int | None = 0,
           pooled: bool = True) -> dict[tuple[str, int], Setting]:  # fmt: skip
    """The setting of each relation and seed, {(relation, seed): setting}, among those with this layer, this β and this
    rank (None: any), that does best on the examples: those of all relations under the seed, or, not `pooled`, its own.

    Raises ValueError for a decoder that the table does not have, and for settings that it does not have.
    """
    rows, found = _rows(table, decoder), {}
    places = {id(row): {Setting(*s): i for i, s in enumerate(row["settings"])} for row in rows}

    def quality(s: Setting, peers: list[dict]) -> list[float]:
        at = [(row, places[id(row)][s]) for row in peers if s in places[id(row)]]
        return [np.mean([row[column][i] for row, i in at]) for column in ("left_out", "left_out_log")]

    for row in rows:
        peers = [r for r in rows if r["seed"] == row["seed"]] if pooled else [row]
        use = [s for s in places[id(row)]
               if layer in (None, s.layer) and beta in (None, s.beta) and rank in (None, s.rank)]
        if not use:
            raise ValueError(f"{decoder!r} was not evaluated at layer {layer}, β {beta}, rank {rank}; its settings are "
                             f"{', '.join(str(s) for s in row['settings'][:4])} and so on")
        found[row["relation"], row["seed"]] = max(use, key=lambda s, peers=peers: quality(s, peers))
    return found


def scores(table: Table, decoder: str, measure: str = "faithful",
           at: Mapping[tuple[str, int], Setting] | None = None, **settings: Any) -> dict[str, np.ndarray]:  # fmt: skip
    """What a decoder scores, by relation: (seeds, samples of the relation), NaN for a sample that was learned from or
    does not count. `at` is of `choose`; by default it chooses by these `settings`, of all ranks where the measure is
    "causal", and W whole otherwise. Raises ValueError for measures that the table has not."""
    first = _rows(table, decoder)[0]
    one_of("measure", [measure], [m for m in MEASURES if m in first or m == "faithful" and "truth" in first])
    at = choose(table, decoder, **{"rank": None if measure == "causal" else 0} | settings) if at is None else at
    right = {(row["relation"], row["seed"]): row["truth"][0] for row in table.rows if row["decoder"] == "model"}
    column, found = {"faithful": "truth"}.get(measure, measure), {}
    for row in _rows(table, decoder):
        key = row["relation"], row["seed"]
        values = np.array(row[column][[Setting(*s) for s in row["settings"]].index(at[key])], float)
        if measure in ("faithful", "top3"):
            values[np.array(right[key]) == 0] = np.nan
        line = np.full(row["n_samples"], np.nan)
        line[row["samples"]] = values
        found.setdefault(row["relation"], []).append(line)
    return {name: np.stack(lines) for name, lines in found.items()}


def _rows(table: Table, decoder: str) -> list[dict[str, Any]]:
    rows = table.where(decoder=decoder)
    if not rows:
        one_of("decoder", [decoder], {row["decoder"]: None for row in table.rows})
    return rows


def overall(values: np.ndarray) -> float:
    """The mean of the scores (seeds, samples) that are there."""
    return float(np.nanmean(values))


def crossed(values: np.ndarray, n: int = 4000, seed: int = 1) -> np.ndarray:
    """The mean of scores (seeds, samples), NaN where there is none, with its 95 % interval over seeds and samples both:
    (value, low, high). Seeds and samples are each drawn again, every score weighing as often as its seed times as often
    as its sample (the pigeonhole bootstrap, Owen 2007), which counts that a sample comes under several seeds. One seed
    is drawn alone, and the interval then is over samples.

    Raises ValueError for scores of fewer than two samples, of which no draw could tell anything.

    >>> crossed(np.array([[1.0, 0.0, np.nan], [1.0, np.nan, 1.0]])).round(2).tolist()[0]
    0.75
    """
    values = np.asarray(values, float)
    there = ~np.isnan(values)
    if there.any(0).sum() < 2:
        raise ValueError(f"an interval takes scores of two samples or more, and here are {there.any(0).sum()}: the "
                         "model gets no more of them right, say")
    seeds, samples = _times(values.shape, n, seed)
    total, count = (((seeds @ x) * samples).sum(1) for x in (np.where(there, values, 0.0), there.astype(float)))
    return np.array([overall(values), *np.quantile(total[count > 0] / count[count > 0], [0.025, 0.975])])


@functools.lru_cache(16)
def _times(shape: tuple[int, ...], n: int, seed: int) -> list[np.ndarray]:
    """How often each of m comes in each of n draws of m, for every m of the shape: (n, m)."""
    random = np.random.default_rng(seed)
    return [random.multinomial(m, np.full(m, 1 / m), size=n) for m in shape]


def ahead(table: Table, a: str, b: str, measure: str = "faithful", **settings: Any) -> dict[str, np.ndarray]:
    """How far decoder a is ahead of b on the same samples, by relation: (seeds, samples), for `crossed`; `settings` as
    in `choose`, for both."""
    first, second = (scores(table, name, measure, **settings) for name in (a, b))
    return {name: first[name] - second[name] for name in first}
