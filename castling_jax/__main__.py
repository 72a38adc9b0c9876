"""The commands: python -m castling_jax COMMAND, or castling-jax COMMAND where the package is installed."""

import ast
import importlib
import sys
from pathlib import Path

from castling_jax.errors import InputError, check_known
from castling_jax.tables import aligned
from castling_jax.tools.cli import ending_in_a_sentence, program

# Command -> its module in castling_jax.tools, in the order of a day's work.
COMMANDS = {
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "features": "features",
    "probe": "probe",
    "prepare": "prepare",
    "compare": "compare",
    "summary": "summary",
    "plots": "plots",
    "convert": "convert",
    "fetch": "fetch",
    "describe": "describe",
    "report": "tpu_report",
    "benchmark": "benchmark",
    "feeding": "feeding",
    "loader_memory": "loader_memory",
    "faults": "faults",
    "doctor": "doctor",
}


def list_commands() -> str:
    """A line for each command: its name and the first line of its module's docstring."""
    tools = Path(__file__).parent / "tools"
    # Parsed, not imported: eighteen imports, JAX among them, would make --help take seconds.
    docs = {name: ast.get_docstring(ast.parse((tools / f"{file}.py").read_bytes())) for name, file in COMMANDS.items()}
    lines = aligned([(name, (doc or "").splitlines()[0]) for name, doc in docs.items()], "l")
    return "\n".join([f"usage: {program()} COMMAND [...]", "", *lines, "", "COMMAND --help says what a command takes."])


@ending_in_a_sentence()
def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(list_commands())
        return
    if name.startswith("-"):
        raise InputError(f"give a command before {name}: one of {', '.join(COMMANDS)}.")
    check_known("command", name, COMMANDS)
    # The command's own parser reads sys.argv, and shows its first entry as the program's name.
    sys.argv = [f"{program()} {name}", *words]
    importlib.import_module(f"castling_jax.tools.{COMMANDS[name]}").main()


if __name__ == "__main__":
    main()
