"""What a wheel has in it, and that it works without the checkout."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_wheel_has_every_package():
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for path in (ROOT / "castling_jax").rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(names | {"castling_jax.configs"}) == described


TEN_LINES = """
import castling_jax
from sklearn.datasets import load_digits
config = castling_jax.load_config("digits")
config.train.epochs = 1
summary = castling_jax.train(config, "run")
castled = castling_jax.to_inference(castling_jax.convert.read("run").variables)
model, variables = castling_jax.load_inference("digits")
images = [(image * 255 / 16).astype("uint8") for image in load_digits().images[:5]]
print([answer[0][0] for answer in castling_jax.predict("digits", images)], summary.figures["steps"])
"""


@pytest.mark.slow
def test_a_wheel_alone_trains_castles_and_predicts(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", f"--target={tmp_path}", str(ROOT)], check=True)
    program = """
import castling_jax, castling_jax.configs.deit_384
from castling_jax.training.config_files import CONFIGS, load_config
print(castling_jax.__file__, CONFIGS, castling_jax.configs.deit_384.get_config("small").model.name)
print(load_config("levit:128s,softmax").model.name)
"""
    alone = {"env": {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": ""}, "cwd": tmp_path}
    commands = [["-c", program], [str(tmp_path / "bin" / "castling-jax"), "train", "--config=digits", "--check"]]
    commands += [["-c", TEN_LINES]]
    printed, checked, answers = (
        subprocess.run([sys.executable, "-P", *command], **alone, capture_output=True, text=True, check=True).stdout
        for command in commands
    )
    folder = tmp_path / "castling_jax"
    assert printed == f"{folder}/__init__.py {folder}/configs deit_small\nlevit_128s\n"
    assert checked == "The configuration is valid.\n"
    assert answers == "['0', '1', '2', '3', '4'] 22\n"
