"""Compares a run's kernels with XLA before its first step: a wrong kernel would train a wrong model unnoticed."""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from castling_jax.errors import InputError
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import apply, forward_train, get_variables
from castling_jax.ops.angular import add_linear_angular
from castling_jax.ops.around import Around
from castling_jax.ops.encoder_block import linear_angular_block
from castling_jax.ops.kernel_calls import Call, recorded_calls
from castling_jax.ops.masked_softmax import masked_softmax_first
from castling_jax.sizes import image_shape
from castling_jax.training.setup import Setup
from castling_jax.training.sharding import BATCH_AXES

# The largest differences of (outputs, gradients) that rounding explains, as shares of an array's largest number.
# float32: sums over thousands of tokens in two orders; a TPU splits each factor of a product into bfloat16 parts.
# bfloat16: the factors and the kernel's outputs are rounded to 8 bits, 2^-9 each, and a gradient goes through four such
# steps. A kernel that reads or writes the wrong block is off by about 1.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 4e-2)}
NOISE = 0.45  # of a channel: a score, the scaled sum of a head's products, then has a standard deviation of 0.2
Differences = dict[str, jax.Array]
IMAGES_A_DEVICE = 2  # a kernel takes one image at a time; with two, its sums over images are checked as well


def compare_kernels(setup: Setup) -> None:
    """Compares each kernel that the run's models call with XLA, forward and backward, on a small random batch.

    Does nothing if no kernels run: with `config.model.implementation` "xla", or "auto" without a TPU. All processes
    make the call together and see the same differences, so either all of them stop or none does. Every start makes the
    check, also a resumed run's: it may be on another TPU, mesh or version of the compiler.

    Raises:
      InputError: a kernel differs from XLA by more than rounding; the message names the kernel and the remedy.
    """
    mesh, implementation = setup.mesh, setup.config.model.implementation
    device = mesh.devices.flat[0]
    if implementation == "xla" or (implementation == "auto" and device.platform != "tpu"):
        return
    start, worst = time.perf_counter(), 0.0
    with jax.set_mesh(mesh):
        calls = kernel_calls([setup.model, *setup.task.other_models], mesh)
        for call in calls:
            try:
                worst = max(worst, compare_kernel(call, device.device_kind))
            except InputError as error:
                remedy = "train without the kernels, with --config.model.implementation=xla"
                raise InputError(f"{str(error).rstrip('.')}: {remedy}.") from error
    if jax.process_index() == 0:
        print(
            f"Compared {len(calls)} kernels with XLA in {time.perf_counter() - start:.1f} s: the largest "
            f"difference is {worst:.0%} of what rounding explains.",
            flush=True,
        )


def compare_kernel(call: Call, chip: str) -> float:
    """Compares one kernel with XLA, forward and backward, on random numbers.

    Args:
      call: a call from `kernel_calls`.
      chip: the device's name, for the message.

    Returns:
      The largest difference, divided by the difference that rounding explains.

    Raises:
      InputError: it is above 1; the message names the kernel and the array.
    """
    first = next(iter(call.arrays.values()))
    dtype, worst = first.dtype.name, 0.0
    both = jax.device_get(jax.jit(functools.partial(_differences, call))(jax.random.key(0)))  # (outputs, gradients)
    for differences, limit in zip(both, TOLERANCES[dtype], strict=True):
        for what, difference in differences.items():
            if not difference <= limit:  # this way around NaN is refused as well
                raise InputError(
                    f"the kernel of {call.operation} differs from XLA on this {chip} by {difference:.1e} of the "
                    f"largest number in the {what}, where {dtype}'s rounding explains {limit:.0e} "
                    f"({call_shapes(call)})."
                )
            worst = max(worst, float(difference) / limit)
    return worst


def call_shapes(call: Call) -> str:
    """The shapes of a call's tokens, or of its queries and keys, for people."""
    return ", ".join(f"{name} {call.arrays[name].shape}" for name in ("x", "q", "k") if name in call.arrays)


def kernel_calls(models: list[Model], mesh: Mesh) -> list[Call]:
    """The kernels that the models call on a small batch: in training, with an empty mask too, and in inference form.

    The mesh has to be set.
    """
    rows = IMAGES_A_DEVICE * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    key = jax.eval_shape(lambda: jax.random.key(0))
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    # eval_shape traces the models without computing them: only the kernels themselves run later, one by one.
    with recorded_calls() as calls:
        for model in models:
            variables, size = get_variables(model), image_shape(model.spec.image_size)
            images = jax.ShapeDtypeStruct((rows, *size, model.in_chans), jnp.float32)
            run = functools.partial(forward_train, model)
            jax.eval_shape(
                lambda v, x, t, key, run=run: run(v, x, mask_threshold=t, key=key), variables, images, threshold, key
            )
            jax.eval_shape(lambda v, x, key, run=run: run(v, x, mask_threshold=1.0, key=key), variables, images, key)
            inference = abstract_model(**model.spec.arguments(form="inference"))
            jax.eval_shape(functools.partial(apply, inference), get_variables(inference), images)
    return calls


def _differences(call: Call, key: Key[Array, ""]) -> tuple[Differences, Differences]:
    """The differences of the kernel's (outputs, gradients) from XLA's, as shares of XLA's largest number."""
    arrays = _draw(call.arrays, key)
    # XLA gets the same rounded numbers, but computes in float32: the difference is then the kernel's error alone.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        actual = _outputs_and_gradients(call, arrays, "pallas", key)
        expected = _outputs_and_gradients(call, wide, "xla", key)

    def share(one: jax.Array, other: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(other))
        return jnp.max(jnp.abs(one.astype(jnp.float32) - other)) / jnp.where(largest > 0, largest, 1)

    outputs, gradients = (
        {name: _largest(jax.tree.map(share, kernel_arrays[name], xla_arrays[name])) for name in xla_arrays}
        for kernel_arrays, xla_arrays in zip(actual, expected, strict=True)
    )
    return outputs, gradients


def _largest(shares: Any) -> jax.Array:
    return jnp.max(jnp.stack(jax.tree.leaves(shares)))  # jnp.max returns NaN if there is one


def _draw(shapes: dict[str, Any], key: Key[Array, ""]) -> dict[str, Any]:
    """Normal random numbers, but with no softmax weight near the threshold, where rounding would decide.

    The first channel of q and k makes the scores of even keys larger by 4 than the scores of odd keys. The other
    channels and the bias add normal numbers with a standard deviation of 0.2, so the threshold is 5 deviations away
    from both.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    arrays = jax.tree.unflatten(
        tree, [jax.random.normal(key, leaf.shape, jnp.float32) for key, leaf in zip(keys, leaves, strict=True)]
    )
    if "weights" in arrays:
        # Numbers of the usual size after each product: the matrices come as [inputs, outputs].
        arrays["weights"] = jax.tree.map(lambda x: x / math.sqrt(x.shape[0]) if x.ndim == 2 else x, arrays["weights"])
    else:
        tilt = math.sqrt(2 * math.sqrt(shapes["q"].shape[3]))
        signs = 1 - 2 * (jnp.arange(shapes["k"].shape[1]) % 2)
        arrays["q"] = (NOISE * arrays["q"]).at[..., 0].set(tilt)
        arrays["k"] = (NOISE * arrays["k"]).at[..., 0].set(tilt * signs[:, None])
    if "norms" in arrays:
        # Close to no norm at all, which keeps the distance from the threshold.
        nothing = jnp.array([0.0, 1.0, 0.0])[:, None, None]
        arrays["norms"] = jax.tree.map(lambda x: nothing + NOISE**2 / 2 * x, arrays["norms"])
    if "bias" in arrays:
        arrays["bias"] = jax.tree.map(lambda x: NOISE**2 / 2 * x, arrays["bias"])
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), arrays, shapes)


def _threshold(keys: int) -> float:
    """The geometric mean of the weights of even keys, about 2 / keys, and of odd keys, e^-4 times that."""
    return 2 * math.exp(-2) / keys


def _outputs_and_gradients(
    call: Call, arrays: dict[str, Any], implementation: str, key: Key[Array, ""]
) -> tuple[dict[str, Any], dict[str, Any]]:
    outputs, pullback = jax.vjp(lambda arrays: _run(call, arrays, implementation), arrays)
    leaves, tree = jax.tree.flatten(outputs)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    dtype = next(iter(call.arrays.values())).dtype  # both implementations get the same numbers
    cotangents = [
        jax.random.normal(key, leaf.shape, dtype).astype(leaf.dtype) if leaf.ndim else jnp.zeros_like(leaf)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    (gradients,) = pullback(jax.tree.unflatten(tree, cotangents))
    return outputs, {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def _run(call: Call, arrays: dict[str, Any], implementation: str) -> dict[str, Any]:
    """The call's outputs by name, from these arrays and this implementation."""
    if call.operation == "linear_angular_block":
        return {"output": linear_angular_block(**arrays, implementation=implementation, **call.options)}
    arrays = dict.fromkeys(("token_kernel", "query_values", "auxiliary", "bias", "norms")) | arrays
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    if call.operation == "masked_softmax_attention":
        out, density, qkv = masked_softmax_first(
            q,
            k,
            v,
            mask_threshold=jnp.float32(_threshold(k.shape[1])),
            bias=arrays["bias"],
            norms=arrays["norms"],
            implementation=implementation,
            **call.options,
        )
        return {"output": out, "mask density": density, "q, k and v handed on": qkv}
    options = dict(call.options)
    tokens = options.pop("query_tokens")
    out = add_linear_angular(
        arrays["auxiliary"],
        q,
        k,
        v,
        arrays["token_kernel"],
        query_values=arrays["query_values"] if tokens is None else np.array(tokens),
        around=Around(arrays["norms"], options.pop("activation")),
        implementation=implementation,
        **options,
    )
    return {"output": out}
