import dataclasses
import json
import random
import resource
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from castling_jax.convert.checksums import checksums
from castling_jax.errors import InputError
from castling_jax.training import checkpoints
from castling_jax.training.checkpoints import Checkpoints, Progress
from castling_jax.training.state import create_state
from tests.models.meshes import run_on_devices


def state_at(step):
    params = {
        "a": {"kernel": jnp.arange(3000, dtype=jnp.float32).reshape(30, 100) + step},
        "b": jnp.ones(5, jnp.bfloat16),
    }
    state = create_state({"params": params}, optax.adamw(1e-3), seed=7)
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def write(folder, steps, keep=5, figures=None):
    checkpoints = Checkpoints(epath.Path(folder), keep=keep)
    for step in steps:
        checkpoints.save(state_at(step), Progress(1.5 * step, figures and {"accuracy_inference_form": figures[step]}))
    checkpoints.close()


def restore(folder):
    checkpoints = Checkpoints(epath.Path(folder), keep=5)
    restored = checkpoints.restore(state_at(0))
    checkpoints.close()
    return restored


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def as_an_earlier_version_wrote_it(folder):
    """Makes checkpoints like those that had no manifest, and beside the state no more than this."""
    for step in folder.iterdir():
        (step / "SHA256SUMS").unlink()
        about = step / "about" / "metadata"
        written = json.loads(about.read_text())
        about.write_text(json.dumps({name: written[name] for name in ("train_seconds", "checksums")}))


def damage(folder, how):
    path = largest_file(folder / "state")
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def test_whole_state_comes_back(tmp_path):
    write(tmp_path / "c", [3, 6])
    state, progress = restore(tmp_path / "c")
    expected = state_at(6)
    chex.assert_trees_all_equal(state.params, expected.params)
    chex.assert_trees_all_equal(state.opt_state, expected.opt_state)
    assert int(state.step) == 6
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(expected.key))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert progress == Progress(9.0)


def test_what_is_saved_beside_the_state_comes_back(tmp_path):
    data = {"classes": ["a", "b"], "training": {"images": 3}}
    checkpoints = Checkpoints(epath.Path(tmp_path / "c"), keep=5, data=data)
    assert checkpoints.saved_data() is None
    checkpoints.save(state_at(3), Progress(1.5, mask_threshold=0.25))
    checkpoints.close()
    checkpoints = Checkpoints(epath.Path(tmp_path / "c"), keep=5)
    assert checkpoints.saved_data() == data
    assert checkpoints.restore(state_at(0))[1] == Progress(1.5, mask_threshold=0.25)
    checkpoints.close()


def test_an_earlier_versions_checkpoints_are_restored(tmp_path):
    write(tmp_path / "c", [3, 6])
    as_an_earlier_version_wrote_it(tmp_path / "c")
    assert Checkpoints(epath.Path(tmp_path / "c"), keep=5).saved_data() is None
    state, progress = restore(tmp_path / "c")
    chex.assert_trees_all_equal(state.params, state_at(6).params)
    assert progress == Progress(9.0)


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "c") is None


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path / "c", [1, 2, 3, 4], keep=2)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [3, 4]


def test_the_best_stays_with_the_newest(tmp_path):
    figures = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.8, 5: 0.6}
    write(tmp_path / "c", figures, keep=2, figures=figures)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [2, 4, 5]
    checkpoints = Checkpoints(epath.Path(tmp_path / "c"), keep=2)
    assert checkpoints.best() == 0.9
    checkpoints.save(state_at(6), Progress(1.0))  # and what was not evaluated is not the best
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [2, 5, 6]


def test_without_an_evaluation_none_is_the_best(tmp_path):
    write(tmp_path / "c", [1])
    assert Checkpoints(epath.Path(tmp_path / "c"), keep=2).best() < 0


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, how):
    folder = tmp_path / "c"
    write(folder, [3, 6])
    damage(folder / "6", how)
    state, progress = restore(folder)
    assert (int(state.step), progress.train_seconds) == (3, 4.5)
    chex.assert_trees_all_equal(state.params, state_at(3).params)
    assert "6' is damaged (" in caplog.text
    assert (tmp_path / "c_damaged" / "6").is_dir()  # nothing is lost
    write(folder, [6])  # and its step can be written again
    assert int(restore(folder)[0].step) == 6


@pytest.mark.parametrize("earlier", [False, True])
def test_array_metadata_that_is_damaged(tmp_path, caplog, earlier):
    # Only what lays arrays out on devices reads it, when a checkpoint without a manifest has been judged already.
    folder = tmp_path / "c"
    write(folder, [1, 3, 6], figures={1: 0.5, 3: 0.6, 6: 0.9})
    if earlier:
        as_an_earlier_version_wrote_it(folder)
    for step in (3, 6):
        (folder / str(step) / "state" / "array_metadatas" / "process_0").write_text('{"array_metadatas": [')
    checkpoints = Checkpoints(epath.Path(folder), keep=5)
    state, progress = checkpoints.restore(state_at(0))
    assert (int(state.step), progress.train_seconds, checkpoints.best()) == (1, 1.5, 0.5)
    checkpoints.save(state_at(6), Progress(1.0))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "6"]
    assert sorted(path.name for path in (tmp_path / "c_damaged").iterdir()) == ["3", "3.txt", "6", "6.txt"]
    assert f"6' {'cannot be restored' if earlier else 'is damaged'} (" in caplog.text


def test_without_its_manifest_it_is_damaged(tmp_path, caplog):
    write(tmp_path / "c", [3, 6])
    (tmp_path / "c" / "6" / "SHA256SUMS").unlink()
    assert int(restore(tmp_path / "c")[0].step) == 3
    assert "6' is damaged (its SHA256SUMS is missing)" in caplog.text


@pytest.mark.parametrize("earlier", [False, True])
def test_another_runs_checkpoints_are_refused_and_stay(tmp_path, refuses, earlier):
    folder = tmp_path / "c"
    write(folder, [3, 6])
    if earlier:
        as_an_earlier_version_wrote_it(folder)
    wider = dataclasses.replace(state_at(0), params={"a": {"kernel": jnp.zeros((30, 101))}, "b": jnp.ones(5)})
    checkpoints = Checkpoints(epath.Path(folder), keep=5)
    with refuses("6' cannot be restored (", "), nor one before it: remove it"):
        checkpoints.restore(wider)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_whatever_is_damaged_the_last_good_step_is_restored_to_the_bit(tmp_path, earlier):
    whole, folder, draw = tmp_path / "whole", tmp_path / "run" / "c", random.Random(earlier)
    write(whole, [3, 6], figures={3: 0.5, 6: 0.25})
    if earlier:
        as_an_earlier_version_wrote_it(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for _ in range(80):
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(whole, folder)
        path, how = folder / draw.choice(files), draw.choice(["flipped", "flipped", "cut", "missing"])
        data = bytearray(path.read_bytes())
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:place] if how == "cut" else data)
        checkpoints = Checkpoints(epath.Path(folder), keep=5)
        state, progress = checkpoints.restore(state_at(0))
        step = int(state.step)
        said = f"{path.relative_to(folder)} {how} at {place}"
        chex.assert_trees_all_equal(
            *(dataclasses.replace(each, key=jax.random.key_data(each.key)) for each in (state, state_at(step))),
            custom_message=said,
        )
        damaged = {int(path.name) for path in (folder.parent / "c_damaged").glob("?")}
        assert (step, progress.train_seconds) == (3 if 6 in damaged else 6, 1.5 * step), said
        assert damaged <= {int(path.relative_to(folder).parts[0])}, said
        # An earlier version's figures have no checksum: a flipped bit can make other figures of them.
        assert earlier or checkpoints.best() == (0.25 if 3 in damaged else 0.5), said
        checkpoints.save(state_at(9), Progress(1.0))  # and the run goes on
        checkpoints.close()


def test_what_another_process_could_not_read_is_left_by_all(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "checkpoints"
    write(folder, [3, 6])
    answers = [np.array([True, False]), np.array([True, True])]
    checked = []
    real = checkpoints.multihost_utils
    two = types.SimpleNamespace(
        process_allgather=lambda _: answers.pop(0),
        broadcast_one_to_all=real.broadcast_one_to_all,
        sync_global_devices=real.sync_global_devices,
    )
    monkeypatch.setattr(checkpoints, "multihost_utils", two)
    monkeypatch.setattr(checkpoints, "verify_checksums", lambda *_: checked.append(len(answers)))
    state, _ = restore(folder)
    assert int(state.step) == 3
    assert checked == [0]  # not those of step 6: their sums need all processes
    assert "6' cannot be restored (another process could not read it)" in caplog.text


def test_nothing_whole_is_one_sentence(tmp_path):
    folder = tmp_path / "c"
    write(folder, [3, 6])
    for step in (3, 6):
        damage(folder / str(step), "truncated")
    with pytest.raises(InputError, match="none of the 2 checkpoints in .* is whole"):
        restore(folder)


def test_where_nothing_is_whole_all_stays_and_is_refused_again(tmp_path):
    folder = tmp_path / "c"
    write(folder, [3, 6])
    for step in (3, 6):
        damage(folder / str(step), "truncated")
    for _ in range(2):  # a script that starts again must not start from nothing
        with pytest.raises(InputError, match="none of the 2 checkpoints in .* is whole"):
            restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


@pytest.mark.parametrize("step", [3, 6])
def test_figures_that_are_damaged(tmp_path, step):
    folder = tmp_path / "c"
    write(folder, [3, 6])
    file = folder / str(step) / "metrics" / "metrics"
    file.write_text(file.read_text()[:3])
    state, _ = restore(folder)
    assert int(state.step) == 9 - step
    assert (tmp_path / "c_damaged" / str(step)).is_dir()


def test_a_checkpoint_that_was_being_deleted_does_not_stay(tmp_path):
    folder = tmp_path / "c"
    write(folder, [1, 2, 3])
    shutil.rmtree(folder / "2" / "metrics")
    (folder / "2" / "_CHECKPOINT_METADATA").unlink()
    write(folder, [4, 5], keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "5"]


def test_leftovers_of_a_killed_save_are_ignored(tmp_path):
    folder = tmp_path / "c"
    write(folder, [3])
    (folder / "6.orbax-checkpoint-tmp").mkdir()
    assert int(restore(folder)[0].step) == 3


def test_saving_is_safe_while_the_state_is_donated(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "c"), keep=1)
    step = jax.jit(
        lambda state: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    state = dataclasses.replace(state_at(1), params={"w": jnp.zeros((2000, 2000))}, opt_state={})
    template = jax.tree.map(jnp.copy, state)
    checkpoints.save(state, Progress(0.0))
    for _ in range(20):
        state = step(state)
    checkpoints.close()
    checkpoints = Checkpoints(epath.Path(tmp_path / "c"), keep=1)
    restored, _ = checkpoints.restore(template)
    checkpoints.close()
    assert not np.any(restored.params["w"])


def test_what_cannot_be_written_is_one_sentence_and_the_rest_stays(tmp_path, refuses):
    folder = tmp_path / "c"
    write(folder, [3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk, but for the name of the error
    try:
        with refuses("could not be written to", "(File too large); those of steps 3 are whole, and the same command"):
            write(folder, [6])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state, _ = restore(folder)
    assert int(state.step) == 3
    write(folder, [6])
    assert int(restore(folder)[0].step) == 6


def test_checksum_sees_every_flipped_bit():
    array = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    original = checksums([jnp.asarray(array)])
    for place in (0, 17, 63):
        for bit in range(32):
            flipped = array.copy()
            flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert checksums([jnp.asarray(flipped)]) != original


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_checksum_in_numpy_is_that_of_the_devices(dtype):
    for shape in ((), (7,), (300, 5, 90)):  # the last has more than 2^16 places, whose upper half counts too
        array = np.random.default_rng(0).integers(0, 2**7, shape).astype(dtype)
        assert checksums([array]) == checksums([jnp.asarray(array)])


def test_checksum_of_a_random_key_and_of_64_bits():
    key = jax.random.key(3)
    assert checksums([key]) == checksums([jax.random.key_data(key)]) != checksums([jax.random.key(4)])
    assert checksums([np.arange(5.0)]) == checksums([jnp.arange(5.0)])  # JAX holds them in 32


@pytest.mark.slow
def test_checksum_does_not_depend_on_the_sharding():
    run_on_devices(8, "tests.training.checksum_shards")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_checksum_depends_on_order(dtype):
    array = jnp.array([0, 1, 1, 0, 0, 1]).astype(dtype)
    assert checksums([array]) != checksums([array[::-1]])
    assert checksums([array]) == checksums([jnp.array(array)])
