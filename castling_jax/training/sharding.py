"""Where arrays live: one mesh, sharding rules by parameter name, and the rows of a batch that a process holds."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from castling_jax.errors import InputError
from castling_jax.models.model import Model

# replica: whole copies, one or more in each slice of a pod, that exchange only gradients; data: more copies within a
# slice; fsdp: splits the batch and also the matrices; tensor: splits the heads and the MLP's channels.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]
# Suffix of a parameter's name -> the mesh axes that split the array's last axes; P() leaves it whole on every device.
# The first match counts, and a name without a match is refused. The optimiser's moments have the parameters' names, so
# they are split in the same way.
RULES = (
    (r"mlp/(fc1|ln1/linear)/kernel", P("fsdp", "tensor")),
    (r"mlp/(fc1/bias|ln1/bn/\w+)", P("tensor")),
    (r"mlp/(fc2|ln2/linear)/kernel", P("tensor", "fsdp")),
    (r"attn\w*/proj/(ln/linear/)?kernel", P("tensor", "fsdp")),
    (r"attn\w*/(qkv|q|q/ln|kv)/(linear/)?kernel", P("fsdp", "tensor")),
    (r"attn\w*/((qkv|q|kv)/bias|(qkv|q/ln|kv)/bn/\w+)", P("tensor")),
    (r"attn/latent/kernel", P("fsdp", None)),
    (r"token_kernel|relative_position_bias_table", P("tensor")),
    (r"attention_biases|focus_scale", P("tensor", None)),
    (r"(head|head_dist)/(linear/|fc/)?kernel|shortcut_proj_attn/kernel", P("fsdp", None)),
    (r"(patch_embed/proj|stem/conv[34]/linear)/kernel", P("fsdp")),
    (r"(stem/conv[12]/linear|pool_[qkv])/kernel", P()),
    (r"decoder_(embed|pred)/kernel", P("fsdp", None)),
    (r"cls_token|dist_token|mask_token|global_tokens|(decoder_)?pos_embed|rel_pos_[hw]", P()),
    (r"(neck|pyramid|head)/.+/kernel", P()),  # a detector's or a segmenter's, small beside its backbone
    (r"bias|scale|mean|var", P()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices along AXES.

    Args:
      sizes: axis -> its size; one may be -1, for all devices that the other axes leave.
      devices: the devices to use; None takes all devices of all processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or replica is no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes[axis] for axis in AXES]
    axes = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"config.mesh needs sizes of at least 1, one of which may be -1, not {axes}.")
    known = math.prod(size for size in shape if size != -1)
    if len(devices) % known or (-1 not in shape and len(devices) != known):
        raise InputError(f"config.mesh with {axes} does not make up the {len(devices)} devices that are here.")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # The torus of a pod's links has long sides, and a mesh axis may take a part of one: tensor = 2 on 4 x 4 x 4 chips.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise InputError(f"config.mesh.replica must be a multiple of the {slices} slices, not {shape[0]}.")
    else:
        # Only replica crosses slices, whose network is slower than the links within: it exchanges gradients alone.
        within, across = [shape[0] // slices, *shape[1:]], [slices, 1, 1, 1]
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a state, or of any tree with parameters' names, by RULES; scalars are not split.

    Args:
      state: a tree of arrays or of their shapes.
      mesh: a mesh from `make_mesh`.

    Raises:
      InputError: no rule matches a name, or an axis of the mesh does not divide the array's axis that it splits.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((spec for pattern, spec in RULES if re.search(rf"(^|/)({pattern})$", name)), None)
        if rule is None and leaf.shape:
            raise InputError(f"'{name}' {leaf.shape} has no sharding rule: add one to RULES in training/sharding.py.")
        rule = rule or P()
        spec = P(*(None,) * (len(leaf.shape) - len(rule)), *rule)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"the mesh axis {axis} = {mesh.shape[axis]} does not divide the {size} channels or heads of "
                    f"'{name}' {leaf.shape}: choose another config.mesh.{axis}."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def whole_over_fsdp(shardings: Any) -> Any:
    """The same shardings without the axis `fsdp`, for parameters that are gathered before use."""
    return jax.tree.map(
        lambda leaf: NamedSharding(leaf.mesh, P(*(None if axis == "fsdp" else axis for axis in leaf.spec))), shardings
    )


def check_heads(model: Model, mesh: Mesh) -> None:
    """Raises an InputError unless the mesh's axis `tensor` divides the heads of every attention."""
    for path, module in nnx.iter_modules(model):
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and heads % mesh.shape["tensor"]:
            name = "/".join(map(str, path))
            raise InputError(
                f"the mesh axis tensor = {mesh.shape['tensor']} does not divide the {heads} heads of '{name}': choose "
                "another config.mesh.tensor."
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def check_batch(name: str, batch_size: int, mesh: Mesh, *, parts: int = 1) -> None:
    """Raises an InputError unless the mesh's batch axes divide each of the batch's `parts` equal parts."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % (shards * parts):
        axes = " x ".join(f"{axis} = {mesh.shape[axis]}" for axis in BATCH_AXES)
        accumulated = f" times config.train.accumulate_steps = {parts}" if parts > 1 else ""
        raise InputError(
            f"{name} = {batch_size} must be a multiple of {shards * parts}: the mesh axes {axes} split it{accumulated}."
        )


def batch_shapes(
    example: Mapping[str, jax.ShapeDtypeStruct], batch_size: int, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of such examples, split over the mesh, to compile a training step for."""
    rows = None if mesh is None else batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype, sharding=rows) for name, one in example.items()
    }


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, to restore a checkpoint into or to compile a step for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays from numpy arrays that every process has; the processes send each other nothing."""

    def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return array[index or ()]

        return jax.make_array_from_callback(array.shape, sharding, part)

    return jax.tree.map(global_array, tree, shardings)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Gathers arrays from the mesh into whole numpy arrays in every process; all processes make the call."""
    return jax.device_get(jax.device_put(tree, replicated(mesh)))


@functools.cache  # every batch asks for it
def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The sorted rows of a global batch that this process's devices hold."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, *, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays, split along their first axis, from the rows that `process_rows` names."""
    sharding, rows = batch_sharding(mesh), process_rows(batch_size, mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (index or (slice(None),))[0].indices(batch_size)
            # JAX asks by rows of the global batch; `array` has this process's rows alone.
            start = int(np.searchsorted(rows, first))
            return array[start : start + last - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}
