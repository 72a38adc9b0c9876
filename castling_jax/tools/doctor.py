"""Says whether everything works here, line by line, and what to do where it does not.

    python -m castling_jax doctor [--tpu]

It looks at versions, devices, memory, where data and runs are, and at libtpu and gcsfs. Then it trains ten steps on the
digits, switches to the inference form, reads the exported weights, and predicts. A line begins with ok, NO, or -- where
something is missing that not everybody needs. The status is 1 where a line begins with NO.

--tpu, on a TPU, also compares every attention kernel with XLA on random numbers, forward and backward, in bfloat16 and
float32, and prints the measured time of an attention layer beside the TPU compiler's estimate. It is meant to take two
minutes. Nobody has run these kernels on a TPU yet: please send the output, which the issue template "TPU report" asks
for.
"""

import sys
from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tpu", action="store_true", help="compare the kernels with XLA too; needs a TPU")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    from absl import logging

    from castling_jax.doctor import examine, examine_tpu

    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file
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
