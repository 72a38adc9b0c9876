"""Every configuration is complete and can be compiled, and one step of each family and attention runs."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from castling_jax.data.sources import Dataset
from castling_jax.models.attention import ATTENTIONS
from castling_jax.training import setup
from castling_jax.training.config import check_config
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import batch_sharding, replicated, with_shardings

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGENET = {"train": 1_281_167, "validation": 50_000}  # images
FAMILIES = ["deit", "levit", "mvitv2"]
TRAINED = [attention for attention in ATTENTIONS if attention != "angular"]  # what there are recipes for
SMALL = {
    "deit": {"depth": 1, "embed_dim": 32, "num_heads": 2, "image_size": 32},
    "levit": {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8, "image_size": 32},
    "mvitv2": {"image_size": 64},
}


def module_of(name):
    return importlib.import_module(f"configs.{name}")


def arguments_of(name):
    """What a configuration can be asked for."""
    variants = getattr(module_of(name), "VARIANTS", None)
    if variants is None:
        return [None]
    return [f"{variant},{attention}" for variant in variants for attention in TRAINED]


ALL = [
    (path.stem, argument)
    for path in sorted(CONFIGS.glob("*.py"))
    if path.stem not in ("__init__", "imagenet")
    for argument in arguments_of(path.stem)
]


def load(name, argument):
    module = module_of(name)
    return module.get_config() if argument is None else module.get_config(argument)


class Blank(Dataset):
    """As many blank images as ImageNet has, of no size in memory."""


@pytest.fixture
def datasets(monkeypatch):
    """Datasets of their published numbers of images and classes, with nothing in them."""

    class Sized:
        def __init__(self, length, num_classes):
            self._length, self.num_classes = length, num_classes

        def __len__(self):
            return self._length

    def load_dataset(name, split, **_):
        if name == "imagenet2012":
            return Sized(IMAGENET[split], 1000)
        return Sized(60_000, 10)

    monkeypatch.setattr(setup, "load_dataset", load_dataset)


@pytest.mark.parametrize(("name", "argument"), ALL)
def test_configuration_is_complete(name, argument):
    module = module_of(name)
    check_config(load(name, argument))
    assert f"configs/{name}.py" in module.__doc__
    assert len((CONFIGS / f"{name}.py").read_text().splitlines()) <= 50  # one screen


def lower(config):
    """The training step, traced and lowered for the batch it is made for."""
    made = set_up(config)
    size = made.model.spec.image_size
    rows = batch_sharding(made.mesh)
    shape = (config.train.batch_size, size, size, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    threshold = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(made.mesh))
    with jax.set_mesh(made.mesh):
        return jax.jit(made.train_step).lower(with_shardings(made.state, made.shardings), batch, threshold)
