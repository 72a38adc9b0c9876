"""Files on disks: written whole or not at all. Buckets: training/test_bucket.py."""

import os
from pathlib import Path

import pytest

from castling_jax.storage import as_path, try_file, try_folder, write_atomically


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Paths


@pytest.mark.parametrize("path", [None, 3, b"runs", ["runs"], "", "a\0b", "http://a/b", "s3://a/b"])
def test_what_is_no_path(refuses, path):
    with refuses("a path must"):
        as_path(path)


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(as_path("~/runs")) == "/home/somebody/runs"
    assert str(as_path("~")) == "/home/somebody"
    assert str(as_path(Path("~/runs"))) == "/home/somebody/runs"
    for path in ("runs/~", "./~", "~nobody-here/runs", "gs://bucket/~"):
        assert str(as_path(path)) == path.removeprefix("./")


def everything_in(folder):
    return sorted(folder.rglob("*"))


def test_places_that_cannot_be_written_to_are_refused_and_none_is_left_half_made(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = everything_in(tmp_path)
    for check in (try_folder, lambda folder: try_file(folder / "file.txt")):
        with refuses(f"'{tmp_path / 'file'}' is a file, and a folder is needed there"):
            check(tmp_path / "file")
        with refuses(f"'{tmp_path / 'file' / 'a' / 'b'}' cannot be made: '{tmp_path / 'file'}' is a file"):
            check(tmp_path / "file" / "a" / "b")
        with refuses(f"'{tmp_path / 'link'}' is a link that leads nowhere"):
            check(tmp_path / "link")
        with refuses("'/proc/a/b' cannot be written to (No such file or directory): choose another"):
            check(Path("/proc/a/b"))
        with refuses("cannot be written to (File name too long)"):
            check(tmp_path / ("a" * 300))
        check(tmp_path / "new" / "deep")
    with refuses(f"'{tmp_path}' is a folder, but a file has to be written there"):
        try_file(tmp_path)
    assert everything_in(tmp_path) == before


def test_a_folder_of_somebody_elses(refuses, tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with refuses("cannot be written to (Permission denied)"):
        try_folder(tmp_path / "a")
