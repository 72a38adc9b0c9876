import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import castling_jax
from castling_jax.models.attention.core import Kind
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.registry import abstract_model
from castling_jax.ops.around import normalize_qkv
from tests.models import small
from tests.ops import reference

# The weights are of order one and are sums of at most 24 float32 products of unit vectors, or one softmax of scores up
# to about 10, whose rounding the exponential passes on.
ATOL = 1e-5
FAMILIES = {
    "deit": (small.small_model, {"distilled": True}, small.random_images()),
    "levit": (small.small_levit, {}, small.random_images(1, 112, 112)),
    "mvit": (small.small_mvit, {}, small.random_images(1, 32, 32)),
}
NO_MAPS = {"window", "bridge", "separable"}


def made(family, **arguments):
    make, options, images = FAMILIES[family]
    model = make(**(options | arguments))
    return model, small.random_variables(model), images


def layers_of(model, variables, images, threshold):
    """(q, k, v, inputs, output) of each layer in float64, as its kind was called in a forward pass."""
    calls = []
    original = Kind.__call__

    def record(self, q, k, v, **inputs):
        result = original(self, q, k, v, **inputs)
        q, k, v = normalize_qkv(q, k, v, inputs["around"].norms if "around" in inputs else None)
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, k, v, inputs.get("bias"), result[0]))
        calls.append((*wide[:3], inputs | {"bias": wide[3]}, wide[4]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kind, "__call__", record)
        castling_jax.apply(model, variables, images, mask_threshold=threshold)
    return calls


def values_at_queries(v, place):
    """The 1/2 V term's values, written out."""
    if place is None:
        return v
    return v[:, place] if isinstance(place, np.ndarray) else np.asarray(place, np.float64)


def activated(out, family):
    """LeViT's Hardswish, which is no part of the weights."""
    return out * np.clip(out + 3, 0, 6) / 6 if family == "levit" else out


@pytest.mark.parametrize(
    "family", ["deit", pytest.param("levit", marks=pytest.mark.slow), pytest.param("mvit", marks=pytest.mark.slow)]
)
def test_castling_layers_have_the_weights_of_the_equations_and_their_output(family):
    model, variables, images = made(family, token_conv=None)
    softmax = [reference.softmax(reference.scaled_scores(q, k, inputs["bias"])) for q, k, _, inputs, _ in
               layers_of(model, variables, images, 0.0)]  # fmt: skip
    # Rounding must not decide on which side of the threshold a weight is. The later layers read what the threshold has
    # changed, so that only the first layer's weights are known beforehand.
    threshold = reference.clear_threshold(softmax[0], near=1 / softmax[0].shape[3])
    layers = layers_of(model, variables, images, threshold)
    assert len(layers) == len(
        castling_jax.apply(model, variables, images, mask_threshold=1.0, return_densities=True)[1]
    )
    for index, (q, k, v, inputs, out) in enumerate(layers):
        maps = castling_jax.attention_maps(model, variables, images, layer=index, mask_threshold=threshold)
        assert list(maps) == ["masked_softmax", "linear_angular", "angular"]
        assert {array.shape for array in maps.values()} == {(q.shape[0], q.shape[2], q.shape[1], k.shape[1])}
        masked, linear, angular = (np.asarray(array, np.float64) for array in maps.values())

        weights = reference.softmax(reference.scaled_scores(q, k, inputs["bias"]))
        clear = np.abs(weights - threshold) > ATOL
        kept = np.where(weights > threshold, weights, 0)
        np.testing.assert_allclose(masked[clear], kept[clear], atol=ATOL)
        assert 0 < np.count_nonzero(masked) < masked.size

        place = inputs.get("query_values")
        cosines = reference.scores_of(reference.normalize(q), reference.normalize(k))
        half = np.zeros(cosines.shape[2:])
        if not isinstance(place, jax.Array):
            keys = np.arange(k.shape[1]) if place is None else place
            half[np.arange(len(keys)), keys] = 0.5
        np.testing.assert_allclose(linear, half + cosines / np.pi, atol=ATOL)
        # arccos has an infinite slope at 1: angles are compared by their cosines.
        np.testing.assert_allclose(np.cos(np.pi * (1 - angular)), cosines, atol=ATOL)

        core = np.einsum("bhqk,bkhd->bqhd", masked + linear, v)
        if isinstance(place, jax.Array):
            core += 0.5 * values_at_queries(v, place)
        # Cores are of order one; the normalisation multiplies the rounding of a short one.
        np.testing.assert_allclose(activated(reference.normalize(core), family), out, atol=10 * ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_weights_times_values_are_the_output_of_every_kind(family, kind):
    if family != "deit" and KINDS[kind].module:
        pytest.skip("for plain transformers only")
    if kind in NO_MAPS | {"castling"}:
        pytest.skip("refused, or tested above")
    model, variables, images = made(family, attention=kind, **({} if family == "levit" else {"token_conv": None}))
    layers = layers_of(model, variables, images, 0.05)
    for index in (0, len(layers) - 1):
        _, _, v, inputs, out = layers[index]
        maps = castling_jax.attention_maps(model, variables, images, layer=index, mask_threshold=0.05)
        first = next(iter(maps))
        assert first == {"softmax_taps": "softmax", "convolutional": "softmax"}.get(kind, kind)
        total = np.einsum("bhqk,bkhd->bqhd", np.asarray(maps[first], np.float64), v)
        place = inputs.get("query_values")
        if kind == "linear_angular" and isinstance(place, jax.Array):
            total += 0.5 * values_at_queries(v, place)
        if kind in ("linear_angular", "angular"):
            total = reference.normalize(total)
        if inputs["token_kernel"] is not None:
            kernel = np.asarray(inputs["token_kernel"], np.float64)
            total += reference.convolve_grid(values_at_queries(v, place), kernel, inputs["grid"])
        np.testing.assert_allclose(activated(total, family), out, atol=10 * ATOL * np.abs(out).max())


@pytest.mark.slow
def test_softmax_weights_are_the_softmax_of_the_scores():
    model, variables, images = made("levit", attention="softmax")
    for index, (q, k, _, inputs, _) in enumerate(layers_of(model, variables, images, None)):
        maps = castling_jax.attention_maps(model, variables, images, layer=index)
        expected = reference.softmax(reference.scaled_scores(q, k, inputs["bias"]))
        np.testing.assert_allclose(maps["softmax"], expected, atol=ATOL)


def test_a_fade_lowers_all_weights():
    model, variables, images = made("deit", mask_kind="fade")
    whole, half = (
        castling_jax.attention_maps(model, variables, images, layer=0, mask_threshold=t)["masked_softmax"]
        for t in (0.0, 0.5)
    )
    np.testing.assert_allclose(np.asarray(whole).sum(3), 1, atol=ATOL)
    np.testing.assert_allclose(half, whole / 2, atol=ATOL)


def test_a_masked_autoencoders_decoder_has_the_weights_of_softmax():
    backbone = {word: small.SIZES[word] for word in ("embed_dim", "num_heads", "patch_size")} | {"depth": 1}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    model = abstract_model("mae", image_size=8, backbone="deit_micro", backbone_arguments=backbone, **decoder)
    variables, images = small.random_variables(model), small.random_images()
    first, last = (
        jax.jit(functools.partial(castling_jax.attention_maps, model, layer=layer, mask_threshold=0.02))
        for layer in (0, -1)
    )
    visible = 1 + 4  # the class token and a quarter of 16 patches
    shapes = {name: array.shape for name, array in jax.eval_shape(first, variables, images).items()}
    assert shapes == dict.fromkeys(["masked_softmax", "linear_angular", "angular"], (2, 3, visible, visible))
    maps = last(variables, images)
    assert list(maps) == ["softmax"] and maps["softmax"].shape == (2, 2, 17, 17)
    assert np.min(maps["softmax"]) > 0
    np.testing.assert_allclose(np.asarray(maps["softmax"]).sum(3), 1, atol=ATOL)


@pytest.mark.slow
def test_negative_layers_count_from_the_end_and_the_inference_form_has_no_branch():
    model, variables, images = made("levit")
    last = castling_jax.attention_maps(model, variables, images, layer=-1, mask_threshold=1.0)
    same = castling_jax.attention_maps(model, variables, images, layer=2, mask_threshold=1.0)
    assert not np.any(last["masked_softmax"])  # the mask is empty from 1 on
    np.testing.assert_array_equal(last["linear_angular"], same["linear_angular"])
    inference, _, _ = made("levit", form="inference")
    folded = castling_jax.to_inference(variables)
    switched = castling_jax.attention_maps(inference, folded, images, layer=-1)
    assert list(switched) == ["linear_angular", "angular"]
    np.testing.assert_allclose(switched["linear_angular"], last["linear_angular"], atol=10 * ATOL)


@pytest.mark.slow
def test_maps_can_be_jitted_on_any_mesh_and_where_blocks_are_computed_again():
    model, variables, images = made("deit", remat=True)

    def maps_of(model, images):
        return castling_jax.attention_maps(model, variables, images, layer=1, mask_threshold=0.05)

    expected = maps_of(made("deit")[0], images)
    mesh = jax.make_mesh((1,), ("data",))  # its axis is Explicit
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    traced = jax.jit(lambda images: maps_of(model, images))
    for name, array in expected.items():
        np.testing.assert_allclose(traced(images)[name], array, atol=ATOL)
        np.testing.assert_allclose(maps_of(model, placed)[name], array, atol=ATOL)


def test_models_of_bfloat16_have_weights_in_float32():
    model, variables, images = made("deit", dtype=jnp.bfloat16)
    for array in castling_jax.attention_maps(model, variables, images, layer=0, mask_threshold=0.0).values():
        assert array.dtype == jnp.float32


def test_an_attention_of_ones_own_has_maps():
    def cosine_attention(q, k, v):
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        return jnp.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v)

    castling_jax.register_attention("cosine_of_maps", cosine_attention)
    try:
        model, variables, images = made("deit", attention="cosine_of_maps")
        (q, k, *_), *_ = layers_of(model, variables, images, None)
        maps = castling_jax.attention_maps(model, variables, images, layer=0)
    finally:
        del KINDS["cosine_of_maps"]
    cosines = reference.scores_of(reference.normalize(q), reference.normalize(k))
    np.testing.assert_allclose(maps["cosine_of_maps"], cosines, atol=ATOL)


@pytest.mark.parametrize("layer", [2, -3, 0.5, "0"])
def test_a_layer_that_is_not_there_is_refused(refuses, layer):
    model, variables, images = made("deit")
    with refuses("layer must be an integer from -2 to 1", repr(layer)):
        castling_jax.attention_maps(model, variables, images, layer=layer, mask_threshold=0.1)


@pytest.mark.parametrize("kind", sorted(NO_MAPS))
def test_attentions_without_weights_of_all_keys_are_refused(refuses, kind):
    model, variables, images = made("deit", attention=kind)
    with refuses(f"attention={kind!r} has no maps"):
        castling_jax.attention_maps(model, variables, images, layer=0)


def test_the_threshold_and_the_images_are_needed_as_in_apply(refuses):
    model, variables, images = made("deit")
    with refuses("needs mask_threshold"):
        castling_jax.attention_maps(model, variables, images, layer=0)
    with refuses("images must be [batch, height, width, channels]"):
        castling_jax.attention_maps(model, variables, images[0], layer=0)
