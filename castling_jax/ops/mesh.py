"""Arrays on meshes with Explicit axes, which `jax.make_mesh` makes by default.

Along an Explicit axis every operation must say how its result is split. Along an Auto axis the compiler decides. This
package is written for Auto axes. `on_auto_axes` lets a function take arrays on Explicit axes: inside the function the
axes are Auto, and its results are split like its first argument.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from castling_jax.errors import InputError

HEAD_AXES = ("tensor", "model")  # mesh axes with these names split the heads; all other axes split the batch


def split_as(x: Any, *dimensions: int | None) -> PartitionSpec:
    """The specification of a result whose dimensions are split like these dimensions of `x`.

    A dimension of None is not split, nor are dimensions beyond these.
    """
    spec = tuple(jax.typeof(x).sharding.spec) if isinstance(x, jax.Array) else ()
    return PartitionSpec(*(spec[i] if i is not None and i < len(spec) else None for i in dimensions))


def on_auto_axes(out_specs: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function so that it runs with the mesh's Explicit axes turned into Auto axes.

    The mesh is that of `jax.set_mesh`, or else the mesh of the arguments' arrays. Without a mesh, or without Explicit
    axes, the function is called as it is. NumPy arrays in float64 become JAX arrays of the type that JAX gives them.

    Args:
      out_specs: first argument -> the PartitionSpecs of the results over the Explicit axes, a prefix of their tree.

    Raises:
      InputError: arrays lie on a mesh with Explicit axes that is not the mesh in use.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            if any(map(_is_numpys_float64, leaves)):
                leaves = [jnp.asarray(leaf) if _is_numpys_float64(leaf) else leaf for leaf in leaves]
                args, kwargs = jax.tree.unflatten(tree, leaves)
            is_explicit = [_is_on_explicit_axes(leaf) for leaf in leaves]
            arrays = [leaf for leaf, explicit in zip(leaves, is_explicit, strict=True) if explicit]
            mesh = mesh_in_use(arrays)
            _check_one_mesh(mesh, arrays)
            axes = axes_of_kind(mesh, AxisType.Explicit)
            if not axes:
                return function(*args, **kwargs)

            def inside(*arrays: jax.Array) -> Any:
                # Only these arrays are converted: a concrete threshold or NumPy tokens would become traced.
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
    """The mesh of `jax.set_mesh` or of a shard_map, or else the first mesh of an array; it may be empty."""
    in_use = jax.sharding.get_abstract_mesh()
    for array in arrays if in_use.empty else ():
        # Outside of jit the type of an array does not know the devices, only the array itself does.
        sharding = getattr(array, "sharding", None)
        if isinstance(array, jax.core.Tracer):
            sharding = jax.typeof(array).sharding
        if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
            return sharding.mesh
    return in_use


def axes_of_kind(mesh: Mesh | AbstractMesh, wanted: AxisType) -> tuple[str, ...]:
    """The names of the mesh's axes of one kind."""
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True) if kind == wanted)


def _is_numpys_float64(leaf: Any) -> bool:
    """Whether this is an array that JAX holds in float32 by default: a cast to its own type would warn.

    A scalar is left alone, because a concrete threshold would become traced.
    """
    return isinstance(leaf, np.ndarray) and leaf.ndim > 0 and leaf.dtype == np.float64


def _is_on_explicit_axes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(axes_of_kind(jax.typeof(leaf).sharding.mesh, AxisType.Explicit))


def _check_one_mesh(mesh: Mesh | AbstractMesh, arrays: list[jax.Array]) -> None:
    for array in arrays:
        other = jax.typeof(array).sharding.mesh
        if other != mesh.abstract_mesh:
            raise InputError(
                f"an array of shape {array.shape} lies on a mesh of {_axes_in_words(other)}, not on the mesh in use, "
                f"of {_axes_in_words(mesh)}: place all arrays on one mesh, that of jax.set_mesh if one is set."
            )


def _axes_in_words(mesh: Mesh | AbstractMesh) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types or (), strict=True)
    return " x ".join(f"{name} = {size} ({kind.name})" for name, size, kind in axes)
