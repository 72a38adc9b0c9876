import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.models import levit
from castling_jax.models.levit import bias_of_offsets, fit_bias_table, halved
from castling_jax.models.registry import abstract_model, create_model
from castling_jax.models.variables import bind, flatten, forward_train, get_variables
from tests.models import small
from tests.models.levit_reference import Reference, bias_of

VARIANTS = [
    ("castling", "2d"),
    ("softmax", "2d"),
    pytest.param("angular", "2d", marks=pytest.mark.slow),
    pytest.param("linear_angular", None, marks=pytest.mark.slow),
    pytest.param("castling", "1d", marks=pytest.mark.slow),
    *(pytest.param(kind, "2d", marks=pytest.mark.slow) for kind in (*small.LINEAR, "taylor")),
]
THRESHOLD = 0.035  # with 49 and 16 keys, where many weights are
PLAIN = {"num_heads": small.LEVIT_SIZES["num_heads"], "key_dim": 4, "side": 7}


@functools.cache
def compiled(model):
    return jax.jit(lambda v, x, t: castling_jax.apply(model, v, x, mask_threshold=t, return_densities=True))


def run(model, variables, images, threshold=None):
    return compiled(model)(variables, images, threshold)


def images_of(height=112, width=112, batch=2):
    return small.random_images(batch, height, width)


def reference_of(variables, attention, *, threshold=None, **arguments):
    threshold = threshold if attention in small.WITH_MASK else None
    return Reference(variables, attention=attention, threshold=threshold, **(PLAIN | arguments))


def assert_close(out, expected, rounding):
    np.testing.assert_allclose(out, expected, rtol=0, atol=rounding * np.max(np.abs(expected)))


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "token_conv"), VARIANTS)
def test_float32_agrees_with_the_float64_reference_on_odd_grids(attention, token_conv):
    model = small.small_levit(attention=attention, token_conv=token_conv, distilled=token_conv == "2d")
    variables, images = small.random_variables(model), images_of()
    threshold = 0.036 if attention == "taylor" else THRESHOLD  # which one of its weights is too near
    logits, densities = run(model, variables, images, threshold)
    chex.assert_type([logits, densities], jnp.float32)
    reference = reference_of(variables, attention, threshold=threshold, token_conv=token_conv)
    # Some 40 sums of 8 to 64 terms one after another, each off by a few roundings of 6e-8.
    assert_close(logits, reference(images), 1e-5)
    # No weight is so near the threshold that rounding decides.
    assert reference.margin > 1e-5
    np.testing.assert_allclose(densities, reference.densities, rtol=1e-6)
    if attention in small.WITH_MASK:
        assert np.all((densities > 0) & (densities < 1))


def test_bfloat16_agrees_within_its_rounding():
    model = small.small_levit(dtype="bfloat16")
    variables, images = small.random_variables(model), images_of()
    # No weight is under 1e-6, so that no rounding decides a mask.
    logits, densities = run(model, variables, images, 1e-6)
    chex.assert_type([logits, densities], jnp.float32)
    reference = reference_of(variables, "castling", threshold=1e-6)
    # About 60 arrays in a row are rounded to 2^-8 of their elements; independent errors grow with the square root.
    assert_close(logits, reference(images), 60**0.5 * 2**-8)
    np.testing.assert_allclose(densities, reference.densities, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("levit_small_cfg", "train"),
        pytest.param("levit_small_cfg", "inference", marks=pytest.mark.slow),
        pytest.param("levit_distilled_small_cfg", "train", marks=pytest.mark.slow),
        ("levit_distilled_small_cfg", "inference"),
    ],
)
def test_agrees_with_timm(golden, name, form):
    file = golden(name)
    meta = file.meta
    arguments = {word: meta[word] for word in ("embed_dim", "key_dim", "depth", "num_heads", "num_classes")}
    arguments |= {"image_size": meta["img_size"], "distilled": meta.get("distilled", False), "attention": "softmax"}
    model = abstract_model("levit_128s", **arguments)
    variables = castling_jax.convert.from_torch(model, file.group("weights"))
    if form == "inference":
        model, variables = abstract_model("levit_128s", form=form, **arguments), castling_jax.to_inference(variables)
    logits, _ = run(model, variables, jnp.asarray(file["input_nchw"].transpose(0, 2, 3, 1)))
    # Both sides are float32, each off by some roundings: under 1e-4 of logits up to 35.
    assert_close(logits, file["logits"], 2.5e-6)


def test_castling_at_threshold_one_is_its_inference_form():
    arguments = {"distilled": True}
    model = small.small_levit(**arguments)
    variables, images = small.random_variables(model), images_of()
    logits, densities = run(model, variables, images, 1.0)
    switched = run(small.small_levit(form="inference", **arguments), castling_jax.to_inference(variables), images)[0]
    # The same sums but for the folded scales: as above.
    assert_close(logits, switched, 1e-5)
    chex.assert_trees_all_equal(densities, jnp.zeros(3))
    # At a threshold that keeps weights the two are not the same.
    assert np.max(np.abs(run(model, variables, images, THRESHOLD)[0] - switched)) > 1e-2


def test_images_of_another_size_look_their_offsets_up_and_features_are_the_stages_tokens():
    # A grid of 9 x 3: farther down than the table has, and less far across.
    model = small.small_levit(distilled=True)
    variables, images = small.random_variables(model), images_of(144, 48)
    features = jax.jit(lambda v, x, t: bind(model, v).features(x, mask_threshold=t))(variables, images, THRESHOLD)
    reference = reference_of(variables, "castling", threshold=THRESHOLD)
    reference(images)
    assert reference.margin > 1e-5
    assert [feature.shape for feature in features] == [(2, 9, 3, 8), (2, 5, 2, 12)]
    for feature, expected in zip(features, reference.features, strict=True):
        assert_close(feature, expected, 1e-5)


def test_published_grids():
    model = abstract_model("levit_128s", attention="softmax")
    features = jax.eval_shape(
        lambda v, x: bind(model, v).features(x), get_variables(model), jnp.zeros((1, 224, 224, 3))
    )
    assert [feature.shape for feature in features] == [(1, 14, 14, 128), (1, 7, 7, 256), (1, 4, 4, 384)]


@pytest.mark.parametrize(("grid", "side"), [((7, 7), 7), ((4, 6), 5), ((3, 5), 2), ((1, 1), 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_are_those_of_every_pair(grid, side, stride):
    keys = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    queries = [key for key in keys if key[0] % stride == key[1] % stride == 0]
    table = np.random.default_rng(0).normal(size=(2, side * side)).astype(np.float32)
    bias = bias_of_offsets(table, grid, (side, side), stride=stride)
    np.testing.assert_array_equal(bias, bias_of(table, queries, keys, side))
    if stride == 2:
        assert len(queries) == math.prod(halved(grid))


@pytest.mark.parametrize(("grid", "side", "stride"), [((7, 7), 7, 1), ((4, 6), 5, 2), ((3, 5), 2, 1)])
def test_a_tpus_products_select_the_same_biases(monkeypatch, grid, side, stride):
    table = np.random.default_rng(0).normal(size=(2, side * side)).astype(np.float32)

    def bias_and_gradient():
        bias, pullback = jax.vjp(lambda table: bias_of_offsets(table, grid, (side, side), stride=stride), table)
        return bias, pullback(jnp.sin(jnp.arange(bias.size, dtype=jnp.float32)).reshape(bias.shape))[0]

    expected, expected_gradient = bias_and_gradient()
    monkeypatch.setattr(levit, "_look_up", levit._select)
    selected, gradient = bias_and_gradient()
    np.testing.assert_array_equal(selected, expected)
    # Sums of up to 49 numbers of at most 1, in another order.
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [3, 4, 6])
def test_a_table_of_another_size_gives_the_same_biases(side):
    table = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    fitted = fit_bias_table(table, (4, 4), (side, side))
    # On grids that neither reaches beyond; and beyond what the old table has, where the new one has it.
    for grid, stride in [((3, 3), 1), ((min(side, 4),) * 2, 1), ((side, side), 2)]:
        new, old = (bias_of_offsets(x, grid, (size, size), stride=stride) for x, size in ((fitted, side), (table, 4)))
        np.testing.assert_array_equal(new, old)


# Training


@functools.partial(jax.jit, static_argnums=0)
def train_once(model, variables, images):
    return forward_train(model, variables, images, mask_threshold=1e-6, key=jax.random.key(0))


def test_training_goes_by_the_batchs_statistics_and_updates_the_running_ones():
    model = small.small_levit(distilled=True)
    variables, images = small.random_variables(model), images_of(batch=3)
    reference = reference_of(variables, "castling", threshold=1e-6, training=True)

    before = jax.tree.map(np.array, variables)
    logits, densities, batch_stats = train_once(model, variables, images)
    logits = logits.mean(axis=0)
    chex.assert_trees_all_equal(variables, before)
    # The head's norm is over three samples: where they are alike it divides by little, and rounding grows.
    assert_close(logits, reference(images), 1e-4)
    np.testing.assert_allclose(densities, reference.densities, rtol=1e-6)
    new = flatten(batch_stats)
    assert new.keys() == reference.batch_stats.keys() == flatten(variables["batch_stats"]).keys()
    for path, leaf in new.items():
        assert_close(leaf, reference.batch_stats[path], 1e-5)


def test_training_leaves_the_model_alone():
    variables = small.random_variables(small.small_levit())
    model = bind(small.small_levit(), variables)
    # Traced, so that anything that batch norm wrote into the model would be a tracer.
    jax.eval_shape(functools.partial(train_once, model), variables, images_of())
    for path, leaf in flatten(get_variables(model)).items():
        assert leaf is flatten(variables)[path]


def test_a_model_without_batch_norm_has_no_statistics_to_update():
    model = small.small_model(depth=1)
    *_, batch_stats = jax.eval_shape(
        lambda v: forward_train(model, v, small.random_images(), mask_threshold=0.1, key=jax.random.key(0)),
        small.random_variables(model),
    )
    assert batch_stats == {}


def test_every_residual_branch_draws_its_own_drop_path_at_the_same_rate(monkeypatch):
    draws, rates = [], []

    def record(x, rate, drawn):
        draws.append(drawn[0])
        rates.append(rate)
        return x

    monkeypatch.setattr(levit, "drop_path", record)
    model = abstract_model("levit_128s", **(small.LEVIT_SIZES | {"drop_path_rate": 0.25, "depth": (2, 3)}))

    @jax.jit
    def draws_of(variables, images):
        forward_train(model, variables, images, mask_threshold=1.0, key=jax.random.key(0))
        return jnp.stack(draws)

    data = draws_of(small.random_variables(model), small.random_images(1, 16, 16)).tolist()
    # Two of a block, one of a subsampling layer.
    assert len(data) == len(set(data)) == 2 * 5 + 1
    assert set(rates) == {0.25}


def test_a_new_model_starts_as_published():
    @jax.jit
    def what_is_not_drawn():
        params = flatten(get_variables(create_model("levit_128s", **small.LEVIT_SIZES))["params"])
        return {path: leaf for path, leaf in params.items() if not path.endswith("/kernel")}

    for path, leaf in what_is_not_drawn().items():
        if path.endswith("/scale"):
            is_residual = path.endswith(("attn/proj/ln/bn/scale", "mlp/ln2/bn/scale"))
            chex.assert_trees_all_equal(leaf, jnp.full(leaf.shape, 0.0 if is_residual else 1.0))
        else:
            chex.assert_trees_all_equal(leaf, jnp.zeros(leaf.shape))


@pytest.mark.parametrize("attention", ["castling", "linear_angular", "softmax", "angular"])
def test_attention_biases_stand_where_they_are_used(attention):
    def biases(form):
        variables = get_variables(small.small_levit(attention=attention, form=form))
        return {path for path in flatten(variables) if path.endswith("attention_biases")}

    layers = [f"params/stages/{stage}/blocks/0/attn" for stage in range(2)]
    layers += ["params/stages/1/downsample/attn_downsample"]
    branch = {"castling": "/softmax_branch", "softmax": ""}.get(attention)
    expected = set() if branch is None else {f"{layer}{branch}/attention_biases" for layer in layers}
    assert biases("train") == expected
    assert biases("inference") == (expected if attention == "softmax" else set())


# Refusals


@pytest.mark.parametrize("size", [111, 8])
def test_an_image_that_is_no_multiple_of_the_stem(refuses, size):
    with refuses(f"{size} x {size} pixels", "multiple of the stem's stride", "16 pixels"):
        small.small_levit(image_size=size)


@pytest.mark.parametrize(("height", "width"), [(112, 113), (8, 112)])
def test_images_that_are_no_multiple_of_the_stem(refuses, height, width):
    model = small.small_levit()
    with refuses(f"{height} x {width} pixels", "16 pixels"):
        castling_jax.apply(model, small.random_variables(model), images_of(height, width), mask_threshold=0.1)


def test_images_of_other_channels(refuses):
    model = small.small_levit()
    with refuses("channels", "3", "1"):
        castling_jax.apply(model, small.random_variables(model), jnp.zeros((1, 112, 112, 1)), mask_threshold=0.1)


def test_castling_in_training_form_needs_a_threshold(refuses):
    model = small.small_levit()
    with refuses("mask_threshold", "at least 0"):
        castling_jax.apply(model, small.random_variables(model), images_of())


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"embed_dim": 128}, ["embed_dim must be a tuple", "128"]),
        ({"depth": (1, 0)}, ["depth", "at least 1", "(1, 0)"]),
        ({"num_heads": ()}, ["num_heads", "()"]),
        ({"num_heads": (1, 2, 3)}, ["as many stages", "2, 2, 3"]),
        ({"embed_dim": (12, 12)}, ["multiple of 8", "12"]),
        ({"key_dim": 9}, ["key_dim", "(8, 12)", "9"]),
        ({"key_dim": 0}, ["key_dim", "from 1 to", "0"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate must be a number in [0, 1)"]),
        ({"token_conv": "3d"}, ["token_conv", "'3d'", "2d"]),
        ({"token_kernel_size": 2}, ["token_kernel_size", "odd"]),
        ({"patch_size": 2}, ["levit_128s", "'patch_size'"]),
    ],
)
def test_sizes_that_do_not_fit(refuses, arguments, fragments):
    with refuses(*fragments):
        small.small_levit(**arguments)
