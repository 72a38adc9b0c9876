"""Kills a run again and again, and compares its end with that of a run that was left alone.

    python -m castling_jax faults [--kills=20] [--processes=2] [--seed=0] [--out=FILE.md]

trains a small model on the digits in several processes on this machine, once undisturbed and once with kills at random
moments. A kill is SIGKILL to one process, SIGKILL to all (half of the time while a checkpoint is being written), or
SIGTERM to all. After each kill the same command goes on. Both runs must end with the same parameters, bit for bit. The
command needs a clone of the repository, because it starts scripts/launch.py.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from castling_jax.storage import try_file
from castling_jax.tools.cli import Parser, command, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_count("--kills", 20, "number of kills")
    parser.add_count("--processes", 2, "number of processes")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments and the kinds of the kills")
    parser.add_argument("--out", type=local_path, help="a file to write the table to as well")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.bench.faults import LAUNCHER, describe, sweep

    if not LAUNCHER.exists():
        sys.exit(f"there is no '{LAUNCHER}': run this in a clone of the repository.")
    if options.out is not None:
        try_file(options.out)
    with tempfile.TemporaryDirectory(prefix="castling_jax_faults_") as folder:
        kills, expected, hashes = sweep(
            Path(folder), kills=options.kills, processes=options.processes, seed=options.seed
        )
    page = describe(kills, options.processes, expected, hashes)
    print(page)
    if options.out is not None:
        options.out.write_text(page)
    sys.exit(hashes != {expected})


if __name__ == "__main__":
    main()
