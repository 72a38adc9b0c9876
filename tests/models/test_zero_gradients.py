"""A new model's gradients on images with nothing in them: its biases are zero, so q, k and v of black patches are too.

The gradients of every attention are compared with those of softmax attention on the same images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax.models.layers import Layers, stop_at_zero
from castling_jax.models.variables import forward_train
from tests.models import small

MODELS = {
    "deit": ("deit_micro", small.SIZES),
    "levit": ("levit_128s", small.LEVIT_SIZES),
    # Four stages of full width, each of which keeps some tokens zero.
    "mvitv2": ("mvitv2_tiny", {"depths": (1, 1, 1, 1), "num_classes": 7, "image_size": 32}),
}
KINDS = ["castling", "linear_angular", "angular"]
RIVALS = ["taylor", "linear_taylor", "relu_linear_taps", "focused_linear", "performer"]
# With an empty mask, castling attention in training form is linear-angular attention, in another program.
THRESHOLDS = {"castling": (0.02, 0.999), "taylor": (0.02,)}


def draw_images(size):
    """Four images of each kind, normalised: black is 0 where the mean is 0."""
    noise = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    half, corner, one = noise.copy(), np.zeros_like(noise), noise.copy()
    half[:, :, : size // 2] = 0
    corner[:, : size // 8, : size // 8] = noise[:, : size // 8, : size // 8]
    one[0] = 0
    return {
        "noise": noise,
        "black": np.zeros_like(noise),
        "constant": np.ones_like(noise),
        "of one colour each": np.ones_like(noise) * noise[:, :1, :1],
        "half black": half,
        "black but for a corner": corner,
        "one of four black": one,
    }


@functools.cache
def gradient_norms(family, attention, training):
    """The norm of all parameters' gradients, for each threshold and kind of images, in float64."""
    name, sizes = MODELS[family]
    model = castling_jax.create_model(name, attention=attention, **sizes)
    variables = castling_jax.get_variables(model)

    @jax.jit
    @jax.grad
    def gradients(params, images, threshold):
        bound = variables | {"params": params}
        if training:
            logits = forward_train(model, bound, images, mask_threshold=threshold, key=jax.random.key(0))[0][0]
        else:
            logits = castling_jax.apply(model, bound, images, mask_threshold=threshold)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))

    def norm(images, threshold):
        leaves = jax.tree.leaves(gradients(variables["params"], images, threshold))
        return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves))

    return {
        (kind, threshold): norm(images, threshold)
        for kind, images in draw_images(sizes["image_size"]).items()
        for threshold in THRESHOLDS.get(attention, (None,))
    }


# Evaluation differs from training in the batch norms, which LeViT alone has. The layers around the rivals' operations
# are those around ours, so that one family shows whether the operations bear zeros.
CASES = [*((family, kind, True) for family in MODELS for kind in KINDS), *(("levit", kind, False) for kind in KINDS)]
CASES += [("levit", kind, True) for kind in RIVALS]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "attention", "training"), CASES)
def test_gradients_are_of_softmaxs_size(family, attention, training):
    expected = gradient_norms(family, "softmax", training)
    for (kind, threshold), found in gradient_norms(family, attention, training).items():
        assert found <= 1e3 * expected[kind, None], (kind, threshold, found)  # false for NaN


def test_stop_at_zero_is_the_identity_elsewhere():
    x = jnp.asarray([[0.0, 0.0, 0.0], [1.0, -2.0, 0.0], [1e-30, 0.0, 0.0]])
    norm = Layers(dtype=jnp.dtype(jnp.float32), param_dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)).layer_norm(3)
    cotangent = jnp.asarray([[1.0, 2.0, 4.0]] * 3)
    out, pullback = jax.vjp(lambda x: norm(stop_at_zero(x)), x)
    expected, expected_pullback = jax.vjp(norm, x)
    np.testing.assert_array_equal(out, expected)
    gradient, expected_gradient = pullback(cotangent)[0], expected_pullback(cotangent)[0]
    assert not gradient[0].any()
    assert expected_gradient[0].any()
    np.testing.assert_array_equal(gradient[1:], expected_gradient[1:])
