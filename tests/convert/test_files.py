import hashlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

import castling_jax
from castling_jax import load_inference, to_inference
from castling_jax.convert.files import MODEL_FILE, VARIABLES_FILE, save_inference, write_atomically
from tests.models import small


@pytest.fixture
def model():
    return small.small_model(distilled=True)


@pytest.fixture
def variables(model):
    return small.random_variables(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = small.small_model(distilled=True)
    folder = tmp_path_factory.mktemp("saved")
    save_inference(folder, model, small.random_variables(model))
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    return shutil.copytree(saved, tmp_path / "inference")


def bits(tree):
    return jax.tree.map(lambda leaf: (leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()), tree)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["castling", "linear_angular", "softmax", "angular"])
def test_variables_come_back_bit_by_bit(tmp_path, kind, param_dtype):
    model = small.small_model(attention=kind, param_dtype=param_dtype, token_conv="2d")
    variables = small.random_variables(model)
    # Numbers that a conversion through text or another dtype would change.
    biases = jnp.asarray([np.pi, -0.0, 1e-45, 3e38, np.inf, 1e-39, 1 / 3], param_dtype)
    variables["params"]["head"]["bias"] = biases
    save_inference(tmp_path, model, variables)
    loaded_model, loaded = load_inference(tmp_path)
    assert bits(loaded) == bits(to_inference(variables))
    assert loaded_model.spec.arguments() == model.spec.arguments(form="inference")


def test_the_loaded_model_computes_the_same_logits(tmp_path):
    model = small.small_model(depth=1, dtype="bfloat16")
    variables, images = small.random_variables(model), small.random_images()
    save_inference(str(tmp_path), model, variables)
    apply = jax.jit(castling_jax.apply, static_argnums=0)
    expected = apply(small.small_model(depth=1, dtype="bfloat16", form="inference"), to_inference(variables), images)
    chex.assert_trees_all_equal(apply(*load_inference(str(tmp_path)), images), expected)


def test_the_loaded_model_holds_shapes_only(folder):
    model, _ = load_inference(folder)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(castling_jax.get_variables(model)))


def test_a_model_in_inference_form_can_be_saved_too(tmp_path, folder, variables):
    save_inference(tmp_path / "again", small.small_model(distilled=True, form="inference"), to_inference(variables))
    assert bits(load_inference(tmp_path / "again")[1]) == bits(load_inference(folder)[1])


def test_the_folder_says_what_it_was_written_with_and_holds_nothing_else(folder):
    description = json.loads((folder / MODEL_FILE).read_text())
    assert description["model"]["name"] == "deit_micro"
    assert description["model"]["form"] == "inference"
    assert description["model"]["distilled"] is True
    assert description["versions"]["jax"] == jax.__version__
    assert sorted(path.name for path in folder.iterdir()) == sorted([MODEL_FILE, VARIABLES_FILE])


def test_an_earlier_folder_is_replaced(folder, model):
    other = small.random_variables(model, seed=5)
    save_inference(folder, model, other)
    assert bits(load_inference(folder)[1]) == bits(to_inference(other))


def test_saving_does_not_change_the_variables(tmp_path, model, variables):
    before = bits(variables)
    save_inference(tmp_path, model, variables)
    assert bits(variables) == before


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Refusals


def test_saving_refuses_variables_that_are_not_the_models(refuses, tmp_path, model, variables):
    del variables["params"]["norm"]["scale"]
    with refuses("lack 'params/norm/scale'"):
        save_inference(tmp_path, model, variables)
    with refuses("not an inference folder"):
        load_inference(tmp_path)


@pytest.mark.parametrize("name", [MODEL_FILE, VARIABLES_FILE])
def test_a_missing_file(refuses, folder, name):
    (folder / name).unlink()
    with refuses(str(folder), f"no {name}"):
        load_inference(folder)


def test_a_missing_folder(refuses, tmp_path):
    with refuses("nowhere", "not an inference folder"):
        load_inference(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "first byte", "byte in the middle", "last byte", "longer"])
def test_damaged_variables(refuses, folder, damage):
    path = folder / VARIABLES_FILE
    data = bytearray(path.read_bytes())
    position = {"first byte": 0, "byte in the middle": len(data) // 2, "last byte": -1}.get(damage)
    if position is not None:
        data[position] ^= 1
    path.write_bytes({"truncated": data[:-100], "emptied": b"", "longer": data + b"\0"}.get(damage, data))
    with refuses(VARIABLES_FILE, "damaged", "SHA-256"):
        load_inference(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b'"model"', b"{}", b"\xff\xfe\x00", b'{"format": 1, "model": {}}']
)
def test_a_damaged_description(refuses, folder, text):
    (folder / MODEL_FILE).write_bytes(text)
    with refuses(MODEL_FILE, "damaged"):
        load_inference(folder)


def test_a_truncated_description(refuses, folder):
    path = folder / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-20])
    with refuses(MODEL_FILE, "damaged"):
        load_inference(folder)


def rewrite(folder, **changes):
    path = folder / MODEL_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format(refuses, folder):
    rewrite(folder, format=99)
    with refuses("format 99", "reads format 1"):
        load_inference(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "deit_titanic"},
        {"depth": "two"},
        {"distilled": None, "name": None},
        {"attention": 3},
        {"dtype": "gloat32"},
        {"param_dtype": 32},
        {"width": 24},
    ],
)
def test_a_description_of_no_model(refuses, folder, changes):
    arguments = json.loads((folder / MODEL_FILE).read_text())["model"]
    rewrite(folder, model=arguments | changes)
    with refuses():
        load_inference(folder)


@pytest.mark.parametrize("arguments", [[], {}, "deit_micro", None, {"attention": "castling"}])
def test_a_description_without_a_models_name(refuses, folder, arguments):
    rewrite(folder, model=arguments)
    with refuses(MODEL_FILE, "damaged"):
        load_inference(folder)


def test_variables_of_another_model(refuses, folder):
    arguments = json.loads((folder / MODEL_FILE).read_text())["model"]
    rewrite(folder, model=arguments | {"distilled": False})
    with refuses("'params/dist_token'", "does not have"):
        load_inference(folder)


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        (b"not safetensors at all", [VARIABLES_FILE, "cannot be read"]),
        (save({"params/cls_token": np.zeros((1, 1, 24), np.float32)}), ["lack 'params/"]),
    ],
    ids=["other format", "other arrays"],
)
def test_a_file_that_is_whole_but_not_the_models(refuses, folder, data, fragments):
    (folder / VARIABLES_FILE).write_bytes(data)
    rewrite(folder, sha256=hashlib.sha256(data).hexdigest())
    with refuses(*fragments):
        load_inference(folder)
