"""Plans the switch: what it would do to each array, without computing anything."""

from typing import Any, Literal, NamedTuple

import jax

from castling_jax.convert.inference import SOFTMAX_BRANCH, to_inference
from castling_jax.models.variables import Variables, flatten


class Fate(NamedTuple):
    """What the switch does to one array.

    Attributes:
      action: "kept"; "folded", as a batch norm or as the layer beside it; "averaged" with the other head; or "dropped"
        with the softmax branch.
      target: path in the inference tree of the array with the result; None for a dropped array.
      shape: shape of the target; None for a dropped array.
    """

    action: Literal["kept", "folded", "averaged", "dropped"]
    target: str | None
    shape: tuple[int, ...] | None


def plan(variables: Variables) -> dict[str, Fate]:
    """What `to_inference` would do to each array: path, such as "params/head/kernel", -> `Fate`.

    A batch norm's scale and var are listed under the kernel that they are folded into, its bias and mean under the bias
    (which scale and var change as well). A head's kernel that is folded and then averaged is "averaged".

    Args:
      variables: variables as `to_inference` takes them; only their shapes are used.

    Raises:
      InputError: what `to_inference` raises.
    """
    # From to_inference itself, so that the plan cannot disagree with it about the paths and shapes of the result.
    shapes = jax.eval_shape(to_inference, jax.tree.map(_shape_only, variables))
    targets = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    paths = flatten(variables)
    two_heads = "head_dist" in variables["params"] and "head_dist" not in shapes["params"]
    return {path: _fate(path, paths, targets, two_heads) for path in paths}


def _shape_only(leaf: Any) -> Any:
    """The leaf's shape and dtype; a leaf that is no array stays as it is, for `to_inference` to refuse."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _fate(path: str, paths: dict[str, object], targets: dict[str, tuple[int, ...]], two_heads: bool) -> Fate:
    if SOFTMAX_BRANCH in path.split("/"):
        return Fate("dropped", None, None)
    node, _, layer = path.rpartition("/")[0].rpartition("/")
    # batch_stats has no counterpart in the inference tree: mean and var go to the layer at the same place in params.
    in_params = node.replace("batch_stats", "params", 1)
    target = path
    if layer == "bn":
        target = f"{in_params}/linear/{'kernel' if path.endswith(('/scale', '/var')) else 'bias'}"
    action: Literal["kept", "folded", "averaged"] = "kept"
    if layer == "bn" or (layer == "linear" and f"{in_params}/bn/scale" in paths):
        action = "folded"
    if two_heads and target.startswith(("params/head/", "params/head_dist/")):
        target = target.replace("/head_dist/", "/head/")
        action = action if layer == "bn" else "averaged"
    return Fate(action, target, targets[target])
