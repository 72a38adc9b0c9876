"""How a tool ends that cannot go on, and which folders it takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from castling_jax.errors import InputError
from castling_jax.storage import make_folder
from castling_jax.tools import compare, faults, plots
from castling_jax.tools.cli import any_path, ending_in_a_sentence, local_path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("'a' is wrong."), "tool: 'a' is wrong."),
        (IsADirectoryError(21, "Is a directory", "runs"), "tool: 'runs' cannot be read or written (Is a directory)."),
        (OSError(28, "No space left on device"), "tool: the system refuses to go on (No space left on device)."),
    ],
)
def test_a_mistake_and_the_systems_error_are_a_sentence(error, message):
    @ending_in_a_sentence("tool: ")
    def main():
        raise error

    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == message


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), ending_in_a_sentence():
        raise KeyError("a")


def test_a_reader_that_left_is_no_mistake():
    program = """
from castling_jax.tools.cli import ending_in_a_sentence
with ending_in_a_sentence():
    while True:
        print("line")
"""
    tool = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout.readline() == b"line\n"
    tool.stdout.close()
    assert (tool.stderr.read(), tool.wait()) == (b"", 0)


def test_paths_of_a_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/out") == Path("/home/somebody/out")
    assert str(any_path("~/out")) == "/home/somebody/out"
    assert str(any_path("gs://bucket/out")) == "gs://bucket/out"


def test_a_folder_is_made_and_tried(refuses, tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with refuses(f"'{tmp_path / 'file'}' cannot be made (File exists): choose another folder for --out."):
        make_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        (faults, ["--out={}"]),
        (compare, ["--config=digits", "--workdir={}/..", "--attentions=softmax"]),
        (plots, ["augment", "--config=fashion_mnist", "--out={}"]),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, tool, arguments):
    def unreached(*_, **__):
        raise AssertionError("the work began")

    for name in ("bench.faults.sweep", "training.comparison.run", "training.contact_sheet.draw_augmentations"):
        monkeypatch.setattr(f"castling_jax.{name}", unreached)
    place = tmp_path / "compare.md"
    place.mkdir()
    monkeypatch.setattr(sys, "argv", ["tool", *(argument.format(place) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert "compare.md' is a folder, but a file has to be written there." in str(ended.value.code)
