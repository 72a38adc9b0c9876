"""Measures whether the loader keeps up with a configuration's training step on this machine.

    python -m castling_jax feeding --config=fashion_mnist [--batches=100] [--repeats=5]

times three things in turns and prints the images a second of each: reading batches, training steps on a batch that is
in memory already, and both together, as training does. It also prints the bytes that the host sends for each image and,
without workers, the images a second of CPU time of reading. The loader keeps up where reading is faster than the steps,
except for the time that the two take from each other on the same cores.
"""

from argparse import Namespace

from castling_jax.tools.cli import Parser, command


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_config(default="fashion_mnist")
    parser.add_count("--batches", 100, "batches in each repeat")
    parser.add_count("--repeats", 5, "repeats of each measurement")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.bench.loader_speed import measure
    from castling_jax.tables import aligned
    from castling_jax.training.overrides import load_overridden

    config = load_overridden(options.config, options.fields)
    print(f"{options.config}: images/s, range of {options.repeats} repeats", flush=True)
    feeding = measure(config, batches=options.batches, repeats=options.repeats)
    speeds = feeding.rates
    rows = [(name, *(f"{speed[of]:,.0f}" for of in ("min", "median", "max"))) for name, speed in speeds.items()]
    print("\n".join(aligned([("", "min", "median", "max"), *rows])))
    print(f"  the host sends {feeding.bytes_an_image:,.0f} bytes for each image;")
    print(f"  reading is {speeds['reading']['median'] / speeds['steps']['median']:.2f} times as fast as the steps.")


if __name__ == "__main__":
    main()
