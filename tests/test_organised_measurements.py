"""What notebook 08 draws and does not compute: trees planted in noise, and a model tuned towards its own tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from measurements import penalty, planted

from tensorlens_utils import linearize, load_data, load_model
from tensorlens_utils.collapse import METHODS as MAPS

HERE = Path(__file__).parent / "measurements"
PLANTED, PENALTY = (json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in ("planted", "penalty"))
TANGENT = {"attention": "tangent", "norm": "tangent", "activation": "tangent"}


@pytest.mark.parametrize("frozen, options", [(True, {}), (False, TANGENT)], ids=["T", "J"])
def test_forward_mode_is_the_operator(frozen, options):
    model, processor = load_model("tiny-vit", dtype="float64")
    pixels = processor(load_data("digits")[:3]["image"], return_tensors="pt").pixel_values.double()
    epsilon = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    T = linearize(model, {"pixel_values": pixels}, at="embeddings", **options)
    logits, product = penalty.pushed(model, pixels, epsilon, frozen)
    assert (logits - T.output[:, 0]).abs().max() < 1e-12
    assert (product - T.matvec(epsilon)[:, 0]).abs().max() < 1e-12


def test_the_penalty_has_the_derivative_of_a_difference():
    """By one weight of each part that T holds constant at X: queries, norms, what an activation reads."""
    model, processor = load_model("tiny-vit", dtype="float64")
    pixels = processor(load_data("digits")[:2]["image"], return_tensors="pt").pixel_values.double()
    epsilon = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def missed():
        (_, J), (_, T) = (penalty.pushed(model, pixels, epsilon, frozen) for frozen in (False, True))
        return (J - T).square().sum()

    parts = ("layers.1.attention.q_proj.weight", "layers.2.layernorm_before.weight", "layers.1.mlp.fc1.weight")
    some = [p for name, p in model.named_parameters() if name.endswith(parts)]
    assert len(some) == 3
    for p, g in zip(some, torch.autograd.grad(missed(), some), strict=True):
        at, h, values = np.unravel_index(int(g.abs().argmax()), g.shape), 1e-5, []
        for step in (h, -h):
            with torch.no_grad():
                p[at] += step
                values.append(float(missed()))
                p[at] -= step
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(g[at]), rel=1e-5)


def test_fine_tuning_is_the_same_again_and_lowers_what_is_penalised():
    steps = 6
    gaps = []
    pixels = load_model("tiny-vit")[1](load_data("digits", "test")[:64]["image"], return_tensors="pt").pixel_values
    for weight in (0, 100, 100):
        _, missed, whole = penalty.gap(penalty.tuned(weight, 0, steps), pixels, torch.Generator().manual_seed(1))
        gaps.append(float((missed / whole).detach()))
    assert gaps[1] == gaps[2] < gaps[0]


def test_the_table_of_penalties_is_complete():
    runs, images = PENALTY["runs"], PENALTY["images_of_areas"]
    assert [(run["penalty"], run["seed"]) for run in runs] == [(None, None)] + [
        (weight, seed) for weight in penalty.PENALTIES for seed in penalty.SEEDS]
    assert (PENALTY["steps"], PENALTY["batch"], images) == (penalty.STEPS, penalty.BATCH, penalty.IMAGES)
    for run in runs:
        assert len(run["right"]) == PENALTY["images"] == 500 and 0 < run["gap"] < 1
        assert all(np.shape([*of.values()]) == (len(penalty.METHODS), images) for of in run["areas"].values())


def test_the_table_says_what_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(penalty, "METHODS", {"in_out": MAPS["in_out"]})
    penalty.main(penalties=[], images=8, out=tmp_path / "penalty.json")
    (run,) = json.loads((tmp_path / "penalty.json").read_text())["runs"]
    stored = PENALTY["runs"][0]
    assert np.mean(run["right"]) == pytest.approx(np.mean(stored["right"]), abs=0.005)
    assert run["gap"] == pytest.approx(stored["gap"], abs=1e-3)
    for order, areas in run["areas"].items():
        assert np.allclose(areas["in_out"], stored["areas"][order]["in_out"][:8], atol=2e-3)


def test_the_table_of_planted_trees_says_what_is_found_again(tmp_path):
    stored = PLANTED["rows"]
    assert len(stored) == 2 * len(planted.LEVELS) * planted.SEEDS and len(PLANTED["random"]) == planted.PAIRS
    planted.main({"matrix": planted.SHAPES["matrix"]}, [20.0], 1, 2, tmp_path / "planted.json")
    again = json.loads((tmp_path / "planted.json").read_text())
    (row,) = again["rows"]
    (same,) = [r for r in stored if (r["kind"], r["snr_db"], r["seed"]) == ("matrix", 20.0, 0)]
    for way, rand in row["adjusted_rand"].items():
        assert rand == pytest.approx(same["adjusted_rand"][way], abs=0.02)
    assert np.allclose(again["random"], PLANTED["random"][:2], atol=0.05)
