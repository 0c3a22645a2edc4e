"""Lenses of every family under every objective, before the two judges of notebook 07: held-out KL, and ablation.

    python tests/measurements/lenses_grid.py            # writes lenses_grid.json beside this file, in ten minutes or so

All are lenses of tiny-gpt, made from the same text with the same settings, those of `train` unless said here: a closed
form, and from there STEPS steps on BATCHES batches. None was tried with others. What does not go together is not there:
a lens shared by heads reads what each head writes by itself, and the sum over a layer's heads is read as one.
"""

import json
from pathlib import Path

import torch

from tensorlens_utils import load_model
from tensorlens_utils.data import world
from tensorlens_utils.lenses import bias_only, unembedding
from tensorlens_utils.lenses.checks import ablation, by_text, together
from tensorlens_utils.lenses.families import FAMILIES, Shared
from tensorlens_utils.lenses.heads import Heads
from tensorlens_utils.lenses.moments import Moments
from tensorlens_utils.lenses.training import train

HERE = Path(__file__).resolve()
BATCHES, ROWS, STEPS, RANK = 160, 2, 480, 4  # rows of 128 tokens
HELD_OUT, TEXTS, WORDS = 48, 24, 31  # rows to measure KL on; texts whose heads are taken away, and their words
OBJECTIVES = {"kl": {}, "reverse": {}, "next": {}, "logits": {},
              "sum, last": {"objective": "sum", "positions": "last"},
              "sum, all": {"objective": "sum", "positions": "all"}}  # fmt: skip


def goes(family, objective):
    return not (objective.startswith("sum") and issubclass(FAMILIES[family], Shared))


def inputs(heads):
    """The beginnings of texts that no lens has seen, as notebook 07 takes them."""
    documents = (words.split()[:WORDS] for words in iter(world.Text(world.HELD_OUT).document, None))
    some = (" ".join(words) for words in documents if len(words) > 7)
    return heads.inputs([next(some) for _ in range(TEXTS)])


def judged(lenses, heads, mean):
    """{"kl", "named", "correlation", "weighted"} of each lens: of each text the median head's KL, and means over heads
    of what `ablation` measures with heads at the mean of z."""
    rows = world.Text(world.HELD_OUT).rows(HELD_OUT).split(4)
    seen = together(heads.capture({"input_ids": some}, scale=True) for some in rows)
    taken = ablation(lenses, inputs(heads), mean)
    return {name: {"kl": by_text(lens.kl(seen), seen).median(0).values,
                   **{key: values.mean(0) for key, values in taken[name].items()}}
            for name, lens in lenses.items()}  # fmt: skip


def grid(families=FAMILIES, objectives=OBJECTIVES, batches=BATCHES, steps=STEPS):
    """{"family | objective": what `judged` gives}, and that of the unembedding and of the unigram."""
    model, tokenizer = load_model("tiny-gpt")
    heads = Heads(model, tokenizer(["a"], return_tensors="pt"), tokenizer)
    text = world.Text(1).rows(batches * ROWS).split(ROWS)
    seen = [heads.capture({"input_ids": rows}, scale=True) for rows in text]
    moments = {of_logits: Moments.of(seen[1:], of_logits) for of_logits in (False, True)}
    lenses = {f"{family} | {objective}": train(heads, seen, family=family, steps=steps, rank=RANK, progress=False, **(
                  {"objective": objective, "moments": moments[objective == "logits"]} | options
                  | ({"moments": None, "warm": batches - 1} if options else {})))
              for family in families for objective, options in objectives.items() if goes(family, objective)}
    lenses |= {"unembedding": unembedding(heads, moments[False]), "bias only": bias_only(heads, moments[False])}
    return judged(lenses, heads, moments[False].mu)


def rounded(found):
    return {name: {key: [float(f"{x:.5g}") for x in values.tolist()] for key, values in one.items()}
            for name, one in found.items()}  # fmt: skip


def main():
    torch.set_num_threads(1)
    found = {"torch": torch.__version__.partition("+")[0], "steps": STEPS, "rows": BATCHES * ROWS, **rounded(grid())}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items())
    HERE.with_suffix(".json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
