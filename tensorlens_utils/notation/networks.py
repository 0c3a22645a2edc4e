"""The network that ``linearize`` holds, as diagrams: at a fixed input a transformer is pictures that compute.

Residual connections are sums, which cut a network into stages. Between two sums there are only products, so that each
summand is one diagram (Graphical tensor notation, 2402.01790):

    x1 = X + A1·X·W_V·W_O,      x2 = x1 + A2·x1·W_V·W_O,      ...,      T·X = Y, the last of them

Multiplying the sums out gives the path expansion, T·X as a sum of diagrams, one for each way through the network.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product

import torch
from torch import Tensor, nn

from ..tensor import AttentionTensor
from . import Diagram
from .reading import Reader, tidy


@dataclass(frozen=True)
class Term:
    """One summand of a stage: a diagram in which ``source``, X or an earlier stage, is a tensor without numbers.

    ``label`` says which branch it is by the tensors in it, such as "A1"; it is empty where the source passes by.
    """

    diagram: Diagram
    source: str
    label: str

    def branch(self, first: "Term") -> tuple[str, ...]:
        """Its name, if it is a branch beside the stage's first term, which passes by; else nothing."""
        return () if first.label or not self.label and self.source == first.source else (self.label or self.source,)

    def __call__(self, values: Tensor) -> Tensor:
        """The summand for K values of the source at once, (K, ...) -> (K, ...)."""
        source = self.diagram[self.source]
        shape = [self.diagram.sizes[leg] for leg in source.legs]
        given = replace(source, legs=("K", *source.legs), tensor=values.reshape(-1, *shape))
        nodes = [given if node is source else node for node in self.diagram.nodes]
        return Diagram(nodes, ("K", *self.diagram.output), self.diagram.sizes).contract()


@dataclass(frozen=True)
class Path:
    """One way through a network: the branches that it takes, first to last, and its diagram, from X to the output."""

    branches: tuple[str, ...]
    diagram: Diagram


class Network:
    """The stages of a network, {name: its terms}; the last one, "Y", is T·X. Made by ``diagram_of``.

    >>> from tensorlens_utils import linearize_function
    >>> T = linearize_function(lambda x: x + torch.relu(x @ torch.ones(2, 2)), torch.randn(1, 3, 2))
    >>> net = diagram_of(T)
    >>> net, bool(torch.allclose(net.contract(), (T @ T.input)[0]))
    (Y = X + r1·W1·X, True)
    """

    def __init__(self, stages: dict[str, tuple[Term, ...]], X: Tensor, shape: tuple[int, ...]):
        self.stages, self.X, self.shape = stages, X, shape

    def __repr__(self):
        return "\n".join(f"{name} = {' + '.join(f'{t.label}·{t.source}'.lstrip('·') for t in terms)}"
                         for name, terms in self.stages.items())  # fmt: skip

    def contract(self, V: Tensor | None = None) -> Tensor:
        """T·V (M, D') for V (L, D), or T·X: stage by stage, each the sum of its terms."""
        values = {"X": self._input(V)[None]}
        for name, terms in self.stages.items():
            values[name] = sum(term(values[term.source]) for term in terms)
        return values["Y"].reshape(self.shape)

    def orders(self, V: Tensor | None = None) -> Tensor:
        """T·V by order, (orders, M, D'): in place k, all paths together that take k branches and pass by the others.

        With every branch H turned down to t·H the network is a polynomial in t, ∏(1 + t·H); these are its
        coefficients, found in one go and not path by path.
        """
        values = {"X": self._input(V)[None]}  # (orders, ...)
        for name, terms in self.stages.items():
            found = []
            for term in terms:
                value = term(values[term.source])
                found.append(torch.cat([torch.zeros_like(value[:1]), value]) if term.branch(terms[0]) else value)
            most = max(map(len, found))
            values[name] = sum(torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in found)
        return values["Y"].reshape(-1, *self.shape)

    def paths(self) -> Iterator[Path]:
        """Every path, one diagram each, X in it: 2ⁿ of them for n branches in a row. They add up to T·X."""
        yield from self._paths("Y")

    def _paths(self, name: str) -> Iterator[Path]:
        for term in self.stages[name]:
            own = term.branch(self.stages[name][0])
            if term.source == "X":
                X = self.X.reshape([term.diagram.sizes[leg] for leg in term.diagram["X"].legs])
                yield Path(own, term.diagram.fill(X=X))
            else:
                for path in self._paths(term.source):
                    yield Path(path.branches + own, _inlined(term, path.diagram))

    def by_head(self) -> "Network":
        """The same network with one term for each attention head, A1.0, A1.1, ..., in place of their sum."""
        stages = {name: tuple(one for term in terms for one in _heads(term)) for name, terms in self.stages.items()}
        return Network(stages, self.X, self.shape)

    def parts(self, name: str) -> list:
        """One stage as an equation for ``drawing.draw``.

        >>> from tensorlens_utils import linearize_function
        >>> net = diagram_of(linearize_function(lambda x: x + x @ torch.ones(2, 2), torch.randn(1, 3, 2)))
        >>> [part if isinstance(part, str) else part.output for part in net.parts("Y")]
        ['Y =', ('seq', 'd_model'), '+', ('seq', 'd_model')]
        """
        return [f"{name} ="] + [part for term in self.stages[name] for part in ("+", term.diagram)][1:]

    def _input(self, V: Tensor | None) -> Tensor:
        if V is not None and V.shape != self.X.shape:
            raise ValueError(f"V is of the shape of X without its batch, {tuple(self.X.shape)}; not {tuple(V.shape)}")
        if V is not None and V.is_complex() and not self.X.is_complex():
            raise ValueError(f"V is real, as X is; not {V.dtype}. T takes the real and the imaginary part apart")
        return self.X if V is None else V.to(self.X)


def diagram_of(T: AttentionTensor, model: nn.Module | None = None) -> Network:
    """The network that an operator holds, as diagrams; contracted, they are T·X.

    Axes of length one, the batch among them, have no leg. A are attention patterns, C centres, 1/σ or γ/σ are the
    scales of norms, r the ratios of activations and gates, S selects, W are weights; with ``model``, weights go by
    their modules and blocks. A call that has no picture of its own is drawn as the dense matrix that it is.

    Raises:
        ValueError: for an operator of several inputs, or where a value is read that was overwritten in another view.
        MemoryError: where a dense matrix would be too large.

    >>> from tensorlens_utils import linearize_function
    >>> diagram_of(linearize_function(lambda x: x @ torch.ones(2, 4), torch.randn(1, 3, 2)))
    Y = W1·X
    """
    if len(T.input) != 1:
        raise ValueError(f"a diagram is of one input; this operator has {len(T.input)}, so linearise one of them")
    weights = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    stages, terms = Reader(T.tape, T.input, weights, id(getattr(head, "weight", None))).stages, {}
    for name, diagrams in stages.items():
        held = [{id(node.tensor) for node in d.nodes} for d in diagrams]
        common = set.intersection(*held) if len(held) > 1 else ()
        found = (_term(d, {"X", *terms}, common) for d in diagrams)
        order = ["X", *terms]
        terms[name] = tuple(sorted(found, key=lambda term: (bool(term.label), order.index(term.source))))
    return Network(terms, T.input[0], tuple(T.output.shape[1:]))


def _term(d: Diagram, sources: set[str], common: Container[int]) -> Term:
    source = next(node.name for node in d.nodes if node.name in sources and node.tensor is None)
    others = [node.name for node in d.nodes if node.tensor is not None and node.legs and id(node.tensor) not in common
              and node.name.rstrip("′") not in ("C", "1/σ", "γ/σ", "S")]
    patterns = [name for name in others if re.fullmatch(r"A\d+", name)]
    return Term(d, source, "·".join(patterns or reversed(others)))


def _heads(term: Term) -> Iterator[Term]:
    d = term.diagram
    legs = [leg for leg in d.sizes if leg.rstrip("′") == "head" and leg not in d.output]
    for k, place in enumerate(product(*(range(d.sizes[leg]) for leg in legs))):
        pinned = reduce(lambda d, at: d.pin(*at), zip(legs, place, strict=True), d)
        yield Term(pinned, term.source, f"{term.label}.{k}" if legs else term.label)


def _inlined(term: Term, inner: Diagram) -> Diagram:
    """A term with a diagram in place of its source."""
    legs = term.diagram[term.source].legs
    others = [node for node in term.diagram.nodes if node.name != term.source]
    held = {leg for node in others for leg in node.legs}
    output = [leg for leg in dict.fromkeys((*term.diagram.output, *legs)) if leg in held]
    rest = Diagram(others, output, {leg: n for leg, n in term.diagram.sizes.items() if leg in held})
    for k, leg in enumerate(legs):  # the stage's legs as the term has them: split where they are finer, else grouped
        n = term.diagram.sizes[leg]
        while (m := inner.sizes[inner.output[k]]) != n:
            inner = (inner.split(inner.output[k], **{f"{leg}#{k}": n, f"{leg}#{k}.": m // n}) if m > n else
                     inner.group(" ".join(inner.output[k:k + 2]), f"{leg}#{k}.{m}"))
    apart = {leg: f"{leg.rstrip('′')}#{k}" for k, leg in enumerate(inner.sizes)}
    apart |= dict(zip(inner.output, legs, strict=True))
    return tidy(rest.join(inner.rename(**apart), output=term.diagram.output))
