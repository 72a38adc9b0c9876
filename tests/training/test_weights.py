import dataclasses
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from castling_jax.convert import read, to_torch
from castling_jax.convert.inference import to_inference
from castling_jax.convert.inference_folder import save_inference
from castling_jax.convert.run_folder import model_arguments, write_config
from castling_jax.models.position import resize_position_embedding, sincos_position_embedding
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten, get_variables
from castling_jax.preprocessing import Preprocessing
from castling_jax.training.config import default_config
from castling_jax.training.weights import initial_variables, read_teacher
from tests.convert.runs import write_averages, write_run
from tests.models import small

PIXELS_AND_CLASSES = (Preprocessing(32), ("a", "b"))  # of `run`


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


def test_a_teacher_of_other_classes_or_other_pixels_is_refused(refuses, tmp_path):
    """Where it is known, as an inference folder says it."""
    student = small.small_model()
    pixels = Preprocessing(8, mean=(0.4, 0.5, 0.6))
    save_inference(tmp_path, student, small.random_variables(student), classes=[*"abcdefg"], preprocessing=pixels)
    read_teacher(tmp_path, "deit_tiny", student, dataclasses.replace(pixels, crop_ratio=1.0), tuple("abcdefg"))
    with refuses("the data's classes are not the run's (their order has changed): give a teacher of these classes"):
        read_teacher(tmp_path, "deit_tiny", student, pixels, tuple("bacdefg"))
    with refuses("the teacher", "has mean = (0.4, 0.5, 0.6), but the model that learns from it has (0.5, 0.5, 0.5)"):
        read_teacher(tmp_path, "deit_tiny", student, Preprocessing(8), tuple("abcdefg"))
    with refuses("the teacher", "has exif = False, but the model that learns from it has True"):
        read_teacher(tmp_path, "deit_tiny", student, dataclasses.replace(pixels, exif=True), tuple("abcdefg"))


def test_a_teacher_of_other_classes_is_said(refuses, tmp_path):
    softmax = small.small_levit(image_size=32, distilled=True, attention="softmax")
    save_file(to_torch(softmax, small.random_variables(softmax, seed=3)), tmp_path / "weights.safetensors")
    student = small.small_levit(image_size=32, num_classes=5)
    with refuses("the teacher", "has num_classes = 7, but the model that learns from it has 5"):
        read_teacher(tmp_path / "weights.safetensors", "levit_128s", student, *PIXELS_AND_CLASSES)


@pytest.mark.slow
def test_a_teacher_is_a_run_an_inference_folder_or_timms_weights(refuses, run, tmp_path, model):
    variables = small.random_variables(model, seed=10)  # of the run's newest checkpoint
    expected = to_inference(variables)
    save_inference(tmp_path / "inference", model, variables)
    for path in (run, tmp_path / "inference"):
        teacher, found = read_teacher(path, "levit_128s", model, *PIXELS_AND_CLASSES)
        assert (teacher.spec.form, teacher.spec.attention) == ("inference", "castling")
        # Folding multiplies in numpy's order or in XLA's: a rounding or two of numbers below 1.
        chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=0, atol=2e-7)
    average = small.random_variables(model, seed=4)  # a run that exports it is the teacher that it is
    step = write_averages(tmp_path, run, variables, average)
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"train": {"ema_decay": 0.9}}))
    _, found = read_teacher(step, "levit_128s", model, *PIXELS_AND_CLASSES)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, to_inference(average)), rtol=0, atol=2e-7)
    softmax = small.small_levit(image_size=32, distilled=True, attention="softmax")
    weights = small.random_variables(softmax, seed=3)
    save_file(to_torch(softmax, weights), tmp_path / "weights.safetensors")
    teacher, found = read_teacher(tmp_path / "weights.safetensors", "levit_128s", softmax, *PIXELS_AND_CLASSES)
    assert (teacher.spec.form, teacher.spec.attention) == ("inference", "softmax")
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, to_inference(weights)), rtol=0, atol=2e-7)
    other = small.small_levit(image_size=32, num_classes=5)
    with refuses("the teacher", "has num_classes = ", "but the model that learns from it has 5"):
        read_teacher(run, "levit_128s", other, *PIXELS_AND_CLASSES)


# Models on a backbone

SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
BACKBONE = {"backbone": "deit_micro", **SIZES}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SEGMENTER = {"name": "pyramid_segmenter", "image_size": 32, "head_channels": 8, **BACKBONE}
MAE = {"name": "mae", "image_size": (24, 32), **BACKBONE, **DECODER}
DETECTOR = {"name": "picodet_s", "image_size": 160, "neck_channels": 16, "num_convs": 1, **BACKBONE}


def configured(**model):
    config = default_config()
    config.model.update(model)
    return config


def model_of(classes=2, **model):
    return abstract_model(num_classes=classes, **model_arguments(configured(**model)))


def run_of(folder, **model):
    """A run of a model for two classes, as `write_run` leaves it."""
    write_run(folder, model_of(**model))
    write_config(epath.Path(folder), configured(**model).to_dict())
    return folder


def start(path, *, reset_head=False, **model):
    return flatten(initial_variables(path, model_of(**model), reset_head=reset_head))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("softmax") / "segmenter", **SEGMENTER | {"attention": "softmax"})


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    """Its grid has 6 x 8 patches."""
    return run_of(tmp_path_factory.mktemp("softmax") / "mae", **MAE | {"attention": "softmax"})


def check_same(started, weights, *, but=()):
    """All arrays are the run's, but taps, which are zero, and those whose paths end with one of `but`."""
    for path, leaf in started.items():
        if path.endswith("/token_kernel"):
            assert not np.any(leaf)
        elif not path.endswith(tuple(but)):
            np.testing.assert_array_equal(leaf, weights[path], err_msg=path)


@pytest.mark.slow
def test_a_castling_model_starts_from_a_softmax_one_for_the_same_task(segmenter, mae):
    for path, model in ((segmenter, SEGMENTER), (mae, MAE)):
        started, weights = start(path, **model), flatten(read(path).variables)
        assert started.keys() - weights.keys() == {f"params/backbone/blocks/{i}/attn/token_kernel" for i in range(2)}
        check_same(started, weights, but=["decoder_pos_embed"])  # fixed, and not random as in this run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("levit_128s", {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8}),
        pytest.param("mvitv2_tiny", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_detector_starts_from_one_with_another_attention_and_image_size(tmp_path, name, sizes):
    neck = {word: DETECTOR[word] for word in ("name", "image_size", "neck_channels", "num_convs")}
    detector = neck | {"backbone": name, "token_conv": "2d"} | sizes
    run = run_of(tmp_path / "run", **detector | {"attention": "softmax"})
    started = start(run, **detector | {"image_size": (160, 192)})
    check_same(started, flatten(read(run).variables), but=["attention_biases", "rel_pos_h", "rel_pos_w"])


def test_the_image_size_may_change_for_the_same_task(segmenter, mae):
    weights = flatten(read(segmenter).variables)
    started = start(segmenter, **SEGMENTER | {"attention": "softmax", "image_size": 64})
    check_same(started, weights, but=["backbone/pos_embed"])
    positions = "params/backbone/pos_embed"
    expected = resize_position_embedding(jnp.asarray(weights[positions]), (8, 8), (16, 16), 1)
    chex.assert_trees_all_close(started[positions], expected, rtol=0, atol=1e-6)
    started = start(mae, **MAE | {"image_size": (32, 48)})
    check_same(started, flatten(read(mae).variables), but=["pos_embed"])
    # The decoder's positions are fixed.
    expected = sincos_position_embedding((8, 12), 16, 1)
    chex.assert_trees_all_equal(started["params/decoder_pos_embed"], jnp.asarray(expected))


@pytest.mark.parametrize(
    ("image_size", "grid"), [((24, 32), (8, 8)), ((32, 64), (8, 16))], ids=["the same images", "larger images"]
)
def test_positions_are_resized_from_the_grid_of_the_run(mae, image_size, grid):
    """A segmenter pads images of 24 x 32 pixels to 32 x 32."""
    started = start(mae, **SEGMENTER | {"image_size": image_size})["params/backbone/pos_embed"]
    positions = jnp.asarray(flatten(read(mae).variables)["params/backbone/pos_embed"])
    chex.assert_trees_all_close(started, resize_position_embedding(positions, (6, 8), grid, 1), rtol=0, atol=1e-6)


def test_positions_of_as_many_patches_on_another_grid_are_resized(mae):
    classifier = {"name": "deit_micro", "image_size": (32, 24), **SIZES}
    started = start(mae, **classifier)["params/pos_embed"]
    positions = jnp.asarray(flatten(read(mae).variables)["params/backbone/pos_embed"])
    chex.assert_trees_all_close(started, resize_position_embedding(positions, (6, 8), (8, 6), 1), rtol=0, atol=1e-6)


def test_a_run_with_other_heads_does_not_fit(refuses, mae):
    """Its arrays have the same shapes."""
    for field in ("num_heads", "decoder_num_heads"):
        with refuses(f"'{mae}' has {field} = 2, and this model {field} = 4: set config.model.{field} as in that run"):
            start(mae, reset_head=True, **MAE | {field: 4})
    deit = {word: MAE[word] for word in (*SIZES, "image_size")}
    with refuses("num_heads = 2, and this model num_heads = 1: set config.model.num_heads as in that run"):
        start(mae, name="deit_micro", **deit | {"num_heads": 1})


@pytest.mark.slow
def test_a_segmenters_backbone_starts_other_models(segmenter):
    weights = flatten(read(segmenter).variables)
    for model in (DETECTOR, MAE, {"name": "deit_micro", "image_size": 32, **SIZES}):
        started = start(segmenter, **model)
        blocks = [path for path in started if re.match(r"params/(backbone/)?blocks/.*(kernel|bias|scale)$", path)]
        blocks = [path for path in blocks if not path.endswith("token_kernel")]
        assert len(blocks) == 24
        for path in blocks:
            theirs = weights[path if "/backbone/" in path else path.replace("params/", "params/backbone/")]
            np.testing.assert_array_equal(started[path], theirs, err_msg=path)


@pytest.mark.slow
def test_a_head_of_other_sizes_is_said_and_starts_anew_where_asked(refuses, segmenter, mae):
    wide = SEGMENTER | {"head_channels": 16}
    with refuses(
        f"'{segmenter}' has head_channels = 8, and this model head_channels = 16, so that arrays of its head, pyramid "
        "have other sizes: set config.model.head_channels as in that run, or config.reset_head = True",
        "'batch_stats/head/fuse/bn/mean' is (8,), not (16,)",
    ):
        start(segmenter, **wide)
    started = start(segmenter, reset_head=True, **wide)
    chex.assert_trees_all_equal_shapes(started, flatten(get_variables(model_of(**wide))))
    with refuses(f"'{segmenter}' has 2 classes and the model 5: set config.reset_head = True"):
        start(segmenter, classes=5, **SEGMENTER)
    deep = MAE | {"decoder_depth": 2}
    with refuses(
        "has decoder_depth = 1, and this model decoder_depth = 2",
        "'params/decoder_blocks/1/attn/proj/bias' is absent, not (16,)",
    ):
        start(mae, **deep)
    weights, started = flatten(read(mae).variables), start(mae, reset_head=True, **deep)
    old = {path: leaf for path, leaf in started.items() if "decoder_blocks/1/" not in path}
    assert len(started) - len(old) == 12
    check_same(old, weights, but=["decoder_pos_embed"])


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_by_its_cause(refuses, segmenter, mae, tmp_path):
    levit = {"name": "pyramid_segmenter", "image_size": 64, "head_channels": 8, "backbone": "levit_128s"}
    with refuses(
        f"'{mae}' is a mae on deit_micro, and this model's backbone is levit_128s: set config.model.backbone and its "
        "sizes as in that run (the state dict does not fit levit_128s: it lacks"
    ):
        start(mae, **levit)
    with refuses(
        f"'{mae}' is a mae on deit_micro, and this model is a deit_tiny: set config.model.name and its sizes as in that"
    ):
        start(mae, name="deit_tiny")
    for changes, fault in (
        ({"depth": 3}, "depth = 2, and this model depth = 3: set config.model.depth as in that run (the state dict"),
        (
            {"patch_size": 8, "embed_dim": 24},
            "embed_dim = 16, patch_size = 4, and this model embed_dim = 24, patch_size = 8: set config.model.embed_dim "
            "and config.model.patch_size as in that run (the state dict does not fit",
        ),
    ):
        with refuses(f"'{segmenter}' has {fault}"):
            start(segmenter, **SEGMENTER | changes)
    castling = run_of(tmp_path / "castling", **SEGMENTER)
    with refuses(f"'{castling}', a pyramid_segmenter: the", "which attention='softmax' does not have"):
        start(castling, **SEGMENTER | {"attention": "softmax"})
    save_inference(tmp_path / "inference", model_of(**SEGMENTER), small.random_variables(model_of(**SEGMENTER)))
    with refuses(str(tmp_path / "inference"), "is in inference form"):
        start(tmp_path / "inference", **SEGMENTER)
