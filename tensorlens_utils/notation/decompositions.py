"""A tensor taken apart into a diagram of smaller ones: as a sum of outer products (CP), as a small core between
isometries (Tucker), as a chain (a tensor train).

A matrix, or a tensor whose legs are put on two sides, is taken apart by `Diagram.decompose`, in any diagram. The
functions here begin with a tensor and give a whole one. (Graphical tensor notation for interpretability, 2402.01790.)

>>> T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
>>> for made in (cp(T, "i j k", 6), tucker(T, "i j k", [2, 3, 4]), train(T, "i j k")):
...     print(made, bool(torch.allclose(made.contract(), T, atol=1e-4)))
Diagram(A1(i r), λ(r), A2(j r), A3(k r) -> i j k) True
Diagram(G(r1 r2 r3), U1(i r1), U2(j r2), U3(k r3) -> i j k) True
Diagram(A1(i b1), A2(b1 j b2), A3(b2 k) -> i j k) True
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import Diagram, Node


def cp(tensor: Tensor, legs: str, rank: int, seed: int = 0, starts: int = 5, name: str = "A") -> Diagram:
    """A tensor as a sum of outer products (CP, also CANDECOMP/PARAFAC): a matrix for each leg, all on one copy dot.

    T[i, j, k] ≈ Σ_r λ[r]·A1[i, r]·A2[j, r]·A3[k, r], for any number of legs from three. The columns of the matrices
    have norm 1, and the weights λ are positive and fall. Unlike an SVD this is a search: which rank a tensor needs is
    NP-hard to tell, the best approximation of a rank may not exist, and what is found hangs on the start. So compare
    the diagram's `contract()` with the tensor.

    Args:
        tensor: any real tensor of order three or more.
        legs: names of its legs, in order, with blanks between them; the one summed over is "r", or r′ if that is taken.
        rank: the number of outer products.
        seed: of the random starts; the same seed gives the same diagram.
        starts: how many; the best result is kept, and the first that is exact (to 1e-7 of the norm) ends the search.
        name: of the matrices, which get numbers.

    Returns:
        A diagram with the matrices (size of the leg, rank) and the vector λ (rank,).

    Raises:
        ValueError: for a tensor that is not real or not finite, has nothing but zeros, or fewer legs than three, for
            legs that do not name its axes, and for a rank or a number of starts below 1.

    Source: tensorly's `parafac`, alternating least squares with line search (Kolda and Bader, SIAM Review 51, 2009).

    >>> T = torch.einsum("ir,jr,kr->ijk", *(torch.randn(n, 2, dtype=torch.float64) for n in (4, 5, 6)))
    >>> d = cp(T, "i j k", 2)
    >>> bool(torch.allclose(d.contract(), T, atol=1e-6)), d["A2"].tensor.shape
    (True, torch.Size([5, 2]))
    """
    own = _legs(tensor, legs)
    if len(own) < 3:
        raise ValueError(f"CP is for three legs or more, and {legs!r} names {len(own)}; Diagram.decompose takes a "
                         "matrix apart by its SVD, the best sum of outer products that there is")  # fmt: skip
    _check_count("a rank of CP", rank)
    _check_count("the number of starts", starts)
    if not tensor.any():
        raise ValueError("CP needs a tensor with some entry other than 0; one of zeros is a sum of no outer products")
    import tensorly
    from tensorly.decomposition import parafac  # only here: importing it takes as long as a small notebook

    norm = tensor.detach().double().norm().item()
    unit = _array(tensor) / norm
    random, best = np.random.RandomState(seed), (np.inf, np.ones(rank), [])
    for _ in range(starts):  # the ridge keeps the normal equations regular where the rank is more than enough
        weights, factors = parafac(unit, rank, n_iter_max=1000, init="random", tol=1e-12, random_state=random,
                                   normalize_factors=True, l2_reg=1e-12, linesearch=True)  # fmt: skip
        best = min(best, (np.linalg.norm(tensorly.cp_to_tensor((weights, factors)) - unit), weights, factors),
                   key=lambda found: found[0])  # fmt: skip
        if best[0] < 1e-7:
            break
    _, weights, factors = best
    order = np.argsort(-weights, kind="stable")
    bond = _fresh("r", own)
    nodes = [Node(f"{name}{k}", (leg, bond), _like(factor[:, order], tensor), "matrix")
             for k, (leg, factor) in enumerate(zip(own, factors, strict=True), 1)]  # fmt: skip
    nodes.insert(1, Node("λ", (bond,), _like(norm * weights[order], tensor)))  # second: drawn above the row
    return Diagram(nodes, own)


def tucker(tensor: Tensor, legs: str, ranks: Sequence[int], name: str = "U") -> Diagram:
    """A tensor as a small core with an isometry on each leg (Tucker).

    T[i, j, k] ≈ Σ_abc G[a, b, c]·U1[i, a]·U2[j, b]·U3[k, c]: for each leg a few directions that matter, and a core that
    says how they go together, in general not diagonal. It is exact where the ranks are those of the tensor's
    unfoldings, each leg against all others. As the matrices are isometries, the core has the norm of the product.

    Args:
        tensor: any real tensor of order two or more.
        legs: names of its legs, in order, with blanks between them; the core's legs are "r1", "r2", ..., with primes if
            one is taken.
        ranks: the size of the core, one for each leg, from 1 to the leg's size.
        name: of the isometries, which get numbers; the core is G.

    Returns:
        A diagram with the core G (*ranks) and the isometries (size of the leg, rank), their tips towards it.

    Raises:
        ValueError: for a tensor that is not real or not finite or has fewer legs than two, for legs that do not name
            its axes, and for ranks of another number or out of bounds.

    Source: tensorly's `tucker`, higher-order orthogonal iteration from the SVDs of the unfoldings (Kolda and Bader,
    SIAM Review 51, 2009). It has no random start.

    >>> d = tucker(torch.randn(6, 5, 4), "i j k", [2, 3, 4])
    >>> d["G"].tensor.shape, d["U1"].tensor.shape
    (torch.Size([2, 3, 4]), torch.Size([6, 2]))
    >>> U1 = d["U1"].tensor
    >>> bool(torch.allclose(U1.T @ U1, torch.eye(2), atol=1e-6))
    True
    """
    own = _legs(tensor, legs)
    if isinstance(ranks, int) or len(ranks) != len(own):
        raise ValueError(f"Tucker has a rank for each leg, and {legs!r} names {len(own)}; not {ranks!r}")
    for leg, size, rank in zip(own, tensor.shape, ranks, strict=True):
        _check_count(f"a rank of Tucker, here of {leg!r},", rank, size)
    from tensorly.decomposition import tucker as iterate

    norm = tensor.detach().double().norm().item() or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an unfolding of the core has fewer columns than a rank asks for
        core, factors = iterate(_array(tensor) / norm, [*ranks], n_iter_max=500, tol=1e-12, random_state=0)
    inner = [_fresh(f"r{k}", own) for k in range(1, len(own) + 1)]
    nodes = [Node(f"{name}{k}", (leg, bond), _like(factor, tensor), tip=(bond,))
             for k, (leg, bond, factor) in enumerate(zip(own, inner, factors, strict=True), 1)]  # fmt: skip
    return Diagram([Node("G", tuple(inner), _like(norm * core, tensor)), *nodes], own)


def train(tensor: Tensor, legs: str, rank: int | None = None, name: str = "A") -> Diagram:
    """A tensor as a tensor train (a matrix product state), by successive SVDs from the left.

    T[i, j, k] ≈ Σ_bc A1[i, b]·A2[b, j, c]·A3[c, k]. All tensors but the last are isometries with their tips to the
    right. Without ``rank`` it is exact; with it, the squares of all that the SVDs discard add up to the square of the
    error.

    Args:
        tensor: any real tensor of order two or more.
        legs: names of its legs, in order, with blanks between them; the bonds are "b1", "b2", ..., with primes if one
            is taken.
        rank: the largest size of a bond; None: as large as it comes.
        name: of the tensors, which get numbers.

    Returns:
        A diagram with a tensor for each leg: (leg, bond), then (bond, leg, bond), at last (bond, leg).

    Raises:
        ValueError: for a tensor that is not real or not finite or has fewer legs than two, for legs that do not name
            its axes, and for a rank below 1.

    Source: TT-SVD (Oseledets, SIAM Journal on Scientific Computing 33, 2011).

    >>> train(torch.randn(2, 3, 4), "i j k")
    Diagram(A1(i b1), A2(b1 j b2), A3(b2 k) -> i j k)
    >>> train(torch.randn(2, 3, 4), "i j k", rank=1).sizes
    {'i': 2, 'j': 3, 'k': 4, 'b1': 1, 'b2': 1}
    """
    own = _legs(tensor, legs)
    if rank is not None:
        _check_count("the rank of a train", rank)
    found, left = Diagram([Node(f"{name}1", own, tensor)], own), ""
    for k, leg in enumerate(own[:-1], 1):
        bond = _fresh(f"b{k}", own)
        found = found.decompose(f"{name}{k}", f"{left} {leg}", rank=rank, bond=bond, names=f"{name}{k} S V")
        found, left = found.merge("S", "V", name=f"{name}{k + 1}"), bond
    return found


# ---------------------------------------------------------------------------------------------------- checks


def _legs(tensor: Tensor, legs: str) -> tuple[str, ...]:
    """The legs by name, when they and the tensor are such as can be taken apart."""
    own = tuple(legs.split())
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a decomposition takes a torch tensor, not a {type(tensor).__name__}; torch.as_tensor makes "
                         "one")  # fmt: skip
    if not tensor.is_floating_point():
        raise ValueError(f"a decomposition takes real floating-point numbers, not {tensor.dtype}; "
                         + ("decompose the real and the imaginary part apart" if tensor.is_complex() else
                            "tensor.double() makes them"))  # fmt: skip
    if len(own) != tensor.dim():
        raise ValueError(f"a tensor has one leg for each axis, here {tensor.dim()}, and {legs!r} names {len(own)}; put "
                         'blanks between them, as in "i j k"')  # fmt: skip
    if len(own) < 2:
        raise ValueError(f"a decomposition takes two legs or more, and {legs!r} names {len(own)}; a vector is whole")
    if len(set(own)) < len(own):
        raise ValueError(f"the legs have names of their own, and {legs!r} repeats one; rename it")
    if not tensor.numel() or not tensor.isfinite().all():
        raise ValueError(f"a decomposition takes finite numbers, and this tensor of shape {tuple(tensor.shape)} has "
                         + (f"{(~tensor.isfinite()).sum()} that are not; mask or replace them" if tensor.numel() else
                            "none; each leg has a size of 1 or more"))  # fmt: skip
    return own


def _check_count(what: str, n: int, most: int | None = None):
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1 or most is not None and n > most:
        bounds = "1 or more" if most is None else f"from 1 to {most}, the leg's size"
        raise ValueError(f"{what} is a whole number, {bounds}; not {n!r}")


def _fresh(bond: str, taken: Sequence[str]) -> str:
    while bond in taken:
        bond += "′"
    return bond


def _array(tensor: Tensor) -> np.ndarray:
    """In float64, which numpy has and float16 is rounded from."""
    return tensor.detach().double().cpu().numpy()


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(array)).to(tensor)
