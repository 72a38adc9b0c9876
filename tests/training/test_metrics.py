import json

import pytest

from castling_jax.convert.run_folder import read_metrics
from castling_jax.training.metrics import MetricsWriter, check_callbacks


def write(workdir, first_step, steps, callbacks=()):
    writer = MetricsWriter(workdir, first_step=first_step, callbacks=callbacks)
    for step in steps:
        writer.write(step, {"loss": step / 2, "mask_density": [0.1, 0.2]})
    writer.close()


def test_lines_are_objects_with_a_step(tmp_path):
    write(tmp_path, 0, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 2, "mask_density": [0.1, 0.2]} for step in (1, 2)]


def test_going_on_removes_what_lies_ahead(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3, 4])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_line_cut_short_is_left_out(tmp_path, caplog):
    write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert not caplog.messages  # as a kill leaves it
    assert read_metrics(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"\xff\xfe",
        b"{",
        b"",
        b"null",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b'{"step": 2, "loss": {}}',
        b"[" * 9999,
    ],
)
def test_damaged_lines_are_skipped_and_counted(tmp_path, caplog, line):
    write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line, b"\n", lines[2]]))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    assert caplog.messages == [f"1 of the 3 lines of '{path}' are damaged, and were skipped."]
    write(tmp_path, 3, [4])  # and the run goes on
    caplog.clear()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]
    assert not caplog.messages


def test_callbacks_get_what_a_line_gets(tmp_path):
    calls = []

    def change(step, figures):
        calls.append(("first", step, dict(figures)))
        figures.clear()

    write(tmp_path, 0, [1, 2], [change, lambda step, figures: calls.append(("second", step, figures))])
    lines = [(line.pop("step"), line) for line in read_metrics(tmp_path)]
    assert calls == [(name, *line) for line in lines for name in ("first", "second")]


@pytest.mark.parametrize("callbacks", [None, print, [print, 3], "print", {print}])
def test_what_cannot_be_called_is_refused(refuses, callbacks):
    with refuses("callbacks must be a list of functions of (step, figures), not", repr(callbacks)):
        check_callbacks(callbacks)
