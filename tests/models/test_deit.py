import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.models import deit
from castling_jax.models.macs import count_macs
from castling_jax.models.variables import bind, flatten, forward_train, unflatten
from tests.models import small
from tests.models.test_position import resize_with_pillow

KINDS = ["castling", "linear_angular", "softmax", "angular", "softmax_taps", *small.LINEAR, "taylor"]
RIVALS = [*small.LINEAR, "taylor"]  # test_linear_kinds.py has them in bfloat16
VARIANTS = [
    (kind, conv)
    for kind in KINDS
    for conv in ("1d", "2d", None)
    # Some have no convolution, and the others' is the same code.
    if kind not in (*small.WITHOUT_TAPS, *RIVALS) or conv == "1d"
]
THRESHOLD = 0.06  # with 17 tokens, where many weights are


@functools.cache
def compiled(model):
    return jax.jit(lambda v, x, t: castling_jax.apply(model, v, x, mask_threshold=t, return_densities=True))


def run(model, variables, images, threshold=None):
    return compiled(model)(variables, images, threshold)


def expected(variables, images, attention, token_conv, threshold, num_heads=3):
    return small.forward(
        variables,
        images,
        num_heads=num_heads,
        patch_size=2,
        attention=attention,
        threshold=threshold if attention in small.WITH_MASK else None,
        token_conv=token_conv,
    )


@pytest.mark.parametrize(("attention", "token_conv"), VARIANTS)
def test_float32_agrees_with_the_float64_reference(attention, token_conv):
    depth = 2 if attention in small.WITH_MASK else 1
    model = small.small_model(attention=attention, token_conv=token_conv, distilled=token_conv == "2d", depth=depth)
    variables, images = small.random_variables(model), small.random_images()
    logits, densities = run(model, variables, images, THRESHOLD)
    chex.assert_type([logits, densities], jnp.float32)
    reference, reference_densities, margin = expected(variables, images, attention, token_conv, THRESHOLD)
    # No weight is so near the threshold that rounding decides.
    assert margin > 1e-5
    # Some 60 sums of 24 to 96 terms one after another, each off by a few roundings of 6e-8.
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.max(np.abs(reference)))
    np.testing.assert_allclose(densities, reference_densities, rtol=1e-6)
    if attention in small.WITH_MASK:
        assert np.all((reference_densities > 0) & (reference_densities < 1))
    else:
        chex.assert_trees_all_equal(densities, jnp.zeros(depth))


@pytest.mark.parametrize(
    ("attention", "token_conv"), [*((kind, "1d") for kind in KINDS if kind not in RIVALS), ("castling", "2d")]
)
def test_bfloat16_agrees_within_its_rounding(attention, token_conv):
    model = small.small_model(attention=attention, token_conv=token_conv, dtype="bfloat16", depth=1)
    variables, images = small.random_variables(model), small.random_images()
    # No weight is under 1e-6, so that no rounding decides a mask.
    logits, densities = run(model, variables, images, 1e-6)
    chex.assert_type([logits, densities], jnp.float32)
    reference, reference_densities, _ = expected(variables, images, attention, token_conv, 1e-6)
    # About 20 arrays in a row are rounded to 2^-8 of their elements; independent errors grow with the square root.
    np.testing.assert_allclose(logits, reference, rtol=0, atol=20**0.5 * 2**-8 * np.max(np.abs(reference)))
    np.testing.assert_allclose(densities, reference_densities, rtol=1e-6)


@pytest.mark.parametrize("name", ["deit_small_cfg", "deit_distilled_small_cfg"])
def test_agrees_with_timm(golden, name):
    file = golden(name)
    meta = file.meta
    model = small.abstract_model(
        "deit_tiny",
        attention="softmax",
        image_size=meta["img_size"],
        distilled=meta.get("distilled", False),
        **{word: meta[word] for word in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes")},
    )
    variables = castling_jax.convert.from_torch(model, file.group("weights"))
    images = jnp.asarray(file["input_nchw"].transpose(0, 2, 3, 1))
    logits, _ = run(model, variables, images)
    # Both sides are float32: each is off by some 1e-6.
    np.testing.assert_allclose(logits, file["logits"], rtol=0, atol=5e-6 * np.max(np.abs(file["logits"])))


def test_castling_at_threshold_one_is_linear_angular():
    castling, linear = (small.small_model(attention=kind) for kind in ("castling", "linear_angular"))
    variables, images = small.random_variables(castling), small.random_images()
    logits, densities = run(castling, variables, images, 1.0)
    # The same sums, which two programs may order differently.
    chex.assert_trees_all_close(logits, run(linear, variables, images)[0], rtol=0, atol=1e-5)
    chex.assert_trees_all_equal(densities, jnp.zeros(2))


@pytest.mark.parametrize(("height", "width", "distilled"), [(12, 12, False), (4, 10, True)])
def test_images_of_another_size_resize_the_position_embedding(height, width, distilled):
    model = small.small_model(token_conv="2d", distilled=distilled, depth=1)
    variables, images = small.random_variables(model), small.random_images(1, height, width)
    logits, _ = run(model, variables, images, 1e-9)
    prefix = 2 if distilled else 1
    resized = resize_with_pillow(variables["params"]["pos_embed"], (4, 4), (height // 2, width // 2), prefix)
    other = {"params": variables["params"] | {"pos_embed": resized}}
    reference, _, _ = expected(other, images, "castling", "2d", 1e-9)
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.max(np.abs(reference)))


def test_two_heads_of_a_distilled_model_are_averaged():
    model = small.small_model(distilled=True)
    variables, images = small.random_variables(model), small.random_images()
    params = variables["params"]
    both = run(model, variables, images, THRESHOLD)[0]
    doubled = [
        run(model, {"params": params | {silent: jax.tree.map(jnp.zeros_like, params[silent])}}, images, THRESHOLD)[0]
        for silent in ("head", "head_dist")
    ]
    chex.assert_trees_all_close(both, doubled[0] + doubled[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_features_are_the_normed_patches_on_their_grid(distilled):
    model = small.small_model(distilled=distilled, depth=1)
    variables, images = small.random_variables(model), small.random_images(2, 12, 8)
    (features,) = jax.jit(lambda v, x: bind(model, v).features(x, mask_threshold=1.0))(variables, images)
    assert features.shape == (2, 6, 4, 24)
    # Each patch's own, in the order of rows: the mean and deviation of a norm with scale one and bias zero.
    norm = variables["params"]["norm"]
    normed = (features - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(jnp.mean(normed, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(normed, -1), 1, rtol=1e-4)
    # A patch of the image that is changed changes its own token most.
    (other,) = jax.jit(lambda v, x: bind(model, v).features(x, mask_threshold=1.0))(
        variables, images.at[0, 8:10, 2:4].add(10.0)
    )
    change = jnp.linalg.norm(other - features, axis=-1)
    assert np.unravel_index(jnp.argmax(change), change.shape) == (0, 4, 1)


def test_drop_path_follows_its_key_and_evaluation_is_deterministic():
    model = small.small_model(drop_path_rate=0.5)
    variables, images = small.random_variables(model), small.random_images(8)

    @jax.jit
    def train(key):
        return forward_train(model, variables, images, mask_threshold=THRESHOLD, key=key)[0][0]

    first, again, other = train(jax.random.key(0)), train(jax.random.key(0)), train(jax.random.key(1))
    chex.assert_trees_all_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3
    evaluated = run(model, variables, images, THRESHOLD)[0]
    chex.assert_trees_all_equal(evaluated, run(model, variables, images, THRESHOLD)[0])
    # Evaluation knows no drop-path: it is the model without it.
    without = run(small.small_model(), variables, images, THRESHOLD)[0]
    chex.assert_trees_all_equal(evaluated, without)


def test_every_residual_branch_draws_its_own_drop_path(monkeypatch):
    draws = []

    def record(x, rate, drawn):
        draws.append(drawn.item())
        return x

    monkeypatch.setattr(deit, "drop_path", record)
    model = small.small_model(attention="softmax", depth=3)
    forward_train(model, small.random_variables(model), small.random_images(1), key=jax.random.key(0))
    assert len(draws) == len(set(draws)) == 6


def test_drop_path_grows_linearly_over_depth():
    model = small.small_model(depth=5, drop_path_rate=0.2)
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert small.small_model(depth=1, drop_path_rate=0.2).blocks[0].drop_path_rate == 0


def test_gradients_reach_every_parameter():
    model = small.small_model(distilled=True, depth=1)
    variables, images = small.random_variables(model), small.random_images()
    loss = jax.jit(
        jax.grad(lambda v: jnp.sum(jnp.square(castling_jax.apply(model, v, images, mask_threshold=THRESHOLD))))
    )
    gradients = loss(variables)
    chex.assert_trees_all_equal_structs(gradients, variables)
    chex.assert_tree_all_finite(gradients)
    assert all(jnp.any(gradient != 0) for gradient in jax.tree.leaves(gradients))


def test_black_images_have_finite_gradients():
    # Without biases and embeddings every query, key and value of the first layer is a zero vector.
    model = small.small_model(depth=1, qkv_bias=False)
    leaves = flatten(small.random_variables(model)["params"])
    silent = ("cls_token", "pos_embed", "patch_embed/proj/bias", "blocks/0/norm1/bias")
    params = unflatten({path: leaf * (path not in silent) for path, leaf in leaves.items()})

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.sum(castling_jax.apply(model, {"params": params}, jnp.zeros((1, 8, 8, 3)), mask_threshold=0.02))

    chex.assert_tree_all_finite(loss(params))


# Refusals


@pytest.mark.parametrize("size", [7, 1])
def test_an_image_that_is_no_multiple_of_the_patch(refuses, size):
    with refuses(f"{size} x {size} pixels", "multiple of the patch", "2 pixels"):
        small.small_model(image_size=size)


@pytest.mark.parametrize(("height", "width"), [(8, 9), (1, 8), (0, 8)])
def test_images_that_are_no_multiple_of_the_patch(refuses, height, width):
    model = small.small_model()
    with refuses(f"{height} x {width} pixels", "multiple of the patch", "2 pixels"):
        castling_jax.apply(model, small.random_variables(model), jnp.zeros((1, height, width, 3)), mask_threshold=0.1)


def test_images_of_other_channels(refuses):
    model = small.small_model()
    with refuses("channels", "3", "1"):
        castling_jax.apply(model, small.random_variables(model), jnp.zeros((1, 8, 8, 1)), mask_threshold=0.1)


@pytest.mark.parametrize("patch_size", [0, -2])
def test_a_patch_of_no_pixels(refuses, patch_size):
    with refuses("patch", str(patch_size)):
        small.small_model(patch_size=patch_size)


@pytest.mark.parametrize("depth", [0, -1])
def test_a_model_without_blocks(refuses, depth):
    with refuses("depth", str(depth)):
        small.small_model(depth=depth)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_rate_that_is_no_share(refuses, rate):
    with refuses("drop_path_rate must be a number in [0, 1)", str(rate)):
        small.small_model(drop_path_rate=rate)


@pytest.mark.parametrize("distilled", [False, True])
def test_pooled_queries_keys_and_values_agree_with_the_float64_reference(distilled):
    model = small.small_model(qkv_pool="3x3", distilled=distilled, depth=1)
    variables, images = small.random_variables(model), small.random_images()
    logits, _ = run(model, variables, images, THRESHOLD)
    reference, _, margin = expected(variables, images, "castling", "1d", THRESHOLD)
    assert margin > 1e-5
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-5 * np.max(np.abs(reference)))


def test_pools_start_at_zero_and_stay_at_the_switch():
    plain, pooled = small.small_model(), small.small_model(qkv_pool="3x3")
    variables, images = small.random_variables(plain), small.random_images()
    started = castling_jax.convert.from_torch(pooled, castling_jax.convert.to_torch(plain, variables))
    # The same float32 numbers, with zeros added.
    np.testing.assert_array_equal(run(pooled, started, images, 0.1)[0], run(plain, variables, images, 0.1)[0])
    new = castling_jax.get_variables(castling_jax.create_model("deit_micro", qkv_pool="3x3", depth=1))
    assert all(not np.any(leaf) for path, leaf in flatten(new).items() if "pool_" in path)
    variables = small.random_variables(pooled)
    state_dict = castling_jax.convert.to_torch(pooled, variables)
    chex.assert_trees_all_equal(castling_jax.convert.from_torch(pooled, state_dict), variables)
    chex.assert_trees_all_equal(castling_jax.to_inference(variables), variables)


def test_pools_cost_27_macs_a_patch_channel_and_layer():
    macs = [count_macs(small.small_model(qkv_pool=pool, form="inference")) for pool in (None, "3x3")]
    assert macs[1] - macs[0] == 27 * 16 * 24 * 2  # patches, width, layers


def test_pools_are_of_multi_head_attention(refuses):
    with refuses("qkv_pool is for multi-head attention, which attention='window' is not"):
        small.small_model(qkv_pool="3x3", attention="window")
    with refuses("unknown qkv_pool '5x5'"):
        small.small_model(qkv_pool="5x5")
    with refuses("qkv_pool"):
        castling_jax.create_model("levit_128s", qkv_pool="3x3")


@pytest.mark.parametrize("name", ["deit_tiny", "mvitv2_tiny"])
def test_patches_start_with_pytorchs_bias(name):
    arguments = {"depth": 1} if name == "deit_tiny" else {"depths": (1,)}
    proj = castling_jax.get_variables(castling_jax.create_model(name, **arguments))["params"]["patch_embed"]["proj"]
    limit = 1 / math.sqrt(np.prod(proj["kernel"].shape[:3]))
    # Uniform from -limit to limit, over 192 or 96 numbers: within four standard errors of limit / sqrt(3).
    assert np.max(np.abs(proj["bias"])) <= limit
    assert np.std(proj["bias"]) == pytest.approx(limit / math.sqrt(3), rel=0.2)
