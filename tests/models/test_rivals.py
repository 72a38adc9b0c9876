"""Attentions to compare castling with that are modules of their own, beside their papers' equations in float64."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import castling_jax
from castling_jax.compile_report.cases import load_case
from castling_jax.convert.torch import from_torch, to_torch
from castling_jax.data.arrays import ArrayDataset
from castling_jax.models import description, macs
from castling_jax.models.attention.core import Places
from castling_jax.models.attention.kinds import KINDS, make_core
from castling_jax.models.registry import abstract_model, attentions_of
from castling_jax.models.variables import bind, flatten, get_variables, unflatten
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import decay_mask
from castling_jax.training.setup import first_state, first_variables, set_up
from castling_jax.training.sharding import AXES, state_shardings
from tests.models import small

RIVALS = ["bridge", "convolutional", "separable", "window"]
ONE_FAST = [kind if kind == "window" else pytest.param(kind, marks=pytest.mark.slow) for kind in RIVALS]
DIM, HEADS = 24, 3
# Sums of up to a hundred float32 products and a softmax, as shares of the largest output.
ROUNDING = 3e-6


def random_module(kind, *, dtype="float32", **core):
    """(a module whose parameters all matter, the same parameters in float64 as a nested dict)."""
    layers = dataclasses.replace(small.layers(), dtype=jnp.dtype(dtype))
    made_with = dataclasses.replace(make_core(kind, "train", token_conv="1d"), **core)
    module = KINDS[kind].module(DIM, HEADS, made_with, layers, qkv_bias=True)
    variables = small.random_variables(module)
    wide = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(variables["params"]).items()}
    return bind(module, variables), unflatten(wide)


def outputs_of(kind, grid, prefix_tokens, *, dtype="float32", **core):
    """(the module's output, the reference's) for random tokens."""
    module, parameters = random_module(kind, dtype=dtype, **core)
    tokens = prefix_tokens + math.prod(grid)
    x = np.random.default_rng(1).normal(size=(2, tokens, DIM))
    run = jax.jit(functools.partial(module, places=Places(grid, prefix_tokens), mask_threshold=None))
    out, density = run(jnp.asarray(x, dtype))
    assert float(density) == 0
    chex.assert_type(out, dtype)
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    return np.asarray(out, np.float64), REFERENCES[kind](x, parameters, grid, prefix_tokens, **core)


# The references: one loop for each sum that the equations have


def attend(q, k, v, bias=0.0):
    """softmax(q k^T / sqrt(d) + bias) v of one head: [queries, d], [keys, d], [keys, d]."""
    scores = q @ k.T / math.sqrt(q.shape[1]) + bias
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def heads_of(x):
    """[tokens, channels] -> a list of [tokens, channels of the head]."""
    return np.split(x, HEADS, axis=-1)


def by_heads(q, k, v, bias=(0.0,) * HEADS):
    return np.concatenate([attend(*head) for head in zip(*map(heads_of, (q, k, v)), bias, strict=True)], axis=-1)


def window_starts(size, side, shifted):
    """Which window along one axis each of `size` tokens is in."""
    if size <= side:
        return [0] * size
    offset = side - side // 2 if shifted else 0  # a shift by side // 2 leaves a first window of so many tokens
    return [(i + offset) // side for i in range(size)]


def window_reference(x, parameters, grid, prefix_tokens, *, window_size=7, block=0):
    """A dense mask and a dense bias over all tokens, pair by pair."""
    tokens = x.shape[1]
    shifted = block % 2 == 1
    rows, columns = (window_starts(size, window_size, shifted) for size in grid)
    place = [None] * prefix_tokens + [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    bias = np.zeros((HEADS, tokens, tokens))
    for a in range(tokens):
        for b in range(tokens):
            if place[a] is None or place[b] is None:
                continue
            (i, j), (m, n) = place[a], place[b]
            if rows[i] != rows[m] or columns[j] != columns[n]:
                bias[:, a, b] = -np.inf
                continue
            row = (i - m + window_size - 1) * (2 * window_size - 1) + j - n + window_size - 1
            bias[:, a, b] = parameters["relative_position_bias_table"][row]
    qkv = small.dense(x, parameters["qkv"])
    outs = [by_heads(*np.split(image, 3, axis=-1), bias) for image in qkv]
    return small.dense(np.stack(outs), parameters["proj"])


def separable_reference(x, parameters, grid, prefix_tokens):
    outs = []
    for image in x:
        k, v = np.split(small.dense(image, parameters["kv"]), 2, axis=-1)
        scores = np.exp(image @ parameters["latent"]["kernel"][:, 0])
        context = sum(score * key for score, key in zip(scores / scores.sum(), k, strict=True))
        outs.append([np.maximum(value, 0) * context for value in v])
    return small.dense(np.asarray(outs), parameters["proj"])


def convolve(image, kernel, stride):
    """[rows, columns, channels] with taps [3, 3, 1, channels], zero padded."""
    height, width, _ = image.shape
    out = np.zeros((-(-height // stride), -(-width // stride), image.shape[2]))
    for i, j in np.ndindex(*out.shape[:2]):
        for a, b in np.ndindex(3, 3):
            row, column = stride * i + a - 1, stride * j + b - 1
            if 0 <= row < height and 0 <= column < width:
                out[i, j] += kernel[a, b, 0] * image[row, column]
    return out


def convolutional_reference(x, parameters, grid, prefix_tokens):
    weights = np.split(parameters["qkv"]["kernel"], 3, axis=1)
    biases = np.split(parameters["qkv"]["bias"], 3)
    outs = []
    for image in x:
        patches = image[prefix_tokens:].reshape(*grid, DIM)
        inputs = []
        for name, stride, weight, bias in zip("qkv", (1, 2, 2), weights, biases, strict=True):
            convolved = convolve(patches, parameters[f"pool_{name}"]["kernel"], stride).reshape(-1, DIM)
            normed = small.layer_norm(convolved, parameters[f"norm_{name}"])
            inputs.append(np.concatenate([image[:prefix_tokens], normed]) @ weight + bias)
        outs.append(by_heads(*inputs))
    return small.dense(np.stack(outs), parameters["proj"])


def bridge_reference(x, parameters, grid, prefix_tokens):
    z = parameters["global_tokens"][0]
    outs = []
    for image in x:
        updated = z + small.dense(by_heads(small.dense(z, parameters["q"]), image, image), parameters["proj"])
        k, v = np.split(small.dense(updated, parameters["kv"]), 2, axis=-1)
        outs.append(by_heads(image, k, v))
    return np.stack(outs)


REFERENCES = {
    "bridge": bridge_reference,
    "convolutional": convolutional_reference,
    "separable": separable_reference,
    "window": window_reference,
}


def compare(out, expected, rounding=ROUNDING):
    np.testing.assert_allclose(out, expected, rtol=0, atol=rounding * np.max(np.abs(expected)))


# Grids of one window, of whole windows and of broken ones, wide and high.
GRIDS = [(3, 2), (4, 4), (5, 7), (8, 4), (1, 6)]


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bridge", "convolutional", "separable"])
def test_a_module_is_its_papers_equation(kind, prefix_tokens):
    compare(*outputs_of(kind, (5, 6), prefix_tokens))


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_a_dense_mask_and_bias(grid, block):
    compare(*outputs_of("window", grid, 1, window_size=4, block=block))


@pytest.mark.parametrize("prefix_tokens", [0, 2])
@pytest.mark.parametrize(("size", "block"), [(1, 1), (3, 0), (3, 1), (4, 3)])
def test_windows_of_other_sizes_and_prefixes(size, block, prefix_tokens):
    compare(*outputs_of("window", (7, 5), prefix_tokens, window_size=size, block=block))


def test_windows_are_of_seven_tokens_unless_they_are_named():
    compare(*outputs_of("window", (8, 9), 1, block=1))


@pytest.mark.parametrize("kind", RIVALS)
def test_modules_in_bfloat16(kind):
    # 2^-9 of each of some tens of roundings, of the layers' outputs and of weights and values.
    compare(*outputs_of(kind, (4, 5), 1, dtype="bfloat16"), rounding=3e-2)


@pytest.mark.parametrize("kind", RIVALS)
def test_tokens_that_are_zero_have_finite_gradients(kind):
    # In a new model biases are zero, so that an empty image's queries, keys and values are zero too.
    core = dataclasses.replace(make_core(kind, "train", token_conv=None), window_size=2, block=1)
    module = KINDS[kind].module(DIM, HEADS, core, small.layers(), qkv_bias=True)
    graphdef, params = nnx.split(module)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        out, _ = nnx.merge(graphdef, params)(x, places=Places((3, 3), 1), mask_threshold=None)
        return jnp.sum(jnp.sin(out + 1))

    for gradient in jax.tree.leaves(gradients(params, jnp.zeros((2, 10, DIM)))):
        assert np.max(np.abs(gradient)) < 1e3


# What they cost


def costs_of(kind, grid, prefix_tokens=0):
    """The multiply-accumulates of a layer, part by part."""
    module, _ = random_module(kind, window_size=2)
    x = jax.ShapeDtypeStruct((1, prefix_tokens + math.prod(grid), DIM), jnp.float32)
    program = functools.partial(module, places=Places(grid, prefix_tokens), mask_threshold=None)
    found = dict.fromkeys(macs.parts(), 0)
    for part, cost in macs._costs(jax.make_jaxpr(program)(x).jaxpr, macs.OTHER, macs.parts()):
        found[part] += cost.macs
    return found


@pytest.mark.parametrize(("kind", "growth"), [("bridge", 2), ("separable", 2), ("window", 2), ("convolutional", 4)])
def test_twice_the_tokens_cost_twice_as_much_but_for_the_quadratic_one(kind, growth):
    once, twice = costs_of(kind, (4, 4)), costs_of(kind, (4, 8))
    (part,) = KINDS[kind].parts
    assert 0 < once[part] * growth == twice[part]
    assert KINDS[kind].linear == (growth == 2)


def test_counted_costs_are_worked_out_by_hand():
    patches, first = 4 * 6, 1
    tokens = patches + first
    found = {kind: costs_of(kind, (4, 6), first) for kind in RIVALS}
    # Each patch has the 4 of its window and the class token; the class token has all. Scores, and weights times values.
    assert found["window"]["softmax"] == 2 * DIM * (patches * (4 + first) + first * tokens)
    assert found["separable"]["separable"] == DIM * tokens
    assert found["separable"]["qkv"] == DIM * tokens * (1 + 2 * DIM)
    assert found["convolutional"]["softmax"] == 2 * DIM * tokens * (2 * 3 + first)
    assert found["convolutional"]["pool"] == 9 * DIM * (patches + 2 * 2 * 3)
    assert found["convolutional"]["qkv"] == DIM**2 * (tokens + 2 * (2 * 3 + first))
    assert found["bridge"]["softmax"] == 2 * 2 * DIM * 6 * tokens
    assert (found["bridge"]["qkv"], found["bridge"]["proj"]) == (6 * 3 * DIM**2, 6 * DIM**2)


@pytest.mark.parametrize("kind", RIVALS)
def test_every_product_is_counted_under_a_part(kind):
    assert macs.OTHER not in macs.count_costs(rival(kind, distilled=True))


@pytest.mark.slow
def test_they_are_described():
    text = description.describe(abstract_model("deit_micro", attention="separable"))
    assert {line.split()[0] for line in text.splitlines() if "train and inference" in line} >= set(RIVALS)
    assert description.PART_NAMES["separable"] in text


# In a model


def rival(kind, **arguments):
    return small.small_model(attention=kind, **({"window_size": 3} | arguments))


def test_every_block_knows_its_number_and_the_window_size():
    model = rival("window", depth=4)
    assert [block.attn.core.block for block in model.blocks] == [0, 1, 2, 3]
    paths = {path: leaf.shape for path, leaf in flatten(get_variables(model)).items() if path.endswith("bias_table")}
    assert paths == {f"params/blocks/{i}/attn/relative_position_bias_table": (25, 3) for i in range(4)}
    assert rival("window", window_size=None).blocks[0].attn.relative_position_bias_table.shape == (169, 3)


@pytest.mark.parametrize("kind", RIVALS)
def test_images_of_other_sizes(kind):
    model = rival(kind)
    for height, width in ((8, 12), (4, 2), (18, 14)):
        images = small.random_images(height=height, width=width)
        out = jax.eval_shape(functools.partial(castling_jax.apply, model), get_variables(model), images)
        assert out == jax.ShapeDtypeStruct((2, 7), jnp.float32)


@pytest.mark.parametrize("kind", RIVALS)
def test_any_number_of_images(kind):
    """An exported program's batch is a symbol."""
    model = rival(kind)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    out = jax.eval_shape(functools.partial(castling_jax.apply, model), get_variables(model), images)
    assert out.shape == (batch, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIVALS)
def test_gradients_with_remat_are_the_same(kind):
    model, remat = rival(kind), rival(kind, remat=True)
    variables, images = small.random_variables(model), small.random_images(height=12, width=10)

    def gradients(model):
        return jax.jit(jax.grad(lambda variables: jnp.sum(castling_jax.apply(model, variables, images) ** 2)))(
            variables
        )

    kept, again = flatten(gradients(model)), flatten(gradients(remat))
    for path, gradient in kept.items():
        assert np.all(np.isfinite(gradient)), path
        # The same operations, which the compiler fuses in other ways.
        np.testing.assert_allclose(again[path], gradient, rtol=0, atol=1e-5 * np.max(np.abs(gradient)), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIVALS)
def test_the_switch_returns_the_same_arrays(kind):
    model, inference = (rival(kind, form=form, distilled=True) for form in ("train", "inference"))
    variables = small.random_variables(model)
    switched = castling_jax.to_inference(variables)
    before, after = flatten(variables), flatten(switched)
    assert before.keys() == after.keys() == flatten(get_variables(inference)).keys()
    assert all(after[path] is leaf for path, leaf in before.items())
    images = small.random_images()
    logits, densities = castling_jax.apply(model, variables, images, return_densities=True)
    chex.assert_trees_all_equal(castling_jax.apply(inference, switched, images), logits)
    chex.assert_trees_all_equal(densities, jnp.zeros(2))


@pytest.mark.parametrize("kind", ONE_FAST)
def test_one_training_step_on_a_mesh_moves_every_parameter(kind):
    config = default_config()
    config.model.update({"name": "deit_micro", "attention": kind, "depth": 2, "embed_dim": 16, "window_size": 3})
    config.train.batch_size = config.evaluation.batch_size = 8
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(8, 8, 8, 3)).astype(np.float32)
    data = ArrayDataset(images, np.arange(8) % 3, 3)
    setup = set_up(config, jax.devices()[:1], (data, data))
    assert setup.model.blocks[1].attn.core.window_size == 3
    assert castling_jax.create_model(**setup.model.spec.arguments()).spec == setup.model.spec
    state = first_state(setup, first_variables(setup))
    before = jax.tree.map(np.asarray, state.params)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(8) % 3}
    state, metrics = setup.train_step(state, batch, 0.05)
    assert np.isfinite(metrics["loss"])
    after = flatten(jax.tree.map(np.asarray, state.params))
    still = [path for path, leaf in flatten(before).items() if np.array_equal(leaf, after[path])]
    # The classifier reads the class token alone: the last block's patches, and what only they read, have no gradient.
    assert all(path.startswith("blocks/1/attn/") for path in still)


def test_tables_and_tokens_are_split_and_decayed_as_their_like():
    masks = {kind: flatten(decay_mask(get_variables(rival(kind))["params"]["blocks"]["0"]["attn"])) for kind in RIVALS}
    assert {path for mask in masks.values() for path, decayed in mask.items() if decayed} == {
        *("qkv/kernel", "proj/kernel", "q/kernel", "kv/kernel", "latent/kernel"),
        *("pool_q/kernel", "pool_k/kernel", "pool_v/kernel"),
    }
    specs = {}
    for kind in RIVALS:
        mesh = AbstractMesh((1, 1, 4, 3), AXES)
        attn = state_shardings(get_variables(rival(kind)), mesh)["params"]["blocks"]["0"]["attn"]
        specs |= {path: leaf.spec for path, leaf in flatten(attn).items()}
    assert specs["relative_position_bias_table"] == jax.P(None, "tensor")
    assert specs["global_tokens"] == jax.P(None, None, None)
    assert specs["latent/kernel"] == jax.P("fsdp", None)
    assert specs["q/kernel"] == specs["kv/kernel"] == specs["qkv/kernel"] == jax.P("fsdp", "tensor")
    assert specs["q/bias"] == specs["kv/bias"] == jax.P("tensor")


# Where they do not fit


@pytest.mark.parametrize("kind", RIVALS)
def test_levit_and_mvitv2_refuse(refuses, kind):
    for build, name in ((small.small_levit, "levit_128s"), (small.small_mvit, "mvitv2_tiny")):
        with refuses(f"attention='{kind}' is for plain transformers", name, "deit_small"):
            build(attention=kind)
        assert kind not in attentions_of(name)
    assert kind in attentions_of("deit_tiny")


def test_a_window_size_that_does_not_fit(refuses):
    with refuses("window_size must be an integer from 1 to 16777216, not 0."):
        rival("window", window_size=0)
    with refuses("unknown argument of levit_128s 'window_size'"):
        small.small_levit(window_size=7)


def test_heads_that_do_not_divide_the_width(refuses):
    for kind in ("bridge", "convolutional", "window"):
        with refuses("5 heads do not divide the width 24"):
            rival(kind, num_heads=5)


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("bridge", "blocks.0.attn.global_tokens"),
        ("convolutional", "blocks.0.attn.norm_k.bias"),
        ("separable", "blocks.0.attn.kv.bias"),
        ("window", "blocks.0.attn.relative_position_bias_table"),
    ],
)
def test_timms_weights_are_refused_and_their_own_come_back(refuses, kind, lacks):
    softmax, model = small.small_model(attention="softmax"), rival(kind)
    with refuses("the state dict does not fit deit_micro", "it lacks", repr(lacks)):
        from_torch(model, to_torch(softmax, small.random_variables(softmax)))
    variables = small.random_variables(model)
    chex.assert_trees_all_equal(from_torch(model, to_torch(model, variables)), variables)


# Tools


@pytest.mark.parametrize("kind", RIVALS)
def test_the_compile_report_takes_their_layers(refuses, kind):
    options = {"attention": kind, "tokens": 10, "batch": 2}
    case = load_case("layer", {**options, "form": "train"}, [])
    weights, x, _, _ = case.arguments
    assert x == jax.ShapeDtypeStruct((2, 10, 768), jnp.bfloat16)
    out, gradients = jax.eval_shape(case.function, *case.arguments)
    assert out == x
    assert gradients == (weights, x)
    inference = load_case("layer", options, [])
    assert jax.eval_shape(inference.function, *inference.arguments) == x
    with refuses(f"there are no Pallas kernels of {kind} attention"):
        load_case("layer", {**options, "implementation": "pallas"}, [])
