"""What notebook 06 draws of three models under five seeds is what is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from measurements.relations import BETAS, DECODERS, EDITORS, EXAMPLES, MODELS, RANKS, SEEDS, marks, measure

from tensorlens_utils.relations import world_relations

MEASURED = json.loads((Path(__file__).parent / "measurements" / "relations.json").read_text(encoding="utf-8"))
WORLD = world_relations()


def test_marks_are_scores():
    assert marks(np.array([[1.0, np.nan, 0.0]])) == ["1-0"]


def test_the_table_is_complete():
    assert (MEASURED["seeds"], MEASURED["examples"]) == (SEEDS, EXAMPLES) and [*MEASURED["models"]] == [*MODELS]
    assert (MEASURED["betas"], MEASURED["ranks"]) == ([*BETAS], [*RANKS])
    for found in MEASURED["models"].values():
        assert {kind: [*of] for kind, of in found.items()} == {"faithful": [*DECODERS], "causal": [*EDITORS]}
        for kind, decoders in found.items():
            first = decoders["tensor"]["scores"]
            for of in decoders.values():
                assert len(of["settings"]) == SEEDS
                for name, relation in WORLD.items():
                    assert [len(line) for line in of["scores"][name]] == [len(relation.samples)] * SEEDS
                    for seed, line in enumerate(of["scores"][name]):  # the same samples count for all
                        assert {i for i, mark in enumerate(line) if mark == "-"} == {
                            i for i, mark in enumerate(first[name][seed]) if mark == "-"}
                        learned = relation.split(EXAMPLES, seed)[0]
                        assert all(line[relation.samples.index(x)] == "-" for x in learned), kind


@pytest.mark.parametrize("model", MODELS)
def test_the_table_says_what_is_measured_again(model):
    """One relation under the first seed, at the settings that were chosen; another processor may round a word away."""
    for kind, decoders in MEASURED["models"][model].items():
        for decoder in ("tensor", "lre"):
            layer, beta, rank = decoders[decoder]["settings"][0]
            again = measure(model, {"fruit_colour": WORLD["fruit_colour"]}, seeds=1, layers=[layer], betas=[beta],
                            ranks=[rank or RANKS[0]])  # fmt: skip
            line, stored = (of[kind][decoder]["scores"]["fruit_colour"][0]
                            for of in (again, MEASURED["models"][model]))  # fmt: skip
            assert len(line) == len(stored) and sum(a != b for a, b in zip(line, stored, strict=True)) <= 1
