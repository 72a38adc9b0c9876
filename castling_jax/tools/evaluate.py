"""Evaluates both forms of a trained model, on its own held-out split or on other data.

    python -m castling_jax evaluate RUN [--workdir=DIR] [--config.dataset.name=NAME --config.dataset.eval_split=SPLIT]

RUN is a run's folder or RUN/checkpoints/STEP. The split is the one in the run's summary, or the one that
--config.dataset.name, .eval_split and other fields of dataset and evaluation name. The command prints its figures and
writes RUN/evaluation/, or DIR/evaluation/ where --workdir is given. It is the same as main.py --evaluate=RUN.
"""

import argparse
from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence, program
from castling_jax.tools.train import add_process_flags
from castling_jax.training.malloc import keep_freed_memory_on_cpu


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_argument("evaluate", metavar="RUN", help="a run's folder, or one of its checkpoints/STEP")
    parser.add_argument("--workdir", metavar="DIR", help="where evaluation/ is written; RUN if not given")
    parser.add_argument("--config", help=argparse.SUPPRESS)  # so that a sentence refuses it, and says why
    add_process_flags(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    name = program()
    with ending_in_a_sentence(f"{name}: "):
        options = make_parser().read(words)
    keep_freed_memory_on_cpu()
    from castling_jax.training import process

    process.handle_signals(name)
    process.evaluate(options, name)


if __name__ == "__main__":
    main()
