"""Elementwise steps around an attention, which its kernels can do where they read q, k and v and write the output."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from castling_jax.errors import InputError, check_known
from castling_jax.ops.activations import ACTIVATIONS
from castling_jax.ops.checks import check_implementation, check_shapes

# For q, k and v: a mean, a factor and a bias for each channel.
ChannelNorms = tuple[
    Float[Array, "3 heads key_dim"], Float[Array, "3 heads key_dim"], Float[Array, "3 heads value_dim"]
]


class Around(NamedTuple):
    """What is done to q, k and v before an attention, and to its output after it.

    Attributes:
      norms: (x - mean) * factor + bias for each channel of q, k and v, which is batch norm's last step: for each of the
        three an array [3, heads, dim] with these three. None for no norm.
      activation: a name of ACTIVATIONS, "hard_swish"; or None for nothing.
    """

    norms: ChannelNorms | None = None
    activation: str | None = None


NOTHING = Around()


def normalize_channels(x: Float[Array, "..."], norm: Float[Array, "3 ..."]) -> Float[Array, "..."]:
    """(x - mean) * factor + bias in x's dtype, where `norm` has these three for x's last axes."""
    mean, factor, bias = norm
    # The difference comes first and the factor second: x * f + (b - m * f) would cancel where the mean is large.
    return ((x.astype(norm.dtype) - mean) * factor + bias).astype(x.dtype)


def normalize_qkv(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    norms: ChannelNorms | None,
) -> tuple[Array, Array, Array]:
    """q, k and v, normalised; without norms as they are."""
    if norms is None:
        return q, k, v
    q, k, v = (normalize_channels(x, norm) for x, norm in zip((q, k, v), norms, strict=True))
    return q, k, v


def with_norms(
    attention: Callable[..., Any],
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    around: Around,
    *,
    implementation: str,
) -> Any:
    """attention(q, k, v, around) by the kernels; without kernels the same of normalised arrays, without the norms.

    On other platforms the arrays are normalised once, not by each of the attention's operations.

    Raises:
      InputError: `around` is no Around, a norm is not [3, heads, dim], or the activation's or the implementation's name
        is unknown.
    """
    check_implementation(implementation)
    if not isinstance(around, Around) or (around.norms is not None and len(around.norms) != 3):
        given = f"{len(around.norms)} norms" if isinstance(around, Around) else type(around).__name__
        raise InputError(f"around must be an Around, with three norms or None, not {given}.")
    norms, activation = around
    if activation is not None:
        check_known("activation", activation, ACTIVATIONS)
    if norms is None:
        return attention(q, k, v, around)
    of_names = {
        f"the norm of {name}": (norm, (3, *x.shape[2:])) for name, x, norm in zip("qkv", (q, k, v), norms, strict=True)
    }
    check_shapes(**of_names)
    if implementation == "pallas":
        return attention(q, k, v, around)

    def apart(q: Array, k: Array, v: Array, norms: ChannelNorms) -> Any:
        return attention(*normalize_qkv(q, k, v, norms), around._replace(norms=None))

    def fused(q: Array, k: Array, v: Array, norms: ChannelNorms, *, interpret: bool) -> Any:
        return attention(q, k, v, around._replace(norms=norms))

    if implementation == "xla":
        return apart(q, k, v, norms)
    from castling_jax.ops.tpu.dispatch import on_platform  # here, because importing Pallas takes a while

    return on_platform(fused, q, k, v, norms, fallback=apart)
