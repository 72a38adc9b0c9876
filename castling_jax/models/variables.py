"""Converts between NNX modules and plain trees, on which the rest of the package and users' programs work.

Variables are {"params": {...}, "batch_stats": {...}}: nested dicts with string keys only, whose leaves are arrays. Only
models with batch norm have `batch_stats`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Key

from castling_jax.errors import InputError, check, takes
from castling_jax.models.model import Model
from castling_jax.ops.mesh import on_auto_axes, split_as

Variables = dict[str, Any]
MODEL = (nnx.Module, "a model, as create_model makes it,")
VARIABLES = (Mapping, 'variables such as {"params": ...}')
COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def _string_keys(tree: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@takes(model=MODEL)
def get_variables(model: Model) -> Variables:
    """The model's variables as nested plain dicts with string keys (block 0 is "0"). The arrays are not copied."""
    trees = {name: nnx.to_pure_dict(nnx.state(model, kind)) for name, kind in COLLECTIONS.items()}
    return {name: _string_keys(tree) for name, tree in trees.items() if tree}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one dict from paths such as "params/blocks/0/norm1/scale" to leaves, sorted by path."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return dict(sorted(leaves.items()))


def unflatten(leaves: dict[str, Any]) -> Any:
    """The inverse of `flatten`.

    Raises:
      InputError: a path continues below an array, as "a/b" does if "a" is an array.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for depth, parent in enumerate(parents, start=1):
            if (above := "/".join(parents[:depth])) in leaves:
                raise InputError(f"{above!r} cannot be an array and hold {path!r}.")
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


@takes(model=MODEL, variables=VARIABLES)
def leaves_of(model: Model, variables: Variables) -> dict[str, Any]:
    """The variables by path, as `flatten` returns them, after a check that they are this model's.

    Raises:
      InputError: a variable is missing, unknown or of another shape than in the model.
    """
    expected, given = flatten(get_variables(model)), flatten(variables)
    if missing := sorted(expected.keys() - given.keys()):
        raise InputError(f"the variables lack {missing[0]!r} ({len(missing)} of {len(expected)} arrays are missing).")
    if unknown := sorted(given.keys() - expected.keys()):
        raise InputError(f"the variables hold {unknown[0]!r}, which the model does not have ({len(unknown)} arrays).")
    for path, leaf in expected.items():
        shape = getattr(given[path], "shape", type(given[path]).__name__)
        check(shape == leaf.shape, f"{path!r} must have the shape {leaf.shape}, not {shape}.")
    return given


def bind(model: Model, variables: Variables) -> Model:
    """A copy of the model that holds `variables`; the model itself does not change.

    Raises:
      InputError: a variable is missing, unknown or of another shape.
    """
    return _with_leaves(model, leaves_of(model, variables))


def _with_leaves(model: Model, leaves: dict[str, Any]) -> Model:
    graphdef, state = nnx.split(model)
    collections = {kind: name for name, kind in COLLECTIONS.items()}
    bound = {
        path: variable.replace(leaves["/".join([collections[variable.type], *map(str, path)])])
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(bound))


@takes(model=MODEL, variables=VARIABLES)
def apply(
    model: Model,
    variables: Variables,
    images: Float[Array, "batch height width channels"],
    *,
    mask_threshold: ArrayLike | None = None,
    return_densities: bool = False,
    key: Key[Array, ""] | None = None,
) -> Any:
    """The evaluation-mode forward pass; pure, jit- and grad-able (in reverse mode).

    Args:
      model: the architecture; the parameters in the model are not used.
      variables: the variables to use, in the form that `get_variables` returns.
      images: normalised pixels, in floating-point numbers, as `castling_jax.preprocess` makes them.
      mask_threshold: a scalar of at least 0. Models in training form need it if their attention has a mask (castling,
        taylor); other models ignore it.
      return_densities: also return the mask density of each layer.
      key: what draws a masked autoencoder's hidden patches; None is a fixed key. Other models take none.

    Returns:
      In float32 a classifier's logits [batch, classes]; a detector's {"scores": [batch, points, classes], "boxes":
      [batch, points, 4]} (x0, y0, x1, y1 in pixels of the images); a segmenter's {"logits": [batch, height, width,
      classes]}; or a masked autoencoder's {"reconstruction": [batch, patches, patch pixels], "mask": [batch, patches]},
      1 for hidden patches. With `return_densities` a pair of these
      outputs and the densities [layers]; a layer without the masked branch has the density 0.

    Raises:
      InputError: variables are missing or of another shape, images do not fit the model, the threshold is missing,
        negative or NaN, or the key is no key.
    """
    check_images(images)
    if key is not None:
        check(model.draws, "key is for masked autoencoders, and this model draws nothing.")
        _require_key(key)

    @on_auto_axes(lambda images: (split_as(images, 0), PartitionSpec()))
    def forward(images: Any, leaves: Any, mask_threshold: Any) -> Any:
        draws = {} if key is None else {"key": key}
        return _with_leaves(model, leaves)(images, mask_threshold=mask_threshold, **draws)

    outputs, densities = forward(images, leaves_of(model, variables), mask_threshold)
    return (outputs, densities) if return_densities else outputs


@takes(model=MODEL, variables=VARIABLES)
def forward_train(
    model: Model,
    variables: Variables,
    images: Float[Array, "batch height width channels"],
    *,
    mask_threshold: ArrayLike | None = None,
    key: Key[Array, ""],
) -> tuple[Any, Float[Array, "layers"], Any]:
    """(outputs, densities, batch_stats) in training mode; pure, as `apply` is.

    The outputs are each head's logits [heads, batch, classes], or those of another model's `training_outputs`. `key`
    draws drop-path's branches and a masked autoencoder's hidden patches. `batch_stats` are the running statistics of
    batch norm after this batch, or {} without batch norm.

    Raises:
      InputError: what `apply` raises; None is no key, because without one a model evaluates.
    """
    check_images(images)
    _require_key(key)
    leaves = leaves_of(model, variables)
    statistics = flatten(variables.get("batch_stats", {}))
    # Running statistics are outputs, and keep the sharding that they came with.
    stay = unflatten({path: split_as(leaf, *range(len(leaf.shape))) for path, leaf in statistics.items()})

    over_batch = (None,) * model.batch_axis + (0,)

    @on_auto_axes(lambda images: (split_as(images, *over_batch), PartitionSpec(), stay))
    def forward(images: Any, leaves: Any, mask_threshold: Any, key: Any) -> Any:
        # Batch norm writes into the copy's variables, which are made here: no tracer leaves jit or grad through them,
        # and the model does not change.
        bound = _with_leaves(model, leaves)
        outputs, densities = bound.training_outputs(images, mask_threshold=mask_threshold, key=key)
        return outputs, densities, get_variables(bound).get("batch_stats", {})

    return forward(images, leaves, mask_threshold, key)


@takes(model=MODEL, variables=VARIABLES)
def features(
    model: Model,
    variables: Variables,
    images: Float[Array, "batch height width channels"],
    *,
    mask_threshold: ArrayLike | None = None,
) -> list[Float[Array, "batch height width channels"]]:
    """The backbone's tokens on their grid, one map for each stage, finest first.

    Pure, as `apply` is, with the same arguments and errors. A segmenter's maps are of the padded images, whose sides
    are multiples of 32 pixels.
    """
    check_images(images)

    @on_auto_axes(lambda images: split_as(images, 0))
    def forward(images: Any, leaves: Any, mask_threshold: Any) -> Any:
        return _with_leaves(model, leaves).features(images, mask_threshold=mask_threshold)

    return forward(images, leaves_of(model, variables), mask_threshold)


def check_images(images: jax.Array) -> None:
    """Raises an InputError unless `images` is a batch of at least one image, with four axes."""
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) != 4 or shape[0] < 1:
        what = type(images).__name__ if shape is None else f"of shape {shape}"
        raise InputError(f"images must be [batch, height, width, channels], at least one, not {what}.")


def _require_key(key: Any) -> None:
    """Raises an InputError unless this is one key of `jax.random.key`, or of `jax.random.PRNGKey`: a row of numbers."""
    dtype = getattr(key, "dtype", np.dtype(bool))
    axes = 0 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else 1 if dtype == np.uint32 else None
    if axes is None or key.ndim != axes:
        raise InputError(f"key must be one key, such as jax.random.key(0), not {repr(key)[:100]}.")


@takes(variables=VARIABLES)
def count_parameters(variables: Variables) -> int:
    """The number of parameters: numbers in `params`, without the batch statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
