"""A segmenter's way out: maps of labels at the images' own size, the command's files, and exported programs."""

import csv
import dataclasses
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import castling_jax
from castling_jax.convert.inference_folder import PROGRAM_FILE, program_outputs, save_inference
from castling_jax.convert.run_folder import write_config
from castling_jax.convert.weights import read
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten
from castling_jax.normalization import model_input
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.segmentation.transforms import EvalTransform
from castling_jax.tools.predict import main as predict_command
from castling_jax.training.config import default_config
from castling_jax.training.export import compare_forms, compare_written
from castling_jax.training.weights import initial_variables
from tests.convert.runs import write_run
from tests.models import small
from tests.models.test_segmenter import BACKBONES, small_segmenter
from tests.tasks.segmentation.test_windows import joined_by_hand
from tests.test_detectors import ALONE

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
PREPROCESSING = Preprocessing((40, 72), crop_mode="squash", crop_ratio=1.0)
SIZES = [(50, 60), (31, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An inference folder with random variables."""
    path = tmp_path_factory.mktemp("segmenter")
    model = small_segmenter("deit_micro")
    save_inference(path, model, small.random_variables(model), preprocessing=PREPROCESSING, classes=CLASSES)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(path / f"{number}.png")
    return path


def seen_of(file, preprocessing=PREPROCESSING):
    return EvalTransform(preprocessing)({"image": file.read_bytes()})


@pytest.mark.parametrize("crop_mode", [pytest.param("squash", marks=pytest.mark.slow), "slide"])
def test_predictions_are_the_classes_of_the_images_own_pixels(tmp_path, photographs, crop_mode):
    model, preprocessing = small_segmenter("deit_micro"), dataclasses.replace(PREPROCESSING, crop_mode=crop_mode)
    folder = tmp_path / "inference"
    save_inference(folder, model, small.random_variables(model), preprocessing=preprocessing, classes=CLASSES)
    weights = read(folder)
    answers = castling_jax.predict(folder, photographs)
    for file, size, answer in zip(sorted(photographs.iterdir()), SIZES, answers, strict=True):
        assert (answer.shape, answer.dtype) == (size, np.uint8)
        seen = seen_of(file, preprocessing)
        images = model_input(seen["image"].reshape(-1, 40, 72, 3), preprocessing)
        logits = castling_jax.apply(weights.model, weights.variables, images)["logits"]
        resized = joined_by_hand(logits, seen["windows"], size)
        best, second = np.sort(resized, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
        # Where the two best logits are no more apart than float32's rounding, either is right.
        assert ((answer == resized.argmax(-1)) | (best - second < 1e-4)).all()
        assert len(np.unique(answer)) > 1


def test_the_command_writes_masks_a_table_and_a_picture(folder, photographs, tmp_path, capsys):
    table, sheet, masks = tmp_path / "classes.csv", tmp_path / "sheet.png", tmp_path / "new" / "masks"
    predict_command([str(folder), str(photographs), f"--csv={table}", f"--sheet={sheet}", f"--labels={masks}"])
    answers = castling_jax.predict(folder, photographs)
    assert sorted(file.name for file in masks.iterdir()) == ["0.png", "1.png"]
    for number, answer in enumerate(answers):
        with Image.open(masks / f"{number}.png") as mask:
            assert mask.mode == "L"
            np.testing.assert_array_equal(np.asarray(mask), answer)
    lines = capsys.readouterr().out.splitlines()
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "share", "error"]
    for file, answer, line in zip(sorted(photographs.iterdir()), answers, lines, strict=True):
        shares = {CLASSES[label]: np.mean(answer == label) for label in np.unique(answer)}
        assert {row[1]: float(row[2]) for row in rows if row[0] == str(file)} == pytest.approx(shares)
        name = max(shares, key=shares.get)
        assert line.startswith(f"{file}: {name} {100 * shares[name]:.1f} %")
    assert Image.open(sheet).size[0] > 300


def test_what_the_command_refuses(folder, photographs, tmp_path):
    model = small.small_model()
    save_inference(tmp_path, model, small.random_variables(model), preprocessing=Preprocessing(8), classes=["a"] * 7)
    with pytest.raises(SystemExit, match="--labels is for a segmenter's masks"):
        predict_command([str(tmp_path), str(photographs), f"--labels={tmp_path / 'masks'}"])
    assert not (tmp_path / "masks").exists()
    with pytest.raises(SystemExit, match="--json is for a detector's boxes"):
        predict_command([str(folder), str(photographs), f"--json={tmp_path / 'x.json'}"])
    with pytest.raises(SystemExit, match="--labels has one name for several images, '0': give them one by one."):
        predict_command([str(folder), str(photographs), str(photographs / "0.png"), f"--labels={tmp_path / 'masks'}"])
    assert not (tmp_path / "masks").exists()


def test_no_image_is_replaced_by_an_answer(folder, photographs):
    before = {file: file.read_bytes() for file in photographs.iterdir()}
    for option in (f"--labels={photographs}", f"--sheet={photographs / '1.png'}", f"--csv={photographs / '0.png'}"):
        with pytest.raises(SystemExit, match="is one of the images, which it would replace."):
            predict_command([str(folder), str(photographs), option])
    assert {file: file.read_bytes() for file in photographs.iterdir()} == before


def test_true_masks_are_not_replaced_by_answers(folder, photographs, tmp_path):
    masks, command = tmp_path / "masks", [str(folder), str(photographs), f"--labels={tmp_path / 'masks'}"]
    predict_command(command)
    answer = (masks / "1.png").read_bytes()
    predict_command(command)  # its own masks are
    Image.new("L", (40, 30)).save(masks / "1.png")
    (masks / "0.png").unlink()
    truth = (masks / "1.png").read_bytes()
    for content in (truth, b"no picture"):
        (masks / "1.png").write_bytes(content)
        with pytest.raises(
            SystemExit, match=r"1\.png' was not written by this command, which would replace it: choose another"
        ):
            predict_command(command)
        assert [file.name for file in masks.iterdir()] == ["1.png"]
        assert (masks / "1.png").read_bytes() == content != answer


@pytest.mark.slow
def test_an_exported_program_runs_without_this_package_and_gives_classes(tmp_path, photographs):
    model = small_segmenter("deit_micro")
    variables = small.random_variables(model)
    save_inference(tmp_path, model, variables, format="stablehlo", preprocessing=PREPROCESSING, classes=CLASSES)
    images = castling_jax.preprocess(sorted(photographs.iterdir()), PREPROCESSING)
    np.save(tmp_path / "images.npy", images)
    files = [tmp_path / name for name in (PROGRAM_FILE, "images.npy", "found.npz")]
    subprocess.run([sys.executable, "-c", ALONE.replace("**program", "program"), *map(str, files)], check=True)
    found = np.load(tmp_path / "found.npz")["arr_0"]
    inference = abstract_model(**model.spec.arguments(form="inference"))
    logits = np.asarray(castling_jax.apply(inference, castling_jax.to_inference(variables), images)["logits"])
    assert (found.shape, found.dtype) == ((2, 40, 72), np.int32)
    chosen = np.take_along_axis(logits, found[..., None], -1)[..., 0]
    # The class of the largest logit; of two that rounding may swap, either.
    np.testing.assert_allclose(chosen, logits.max(-1), rtol=0, atol=1e-4)
    # As `convert --check` says it.
    said = compare_written(tmp_path, "stablehlo", inference, castling_jax.to_inference(variables), images, None)
    assert said == "the written program, read back, gives 100.00% of the pixels the model's class"
    # The same of a program that takes the pixels.
    save_inference(tmp_path, model, variables, format="stablehlo", preprocessing=PREPROCESSING, uint8=True)
    pixels = np.stack([seen_of(file)["image"] for file in sorted(photographs.iterdir())])
    inference_variables = castling_jax.to_inference(variables)
    again = compare_written(tmp_path, "stablehlo", inference, inference_variables, images, None, pixels=pixels)
    assert again == said
    np.testing.assert_array_equal(
        program_outputs(inference, castling_jax.to_inference(variables), images), logits.argmax(-1)
    )


@pytest.mark.slow
def test_the_check_of_a_conversion_compares_logits(folder, photographs):
    model = small_segmenter("deit_micro")
    variables = small.random_variables(model)
    images = jax.numpy.asarray(castling_jax.preprocess(sorted(photographs.iterdir()), PREPROCESSING))
    at_threshold, at_one = compare_forms(model, variables, 0.01, images)
    assert at_threshold.startswith("at the mask threshold 0.01 the two forms' outputs differ by at most ")
    assert at_one.startswith("at 1 by at most ")
    weights = read(folder)
    said = compare_written(folder, "safetensors", weights.model, weights.variables, images, None)
    assert said.startswith("the written files, read back, give the same outputs")


@pytest.mark.slow
def test_a_segmenter_starts_from_one_of_other_classes(tmp_path, refuses):
    folder = write_run(tmp_path / "run", small_segmenter("deit_micro", num_classes=2))
    config = default_config()
    config.model.update(name="pyramid_segmenter", backbone="deit_micro", image_size=(40, 72), head_channels=12)
    config.model.update(BACKBONES["deit_micro"])
    write_config(epath.Path(folder), config.to_dict())
    variables, model = read(folder).variables, small_segmenter("deit_micro", num_classes=3)
    with refuses(f"'{folder}' has 2 classes and the model 3: set config.reset_head = True"):
        initial_variables(folder, model, reset_head=False)
    start = initial_variables(folder, model, reset_head=True)
    chex.assert_trees_all_equal_shapes(start, castling_jax.get_variables(model))
    before, after = flatten(variables), flatten(start)
    renewed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert renewed == {"params/head/classifier/bias", "params/head/classifier/kernel"}
    same = initial_variables(folder, small_segmenter("deit_micro", num_classes=2), reset_head=True)
    chex.assert_trees_all_equal(same, variables)
