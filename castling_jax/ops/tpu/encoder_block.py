"""An encoder block in one kernel: norms, projections, linear-angular attention, MLP and both residual sums.

The weights of the block stay in fast memory while the grid goes over the images, so HBM is read and written once for
each image. Between separate kernels, XLA would change the layout of q, k, v and the output, and read the normed tokens
three times.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from castling_jax.errors import InputError
from castling_jax.ops.block_weights import BlockWeights
from castling_jax.ops.gelu import gelu, tanh_gelu
from castling_jax.ops.kernel_calls import record
from castling_jax.ops.norms import layer_norm
from castling_jax.ops.tpu.call import Operand, Refs, call
from castling_jax.ops.tpu.dispatch import INSTEAD, check_dtypes, on_platform, over_mesh, split_over_mesh
from castling_jax.ops.tpu.layout import NN, Heads, arrange, fast_memory_bytes, product, traced_once
from castling_jax.ops.tpu.linear_angular import attend, head_sums, window_heads
from castling_jax.ops.tpu.taps import TapPositions, spread_taps, tap_positions

# Images of few tokens share a grid step: while one waits for the matrix unit, another uses the vector unit.
TOKENS_A_STEP = 400
ROWS = 256  # tokens whose MLP is computed at once
# The attention's rows are unrolled, so that compiling takes longer the more numbers they have: 1,025 tokens of DeiT-B
# take one to two minutes.
MAX_NUMBERS = 1025 * 768
HIDDEN_CHUNK = 768  # channels of the MLP's hidden layer that exist at once
MATRICES = ("qkv_kernel", "proj_kernel", "fc1_kernel", "fc2_kernel")


def linear_angular_block(
    x: Float[Array, "batch tokens channels"],
    weights: BlockWeights,
    *,
    num_heads: int,
    epsilon: float,
    grid: tuple[int, int] | None,
    prefix_tokens: int,
    needed_tokens: int,
    plain: Callable[[Array, BlockWeights], Array],
    then: Callable[[Array], Array],
    fallback: Callable[[Array, BlockWeights], Array] | None,
) -> Float[Array, "batch result_tokens channels"]:
    """The block in one kernel.

    Args:
      x: tokens.
      weights: the block's parameters.
      num_heads: heads of the attention.
      epsilon: what both norms add to the variance.
      grid: (height, width) of the patches, for taps over the grid.
      prefix_tokens: leading tokens that taps over the grid leave out.
      needed_tokens: how many leading tokens the kernel computes.
      plain: the block in separate operations, for the gradients.
      then: is applied to the kernel's result.
      fallback: runs instead, with x and the weights, where there is no TPU or the kernel does not take them. Its
        result has the needed tokens alone. None raises an error instead, and interprets the kernel on a CPU.

    Raises:
      InputError: without `fallback`: the kernel does not take the arguments, or the platform is a GPU.
    """
    positions = tap_positions(weights.token_kernel, grid, prefix_tokens)
    try:
        split = split_over_mesh(x, heads=None)
        check_dtypes("x", x)
        weights = _that_fit(x, weights, num_heads, positions)
    except InputError:
        if fallback is None:
            raise
        return fallback(x, weights)
    static = {"num_heads": num_heads, "epsilon": epsilon, "needed_tokens": needed_tokens}
    record("linear_angular_block", {"x": x, "weights": weights}, **static, grid=grid, prefix_tokens=prefix_tokens)

    run: Callable[..., Array] = functools.partial(_fused, positions=positions, **static)
    if split is not None:
        mesh, tokens = split
        run = over_mesh(run, mesh, (tokens, PartitionSpec()), tokens)

    def kernel(x: Array, weights: BlockWeights, *, interpret: bool) -> Array:
        fused = jax.custom_vjp(functools.partial(run, interpret=interpret))
        fused.defvjp(lambda *arguments: (fused(*arguments), arguments), lambda kept, d: jax.vjp(needed, *kept)[1](d))
        return then(fused(x, weights))

    def needed(x: Array, weights: BlockWeights) -> Array:
        return plain(x, weights)[:, :needed_tokens]

    return on_platform(kernel, x, weights, fallback=fallback)


def needed_bytes(x: Array, weights: BlockWeights, num_heads: int, positions: TapPositions) -> int:
    """The least fast memory that the kernel needs, in bytes: the weights, an image's buffers and what it computes."""
    _, tokens, channels = x.shape
    width = _window_width(num_heads, channels)
    matrices = sum(matrix.size * matrix.dtype.itemsize for matrix in (getattr(weights, name) for name in MATRICES))
    chunk = min(HIDDEN_CHUNK, weights.fc1_kernel.shape[1])
    # Two buffers each of tokens and result; the sum, the centred and the normed tokens; some eight arrays of a window's
    # heads. In the MLP the tokens again, and a chunk before and after GELU.
    attention = tokens * (channels * (4 * x.dtype.itemsize + 3 * 4) + width * 8 * 4)
    mlp = min(tokens, ROWS) * 4 * (3 * channels + 2 * chunk)
    return matrices + attention + mlp + positions.scratch_bytes(tokens, width)


def _that_fit(x: Array, weights: BlockWeights, num_heads: int, positions: TapPositions) -> BlockWeights:
    """The weights as they are or, if only these fit the fast memory, with matrices in x's dtype; never narrower than x.

    The matrix unit rounds float32 factors to bfloat16 itself. A cast of all weights before the kernel would take a
    twelfth of a DeiT-B's time.
    """
    _, tokens, channels = x.shape
    if tokens * channels > MAX_NUMBERS:
        raise InputError(
            f"the block's kernel takes at most {MAX_NUMBERS:,} numbers an image, not {tokens:,} tokens of {channels:,} "
            f"channels: {INSTEAD}."
        )
    # Beside narrower matrices the kernel would round x to their dtype.
    matrices = {name: getattr(weights, name) for name in MATRICES}
    wide = {name: matrix.astype(jnp.promote_types(x.dtype, matrix.dtype)) for name, matrix in matrices.items()}
    weights = weights._replace(**wide)
    room = fast_memory_bytes()
    if needed_bytes(x, weights, num_heads, positions) <= room:
        return weights
    cast = weights._replace(**{name: matrix.astype(x.dtype) for name, matrix in matrices.items()})
    needed = needed_bytes(x, cast, num_heads, positions)
    if needed <= room:
        return cast
    raise InputError(
        f"the block's kernel needs {needed / 2**20:,.0f} MiB of fast memory for {tokens:,} tokens of {channels:,} "
        f"channels, and there are {room / 2**20:,.0f} MiB: {INSTEAD}."
    )


def _layout(num_heads: int, channels: int) -> Heads:
    """All heads in one grid step."""
    head_dim = channels // num_heads
    return arrange(num_heads, head_dim, head_dim, bytes_per_head=0)


def _window_width(num_heads: int, channels: int) -> int:
    return window_heads(_layout(num_heads, channels)) * (channels // num_heads)


@traced_once("num_heads", "epsilon", "needed_tokens", "positions", "interpret")
def _fused(x, weights, *, num_heads, epsilon, needed_tokens, positions, interpret):
    batch, tokens, channels = x.shape
    layout = _layout(num_heads, channels)
    images = _images_a_step(batch, tokens)
    blocks, out_blocks = (pl.BlockSpec((images, n, channels), lambda i: (i, 0, 0)) for n in (tokens, needed_tokens))
    out = jax.ShapeDtypeStruct((batch, needed_tokens, channels), x.dtype)
    resident = _resident_arrays(weights, layout, x.dtype)
    room = fast_memory_bytes()
    outputs = call(
        functools.partial(_kernel, layout=layout, positions=positions, epsilon=epsilon),
        inputs={"x": (x, blocks), **{name: _resident(array) for name, array in resident.items()}},
        outputs={"out": (out, out_blocks)},
        scratch={
            "padded": positions.scratch(tokens, _window_width(num_heads, channels)),
            "attended": pltpu.VMEM((needed_tokens, channels), jnp.float32),
        },
        grid=(batch // images,),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=room),
        interpret=interpret,
        name="linear_angular_block",
    )
    return outputs["out"]


def _images_a_step(batch, tokens: int) -> int:
    """A divisor of the batch; 1 where the batch is symbolic, as in an exported program."""
    if not isinstance(batch, int):
        return 1
    return max(images for images in range(1, max(TOKENS_A_STEP // tokens, 1) + 1) if batch % images == 0)


def _resident(array: jax.Array) -> Operand:
    """An input that stays in fast memory: one buffer, because no grid step needs another block of it."""
    return array, pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))


def _resident_arrays(weights: BlockWeights, layout: Heads, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The weights as the kernel reads them: matrices as they are, and vectors as rows of float32."""
    arrays = weights._asdict()
    taps = spread_taps(arrays.pop("token_kernel"), layout.heads, layout.value_dim)
    if arrays["qkv_bias"] is None:
        arrays["qkv_bias"] = jnp.zeros(weights.qkv_kernel.shape[1])
    arrays |= {name: array.astype(jnp.float32)[None] for name, array in arrays.items() if name not in MATRICES}
    return arrays | {"taps": taps, **head_sums(layout, window_heads(layout), dtype)}


def _kernel(refs: Refs, *, layout: Heads, positions: TapPositions, epsilon: float):
    for image in range(refs.x.shape[0]):
        refs.attended[...] = _attention(refs, refs.x[image].astype(jnp.float32), layout, positions, epsilon)
        _write_mlp(refs, image, epsilon)


def _write_mlp(refs: Refs, image: int, epsilon: float) -> None:
    """Writes an image's result: the MLP of `refs.attended`, ROWS tokens at a time."""
    dtype = refs.out.dtype

    def write(start, count: int) -> None:
        rows = pl.ds(start, count)
        refs.out[image, rows] = _mlp(refs, refs.attended[rows], dtype, epsilon).astype(dtype)

    # A loop, because the unrolled MLP of a long sequence would take minutes to compile.
    blocks, rest = divmod(refs.out.shape[1], ROWS)
    if blocks:
        jax.lax.fori_loop(0, blocks, lambda block, _: write(pl.multiple_of(block * ROWS, ROWS), ROWS), None)
    if rest:
        write(blocks * ROWS, rest)


def _dense(x, kernel, bias, dtype: jnp.dtype):
    """x @ kernel + bias in float32, of factors rounded to bfloat16 if `dtype` is bfloat16."""
    # The matrix unit rounds float32 to bfloat16 at the default precision. Of float32 tokens the products are as exact
    # as XLA's: by JAX's setting.
    precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else None
    x = x.astype(dtype).astype(kernel.dtype)
    return jax.lax.dot_general(x, kernel, NN, precision=precision, preferred_element_type=jnp.float32) + bias


def _attention(refs: Refs, x, layout: Heads, positions: TapPositions, epsilon: float):
    """x + proj(attention(norm1(x))) in float32, of the tokens of the result."""
    dtype, channels, needed = refs.x.dtype, x.shape[1], refs.out.shape[1]
    normed = layer_norm(x, refs.norm1_scale[...], refs.norm1_bias[...], epsilon)
    total = x[:needed] + refs.proj_bias[...]
    for _, [lanes] in layout.windows(layout.key_dim):
        parts = [slice(start + lanes.start, start + lanes.stop) for start in (0, channels, 2 * channels)]
        q, k, v = (
            _dense(rows, refs.qkv_kernel[:, part], refs.qkv_bias[:, part], dtype)
            for rows, part in zip((normed[:needed], normed, normed), parts, strict=True)
        )
        out = attend(product(dtype), refs, (lanes, lanes), q, k, v, query_values=v[:needed])
        out += positions.convolve(refs.padded, v, refs.taps[:, lanes])[:needed]
        total += _dense(out, refs.proj_kernel[lanes, :], 0.0, dtype)
    return total


def _mlp(refs: Refs, x, dtype: jnp.dtype, epsilon: float):
    """x + fc2(gelu(fc1(norm2(x)))) in float32."""
    activation = tanh_gelu if dtype == jnp.bfloat16 else gelu
    normed = layer_norm(x, refs.norm2_scale[...], refs.norm2_bias[...], epsilon)
    total, hidden = x + refs.fc2_bias[...], refs.fc1_kernel.shape[1]
    for start in range(0, hidden, HIDDEN_CHUNK):
        chunk = slice(start, min(start + HIDDEN_CHUNK, hidden))
        activated = activation(_dense(normed, refs.fc1_kernel[:, chunk], refs.fc1_bias[:, chunk], dtype))
        total += _dense(activated, refs.fc2_kernel[chunk, :], 0.0, dtype)
    return total
