"""Where arrays live: one mesh, rules on the parameters' names, and the rows of a batch that a process holds."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from castling_jax.errors import InputError
from castling_jax.models.model import ImageSize, Model, image_shape

# replica: whole copies, one or more to a slice, between which only gradients go; data: the same within a slice; fsdp:
# splits the batch, and the matrices too; tensor: splits heads and the MLP's channels.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]
# Suffixes of names -> how the array is split, the last axes where it has more; P(): it is whole on every device. The
# first rule that fits counts, and a name that no rule fits is refused. The optimiser keeps its moments under the
# parameters' names, so that they are split alike.
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
    (r"cls_token|dist_token|global_tokens|pos_embed|rel_pos_[hw]", P()),
    (r"(neck|pyramid|head)/.+/kernel", P()),  # a detector's, small beside its backbone
    (r"bias|scale|mean|var", P()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Devices along AXES.

    Args:
      sizes: of each axis; at most one is -1, which is what the others leave.
      devices: None is all of all processes.

    Raises:
      InputError: the sizes do not make up the number of devices, or replicas that do not lie in whole slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes[axis] for axis in AXES]
    said = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"config.mesh needs sizes of at least 1, one of which may be -1, not {said}.")
    known = math.prod(size for size in shape if size != -1)
    if len(devices) % known or (-1 not in shape and len(devices) != known):
        raise InputError(f"config.mesh with {said} does not make up the {len(devices)} devices that are here.")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A pod is a torus, of which an axis here may take a part of a side: tensor = 2 of 4 x 4 x 4.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise InputError(f"config.mesh.replica must be a multiple of the {slices} slices, not {shape[0]}.")
    else:
        within, across = [shape[0] // slices, *shape[1:]], [slices, 1, 1, 1]
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a state, or of any tree with parameters' names, by RULES; scalars are not split.

    Args:
      state: arrays or their shapes.
      mesh: from `make_mesh`.

    Raises:
      InputError: no rule fits a name, or an axis of the mesh does not divide what it has to split.
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
    """The same shardings without the axis `fsdp`: of parameters that are gathered to be used."""
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
    """Of anything that has a batch's rows along its first axis."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what is on every device."""
    return NamedSharding(mesh, P())


def check_batch(name: str, batch_size: int, mesh: Mesh, *, parts: int = 1) -> None:
    """Raises an InputError unless the mesh's batch axes divide the batch, `parts` times over."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % (shards * parts):
        axes = " x ".join(f"{axis} = {mesh.shape[axis]}" for axis in BATCH_AXES)
        accumulated = f" times config.train.accumulate_steps = {parts}" if parts > 1 else ""
        raise InputError(
            f"{name} = {batch_size} must be a multiple of {shards * parts}: the mesh axes {axes} split it{accumulated}."
        )


def batch_shapes(batch_size: int, image_size: ImageSize, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch as the training step takes it: what that is compiled for."""
    rows = None if mesh is None else batch_sharding(mesh)
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape(image_size), 3), jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where the arrays are to lie: what is restored or compiled for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays from numpy arrays that every process has; nothing is sent."""

    def global_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return array[index or ()]

        return jax.make_array_from_callback(array.shape, sharding, part)

    return jax.tree.map(global_array, tree, shardings)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """numpy arrays, whole in every process, of arrays that lie on the mesh; all processes make the call."""
    return jax.device_get(jax.device_put(tree, replicated(mesh)))


@functools.cache  # asked for with every batch
def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, sorted."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, *, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays, split along their first axis, from the rows that `process_rows` names."""
    sharding, rows = batch_sharding(mesh), process_rows(batch_size, mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (index or (slice(None),))[0].indices(batch_size)
            start = int(np.searchsorted(rows, first))
            return array[start : start + last - first]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}
