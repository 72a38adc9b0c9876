import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from castling_jax.models.attention.kinds import FORMS
from castling_jax.models.registry import abstract_model, attentions_of
from castling_jax.models.variables import flatten, get_variables
from castling_jax.training import sharding
from castling_jax.training.sharding import AXES, check_batch, check_heads, make_mesh, process_rows, shard_batch
from tests.training.meshes import MESHES, RIVALS, run_case

SIZES = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}


def abstract_mesh(replica=1, data=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((replica, data, fsdp, tensor), AXES)


def specs_of(name, mesh, **arguments):
    variables = get_variables(abstract_model(name, **arguments))
    return {path: leaf.spec for path, leaf in flatten(sharding.state_shardings(variables, mesh)).items()}


def test_one_size_may_be_what_is_left():
    mesh = make_mesh(SIZES)
    assert mesh.axis_names == AXES
    assert mesh.shape["data"] == jax.device_count()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fsdp": -1}, "config.mesh needs sizes of at least 1, one of which may be -1, not replica = 1, data = -1"),
        ({"tensor": 0}, "tensor = 0"),
        ({"data": 3}, "data = 3, fsdp = 1, tensor = 1 does not make up the 1 devices"),
        ({"fsdp": 2}, "does not make up the 1 devices"),
    ],
)
def test_sizes_that_are_no_mesh_are_refused(refuses, changes, sentence):
    with refuses(sentence):
        make_mesh(SIZES | changes)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a slice, as far as a mesh looks at it; four of them are a slice."""

    id: int
    platform = device_kind = "cpu"
    process_index = 0

    @property
    def slice_index(self):
        return self.id // 4


@pytest.mark.parametrize("replica", [2, 4])
def test_a_replica_lies_within_one_slice(replica):
    mesh = make_mesh(SIZES | {"replica": replica, "fsdp": 2}, [Chip(number) for number in range(8)])
    assert mesh.shape["replica"] == replica
    slices = [{chip.slice_index for chip in part.flat} for part in mesh.devices]
    assert slices == [{number * 2 // replica} for number in range(replica)]


def test_slices_must_divide_the_replicas(refuses):
    with refuses("config.mesh.replica must be a multiple of the 2 slices, not 1"):
        make_mesh(SIZES | {"fsdp": 2}, [Chip(number) for number in range(8)])


def test_batch_is_placed_on_the_mesh():
    mesh = make_mesh(SIZES)
    images = np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = shard_batch({"image": images}, mesh, batch_size=4)
    assert batch["image"].sharding.spec == P(("replica", "data", "fsdp"))
    np.testing.assert_array_equal(batch["image"], images)
    np.testing.assert_array_equal(process_rows(4, mesh), np.arange(4))


def test_axes_must_divide_the_batch(refuses):
    mesh = abstract_mesh(data=4, fsdp=2, tensor=3)
    check_batch("config.train.batch_size", 16, mesh)
    with refuses("config.train.batch_size = 12 must be a multiple of 8: the mesh axes", "data = 4 x fsdp = 2 split it"):
        check_batch("config.train.batch_size", 12, mesh)
    with refuses("multiple of 32", "config.train.accumulate_steps = 4"):
        check_batch("config.train.batch_size", 16, mesh, parts=4)


def test_axes_must_divide_heads_and_channels(refuses):
    check_heads(abstract_model("deit_tiny"), abstract_mesh(tensor=3))
    with refuses("tensor = 2 does not divide the 3 heads of 'blocks/0/attn'"):
        check_heads(abstract_model("deit_tiny"), abstract_mesh(tensor=2))
    with refuses("tensor = 2 does not divide the 1 heads", "'stages/0"):
        check_heads(abstract_model("mvitv2_tiny"), abstract_mesh(tensor=2))
    with refuses("fsdp = 5 does not divide the 192 channels", "/kernel'", "choose another config.mesh.fsdp"):
        specs_of("deit_tiny", abstract_mesh(fsdp=5))
    with refuses("tensor = 5 does not divide the 192"):
        specs_of("deit_tiny", abstract_mesh(tensor=5))


@pytest.mark.parametrize("attention", ["castling", "softmax"])
@pytest.mark.parametrize(
    ("name", "tensor"), [("deit_base", 4), ("levit_256", 2), pytest.param("mvitv2_base", 1, marks=pytest.mark.slow)]
)
def test_rules_split_all_that_is_large(name, tensor, attention):
    mesh = abstract_mesh(fsdp=8, tensor=tensor)
    specs = specs_of(name, mesh, attention=attention)
    variables = flatten(get_variables(abstract_model(name, attention=attention)))
    whole = {path: variables[path].size for path, spec in specs.items() if spec == P(*(None,) * len(spec))}
    # What is whole on every device is vectors, tokens, positions and small convolutions: of a large model, next to
    # nothing.
    assert sum(whole.values()) < 0.02 * sum(leaf.size for leaf in variables.values())
    assert max(whole.values()) < 2e5


@pytest.mark.parametrize(
    "name", ["deit_micro", *(pytest.param(name, marks=pytest.mark.slow) for name in ("levit_128s", "mvitv2_tiny"))]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_rule(name, form):
    for attention in attentions_of(name):
        # Distilled where the family can be: with all the arrays that it may have.
        options = {} if name == "mvitv2_tiny" else {"distilled": True}
        assert specs_of(name, abstract_mesh(), attention=attention, form=form, **options)


@pytest.mark.parametrize("backbone", ["deit_tiny", "levit_128s"])
@pytest.mark.parametrize("neck", ["lc_pan", "csp_pan"])
def test_every_parameter_of_a_detector_has_a_rule(backbone, neck):
    assert specs_of("picodet_s", abstract_mesh(), backbone=backbone, neck=neck)


def test_every_parameter_of_a_masked_autoencoder_has_a_rule():
    specs = specs_of("mae", abstract_mesh(), backbone="deit_tiny")
    assert specs["params/decoder_blocks/0/mlp/fc1/kernel"] == P("fsdp", "tensor")
    assert specs["params/decoder_pred/kernel"] == P("fsdp", None)
    assert specs_of("deit_tiny", abstract_mesh(), global_pool="avg")  # what is fine-tuned from it


@pytest.mark.parametrize("backbone", ["deit_tiny", "levit_128s"])
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_a_segmenter_has_a_rule(backbone, form):
    assert specs_of("pyramid_segmenter", abstract_mesh(), backbone=backbone, form=form)


def test_a_parameter_without_a_rule_is_refused(refuses):
    leaf = jax.ShapeDtypeStruct((3, 4), "float32")
    with refuses("'params/blocks/0/attn/temperature' (3, 4) has no sharding rule", "RULES"):
        sharding.state_shardings({"params": {"blocks": {"0": {"attn": {"temperature": leaf}}}}}, abstract_mesh())


def test_the_optimisers_moments_lie_as_their_parameters():
    import optax

    from castling_jax.training.state import create_state

    variables = get_variables(abstract_model("deit_tiny"))
    state = jax.eval_shape(lambda variables: create_state(variables, optax.adamw(1e-3), 0), variables)
    shardings = sharding.state_shardings(state, abstract_mesh(fsdp=4, tensor=3))
    assert shardings.opt_state[0].mu == shardings.params == shardings.opt_state[0].nu
    assert shardings.params["blocks"]["0"]["attn"]["qkv"]["kernel"].spec == P("fsdp", "tensor")
    assert shardings.step.spec == P()


# Another order of float32 sums: a few roundings of 6e-8, and for gradients, as shares of the largest one, of the sums'
# terms, which are larger than what comes of them. The drop-path's draws and the mask are the same on every mesh.
ROUNDING = {"loss": 1e-6, "gradient_norm": 2e-6, "mask_density": 1e-6, "gradients": 5e-6, "batch_stats": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["deit", "accumulated", "erased", "pallas", "levit", "mae"])
def test_every_mesh_trains_as_one_device_does(case):
    for mesh, found in run_case(case).items():
        for name, tolerance in ROUNDING.items():
            assert found[name] <= tolerance, (mesh, name, found[name])
        assert (found["split"] > 0) == any(size > 1 for size in MESHES[mesh][3:]), mesh
        assert 0.1 < found["density"] < 0.95  # the threshold lies among the weights


@pytest.mark.slow
@pytest.mark.parametrize("case", RIVALS)
def test_modules_of_other_attentions_train_as_on_one_device(case):
    for mesh, found in run_case(case).items():
        for name in ("loss", "gradient_norm", "gradients"):
            assert found[name] <= ROUNDING[name], (mesh, name, found[name])


@pytest.mark.slow
def test_collectives_of_the_compiled_step():
    found = run_case("collectives")
    data = found["8 data"]
    assert data["sent"].keys() == {"all-reduce"}
    assert data["gradients"] <= sum(data["sent"]["all-reduce"]) <= 1.01 * data["gradients"]
    for mesh in ("8 fsdp", "4 replica x fsdp"):
        # Forward and backward may each gather a parameter; nothing else is gathered.
        assert found[mesh]["split"] <= len(found[mesh]["sent"]["all-gather"]) <= 2 * found[mesh]["split"]
        assert found[mesh]["sent"].keys() <= {"all-reduce", "all-gather", "reduce-scatter"}
