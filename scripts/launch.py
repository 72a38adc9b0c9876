"""Starts a run as several processes on this machine, as if each were a host of a pod.

    python scripts/launch.py --simulate=2 [--devices=2] [main.py's flags ...]

Process 0 prints as main.py does. If a process ends with an error, or is killed, the others are ended. SIGTERM and the
first Ctrl-C are passed on to all, and then the run saves and ends; a second Ctrl-C ends all at once. The same command
goes on from the last checkpoint, and so does one with another number of processes.
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
GRACE_SECONDS = 10  # for the others to end by themselves, saying why, when one has
SAME_AGAIN = 3  # main.py's status where the same command would only come to the same end again


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own flags, and main.py's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--devices", type=int, default=1, help="devices that each process sees (default: %(default)s)")
    options, flags = parser.parse_known_args()
    for name in ("simulate", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options, flags


def start(options: argparse.Namespace, flags: list[str]) -> list[subprocess.Popen]:
    """Starts the processes."""
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
    """What became of a process."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def watch(processes: list[subprocess.Popen]) -> int:
    """Waits for all; ends the others when one fails. Returns the status of the launcher."""
    while True:
        statuses = [process.poll() for process in processes]
        # One that was killed first: the others may have ended because of it, since they were last looked at.
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
    said = f"process {failed} of {len(processes)} {describe(statuses[failed])}"
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
    end(processes)
    if any(process.returncode == SAME_AGAIN for process in processes):  # which has said why
        return SAME_AGAIN
    print(
        f"launch.py: {said}, so the run was ended; the same command goes on from the last checkpoint, if there is one.",
        file=sys.stderr,
    )
    return 1


def end(processes: list[subprocess.Popen]) -> None:
    """Kills what still runs."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def main() -> None:
    options, flags = parse_arguments()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # in the processes too, until main.py has a sentence for it
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
