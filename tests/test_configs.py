"""Every configuration is complete and can be compiled, and one step of each family and attention runs."""

import importlib
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from castling_jax.convert.run_folder import exported_weights
from castling_jax.data.sources import Unread
from castling_jax.models.registry import create_model
from castling_jax.models.variables import get_variables
from castling_jax.training.config import check_config
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import batch_shapes, replicated, with_shardings
from castling_jax.training.state import create_state

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGENET = {"train": 1_281_167, "validation": 50_000}  # images
TRAINED = ["castling", "linear_angular", "softmax"]  # the configurations name these
SMALL = {
    "deit": {"depth": 1, "embed_dim": 32, "num_heads": 2, "image_size": 32},
    "levit": {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8, "image_size": 32},
    "mvitv2": {"depths": (1, 1), "embed_dim": 16, "image_size": 32},
}
# A block in each stage, of the full width.
ONE_BLOCK = {"deit": {"depth": 1}, "levit": {"depth": (1, 1, 1)}, "mvitv2": {"depths": (1, 1, 1, 1)}}
ONE_BLOCK |= {"levit_128s": ONE_BLOCK["levit"], "mvitv2_tiny": ONE_BLOCK["mvitv2"]}
ONE_BLOCK |= {f"deit_{size}": ONE_BLOCK["deit"] for size in ("small", "base")}


def module_of(name):
    return importlib.import_module(f"configs.{name}")


def arguments_of(name):
    """What a configuration can be asked for."""
    if name == "folder":
        return ["224", "28", "256,levit_128s,softmax"]
    if name in ("images", "masks"):
        return ["224", "28", "224,deit_small,softmax"]
    if name == "picodet":
        return ["s", "l,mvitv2_tiny,softmax"]
    variants = getattr(module_of(name), "VARIANTS", None)
    if variants is None:
        return [None]
    return [f"{variant},{attention}" for variant in variants for attention in TRAINED]


ALL = [(path.stem, argument) for path in sorted(CONFIGS.glob("[!_]*.py")) for argument in arguments_of(path.stem)]


def load(name, argument):
    module = module_of(name)
    return module.get_config() if argument is None else module.get_config(argument)


def datasets(config):
    """Of their published numbers of images and classes, with nothing in them."""
    if config.dataset.name == "imagenet2012":
        return Unread(IMAGENET["train"], 1000), Unread(IMAGENET["validation"], 1000)
    if config.model.name.startswith("picodet"):
        return Unread(118_287, 80, "boxes"), Unread(5_000, 80, "boxes")
    if config.dataset.name == "masks:PATH/ADE20K":
        return Unread(20_210, 150, "mask"), Unread(2_000, 150, "mask")
    if config.dataset.name == "images:PATH":
        return Unread(1_000, 0, "none"), Unread(100, 0, "none")
    if config.model.name == "pyramid_segmenter":
        return Unread(367, 11, "mask"), Unread(101, 11, "mask")
    return Unread(60_000, 10), Unread(10_000, 10)


@pytest.mark.parametrize(("name", "argument"), ALL)
def test_configuration_is_complete(name, argument):
    check_config(load(name, argument))
    assert f"configs/{name}.py" in module_of(name).__doc__
    assert len((CONFIGS / f"{name}.py").read_text().splitlines()) <= 60  # one screen


@pytest.mark.parametrize("name", ["levit", "deit", "deit_384", "castle_pretrained", "fashion_mnist"])
def test_the_recipes_of_levit_and_deit_export_raw_weights(name):
    expected = "averaged" if name == "fashion_mnist" else "raw"
    assert exported_weights(load(name, arguments_of(name)[0])) == expected


def test_a_teacher_has_to_be_given(refuses):
    config = load("castle_pretrained", "base")
    with refuses("config.distillation.kind = 'soft' needs a teacher: give config.distillation.teacher"):
        set_up(config, datasets=datasets(config))
    config.distillation.update(kind=None, teacher="run")
    with refuses("config.distillation.teacher = 'run' has no effect without a kind of loss: give", "(hard, soft)"):
        set_up(config, datasets=datasets(config))


def set_up_without_teacher(name, argument, **fields):
    config = load(name, argument)
    config.model.update(fields)
    config.distillation.kind = None  # whose teacher would have to be there
    return config, set_up(config, datasets=datasets(config))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), ALL)
def test_every_configuration_is_set_up(name, argument):
    config, made = set_up_without_teacher(name, argument)
    assert made.model.spec.num_classes == (datasets(config)[0].num_classes or 1)
    assert jax.tree.structure(made.state) == jax.tree.structure(made.shardings)


# A variant's program is that of the family's first, of other sizes; and a block's is that of the others in its stage.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), [one for one in ALL if one[1] in arguments_of(one[0])[: len(TRAINED)]])
def test_the_step_of_each_kind_is_lowered(name, argument):
    model = load(name, argument).model
    family = model.backbone or model.name.split("_")[0]
    decoder = {"decoder_depth": 1} if model.name == "mae" else {}
    _, made = set_up_without_teacher(name, argument, **ONE_BLOCK.get(family, {}), **decoder)
    example = made.task.example_shapes(made.model.spec.image_size)
    batch = batch_shapes(example, made.config.train.batch_size, made.mesh)
    threshold = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(made.mesh))
    with jax.set_mesh(made.mesh):
        lowered = jax.jit(made.train_step).lower(with_shardings(made.state, made.shardings), batch, threshold)
    assert "func.func public @main" in lowered.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "castling") for family in SMALL), *(("deit", other) for other in TRAINED[1:])]
)
def test_a_reduced_step_of_each_recipe_runs(family, attention):
    config = load(family, f"{next(iter(module_of(family).VARIANTS))},{attention}")
    config.model.update(SMALL[family])
    config.train.batch_size = 4
    config.evaluation.batch_size = 4
    made = set_up(config, datasets=datasets(config))
    spec = made.model.spec
    variables = get_variables(create_model(**spec.arguments()))
    state = create_state(variables, made.optimizer, 0, ema=config.train.ema_decay is not None)
    before = jax.tree.map(jnp.copy, state.params)
    images = jax.random.normal(jax.random.key(0), (4, spec.image_size, spec.image_size, 3))
    batch = {"image": images, "label": jnp.array([1, 20, 300, 999])}
    with jax.set_mesh(made.mesh):
        state, metrics = made.train_step(jax.device_put(state, made.shardings), batch, 0.02)
    chex.assert_tree_all_finite(metrics)
    assert float(metrics["loss"]) == pytest.approx(math.log(1000), rel=0.3)
    assert bool(state.ema) == (family == "levit")
    moved = [bool(jnp.any(old != new)) for old, new in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)]
    assert sum(moved) > 0.5 * len(moved)  # at the warm-up's first rate, bfloat16 gradients of some may vanish


def test_a_variant_that_there_is_not_is_refused(refuses):
    with refuses("unknown variant of DeiT 'smal': did you mean 'small'?"):
        load("deit", "smal")
    with refuses("unknown attention 'softmx'"):
        load("levit", "256,softmx")
    with refuses("VARIANT,ATTENTION and no more, not 'tiny,softmax,x'"):
        load("mvitv2", "tiny,softmax,x")
