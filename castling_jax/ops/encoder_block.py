"""A transformer's encoder block with linear-angular attention in one operation, for inference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.errors import check, check_between, takes
from castling_jax.ops.angular import linear_angular_attention
from castling_jax.ops.block_weights import BlockWeights
from castling_jax.ops.checks import check_array, check_implementation, check_shapes
from castling_jax.ops.depthwise import check_token_kernel
from castling_jax.ops.gelu import gelu
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.norms import layer_norm


@takes(
    weights=(BlockWeights, "BlockWeights"),
    num_heads=(int, "a whole number"),
    epsilon=(float, "a Python float"),
    needed_tokens=(int | None, "a whole number or None"),
)
@on_auto_axes(lambda x: split_as(x, 0, 1))
def linear_angular_block(
    x: Float[Array, "batch tokens channels"],
    weights: BlockWeights,
    *,
    num_heads: int,
    epsilon: float = 1e-6,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    needed_tokens: int | None = None,
    then: Callable[[Array], Array] | None = None,
    implementation: str = "auto",
    otherwise: Callable[[Array], Array] | None = None,
) -> Float[Array, "batch result_tokens channels"]:
    """A pre-norm encoder block (Dosovitskiy et al., 2021, equations 2 and 3) with `linear_angular_attention`::

        x = x + proj(attention(q, k, v)),  q, k, v = qkv(norm1(x))
        x = x + fc2(gelu(fc1(norm2(x))))

    On a TPU all of it is one kernel, which keeps the weights in fast memory. In bfloat16 the kernel rounds only the
    factors of products and the result, and its GELU differs from the exact one by at most 1.2e-5. Gradients are those
    of the separate operations.

    Args:
      x: tokens.
      weights: the block's parameters. They are cast to x's dtype.
      num_heads: heads of the attention.
      epsilon: what both norms add to the variance.
      grid: (height, width) of the patches, for taps over the grid.
      prefix_tokens: leading tokens that taps over the grid leave out.
      needed_tokens: how many leading tokens the result has, such as the one that a classifier reads; None means all.
        The kernel leaves the others' work out, which is most of the block's.
      then: is applied to the result, token by token, such as a model's last norm. Where the kernel does not run it is
        applied to all tokens, so that a model computes bit by bit what it does without `needed_tokens`. None: nothing.
      implementation: "xla"; "pallas", the kernel (interpreted, and slow, on a CPU); or "auto", the kernel where the
        program is lowered for a TPU and the kernel takes these arguments, "xla" elsewhere.
      otherwise: computes the block of x where "auto" does without the kernel. A model gives its own layers, so that on
        other platforms inference computes what training does: under jit bit by bit.

    Returns:
      The first `needed_tokens` after the block and `then`.

    Raises:
      InputError: an argument is of another type, x is empty, shapes do not fit, or the kernel does not take the
        arguments: x is neither float32 nor bfloat16, the weights and an image do not fit the fast memory, the mesh
        splits the heads, or the platform is a GPU.
    """
    check_implementation(implementation)
    check_array("x", x, ("batch", "tokens", "channels"))
    check(0 not in x.shape, f"x must not be empty, but has the shape {x.shape}.")
    needed_tokens = x.shape[1] if needed_tokens is None else needed_tokens
    check_between("needed_tokens", needed_tokens, 1, x.shape[1])
    _check_weights(weights, x.shape[2], num_heads)
    if weights.token_kernel is not None:
        check_token_kernel(weights.token_kernel, x.shape[1], num_heads, grid, prefix_tokens)

    def plain(x: Array, weights: BlockWeights) -> Array:
        def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
            out = x @ kernel.astype(x.dtype)
            return out if bias is None else out + bias.astype(x.dtype)

        with jax.named_scope("qkv"):
            normed = layer_norm(x, weights.norm1_scale, weights.norm1_bias, epsilon)
            qkv = linear(normed, weights.qkv_kernel, weights.qkv_bias)
            q, k, v = (part.reshape(*x.shape[:2], num_heads, -1) for part in jnp.split(qkv, 3, axis=2))
        where = {"grid": grid, "prefix_tokens": prefix_tokens}
        # On a TPU a block that its own kernel does not take still has the attention's.
        kernels = "xla" if implementation == "xla" else "auto"
        attended = linear_angular_attention(q, k, v, weights.token_kernel, **where, implementation=kernels)
        with jax.named_scope("proj"):
            x = x + linear(attended.reshape(x.shape), weights.proj_kernel, weights.proj_bias)
        with jax.named_scope("mlp"):
            normed = layer_norm(x, weights.norm2_scale, weights.norm2_bias, epsilon)
            hidden = gelu(linear(normed, weights.fc1_kernel, weights.fc1_bias))
            return x + linear(hidden, weights.fc2_kernel, weights.fc2_bias)

    def finish(out: Array) -> Array:
        return out if then is None else then(out)

    if implementation == "xla":
        return finish(plain(x, weights))[:, :needed_tokens]

    def fallback(x: Array, weights: BlockWeights) -> Array:
        return finish(plain(x, weights) if otherwise is None else otherwise(x))[:, :needed_tokens]

    from castling_jax.ops.tpu import encoder_block as kernel  # here, because importing Pallas takes a while

    return kernel.linear_angular_block(
        x,
        weights,
        num_heads=num_heads,
        epsilon=epsilon,
        grid=grid,
        prefix_tokens=prefix_tokens,
        needed_tokens=needed_tokens,
        plain=plain,
        then=finish,
        fallback=None if implementation == "pallas" else fallback,
    )


def _check_weights(weights: BlockWeights, channels: int, num_heads: int) -> None:
    check(num_heads >= 1 and channels % num_heads == 0, f"{num_heads} heads do not divide {channels} channels.")
    check_array("fc1_kernel", weights.fc1_kernel, ("channels", "hidden"))
    hidden = max(weights.fc1_kernel.shape[1], 1)  # a kernel without hidden channels fits no other
    sizes = {"qkv_kernel": (channels, 3 * channels), "qkv_bias": (3 * channels,), "proj_kernel": (channels, channels)}
    sizes |= {"fc1_kernel": (channels, hidden), "fc1_bias": (hidden,), "fc2_kernel": (hidden, channels)}
    for name, array in weights._asdict().items():
        # Two may be missing; the token kernel has a check of its own.
        if name != "token_kernel" and not (name == "qkv_bias" and array is None):
            check_array(name, array)
            check_shapes(**{name: (array, sizes.get(name, (channels,)))})
