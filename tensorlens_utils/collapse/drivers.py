"""Which parts of a model drive an output: two exact splits of a logit, and what T says of taking a part away.

The frozen network F̃ is affine in more than X: every additive parameter p (a bias, a norm's β, an embedding of positions
or types, a class token) is an input of it too. So a logit is a sum of shares, which one backward pass gives:

    by source    ⟨w, F(X)⟩ = Σ_j ⟨x_j, ∂/∂x_j⟩ + Σ_p ⟨p, ∂/∂p⟩                     of ⟨w, F̃(X, p, q, ...)⟩
    by writer    ⟨w, F(X)⟩ = Σ_j ⟨x_j, ∂′/∂x_j⟩ + Σ_p ⟨p, ∂′/∂p⟩ + Σ_h ⟨z_h, ∂′/∂z_h⟩

What a head or an FFN writes into the residual stream is z, the head's A·v or the FFN's activations, times its output
weights. ∂′ is the derivative with the blocks' matrix products cut at what they read, which becomes a leaf: it goes
through residual stream and frozen norms alone, and the products that it still reaches are the writers. No family is
named for this: the product before a head's output weights is A·v, without a parameter; that before an FFN's has one.

A bias that went into A has no share, A being constant at X; what no parameter brings (φ(0), numbers) is "constants".
One example is split at a time, since a batch shares its parameters.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..linearize import _forward, linearize, untouched
from ..linearize.rules import PRODUCTS, attend, rule_of
from ..linearize.tape import Node, leaves, map_leaves
from ..models import find_blocks
from . import directions

TOKENS, CONSTANTS = "tokens", "constants"


class Shares(dict):
    """name -> share of the logit, (N,), or (N, R) where it has parts: of R tokens, positions or heads."""

    @property
    def total(self) -> Tensor:
        """The sum of all shares, (N,): the logit."""
        return sum(share.flatten(1).sum(1) if share.dim() > 1 else share for share in self.values())


def by_source(model: nn.Module, inputs, target=None, position=-1) -> Shares:
    """The logit split over all that enters the frozen network: "tokens" (N, L), and every additive parameter by name.

    An embedding has a share for each row that is added, such as a position's, (N, R). A constant that was made from
    several parameters goes by all their names. ``target`` and ``position`` are those of ``class_map``.

    >>> from tensorlens_utils import load_data, load_model
    >>> model, processor = load_model("tiny-vit")
    >>> shares = by_source(model, processor(load_data("digits")[:1]["image"], return_tensors="pt"))
    >>> shares["tokens"].shape, shares["vit.embeddings.position_embeddings"].shape, shares["classifier.bias"].shape
    (torch.Size([1, 16]), torch.Size([1, 17]), torch.Size([1]))
    """
    return _stacked([_Opened(model, *one).shares for one in _each(inputs, target, position)])


def by_writer(model: nn.Module, inputs, target=None, position=-1) -> Shares:
    """The logit split over what is written into the residual stream, each write carried to the logit by stream and
    frozen norms only: direct logit attribution, exact.

    Heads go by their output projection, (N, H); an FFN, its last bias included, by its last linear map, (N,); then
    "tokens" and the additive parameters that reach the stream, an attention's output bias among them. Raises
    ``ValueError`` where ``models.find_blocks`` finds no blocks.

    >>> from tensorlens_utils import load_data, load_model
    >>> model, processor = load_model("tiny-vit")
    >>> shares = by_writer(model, processor(load_data("digits")[:1]["image"], return_tensors="pt"))
    >>> shares["vit.layers.0.attention.o_proj"].shape, shares["vit.layers.0.mlp.fc2"].shape
    (torch.Size([1, 4]), torch.Size([1]))
    """
    inside = _inside(model)
    return _stacked([_Opened(model, *one, cut=inside).shares for one in _each(inputs, target, position)])


def _inside(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module, by its path, lies in the blocks."""
    blocks = find_blocks(model)[0] + "."
    return lambda path: path.startswith(blocks)


def writers(model: nn.Module, inputs, position=-1) -> dict[str, int | None]:
    """The modules that write into the residual stream, by path, as the first of these inputs shows them: how many
    heads an attention's output projection reads, side by side; None for an FFN's last linear map.

    Found are those that the logits at ``position`` depend on.

    >>> from tensorlens_utils import load_data, load_model
    >>> model, processor = load_model("tiny-vit")
    >>> found = writers(model, processor(load_data("digits")[:1]["image"], return_tensors="pt"))
    >>> found["vit.layers.0.attention.o_proj"], found["vit.layers.0.mlp.fc2"]
    (4, None)
    """
    return _Opened(model, *next(_each(inputs, None, position)), cut=_inside(model)).heads


def removal(model: nn.Module, inputs, writer: str | tuple[str, int], target=None, position=-1) -> tuple[Tensor, Tensor]:
    """How the logit changes when a writer writes nothing: (as T predicts it, as the model answers), (N,) each.

    ``writer`` is a name of ``by_writer``, or (name, head). T's prediction keeps A, norms and activation ratios as they
    are at X, but follows the write through all that reads it, not through the residual stream alone.

    >>> from tensorlens_utils import load_data, load_model
    >>> model, processor = load_model("tiny-vit")
    >>> inputs = processor(load_data("digits")[:3]["image"], return_tensors="pt")
    >>> predicted, answered = removal(model, inputs, ("vit.layers.3.attention.o_proj", 0))
    >>> predicted.shape, answered.shape
    (torch.Size([3]), torch.Size([3]))
    """
    name, head = (writer, None) if isinstance(writer, str) else writer
    examples = list(_each(inputs, target, position))
    found = writers(model, inputs, position)
    heads = found.get(name, 0)  # None: an FFN's
    if heads == 0 or head is not None and not (heads and 0 <= head < heads):
        raise ValueError(f"writer must be one of {', '.join(found)}, or (name, head) of an attention; not {writer!r}"
                         + f", which has {heads} heads" * bool(heads))  # fmt: skip
    opened = [_Opened(model, *one, cut=name.__eq__) for one in examples]
    shares = _stacked([o.shares for o in opened])[name]
    shares = shares.view(len(shares), -1)
    at, w = (torch.cat(parts) for parts in zip(*((o.at, o.w) for o in opened), strict=True))
    with untouched(model), torch.no_grad():
        before = _forward(model, dict(inputs.items()), "tokens", None, None)
        with _silenced(model.get_submodule(name), head, heads):
            after = _forward(model, dict(inputs.items()), "tokens", None, None)
    n = torch.arange(len(at), device=at.device)
    return -(shares.sum(1) if head is None else shares[:, head]), ((after - before)[n, at] * w).sum(-1)


@contextmanager
def _silenced(module: nn.Module, head: int | None, heads: int | None):
    """``module`` reads no z of one head, or of all; without heads, it is an FFN's and answers zero, bias and all."""
    ran = []

    def read(module, args):
        z = args[0].unflatten(-1, (heads, -1)).clone()
        z[..., slice(None) if head is None else head, :] = 0
        ran.append(True)
        return (z.flatten(-2), *args[1:])

    def answer(module, args, out):
        ran.append(True)
        return torch.zeros_like(out)

    handle = module.register_forward_pre_hook(read) if heads else module.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise RuntimeError(f"a writer is removed by a hook on its module, and this {type(module).__name__} is never "
                           "called: the module around it only reads its weights. Zero these by hand")  # fmt: skip


def _each(inputs, target, position) -> Iterator[tuple]:
    """(inputs, target, position) of each example."""
    inputs = dict(inputs.items())
    main = next((k for k in ("inputs_embeds", "pixel_values", "input_ids") if k in inputs), next(iter(inputs)))
    target, N = None if target is None else torch.as_tensor(target), len(inputs[main])
    for n in range(N):
        one = {k: v[n : n + 1] if isinstance(v, Tensor) and v.dim() and len(v) == N else v for k, v in inputs.items()}
        at = position[n : n + 1] if isinstance(position, Tensor) and position.dim() else position
        yield one, None if target is None else target[n : n + 1], at


def _stacked(examples: list[dict[str, Tensor]]) -> Shares:
    """The shares of all examples; what one of them did not use has none there."""
    like = {name: share for shares in examples for name, share in shares.items()}
    return Shares((k, torch.cat([shares.get(k, torch.zeros_like(v)) for shares in examples])) for k, v in like.items())


class _Origins(TorchFunctionMode):
    """Keeps, while a model runs, which parameters and buffers every constant was made from."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.made = WeakIdKeyDictionary()
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if p.is_floating_point():
                self.made[p] = frozenset([name])

    def of(self, x) -> frozenset:
        return self.made.get(x, frozenset()) if isinstance(x, Tensor) else frozenset()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        origin = frozenset().union(*map(self.of, given))
        if any(x.requires_grad for x in given) or CONSTANTS in origin:  # X made it, with whatever parameters
            origin = frozenset([CONSTANTS])
        for x in leaves(args[0] if out is None and args else out):  # None: x[i] = y
            if origin and isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
                self.made[x] = origin if CONSTANTS in origin else self.of(x) | origin
        return out


class _Opened:
    """One example's frozen network, with leaves for all that it adds and for what the products of ``cut`` read.

    shares    name -> ⟨p, ∂/∂p⟩, (1,) or (1, R), of each leaf that the logit depends on
    heads     of each product that was cut and that the logit depends on, how many heads wrote what it reads, or None
    at, w     the output position (1,) and the output vector (1, D') that make the logit
    """

    def __init__(self, model: nn.Module, inputs, target, position, cut: Callable[[str], bool] = lambda writer: False):
        with _Origins(model) as self.origins:
            T = linearize(model, inputs)
        self.at = T.positions(position)
        self.w = directions(T, target, position)[:, 0]
        self.cut, self.found, self.width = cut, [], None
        tape = copy.copy(T.tape)
        tape.nodes = [node and self.opened(node) for node in T.tape.nodes]
        with torch.enable_grad():
            X = self.leaf(TOKENS, T.input)
            logit = (tape(X)[0, self.at[0]] * self.w[0]).sum()
        grads = torch.autograd.grad(logit, [leaf for _, leaf, _ in self.found], allow_unused=True)
        self.shares, self.heads = {}, {}
        for (name, leaf, heads), g in zip(self.found, grads, strict=True):
            if g is not None:
                self.add(name, (leaf * g).detach(), heads)
        for name in [k for k in self.shares if self.heads.get(_owner(k), 0) is None]:  # an FFN's last bias is its own
            self.shares[_owner(name)] += self.shares.pop(name)

    def leaf(self, name: str, x: Tensor, heads: int | None = 0) -> Tensor:
        x = x.detach().clone().requires_grad_()
        self.found.append((name, x, heads))
        return x

    def opened(self, node: Node) -> Node:
        """``node`` with a leaf for each constant that it adds; a matrix product also looks at what it reads."""
        keys = set(node.addends)
        args, kwargs = _mapped(self.addend, node.args, node.kwargs, keys.__contains__)
        factors = [x for k, x in (*enumerate(args), *kwargs.items()) if k not in keys]
        if any(map(_number, leaves([x for k, x in (*enumerate(args), *kwargs.items()) if k in keys]))):
            return node._replace(fn=self.with_numbers(node.fn, keys), args=args, kwargs=kwargs)
        if node.fn is attend or rule_of(node.fn)[1] in PRODUCTS:
            return node._replace(fn=self.product(node.fn, keys, factors), args=args, kwargs=kwargs)
        return node._replace(args=args, kwargs=kwargs)

    def addend(self, x):
        name = " + ".join(sorted(self.origins.of(x))) or CONSTANTS
        if not isinstance(x, Tensor) or not x.is_floating_point() or name == CONSTANTS and not x.any():
            return x
        return self.leaf(name, x)

    def with_numbers(self, fn: Callable, keys: set) -> Callable:
        """``fn`` with what its added numbers bring to the output times a leaf, 1."""

        def call(*args, **kwargs):
            args0, kwargs0 = _mapped(lambda x: 0.0 if _number(x) else x, args, kwargs, keys.__contains__)
            out = fn(*args0, **kwargs0)
            brought = (fn(*args, **kwargs) - out).detach()
            return out + self.leaf(CONSTANTS, torch.ones_like(brought)) * brought

        return call

    def product(self, fn: Callable, keys: set, factors: list) -> Callable:
        """A matrix product: where its weights are a writer's of ``cut``, what it reads becomes a leaf."""
        weights = frozenset().union(*map(self.origins.of, leaves(factors))) - {CONSTANTS}
        writer = next(filter(self.cut, sorted(map(_owner, weights))), None)
        constants = {id(x) for x in leaves(factors)}

        def read(x):
            if not isinstance(x, Tensor) or id(x) in constants:
                return x
            heads = x.shape[-1] // self.width if self.width else None
            self.width = None if weights else x.shape[-1]  # A·v is as wide as a head
            return x if writer is None else self.leaf(writer, x, heads)

        def call(*args, **kwargs):
            args, kwargs = _mapped(read, args, kwargs, lambda k: k not in keys)
            return fn(*args, **kwargs)

        return call

    def add(self, name: str, share: Tensor, heads: int | None) -> None:
        """Add a leaf's share, entry by entry, to what goes by its name."""
        if heads != 0:  # of a product
            self.heads[name] = heads
            share = share.flatten(0, -2).sum(0).unflatten(0, (heads, -1) if heads else (1, -1)).sum(-1)[None]
        elif share.dim() > 1 and name != CONSTANTS:
            share = share.sum(-1)
            share = share.reshape(1, -1, share.shape[-1]).sum(1)
        else:
            share = share.sum().view(1, 1)
        share = share[:, 0] if share.shape[1] == 1 and name != TOKENS else share
        old = self.shares.get(name, 0)
        if isinstance(old, Tensor) and old.shape != share.shape:  # one name, parts that differ
            old, share = old.sum().view(1), share.sum().view(1)
        self.shares[name] = old + share


def _mapped(f: Callable, args: tuple, kwargs: dict, where: Callable) -> tuple[tuple, dict]:
    """``f`` on the leaves of the arguments whose position or name ``where`` tells."""
    args = tuple(map_leaves(f, x) if where(i) else x for i, x in enumerate(args))
    return args, {k: map_leaves(f, x) if where(k) else x for k, x in kwargs.items()}


def _number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < abs(x) < float("inf")


def _owner(parameter: str) -> str:
    """The module whose parameter it is."""
    return parameter.rpartition(".")[0]
