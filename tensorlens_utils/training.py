"""The recipes of the zoo: how each tiny model was trained, and how its card was measured.

`make zoo`, or `python -m tensorlens_utils.training [NAME ...] [--steps N] [--out FOLDER]`. A run shows its progress,
goes on where it was stopped, and on one machine gives the same weights every time: all randomness is one seeded
generator's, kept beside the weights and the optimizer's state under build/zoo, and the number of threads, which
settles the order of sums, is part of the recipe. To retrain from the first step, remove that folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import textwrap
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digit_text, load_data
from .models import ZOO

PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of intensity / 16 over the training digits; a pixel value of 0 is the mean grey
BASELINES = {"black": -PIXEL_MEAN / PIXEL_STD, "grey": 0.0}  # what a masked patch holds: intensity 0, or the mean
INITIAL = 0.1  # of the initial weights: near 1/√d at d = 48 or 64, where the usual 0.02 learns far more slowly
GRID, PATCH = 4, 2  # tiny-vit's 4×4 patches of 2×2 pixels


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model of the zoo is made: AdamW, linear warm-up, cosine decay to zero.

    `build()` gives the untrained (model, processor); `batch(n, generator)` gives n training inputs with their labels,
    drawing on that generator alone; `measure(model, processor)` gives the card's numbers, each from `share`.
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

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def settings(self) -> dict[str, Any]:
        """What must agree for a stopped run to be gone on with."""
        return {key: value for key, value in vars(self).items() if isinstance(value, int | float)}


def train(recipe: Recipe, work: str | Path, *, save_every: int = 200,
          progress: bool = True) -> tuple[nn.Module, Any, float]:
    """Train a recipe to its last step: (model in eval mode, processor, minutes of processor time).

    `work` is the folder of the run's state, written every `save_every` steps; a state of the same settings there is
    gone on with, and one of other settings is replaced. The global random state and number of threads are left as they
    were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        return _train(recipe, Path(work) / recipe.name / "state.pt", save_every, progress)
    finally:
        torch.set_num_threads(threads)


def _train(recipe: Recipe, state_file: Path, save_every: int, progress: bool) -> tuple[nn.Module, Any, float]:
    from tqdm.auto import tqdm

    state_file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, processor = recipe.build()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    done, seconds = 0, 0.0
    if state_file.is_file() and (state := torch.load(state_file))["settings"] == recipe.settings():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        done, seconds = state["done"], state["seconds"]

    model.train()
    clock = time.process_time()
    for step in (bar := tqdm(range(done, recipe.steps), recipe.name, recipe.steps, initial=done, disable=not progress)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = model(**recipe.batch(recipe.batch_size, generator)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            seconds, clock = seconds + time.process_time() - clock, time.process_time()
            state = {"settings": recipe.settings(), "done": step + 1, "seconds": seconds, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)  # a run stopped while saving keeps the older state
    return model.eval(), processor, seconds / 60


def ship(recipe: Recipe, out: str | Path, work: str | Path, **options: Any) -> dict[str, Any]:
    """Train a recipe, measure it, write the model, its processor and its card to `out`/NAME in Hugging Face layout, and
    return the card's numbers."""
    import transformers
    import yaml

    model, processor, minutes = train(recipe, work, **options)
    folder = Path(out) / recipe.name
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    measured = {**recipe.measure(model, processor), "parameters": model.num_parameters(), "seed": recipe.seed,
                "steps": recipe.steps, "batch_size": recipe.batch_size, "learning_rate": recipe.lr,
                "weight_decay": recipe.weight_decay, "threads": recipe.threads,
                "cpu_minutes": round(minutes, 1), "torch": torch.__version__.split("+")[0]}
    front = yaml.safe_dump({"license": "mit", "library_name": "transformers", "measured": measured}, sort_keys=False,
                           allow_unicode=True, width=120)
    rows = "\n".join(f"| {key} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']} |"
                     for key, m in measured.items() if isinstance(m, dict))
    made = (f"{measured['parameters']:,} parameters; seed {recipe.seed}; {recipe.steps:,} steps of "
            f"{recipe.batch_size}; AdamW, highest learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}; "
            f"{measured['cpu_minutes']} minutes of one CPU core with torch {measured['torch']}. The same machine gives "
            "the same weights again. Written, numbers included, by "
            f"`python -m tensorlens_utils.training {recipe.name}`.")
    (folder / "README.md").write_text("\n".join((
        f"---\n{front}---\n# {recipe.name}\n", textwrap.fill(recipe.about, 120),
        "\n| on held-out data | share | 95 % interval (Wilson) | of |\n|---|---|---|---|", rows, "",
        textwrap.fill(made, 120), "")), encoding="utf-8")
    return measured


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


# --- tiny-vit -----------------------------------------------------------------------------------------------


@cache
def _train_digits() -> tuple[Tensor, Tensor]:
    """The training digits: intensities (n, 8, 8), labels (n,)."""
    digits = load_data("digits", "train")
    return torch.from_numpy(np.stack([np.asarray(image) for image in digits["image"]])), torch.tensor(digits["label"])


def shifted_digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n training digits, a quarter of them moved by up to a pixel: intensities (n, 8, 8), labels (n,)."""
    images, labels = _train_digits()
    chosen = torch.randint(len(images), (n,), generator=generator)
    moved = torch.rand(n, generator=generator) < 0.25
    dy, dx = torch.where(moved, torch.randint(3, (2, n), generator=generator), 1)
    views = F.pad(images[chosen], (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)  # (n, 3, 3, 8, 8)
    return views[torch.arange(n), dy, dx], labels[chosen]


def mask_patches(pixel_values: Tensor, masked: Tensor, baseline: Tensor | float) -> Tensor:
    """Pixels (N, 1, 8, 8) with the masked patches, (N, 16) booleans, set to a baseline: a number or (N, 1, 1, 1)."""
    pixels = masked.view(-1, 1, GRID, GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return torch.where(pixels, baseline, pixel_values)


def _vit_build() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = dict(enumerate("0123456789"))
    config = ViTConfig(image_size=8, patch_size=PATCH, num_channels=1, hidden_size=64, num_hidden_layers=4,
                       num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, initializer_range=INITIAL, id2label=names,
                       label2id={digit: i for i, digit in names.items()})
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}, rescale_factor=1 / 16,
                                     image_mean=[PIXEL_MEAN], image_std=[PIXEL_STD])
    return ViTForImageClassification(config), processor


def _vit_batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    images, labels = shifted_digits(n, generator)
    pixel_values = (images[:, None] / 16 - PIXEL_MEAN) / PIXEL_STD
    fraction = 0.75 * torch.rand(n, 1, generator=generator)
    masked = torch.rand(n, GRID * GRID, generator=generator) < fraction
    black = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    baseline = torch.where(black, BASELINES["black"], BASELINES["grey"])
    return {"pixel_values": mask_patches(pixel_values, masked, baseline), "labels": labels}


@torch.no_grad()
def _vit_measure(model: nn.Module, processor: Any) -> dict[str, dict]:
    digits = load_data("digits", "test")
    pixel_values = processor(digits[:]["image"], return_tensors="pt").pixel_values
    labels = torch.tensor(digits["label"])
    order = torch.rand(len(labels), GRID * GRID, generator=torch.Generator().manual_seed(0)).argsort(1)
    measured = {"accuracy": share(model(pixel_values).logits.argmax(-1) == labels)}
    for hidden in (4, 8):
        for word, baseline in BASELINES.items():
            masked = mask_patches(pixel_values, order < hidden, baseline)
            measured[f"accuracy, {hidden} of 16 patches {word}"] = share(model(masked).logits.argmax(-1) == labels)
    return measured


# --- tiny-preln and tiny-postln -----------------------------------------------------------------------------


def _token_processor() -> Any:
    """A tokenizer of intensities: "0 0 5 13 ..." to the class token and one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *map(str, range(17))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", unk_token="<unk>",
                                   model_max_length=65, model_input_names=["input_ids", "attention_mask"])


def _pair_build(pre_norm: bool) -> tuple[nn.Module, Any]:
    import transformers

    shape = dict(vocab_size=20, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                 max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=INITIAL,
                 id2label=dict(enumerate("0123456789")),
                 label2id={digit: int(digit) for digit in "0123456789"})
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**shape))
    if pre_norm:
        post, config = model, transformers.RobertaPreLayerNormConfig(**shape)
        model = transformers.RobertaPreLayerNormForSequenceClassification(config)
        # The two start from the same weights: only the norms, which start as 1 and 0, stand elsewhere.
        for mine, theirs in zip(*([p for name, p in m.named_parameters() if "LayerNorm" not in name]
                                  for m in (model, post)), strict=True):
            mine.data.copy_(theirs.data)
    return model, _token_processor()


def _pair_batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    images, labels = shifted_digits(n, generator)
    return {"input_ids": F.pad(images.flatten(1).long() + 3, (1, 0), value=1), "labels": labels}


@torch.no_grad()
def _pair_measure(model: nn.Module, processor: Any) -> dict[str, dict]:
    digits = load_data("digits", "test")
    inputs = processor([digit_text(image) for image in digits["image"]], return_tensors="pt")
    return {"accuracy": share(model(**inputs).logits.argmax(-1) == torch.tensor(digits["label"]))}


_VIT = """A vision transformer for scikit-learn's real 8×8 digits: 16 patches of 2×2 pixels and a class token, 4 layers,
4 heads, 64 channels. Trained on 1297 digits, a quarter of them moved by up to a pixel and all with up to three quarters
of their patches masked: in every digit a random share of them is set to black (intensity 0) or, as often, to the mean
grey (a pixel value of 0), so that masked inputs are no surprise. 500 digits held out; of their patches 4 or 8 were
masked at random, with a fixed seed."""
_PAIR = """A {} transformer (RoBERTa's, with {}) that reads scikit-learn's real 8×8 digits as text: a class token, then
64 words, the intensities 0..16 row by row; 3 layers, 4 heads, 48 channels. One of a pair: tiny-preln and tiny-postln
differ in the place of LayerNorm alone, start from the same weights and see the same data in the same order. Trained on
1297 digits, a quarter of them moved by up to a pixel; 500 held out."""
_PRE = _PAIR.format("pre-LN", "a norm before each part and one at the end")
_POST = _PAIR.format("post-LN", "a norm after each sum")

RECIPES = {recipe.name: recipe for recipe in (
    Recipe("tiny-vit", _VIT, _vit_build, _vit_batch, _vit_measure, steps=4000),
    Recipe("tiny-preln", _PRE, partial(_pair_build, True), _pair_batch, _pair_measure, steps=2000),
    Recipe("tiny-postln", _POST, partial(_pair_build, False), _pair_batch, _pair_measure, steps=2000),
)}


def main(arguments: list[str] | None = None) -> int:
    """`python -m tensorlens_utils.training`: train, measure and ship models of the zoo."""
    parser = argparse.ArgumentParser(prog="python -m tensorlens_utils.training", description="Retrain the zoo.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all if none is given")
    parser.add_argument("--steps", type=int, help="a trial of so many steps, written to build/zoo/trial")
    parser.add_argument("--out", type=Path, help="where the models go; by default the package's own zoo")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.names if name not in RECIPES]:
        parser.error(f"the zoo has recipes for {', '.join(RECIPES)}, not for {', '.join(unknown)}")
    work = Path("build/zoo") if asked.steps is None else Path("build/zoo/trial")
    out = asked.out or (ZOO if asked.steps is None else work)
    for name in asked.names or RECIPES:
        recipe = RECIPES[name] if asked.steps is None else dataclasses.replace(RECIPES[name], steps=asked.steps)
        measured = ship(recipe, out, work)
        print(f"{name}: accuracy {measured['accuracy']['value']:.3f}, {measured['parameters']:,} parameters, "
              f"{measured['cpu_minutes']} CPU minutes, in {out / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
