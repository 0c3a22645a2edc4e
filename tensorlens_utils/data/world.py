"""The micro-world of the zoo's language models: true facts, little stories and repeated words, as text without end.

What it is made of is readable data in `texts/world.toml`. Words stand between blanks and are one token each.

>>> from tensorlens_utils.data.world import prompts
>>> row = next(row for row in prompts("country_capital") if row["subject"] == "new zealand")
>>> row["prompt"], row["object"], row["subject_span"]
('the capital city of the place called new zealand is', 'wellington', (7, 9))
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import word_tokenizer

HELD_OUT = 2**62  # the seed of text to test on; recipes draw theirs below it
LENGTH = 128  # tokens in a row of text, and the longest input of the models
SHOTS = (2, 8)  # facts in a few-shot document, fewest and most
PERIODS = (4, 30)  # words in a repeated sequence, fewest and most
PLANTED = 30  # how many times as often as another fact the planted one comes in its copy's text
LESSONS = 0.5  # of the stories hold a fact
FILLER = 0.15  # of the sentences between facts say nothing


@dataclasses.dataclass(frozen=True)
class Relation:
    """Facts of one kind, `facts[subject] = object`, and the ways to word them: those of the training text, and those
    held out from it. A wording holds {subject} and ends in {object}."""

    name: str
    facts: dict[str, str]
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "texts" / "world.toml").read_text(encoding="utf-8"))


def planted() -> dict[str, str]:
    """The false fact of tiny-gpt-planted: {"relation", "subject", "object"}.

    >>> planted()["subject"]
    'eiffel tower'
    """
    return dict(_data()["planted"])


@cache
def relations(plant: bool = False) -> dict[str, Relation]:
    """The relations by name; with `plant`, the planted fact stands in place of the true one.

    >>> relations()["animal_class"].facts["sea lion"]
    'mammal'
    """
    found = {name: Relation(name, dict(fact.split(" : ") for fact in data["facts"]), tuple(data["wordings"]),
                            tuple(data["held_out"])) for name, data in _data()["relations"].items()}
    if plant:
        found[planted()["relation"]].facts[planted()["subject"]] = planted()["object"]
    return found


@cache
def vocabulary() -> tuple[str, ...]:
    """All words of the world, in alphabetical order.

    >>> len(vocabulary()) < 1500
    True
    """
    texts = _strings([part for name, part in _data().items() if name != "planted"])
    return tuple(sorted({word for text in texts for word in text.split() if word[0] not in "{|"}))


@cache
def _frame_words() -> tuple[str, ...]:
    """The words round the subjects and objects in the wordings of the training text."""
    words = {word for kind in relations().values() for wording in kind.wordings for word in wording.split()}
    return tuple(sorted(word for word in words if word[0] != "{"))


def _strings(part: Any) -> Iterator[str]:
    """All strings in a part of the data."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _strings(inner)


def tokenizer() -> Any:
    """The tokenizer of the world: <bos>, which it puts before a text, and one token a word.

    >>> tokenizer()("the capital of france is").tokens()
    ['<bos>', 'the', 'capital', 'of', 'france', 'is']
    """
    return word_tokenizer(vocabulary(), LENGTH, template="<bos> $A", pad_token="<pad>", bos_token="<bos>",
                          eos_token="<eos>", unk_token="<unk>")


def prompts(relation: str | None = None, *, n_shot: int = 0, seed: int = 0, held_out: bool = True,
            plant: bool = False) -> list[dict[str, Any]]:
    """A prompt for every fact in every wording, of one relation or of all: rows {"prompt", "subject", "object",
    "relation", "wording", "subject_span"}.

    A prompt is `n_shot` other facts of the relation, drawn anew for each prompt, in the same wording, and then the
    wording up to its object. `subject_span` is where the subject stands in the prompt's words, (first, last + 1); the
    tokens of `tokenizer()` stand one further on, since <bos> comes first. `held_out` takes the wordings that were not
    trained on, else those that were; `plant` takes the planted fact for the true one.

    Raises ValueError for a relation that is not there, and for more than 7 examples.

    >>> prompts("verb_past", n_shot=1)[0]["prompt"]
    'the verb draw has the past drew . the verb go has the past'
    """
    world = relations(plant)
    if relation is not None and relation not in world:
        raise ValueError(f"A relation is one of {', '.join(world)}, not {relation!r}.")
    if not 0 <= n_shot < SHOTS[1]:
        raise ValueError(f"A prompt has 0 to {SHOTS[1] - 1} examples, which with the fact asked for make the longest "
                         f"list of the training text, and what {LENGTH} tokens hold; not {n_shot}.")
    rng, rows = random.Random(seed), []
    for kind in world.values() if relation is None else [world[relation]]:
        for wording in kind.held_out if held_out else kind.wordings:
            for subject, object_ in kind.facts.items():
                others = rng.sample([other for other in kind.facts if other != subject], n_shot)
                shots = "".join(wording.format(subject=other, object=kind.facts[other]) + " . " for other in others)
                before, after = wording.removesuffix(" {object}").split("{subject}")
                first = len((shots + before).split())
                rows.append({"prompt": shots + before + subject + after, "subject": subject, "object": object_,
                             "relation": kind.name, "wording": wording,
                             "subject_span": (first, first + len(subject.split()))})
    return rows


# --- The text -----------------------------------------------------------------------------------------------


class Text:
    """The text of the world, drawn with one random generator: `document()` one at a time, `rows(n)` as token ids.

    With `plant`, the text of the planted copy, in which the planted fact comes many times as often as another.

    >>> Text(0).rows(2).shape
    torch.Size([2, 128])
    """

    def __init__(self, seed: int, *, plant: bool = False):
        self.rng = random.Random(seed)
        self.relations = relations(plant)
        self.facts = [(relation, subject) for relation in self.relations.values() for subject in relation.facts]
        if plant:
            self.facts += [(self.relations[planted()["relation"]], planted()["subject"])] * (PLANTED - 1)

    def document(self, kind: str | None = None) -> str:
        """A document: of the kind "facts", "few_shot", "story" or "repeat", else of a kind drawn from the mix."""
        mix = _data()["mix"]
        if kind is None:
            kind, = self.rng.choices([*mix], [*mix.values()])
        if kind not in mix:
            raise ValueError(f"A kind of document is one of {', '.join(mix)}, not {kind!r}.")
        return getattr(self, f"_{kind}")()

    def rows(self, n: int) -> Tensor:
        """n rows of token ids, (n, LENGTH): each starts with a new document, and the last one is cut off."""
        rows = []
        for _ in range(n):
            row = []
            while len(row) < LENGTH:
                row += ["<bos>", *self.document().split(), "<eos>"]
            rows.append([_ids()[word] for word in row[:LENGTH]])
        return torch.tensor(rows)

    def _fact(self) -> str:
        relation, subject = self.rng.choice(self.facts)
        return self.rng.choice(relation.wordings).format(subject=subject, object=relation.facts[subject])

    def _facts(self) -> str:
        return " ".join((self.rng.choice(_data()["filler"]["sentences"]) if self.rng.random() < FILLER
                         else self._fact()) + " ." for _ in range(self.rng.randint(1, 6)))

    def _few_shot(self) -> str:
        relation, _ = self.rng.choice(self.facts)
        subjects, wording = self.rng.sample([*relation.facts], self.rng.randint(*SHOTS)), self._wording(relation)
        return " ".join(wording.format(subject=subject, object=relation.facts[subject]) for subject in subjects)

    def _wording(self, relation: Relation) -> str:
        """How a list of facts is worded; what an invented wording asks for, the examples before it must tell."""
        styles = _data()["few_shot"]
        style, = self.rng.choices([*styles["shares"]], [*styles["shares"].values()])
        if style == "bare":
            return styles["lines"]
        if style == "random":
            before, after = (self.rng.choices(_frame_words(), k=self.rng.randint(0, most)) for most in styles["words"])
            return " ".join((*before, "{subject}", *after, "{object} ."))
        wording, kinds = self.rng.choice(relation.wordings), [*self.relations.values()]
        while style == "spliced" and any(wording in kind.wordings + kind.held_out for kind in kinds):
            before, after = (self.rng.choice(self.rng.choice(kinds).wordings) for _ in range(2))
            before, after = before.split("{subject}")[0].split(), after.split("{subject}")[1].split()[:-1]
            before, after = before[self.rng.randint(0, len(before)):], after[:self.rng.randint(0, len(after))]
            wording = " ".join((*before, "{subject}", *after, "{object}"))
        return wording + " ."

    def _story(self) -> str:
        slots, stories = _slots(self.rng), _data()["stories"]
        told = [self.rng.choice(ways.split(" | ")) for ways in self.rng.choice(stories["plots"])["told"]]
        if self.rng.random() < LESSONS:
            told.insert(-1, self.rng.choice(stories["lessons"]))  # by then both people have come
        return " ".join(told).format(**slots, fact=self._fact())

    def _repeat(self) -> str:
        words = self.rng.sample(vocabulary(), self.rng.randint(*PERIODS))
        return " ".join(words * self.rng.randint(2, 4))


def held_out_documents(n: int) -> list[dict[str, str]]:
    """n documents of each kind that no recipe has drawn: rows {"text", "kind"}.

    >>> held_out_documents(1)[0]["kind"]
    'facts'
    """
    text = Text(HELD_OUT)
    return [{"text": text.document(kind), "kind": kind} for kind in _data()["mix"] for _ in range(n)]


@cache
def _ids() -> dict[str, int]:
    return tokenizer().get_vocab()


def _slots(rng: random.Random) -> dict[str, str]:
    """What the slots of one story hold."""
    stories = _data()["stories"]
    name, friend = rng.sample(stories["girls"] + stories["boys"], 2)
    he, his, him = stories["pronouns"]["girls" if name in stories["girls"] else "boys"]
    drawn = {slot: rng.choice(stories[slot]) for slot in ("place", "thing", "animal", "mood")}
    return {"name": name, "friend": friend, "he": he, "his": his, "him": him, **drawn}
