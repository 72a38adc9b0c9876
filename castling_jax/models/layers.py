"""Layers that the backbones share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from castling_jax.errors import InputError

# DeiT and MViTv2 start their matrices, tokens and position embeddings from timm's trunc_normal_(std=0.02). It cuts at
# -2 and 2, a hundred deviations away, so it is a normal; JAX's truncated_normal cuts at two deviations.
DEIT_STD = 0.02
# As PyTorch starts linear and convolution layers, and so DeiT its patches and LeViT all but its heads: uniform, of
# variance 1 / (3 fan_in).
TORCH_INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
BATCH_NORM_EPSILON = 1e-5
SUBLANES = 8  # rows of a TPU's register: of fewer rows the compiler makes a reduction again


def normal_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param:
    """A token or position embedding: a parameter drawn from a normal of standard deviation 0.02."""
    return nnx.Param(jax.nn.initializers.normal(DEIT_STD)(rngs.params(), shape, dtype))


def add_bias(x: Float[Array, "*batch channels"], bias: Float[Array, "channels"]) -> Float[Array, "*batch channels"]:
    """x + bias; on a TPU the bias's gradient is a product with ones. Not for forward-mode differentiation.

    It is the sum over all tokens all the same. Where a kernel gives it, the matrix unit takes the sum in little more
    time than it takes to read it; a reduction of bfloat16, fused with nothing, takes several times as long. Behind
    other layers it is fused with what they do, and costs less than this would.
    """
    # In a shard_map that keeps account of it, the bias is one for all devices, and its gradient is each device's.
    varying = jax.typeof(x).manual_axis_type.varying - jax.typeof(bias).manual_axis_type.varying
    return _add_bias(x, jax.lax.pcast(bias, tuple(varying), to="varying") if varying else bias)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias


def _add_bias_and_keep(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _bias_gradient(_: None, d_out: Array) -> tuple[Array, Array]:
    tokens = tuple(range(d_out.ndim - 1))

    def by_product(d_out: Array) -> Array:
        ones = jnp.ones((*d_out.shape[:-1], SUBLANES), d_out.dtype)
        contracted = ((tokens, tokens), ((), ()))
        return jax.lax.dot_general(ones, d_out, contracted, precision=jax.lax.Precision.HIGHEST)[0]

    return d_out, jax.lax.platform_dependent(d_out, tpu=by_product, default=lambda d_out: jnp.sum(d_out, tokens))


_add_bias.defvjp(_add_bias_and_keep, _bias_gradient)


def linear(
    features_in: int,
    features_out: int,
    *,
    use_bias: bool = True,
    init_std: float = DEIT_STD,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer that starts as the ViT family's do: a normal of `init_std`, zero bias."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=jax.nn.initializers.normal(init_std),
        rngs=rngs,
    )


def split_linear(layer: nnx.Linear, x: Float[Array, "*batch channels"], parts: int | Sequence[int]) -> list[Array]:
    """The result of a fused layer in so many equal parts, or cut at these columns, by a product for each.

    Columns of the weights are cut out for less than those of the result: on a TPU each part of a result is a copy.
    """
    dtype = layer.dtype or x.dtype
    kernels = jnp.split(layer.kernel[...].astype(dtype), parts, axis=1)
    outs = [x.astype(dtype) @ kernel for kernel in kernels]
    if layer.bias is None:
        return outs
    biases = jnp.split(layer.bias[...].astype(dtype), parts)
    return [add_bias(out, bias) for out, bias in zip(outs, biases, strict=True)]


def layer_norm(features: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation with the epsilon of DeiT and MViTv2."""
    return nnx.LayerNorm(features, epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


@jax.custom_jvp
def stop_at_zero(x: Float[Array, "*axes channels"]) -> Float[Array, "*axes channels"]:
    """x, whose zero vectors pass no gradient: what goes before a layer norm where tokens may be zero.

    At zero, layer norm's derivative is 1 / sqrt(epsilon) = 1000. A black region's tokens are zero in a new model, and
    linear-angular attention leaves zero tokens zero from block to block: the factors would multiply.
    """
    return x


@stop_at_zero.defjvp
def _stop_at_zero_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return x, jnp.where(jnp.any(x != 0, axis=-1, keepdims=True), x_dot, 0)


def norm_heads(
    norm: nnx.LayerNorm, x: Float[Array, "batch tokens channels"], num_heads: int
) -> Float[Array, "batch tokens heads head_dim"]:
    """Layer normalisation of each head's channels, of all heads by the same layer.

    On a TPU means over a head are products with a matrix of zeros and ones: where heads are an axis of their own, of
    two or four, most of a register is empty, and each mean would take as long as a product of the block.
    """
    batch, tokens, channels = x.shape
    dim = channels // num_heads
    if num_heads == 1:
        return norm(x)[:, :, None]
    ones = np.kron(np.eye(num_heads), np.ones((dim, dim)))  # same head

    def by_products(x: Array, scale: Array, bias: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def mean(values: Array) -> Array:
            # Three passes of bfloat16 are float32 to 16 bits and more; what is bfloat16 already takes one.
            precision = jax.lax.Precision.HIGH
            total = jnp.matmul(values, ones.astype(values.dtype), precision=precision, preferred_element_type=wide)
            return total / dim

        centred = x.astype(wide) - mean(x)
        inverse = jax.lax.rsqrt(mean(jnp.square(centred)) + norm.epsilon)
        return (centred * inverse * jnp.tile(scale, num_heads) + jnp.tile(bias, num_heads)).astype(x.dtype)

    def by_reductions(x: Array, scale: Array, bias: Array) -> Array:
        return norm(x.reshape(batch, tokens, num_heads, dim)).reshape(x.shape)

    assert norm.scale is not None and norm.bias is not None  # of `layer_norm`
    x = x if norm.dtype is None else x.astype(norm.dtype)
    normed = jax.lax.platform_dependent(x, norm.scale[...], norm.bias[...], tpu=by_products, default=by_reductions)
    return normed.reshape(batch, tokens, num_heads, dim)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation over all axes but the last, with PyTorch's constants; statistics are float32 in any dtype.

    PyTorch's momentum of 0.1 is 0.9 here. It puts the unbiased variance into the running one, we the batch's own: one
    part in the number of averaged values less.
    """

    def __init__(self, features: int, *, scale: float = 1.0, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(
            features,
            momentum=0.9,
            epsilon=BATCH_NORM_EPSILON,
            dtype=jnp.float32,  # in bfloat16 it would round the running statistics before it uses them
            param_dtype=param_dtype,
            scale_init=jax.nn.initializers.constant(scale),
            rngs=rngs,
        )

    def normalize(self, x: Float[Array, "*batch channels"], training: bool) -> Float[Array, "*batch channels"]:
        """In training by the batch's statistics, which the running ones then follow; else by these."""
        return self.normalize_parts([x], training)[0]

    def normalize_parts(self, parts: Sequence[Float[Array, "*batch _"]], training: bool) -> list[Array]:
        """`normalize` of parts of the channels, in order, each for itself: to cut a result would be to copy it."""
        wide = [part.astype(jnp.float32) for part in parts]
        mean, variance = self.mean[...], self.var[...]
        if training:
            tokens = tuple(range(parts[0].ndim - 1))
            mean = jnp.concatenate([jnp.mean(x, tokens) for x in wide])
            mean_square = jnp.concatenate([jnp.mean(jnp.square(x), tokens) for x in wide])
            variance = jnp.maximum(mean_square - jnp.square(mean), 0)
            for running, batch in ((self.mean, mean), (self.var, variance)):
                running[...] = jax.lax.stop_gradient(self.momentum * running[...] + (1 - self.momentum) * batch)
        assert self.scale is not None and self.bias is not None  # of the constructor
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        edges = np.cumsum([part.shape[-1] for part in parts])[:-1].tolist()
        of_parts = zip(wide, *(jnp.split(x, edges) for x in (mean, factor, self.bias[...])), strict=True)
        return [((x - m) * f + b).astype(parts[0].dtype) for x, m, f, b in of_parts]


class ConvNorm(nnx.Module):
    """A 3 x 3 convolution of stride 2, then batch norm; in form="inference" the two are one, with a bias."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        form: str,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.Conv(
            features_in,
            features_out,
            (3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
            use_bias=form == "inference",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=TORCH_INIT,
            rngs=rngs,
        )
        self.bn = None if form == "inference" else BatchNorm(features_out, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width channels"], *, training: bool
    ) -> Float[Array, "batch half_height half_width features"]:
        x = self.linear(x)
        return x if self.bn is None else self.bn.normalize(x, training)


class LinearNorm(nnx.Module):
    """A dense layer, then batch norm over all tokens; in form="inference" the two are one, with a bias.

    `bn_scale` is what the norm's scale starts from: 0 where a residual branch is to start at nothing.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bn_scale: float = 1.0,
        form: str,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.Linear(
            features_in,
            features_out,
            use_bias=form == "inference",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=TORCH_INIT,
            rngs=rngs,
        )
        self.bn = (
            None if form == "inference" else BatchNorm(features_out, scale=bn_scale, param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(self, x: Float[Array, "batch tokens channels"], *, training: bool) -> Float[Array, "batch tokens _"]:
        x = self.linear(x)
        return x if self.bn is None else self.bn.normalize(x, training)

    def split(self, x: Float[Array, "batch tokens channels"], edges: Sequence[int], *, training: bool) -> list[Array]:
        """The result cut at these channels, as `split_linear` does it."""
        parts = split_linear(self.linear, x, edges)
        return parts if self.bn is None else self.bn.normalize_parts(parts, training)


class NormLinear(nnx.Module):
    """Batch norm, then a dense layer: a classifier head; in form="inference" the two are one."""

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        form: str,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.bn = None if form == "inference" else BatchNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.linear = linear(features, num_classes, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "batch channels"], *, training: bool) -> Float[Array, "batch classes"]:
        return self.linear(x if self.bn is None else self.bn.normalize(x, training))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.proj = nnx.Conv(
            in_chans,
            embed_dim,
            (patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=TORCH_INIT,
            rngs=rngs,
        )

    @jax.named_scope("patch_embed")
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens embed_dim"]:
        patches = self.proj(images)
        return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def mlp_width(dim: int, mlp_ratio: float) -> int:
    """Channels between an MLP's two layers.

    Raises:
      InputError: there would be none.
    """
    width = int(dim * mlp_ratio)
    if width < 1:
        raise InputError(f"an mlp_ratio of {mlp_ratio} leaves none of {dim} channels: give at least 1 / {dim}.")
    return width


class Mlp(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them; `layer` is what `linear` takes."""

    def __init__(self, dim: int, hidden_dim: int, **layer: Any):
        self.fc1 = linear(dim, hidden_dim, **layer)
        self.fc2 = linear(hidden_dim, dim, **layer)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        return self.fc2(gelu(self.fc1(x)))


def gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2, in x's dtype.

    JAX's own goes by erfc, which keeps more digits of what is nearly zero; on a TPU that takes as long as the product
    before it, where erf hides behind it.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def draw_drop_path(key: Key[Array, ""] | None, layers: int, batch: int) -> Float[Array, "layers 2 batch"] | None:
    """What decides which samples `drop_path` drops, in the two branches of each layer; None without a key.

    Drawn all at once: a key for every branch would be a hundred operations on single numbers, for each of them.
    """
    return None if key is None else jax.random.uniform(key, (layers, 2, batch))


def drop_path(
    x: Float[Array, "batch *axes"], rate: float, drawn: Float[Array, "batch"] | None
) -> Float[Array, "batch *axes"]:
    """Stochastic depth: drops a residual branch of whole samples, and scales the others up to keep the mean.

    Without numbers drawn from [0, 1), as in evaluation, it does nothing.
    """
    if drawn is None or rate == 0:
        return x
    kept = drawn.reshape(-1, *(1,) * (x.ndim - 1)) < 1 - rate
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def of_layer(drawn: Float[Array, "layers ..."] | None, layer: int | slice) -> Any:
    """A layer's part of what was drawn, or several layers'; None of None."""
    return None if drawn is None else drawn[layer]


def run_block(block: nnx.Module, x: Array, *, remat: bool, **options: Any) -> Any:
    """block(x, **options); with `remat` its inner values are computed again in the backward pass, not kept until then.

    `options` are closed over rather than passed: a threshold that is known stays known.
    """
    if not remat:
        return block(x, **options)
    return nnx.remat(lambda block, x: block(x, **options))(block, x)
