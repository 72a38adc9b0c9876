"""The kernels under the TPU interpreter: memory that nothing has written is NaN, and every race is reported."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from castling_jax import ops
from castling_jax.ops.tpu import call, linear_angular, masked_softmax
from tests.ops import test_around, test_tpu
from tests.ops import test_encoder_block as blocks

interpreter = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")  # has no public name
pytestmark = pytest.mark.slow


def run(function, *arguments):
    """The function's result under the interpreter, which must have found no race."""
    parameters = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(parameters):
        result = jax.block_until_ready(jax.jit(function)(*arguments))
    assert not interpreter.races.races_found
    return result


@pytest.mark.parametrize("bias", [None, "factored"])
@pytest.mark.parametrize("shape", [test_tpu.SHAPES[1], (1, 33, 70, 2, 32, 128), (2, 20, 20, 6, 32, 64)])
@pytest.mark.parametrize("kind", ["whole", "blocks"])
def test_castling(kind, shape, bias, monkeypatch):
    if bias and shape[2] % 5:
        pytest.skip("the factors have five columns")
    test_tpu.use_small_blocks(monkeypatch, kind)
    # The interpreter (JAX 0.10) gives an output in an input's place the input's padded shape, where the last block is
    # ragged. Without aliases the kernel is the same: it reads such a block before it writes it.
    monkeypatch.setattr(masked_softmax, "call", lambda kernel, aliases=None, **options: call.call(kernel, **options))
    compare(kind, shape, bias)


def test_an_output_in_an_inputs_place(monkeypatch):
    """The aliases that `test_castling` leaves out, with tokens that the blocks divide."""
    test_tpu.use_small_blocks(monkeypatch, "whole")
    compare("whole", (1, 48, 48, 4, 16, 32), None)


def compare(kind, shape, bias):
    """Outputs and gradients with those of the plain operations."""
    q, k, v, taps, own, cotangent = test_tpu.draw(shape)
    threshold = jnp.float32(1e-6)  # below every weight
    arguments = q, k, v, taps, own, test_tpu.draw_bias(shape, bias), threshold, cotangent
    # A name of its own for the cache, because the interpreter's program is another one.
    found = run(test_tpu.both_attentions("pallas", f"interpreted, {kind}, {shape}"), *arguments)
    test_tpu.assert_close(found, test_tpu.both_attentions("xla", None)(*arguments), test_tpu.FLOAT32)


@pytest.mark.parametrize("case", ["two images a step", "taps over the grid"])
def test_encoder_block(case):
    shape, taps, grid, prefix = blocks.CASES[case]
    x, weights = blocks.draw(shape, taps)
    where = {"grid": grid, "prefix_tokens": prefix} if grid else {}
    block = functools.partial(ops.linear_angular_block, num_heads=shape[3], **where)
    found = run(functools.partial(block, implementation="pallas"), x, weights)
    expected = block(x, weights, implementation="xla")
    assert blocks.difference(found, expected) < blocks.FLOAT32


def test_activation():
    q, k, v, taps, own, _ = test_tpu.draw((1, 33, 70, 2, 32, 128))
    attention = functools.partial(
        ops.linear_angular_attention, query_values=own, around=ops.Around(activation="hard_swish")
    )
    found = run(functools.partial(attention, implementation="pallas"), q, k, v, taps)
    expected = attention(q, k, v, taps, implementation="xla")
    assert blocks.difference(found, expected) < test_tpu.FLOAT32[0]


def test_norms(monkeypatch):
    test_tpu.use_small_blocks(monkeypatch, "whole")
    # As in `test_castling`: the last block is ragged.
    monkeypatch.setattr(masked_softmax, "call", lambda kernel, aliases=None, **options: call.call(kernel, **options))
    of = functools.partial(test_around.results, ops.castling_attention, test_around.SHAPE, threshold=1e-6)
    found = run(lambda: of(implementation="pallas"))
    test_tpu.assert_close(found, of(implementation="xla", before=True), test_tpu.FLOAT32)


def test_memory_that_nothing_has_written_is_seen(monkeypatch):
    """A kernel that misses its last rows, so that the tests above are known to see it."""
    q, k, v, *_ = test_tpu.draw((1, 17, 17, 2, 64, 64))

    def without_last_rows(refs, **options):
        refs.out[0, :8] = jnp.zeros_like(refs.out[0, :8])

    monkeypatch.setattr(linear_angular, "_forward_kernel", without_last_rows)
    out = run(functools.partial(ops.linear_angular_attention, implementation="pallas"), q, k, v)
    assert jnp.isnan(out[0, 8:]).all()
