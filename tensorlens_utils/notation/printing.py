"""A tensor diagram as code: a line of einsum or einops, or plain torch, step by step.

>>> from tensorlens_utils.notation import diagram
>>> d = diagram("i j, j k -> i k", A=None, B=None, sizes={"i": 2, "j": 3, "k": 4})
>>> print(code(d, "einops"))
einops.einsum(A, B, "i j, j k -> i k")
"""

import keyword
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from . import Diagram
from .contracting import Step


def code(diagram: Diagram, kind: str = "einsum", order="best") -> str:
    """The contraction as a line of "einsum" or "einops", or as "torch", pair by pair in an order.

    Tensors go by their names; those that are no identifiers are spelt out, X⁻¹ as Xinv, V† as Vh, A′ as Ap, and
    told apart where two would be the same.

    Raises:
        ValueError: for another kind, or more legs than torch.einsum has letters.
    """
    nodes, stands = diagram.operands()
    names = list(_identifiers(node.name for node in nodes).values())
    legs = [[stands[leg] for leg in node.legs] for node in nodes]
    used = list(dict.fromkeys(leg for own in legs for leg in own))
    first = next((name for node, name in zip(nodes, names, strict=True) if node.kind not in ("wire", "joint")), None)
    lines = [f"{name} = torch.eye({math.isqrt(math.prod(shape))}).view{shape}" + f".to({first})" * bool(first)
             for node, name in zip(nodes, names, strict=True) if node.kind in ("wire", "joint")
             for shape in [tuple(diagram.sizes[leg] for leg in node.legs)]]  # fmt: skip
    if kind == "einops":
        axis = _identifiers(used)
        inputs = ", ".join(" ".join(axis[leg] for leg in own) for own in legs)
        lines += [f'einops.einsum({", ".join(names)}, "{inputs} -> {" ".join(axis[leg] for leg in diagram.output)}")']
        return "\n".join(lines)
    if kind == "einsum":
        if len(used) > 52:
            raise ValueError(f'torch.einsum has 52 letters, and this has {len(used)} legs; use code(diagram, "torch")')
        letters = dict(zip(used, _letters(used), strict=True))
        inputs = ",".join("".join(letters[leg] for leg in own) for own in legs)
        lines += [f'torch.einsum("{inputs}->{"".join(letters[leg] for leg in diagram.output)}", {", ".join(names)})']
        return "\n".join(lines)
    if kind != "torch":
        raise ValueError(f'code is "einsum", "einops" or "torch", not {kind!r}')
    held, taken_names = list(names), set(names)
    for step in diagram.steps(order):
        taken = [held.pop(i) for i in reversed(step.positions)][::-1]
        result = "".join(taken) if len(taken) > 1 else f"{taken[0]}_"
        while result in taken_names:  # a tensor of that name may still be wanted
            result += "_"
        held.append(result)
        taken_names.add(result)
        lines.append(f"{result} = {_torch_step(taken, step)}")
    return "\n".join(lines)


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """An identifier for each name, no two the same."""
    found: dict[str, str] = {}
    for name in names:
        plain = name.replace("⁻¹", "inv").replace("†", "h").replace("′", "p").replace("*", "s")
        plain = "".join(c for c in unicodedata.normalize("NFKC", plain) if f"n{c}".isidentifier()).strip("_")
        plain = plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"n{plain}"
        while plain in (*found.values(), "torch", "einops"):
            plain += "2"
        found[name] = plain
    return found


def _letters(legs: list[str]) -> list[str]:
    """A letter for each leg: its own first one where it is free."""
    free = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    out = []
    for leg in legs:
        out.append(leg[0] if leg[0] in free else free[0])
        free.remove(out[-1])
    return out


def _torch_step(names: list[str], step: Step) -> str:
    """One step in plain torch: a tensordot, or, where a leg is shared and stays, a product that broadcasts."""
    operands = []
    for k, (name, legs) in enumerate(zip(names, step.taken, strict=True)):
        legs, elsewhere = list(legs), {leg for j, own in enumerate(step.taken) if j != k for leg in own}
        for leg in [x for x, n in Counter(legs).items() if n > 1]:  # a diagonal
            while legs.count(leg) > 1:
                a = legs.index(leg)
                b = legs.index(leg, a + 1)
                name = f"{name}.diagonal(dim1={a}, dim2={b})"
                legs = [x for i, x in enumerate(legs) if i not in (a, b)] + [leg]
        if alone := [i for i, leg in enumerate(legs) if leg not in step.legs and leg not in elsewhere]:
            name, legs = f"{name}.sum({tuple(alone)})", [leg for i, leg in enumerate(legs) if i not in alone]
        operands.append((name, legs))
    if len(operands) > 2:
        raise ValueError(f'"torch" goes two by two, and a step takes {" ".join(names)}; give an order of pairs')
    if len(operands) == 1:
        return _permuted(*operands[0], step.legs)
    (A, a), (B, b) = operands
    summed = [leg for leg in a if leg in b and leg not in step.legs]
    if set(a) & set(b) == set(summed):
        code = f"torch.tensordot({A}, {B}, ({[a.index(x) for x in summed]}, {[b.index(x) for x in summed]}))"
        return _permuted(code, [x for x in (*a, *b) if x not in summed], step.legs)
    order = [*step.legs, *summed]
    left, right = (_permuted(name, legs, [x for x in order if x in legs])
                   + f"[{', '.join(':' if x in legs else 'None' for x in order)}]" for name, legs in operands)
    total = f".sum({tuple(range(len(step.legs), len(order)))})" if summed else ""
    return f"({left} * {right}){total}"


def _permuted(name: str, legs: Sequence[str], order: Sequence[str]) -> str:
    where = [list(legs).index(leg) for leg in order]
    return name if where == sorted(where) else f"{name}.permute({', '.join(map(str, where))})"
