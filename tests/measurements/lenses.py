"""Lenses trained for longer than a notebook may, and lenses of a real pretrained model on real text.

    python tests/measurements/lenses.py                 # writes lenses.json beside this file, in ten minutes or so

Notebook 07 draws what the file holds, for each held-out text, so that paired intervals can be taken: the KL of the
median head of tiny-gpt, for the unigram, for the closed form from more and more text, and for lenses trained on fresh
text; and for stories260K on TinyStories, KL and ablation by lenses and by the unembedding. Model and text of the latter
are not part of the repository: they are looked for in $TENSORLENS_DATA, or ../shared/data.
"""

import copy
import itertools
import json
import os
from pathlib import Path

import torch

from tensorlens_utils import load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses import bias_only, unembedding
from tensorlens_utils.lenses.checks import ablation, by_text, together
from tensorlens_utils.lenses.data import Rows
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.training import train

HERE = Path(__file__).resolve()
DATA = Path(os.environ.get("TENSORLENS_DATA") or HERE.parents[2].parent / "shared" / "data")
HELD_OUT, ROWS = 48, 4  # rows that are tested on, and rows of a batch, of 128 tokens each
TEXT = (80, 320, 1280, 3840)  # rows behind a closed form
STEPS = (250, 1000, 4000)  # of training, each on rows of its own
STORIES, LENGTH = 40, 32  # stories whose heads are taken away, and how many tokens of each are read


class Fresh:
    """n batches of the world's text, the same at every pass."""

    def __init__(self, n, seed=100):
        self.n, self.seed = n, seed

    def __iter__(self):
        text = world.Text(self.seed)
        return ({"input_ids": text.rows(ROWS)} for _ in range(self.n))


def median(lens, seen):
    """The median head's KL on each text."""
    return by_text(lens.kl(seen), seen).median(0).values


def held_out(heads):
    rows = world.Text(world.HELD_OUT).rows(HELD_OUT).split(ROWS)
    return together(heads.capture({"input_ids": some}, scale=True) for some in rows)


def tiny(text=TEXT, steps=STEPS, families=("full", "translator")):
    """{"unigram", "closed form": {rows: ...}, family: {steps: ...}} -> the median head's KL on each held-out row."""
    model, tokenizer = load_model("tiny-gpt")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    seen, sums, found = held_out(heads), Moments(), {"closed form": {}}
    for n, batch in enumerate(itertools.islice(Fresh(text[-1] // ROWS + 1), 1, None), 1):  # the first one is α's
        sums.add(heads.capture(batch, scale=True))
        if n * ROWS in text:
            moments = copy.deepcopy(sums).close()
            lens = train(heads, Fresh(1), steps=0, moments=moments, progress=False)
            found["closed form"][n * ROWS] = median(lens, seen)
    found["unigram"] = median(bias_only(heads, moments), seen)
    for family in families:
        found[family] = {}
        for n in steps if family == "full" else steps[1:2]:
            lens = train(heads, Fresh(n), family=family, steps=n, moments=moments, progress=False)
            found[family][n] = median(lens, seen)
    return found


def real(data=DATA, n_rows=600, steps=300):
    """stories260K: {"kl": {name: texts}, "ablation": {name: {key: texts}}}, over heads the median of the KL and the
    means of what `ablation` measures."""
    model, tokenizer = load_model(data / "stories260K", dtype="float32")
    tokenizer.pad_token = tokenizer.eos_token
    text = (data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:-1]]
    heads = Heads(model, tokenizer(["Once upon a time"], return_tensors="pt"), tokenizer)
    tested = [story for story in stories if len(tokenizer(story).input_ids) > LENGTH][:STORIES]
    rest = stories[stories.index(tested[-1]) + 1:]
    batches = [heads.capture(batch, scale=True) for _, batch in zip(range(n_rows // ROWS), Rows(
        rest, tokenizer, ROWS, 64), strict=False)]
    inputs = dict(tokenizer(tested, truncation=True, max_length=LENGTH, return_tensors="pt").items())
    seen, moments = heads.capture(inputs, scale=True), Moments.of(batches[1:])
    lenses = {"closed form": train(heads, batches, steps=0, moments=moments, progress=False)}
    lenses |= {family: train(heads, batches, family=family, steps=steps, moments=moments, progress=False)
               for family in ("full", "translator")}
    lenses |= {"unembedding": unembedding(heads, moments), "bias only": bias_only(heads, moments)}
    taken = ablation({name: lens for name, lens in lenses.items() if name != "bias only"}, inputs)
    del taken["moved"]
    taken = {name: {key: values.mean(0) for key, values in table.items()} for name, table in taken.items()}
    return {"layers": len(heads.paths), "heads": len(heads.names), "rows": len(batches) * ROWS,
            "kl": {name: median(lens, seen) for name, lens in lenses.items()}, "ablation": taken}  # fmt: skip


def rounded(found):
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    return [float(f"{x:.5g}") for x in found.tolist()] if isinstance(found, torch.Tensor) else found


def main():
    torch.set_num_threads(1)
    found = {"held-out rows": HELD_OUT, "batch": ROWS, "torch": torch.__version__.partition("+")[0],
             "stories260K": real(), "tiny-gpt": tiny()}  # fmt: skip
    HERE.with_suffix(".json").write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
