"""A DeiT, a LeViT and an MViTv2 small enough for tests, and DeiT's forward pass once more in plain float64 numpy."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from castling_jax.models.attention.linear import random_directions
from castling_jax.models.layers import Layers
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten, get_variables, unflatten
from tests.ops import reference

WITH_SOFTMAX = ("softmax", "softmax_taps")
WITHOUT_TAPS = ("softmax", "relu_linear", "taylor", "linear_taylor", "performer")
WITH_MASK = ("castling", "taylor")  # and their branch has the tables, under softmax_branch
SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
    "image_size": 8,
    "patch_size": 2,
    "drop_path_rate": 0.0,
}
# Two stages, on grids of 7 x 7 and 4 x 4; the golden files have three.
LEVIT_SIZES = {
    "embed_dim": (8, 12),
    "depth": (1, 1),
    "num_heads": (2, 3),
    "key_dim": 4,
    "num_classes": 7,
    "image_size": 112,
}


# Grids 8, 4 and 2; keys on 2, 4 and 2, and 4: all the three relations.
MVIT_SIZES = {
    "embed_dim": 8,
    "depths": (1, 2, 1),
    "num_heads": 1,
    "num_classes": 7,
    "image_size": 32,
    "drop_path_rate": 0.0,
}


def layers(**options):
    """What makes layers in float32, from seed 0."""
    return Layers(dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), **options)


@functools.cache
def small_model(**arguments):
    """Shapes only, so that nothing is drawn or compiled: variables come from `random_variables`. One for all tests."""
    return abstract_model("deit_micro", **(SIZES | arguments))


@functools.cache
def small_levit(**arguments):
    """A LeViT, likewise."""
    return abstract_model("levit_128s", **(LEVIT_SIZES | arguments))


@functools.cache
def small_mvit(**arguments):
    """An MViTv2, likewise."""
    return abstract_model("mvitv2_tiny", **(MVIT_SIZES | arguments))


def random_variables(model, seed=0):
    """Numbers with which every part of the model matters: nothing is zero or one, as in a new model."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in flatten(get_variables(model)).items():
        value = rng.normal(size=leaf.shape)
        name = path.split("/")[-1]
        if name == "kernel":
            value /= math.sqrt(math.prod(leaf.shape[:-1]))
        elif name == "scale":
            value = 1 + 0.2 * value
        elif name == "var":
            value = np.exp(0.5 * value)
        elif name != "pos_embed":
            value *= 0.3
        leaves[path] = jnp.asarray(value, leaf.dtype)
    return unflatten(leaves)


def random_images(batch=2, height=8, width=8, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width, 3)), jnp.float32)


def layer_norm(x, parameters):
    deviation = x - x.mean(-1, keepdims=True)
    return (
        deviation / np.sqrt(np.square(deviation).mean(-1, keepdims=True) + 1e-6) * parameters["scale"]
        + parameters["bias"]
    )


def dense(x, parameters):
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu_linear(q, k, v):
    """As a quadratic sum of normalised weights; the package multiplies keys and values first. Without weights 0."""
    weights = reference.scores_of(np.maximum(q, 0), np.maximum(k, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights / np.where(total == 0, 1, total), v)


def focused_linear(q, k, v, focus_scale):
    """FLatten's equations 5 and 6 with the published code's scales and epsilon: normalised weights of all pairs."""

    def focus(x):
        x = np.maximum(x, 0) / np.log1p(np.exp(focus_scale))
        return np.linalg.norm(x, axis=-1, keepdims=True) * reference.normalize(x**3)

    weights = reference.scores_of(focus(q), focus(k)) / k.shape[1]
    return np.einsum("bhqk,bkhd->bqhd", weights / (weights.sum(axis=-1, keepdims=True) + 1e-6), v)


def taylor_weights(q, k):
    """1 + s of centred keys, divided by the row's sum as in the paper, which centring makes N."""
    weights = 1 + reference.scaled_scores(q, k - k.mean(axis=1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def taylor(q, k, v, threshold, bias=None):
    """ViTALiTy's training form; with a threshold of 1 its linear form."""
    weights = reference.softmax(reference.scaled_scores(q, k, bias))
    mask = reference.mask_of(weights, threshold)
    linear = taylor_weights(q, k)
    return np.einsum("bhqk,bkhd->bqhd", np.where(mask, weights, linear), v), mask.mean()


def performer(q, k, v, directions):
    """Performer's weights of all pairs. Epsilon stands beside the features, relative to the largest."""

    def features(x, axes):
        x = x / x.shape[-1] ** 0.25
        logs = x @ directions.T
        if axes == (1, 3):
            logs = logs - np.square(x).sum(axis=-1, keepdims=True) / 2
        return np.exp(logs - logs.max(axis=axes, keepdims=True)) + 1e-6

    weights = reference.scores_of(features(q, (3,)), features(k, (1, 3)))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), v)


def _performer_of_seed_0(q, k, v, parameters):
    key_dim = q.shape[-1]
    return performer(q, k, v, random_directions(key_dim * max(1, round(math.log(key_dim))), key_dim))


# The kinds without a mask or a bias: (q, k, v, the attention's parameters) -> output without the taps.
LINEAR = {
    "relu_linear": lambda q, k, v, parameters: relu_linear(q, k, v),
    "relu_linear_taps": lambda q, k, v, parameters: relu_linear(q, k, v),
    "focused_linear": lambda q, k, v, parameters: focused_linear(q, k, v, parameters["focus_scale"]),
    "linear_taylor": lambda q, k, v, parameters: taylor(q, k, v, 1.0)[0],
    "performer": _performer_of_seed_0,
}


def attend(q, k, v, parameters, *, attention, threshold, token_conv, grid, prefix_tokens):
    """(output, mask density, how near a weight comes to the threshold, relative to it)."""
    density, margin = 0.0, np.inf
    if attention in WITH_SOFTMAX:
        weights = reference.softmax(reference.scaled_scores(q, k))
        out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    elif attention in LINEAR:
        out = LINEAR[attention](q, k, v, parameters)
    elif attention == "taylor":
        out, density = taylor(q, k, v, threshold)
        margin = np.min(np.abs(reference.softmax(reference.scaled_scores(q, k)) - threshold) / threshold)
    elif attention == "angular":
        out = reference.normalize(np.einsum("bhqk,bkhd->bqhd", reference.kernel(q, k), v))
    elif threshold is None:
        out = reference.linear_angular(q, k, v)
    else:
        out, density = reference.castling(q, k, v, threshold=threshold)
        weights = reference.softmax(reference.scaled_scores(q, k))
        margin = np.min(np.abs(weights - threshold) / threshold)
    if attention in WITHOUT_TAPS:
        return out, density, margin
    if token_conv == "1d":
        out = out + reference.convolve_tokens(v, parameters["token_kernel"])
    if token_conv == "2d":
        patches = v[:, prefix_tokens:]
        out[:, prefix_tokens:] += reference.convolve_grid(patches, parameters["token_kernel"], grid)
    return out, density, margin


def forward(variables, images, *, num_heads, patch_size, attention, threshold=None, token_conv="1d"):
    """(logits, densities, margin) of DeiT; the variables' position embedding must have the images' grid."""
    params = unflatten({path: np.asarray(leaf, np.float64) for path, leaf in flatten(variables["params"]).items()})
    images = np.asarray(images, np.float64)
    batch, height, width, channels = images.shape
    grid = (height // patch_size, width // patch_size)
    patches = images.reshape(batch, grid[0], patch_size, grid[1], patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patch_embed"]["proj"]["kernel"]
    x = patches.reshape(batch, grid[0] * grid[1], -1) @ kernel.reshape(-1, kernel.shape[-1])
    x = x + params["patch_embed"]["proj"]["bias"]
    prefix = [params[name] for name in ("cls_token", "dist_token") if name in params]
    x = np.concatenate([*(np.repeat(token, batch, axis=0) for token in prefix), x], axis=1) + params["pos_embed"]
    densities, margins = [], []
    for block in params["blocks"].values():
        qkv = dense(layer_norm(x, block["norm1"]), block["attn"]["qkv"])
        q, k, v = np.moveaxis(qkv.reshape(batch, x.shape[1], 3, num_heads, -1), 2, 0)
        if "pool_q" in block["attn"]:
            pools = (block["attn"][f"pool_{name}"]["kernel"] for name in "qkv")
            q, k, v = (add_pooled(part, pool, grid, len(prefix)) for part, pool in zip((q, k, v), pools, strict=True))
        out, density, margin = attend(
            q,
            k,
            v,
            block["attn"],
            attention=attention,
            threshold=threshold,
            token_conv=token_conv,
            grid=grid,
            prefix_tokens=len(prefix),
        )
        x = x + dense(out.reshape(x.shape), block["attn"]["proj"])
        x = x + dense(gelu(dense(layer_norm(x, block["norm2"]), block["mlp"]["fc1"])), block["mlp"]["fc2"])
        densities.append(density)
        margins.append(margin)
    x = layer_norm(x, params["norm"])
    logits = dense(x[:, 0], params["head"])
    if "head_dist" in params:
        logits = (logits + dense(x[:, 1], params["head_dist"])) / 2
    return logits, np.asarray(densities), min(margins)


def add_pooled(x, kernel, grid, prefix_tokens):
    """x and, at the patches, the sum over each 3 x 3 neighbourhood on the grid with the kernel [3, 3, 1, head_dim]."""
    patches = x[:, prefix_tokens:].reshape(x.shape[0], *grid, *x.shape[2:])
    padded = np.pad(patches, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    pooled = np.einsum("byxhdij,ijd->byxhd", windows, kernel[:, :, 0])
    return x + np.concatenate(
        [np.zeros_like(x[:, :prefix_tokens]), pooled.reshape(patches.shape[0], -1, *x.shape[2:])], 1
    )
