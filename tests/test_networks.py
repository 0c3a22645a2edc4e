"""The network that an operator holds, drawn: contracting the drawing gives T·X, in every family."""

import re
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, UNSUPPORTED, tolerance
from pictures import clashes

from tensorlens_utils import linearize, linearize_function, load_model
from tensorlens_utils.data import RUNNING_SENTENCE
from tensorlens_utils.notation import reading
from tensorlens_utils.notation.drawing import page
from tensorlens_utils.notation.networks import diagram_of

IDS = torch.tensor([[1, 5, 9, 3, 7, 5, 9, 3]])
PARALLEL = {"gptj", "gpt_neox", "falcon", "phi", "cohere"}  # attention and MLP side by side: one sum in each block


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
    layers = model.config.num_hidden_layers
    assert len(net.orders()) == 1 + layers * (1 if name in PARALLEL else 2)
    split = net.by_head()
    heads = Counter(re.sub(r"[.]\d+$", "", term.label) for terms in split.stages.values() for term in terms
                    if re.fullmatch(r"A\d+[.]\d+", term.label))  # fmt: skip
    count = getattr(model.config, "num_attention_heads", 0)
    assert set(heads.values()) == {count} - {0} and (len(heads) >= layers or name == "rwkv"), heads
    assert distance(split.contract(V[0]), (T @ V)[0]) < tolerance(name)


@torch.no_grad()
def written(model, x, V, layer, k):
    """What head k of a layer writes when V (L, D) comes in at its norm, frozen at x, by the weights themselves."""
    attention, norm, values, out = layer
    if norm is not None:
        eps = norm.eps if isinstance(norm, torch.nn.LayerNorm) else norm.variance_epsilon
        centred = V - V.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else V
        away = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
        V = centred / (away.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    return attention[0, k] @ (V @ values.T) @ out.T


def layer_of(name, model, attentions):
    """The first layer: its patterns, its norm, and for each head the rows of its values, the columns of its output."""
    if name == "gpt2":
        block = model.transformer.h[0]
        norm, values, out = block.ln_1, block.attn.c_attn.weight.T[-16:], block.attn.c_proj.weight.T
    elif name == "falcon":  # fused and multi-query: the queries of all heads, one key, one value
        block = model.transformer.h[0]
        values, out = block.self_attention.query_key_value.weight[-4:], block.self_attention.dense.weight
        norm = block.input_layernorm
    elif name == "modernbert":  # fused, and no norm before its first attention
        block = model.model.layers[0]
        norm, values, out = None, block.attn.Wqkv.weight[-16:], block.attn.Wo.weight
    else:  # grouped: two heads read one value
        block = model.model.layers[0]
        norm, values, out = block.input_layernorm, block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
    shared = 16 // len(values)
    return [(attentions, norm, values[4 * (k // shared):][:4], out[:, 4 * k:4 * k + 4]) for k in range(4)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon", "modernbert"])
def test_each_head_has_the_term_of_what_it_writes(name):
    model, inputs = FAMILIES[name]()
    inputs = {"input_ids": inputs["input_ids"][:1]}
    T = linearize(model, inputs)
    net = diagram_of(T, model).by_head()
    terms = [term for term in net.stages["x1"] if re.fullmatch(r"A1[.]\d", term.label)]
    assert [term.label for term in terms] == [f"A1.{k}" for k in range(4)]
    eager = type(model)._from_config(model.config, attn_implementation="eager").double().eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    x, V = out.hidden_states[0][0], noise(*T.input.shape[1:])
    into = V
    if name == "modernbert":  # its X goes through the norm of the embeddings first
        passes, = [term for term in net.stages["x1"] if not term.label]
        into = passes(V)[0]
    for k, (term, layer) in enumerate(zip(terms, layer_of(name, model, out.attentions[0]), strict=True)):
        assert distance(term(V)[0], written(model, x, into, layer, k)) < 1e-6, k  # softmax in float32


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


L, D = 4, 6
W, v, b, A, U = noise(D, D), noise(D, seed=1), noise(D, seed=2), noise(L, L, seed=3).softmax(-1), noise(3, 5, D, seed=4)
MASK, RANGE = W[:L] > 0, torch.arange(1, D + 1)


def norm(x):
    return F.layer_norm(x, (D,), v, b)


def mlp(x):
    return torch.tanh(x @ W) @ W.T


def attention(x, k=2):
    heads = [(x @ w).view(1, L, k, D // k).transpose(1, 2) for w in (W, W.T, W @ W)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, L, D)


def then(f, g):
    return lambda x: g(f(x))


def written_at(x):
    y = x * 2
    y[:, 0] = x[:, 1]
    return y


def in_place(x):
    y = x @ W
    y += x
    y *= 3
    return torch.relu(y) @ W + y


FUNCTIONS = {  # (how many orders, the function); each branch beside what passes by is one more
    "mul, other=": (1, lambda x: torch.mul(x, other=v)),
    "mul, input=": (1, lambda x: torch.mul(input=x, other=v)),
    "div, other=": (1, lambda x: torch.div(x, other=v)),
    "div by int": (2, lambda x: x / RANGE + x / 2 + x / 3),
    "add, other=": (2, lambda x: torch.add(x, other=x @ W)),
    "add, alpha=": (1, lambda x: torch.add(x, x @ W, alpha=2)),
    "sub, input=": (2, lambda x: torch.sub(other=x, input=x @ W)),
    "rsub": (2, lambda x: torch.rsub(x, x @ W)),
    "rsub, alpha=": (1, lambda x: torch.rsub(x, x @ W, alpha=3)),
    "rsub of a constant": (1, lambda x: 3 - x),
    "constant minus": (1, lambda x: b - x),
    "add broadcast": (1, lambda x: x + x.mean(1, keepdim=True)),
    "broadcast minus": (1, lambda x: x.mean(1, keepdim=True) - x),
    "add fewer axes": (1, lambda x: x + x[0, 0]),
    "add to fewer": (1, lambda x: x[:, :1] + W[None, :L]),
    "linear, weight=": (1, lambda x: F.linear(x, weight=W, bias=b)),
    "linear, input=": (1, lambda x: F.linear(input=x, weight=W)),
    "matmul, other=": (1, lambda x: torch.matmul(x, other=W)),
    "addmm": (1, lambda x: torch.addmm(b, x[0], W)[None]),
    "addmm, mat1=": (1, lambda x: torch.addmm(b, mat1=x[0], mat2=W)[None]),
    "addmm, beta=": (1, lambda x: torch.addmm(b, x[0], W, beta=2, alpha=3)[None]),
    "bmm, mat2=": (1, lambda x: torch.bmm(A[None], mat2=x)),
    "matrix of a vector": (1, lambda x: x @ v),
    "pattern before": (1, lambda x: A @ x),
    "mT": (1, lambda x: (x.mT @ A.T).mT),
    "negative dims": (1, lambda x: x.transpose(-1, -2).flip(-1).roll(1, -2)),
    "movedim": (1, lambda x: x.movedim(-1, 1)),
    "permute, dims=": (1, lambda x: torch.permute(x, dims=(0, 2, 1))),
    "permute": (1, lambda x: x.permute((0, -1, -2))),
    "unflatten": (1, lambda x: x.unflatten(-1, (2, 3)).transpose(-2, -1).flatten(-2)),
    "permuted flatten": (1, lambda x: x.view(1, L, 2, 3).transpose(2, 3).reshape(1, L, D) @ W),
    "permuted flatten, x": (1, lambda x: x.view(1, L, 2, 3).transpose(2, 3).reshape(1, L, D) + x),
    "permuted stage": (2, then(lambda x: x + x @ W, lambda h: h.view(1, L, 2, 3).transpose(2, 3).reshape(1, L, D) + h)),
    "unequal split": (1, lambda x: x.split([1, 5], -1)[1] * 2),
    "uneven chunks": (1, lambda x: torch.cat(x.chunk(4, -1)[::-1], -1)),
    "split and cat": (1, lambda x: torch.cat([t * k for k, t in enumerate(x.split([1, 2, 3], -1), 1)], -1)),
    "tensor_split": (1, lambda x: torch.tensor_split(x, [1, 4], dim=-1)[1]),
    "unbind": (1, lambda x: torch.stack(x.unbind(-1)[::-1], -1)),
    "cat": (1, lambda x: torch.cat([x, x @ W], -1)),
    "cat, tensors=": (1, lambda x: torch.cat(tensors=[b.expand(1, 2, D), x], dim=-2)),
    "einsum": (1, lambda x: torch.einsum("bld,de->bel", x, W)),
    "einsum of a diagonal": (1, lambda x: torch.einsum("bll->bl", x[:, :, :L])),
    "where": (1, lambda x: torch.where(MASK, x, torch.zeros_like(x))),
    "where of two": (1, lambda x: torch.where(condition=MASK, input=x, other=x @ W)),
    "where or a constant": (2, lambda x: torch.where(MASK, x, 5.0) + x),
    "cumsum, dim=": (1, lambda x: torch.cumsum(x, dim=-1)),
    "conv1d": (1, lambda x: F.conv1d(x.mT, noise(5, D, 3), noise(5), padding=1).mT),
    "conv1d, groups=": (2, lambda x: F.conv1d(x.mT, noise(D, 1, 2), groups=D, padding=1)[..., :L].mT + x),
    "expand": (1, lambda x: x[:, :1].expand(1, 3, D) * noise(3, 1)),
    "expand two": (1, lambda x: x[:, :1, :1].expand(1, 3, 5)),
    "expand anew": (1, lambda x: x.expand(2, 1, L, D).sum(0)),
    "repeat": (1, lambda x: x.repeat(1, 2, 1)),
    "diagonal": (1, lambda x: torch.diagonal(x[:, :, :L], 1, -2, -1)),
    "diagonal, dims": (1, lambda x: x[:, :, :L].diagonal(dim1=1, dim2=2)),
    "pad": (1, lambda x: F.pad(x, (1, 2), value=7.0) + F.pad(x, (2, 1))),
    "two indices": (1, lambda x: x[:, [0, 1], [2, 3]]),
    "gather": (1, lambda x: x.gather(1, torch.ones(1, 3, D, dtype=torch.long))),
    "written at a place": (1, written_at),
    "in place": (3, in_place),
    "minus minus": (2, lambda x: 1 - (2 - (x - x @ W))),
    "sums of all": (1, lambda x: x.sum((1, 2))[:, None] * v),
    "gate": (1, lambda x: torch.sigmoid(x @ W) * x),
    "reshapes": (2, lambda x: x.reshape(1, 3, 8).reshape(1, L, D) + x),
    "attention alone": (1, attention),
    "attention beside": (2, lambda x: attention(x) + x),
    "attention twice": (2, lambda x: attention(attention(x) @ W) @ W + x),
    "parallel branches": (2, lambda x: x + mlp(norm(x)) + attention(norm(x))),
    "post-LN": (3, then(lambda x: norm(x + attention(x) @ W), lambda h: norm(h + mlp(h)))),
    "pre-LN": (3, then(lambda x: x + attention(norm(x)), lambda h: h + mlp(norm(h)))),
    "norms pass by": (2, lambda x: norm(norm(x)) + mlp(x)),
    "scales pass by": (2, lambda x: x / 2 + mlp(x)),
    "nested residual": (3, lambda x: x + then(norm, lambda h: h + mlp(h))(x) @ W),
    "a branch of a sum": (2, lambda x: x + (mlp(x) + attention(x)) @ W),
    "no residual": (1, lambda x: mlp(x) + attention(x)),
    "a shared sum": (3, then(lambda x: x + mlp(x), lambda h: h + mlp(h) + attention(h))),
    "last token": (2, lambda x: (x + mlp(x))[:, -1:]),
    "four axes": (2, lambda x: x + mlp(x.view(1, 2, 2, D)).view(1, L, D)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_all_kinds_have_drawings(name):
    orders, f = FUNCTIONS[name]
    T = linearize_function(f, noise(1, L, D, seed=5))
    net, V = diagram_of(T), noise(1, L, D, seed=6)
    assert distance(net.contract(), (T @ T.input)[0]) < 1e-12 and distance(net.contract(V[0]), (T @ V)[0]) < 1e-12
    assert distance(sum(path.diagram.contract().reshape(net.shape) for path in net.paths()), net.contract()) < 1e-12
    assert net.orders(V[0]).shape == (orders, *T.output.shape[1:])
    assert distance(net.orders(V[0]).sum(0), net.contract(V[0])) < 1e-12


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
    with pytest.raises(ValueError, match="V is real, as X is; not torch.complex64"):
        net.contract(torch.ones(3, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="gives a part without entries"):
        diagram_of(linearize_function(lambda x: x.split([0, 2], -1)[1], noise(1, 3, 2)))
