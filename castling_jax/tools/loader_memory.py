"""Shows that a loader's memory stays flat while it reads a folder of JPEGs for many epochs.

    python -m castling_jax loader_memory [--batches=3000] [--workers=0]

writes small JPEGs to a temporary folder, reads them for many epochs as training does, and prints the resident memory of
this process and its workers from time to time.
"""

from argparse import Namespace

from castling_jax.tools.cli import Parser, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_count("--batches", 3000, "number of batches")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0 reads in this one")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.bench.loader_memory import watch_memory

    watch_memory(options.batches, options.workers)


if __name__ == "__main__":
    main()
