"""A detector's way out: predictions, exported programs, and the files beside them; and its start from a classifier."""

import dataclasses
import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file

import castling_jax
from castling_jax.convert import to_torch
from castling_jax.convert.inference_folder import MODEL_FILE, PROGRAM_FILE, read_description, save_inference
from castling_jax.convert.run_folder import write_config
from castling_jax.convert.weights import read
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten
from castling_jax.postprocessing import Suppression
from castling_jax.predictions import predictions_of
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.detection.predictions import BoxPredictions
from castling_jax.tools.predict import main as predict_command
from castling_jax.training.config import default_config
from castling_jax.training.weights import initial_variables
from tests.convert.runs import write_run
from tests.models import small

CLASSES = ["ant", "bee", "cat", "dog"]
IDS = [2, 7, 41, 90]
BACKBONE = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8}
PREPROCESSING = Preprocessing((160, 192), crop_mode="squash", crop_ratio=1.0)
SUPPRESSION = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=20)
# Runs a program with jax alone: importing this package is an error.
ALONE = """
import sys, numpy as np, jax
sys.modules["castling_jax"] = None
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.savez(sys.argv[3], **program.call(np.load(sys.argv[2])))
"""


def detector(**arguments):
    sizes = {"neck_channels": 16, "num_convs": 1, "num_classes": 4, "image_size": (160, 192)}
    return abstract_model("picodet_s", **({"backbone_arguments": BACKBONE} | sizes | arguments))


@pytest.fixture(autouse=True)
def batches_of_four(monkeypatch):
    """Not of 32 images, most of which would be padding."""
    monkeypatch.setattr(BoxPredictions, "batch_size", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An inference folder with random variables."""
    path = tmp_path_factory.mktemp("detector")
    model = detector()
    stated = {"preprocessing": PREPROCESSING, "classes": CLASSES, "suppression": SUPPRESSION, "category_ids": IDS}
    save_inference(path, model, small.random_variables(model), **stated)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate([(300, 200), (90, 260)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


apply = jax.jit(castling_jax.apply, static_argnums=0)


def expected(folder, file):
    """The detections in an image by the public functions, in pixels of the image itself."""
    weights = read(folder)
    outputs = apply(weights.model, weights.variables, castling_jax.preprocess(file, PREPROCESSING))
    found = castling_jax.ops.non_maximum_suppression(**outputs, **SUPPRESSION.to_dict())
    width, height = Image.open(file).size
    boxes = np.asarray(found["boxes"][0], np.float64) * np.array([width / 192, height / 160] * 2)
    boxes = np.clip(boxes, 0, [width, height] * 2)
    count = int(found["count"][0])
    return [CLASSES[label] for label in found["classes"][0, :count]], found["scores"][0, :count], boxes[:count]


@pytest.mark.slow
def test_predictions_are_boxes_in_pixels_of_the_image(folder, photographs):
    files = sorted(photographs.iterdir())
    for file, answer in zip(files, castling_jax.predict(folder, photographs, score_threshold=0), strict=True):
        names, scores, boxes = expected(folder, file)
        assert len(names) > 3
        assert [name for name, *_ in answer] == names
        # The batch is padded to 4 images, so sums run in another order: some roundings of 6e-8 of order one.
        np.testing.assert_allclose([score for _, score, _ in answer], scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose([box for *_, box in answer], boxes, rtol=0, atol=1e-2)
    limit = float(np.median([score for _, score, _ in answer]))
    likely = castling_jax.predict(folder, files[-1], score_threshold=limit)[0]
    assert likely == [one for one in answer if one[1] >= limit]
    assert castling_jax.predict(folder, files[-1], score_threshold=limit, top=2)[0] == likely[:2]


@pytest.mark.slow
def test_the_command_writes_a_table_cocos_results_and_a_picture(folder, photographs, tmp_path, capsys):
    out = {name: str(tmp_path / name) for name in ("boxes.csv", "boxes.json", "boxes.png")}
    flags = [f"--csv={out['boxes.csv']}", f"--json={out['boxes.json']}", f"--sheet={out['boxes.png']}"]
    predict_command([str(folder), str(photographs), "--score=0", *flags])
    answers = castling_jax.predict(folder, photographs, score_threshold=0)
    lines = (tmp_path / "boxes.csv").read_text().splitlines()
    assert lines[0] == "image,class,score,x0,y0,x1,y1,error"
    assert len(lines) == 1 + sum(map(len, answers))
    results = json.loads((tmp_path / "boxes.json").read_text())
    assert {result["image_id"] for result in results} == {str(file) for file in photographs.iterdir()}
    name, score, (x0, y0, x1, y1) = answers[0][0]
    first = {
        "category_id": IDS[CLASSES.index(name)],
        "category_name": name,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": score,
    }
    assert results[0] == first | {"image_id": results[0]["image_id"]}
    assert Image.open(tmp_path / "boxes.png").size[0] > 300
    assert f"{name} {score:.2f}" in capsys.readouterr().out


def test_what_the_command_refuses(tmp_path, photographs):
    model = small.small_model()
    save_inference(tmp_path, model, small.random_variables(model), preprocessing=Preprocessing(8), classes=["a"] * 7)
    with pytest.raises(SystemExit, match="--json is for a detector's boxes"):
        predict_command([str(tmp_path), str(photographs), f"--json={tmp_path / 'x.json'}"])
    with pytest.raises(SystemExit, match=r"--score must be a number in \[0, 1\], not 2.0\."):
        predict_command([str(tmp_path), str(photographs), "--score=2"])


def test_suppression_is_kept_beside_the_weights(folder, tmp_path, refuses):
    assert read_description(folder).suppression == read(folder).suppression == SUPPRESSION
    content = json.loads((folder / MODEL_FILE).read_text())
    assert content["suppression"] == {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 20}
    for name in (MODEL_FILE, "variables.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for broken in ({"iou_threshold": 2}, {"overlap": 0.5}):
        (tmp_path / MODEL_FILE).write_text(json.dumps(content | {"suppression": broken}))
        with refuses("model.json' is damaged"):
            read_description(tmp_path)
    (tmp_path / MODEL_FILE).write_text(json.dumps({k: v for k, v in content.items() if k != "suppression"}))
    assert read(tmp_path).suppression == Suppression()


def test_category_ids_are_kept_beside_the_classes(folder, tmp_path, refuses):
    assert read_description(folder).category_ids == read(folder).category_ids == IDS
    content = json.loads((folder / MODEL_FILE).read_text())
    for name in (MODEL_FILE, "variables.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for broken, said in (
        ([1, 2], "there are 2 ids of classes"),
        (["a"] * 4, "category_ids must be a list of integers"),
    ):
        (tmp_path / MODEL_FILE).write_text(json.dumps(content | {"category_ids": broken}))
        with refuses("model.json' is damaged", said):
            read_description(tmp_path)
    # A folder of an earlier version has no ids: the classes are counted from 1.
    (tmp_path / MODEL_FILE).write_text(json.dumps({k: v for k, v in content.items() if k != "category_ids"}))
    weights = read(tmp_path)
    answers = [("a.jpg", [("dog", 0.5, (1.0, 2.0, 4.0, 6.0))])]
    for ids, dog in ((weights.category_ids, 4), (IDS, 90)):
        predictions = predictions_of(dataclasses.replace(weights, category_ids=ids), CLASSES)
        expected = {"image_id": "a.jpg", "category_id": dog, "category_name": "dog", "bbox": [1, 2, 3, 4], "score": 0.5}
        assert predictions.coco_results(answers) == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("suppression", [SUPPRESSION, None])
def test_a_program_runs_without_this_package_and_gives_our_detections(tmp_path, suppression, photographs):
    model = detector()
    variables = small.random_variables(model)
    stated = {"preprocessing": PREPROCESSING, "classes": CLASSES, "suppression": suppression}
    save_inference(tmp_path, model, variables, format="stablehlo", **stated)
    images = castling_jax.preprocess(sorted(photographs.iterdir()), PREPROCESSING)
    np.save(tmp_path / "images.npy", images)
    files = [tmp_path / name for name in (PROGRAM_FILE, "images.npy", "found.npz")]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, files)], check=True)
    found = dict(np.load(tmp_path / "found.npz"))
    inference = abstract_model(**model.spec.arguments(form="inference"))
    ours = castling_jax.apply(inference, castling_jax.to_inference(variables), images)
    if suppression is not None:
        ours = castling_jax.ops.non_maximum_suppression(**ours, **suppression.to_dict())
        np.testing.assert_array_equal(found.pop("classes"), ours.pop("classes"))
        np.testing.assert_array_equal(found.pop("count"), ours.pop("count"))
    # The same operations in another program, which XLA fuses otherwise: float32's rounding.
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, ours), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backbone", [pytest.param("levit_128s", marks=pytest.mark.slow), "deit_micro"])
def test_a_detector_starts_from_a_classifier(tmp_path, backbone):
    """Softmax weights under timm's names, for other classes and another image size, become the castling backbone's."""
    arguments = {"levit_128s": BACKBONE, "deit_micro": {"depth": 1, "patch_size": 16}}[backbone]
    softmax = abstract_model(backbone, attention="softmax", num_classes=7, image_size=96, **arguments)
    variables = small.random_variables(softmax)
    save_file(to_torch(softmax, variables), tmp_path / "weights.safetensors")
    model = detector(backbone=backbone, backbone_arguments=arguments)
    start, again, other = (
        initial_variables(tmp_path / "weights.safetensors", model, reset_head=False, seed=seed) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal_shapes(start, castling_jax.get_variables(model))
    chex.assert_trees_all_equal(start, again)
    leaves, theirs = flatten(start["params"]["backbone"]), flatten(variables["params"])
    alike = [path for path in leaves.keys() & theirs.keys() if leaves[path].shape == theirs[path].shape]
    assert len(alike) > 0.7 * len(leaves)
    for path in alike:
        np.testing.assert_array_equal(leaves[path], theirs[path], err_msg=path)
    assert not any(path.startswith("head") for path in leaves)
    necks = [flatten(one["params"]["neck"]) for one in (start, other)]
    assert any(not np.array_equal(necks[0][path], necks[1][path]) for path in necks[0])


@pytest.mark.slow
def test_a_run_of_another_backbone_is_named(tmp_path, refuses):
    run = write_run(tmp_path / "run", small.small_levit(image_size=32, distilled=True, num_classes=2))
    with refuses(f"'{run}', a levit_128s: the state dict does not fit deit_micro"):
        initial_variables(run, detector(backbone="deit_micro", backbone_arguments={"depth": 1}), reset_head=False)


@pytest.mark.slow
def test_a_detector_starts_from_a_detector(tmp_path):
    model = detector(num_classes=2)
    write_run(tmp_path / "run", model)
    config = default_config()
    config.model.update(name="picodet_s", image_size=(160, 192), neck_channels=16, num_convs=1, **BACKBONE)
    config.evaluation.iou_threshold = 0.4
    write_config(epath.Path(tmp_path / "run"), config.to_dict())
    weights = read(tmp_path / "run")
    assert (weights.model.spec.name, weights.model.spec.num_classes) == ("picodet_s", 2)
    assert weights.suppression == Suppression(iou_threshold=0.4)
    start = initial_variables(tmp_path / "run", model, reset_head=False)
    chex.assert_trees_all_equal(start, small.random_variables(model, seed=10))
