"""Checks line by line whether everything works here, and says how to mend what does not.

    python -m castling_jax doctor [--tpu]

It looks at versions, devices, memory, the folders of data and runs, libtpu and gcsfs. Then it trains ten steps on the
digits, switches to the inference form, reads the exported weights, and predicts. A line begins with ok or NO, or with
-- where something is missing that not everybody needs. The status is 1 where a line begins with NO.

--tpu, on a TPU, also compares every attention kernel with XLA on random numbers, forward and backward, in bfloat16 and
float32, and prints the measured time of an attention layer beside the TPU compiler's estimate. It should take about two
minutes. Nobody has run these kernels on a TPU yet: please send the output with the issue template "TPU report".
"""

import sys
from argparse import Namespace

from castling_jax.tools.cli import Parser, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tpu", action="store_true", help="compare the kernels with XLA too; needs a TPU")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from absl import logging

    from castling_jax.doctor import examine, examine_tpu

    logging.set_verbosity(logging.FATAL)  # Orbax logs every file
    failed = 0
    for lines in (examine(), examine_tpu()) if options.tpu else (examine(),):
        for line in lines:
            print(line, flush=True)
            failed += line.ok is False
    if failed:
        sys.exit(f"{failed} lines begin with NO.")
    print("All is well.")


if __name__ == "__main__":
    main()
