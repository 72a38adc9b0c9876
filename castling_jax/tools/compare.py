"""Trains several attentions side by side, and says what each has reached and what it costs.

    python -m castling_jax compare --config=fashion_mnist [--attentions=castling,softmax]
        [--epochs=N] [--workdir=runs/compare-fashion_mnist]

trains the configuration once for each attention, all else being equal, prints held-out accuracy beside parameters and
multiply-accumulates (MACs) of what is run in the end, and writes the table to WORKDIR/compare.md. Each run is one of
main.py's in a folder of its own, WORKDIR/ATTENTION: started again, the command goes on where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from castling_jax.errors import InputError, check_known
from castling_jax.storage import try_file, write_atomically
from castling_jax.tools.cli import Parser, any_path, ending_in_a_sentence


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_config(required=True)
    parser.add_argument("--attentions", default="castling,softmax", help="by commas (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="instead of the configuration's")
    parser.add_argument("--workdir", type=any_path, help="by default runs/compare- and the configuration's name")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    import jax

    from castling_jax.models.attention.kinds import KINDS
    from castling_jax.training.comparison import TABLE_FILE, compare, table
    from castling_jax.training.malloc import keep_freed_memory
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
        try_file(workdir / TABLE_FILE)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        page = table(compare(config, attentions, workdir))
        write_atomically(workdir / TABLE_FILE, page.encode())
    except Preempted as preempted:
        sys.exit(f"interrupted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, if there is one.")
    print(page)


if __name__ == "__main__":
    main()
