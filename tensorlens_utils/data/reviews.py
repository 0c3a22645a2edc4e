"""Generated film reviews whose label hangs on words in relation, and which say what words those are.

The grammar is readable data in `texts/reviews.toml`: 2 to 5 sentences, at most 48 words, words and punctuation between
blanks. Every review holds one opinion that counts. The label is that opinion's polarity:

- A word such as "good" or "bored" has a polarity; a negator ("not", "hardly", "by no means", "nothing") turns it round.
  Words of degree ("very", "absolutely") and the strength of a word change nothing.
- Hearsay does not count: an opinion that somebody other than "i" holds ("some said that it was awful", "the plot bored
  my brother").
- Of two opinions of the reviewer's own, what follows "but" or "yet" counts, and the clause of "while" does not.

The evidence is the words that decide: the polar word of the opinion that counts, and its negator. What does not count
is drawn without regard to the label, and every polar word has a counterpart of the other polarity that is drawn as
often: without the evidence nothing tells the label, and a bag of words tells next to nothing.

The kinds are "plain" and the joined names of what a review needs: "negated" (the opinion that counts holds a negator),
"contrasted" ("but", "yet" or "while" stands between two opinions), "hearsay" (one of two opinions is somebody else's).
Kinds without "negated" are twice as frequent as those with it; in each the labels are balanced.

>>> from tensorlens_utils.data.reviews import reviews
>>> review = reviews(1, seed=363)[0]
>>> review["text"]
'the finale was remarkably touching at first , but later far from elegant . the cinema is far from my house .'
>>> review["kind"], review["label"]
('negated contrasted', 0)
>>> [word for word, decides in zip(review["text"].split(), review["evidence"]) if decides]
['far', 'from', 'elegant']
"""

from __future__ import annotations

import math
import random
import re
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRAMMAR = tomllib.loads((Path(__file__).parent / "texts" / "reviews.toml").read_text(encoding="utf-8"))
LABELS = ("negative", "positive")
KINDS = ("plain", "contrasted", "hearsay", "contrasted hearsay",
         "negated", "negated contrasted", "negated hearsay", "negated contrasted hearsay")
ROUND = KINDS[:4] + KINDS  # a third of the opinions that count are negated, as are those that do not
SENTENCES = (2, 5)  # in a review, fewest and most; beyond those that its opinions need, they are filler
WORDS = 48  # in a review, most
LISTS = GRAMMAR["opinions"] | GRAMMAR["words"]  # by the name of the slot that they fill
SLOT = re.compile(r"\{([^?}]+)(\??)\}")
BE = {aspect: be for be, aspects in GRAMMAR["aspects"].items() for aspect in aspects}  # "the jokes": "were"


def reviews(n: int, seed: int = 0, split: str = "test", *,
            sentences: tuple[int, int] = SENTENCES) -> list[dict[str, Any]]:
    """n reviews, the same ones for the same arguments: rows of `text`; `label` (0 negative, 1 positive); `evidence`, a
    0 or 1 for each word of `text.split()`, 1 for those that decide; and `kind`.

    No text belongs to both splits. Those of "train" hold no pair of negator and polar word that `unseen` tells; those
    of "test" hold them as often as any other. Kinds and labels are balanced (exactly, where n is a multiple of 24).
    `sentences` is the fewest and the most of them: (1, 1) leaves out all filler.

    Raises ValueError for a split of another name.

    >>> for review in reviews(2, seed=1, sentences=(1, 1)):
    ...     print(review["label"], review["text"])
    0 while my brother thought that the lead actor was truly fantastic , i thoroughly resented the film .
    1 the man next to me thought that the cast was dull , yet in the end i loved the finale .
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}.')
    rng = random.Random(seed)
    kinds = [*ROUND] * math.ceil(n / len(ROUND) / 2)
    rng.shuffle(kinds)
    plan = [(kind, label) for kind in kinds for label in rng.sample((0, 1), 2)][:n]
    rng.shuffle(plan)
    return [_draw(rng, kind, label, split, sentences) for kind, label in plan]


def unseen(words: Sequence[str], evidence: Sequence[int]) -> bool:
    """Whether an opinion's evidence is a negator and a polar word that no training text brings together.

    >>> unseen("the plot was not very clever".split(), [0, 0, 0, 1, 0, 1])
    True
    """
    *negator, polar = (word for word, decides in zip(words, evidence, strict=True) if decides)
    return polar in GRAMMAR["unseen"].get(" ".join(negator), ())


def vocabulary() -> list[str]:
    """Every word that a review can hold, in alphabetical order.

    >>> "marvellous" in vocabulary()
    True
    """
    def strings(node: Any) -> list[str]:
        children = node.values() if isinstance(node, dict) else node
        return [node] if isinstance(node, str) else [text for child in children for text in strings(child)]

    text = SLOT.sub(" ", " ".join([*strings(GRAMMAR), *GRAMMAR["aspects"], "i me"]))
    return sorted(set(re.sub(r"[][]", "", text).split()))


def _draw(rng: random.Random, kind: str, label: int, split: str, sentences: tuple[int, int]) -> dict[str, Any]:
    while True:
        text, seen = _compose(rng, kind, label, sentences)
        words, evidence = _read(text)
        text = " ".join(words)
        held_out = zlib.crc32(text.encode()) % 4 == 0  # a quarter of all texts, whatever the seed
        if len(words) <= WORDS and held_out == (split == "test") and (seen or split == "test"):
            return {"text": text, "label": label, "evidence": evidence, "kind": kind}


def _compose(rng: random.Random, kind: str, label: int, length: tuple[int, int] = SENTENCES) -> tuple[str, bool]:
    """A review with its evidence in brackets, and whether all its negated opinions are such as training texts hold.

    The label settles which of two parallel lists the verdict's polar word is taken from, and nothing else.
    """
    frames, hearsay, negated = GRAMMAR["sentences"], "hearsay" in kind, "negated" in kind
    if "contrasted" in kind:
        core = [rng.choice(frames["contrast_hearsay" if hearsay else "contrast"])]
    else:
        core = [rng.choice(frames[name]) for name in ("verdict", "hearsay")[: 1 + hearsay]]
    filler = rng.sample(frames["filler"], max(0, rng.randint(*length) - len(core)))

    aspect, other = rng.sample(list(BE), 2)
    forms = ("so", "not so") if "{was}" in core[0] else ("opinion", "negated opinion")
    verdict = _opinion(rng, forms[negated], aspect, LABELS[label ^ negated])
    remark = _opinion(rng, forms[rng.random() < 1 / 3], other, rng.choice(LABELS), hearsay)
    slots = {"verdict": verdict, "remark": re.sub(r"[][]", "", remark), "the plot": aspect, "was": BE[aspect]}
    sentences = [frame.format(**slots) for frame in core] + [_fill(rng, frame) for frame in filler]
    rng.shuffle(sentences)
    stated = [verdict] if kind in ("plain", "negated") else [verdict, remark]
    return " ".join(sentences), not any(unseen(*_read(opinion)) for opinion in stated)


def _opinion(rng: random.Random, form: str, aspect: str, polarity: str, hearsay: bool = False) -> str:
    """One opinion on an aspect, with the words that decide in brackets; in hearsay, somebody else holds it."""
    i, me = "{i}", "{me}"  # who holds it is settled last
    subject = {"the plot": aspect, "was": BE[aspect]}
    text = _fill(rng, rng.choice(LISTS[form]), polarity, i=i, me=me, **subject)
    if not hearsay:
        return text.format(i="i", me="me")
    if i not in text and me not in text:
        text = _fill(rng, "{i} {said} that ", i=i) + text
    source = rng.choice(GRAMMAR["words"]["some"])
    return text.format(i=source, me=source)


def _fill(rng: random.Random, template: str, polarity: str = "", /, **given: str) -> str:
    """A template with its slots filled: from `given`, from the grammar's lists, or by a word of the polarity."""
    def entry(match: re.Match) -> str:
        name, optional = match.groups()
        if name in given:
            return given[name]
        if optional and rng.random() < 0.5:
            return ""
        options = LISTS.get(name) or GRAMMAR["polar"][name][polarity]
        return SLOT.sub(entry, rng.choice(options))

    return SLOT.sub(entry, template)


def _read(marked: str) -> tuple[list[str], list[int]]:
    """The words of a text, and for each whether it stands in brackets."""
    spans = re.findall(r"\[(.+?)\]|([^\s[]+)", marked)
    words = [(word, int(bool(inside))) for inside, outside in spans for word in (inside or outside).split()]
    return [word for word, _ in words], [decides for _, decides in words]
