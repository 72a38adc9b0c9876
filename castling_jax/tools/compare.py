"""Trains several attentions side by side, and prints the accuracy and the cost of each.

    python -m castling_jax compare --config=fashion_mnist [--attentions=castling,softmax]
        [--epochs=N] [--workdir=runs/compare-fashion_mnist]

trains the configuration once for each attention, all else being equal. It prints the held-out accuracy beside the
parameters and multiply-accumulates (MACs) of the inference form, and writes the table to WORKDIR/compare.md. Each run
is one of main.py's, in the folder WORKDIR/ATTENTION: the same command goes on after an interruption.
"""

import sys
from argparse import Namespace
from pathlib import Path

from etils import epath

from castling_jax.errors import InputError, check_known
from castling_jax.storage import try_file, write_atomically
from castling_jax.tools.cli import Parser, any_path, command
from castling_jax.training.malloc import keep_freed_memory_on_cpu


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_config(required=True)
    parser.add_argument("--attentions", default="castling,softmax", help="the attentions, with commas")
    parser.add_argument("--epochs", type=int, help="epochs of each run; the configuration's if not given")
    parser.add_argument("--workdir", type=any_path, help="the folder of the runs; runs/compare-NAME if not given")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    keep_freed_memory_on_cpu()
    from castling_jax.models.attention.kinds import KINDS
    from castling_jax.training.comparison import TABLE_FILE, compare, table
    from castling_jax.training.overrides import load_overridden
    from castling_jax.training.preemption import Preempted

    try:
        if any(field.startswith("--config.model.attention") for field in options.fields):
            raise InputError("compare takes its attentions from --attentions: leave out --config.model.attention.")
        if options.epochs is not None:
            options.fields.append(f"--config.train.epochs={options.epochs}")
        config = load_overridden(options.config, options.fields)
        attentions = options.attentions.split(",")
        for attention in attentions:
            check_known("attention", attention, KINDS)
        workdir = options.workdir or epath.Path("runs") / f"compare-{Path(options.config.partition(':')[0]).stem}"
        try_file(workdir / TABLE_FILE)  # before hours are spent
        page = table(compare(config, attentions, workdir))
        write_atomically(workdir / TABLE_FILE, page.encode())
    except Preempted as preempted:
        sys.exit(f"interrupted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, if there is one.")
    print(page)


if __name__ == "__main__":
    main()
