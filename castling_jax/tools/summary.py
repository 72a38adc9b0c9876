"""Prints what came of a run, as training did at its end.

python -m castling_jax summary RUN
"""

from collections.abc import Sequence

from castling_jax.errors import InputError
from castling_jax.storage import reach_bucket
from castling_jax.tools.cli import Parser, any_path, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", type=any_path, help="the folder of a run, such as runs/digits")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    workdir = make_parser().read(words).run
    reach_bucket(workdir)

    from castling_jax.training.summary import SUMMARY_FILE, read_summary

    summary = read_summary(workdir)
    if summary is None:
        raise InputError(f"'{workdir}' is not a finished run: it has no {SUMMARY_FILE}.")
    print(summary)


if __name__ == "__main__":
    main()
