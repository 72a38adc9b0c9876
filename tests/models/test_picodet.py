"""PicoDet against PaddleDetection's golden files and published sizes, on backbones of every family, and switched."""

import json
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax import convert
from castling_jax.convert.inference import largest_difference
from castling_jax.convert.inference_folder import export_program, save_inference
from castling_jax.models.depthwise_separable import separable
from castling_jax.models.macs import count_costs
from castling_jax.models.pan import KAIMING_UNIFORM, NECKS, Pan
from castling_jax.models.picodet import PicoDet, PicoDetConfig
from castling_jax.models.picodet_heads import HEADS, HeadSizes
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import bind, count_parameters, flatten, forward_train, get_variables
from castling_jax.ops.points import level_points
from tests.models import small

# Backbones of every family, small; LeViT's has three stages, the last at a stride of 64.
BACKBONES = {
    "levit_128s": {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8},
    "deit_micro": {"patch_size": 16, "embed_dim": 16, "depth": 1},
    "mvitv2_tiny": {"embed_dim": 8, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0},
}
# A neck sees maps, of whichever backbone: each is there once.
PAIRS = [("levit_128s", "lc_pan"), ("deit_micro", "csp_pan"), ("mvitv2_tiny", "lc_pan")]
SIZES = {"neck_channels": 16, "num_convs": 1, "num_classes": 3, "image_size": (160, 192)}
POINTS = 20 * 24 + 10 * 12 + 5 * 6 + 3 * 3
LEVIT = "levit_128s"


def small_picodet(backbone=LEVIT, **arguments):
    """Shapes only."""
    arguments = {"backbone_arguments": BACKBONES[backbone]} | SIZES | arguments
    return abstract_model("picodet_s", backbone=backbone, **arguments)


def images_of(model, batch=2):
    height, width = model.spec.image_size
    return small.random_images(batch=batch, height=height, width=width)


# Golden files


class Maps(nnx.Module):
    """In the place of a backbone, of the golden files' widths."""

    feature_strides, feature_channels, in_chans = (8, 16, 32), (12, 20, 28), 3


@pytest.fixture(params=["lc_pan", "csp_pan"])
def case(request, golden):
    """(the file, a model of its sizes, its weights, and the maps that the neck reads)."""
    file = golden("dense/" + {"lc_pan": "picodet_v2", "csp_pan": "picodet_legacy"}[request.param])
    meta = file.meta
    config = PicoDetConfig(
        num_classes=meta["num_classes"],
        image_size=tuple(meta["image"]),
        neck=request.param,
        neck_channels=meta["channels"],
        num_convs=meta["num_convs"],
    )
    model = nnx.eval_shape(lambda: PicoDet(config, Maps(), small.layers()))
    model.spec = types.SimpleNamespace(form="train", name="picodet_s")
    variables = convert.from_paddle(model, file.group("weights"))
    return file, model, variables, [jnp.asarray(file[f"input/{i}"].transpose(0, 2, 3, 1)) for i in range(3)]


def test_golden_outputs(case):
    file, model, variables, maps = case

    @jax.jit
    def run(variables, maps):
        detector = bind(model, variables)
        return detector.neck(maps, training=False), detector._detect(maps, training=False)

    necks, outputs = run(variables, maps)
    for i, neck in enumerate(necks):
        np.testing.assert_allclose(neck, file[f"neck/{i}"].transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    assert outputs.keys() == {"scores", "boxes", "reg_logits"} | ({"cls_logits"} & file.keys())
    # Numbers of order 1 behind some thirty convolutions in float32; boxes reach over 7 strides of 64 pixels.
    for name, output in outputs.items():
        np.testing.assert_allclose(output, file[name], rtol=0, atol=1e-3 if name == "boxes" else 1e-5, err_msg=name)
    points, strides, _ = level_points(tuple(file.meta["image"]))
    np.testing.assert_array_equal(points, file["points"])
    np.testing.assert_array_equal(strides, file["strides"])


@pytest.mark.slow
def test_golden_gradients(case):
    """The file's gradients by the outputs lead to its gradients by the maps."""
    file, model, variables, maps = case
    groups = ["grad"] if "cls_logits" in file else ["grad/atss", "grad/tal"]

    @jax.jit
    def gradients(maps, cotangents):
        def total(maps):
            outputs = bind(model, variables)._detect(maps, training=False)
            return sum(jnp.vdot(outputs[name], cotangent) for name, cotangent in cotangents.items())

        return jax.grad(total)(maps)

    for group in groups:
        cotangents = {name: x for name, x in file.group(group).items() if not name.startswith("input/")}
        for i, gradient in enumerate(gradients(maps, cotangents)):
            expected = file[f"{group}/input/{i}"].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * abs(expected).max())


def test_paddles_names_go_there_and_back(case):
    file, model, variables, _ = case
    weights = file.group("weights")
    again = convert.to_paddle(model, variables)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        if "scale_reg" in name:  # which neither side reads: random in the file, Paddle's 1 here
            assert again[name] == 1
        else:
            np.testing.assert_array_equal(again[name], value, err_msg=name, strict=True)
    chex.assert_trees_all_equal(convert.from_paddle(model, again), variables)


@pytest.mark.parametrize(
    ("backbone", "neck"), [(LEVIT, "lc_pan"), (LEVIT, "csp_pan"), ("deit_micro", "lc_pan"), ("mvitv2_tiny", "csp_pan")]
)
def test_every_neck_and_head_goes_there_and_back(backbone, neck):
    model = small_picodet(backbone, neck=neck)
    variables = small.random_variables(model)
    state_dict = convert.to_paddle(model, variables)
    again = convert.from_paddle(model, state_dict)
    for name in ("neck", "head"):
        for collection in ("params", "batch_stats"):
            chex.assert_trees_all_equal(again[collection][name], variables[collection][name])
    chex.assert_trees_all_equal(again["params"]["backbone"], get_variables(model)["params"]["backbone"])
    fourth = "neck.conv_t.convs.3.conv.weight" in state_dict
    assert fourth == (backbone == LEVIT) != ("neck.first_top_conv.dwconv.weight" in state_dict)


def test_a_single_channel_is_not_halved():
    model = small_picodet(neck="csp_pan", neck_channels=1)
    images = jax.ShapeDtypeStruct((1, 160, 192, 3), jnp.float32)
    outputs = jax.eval_shape(
        lambda v, x: castling_jax.apply(model, v, x, mask_threshold=1), get_variables(model), images
    )
    assert outputs["boxes"].shape == (1, 639, 4)


def test_a_state_dict_that_does_not_fit(refuses):
    model = small_picodet()
    state_dict = convert.to_paddle(model, small.random_variables(model))
    backbone = {"backbone.conv1.conv.weight": np.zeros(3, np.float32)}
    convert.from_paddle(model, state_dict | backbone)  # which is another one
    with refuses("does not fit picodet_s: it lacks 1 of the model's tensors: 'neck.conv_t.convs.3.bn.bias'"):
        convert.from_paddle(model, {k: v for k, v in state_dict.items() if k != "neck.conv_t.convs.3.bn.bias"})
    with refuses("it holds 1 that picodet_s does not have: 'neck.extra'"):
        convert.from_paddle(model, state_dict | {"neck.extra": np.zeros(3)})
    name = "head.head_cls_list.0.weight"
    with refuses(f"it holds 1 of another shape: {name!r} is (5, 16, 1, 1), not (3, 16, 1, 1)"):
        convert.from_paddle(model, state_dict | {name: np.zeros((5, 16, 1, 1))})
    with refuses(f"{name!r} has 1 of 48 numbers that are not finite"):
        convert.from_paddle(model, state_dict | {name: np.where(np.arange(48) == 7, np.nan, 0).reshape(3, 16, 1, 1)})
    with refuses("form"):
        convert.from_paddle(small_picodet(form="inference"), state_dict)
    with refuses("from_paddle takes a detector, as create_model makes it, as model, not DeiT"):
        convert.from_paddle(small.small_model(), state_dict)
    for wrong, said in (
        ([1], "a state dict must be a dict of names to arrays, not list."),
        (state_dict | {name: "x"}, f"a state dict holds str under {name!r}"),
        (state_dict | {3: np.zeros(3)}, "a state dict holds numpy.ndarray under 3"),
        # Finite in float64, infinite in the model's float32.
        (state_dict | {name: np.full((3, 16, 1, 1), 1e300)}, f"{name!r} has 48 of 48 numbers that are not finite"),
    ):
        with refuses(said):
            convert.from_paddle(model, wrong)
    wrapped = convert.from_paddle(model, {"state_dict": state_dict, "epoch": 3})
    chex.assert_trees_all_equal(wrapped, convert.from_paddle(model, state_dict))


# Sizes


def lcnet(scale):
    """Parameters of PP-LCNet up to its last map, without its classifier (Cui et al., 2021, table 1)."""
    depthwise = [(3, 16, 32), (3, 32, 64), (3, 64, 64), (3, 64, 128), (3, 128, 128), (3, 128, 256)]
    depthwise += [(5, 256, 256)] * 5 + [(5, 256, 512), (5, 512, 512)]
    total = (27 + 2) * int(16 * scale)
    for number, (kernel, *widths) in enumerate(depthwise):
        before, after = (int(width * scale) for width in widths)
        total += (kernel**2 + 2) * before + (before + 2) * after
        if number >= len(depthwise) - 2:  # squeeze and excitation
            total += 2 * before * (before // 4) + before // 4 + before
    return total


@pytest.mark.parametrize(
    ("scale", "channels", "num_convs", "published"), [(0.75, 96, 2, 1.18), (1.5, 128, 4, 3.46), (2, 160, 4, 5.80)]
)
def test_with_their_backbones_the_sizes_are_the_published_ones(scale, channels, num_convs, published):
    widths = [int(width * scale) for width in (128, 256, 512)]
    neck = nnx.eval_shape(lambda: Pan(widths, channels, "lc_pan", small.layers()))
    head = nnx.eval_shape(lambda: HEADS["lc_pan"](HeadSizes(channels, num_convs, 80), small.layers()))
    total = lcnet(scale) + count_parameters(get_variables(neck)) + 4 * count_parameters(get_variables(head))
    assert math.floor(total / 1e4) / 100 == published  # which cuts digits off


@pytest.mark.parametrize(("name", "c", "n"), [("picodet_s", 96, 2), ("picodet_m", 128, 4), ("picodet_l", 160, 4)])
def test_the_legacy_sizes(name, c, n):
    """ESNet is not written down here, so neck and head are counted by their description."""
    arguments = {"neck": "csp_pan", "backbone": "mvitv2_tiny", "backbone_arguments": BACKBONES["mvitv2_tiny"]}
    params = get_variables(abstract_model(name, **arguments))["params"]

    def pointwise(before, after):
        return before * after + 2 * after

    def dp(width):
        return 27 * width + pointwise(width, width)

    csp = 2 * pointwise(2 * c, c // 2) + pointwise(c // 2, c // 2) + dp(c // 2) + pointwise(c, c)
    neck = sum(pointwise(width, c) for width in (16, 32, 64)) + 4 * csp + 4 * dp(c)
    assert count_parameters({"params": params["neck"]}) == neck
    assert count_parameters({"params": params["head"]}) == 4 * (n * dp(c) + (c + 1) * 112)


def test_the_macs_of_neck_and_head():
    costs = count_costs(small_picodet("mvitv2_tiny", neck="csp_pan", neck_channels=96, num_convs=2, num_classes=80))
    p3, p4, p5, p6 = 20 * 24, 10 * 12, 5 * 6, 3 * 3

    def dp(width):
        return 25 * width + width**2

    csp = 2 * 192 * 48 + 48 * 48 + dp(48) + 96 * 96
    neck = 96 * (16 * p3 + 32 * p4 + 64 * p5) + csp * (p4 + p3 + p4 + p5) + dp(96) * (p4 + p5 + 2 * p6)
    assert costs["neck"].macs == neck
    assert costs["head"].macs == (2 * dp(96) + 96 * 112) * (p3 + p4 + p5 + p6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "size", "points", "layers"),
    [(LEVIT, 416, 3598, 5), ("deit_micro", 320, 2125, 1), ("mvitv2_tiny", (160, 192), POINTS, 4)],
)
def test_the_points_of_an_image(backbone, size, points, layers):
    model = small_picodet(backbone, image_size=size)
    height, width = size if isinstance(size, tuple) else (size, size)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    outputs, densities = jax.eval_shape(
        lambda v, x: castling_jax.apply(model, v, x, mask_threshold=0.1, return_densities=True),
        get_variables(model),
        images,
    )
    assert {name: (x.shape, x.dtype.name) for name, x in outputs.items()} == {
        "scores": ((2, points, 3), "float32"),
        "boxes": ((2, points, 4), "float32"),
    }
    assert densities.shape == (layers,)
    assert sum(level_points((height, width))[2]) == points


# In training, and switched


@pytest.mark.slow
def test_training_gives_logits_and_statistics():
    model = small_picodet(neck="csp_pan")
    variables, images = small.random_variables(model), images_of(model)
    outputs, densities, batch_stats = jax.jit(
        lambda v, x: forward_train(model, v, x, mask_threshold=0.05, key=jax.random.key(0))
    )(variables, images)
    assert outputs.keys() == {"scores", "boxes", "reg_logits", "cls_logits"}
    np.testing.assert_allclose(outputs["scores"], jax.nn.sigmoid(outputs["cls_logits"]), rtol=1e-6)
    assert densities.shape == (5,)
    before, after = flatten(variables["batch_stats"]), flatten(batch_stats)
    assert before.keys() == after.keys()
    assert all(np.any(before[path] != after[path]) for path in before)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "neck"), PAIRS)
def test_every_parameter_is_trained(backbone, neck):
    """No stage of a backbone is left out, and nothing is there that no output needs."""
    model = small_picodet(backbone, neck=neck)
    variables, images = small.random_variables(model), images_of(model)

    @jax.jit
    def gradients(params):
        def total(params):
            outputs, _, _ = forward_train(
                model, variables | {"params": params}, images, mask_threshold=0.02, key=jax.random.key(0)
            )
            return sum(jnp.mean(jnp.sin(outputs[name])) for name in ("scores", "reg_logits"))

        return jax.grad(total)(params)

    zero = [path for path, leaf in flatten(gradients(variables["params"])).items() if not np.any(leaf)]
    # Of MViTv2's tables, entries of distances that the small grids lack alone would stay zero; no whole table does.
    assert not zero


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "neck"), PAIRS)
def test_the_switch_gives_the_same_boxes(backbone, neck):
    model = small_picodet(backbone, neck=neck)
    variables, images = small.random_variables(model), images_of(model)
    switched = castling_jax.to_inference(variables)
    inference = small_picodet(backbone, neck=neck, form="inference")

    @jax.jit
    def run(variables, switched, images, threshold):
        trained = castling_jax.apply(model, variables, images, mask_threshold=threshold)
        return trained, castling_jax.apply(inference, switched, images)

    trained, inferred = run(variables, switched, images, 1.0)
    assert np.ptp(trained["scores"]) > 0.01
    assert np.ptp(trained["boxes"]) > 100
    np.testing.assert_allclose(trained["scores"], inferred["scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(trained["boxes"] / 192, inferred["boxes"] / 192, rtol=0, atol=1e-5)
    report = castling_jax.check_switch(model, variables, images, 0.02)
    trained, inferred = run(variables, switched, images, 0.02)
    boxes, scores = (float(abs(trained[name] - inferred[name]).max()) for name in ("boxes", "scores"))
    assert report["max_difference"] == pytest.approx(max(boxes / 192, scores), rel=1e-2)


@pytest.mark.slow
def test_the_switch_is_checked():
    model = small_picodet("deit_micro", neck="csp_pan", image_size=160)
    images = small.random_images(batch=1, height=160, width=160)
    report = castling_jax.check_switch(model, small.random_variables(model), images, 0.02)
    assert report["max_difference_at_one"] <= 1e-5 < report["max_difference"]
    assert report["densities"].shape == (1,)


@pytest.mark.slow
def test_a_detector_is_written_and_read(tmp_path):
    model = small_picodet(neck="csp_pan")
    variables = small.random_variables(model)
    save_inference(tmp_path, model, variables)
    loaded, its_variables = castling_jax.load_inference(tmp_path)
    assert loaded.spec == small_picodet(neck="csp_pan", form="inference").spec
    chex.assert_trees_all_equal(its_variables, castling_jax.to_inference(variables))


@pytest.mark.slow
def test_a_detector_is_exported_for_any_batch():
    model = small_picodet(form="inference")
    variables, images = small.random_variables(model), images_of(model, batch=3)
    program = jax.export.deserialize(bytearray(export_program(model, variables)))
    assert program.in_avals[0].shape[1:] == (160, 192, 3)
    expected = jax.jit(lambda v, x: castling_jax.apply(model, v, x))(variables, images)
    # The same operations, which the compiler fuses otherwise where the batch is known.
    chex.assert_trees_all_close(program.call(images), expected, rtol=1e-5, atol=1e-4)


def test_differences_are_shares():
    one = {"boxes": np.float32([100, 0]), "scores": np.float32([0.5]), "logits": np.float32([4, -8])}
    other = {"boxes": np.float32([98, 0]), "scores": np.float32([0.49]), "logits": np.float32([4, -8])}
    assert float(largest_difference(one, other, 200)) == pytest.approx(0.01)  # both
    assert float(largest_difference(one, other | {"logits": np.float32([4, -10])}, 200)) == pytest.approx(0.2)
    assert float(largest_difference(np.float32([4, -8]), np.float32([4, -10]), 200)) == 2


@pytest.mark.parametrize("neck", NECKS)
def test_the_switched_tree_is_the_inference_forms(neck):
    trained, inference = (get_variables(small_picodet(neck=neck, form=form)) for form in ("train", "inference"))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(castling_jax.to_inference, trained), inference)
    assert {fate.action for fate in convert.plan(trained).values()} == {"kept", "folded", "dropped"}


# The start


def test_the_start():
    """Deviations of PaddleDetection's, from some hundred numbers each, and Kaiming's uniform of fan-in 25."""

    @jax.jit
    def make():
        heads = [HEADS[neck](HeadSizes(32, 1, 3), small.layers()) for neck in HEADS]
        neck = separable(32, 8, small.layers(kernel_init=KAIMING_UNIFORM))
        return [get_variables(module)["params"] for module in (*heads, neck)]

    head, legacy, neck = map(flatten, make())
    for leaves, name in ((head, "cls"), (legacy, "output")):
        np.testing.assert_allclose(leaves[f"{name}/bias"], -math.log(99), rtol=1e-6)
        for kernel in ("depthwise", "pointwise"):
            assert np.std(leaves[f"body/0/{kernel}/linear/kernel"]) == pytest.approx(0.01, rel=0.1)
    assert not np.any(head["reg/bias"])
    deviations = {"reg": 0.01, "se/fc": 0.001, "se/conv/linear": 0.01}
    for name, deviation in deviations.items():
        assert np.std(head[f"{name}/kernel"]) == pytest.approx(deviation, rel=0.1)
    kernel = neck["depthwise/linear/kernel"]
    assert 0.95 * math.sqrt(6 / 25) < abs(kernel).max() <= math.sqrt(6 / 25)


# Specs and refusals


def test_the_spec_makes_the_detector_again_through_json():
    model = small_picodet(attention="softmax", neck="csp_pan", dtype="bfloat16")
    again = abstract_model(**json.loads(json.dumps(model.spec.arguments())))
    assert again.spec == model.spec
    assert hash(again.spec) == hash(model.spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(get_variables(again), get_variables(model))
    assert model.spec.arguments()["backbone"] == LEVIT
    plain = abstract_model(**model.spec.with_backbone(implementation="xla"))
    assert dict(plain.spec.arguments()["backbone_arguments"])["implementation"] == "xla"
    assert plain.backbone.stages[0].blocks[0].attn.core.implementation == "xla"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backbone": "resnet50"}, "unknown backbone 'resnet50' (known: deit_tiny, "),
        ({"neck": "fpn"}, "unknown neck 'fpn' (known: lc_pan, csp_pan)."),
        ({"image_size": 128}, "sides are multiples of 32 pixels and at least 160, not 128 x 128."),
        ({"image_size": (160, 176)}, "sides are multiples of 32 pixels and at least 160, not 160 x 176."),
        # LeViT takes multiples of 16: a detector's own rule comes first.
        ({"image_size": 150}, "sides are multiples of 32 pixels and at least 160, not 150 x 150."),
        ({"image_size": (416,)}, "to 16777216, or such a height and width, not (416,)."),
        ({"backbone_arguments": {"depths": 3}}, "unknown backbone argument of levit_128s 'depths'"),
        ({"backbone_arguments": {"image_size": 32}}, "unknown backbone argument of levit_128s 'image_size'"),
        ({"backbone_arguments": 3}, "backbone_arguments must be a dict of arguments, not 3."),
        ({"embed_dim": 32}, "unknown argument of picodet_s 'embed_dim'"),
        ({"num_convs": 0}, "num_convs must be an integer from 1 to 16777216, not 0."),
        ({"neck": 3}, "neck must be a string, not 3."),
        ({"attention": "window"}, "is for plain transformers such as deit_small, not levit_128s."),
        (
            {"backbone_arguments": {"embed_dim": (16,), "depth": (1,), "num_heads": (2,), "key_dim": 8}},
            "strides of 8, 16 and 32 pixels, or one map at a power of two, not levit_128s's (8, 16).",
        ),
    ],
)
def test_refusals(refuses, arguments, said):
    with refuses(said):
        abstract_model("picodet_s", **arguments)


def test_images_of_another_size(refuses):
    model = small_picodet()
    with refuses("sides are multiples of 32 pixels and at least 160, not 160 x 150."):
        castling_jax.apply(model, small.random_variables(model), jnp.zeros((1, 160, 150, 3)), mask_threshold=1)
