""".ci/newest_python, with Pythons that are only scripts: which of them CI's second leg runs on."""

import shutil
import subprocess
from pathlib import Path

import pytest

NEWEST_PYTHON = Path(__file__).parent.parent / ".ci" / "newest_python"
RUNS = "exit 0"
SHIM = "echo 'pyenv: python: command not found' >&2; exit 127"
NO_VENV = """case "$2" in "import ensurepip") exit 1;; esac"""  # Debian's python3.N without python3.N-venv


@pytest.mark.parametrize(
    "pythons, newest",
    [
        ({}, None),
        ({"bin/python3.11": RUNS}, None),  # not newer than the first leg's
        ({"bin/python3.12": RUNS, "bin/python3.13": RUNS}, "bin/python3.13"),
        ({"bin/python3.12": RUNS, "bin/python3.13": SHIM}, "bin/python3.12"),
        ({"bin/python3.12": RUNS, "bin/python3.13": NO_VENV}, "bin/python3.12"),
        ({"bin/python3.13": SHIM, "pyenv/versions/3.13.0/bin/python": RUNS}, "pyenv/versions/3.13.0/bin/python"),
        ({"bin/python3.13": RUNS, "pyenv/versions/3.14.1/bin/python": RUNS}, "pyenv/versions/3.14.1/bin/python"),
        ({"pyenv/versions/3.14.1/bin/python": SHIM, "pyenv/versions/3.9.18/bin/python": RUNS}, None),
        ({"pyenv/versions/3.14.1t/bin/python": RUNS}, None),  # free-threaded: few packages have wheels for it
    ],
)
def test_the_newest_python_that_runs(tmp_path, pythons, newest):
    for path, script in pythons.items():
        python = tmp_path / path
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        python.chmod(0o755)
    found = subprocess.run(
        [shutil.which("bash"), NEWEST_PYTHON, "11"],
        env={"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert found.returncode == (newest is None), found.stderr
    assert found.stdout == (f"{tmp_path / newest}\n" if newest else "")
