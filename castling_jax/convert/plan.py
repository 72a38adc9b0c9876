"""What the switch does to each array, told without doing it."""

from typing import Any, Literal, NamedTuple

import jax

from castling_jax.convert.inference import SOFTMAX_BRANCH, to_inference
from castling_jax.models.variables import Variables, flatten


class Fate(NamedTuple):
    """What becomes of one array.

    Attributes:
      action: "kept"; "folded" into or with a batch norm's neighbour; "averaged" with the other head; or "dropped" with
        the softmax branch.
      target: path of the array in the inference tree that holds the result; None where it is dropped.
      shape: the target's; None where it is dropped.
    """

    action: Literal["kept", "folded", "averaged", "dropped"]
    target: str | None
    shape: tuple[int, ...] | None


def plan(variables: Variables) -> dict[str, Fate]:
    """What `to_inference` would do to each array: its path, such as "params/head/kernel", -> its `Fate`.

    A batch norm's scale and var are folded into the kernel beside it, its bias and mean into the bias (where scale and
    var take part as well). A head's kernel that is folded and then averaged is "averaged".

    Args:
      variables: as `to_inference` takes them; only shapes are looked at, and nothing is computed.

    Raises:
      InputError: what `to_inference` raises.
    """
    shapes = jax.eval_shape(to_inference, jax.tree.map(_shape_only, variables))
    targets = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    paths = flatten(variables)
    two_heads = "head_dist" in variables["params"] and "head_dist" not in shapes["params"]
    return {path: _fate(path, paths, targets, two_heads) for path in paths}


def _shape_only(leaf: Any) -> Any:
    """What `to_inference` refuses stays as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _fate(path: str, paths: dict[str, object], targets: dict[str, tuple[int, ...]], two_heads: bool) -> Fate:
    if SOFTMAX_BRANCH in path.split("/"):
        return Fate("dropped", None, None)
    node, _, layer = path.rpartition("/")[0].rpartition("/")
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
