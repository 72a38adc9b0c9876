"""The start of a process that trains or evaluates, and its end with a sentence and an exit status."""

import contextlib
import errno
import faulthandler
import logging as stdlib_logging
import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.errors import DeterministicError, InputError, refusing_os_errors
from castling_jax.storage import as_path, reach_bucket
from castling_jax.training import distributed
from castling_jax.training.checkpoints import next_start
from castling_jax.training.config_files import DEFAULT_CONFIG, find_config
from castling_jax.training.evaluate_run import evaluate_checkpoint, run_of
from castling_jax.training.overrides import load_overridden, parse_overrides
from castling_jax.training.preemption import Preempted
from castling_jax.training.run import run
from castling_jax.training.summary import SUMMARY_FILE

SAME_AGAIN = 3  # status after a DeterministicError; scripts/pod/resume.sh then does not start the run again
BROKEN_PIPE = 128 + signal.SIGPIPE  # the status that shells report
INTERRUPTED = 128 + signal.SIGINT  # the status that shells report


def train(options: Namespace, program: str, profile: range | None) -> None:
    """Trains with the options of a command line, prints the summary, and ends the process if it cannot go on.

    Args:
      options: config, fields, workdir and the flags of `start`; `castling_jax.tools.train` explains them.
      program: the command's name, for its sentences.
      profile: the steps to trace; None for none.
    """
    with ending_in_a_status(program) as place:
        name = options.config or DEFAULT_CONFIG
        config = load_overridden(name, options.fields)
        workdir = place.folder = as_path(options.workdir or default_workdir(name), "--workdir")
        # Only now: joining the other processes waits for them, and a mistake on the command line need not.
        start(options)
        reach_bucket(workdir, for_a_run=True)
        distributed.use_compilation_cache(workdir / "compiled")
        was_finished = (workdir / SUMMARY_FILE).exists() and not options.extend
        summary = run(config, workdir, profile=profile, extend=options.extend)
        if jax.process_index() == 0:
            print(summary)
            if was_finished:
                print(
                    "This run is finished. A larger --config.train.epochs with --extend trains it further; to start "
                    f"anew, remove '{workdir}' or give another --workdir."
                )


def evaluate(options: Namespace, program: str) -> None:
    """Evaluates the run or checkpoint `options.evaluate`; prints the figures and writes them to files."""
    with ending_in_a_status(program):
        unused = [f"--{flag}" for flag in ("profile", "config", "extend") if getattr(options, flag, None)]
        if unused:
            raise InputError(f"an evaluation takes the run's own configuration: leave out {' and '.join(unused)}.")
        config, changes = parse_overrides(DEFAULT_CONFIG, options.fields)
        start(options)
        changes = {name: value for name, value in changes.items() if not name.startswith("mesh.")}
        evaluation = evaluate_checkpoint(options.evaluate, config.mesh, changes)
        if jax.process_index() == 0:
            # Written before they are printed: a reader that leaves, such as `head`, ends the process.
            files = evaluation.write(options.workdir or run_of(options.evaluate))
            print(evaluation, end="")
            print("".join(f"  {file}\n" for file in files), end="")


def default_workdir(name: str) -> epath.Path:
    """runs/NAME-VARIANT, with the configuration's name and variant: runs/deit-tiny-softmax."""
    file, variant = find_config(name)
    return epath.Path("runs") / "-".join([file.stem, *filter(None, variant.split(","))])


def start(options: Namespace) -> None:
    """Joins the other processes, and keeps the libraries quiet unless `options.verbose`."""
    if not options.verbose:
        # Orbax logs every file that it writes, and also logs the errors that it raises.
        logging.set_verbosity(logging.FATAL)
        stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
        sys.unraisablehook = ignore_closed_loops
        stdlib_logging.getLogger("castling_jax").setLevel(stdlib_logging.WARNING)  # users should see our own warnings
    distributed.initialize(options.coordinator, options.num_processes, options.process_id)


def ignore_closed_loops(raised: Any) -> None:
    """Python's hook for exceptions that nobody can catch, without the hundred that TensorStore raises at a bad file."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def handle_signals(program: str) -> None:
    """Makes a second Ctrl-C end this process wherever it is, and a first one count even if inherited as ignored.

    It also makes a crash print where it happened.

    Python's handlers run only in the main thread, and only after a compilation or a wait for another process. But
    Python writes each signal's number to a pipe at once, and a thread reads it there.
    """
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # set_wakeup_fd demands it: a signal handler must never block
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def listen() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(read_end, 1)[0] == signal.SIGINT
        os.write(2, f"{program}: interrupted twice, so it ended at once.\n".encode())
        distributed.end_at_once(INTERRUPTED)

    threading.Thread(target=listen, daemon=True).start()


class Place:
    """The folder of a run; None until it is known, and for an evaluation."""

    folder: epath.Path | None = None

    def outlook(self) -> str:
        """What the same command would do next, for the end of a sentence."""
        try:
            return "nothing was written" if self.folder is None else next_start(self.folder / CHECKPOINTS)
        except Exception:  # the bucket may be out of reach, and its libraries raise many kinds
            return "the same command goes on from the last checkpoint, if there is one"


@contextlib.contextmanager
def ending_in_a_status(program: str) -> Iterator[Place]:
    """Ends this process with a sentence and a non-zero status if the block raises a mistake or is interrupted."""
    place = Place()
    try:
        with refusing_os_errors():
            yield place
            sys.stdout.flush()  # here, so that a broken pipe is handled below and not as Python exits
    except DeterministicError as error:
        distributed.end(f"{program}: {error}", status=SAME_AGAIN)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, BrokenPipeError):  # the reader has left, as in `main.py | head`, and needs no sentence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's flush at exit would fail again
            distributed.end_quietly(BROKEN_PIPE)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            distributed.end(f"{program}: {str(error).rstrip('.')}; make room: {place.outlook()}.")
        distributed.end(f"{program}: {error}")
    except Preempted as preempted:
        if jax.process_index() == 0:
            print(f"Preempted; the state of step {preempted.step} is saved, and the same command goes on from there.")
    except KeyboardInterrupt:
        distributed.end(f"{program}: interrupted; {place.outlook()}.", status=INTERRUPTED)
    except Exception as error:
        if not distributed.has_others():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            distributed.end(
                f"{program}: the processes' common work broke off ({str(error).splitlines()[0][:300]}), "
                f"perhaps because one of them is gone; {place.outlook()}."
            )
        traceback.print_exc()  # a bug. End at once, or the others would wait for this process
        distributed.end(f"{program}: ended by the error above; {place.outlook()}.")
