import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from castling_jax.compile_report.kernels import find_kernels, kernel_key, pipeline_bytes

X = jax.ShapeDtypeStruct((4, 128, 768), jnp.bfloat16)
OUT = jax.ShapeDtypeStruct((512, 128), jnp.float32)
X_BLOCK, OUT_BLOCK = 128 * 256 * 2, 128 * 128 * 4  # bytes


def compute(*refs):
    refs[-1][...] = jnp.zeros(refs[-1].shape, refs[-1].dtype)


def traffic(function, *arguments):
    ((key, call),) = find_kernels(jax.make_jaxpr(function)(*arguments).jaxpr).items()
    return key, pipeline_bytes(call)


@pytest.mark.parametrize(
    ("index_map", "fetches"),
    [
        (lambda i, j: (i, 0, j), 12),
        (lambda i, j: (i, 0, 0), 4),  # stays while j moves on
        (lambda i, j: (0, 0, j), 12),  # comes back with each i
        (lambda i, j: (0, 0, 0), 1),
    ],
)
def test_blocks_are_fetched_as_they_change(index_map, fetches):
    call = pl.pallas_call(
        compute,
        grid=(4, 3),
        in_specs=[pl.BlockSpec((None, 128, 256), index_map)],
        out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, 0)),
        out_shape=OUT,
    )
    expected = ("unnamed_kernel bf16[4,128,768] f32[512,128]", fetches * X_BLOCK + 4 * OUT_BLOCK)
    assert traffic(call, X) == expected
    # Inside loops, conditionals and nested jits it is found too.
    assert traffic(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y + jax.jit(call)(x), call(x)), X) == expected


def test_whole_arrays_move_once():
    assert traffic(pl.pallas_call(compute, out_shape=OUT), X)[1] == 4 * 128 * 768 * 2 + 512 * 128 * 4


def test_block_that_depends_on_data_is_fetched_each_step():
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(4,),
        in_specs=[pl.BlockSpec((None, 128, 256), lambda i, chosen: (chosen[i], 0, 0))],
        out_specs=pl.BlockSpec((128, 128), lambda i, chosen: (0, 0)),
    )
    call = pl.pallas_call(compute, grid_spec=grid, out_shape=OUT)
    assert traffic(call, jax.ShapeDtypeStruct((4,), jnp.int32), X) == (
        "unnamed_kernel bf16[4,128,768] f32[512,128] s32[4]",
        4 * X_BLOCK + OUT_BLOCK,
    )


def test_scalar_memory_is_no_traffic():
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    call = pl.pallas_call(compute, in_specs=[scalar], out_shape=OUT)
    assert traffic(call, jax.ShapeDtypeStruct((4,), jnp.int32))[1] == 512 * 128 * 4


def test_traffic_of_a_kernel_that_copies_by_itself_is_not_known():
    call = pl.pallas_call(compute, in_specs=[pl.BlockSpec(memory_space=pl.ANY)], out_shape=OUT)
    assert traffic(call, X)[1] is None


def test_traffic_of_a_grid_that_is_not_constant_is_not_known():
    def call(steps, x):
        blocks = pl.BlockSpec((None, 128, 768), lambda i: (i, 0, 0))
        return pl.pallas_call(compute, grid=(steps,), in_specs=[blocks], out_shape=OUT)(x)

    assert traffic(call, jax.ShapeDtypeStruct((), jnp.int32), X)[1] is None


def test_a_kernel_is_known_by_its_name_and_its_arrays():
    arrays = [("f32", "512,128"), ("bf16", "4,128,768")]
    key = "masked_softmax bf16[4,128,768] f32[512,128]"
    assert kernel_key("masked_softmax", arrays) == key
    assert kernel_key("%masked_softmax.12.clone", reversed(arrays)) == key
    call = pl.pallas_call(compute, out_shape=OUT, name="masked_softmax")
    assert list(find_kernels(jax.make_jaxpr(call)(X).jaxpr)) == [key]


def test_a_kernel_that_is_interpreted_is_none():
    call = pl.pallas_call(compute, out_shape=OUT, interpret=True)
    assert not find_kernels(jax.make_jaxpr(call)(X).jaxpr)
