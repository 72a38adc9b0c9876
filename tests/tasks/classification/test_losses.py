import jax
import numpy as np
import pytest
import scipy.special

from castling_jax.tasks.classification.losses import cross_entropy, distillation_loss


def draw(seed):
    return np.asarray(jax.random.normal(jax.random.key(seed), (5, 7))) * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_minus_the_expected_log_probability(smoothing):
    logits, labels = draw(0), np.array([0, 6, 3, 3, 1])
    targets = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(targets * scipy.special.log_softmax(logits.astype(np.float64), axis=-1)).sum(-1)
    # A sum of seven float32 terms of size up to 10.
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-6)


def test_soft_distillation_is_a_divergence():
    student, teacher = draw(0), draw(1)
    p, q = (scipy.special.softmax(values.astype(np.float64) / 3, axis=-1) for values in (teacher, student))
    expected = 9 * scipy.special.rel_entr(p, q).sum(-1)
    found = distillation_loss(student, teacher, kind="soft", temperature=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(distillation_loss(teacher, teacher, kind="soft", temperature=3.0), 0, atol=1e-5)


def test_hard_distillation_takes_the_teachers_decision_for_the_label():
    student, teacher = draw(0), draw(1)
    expected = cross_entropy(student, np.eye(7)[teacher.argmax(-1)])
    np.testing.assert_allclose(distillation_loss(student, teacher, kind="hard", temperature=1.0), expected, rtol=1e-6)
