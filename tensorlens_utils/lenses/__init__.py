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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES, Family, Full, Moments, Translator
from .heads import Captured, Heads
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

    def kl(self, seen: Captured) -> Tensor:
        """KL(model ‖ lens) of every head at every position, (A, n), in nats."""
        return losses(self.family, seen)

    # -- in words

    def tokens(self, seen: Captured, k: int = 1, said: bool = False) -> tuple[Tensor, Tensor]:
        """The k first choices of every head at every position: (probabilities, ids), (A, n, k) each. With `said`, the
        tokens that `said` raises most, and by how much, in logits less the mean one."""
        found = []
        for h in range(len(self.heads.names)):
            one = slice(h, h + 1)
            x = self.said(seen, one) if said else self.log_probs(seen, one).exp()
            found.append((x - x.mean(-1, keepdim=True) if said else x).topk(k))
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    def words(self, ids: Tensor) -> Any:
        """Tokens, or the labels of a class model, by their ids: nested lists of the same shape."""
        if ids.dim():
            return [self.words(i) for i in ids]
        names = self.heads.model.config.id2label
        if self.heads.V == len(names):
            return names[int(ids)]
        return self.heads.processor.convert_ids_to_tokens(int(ids))

    def grid(self, example, position: int = -1, k: int = 3, said: bool = False) -> list[list[list[tuple[str, float]]]]:
        """What each head says at one position of one example: layers × heads × k of (word, number), as in `tokens`."""
        seen = self.capture(example)
        values, ids = self.tokens(seen[[position]], k, said)
        rows: dict[int, list] = {}
        for (layer, _), v, words in zip(self.heads.names, values[:, 0].tolist(), self.words(ids[:, 0]), strict=True):
            rows.setdefault(layer, []).append([*zip(words, v, strict=True)])
        return [*rows.values()]

    def top_tokens(self, example, layer: int, head: int, position: int = -1, k: int = 5, said: bool = False):
        """The first choices of one head's lens: [(word, probability), ...]; with `said`, as `tokens`."""
        if (layer, head) not in self.heads.names:
            raise ValueError(f"(layer, head) must be one of {self.heads.names[0]} to {self.heads.names[-1]}, not "
                             f"{(layer, head)}")  # fmt: skip
        return self.grid(example, position, k, said)[layer][head]

    def table(self, example, layer: int, said: bool = False) -> list[list[str]]:
        """Heads × tokens: the first choice of each head of a layer at each position of one example."""
        _, ids = self.tokens(self.capture(example), 1, said)
        return [self.words(ids[a, :, 0]) for a, (at, _) in enumerate(self.heads.names) if at == layer]

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
    wrong = [f"{k} was {about[k]}, now is {ours[k]}" for k in ("heads", "sizes", "V") if about[k] != ours[k]]
    if not transfer and not wrong:
        theirs, norms = torch.tensor(about["W_O"]), torch.tensor(ours["W_O"])
        if (theirs - norms).norm() > 5e-4 * norms.norm():  # rounding to bfloat16 changes less, fine-tuning more
            wrong = ["its heads write otherwise (W_O differs); transfer=True reads it all the same"]
    if wrong:
        raise ValueError(f"lenses fit the model that they were made on, {about['model']!r}, and this one is another: "
                         + "; ".join(wrong))  # fmt: skip
    mu = tensors.pop("mu")
    parameters = {name.removeprefix("parameters."): value for name, value in tensors.items()}
    return Lens(heads, FAMILIES[about["family"]].of(parameters, mu, heads), about)


def fits(heads: Heads) -> dict[str, Any]:
    """What must be the same where a lens is made and where it is read."""
    config, layers = heads.model.config, [layer for layer, _ in heads.names]
    name = Path(config._name_or_path)
    return {"model": name.name if name.is_dir() else str(name), "revision": getattr(config, "_commit_hash", None),
            "class": type(heads.model).__name__, "heads": [layers.count(layer) for layer in sorted({*layers})],
            "sizes": sorted({*heads.sizes}), "V": heads.V,
            "W_O": [float(f"{norm:.6g}") for norm in heads.W_O.double().flatten(1).norm(dim=1)]}  # fmt: skip


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
