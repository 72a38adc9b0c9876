"""The committed results of two studies, and copies of them with one fault each."""

import json
import shutil

import numpy as np
import pytest

from experiments import results, study
from experiments.results import ORIGIN_FILE, pack, read_origin, read_results, unpack
from experiments.study import RESULTS, load_study, study_names, trials_of

STUDY = "cifar10_mae"
RUN = "castling-fresh-lr0.002-seed1.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a copy of all results, which is read in the place of the committed ones."""
    shutil.copytree(RESULTS, tmp_path / "results")
    for module in (results, study):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def read(name=STUDY):
    return read_results(name, load_study(name))


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("images", [1, 8, 1003])
def test_answers_are_packed_without_loss(images):
    correct = np.random.default_rng(images).random(images) < 0.7
    np.testing.assert_array_equal(unpack(pack(correct), images), correct)
    assert len(pack(correct)) <= images / 6 + 4


def test_what_is_packed_is_base64_of_as_many_images():
    for packed, images in (("abc", 10), (pack(np.ones(16, bool)), 17), (pack(np.ones(17, bool)), 16)):
        with pytest.raises(ValueError):
            unpack(packed, images)


def test_results_come_in_the_order_of_the_runs(folder):
    found = [(one["variant"], one["learning_rate"], one["seed"]) for one in read()]
    runs = [(one.arm.name, one.learning_rate, one.seed) for one in trials_of(STUDY, load_study(STUDY))]
    assert len(found) == len(list(folder.glob(f"{STUDY}/*seed*.json")))
    assert found == [run for run in runs if run in found]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"accuracy_inference_form": 0.9}, "accuracy_inference_form"),
        ({"correct": pack(np.ones(10_000, bool))}, "accuracy_inference_form"),
        ({"seed": 0}, "seed"),
        ({"commit": 40 * "0"}, "commit"),
        ({"data": {"name": "npz:data_local/cifar10.npz", "eval_split": "val", "test_split": "val"}}, "data"),
        ({"steps": 1}, "steps"),
        ({"parameters": 3}, "parameters"),
        ({"macs": 3}, "macs"),
        ({"mask": []}, "schedule"),
        ({"images": 9_999, "correct": pack(np.ones(100, bool))}, "no correct answers"),
        ({"correct": "abc"}, "no correct answers"),
        ({"correct": 7}, "no correct answers"),
    ],
)
def test_a_figure_that_contradicts_others_is_found(folder, refuses, changes, field):
    change(folder / STUDY / RUN, **changes)
    with refuses(RUN, field):
        read()


def test_runs_on_other_images_are_found(folder, refuses):
    first, second = sorted((folder / STUDY).glob("castling-fresh-*"))[:2]
    change(first, contents={"test": {"images": 10_000, "images and labels": "a"}})
    read()  # runs of earlier commits have no record
    change(second, contents={"test": {"images": 10_000, "images and labels": "b"}})
    with refuses(second.name, "contents"):
        read()


def test_where_validation_images_are_the_test_both_accuracies_are_one(folder, refuses):
    run = "castling-lr0.004-seed0.json"
    change(folder / "cifar10_rates" / run, accuracy_validation=0.99)
    with refuses(run, "accuracy_validation = 0.99"):
        read("cifar10_rates")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"study": "cifar10_mae"}'])
@pytest.mark.parametrize("name", [RUN, ORIGIN_FILE])
def test_a_damaged_file_is_named(folder, refuses, name, content):
    (folder / STUDY / name).write_bytes(content)
    with refuses(str(folder / STUDY / name), "restore or remove it"):
        read()


def test_results_without_an_origin_are_refused(folder, refuses):
    (folder / STUDY / ORIGIN_FILE).unlink()
    for call in (read, lambda: read_origin(STUDY)):
        with refuses(f"results without their {ORIGIN_FILE}"):
            call()
    shutil.rmtree(folder / STUDY)
    assert read() == [] and read_origin(STUDY) is None


def test_a_file_of_no_run_is_refused(folder, refuses):
    shutil.copy(folder / STUDY / RUN, folder / STUDY / "castling-seed9.json")
    with refuses("castling-seed9"):
        read()


def test_results_of_a_studys_older_file_are_refused(folder, refuses):
    change(folder / STUDY / ORIGIN_FILE, study=64 * "0")
    with refuses(f"{STUDY}.py has changed"):
        read()


@pytest.mark.parametrize("name", study_names())
def test_the_committed_results_are_whole(name):
    read(name)
