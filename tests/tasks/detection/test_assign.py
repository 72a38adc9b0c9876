"""The assigners against the reference's, and against loops over boxes and points that were written from their rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.tasks.detection import assign_atss, assign_simota, assign_tal, level_points

IMAGE_SIZE = (160, 224)
CLASSES = 5
POINTS, STRIDES, COUNTS = level_points(IMAGE_SIZE)
NAMES = ("atss", "tal", "simota")


def assign(name, scores, boxes, truth):
    """One image, whose truth is boxes, classes and valid."""
    if name == "atss":
        return assign_atss(POINTS, STRIDES, COUNTS, boxes, *truth, CLASSES)
    if name == "tal":
        return assign_tal(POINTS, scores, boxes, *truth)
    return assign_simota(POINTS, STRIDES, scores, boxes, *truth)


@functools.cache
def compiled(name):
    return jax.jit(jax.vmap(functools.partial(assign, name)))


def assign_batch(name, scores, boxes, truth):
    return [np.asarray(part) for part in compiled(name)(scores, boxes, tuple(truth))]


# ---------------------------------------------------------------------------------------------------------------------
# The rules in loops, in float64.


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def giou(a, b):
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    ratio = iou(a, b)
    union -= ratio * union / (1 + ratio)  # the intersection, from the ratio
    return ratio - ((hull - union) / hull if hull > 0 else 0)


def table(function, boxes, others):
    return np.array([[function(a, b) for b in others] for a in boxes])


def depths(boxes):
    x, y = POINTS.T.astype(float)
    return np.array([np.minimum.reduce([x - a, y - b, c - x, d - y]) for a, b, c, d in boxes])


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def reference_claims(name, scores, predicted, boxes, classes):
    """For each box the points it claims, what decides between claimants, and the IoU with the prediction."""
    overlap = table(iou, boxes, predicted)
    if name == "atss":
        half = 2.5 * STRIDES[:, None]
        anchors = np.concatenate([POINTS - half, POINTS + half], axis=1).astype(float)
        by_anchor, claims = table(iou, boxes, anchors), []
        for g, box in enumerate(boxes):
            distance = ((POINTS.astype(float) - center(box)) ** 2).sum(1)
            near, first = [], 0
            for count in COUNTS:
                near += sorted(range(first, first + count), key=lambda point: distance[point])[:9]
                first += count
            threshold = by_anchor[g, near].mean() + by_anchor[g, near].std(ddof=1)
            claims.append({p for p in near if by_anchor[g, p] > threshold and depths([box])[0, p] > 1e-9})
        return claims, by_anchor, overlap
    if name == "tal":
        aligned = scores[:, classes].T * overlap**6
        inside = depths(boxes) > 1e-9
        claims = [set(sorted(np.flatnonzero(inside[g]), key=lambda p: -aligned[g, p])[:13]) for g in range(len(boxes))]
        return claims, overlap, overlap
    inside = depths(boxes) > 0
    around = [[x - 1, y - 1, x + 1, y + 1] for x, y in map(center, boxes)]
    near = np.abs(POINTS.astype(float) - np.array(around)[:, None, :2] - 1).max(2) < 2.5 * STRIDES
    candidates = np.flatnonzero((inside | near).any(0))
    p = np.clip(scores, 1e-12, 1 - 2.0**-24)
    negative = -0.75 * p**2 * np.log1p(-p)
    cost = np.zeros(overlap.shape)
    for g, c in enumerate(classes):
        q, s = overlap[g], p[:, c]
        own = np.where(q > 0, -q * (q * np.log(s) + (1 - q) * np.log1p(-s)), negative[:, c])
        cost[g] = np.delete(negative, c, axis=1).sum(1) + own
    # Float32 as in the rule; its step there is 8, and 1e8 itself is a float32.
    cost = (cost + 6 * (1 - table(giou, boxes, predicted))).astype(np.float32)
    cost = cost + np.where(inside & near, np.float32(0), np.float32(1e8))
    claims = []
    for g in range(len(boxes)):
        number = max(1, int(np.sort(overlap[g, candidates])[-10:].sum()))
        claims.append(set(sorted(candidates, key=lambda point: cost[g, point])[:number]))
    return claims, -cost, overlap


def reference(name, scores, predicted, truth):
    all_boxes, all_classes, valid = truth
    boxes, classes = all_boxes[valid > 0].astype(float), all_classes[valid > 0]
    labels = np.full(len(POINTS), CLASSES)
    out_boxes, out_scores = np.zeros((len(POINTS), 4)), np.zeros((len(POINTS), CLASSES))
    if not len(boxes):
        return labels, out_boxes, out_scores
    scores, predicted = scores.astype(float), predicted.astype(float)
    claims, preference, overlap = reference_claims(name, scores, predicted, boxes, classes)
    owners = {}
    for point in range(len(POINTS)):
        claimants = [g for g in range(len(boxes)) if point in claims[g]]
        if claimants:
            owners[point] = claimants[0] if len(claimants) == 1 else int(np.argmax(preference[:, point]))
    for point, g in owners.items():
        soft = overlap[g, point]
        if name == "tal":
            got = [p for p in owners if owners[p] == g]
            aligned = {p: scores[p, classes[g]] * overlap[g, p] ** 6 for p in got}
            soft = aligned[point] / (max(aligned.values()) + 1e-9) * max(overlap[g, p] for p in got)
        labels[point], out_boxes[point], out_scores[point, classes[g]] = classes[g], boxes[g], soft
    return labels, out_boxes, out_scores


# ---------------------------------------------------------------------------------------------------------------------


def draw(seed, rows=6):
    """Boxes at multiples of 4 px, so that many points are equally near, and predictions around some of them."""
    rng = np.random.default_rng(seed)
    low = 4 * rng.integers(-4, 40, (rows, 2))
    boxes = np.concatenate([low, low + 4 * rng.integers(1, 30, (rows, 2))], axis=1).astype(np.float32)
    aim = boxes[rng.integers(0, rows, len(POINTS))]
    predicted = (aim + rng.normal(0, 8, aim.shape)).astype(np.float32)
    predicted = np.concatenate([predicted[:, :2], np.maximum(predicted[:, 2:], predicted[:, :2])], axis=1)
    scores = rng.uniform(0.01, 0.99, (len(POINTS), CLASSES)).astype(np.float32)
    classes, valid = rng.integers(0, CLASSES, rows).astype(np.int32), rng.integers(0, 4, rows) > 0
    return scores, predicted, (boxes, classes, valid)


def stack(draws):
    return jax.tree.map(lambda *parts: np.stack(parts), *draws)


def assert_assigned(actual, expected):
    labels, boxes, scores = actual
    np.testing.assert_array_equal(labels, expected[0])
    np.testing.assert_array_equal(boxes, expected[1])
    # Ratios and sixth powers of float32 IoUs, whose error is 1e-6 where boxes are small.
    np.testing.assert_allclose(scores, expected[2], rtol=0, atol=1e-5)


def golden_images(file, prefix, truth="gt", images=slice(None)):
    truth = [file[f"{truth}/{name}"] for name in ("boxes", "classes", "valid")]
    return file[f"{prefix}scores"][images], file[f"{prefix}boxes"][images], truth


@pytest.mark.parametrize("prefix", ["", "case/", "conflict/"])
@pytest.mark.parametrize("name", ["atss", "tal"])
def test_assigns_as_paddle_detection(golden, name, prefix):
    file = golden("dense/picodet_v2")
    if prefix == "conflict/":  # three times the one image: a batch as the others are
        images = golden_images(file, "case/", "conflict/gt", slice(0, 1))
        images = jax.tree.map(lambda part: np.repeat(part, 3, axis=0), images)
    else:
        images = golden_images(file, prefix)
    actual = assign_batch(name, *images)
    expected = [file[f"{prefix}assigned/{name}/{part}"] for part in ("labels", "boxes", "scores")]
    assert_assigned([part[: len(expected[0])] for part in actual], expected)


@pytest.mark.parametrize("prefix", ["", "low/", "case/"])
def test_assigns_as_the_legacy_paddle_detection(golden, prefix):
    file = golden("dense/picodet_legacy")
    scores, boxes, truth = golden_images(file, "case/" if prefix == "case/" else "")
    if prefix == "low/":
        scores = np.asarray(jax.nn.sigmoid(file["cls_logits"] + file["low/shift"]))
    labels, assigned, _ = assign_batch("simota", scores, boxes, truth)
    np.testing.assert_array_equal(labels, file[f"{prefix}assigned/labels"])
    if prefix != "low/":
        np.testing.assert_array_equal(assigned, file[f"{prefix}assigned/boxes"])


def test_simota_gives_a_box_without_area_one_point(golden):
    file = golden("dense/picodet_legacy")
    scores, boxes, truth = golden_images(file, "case/")
    truth[2][2] = file["zero_area/valid"]
    labels, assigned, _ = assign_batch("simota", scores, boxes, truth)
    np.testing.assert_array_equal(labels[2], file["zero_area/labels"])
    np.testing.assert_array_equal(assigned[2], file["zero_area/boxes"])
    assert (labels[2] < CLASSES).sum() == file["zero_area/num_positive"]


@pytest.mark.parametrize("name", NAMES)
def test_assigns_as_loops_do(name):
    images = [draw(seed) for seed in range(3)]
    actual = assign_batch(name, *stack(images))
    positives = 0
    for i, image in enumerate(images):
        assert_assigned([part[i] for part in actual], reference(name, *image))
        positives += (actual[0][i] < CLASSES).sum()
    assert positives > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_assigns_as_loops_do_at_length(name):
    for start in range(100, 160, 3):
        images = [draw(seed) for seed in range(start, start + 3)]
        actual = assign_batch(name, *stack(images))
        for i, image in enumerate(images):
            assert_assigned([part[i] for part in actual], reference(name, *image))


@pytest.mark.parametrize("name", NAMES)
def test_odd_boxes(name):
    """All padded; without area; equal boxes, of which the first one wins; and boxes partly and wholly outside."""
    scores, predicted, truth = stack([draw(seed) for seed in range(3)])
    boxes, classes, valid = truth
    valid[:] = [[False] * 6, [True, True, True, False, False, False], [True] * 6]
    boxes[1, :3] = [[40, 40, 40, 90], [50, 50, 110, 110], [50, 50, 110, 110]]
    classes[1, :3] = [0, 1, 2]
    boxes[2, :3] = [[-50, -30, 40, 60], [180, 100, 300, 220], [300, 300, 340, 350]]
    actual = assign_batch(name, scores, predicted, truth)
    labels, assigned, soft = actual
    assert (labels[0] == CLASSES).all()
    assert not assigned[0].any()
    assert not soft[0].any()
    assert (0 in labels[1]) == (name == "simota")
    if name == "atss":  # in the others the scores of the two classes count, too
        assert set(labels[1]) == {1, CLASSES}
    for i in (1, 2):
        image = jax.tree.map(lambda part: part[i], (scores, predicted, truth))  # noqa: B023
        assert_assigned([part[i] for part in actual], reference(name, *image))


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    scores, predicted, truth = stack([draw(seed) for seed in (5, 6, 7)])
    plain = assign_batch(name, scores, predicted, truth)
    boxes, classes, valid = truth
    rng = np.random.default_rng(0)
    boxes[~valid] = rng.uniform(-1e3, 1e3, boxes[~valid].shape)
    classes[~valid] = rng.choice([-1, 99], classes[~valid].shape)
    for actual, expected in zip(assign_batch(name, scores, predicted, truth), plain, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["tal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("atss", "simota"))])
def test_half_precision_is_widened_first_and_no_gradient_passes(name):
    scores, predicted, truth = draw(8)
    half = [jnp.asarray(part, jnp.bfloat16) for part in (scores, predicted)]

    def total(scores, boxes):
        labels, assigned, soft = assign(name, scores, boxes, truth)
        return soft.sum() + assigned.sum(), (labels, assigned, soft)

    gradients, actual = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*half)
    wide = [np.asarray(part.astype(jnp.float32)) for part in half]
    assert_assigned(actual, reference(name, *wide, truth))
    assert actual[2].dtype == actual[1].dtype == jnp.float32
    assert not any(np.any(gradient) for gradient in gradients)


def test_ties_go_to_the_lower_index():
    """A box between four points of equal predictions and scores; 13 of the 16 points inside it are the first ones."""
    boxes = np.float32([[8, 8, 40, 40]])
    truth = (boxes, np.int32([0]), np.array([True]))
    scores, predicted = np.full((len(POINTS), CLASSES), 0.5, np.float32), np.repeat(boxes, len(POINTS), axis=0)
    inside = np.flatnonzero(depths(boxes)[0] > 0)
    labels = np.asarray(jax.jit(functools.partial(assign, "tal"))(scores, predicted, truth)[0])
    np.testing.assert_array_equal(np.flatnonzero(labels == 0), inside[:13])


def test_levels_with_few_points_give_all_of_them():
    points, strides, counts = level_points(64)  # 64, 16, 4 and 1 points, of which 9, 9, 4 and 1 are candidates
    predicted = np.repeat(np.float32([[20, 20, 44, 32]]), len(points), axis=0)
    truth = (np.float32([[20, 20, 44, 44]]), np.int32([2]), np.array([True]))
    run = jax.jit(lambda *truth: assign_atss(points, strides, counts, predicted, *truth, CLASSES))
    labels, _, scores = run(*truth)
    # IoUs with the anchors are 4 x 0.36, 5 x 0.283, 9 x 0.09, 4 x 0.0225 and 0.006: 0.17 + 0.13 lies between.
    positive = np.flatnonzero(np.asarray(labels) == 2)
    np.testing.assert_array_equal(points[positive], [[28, 28], [36, 28], [28, 36], [36, 36]])
    np.testing.assert_array_equal(np.asarray(scores)[positive, 2], 0.5)


def test_shapes_that_do_not_fit(refuses):
    scores, predicted, (boxes, classes, valid) = draw(0)
    with refuses("classes must have the shape (6,), not (5,)."):
        assign_tal(POINTS, scores, predicted, boxes, classes[1:], valid)
    with refuses("boxes must have the shape (1, 4), not (1, 6, 4)."):
        assign_tal(POINTS, scores, predicted, boxes[None], classes[None], valid[None])
    with refuses("pred_boxes must have the shape (747, 4), not (746, 4)."):
        assign_atss(POINTS, STRIDES, COUNTS, predicted[1:], boxes, classes, valid, CLASSES)
    with refuses("points must have the shape (735, 2), not (747, 2)."):
        assign_atss(POINTS, STRIDES, COUNTS[:3], predicted, boxes, classes, valid, CLASSES)
    with refuses("strides must have the shape (747,), not (1,)."):
        assign_simota(POINTS, STRIDES[:1], scores, predicted, boxes, classes, valid)
    with refuses("the number of rows in boxes must be at least 1, not 0."):
        assign_simota(POINTS, STRIDES, scores, predicted, boxes[:0], classes[:0], valid[:0])
