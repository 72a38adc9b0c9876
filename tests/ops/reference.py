"""The mathematics once more, as plain float64 numpy: written from the paper, sharing no code with the package.

Shapes as in the package: q [batch, queries, heads, key_dim], k and v [batch, keys, heads, dim].
"""

import math

import numpy as np


def normalize(x):
    norm = np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True))
    return x / np.where(norm == 0, 1, norm)


def scores_of(q, k):
    """q . k for every pair of a query and a key."""
    return np.einsum("bqhd,bkhd->bhqk", q, k)


def kernel(q, k):
    return 1 - np.arccos(np.clip(scores_of(normalize(q), normalize(k)), -1, 1)) / np.pi


def series(q, k, order):
    cosines = scores_of(normalize(q), normalize(k))
    total = 0.5 + cosines / np.pi
    for i in range(1, order + 1):
        coefficient = math.factorial(2 * i) / (4**i * math.factorial(i) ** 2 * (2 * i + 1))
        total += coefficient * cosines ** (2 * i + 1) / np.pi
    return total


def linear_core(q, k, v, query_values):
    """1/2 V + Q^ (K^^T V) / pi, as a quadratic sum: associativity is what the package makes use of."""
    weights = scores_of(normalize(q), normalize(k)) / np.pi
    return 0.5 * query_values + np.einsum("bhqk,bkhd->bqhd", weights, v)


def scaled_scores(q, k, bias=None):
    scores = scores_of(q, k) / math.sqrt(q.shape[-1])
    if isinstance(bias, tuple):
        rows, columns = bias
        outer = rows[..., :, None] + columns[..., None, :]
        bias = outer.reshape(*outer.shape[:3], -1)
    return scores if bias is None else scores + bias


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def mask_of(weights, threshold):
    """Strictly greater, and from 1 on empty by definition."""
    return (weights > threshold) & (threshold < 1)


def masked_softmax(q, k, v, threshold, bias=None):
    weights = softmax(scaled_scores(q, k, bias))
    mask = mask_of(weights, threshold)
    return np.einsum("bhqk,bkhd->bqhd", weights * mask, v), mask.mean()


def convolve_tokens(v, kernel):
    """np.correlate, one channel at a time; v [batch, tokens, heads, dim], kernel [taps, heads]."""
    out = np.zeros(v.shape)
    for batch, head, channel in np.ndindex(v.shape[0], *v.shape[2:]):
        # "full" and then cut: "same" is as long as the kernel where that is longer than the tokens.
        full = np.correlate(v[batch, :, head, channel], kernel[:, head], "full")
        start = len(kernel) // 2
        out[batch, :, head, channel] = full[start : start + v.shape[1]]
    return out


def convolve_grid(v, kernel, grid):
    """A loop over the patches and the taps; kernel [rows, columns, heads]."""
    (height, width), (rows, columns, _) = grid, kernel.shape
    patches = v.reshape(v.shape[0], height, width, *v.shape[2:])
    out = np.zeros(patches.shape)
    for y, x, row, column in np.ndindex(height, width, rows, columns):
        from_y, from_x = y + row - rows // 2, x + column - columns // 2
        if 0 <= from_y < height and 0 <= from_x < width:
            out[:, y, x] += patches[:, from_y, from_x] * kernel[row, column][:, None]
    return out.reshape(v.shape)


def linear_angular(q, k, v, token_kernel=None, query_values=None):
    query_values = v if query_values is None else query_values
    out = normalize(linear_core(q, k, v, query_values))
    return out if token_kernel is None else out + convolve_tokens(query_values, token_kernel)


def castling(q, k, v, token_kernel=None, *, threshold, bias=None, query_values=None):
    query_values = v if query_values is None else query_values
    auxiliary, density = masked_softmax(q, k, v, threshold, bias)
    out = normalize(linear_core(q, k, v, query_values) + auxiliary)
    return (out if token_kernel is None else out + convolve_tokens(query_values, token_kernel)), density


def clear_threshold(weights, near):
    """A threshold in the middle of the widest gap between weights from near / 2 to 2 near: rounding cannot cross it."""
    inside = np.sort(weights[(weights > near / 2) & (weights < 2 * near)])
    edges = np.concatenate([[near / 2], inside, [2 * near]])
    widest = np.argmax(np.diff(edges))
    return float(edges[widest] + edges[widest + 1]) / 2
