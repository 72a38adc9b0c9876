"""Kernels, interpreted on the CPU, beside XLA: sound ones pass, and one that is broken on purpose stops the run."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.models.registry import abstract_model
from castling_jax.ops.tpu import encoder_block, linear_angular, masked_softmax
from castling_jax.training import kernel_check
from castling_jax.training.config import default_config
from castling_jax.training.run import run
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import make_mesh

KEY = jax.random.key(0)
MESH = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}


def small_config(implementation="pallas"):
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 1, "embed_dim": 16, "num_heads": 1, "patch_size": 4})
    config.model.implementation = implementation
    config.train.epochs = 1
    config.optimizer.warmup_epochs = 0.5
    config.logging.update({"progress": False, "tensorboard": False})
    return config


def calls_of(name, **arguments):
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        return kernel_check.kernel_calls([abstract_model(name, implementation="pallas", **arguments)], mesh)


@pytest.mark.slow  # interpreted kernels take long to compile
def test_sound_kernels_pass(capsys):
    kernel_check.compare_kernels(set_up(small_config()))
    said = capsys.readouterr().out
    assert re.fullmatch(r"Compared 4 kernels with XLA in .* s: the largest difference is \d+% of .*\n", said)
    assert int(re.search(r"(\d+)%", said)[1]) < 10  # of what is allowed on a TPU; a CPU's float32 is nearer


def broken(function, change):
    def kernel(*arguments, **options):
        out = function(*arguments, **options)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return kernel


@jax.custom_vjp
def wrong_backward(x):
    return x


wrong_backward.defvjp(lambda x: (x, None), lambda _, gradient: (gradient * 1.01,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "change", "said"),
    [
        (linear_angular, "linear_angular", lambda x: x.at[:, -1].set(0), ["linear_angular_attention", "the output"]),
        (linear_angular, "linear_angular", lambda x: x * jnp.nan, ["linear_angular_attention", "by nan of"]),
        (
            masked_softmax,
            "masked_softmax",
            wrong_backward,
            ["masked_softmax_attention", "in the gradient of"],
        ),
        (encoder_block, "_fused", lambda x: x.at[:, -1].set(0), ["linear_angular_block", "the output", "(x (2,"]),
    ],
    ids=["forward", "nan", "backward", "block"],
)
def test_a_broken_kernel_stops_the_run_and_leaves_nothing(tmp_path, monkeypatch, refuses, module, name, change, said):
    monkeypatch.setattr(module, name, broken(getattr(module, name), change))
    with refuses(
        "differs from XLA on this cpu", "train without the kernels, with --config.model.implementation=xla", *said
    ):
        run(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_where_no_kernel_runs_nothing_is_compared(implementation, monkeypatch, capsys):
    monkeypatch.setattr(kernel_check, "kernel_calls", None)
    kernel_check.compare_kernels(set_up(small_config(implementation)))
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_the_kernels_of_each_family_are_found():
    deit = calls_of("deit_tiny", depth=3, dtype="bfloat16")
    *attention, block, last_block = deit
    assert [call.operation for call in attention] == ["masked_softmax_attention"] + 2 * ["linear_angular_attention"]
    assert all(call.arrays["q"].shape == (2, 197, 3, 64) for call in attention)
    assert all(call.arrays["q"].dtype == jnp.bfloat16 for call in attention)
    assert block.operation == "linear_angular_block"
    assert block.arrays["x"].shape == (2, 197, 192)
    assert block.arrays["x"].dtype == jnp.bfloat16
    assert last_block == dataclasses.replace(block, options=block.options | {"needed_tokens": 1})
    levit = calls_of("levit_128s", depth=(1, 1, 1))
    # Three stages and two steps between them: each has the branch, the attention with it and without it, and the
    # inference form's. All but the branch end with Hardswish, and all but the inference form have norms.
    assert len(levit) == 20
    assert sum(call.options.get("activation") == "hard_swish" for call in levit) == 15
    assert sum("norms" in call.arrays for call in levit) == 15
    assert any(call.options.get("query_tokens") for call in levit)
    assert all(call.arrays["bias"].shape[0] == 1 for call in levit if call.operation == "masked_softmax_attention")
    mvit = calls_of("mvitv2_tiny", depths=(1, 1))
    assert any(isinstance(call.arrays.get("bias"), tuple | list) for call in mvit)
    assert not calls_of("deit_tiny", depth=1, attention="softmax")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param("levit_128s", {"depth": (1, 1, 1)}, marks=pytest.mark.slow), ("mvitv2_tiny", {"depths": (1, 1)})],
)
def test_no_weight_comes_near_the_threshold(name, arguments):
    """The softmax, in float64: half of the weights or more are kept, and none is within e^0.5 of the threshold."""
    calls = [c for c in calls_of(name, image_size=64, **arguments) if c.operation == "masked_softmax_attention"]
    for call in (calls[0], calls[-1]):  # of the most and the fewest tokens
        arrays = jax.tree.map(
            lambda x: np.asarray(x, np.float64), jax.jit(lambda key, a=call.arrays: kernel_check._draw(a, key))(KEY)
        )
        scores = np.einsum("bqhd,bkhd->bhqk", arrays["q"], arrays["k"]) / math.sqrt(arrays["q"].shape[3])
        bias = arrays.get("bias", 0)
        if isinstance(bias, tuple | list):
            bias = (bias[0][..., :, None] + bias[1][..., None, :]).reshape(scores.shape)
        weights = np.exp(scores + bias)
        weights /= weights.sum(-1, keepdims=True)
        threshold = kernel_check._threshold(scores.shape[3])
        assert np.abs(np.log(weights / threshold)).min() > 0.5
        assert (weights > threshold).mean() >= 0.5
