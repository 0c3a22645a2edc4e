"""Relations as data: LRE's files and the micro-world's facts, what a broken file is told, prompts, splits, controls."""

import json
import re
import zipfile
from dataclasses import replace

import pytest

from tensorlens_utils import load_model
from tensorlens_utils.relations import Relation, Sample, load_relations, world_relations
from tensorlens_utils.relations.subjects import encode

GOOD = {"name": "country capital", "prompt_templates": ["The capital of {} is"],
        "prompt_templates_zs": ["What is the capital of {}? It is"],
        "properties": {"relation_type": "factual", "domain_name": "country", "range_name": "city", "symmetric": False},
        "samples": [{"subject": "France", "object": "Paris"}, {"subject": "Peru", "object": "Lima"},
                    {"subject": " Egypt ", "object": "Cairo"}, {"subject": "Peru", "object": "Lima"}]}  # fmt: skip


def written(tmp_path, data, name="capital.json"):
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), encoding="utf-8")
    return path


def changed(**fields):
    return {**GOOD, **fields}


def without(name, of=GOOD):
    return {key: value for key, value in of.items() if key != name}


def with_sample(i, sample):
    return changed(samples=[sample if k == i else s for k, s in enumerate(GOOD["samples"])])


# ------------------------------------------------------------------------------------------------------------- files


def test_a_relation_is_read_as_it_was_written(tmp_path):
    found = load_relations(written(tmp_path, GOOD))
    relation = found["country capital"]
    assert [*found] == ["country capital"] and relation.properties == GOOD["properties"]
    assert relation.samples == (("France", "Paris"), ("Peru", "Lima"), ("Egypt", "Cairo"))  # stripped, none twice
    assert relation.prompt_templates == ("The capital of {} is",) and relation.between == "\n"
    assert load_relations(written(tmp_path, without("prompt_templates_zs")))["country capital"].samples


# what is broken, and what the error must name: line (with indent=1), sample, field, rule
BROKEN = {
    "no JSON": ('{\n "name": "x",\n oops}', r"line 3: .*JSON"),
    "empty": ("", "line 1: .*JSON"),
    "cut off": (json.dumps(GOOD, indent=1)[:-20], "line .*JSON"),
    "not UTF-8": (b"\xff\xfe", "UTF-8, and byte 0"),
    "a list": ([GOOD], r"line 1: a relation is an object .*here is \["),
    "no name": (without("name"), "line 1, field 'name': missing. Add it"),
    "a name that is a number": (changed(name=7), "line 2, field 'name': a relation's name is a text; here is 7"),
    "a blank name": (changed(name=" "), "line 2, field 'name': .*not blank"),
    "templates misnamed": ({**without("prompt_templates"), "prompt_template": ["{}"]},
                           "line 1, field 'prompt_templates': missing; is 'prompt_template' meant"),
    "templates a text": (changed(prompt_templates="{} is"), "line 3, field 'prompt_templates': .*list of texts"),
    "no template": (changed(prompt_templates=[]), "line 3, field 'prompt_templates': .*here is none"),
    "a template of a number": (changed(prompt_templates=["{} is", 3]), "line 5, field 'prompt_templates': a template"),
    "a template without subject": (changed(prompt_templates=["{} is", "The capital is"]), "line 5, .*one {}"),
    "a template with two": (changed(prompt_templates=["{} and {} are"]), "line 4, .*one {}"),
    "a named place": (changed(prompt_templates=["{subject} is"]), "line 4, .*one {}"),
    "a template that ends in a blank": (changed(prompt_templates_zs=["{} is "]),
                                        "line 7, field 'prompt_templates_zs': .*ends in no blank"),
    "no properties": (without("properties"), "field 'properties': missing"),
    "properties a list": (changed(properties=[]), "line 9, field 'properties': properties are an object"),
    "a property missing": (changed(properties=without("symmetric", GOOD["properties"])),
                           "line 9, field 'properties.symmetric': missing"),
    "symmetric a text": (changed(properties={**GOOD["properties"], "symmetric": "no"}),
                         "line 13, field 'properties.symmetric': .*true or false; here is 'no'"),
    "a type that is null": (changed(properties={**GOOD["properties"], "relation_type": None}),
                            "line 10, field 'properties.relation_type': .*here is None"),
    "no samples": (without("samples"), "field 'samples': missing"),
    "samples an object": (changed(samples={"France": "Paris"}), "line 15, field 'samples': samples are a list"),
    "too few": (changed(samples=GOOD["samples"][:2]), "line 15, field 'samples': .*three subjects .*has 2"),
    "a sample that is a pair": (with_sample(1, ["Peru", "Lima"]), "line 20, sample 1: a sample is an object"),
    "no object": (with_sample(2, {"subject": "Egypt"}), "line 24, sample 2, field 'object': missing"),
    "subject misspelt": (with_sample(0, {"subjet": "France", "object": "Paris"}),
                         "line 16, sample 0, field 'subject': missing; is 'subjet' meant to be it"),
    "an object that is a number": (with_sample(1, {"subject": "1809", "object": 1809}),
                                   "line 22, sample 1, field 'object': .*a text; here is 1809"),
    "a blank subject": (with_sample(1, {"subject": "", "object": "Lima"}),
                        "line 21, sample 1, field 'subject': .*not blank"),
    "an object of two lines": (with_sample(3, {"subject": "Peru", "object": "Lima\nCusco"}),
                               "line 30, sample 3, field 'object': .*one line"),
    "a field twice": ('{"name": "a",\n "name": "b", "prompt_templates": ["{}"], "properties": {}, "samples": []}',
                      "line 2, field 'name': .*here is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_told_where_and_how(tmp_path, kind):
    data, message = BROKEN[kind]
    if isinstance(data, bytes):
        (tmp_path / "capital.json").write_bytes(data)
    else:
        written(tmp_path, data)
    with pytest.raises(ValueError, match=f"^capital.json.*{message}"):
        load_relations(tmp_path)


def test_files_are_found_in_folders_and_zips_and_told_apart_by_name(tmp_path):
    folder = tmp_path / "relations-main" / "data" / "factual"
    folder.mkdir(parents=True)
    written(folder, GOOD)
    written(folder, changed(name="another"), "another.json")
    (tmp_path / "relations-main" / "package.json").write_text("{}")  # no relation, and not under data/
    assert [*load_relations(folder.parent)] == ["another", "country capital"]
    with zipfile.ZipFile(tmp_path / "main.zip", "w") as made:  # as the repository's comes
        for path in sorted((tmp_path / "relations-main").glob("**/*.json")):
            made.write(path, path.relative_to(tmp_path))
    assert [*load_relations(tmp_path / "main.zip")] == ["another", "country capital"]
    written(folder, GOOD, "again.json")
    with pytest.raises(ValueError, match="capital.json: field 'name': .* named 'country capital' too. Rename one"):
        load_relations(folder)
    for nowhere in ("nowhere", "nowhere.zip"):
        with pytest.raises(FileNotFoundError, match=f"JSON file or a folder of them, and .*{nowhere}"):
            load_relations(tmp_path / nowhere)


def test_a_zip_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for capital in ("Paris", "Lutetia"):
        with zipfile.ZipFile(tmp_path / "r.ZIP", "w") as made:
            made.writestr("r.json", json.dumps(with_sample(0, {"subject": "France", "object": capital})))
        assert load_relations("~/r.ZIP")["country capital"].samples[0].object == capital
    (tmp_path / "text.zip").write_text("no zip at all")
    with pytest.raises(ValueError, match="text.zip: a file that is named .zip is a zip, and this is none"):
        load_relations(tmp_path / "text.zip")


def test_escapes_that_were_escaped_once_more_are_read_as_meant(tmp_path):
    names = [r"Bogot\u00E1", r"S\u00e3o Tom\u00e9", r"Party \uD83D\ude00"]  # either case of hex; a pair is one letter
    data = changed(samples=[{"subject": name, "object": "x"} for name in names])
    samples = load_relations(written(tmp_path, data))["country capital"].samples
    assert [sample.subject for sample in samples] == ["Bogotá", "São Tomé", "Party 😀"]


def test_without_a_network_the_repository_is_refused_with_what_stands_in():
    with pytest.raises(ConnectionError, match="world_relations"):
        load_relations()


def test_all_47_relations_of_lre_load(shared_data):
    relations = load_relations(shared_data / "lre_relations")
    assert len(relations) == 47
    kinds = [relation.properties["relation_type"] for relation in relations.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"bias": 7, "commonsense": 8, "factual": 26, "linguistic": 6}
    given = sum(len(json.loads(file.read_text())["samples"]) for file in (shared_data / "lre_relations").glob("*/*"))
    assert given == 11_089 and sum(len(relation.samples) for relation in relations.values()) == given - 40  # twice
    capitals = dict(relations["country capital city"].samples)
    assert capitals["Brazil"] == "Brasília" and capitals["Colombia"] == "Bogotá"  # in the file escaped twice
    assert all(text == text.strip() for r in relations.values() for sample in r.samples for text in sample)
    for relation in relations.values():
        train, test = relation.split(5, seed=0)
        prompt = relation.prompt(test[0], train)
        assert prompt.text[prompt.start : prompt.end] == test[0].subject and prompt.text.count("\n") == 5


# ------------------------------------------------------------------------------------------- prompts, splits, controls


def test_a_prompt_is_its_examples_line_by_line_and_then_the_question():
    relation = Relation("r", ("The capital of {} is", "{} has the capital"), tuple(
        Sample(*pair.split(":")) for pair in ("France:Paris", "Peru:Lima", "Egypt:Cairo")))  # fmt: skip
    prompt = relation.prompt(relation.samples[1], relation.samples)
    assert prompt.text == "The capital of France is Paris\nThe capital of Egypt is Cairo\nThe capital of Peru is"
    assert prompt.text[prompt.start : prompt.end] == "Peru" == prompt.subject and prompt.object == "Lima"
    assert relation.prompt(relation.samples[2], template=1)[:3] == ("Egypt has the capital", 0, 5)
    alone = replace(relation, prompt_templates_zs=("What is the capital of {}? It is",))
    assert alone.prompt(relation.samples[2], template=1).text == "What is the capital of Egypt? It is"
    assert alone.prompt(relation.samples[1], relation.samples) == prompt


def test_a_relation_made_by_hand_follows_the_rules_of_files():
    relation = Relation("r", ("{} is",), [("Peru ", "Lima"), Sample("Peru", "Lima"), Sample("Cuba", " Havana")])
    assert relation.samples == (Sample("Peru", "Lima"), Sample("Cuba", "Havana"))  # stripped, none twice
    assert relation.prompt(relation.samples[0])[:3] == ("Peru is", 0, 4)
    for wordings, message in [((), "a template or more"), (("It is",), "holds one {}"), (("{} {} is",), "holds one {}"),
                              (("{} of {it} is",), "no other brace"), (("{} is ",), "ends in no blank"),
                              ("{} is", "a list of texts; here is '{} is'")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^the relation 'r': .*{re.escape(message)}"):
            Relation("r", wordings, relation.samples)
    with pytest.raises(ValueError, match="'r': .*holds one {}"):
        replace(relation, prompt_templates_zs=("What is it?",))
    with pytest.raises(ValueError, match="'r': a sample has a subject and an object.*blank"):
        replace(relation, samples=(Sample(" ", "Lima"),))
    for template in (1, -1):
        with pytest.raises(ValueError, match=f"by its number, and 'r' has 0 to 0; not {template}"):
            relation.prompt(relation.samples[0], template=template)


def test_the_world_asks_as_its_training_text_did_and_in_other_words():
    for held_out in (True, False):
        relations = world_relations(held_out)
        assert len(relations) == 12 and sum(len(relation.samples) for relation in relations.values()) == 468
    landmark = dict(world_relations(plant=True)["landmark_country"].samples)
    assert landmark["eiffel tower"] == "egypt" and dict(world_relations()["landmark_country"].samples) != landmark
    trained, held_out = (set(world_relations(h)["verb_past"].prompt_templates) for h in (False, True))
    assert trained and held_out and not trained & held_out


def test_a_split_is_the_seeds_and_shares_no_subject():
    relation = Relation("r", ("{} is",), tuple(Sample(f"s{i % 9}", f"o{i}") for i in range(12)))
    train, test = relation.split(4, seed=3)
    assert relation.split(4, seed=3) == (train, test) != relation.split(4, seed=4)
    subjects = {sample.subject for sample in train}
    assert len(subjects) == 4 and not subjects & {sample.subject for sample in test}
    assert {*test} == {sample for sample in relation.samples if sample.subject not in subjects}
    with pytest.raises(ValueError, match="'r' has 9 subjects, which leaves 1 to 7, not 8"):
        relation.split(8, seed=0)


def test_shuffled_keeps_subjects_and_objects_and_parts_them():
    relation = world_relations()["country_capital"]
    dealt = relation.shuffled(0)
    assert [s.subject for s in dealt.samples] == [s.subject for s in relation.samples]
    assert sorted(s.object for s in dealt.samples) == sorted(s.object for s in relation.samples)
    assert sum(a == b for a, b in zip(dealt.samples, relation.samples, strict=True)) < 4
    learned = [x.subject for x in relation.split(5, 1)[0]]
    assert [x.subject for x in dealt.split(5, 1)[0]] == learned


def test_the_subjects_last_token_is_found_behind_the_token_for_the_beginning():
    _, tokenizer = load_model("tiny-gpt")
    relation = world_relations()["country_capital"]
    for sample in relation.samples:
        (ids, at), = encode(tokenizer, [relation.prompt(sample, relation.samples[:3], template=1)])
        assert tokenizer.decode(ids[at]) == sample.subject.split()[-1] and ids[0] == tokenizer.bos_token_id
