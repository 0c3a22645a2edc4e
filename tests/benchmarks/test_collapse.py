"""What the maps cost, in plain forwards of the same batch, measured in turn with them (tiny-vit, 64 digits).

Each bar is asserted, and its figure is kept beside the times in the results file (``extra_info``). On a CPU all of it
runs on one thread: the model is so small that two wait for one another more than they work.
"""

import statistics

import pytest
import torch

from tensorlens_utils import baselines, collapse, linearize, load_data, load_model
from tensorlens_utils.collapse import class_map
from tensorlens_utils.costs import seconds

pytestmark = pytest.mark.usefixtures("single_thread")
METHODS = collapse.METHODS | baselines.METHODS
STEPS = 32  # of Integrated Gradients


@pytest.fixture(scope="module")
def case(device):
    model, processor = load_model("tiny-vit", device=device)
    inputs = processor(load_data("digits")[:64]["image"], return_tensors="pt").to(device)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits.argmax(-1)


def forwards(run, case, device, rounds=15):
    """The median of ``run``'s times over those of a plain forward, taken in turn, and its quartiles."""
    model, inputs, _ = case

    def forward():
        with torch.no_grad():
            model(**inputs)

    run(), forward()
    ratios = [seconds(run, device) / seconds(forward, device) for _ in range(rounds)]
    return statistics.median(ratios), statistics.quantiles(ratios, n=4)


def integrated_gradients(model, inputs, target):
    """(x − 0)·∫₀¹ ∂y/∂x(t·x) dt by the midpoint rule, the pixels of one step at a time."""
    x = inputs["pixel_values"]
    total = torch.zeros_like(x)
    for step in range(STEPS):
        at = (x * (step + 0.5) / STEPS).requires_grad_()
        y = model(pixel_values=at).logits.gather(1, target[:, None]).sum()
        total += torch.autograd.grad(y, at)[0]
    return total * x / STEPS


def test_class_map_costs_at_most_3_forwards_and_integrated_gradients_15_times_as_much(benchmark, device, case):
    model, inputs, target = case
    for p in model.parameters():  # which the gradients by the input need not follow
        p.requires_grad_(False)

    def ours():
        return METHODS["class"](model, inputs, target)

    def complete():
        return class_map(linearize(model, inputs), target)

    def theirs():
        return integrated_gradients(model, inputs, target)

    scores, quartiles = forwards(ours, case, device)
    split, _ = forwards(complete, case, device)
    rival, _ = forwards(theirs, case, device, rounds=5)
    slower = statistics.median(seconds(theirs, device) / seconds(ours, device) for _ in range(5))
    benchmark.pedantic(ours, rounds=5)
    benchmark.extra_info |= {
        "forwards_per_map": scores, "quartiles": quartiles, "forwards_with_bias": split,
        "forwards_per_integrated_gradients": rival, "times_integrated_gradients": slower, "threads": 1,
    }  # fmt: skip
    assert scores <= 3
    assert slower >= 15


@pytest.mark.parametrize("method", METHODS)
def test_what_each_map_costs(benchmark, device, case, method):
    model, inputs, target = case

    def run():
        return METHODS[method](model, inputs, target)

    median, quartiles = forwards(run, case, device, rounds=7)
    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info |= {"method": method, "forwards_per_map": median, "quartiles": quartiles}
