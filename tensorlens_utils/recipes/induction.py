"""tiny-attn: two layers of attention, nothing between them, and the induction circuit; what shows the circuit in any
causal model."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import word_tokenizer
from .training import Recipe, average

WORDS = [consonant + vowel for consonant in "bdfghklmnprst" for vowel in "aeiou"]
LENGTH = 64  # words in a sequence; <s> stands before them
PERIODS = (8, 32)  # the shortest and the longest stretch that is repeated
FIRST = 3  # the id of the first word: <pad>, <s> and <unk> come before


def repeated_words(n: int, generator: torch.Generator, periods: tuple[int, int] = PERIODS) -> Tensor:
    """n sequences of ids, (n, 1 + LENGTH): <s>, then random words that begin again after a period, over and over.

    The period is drawn anew for each sequence, so that no fixed distance back finds the word that comes next.
    """
    words = FIRST + torch.randint(len(WORDS), (n, LENGTH), generator=generator)
    period = torch.randint(periods[0], periods[1] + 1, (n, 1), generator=generator)
    return F.pad(words.gather(1, torch.arange(LENGTH) % period), (1, 0), value=1)


def attention_maps(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The attention of every head of a model of text: (layers, N, heads, L, L), rows summing to 1."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others never form it
    try:
        return torch.stack(model(input_ids, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(before)


def induction_scores(model: nn.Module, input_ids: Tensor, period: int) -> Tensor:
    """Mean attention from a token of the second copy to the token after its first occurrence: (N, layers, heads).

    `input_ids` (N, L) end in a stretch of `period` tokens and its copy; anything may stand before them.
    """
    if not torch.equal(input_ids[:, -period:], input_ids[:, -2 * period:-period]):
        raise ValueError(f"An induction score is taken where the last `period` tokens are those before them once more; "
                         f"here the last {period} are not. Build input_ids as torch.cat([block, block], 1).")
    return attention_maps(model, input_ids).diagonal(1 - period, -2, -1)[..., -period:].mean(-1).movedim(0, 1)


def previous_token_scores(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Mean attention from a token to the one before it: (N, layers, heads)."""
    return attention_maps(model, input_ids).diagonal(-1, -2, -1).mean(-1).movedim(0, 1)


def _build() -> tuple[nn.Module, Any]:
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = word_tokenizer(WORDS, 1 + LENGTH, template="<s> $A", pad_token="<pad>", bos_token="<s>",
                               unk_token="<unk>")
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2,
                       num_attention_heads=4, ffn_dim=0, max_position_embeddings=1 + LENGTH, enable_bias=False,
                       layer_norm_elementwise_affine=False, tie_word_embeddings=False, dropout=0.0, init_std=0.1,
                       pad_token_id=0, bos_token_id=1, eos_token_id=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the MLP's, of no hidden units
        return OPTForCausalLM(config), tokenizer


def _batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = repeated_words(n, generator)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def _measure(model: nn.Module, processor: Any) -> dict[str, dict]:
    ids, period = repeated_words(500, torch.Generator().manual_seed(1), (PERIODS[1], PERIODS[1])), PERIODS[1]
    logits, targets = model(ids).logits[:, :-1], ids[:, 1:]
    loss = F.cross_entropy(logits.mT, targets, reduction="none")
    right = (logits.argmax(-1) == targets).double()
    # The first word of the second copy is left out: nothing tells yet that the sequence begins again.
    measured = {"accuracy, second copy": average(right[:, period + 1:].mean(1)),
                "loss, first copy": average(loss[:, :period].mean(1)),
                "loss, second copy": average(loss[:, period + 1:].mean(1))}
    for kind, scores in {"previous token": previous_token_scores(model, ids),
                         "induction": induction_scores(model, ids, period)}.items():
        for layer, head in itertools.product(*map(range, scores.shape[1:])):
            measured[f"{kind}, layer {layer} head {head}"] = average(scores[:, layer, head])
    return measured


_ABOUT = f"""Two layers of attention and nothing else: OPT's architecture with an MLP of no hidden units (ffn_dim 0, so
that it adds exactly zero), no biases, LayerNorm without weights (it stays: before each attention and at the end),
learned positions, and input and output embeddings of their own; 4 heads in each layer, 64 channels. Trained on random
sequences of {LENGTH} words, of a vocabulary of {len(WORDS)}, that begin again after a period of {PERIODS[0]} to
{PERIODS[1]} words, drawn anew for each, so that no fixed distance back finds the word that comes next: a head must look
for the word after the earlier occurrence of the present one. That is induction, and takes two layers: in layer 0 a head
attends to the previous token, and layer 1 finds the place by what that head wrote there. Measured on new random
sequences of {PERIODS[1]} words said twice; losses in nats. Scores are mean attention: to the previous token, and, in
the second copy, to the token after the first occurrence. The first copy cannot be predicted: a uniform guess has a loss
of {math.log(len(WORDS)):.3f}, and the model's is higher, most where chance repeats a word, which it takes for the
beginning of the second copy."""

RECIPES = (Recipe("tiny-attn", _ABOUT, _build, _batch, _measure, steps=2000, lr=3e-3),)
