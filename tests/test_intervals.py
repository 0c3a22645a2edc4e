"""Bootstrap intervals: how often they hold what they should, and what they refuse."""

import numpy as np
import pytest

from tensorlens_utils.intervals import interval, show


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    samples = np.random.default_rng(0).exponential(size=(1000, 60))
    value, low, high = interval(samples)
    assert np.allclose(value, samples.mean(-1)) and (low < value).all() and (value < high).all()
    share = ((low < 1) & (1 < high)).mean()
    assert 0.90 < share < 0.97, share  # a percentile bootstrap of 60 skewed values holds a little less than 95 %


def test_a_ratio_of_means_is_drawn_together():
    total = np.random.default_rng(0).uniform(1, 100, 50)
    assert np.allclose(interval(0.3 * total, of=total), 0.3)
    _, low, high = interval(0.3 * total)
    assert high - low > 1


def test_draws_follow_from_their_seed():
    values = np.arange(20.0)
    assert np.array_equal(interval(values), interval(values))
    assert not np.array_equal(interval(values), interval(values, seed=2))
    assert show(interval(values), 1).startswith("9.5 [")


@pytest.mark.parametrize(("values", "of"), [(3.0, None), ([1.0], None), ([], None), ([1.0, 2.0], [1.0]),
                                            ([1.0, 2.0], [[1.0, 2.0]])])  # fmt: skip
def test_too_few_values_are_refused(values, of):
    with pytest.raises(ValueError, match="an interval takes two values or more"):
        interval(values, of)


@pytest.mark.parametrize("values, of, message", [
    ([1.0, float("nan")], None, "finite values"), ([1.0, 2.0], [1.0, float("inf")], "finite values"),
    ([1.0, 2.0], [0.0, 0.0], "that is not zero"), ([1.0, 2.0, 3.0], [-1.0, 1.0, -0.5], "that is not zero"),
    ([1.0, 2.0, 3.0], [-1.0, 1.0, 0.5], "from draw to draw")])  # fmt: skip
def test_what_has_no_interval_is_refused(values, of, message):
    with pytest.raises(ValueError, match=message):
        interval(values, of)
