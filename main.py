"""Trains a model: python main.py --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...].

Started again, the same command goes on where an interrupted run stopped; of a finished run it prints the summary.
--evaluate=RUN (or RUN/checkpoints/STEP) prints the held-out figures of both forms, and does nothing else.

On a TPU pod it is started on every host, which find each other; elsewhere --coordinator=HOST:PORT, --num_processes and
--process_id say where they are. scripts/launch.py starts several processes on one machine.
"""

import errno
import itertools
import logging as stdlib_logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from castling_jax.errors import InputError, check_known
from castling_jax.storage import check_bucket
from castling_jax.tools import summary
from castling_jax.training import distributed
from castling_jax.training.config import CONFIG_FILE, check_config, check_same_run, field_names, load_config
from castling_jax.training.evaluate import evaluate_checkpoint
from castling_jax.training.loop import train
from castling_jax.training.preemption import Preempted

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"


def check_overrides(arguments: list[str]) -> None:
    """Refuses what ml_collections would end in a traceback of.

    Raises:
      InputError: an override of an unknown field, or no such configuration.
    """
    for argument, following in itertools.pairwise([*arguments, ""]):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument):
            load_config(following if found[1] is None else found[1])
        if field := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            check_known("config field", field[1], field_names())


def define_flags(argv: list[str]) -> None:
    """Defines the flags. ml_collections reads the overrides among them right then, so they are checked first.

    Raises:
      InputError: as `check_overrides`.
    """
    check_overrides(argv[1:])
    config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "The configuration file.")
    flags.DEFINE_string("workdir", None, "Where the run is kept, gs:// too; by default runs/ and the config's name.")
    flags.DEFINE_string("evaluate", None, "A run's folder, or one of its checkpoints/STEP, to evaluate and no more.")
    flags.DEFINE_string("profile", None, "FIRST:LAST, the steps to trace for XProf, into the workdir's profile/.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several that are not on a TPU pod.")
    flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def parse_flags(argv: list[str]) -> list[str]:
    """What absl makes of the command line.

    Raises:
      InputError: an unknown flag, or a value of another type.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error).strip()) from error


def profiled_steps(text: str | None) -> range | None:
    """What --profile says.

    Raises:
      InputError: it is not FIRST:LAST.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) > int(found[2]):
        raise InputError(f"--profile must be FIRST:LAST, such as 100:104, not {text!r}.")
    return range(int(found[1]), int(found[2]) + 1)


def ignore_closed_loops(raised: Any) -> None:
    """Python's hook for what nobody can catch, without what TensorStore's threads say a hundred times of a bad file."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # Orbax tells of every file it writes, and logs the errors that it raises too.
        logging.set_verbosity(logging.FATAL)
        stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
        sys.unraisablehook = ignore_closed_loops
        stdlib_logging.getLogger("castling_jax").setLevel(stdlib_logging.WARNING)  # what we say is meant to be read
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; flags are --config, --workdir and --config.GROUP.FIELD.")
    options = flags.FLAGS
    path, _, variant = config_flags.get_config_filename(options["config"]).partition(":")
    config_file = Path(path)
    if not config_file.is_file():
        raise InputError(f"there is no configuration file '{config_file}'.")
    profile = profiled_steps(options.profile)
    distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    is_writer = jax.process_index() == 0
    if options.evaluate is not None:
        check_bucket(options.evaluate)
        figures = evaluate_checkpoint(epath.Path(options.evaluate), options.config.mesh)
        print(summary.describe_evaluation(figures) if is_writer else "", end="")
        return
    config = options.config
    name = "-".join([config_file.stem, *filter(None, variant.split(","))])
    workdir = epath.Path(options.workdir or Path("runs") / name)
    check_config(config)
    check_bucket(workdir, for_a_run=True)
    distributed.use_compilation_cache(workdir / "compiled")
    finished = summary.read_summary(workdir)
    if finished is None:
        figures = train(config, workdir, profile=profile)
        if is_writer:
            print(summary.describe(summary.finish(workdir, figures)))
        return
    check_same_run(config, workdir / CONFIG_FILE)
    if is_writer:
        print(summary.describe(finished))
        print(f"This run is finished. To start anew, remove '{workdir}' or give another --workdir.")


def run() -> None:
    """main() with mistakes said in one sentence, and a non-zero status."""
    try:
        define_flags(sys.argv)
        app.run(main, flags_parser=parse_flags)
    except InputError as error:
        distributed.end(f"main.py: {error}")
    except Preempted as preempted:
        if jax.process_index() == 0:
            print(f"Preempted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        distributed.end("main.py: interrupted; the same command goes on from the last checkpoint.")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            distributed.end(f"main.py: {error}; once there is room, the same command goes on from the last checkpoint.")
        if not distributed.has_others():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            distributed.end(
                f"main.py: the processes' common work broke off ({str(error).splitlines()[0][:300]}); if one of them "
                "is gone, the same command goes on from the last checkpoint."
            )
        traceback.print_exc()  # a bug; the others must not wait for this process until it is dead
        distributed.end("main.py: ended by the error above; the same command goes on from the last checkpoint.")


if __name__ == "__main__":
    run()
