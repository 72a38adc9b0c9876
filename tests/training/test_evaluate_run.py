"""A run evaluated on any data: which fields count, which split is read, and what is said and written."""

import csv
import json

import jax
import numpy as np
import optax
import pytest
from etils import epath
from PIL import Image
from sklearn.metrics import confusion_matrix

from castling_jax import apply, preprocess
from castling_jax.convert import read
from castling_jax.convert.run_folder import write_config
from castling_jax.models.registry import abstract_model
from castling_jax.tasks.classification.answers import ClassAnswers
from castling_jax.training.checkpoints import Checkpoints, Progress
from castling_jax.training.config import default_config
from castling_jax.training.evaluate_run import Evaluation, evaluate_checkpoint, run_of
from castling_jax.training.state import create_state
from tests.data.test_decode import smooth
from tests.models import small

MESH = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
CLASSES = ["0", "1", "10", "2", 'a, "b"', "line\nbreak", "none here"]


def write_run(folder, classes, **dataset):
    """A run as it is on disk after step 3, without the training."""
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 1, "embed_dim": 32})
    config.dataset.update({"workers": 0, **dataset})
    folder.mkdir()
    write_config(epath.Path(folder), config.to_dict())
    model = abstract_model("deit_micro", num_classes=len(classes or CLASSES), depth=1, embed_dim=32)
    data = {} if classes is None else {"classes": classes}
    checkpoints = Checkpoints(epath.Path(folder / "checkpoints"), keep=1, data=data)
    state = create_state(small.random_variables(model), optax.sgd(1e-3), 0)
    object.__setattr__(state, "step", np.int32(3))
    checkpoints.save(state, Progress(1.0, mask_threshold=0.03))
    checkpoints.close()
    return folder


def write_images(folder, names, count=3):
    """FOLDER/NAME/*.png; each another picture."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(smooth(10, 12, seed=10 * label + number))
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", CLASSES, name="folder:/gone", test_split="secret")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder without train, and with some of the classes only."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_images(folder / "field", CLASSES[:6])
    return folder


@pytest.fixture(scope="module")
def evaluation(run, elsewhere):
    return evaluate_checkpoint(run, MESH, {"dataset.name": f"folder:{elsewhere}", "dataset.eval_split": "field"})


def by_hand(run, folder):
    """(labels, logits) of a folder's images in the sorted order, by the public functions alone."""
    weights = read(run)
    paths = sorted(folder.glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    images = preprocess(paths, weights.preprocessing)
    logits_of = jax.jit(apply, static_argnums=0)
    return labels, np.asarray(logits_of(weights.model, weights.variables, images, mask_threshold=0.03))


def test_a_run_is_evaluated_elsewhere(run, elsewhere, evaluation):
    labels, logits = by_hand(run, elsewhere / "field")
    figures = evaluation.figures
    assert (figures["dataset"], figures["split"], figures["step"]) == (f"folder:{elsewhere}", "field", 3)
    assert (figures["eval_images"], figures["eval_corrupt"]) == (18, 0)
    assert figures["accuracy_train_form"] == np.mean(logits.argmax(-1) == labels)
    ranks = np.argsort(-logits, axis=-1)
    assert figures["top5_accuracy_train_form"] == np.mean((ranks[:, :5] == labels[:, None]).any(-1))
    np.testing.assert_array_equal(evaluation.answers.train_form, logits.argmax(-1))
    np.testing.assert_array_equal(evaluation.answers.label, labels)
    assert evaluation.classes == CLASSES


def test_the_output_names_data_split_and_images_and_every_class(evaluation, elsewhere):
    text = str(evaluation)
    assert f"  folder:{elsewhere}, split field: 18 images of 7 classes\n" in text
    assert text.startswith("step 3, mask threshold 0.03\n")
    figures = evaluation.figures
    for form, label in (("train", "training form  "), ("inference", "inference form ")):
        shares = (f"{100 * figures[f'{name}accuracy_{form}_form']:.2f} %" for name in ("", "top5_"))
        assert "  {} {} top-1, {} top-5".format(label, *shares) in text
    assert "    line\\nbreak  " in text
    assert "none here" not in text  # of no image


def test_what_is_written_is_what_was_answered(evaluation, tmp_path):
    files = evaluation.write(tmp_path)
    folder = evaluation.folder(tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in folder.iterdir())
    assert folder.parent == epath.Path(tmp_path / "evaluation") and folder.name.endswith("-field-3")
    answers = evaluation.answers
    written = np.loadtxt(folder / "answers.csv", delimiter=",", skiprows=1, dtype=int)
    np.testing.assert_array_equal(written.T, [answers.image, answers.label, answers.train_form, answers.inference_form])
    header, *rows = csv.reader((folder / "confusion.csv").read_text().splitlines(keepends=True))
    assert header[1:] == [row[0] for row in rows] == CLASSES
    counts = np.array([row[1:] for row in rows], int)
    np.testing.assert_array_equal(counts, confusion_matrix(answers.label, answers.inference_form, labels=range(7)))
    figures = json.loads((folder / "figures.json").read_text())
    by_class = figures.pop("classes")
    assert figures == evaluation.figures
    for label, name in enumerate(CLASSES):
        images = counts[label].sum()
        assert by_class[name]["images"] == images
        assert by_class[name]["accuracy"] == (counts[label, label] / images if images else None)
    with Image.open(folder / "confusion.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluation.write(tmp_path)  # again, in its place
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_it_is_written_nowhere_by_itself_and_a_file_in_its_place_is_one_sentence(run, evaluation, tmp_path, refuses):
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]
    (tmp_path / "evaluation").write_text("")
    with refuses("the evaluation cannot be written into", "(Not a directory)."):
        evaluation.write(tmp_path)


def test_fields_of_the_evaluation_count(run, elsewhere, evaluation):
    changes = {"dataset.name": f"folder:{elsewhere}", "dataset.test_split": "field"}
    other = evaluate_checkpoint(run, MESH, changes | {"dataset.crop_ratio": 0.5, "evaluation.batch_size": 5})
    assert other.figures["eval_images"] == 18
    assert other.figures["eval_loss"] != evaluation.figures["eval_loss"]
    same = evaluate_checkpoint(run, MESH, changes | {"evaluation.batch_size": 5})
    # Other batches: float32's rounding of logits of order one.
    assert same.figures["eval_loss"] == pytest.approx(evaluation.figures["eval_loss"], rel=1e-5)
    np.testing.assert_array_equal(same.answers.inference_form, evaluation.answers.inference_form)


def test_a_corrupt_image_is_left_out_and_counted(run, elsewhere, tmp_path):
    folder = write_images(tmp_path / "field", CLASSES[:2])
    (folder / "0" / "1.png").write_bytes(b"")
    found = evaluate_checkpoint(run, MESH, {"dataset.name": f"folder:{tmp_path}", "dataset.eval_split": "field"})
    assert found.answers.image.tolist() == [0, 2, 3, 4, 5]
    assert "5 images of 7 classes (1 corrupt ones left out)" in str(found)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 7}, "does not heed seed: of the configuration, only dataset.name, "),
        ({"model.depth": 2, "train.epochs": 1}, "does not heed model.depth, train.epochs: "),
        ({"dataset.train_split": "x"}, "does not heed dataset.train_split"),
        ({"dataset.accept_changes": True}, "does not heed dataset.accept_changes"),
        ({"evaluation.every_epochs": 2}, "does not heed evaluation.every_epochs"),
        ({"dataset.nmae": "x"}, "does not heed dataset.nmae"),
        ({"dataset.eval_split": "a", "dataset.test_split": "b"}, "both name the split to evaluate: give one"),
        ({"dataset.crop_ratio": 2.0}, "config.dataset.crop_ratio must be a number in (0, 1], not 2.0."),
        ({"evaluation.batch_size": 0}, "config.evaluation.batch_size must be an integer of at least 1, not 0."),
        ({"dataset.name": "digits", "dataset.eval_split": "test"}, "the data's classes are not the run's (10 instead"),
        ({"evaluation.score_threshold": 0.5}, "the run's deit_micro does not use config.evaluation.score_threshold: "),
        ({}, "there is no folder '/gone'."),
    ],
)
def test_what_an_evaluation_does_not_heed_is_refused(run, refuses, changes, sentence):
    with refuses(sentence):
        evaluate_checkpoint(run, MESH, changes)


def test_data_without_a_held_out_split_has_a_part_to_evaluate_on(tmp_path):
    """Whatever the run has learnt from: its data had a split of its own."""
    run = write_run(tmp_path / "run", CLASSES, name="folder:/gone", train_split="train", eval_split="val")
    write_images(tmp_path / "data" / "train", CLASSES)
    changes = {"dataset.name": f"folder:{tmp_path / 'data'}", "dataset.eval_split": None}
    assert evaluate_checkpoint(run, MESH, changes).figures["split"] == "10% of train"


def test_other_classes_than_the_models_are_refused(run, tmp_path, refuses):
    write_images(tmp_path / "field", ["0", "zebra"])
    with refuses("field/zebra' is a class that the model does not have."):
        evaluate_checkpoint(run, MESH, {"dataset.name": f"folder:{tmp_path}", "dataset.eval_split": "field"})
    with refuses("unknown split of", "'secret'"):  # the test split, which is the summary's
        evaluate_checkpoint(run, MESH, {"dataset.name": f"folder:{tmp_path}"})
    earlier = write_run(tmp_path / "earlier", None, name="digits")  # keeps no classes
    with refuses("the data has 10 classes, and the run's model 7: choose data of these classes"):
        evaluate_checkpoint(earlier, MESH)


def test_the_folder_of_a_run_or_of_its_checkpoint(tmp_path):
    assert run_of(tmp_path / "run") == run_of(tmp_path / "run" / "checkpoints" / "12") == tmp_path / "run"
    assert run_of(tmp_path / "12") == tmp_path / "12"


def answers_of(num_classes, labels, answers):
    labels, answers = np.array(labels), np.array(answers)
    numbers = np.arange(len(labels))
    is_right = labels == answers
    return ClassAnswers(
        num_classes, numbers, labels, answers, answers, is_right, is_right, is_right * 1.0, is_right * 0.5, 0
    )


def test_five_classes_have_no_five_likeliest():
    assert "top5_accuracy_train_form" not in answers_of(5, [0, 1], [0, 0]).figures()
    assert answers_of(6, [0, 1], [0, 0]).figures()["top5_accuracy_train_form"] == 0.5


def test_of_many_classes_the_worst_are_shown_and_no_matrix_is_written(tmp_path):
    labels = np.arange(2001)
    answers = np.where(labels % 100 == 7, 0, labels)
    figures = {
        "dataset": "imagenet2012",
        "split": "train[:5%]/x",
        "step": 9,
        "mask_kind": "threshold",
        "mask_threshold": 1.0,
        "exported": "raw",
    }
    found = answers_of(2001, labels, answers)
    evaluation = Evaluation(figures | found.figures(), found, [f"n{label}" for label in labels])
    text = str(evaluation)
    assert "the 20 classes of the lowest accuracy" in text and "n2000" not in text
    assert all(f"    n{100 * hundred + 7} " in text for hundred in range(20))
    assert [path.name for path in evaluation.write(tmp_path)] == ["figures.json", "answers.csv"]
    assert evaluation.folder(tmp_path).name == "imagenet2012-train__5___x-9"
