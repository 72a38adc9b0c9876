"""Models on meshes of four devices, whatever their axes' types: the same numbers as on one device."""

import pytest

from tests.models.meshes import meshes_of, run_case, run_on_devices

# Shares of each array's largest number. Devices sum in another order: float32's rounding, 6e-8, through some tens of
# operations; in LeViT also through batch norms over 4 images, whose deviations are small beside what is subtracted.
ROUNDING = {"deit": 3e-6, "levit": 2e-5, "mvitv2": 1e-5}
# Three steps of gradient descent at a rate of 0.1, from random weights, multiply the rounding of each step before.
AFTER_STEPS = {"deit": 1e-5, "levit": 4e-4}
BFLOAT16 = 2e-2  # 2^-9 of each of some tens of roundings, where sums in another order fall on another side


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "levit", "mvitv2"])
@pytest.mark.parametrize("case", ["forward", "around"])
def test_a_model_on_a_mesh_is_the_model(case, family):
    for what, found in run_case(case, family).items():
        assert found.keys() == set(meshes_of(family, "around" if case == "around" else what))
        for mesh, difference in found.items():
            limit = 0 if what == "layout" else BFLOAT16 if what == "bfloat16" else ROUNDING[family]
            assert difference <= limit, (what, mesh, difference)


@pytest.mark.slow
def test_a_detector_on_a_mesh_is_the_detector():
    for what, found in run_case("detect", "picodet").items():
        assert found.keys() == set(meshes_of("picodet", what))
        assert max(found.values()) <= ROUNDING["levit"], (what, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convolution", "deit", "levit", "mvitv2", "picodet"])
def test_gradients_where_an_axis_splits_nothing(family):
    """XLA multiplies the gradient of a depthwise convolution's kernel by that axis' size, here 2."""
    found = run_case("replicated", family)["replicated"]
    assert found.keys() == ({"Auto", "Explicit"} if family in ("convolution", "deit") else {"Explicit"})
    # Shares of a norm are of rounding; gradients that cancel to near zero, as a key's bias', have more of it.
    assert all(share < 1e-2 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "levit"])
def test_a_loop_of_ones_own(family):
    found = run_case("own_loop", family)["own_loop"]
    for mesh, difference in found.items():
        assert difference <= AFTER_STEPS[family], (mesh, difference)
    # The compiler splits the same program: Explicit axes add nothing of their own.
    assert len(set(found.values())) == 1, found


# MViTv2's functions are those of the others here, and its layers run on such a mesh above.
SMALL = {
    "deit_micro": ["depth=1"],
    "levit_128s": ["embed_dim=[16,24]", "depth=[1,1]", "num_heads=[2,2]", "key_dim=8", "image_size=64"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_what_a_notebook_writes(name):
    run_on_devices(2, "tests.models.notebook", name, *SMALL[name])
