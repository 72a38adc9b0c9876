"""Starts a run as several processes on this machine, as if each were a host of a pod.

    python scripts/launch.py --simulate=2 [--devices=2] [main.py's flags ...]

Process 0 prints as main.py does. If a process ends with an error or is killed, the launcher ends the others. It passes
SIGTERM and the first Ctrl-C on to all, and then the run saves and ends; a second Ctrl-C ends all at once. The same
command goes on from the last checkpoint, with the same number of processes or another one.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

MAIN = Path(__file__).resolve().parent.parent / "main.py"
POLL_SECONDS = 0.2
GRACE_SECONDS = 10  # when one process has ended, the others get this time to end by themselves and say why
SAME_AGAIN = 3  # main.py's status where the same command would only fail in the same way


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and main.py's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument("--devices", type=int, default=1, help="devices of each process (default: %(default)s)")
    options, flags = parser.parse_known_args()
    for name in ("simulate", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options, flags


def start(options: argparse.Namespace, flags: list[str]) -> list[subprocess.Popen]:
    """Starts the processes, which find each other at a free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.strip()}
    return [
        subprocess.Popen(
            [
                *(sys.executable, str(MAIN), f"--coordinator=localhost:{port}"),
                *(f"--num_processes={options.simulate}", f"--process_id={index}", *flags),
            ],
            env=environment,
        )
        for index in range(options.simulate)
    ]


def describe(status: int) -> str:
    """How a process ended, in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def watch(processes: list[subprocess.Popen]) -> int:
    """Waits for all processes, and ends the others when one fails; returns the launcher's status."""
    while True:
        statuses = [process.poll() for process in processes]
        # A killed process comes first: the others may have failed because of it since the last look.
        failed = min(
            (index for index, status in enumerate(statuses) if status),
            key=lambda index: statuses[index] > 0,
            default=None,
        )
        if failed is not None or None not in statuses:
            break
        time.sleep(POLL_SECONDS)
    if failed is None:
        return 0
    ending = f"process {failed} of {len(processes)} {describe(statuses[failed])}"
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    end(processes)
    if any(process.returncode == SAME_AGAIN for process in processes):  # the process has said why
        return SAME_AGAIN
    print(
        f"launch.py: {ending}, so the run was ended; "
        "the same command goes on from the last checkpoint, if there is one.",
        file=sys.stderr,
    )
    return 1


def end(processes: list[subprocess.Popen]) -> None:
    """Kills the processes that still run."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def main() -> None:
    options, flags = parse_arguments()
    # The processes inherit this: Ctrl-C must not reach them before main.py can end in a sentence.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes = start(options, flags)

    def pass_on(*_: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, interrupt_again)
        pass_on()

    def interrupt_again(*_: object) -> None:
        end(processes)
        print("launch.py: interrupted twice, so the run was ended at once.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, interrupt)
    sys.exit(watch(processes))


if __name__ == "__main__":
    main()
