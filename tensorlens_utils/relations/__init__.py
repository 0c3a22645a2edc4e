"""Relations as data: which object belongs to which subject, and the wordings that ask for it, in LRE's JSON schema.

A relation (Hernandez et al., arXiv 2308.09124, "LRE") is a file such as

    {"name": "country capital",
     "prompt_templates": ["The capital of {} is"], "prompt_templates_zs": ["What is the capital of {}? It is"],
     "properties": {"relation_type": "factual", "domain_name": "country", "range_name": "city", "symmetric": false},
     "samples": [{"subject": "France", "object": "Paris"}, {"subject": "Peru", "object": "Lima"}]}

and a prompt is n examples, each a line of its own, then the subject that is asked for. Here are LRE's own 47 relations
(from a local folder, or its repository), the micro-world's twelve, which the zoo's language models were trained on, and
any file of yours.

>>> capital = world_relations()["country_capital"]
>>> prompt = capital.prompt(capital.samples[3], examples=capital.samples[:1])
>>> prompt.text
'the capital city of the place called france is paris . the capital city of the place called spain is'
>>> prompt.text[prompt.start : prompt.end], prompt.object
('spain', 'madrid')
"""

from __future__ import annotations

import difflib
import json
import random
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..data import world

REPOSITORY = "https://github.com/evandez/relations/archive/refs/heads/main.zip"  # LRE's own, its data under data/
PROPERTIES = {"relation_type": str, "domain_name": str, "range_name": str, "symmetric": bool}


class Sample(NamedTuple):
    """One fact of a relation."""

    subject: str
    object: str


class Prompt(NamedTuple):
    """What is asked of a model: `text`, which `object` goes on; its subject is `text[start:end]`."""

    text: str
    start: int
    end: int
    subject: str
    object: str


@dataclass(frozen=True)
class Relation:
    """A relation: its samples, and its wordings, in which {} stands for the subject and which end before the object.

    `prompt_templates_zs` are for prompts without examples. `between` stands between two facts of a prompt: LRE puts
    each on a line, the micro-world has " . ". Blanks round a subject or object are taken off, and a sample that comes
    twice counts once.

    Raises ValueError for a wording without its one {}, and for a blank subject or object.
    """

    name: str
    prompt_templates: tuple[str, ...]
    samples: tuple[Sample, ...]
    prompt_templates_zs: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)
    between: str = "\n"

    def __post_init__(self):
        samples = dict.fromkeys(Sample(*(text.strip() for text in sample)) for sample in self.samples)
        object.__setattr__(self, "samples", tuple(samples))
        for _, what in _wording_faults(vars(self)):
            raise ValueError(f"the relation {self.name!r}: {what}")
        if not all(text for sample in samples for text in sample):
            raise ValueError(f"the relation {self.name!r}: a sample has a subject and an object, and one of these is "
                             "blank. Fill it in, or take the sample out.")

    def prompt(self, sample: Sample, examples: Sequence[Sample] = (), template: int = 0) -> Prompt:
        """The prompt for a sample after these examples, those of the same subject left out (LRE, appendix B); given
        none, in a wording for prompts without examples, where the relation has some. Raises ValueError for a template
        that is not there."""
        if template not in range(len(self.prompt_templates)):
            raise ValueError(f"a wording is asked for by its number, and {self.name!r} has 0 to "
                             f"{len(self.prompt_templates) - 1}; not {template!r}")
        alone = () if examples else self.prompt_templates_zs  # these need not be as many
        wording = alone[template % len(alone)] if alone else self.prompt_templates[template]
        shots = [f"{wording.format(x.subject)} {x.object}" for x in examples if x.subject != sample.subject]
        before = self.between.join([*shots, wording[: wording.index("{}")]])
        start, after = len(before), wording[wording.index("{}") + 2 :]
        return Prompt(before + sample.subject + after, start, start + len(sample.subject), *sample)

    def split(self, n: int, seed: int) -> tuple[list[Sample], list[Sample]]:
        """n samples of different subjects, drawn by the seed, and all samples of other subjects, in order.

        Raises ValueError where a relation has too few subjects to leave two to test on.
        """
        subjects = [*dict.fromkeys(sample.subject for sample in self.samples)]
        if not 1 <= n <= len(subjects) - 2:
            raise ValueError(f"a relation is split into 1 or more samples and at least two others; {self.name!r} has "
                             f"{len(subjects)} subjects, which leaves 1 to {len(subjects) - 2}, not {n}")
        rng = random.Random(f"{seed} {self.name}")
        chosen = rng.sample(subjects, n)
        train = [rng.choice([sample for sample in self.samples if sample.subject == name]) for name in chosen]
        return train, [sample for sample in self.samples if sample.subject not in chosen]

    def shuffled(self, seed: int) -> Relation:
        """The relation with its objects dealt anew, none but by chance in its place: a control."""
        objects = [sample.object for sample in self.samples]
        random.Random(f"{seed} {self.name}").shuffle(objects)
        samples = tuple(Sample(s.subject, o) for s, o in zip(self.samples, objects, strict=True))
        return Relation(self.name, self.prompt_templates, samples, self.prompt_templates_zs, self.properties,
                        self.between)


# ---------------------------------------------------------------------------------------------------- where from


def world_relations(held_out: bool = True, plant: bool = False) -> dict[str, Relation]:
    """The micro-world's twelve relations by name, in wordings that no recipe trained on, or in those of the training
    text; with `plant`, as tiny-gpt-planted learned them.

    >>> len(world_relations()), world_relations()["animal_class"].prompt_templates[0]
    (12, 'what class is the {} in ? the answer is')
    """
    found = {}
    for name, kind in world.relations(plant).items():
        wordings = [w.removesuffix(" {object}").replace("{subject}", "{}")
                    for w in (kind.held_out if held_out else kind.wordings)]
        samples = tuple(Sample(*fact) for fact in kind.facts.items())
        domain, _, range_name = name.partition("_")
        properties = {"relation_type": "world", "domain_name": domain, "range_name": range_name, "symmetric": False}
        found[name] = Relation(name, tuple(wordings), samples, tuple(wordings), properties, between=" . ")
    return found


def load_relations(source: str | Path = REPOSITORY) -> dict[str, Relation]:
    """Relations by name, from a JSON file, from all of a folder and the folders in it, or from a zip, here or on the
    net (fetched once); by default from LRE's repository. The two names that LRE's files escape twice (Brasília, Bogotá)
    are read as meant.

    Raises FileNotFoundError for a path that is not there or holds no JSON file, ConnectionError where the net cannot be
    reached, and ValueError for a file that is no relation, with its line, sample and field.
    """
    found: dict[str, Relation] = {}
    with _folder(str(source)) as folder:
        files = [folder] if folder.is_file() else sorted(folder.glob("**/*.json"))
        if not files:
            raise FileNotFoundError(f"Relations are a JSON file or a folder of them, and {str(source)!r} is neither. "
                                    "load_relations() fetches LRE's; world_relations() needs no file.")
        for file in files:
            relation = _read(file)
            if relation.name in found:
                raise ValueError(f"{file.name}: field 'name': relations have names of their own, and another file of "
                                 f"{str(source)!r} is named {relation.name!r} too. Rename one.")
            found[relation.name] = relation
    return found


@contextmanager
def _folder(source: str) -> Iterator[Path]:
    """A path; of a zip, what it holds: the folder data/, or all. One from the net stays in the cache of `datasets`."""
    path = Path(source).expanduser()
    with tempfile.TemporaryDirectory() as made:
        if "://" in source:
            path = _data(_fetched(source))
        elif path.suffix.lower() == ".zip" and path.is_file():
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path.name}: a file that is named .zip is a zip, and this is none. Pack it again.")
            with zipfile.ZipFile(path) as packed:
                packed.extractall(made)
            path = _data(Path(made))
        yield path


def _data(folder: Path) -> Path:
    return next((path for path in sorted(folder.glob("**/data")) if path.is_dir()), folder)


def _fetched(url: str) -> Path:
    from datasets import DownloadManager

    try:
        return Path(DownloadManager().download_and_extract(url))
    except ConnectionError as error:
        raise ConnectionError(f"{url!r} is on the net, which cannot be reached (no network, or HF_HUB_OFFLINE=1): "
                              "give the path of a folder of relations; world_relations() needs none.") from error


# ---------------------------------------------------------------------------------------------------- what is checked


class _Fault(ValueError):
    """What is wrong in a relation, and where: the path of keys and indices to the value."""

    def __init__(self, where: tuple, what: str):
        super().__init__(what)
        self.where = where


def _read(file: Path) -> Relation:
    """A relation from a file, or an error that names file, line, sample and field."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        data = json.loads(text, object_pairs_hook=_without_repeats)
        return _relation(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: a relation is a text in UTF-8, and byte {error.start} is not. Save it as "
                         "UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file.name}, line {error.lineno}: a relation is JSON, and here it is not: {error.msg}. Mend "
                         "that line, or one before it.") from error
    except _Fault as fault:
        lines = _lines(text)
        where = next(w for w in (fault.where[:k] for k in range(len(fault.where), -1, -1)) if w in lines)
        fields = [part for part in fault.where if isinstance(part, str)]
        sample = f", sample {fault.where[1]}" if fault.where[:1] == ("samples",) and len(fault.where) > 1 else ""
        at = f", field {'.'.join(fields[1:] if sample else fields)!r}" if fields[1:] or fields and not sample else ""
        raise ValueError(f"{file.name}, line {lines[where]}{sample}{at}: {fault}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields; one that comes twice is kept as a mark, since JSON's last would win unseen."""
    made = dict(pairs)
    for key in made if len(made) < len(pairs) else ():
        if sum(name == key for name, _ in pairs) > 1:
            made[key] = _Twice()
    return made


class _Twice:
    def __repr__(self):
        return "given twice"


def _relation(data: Any) -> Relation:
    for where, what in _faults(data):
        raise _Fault(where, what)
    samples = tuple(Sample(*(_clean(s[name]) for name in Sample._fields)) for s in data["samples"])
    if len({sample.subject for sample in samples}) < 3:
        raise _Fault(("samples",), "a relation has three subjects or more, one to learn from and two to test on, and "
                                   f"this has {len({sample.subject for sample in samples})}. Add some.")
    return Relation(data["name"], tuple(data["prompt_templates"]), samples,
                    tuple(data.get("prompt_templates_zs", ())), data["properties"])


def _clean(text: str) -> str:
    """Without escapes that were escaped once more, as in two of LRE's capitals."""
    return re.sub(r"(\\u[0-9a-fA-F]{4})+", lambda found: json.loads(f'"{found[0]}"'), text.strip())


def _faults(data: Any) -> Iterator[tuple[tuple, str]]:
    """What is wrong in the data, in the order of the schema: (where, rule and offender and remedy)."""
    yield from _is((), data, dict, "a relation is an object with name, prompt_templates, properties and samples")
    yield from _has((), data, ("name", "prompt_templates", "properties", "samples"))
    yield from _text(("name",), data["name"], "a relation's name")
    yield from _wording_faults(data)
    yield from _is(("properties",), data["properties"], dict, f"properties are an object with {', '.join(PROPERTIES)}")
    yield from _has(("properties",), data["properties"], PROPERTIES)
    for name, kind in PROPERTIES.items():
        value = data["properties"][name]
        if kind is str:
            yield from _text(("properties", name), value, f"the property {name}")
        yield from _is(("properties", name), value, kind, f"the property {name} is true or false")
    yield from _is(("samples",), data["samples"], list, "samples are a list")
    for i, sample in enumerate(data["samples"]):
        yield from _is(("samples", i), sample, dict, "a sample is an object with subject and object")
        yield from _has(("samples", i), sample, ("subject", "object"))
        for name in ("subject", "object"):
            yield from _text(("samples", i, name), sample[name], f"the {name} of a sample")


def _wording_faults(data: Mapping[str, Any]) -> Iterator[tuple[tuple, str]]:
    for name in ("prompt_templates", "prompt_templates_zs"):
        templates = data.get(name, [])
        yield from _is((name,), templates, (list, tuple), "templates are a list of texts")
        if name == "prompt_templates" and not templates:
            yield (name,), 'a relation has a template or more, such as "The capital of {} is", and here is none'
        for i, template in enumerate(templates):
            yield from _text((name, i), template, "a template")
            if template.count("{}") != 1 or template.replace("{}", "").count("{") or "}" in template.replace("{}", ""):
                yield (name, i), f"a template holds one {{}}, for the subject, and no other brace; not {template!r}"
            if template != template.rstrip():
                yield (name, i), f"a template ends in no blank, since one is put before the object; not {template!r}"


def _is(where: tuple, value: Any, kind: type | tuple[type, ...], rule: str) -> Iterator[tuple[tuple, str]]:
    if not isinstance(value, kind):
        yield where, f"{rule}; here is {_shown(value)}"


def _has(where: tuple, value: dict, names: Sequence[str]) -> Iterator[tuple[tuple, str]]:
    for name in names:
        if name not in value:
            near = difflib.get_close_matches(name, [key for key in value if key not in names], n=1)
            yield (*where, name), "missing" + (f"; is {near[0]!r} meant to be it?" if near else ". Add it.")


def _text(where: tuple, value: Any, what: str) -> Iterator[tuple[tuple, str]]:
    if not isinstance(value, str):
        yield where, f"{what} is a text; here is {_shown(value)}"
    elif not value.strip():
        yield where, f"{what} is not blank. Fill it in, or take it out."
    elif len(value.splitlines()) > 1:
        yield where, f"{what} is one line, since prompts have a line for each example; not {_shown(value)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _lines(text: str) -> dict[tuple, int]:
    """The line of every value of a JSON text, by its path of keys and indices."""
    decoder, lines = json.JSONDecoder(), {}

    def blank(i: int) -> int:
        while text[i] in " \t\r\n":
            i += 1
        return i

    def value(i: int, path: tuple) -> int:
        i = blank(i)
        lines[path] = text.count("\n", 0, i) + 1
        if text[i] not in "{[":
            return decoder.raw_decode(text, i)[1]
        keyed, end, n = text[i] == "{", "}" if text[i] == "{" else "]", 0
        i = blank(i + 1)
        while text[i] != end:
            key = n
            if keyed:
                key, i = decoder.raw_decode(text, i)
                i = blank(i) + 1  # past the colon
            i = blank(value(i, (*path, key)))
            i, n = blank(i + 1) if text[i] == "," else i, n + 1
        return i + 1

    value(0, ())
    return lines
