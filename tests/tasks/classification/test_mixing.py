import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from castling_jax.tasks.classification.mixing import mix, mix_with_partners, soft_labels

CLASSES = 6
LABELS = jnp.arange(CLASSES)  # each image of a class of its own: the targets show the weights
SMOOTHING = 0.1
MIX = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.4, "probability": 0.8, "num_classes": CLASSES}
SEEDS = 3000
HEIGHT, WIDTH = 13, 10
IMAGES = np.random.default_rng(0).normal(size=(CLASSES, HEIGHT, WIDTH, 3)).astype(np.float32)
ONES = np.where(np.eye(CLASSES), 1 - SMOOTHING + SMOOTHING / CLASSES, SMOOTHING / CLASSES)  # smoothed labels


@pytest.fixture(scope="module")
def mixed():
    """What becomes of one batch under SEEDS keys, sorted by what was done to it. (The draws take seconds to compile.)

    Returns:
      kind -> (images, where they are their own [seeds, height, width], weights of the own labels [seeds]).
    """

    def one(seed):
        key = jax.random.key(seed)
        return mix(jnp.asarray(IMAGES), LABELS, key, **MIX, label_smoothing=SMOOTHING)

    images, targets = map(np.asarray, jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(SEEDS)))
    # timm's targets: y1 * lam + y2 * (1 - lam); of a batch that 16 do not divide, the partner's from its end as there.
    weights = (targets[:, 0, 0].astype(float) - ONES[0, 1]) / (1 - SMOOTHING)
    expected = weights[:, None, None] * ONES + (1 - weights[:, None, None]) * ONES[::-1]
    np.testing.assert_allclose(targets, expected, atol=2e-7)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=5e-7)
    own, others = ((images == batch).all(-1) for batch in (IMAGES, IMAGES[::-1]))
    assert (own == own[:, :1]).all()  # one box for the batch
    is_whole, is_cut = own.all((1, 2, 3)), (own | others).all((1, 2, 3))
    kinds = {"none": is_whole, "cutmix": is_cut & ~is_whole, "mixup": ~is_cut}
    return {kind: (images[chosen], own[chosen, 0], weights[chosen]) for kind, chosen in kinds.items()}


def test_switch_and_probability_are_shares_of_the_batches(mixed):
    shares = {kind: len(weights) / SEEDS for kind, (*_, weights) in mixed.items()}
    # CutMix's box may be shorter than a pixel, sqrt(1 - lambda) < 1 / 10: under 1 % of the batches.
    for kind, expected in (("none", 0.2), ("cutmix", 0.8 * 0.4), ("mixup", 0.8 * 0.6)):
        assert abs(shares[kind] - expected) < 5 * np.sqrt(expected * (1 - expected) / SEEDS) + 0.01
    np.testing.assert_allclose(mixed["none"][2], 1, atol=5e-7)


def test_mixup_weighs_images_and_labels_alike(mixed):
    images, _, weights = mixed["mixup"]
    weights = weights[:, None, None, None, None]
    # Roundings of weights to 2e-7, as recovered from the targets, times numbers up to 8.
    np.testing.assert_allclose(images, weights * IMAGES + (1 - weights) * IMAGES[::-1], atol=3e-6)


def test_mixups_weight_is_from_the_beta_distribution(mixed):
    *_, weights = mixed["mixup"]
    count = len(weights)
    assert scipy.stats.kstest(weights, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-4
    # Mean 1/2 and variance 1 / (4 (2 alpha + 1)), within five standard deviations.
    assert abs(weights.mean() - 0.5) < 5 * weights.std() / np.sqrt(count)
    assert abs(weights.var() - 1 / (4 * 2.6)) < 5 * weights.var() * np.sqrt(2 / count)


def test_cutmixs_label_weight_is_the_area_that_is_left(mixed):
    _, own, weights = mixed["cutmix"]
    # A pixel is 8e-3; the weights are recovered from float32 targets.
    np.testing.assert_allclose(weights, own.mean((1, 2)), rtol=0, atol=3e-7)


def test_cutmixs_boxes_are_the_papers(mixed):
    """Sides of sqrt(1 - lambda) around a uniform pixel, cut off at the border; lambda is uniform where alpha is 1."""
    cut = ~mixed["cutmix"][1]
    rng = np.random.default_rng(0)
    expected = []
    for share in np.sqrt(1 - rng.uniform(size=20_000)):
        area = 1
        for size in (HEIGHT, WIDTH):
            length, center = int(size * share), rng.integers(size)
            area *= min(size, center + (length + 1) // 2) - max(0, center - length // 2)
        expected.append(area)
    assert scipy.stats.ks_2samp(cut.sum((1, 2)), [area for area in expected if area]).pvalue > 1e-4
    for of_image in cut:  # a box, and full
        rows, columns = np.nonzero(of_image)
        assert of_image.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert cut.any(0).all()  # wherever it may lie


@pytest.mark.parametrize("count", [16, 48, 6, 7])
def test_partners_come_in_pairs_and_are_not_repetitions(count):
    order = np.asarray(mix_with_partners(jnp.arange(count), jnp.zeros(count, int)))
    np.testing.assert_array_equal(order[order], np.arange(count))
    if count % 16 == 0:
        assert (np.abs(order - np.arange(count)) == 8).all()
        assert (order // 16 == np.arange(count) // 16).all()


@pytest.mark.parametrize("count", [32, 6])
def test_each_row_is_mixed_by_its_own_weight(count):
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(count, 4)).astype("f"), rng.uniform(size=(count, 1)).astype("f")
    order = np.arange(count) ^ 8 if count % 16 == 0 else np.arange(count)[::-1]
    # A sum of two products of numbers up to about 3.
    expected = weight * rows + (1 - weight) * rows[order]
    np.testing.assert_allclose(mix_with_partners(jnp.asarray(rows), jnp.asarray(weight)), expected, atol=1e-6)


def test_images_are_mixed_half_by_half_unless_a_group_may_be_on_several_devices(monkeypatch):
    rows = jnp.ones((16, 4))

    def text():
        return jax.jit(lambda rows: mix_with_partners(rows, jnp.full((1, 1), 0.3))).lower(rows).as_text()

    assert "stablehlo.reverse" not in text()
    two = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    monkeypatch.setattr("castling_jax.tasks.classification.mixing.mesh_in_use", lambda arrays: two)
    assert "stablehlo.reverse" in text()


def test_labels_are_smoothed_over_all_classes():
    expected = np.full((2, 4), 0.1 / 4)
    expected[[0, 1], [2, 0]] += 0.9
    np.testing.assert_allclose(soft_labels(jnp.array([2, 0]), 4, 0.1), expected, rtol=2e-7)


def test_without_mixing_labels_are_one_hot():
    result, targets = mix(jnp.asarray(IMAGES), LABELS, jax.random.key(0), **(MIX | {"mixup": 0.0, "cutmix": 0.0}))
    np.testing.assert_array_equal(result, IMAGES)
    np.testing.assert_array_equal(targets, np.eye(CLASSES))


def test_images_keep_their_dtype_and_targets_are_float32():
    batch = jax.ShapeDtypeStruct(IMAGES.shape, jnp.bfloat16)
    result, targets = jax.eval_shape(lambda images: mix(images, LABELS, jax.random.key(0), **MIX), batch)
    assert (result.dtype, result.shape) == (jnp.bfloat16, IMAGES.shape)
    assert (targets.dtype, targets.shape) == (jnp.float32, (CLASSES, CLASSES))


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rows_that_share_a_draw_are_mixed_as_a_whole_batch_is(seed):
    options = MIX | {"probability": 1.0}
    key = jax.random.key(seed)
    images, targets = jax.jit(lambda key: mix(jnp.asarray(IMAGES), LABELS, key, **options, mix_rows=2))(key)
    whole = jax.jit(lambda key: mix(jnp.asarray(IMAGES), LABELS, key, **options))
    draws = [whole(own) for own in jax.random.split(key, 3)]
    for ours, expected in zip((images, targets), zip(*draws, strict=True), strict=True):
        np.testing.assert_allclose(
            ours, np.concatenate([draw[2 * i : 2 * i + 2] for i, draw in enumerate(expected)]), rtol=0, atol=1e-6
        )
    assert len({float(targets[row, row]) for row in range(CLASSES)}) == 3  # a weight of its own for each two rows


@pytest.mark.parametrize("rows", [CLASSES, CLASSES + 5])
def test_one_draw_for_the_whole_batch_is_the_default(rows):
    given = jnp.asarray(IMAGES), LABELS, jax.random.key(3)
    for ours, expected in zip(mix(*given, **MIX, mix_rows=rows), mix(*given, **MIX), strict=True):
        np.testing.assert_array_equal(ours, expected)


ON_A_MESH = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from castling_jax.tasks.classification.mixing import mix

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
options = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "probability": 1.0, "num_classes": 10, "mix_rows": SHARE}
images = np.random.default_rng(0).normal(size=(ROWS, 16, 16, 3)).astype(np.float32)
given = images, np.arange(ROWS) % 10, jax.random.key(5)


def run(images, labels, key):
    return mix(images, labels, key, **options)


with jax.set_mesh(mesh):
    over_mesh = jax.jit(run, in_shardings=(split, split, None), out_shardings=split).lower(*given).compile()
text = over_mesh.as_text()
assert ("collective-permute" in text) == (ROWS < 8 * 16)
assert not any(kind in text for kind in ("all-gather", "all-to-all", "all-reduce"))
everywhere = NamedSharding(mesh, PartitionSpec())
placed = [jax.device_put(array, where) for array, where in zip(given, (split, split, everywhere))]
for ours, expected in zip(over_mesh(*placed), jax.jit(run)(*given), strict=True):
    np.testing.assert_array_equal(ours, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "share"), [(32, None), (256, None), (256, 64), (256, 16)])
def test_on_a_mesh_images_with_partners_elsewhere_are_exchanged_and_the_result_is_the_same(rows, share):
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, "-c", ON_A_MESH.replace("ROWS", str(rows)).replace("SHARE", str(share))],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
