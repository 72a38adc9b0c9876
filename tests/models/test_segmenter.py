"""The segmenter: its head against SegFormer's own order of operations in float64, any image size, and the switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax.models.registry import abstract_model
from castling_jax.models.segmenter import MlpHead, resize
from castling_jax.models.variables import bind, flatten, get_variables
from tests.models import small

BACKBONES = {
    "levit_128s": {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8},
    "deit_micro": {"patch_size": 16, "embed_dim": 16, "depth": 1},
    "mvitv2_tiny": {"embed_dim": 8, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0},
}
SIZES = {"head_channels": 12, "num_classes": 5, "image_size": (40, 72)}  # the backbone sees 64 x 96 pixels


def small_segmenter(backbone="levit_128s", **arguments):
    """Shapes only."""
    arguments = {"backbone_arguments": BACKBONES[backbone]} | SIZES | arguments
    return abstract_model("pyramid_segmenter", backbone=backbone, **arguments)


def hats(rows_in, rows_out):
    """The weights of PyTorch's bilinear interpolation with half-pixel centres, written out from its documentation."""
    weights = np.zeros((rows_out, rows_in))
    for row in range(rows_out):
        source = max((row + 0.5) * rows_in / rows_out - 0.5, 0)
        low = min(int(source), rows_in - 1)
        high = min(low + 1, rows_in - 1)
        weights[row, low] += 1 - (source - low)
        weights[row, high] += source - low
    return weights


def resized(x, size):
    return np.einsum(
        "Yy,byxc,Xx->bYXc", hats(x.shape[1], size[0]), np.asarray(x, np.float64), hats(x.shape[2], size[1])
    )


@pytest.mark.parametrize("size", [(7, 20), (3, 4), (2, 1)])
def test_maps_are_resized_as_in_pytorch(size):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
    # A few roundings of numbers of order one.
    np.testing.assert_allclose(resize(jnp.asarray(x), size), resized(x, size), rtol=0, atol=2e-6)


def reference_head(leaves, maps, training):
    """SegFormer's order: projections, resize, concatenation, one product, batch norm, ReLU, classifier; in float64."""
    projected = [x @ leaves["projections", i, "kernel"] + leaves["projections", i, "bias"] for i, x in enumerate(maps)]
    x = np.concatenate([resized(x, maps[0].shape[1:3]) for x in projected], axis=-1)
    x = x @ leaves["fuse", "linear", "kernel"]
    if ("fuse", "linear", "bias") in leaves:
        x = x + leaves["fuse", "linear", "bias"]
    else:
        mean, var = (leaves["fuse", "bn", name] for name in ("mean", "var"))
        if training:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) / np.sqrt(var + 1e-5) * leaves["fuse", "bn", "scale"] + leaves["fuse", "bn", "bias"]
    return np.maximum(x, 0) @ leaves["classifier", "kernel"] + leaves["classifier", "bias"]


def drawn_head(folded=False):
    """(graph, state, its leaves in float64, three maps)."""
    rng = np.random.default_rng(1)
    widths = (6, 8, 10)
    graphdef, state = nnx.split(MlpHead(widths, 4, 3, small.layers(folded=folded)))
    leaves = {path: rng.uniform(0.5, 1.5, leaf.shape) for path, leaf in nnx.to_flat_state(state)}
    maps = [rng.standard_normal((2, 8 >> i, 12 >> i, width), np.float32) for i, width in enumerate(widths)]
    return graphdef, state, leaves, maps


def run_head(graphdef, state, leaves, maps, training):
    bound = {path: leaf.replace(jnp.asarray(leaves[path], jnp.float32)) for path, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(bound))([jnp.asarray(x) for x in maps], training=training)


@pytest.mark.parametrize(("folded", "training"), [(False, False), (False, True), (True, False)])
def test_the_head_is_segformers(folded, training):
    graphdef, state, leaves, maps = drawn_head(folded)
    expected = reference_head(leaves, maps, training)
    logits = run_head(graphdef, state, leaves, maps, training)
    # Sums of up to 12 float32 products, several in a row; without batch norm the numbers reach a hundred.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


def test_the_heads_gradients_are_finite_differences():
    """In training mode, along a direction in the space of all parameters; the differences are float64's."""
    graphdef, state, leaves, maps = drawn_head()
    rng = np.random.default_rng(2)
    cotangent = rng.standard_normal((2, 8, 12, 3))
    directions = {path: rng.standard_normal(leaf.shape) for path, leaf in leaves.items()}

    def moved(step):
        return {path: leaf + step * directions[path] for path, leaf in leaves.items()}

    def value(step):
        return np.sum(reference_head(moved(step), maps, training=True) * cotangent)

    gradient = jax.grad(lambda step: jnp.sum(run_head(graphdef, state, moved(step), maps, True) * cotangent))(0.0)
    # Sums of some hundred float32 terms that partly cancel.
    assert float(gradient) == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("attention", ["castling", "linear_angular", "softmax"])
def test_logits_have_the_images_size(backbone, attention):
    model = small_segmenter(backbone, attention=attention)
    images = jax.ShapeDtypeStruct((2, 40, 72, 3), jnp.float32)
    outputs = jax.eval_shape(
        lambda variables, images: castling_jax.apply(model, variables, images, mask_threshold=0.01),
        get_variables(model),
        images,
    )
    assert outputs.keys() == {"logits"}
    assert (outputs["logits"].shape, outputs["logits"].dtype) == ((2, 40, 72, 5), jnp.float32)


def test_the_maps_that_the_head_reads():
    """A pyramid at strides of 4, 8, 16 and 32 for a DeiT of any patch; the other backbones' maps as they are."""
    for patch, scales in ((16, (4, 2, 1, 0.5)), (8, (2, 1, 0.5, 0.25)), (32, (8, 4, 2, 1))):
        model = small_segmenter("deit_micro", backbone_arguments=BACKBONES["deit_micro"] | {"patch_size": patch})
        found = [(len(level.doubles), level.shrink) for level in model.pyramid.levels]
        assert found == [(max(int(np.log2(scale)), 0), max(round(1 / scale), 1)) for scale in scales]
        assert len(model.head.projections) == 4
    assert small_segmenter("levit_128s").pyramid is None
    assert [x.kernel.shape for x in small_segmenter("levit_128s").head.projections] == [
        (8, 12), (16, 12), (24, 12), (32, 12),
    ]  # fmt: skip
    assert [x.kernel.shape for x in small_segmenter("mvitv2_tiny").head.projections] == [
        (8, 12), (16, 12), (32, 12), (64, 12),
    ]  # fmt: skip


def test_images_are_padded_on_the_right_and_at_the_bottom():
    """40 x 72 pixels are 64 x 96 of which the rest is zero, and any other size is taken too."""
    model = small_segmenter("deit_micro")
    variables = small.random_variables(model)
    images = small.random_images(batch=2, height=40, width=72)
    apply = jax.jit(lambda images: castling_jax.apply(model, variables, images, mask_threshold=0.01)["logits"])
    padded = np.zeros((2, 64, 96, 3), np.float32)
    padded[:, :40, :72] = images
    # The same sums: the padded image is what the model makes of the smaller one.
    np.testing.assert_allclose(apply(images), apply(padded)[:, :40, :72], rtol=0, atol=1e-6)
    assert apply(images[:, :33, :50]).shape == (2, 33, 50, 5)
    features = jax.jit(lambda images: castling_jax.features(model, variables, images, mask_threshold=0.01)[0])
    assert features(images).shape == (2, 4, 6, 16)  # patches of 16 pixels
    np.testing.assert_allclose(features(images), features(padded), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "backbone", ["deit_micro", *(pytest.param(name, marks=pytest.mark.slow) for name in ("levit_128s", "mvitv2_tiny"))]
)
def test_both_forms_agree_at_one(backbone):
    model = small_segmenter(backbone)
    variables = small.random_variables(model)
    images = small.random_images(batch=2, height=40, width=72)
    report = castling_jax.check_switch(model, variables, images, 0.01)
    assert report["max_difference_at_one"] <= 1e-5
    assert report["max_difference"] > 1e-4
    folded = flatten(castling_jax.to_inference(variables))
    assert "params/head/fuse/linear/bias" in folded
    assert not any("/bn/" in path for path in folded)


@pytest.mark.parametrize("patch", [14, 12, 64])
def test_patches_that_do_not_fit_are_refused(refuses, patch):
    with refuses(f"a segmenter needs patches of a power of two up to 32 pixels, not deit_micro's of {patch}."):
        small_segmenter("deit_micro", backbone_arguments={"patch_size": patch}, image_size=1344)  # a multiple of all


def test_what_create_model_refuses(refuses):
    with refuses("unknown argument of pyramid_segmenter 'neck'"):
        small_segmenter(neck="lc_pan")
    with refuses("unknown backbone 'resnet'"):
        abstract_model("pyramid_segmenter", backbone="resnet")
    with refuses("head_channels must be an integer"):
        small_segmenter(head_channels=0)
    model = small_segmenter()
    with refuses("images must have 3 channels, not 1."):
        bind(model, small.random_variables(model))(jnp.zeros((1, 40, 72, 1)), mask_threshold=0.1)
