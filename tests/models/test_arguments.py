"""Arguments of another kind: swapped, missing, empty; and models that hold no arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.convert.inference_folder import save_inference
from castling_jax.convert.torch import from_torch, to_torch
from castling_jax.models.registry import abstract_model
from tests.models import small

IMAGES = np.zeros((2, 8, 8, 3), np.float32)


@pytest.fixture(scope="module")
def model():
    return small.small_model(depth=1, attention="linear_angular")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, v: castling_jax.apply(v, m, IMAGES), "apply takes a model, as create_model makes it, as model, not"),
        (lambda m, v: castling_jax.apply(m, IMAGES, v), 'apply takes variables such as {"params": ...} as variables'),
        (lambda m, v: castling_jax.features(v, m, IMAGES), "features takes a model"),
        (lambda m, v: castling_jax.forward_train(v, m, IMAGES, key=jax.random.key(0)), "forward_train takes a model"),
        (lambda m, v: castling_jax.get_variables(v), "get_variables takes a model"),
        (lambda m, v: castling_jax.get_variables({}), "get_variables takes a model"),
        (lambda m, v: castling_jax.check_switch(v, m, IMAGES, 0.02), "check_switch takes a model"),
        (lambda m, v: from_torch({}, m), "from_torch takes a model"),
        (lambda m, v: to_torch(v, m), "to_torch takes a model"),
        (lambda m, v: save_inference("nowhere", v, m), "save_inference takes a model"),
    ],
)
def test_swapped_arguments_are_a_sentence(refuses, model, call, said):
    with refuses(said):
        call(model, castling_jax.get_variables(model))


@pytest.mark.parametrize("key", [None, 0, jnp.zeros(()), jax.random.split(jax.random.key(0))], ids=type)
def test_training_needs_one_key(refuses, model, key):
    with refuses("key must be one key, such as jax.random.key(0), not "):
        castling_jax.forward_train(model, castling_jax.get_variables(model), IMAGES, key=key)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_either_kind_train(model, make):
    def run(variables, key):
        return castling_jax.forward_train(model, variables, IMAGES, key=key)

    assert jax.eval_shape(run, castling_jax.get_variables(model), make(0))[0].shape == (1, 2, 7)


@pytest.mark.parametrize("missing", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["castling_attention", "linear_angular_attention", "masked_softmax_attention"])
def test_none_is_no_array(refuses, name, missing):
    arrays = dict.fromkeys("qkv", jnp.ones((1, 4, 2, 8))) | {missing: None}
    options = {} if name == "linear_angular_attention" else {"mask_threshold": 0.02}
    with refuses(f"{missing} must be an array, not NoneType."):
        getattr(castling_jax.ops, name)(*arrays.values(), **options)


def test_an_empty_batch_has_no_density():
    q = jnp.zeros((0, 4, 2, 8))
    out, density = castling_jax.ops.castling_attention(q, q, q, mask_threshold=0.02)
    assert (out.shape, float(density)) == ((0, 4, 2, 8), 0)


def test_a_model_of_shapes_says_how_it_computes(refuses):
    shapes = abstract_model("deit_micro", form="inference")
    with refuses("castling_jax.apply(model, variables, images)"):
        shapes(IMAGES)
    with refuses("castling_jax.apply(model, variables, images)"):
        shapes.features(IMAGES)


def test_features_are_public(model):
    (grid,) = castling_jax.features(model, small.random_variables(model), IMAGES)
    assert grid.shape == (2, 4, 4, 24)


def test_a_model_is_shown_in_one_line(model):
    assert repr(model) == (
        "DeiT('deit_micro', attention='linear_angular', form='train', num_classes=7, image_size=8, dtype='float32', "
        "param_dtype='float32', depth=1, drop_path_rate=0.0, embed_dim=24, num_heads=3, patch_size=2)"
    )
