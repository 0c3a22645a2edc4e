"""Removal curves of a real pretrained language model on real text: stories260K, next-token prediction on TinyStories.

    python tests/measurements/stories260K.py            # writes stories260K.json beside this file, in a minute or two

Model and text are not part of the repository: they are looked for in $TENSORLENS_DATA, or ../shared/data. Notebook 05
draws what the file holds: for each way to remove a token (dropped, or <unk> in its place) and to watch the answer
(among all tokens, or among the top token and the runner-up), the area of each method for each story, from which paired
intervals can be taken.
"""
import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import torch

from tensorlens_utils import baselines, collapse, load_model
from tensorlens_utils.perturbation import area, curves, evaluate

HERE = Path(__file__).resolve()
DATA = Path(os.environ.get("TENSORLENS_DATA") or HERE.parents[2].parent / "shared" / "data")
STORIES, LENGTH = 128, 32  # how many, and how many tokens of each are read, the start symbol among them
FRACTIONS = [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1]
METHODS = collapse.METHODS | baselines.METHODS
TASKS = {"drop": ("drop", "prediction"), "unk": ("unk", "prediction"),
         "drop, contrast": ("drop", ("prediction", "runner-up"))}


def model_and_stories(data: Path):
    """The model, its tokenizer, and the beginnings of the first stories that are long enough: rows of `text`."""
    model, tokenizer = load_model(data / "stories260K", dtype="float32")
    tokenizer.pad_token = tokenizer.eos_token
    text = (data / "text" / "tinystories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:-1]]  # the last one is cut off
    long = [story for story in stories if len(tokenizer(story).input_ids) > LENGTH]
    return model, tokenizer, datasets.Dataset.from_dict({"text": long[:STORIES]})


def measure(model, tokenizer, rows, methods=METHODS, tasks=TASKS):
    """task -> order -> method -> areas under the curve of the probability, (stories,)."""
    found = {}
    for task, (remover, target) in tasks.items():
        table = evaluate(model, tokenizer, rows, methods, removers=[remover], orders=["morf", "lerf"], target=target,
                         fractions=FRACTIONS, max_length=LENGTH, batch_size=64)
        found[task] = {order: {method: area(values, FRACTIONS).round(4).tolist() for method, values in curves(
            table, "probability", order=order).items()} for order in ("morf", "lerf")}
    return found


def main():
    torch.set_num_threads(1)
    model, tokenizer, rows = model_and_stories(DATA)
    ids = tokenizer(rows["text"][:], truncation=True, max_length=LENGTH + 1, return_tensors="pt").input_ids
    with torch.no_grad():
        right = model(ids[:, :-1]).logits[:, -1].argmax(-1) == ids[:, -1]
    found = {"model": "stories260K", "data": "TinyStories", "stories": len(rows), "tokens": LENGTH,
             "fractions": FRACTIONS, "right": right.int().tolist(),
             "torch": torch.__version__.partition("+")[0], "tasks": measure(model, tokenizer, rows)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)  # a list on a line
    HERE.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    for task, orders in found["tasks"].items():
        for order, areas in orders.items():
            print(task, order, ", ".join(f"{m} {np.mean(v):.3f}" for m, v in sorted(
                areas.items(), key=lambda item: np.mean(item[1]), reverse=order == "lerf")))


if __name__ == "__main__":
    main()
