"""Shows that a loader's memory stays flat while it reads a folder of JPEGs for many epochs.

    python -m castling_jax loader_memory [--batches=3000] [--workers=0]

writes small JPEGs to a temporary folder, reads them for many epochs as training does, and prints the resident memory of
this process and its workers on the way.
"""

from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--batches", type=int, default=3000, help="how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read (default: %(default)s)")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    from castling_jax.bench.loader_memory import watch_memory

    watch_memory(options.batches, options.workers)


if __name__ == "__main__":
    main()
