"""How sparse a tensor is in a basis, measured so that tensors can be compared, and the nulls that a claim has to beat.

The measures take coefficients c (..., n), flattened over the last axis: ``hoyer(haar.analysis(A).flatten(-2))``; half
precision and whole numbers are taken in float32. Those of the first group do not change with the tensor's scale, so a
network's logits may stand beside another's logits, and probabilities beside probabilities. The papers' own 'ℓ1 entropy'
is a plain sum: it grows with the scale, and compares tensors of one kind only, normalised alike.

>>> import torch
>>> one, all_ = torch.tensor([0.0, 0.0, 4.0, 0.0]), torch.ones(4)
>>> [(float(f(one)), float(f(all_))) for f in (l1_over_l2, hoyer, gini)]
[(1.0, 2.0), (1.0, 0.0), (0.75, 0.0)]
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.fft import dctn
from torch import Tensor

from ..trees import Tree
from . import Haar

# ------------------------------------------------------------------------------------------------- measures, scale-free


def l1_over_l2(c: Tensor) -> Tensor:
    """‖c‖₁/‖c‖₂, from 1 (one coefficient) to √n (all alike): (..., n) -> (...).

    Of zeros alone this, Hoyer's measure and Gini's are NaN: 0 is neither sparse nor not, and is to be left out.
    """
    a = _modulus(c)
    return a.sum(-1) / a.norm(dim=-1)


def hoyer(c: Tensor) -> Tensor:
    """(√n − ‖c‖₁/‖c‖₂) / (√n − 1), from 0 (all alike) to 1 (one coefficient)  (Hoyer 2004): (..., n) -> (...)."""
    if c.shape[-1] < 2:
        raise ValueError("one coefficient alone is neither sparse nor not; Hoyer's measure takes two or more")
    root = math.sqrt(c.shape[-1])
    return (root - l1_over_l2(c)) / (root - 1)


def gini(c: Tensor) -> Tensor:
    """The Gini index of |c|, from 0 (all alike) to 1 − 1/n (one coefficient): (..., n) -> (...).

    1 − 2 Σ_k |c|_(k)/‖c‖₁ · (n − k + ½)/n with |c|_(1) ≤ |c|_(2) ≤ …  (Hurley and Rickard 2009)
    """
    n, a = c.shape[-1], _modulus(c).sort(-1)[0]
    weights = (n - torch.arange(1, n + 1, dtype=a.dtype, device=a.device) + 0.5) / n
    return 1 - 2 * (a @ weights) / a.sum(-1)


def energy(c: Tensor) -> Tensor:
    """The share of ‖c‖² that the 1, 2, … n largest coefficients hold, the curve of compaction: (..., n) -> (..., n).

    Of zeros alone any number holds all, 1.
    """
    sorted_ = _modulus(c).square().sort(-1, descending=True)[0].cumsum(-1)
    return torch.where(sorted_[..., -1:] == 0, 1, sorted_ / sorted_[..., -1:])


def n_term_error(c: Tensor, n_terms: int | Sequence[int]) -> Tensor:
    """‖x − x_k‖/‖x‖ of the best approximation by k = n_terms vectors of an orthonormal basis: (..., n) -> (...); for
    several k, (..., their number). Of x = 0 it is 0."""
    n, kept = c.shape[-1], torch.as_tensor(n_terms, device=c.device)
    if kept.min() < 0 or kept.max() > n:
        raise ValueError(f"of {n} coefficients 0 to as many are kept; not {n_terms}")
    squares = _modulus(c).square().sort(-1)[0].cumsum(-1)
    left = torch.nn.functional.pad(squares, (1, 0))  # ‖·‖² of the 0, 1, … n smallest
    whole = left[..., -1:]
    share = left[..., n - kept.flatten()] / torch.where(whole == 0, 1, whole)
    return share.sqrt().reshape([*c.shape[:-1], *kept.shape])


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider, where squares and sums neither overflow nor lose."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _modulus(c: Tensor) -> Tensor:
    return _wide(c.abs())


# ----------------------------------------------------------------------------------------- measures that tell the scale


def l1_entropy(c: Tensor, haar: Haar, first: int = 10, by: str = "order") -> Tensor:
    """The papers' 'ℓ1 entropy' (arXiv 2506.15541): Σ|c| over some coarse coefficients; (..., n, m, …) -> (...).

    A head or a network with little is called sparse. The sum grows with the tensor's own scale.

    Args:
        c: what ``haar.analysis`` gives.
        first: how many are summed: ``first`` on each axis by "order", ``first`` in all by "support".
        by: "order", as they do for a head: the products of each axis's first vectors in the tree's order, 10 × 10 (20 ×
            20 in figures). "support", as for a network: the vectors that cover most entries, 10 (40, 100); equals are
            taken in order.
    """
    dims, c = _dims(c, haar), _modulus(c)
    if first < 1:
        raise ValueError(f"one coefficient or more is summed; not first={first}")
    if by == "order":
        return c[(..., *[slice(first)] * dims)].flatten(-dims).sum(-1)
    if by == "support":
        widest = haar.support.flatten().argsort(descending=True, stable=True)[:first]
        return c.flatten(-dims)[..., widest.to(c.device)].sum(-1)
    raise ValueError(f'the coefficients that are summed are the first by "order" or by "support", not by {by!r}')


def besov(c: Tensor, haar: Haar, alpha: float, p: float = math.inf, q: float = math.inf) -> Tensor:
    """The Besov-type norm of mixed smoothness α, (..., n, m, …) -> (...): low is smooth on the trees.

        ( Σ_(j, j′, …) ( Σ_{I of level j, J of level j′} (|I×J|^−(α + ½ − 1/p) |c_IJ|)^p )^(q/p) )^(1/q)

    |I×J| is the share of the entries that a wavelet covers, and c is divided by √(nm…), so that tensors of other sizes
    compare. Constants, on whatever axis, are left out. At p = q = ∞ it is the mixed Hölder norm, the least C with
    |c_IJ| ≤ C |I×J|^(α + ½).
    """
    share, c = _wavelets(c, haar)
    scale = torch.zeros((), dtype=torch.int64)  # the levels as one number, of which some stand for no scale at all
    for levels in haar.levels:
        scale = scale[..., None] * (levels.max() + 1) + levels
    scale = scale[haar.wavelets].to(c.device)
    terms = share ** -(alpha + 0.5 - 1 / p) * c.abs()
    scales = terms.new_zeros(*terms.shape[:-1], int(scale.max()) + 1)
    if p == math.inf:
        scales = scales.scatter_reduce(-1, scale.expand_as(terms), terms, "amax")
    else:
        scales = scales.index_add(-1, scale, terms**p) ** (1 / p)
    return scales.norm(q, dim=-1)


class Holder(NamedTuple):
    """The mixed Hölder exponent ``alpha`` (...) with the standard error of the line's slope, ``error`` (...), and the
    points of that line: ``share`` (k,) of the entries that a wavelet covers, by octave, and ``size`` (..., k) of the
    coefficients there."""

    alpha: Tensor
    error: Tensor
    share: Tensor
    size: Tensor


def holder(c: Tensor, haar: Haar, statistic: str = "rms", least: int = 8) -> Holder:
    """The mixed Hölder exponent α: how coefficients fall with the support, |c_IJ| ~ |I×J|^(α + ½); (..., n, m, …).

    Least squares through log |c| against log |I×J|, a point for each octave of |I×J| with ``least`` coefficients or
    more. White noise has α = −½, in whatever fixed basis; trees that were fitted to noise have more. Where an octave
    holds nothing but 0, or what rounding leaves, no power is followed, and α and its error are NaN.

    Args:
        c: what ``haar.analysis`` gives, n · m · … of which are no constants on any axis.
        haar: with a tree on every axis.
        statistic: what |c| is in an octave: "rms", or "max", as in the theorem; the largest of many is larger, which
            flattens the line.
        least: coefficients in an octave.
    """
    share, c = _wavelets(c, haar)
    octave = share.log2().floor()
    groups = [group for o in octave.unique() if (group := octave == o).sum() >= least]
    if len(groups) < 3:
        raise ValueError(f"a slope with an error takes three octaves of {least} coefficients or more, and these trees "
                         f"give {len(groups)}; take larger tensors, or set least")  # fmt: skip
    if statistic == "rms":
        size = [c[..., group].square().mean(-1).sqrt() for group in groups]
        at = [share[group].log2().mean() for group in groups]
    elif statistic == "max":
        size = [c[..., group].abs().amax(-1) for group in groups]
        at = [share[group].log2().amax() for group in groups]
    else:
        raise ValueError(f'the coefficients of an octave are told by "rms" or "max", not by {statistic!r}')
    at, size = torch.stack(at), torch.stack(size, -1)
    x, y = at - at.mean(), size.log2()
    slope = (y @ x) / (x @ x)
    rest = y - y.mean(-1, keepdim=True) - slope[..., None] * x
    error = (rest.square().sum(-1) / (len(x) - 2) / (x @ x)).sqrt()
    empty = (size <= torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)).any(-1)
    return Holder((slope - 0.5).masked_fill(empty, torch.nan), error.masked_fill(empty, torch.nan), at.exp2(), size)


def _dims(c: Tensor, haar: Haar) -> int:
    if None in haar.trees:
        raise ValueError("the measure is of coefficients with a tree on every axis; move an axis without one to the "
                         "front, as a batch")  # fmt: skip
    if tuple(c.shape[-len(haar.shape) :]) != haar.shape:
        raise ValueError(f"the measure is of what haar.analysis gives, {haar.shape} on the last axes; not of shape "
                         f"{tuple(c.shape)}")  # fmt: skip
    return len(haar.trees)


def _wavelets(c: Tensor, haar: Haar) -> tuple[Tensor, Tensor]:
    """Of the coefficients that are of wavelets on every axis: the share of the entries (k,) that they cover, and c
    (..., k) as of a function on a space of measure 1."""
    dims, size = _dims(c, haar), haar.support.numel()
    if not haar.wavelets.any():
        raise ValueError(f"the measure is of wavelets, of which a tree of one leaf has none; these have {haar.shape}")
    share = haar.support[haar.wavelets].double() / size
    c = _wide(c)
    return share.to(c), c.flatten(-dims)[..., haar.wavelets.flatten().to(c.device)] / math.sqrt(size)


# ---------------------------------------------------------------------------------------------------------------- nulls


def dct(x: Tensor, dims: int = 2) -> Tensor:
    """The orthonormal cosine transform over the last ``dims`` axes, in their natural order: a basis for smooth signals,
    which knows of no tree; in float32 or wider, and without derivatives."""
    x = _wide(x.detach())
    return torch.from_numpy(dctn(x.cpu().numpy(), axes=range(-dims, 0), norm="ortho")).to(x)


def svd_error(A: Tensor, budget: int | Sequence[int], dims: int = 2) -> Tensor:
    """‖A − A_r‖/‖A‖ of the best approximation by singular triplets that ``budget`` numbers pay for, n + m each.

    A (..., n, m) -> (...), or (..., number of budgets). With more ``dims``, the matrices along the axes before n share
    one budget, as the heads of a network (..., H, n, m) do.
    """
    singular = torch.linalg.svdvals(_wide(A)).flatten(1 - dims)
    rank = torch.as_tensor(budget) // sum(A.shape[-2:])
    return n_term_error(singular, rank.clamp(max=singular.shape[-1]))


def rivals(x: Tensor, trees: Sequence[Tree], budget: int | Sequence[int], draws: int = 10, seed: int = 0) -> dict:
    """The n-term error of x (..., n, m, …) by ``budget`` numbers on its trees, and in whatever they have to beat.

    The names of what is given, errors of shape (...) or (..., number of budgets):

    organised  on the trees
    shuffled   on trees of the same shape with the leaves dealt anew, which is x with its indices permuted on each axis
    random     on ``Tree.random``; of this and the one before the mean over ``draws``
    natural    on dyadic trees in the order of the indices
    dct        in cosines, in the order of the indices
    entries    in no basis: the largest entries of x itself
    svd        of matrices alone, ``svd_error``

    What is counted are the numbers: not which they are, nor the trees.

    >>> import torch
    >>> from tensorlens_utils.trees import Tree
    >>> errors = rivals(torch.eye(8).double(), [Tree.dyadic(8)] * 2, 16)
    >>> {name: round(float(error), 2) for name, error in errors.items()}["organised"]
    0.0
    """
    if draws < 1 or not all(isinstance(tree, Tree) for tree in trees):
        raise ValueError(f"x is compared on a tree for each of its last axes, in one draw or more; not on {[*trees]} "
                         f"in {draws}")  # fmt: skip
    dims = len(trees)

    def error(*trees):
        return n_term_error(Haar(*trees).analysis(x).flatten(-dims), budget)

    def mean(draw):
        return sum(error(*(draw(tree, [seed, k, i]) for i, tree in enumerate(trees))) for k in range(draws)) / draws

    errors = {
        "organised": error(*trees),
        "shuffled": mean(lambda tree, seed: tree.shuffled(seed)),
        "random": mean(lambda tree, seed: Tree.random(tree.n, seed)),
        "natural": error(*(Tree.dyadic(tree.n) for tree in trees)),
        "dct": n_term_error(dct(x, dims).flatten(-dims), budget),
        "entries": n_term_error(x.flatten(-dims), budget),
    }
    return errors | ({"svd": svd_error(x, budget)} if dims == 2 else {})
