"""Whether the loader keeps up with a configuration's training step: images a second of reading, steps and both."""

import jax
from ml_collections import ConfigDict

from castling_jax.training.setup import first_state, first_variables, set_up
from castling_jax.training.sharding import shard_batch
from castling_jax.training.timing import interleaved_seconds, spread

THRESHOLD = 0.02  # one at which both attentions are computed


def rates(config: ConfigDict, *, batches: int, repeats: int) -> dict[str, dict[str, float]]:
    """Images a second: min, median and max over the repeats, of "reading", "steps" and "both".

    Args:
      config: the training's.
      batches: in each repeat; more than the loader reads ahead.
      repeats: of each.

    Raises:
      InputError: the configuration is wrong, or its data set is not here.
    """
    made = set_up(config)
    size = made.config.train.batch_size
    stream = made.batches()
    state = first_state(made, first_variables(made))
    held = shard_batch(next(stream), made.mesh, batch_size=size)

    def read() -> None:
        for _ in range(batches):
            next(stream)

    def step() -> jax.Array:
        nonlocal state
        for _ in range(batches):
            state, metrics = made.train_step(state, held, THRESHOLD)
        return metrics["loss"]

    def both() -> jax.Array:
        nonlocal state
        for _ in range(batches):
            batch = shard_batch(next(stream), made.mesh, batch_size=size)
            state, metrics = made.train_step(state, batch, THRESHOLD)
        return metrics["loss"]

    with jax.set_mesh(made.mesh):
        seconds = interleaved_seconds({"reading": read, "steps": step, "both": both}, repeats=repeats)
    return {name: spread([batches * size / value for value in values]) for name, values in seconds.items()}
