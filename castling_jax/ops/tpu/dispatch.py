"""From an operation to its kernels: how a mesh splits the work, and on which platform the kernels run."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from castling_jax.errors import InputError
from castling_jax.ops.mesh import HEAD_AXES, axes_of_kind, mesh_in_use

INSTEAD = 'use implementation="xla", which has no such limits'


def split_over_mesh(*arrays: jax.Array, heads: int | None) -> tuple[Mesh | AbstractMesh, PartitionSpec] | None:
    """The mesh in use, and how it splits (batch, tokens, heads or channels); None where it has no axis to split.

    Manual axes, those of a shard_map around the call, have split the arrays already and are left out.

    Args:
      *arrays: what lies on the mesh; the first one has the batch first.
      heads: the number of heads; None for a kernel that needs all of them.

    Raises:
      InputError: the mesh does not divide the batch or the heads, or `vmap` maps a dimension that it splits.
    """
    mesh = mesh_in_use(arrays)
    free = axes_of_kind(mesh, AxisType.Auto)
    if not free:
        return None
    if not _can_split_over(mesh, free):
        raise InputError(
            f"jax.vmap maps a dimension that the mesh splits, and the kernels need its axes {', '.join(free)} for the "
            f"batch and heads: map a dimension that the mesh does not split, or {INSTEAD}."
        )
    head_axes = tuple(name for name in free if name in HEAD_AXES)
    batch_axes = tuple(name for name in free if name not in HEAD_AXES)
    for dimension, size, axes in (("batch", arrays[0].shape[0], batch_axes), ("heads", heads, head_axes)):
        parts = math.prod(mesh.shape[name] for name in axes)
        if size is None and parts > 1:
            raise InputError(
                f"the mesh splits the heads (its axes {', '.join(axes)}), and this kernel needs all: {INSTEAD}."
            )
        if size is not None and size % parts:
            raise InputError(
                f"the mesh splits the {dimension} into {parts} parts (its axes {', '.join(axes)}), and {size} is not a "
                f"multiple of {parts}: choose another mesh or {dimension}, or {INSTEAD}."
            )
    return mesh, PartitionSpec(batch_axes, None, None if heads is None else head_axes)


def check_dtypes(names: str, *arrays: jax.Array) -> None:
    """Raises an InputError unless the arrays, which the message calls `names`, have one dtype that the kernels take.

    So it does for an empty array, of which a kernel would have no block.
    """
    if any(0 in x.shape for x in arrays):
        raise InputError(f"the kernels take no empty {names}: {INSTEAD}.")
    if any(jax.typeof(x).manual_axis_type.varying for x in arrays):
        raise InputError(f"the kernels run in a jax.shard_map only with check_vma=False: pass that, or {INSTEAD}.")
    dtypes = {x.dtype.name for x in arrays}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise InputError(
            f"the kernels take {names} in one dtype, float32 or bfloat16, not in {' and '.join(sorted(dtypes))}: "
            f"{INSTEAD}."
        )


def _can_split_over(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> bool:
    """False under a vmap of a dimension that is split over one of the axes."""
    # JAX has no function that tells, but shard_map refuses such axes.
    size, spec = math.prod(mesh.shape[name] for name in axes), PartitionSpec(axes)
    try:
        jax.eval_shape(
            jax.shard_map(lambda x: x, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False),
            jax.ShapeDtypeStruct((size,), jnp.float32),
        )
    except ValueError:
        return False
    return True


def over_mesh(run: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on each device's part of the batch and of the heads, because the compiler cannot split a kernel."""

    def sharded(*arguments, interpret):
        # An argument of None has no leaf in the arguments' tree, so its specification must be None too.
        specs = tuple(None if x is None else spec for x, spec in zip(arguments, in_specs, strict=True))
        part = functools.partial(run, interpret=interpret)
        # Without the check, because Pallas does not say over which axes its outputs vary.
        part = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        # jit, because without it shard_map would take the mesh with the types its axes had before `on_auto_axes`.
        return jax.jit(part)(*arguments)

    return sharded


def on_platform(kernel: Callable[..., Any], *arguments: Any, fallback: Callable[..., Any] | None) -> Any:
    """Runs the kernel compiled where the program is lowered for a TPU; elsewhere runs `fallback`, or interprets it.

    On the mesh of another platform the kernel is not traced beside its fallback: a training step is then traced in two
    thirds of the time. So a program that is traced on a CPU's mesh has no kernels even where it is exported for a TPU.
    """
    if fallback is not None and _platform_in_use() not in (None, "tpu"):
        return fallback(*arguments)

    def on_tpu(*arguments):
        return kernel(*arguments, interpret=False)

    if fallback is not None:
        return jax.lax.platform_dependent(*arguments, tpu=on_tpu, default=fallback)
    if jax.default_backend() == "gpu":
        raise InputError(f'implementation="pallas" is for TPUs, and this is a GPU: {INSTEAD}.')
    return jax.lax.platform_dependent(*arguments, tpu=on_tpu, cpu=lambda *arguments: kernel(*arguments, interpret=True))


def _platform_in_use() -> str | None:
    """The platform of the devices of `jax.set_mesh`'s mesh; None where no mesh is set, or JAX does not say."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(device, "platform", None)  # JAX 0.10.0 may have no such attribute
