"""Trains steps on forced host devices, in a process of its own: python -m tests.training.meshes CASE.

Prints JSON; `run_case` starts it and reads that.
"""

import functools
import json
import os
import subprocess
import sys

DEVICES = 8
# name -> (devices, replica, data, fsdp, tensor)
MESHES = {
    "1": (1, 1, 1, 1, 1),
    "2 data": (2, 1, 2, 1, 1),
    "4 replica x fsdp": (4, 2, 1, 2, 1),
    "8 data": (8, 1, 8, 1, 1),
    "8 fsdp": (8, 1, 1, 8, 1),
    "8 data x tensor": (8, 1, 4, 1, 2),
    "8 all but replica": (8, 1, 2, 2, 2),
    "8 all but data": (8, 2, 1, 2, 2),
}
FAMILIES: dict[str, dict] = {
    "deit": {"name": "deit_micro", "depth": 2, "drop_path_rate": 0.3},
    "pallas": {"name": "deit_micro", "depth": 1, "implementation": "pallas"},
    "plain": {"name": "deit_micro", "depth": 1},
    "erased": {"name": "deit_micro", "depth": 1},  # uint8 images with erased boxes
    "levit": {
        **{"name": "levit_128s", "image_size": 32, "embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 4)},
        **{"key_dim": 8, "distilled": True},
    },
}
FAMILIES["mae"] = {
    **{"name": "mae", "backbone": "deit_micro", "image_size": 16, "backbone_arguments": {"depth": 1}},
    **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}
RIVALS = ("bridge", "convolutional", "separable", "window")
FAMILIES |= {kind: {"name": "deit_micro", "depth": 2, "attention": kind, "window_size": 3} for kind in RIVALS}
BATCH = 16


def run_case(name: str) -> dict:
    """What a case finds."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.meshes", name],
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def steps(family: str, mesh_name: str, *, accumulate_steps: int = 1, threshold: float = 0.055) -> dict:
    """Loss, gradients' norm and densities of a step, its gradients and what batch norm learns, as numpy arrays."""
    import jax
    import numpy as np
    import optax

    from castling_jax.models.registry import create_model
    from castling_jax.models.variables import flatten, get_variables
    from castling_jax.preprocessing import Preprocessing
    from castling_jax.tasks.classification.task import Classification
    from castling_jax.tasks.reconstruction.task import Reconstruction
    from castling_jax.training import sharding
    from castling_jax.training.state import create_state
    from castling_jax.training.step import make_train_step

    devices, *sizes = MESHES[mesh_name]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:devices])
    model = create_model(num_classes=10, **FAMILIES[family])
    # Gradient descent with a rate of 1: what the parameters lose is the gradient.
    optimizer = optax.sgd(1.0)
    state = create_state(get_variables(model), optimizer, 0)
    before = jax.tree.map(np.array, flatten(state.params))
    shardings = sharding.state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    size = model.spec.image_size
    rng = np.random.default_rng(0)
    batch = {"image": rng.standard_normal((BATCH, size, size, 3), np.float32), "label": np.arange(BATCH) % 10}
    task = Classification(num_classes=10, label_smoothing=0.1)
    if family == "mae":
        task = Reconstruction(patch_size=2, norm_pix_loss=True)
    if family == "erased":
        batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
        batch["erased"] = rng.integers(1, 4, (BATCH, 4)).astype(np.int32)
    options = {"preprocessing": Preprocessing(size), "accumulate_steps": accumulate_steps, "shardings": shardings}
    step = make_train_step(model, optimizer, task, **options)
    with jax.set_mesh(mesh):
        state, metrics = step(state, sharding.shard_batch(batch, mesh, batch_size=BATCH), threshold)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    return {
        "metrics": jax.device_get(metrics),
        "gradients": {name: before[name] - np.asarray(leaf) for name, leaf in flatten(state.params).items()},
        "batch_stats": {name: np.asarray(leaf) for name, leaf in flatten(state.batch_stats).items()},
        "split": split,
    }


def compare(family: str, meshes: list[str], **options) -> dict:
    """The largest differences from one device: of the loss and the norm as shares, of each array's, of its largest."""
    import numpy as np

    expected = steps(family, "1", **{name: value for name, value in options.items() if name != "accumulate_steps"})
    answer = {}
    for mesh in meshes:
        got = steps(family, mesh, **options)

        def share(kind: str, got: dict = got) -> float:
            # Of the largest gradient of all: shifts that a batch norm takes away have none but rounding.
            largest = max(np.abs(array).max() for array in expected[kind].values()) if expected[kind] else 1
            return max(
                (float(np.abs(got[kind][name] - expected[kind][name]).max() / largest) for name in got[kind]), default=0
            )

        metrics = {
            name: float(np.abs(got["metrics"][name] / np.maximum(expected["metrics"][name], 1e-30) - 1).max())
            for name in expected["metrics"]
        }
        answer[mesh] = metrics | {
            "gradients": share("gradients"),
            "batch_stats": share("batch_stats"),
            "split": got["split"],
            "density": float(np.mean(got["metrics"]["mask_density"])),
        }
    return answer


def collectives(mesh_name: str, family: str = "deit") -> dict:
    """Bytes of the gradients, and of each collective's result in the compiled step: {kind: [bytes, ...]}."""
    import jax
    import jax.numpy as jnp
    import optax

    from castling_jax.compile_report import dump
    from castling_jax.models.registry import abstract_model
    from castling_jax.models.variables import get_variables
    from castling_jax.preprocessing import Preprocessing
    from castling_jax.tasks.classification.task import Classification
    from castling_jax.training import sharding
    from castling_jax.training.state import create_state
    from castling_jax.training.step import make_train_step

    devices, *sizes = MESHES[mesh_name]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:devices])
    model = abstract_model(num_classes=10, **FAMILIES[family])
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda variables: create_state(variables, optimizer, 0), get_variables(model))
    shardings = sharding.state_shardings(state, mesh)

    task = Classification(num_classes=10, label_smoothing=0.1, erases=True)  # noise needs no communication
    batch = sharding.batch_shapes(task.example_shapes(model.spec.image_size), BATCH, mesh)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)
    preprocessing = Preprocessing(model.spec.image_size)
    step = make_train_step(model, optimizer, task, preprocessing=preprocessing, shardings=shardings)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(sharding.with_shardings(state, shardings), batch, threshold)
    sent: dict[str, list[int]] = {}
    for found in dump.collectives(dump.read_program(lowered.compile().as_text())):
        sent.setdefault(found.kind, []).append(found.bytes)
    matrices = [leaf for leaf in jax.tree.leaves(shardings.params) if not leaf.is_fully_replicated]
    return {
        "gradients": sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)),
        "split": len(matrices),
        "sent": sent,
    }


CASES = {
    "deit": functools.partial(compare, "deit", [mesh for mesh in MESHES if mesh != "1"]),
    "accumulated": functools.partial(compare, "plain", ["1", "8 data"], accumulate_steps=2),
    "erased": functools.partial(compare, "erased", ["8 data", "4 replica x fsdp", "8 all but replica"]),
    "pallas": functools.partial(compare, "pallas", ["8 data", "8 all but replica"]),
    "mae": functools.partial(compare, "mae", ["2 data", "4 replica x fsdp", "8 all but replica"]),
    "levit": functools.partial(compare, "levit", ["4 replica x fsdp", "8 all but replica"]),
    **{kind: functools.partial(compare, kind, ["8 all but replica"]) for kind in RIVALS},
    "collectives": lambda: {mesh: collectives(mesh) for mesh in ("8 data", "8 fsdp", "4 replica x fsdp")},
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]()))
