import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from castling_jax.convert import to_torch
from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import save_inference
from castling_jax.training.weights import initial_variables, read_teacher
from tests.convert.runs import write_averages, write_run
from tests.models import small


@pytest.fixture(scope="module")
def model():
    return small.small_levit(image_size=32, distilled=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model):
    """Its newest checkpoint's variables are of the seed 10."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", model)


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
    with refuses(str(tmp_path), "is in inference form"):
        initial_variables(tmp_path, model, reset_head=False)


def test_a_teacher_of_other_classes_is_said(refuses, tmp_path):
    softmax = small.small_levit(image_size=32, distilled=True, attention="softmax")
    save_file(to_torch(softmax, small.random_variables(softmax, seed=3)), tmp_path / "weights.safetensors")
    student = small.small_levit(image_size=32, num_classes=5)
    with refuses("the teacher", "has num_classes = 7, but the model that learns from it has 5"):
        read_teacher(tmp_path / "weights.safetensors", "levit_128s", student)


def test_a_teacher_is_a_run_an_inference_folder_or_timms_weights(refuses, run, tmp_path, model):
    variables = small.random_variables(model, seed=10)  # of the run's newest checkpoint
    expected = to_inference(variables)
    save_inference(tmp_path / "inference", model, variables)
    for path in (run, tmp_path / "inference"):
        teacher, found = read_teacher(path, "levit_128s", model)
        assert (teacher.spec.form, teacher.spec.attention) == ("inference", "castling")
        # Folding multiplies in numpy's order or in XLA's: a rounding or two of numbers below 1.
        chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=0, atol=2e-7)
    average = small.random_variables(model, seed=4)  # a run that exports it is the teacher that it is
    step = write_averages(tmp_path, run, variables, average)
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"train": {"ema_decay": 0.9}}))
    _, found = read_teacher(step, "levit_128s", model)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, to_inference(average)), rtol=0, atol=2e-7)
    softmax = small.small_levit(image_size=32, distilled=True, attention="softmax")
    weights = small.random_variables(softmax, seed=3)
    save_file(to_torch(softmax, weights), tmp_path / "weights.safetensors")
    teacher, found = read_teacher(tmp_path / "weights.safetensors", "levit_128s", softmax)
    assert (teacher.spec.form, teacher.spec.attention) == ("inference", "softmax")
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, to_inference(weights)), rtol=0, atol=2e-7)
    other = small.small_levit(image_size=32, num_classes=5)
    with refuses("the teacher", "has num_classes = ", "but the model that learns from it has 5"):
        read_teacher(run, "levit_128s", other)
