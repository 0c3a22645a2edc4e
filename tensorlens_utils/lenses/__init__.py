"""Attention lenses: what every head of a model says, in words (Attention Lens, arXiv 2310.16270).

A lens turns z, what a head has read at a position, into a distribution over the vocabulary: the best guess of the
model's own prediction there that can be made from this head alone. `training.train` makes lenses; here they are
read, kept in one file, and set beside what needs no training.

>>> import torch
>>> from tensorlens_utils import load_model
>>> from tensorlens_utils.data import world
>>> from tensorlens_utils.lenses.heads import Heads
>>> from tensorlens_utils.lenses.training import train
>>> model, tokenizer = load_model("tiny-gpt")
>>> heads = Heads(model, tokenizer(["a story"], return_tensors="pt"), tokenizer)
>>> batches = [{"input_ids": world.Text(seed).rows(4)} for seed in range(4)]
>>> lens = train(heads, batches, steps=4, warm=3, progress=False)
>>> [(word, round(share, 1)) for word, share in lens.top_tokens("the capital of france is", layer=3, head=0, k=2)]
[('the', 0.1), ('.', 0.1)]
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES, Family, Full, Translator
from .heads import Captured, Heads
from .moments import Moments
from .regression import damped, losses, predict


class Lens:
    """The lenses of all heads of a model.

    heads    the model's `Heads`
    family   the lenses proper, folded (`families`)
    about    what they are and how they came about, as the file has it
    """

    def __init__(self, heads: Heads, family: Family, about: dict[str, Any]):
        self.heads, self.family, self.about = heads, family, about

    def capture(self, examples, **options) -> Captured:
        """`Heads.capture` of texts, images or inputs, with all that these lenses read."""
        inputs = examples if hasattr(examples, "items") else self.heads.inputs(examples)
        return self.heads.capture(inputs, scale=self.family.through_unembedding, **options)

    def log_probs(self, seen: Captured, which: slice = slice(None)) -> Tensor:
        """What the lenses of some heads say, (A', n, V): of a few at a time where the vocabulary is large."""
        return predict(self.family, seen, slice(*which.indices(len(self.heads.names)))).log_softmax(-1)

    def said(self, seen: Captured, which: slice = slice(None)) -> Tensor:
        """What a head says here and not on average: the lens's logits at z less those at the mean of z, (A', n, V)."""
        which, V = slice(*which.indices(len(self.heads.names))), slice(0, seen.log_p.shape[1])
        mean = self.family.mu[which, None].expand(-1, len(seen), -1)
        f = self.family.features(seen.z[which], seen.scale, which) - self.family.features(mean, seen.scale, which)
        return self.family.raised(f, which, V)

    def kl(self, seen: Captured, which: slice = slice(None)) -> Tensor:
        """KL(model ‖ lens) of every head, or of some, at every position, (A', n), in nats."""
        return losses(self.family, seen, "kl", which)

    # -- in words

    def tokens(self, seen: Captured, k: int = 1, said: bool = False,
               which: slice = slice(None)) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The k first choices of every head, or of some, at every position: (probabilities, ids), (A', n, k) each. With
        `said`, the tokens that `said` raises most, and by how much, in logits less the mean one."""
        if not 1 <= k <= self.heads.V:
            raise ValueError(f"a head's first choices are 1 to {self.heads.V}, as many as the model has logits; not "
                             f"{k}")  # fmt: skip
        found = []
        for h in range(*which.indices(len(self.heads.names))):
            one = slice(h, h + 1)
            x = self.said(seen, one) if said else self.log_probs(seen, one).exp()
            found.append((x - x.mean(-1, keepdim=True) if said else x).topk(k))
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    def words(self, ids: Tensor) -> Any:
        """Tokens, or the labels of a class model, by their ids: nested lists of the same shape. A logit without a
        token, of which models have some to fill a matrix up, is "[its id]"."""
        if ids.dim():
            return [self.words(i) for i in ids]
        names = self.heads.model.config.id2label
        if self.heads.V == len(names):
            return names[int(ids)]
        return (self.heads.processor and self.heads.processor.convert_ids_to_tokens(int(ids))) or f"[{int(ids)}]"

    def _one(self, example) -> Captured:
        seen = self.capture(example)
        if (n := int(seen.text.max()) + 1) > 1:
            raise ValueError(f"one text or image is read at a time, and these are {n}: give one after the other")
        return seen

    def _at(self, example, position: int, k: int, said: bool, which: slice) -> list[list[tuple[str, float]]]:
        seen = self._one(example)
        if not -len(seen) <= position < len(seen):
            raise ValueError(f"the example has positions 0 to {len(seen) - 1}, or −1 to {-len(seen)} from its end; "
                             f"position is {position}")  # fmt: skip
        values, ids = self.tokens(seen[[position]], k, said, which)
        return [[*zip(words, v, strict=True)]
                for words, v in zip(self.words(ids[:, 0]), values[:, 0].tolist(), strict=True)]  # fmt: skip

    def grid(self, example, position: int = -1, k: int = 3, said: bool = False) -> list[list[list[tuple[str, float]]]]:
        """What each head says at one position of one example: layers × heads × k of (word, number), as in `tokens`."""
        rows: dict[int, list] = {}
        found = self._at(example, position, k, said, slice(None))
        for (layer, _), words in zip(self.heads.names, found, strict=True):
            rows.setdefault(layer, []).append(words)
        return [*rows.values()]

    def top_tokens(self, example, layer: int, head: int, position: int = -1, k: int = 5, said: bool = False):
        """The first choices of one head's lens: [(word, probability), ...]; with `said`, as `tokens`."""
        if (layer, head) not in self.heads.names:
            raise ValueError(f"(layer, head) must be one of {self.heads.names[0]} to {self.heads.names[-1]}, not "
                             f"{(layer, head)}")  # fmt: skip
        a = self.heads.names.index((layer, head))
        return self._at(example, position, k, said, slice(a, a + 1))[0]

    def table(self, example, layer: int, said: bool = False) -> list[list[str]]:
        """Heads × tokens: the first choice of each head of a layer at each position of one example."""
        of = [a for a, (at, _) in enumerate(self.heads.names) if at == layer]
        if not of:
            raise ValueError(f"layers are 0 to {self.heads.names[-1][0]}; layer is {layer!r}")
        _, ids = self.tokens(self._one(example), 1, said, slice(of[0], of[-1] + 1))
        return self.words(ids[..., 0])

    # -- in one file

    def save(self, path: str | Path) -> None:
        """Write the lenses, without the model, as one safetensors file; at once or not at all."""
        from safetensors.torch import save_file

        if "heads" not in self.about:
            raise ValueError("a file keeps lenses that were trained, and these are made in a moment: call "
                             "bias_only(...) or unembedding(...) where they are needed")  # fmt: skip
        tensors = {"mu": self.family.mu, **{f"parameters.{k}": v for k, v in self.family.parameters.items()}}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".half")
        about = json.dumps(self.about, ensure_ascii=False, allow_nan=False)  # one entry: their order is not kept
        tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        save_file(tensors, half, {"lens": about})
        os.replace(half, path)


def load_lens(path: str | Path, heads: Heads, *, transfer: bool = False) -> Lens:
    """The lenses in a file, for the heads of the model that they were made on.

    `transfer` lets them read another model with as many heads, as wide, and as many logits: a fine-tuned copy, another
    seed. Raises ValueError where lens and model do not fit, and where the file is no lens.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("lens", "null"))
        if about is None:
            raise ValueError(f"a file of lenses says so in its metadata, and {str(path)!r} does not: give one that "
                             "Lens.save wrote")  # fmt: skip
        tensors = {name: file.get_tensor(name).to(heads.W_O) for name in file.keys()}  # noqa: SIM118
    ours = fits(heads)
    wrong = differences({k: ours[k] for k in ("heads", "sizes", "V")}, about)
    if not transfer and not wrong and differences({"weights": ours["weights"]}, about):
        wrong = ["its weights are others; transfer=True reads it all the same"]
    if wrong:
        raise ValueError(f"lenses fit the model that they were made on, {about['model']!r}, and this one is another: "
                         + "; ".join(wrong))  # fmt: skip
    mu = tensors.pop("mu")
    parameters = {name.removeprefix("parameters."): value for name, value in tensors.items()}
    return Lens(heads, FAMILIES[about["family"]].of(parameters, mu, heads), about)


def fits(heads: Heads) -> dict[str, Any]:
    """What must be the same where a lens is made and where it is read; of each parameter of the model four numbers."""
    config, layers = heads.model.config, [layer for layer, _ in heads.names]
    name = Path(config._name_or_path)
    return {"model": name.name if name.is_dir() else str(name), "revision": getattr(config, "_commit_hash", None),
            "class": type(heads.model).__name__, "heads": [layers.count(layer) for layer in sorted({*layers})],
            "sizes": sorted({*heads.sizes}), "V": heads.V,
            "weights": sketch(*heads.model.parameters())}  # fmt: skip


def sketch(*tensors: Tensor) -> list[float]:
    """Of each tensor, some thousand of its numbers times four draws of random signs, by their norm: as far as two
    tensors are apart, measured by their norm, so far are these."""
    found = []
    for x in tensors:
        x = x.detach().flatten()[:: 1 + x.numel() // 4096].double().cpu()
        signs = torch.randint(0, 2, (4, len(x)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        found += [float(f"{y:.6g}") for y in (signs @ x / x.norm().clamp_min(1e-300)).tolist()]
    return found


# How far the numbers of the same weights, or moments, are apart at most: rounding to bfloat16 moves none by more than
# 6e-3, while fine-tuning or an adapter moves some by more; moments of the same text differ by how sums are rounded
SAME = {"weights": 8e-3, "moments": 1e-4}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In which of our entries theirs differ."""

    def same(key):
        a, b = ours[key], theirs.get(key)
        if key in SAME and a and b and len(a) == len(b):
            return all(abs(x - y) < SAME[key] for x, y in zip(a, b, strict=True))
        return a == b

    return ["its weights are others" if key == "weights" else f"{key} was {theirs.get(key)!r}, now is {ours[key]!r}"
            for key in ours if not same(key)]  # fmt: skip


def heads_of(lenses: Mapping[str, Lens]) -> Heads:
    """The heads that some lenses read together. Raises ValueError where there is no lens, or they read several."""
    if len({id(lens.heads) for lens in lenses.values()}) != 1:
        raise ValueError("lenses are one or more of one model's heads, the same `Heads` object, by name; not of "
                         f"{len({id(lens.heads) for lens in lenses.values()})} such objects")  # fmt: skip
    return next(iter(lenses.values())).heads


# --- what needs no training -----------------------------------------------------------------------------------------


def bias_only(heads: Heads, m: Moments) -> Lens:
    """The unigram π = E p, whatever a head says."""
    return Lens(heads, Full.unigram(m), {"family": "full", "objective": "bias only"})


def unembedding(heads: Heads, m: Moments, seen: Captured | None = None) -> Lens:
    """Direct logit attribution read as a lens, s M W_Oᵀz + β: what the head adds to the logits, by the model's own end.

    With `seen`, some training positions, the unembedding at its best: s M W_Oᵀ(z − μ), times the one number for each
    head that is best there, on top of log π.
    """
    T, about = heads.W_O.mT.clone(), {"family": "translator", "objective": "unembedding"}
    if seen is None:
        c = (T @ m.mu[..., None])[..., 0]
        return Lens(heads, Translator.of({"T": T, "c": c}, m.mu, heads), about)
    family = Translator({"T": T, "c": torch.zeros_like(T[..., 0])}, m.mu, None, heads.readout.M, m.offset)
    damped(family, seen, grid=[2.0**k for k in range(-8, 7)])
    return Lens(heads, family, about | {"objective": "unembedding, scaled, and unigram"})
