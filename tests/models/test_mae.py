"""The masked autoencoder against transformers' golden file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.convert.inference import check_switch
from castling_jax.convert.torch import from_torch
from castling_jax.models.attention.core import Places, _convolve
from castling_jax.models.mae import image_of
from castling_jax.models.position import sincos_position_embedding
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import apply, bind, flatten, forward_train, get_variables
from castling_jax.tasks.reconstruction.losses import paste, reconstruction_loss
from tests.models.small import random_variables

# The file's names in memory, and those of the weights on Hugging Face's hub, which `from_torch` knows.
HUB_NAMES = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hub_name(name):
    for part, replacement in HUB_NAMES.items():
        name = name.replace(part, replacement)
    return name


def small_mae(attention="softmax", **arguments):
    backbone = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 6, "mlp_ratio": 2.0}
    sizes = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}
    return abstract_model(
        "mae",
        attention=attention,
        image_size=30,
        backbone="deit_tiny",
        backbone_arguments=backbone | arguments.pop("backbone_arguments", {}),
        **sizes | arguments,
    )


@pytest.fixture
def case(golden):
    """(file, model, its variables, images)."""
    file = golden("dense/mae")
    model = small_mae()
    weights = {hub_name(name): array for name, array in file.group("weights").items()}
    return file, model, from_torch(model, weights), jnp.asarray(file["images"].transpose(0, 2, 3, 1))


def outputs_of(model, variables, images, noise):
    bound = bind(model, variables)
    tokens, _ = bound.backbone.embed(images)
    return bound.reconstruct(tokens, noise)[0]


def test_golden_reconstruction(case):
    file, model, variables, images = case
    outputs = jax.jit(functools.partial(outputs_of, model))(variables, images, file["noise"])
    np.testing.assert_array_equal(outputs["mask"], file["mask"])
    np.testing.assert_allclose(outputs["reconstruction"], file["prediction"], rtol=0, atol=1e-5)
    for normalized, name in ((False, "plain"), (True, "pasted")):
        patches = paste(outputs["reconstruction"], outputs["mask"], images, patch_size=6, normalized=normalized)
        if name == "plain":  # the file's plain reconstruction has no visible patches pasted
            patches = outputs["reconstruction"]
        expected = file[f"reconstruction/{name}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(image_of(patches, 6, (5, 5)), expected, rtol=0, atol=1e-5)


def test_golden_encoder(case):
    """The file's tokens are in the order of the draw, and ours in raster order."""
    file, model, variables, images = case
    kept = np.sort(file["ids_keep"])

    @jax.jit
    def encoded(variables, images):
        backbone = bind(model, variables).backbone
        tokens, grid = backbone.embed(images)
        seen = jnp.concatenate([tokens[:, :1], jnp.take_along_axis(tokens[:, 1:], kept[:, :, None], axis=1)], axis=1)
        return backbone.transform(seen, Places(grid, 1, kept), None, None)[0]

    order = np.pad(np.argsort(file["ids_keep"]) + 1, ((0, 0), (1, 0)))
    expected = np.take_along_axis(file["encoder"], order[:, :, None], axis=1)
    np.testing.assert_allclose(encoded(variables, images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_golden_loss_and_gradients(case, normalize):
    file, model, variables, images = case
    name = "normalised" if normalize else "plain"

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        outputs = outputs_of(model, variables, images, file["noise"])
        return reconstruction_loss(**outputs, images=images, patch_size=6, normalize=normalize).mean()

    value, gradients = loss(variables)
    np.testing.assert_allclose(value, file[f"loss/{name}"], rtol=1e-5)
    flat = flatten(gradients["params"])
    ours = {
        "vit.embeddings.cls_token": flat["backbone/cls_token"],
        "vit.embeddings.patch_embeddings.projection.weight": flat["backbone/patch_embed/proj/kernel"].transpose(
            3, 2, 0, 1
        ),
        "vit.layers.0.layernorm_before.weight": flat["backbone/blocks/0/norm1/scale"],
        "decoder.mask_token": flat["mask_token"],
        "decoder.decoder_pred.bias": flat["decoder_pred/bias"],
    }
    expected = file.group(f"grad/{name}")
    assert ours.keys() == expected.keys()
    for array, gradient in ours.items():
        np.testing.assert_allclose(
            gradient, expected[array], rtol=0, atol=1e-4 * np.abs(expected[array]).max(), err_msg=array
        )
    # The positions of both parts are fixed.
    assert not flat["backbone/pos_embed"].any() and not flat["decoder_pos_embed"].any()


def test_fixed_positions_are_the_authors(case):
    file, *_ = case
    for dim, name in ((32, "vit.embeddings.position_embeddings"), (24, "decoder.decoder_pos_embed")):
        expected = file[f"weights/{name}"]
        np.testing.assert_allclose(sincos_position_embedding((5, 5), dim, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("token_conv", ["1d", "2d"])
def test_the_two_forms_agree_once_the_mask_is_empty(token_conv):
    model = small_mae("castling", backbone_arguments={"token_conv": token_conv})
    variables = random_variables(model)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 30, 3)), jnp.float32)
    report = check_switch(model, variables, images, 0.02)
    assert report["max_difference_at_one"] <= 1e-5 < report["max_difference"]


def test_taps_over_the_grid_read_the_patches_own_neighbours():
    """Against a convolution of the whole grid in which hidden patches are zero, position by position."""
    rng = np.random.default_rng(0)
    grid, prefix = (4, 5), 1
    kept = np.stack([np.sort(rng.permutation(20)[:7]) for _ in range(2)])
    v = rng.normal(size=(2, prefix + 7, 3, 2)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3)).astype(np.float32)
    actual = _convolve(jnp.asarray(v), jnp.asarray(kernel), jnp.asarray(kept), grid=grid, prefix_tokens=prefix)
    expected = np.zeros(v.shape)
    for image, places in enumerate(kept):
        at = {divmod(int(place), grid[1]): prefix + number for number, place in enumerate(places)}
        for (row, column), token in at.items():
            for i in range(3):
                for j in range(3):
                    neighbour = at.get((row + i - 1, column + j - 1))
                    if neighbour is not None:
                        expected[image, token] += kernel[i, j][:, None] * v[image, neighbour]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_step_draws_its_mask_from_its_key():
    model = small_mae("castling")
    variables = random_variables(model)
    images = jnp.ones((3, 30, 30, 3))
    keys = jax.random.split(jax.random.key(5), 2)
    masks = [forward_train(model, variables, images, mask_threshold=1.0, key=key)[0]["mask"] for key in keys]
    assert (masks[0] != masks[1]).any() and (masks[0][0] != masks[0][1]).any()
    for mask in masks:
        np.testing.assert_array_equal(mask.sum(axis=1), 19)  # of 25 patches 6 are visible: int(0.25 * 25)
    fixed = [apply(model, variables, images, mask_threshold=1.0)["mask"] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)
    other = apply(model, variables, images, mask_threshold=1.0, key=keys[0])["mask"]
    assert (other != fixed[0]).any()


@pytest.mark.slow
def test_an_evaluations_masks_do_not_depend_on_the_size_of_its_batches():
    """Two batches of 16 images, and one of 32."""
    model = small_mae("castling")
    variables = random_variables(model)
    images = jax.random.normal(jax.random.key(0), (32, 30, 30, 3))
    small, large = (apply(model, variables, images[:count], mask_threshold=1.0)["mask"] for count in (16, 32))
    np.testing.assert_array_equal(np.concatenate([small, small]), large)
    assert len({row.tobytes() for row in np.asarray(small)}) == 16
    keyed = apply(model, variables, images, mask_threshold=1.0, key=jax.random.key(1))["mask"]
    assert len({row.tobytes() for row in np.asarray(keyed)}) == 32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"backbone": "levit_128s"}, "needs a plain transformer such as deit_base, not levit_128s"),
        ({"backbone": "deit_tiny", "attention": "window"}, "needs all patches"),
        ({"backbone": "deit_tiny", "backbone_arguments": {"qkv_pool": "3x3"}}, "such as castling, and no qkv_pool."),
        ({"backbone": "deit_tiny", "backbone_arguments": {"global_pool": "avg"}}, "global_pool = 'avg' leaves out"),
        ({"mask_ratio": 0.0}, "shows 196 of 196 patches: at least one must be visible and one hidden."),
        ({"mask_ratio": 0.999}, "mask_ratio = 0.999 shows 0 of 196 patches"),
        ({"decoder_num_heads": 5}, "a masked autoencoder's decoder: 5 heads do not divide the width 512."),
        (
            {"decoder_embed_dim": 18, "decoder_num_heads": 3},
            "a masked autoencoder's decoder: sine-cosine positions need a multiple of 4 channels, not 18",
        ),
    ],
)
def test_what_a_masked_autoencoder_refuses(refuses, arguments, sentence):
    with refuses(sentence):
        abstract_model("mae", **arguments)


def test_a_classifier_has_no_key(refuses):
    model = abstract_model("deit_micro")
    with refuses("key is for masked autoencoders"):
        apply(model, get_variables(model), jnp.ones((1, 8, 8, 3)), mask_threshold=1.0, key=jax.random.key(0))


def test_a_number_is_no_key(refuses):
    model = small_mae("castling")
    with refuses("key must be one key, such as jax.random.key(0), not 7."):
        apply(model, get_variables(model), jnp.ones((1, 30, 30, 3)), mask_threshold=1.0, key=7)
