import importlib.util
import math
from collections import Counter

import jax
import pytest

from castling_jax.compile_report.compile import DoesNotFitError, compile_apart
from castling_jax.compile_report.dump import collectives, read_program
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import get_variables
from castling_jax.training.sharding import state_shardings, whole_over_fsdp

CASE = """
import jax, jax.numpy as jnp

def too_large():
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    return lambda x: x @ x, (x,)

def broken():
    raise RuntimeError("this is a bug")
"""


def test_missing_compiler_is_said_in_a_sentence(monkeypatch, refuses):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses("libtpu, the TPU compiler, is not installed", 'pip install "jax[tpu]"'):
        compile_apart({})


@pytest.mark.slow
def test_what_does_not_compile_is_said_in_a_sentence(tmp_path, refuses):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    file = tmp_path / "case.py"
    file.write_text(CASE)
    request = {"what": f"{file}:too_large", "options": {}, "topology": "v5e:2x2", "devices": 1}
    with pytest.raises(DoesNotFitError, match="it does not fit a device of v5e:2x2"):
        compile_apart(request)
    with refuses("there is no topology 'v5e:3x7'"):
        compile_apart(request | {"topology": "v5e:3x7"})
    with refuses("--devices must be from 0 (all) to 4"):
        compile_apart(request | {"devices": 5})
    with pytest.raises(SystemExit, match="RuntimeError: this is a bug"):
        compile_apart(request | {"what": f"{file}:broken"})


# Pods, and of each a mesh that uses every axis.
MESHES = {
    "v5e:16x16": {"replica": 2, "data": 8, "fsdp": 8, "tensor": 2},
    "v5p:4x4x4": {"replica": 2, "data": 2, "fsdp": 8, "tensor": 2},
    "v4:4x4x8": {"replica": 2, "data": 4, "fsdp": 4, "tensor": 4},
}
DEPTH, ROWS, SIZE, TOKENS = 2, 16, 32, 5  # blocks, images a device, their pixels and tokens


@pytest.mark.slow
@pytest.mark.parametrize("topology", MESHES)
def test_a_pods_step_gathers_each_parameter_once_and_nothing_else(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    sizes = MESHES[topology]
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    options = {
        **{"form": "train", "name": "deit_base", "depth": DEPTH, "image_size": SIZE},
        **{"mesh": ",".join(f"{axis}:{size}" for axis, size in sizes.items())},
        **{"batch": ROWS * mesh.size // sizes["tensor"]},
    }
    request = {"what": "model", "options": options, "topology": topology, "devices": 0}
    compiled = compile_apart(request, schedules=False)  # refuses what does not fit
    sent = collectives(read_program(compiled.hlo))

    params = get_variables(abstract_model("deit_base", depth=DEPTH, image_size=SIZE))["params"]
    split = state_shardings(params, mesh)
    trees = (jax.tree.leaves(tree) for tree in (params, split, whole_over_fsdp(split)))
    leaves = [
        (leaf.size, here.shard_shape(leaf.shape), used.shard_shape(leaf.shape))
        for leaf, here, used in zip(*trees, strict=True)
    ]
    wanted = Counter(used for _, here, used in leaves if used != here)
    gathered = [dims for found in sent if found.kind == "all-gather" for _, dims in found.arrays]
    assert Counter(tuple(map(int, dims.split(","))) for dims in gathered) == wanted

    # The axis `tensor` sums the activations of attention and MLP, forward and backward; what else is sent is gradients
    # and, of slices of the qkv kernel that do not lie where their heads do, less than the parameters.
    activations = [found for found in sent if (("bf16", f"{ROWS},{TOKENS},768") in found.arrays)]
    assert [found.kind for found in activations] == 4 * DEPTH * ["all-reduce"]
    kinds = Counter()
    for found in sent:
        kinds[found.kind] += 0 if found in activations else found.bytes
    assert kinds["all-reduce"] + kinds["reduce-scatter"] <= 4 * sum(size for size, _, _ in leaves)
    assert kinds["collective-permute"] + kinds["all-to-all"] <= kinds["all-gather"]

    # A device holds its part of the parameters and of their two moments; arrays are padded to whole registers.
    held = 3 * 4 * sum(math.prod(here) for _, here, _ in leaves)
    assert held <= compiled.memory["outputs"] <= 1.1 * held
