"""Trains a model: python main.py --config=NAME[:VARIANT] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...].

NAME is one of configs/, or a file of your own. --help-config lists the fields.

Started again, the same command resumes a run that was interrupted, or prints the summary of a finished one. --extend
trains a finished run further, to a larger --config.train.epochs.
Ctrl-C (as SIGTERM) has the run save after the step and end; a second Ctrl-C ends it at once.
--check checks the configuration, and does nothing else.
--evaluate=RUN (or RUN/checkpoints/STEP) evaluates both forms on the split that the run's summary tells of, or on the
data that --config.dataset.name, .eval_split and other fields of dataset name, and trains nothing. It prints what it
finds and writes RUN/evaluation/, or WORKDIR/evaluation/ where --workdir is given.

On a TPU pod it is started on every host, which find each other; elsewhere --coordinator=HOST:PORT, --num_processes and
--process_id say where they are. scripts/launch.py starts several processes on one machine.

Its status is 0 where it is finished or has saved because it was told to end, 3 where the same command would only come
to the same end again (a loss that is not finite), 130 where Ctrl-C ended it, and 1 after any other mistake.
"""

import errno
import logging as stdlib_logging
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.errors import DeterministicError, InputError, Mistakes, check_known, refusing_os_errors
from castling_jax.storage import as_path, reach_bucket
from castling_jax.suggestions import suggest
from castling_jax.tools.memory import keep_freed_memory
from castling_jax.training import distributed
from castling_jax.training.checkpoints import next_start
from castling_jax.training.config import FIELDS, check_config
from castling_jax.training.config_files import find_config, load_config
from castling_jax.training.config_help import describe_fields
from castling_jax.training.evaluate_run import evaluate_checkpoint, run_of
from castling_jax.training.preemption import Preempted
from castling_jax.training.run import run
from castling_jax.training.summary import SUMMARY_FILE

DEFAULT_CONFIG = "digits"
SAME_AGAIN = 3  # the status after a DeterministicError, by which scripts/pod/resume.sh knows not to start the run again
INTERRUPTED = 128 + signal.SIGINT  # as shells have it


def define_flags(argv: list[str]) -> list[str]:
    """Defines the flags, those of the configuration's fields among them.

    Returns:
      The arguments without the configuration's name, which are absl's to parse.

    Raises:
      InputError: there is no such configuration, or fields are unknown.
    """
    name, arguments, words = DEFAULT_CONFIG, [], iter(argv)
    mistakes = Mistakes()
    for word in words:
        if found := re.fullmatch(r"--?config(?:=(.*))?", word):
            name = next(words, "") if found[1] is None else found[1]
            continue
        arguments.append(word)
        if field := re.match(r"--?(?:no)?config\.([^=]+)", word):
            with mistakes:
                check_known("config field", field[1], FIELDS)
    with mistakes:
        config = load_config(name)
    mistakes.report()
    file, variant = find_config(name)
    workdir = Path("runs") / "-".join([file.stem, *filter(None, variant.split(","))])
    about = "NAME or FILE.py, and :ARGUMENT; --help-config lists its fields."
    config_flags.DEFINE_config_dict("config", config, about, sys_argv=arguments)
    flags.DEFINE_boolean("help-config", False, "Print the configuration's fields, values and meanings, and no more.")
    flags.DEFINE_boolean("check", False, "Check the configuration's values, and do no more: no data is looked at.")
    flags.DEFINE_boolean("extend", False, "Go on with a finished run to a larger config.train.epochs.")
    flags.DEFINE_string("workdir", str(workdir), "Where the run is kept, gs:// too.")
    flags.DEFINE_string("evaluate", None, "A run's folder, or one of its checkpoints/STEP, to evaluate and no more.")
    flags.DEFINE_string("profile", None, "FIRST:LAST, the steps to trace for XProf, into the workdir's profile/.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several that are not on a TPU pod.")
    flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    return arguments


def parse_flags(argv: list[str]) -> list[str]:
    """What absl makes of the command line.

    Raises:
      InputError: an unknown flag, or values that a flag or a field does not take; names all of the fields.
    """
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        nearest = suggest(error.flagname, [*flags.FLAGS, *(f"config.{field}" for field in FIELDS)])
        hint = f": did you mean --{nearest}?" if nearest else "; --help lists the flags."
        raise InputError(f"unknown flag --{error.flagname}{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        mistakes = Mistakes()
        for word in argv[1:]:  # absl stops at the first
            if word.startswith("--config."):
                with mistakes:
                    parse_override(word)
        with mistakes:
            check_config(flags.FLAGS["config"].value)
        mistakes.report()
        raise InputError(str(error).strip()) from error


def parse_override(word: str) -> None:
    """Parses one --config.GROUP.FIELD=VALUE; raises an InputError where it is of another type."""
    try:
        flags.FLAGS(["main.py", word])
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


def evaluation_changes() -> dict[str, Any]:
    """The fields given beside --evaluate, but for mesh's.

    Raises:
      InputError: there is a flag that has no effect with --evaluate.
    """
    options = flags.FLAGS
    unused = [f"--{name}" for name in ("profile", "extend") if options[name].present]
    unused += ["--config"] if any(re.fullmatch(r"--?config(=.*)?", word) for word in sys.argv[1:]) else []
    if unused:
        raise InputError(f"--evaluate takes the run's own configuration: leave out {' and '.join(unused)}.")
    given = config_flags.get_override_values(options["config"])
    return {name: value for name, value in given.items() if not name.startswith("mesh.")}


def ignore_closed_loops(raised: Any) -> None:
    """Python's hook for what nobody can catch, without what TensorStore's threads say a hundred times of a bad file."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def end_at_the_second_interrupt() -> None:
    """Has a second Ctrl-C end this process wherever it is, and a first one heard where it was inherited as ignored.

    Python's handlers run in the main thread alone, once a compilation or another process has been waited for. Python
    writes each signal's number to a pipe at once, though.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def listen() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(heard, 1)[0] == signal.SIGINT
        os.write(2, b"main.py: interrupted twice, so it ended at once.\n")
        distributed.end_at_once(INTERRUPTED)

    threading.Thread(target=listen, daemon=True).start()


def run_folder() -> epath.Path | None:
    """The folder that the flags say, or None where they are not known yet or name no run."""
    options = flags.FLAGS
    if "workdir" not in options or not options.is_parsed() or options.evaluate is not None:
        return None
    return as_path(options.workdir, "--workdir")


def outlook() -> str:
    """What the same command does next, for the end of a sentence."""
    try:
        folder = run_folder()
        return "nothing was written" if folder is None else next_start(folder / CHECKPOINTS)
    except Exception:  # the bucket may be what is out of reach, and its libraries raise many kinds
        return "the same command goes on from the last checkpoint, if there is one"


@refusing_os_errors()
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
    if options["help-config"].value:
        print(describe_fields(options.config))
        return
    profile = profiled_steps(options.profile)
    if options.check:
        check_config(options.config)
        print("The configuration is valid.")
        return
    distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    is_writer = jax.process_index() == 0
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if options.evaluate is not None:
        evaluation = evaluate_checkpoint(options.evaluate, options.config.mesh, evaluation_changes())
        if is_writer:
            print(evaluation, end="", flush=True)
            files = evaluation.write(options.workdir if options["workdir"].present else run_of(options.evaluate))
            print("".join(f"  {file}\n" for file in files), end="")
        return
    workdir = run_folder()
    assert workdir is not None
    reach_bucket(workdir, for_a_run=True)
    distributed.use_compilation_cache(workdir / "compiled")
    was_finished = (workdir / SUMMARY_FILE).exists() and not options.extend
    summary = run(options.config, workdir, profile=profile, extend=options.extend)
    if is_writer:
        print(summary)
        if was_finished:
            print(
                f"This run is finished. A larger --config.train.epochs with --extend goes on with it; to start anew, "
                f"remove '{workdir}' or give another --workdir."
            )


def start() -> None:
    """main() with mistakes said in one sentence, and a non-zero status."""
    try:
        app.run(main, define_flags(sys.argv), flags_parser=parse_flags)
    except DeterministicError as error:
        distributed.end(f"main.py: {error}", status=SAME_AGAIN)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            distributed.end(f"main.py: {str(error).rstrip('.')}; make room: {outlook()}.")
        distributed.end(f"main.py: {error}")
    except Preempted as preempted:
        if jax.process_index() == 0:
            print(f"Preempted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        distributed.end(f"main.py: interrupted; {outlook()}.", status=INTERRUPTED)
    except Exception as error:
        if not distributed.has_others():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            distributed.end(
                f"main.py: the processes' common work broke off ({str(error).splitlines()[0][:300]}), "
                f"perhaps because one of them is gone; {outlook()}."
            )
        traceback.print_exc()  # a bug; the others must not wait for this process until it is dead
        distributed.end(f"main.py: ended by the error above; {outlook()}.")


if __name__ == "__main__":
    end_at_the_second_interrupt()
    start()
