"""Times the loader against a configuration's training step: images a second of reading, steps and both."""

import jax
from ml_collections import ConfigDict

from castling_jax.training.setup import first_state, first_variables, set_up
from castling_jax.training.sharding import shard_batch
from castling_jax.training.timing import interleaved_seconds, spread

THRESHOLD = 0.02  # below 1, so that both attentions are computed


def rates(config: ConfigDict, *, batches: int, repeats: int) -> dict[str, dict[str, float]]:
    """Images a second {min, median, max} over the repeats, of "reading", "steps" and "both".

    Args:
      config: the run's configuration.
      batches: batches in each repeat; more than the loader reads ahead.
      repeats: how often each of the three is timed.

    Raises:
      InputError: the configuration is wrong, or its data set is not here.
    """
    setup = set_up(config)
    size = setup.config.train.batch_size
    stream = setup.batches()
    state = first_state(setup, first_variables(setup))
    placed = shard_batch(next(stream), setup.mesh, batch_size=size)

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
    return {name: spread([batches * size / value for value in values]) for name, values in seconds.items()}
