"""Every notebook is as it was written, and runs from its first cell to its last at the reduced size."""

import base64
import importlib.metadata
import os
import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# By the notebook's number; the first draws one while it trains.
PICTURES = {1: 4, 2: 5, 3: 0, 4: 2, 5: 0, 6: 3, 7: 2, 8: 2}
PNG = b"\x89PNG\r\n"
TIMEOUT = 600  # seconds a cell, of which none takes more than some tens


def named(path):
    return path.stem


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


INSTALLING = code_of(NOTEBOOKS[0])[0]


def test_there_are_eight_and_each_has_a_row_of_the_table():
    text = (ROOT / "notebooks" / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS] == re.findall(r"\(([^)]+\.ipynb)\)", text)
    assert len(NOTEBOOKS) == len(PICTURES) == 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_as_it_was_written(path):
    notebook, text = read(path), path.read_text()
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
    assert not re.search(r"(/home|/root|/work|/tmp|/content|/Users)/|[A-Z]:\\\\", text)
    first, second, *others = code_of(path)
    assert first == INSTALLING
    assert "CASTLING_NOTEBOOK_SMOKE" in second
    assert text.count("CASTLING_NOTEBOOK_SMOKE") == 1
    assert any("SMOKE" in cell for cell in others)
    assert "github.com/YOU/castling_jax" in first
    assert not any("github.com" in cell for cell in others)


def installed(tmp_path, monkeypatch, account="me", **versions):
    """Runs the first cell on a runtime with these packages and without this one; returns what pip is called with."""
    called = []
    source = re.sub(r"%pip (.*)", r"pip(f'\1')", INSTALLING.replace("/YOU/", f"/{account}/", 1))
    assert source != INSTALLING
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    packages = [type("Found", (), {"name": name, "version": version}) for name, version in versions.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
    exec(compile(source, "first cell", "exec"), {"pip": called.append})
    return called


def test_the_first_cell_keeps_the_runtimes_jax(tmp_path, monkeypatch):
    (called,) = installed(tmp_path, monkeypatch, jax="0.10.0", jaxlib="0.10.0", numpy="2.1")
    assert called == "install --quiet git+https://github.com/me/castling_jax --constraint jax-as-it-is.txt"
    assert (tmp_path / "jax-as-it-is.txt").read_text() == "jax==0.10.0\njaxlib==0.10.0\n"


def test_the_first_cell_asks_for_an_address(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^Set REPOSITORY, above"):
        installed(tmp_path, monkeypatch, account="YOU", jax="0.10.0")


def test_the_first_cell_installs_jax_where_there_is_none(tmp_path, monkeypatch):
    assert len(installed(tmp_path, monkeypatch, numpy="2.1")) == 1
    assert (tmp_path / "jax-as-it-is.txt").read_text() == ""


@pytest.mark.parametrize("version", ["0.7.2", "0.9.2", "0.13.0", "1.0"])
def test_the_first_cell_says_that_the_runtimes_jax_does_not_fit(tmp_path, monkeypatch, version):
    with pytest.raises(SystemExit, match=f"^This runtime has JAX {version}, but castling_jax needs 0.10.0 to 0.12"):
        installed(tmp_path, monkeypatch, jax=version)


def test_the_first_cell_has_the_versions_of_the_requirements():
    (low, high), *_ = re.findall(r"^jax>=([\d.]+),<([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    wanted = (tuple(map(int, text.split("."))) for text in (low, high))
    assert "LOWEST, BELOW = {}, {}".format(*wanted) in INSTALLING


@pytest.mark.parametrize("start", [".", "notebooks", ".."])
def test_the_first_cell_uses_a_checkout_as_it_is(tmp_path, monkeypatch, start):
    checkout = tmp_path / "castling_jax"
    (checkout / "castling_jax" / "ops").mkdir(parents=True)
    (checkout / "notebooks").mkdir()
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setenv("PYTHONPATH", "")
    assert not installed((checkout / start).resolve(), monkeypatch, jax="0.1")
    assert os.environ["PYTHONPATH"] == str(checkout)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_runs_at_its_reduced_size(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CASTLING_NOTEBOOK_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    start = time.monotonic()
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    print(f"{path.stem}: {time.monotonic() - start:.0f} s")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)
    assert len(pictures) == PICTURES[int(path.stem[:2])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"\bnan\b", printed)
