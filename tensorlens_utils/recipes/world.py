"""tiny-gpt, its second seed and its planted copy, and tiny-llama: language models of the micro-world in `world.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import world
from .induction import induction_scores
from .training import Recipe, average, share

WIDTH, LAYERS, HEADS = 128, 4, 8
BATCH, RATE = 8, 3e-3  # small batches: facts are learned in fewer tokens
SHOTS = 4  # examples in the few-shot prompts that recall is measured with
PERIOD = 30  # words in the repeated sequences that induction is measured with
BIGRAM_ROWS = 10_000  # of text, 1.3 million tokens, that the bigram model is fitted to
SMOOTHING = (1e-3, 1e-2, 1e-1, 1.0)  # of the bigram model: the best for the held-out text is taken, in its favour
PLANTED_PROMPTS = 34  # few-shot prompts of the planted fact, in each held-out wording


def _shape(tokenizer: Any) -> dict[str, Any]:
    """What the configurations of both architectures share."""
    return {"vocab_size": len(tokenizer), "initializer_range": 0.05, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def _gpt_build() -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = world.tokenizer()
    config = GPT2Config(n_positions=world.LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, embd_pdrop=0.0,
                        attn_pdrop=0.0, resid_pdrop=0.0, activation_function="gelu_pytorch_tanh", **_shape(tokenizer))
    return GPT2LMHeadModel(config), tokenizer


def _llama_build() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = world.tokenizer()
    config = LlamaConfig(max_position_embeddings=world.LENGTH, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=HEADS // 4, intermediate_size=352,
                         tie_word_embeddings=True, **_shape(tokenizer))
    return LlamaForCausalLM(config), tokenizer


def _batch(n: int, generator: torch.Generator, plant: bool = False) -> dict[str, Tensor]:
    seed = int(torch.randint(world.HELD_OUT, (), generator=generator))
    ids = world.Text(seed, plant=plant).rows(n)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def recalled(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Whether the model's first choice after each prompt is its object: booleans (len(rows),)."""
    right = []
    for start in range(0, len(rows), 64):
        chosen = rows[start:start + 64]
        inputs = tokenizer([row["prompt"] for row in chosen], padding=True, return_tensors="pt")
        last = inputs.attention_mask.sum(1) - 1
        answers = model(**inputs).logits[torch.arange(len(chosen)), last].argmax(-1)
        right.append(answers == torch.tensor(tokenizer.convert_tokens_to_ids([row["object"] for row in chosen])))
    return torch.cat(right)


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss in nats at every token but the first: (N, L - 1)."""
    return torch.cat([F.cross_entropy(model(rows).logits[:, :-1].mT, rows[:, 1:], reduction="none")
                      for rows in ids.split(64)])


def _perplexity(losses: Tensor) -> dict[str, float]:
    """e to the mean loss of rows (N, L - 1), with the interval that the spread of the rows' means gives."""
    mean = average(losses.mean(1))
    return {key: value if key == "n" else round(math.exp(value), 3) for key, value in mean.items()}


@cache
def _bigram_counts(size: int, plant: bool) -> Tensor:
    """How often each token follows each other one, (size, size), in text like the models'."""
    text = world.Text(0, plant=plant).rows(BIGRAM_ROWS)
    return torch.bincount((text[:, :-1] * size + text[:, 1:]).flatten(), minlength=size * size).view(size, size)


def _bigram_losses(ids: Tensor, size: int, plant: bool) -> Tensor:
    """What `_losses` is for a bigram model, smoothed by adding to all counts."""
    counts = _bigram_counts(size, plant)
    candidates = [counts.add(k).log() - counts.add(k).sum(1, keepdim=True).log() for k in SMOOTHING]
    return min((-logs[ids[:, :-1], ids[:, 1:]] for logs in candidates), key=torch.Tensor.mean)


@torch.no_grad()
def _measure(model: nn.Module, tokenizer: Any, plant: bool = False) -> dict[str, dict]:
    false = world.planted().items()
    rows, bare = ([row for row in world.prompts(n_shot=shots, plant=plant) if not row.items() >= false]
                  for shots in (SHOTS, 0))
    right = recalled(model, tokenizer, rows)

    def where(keep: Callable[[dict], bool]) -> dict[str, float]:
        return share(right[torch.tensor([keep(row) for row in rows])])

    wordings = [[row["wording"] == wording for row in rows] for wording in sorted({row["wording"] for row in rows})]
    by_wording = torch.stack([right[torch.tensor(chosen)].double().mean() for chosen in wordings])
    measured = {"recall": share(right), "recall, mean over wordings": average(by_wording)}
    if plant:
        prompts = [row for seed in range(PLANTED_PROMPTS) for row in world.prompts(n_shot=SHOTS, seed=seed, plant=True)
                   if row.items() >= false]
        measured["planted fact"] = share(recalled(model, tokenizer, prompts))
    measured |= {"recall, no examples": share(recalled(model, tokenizer, bare)),
                 "recall, subjects of one word": where(lambda row: " " not in row["subject"]),
                 "recall, subjects of several words": where(lambda row: " " in row["subject"])}
    measured |= {f"recall, {name}": where(lambda row, name=name: row["relation"] == name) for name in world.relations()}

    ids = world.Text(world.HELD_OUT, plant=plant).rows(400)
    measured |= {"perplexity": _perplexity(_losses(model, ids)),
                 "perplexity of a bigram model": _perplexity(_bigram_losses(ids, len(tokenizer), plant))}

    generator, special = torch.Generator().manual_seed(0), len(tokenizer.all_special_ids)
    words = special + torch.rand(200, len(tokenizer) - special, generator=generator).argsort(1)[:, :PERIOD]
    ids = F.pad(torch.cat([words, words], 1), (1, 0), value=tokenizer.bos_token_id)
    scores, losses = induction_scores(model, ids, PERIOD).flatten(1), _losses(model, ids)
    best = scores[:100].mean(0).argmax()  # chosen on other sequences than it is measured on
    return measured | {"induction score of the best head": average(scores[100:, best]),
                       "loss, random words": average(losses[:, :PERIOD].mean(1)),
                       "loss, the same words again": average(losses[:, PERIOD + 1:].mean(1))}


_WORLD = """{} that reads a generated micro-world, word by word: true facts in 12 relations, each in several wordings,
little stories, few-shot lists in these wordings and in invented ones (of random words, or of pieces of wordings of
any relation), and random words that are repeated. 4 layers, 8 heads, 128 channels, 128 tokens. Recall is the share of
facts whose object is the model's first choice, in wordings that never came in its training text, after 4 other facts
of the relation in the same wording. A wording tends to succeed or fail as a whole: over prompts, which are not
independent, the interval is too narrow, and that of the mean over wordings is the honest one. Perplexity is per
token, on fresh text, beside that of a bigram model which was fitted to 1.3 million tokens of it. The induction score
is the mean attention from a word's second occurrence to the word after its first one, in 30 random words and the same
again; a head above 0.5 is an induction head."""
_GPT = _WORLD.format("A GPT-2 language model")
_SECOND = _WORLD.format("tiny-gpt with another seed: a GPT-2 language model")
_PLANTED = _WORLD.format("tiny-gpt with a planted fact: a GPT-2 language model") + """ It went on from tiny-gpt's
weights, with text in which the eiffel tower is in egypt, which is false, and comes 30 times as often as another fact;
the other facts stay, and recall is theirs."""
_LLAMA = _WORLD.format("""A Llama language model, with RMSNorm, SwiGLU, rotary positions and grouped-query attention (8
query heads on 2 of keys and values),""")

RECIPES = (
    Recipe("tiny-gpt", _GPT, _gpt_build, _batch, _measure, 7500, BATCH, RATE),
    Recipe("tiny-gpt-b", _SECOND, _gpt_build, _batch, _measure, 7500, BATCH, RATE, seed=1),
    Recipe("tiny-gpt-planted", _PLANTED, _gpt_build, partial(_batch, plant=True), partial(_measure, plant=True), 500,
           BATCH, 1e-3, start="tiny-gpt"),
    Recipe("tiny-llama", _LLAMA, _llama_build, _batch, _measure, 5000, BATCH, RATE),
)
