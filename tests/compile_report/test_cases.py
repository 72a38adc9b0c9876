import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from castling_jax.compile_report.cases import CHANNELS, HEADS, load_case, read_mesh
from castling_jax.models.attention.core import Places
from castling_jax.models.attention.heads import MultiHeadAttention
from castling_jax.models.attention.kinds import make_core
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import get_variables
from tests.models import small


def draw(tree):
    """The tree's shapes, filled in float32."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * random.normal(size=leaf.shape), jnp.float32), tree)


@pytest.mark.parametrize(
    ("attention", "form"),
    [("castling", "train"), ("castling", "inference"), ("linear_angular", "inference"), ("softmax", "inference")],
)
def test_layer_is_the_models_attention(attention, form):
    case = load_case("layer", {"form": form, "tokens": 5, "batch": 2, "attention": attention}, [])
    weights, x, *cotangent = draw(case.arguments[:-1])
    threshold = jnp.float32(0.2)
    core = make_core(attention, form, token_conv="1d")
    module = MultiHeadAttention(CHANNELS, HEADS, core, small.layers(), qkv_bias=True)
    for part in ("kernel", "bias"):
        getattr(module.qkv, part)[...] = jnp.concatenate([weights[name][part] for name in "qkv"], axis=-1)
        getattr(module.proj, part)[...] = weights["proj"][part]
    if attention != "softmax":
        module.token_kernel[...] = weights["token_kernel"]
    expected, _ = jax.jit(lambda x: module(x, places=Places((1, 5), 0), mask_threshold=threshold))(x)
    out = jax.jit(lambda *arguments: jax.tree.leaves(case.function(*arguments))[0])(weights, x, *cotangent, threshold)
    # Sums of 768 products in float32, in another order.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_layer_in_training_gives_all_gradients():
    case = load_case("layer", {"form": "train", "tokens": 5, "batch": 2}, [])
    weights, x, _, _ = case.arguments
    out, gradients = jax.eval_shape(case.function, *case.arguments)
    assert out == x
    assert gradients == (weights, x)


def test_model_in_inference_gives_logits():
    case = load_case("model", {"name": "deit_micro", "batch": 3, "image_size": 16}, [])
    variables, _ = case.arguments
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(case.function, *case.arguments) == jax.ShapeDtypeStruct((3, 1000), jnp.float32)


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"name": "picodet_s", "image_size": 160}, {"backbone": "levit_128s"}),
        (
            {"name": "pyramid_segmenter", "image_size": 32, "depth": 1, "remat": True},
            {"backbone": "deit_tiny", "backbone_arguments": (("depth", 1), ("remat", True))},
        ),
        (
            {"name": "mae", "image_size": 32, "depth": 1},
            {"backbone": "deit_base", "backbone_arguments": (("depth", 1),)},
        ),
    ],
)
def test_models_on_a_backbone_are_compiled_too(options, overrides):
    forward = load_case("model", options, []).function
    (model,) = forward.args
    assert dict(model.spec.overrides) == {"backbone_arguments": ()} | overrides
    step = load_case("model", options | {"form": "train", "batch": 2}, [])
    assert step.arguments[0].params.keys() == get_variables(model)["params"].keys()


def test_model_in_training_makes_a_step_of_any_threshold():
    case = load_case("model", {"name": "deit_micro", "batch": 3, "form": "train"}, [])
    traced = jax.jit(case.function, **case.jit_options).trace(*case.arguments)
    state, figures = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info)
    assert state == case.arguments[0]
    assert figures.keys() == {"loss", "gradient_norm", "mask_density"}
    # The threshold is no constant of the program.
    jaxpr = traced.jaxpr.jaxpr
    assert jaxpr.invars[-1] in [variable for equation in jaxpr.eqns for variable in equation.invars]


def test_step_of_a_mesh_has_its_state_and_its_batch_on_it():
    options = {"name": "deit_micro", "depth": 1, "batch": 3, "form": "train", "mesh": "data:-1"}
    case = load_case("model", options, jax.devices()[:1])
    assert dict(case.mesh.shape) == {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
    state, batch, threshold = case.arguments
    assert state.params["blocks"].keys() == {"0"}
    assert state.opt_state[0].mu["blocks"]["0"]["attn"]["qkv"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(batch)} == {P(("replica", "data", "fsdp"))}
    assert threshold.sharding.spec == P()


def test_sizes_of_a_mesh():
    assert read_mesh("data:64,fsdp:-1") == {"replica": 1, "data": 64, "fsdp": -1, "tensor": 1}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(
            """
            import jax

            X = jax.ShapeDtypeStruct((2,), "float32")

            def plain():
                return lambda x: x + 1, (X,)

            def with_options():
                return lambda x: x + 1, (X,), {"donate_argnums": 0}

            def with_devices(devices):
                return lambda x: x + len(devices), (X,)

            def wrong():
                return X
            """
        )
    )
    return path


def test_function_of_a_file(file):
    case = load_case(f"{file}:plain", {}, ["a", "b"])
    assert case.function(1) == 2
    assert case.arguments[0].shape == (2,)
    assert not case.jit_options
    assert case.mesh is None
    assert load_case(f"{file}:with_options", {}, []).jit_options == {"donate_argnums": 0}
    assert load_case(f"{file}:with_devices", {}, ["a", "b"]).function(1) == 3


def test_cases_that_do_not_exist_are_refused(file, refuses):
    with refuses("there is no file 'other.py'"):
        load_case("other.py:plain", {}, [])
    with refuses("unknown function", "'plane'", "did you mean 'plain'?"):
        load_case(f"{file}:plane", {}, [])
    with refuses("mine.py:wrong must return (function, arguments)"):
        load_case(f"{file}:wrong", {}, [])


def test_options_that_do_not_fit_are_refused(file, refuses):
    with refuses("--tokens is an option of layer and model"):
        load_case(f"{file}:plain", {"tokens": 3}, [])
    with refuses("unknown option of model 'tokens'"):
        load_case("model", {"tokens": 3}, [])
    with refuses("unknown form 'training'", "did you mean 'train'?"):
        load_case("layer", {"form": "training"}, [])
    with refuses("--batch must be at least 1, not 0"):
        load_case("layer", {"batch": 0}, [])
    with refuses("there are no Pallas kernels of softmax attention"):
        load_case("layer", {"attention": "softmax", "implementation": "pallas"}, [])
    with refuses("unknown axis of --mesh 'dat'", "did you mean 'data'?"):
        load_case("model", {"form": "train", "mesh": "dat:2"}, [])
    for mesh in ("data", "data:", "data:2,data:2", "fsdp:two"):
        with refuses("--mesh names each axis once, with its size", repr(mesh)):
            load_case("model", {"name": "deit_micro", "form": "train", "mesh": mesh}, [])
    with refuses("--mesh splits the training step: it needs --form=train"):
        load_case("model", {"mesh": "data:2"}, [])
    with refuses("data = 2, fsdp = 1, tensor = 1 does not make up the 1 devices"):
        load_case("model", {"name": "deit_micro", "form": "train", "mesh": "data:2"}, jax.devices()[:1])
    with refuses("unknown option of model 'devices'"):
        load_case("model", {"devices": 2}, [])
    with refuses("unknown model 'deit_bass'", "did you mean 'deit_base'?"):
        load_case("model", {"name": "deit_bass"}, [])


def test_a_configurations_step_is_the_one_that_main_runs():
    case = load_case("recipe", {"config": "configs/digits.py", "batch": 8}, jax.devices()[:1])
    assert case.facts.images == case.facts.images_per_device == 8
    assert case.facts.assumed == []
    state, batch, *_ = case.arguments
    assert case.held["parameters"] is state.params
    assert batch["image"].shape == (8, 8, 8, 3)
    with jax.set_mesh(case.mesh):
        new, metrics = jax.eval_shape(case.function, *case.arguments)
    chex.assert_trees_all_equal_shapes(new.params, state.params)
    assert metrics["loss"].shape == ()


def test_a_configurations_inference_is_of_the_form_without_softmax():
    options = {"config": "configs/digits.py", "form": "inference", "attention": "softmax", "image_size": 16, "batch": 4}
    case = load_case("recipe", options, jax.devices()[:1])
    assert (case.facts.attention, case.facts.image_size) == ("softmax", 16)
    assert jax.eval_shape(case.function, *case.arguments).shape == (4, 10)


def test_a_configurations_fields_are_overridden():
    options = {"config": "digits", "fields": ["--config.train.batch_size=12", "--config.model.depth=1"]}
    case = load_case("recipe", options, jax.devices()[:1])
    assert case.facts.images == 12
    assert list(case.arguments[0].params["blocks"]) == ["0"]


def test_data_that_is_not_here_is_of_its_published_size(monkeypatch, refuses, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = tmp_path / "configs" / "absent.py"
    config.parent.mkdir()
    text = """
from castling_jax.training.config import (default_config)

def get_config():
    config = default_config()
    config.model.name = "deit_micro"
    config.dataset.update({"name": "imagenet2012", "eval_split": "validation", "data_dir": "/nowhere"})
    return config
"""
    config.write_text(text)
    case = load_case("recipe", {"config": str(config), "batch": 4}, jax.devices()[:1])
    assert "1,281,167 images and 1,000 classes" in case.facts.assumed[0]
    config.write_text(text.replace("imagenet2012", "emnist"))
    with refuses("emnist"):
        load_case("recipe", {"config": str(config), "batch": 4}, jax.devices()[:1])


@pytest.mark.slow
def test_a_teacher_is_compiled_with_the_step_and_not_read():
    options = {"config": "configs/castle_pretrained.py:small", "batch": 1}
    case = load_case("recipe", options, jax.devices()[:1])
    plain = abstract_model("deit_small", attention="softmax", form="inference")
    chex.assert_trees_all_equal_shapes_and_dtypes(case.held["teacher"], get_variables(plain))
    assert any("the teacher is deit_small with softmax attention" in sentence for sentence in case.facts.assumed)
    with jax.set_mesh(case.mesh):
        jaxpr = jax.make_jaxpr(case.function)(*case.arguments)
    taught = len(jax.tree.leaves(case.held["teacher"]))
    used = {variable for equation in jaxpr.eqns for variable in equation.invars}
    assert set(jaxpr.jaxpr.invars[-taught:]) <= used
    inference = load_case("recipe", options | {"form": "inference"}, jax.devices()[:1])
    assert not any("teacher" in sentence for sentence in inference.facts.assumed)


def test_a_pod_that_main_would_refuse_to_evaluate_on_is_told(tmp_path):
    config = tmp_path / "configs" / "few.py"
    config.parent.mkdir()
    text = Path("configs/digits.py").read_text()
    config.write_text(text.replace("    return config", "    config.evaluation.batch_size = 3\n    return config"))
    options = {"config": str(config), "batch": 4}
    assert load_case("recipe", options, jax.devices()[:1]).facts.assumed == []
    (said,) = load_case("recipe", options, 2 * jax.devices()[:1]).facts.assumed
    assert "main.py would refuse to evaluate: config.evaluation.batch_size = 3 must be a multiple of 2" in said
