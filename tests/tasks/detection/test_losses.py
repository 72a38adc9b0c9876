import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.tasks.detection import (
    detection_losses,
    distribution_focal_loss,
    giou_loss,
    legacy_detection_losses,
    level_points,
    mean_losses,
    varifocal_loss,
    varifocal_loss_of_logits,
)
from tests.tasks.detection.test_assign import assign_batch, golden_images

POINTS, STRIDES, _ = level_points((160, 224))
REFERENCE_NAMES = {"varifocal": "vfl", "giou": "box", "dfl": "dfl"}


def loss(losses, key, scores, reg_logits, assigned):
    """The loss, with its parts, from the scores or logits that have this key among the outputs."""
    parts = mean_losses(losses({key: scores, "reg_logits": reg_logits}, assigned, POINTS, STRIDES))
    return sum(parts.values()), parts


value_and_gradients = jax.jit(jax.value_and_grad(loss, (2, 3), has_aux=True), static_argnums=(0, 1))


def assert_gradient(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assigned_of(file, name):
    return tuple(jnp.asarray(file[f"assigned/{name}/{part}"]) for part in ("labels", "boxes", "scores"))


@pytest.mark.parametrize("name", ["atss", "tal"])
def test_losses_and_gradients_of_paddle_detection(golden, name):
    file = golden("dense/picodet_v2")
    scores, reg_logits, assigned = file["scores"], file["reg_logits"], assigned_of(file, name)
    (total, parts), gradients = value_and_gradients(detection_losses, "scores", scores, reg_logits, assigned)
    for ours, theirs in REFERENCE_NAMES.items():
        np.testing.assert_allclose(parts[ours], file[f"loss/{name}/{theirs}"], rtol=1e-6)
    np.testing.assert_allclose(total, file[f"loss/{name}/total"], rtol=1e-6)
    for gradient, part in zip(gradients, ("scores", "reg_logits"), strict=True):
        assert_gradient(gradient, file[f"grad/{name}/{part}"])


@pytest.mark.parametrize("prefix", ["", "low/"])
def test_losses_and_gradients_of_the_legacy_paddle_detection(golden, prefix):
    file = golden("dense/picodet_legacy")
    logits = file["cls_logits"] + file.get(f"{prefix}shift", np.float32(0))
    scores = np.asarray(jax.nn.sigmoid(logits))
    assigned = tuple(assign_batch("simota", scores, *golden_images(file, "")[1:]))
    (_, parts), gradients = value_and_gradients(
        legacy_detection_losses, "cls_logits", logits, file["reg_logits"], assigned
    )
    for ours, theirs in REFERENCE_NAMES.items():
        np.testing.assert_allclose(parts[ours], file[f"{prefix}loss/{theirs}"], rtol=1e-6)
    for gradient, part in zip(gradients, ("cls_logits", "reg_logits"), strict=True):
        if not prefix:
            assert_gradient(gradient, file[f"grad/{part}"])


@pytest.mark.parametrize(
    ("losses", "key", "extra"),
    [(detection_losses, "scores", set()), (legacy_detection_losses, "cls_logits", {"positives"})],
    ids=["v2", "legacy"],
)
def test_totals_add_up_over_images(golden, losses, key, extra):
    file = golden("dense/picodet_v2")
    outputs = {key: file["scores"], "reg_logits": file["reg_logits"]}
    assigned = assigned_of(file, "tal")
    whole = jax.jit(losses)(outputs, assigned, POINTS, STRIDES)
    assert whole.keys() == {"varifocal", "giou", "dfl", "normaliser"} | extra
    images = jax.jit(jax.vmap(losses, (0, 0, None, None)))(outputs, assigned, POINTS, STRIDES)
    for name, values in images.items():
        np.testing.assert_allclose(np.sum(values), whole[name], rtol=1e-6)
    # Image 1 has no box: its sums are those of the negatives, its mean is bounded, and its gradient finite.
    empty = {name: values[1] for name, values in images.items()}
    assert empty["normaliser"] == empty["giou"] == empty["dfl"] == empty.get("positives", 0) == 0
    assert mean_losses(empty)["varifocal"] == empty["varifocal"] > 0
    assert mean_losses(empty)["giou"] == 0
    if not extra:
        np.testing.assert_allclose(whole["normaliser"], file["loss/tal/normaliser"], rtol=1e-6)


@pytest.mark.parametrize("shift", [0, 80, -80])
@pytest.mark.parametrize(
    ("losses", "key"), [(detection_losses, "scores"), (legacy_detection_losses, "cls_logits")], ids=["v2", "legacy"]
)
def test_the_gradient_is_finite_everywhere(losses, key, shift):
    """Predictions that are certain, boxes shrunk to points, true boxes without area, and no positive at all."""
    count = len(POINTS)
    rng = np.random.default_rng(0)
    reg_logits = rng.normal(0, 1, (3, count, 32)).astype(np.float32)
    reg_logits[1] = np.tile(np.where(np.arange(8) == 0, 90, -90), 4)  # every distance is 0
    logits = rng.normal(shift, 1, (3, count, 5)).astype(np.float32)
    scores = logits if key == "cls_logits" else np.asarray(jax.nn.sigmoid(logits))
    labels = rng.integers(0, 6, (3, count)).astype(np.int32)
    labels[2] = 5
    boxes = np.where(labels[..., None] < 5, np.tile(POINTS, 2), 0).astype(np.float32)  # without area, on the points
    boxes[0, ::2] += [-9, -5, 7, 200]
    targets = np.asarray(jax.nn.one_hot(labels, 5)) * np.float32(0.5)
    (total, _), gradients = value_and_gradients(losses, key, scores, reg_logits, (labels, boxes, targets))
    assert np.isfinite(total)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.any(gradients[1][0])


def test_the_gradient_is_the_slope_of_the_written_loss():
    """Loss by loss in NumPy's float64, whose central differences are the gradient's."""
    rng = np.random.default_rng(1)
    points, strides = np.float64([[12, 20], [40, 8]]), np.float64([8, 16])
    boxes = np.float64([[3, 6, 30, 41], [20, -9, 77, 30]])
    scores, targets = rng.uniform(0.1, 0.9, (2, 3)), np.float64([[0, 0.7, 0], [0.4, 0, 0]])
    logits = rng.normal(0, 1, (2, 32))

    def written(scores, logits):
        total = np.where(
            targets > 0,
            -targets * (targets * np.log(scores) + (1 - targets) * np.log(1 - scores)),
            -0.75 * scores**2 * np.log(1 - scores),
        ).sum()
        for i in range(2):
            shares = np.exp(logits[i].reshape(4, 8))
            shares /= shares.sum(1, keepdims=True)
            x, y = points[i] / strides[i]
            left, top, right, bottom = shares @ np.arange(8)
            a, b = np.array([x - left, y - top, x + right, y + bottom]), boxes[i] / strides[i]
            sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
            inter = np.prod(np.maximum(sides, 0))
            union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter
            weight = targets[i].sum()
            total += 2.5 * weight * (1 - inter / union + (hull - union) / hull)
            for side, distance in enumerate([x - b[0], y - b[1], b[2] - x, b[3] - y]):
                distance = np.clip(distance, 0, 6.9)
                low = int(distance)
                cross = (low + 1 - distance) * np.log(shares[side, low])
                total -= 0.5 * weight * (cross + (distance - low) * np.log(shares[side, low + 1])) / 4
        return total / max(targets.sum(), 1)

    arrays = [scores, logits]
    labels = np.int32([1, 0])
    small = [jnp.asarray(part, jnp.float32) for part in (*arrays, boxes, targets, points, strides)]

    def ours(scores, logits):
        assigned = (labels, *small[2:4])
        return sum(
            mean_losses(detection_losses({"scores": scores, "reg_logits": logits}, assigned, *small[4:])).values()
        )

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*small[:2])
    np.testing.assert_allclose(value, written(*arrays), rtol=1e-6)
    for which, gradient in enumerate(gradients):
        slopes = np.zeros_like(arrays[which])
        for place in np.ndindex(slopes.shape):
            around = []
            for step in (1e-6, -1e-6):
                moved = [part.copy() for part in arrays]
                moved[which][place] += step
                around.append(written(*moved))
            slopes[place] = (around[0] - around[1]) / 2e-6
        assert_gradient(gradient, slopes)


def test_both_varifocal_losses_are_one():
    # From -12 to 9; beyond, 1 - score has too few digits, and here it is known to 6e-8 of 1e-4.
    logits, targets = np.meshgrid(np.linspace(-12, 9, 40, dtype=np.float32), np.float32([0, 0.3, 1]))
    scores = (1 / (1 + np.exp(-logits.astype(float)))).astype(np.float32)
    by_scores, by_logits = jax.jit(varifocal_loss)(scores, targets), jax.jit(varifocal_loss_of_logits)(logits, targets)
    np.testing.assert_allclose(by_scores, by_logits, rtol=1e-3, atol=1e-9)
    certain = jax.jit(varifocal_loss)(np.float32([0, 1, 1, 1 + 1e-6]), np.float32([0.5, 0, 1, 0.5]))
    assert np.isfinite(certain).all()
    steep = jax.jit(jax.grad(lambda x: varifocal_loss_of_logits(x, jnp.zeros(1)).sum()))(np.float32([60]))
    np.testing.assert_allclose(steep, 0.75)  # a wrong certainty is still unlearned


def test_the_distribution_focal_loss_by_hand():
    logits = np.log(np.arange(1, 9, dtype=np.float32))  # shares of 1/36, 2/36, ...
    targets = np.float32([2, 2.25, -3, 100])
    share = np.log(np.arange(1, 9) / 36)
    expected = [share[2], 0.75 * share[2] + 0.25 * share[3], share[0], 0.1 * share[6] + 0.9 * share[7]]
    actual = jax.jit(distribution_focal_loss)(np.tile(logits, (4, 1)), targets)
    np.testing.assert_allclose(actual, -np.array(expected), rtol=1e-6)


def test_half_precision_is_widened_first():
    rng = np.random.default_rng(2)
    half = [jnp.asarray(rng.uniform(0, 1, shape), jnp.bfloat16) for shape in ((6, 4), (6, 4), (6, 8), (6,))]
    wide = [part.astype(jnp.float32) for part in half]
    pairs = {
        varifocal_loss: (0, 1),
        varifocal_loss_of_logits: (0, 1),
        giou_loss: (0, 1),
        distribution_focal_loss: (2, 3),
    }
    for loss, (a, b) in pairs.items():
        out = jax.jit(loss)(half[a], half[b])
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, jax.jit(loss)(wide[a], wide[b]))


def test_outputs_that_do_not_fit(refuses):
    scores, reg_logits = jnp.ones((2, 747, 5)), jnp.ones((2, 747, 32))
    assigned = (jnp.zeros((2, 747), jnp.int32), jnp.ones((2, 747, 4)), jnp.ones((2, 747, 5)))
    with refuses("outputs must have scores and reg_logits, not only scores, boxes."):
        detection_losses({"scores": scores, "boxes": reg_logits}, assigned, POINTS, STRIDES)
    with refuses("boxes must have the shape (2, 747, 4), not (2, 746, 4)."):
        short = (assigned[0], assigned[1][:, 1:], assigned[2])
        detection_losses({"scores": scores, "reg_logits": reg_logits}, short, POINTS, STRIDES)
    with refuses("reg_logits must have the shape (2, 747, 32), not (2, 746, 32)."):
        detection_losses({"scores": scores, "reg_logits": reg_logits[:, 1:]}, assigned, POINTS, STRIDES)
    with refuses("scores must have the shape (2, 747, 4), not (2, 747, 5)."):
        detection_losses({"scores": scores[..., :4], "reg_logits": reg_logits}, assigned, POINTS, STRIDES)
    with refuses("points must have the shape (747, 2), not (746, 2)."):
        legacy_detection_losses({"cls_logits": scores, "reg_logits": reg_logits}, assigned, POINTS[1:], STRIDES)
