"""The network that an operator holds, drawn: contracting the drawing gives T·X, in every family."""

from itertools import product

import pytest
import torch
from families import FAMILIES, UNSUPPORTED, tolerance
from test_drawing import clashes

from tensorlens_utils import linearize, linearize_function, load_model, reading
from tensorlens_utils.data import RUNNING_SENTENCE
from tensorlens_utils.drawing import page
from tensorlens_utils.networks import diagram_of

IDS = torch.tensor([[1, 5, 9, 3, 7, 5, 9, 3]])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def attention_only():
    model, _ = load_model("tiny-attn", dtype="float64")
    T = linearize(model, IDS)
    return model, T, diagram_of(T, model)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNSUPPORTED])
def test_the_drawing_of_every_family_computes_its_operator(name):
    model, inputs = FAMILIES[name]()
    T = linearize(model, {k: x[:1] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()})
    net, V = diagram_of(T, model), noise(*T.input.shape)
    assert distance(net.contract(), (T @ T.input)[0]) < tolerance(name)
    assert distance(net.contract(V[0]), (T @ V)[0]) < tolerance(name)
    assert len(net.stages) > 2  # its residual connections were found


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-bert", "tiny-attn", "tiny-llama"])
def test_the_drawings_of_the_zoo_fit_the_page_without_overlaps(name):
    model, tokenizer = load_model(name, dtype="float64")
    inputs = IDS if name == "tiny-attn" else tokenizer([RUNNING_SENTENCE], return_tensors="pt")
    net = diagram_of(linearize(model, inputs), model)
    for stage in net.stages:
        assert not clashes(page(*net.parts(stage))), stage


def test_stages_are_the_models_blocks(attention_only):
    model, T, net = attention_only
    assert repr(net) == "x1 = X + A1·X\nx2 = x1 + A2·x1\nY = lm_head·x2"
    (_, branch), _ = net.stages["x1"], net.stages["x2"]
    assert {"v_proj.0", "out_proj.0", "C", "1/σ", "A1"} <= {node.name for node in branch.diagram.nodes}
    block = linearize(model, IDS, at=0, to=1)  # the same branch, taken between boundaries
    V = noise(*block.input.shape)
    assert distance(branch(V[0]), (block @ V - V)[0]) < 1e-12


def test_paths_are_every_way_through_and_add_up(attention_only):
    model, T, net = attention_only
    paths = {path.branches: path.diagram.contract() for path in net.paths()}
    assert set(paths) == {(), ("A1",), ("A2",), ("A1", "A2")}
    assert distance(sum(paths.values()), (T @ T.input)[0]) < 1e-12
    first, second, last = (linearize(model, IDS, at=a, to=b) for a, b in ((0, 1), (1, 2), (2, "logits")))
    X = T.input  # without the positions, which are in the bias
    H = first @ X - X
    both = second @ H - H
    for branches, value in {(): X, ("A1",): H, ("A2",): second @ X - X, ("A1", "A2"): both}.items():
        assert distance(paths[branches], (last @ value)[0]) < 1e-12, branches


def test_heads_add_up_to_their_layer(attention_only):
    _, T, net = attention_only
    heads = net.by_head()
    assert [term.label for term in heads.stages["x1"]] == ["", "A1.0", "A1.1", "A1.2", "A1.3"]
    paths = {path.branches: path.diagram.contract() for path in heads.paths()}
    ways = [(), *((f"A1.{k}",) for k in range(4))], [(), *((f"A2.{k}",) for k in range(4))]
    assert set(paths) == {a + b for a, b in product(*ways)}
    layers = {path.branches: path.diagram.contract() for path in net.paths()}
    for k in (0, 1):
        own = [value for branches, value in paths.items() if [b[:2] for b in branches] == [f"A{k + 1}"]]
        assert len(own) == 4 and distance(sum(own), layers[(f"A{k + 1}",)]) < 1e-12


def test_orders_gather_the_paths_that_take_as_many_branches():
    model, inputs = FAMILIES["gpt2"]()
    T = linearize(model, {"input_ids": inputs["input_ids"][:1]})
    net = diagram_of(T, model)
    orders, V = net.orders(), noise(*T.input.shape[1:])
    assert orders.shape == (5, *T.output.shape[1:])  # two blocks, two branches each
    for k in range(5):
        paths = [path.diagram.contract() for path in net.paths() if len(path.branches) == k]
        assert len(paths) == [1, 4, 6, 4, 1][k] and distance(sum(paths).reshape(orders[k].shape), orders[k]) < 1e-12
    assert distance(net.orders(V).sum(0), net.contract(V)) < 1e-12


def test_any_function_has_a_drawing():
    W = noise(4, 4)

    def f(x):
        h = torch.cat([x[:, 1:], torch.ones(1, 1, 4, dtype=x.dtype)], 1)
        y = (h - x).repeat_interleave(2, -1)[..., ::2] @ W - 2 * x / 3 + 1
        z = y.cumsum(1).flip(1).view(1, 3, 2, 2).permute(0, 2, 1, 3)
        return (3 - z.reshape(1, 2, 6)) * 2 + (torch.ones_like(W[:1, :1]) - torch.relu(y.reshape(1, 2, 6)))

    T = linearize_function(f, noise(1, 3, 4, seed=1))
    net, V = diagram_of(T), noise(*T.input.shape, seed=2)
    assert distance(net.contract(), (T @ T.input)[0]) < 1e-12 and distance(net.contract(V[0]), (T @ V)[0]) < 1e-12
    assert "cumsum" in {node.name for terms in net.stages.values() for term in terms for node in term.diagram.nodes}


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    model, inputs = FAMILIES["gpt2"]()
    with pytest.raises(ValueError, match="this operator has 2, so linearise one of them"):
        diagram_of(linearize(model, inputs["input_ids"]))

    def overwrites(x):
        y = x * 2
        y[:, 0].mul_(3)
        return y

    with pytest.raises(ValueError, match="reads another view of it"):
        diagram_of(linearize_function(overwrites, noise(1, 3, 2)))
    monkeypatch.setattr(reading, "LARGEST", 10)
    with pytest.raises(MemoryError, match="cumsum has no picture of its own.*6 × 6 entries"):
        diagram_of(linearize_function(lambda x: x.cumsum(1), noise(1, 3, 2)))
    net = diagram_of(linearize_function(lambda x: x * 2, noise(1, 3, 2)))
    with pytest.raises(ValueError, match=r"V is of the shape of X without its batch, \(3, 2\); not \(1, 3, 2\)"):
        net.contract(torch.ones(1, 3, 2))
