import functools
import math
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import castling_jax
from castling_jax.models import mvitv2
from castling_jax.models.attention.core import Kind
from castling_jax.models.attention.kinds import make_core
from castling_jax.models.macs import count_macs
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import bind, flatten, forward_train, get_variables, unflatten
from tests.models import small
from tests.models.test_position import resize_with_interp
from tests.ops import reference

KINDS = ["castling", "linear_angular", "softmax", "angular", "softmax_taps", *small.LINEAR, "taylor"]
RIVALS = [kind for kind in small.LINEAR if kind != "relu_linear"]
# Queries on a finer grid than keys, on the same by unlike strides of both, and on a coarser one, as at the starts of
# MViTv2's stages. The last is of no published model.
STRIDES = [((1, 1), (4, 4)), ((2, 2), (2, 2)), ((2, 2), (1, 1)), ((2, 1), (3, 2))]
FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
THRESHOLD = 0.1


@functools.cache
def compiled(model):
    return jax.jit(lambda v, x, t: castling_jax.apply(model, v, x, mask_threshold=t, return_densities=True))


def run(model, variables, images, threshold=None):
    return compiled(model)(variables, images, threshold)


def golden_model(file, **arguments):
    sizes = {word: file.meta[word] for word in ("depths", "embed_dim", "num_heads", "stride_q", "num_classes")}
    return abstract_model("mvitv2_tiny", **(sizes | {"image_size": file.meta["img_size"]} | arguments))


# Pooling attention once more in plain float64 numpy


def pool(x, kernel, stride):
    """x [batch, height, width, heads, dim], kernel [3, 3, 1, dim]: a loop over the pooled grid and the taps."""
    batch, height, width, heads, dim = x.shape
    out = np.zeros((batch, -(-height // stride[0]), -(-width // stride[1]), heads, dim))
    for y, x_, row, column in np.ndindex(*out.shape[1:3], 3, 3):
        from_y, from_x = y * stride[0] + row - 1, x_ * stride[1] + column - 1
        if 0 <= from_y < height and 0 <= from_x < width:
            out[:, y, x_] += x[:, from_y, from_x] * kernel[row, column, 0]
    return out


def distance(query, key, queries, keys):
    """The row of the table, in exact arithmetic: the shorter side's steps are longer."""
    steps = query * max(Fraction(keys, queries), 1) + (keys - 1 - key) * max(Fraction(queries, keys), 1)
    return math.floor(steps)


def dense_positions(q, tables, q_grid, kv_grid):
    """[batch, heads, queries, keys], pair by pair."""
    rows, columns = (
        table if len(table) == 2 * max(sides) - 1 else resize_with_interp(table, 2 * max(sides) - 1)
        for table, *sides in zip(tables, q_grid, kv_grid, strict=True)
    )
    bias = np.zeros((q.shape[0], q.shape[2], math.prod(q_grid), math.prod(kv_grid)))
    for y, x, row, column in np.ndindex(*q_grid, *kv_grid):
        position = rows[distance(y, row, q_grid[0], kv_grid[0])] + columns[distance(x, column, q_grid[1], kv_grid[1])]
        query = y * q_grid[1] + x
        bias[:, :, query, row * kv_grid[1] + column] = q[:, query] @ position
    return bias


def pooled_parts(x, parameters, heads, strides):
    """(q, k, v, query_values) as tokens, and the grids of queries and keys."""
    qkv = small.dense(x, parameters["qkv"])
    q, k, v = np.moveaxis(qkv.reshape(*x.shape[:3], 3, heads, -1), 3, 0)

    def tokens(values, name, stride):
        on_grid = pool(values, parameters[f"pool_{name}"]["kernel"], stride)
        normed = small.layer_norm(on_grid, parameters[f"norm_{name}"])
        return normed.reshape(len(x), -1, *normed.shape[3:]), on_grid.shape[1:3]

    (q, q_grid), (k, kv_grid) = tokens(q, "q", strides[0]), tokens(k, "k", strides[1])
    return q, k, tokens(v, "v", strides[1])[0], tokens(v, "v", strides[0])[0], q_grid, kv_grid


def pooling_attention(x, parameters, *, heads, strides, attention, threshold=None):
    """(output, mask density); `threshold` may be a function of the softmax weights."""
    q, k, v, query_values, q_grid, kv_grid = pooled_parts(x, parameters, heads, strides)
    branch = parameters.get("softmax_branch", parameters)
    density = 0.0
    if attention in (*small.WITH_MASK, *small.WITH_SOFTMAX):
        bias = dense_positions(q, (branch["rel_pos_h"], branch["rel_pos_w"]), q_grid, kv_grid)
        weights = reference.softmax(reference.scaled_scores(q, k, bias))
    if attention in small.WITH_SOFTMAX:
        out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    elif attention in small.LINEAR:
        out = small.LINEAR[attention](q, k, v, parameters)
    elif attention == "taylor":
        out, density = small.taylor(q, k, v, threshold, bias)
    elif attention == "angular":
        out = reference.normalize(np.einsum("bhqk,bkhd->bqhd", reference.kernel(q, k), v))
    elif attention == "linear_angular":
        out = reference.linear_angular(q, k, v, query_values=query_values)
    else:
        # No weight is so near the threshold that rounding decides.
        assert np.min(np.abs(weights - threshold)) > 1e-5 * threshold
        out, density = reference.castling(q, k, v, threshold=threshold, bias=bias, query_values=query_values)
    if attention not in small.WITHOUT_TAPS:
        out = out + reference.convolve_grid(query_values, parameters["token_kernel"], q_grid)
    return small.dense((out + q).reshape(len(x), *q_grid, -1), parameters["proj"]), density


def attention_module(strides, grid=(6, 6), **arguments):
    core = make_core(**({"attention": "castling", "form": "train", "token_conv": "2d"} | arguments))
    pooling = mvitv2.Pooling(grid, *strides)
    return mvitv2.MultiScaleAttention(10, 12, 3, pooling, core, small.layers(), qkv_bias=True)


def randomise(module, seed=0):
    """Sets every parameter to a random number, and returns them as a nested dict in float64."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape) * 0.6, jnp.float32)
        leaves["/".join(path)] = np.asarray(variable[...], np.float64)
    return unflatten(leaves)


@pytest.mark.parametrize(
    ("attention", "strides"),
    [
        *(("castling", strides) for strides in STRIDES),
        *((kind, STRIDES[0]) for kind in KINDS[1:] if kind not in RIVALS),
        *(pytest.param(kind, STRIDES[0], marks=pytest.mark.slow) for kind in RIVALS),
    ],
)
def test_pooling_attention_agrees_with_the_float64_reference(attention, strides):
    # The image's grid is not the tables', its sides are unlike, and no stride divides 7.
    module = attention_module(strides, attention=attention)
    parameters = randomise(module)
    x = np.random.default_rng(1).normal(size=(2, 7, 4, 10))
    threshold = 1 / math.prod(mvitv2.pooled((7, 4), strides[1]))  # the weights' mean
    out, density = jax.jit(lambda x: module(x, mask_threshold=threshold))(jnp.asarray(x, jnp.float32))
    expected, expected_density = pooling_attention(
        x, parameters, heads=3, strides=strides, attention=attention, threshold=threshold
    )
    # A dozen sums of 3 to 28 terms one after another.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
    assert float(density) == pytest.approx(expected_density, rel=1e-6)
    if attention in small.WITH_MASK:
        assert 0.05 < expected_density < 0.95


@pytest.mark.parametrize(
    ("q_grid", "kv_grid"), [((6, 6), (2, 2)), ((3, 3), (6, 6)), ((5, 4), (3, 4)), ((2, 7), (3, 1))]
)
@pytest.mark.parametrize("length", [11, 5])
def test_decomposed_positions_are_the_dense_formula(q_grid, kv_grid, length):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, math.prod(q_grid), 3, 4))
    tables = rng.normal(size=(2, length, 4))
    arrays = [jnp.asarray(array, jnp.float32) for array in (q, *tables)]
    rows, columns = jax.jit(lambda *arrays: mvitv2.decomposed_bias(*arrays, q_grid, kv_grid))(*arrays)
    assert rows.shape == (2, 3, math.prod(q_grid), kv_grid[0])
    assert columns.shape == (2, 3, math.prod(q_grid), kv_grid[1])
    dense = (rows[..., :, None] + columns[..., None, :]).reshape(2, 3, math.prod(q_grid), -1)
    np.testing.assert_allclose(dense, dense_positions(q, tables, q_grid, kv_grid), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("queries", "keys"), [(10, 6), (9, 3), (6, 10), (7, 7), (1, 5)])
def test_distances_are_exact_and_within_the_table(queries, keys):
    # 10 to 6 has whole numbers that floating-point ratios miss.
    longer = max(queries, keys)
    table = jnp.arange(2 * longer - 1, dtype=jnp.float32)[:, None]
    found = mvitv2.relative_positions(table, queries, keys)[..., 0]
    expected = [[distance(i, j, queries, keys) for j in range(keys)] for i in range(queries)]
    chex.assert_trees_all_equal(found, jnp.asarray(expected, jnp.float32))
    assert float(found.min()) >= 0


@pytest.mark.parametrize("strides", STRIDES)
def test_query_values_are_the_values_pooled_as_the_queries_are(monkeypatch, strides):
    given = {}

    def record(kind, q, k, v, **arguments):
        given.update(v=v, query_values=arguments["query_values"])
        assert arguments["grid"] == q_grid
        return q, jnp.zeros(())

    monkeypatch.setattr(Kind, "__call__", record)
    module = attention_module(strides)
    parameters = randomise(module)
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 10))
    _, _, v, query_values, q_grid, kv_grid = pooled_parts(x, parameters, 3, strides)

    @jax.jit
    def values(x):
        module(x, mask_threshold=THRESHOLD)
        return dict(given)

    given = values(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(given["v"], v, rtol=0, atol=1e-5)
    if strides[0] == strides[1]:
        assert given["query_values"] is None
        return
    np.testing.assert_allclose(given["query_values"], query_values, rtol=0, atol=1e-5)
    # Where a token of the one grid is one of the other's its value is the same.
    on_queries = given["query_values"].reshape(2, *q_grid, 3, 4)
    on_keys = given["v"].reshape(2, *kv_grid, 3, 4)
    steps = [math.lcm(*axis) for axis in zip(*strides, strict=True)]
    shared = [
        values[:, :: steps[0] // stride[0], :: steps[1] // stride[1]]
        for values, stride in zip((on_queries, on_keys), strides, strict=True)
    ]
    chex.assert_trees_all_close(*shared, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (4, 1)])
def test_the_skip_path_takes_the_maximum_on_the_queries_grid(stride):
    x = np.random.default_rng(0).normal(size=(1, 7, 6, 2)).astype(np.float32)
    out = mvitv2.max_pool(jnp.asarray(x), stride)
    assert out.shape[1:3] == mvitv2.pooled((7, 6), stride)
    for y, x_ in np.ndindex(*out.shape[1:3]):
        top, left = (at * step - (step + 1) // 2 * (step > 1) for at, step in zip((y, x_), stride, strict=True))
        bottom, right = (start + step + (step > 1) for start, step in zip((top, left), stride, strict=True))
        window = x[:, max(top, 0) : bottom, max(left, 0) : right]
        chex.assert_trees_all_equal(out[:, y, x_], jnp.asarray(window.max(axis=(1, 2))))


# The model


def test_agrees_with_timm(golden):
    file = golden("mvitv2_small_cfg")
    model = golden_model(file, attention="softmax")
    variables = castling_jax.convert.from_torch(model, file.group("weights"))
    logits, densities = run(model, variables, jnp.asarray(file["input_nchw"].transpose(0, 2, 3, 1)))
    # Both sides are float32: each is off by some 1e-6.
    np.testing.assert_allclose(logits, file["logits"], rtol=0, atol=5e-6 * np.max(np.abs(file["logits"])))
    chex.assert_trees_all_equal(densities, jnp.zeros(4))


@pytest.mark.parametrize("attention", ["castling", pytest.param("softmax", marks=pytest.mark.slow)])
def test_bfloat16_agrees_within_its_rounding(attention):
    models = [small.small_mvit(attention=attention, dtype=dtype, depths=(1,)) for dtype in ("float32", "bfloat16")]
    variables, images = small.random_variables(models[0]), small.random_images(2, 32, 32)
    # No weight is under 1e-6, so that no rounding decides a mask.
    (expected, _), (logits, densities) = (run(model, variables, images, 1e-6) for model in models)
    chex.assert_type([logits, densities], jnp.float32)
    # About 15 arrays in a row are rounded to 2^-8 of their elements; independent errors grow with the square root.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=15**0.5 * 2**-8 * np.max(np.abs(expected)))


def test_castling_at_threshold_one_is_its_inference_form():
    # 44 pixels have the grids 11 and 6, and keys on 3 and 6; 29 have 8 and 4, and keys on 2 and 4.
    models = [small.small_mvit(form=form, depths=(1, 1)) for form in ("train", "inference")]
    variables, images = small.random_variables(models[0]), small.random_images(2, 44, 29)
    logits, densities = run(models[0], variables, images, 1.0)
    switched = run(models[1], castling_jax.to_inference(variables), images)[0]
    # The same sums, which two programs may order differently.
    np.testing.assert_allclose(logits, switched, rtol=0, atol=1e-5 * np.max(np.abs(switched)))
    chex.assert_trees_all_equal(densities, jnp.zeros(2))


def test_the_branch_and_its_positions_matter_under_the_threshold():
    model = small.small_mvit(form="train", depths=(1, 1))
    variables, images = small.random_variables(model), small.random_images(2, 44, 29)
    logits, densities = run(model, variables, images, THRESHOLD)
    assert np.all((densities > 0.05) & (densities < 0.95))
    for word in ("rel_pos_h", "rel_pos_w"):
        leaves = flatten(variables)
        without = unflatten({path: leaf * (not path.endswith(word)) for path, leaf in leaves.items()})
        assert np.max(np.abs(run(model, without, images, THRESHOLD)[0] - logits)) > 1e-3
    assert np.max(np.abs(run(model, variables, images, 1.0)[0] - logits)) > 1e-2


def test_images_of_another_size_resize_the_tables():
    model, larger = (small.small_mvit(attention="softmax", depths=(1, 1), image_size=size) for size in (32, 44))
    variables, images = small.random_variables(model), small.random_images(1, 44, 44)
    leaves, shapes = flatten(variables), flatten(get_variables(larger))
    tables = {path: shape.shape[0] for path, shape in shapes.items() if "rel_pos" in path}
    assert set(tables.values()) == {21, 11}
    by_hand = {
        path: jnp.asarray(resize_with_interp(leaves[path], length), jnp.float32) for path, length in tables.items()
    }
    logits, _ = run(model, variables, images)
    expected, _ = run(larger, unflatten(leaves | by_hand), images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def test_features_are_the_stages_outputs():
    model = small.small_mvit(depths=(1, 1), attention="linear_angular")
    variables, images = small.random_variables(model), small.random_images(2, 44, 29)

    @jax.jit
    def both(variables, images):
        bound = bind(model, variables)
        return bound.features(images), bound(images)[0]

    features, logits = both(variables, images)
    assert [feature.shape for feature in features] == [(2, 11, 8, 8), (2, 6, 4, 16)]
    # The classifier reads the last of them.
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    mean = small.layer_norm(np.asarray(features[-1], np.float64), params["norm"]).mean(axis=(1, 2))
    np.testing.assert_allclose(logits, small.dense(mean, params["head"]["fc"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("depths", [(1,), pytest.param((1, 2, 1), marks=pytest.mark.slow)])
def test_gradients_are_finite_and_reach_every_parameter(depths):
    model = small.small_mvit(depths=depths)
    variables, images = small.random_variables(model), small.random_images(2, 32, 32)
    loss = jax.jit(
        jax.grad(lambda v: jnp.sum(jnp.square(castling_jax.apply(model, v, images, mask_threshold=THRESHOLD))))
    )
    gradients = loss(variables)
    chex.assert_tree_all_finite(gradients)
    silent = [path for path, gradient in flatten(gradients).items() if not jnp.any(gradient != 0)]
    assert not silent


def test_relative_positions_stand_in_the_branch_and_only_there():
    def paths(**arguments):
        return [path for path in flatten(get_variables(small.small_mvit(**arguments))) if "rel_pos" in path]

    assert len(paths()) == 8
    assert all("/attn/softmax_branch/rel_pos_" in path for path in paths())
    assert len(paths(attention="softmax")) == 8
    assert all("/attn/rel_pos_" in path for path in paths(attention="softmax"))
    assert not paths(form="inference") + paths(attention="linear_angular") + paths(attention="angular")


@pytest.mark.slow
def test_one_seed_starts_every_kind_alike():
    trees = [
        flatten(
            get_variables(castling_jax.create_model("mvitv2_tiny", **(small.MVIT_SIZES | {"depths": (1,)} | arguments)))
        )
        for arguments in ({}, {"form": "inference"}, {"attention": "softmax"})
    ]
    for other in trees[1:]:
        shared = trees[0].keys() & other.keys()
        assert len(shared) >= len(trees[0]) - 3
        chex.assert_trees_all_equal(*({path: tree[path] for path in shared} for tree in (trees[0], other)))
    for path, leaf in trees[0].items():
        if "rel_pos" in path:
            # The deviation of 120 draws.
            assert 0.01 < float(jnp.std(leaf)) < 0.03, path
        if path.endswith("token_kernel"):
            chex.assert_trees_all_equal(leaf, jnp.zeros(leaf.shape))


def test_every_residual_branch_draws_its_own_drop_path_at_a_rate_linear_over_depth(monkeypatch):
    draws, rates = [], []

    def record(x, rate, drawn):
        draws.append(drawn[0])
        rates.append(rate)
        return x

    monkeypatch.setattr(mvitv2, "drop_path", record)
    model = small.small_mvit(attention="softmax", drop_path_rate=0.3)
    variables, images = small.random_variables(model), small.random_images(1, 4, 4)

    @jax.jit
    def draws_of(key):
        forward_train(model, variables, images, key=key)
        return draws

    numbers = [drawn.item() for drawn in draws_of(jax.random.key(0))]
    assert len(numbers) == len(set(numbers)) == 8
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(("name", "rate"), [("mvitv2_tiny", 0.1), ("mvitv2_small", 0.1), ("mvitv2_base", 0.3)])
def test_the_variants_have_their_published_drop_path(name, rate):
    model = abstract_model(name, attention="softmax")
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 4, 8]
    assert model.stages[-1].blocks[-1].drop_path_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("overrides", "path", "shape"),
    [
        ({"embed_dim": 16}, "params/stages/2/blocks/0/attn/proj/kernel", (64, 64)),
        ({"depths": (1, 1, 1, 2)}, "params/stages/3/blocks/1/norm1/scale", (64,)),
        ({"num_heads": 2}, "params/stages/1/blocks/0/attn/pool_v/kernel", (3, 3, 1, 4)),
        ({"in_chans": 1}, "params/patch_embed/proj/kernel", (7, 7, 1, 8)),
        ({"mlp_ratio": 2.5}, "params/stages/0/blocks/0/mlp/fc1/kernel", (8, 20)),
        ({"token_conv": "1d"}, "params/stages/1/blocks/0/attn/token_kernel", (9, 2)),
        ({"token_kernel_size": 5}, "params/stages/1/blocks/0/attn/token_kernel", (5, 5, 2)),
        ({"image_size": 44}, "params/stages/0/blocks/0/attn/softmax_branch/rel_pos_h", (21, 8)),
        ({"stride_q": [[2, 2], [2, 2], [2, 2]]}, "params/stages/0/blocks/0/attn/softmax_branch/rel_pos_w", (7, 8)),
        ({"stride_kv_adaptive": (2, 2)}, "params/stages/2/blocks/0/attn/softmax_branch/rel_pos_w", (7, 8)),
    ],
)
def test_overrides_take_effect(overrides, path, shape):
    assert flatten(get_variables(abstract_model("mvitv2_tiny", **(small.MVIT_SIZES | overrides))))[path].shape == shape


def test_qkv_bias_can_be_left_out():
    paths = flatten(get_variables(small.small_mvit(qkv_bias=False)))
    assert "params/stages/0/blocks/0/attn/qkv/kernel" in paths
    assert "params/stages/0/blocks/0/attn/qkv/bias" not in paths


def test_the_strides_of_keys_follow_those_of_queries():
    model = abstract_model("mvitv2_tiny", attention="softmax")
    strides = [(block.stride_q[0], block.attn.stride_kv[0]) for stage in model.stages for block in stage.blocks]
    assert strides == [(1, 4), (2, 2), (1, 2), (2, 1), *[(1, 1)] * 4, (2, 1), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published", "positions"),
    [
        ("mvitv2_tiny", 4.68e9, 35e6),
        pytest.param("mvitv2_small", 6.96e9, 48e6, marks=pytest.mark.slow),
        pytest.param("mvitv2_base", 10.10e9, 72e6, marks=pytest.mark.slow),
    ],
)
def test_softmax_models_have_the_published_macs(monkeypatch, name, published, positions):
    model = abstract_model(name, attention="softmax")
    macs = count_macs(model)
    # Published to two decimals of a G, and to whole M.
    assert macs == pytest.approx(published, abs=0.006e9)
    monkeypatch.setattr(mvitv2, "decomposed_bias", lambda *_: None)
    assert macs - count_macs(model) == pytest.approx(positions, abs=0.6e6)


@pytest.mark.parametrize("form", ["train", "inference"])
def test_castling_macs_are_counted_by_hand(form):
    model = small.small_mvit(form=form, depths=(1, 1), num_classes=10)
    # Width, heads' width, input tokens, queries, keys and the queries' and keys' sides.
    total = 64 * 7 * 7 * 3 * 8
    for width, width_in, tokens, side, key_side, unlike in [(8, 8, 64, 8, 2, True), (16, 8, 64, 4, 4, False)]:
        queries, keys, head_dim = side**2, key_side**2, 8
        pooling = 9 * width * (queries + 2 * keys + (queries if unlike else 0))
        attention = head_dim * width * (queries + keys) + 9 * width * queries
        if form == "train":
            attention += 2 * queries * keys * width + queries * width * 2 * key_side
        skip = tokens * width_in * width if width != width_in else 0
        total += tokens * width_in * 3 * width + pooling + attention + skip + queries * width * width * 9
    assert count_macs(model) == total + 16 * 10


# Refusals


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"depths": ()}, ("depths", "()")),
        ({"depths": (1, 0)}, ("depths", "(1, 0)")),
        ({"depths": 3}, ("depths", "3")),
        ({"stride_q": ((1, 1),)}, ("stride_q", "3 stages", "((1, 1),)")),
        ({"stride_q": (1, 2, 2)}, ("stride_q", "pair", "(1, 2, 2)")),
        ({"stride_q": ((1, 1), (2, 2), (0, 2))}, ("stride_q", "positive")),
        ({"stride_kv_adaptive": 4}, ("stride_kv_adaptive", "pair", "4")),
        ({"num_heads": 3}, ("3 heads", "8")),
        ({"num_heads": 0}, ("num_heads must be an integer from 1", "0")),
        ({"image_size": 0}, ("image_size", "0")),
        ({"drop_path_rate": 1.0}, ("drop_path_rate must be a number in [0, 1)", "1.0")),
        ({"token_conv": "3d"}, ("token_conv", "'3d'", "2d")),
        ({"token_kernel_size": 4}, ("token_kernel_size", "odd", "4")),
        ({"patch_size": 8}, ("mvitv2_tiny", "'patch_size'")),
        ({"depth": 4}, ("'depth'", "did you mean 'depths'")),
    ],
)
def test_arguments_that_do_not_fit(refuses, overrides, fragments):
    with refuses(*fragments):
        abstract_model("mvitv2_tiny", **(small.MVIT_SIZES | overrides))


@pytest.mark.parametrize(
    ("shape", "fragments"), [((32, 0, 3), ("32 x 0", "empty")), ((32, 32, 1), ("channels", "3", "1"))]
)
def test_images_that_do_not_fit(refuses, shape, fragments):
    model = small.small_mvit()
    with refuses(*fragments):
        castling_jax.apply(model, small.random_variables(model), jnp.zeros((1, *shape)), mask_threshold=0.1)


def test_castling_in_training_form_needs_a_threshold(refuses):
    model = small.small_mvit()
    with refuses("mask_threshold", "at least 0"):
        run(model, small.random_variables(model), small.random_images(1, 32, 32))
