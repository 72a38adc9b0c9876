"""Meshes with Explicit axes, which `jax.make_mesh` makes by default.

Along an Explicit axis every operation has to say how its result is split; along an Auto axis the compiler decides.
Everything here is written for Auto axes. `on_auto_axes` lets a function take arrays on Explicit axes: inside, these
axes are Auto, and the results are split as the function's first argument is.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from castling_jax.errors import InputError

HEAD_AXES = ("tensor", "model")  # mesh axes of these names split the heads; all others split the batch


def split_as(x: Any, *dimensions: int | None) -> PartitionSpec:
    """A result whose dimensions are split as these dimensions of `x` are; None, and the rest, are not split."""
    spec = tuple(jax.typeof(x).sharding.spec) if isinstance(x, jax.Array) else ()
    return PartitionSpec(*(spec[i] if i is not None and i < len(spec) else None for i in dimensions))


def on_auto_axes(out_specs: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function so that it runs with the Explicit axes of the mesh in use turned into Auto ones.

    The mesh is the one of `jax.set_mesh`, or else the one that the arguments' arrays lie on. Where it has no Explicit
    axes, or there is none, the function is called as it is.

    Args:
      out_specs: first argument -> the PartitionSpecs of the results over the Explicit axes, a prefix of their tree.

    Raises:
      InputError: arrays lie on a mesh with Explicit axes that is not the one in use.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            is_explicit = [_is_on_explicit_axes(leaf) for leaf in leaves]
            arrays = [leaf for leaf, explicit in zip(leaves, is_explicit, strict=True) if explicit]
            mesh = mesh_in_use(arrays)
            _check_one_mesh(mesh, arrays)
            axes = axes_of_kind(mesh, AxisType.Explicit)
            if not axes:
                return function(*args, **kwargs)

            def inside(*arrays: jax.Array) -> Any:
                # Everything else goes around the conversion: a threshold or tokens known now must stay known.
                converted = iter(arrays)
                new = [
                    next(converted) if explicit else leaf for leaf, explicit in zip(leaves, is_explicit, strict=True)
                ]
                args, kwargs = jax.tree.unflatten(tree, new)
                return function(*args, **kwargs)

            specs = out_specs(args[0] if args else kwargs.get(first))
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            return jax.sharding.auto_axes(inside, axes=axes, out_sharding=shardings)(*arrays)

        return run

    return decorate


def mesh_in_use(arrays: Iterable[jax.Array]) -> Mesh | AbstractMesh:
    """The mesh of `jax.set_mesh` or of a shard_map, or else the first one that an array lies on; it may be empty."""
    in_use = jax.sharding.get_abstract_mesh()
    for array in arrays if in_use.empty else ():
        # Outside of jit only an array itself knows the devices, not its type.
        sharding = getattr(array, "sharding", None)
        if isinstance(array, jax.core.Tracer):
            sharding = jax.typeof(array).sharding
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    return in_use


def axes_of_kind(mesh: Mesh | AbstractMesh, wanted: AxisType) -> tuple[str, ...]:
    """The names of the mesh's axes of this kind."""
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True) if kind == wanted)


def _is_on_explicit_axes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(axes_of_kind(jax.typeof(leaf).sharding.mesh, AxisType.Explicit))


def _check_one_mesh(mesh: Mesh | AbstractMesh, arrays: list[jax.Array]) -> None:
    for array in arrays:
        other = jax.typeof(array).sharding.mesh
        if other != mesh.abstract_mesh:
            raise InputError(
                f"an array of shape {array.shape} lies on a mesh of {_axes_in_words(other)}, not on the mesh in use, "
                f"of {_axes_in_words(mesh)}: place all arrays on one mesh, that of jax.set_mesh where it is set."
            )


def _axes_in_words(mesh: Mesh | AbstractMesh) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types or (), strict=True)
    return " x ".join(f"{name} = {size} ({kind.name})" for name, size, kind in axes)
