"""tiny-bert, which tells whether a generated film review is positive or negative."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..data.reviews import LABELS, SENTENCES, reviews, unseen, vocabulary
from ..models import word_tokenizer
from .training import Recipe, share

LENGTH = 64  # tokens, of which a review fills at most 50: its words between a class token and a separator
CHANNELS = 64
INITIAL = 0.05  # of the initial weights
SHORT = 0.5  # of the training batches are reviews without filler, from which relations are learnt far faster
MASKED, MOST = 0.25, 0.5  # so many of the training reviews have words masked, at most this share of their words


@cache
def _tokenizer() -> Any:
    return word_tokenizer(vocabulary(), LENGTH, template="[CLS] $A [SEP]", pad_token="[PAD]", unk_token="[UNK]",
                          cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def _build() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = _tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=CHANNELS, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=LENGTH, type_vocab_size=1, hidden_dropout_prob=0,
                        attention_probs_dropout_prob=0, initializer_range=INITIAL, pad_token_id=tokenizer.pad_token_id,
                        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)})
    model = BertForSequenceClassification(config)
    # Positions start as waves: who stands next to whom, on which all hangs, is otherwise learnt far more slowly.
    angle = torch.arange(LENGTH)[:, None] * LENGTH ** -torch.linspace(0, 1, CHANNELS // 2)
    waves = 2**0.5 * INITIAL * torch.cat([angle.sin(), angle.cos()], 1)  # as large as the initial weights
    model.bert.embeddings.position_embeddings.weight.data.copy_(waves)
    return model, tokenizer


def _encode(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return dict(_tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt"))


def _batch(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    seed = int(torch.randint(2**31, (), generator=generator))
    sentences = (1, 1) if torch.rand((), generator=generator) < SHORT else SENTENCES
    rows = reviews(n, seed, "train", sentences=sentences)
    inputs = _encode(rows)
    ids = inputs["input_ids"]
    share_masked = torch.where(torch.rand(n, 1, generator=generator) < MASKED, MOST, 0.0)
    share_masked = share_masked * torch.rand(n, 1, generator=generator)
    mask = _tokenizer().mask_token_id  # the last of the special tokens: the words' ids are higher
    masked = (torch.rand(ids.shape, generator=generator) < share_masked) & (ids > mask)
    return {**inputs, "input_ids": ids.masked_fill(masked, mask),
            "labels": torch.tensor([row["label"] for row in rows])}


def measure(model: nn.Module, processor: Any, n: int = 8000, seed: int = 1) -> dict[str, dict]:
    """The card's numbers, from n held-out reviews of a seed."""
    rows = reviews(n, seed)
    inputs, labels = _encode(rows), torch.tensor([row["label"] for row in rows])
    ids = inputs["input_ids"]
    evidence, word = torch.zeros_like(ids, dtype=torch.bool), ids > processor.mask_token_id
    for mine, row in zip(evidence, rows, strict=True):
        mine[1: 1 + len(row["evidence"])] = torch.tensor(row["evidence"], dtype=torch.bool)
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(evidence | ~word, 2.0)
    others = chance.argsort(1).argsort(1) < evidence.sum(1, keepdim=True)

    def right(masked: Tensor | bool = False) -> Tensor:
        shown = torch.where(torch.as_tensor(masked), processor.mask_token_id, ids)
        parts = zip(shown.split(500), inputs["attention_mask"].split(500), strict=True)
        with torch.no_grad():
            return torch.cat([model(part, mask).logits.argmax(-1) for part, mask in parts]) == labels

    plain = right()
    needs = {need: torch.tensor([need in row["kind"] for row in rows]) for need in ("negated", "contrasted", "hearsay")}
    novel = torch.tensor([unseen(row["text"].split(), row["evidence"]) for row in rows])
    return {"accuracy": share(plain), **{f"accuracy, {need}": share(plain[chosen]) for need, chosen in needs.items()},
            "accuracy, negator and polar word never seen together": share(plain[novel]),
            "accuracy, evidence masked": share(right(evidence)),
            "accuracy, as many other words masked": share(right(others)),
            "accuracy of a bag of words": share(_bag_of_words(rows) == labels)}


def _bag_of_words(rows: list[dict[str, Any]]) -> Tensor:
    """What logistic regression on counts of words, fitted to 8000 training reviews, says of others."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = reviews(8000, split="train")
    bag = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
    bag.fit([row["text"] for row in known], [row["label"] for row in known])
    return torch.from_numpy(bag.predict([row["text"] for row in rows]))


_ABOUT = """A BERT classifier of generated film reviews, negative or positive: 4 layers, 4 heads, 64 channels, one
token a word, positions that started as waves. The reviews, up to 48 words long, are such that the label hangs on words
in relation, and each says which words decide, its evidence: the rules are in reviews.py, the grammar in
texts/reviews.toml. Trained on new reviews in every step, half of the batches without filler sentences. In a quarter of
the reviews a random share of the words, at most half, was replaced by [MASK], so that masked inputs are no surprise;
texts with words taken out were not met. Nor was any text of the held-out split, nor an opinion with one of the pairs
of negator and polar word that the grammar lists as unseen. Negated are the reviews whose deciding opinion holds a
negator, contrasted those with but, yet or while between two opinions, hearsay those with somebody else's opinion; one
review can be all three. As many other words masked: of each review, as many words outside its evidence, chosen at
random. The bag of words is scikit-learn's logistic regression on counts of words, fitted to 8000 training reviews."""

RECIPES = (Recipe("tiny-bert", _ABOUT, _build, _batch, measure, steps=4000, lr=1e-3),)
