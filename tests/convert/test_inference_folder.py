import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

import castling_jax
from castling_jax import load_inference, to_inference
from castling_jax.convert import inference_folder
from castling_jax.convert.inference_folder import MODEL_FILE, PAYLOADS, PROGRAM_FILE, VARIABLES_FILE, save_inference
from castling_jax.models import registry
from castling_jax.models.variables import flatten
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


# Orbax


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_checkpoint_brings_variables_back_bit_by_bit(tmp_path, param_dtype):
    model = small.small_levit(distilled=True, param_dtype=param_dtype)
    variables = small.random_variables(model)
    save_inference(tmp_path, model, variables, format="orbax")
    loaded_model, loaded = load_inference(tmp_path)
    assert bits(loaded) == bits(to_inference(variables))
    assert loaded_model.spec.arguments() == model.spec.arguments(form="inference")


@pytest.mark.parametrize("damage", ["truncated", "byte", "missing", "another"])
def test_a_damaged_checkpoint(refuses, tmp_path, model, variables, damage):
    save_inference(tmp_path, model, variables, format="orbax")
    payload = tmp_path / PAYLOADS["orbax"]
    largest = max((path for path in payload.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    if damage == "missing":
        largest.unlink()
    elif damage == "another":
        (payload / "more").write_bytes(b"")
    else:
        middle = len(data) // 2
        largest.write_bytes(data[:-9] if damage == "truncated" else data[:middle] + b"\0\1" + data[middle + 2 :])
    with refuses(PAYLOADS["orbax"], "damaged", "SHA-256"):
        load_inference(tmp_path)


def test_one_format_takes_the_others_place(folder, model, variables):
    for name, payload in [*PAYLOADS.items(), ("safetensors", VARIABLES_FILE)]:
        save_inference(folder, model, variables, format=name)
        assert sorted(path.name for path in folder.iterdir()) == sorted([MODEL_FILE, payload])
    assert bits(load_inference(folder)[1]) == bits(to_inference(variables))


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_conversion_that_fails_leaves_nothing_or_what_was_there(
    refuses, monkeypatch, tmp_path, folder, model, variables, name
):
    def fails(path):
        raise OSError("no space left")

    monkeypatch.setattr(inference_folder, "sha256_of", fails)
    before = bits(variables)
    for out in (tmp_path / "new", folder):
        with refuses(f"'{out}' could not be written (no space left)"):
            save_inference(out, model, variables, format=name)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted([MODEL_FILE, VARIABLES_FILE])
    load_inference(folder)
    assert bits(variables) == before


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(refuses, tmp_path, model, variables, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk, but for the name of the error
    try:
        with refuses(
            f"'{tmp_path / 'out'}' could not be written (File too large); run the same command again once it can"
        ):
            save_inference(tmp_path / "out", model, variables, format=name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


# StableHLO


def exported(tmp_path, model, variables):
    save_inference(tmp_path, model, variables, format="stablehlo")
    return jax.export.deserialize(bytearray((tmp_path / PROGRAM_FILE).read_bytes()))


SLOW_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("levit", "mvitv2", "softmax", "bfloat16")]


@pytest.mark.parametrize("family", ["deit", *SLOW_FAMILIES])
def test_a_program_computes_what_the_model_does(tmp_path, family):
    make = {"levit": small.small_levit, "mvitv2": small.small_mvit}.get(family, small.small_model)
    arguments = {"softmax": {"attention": "softmax"}, "bfloat16": {"param_dtype": "bfloat16"}}.get(family, {})
    model = make(**arguments)
    variables, size = small.random_variables(model), model.spec.image_size
    program = exported(tmp_path, model, variables)
    assert program.platforms == ("cpu", "tpu", "cuda")
    # No kernel of one platform; what is left checks the number of images.
    assert set(re.findall(r"custom_call @(\w+)", program.mlir_module())) == {"shape_assertion"}
    inference = make(form="inference", **arguments)
    for batch in (1, 3):
        images = small.random_images(batch, size, size)
        expected = jax.jit(castling_jax.apply, static_argnums=0)(inference, to_inference(variables), images)
        logits = program.call(images)
        assert logits.dtype == jnp.float32
        # Constants are folded before the program runs: sums of some hundred terms of order one, in another order.
        chex.assert_trees_all_close(logits, expected, rtol=0, atol=1e-5)


def test_a_programs_weights_stay_in_bfloat16(tmp_path):
    sizes = []
    for param_dtype in ("float32", "bfloat16"):
        model = small.small_model(param_dtype=param_dtype)
        save_inference(tmp_path, model, small.random_variables(model), format="stablehlo")
        sizes.append((tmp_path / PROGRAM_FILE).stat().st_size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(castling_jax.get_variables(model)))
    # Four bytes to two, give or take the program's own text.
    assert 1.8 * parameters < sizes[0] - sizes[1] < 2.2 * parameters


ALONE = """
import sys
sys.path += [PURE, PLATFORM]
sys.modules["castling_jax"] = None  # wherever it may be installed
try:
    import castling_jax
    raise SystemExit("castling_jax is here")
except ImportError:
    pass
import jax.export
import numpy as np
program = jax.export.deserialize(bytearray(open("program.stablehlo", "rb").read()))
np.save("logits.npy", program.call(np.load("images.npy")))
assert not {"flax", "orbax", "safetensors"} & sys.modules.keys()
"""


def test_a_program_needs_jax_alone(tmp_path, model, variables):
    exported(tmp_path, model, variables)
    images = small.random_images(3)
    np.save(tmp_path / "images.npy", images)
    paths = {"PURE": repr(sysconfig.get_path("purelib")), "PLATFORM": repr(sysconfig.get_path("platlib"))}
    code = re.sub("PURE|PLATFORM", lambda match: paths[match[0]], ALONE)
    # Isolated and without `site`: neither PYTHONPATH nor an editable installation.
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, check=True, timeout=300)
    inference = small.small_model(distilled=True, form="inference")
    expected = jax.jit(castling_jax.apply, static_argnums=0)(inference, to_inference(variables), images)
    chex.assert_trees_all_close(np.load(tmp_path / "logits.npy"), np.asarray(expected), rtol=0, atol=1e-5)


def test_a_program_is_no_variables(refuses, tmp_path, model, variables):
    save_inference(tmp_path, model, variables, format="stablehlo")
    with refuses(str(tmp_path), "jax.export.deserialize", PROGRAM_FILE):
        load_inference(tmp_path)
    path = tmp_path / PROGRAM_FILE
    path.write_bytes(path.read_bytes()[:-50])
    with refuses(PROGRAM_FILE, "damaged"):
        load_inference(tmp_path)


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
    with refuses("format 99", "reads formats up to 2"):
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


def test_another_kind_of_file(refuses, tmp_path, model, variables):
    with refuses("format 'onnx'", "safetensors, orbax, stablehlo"):
        save_inference(tmp_path / "out", model, variables, format="onnx")
    (tmp_path / "file").write_text("")
    with refuses(str(tmp_path / "file"), "is a file"):
        save_inference(tmp_path / "file", model, variables)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("file", ["../variables.safetensors", 3, None, "other"])
def test_a_description_that_names_another_file(refuses, folder, file):
    rewrite(folder, file=file)
    with refuses(MODEL_FILE, "damaged"):
        load_inference(folder)


# Files that nobody has vouched for


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 100_000},
        {"depth": 10**30},
        {"embed_dim": 2**40},
        {"image_size": 10**12},
        {"num_classes": 10**18},
        {"mlp_ratio": 1e308},
        {"mlp_ratio": 10**400},
        {"name": "levit_128s", "depth": [1] * 2000},
        {"name": "mvitv2_tiny", "depths": [10**6] * 4},
        {"name": "mvitv2_tiny", "stride_q": [[1, 1]] * 10_000},
    ],
)
def test_sizes_are_bounded_before_anything_is_built(refuses, folder, monkeypatch, changes):
    monkeypatch.setattr(registry, "make_core", None)  # with which the building begins
    arguments = json.loads((folder / MODEL_FILE).read_text())["model"]
    rewrite(folder, model=arguments | changes)
    with refuses():
        load_inference(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000])
def test_a_description_that_is_no_reasonable_json(refuses, folder, text):
    (folder / MODEL_FILE).write_bytes(text)
    with refuses(MODEL_FILE, "damaged"):
        load_inference(folder)


@pytest.mark.parametrize("form", ["train", "other", None, 3])
def test_a_description_of_another_form(refuses, folder, form):
    arguments = json.loads((folder / MODEL_FILE).read_text())["model"]
    rewrite(folder, model=arguments | {"form": form})
    with refuses(f"'{folder / MODEL_FILE}' describes a model in the form {form!r}, not 'inference'"):
        load_inference(folder)


def with_variables(folder, arrays):
    data = save(arrays)
    (folder / VARIABLES_FILE).write_bytes(data)
    rewrite(folder, sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_saving_refuses_what_loading_would_refuse(refuses, tmp_path, model, variables, format):
    half = to_inference(variables, dtype=jnp.float16)
    with refuses("dtype of 'params/", "'float16'", "(known: float32, bfloat16)"):
        save_inference(tmp_path / "new", model, half, format=format)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int8", "bool"])
def test_variables_of_another_dtype(refuses, folder, dtype):
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(load_inference(folder)[1]).items()}
    with_variables(folder, arrays | {"params/norm/scale": arrays["params/norm/scale"].astype(dtype)})
    with refuses("dtype of 'params/norm/scale'", repr(dtype), "(known: float32, bfloat16)"):
        load_inference(folder)


def test_a_name_that_is_an_array_and_a_folder(refuses, folder):
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(load_inference(folder)[1]).items()}
    for more in ("params/cls_token/a", "params/cls_token/a/b"):
        with_variables(folder, arrays | {more: np.zeros(1, np.float32)})
        with refuses(f"'params/cls_token' cannot be an array and hold '{more}'"):
            load_inference(folder)


def test_names_of_arrays_are_shown_escaped(refuses, folder):
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(load_inference(folder)[1]).items()}
    with_variables(folder, arrays | {"params/\x1b[2J\nAll is well.": np.zeros(1, np.float32)})
    with refuses("hold 'params/\\x1b[2J\\nAll is well.', which"):
        load_inference(folder)


# Places


def test_what_is_written_has_the_umasks_mode(tmp_path, model, variables):
    before = os.umask(0o027)
    try:
        for name in PAYLOADS:
            save_inference(tmp_path / name, model, variables, format=name)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {path: "0o750" if (tmp_path / path).is_dir() else "0o640" for path in modes}


def test_the_home_folder_is_meant(tmp_path, monkeypatch, model, variables):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_inference("~/exported", model, variables)
    assert (tmp_path / "home" / "exported" / MODEL_FILE).exists()
    assert not (tmp_path / "~").exists()
    load_inference("~/exported")
    load_inference("~/../home/exported")


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_computed(refuses, tmp_path, model, variables):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", "/proc/a"):
        with refuses(f"'{path}' cannot be "):
            save_inference(path, model, {})
    with refuses("a path must be a string or a path, not None"):
        save_inference(None, model, variables)


def test_a_runs_folder_is_told_of(refuses, tmp_path, model, variables):
    save_inference(tmp_path / "inference", model, variables)
    with refuses(f"it has no {MODEL_FILE}; this run's inference folder is '{tmp_path / 'inference'}'"):
        load_inference(tmp_path)
    shutil.rmtree(tmp_path / "inference")
    (tmp_path / "config.json").write_text("{}")
    with refuses("a run that is not finished has none yet, and python -m castling_jax convert makes one"):
        load_inference(tmp_path)
