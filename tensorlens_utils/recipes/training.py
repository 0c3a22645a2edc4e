"""How a tiny model is trained, measured and shipped with its card; the recipes themselves are in `recipes/`.

A run shows its progress, goes on where it was stopped, and on one machine gives the same weights every time: all
randomness is one seeded generator's, kept beside the weights and the optimizer's state, and the number of threads,
which settles the order of sums, is part of the recipe.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import multiprocessing
import os
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import load_model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model of the zoo is made: AdamW, linear warm-up, cosine decay to zero.

    `build()` gives the untrained (model, processor); `batch(n, generator)` gives n training inputs with their labels,
    drawing on that generator alone; `measure(model, processor)` gives the card's numbers, each from `share` or
    `average`. `start` names a zoo model whose shipped weights training starts from, in place of random ones;
    `checkpoints` are the steps, of 0 to the last, whose weights are shipped too. `storage` is the precision of the
    shipped weights; checkpoints have float16.
    """

    name: str
    about: str
    build: Callable[[], tuple[nn.Module, Any]]
    batch: Callable[[int, torch.Generator], dict[str, Tensor]]
    measure: Callable[[nn.Module, Any], dict[str, dict]]
    steps: int
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    seed: int = 0
    threads: int = 1  # models this small gain little from a second, and lose much where the other core is busy
    start: str | None = None
    checkpoints: tuple[int, ...] = ()
    storage: str = "float16"

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class Trained(NamedTuple):
    """What `train` gives: the model in eval mode, its processor, minutes of processor time, and the weights at the
    recipe's checkpoints, by step."""

    model: nn.Module
    processor: Any
    minutes: float
    kept: dict[int, dict[str, Tensor]]


def train(recipe: Recipe, work: str | Path, *, save_every: int = 200, progress: bool = True) -> Trained:
    """Train a recipe to its last step.

    `work` is the folder of the run's state, written every `save_every` steps, with a line of progress. A state there is
    gone on with if its settings, initial weights and first batch are the recipe's, and replaced if not. The global
    random state and number of threads are left as they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        return _train(recipe, Path(work) / recipe.name / "state.pt", save_every, progress)
    finally:
        torch.set_num_threads(threads)


def _train(recipe: Recipe, state_file: Path, save_every: int, progress: bool) -> Trained:
    state_file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, processor = recipe.build()
    if recipe.start is not None:
        model.load_state_dict(load_model(recipe.start)[0].state_dict())
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    run = _fingerprint(recipe, model)
    done, seconds, kept = 0, 0.0, {0: _weights(model)} if 0 in recipe.checkpoints else {}
    if state_file.is_file() and (state := torch.load(state_file)).get("run") == run:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        done, seconds, kept = state["done"], state["seconds"], state["kept"]

    model.train()
    clock, began = time.process_time(), time.perf_counter()
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = model(**recipe.batch(recipe.batch_size, generator)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in recipe.checkpoints:
            kept[step + 1] = _weights(model)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            seconds, clock = seconds + time.process_time() - clock, time.process_time()
            state = {"run": run, "done": step + 1, "seconds": seconds, "kept": kept, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)  # a run stopped while saving keeps the older state
            if progress:
                left = (time.perf_counter() - began) / (step + 1 - done) * (recipe.steps - step - 1) / 60
                print(f"{recipe.name:18}{step + 1:7,} of {recipe.steps:,} steps   loss {loss.item():.3f}   "
                      f"{left:.1f} minutes left", flush=True)
    return Trained(model.eval(), processor, seconds / 60, kept)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _fingerprint(recipe: Recipe, model: nn.Module) -> str:
    """What tells one run from another: its settings, initial weights and first batch, in a digest."""
    batch = recipe.batch(recipe.batch_size, torch.Generator().manual_seed(recipe.seed))
    settings = {key: value for key, value in vars(recipe).items() if isinstance(value, int | float | tuple)}
    digest = hashlib.sha256(repr(settings).encode())
    for values in (*model.state_dict().values(), *batch.values()):
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def ship(recipe: Recipe, out: str | Path, work: str | Path, **options: Any) -> dict[str, Any]:
    """Train a recipe, write the model, its processor, checkpoints and card to `out`/NAME in Hugging Face layout, and
    return the card's numbers, which are measured on the weights as stored."""
    import transformers

    trained, folder = train(recipe, work, **options), Path(out) / recipe.name
    transformers.utils.logging.disable_progress_bar()
    stages = [(folder / f"step{step}", weights, "float16") for step, weights in trained.kept.items()]
    for place, weights, storage in (*stages, (folder, _weights(trained.model), recipe.storage)):
        trained.model.load_state_dict(weights)
        copy.deepcopy(trained.model).to(getattr(torch, storage)).save_pretrained(place)
        trained.processor.save_pretrained(place)
    model, processor = load_model(folder, dtype="float32")
    measured = {**recipe.measure(model, processor), "parameters": model.num_parameters(), "seed": recipe.seed,
                "steps": recipe.steps, "batch_size": recipe.batch_size, "learning_rate": recipe.lr,
                "weight_decay": recipe.weight_decay, "threads": recipe.threads,
                "cpu_minutes": round(trained.minutes, 1), "torch": torch.__version__.split("+")[0]}
    (folder / "README.md").write_text(_card(recipe, measured), encoding="utf-8")
    return measured


def _card(recipe: Recipe, measured: dict[str, Any]) -> str:
    """The text of a model's card."""
    import yaml

    front = yaml.safe_dump({"license": "mit", "library_name": "transformers", "measured": measured}, sort_keys=False,
                           allow_unicode=True, width=120)
    rows = "\n".join(f"| {key} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']} |"
                     for key, m in measured.items() if isinstance(m, dict))
    stored = [f"Training starts from the weights of {recipe.start}."] if recipe.start else []
    if recipe.storage != "float32":
        stored.append(f"The weights are stored in {recipe.storage}, and the numbers are those of the stored weights.")
    if recipe.checkpoints:
        stored.append(f"Checkpoints along the way, in float16: `load_model(\"{recipe.name}\", revision=...)` with "
                      + ", ".join(f"step{step}" for step in recipe.checkpoints if step <= recipe.steps) + ".")
    made = (f"{measured['parameters']:,} parameters; seed {recipe.seed}; {recipe.steps:,} steps of "
            f"{recipe.batch_size}; AdamW, highest learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}; "
            f"{measured['cpu_minutes']} minutes of one CPU core with torch {measured['torch']}. "
            + "".join(f"{sentence} " for sentence in stored)
            + f"The same machine gives the same weights again. Written, numbers included, by `python -m "
            f"tensorlens_utils.recipes {recipe.name}`.")
    return "\n".join((
        f"---\n{front}---\n# {recipe.name}\n", textwrap.fill(recipe.about, 120),
        "\n| on held-out data | value | 95 % interval | of |\n|---|---|---|---|", rows, "",
        "Intervals are Wilson's for shares, Student's for means.\n", textwrap.fill(made, 120), ""))


def share(right: Tensor) -> dict[str, float]:
    """The share of True in a boolean tensor with its 95 % Wilson interval: {"value", "low", "high", "n"}.

    >>> share(torch.tensor([True] * 98 + [False] * 2))
    {'value': 0.98, 'low': 0.93, 'high': 0.9945, 'n': 100}
    """
    from scipy.stats import binomtest

    k, n = int(right.sum()), right.numel()
    interval = binomtest(k, n).proportion_ci(method="wilson")
    low, high = round(float(interval.low), 4), round(float(interval.high), 4)
    return {"value": round(k / n, 4), "low": low, "high": high, "n": n}


def average(values: Tensor) -> dict[str, float]:
    """The mean of independent values with its 95 % interval, Student's: {"value", "low", "high", "n"}.

    >>> average(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    {'value': 2.5, 'low': 0.4457, 'high': 4.5543, 'n': 4}
    """
    from scipy.stats import sem, t

    x = values.double().flatten().numpy()
    mean, half = float(x.mean()), float(t.ppf(0.975, len(x) - 1) * sem(x))
    return {"value": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "n": len(x)}


def begin_worker() -> None:
    """At the start of a process that trains for another: it takes one core, and ends when the other ends, however."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
