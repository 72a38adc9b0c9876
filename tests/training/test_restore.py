import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors.numpy import save_file

from castling_jax.convert import to_torch
from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import save_inference
from castling_jax.models.variables import get_variables
from castling_jax.training.checkpoints import Checkpoints, Progress, checkpoint_steps, checksums
from castling_jax.training.config import default_config
from castling_jax.training.restore import initial_variables, read_snapshot, read_teacher
from castling_jax.training.state import create_state
from tests.models import small

SIZES = {"embed_dim": (8, 12), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 4, "image_size": 32}


@pytest.fixture(scope="module")
def model():
    return small.small_levit(image_size=32, distilled=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """A run's folder with checkpoints of the steps 2 and 10, whose variables are of the seeds 2 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = default_config()
    config.model.update({"name": "levit_128s", "distilled": True, **SIZES})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"step": step, "mask_threshold": step / 40} for step in (1, 5, 10)] + [{"step": 10, "accuracy": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoints = Checkpoints(epath.Path(folder / "checkpoints"), keep=2, data={"classes": ["a", "b"]})
    for step in (2, 10):
        state = create_state(small.random_variables(model, seed=step), optax.adam(1e-3), 0)
        object.__setattr__(state, "step", jnp.int32(step))
        checkpoints.save(state, Progress(1.0, mask_threshold=step / 20))
    checkpoints.close()
    return folder


def without_manifest(step, **about):
    """Changes what a checkpoint holds beside the state, and makes it an earlier version's, without a manifest."""
    (step / "SHA256SUMS").unlink()
    path = step / "about" / "metadata"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({name: written[name] for name in ("train_seconds", "checksums")} | about))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_checkpoint_or_the_one_named_is_read_and_nothing_touched(run, model):
    before = contents(run)
    for path, step, threshold in [(run, 10, 0.5), (run / "checkpoints/10", 10, 0.5), (run / "checkpoints/2", 2, 0.1)]:
        snapshot = read_snapshot(path)
        assert (snapshot.step, snapshot.mask_threshold) == (step, threshold)
        assert snapshot.folder == run / "checkpoints" / str(step)
        assert snapshot.config.dataset.name == "digits"
        assert snapshot.classes == ["a", "b"]
        chex.assert_trees_all_equal(snapshot.variables, small.random_variables(model, seed=step))
        chex.assert_trees_all_equal_shapes(get_variables(snapshot.model), get_variables(model))
    assert contents(run) == before


def test_what_is_still_being_written_is_no_checkpoint(run, tmp_path):
    for name in ("3", "12", "20.orbax-checkpoint-tmp-7", "about"):
        (tmp_path / name).mkdir()
    assert checkpoint_steps(tmp_path) == [3, 12]
    assert checkpoint_steps(tmp_path / "nowhere") == []


@pytest.mark.parametrize("log", [b"", b'{"step": 9, "mask_threshold": 0.02}\n', b"[1]\n\xff\n"])
def test_the_log_does_not_matter(run, tmp_path, log):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.jsonl").write_bytes(log)
    assert read_snapshot(copy).mask_threshold == 0.5


def test_an_earlier_versions_threshold_is_the_logs_or_the_schedules_first(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    without_manifest(copy / "checkpoints" / "10")
    assert read_snapshot(copy).mask_threshold == 0.25
    assert read_snapshot(copy).classes is None
    assert "an earlier version's run" in caplog.text
    assert "that of step 10 is taken to be 0.25, as metrics.jsonl has it of step 10" in caplog.text
    (copy / "metrics.jsonl").unlink()
    assert read_snapshot(copy).mask_threshold == 0.02
    assert "where the schedule starts" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "missing", "about"])
def test_a_damaged_checkpoint_is_said_and_another_named(refuses, run, tmp_path, damage):
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / "checkpoints" / "10"
    largest = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[:-200])
    elif damage == "missing":
        largest.unlink()
    else:
        (step / "about" / "metadata").write_text("{")
    before = contents(copy)
    with refuses(str(step), "damaged", f"try '{copy / 'checkpoints' / '2'}'"):
        read_snapshot(copy)
    assert contents(copy) == before


def test_other_arrays_than_were_saved_are_noticed(refuses, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / "checkpoints" / "10"
    checksums = json.loads((step / "about" / "metadata").read_text())["checksums"]
    without_manifest(step, checksums=checksums | {"batch_stats/head/bn/mean": 1})
    with refuses("checkpoints/10", "checksum of batch_stats/head/bn/mean"):
        read_snapshot(copy)


def test_the_moving_average_is_read_where_there_is_one(refuses, run, tmp_path, model):
    with refuses("checkpoints/10", "no moving average"):
        read_snapshot(run, ema=True)
    variables, average = (small.random_variables(model, seed=seed) for seed in (3, 4))
    state = variables | {"ema": average}
    folder = tmp_path / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave({"checksums": checksums(state)})}
        manager.save(5, args=ocp.args.Composite(**items))
    shutil.copy(run / "config.json", tmp_path)
    for ema, expected in [(True, average), (False, variables), (None, variables)]:
        chex.assert_trees_all_equal(read_snapshot(folder / "5", ema=ema).variables, expected)
    config = json.loads((tmp_path / "config.json").read_text())
    config["train"]["ema_decay"] = 0.9
    (tmp_path / "config.json").write_text(json.dumps(config))
    chex.assert_trees_all_equal(read_snapshot(folder / "5").variables, average)
    _, teacher = read_teacher(epath.Path(folder / "5"), "levit_128s", model)
    chex.assert_trees_all_close(teacher, to_inference(average))


def test_what_is_no_run(refuses, run, tmp_path):
    for path in (tmp_path, run / "checkpoints", tmp_path / "nowhere", run / "config.json", epath.Path("/nowhere")):
        with refuses(str(path), "neither a run's folder"):
            read_snapshot(path)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"model": 3, "mask": {}}', '{"model": {"name": "levit_128s"}}']
)
def test_a_config_that_is_missing_or_damaged(refuses, run, tmp_path, text):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "config.json").unlink() if text is None else (copy / "config.json").write_text(text)
    with refuses("config.json", "missing or damaged"):
        read_snapshot(copy)


# Where a run starts


def test_a_castling_model_starts_from_a_softmax_one(tmp_path):
    softmax = small.small_model(attention="softmax", image_size=16, num_classes=3)
    variables = small.random_variables(softmax)
    save_file(to_torch(softmax, variables), tmp_path / "weights.safetensors")
    model = small.small_model()
    start = initial_variables(tmp_path / "weights.safetensors", model, reset_head=True)["params"]
    assert start["pos_embed"].shape == (1, 17, 24)
    assert not np.any(start["head"]["kernel"])
    for name, block in start["blocks"].items():
        assert not np.any(block["attn"].pop("token_kernel"))
        chex.assert_trees_all_equal(block, variables["params"]["blocks"][name])


def test_a_run_starts_from_another(refuses, run, model, tmp_path):
    expected = small.random_variables(model, seed=10)
    chex.assert_trees_all_equal(initial_variables(run, model, reset_head=False), expected)
    with refuses("levit_128s", "'head.linear.weight' is (7, 12), not (9, 12)", "reset_head"):
        initial_variables(run, small.small_levit(image_size=32, distilled=True, num_classes=9), reset_head=False)
    save_inference(tmp_path, model, expected)
    with refuses(str(tmp_path), "neither a run's folder"):
        initial_variables(tmp_path, model, reset_head=False)


def test_a_teacher_is_a_run_an_inference_folder_or_timms_weights(refuses, run, tmp_path, model):
    variables = small.random_variables(model, seed=10)  # of the run's newest checkpoint
    expected = to_inference(variables)
    save_inference(tmp_path / "inference", model, variables)
    for path in (run, tmp_path / "inference"):
        teacher, found = read_teacher(epath.Path(path), "levit_128s", model)
        assert (teacher.spec.form, teacher.spec.attention) == ("inference", "castling")
        # Folding multiplies in numpy's order or in XLA's: a rounding or two of numbers below 1.
        chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=0, atol=2e-7)
    softmax = small.small_levit(image_size=32, distilled=True, attention="softmax")
    weights = small.random_variables(softmax, seed=3)
    save_file(to_torch(softmax, weights), tmp_path / "weights.safetensors")
    teacher, found = read_teacher(epath.Path(tmp_path / "weights.safetensors"), "levit_128s", softmax)
    assert (teacher.spec.form, teacher.spec.attention) == ("inference", "softmax")
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, to_inference(weights)), rtol=0, atol=2e-7)
    other = small.small_levit(image_size=32, num_classes=5)
    with refuses("the teacher", "has num_classes = ", "which must be that of the model that learns from it, 5"):
        read_teacher(epath.Path(run), "levit_128s", other)
