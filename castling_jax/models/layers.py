"""Layers that the backbones share."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from castling_jax.errors import InputError, check
from castling_jax.models.initializers import Initializer, normal, scaled_uniform, uniform
from castling_jax.ops.dense import SUBLANES, dense, of_all_devices
from castling_jax.ops.depthwise import convolve_channels
from castling_jax.ops.gelu import gelu

# The matrices, tokens and position embeddings of DeiT and MViTv2 start from timm's trunc_normal_(std=0.02). timm cuts
# at -2 and 2, a hundred deviations away, which is a plain normal; JAX's truncated_normal cuts at two deviations.
DEIT_STD = 0.02
# PyTorch's default for linear layers and convolutions, a uniform distribution of variance 1 / (3 fan_in). DeiT's patch
# embedding and all layers of LeViT except its heads start from it.
TORCH_INIT = scaled_uniform(1 / 3, "fan_in")
XAVIER_INIT = scaled_uniform(1.0, "fan_avg")  # Glorot and Bengio, 2010


def torch_bias_init(fan_in: int) -> Initializer:
    """PyTorch's default for the biases of linear layers and convolutions: uniform from -1 to 1 over sqrt(fan_in)."""
    return uniform(1 / math.sqrt(fan_in))


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of a model: one value from the model's constructor down to its blocks.

    Attributes:
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
      rngs: the streams that the parameters are drawn from.
      init_std: standard deviation of the normal that the dense layers' matrices start from. None takes Xavier's uniform
        distribution (Glorot and Bengio, 2010) instead, as MAE does.
      kernel_init: initializer of layers with batch norm.
      folded: whether batch norm is folded into the layer beside it, as in inference form.
    """

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    rngs: nnx.Rngs
    init_std: float | None = DEIT_STD
    kernel_init: Initializer = TORCH_INIT
    folded: bool = False

    @property
    def flax(self) -> dict[str, Any]:
        """The arguments that Flax's own layers take."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def linear(self, features_in: int, features_out: int, **arguments: Any) -> nnx.Linear:
        """A dense layer with the ViT family's initial values: a normal of `init_std`, and zero bias."""
        kernel_init = XAVIER_INIT if self.init_std is None else normal(self.init_std)
        return nnx.Linear(
            features_in, features_out, kernel_init=kernel_init, dot_general=dense, **arguments, **self.flax
        )

    def layer_norm(self, features: int) -> nnx.LayerNorm:
        """Layer normalisation with the epsilon of DeiT and MViTv2."""
        return nnx.LayerNorm(features, epsilon=1e-6, **self.flax)

    def embedding(self, *shape: int) -> nnx.Param:
        """A token or position embedding: a parameter drawn from a normal of standard deviation 0.02."""
        return nnx.Param(normal(DEIT_STD)(self.rngs.params(), shape, self.param_dtype))

    def zeros(self, *shape: int) -> nnx.Param:
        """A parameter that starts at zero."""
        return nnx.Param(jnp.zeros(shape, self.param_dtype))


def add_bias(x: Float[Array, "*batch channels"], bias: Float[Array, "channels"]) -> Float[Array, "*batch channels"]:
    """x + bias; on a TPU the bias's gradient is a product with ones. Not for forward-mode differentiation.

    The bias's gradient is the sum of the output's gradient over all tokens. If a kernel computes the output's gradient,
    XLA cannot fuse the sum with anything: the matrix unit sums in little more time than reading takes, and a reduction
    in bfloat16 takes several times as long. After other layers XLA fuses the sum with their work, which costs less than
    a product.
    """
    return _add_bias(x, of_all_devices(bias, x))


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias


def _add_bias_and_keep(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _bias_gradient(_: None, d_out: Array) -> tuple[Array, Array]:
    tokens = tuple(range(d_out.ndim - 1))

    def by_product(d_out: Array) -> Array:
        ones = jnp.ones((*d_out.shape[:-1], SUBLANES), d_out.dtype)
        # HIGHEST keeps float32 gradients whole; bfloat16 ones take one pass at any precision.
        contracted = ((tokens, tokens), ((), ()))
        return jax.lax.dot_general(ones, d_out, contracted, precision=jax.lax.Precision.HIGHEST)[0]

    return d_out, jax.lax.platform_dependent(d_out, tpu=by_product, default=lambda d_out: jnp.sum(d_out, tokens))


_add_bias.defvjp(_add_bias_and_keep, _bias_gradient)


def split_linear(
    layer: nnx.Linear,
    x: Float[Array, "*batch channels"] | Sequence[Float[Array, "*batch channels"]],
    parts: int | Sequence[int],
) -> list[Array]:
    """The result of a fused layer in `parts` equal parts, or cut at the columns `parts`; each part is a product.

    Slicing the kernel is cheaper than slicing the result, which XLA:TPU copies. `x` is the input of all parts, or a
    sequence with an input for each part.
    """
    dtype = layer.dtype or jnp.result_type(*jax.tree.leaves(x))
    kernels = split_kernel(layer, dtype, parts)
    inputs = x if isinstance(x, Sequence) else [x] * len(kernels)
    outs = [dense(x.astype(dtype), kernel) for x, kernel in zip(inputs, kernels, strict=True)]
    if layer.bias is None:
        return outs
    biases = jnp.split(layer.bias[...].astype(dtype), parts)
    return [add_bias(out, bias) for out, bias in zip(outs, biases, strict=True)]


def split_kernel(layer: nnx.Linear, dtype: Any, parts: int | Sequence[int]) -> list[Float[Array, "features_in part"]]:
    """The layer's kernel in this dtype, in `parts` equal parts or cut at the columns `parts`."""
    return jnp.split(layer.kernel[...].astype(dtype), parts, axis=1)


class Pool(nnx.Module):
    """Pooling by a depthwise 3 x 3 convolution without bias.

    Args:
      channels: channels of the kernel. An input with a multiple of these has them head by head, and the heads share the
        taps.
      layers: makes the kernel.
      kernel_init: the kernel's initializer.
    """

    def __init__(self, channels: int, layers: Layers, kernel_init: Initializer = TORCH_INIT):
        self.kernel = nnx.Param(kernel_init(layers.rngs.params(), (3, 3, 1, channels), layers.param_dtype))

    @jax.named_scope("pool")
    def __call__(
        self, x: Float[Array, "batch height width channels"], strides: tuple[int, int] = (1, 1)
    ) -> Float[Array, "batch rows columns channels"]:
        # The taps are repeated for every head, so that heads stay side by side in the channels and nothing is
        # transposed. XLA has a depthwise convolution for TPUs. By its estimates shifted multiply-adds would take two to
        # three times as long forwards and four to five times as long backwards; on a CPU they would be faster.
        kernel = jnp.tile(self.kernel[...].astype(x.dtype), x.shape[3] // self.kernel.shape[3])
        return convolve_channels(x, kernel, strides)


@jax.custom_jvp
def stop_at_zero(x: Float[Array, "*axes channels"]) -> Float[Array, "*axes channels"]:
    """x, but zero vectors pass no gradient. It goes before a layer norm whose tokens may be zero.

    At zero, layer norm's derivative is 1 / sqrt(epsilon) = 1000. A region's tokens may be zero, as in black images when
    the model has no biases. Linear-angular attention keeps them zero from block to block, so the factors of 1000 would
    multiply.
    """
    return x


@stop_at_zero.defjvp
def _stop_at_zero_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return x, jnp.where(jnp.any(x != 0, axis=-1, keepdims=True), x_dot, 0)


def norm_heads(
    norm: nnx.LayerNorm, x: Float[Array, "batch tokens channels"], num_heads: int
) -> Float[Array, "batch tokens heads head_dim"]:
    """Layer normalisation over each head's channels, with the same scale and bias for all heads.

    On a TPU the means over a head are products with a matrix of zeros and ones. If the heads were an axis of their own,
    two or four long, most of a register would be empty, and each mean would take as long as a product of the block.
    """
    batch, tokens, channels = x.shape
    dim = channels // num_heads
    if num_heads == 1:
        return norm(x)[:, :, None]
    ones = np.kron(np.eye(num_heads), np.ones((dim, dim)))  # 1 where two channels are in the same head

    def by_products(x: Array, scale: Array, bias: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def mean(values: Array) -> Array:
            # Three passes of bfloat16 keep 16 bits and more of a float32; values in bfloat16 take one pass.
            precision = jax.lax.Precision.HIGH
            total = jnp.matmul(values, ones.astype(values.dtype), precision=precision, preferred_element_type=wide)
            return total / dim

        # Centred before squaring: E x^2 - (E x)^2 would cancel, and these products keep only 16 bits.
        centred = x.astype(wide) - mean(x)
        inverse = jax.lax.rsqrt(mean(jnp.square(centred)) + norm.epsilon)
        return (centred * inverse * jnp.tile(scale, num_heads) + jnp.tile(bias, num_heads)).astype(x.dtype)

    def by_reductions(x: Array, scale: Array, bias: Array) -> Array:
        return norm(x.reshape(batch, tokens, num_heads, dim)).reshape(x.shape)

    assert norm.scale is not None and norm.bias is not None  # Layers.layer_norm makes both
    x = x if norm.dtype is None else x.astype(norm.dtype)
    normed = jax.lax.platform_dependent(x, norm.scale[...], norm.bias[...], tpu=by_products, default=by_reductions)
    return normed.reshape(batch, tokens, num_heads, dim)


# jit keeps this function's name in the jaxpr, by which models/macs.py leaves its work out.
@functools.partial(jax.jit, static_argnames=("shape", "method", "antialias"))
def interpolate(x: Array, shape: tuple[int, ...], method: str, *, antialias: bool = True) -> Array:
    """`jax.image.resize`, which has half-pixel centres, as PyTorch's `align_corners=False`."""
    return jax.image.resize(x, shape, method, antialias=antialias)


def patch_grid(size: tuple[int, ...], side: int, what: str) -> tuple[int, int]:
    """(rows, columns) of tokens, one for each square of `side` pixels, in an image of (height, width) pixels.

    Raises:
      InputError: height or width is not a multiple of the side, which the message calls `what`.
    """
    height, width = size
    if min(size) < side or height % side or width % side:
        raise InputError(f"an image of {height} x {width} pixels is not a multiple of {what}, {side} pixels.")
    return height // side, width // side


def check_stages(**sizes: Any) -> None:
    """Raises an InputError unless each value, by its name, is a tuple with a positive integer for each stage."""
    for name, values in sizes.items():
        are_sizes = isinstance(values, tuple) and len(values) > 0 and all(type(n) is int and n > 0 for n in values)
        check(are_sizes, f"{name} must be a tuple of an integer of at least 1 for each stage, not {values!r}.")
    counts = [len(values) for values in sizes.values()]
    check(len({*counts}) == 1, f"{', '.join(sizes)} must have as many stages as each other, not {counts}.")


def mlp_width(dim: int, mlp_ratio: float) -> int:
    """The number of channels between an MLP's two layers.

    Raises:
      InputError: the number would be zero.
    """
    width = int(dim * mlp_ratio)
    check(width >= 1, f"an mlp_ratio of {mlp_ratio} leaves none of {dim} channels: give at least 1 / {dim}.")
    return width


class Mlp(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them, where the width is `mlp_ratio` times the input's."""

    def __init__(self, dim: int, mlp_ratio: float, layers: Layers):
        hidden_dim = mlp_width(dim, mlp_ratio)
        self.fc1 = layers.linear(dim, hidden_dim)
        self.fc2 = layers.linear(hidden_dim, dim)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        return self.fc2(gelu(self.fc1(x)))


def draw_drop_path(key: Key[Array, ""] | None, layers: int, batch: int) -> Float[Array, "layers 2 batch"] | None:
    """The random numbers that decide which samples `drop_path` drops, in the two branches of each layer.

    Returns None without a key. One call draws all of them, because splitting a key for each branch costs a hundred
    scalar operations each time.
    """
    return None if key is None else jax.random.uniform(key, (layers, 2, batch))


def drop_path(
    x: Float[Array, "batch *axes"], rate: float, drawn: Float[Array, "batch"] | None
) -> Float[Array, "batch *axes"]:
    """Stochastic depth: drops a residual branch for some samples, and scales the other samples up to keep the mean.

    `drawn` are numbers from [0, 1), one for each sample; with None, as in evaluation, nothing is dropped.
    """
    if drawn is None or rate == 0:
        return x
    # where, not a product with 0 or 1: a dropped branch that overflowed would turn inf * 0 into NaN.
    kept = drawn.reshape(-1, *(1,) * (x.ndim - 1)) < 1 - rate
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def of_layer(drawn: Float[Array, "layers ..."] | None, layer: int | slice) -> Any:
    """The numbers in `drawn` for one layer, or for a slice of layers; None if nothing was drawn."""
    return None if drawn is None else drawn[layer]


def run_block(block: nnx.Module, x: Array, *, remat: bool, **options: Any) -> Any:
    """block(x, **options); with `remat` the backward pass recomputes the block's inner values, to save memory.

    The closure holds `options`, because arguments would be traced: a threshold that is known while tracing stays known.
    """
    if not remat:
        return block(x, **options)
    return nnx.remat(lambda block, x: block(x, **options))(block, x)
