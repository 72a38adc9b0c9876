import jax
import numpy as np
import pytest
import scipy.special

from castling_jax.training.losses import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_minus_the_expected_log_probability(smoothing):
    logits = np.asarray(jax.random.normal(jax.random.key(0), (5, 7))) * 3
    labels = np.array([0, 6, 3, 3, 1])
    targets = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(targets * scipy.special.log_softmax(logits.astype(np.float64), axis=-1)).sum(-1)
    # A sum of seven float32 terms of size up to 10.
    np.testing.assert_allclose(cross_entropy(logits, labels, label_smoothing=smoothing), expected, rtol=1e-6)
