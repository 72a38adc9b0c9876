import subprocess

import pytest
from etils import epath

from castling_jax.convert.manifest import verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    for name in ("about/metadata", "metrics/metrics", "state/d/0123", "state/ocdbt.process_0/d/45", "state/_METADATA"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"what {name} says")
    write_manifest(epath.Path(tmp_path))
    return epath.Path(tmp_path)


def test_sha256sum_checks_it(folder):
    result = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["about/metadata: OK", "metrics/metrics: OK", "state/_METADATA: OK"]
    assert verify_manifest(folder)


def test_what_orbax_writes_later_and_the_arrays_are_left_out(folder):
    (folder / "commit_success.txt").write_text("now")
    (folder / "_CHECKPOINT_METADATA").write_text("now")
    (folder / "state" / "d" / "0123").write_text("another")
    assert verify_manifest(folder)


@pytest.mark.parametrize("damage", ["other", "missing", "more", "line"])
def test_what_is_not_as_it_was_written(folder, damage):
    path, said = folder / "state" / "_METADATA", "state/_METADATA"
    if damage == "other":
        path.write_text(path.read_text().swapcase())
    elif damage == "missing":
        path.unlink()
    elif damage == "more":
        (folder / "state" / "_sharding").write_text("{}")
        said = "state/_sharding"
    else:  # a manifest that is cut short does not pass for one of fewer files
        manifest = folder / "SHA256SUMS"
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=f"{said} is not as SHA256SUMS has it"):
        verify_manifest(folder)
    assert verify_manifest(folder, "metrics/")


def test_an_earlier_versions_checkpoint_has_none(folder):
    (folder / "SHA256SUMS").unlink()
    assert not verify_manifest(folder)
