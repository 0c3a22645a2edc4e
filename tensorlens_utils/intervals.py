"""Means and how sure they are: the 95 % bootstrap interval that stands beside each comparison of the series.

>>> print(show(interval([1.0, 2.0, 3.0, 4.0])))
2.50 [1.50, 3.50]
"""

from functools import lru_cache

import numpy as np


@lru_cache(4)
def _times(m, n, seed):
    """How many times each of m values comes in each of n draws of m: (m, n)."""
    draws = np.random.default_rng(seed).integers(m, size=(n, m)) + m * np.arange(n)[:, None]
    return np.bincount(draws.ravel(), minlength=n * m).reshape(n, m).T.astype(np.uint16, order="C")


def interval(values, of=None, *, n=4000, seed=1):
    """The mean over the last axis, and the ends of its 95 % percentile bootstrap interval: (3, ...).

    What is averaged must be independent: texts, images or relations, not the tokens of one text.

    Args:
        values: (..., m), any array or CPU tensor.
        of: (m,); the mean of `values` is divided by its mean, both drawn together: a ratio of means, as a share of
            a total is.
        n: draws; seed: of the draws, which are the same for the same m.

    Raises:
        ValueError: for fewer than two values, of which no draw could tell anything, for values that are not finite, and
            where a mean of `of` is not above 0.
    """
    values = np.asarray(values, dtype=float)
    of = np.ones(values.shape[-1:]) if of is None else np.asarray(of, dtype=float)
    if values.shape[-1:] < (2,) or of.shape != values.shape[-1:]:
        raise ValueError(f"an interval takes two values or more on the last axis, and `of` as many; not {values.shape}"
                         f" and {of.shape}")
    if not (np.isfinite(values).all() and np.isfinite(of).all()):
        raise ValueError("an interval takes finite values, and here some are not; leave out what was not measured")
    times = _times(values.shape[-1], n, seed)
    whole = of @ times
    if whole.min() <= 0 <= whole.max():
        raise ValueError("a ratio of means is of a whole that is not zero, and here the mean of `of` changes its sign "
                         "from draw to draw; take values of one sign")  # fmt: skip
    means = values @ times / whole
    return np.stack([values.mean(-1) / of.mean(), *np.quantile(means, [0.025, 0.975], axis=-1)])


def show(triple, digits=2):
    """A mean with its interval, as text: (value, low, high) -> "0.98 [0.93, 0.99]"."""
    return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*triple, n=digits)
