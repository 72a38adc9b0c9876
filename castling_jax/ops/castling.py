"""Castling attention in its training form: both attentions at once (Castling-ViT, equation 9)."""

from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Float

from castling_jax.ops.angular import add_linear_angular
from castling_jax.ops.bias import Bias
from castling_jax.ops.checks import is_known_empty
from castling_jax.ops.masked_softmax import masked_softmax_first
from castling_jax.ops.mesh import on_auto_axes, split_as
from castling_jax.ops.tokens import QueryValues


@on_auto_axes(lambda q: (split_as(q, 0, 1, 2), PartitionSpec()))
def castling_attention(
    q: Float[Array, "batch queries heads key_dim"],
    k: Float[Array, "batch keys heads key_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    token_kernel: Float[Array, "taps heads"] | Float[Array, "rows columns heads"] | None = None,
    *,
    mask_threshold: ArrayLike,
    bias: Bias | None = None,
    query_values: QueryValues = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, ""]]:
    """l2normalise(aux + 1/2 V + Q^ (K^^T V) / pi) + DWConv(V), the training form of the authors' block.

    aux is `masked_softmax_attention`, whose queries and keys are not normalised. In the linear-angular part and for the
    output, a zero vector normalises to zero and passes no gradient of its own. The inference form, without aux, is
    `linear_angular_attention`; from mask_threshold = 1 on the two are equal.

    Args:
      q: queries.
      k: keys.
      v: values.
      token_kernel: of the values, as `depthwise_convolution` takes it.
      mask_threshold: scalar of at least 0; softmax weights at or under it are masked out.
      bias: of the softmax branch alone; see `masked_softmax_attention`.
      query_values: the values at the queries' positions, where queries and keys are different tokens; or, where the
        queries stand on some of the keys' tokens, which: integers [queries], in NumPy.
      grid: (height, width) of the queries, for a token kernel over the grid.
      prefix_tokens: leading queries that the token kernel leaves out.
      implementation: "xla"; "pallas", fused TPU kernels (interpreted, and slow, on a CPU); or "auto", the kernels where
        it is lowered for a TPU and they serve these arguments, "xla" elsewhere.

    Returns:
      The attention's output in v's dtype, and the mask density: the share of softmax weights kept, in float32.

    Raises:
      InputError: shapes do not fit or the kernels do not serve them, queries unlike keys come without query_values,
        the threshold is negative or NaN (where it is concrete), or a name is unknown.
    """
    auxiliary, density, (q, k, v) = masked_softmax_first(
        q, k, v, mask_threshold=mask_threshold, bias=bias, implementation=implementation
    )
    # Of an empty mask the branch is zero: it is not worth reading.
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
        implementation=implementation,
    )
    return out, density
