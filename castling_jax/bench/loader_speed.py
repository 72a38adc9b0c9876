"""Times the loader against a configuration's training step: images a second of reading, steps and both."""

import dataclasses
import time

import jax
from ml_collections import ConfigDict

from castling_jax.training.setup import first_state, first_variables, set_up
from castling_jax.training.sharding import shard_batch
from castling_jax.training.timing import interleaved_seconds, spread

THRESHOLD = 0.02  # below 1, so that both attentions are computed


@dataclasses.dataclass(frozen=True)
class Feeding:
    """What `measure` finds.

    Attributes:
      rates: images a second {min, median, max} over the repeats, of "reading", "steps" and "both". Without workers also
        "reading, CPU time", images a second of this process's CPU time, which other programs change little.
      bytes_an_image: bytes of each image and its annotations that the host sends to the devices.
    """

    rates: dict[str, dict[str, float]]
    bytes_an_image: float


def measure(config: ConfigDict, *, batches: int, repeats: int) -> Feeding:
    """Times reading, steps and both in turns.

    Args:
      config: the run's configuration.
      batches: batches in each repeat; more than the loader reads ahead.
      repeats: how often each is timed.

    Raises:
      InputError: the configuration is wrong, or its data set is not here.
    """
    setup = set_up(config)
    size = setup.config.train.batch_size
    stream = setup.batches()
    state = first_state(setup, first_variables(setup))
    first = next(stream)
    placed = shard_batch(first, setup.mesh, batch_size=size)

    def read() -> None:
        for _ in range(batches):
            next(stream)

    def step() -> jax.Array:
        nonlocal state
        for _ in range(batches):
            state, metrics = setup.train_step(state, placed, THRESHOLD)
        return metrics["loss"]

    def both() -> jax.Array:
        nonlocal state
        for _ in range(batches):
            batch = shard_batch(next(stream), setup.mesh, batch_size=size)
            state, metrics = setup.train_step(state, batch, THRESHOLD)
        return metrics["loss"]

    with jax.set_mesh(setup.mesh):
        seconds = interleaved_seconds({"reading": read, "steps": step, "both": both}, repeats=repeats)
    if not config.dataset.workers:  # whose CPU time is not this process's
        seconds |= interleaved_seconds({"reading, CPU time": read}, repeats=repeats, clock=time.process_time)
    speeds = {name: spread([batches * size / value for value in values]) for name, values in seconds.items()}
    return Feeding(speeds, sum(array.nbytes / len(array) for array in first.values()))
