"""Trees that were planted in a tensor and what is found of them under noise, beside plain average linkage.

    python tests/measurements/planted.py            # writes planted.json beside this file, in some minutes

Block-hierarchical tensors of 64 × 64 × 64 with nested trees of 4, 8 and 16 folders on each axis, their leaves shuffled,
and of a matrix of 128 × 128 with the same trees, with noise of rising strength. Notebook 08 draws what the file holds:
for each tensor the adjusted Rand index at each planted number of folders, a mean over the axes, of the questionnaire's
trees and of scipy's average linkage of the slices, cut at these numbers, by Euclidean, cosine and city-block distance;
and, of random tensors without any structure, how far the trees of two halves agree, and those with leaves dealt anew.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage

from tensorlens_utils.trees import Tree
from tensorlens_utils.trees.growing import flexible_tree
from tensorlens_utils.trees.questionnaire import plant, questionnaire

OUT = Path(__file__).resolve().with_suffix(".json")
COUNTS, LEVELS, SEEDS = (4, 8, 16), (None, 20.0, 10.0, 5.0, 0.0, -5.0, -10.0), 6
RANDOM, PAIRS = (32, 32, 64), 200
SHAPES = {"3-tensor": (64, 64, 64), "matrix": (128, 128)}
RULES = {"questionnaire": {}, "questionnaire, flexible trees": {"grow": flexible_tree, "rounds": 3}}
METRICS = ("euclidean", "cosine", "cityblock")


def found_by(x):
    """way -> a tree for each axis."""
    found = {name: questionnaire(x, **options).trees for name, options in RULES.items()}
    for metric in METRICS:
        merges = (linkage(x.movedim(axis, 0).flatten(1).numpy(), "average", metric) for axis in range(x.dim()))
        found[f"average linkage, {metric}"] = [Tree.from_linkage(Z, COUNTS) for Z in merges]
    return found


def same(found, trees):
    """The adjusted Rand index at each planted number of folders, a mean over the axes."""
    rand = [[a.adjusted_rand(b, n) for n in COUNTS] for a, b in zip(found, trees, strict=True)]
    return np.mean(rand, 0).round(4).tolist()


def planted(shapes, levels, seeds):
    rows = []
    for kind, shape in shapes.items():
        for snr_db in levels:
            for seed in range(seeds):
                x, trees = plant(shape, COUNTS, snr_db, seed=seed)
                rand = {name: same(found, trees) for name, found in found_by(x).items()}
                rows.append({"kind": kind, "snr_db": snr_db, "seed": seed, "adjusted_rand": rand})
            print(kind, snr_db, {name: np.mean([row["adjusted_rand"][name] for row in rows[-seeds:]], 0).round(2)
                                 for name in rand}, flush=True)  # fmt: skip
    return rows


def halves(shape, pairs):
    """Of random tensors: the agreement of the heads' trees of two halves of the rows, and with leaves dealt anew."""
    rows = []
    for seed in range(pairs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        one, other = (questionnaire(part, rounds=3).trees[-1] for part in x.chunk(2))
        rows.append([round(one.agreement(tree), 4) for tree in (other, other.shuffled(seed))])
    return rows


def main(shapes=SHAPES, levels=LEVELS, seeds=SEEDS, pairs=PAIRS, out=OUT):
    torch.set_num_threads(1)
    found = {"counts": COUNTS, "shapes": shapes, "rows": planted(shapes, levels, seeds),
             "random": halves(RANDOM, pairs), "torch": torch.__version__.partition("+")[0]}
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])),  # a list on a line
                  json.dumps(found, indent=1, ensure_ascii=False))
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
