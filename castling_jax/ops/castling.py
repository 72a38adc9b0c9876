"""Castling attention in its training form, the sum of both attentions (Castling-ViT, equation 9)."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Float

from castling_jax.errors import check_known
from castling_jax.ops.angular import add_linear_angular
from castling_jax.ops.around import NOTHING, Around, ChannelNorms, with_norms
from castling_jax.ops.bias import Bias
from castling_jax.ops.checks import is_known_empty
from castling_jax.ops.masked_softmax import masked_softmax_first
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.tokens import QueryValues

MASK_KINDS = ("threshold", "fade")


@on_auto_axes(lambda q: (split_as(q, 0, 1, 2), PartitionSpec()))
def castling_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None = None,
    *,
    mask_threshold: ArrayLike,
    mask_kind: str = "threshold",
    bias: Bias | None = None,
    query_values: QueryValues = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    around: Around = NOTHING,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """l2normalise(aux + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), the training form of the authors' block.

    aux is the output of `masked_softmax_attention`, where queries and keys are not normalised. With mask_kind="fade",
    aux is (1 - mask_threshold) softmax(Q K^T / sqrt(key_dim) + bias) V instead: a factor in place of the mask, for
    comparison with the mask. The paper has no fade. Where the linear-angular part and the output are normalised, a zero
    vector normalises to zero and passes no gradient of its own. The inference form, without aux, is
    `linear_angular_attention`. From mask_threshold = 1 on, both forms are equal.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: the taps that convolve the values, as `depthwise_convolution` takes them.
      mask_threshold: scalar of at least 0. Softmax weights at or below it are masked out, or all weights fade by it.
      mask_kind: "threshold" or "fade".
      bias: added to the scores of the softmax branch only; see `masked_softmax_attention`.
      query_values: the values at the queries' positions, where queries and keys are different tokens. Where the queries
        stand on some of the keys' tokens, the indices of these tokens instead: integers [queries], in NumPy.
      grid: (height, width) of the queries, for taps over the grid.
      prefix_tokens: leading queries that the taps leave out.
      around: norms of q, k and v before anything else, and an activation of the output.
      implementation: "xla"; "pallas", fused TPU kernels (interpreted, and slow, on a CPU); or "auto", the kernels where
        the program is lowered for a TPU and they take these arguments, "xla" elsewhere.

    Returns:
      The attention's output in v's dtype, and the mask density in float32: the share of softmax weights that is kept,
      or 1 - mask_threshold with a fade.

    Raises:
      InputError: shapes do not fit, the kernels do not take the arguments, queries and keys differ in number and
        query_values is missing, the threshold is negative or NaN (where it is concrete), or a name is unknown.
    """

    def attention(q: Array, k: Array, v: Array, around: Around) -> tuple[Array, Array]:
        auxiliary, density, (q, k, v) = softmax_branch(
            q,
            k,
            v,
            mask_threshold=mask_threshold,
            mask_kind=mask_kind,
            bias=bias,
            norms=around.norms,
            implementation=implementation,
        )
        # With an empty mask the branch is all zeros: leaving it out saves the program an addition.
        added = None if is_known_empty(mask_threshold) else auxiliary
        out = add_linear_angular(
            added,
            q,
            k,
            v,
            token_kernel,
            query_values=query_values,
            grid=grid,
            prefix_tokens=prefix_tokens,
            around=around,
            implementation=implementation,
        )
        return out, density

    return with_norms(attention, q, k, v, around, implementation=implementation)


def softmax_branch(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    mask_threshold: ArrayLike,
    mask_kind: str,
    bias: Bias | None,
    norms: ChannelNorms | None = None,
    implementation: str,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""], tuple[Array, Array, Array]]:
    """aux, the mask density, and the q, k and v to go on with, as in `masked_softmax_first`."""
    check_known("mask_kind", mask_kind, MASK_KINDS)
    fades = mask_kind == "fade" and not is_known_empty(mask_threshold)
    # A threshold of 0 keeps the whole softmax: only weights that underflow to 0 are masked out, and they add nothing to
    # the output or to a gradient.
    auxiliary, density, (q, k, v) = masked_softmax_first(
        q, k, v, mask_threshold=0.0 if fades else mask_threshold, bias=bias, norms=norms, implementation=implementation
    )
    if fades:
        kept = jnp.maximum(1 - jnp.asarray(mask_threshold, jnp.promote_types(v.dtype, jnp.float32)), 0)
        auxiliary, density = (kept * auxiliary).astype(v.dtype), kept.astype(jnp.float32)
    return auxiliary, density, (q, k, v)
