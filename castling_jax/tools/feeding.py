"""Whether the loader keeps up with a configuration's training step on this machine.

    python -m castling_jax.tools.feeding --config=configs/fashion_mnist.py [--batches=100] [--repeats=5]

reads batches, makes steps of one batch that is there already, and does both as training does, in turns; and prints the
images a second of each. Where reading is faster than the step the loader keeps up, but for what the two take from each
other of the same cores.
"""

import argparse

import jax

from castling_jax.errors import check_at_least
from castling_jax.tools.folders import ending_in_a_sentence
from castling_jax.training.config_files import load_config
from castling_jax.training.setup import first_state, first_variables, set_up
from castling_jax.training.sharding import shard_batch
from castling_jax.training.timing import interleaved_seconds, spread

THRESHOLD = 0.02  # one at which both attentions are computed


def rates(config_name: str, *, batches: int, repeats: int) -> dict[str, dict[str, float]]:
    """Images a second: min, median and max over the repeats, of "reading", "steps" and "both".

    Args:
      config_name: FILE.py or FILE.py:ARGUMENT.
      batches: in each repeat; more than the loader reads ahead.
      repeats: of each.

    Raises:
      InputError: the configuration is wrong, or its data set is not here.
    """
    made = set_up(load_config(config_name))
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


@ending_in_a_sentence("feeding: ")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion_mnist.py", help="default %(default)s")
    parser.add_argument("--batches", type=int, default=100, help="in each repeat; default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of each; default %(default)s")
    options = parser.parse_args()
    for name in ("batches", "repeats"):
        check_at_least(f"--{name}", getattr(options, name), 1)
    print(f"{options.config}: images/s, least / median / greatest of {options.repeats}", flush=True)
    found = rates(options.config, batches=options.batches, repeats=options.repeats)
    for name, figures in found.items():
        print(f"  {name:8}  {figures['min']:9,.0f} / {figures['median']:9,.0f} / {figures['max']:9,.0f}")
    print(f"  reading is {found['reading']['median'] / found['steps']['median']:.2f} times as fast as the steps.")


if __name__ == "__main__":
    main()
