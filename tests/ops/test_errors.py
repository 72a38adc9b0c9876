import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax import InputError, ops
from castling_jax.errors import check_at_least, check_at_most, check_between, check_known, refusing

Q = jnp.ones((2, 5, 3, 4))
MASKED = {
    "masked_softmax": ops.masked_softmax_attention,
    "castling": ops.castling_attention,
}
ATTENTIONS = {
    "angular": ops.angular_attention,
    "linear_angular": ops.linear_angular_attention,
    "masked_softmax": lambda q, k, v: ops.masked_softmax_attention(q, k, v, mask_threshold=0.1),
    "castling": lambda q, k, v: ops.castling_attention(q, k, v, mask_threshold=0.1),
    "castling at one": lambda q, k, v: ops.castling_attention(q, k, v, mask_threshold=1.0),
}


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_an_unknown_name_is_answered_with_the_nearest_and_all(refuses):
    with refuses("colour 'bleu'", "did you mean 'blue'", "red, blue"):
        check_known("colour", "bleu", ["red", "blue"])
    with refuses("colour 17", "known: none"):
        check_known("colour", 17, [])
    check_known("colour", "red", ["red", "blue"])


def test_numbers_are_refused_beyond_their_limits_and_taken_on_them(refuses):
    for too_low in (0, np.nan):
        with refuses(f"--batch must be at least 1, not {too_low}."):
            check_at_least("--batch", too_low, 1)
    for too_high in (0.75, np.nan):
        with refuses(f"begin must be at most end, 0.5, not {too_high}."):
            check_at_most("begin", too_high, 0.5, "end")
    for outside in (-1, 4, np.nan):
        with refuses(f"id must be from 0 to 3, not {outside}."):
            check_between("id", outside, 0, 3)
    check_at_least("--batch", 1, 1)
    check_at_most("begin", 0.5, 0.5, "end")
    check_between("id", 0, 0, 3)
    check_between("id", 3, 0, 3)


def test_errors_of_other_packages_become_one_sentence(refuses, tmp_path):
    with refuses("'x.bin' is damaged (it is short; read 3 of 7 bytes)."), refusing(ValueError, "'x.bin' is damaged"):
        raise ValueError("it is short. read\n3 of 7 bytes.")
    with refuses("it is damaged (KeyError('model'))."), refusing(KeyError, "it is damaged"):
        {}["model"]
    with refuses("'x' cannot be read (No such file or directory)."), refusing(OSError, "'x' cannot be read"):
        (tmp_path / "x").read_bytes()
    with refuses("it is damaged (ValueError())."), refusing(ValueError, "it is damaged"):
        raise ValueError
    # A refusal is a ValueError too, and has its sentence already; what is of another kind is not bad input.
    with refuses("mine."), refusing(ValueError, "it is damaged"):
        raise InputError("mine.")
    with pytest.raises(TypeError, match="a bug"), refusing(ValueError, "it is damaged"):
        raise TypeError("a bug")


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize(
    ("q", "k", "v", "fragments"),
    [
        ((5, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4), ["q must be [batch, tokens, heads, dim]", "(5, 3, 4)"]),
        ((2, 5, 3, 4), (1, 5, 3, 4), (2, 5, 3, 4), ["k must have q's batch and heads", "(1, 5, 3, 4)"]),
        ((2, 5, 3, 4), (2, 5, 3, 4), (2, 5, 1, 4), ["v must have q's batch and heads", "(2, 5, 1, 4)"]),
        ((2, 5, 3, 4), (2, 5, 3, 8), (2, 5, 3, 4), ["same key_dim", "4 and 8"]),
        ((2, 5, 3, 4), (2, 5, 3, 4), (2, 6, 3, 4), ["equally many tokens", "5 and 6"]),
    ],
    ids=["axes", "batch", "heads", "key_dim", "tokens"],
)
def test_shapes_that_do_not_fit(refuses, name, q, k, v, fragments):
    with refuses(*fragments):
        ATTENTIONS[name](jnp.ones(q), jnp.ones(k), jnp.ones(v))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_integers_are_refused(refuses, name):
    with refuses("k", "int32", "float32 or bfloat16"):
        ATTENTIONS[name](Q, Q.astype(jnp.int32), Q)


def test_kernels_refuse_a_dense_bias_in_float16(refuses):
    """Mosaic compiles no loads of float16. A pair's factors are rounded to q's dtype instead."""
    bias = jnp.ones((1, 3, 5, 5), jnp.float16)

    def run(bias, implementation):
        return ops.masked_softmax_attention(Q, Q, Q, mask_threshold=0.1, bias=bias, implementation=implementation)

    with refuses("the kernels take a dense bias in one dtype, float32 or bfloat16, not in float16"):
        run(bias, "pallas")
    assert "pallas_call" not in str(jax.make_jaxpr(lambda bias: run(bias, "auto"))(bias))
    assert "pallas_call" in str(jax.make_jaxpr(lambda bias: run((bias[..., :1], bias), "auto"))(bias))


@pytest.mark.parametrize("kernel", [ops.angular_kernel, lambda q, k: ops.angular_kernel_series(q, k, 2)])
def test_kernels_refuse_shapes_that_do_not_fit(refuses, kernel):
    with refuses("same key_dim", "4 and 3"):
        kernel(Q, Q[..., :3])


@pytest.mark.parametrize("order", [-1, 1.5, "2", None])
def test_the_order_of_the_series(refuses, order):
    with refuses("order", repr(order), "integer of at least 0"):
        ops.angular_kernel_series(Q, Q, order)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("threshold", [-0.1, float("nan"), -np.inf, np.float32(-1), jnp.float32(-1)])
def test_a_known_threshold_must_be_a_number_of_at_least_zero(refuses, name, threshold):
    with refuses("mask_threshold", str(float(threshold)), "at least 0"):
        MASKED[name](Q, Q, Q, mask_threshold=threshold)


@pytest.mark.parametrize("name", MASKED)
def test_a_threshold_must_be_a_scalar(refuses, name):
    with refuses("mask_threshold", "scalar", "(2,)"):
        MASKED[name](Q, Q, Q, mask_threshold=jnp.asarray([0.1, 0.2]))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(("threshold", "density"), [(-0.1, 1), (float("nan"), 0)])
def test_a_traced_threshold_is_not_seen(name, threshold, density):
    out, kept = jax.jit(lambda t: MASKED[name](Q, Q, Q, mask_threshold=t))(threshold)
    assert np.all(np.isfinite(out))
    assert float(kept) == pytest.approx(density, abs=1e-6)


@pytest.mark.parametrize("name", ["linear_angular", "castling", "castling at one"])
def test_queries_unlike_keys_need_query_values(refuses, name):
    with refuses("5 queries and 7 keys", "query_values [batch, queries, heads, value_dim]"):
        ATTENTIONS[name](Q, jnp.ones((2, 7, 3, 4)), jnp.ones((2, 7, 3, 6)))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([0, 1], "name 5 keys, one a query, not (2,)"),
        ([0, 1, 2, 3, 5], "keys from 0 to 4, not 0 to 5"),
        ([-1, 0, 1, 2, 3], "keys from 0 to 4, not -1 to 3"),
    ],
)
def test_query_values_by_tokens_that_there_are_not(refuses, tokens, said):
    with refuses("query_values must", said):
        ops.linear_angular_attention(Q, Q, Q, query_values=np.array(tokens))


def test_query_values_of_another_shape(refuses):
    with refuses("query_values", "(2, 5, 3, 4)", "(2, 4, 3, 4)"):
        ops.linear_angular_attention(Q, Q, Q, query_values=Q[:, :4])


@pytest.mark.parametrize(
    "call",
    [
        lambda name: ops.linear_angular_attention(Q, Q, Q, implementation=name),
        lambda name: ops.masked_softmax_attention(Q, Q, Q, mask_threshold=0.1, implementation=name),
        lambda name: ops.castling_attention(Q, Q, Q, mask_threshold=0.1, implementation=name),
    ],
    ids=["linear_angular", "masked_softmax", "castling"],
)
def test_an_unknown_implementation(refuses, call):
    with refuses("implementation 'xlaa'", "did you mean 'xla'", "auto"):
        call("xlaa")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("threshold", [0.1, 1.0])
@pytest.mark.parametrize(
    ("bias", "fragments"),
    [
        (jnp.ones((2, 3, 5, 6)), ["5 keys", "(2, 3, 5, 6)"]),
        (jnp.ones((3, 3, 5, 5)), ["1 or 2", "(3, 3, 5, 5)"]),
        (jnp.ones((3, 5, 5)), ["(3, 5, 5)"]),
        ((jnp.ones((2, 3, 5, 2)), jnp.ones((2, 3, 5, 3))), ["pair", "product is 5", "(2, 3, 5, 2) and (2, 3, 5, 3)"]),
        ((jnp.ones((2, 3, 4, 1)), jnp.ones((2, 3, 5, 5))), ["3 heads", "5 queries", "(2, 3, 4, 1)"]),
        ((jnp.ones((2, 3, 5, 5)),), ["pair", "(2, 3, 5, 5)"]),
    ],
    ids=["keys", "batch", "axes", "factors", "queries", "no pair"],
)
def test_a_bias_that_does_not_fit(refuses, name, bias, fragments, threshold):
    with refuses(*fragments):
        MASKED[name](Q, Q, Q, mask_threshold=threshold, bias=bias)


@pytest.mark.parametrize(
    ("kernel", "arguments", "fragments"),
    [
        ((4, 3), {}, ["odd", "(4, 3)"]),
        ((3, 2, 3), {"grid": (1, 5)}, ["odd", "(3, 2, 3)"]),
        ((3,), {}, ["[taps, heads]", "(3,)"]),
        ((3, 3, 3, 3), {}, ["[taps, heads]", "(3, 3, 3, 3)"]),
        ((3, 2), {}, ["(3, 2)", "3 heads"]),
        ((3, 3, 3), {}, ["grid=None", "(3, 3, 3)"]),
        ((3, 3), {"grid": (1, 5)}, ["grid=(1, 5)", "(3, 3)"]),
        ((3, 3, 3), {"grid": (2, 2)}, ["(2, 2)", "5 tokens"]),
        ((3, 3), {"prefix_tokens": 6}, ["prefix_tokens", "from 0 to 5", "6"]),
        ((3, 3), {"prefix_tokens": -1}, ["prefix_tokens", "-1"]),
    ],
)
def test_a_token_kernel_or_grid_that_does_not_fit(refuses, kernel, arguments, fragments):
    with refuses(*fragments):
        ops.depthwise_convolution(Q, jnp.ones(kernel), **arguments)


def test_values_of_a_convolution_have_four_axes(refuses):
    with refuses("v must be [batch, tokens, heads,", "(5, 3, 3)"):
        ops.depthwise_convolution(jnp.ones((5, 3, 3)), jnp.ones((3, 3)))


@pytest.mark.parametrize("kernel", [(4, 3), (3, 1)])
def test_attention_refuses_such_a_token_kernel_too(refuses, kernel):
    with refuses("token kernel"):
        ops.linear_angular_attention(Q, Q, Q, jnp.ones(kernel))
    with refuses("token kernel"):
        ops.castling_attention(Q, Q, Q, jnp.ones(kernel), mask_threshold=0.1)


def test_a_grid_kernel_does_not_go_into_attention(refuses):
    with refuses("grid", "(3, 3, 3)"):
        ops.linear_angular_attention(Q, Q, Q, jnp.ones((3, 3, 3)))


@pytest.mark.parametrize("threshold", [None, "half"])
def test_a_threshold_that_is_no_number(refuses, threshold):
    with refuses("mask_threshold must be a number", repr(threshold)):
        ops.masked_softmax_attention(Q, Q, Q, mask_threshold=threshold)


def test_nan_is_not_hidden():
    broken = Q.at[0, 0, 0, 0].set(jnp.nan)
    assert jnp.isnan(ops.angular_kernel(broken, Q)[0, 0, 0]).all()
    assert jnp.isnan(ops.masked_softmax_attention(broken, Q, Q, mask_threshold=0.1)[0][0, 0, 0]).all()


@pytest.mark.parametrize("query_values", [[0, 2, 4], jnp.arange(3)])
def test_tokens_that_are_not_in_numpy(refuses, query_values):
    with refuses("query_values that name keys must be a NumPy array"):
        ops.linear_angular_attention(Q[:, :3], Q, Q, query_values=query_values)


@pytest.mark.parametrize("grid", [(5,), (-1, -5), (5, 1, 1)])
def test_a_grid_that_is_none(refuses, grid):
    with refuses(f"a grid of {grid} does not hold the 5 tokens"):
        ops.depthwise_convolution(Q, jnp.ones((3, 3, 3)), grid=grid)


def test_a_kernel_without_axes(refuses):
    with refuses("a token kernel must be [taps, heads]", "not ()"):
        ops.depthwise_convolution(Q, jnp.ones(()))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_is_no_array(refuses, name):
    with refuses("k must be an array, not list"):
        ATTENTIONS[name](Q, [1.0], Q)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (jnp.ones((2, 3, 5, 5), bool), "bias must be of a floating type such as float32 or bfloat16, not bool."),
        ((jnp.ones((2, 3, 5, 1), int), jnp.ones((2, 3, 5, 5))), "bias must be of a floating type"),
        (1.0, "bias must be an array, not float."),
    ],
    ids=["a mask", "integers", "a number"],
)
def test_a_bias_that_is_none(refuses, name, bias, said):
    with refuses(said):
        MASKED[name](Q, Q, Q, mask_threshold=0.1, bias=bias)


def test_a_convolution_of_integers(refuses):
    with refuses("v must be of a floating type", "not int32"):
        ops.depthwise_convolution(Q.astype(jnp.int32), jnp.ones((3, 3)))
    with refuses("token_kernel must be an array, not list"):
        ops.depthwise_convolution(Q, [0.5])


@pytest.mark.parametrize(("grid", "prefix_tokens"), [((1.0, 5.0), 0), ((1, 5), 1.0), ((1, 5), None)])
def test_a_grid_that_is_not_of_integers(refuses, grid, prefix_tokens):
    with refuses("grid and prefix_tokens must be integers"):
        ops.depthwise_convolution(Q, jnp.ones((3, 3, 3)), grid=grid, prefix_tokens=prefix_tokens)


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
def test_query_values_are_taken_in_the_values_type(implementation):
    q, own = Q[:, :3].astype(jnp.bfloat16), Q[:, :3]
    run = jax.jit(lambda k, own: ops.linear_angular_attention(q, k, k, query_values=own, implementation=implementation))
    assert run(Q.astype(jnp.bfloat16), own).dtype == jnp.bfloat16


def test_a_series_of_a_numpy_order():
    assert ops.angular_kernel_series(Q, Q, np.int64(3)).shape == (2, 3, 5, 5)
