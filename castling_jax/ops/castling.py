"""Castling attention in its training form: both attentions at once (Castling-ViT, equation 9)."""

from jaxtyping import Array, ArrayLike, Float

from castling_jax.ops.angular import linear_angular_core, normalize_and_convolve
from castling_jax.ops.checks import check_implementation, check_qkv, check_query_values
from castling_jax.ops.masked_softmax import Bias, masked_softmax_attention


def castling_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | None = None,
    *,
    mask_threshold: ArrayLike,
    bias: Bias | None = None,
    query_values: Float[Array, "batch queries heads value_dim"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """l2normalise(aux + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), the training form of the authors' block.

    aux is `masked_softmax_attention`. The inference form, without it, is `linear_angular_attention`; from
    mask_threshold = 1 on the two are equal.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: one set of taps a head for the convolution of the values over tokens; their number is odd.
      mask_threshold: scalar of at least 0; softmax weights at or under it are masked out.
      bias: of the softmax branch alone; see `masked_softmax_attention`.
      query_values: the values at the queries' positions, where queries and keys are different tokens.
      implementation: "xla", "pallas" (fused TPU kernels; interpreted, and slow, on a CPU), or "auto", today "xla".

    Returns:
      The attention's output in v's dtype, and the mask density: the share of softmax weights kept, in float32.

    Raises:
      InputError: shapes do not fit or the kernels do not serve them, queries unlike keys come without query_values,
        the threshold is negative or NaN (where it is concrete), or a name is unknown.
    """
    check_implementation(implementation)
    check_qkv(q, k, v)
    own_values, query_values = query_values is not None, check_query_values(q, v, query_values)
    auxiliary, density = masked_softmax_attention(
        q, k, v, mask_threshold=mask_threshold, bias=bias, implementation=implementation
    )
    if implementation == "pallas":
        from castling_jax.ops.tpu import attention as kernels  # Pallas takes a while to import

        out = kernels.linear_angular_attention(q, k, v, token_kernel, auxiliary=auxiliary, own_values=own_values)
        return out, density
    core = linear_angular_core(q, k, v, query_values)
    return normalize_and_convolve(core + auxiliary.astype(core.dtype), query_values, token_kernel), density
