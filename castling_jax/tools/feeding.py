"""Whether the loader keeps up with a configuration's training step on this machine.

    python -m castling_jax feeding --config=fashion_mnist [--batches=100] [--repeats=5]

reads batches, makes steps of one batch that is there already, and does both as training does, in turns; and prints the
images a second of each. Where reading is faster than the step the loader keeps up, but for what the two take from each
other of the same cores.
"""

from collections.abc import Sequence

from castling_jax.errors import check_at_least
from castling_jax.tools.cli import Parser, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_config(default="fashion_mnist")
    parser.add_argument("--batches", type=int, default=100, help="in each repeat; default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="of each; default %(default)s")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)
    for name in ("batches", "repeats"):
        check_at_least(f"--{name}", getattr(options, name), 1)

    from castling_jax.bench.loader_speed import rates
    from castling_jax.training.overrides import load_overridden

    config = load_overridden(options.config, options.fields)
    print(f"{options.config}: images/s, least / median / greatest of {options.repeats}", flush=True)
    found = rates(config, batches=options.batches, repeats=options.repeats)
    for name, figures in found.items():
        print(f"  {name:8}  {figures['min']:9,.0f} / {figures['median']:9,.0f} / {figures['max']:9,.0f}")
    print(f"  reading is {found['reading']['median'] / found['steps']['median']:.2f} times as fast as the steps.")


if __name__ == "__main__":
    main()
