"""Initial values of parameters: the numbers of jax.nn.initializers, drawn with fewer and smaller programs.

JAX draws each number of an array from the key and the number's place alone, so an array's numbers are the first ones of
any longer vector's. A new model's time goes into compiling: XLA compiles a vector's draw in 0.4 s of a CPU core, but
that of a kernel of 3 x 3 pixels in 2.5 s. And all small arrays share one vector's program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SHARED_SIZE = 2**16  # arrays of at most so many numbers are cut out of a vector of this size
Initializer = Callable[[jax.Array, Sequence[int], Any], jax.Array]  # (key, shape, dtype) -> array


def normal(std: float) -> Initializer:
    """A normal distribution with mean 0: jax.nn.initializers.normal."""

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return _scaled(_draw(jax.random.normal, key, shape, dtype), jnp.array(std, dtype), tuple(shape))

    return initialize


def scaled_uniform(scale: float, mode: str, *, in_axes: Sequence[int] = (-2,)) -> Initializer:
    """A uniform distribution around 0 of variance scale / fan: jax.nn.initializers.variance_scaling.

    Args:
      scale: the variance times the fan.
      mode: "fan_in", a kernel's inputs; or "fan_avg", the mean of its inputs and outputs.
      in_axes: the axes of input channels; the last axis is that of output channels, and all others are a window's.
    """

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        inputs, outputs = math.prod(shape[axis] for axis in in_axes), shape[-1]
        fan_in, fan_out = math.prod(shape) / outputs, math.prod(shape) / inputs
        fan = {"fan_in": fan_in, "fan_avg": (fan_in + fan_out) / 2}[mode]
        numbers = _draw(functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0), key, shape, dtype)
        return _scaled(numbers, jnp.sqrt(3 * jnp.array(scale / fan, dtype)), tuple(shape))

    return initialize


def uniform(limit: float) -> Initializer:
    """A uniform distribution from -limit to limit."""

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        draw = functools.partial(jax.random.uniform, minval=-limit, maxval=limit)
        return _scaled(_draw(draw, key, shape, dtype), jnp.array(1, dtype), tuple(shape))

    return initialize


def _draw(draw: Callable[..., jax.Array], key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """A vector that starts with the numbers of an array of this shape."""
    return draw(key, (max(math.prod(shape), SHARED_SIZE),), dtype)


@functools.partial(jax.jit, static_argnums=2)
def _scaled(numbers: jax.Array, factor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return numbers[: math.prod(shape)].reshape(shape) * factor
