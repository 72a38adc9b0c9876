"""Kills a run again and again, and sees whether it ends as one that was left alone.

    python -m castling_jax faults [--kills=20] [--processes=2] [--seed=0] [--out=FILE.md]

trains a small model on the digits in several processes on this machine, once undisturbed and once killed at random
moments: one process by SIGKILL, all by SIGKILL (half of the time while a checkpoint is being written), or all told to
end by SIGTERM; and each time goes on by the same command. Both must end with the same parameters, bit for bit. It works
in a clone of the repository, whose scripts/launch.py it starts.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from castling_jax.errors import check_at_least
from castling_jax.storage import try_file
from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ways (default: %(default)s)")
    parser.add_argument("--out", type=local_path, help="also write the table there")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)
    for word in ("kills", "processes"):
        check_at_least(f"--{word}", getattr(options, word), 1)

    from castling_jax.bench.faults import LAUNCHER, describe, sweep

    if not LAUNCHER.exists():
        sys.exit(f"there is no '{LAUNCHER}': run this in a clone of the repository.")
    if options.out is not None:
        try_file(options.out)
    with tempfile.TemporaryDirectory(prefix="castling_jax_faults_") as folder:
        kills, expected, found = sweep(
            Path(folder), kills=options.kills, processes=options.processes, seed=options.seed
        )
    page = describe(kills, options.processes, expected, found)
    print(page)
    if options.out is not None:
        options.out.write_text(page)
    sys.exit(found != {expected})


if __name__ == "__main__":
    main()
