import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import ops

SETTINGS = {"score_threshold": 0.025, "iou_threshold": 0.6, "max_detections": 30}
compiled = jax.jit(ops.non_maximum_suppression, static_argnames=("max_detections", "candidates"))


def suppress(boxes, scores, **changed):
    return compiled(jnp.asarray(boxes), jnp.asarray(scores), **(SETTINGS | changed))


def detections(out):
    """The rows that are detections, and a look at the others."""
    count = int(out["count"])
    for name, empty in (("boxes", 0), ("scores", 0), ("classes", -1)):
        assert np.all(np.asarray(out[name][count:]) == empty)
    return [np.asarray(out[name][:count]) for name in ("boxes", "scores", "classes")]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def greedy(boxes, scores, *, score_threshold, iou_threshold, max_detections, candidates=1000):
    """Pair by pair, in loops."""
    points, classes = scores.shape
    pairs = [(p, c) for p in range(points) for c in range(classes) if scores[p, c] > score_threshold]
    pairs = sorted(pairs, key=lambda pair: -scores[pair])[:candidates]  # Python's sort is stable
    kept = []
    for p, c in pairs:
        rivals = [boxes[q] for q, d in kept if d == c]
        if not any(overlap(boxes[p], rival) > iou_threshold for rival in rivals):
            kept.append((p, c))
    kept = kept[:max_detections]
    return (
        np.array([boxes[p] for p, _ in kept]).reshape(-1, 4),
        np.array([scores[pair] for pair in kept]),
        np.array([c for _, c in kept]),
    )


def overlap(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = np.prod(np.maximum(sides, 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter
    return inter / union if union else 0


def draw(seed, points=40, classes=3):
    """Whole coordinates, whose areas are exact, a few of them negative or without area; few different scores."""
    rng = np.random.default_rng(seed)
    low = rng.integers(-10, 30, (points, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 25, (points, 2))], axis=1).astype(np.float32)
    return boxes, (rng.integers(0, 12, (points, classes)) / 16).astype(np.float32)


def test_keeps_what_torchvision_and_paddle_keep(golden):
    file = golden("dense/nms")
    cases = file.meta["cases"]
    # One program for all: points and classes with a score of 0 stand behind, and change nothing.
    boxes, scores = np.zeros((len(cases), 300, 4), np.float32), np.zeros((len(cases), 300, 6), np.float32)
    for i in range(len(cases)):
        points, classes = file[f"{i}/scores"].shape
        boxes[i, :points], scores[i, :points, :classes] = file[f"{i}/boxes"], file[f"{i}/scores"]
    low, most = (np.float32([case[name] for case in cases]) for name in ("low", "iou"))
    limit = max(case["keep"] for case in cases)
    outs = jax.vmap(lambda *c: suppress(*c[:2], score_threshold=c[2], iou_threshold=c[3], max_detections=limit))(
        boxes, scores, low, most
    )
    for i, case in enumerate(cases):
        found = detections({name: values[i] for name, values in outs.items()})
        expected = [file[f"{i}/kept/{name}"] for name in ("boxes", "scores", "classes")]
        assert min(len(found[1]), case["keep"]) == len(expected[1]), case["name"]
        assert_equal([part[: case["keep"]] for part in found], expected)


@pytest.mark.parametrize("candidates", [1000, 7, 50])
def test_keeps_what_loops_keep(candidates):
    # These boxes reach a ratio of 0.5 exactly; seven candidates are fewer than points, 50 fewer than pairs.
    for seed in range(20):
        changed = {"candidates": candidates, "iou_threshold": (0.2, 0.5)[seed % 2]}
        boxes, scores = draw(seed)
        assert_equal(detections(suppress(boxes, scores, **changed)), greedy(boxes, scores, **(SETTINGS | changed)))


def test_a_batch_is_image_by_image():
    boxes, scores = (np.stack(parts) for parts in zip(*map(draw, range(6)), strict=True))
    mapped = jax.vmap(suppress)(boxes, scores)
    grid = suppress(boxes.reshape(2, 3, 40, 4), scores.reshape(2, 3, 40, 3))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), grid, mapped)
    for i in range(6):
        image = {name: values[i] for name, values in mapped.items()}
        assert_equal(detections(image), greedy(boxes[i], scores[i], **SETTINGS))


def test_a_chain_alternates():
    # Each box overlaps its neighbours alone, so the rule has to run down the whole chain: the longest loop there is.
    left, scores = np.arange(40, dtype=np.float32), np.zeros((40, 3), np.float32)
    boxes = np.stack([left, 0 * left, left + 1.9, 0 * left + 1], axis=1)
    scores[:, 0] = np.linspace(0.9, 0.1, 40)
    kept, _, _ = detections(suppress(boxes, scores, iou_threshold=0.3))
    np.testing.assert_array_equal(kept, boxes[::2])


def test_classes_do_not_meet_at_negative_coordinates():
    # Shifting boxes by class times the largest coordinate, 10, moves the second box of class 1 onto the one of class 0.
    boxes, scores = np.zeros((40, 4), np.float32), np.zeros((40, 3), np.float32)
    boxes[:3] = [[-20, -20, -10, -10], [0, 0, 9, 9], [-31, -31, -21, -21]]
    scores[[0, 1, 2], [0, 1, 1]] = [0.9, 0.8, 0.7]
    _, _, classes = detections(suppress(boxes, scores))
    np.testing.assert_array_equal(classes, [0, 1, 1])


def test_scores_that_are_no_numbers_do_not_count():
    boxes, scores = draw(3)
    scores[:5, 0], scores[5, 1] = np.nan, np.inf
    known = np.where(np.isnan(scores), 0, scores)
    assert_equal(detections(suppress(boxes, scores)), greedy(boxes, known, **SETTINGS))


def test_half_precision_and_where_a_threshold_is_met():
    boxes, scores = draw(4)
    half = suppress(jnp.asarray(boxes, jnp.bfloat16), jnp.asarray(scores, jnp.bfloat16))
    assert half["boxes"].dtype == half["scores"].dtype == jnp.bfloat16
    assert_equal(detections(half), greedy(boxes, scores, **SETTINGS))  # sixteenths and small integers are exact
    at = suppress(boxes, scores, score_threshold=float(scores.max()))
    assert int(at["count"]) == 0


def test_an_export_takes_any_batch():
    batch = jax.export.symbolic_shape("batch")
    specs = [jax.ShapeDtypeStruct((*batch, *tail), jnp.float32) for tail in ((40, 4), (40, 3))]
    run = jax.jit(functools.partial(ops.non_maximum_suppression, **SETTINGS))
    exported = jax.export.deserialize(jax.export.export(run, platforms=("cpu", "tpu"))(*specs).serialize())
    boxes, scores = (np.stack(parts) for parts in zip(*map(draw, range(3)), strict=True))
    out = exported.call(boxes, scores)
    for i in range(3):
        image = {name: values[i] for name, values in out.items()}
        assert_equal(detections(image), greedy(boxes[i], scores[i], **SETTINGS))


@pytest.mark.slow
def test_scores_and_boxes_have_a_gradient():
    boxes, scores = map(jnp.asarray, draw(5))

    def total(boxes, scores):
        out = suppress(boxes, scores)
        return out["boxes"].sum() + 2 * out["scores"].sum(), out["count"]

    (by_boxes, by_scores), count = jax.jit(jax.grad(total, (0, 1), has_aux=True))(boxes, scores)
    assert by_boxes.sum() == 4 * count
    assert by_scores.sum() == 2 * count


def test_what_does_not_fit(refuses):
    boxes, scores = map(jnp.asarray, draw(0))
    suppress = functools.partial(ops.non_maximum_suppression, **SETTINGS)
    with refuses("boxes must have the shape (39, 4), not (40, 4)."):
        suppress(boxes, scores[1:])
    with refuses("scores must be [..., points, classes]", "(40,)"):
        suppress(boxes, scores[:, 0])
    with refuses("at least one class, not of shape (40, 0)."):
        suppress(boxes, scores[:, :0])
    with refuses("scores must be of a floating type", "int32"):
        suppress(boxes, scores.astype(np.int32))
    for name in ("max_detections", "candidates"):
        with refuses(f"{name} must be at least 1, not 0."):
            suppress(boxes, scores, **{name: 0})
