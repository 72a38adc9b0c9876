import functools
import inspect
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax.models.macs import count_macs
from castling_jax.models.registry import MODELS, abstract_model
from castling_jax.models.variables import bind, count_parameters, flatten, get_variables
from tests.models import small

# Softmax baselines with 1000 classes. DeiT's are published. So are LeViT's with two heads (DISTILLED), the second of
# which is a batch norm, two numbers a channel, and a matrix with its bias. deit_micro's is 64 wide, 4 deep, on 4 x 4
# patches of 12 numbers: 64 * 13 + 64 + 17 * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 2 * 64 + 65 * 1000.
PARAMETERS = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_micro": 267_048,
    "levit_128s": 7_777_058 - (1002 * 384 + 1000),
    "levit_128": 9_213_936 - (1002 * 384 + 1000),
    "levit_192": 10_947_069 - (1002 * 384 + 1000),
    "levit_256": 18_893_876 - (1002 * 512 + 1000),
    "levit_384": 39_128_836 - (1002 * 768 + 1000),
    "mvitv2_tiny": 24_173_320,
    "mvitv2_small": 34_870_216,
    "mvitv2_base": 51_472_744,
}
DISTILLED = {
    "deit_tiny": 5_910_800,
    "deit_small": 22_436_432,
    "deit_base": 87_338_192,
    "levit_128s": 7_777_058,
    "levit_128": 9_213_936,
    "levit_192": 10_947_069,
    "levit_256": 18_893_876,
    "levit_384": 39_128_836,
}
TAPS = {
    "deit_tiny": 12 * 3 * 9,
    "deit_small": 12 * 6 * 9,
    "deit_base": 12 * 12 * 9,
    "deit_micro": 4 * 2 * 9,
    # Depth times heads of each stage, and the heads of the subsampling attentions between them.
    "levit_128s": 9 * (2 * 4 + 8 + 3 * 6 + 16 + 4 * 8),
    "levit_128": 9 * (4 * 4 + 8 + 4 * 8 + 16 + 4 * 12),
    "levit_192": 9 * (4 * 3 + 6 + 4 * 5 + 9 + 4 * 6),
    "levit_256": 9 * (4 * 4 + 8 + 4 * 6 + 12 + 4 * 8),
    "levit_384": 9 * (4 * 6 + 12 + 4 * 9 + 16 + 4 * 12),
    # Depth times heads of each stage.
    "mvitv2_tiny": 9 * (1 + 2 * 2 + 5 * 4 + 2 * 8),
    "mvitv2_small": 9 * (1 + 2 * 2 + 11 * 4 + 2 * 8),
    "mvitv2_base": 9 * (2 + 3 * 2 + 16 * 4 + 3 * 8),
}


def count(name, **arguments):
    return count_parameters(get_variables(abstract_model(name, **arguments)))


def test_every_variant_has_a_pin():
    assert MODELS.keys() == PARAMETERS.keys() == TAPS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_softmax_parameters_are_the_published_ones(name):
    assert count(name, attention="softmax") == PARAMETERS[name]


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_parameters_are_the_published_ones(name):
    assert count(name, attention="softmax", distilled=True) == DISTILLED[name]


@pytest.mark.parametrize(("name", "form"), [*((name, "train") for name in MODELS), ("deit_micro", "inference")])
def test_castling_adds_nine_taps_a_head_and_layer(name, form):
    assert count(name, form=form) == PARAMETERS[name] + TAPS[name]


def test_castlings_inference_form_has_no_relative_positions():
    # Queries' or keys' side, the longer one: 56, then 28, one block that halves it and blocks that keep it.
    tables = 2 * 96 * sum(2 * side - 1 for side in (56, 28, 28, 28, 14, 14, 14, 14, 14, 7))
    expected = PARAMETERS["mvitv2_tiny"] + TAPS["mvitv2_tiny"] - tables
    assert count("mvitv2_tiny", form="inference") == expected


@pytest.mark.parametrize("attention", ["linear_angular", "angular"])
@pytest.mark.parametrize(("token_conv", "share"), [("1d", 1), ("2d", 1), (None, 0)])
def test_the_other_kinds_add_the_same_taps(attention, token_conv, share):
    # 3 x 3 taps are nine too.
    expected = PARAMETERS["deit_micro"] + share * TAPS["deit_micro"]
    assert count("deit_micro", attention=attention, token_conv=token_conv) == expected


@pytest.mark.parametrize(
    ("overrides", "path", "shape"),
    [
        ({"num_classes": 11}, "params/head/kernel", (24, 11)),
        ({"image_size": 12}, "params/pos_embed", (1, 37, 24)),
        ({"patch_size": 4}, "params/patch_embed/proj/kernel", (4, 4, 3, 24)),
        ({"in_chans": 1}, "params/patch_embed/proj/kernel", (2, 2, 1, 24)),
        ({"embed_dim": 48}, "params/blocks/1/attn/qkv/kernel", (48, 144)),
        ({"depth": 3}, "params/blocks/2/norm1/scale", (24,)),
        ({"num_heads": 4}, "params/blocks/0/attn/token_kernel", (9, 4)),
        ({"mlp_ratio": 2.5}, "params/blocks/0/mlp/fc1/kernel", (24, 60)),
        ({"distilled": True}, "params/head_dist/bias", (7,)),
        ({"token_kernel_size": 7}, "params/blocks/0/attn/token_kernel", (7, 3)),
    ],
)
def test_overrides_take_effect(overrides, path, shape):
    assert flatten(get_variables(small.small_model(**overrides)))[path].shape == shape


def test_qkv_bias_can_be_left_out():
    assert "params/blocks/0/attn/qkv/bias" in flatten(get_variables(small.small_model()))
    assert "params/blocks/0/attn/qkv/bias" not in flatten(get_variables(small.small_model(qkv_bias=False)))


def test_without_rngs_a_model_is_that_of_seed_zero():
    default = castling_jax.create_model("deit_micro", **small.SIZES)
    chex.assert_trees_all_equal(
        get_variables(default), get_variables(castling_jax.create_model("deit_micro", rngs=nnx.Rngs(0), **small.SIZES))
    )
    other = castling_jax.create_model("deit_micro", rngs=nnx.Rngs(1), **small.SIZES)
    kernels = [get_variables(model)["params"]["head"]["kernel"] for model in (default, other)]
    assert jnp.any(kernels[0] != kernels[1])


def test_param_dtype_is_what_parameters_are_held_in():
    leaves = jax.tree.leaves(get_variables(small.small_model(param_dtype=jnp.bfloat16, distilled=True)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_an_abstract_model_has_the_shapes_of_a_real_one():
    real = get_variables(castling_jax.create_model("deit_micro", **small.SIZES))
    abstract = get_variables(small.small_model())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    chex.assert_trees_all_equal_shapes_and_dtypes(real, abstract)


def test_the_spec_makes_the_model_again_through_json():
    model = small.small_model(distilled=True, token_conv="2d", dtype=jnp.bfloat16)
    arguments = json.loads(json.dumps(model.spec.arguments()))
    again = abstract_model(**arguments)
    assert again.spec == model.spec
    assert hash(again.spec) == hash(model.spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(get_variables(again), get_variables(model))
    assert model.spec.arguments(form="inference")["form"] == "inference"
    assert model.spec.form == "train"


@pytest.mark.parametrize(
    ("name", "size", "path", "shape"),
    [
        ("deit_tiny", (224, 160), "params/pos_embed", (1, 1 + 14 * 10, 192)),
        ("levit_128s", (224, 160), "params/stages/0/blocks/0/attn/softmax_branch/attention_biases", (4, 14 * 10)),
        ("mvitv2_tiny", (224, 160), "params/stages/3/blocks/1/attn/softmax_branch/rel_pos_w", (2 * 5 - 1, 96)),
    ],
)
def test_an_image_need_not_be_square(name, size, path, shape):
    model = abstract_model(name, image_size=size)
    assert flatten(get_variables(model))[path].shape == shape
    assert model.spec.image_size == size
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    run = jax.eval_shape(lambda v, x: castling_jax.apply(model, v, x, mask_threshold=0.1), get_variables(model), images)
    assert run.shape == (2, 1000)


def test_a_square_has_one_name():
    assert abstract_model("deit_micro", image_size=(12, 12)).spec == abstract_model("deit_micro", image_size=12).spec


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_micro", "levit_128s", "mvitv2_tiny"])
def test_feature_maps_are_known_before_they_are_computed(name):
    sizes = {"deit_micro": small.small_model, "levit_128s": small.small_levit, "mvitv2_tiny": small.small_mvit}
    model = sizes[name](image_size=(64, 96))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)

    def run(variables, images, **arguments):
        return bind(model, variables).feature_maps(images, mask_threshold=0.1, **arguments)

    for arguments in ({}, {"key": jax.random.key(0)}):
        maps, densities = jax.eval_shape(functools.partial(run, **arguments), get_variables(model), images)
        expected = [
            (2, 64 // stride, 96 // stride, channels)
            for stride, channels in zip(model.feature_strides, model.feature_channels, strict=True)
        ]
        assert [x.shape for x in maps] == expected
        assert densities.shape == ({"deit_micro": 2, "levit_128s": 3, "mvitv2_tiny": 4}[name],)
    assert model.feature_strides == {"deit_micro": (2,), "levit_128s": (8, 16, 32), "mvitv2_tiny": (4, 8, 16)}[name]


# Refusals


def test_an_unknown_model(refuses):
    with refuses("model 'deit_tyny'", "did you mean 'deit_tiny'"):
        castling_jax.create_model("deit_tyny")


@pytest.mark.parametrize(("word", "nearest"), [("embed_dims", "embed_dim"), ("heads", "num_heads"), ("stride_q", "")])
def test_an_unknown_override(refuses, word, nearest):
    with refuses("deit_micro", repr(word), nearest):
        castling_jax.create_model("deit_micro", **{word: 2})


@pytest.mark.parametrize("num_classes", [0, -1])
def test_a_model_without_classes(refuses, num_classes):
    with refuses("num_classes", "from 1 to", str(num_classes)):
        small.small_model(num_classes=num_classes)


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
def test_an_unknown_dtype(refuses, argument):
    with refuses(argument, "'float33'", "float32"):
        small.small_model(**{argument: "float33"})


def test_an_unknown_implementation(refuses):
    with refuses("implementation 'palas'", "did you mean 'pallas'"):
        castling_jax.create_model("deit_tiny", implementation="palas")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("deit_micro", {"image_size": (8, 8, 8)}, "to 16777216, or such a height and width, not (8, 8, 8)."),
        ("deit_micro", {"image_size": (8, 0)}, "to 16777216, or such a height and width, not (8, 0)."),
        ("deit_micro", {"image_size": 8.0}, "to 16777216, or such a height and width, not 8.0."),
        ("deit_micro", {"depth": (1, 2)}, "depth must be an integer from 1 to 16777216, not (1, 2)."),
        ("deit_micro", {"num_heads": 2.0}, "num_heads must be an integer from 1 to 16777216, not 2.0."),
        ("deit_micro", {"num_heads": 0}, "num_heads must be an integer from 1 to 16777216, not 0."),
        ("deit_micro", {"num_heads": -3}, "num_heads must be an integer from 1 to 16777216, not -3."),
        ("deit_micro", {"image_size": 0}, "to 16777216, or such a height and width, not 0."),
        ("levit_128s", {"image_size": 0}, "to 16777216, or such a height and width, not 0."),
        ("deit_micro", {"token_kernel_size": 0}, "token_kernel_size must be an integer from 1 to 16777216, not 0."),
        ("deit_micro", {"token_kernel_size": -1}, "token_kernel_size must be an integer from 1 to 16777216, not -1."),
        ("deit_micro", {"num_classes": "10"}, "num_classes must be an integer from 1 to 16777216, not '10'."),
        ("deit_micro", {"in_chans": 0}, "in_chans must be an integer from 1 to 16777216, not 0."),
        ("deit_micro", {"mlp_ratio": -1}, "mlp_ratio must be a number in (0, 16777216], not -1."),
        ("deit_micro", {"mlp_ratio": float("inf")}, "mlp_ratio must be a number in (0, 16777216], not inf."),
        ("deit_micro", {"mlp_ratio": float("nan")}, "mlp_ratio must be a number in (0, 16777216], not nan."),
        ("levit_128s", {"mlp_ratio": 0.001}, "an mlp_ratio of 0.001 leaves none of 128 channels"),
        ("deit_micro", {"drop_path_rate": None}, "drop_path_rate must be a number in [0, 1), not None."),
        ("deit_micro", {"distilled": "no"}, "distilled must be True or False, not 'no'."),
        ("deit_micro", {"token_kernel_size": 3.0}, "token_kernel_size must be an integer from 1 to 16777216, not 3.0."),
        ("levit_128s", {"embed_dim": (128.0, 256.0, 384.0)}, "embed_dim must be integers up to 16777216, at most 256"),
        ("levit_128s", {"depth": ((1,), 2, 3)}, "depth must be a tuple of an integer of at least 1 for each stage"),
        ("mvitv2_tiny", {"depths": ((1,), 2, 5, 2)}, "depths must be a tuple of an integer of at least 1"),
        ("deit_micro", {"rngs": nnx.Rngs(dropout=3)}, "rngs must have a stream for params, as nnx.Rngs(0) does."),
    ],
)
def test_an_argument_of_another_type_or_too_small(refuses, name, arguments, said):
    with refuses(said):
        abstract_model(name, **arguments)  # create_model, with nothing drawn before it refuses


def test_numpys_integers_are_integers():
    model = abstract_model("levit_128s", image_size=32, embed_dim=tuple(np.array([16, 24, 32])), key_dim=8)
    assert dict(model.spec.overrides)["embed_dim"] == (16, 24, 32)
    model = small.small_model(num_classes=np.int64(3), drop_path_rate=np.float32(0.5), distilled=np.True_)
    assert model.spec.num_classes == 3
    json.dumps(model.spec.arguments())


def test_a_key_in_the_place_of_rngs(refuses):
    unchecked = inspect.unwrap(castling_jax.create_model)  # the tests' own check of types would come before
    with refuses("rngs must be nnx.Rngs, such as nnx.Rngs(0), not PRNGKeyArray"):
        unchecked("deit_micro", rngs=jax.random.key(0))


def test_images_of_one_channel_are_counted():
    three, one = (count_macs(abstract_model("deit_micro", in_chans=channels)) for channels in (3, 1))
    assert three - one == 16 * 64 * 2 * 2 * 2  # two channels less, of 16 patches of 2 x 2 pixels
