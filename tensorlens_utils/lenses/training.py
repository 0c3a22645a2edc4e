"""Training lenses: every head of every layer at once, from one pass of the model over a stream of text.

A step runs the model once on a batch, catches z of all heads and the model's own log-probabilities, which all heads
share, and takes one step of Adam on all lenses. It starts where Newton's damped step from the unigram ends (see
`families`), which costs one pass over the first batches.

Nothing is random but the text: the same text, model and settings give the same file, to the last bit on one CPU with
one number of threads. A run that was stopped, killed even, goes on from its last state and ends in the same file.

Several processes, on one machine or many, with a GPU each or none, share each batch: each runs the model on its own
rows, and sums over positions are added up before a step.

    from accelerate import Accelerator
    train(heads, batches, path="lens.safetensors", accelerator=Accelerator(), ...)     # accelerate launch script.py
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attentions import main_input
from . import Lens, differences, fits, load_lens, sketch
from .data import repeated
from .families import FAMILIES, Family, Full, Shared
from .heads import NEVER, Captured, Heads
from .moments import Moments
from .regression import OBJECTIVES, damped, gradient, losses, same

WARM_UP = 10  # steps over which the step length grows


def train(heads: Heads, batches: Iterable, *, held_out: Iterable = (), family: str = "full", objective: str = "kl",
          steps: int = 200, lr: float = 0.03, warm: int = 8, rank: int = 4, positions: str | int | None = None,
          path: str | Path | None = None, save_every: int = 50, precision: torch.dtype | None = None,
          moments: Moments | None = None, accelerator: Any = None, progress: bool = True) -> Lens:  # fmt: skip
    """Train the lenses of all heads of a model.

    Args:
        heads: the model's.
        batches: inputs of the model, the same at every pass, as those of data.py give them, or what
            `Heads.capture` made of them, to be used for several lenses. The first one settles α, the next `warm` ones
            the moments; then all are gone through from the first, over again where they end before the steps. One
            that has none of `positions` is passed over.
        held_out: batches of other text, on which the mean KL to the model is measured.
        family: one of `FAMILIES`.
        objective: one of `regression.OBJECTIVES`, for each head by itself; or "sum", Attention Lens': the forward KL of
            the sum over a layer's heads, which are taken apart afterwards, each with the layer's bias.
        steps: of Adam; 0 leaves the closed form.
        lr: the longest step, in white coordinates; it grows over the first steps and falls to 0 along a line.
        rank: of the family "low rank".
        positions: "all", "last" of each text, or one, as 0 for a class token. None: "all", but "last" for "sum".
        path: where the file goes; beside it, with ".state" added, what a stopped run goes on from. A finished file is
            given back as it is. Either is told by the model's weights, all that is said here, the first 1 + `warm`
            batches, and the text held out.
        save_every: steps between two states, and between two lines of progress.
        precision: of the products, as torch.bfloat16; None: that of `heads`.
        moments: for `batches` 1 to `warm`, where they are known from another run.
        accelerator: accelerate's, where several processes share each batch by its rows.

    Raises:
        ValueError: for a family or objective that there is not, and the two that do not go together ("sum" with
            "shared by …"); for text that cannot be gone through again, or has too few positions; for moments of other
            heads, or for other objectives; for a path with another run's state or lens.

    >>> from tensorlens_utils import load_model
    >>> from tensorlens_utils.data import world
    >>> model, tokenizer = load_model("tiny-gpt")
    >>> heads = Heads(model, tokenizer(["a story"], return_tensors="pt"), tokenizer)
    >>> text = [{"input_ids": world.Text(seed).rows(2)} for seed in range(3)]
    >>> train(heads, text, family="translator", steps=2, warm=2, progress=False).family.parameters["T"].shape
    torch.Size([32, 128, 16])
    """
    known = [*OBJECTIVES, "sum"]
    if family not in FAMILIES or objective not in known:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, and objective one of {', '.join(known)}; they "
                         f"are {family!r} and {objective!r}")  # fmt: skip
    if min(steps, warm) < 0 or save_every < 1:
        raise ValueError(f"steps and warm are counted from 0, save_every from 1; they are {steps}, {warm} and "
                         f"{save_every}")  # fmt: skip
    batches, held_out = repeated(batches, "batches"), repeated(held_out, "batches held out")
    if positions is None:
        positions = "last" if objective == "sum" else "all"
    settings = {**fits(heads), "family": family, "objective": objective, "positions": positions, "steps": steps,
                "lr": lr, "warm": warm, "rank": rank, "precision": str(precision or heads.dtype),
                "dtype": str(next(heads.model.parameters()).dtype),
                "text": _digest(itertools.islice(batches, 1 + warm)), "held_out_text": _digest(held_out),
                "moments": moments and [moments.n, *sketch(moments.mu, moments.S, moments.offset)]}  # fmt: skip
    if settings["text"] is None or held_out and settings["held_out_text"] is None:
        raise ValueError(f"training needs at least one batch, and there is none{' held out' * bool(settings['text'])}: "
                         "is the text shorter than a batch?")  # fmt: skip
    path = None if path is None else Path(path)
    if path is not None and path.exists():
        lens = load_lens(path, heads)
        _same(settings, lens.about, path)
        return lens
    run = Run(heads, settings, accelerator)
    state = None if path is None else path.with_name(path.name + ".state")
    if state is None or not state.exists():
        run.begin(batches, held_out, moments)
    else:
        run.go_on(torch.load(state, map_location=heads.W_O.device), state)
    began, first = time.monotonic(), run.done
    for batch in itertools.islice(_over_again(batches), run.done, steps):
        run.step(batch, precision)
        if run.done % save_every == 0 and run.done < steps:
            run.note(held_out)
            if state is not None and run.main:
                torch.save(run.state(), half := path.with_name(path.name + ".half"))
                os.replace(half, state)  # a run that is stopped while saving keeps the older state
            if progress and run.main:
                left = (time.monotonic() - began) / (run.done - first) * (steps - run.done) / 60
                kl = f"{run.measured['on the way'][-1][1]:.3f}" if held_out else "not measured"
                print(f"{family}, {objective:10}{run.done:7,} of {steps:,} steps   held-out KL, median head: {kl}   "
                      f"{left:.1f} minutes left", flush=True)  # fmt: skip
    lens = run.lens(held_out)
    if path is not None and run.main:
        lens.save(path)
        for rest in (state, path.with_name(path.name + ".half")):
            rest.unlink(missing_ok=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return lens


class Run:
    """A run of `train`: the lenses as they stand, the optimizer, how far it is, and what it has measured. It starts by
    `begin` or `go_on`, or by `optimize` from a family of one's own; then come `step` after `step`, and `lens`."""

    def __init__(self, heads: Heads, settings: dict, accelerator: Any):
        self.heads, self.settings, self.done, self.tokens, self.measured = heads, settings, 0, 0, {}
        self.kind, self.joined = FAMILIES[settings["family"]], settings["objective"] == "sum"
        self.objective = "kl" if self.joined else settings["objective"]
        self.processes, self.number = 1, 0
        if accelerator is not None:
            self.processes, self.number = accelerator.num_processes, accelerator.process_index
        self.reduce = (lambda x: accelerator.reduce(x, "sum")) if self.processes > 1 else same
        if self.joined and (len({*settings["heads"]}) > 1 or len(settings["sizes"]) > 1):
            raise ValueError("the sum over a layer's heads is learned as one lens, for which all layers have as many "
                             "heads, as wide; here they differ: take another objective")  # fmt: skip
        if self.joined and issubclass(self.kind, Shared):
            raise ValueError("a shared lens reads what each head writes by itself, and the sum over a layer's heads is "
                             f"read as one: {settings['family']!r} needs another objective")  # fmt: skip

    @property
    def main(self) -> bool:
        return self.number == 0

    def seen(self, batch: Any, whole: bool = False) -> Captured:
        """What lenses learn from in this process's part of a batch, or in the whole of it."""
        part = slice(None) if whole else slice(self.number, None, self.processes)
        if not isinstance(batch, Captured):
            inputs = {k: v[part].to(self.heads.W_O.device) for k, v in batch.items()}
            if not len(main_input(inputs)):
                raise ValueError(f"each of {self.processes} processes needs rows of its own, and a batch has fewer: "
                                 "make batches larger")  # fmt: skip
            seen = self.heads.capture(inputs, scale=self.kind.through_unembedding, positions=self.settings["positions"])
        else:
            seen = batch.at(self.settings["positions"])[part]
        seen = seen[seen.following >= 0] if self.objective == "next" else seen
        return replace(seen, z=self.join(seen.z)) if self.joined else seen

    def join(self, x: Tensor) -> Tensor:
        """(A, n, d) of heads, one after the other -> (layers, n, heads·d)."""
        return x.unflatten(0, (-1, self.settings["heads"][0])).transpose(1, 2).flatten(2)

    def begin(self, batches: Iterable, held_out: Iterable, moments: Moments | None) -> None:
        """The closed form, and how far it comes."""
        trial = self.seen(next(_over_again(batches)))
        if not self.reduce(torch.tensor(len(trial), device=trial.z.device)):
            raise ValueError("the first batch settles α, and it has none of the positions asked for, "
                             f"{self.settings['positions']!r}{', that a word follows' * (self.objective == 'next')}: "
                             "begin with one that has, or ask for others")  # fmt: skip
        if self.objective in ("logits", "reverse") and (trial.log_p <= NEVER).any():
            raise ValueError("the model rules some words out by logits of −∞, and no lens is at a finite distance from "
                             f"it by objective {self.objective!r}: take \"kl\" or \"next\"")
        if moments is None:
            moments = Moments(self.objective == "logits")
            for batch in itertools.islice(batches, 1, 1 + self.settings["warm"]):
                moments.add(self.seen(batch), self.reduce)
            moments.close(self.reduce)
        ours, theirs = (*trial.z.shape[::2], self.heads.V), (*moments.mu.shape, len(moments.offset))
        if ours != theirs or moments.of_logits != (self.objective == "logits"):
            raise ValueError(f"moments are of what is learned from, (heads, width, logits) = {ours}, and of_logits for "
                             f'objective "logits" alone; these are of {theirs}, of_logits={moments.of_logits}: leave '
                             "them out, or make them anew")  # fmt: skip
        self.family = self.kind.start(moments, self.heads, self.settings["rank"])
        if held_out:
            self.measure("unigram", Full.unigram(moments), held_out)
        alpha = damped(self.family, trial, self.objective, reduce=self.reduce)
        self.measured["alpha"] = [round(a, 2) for a in alpha.tolist()]
        if held_out:
            self.measure("start", self.family, held_out)
        self.optimize()

    def optimize(self) -> None:
        for p in self.family.parameters.values():
            p.grad = torch.zeros_like(p)
        self.optimizer = torch.optim.Adam(self.family.parameters.values(), betas=(0.9, 0.99), fused=True)

    def step(self, batch: Any, precision: torch.dtype | None) -> None:
        seen = self.seen(batch)
        n = int(self.reduce(torch.tensor(len(seen), device=seen.z.device)))
        gradient(self.family, seen, self.objective, 1 / max(1, n), precision)
        for p in self.family.parameters.values():
            p.grad = self.reduce(p.grad)
        steps, lr = self.settings["steps"], self.settings["lr"]
        self.optimizer.param_groups[0]["lr"] = lr * min((self.done + 1) / WARM_UP, 1 - self.done / steps)
        if n:
            self.optimizer.step()
        for p in self.family.parameters.values():
            p.grad.zero_()
        self.done, self.tokens = self.done + 1, self.tokens + n

    def held_out(self, family: Family, batches: Iterable) -> Tensor:
        """The mean KL of each head over other text, (A,); of each layer for "sum"."""
        parts = [(len(seen), losses(family, seen).double().sum(1)) for seen in (self.seen(b, True) for b in batches)]
        if not (n := sum(n for n, _ in parts)):
            raise ValueError("lenses are measured on the text held out, and it has none of the positions asked for, "
                             f"{self.settings['positions']!r}: give other text")  # fmt: skip
        return sum(part for _, part in parts) / n

    def note(self, batches: Iterable) -> None:
        """Where the median head stands: (positions seen, its mean KL)."""
        if batches and self.main:
            kl = float(self.held_out(self.family, batches).median())
            self.measured.setdefault("on the way", []).append([self.tokens, float(f"{kl:.5g}")])

    def measure(self, name: str, family: Family, batches: Iterable) -> None:
        self.measured[name] = [float(f"{kl:.5g}") for kl in self.held_out(family, batches)]

    def lens(self, held_out: Iterable) -> Lens:
        """The lenses as they stand, each head's its own, for z itself."""
        if held_out:
            self.measure("end", self.family, held_out)
        family, heads = self.family, self.heads
        parameters, mu = family.folded(heads).parameters, family.mu
        if self.joined:
            H = self.settings["heads"][0]

            def apart(x: Tensor) -> Tensor:
                return x.unflatten(-1, (H, -1)).movedim(-2, 1).flatten(0, 1)

            parameters, mu = {k: apart(v) if k == family.linear else v.repeat_interleave(H, 0)
                              for k, v in parameters.items()}, apart(mu)  # fmt: skip
        about = self.settings | {"tokens": self.tokens, "held_out": self.measured}
        return Lens(heads, self.kind.of(parameters, mu, heads), about)

    def state(self) -> dict:
        """All that `go_on` needs, on the CPU or not."""
        return {"settings": self.settings, "family": vars(self.family), "optimizer": self.optimizer.state_dict(),
                "done": self.done, "tokens": self.tokens, "measured": self.measured}  # fmt: skip

    def go_on(self, state: dict, path: Path) -> None:
        _same(self.settings, state["settings"], path)
        self.family = self.kind.__new__(self.kind)
        vars(self.family).update(state["family"])
        self.optimize()
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.tokens, self.measured = state["done"], state["tokens"], state["measured"]


def _over_again(batches: Iterable) -> Iterator:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches are gone through more than once, and there are none any more: give a list, or "
                             "Rows or Examples")  # fmt: skip


def _same(ours: dict, theirs: dict, path: Path) -> None:
    """A file or state is gone on with only by the run that it is of."""
    if other := differences(ours, theirs):
        raise ValueError(f"a run goes on from a state of its own, and {str(path)!r} is another's: {'; '.join(other)}. "
                         "Give another path, or remove the file.")  # fmt: skip


def _digest(batches: Iterable) -> str | None:
    """What tells batches from others, in a few letters: all tensors' names, shapes and numbers, of a large one that is
    no text some ten thousand. None where there is no batch."""
    digest, n = hashlib.sha256(), 0
    for batch in batches:
        n += 1
        captured = isinstance(batch, Captured)
        for name, value in ((f.name, getattr(batch, f.name)) for f in fields(batch)) if captured else batch.items():
            if isinstance(value, Tensor):
                flat = value.flatten()[:: 1 + value.numel() // 2**14 if value.is_floating_point() else 1]
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if n else None
