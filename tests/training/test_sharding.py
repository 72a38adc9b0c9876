import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from castling_jax.ops.errors import InputError
from castling_jax.training.sharding import check_batch, make_mesh, replicate, shard_batch


def test_batch_and_state_are_placed_on_the_mesh():
    mesh = make_mesh()
    batch = shard_batch({"image": np.ones((4, 2), np.float32)}, mesh)
    assert batch["image"].sharding.spec[0] == "data"
    assert replicate(np.ones(3), mesh).sharding.is_fully_replicated


def test_devices_must_divide_the_batch():
    class Mesh:
        size = 8

    check_batch("train.batch_size", 16, Mesh())
    with pytest.raises(InputError, match="config.train.batch_size = 12 must be a multiple of the 8 devices"):
        check_batch("train.batch_size", 12, Mesh())


@pytest.mark.slow
def test_four_devices_train_as_one_does():
    program = """
        import jax, numpy as np, optax
        from castling_jax.models.registry import create_model
        from castling_jax.models.variables import get_variables
        from castling_jax.training.sharding import make_mesh, replicate, shard_batch
        from castling_jax.training.state import create_state
        from castling_jax.training.step import make_train_step
        model = create_model("deit_micro", num_classes=10, depth=1)
        mesh = make_mesh()
        optimizer = optax.sgd(0.1)
        state = replicate(create_state(get_variables(model), optimizer, 0), mesh)
        rng = np.random.default_rng(0)
        batch = {"image": rng.random((8, 8, 8, 3), np.float32), "label": np.arange(8, dtype=np.int32)}
        step = make_train_step(model, optimizer, label_smoothing=0.1)
        for threshold in (0.0, 0.0, 1.0):
            state, metrics = step(state, shard_batch(batch, mesh), threshold)
        print(jax.device_count(), repr(float(metrics["loss"])))
    """
    losses = {}
    for devices in (1, 4):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        count, loss = run.stdout.split()
        losses[int(count)] = float(loss)
    # Another order of float32 sums, through three steps.
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
