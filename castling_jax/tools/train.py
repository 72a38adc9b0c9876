"""Trains a model.

    python -m castling_jax train --config=NAME[:VARIANT] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]

NAME is one of configs/, or a file of your own. --help-config lists the fields.

The same command resumes a run that was interrupted, and prints the summary of a finished one. --extend trains a
finished run further, to a larger --config.train.epochs.
Ctrl-C (or SIGTERM) makes the run save after the step and end; a second Ctrl-C ends it at once.
--check checks the configuration, and does nothing else.

On a TPU pod, start the command on every host; the hosts find each other. Elsewhere --coordinator=HOST:PORT,
--num_processes and --process_id say where the processes are. scripts/launch.py starts several on one machine.

The status is 0 where the run is finished, or has saved because it was told to end; 3 where the same command would only
fail in the same way (a loss that is not finite); 130 where Ctrl-C ended it; and 1 after any other mistake.
"""

import re
from collections.abc import Sequence

from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, ending_in_a_sentence, program
from castling_jax.training.malloc import keep_freed_memory_on_cpu


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_config()
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder, gs:// too; runs/NAME if not given")
    parser.add_argument(
        "--evaluate",
        metavar="RUN",
        help="evaluate this run, or one of its checkpoints/STEP, and do no more: as python -m castling_jax evaluate",
    )
    parser.add_argument(
        "--extend", action="store_true", help="train a finished run further, to a larger config.train.epochs"
    )
    parser.add_argument("--profile", metavar="FIRST:LAST", help="the steps to trace for XProf, into DIR/profile/")
    parser.add_argument("--check", action="store_true", help="check the configuration, and do no more")
    parser.add_argument("--help-config", action="store_true", help="print the configuration's fields, and do no more")
    add_process_flags(parser)
    return parser


def add_process_flags(parser: Parser) -> None:
    """Adds the flags of a command that can run in several processes."""
    group = parser.add_argument_group("several processes that are not on a TPU pod")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process_id", type=int, metavar="N", help="the number of this process, from 0")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries log")


def profiled_steps(text: str | None) -> range | None:
    """The steps of --profile, the last one among them.

    Raises:
      InputError: the text is not FIRST:LAST.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"--profile must be FIRST:LAST, such as 100:104, not {text!r}.")
    return range(int(match[1]), int(match[2]) + 1)


def main(words: Sequence[str] | None = None) -> None:
    name = program()
    # What follows the block ends in a sentence and a status of its own: resume.sh reads the status.
    with ending_in_a_sentence(f"{name}: "):
        options = make_parser().read(words)
        profile = profiled_steps(options.profile)

        if options.help_config or options.check:
            from castling_jax.training.config_help import show

            show(options)
            return

        keep_freed_memory_on_cpu()
        from castling_jax.training import process
    process.handle_signals(name)
    if options.evaluate is None:
        process.train(options, name, profile)
    else:
        process.evaluate(options, name)


if __name__ == "__main__":
    main()
