"""Prints the summary of a finished run, as training did at its end.

python -m castling_jax summary RUN
"""

from argparse import Namespace

from castling_jax.errors import InputError
from castling_jax.storage import reach_bucket
from castling_jax.tools.cli import Parser, any_path, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", type=any_path, help="the folder of a run, such as runs/digits")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    reach_bucket(options.run)

    from castling_jax.training.summary import SUMMARY_FILE, read_summary

    summary = read_summary(options.run)
    if summary is None:
        raise InputError(f"'{options.run}' is not a finished run: it has no {SUMMARY_FILE}.")
    print(summary)


if __name__ == "__main__":
    main()
