import numpy as np
import pytest

from castling_jax.convert import to_torch
from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import save_inference
from castling_jax.data.arrays import ArrayDataset
from castling_jax.data.transforms import EvalTransform
from castling_jax.models.registry import create_model
from castling_jax.models.variables import apply, get_variables
from castling_jax.normalization import normalize_images
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.losses import cross_entropy
from castling_jax.tasks.classification.task import Classification
from castling_jax.training.evaluate import make_evaluator
from castling_jax.training.evaluate_run import evaluate_checkpoint
from castling_jax.training.sharding import make_mesh
from tests.models import small
from tests.training.test_sharding import SIZES

TRANSFORM = EvalTransform(Preprocessing(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, crop_ratio=0.875))
TASK = Classification(num_classes=10)


@pytest.mark.parametrize("size", [3, pytest.param(8, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.slow)])
def test_figures_are_those_of_one_whole_batch(size):
    rng = np.random.default_rng(0)
    dataset = ArrayDataset(rng.random((size, 8, 8, 3), np.float32), rng.integers(0, 10, size).astype(np.int32), 10)
    model = create_model("deit_micro", num_classes=10, depth=1)
    variables = get_variables(model)
    figures = make_evaluator(model, dataset, TASK, transform=TRANSFORM, batch_size=4, mesh=make_mesh(SIZES))(
        variables, 0.05
    ).figures()

    images = normalize_images(dataset.images, Preprocessing(8))
    inference_model = create_model("deit_micro", num_classes=10, depth=1, form="inference")
    train_logits = apply(model, variables, images, mask_threshold=0.05)
    logits = apply(inference_model, to_inference(variables), images)
    assert figures["accuracy_train_form"] == pytest.approx(np.mean(train_logits.argmax(-1) == dataset.labels))
    assert figures["accuracy_inference_form"] == pytest.approx(np.mean(logits.argmax(-1) == dataset.labels))
    # float32 sums over other batch sizes: some roundings of 1e-7 of numbers about 2.
    assert figures["eval_loss"] == pytest.approx(
        float(cross_entropy(logits, np.eye(10)[dataset.labels]).mean()), rel=1e-5
    )
    assert figures["max_difference"] == pytest.approx(float(abs(train_logits - logits).max()), rel=1e-4)


@pytest.mark.slow
def test_folding_in_bfloat16_is_compared_in_float32():
    dataset = ArrayDataset(np.random.default_rng(0).random((5, 32, 32, 3), np.float32), np.zeros(5, np.int32), 10)
    model = small.small_levit(num_classes=10, dtype="bfloat16")
    variables = small.random_variables(model)
    transform = EvalTransform(Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, crop_ratio=1.0))
    evaluate = make_evaluator(model, dataset, TASK, transform=transform, batch_size=4, mesh=make_mesh(SIZES))
    # What is folded is rounded to 24 bits, in some twenty layers, of logits of order one; bfloat16 shows 1e-2.
    assert evaluate(variables, 1.0).figures()["max_difference"] < 1e-5


def test_forms_agree_at_an_empty_mask():
    dataset = ArrayDataset(np.random.default_rng(0).random((5, 8, 8, 3), np.float32), np.zeros(5, np.int32), 10)
    model = create_model("deit_micro", num_classes=10, depth=1)
    evaluate = make_evaluator(model, dataset, TASK, transform=TRANSFORM, batch_size=4, mesh=make_mesh(SIZES))
    assert evaluate(get_variables(model), 1.0).figures()["max_difference"] < 1e-6


def test_only_checkpoints_are_evaluated_for_only_they_have_both_forms_and_data(refuses, tmp_path):
    model = small.small_model()
    variables = small.random_variables(model)
    save_inference(tmp_path / "inference", model, variables)
    np.savez(tmp_path / "weights.npz", **to_torch(model, variables))
    for path in (tmp_path / "inference", tmp_path, tmp_path / "weights.npz", tmp_path / "nowhere"):
        with refuses(f"'{path}' is neither a run's folder with checkpoints"):
            evaluate_checkpoint(path, {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1})
