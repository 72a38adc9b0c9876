"""Converts a PicoDet's neck and head from and to state dicts with PaddleDetection's parameter names."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from castling_jax.convert.names import state_arrays
from castling_jax.convert.torch import check_fit, check_form, check_weights
from castling_jax.errors import takes
from castling_jax.models.model import Model
from castling_jax.models.picodet import PicoDet
from castling_jax.models.variables import VARIABLES, Variables, flatten, get_variables, leaves_of, unflatten
from castling_jax.ops.points import BINS

DETECTOR = (PicoDet, "a detector, as create_model makes it,")
# Our paths -> PaddleDetection's names: all rules are applied, in this order.
RULES = (
    (r"^\w+/", ""),  # the collection
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/_mean"),
    (r"/var$", "/_variance"),
    (r"conv_t/(\d+)/conv/", r"conv_t/convs/\1/conv/"),
    # Before the general rules for convolutions below: LC-PAN's blocks have other names than all other convolutions.
    (r"(_blocks/\d+)/blocks/(\d+)/depthwise/", r"\1/\2/dw_conv/conv/"),
    (r"(_blocks/\d+)/blocks/(\d+)/pointwise/", r"\1/\2/pw_conv/conv/"),
    (r"^head/(\d+)/body/(\d+)/depthwise/", r"head/conv_feat/cls_conv_dw\1/\2/conv/"),
    (r"^head/(\d+)/body/(\d+)/pointwise/", r"head/conv_feat/cls_conv_pw\1/\2/conv/"),
    (r"^head/(\d+)/se/", r"head/conv_feat/se/\1/"),
    (r"^head/(\d+)/align/", r"head/cls_align/\1/"),
    (r"^head/(\d+)/(cls|reg)/", r"head/head_\2_list/\1/"),
    (r"^head/(\d+)/output/", r"head/head_cls\1/"),
    (r"/(depthwise|dense)/linear/", "/dwconv/"),
    (r"/(depthwise|dense)/bn/", "/bn1/"),
    (r"/pointwise/linear/", "/pwconv/"),
    (r"/pointwise/bn/", "/bn2/"),
    (r"(/se/\d+/conv)/linear/", r"\1/conv/"),
    (r"(/se/\d+/conv)/bn/", r"\1/norm/"),
    (r"(conv_feat/cls_conv.+)/conv/bn/", r"\1/norm/"),
    (r"/conv/linear/", "/conv/"),
    (r"/conv/bn/", "/bn/"),
    (r"/", "."),
)
# Arrays that PaddleDetection's heads hold and never read: scales of the distances, and the bins' numbers. `to_paddle`
# writes them too, so that its state dict has all of PaddleDetection's names.
UNREAD = {f"head.p{level}_feat.scale_reg": np.ones(1, np.float32) for level in (3, 4, 5, 6)}
UNREAD |= {"head.distribution_project.project": np.arange(BINS, dtype=np.float32)}


@takes(model=DETECTOR)
def from_paddle(model: Model, state_dict: Mapping[str, Any]) -> Variables:
    """Variables for `model` with neck and head from a state dict with PaddleDetection's names.

    The backbone and its pyramid, which PaddleDetection does not have, keep the model's values. Names that start with
    "backbone." are ignored.

    Args:
      model: a PicoDet in training form.
      state_dict: names to NumPy, JAX or PyTorch arrays; kernels are [out, in, height, width], as in Paddle.

    Returns:
      {"params": ..., "batch_stats": ...}: arrays in the model's dtypes. The neck's and the head's arrays are copies.

    Raises:
      InputError: the model is in inference form, the state dict is no mapping to arrays, names are missing or unknown,
        shapes do not fit, or arrays hold other things than finite floating-point numbers; the message lists them.
    """
    check_form(model)
    remaining = {
        name: value
        for name, value in state_arrays(state_dict, "a state dict").items()
        if name not in UNREAD and not name.startswith("backbone.")
    }
    leaves, taken = {}, {}
    missing, misshapen = [], []
    for path, leaf in flatten(get_variables(model)).items():
        if not _is_theirs(path):
            leaves[path] = leaf
            continue
        names, shape = _paddle_names(path), _paddle_layout(path, np.empty(leaf.shape, np.bool_)).shape
        # The state dict may have either of an array's two names, or both.
        held = {name: remaining.pop(name) for name in names if name in remaining}
        if not held:
            missing.append(repr(names[0]))
            continue
        name, value = next(iter(held.items()))
        if value.shape != shape:
            misshapen.append(f"{name!r} is {value.shape}, not {shape}")
            continue
        taken[name] = value
        # [out, in, height, width] -> [height, width, in, out]; 1 x 1 convolutions are dense layers here: [in, out].
        leaves[path] = jnp.array(
            value.transpose(2, 3, 1, 0).reshape(leaf.shape) if value.ndim == 4 else value, leaf.dtype
        )
    check_fit(model.spec.name, missing, [repr(name) for name in sorted(remaining)], misshapen, [])
    check_weights(taken)
    return unflatten(leaves)


@takes(model=DETECTOR, variables=VARIABLES)
def to_paddle(model: Model, variables: Variables) -> dict[str, np.ndarray]:
    """Neck and head under PaddleDetection's names, as float32 NumPy copies.

    Arrays that PaddleDetection keeps under two names are under both. A neck that reads four maps, as on a LeViT, has a
    fourth `neck.conv_t.convs` instead of `neck.first_top_conv`.

    Raises:
      InputError: the model is in inference form, or the variables are not this model's.
    """
    check_form(model)
    state_dict = {name: value.copy() for name, value in UNREAD.items()}
    for path, leaf in leaves_of(model, variables).items():
        if _is_theirs(path):
            value = _paddle_layout(path, np.asarray(leaf, np.float32))
            state_dict |= {name: np.array(value, order="C") for name in _paddle_names(path)}
    return state_dict


def _is_theirs(path: str) -> bool:
    return path.split("/")[1] in ("neck", "head")


def _paddle_names(path: str) -> list[str]:
    """The array's names in PaddleDetection: the second version's output convolutions have two each."""
    name = path
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return list(dict.fromkeys([name, re.sub(r"_list\.(\d+)", r"\1", name)]))


def _paddle_layout(path: str, value: np.ndarray) -> np.ndarray:
    if not path.endswith("/kernel"):
        return value
    return (value if value.ndim == 4 else value[None, None]).transpose(3, 2, 0, 1)
