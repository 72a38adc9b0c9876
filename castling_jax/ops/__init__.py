"""The mathematics: pure functions, arrays in, arrays out.

Attention compares each query with all keys and returns a weighted sum of the values. All operations take

| q: queries, [batch, queries, heads, key_dim],
| k: keys, [batch, keys, heads, key_dim],
| v: values, [batch, keys, heads, value_dim],

and return [batch, queries, heads, value_dim]. `queries` and `keys` count tokens. In self-attention both are the tokens
of an image. `key_dim` and `value_dim` are the channels of one head. Capital letters are the matrices of one head: Q has
a query in each row, Q^ has rows divided by their norm, and Q K^T are the scores, [queries, keys].

bias
    An array that is added to the scores before the softmax, [batch, heads, queries, keys]. A factored bias is a pair of
    arrays, one for the rows and one for the columns of the keys' grid, whose outer sum is the bias.
branch
    The masked softmax attention that training adds to linear-angular attention, also called auxiliary.
density
    The share of the branch's softmax weights that the mask keeps, from 0 to 1.
form
    The training form computes both attentions, `castling_attention`. The inference form is linear-angular attention
    alone, `linear_angular_attention`.
grid
    (height, width) of an image's patches in tokens, row by row.
prefix tokens
    Class and distillation tokens, which come before the patches and have no place in the grid.
query tokens
    Indices of the key tokens on which the queries stand, where the queries are some of these tokens only.
query values
    The values at the queries' positions, V in the terms 1/2 V and DWConv(V). They are v unless queries and keys are
    different tokens.
switch
    The step from the training form's parameters to those of the inference form. From a threshold of 1 on the mask is
    empty, and both forms compute the same.
taps
    The weights of the token kernel, a small depthwise convolution of the values over tokens, DWConv(V): [taps, heads]
    over the token axis, or [rows, columns, heads] over the grid.
threshold
    The number above which a softmax weight of the branch is kept. It rises from about 0 to 1 during training.
"""

from castling_jax.ops.angular import (
    angular_attention,
    angular_kernel,
    angular_kernel_series,
    linear_angular_attention,
)
from castling_jax.ops.around import Around
from castling_jax.ops.block_weights import BlockWeights
from castling_jax.ops.boxes import box_iou, generalized_box_iou
from castling_jax.ops.castling import castling_attention
from castling_jax.ops.depthwise import depthwise_convolution
from castling_jax.ops.encoder_block import linear_angular_block
from castling_jax.ops.masked_softmax import masked_softmax_attention
from castling_jax.ops.suppression import non_maximum_suppression

__all__ = [
    "Around",
    "BlockWeights",
    "angular_attention",
    "angular_kernel",
    "angular_kernel_series",
    "box_iou",
    "castling_attention",
    "depthwise_convolution",
    "generalized_box_iou",
    "linear_angular_attention",
    "linear_angular_block",
    "masked_softmax_attention",
    "non_maximum_suppression",
]
