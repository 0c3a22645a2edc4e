"""Relation decoding under five seeds in each of three models: what tensor and LRE decode, and what their edits flip.

    python tests/measurements/relations.py [FOLDER]     # writes relations.json beside this file, in seven minutes or so

Notebook 06 has time for five seeds in one model only, and draws the others from what the file holds: for each relation
and seed a text with a mark for each sample, 1 or 0, and - where it does not count (learned from, or got wrong by the
model, or without a target). Boundary, β and rank are chosen on the examples, as there; `settings` has them by seed. In
FOLDER the tables are kept, and a run that was stopped goes on.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from tensorlens_utils import load_model
from tensorlens_utils.relations import world_relations
from tensorlens_utils.relations.editing import evaluate_causality
from tensorlens_utils.relations.faithfulness import choose, evaluate_relations, scores

HERE = Path(__file__).resolve()
MODELS = ("tiny-gpt", "tiny-gpt-b", "tiny-llama")
SEEDS, EXAMPLES, BETAS, RANKS = 5, 5, (0.0, 1.0, 2.0, 4.0), (8, 32)
DECODERS, EDITORS = ("tensor", "lre"), ("tensor", "lre", "subject")


def marks(values):
    """Scores (seeds, samples) of 0, 1 and NaN, as texts."""
    return ["".join("-" if np.isnan(x) else str(int(x)) for x in line) for line in values]


def measure(name, relations, *, seeds=SEEDS, layers=None, betas=BETAS, ranks=RANKS, folder=None):
    """{"faithful", "causal"} -> {decoder: {"settings": [layer, β, rank] by seed, "scores": {relation: marks}}}."""
    model, tokenizer = load_model(name, dtype="float32")
    options = {"seeds": seeds, "n_examples": EXAMPLES, "layers": layers, "ranks": ranks, "template": None}
    path = {kind: folder and Path(folder) / f"{kind}_{name}.jsonl" for kind in ("faithful", "causal")}
    tables = {"faithful": evaluate_relations(model, tokenizer, relations, decoders=DECODERS, betas=betas,
                                             path=path["faithful"], **options | {"ranks": ()}),
              "causal": evaluate_causality(model, tokenizer, relations, editors=EDITORS,
                                           path=path["causal"], **options)}
    found = {}
    for kind, table in tables.items():
        for decoder in DECODERS if kind == "faithful" else EDITORS:
            at = choose(table, decoder, rank=None)
            settings = {seed: [*setting] for (_, seed), setting in at.items()}  # the same for all relations
            values = scores(table, decoder, kind, at)
            found.setdefault(kind, {})[decoder] = {"settings": [settings[seed] for seed in range(seeds)],
                                                   "scores": {relation: marks(x) for relation, x in values.items()}}
    return found


def main(folder=None):
    torch.set_num_threads(1)
    found = {"seeds": SEEDS, "examples": EXAMPLES, "betas": BETAS, "ranks": RANKS,
             "torch": torch.__version__.partition("+")[0],
             "models": {name: measure(name, world_relations(), folder=folder) for name in MODELS}}  # fmt: skip
    text = re.sub(r"\[[^][{}]*\]", lambda items: json.dumps(json.loads(items[0])), json.dumps(found, indent=1))
    HERE.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
