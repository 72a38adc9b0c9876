"""Trains a model: python main.py --config=configs/digits.py [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...].

Started again, the same command goes on where an interrupted run stopped; of a finished run it prints the summary.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from castling_jax.ops.errors import InputError, check_known
from castling_jax.tools import summary
from castling_jax.training.config import check_config, check_same_run, field_names
from castling_jax.training.loop import CONFIG_FILE, train

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"


def define_flags(argv: list[str]) -> None:
    """Defines the flags. ml_collections reads the overrides among them right then, so they are checked first.

    Raises:
      InputError: an override of an unknown field.
    """
    for argument in argv[1:]:
        if field := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            check_known("config field", field[1], field_names())
    config_flags.DEFINE_config_file("config", str(DEFAULT_CONFIG), "The configuration file.")
    flags.DEFINE_string("workdir", None, "Where the run is kept; by default runs/ and the configuration's name.")


def parse_flags(argv: list[str]) -> list[str]:
    """What absl makes of the command line.

    Raises:
      InputError: an unknown flag, or a value of another type.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error).strip()) from error


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at INFO, Orbax tells of every file it writes
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}; flags are --config, --workdir and --config.GROUP.FIELD.")
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not config_file.is_file():
        raise InputError(f"there is no configuration file '{config_file}'.")
    config = flags.FLAGS.config
    workdir = Path(flags.FLAGS.workdir or Path("runs") / config_file.stem)
    check_config(config)
    finished = summary.read_summary(workdir)
    if finished is not None:
        check_same_run(config, workdir / CONFIG_FILE)
        print(summary.describe(finished))
        print(f"This run is finished. To start anew, remove '{workdir}' or give another --workdir.")
        return
    print(summary.describe(summary.finish(workdir, train(config, workdir))))


def run() -> None:
    """main() with mistakes said in one sentence, and a non-zero status."""
    try:
        define_flags(sys.argv)
        app.run(main, flags_parser=parse_flags)
    except InputError as error:
        sys.exit(f"main.py: {error}")
    except KeyboardInterrupt:
        sys.exit("main.py: interrupted; the same command goes on from the last checkpoint.")


if __name__ == "__main__":
    run()
