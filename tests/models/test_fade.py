"""A castling model whose softmax branch fades: the option `mask_kind` and all that reads it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import castling_jax
from castling_jax.compile_report.cases import load_case
from castling_jax.convert.inference_folder import save_inference
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import get_variables
from castling_jax.training import comparison, summary
from castling_jax.training.config import default_config
from castling_jax.training.export import compare_forms
from castling_jax.training.weights import teacher_model
from tests.models import small

BUILDERS = [
    small.small_model,
    *(pytest.param(build, marks=pytest.mark.slow) for build in (small.small_levit, small.small_mvit)),
]


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
def test_a_fading_model_goes_from_the_whole_softmax_to_its_inference_form(build):
    model, masked = build(mask_kind="fade"), build()
    variables = small.random_variables(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, get_variables(masked))
    images = small.random_images(2, model.spec.image_size, model.spec.image_size)

    @jax.jit
    def run(t):
        return tuple(
            castling_jax.apply(one, variables, images, mask_threshold=t, return_densities=True)
            for one in (model, masked)
        )

    (start, densities), (whole, _) = run(0.0)
    # At 0 both are the whole softmax; the fade multiplies by 1. Logits around 1 are rounded where they are fused.
    chex.assert_trees_all_close(start, whole, rtol=0, atol=1e-6)
    assert np.all(densities == 1)
    (half, densities), _ = run(0.25)
    np.testing.assert_array_equal(densities, 0.75)
    assert float(jnp.max(jnp.abs(half - start))) > 1e-2
    report = castling_jax.check_switch(model, variables, images, 0.25)
    np.testing.assert_array_equal(report["densities"], 0.75)
    assert report["max_difference_at_one"] < 1e-4 < report["max_difference"]


def test_mask_kind_is_saved_with_the_model_and_left_behind_by_nothing(tmp_path):
    model = small.small_model(mask_kind="fade")
    left = abstract_model(**model.spec.arguments(form="inference"))
    variables = castling_jax.to_inference(small.random_variables(model))
    save_inference(tmp_path / "inference", left, variables)
    read, _ = castling_jax.load_inference(tmp_path / "inference")
    assert read.spec.arguments()["mask_kind"] == "fade"
    again = abstract_model(**read.spec.arguments(form="train"))
    assert again.blocks[0].attn.core.mask_kind == "fade"
    # The threshold's own models are written as before.
    assert "mask_kind" not in small.small_model().spec.arguments()


@pytest.mark.parametrize("attention", [name for name in KINDS if name != "castling"])
def test_other_attentions_do_not_fade(refuses, attention):
    with refuses(f"mask_kind='fade' is an option of castling attention, not of '{attention}'."):
        small.small_model(attention=attention, mask_kind="fade")


def test_an_unknown_mask_kind_is_refused(refuses):
    with refuses("unknown mask_kind 'fde': did you mean 'fade'?"):
        small.small_model(mask_kind="fde")


def test_a_fading_students_teacher_of_its_own_architecture_is_softmax():
    teacher = teacher_model("deit_micro", small.small_model(mask_kind="fade"))
    assert (teacher.spec.attention, teacher.spec.arguments().get("mask_kind")) == ("softmax", None)


def test_only_castling_fades_in_a_comparison(monkeypatch, tmp_path):
    made = {}

    def run(config, workdir):
        made[config.model.attention] = config.mask.kind
        return summary.Summary(workdir, {})

    monkeypatch.setattr(comparison, "run", run)
    config = default_config()
    config.mask.kind = "fade"
    comparison.compare(config, ["softmax", "castling", "taylor"], tmp_path)
    assert made == {"softmax": "threshold", "castling": "fade", "taylor": "threshold"}


def test_the_compilers_report_compares_a_fading_configuration_with_softmax(tmp_path):
    (tmp_path / "faded.py").write_text(
        "from castling_jax.training.config import default_config\n\n\n"
        "def get_config():\n    config = default_config()\n"
        "    config.model.update(name='deit_micro', depth=1)\n    config.mask.kind = 'fade'\n    return config\n"
    )
    for attention in ("castling", "softmax"):
        options = {"config": str(tmp_path / "faded.py"), "attention": attention, "batch": 8}
        assert load_case("recipe", options, jax.devices()[:1]).facts.attention == attention


def test_the_words_are_a_fades():
    model = small.small_model(mask_kind="fade", depth=1)
    first, _ = compare_forms(model, small.random_variables(model), 0.25, small.random_images())
    assert first.startswith("at the mask fade 0.25 the two forms' outputs differ by at most ")
    assert first.endswith("softmax weights kept, by layer: 75.00%")
    history = {"step": np.arange(3), "mask_threshold": np.arange(3) / 2, "mask_density": np.ones((3, 2))}
    axes = castling_jax.plots.draw_training(history, mask_kind="fade").axes
    assert [axis.get_title() for axis in axes[2:4]] == [
        "Learning rate and mask fade",
        "Softmax branch kept by the fade",
    ]
    assert "mask fade" in {axis.get_ylabel() for axis in axes}
