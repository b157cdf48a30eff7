import numpy as np
import pytest

from emoshare.training.label_weights import KERNEL_WIDTH, smoothed_weights

NAN = float("nan")


def test_rare_shares_weigh_more_and_the_mean_weight_of_a_label_is_one():
    shares = np.array([0.1] * 90 + [0.8] * 10)
    shares = np.stack([shares, 1 - shares, np.full(100, 0.3)], axis=1).astype(np.float32)
    weights = smoothed_weights(shares)
    assert weights.shape == (100, 3)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.mean(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(weights[-1] / weights[0], [9, 9, 1], rtol=1e-4)


def test_the_density_is_smoothed():
    """A share with many just next to it is not rare; one that is far from all others is."""
    shares = np.array([0.3] * 50 + [0.3 + KERNEL_WIDTH / 2] + [0.9])[:, None]
    near, far = smoothed_weights(shares)[-2:, 0]
    density = 50 + np.exp(-0.5 * 0.5**2)  # of the first 50
    assert near / smoothed_weights(shares)[0, 0] == pytest.approx(density / (50 * np.exp(-0.5 * 0.4**2) + 1), rel=0.1)
    assert far > 40 * near


def test_unknown_shares_and_labels_have_no_say():
    shares = np.random.default_rng(0).random((20, 2))
    expected = smoothed_weights(shares)
    with_unknown = smoothed_weights(np.concatenate([shares, np.full((3, 2), NAN)]))
    np.testing.assert_array_equal(with_unknown[:20], expected)
    np.testing.assert_array_equal(with_unknown[20:], 1)
    assert (smoothed_weights(np.full((4, 2), NAN)) == 1).all()
