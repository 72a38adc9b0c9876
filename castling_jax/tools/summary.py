"""Prints what came of a run, as main.py did at its end.

python -m castling_jax.tools.summary RUN
"""

import argparse

from castling_jax.errors import InputError
from castling_jax.storage import reach_bucket
from castling_jax.tools.folders import any_path, ending_in_a_sentence
from castling_jax.training.summary import SUMMARY_FILE, read_summary


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=any_path, help="the folder of a run, such as runs/digits")
    workdir = parser.parse_args().run
    reach_bucket(workdir)
    summary = read_summary(workdir)
    if summary is None:
        raise InputError(f"'{workdir}' is not a finished run: it has no {SUMMARY_FILE}.")
    print(summary)


if __name__ == "__main__":
    main()
