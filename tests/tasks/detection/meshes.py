"""Steps of detection on forced host devices: python -m tests.tasks.detection.meshes.

Prints JSON, {case: {what: largest difference from one device}}.

Compiling a detector's gradients takes half a minute, so two linear layers over each point's pixels stand in for it;
tests/models/meshes.py has PicoDet's own gradients on meshes. As in a detector, batch norm couples a batch's images.
"""

import dataclasses
import functools
import json

# case -> (devices and the sizes of replica, data, fsdp and tensor; parts of the batch; whether the head is legacy)
ONE = (1, 1, 1, 1, 1)
CASES = {
    "2 data": ((2, 1, 2, 1, 1), 1, False),
    "4 replica x fsdp": ((4, 2, 1, 2, 1), 1, False),
    "8 data": ((8, 1, 8, 1, 1), 1, False),
    "1 in parts": (ONE, 2, False),
    "8 all but replica, in parts": ((8, 1, 2, 2, 2), 2, False),
    "8 data, legacy": ((8, 1, 8, 1, 1), 1, True),
}
TAL_STEP = 1
BATCH, SIZE, CLASSES, BOXES, WIDTH = 16, 160, 4, 5, 16


def examples():
    """Each image comes twice, with other boxes: two parts have the batch's statistics, but not its sum of weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH // 2, SIZE, SIZE, 3), np.float32)
    corners = rng.uniform(0, 110, (BATCH, BOXES, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 50, (BATCH, BOXES, 2))], axis=-1)
    return {
        "image": np.repeat(images, 2, axis=0),
        "boxes": boxes.astype(np.float32),
        "classes": rng.integers(0, CLASSES, (BATCH, BOXES)).astype(np.int32),
        "valid": rng.random((BATCH, BOXES)) < np.tile([0.9, 0.3], BATCH // 2)[:, None],
    }


def variables():
    import numpy as np

    rng = np.random.default_rng(1)
    layers = {"patch_embed": {"proj": (12, WIDTH)}, "head": (WIDTH, 2 * CLASSES + 32)}

    def drawn(shape):
        return {"kernel": rng.standard_normal(shape, np.float32), "bias": rng.standard_normal(shape[1], np.float32)}

    params = {"patch_embed": {"proj": drawn(layers["patch_embed"]["proj"])}, "head": drawn(layers["head"])}
    return {"params": params, "batch_stats": {"norm": {"mean": np.zeros(WIDTH, np.float32)}}}


def forward_train(model, variables, images, *, mask_threshold, key):
    """Stands in for a detector's outputs, densities and new statistics."""
    import jax
    import jax.numpy as jnp

    from castling_jax.ops.points import STRIDES, decode_boxes, level_points

    params = variables["params"]
    levels = []
    for stride in STRIDES:
        padded = jnp.pad(images, ((0, 0), (0, -SIZE % stride), (0, -SIZE % stride), (0, 0)))
        rows = padded.shape[1] // stride
        # The means of a cell's quarters.
        cells = padded.reshape(len(images), rows, 2, stride // 2, rows, 2, stride // 2, 3).mean((3, 6))
        levels.append(cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), rows * rows, 12) * (stride / 4))
    x = _linear(jnp.concatenate(levels, axis=1), params["patch_embed"]["proj"])
    mean = x.mean((0, 1))
    x = _linear(jnp.tanh((x - mean) / jnp.sqrt(x.var((0, 1)) + 1e-5)), params["head"])
    logits, align, bins = x[..., :CLASSES], x[..., CLASSES : 2 * CLASSES], x[..., 2 * CLASSES :]
    points, strides, _ = level_points(SIZE)
    scores = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(align) + 1e-9)
    outputs = {"cls_logits": logits, "scores": scores, "reg_logits": bins, "boxes": decode_boxes(bins, points, strides)}
    return outputs, jnp.zeros(1), {"norm": {"mean": 0.9 * variables["batch_stats"]["norm"]["mean"] + 0.1 * mean}}


def _linear(x, layer):
    return x @ layer["kernel"] + layer["bias"]


@functools.cache
def steps(mesh_sizes, parts, legacy):
    """What a step with ATSS and one with TAL make of the same state: metrics, gradients and statistics."""
    import jax
    import numpy as np
    import optax

    from castling_jax.models.variables import flatten
    from castling_jax.training import sharding
    from castling_jax.training.state import create_state
    from castling_jax.training.step import make_train_step
    from tests.tasks.detection.test_task import task

    devices, *sizes = mesh_sizes
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:devices])
    # Gradient descent with a rate of 1: what the parameters lose is the gradient.
    optimizer = optax.sgd(1.0)
    state = create_state(variables(), optimizer, 0)
    before = jax.tree.map(np.array, flatten(state.params))
    shardings = sharding.state_shardings(state, mesh)
    detection = task(num_classes=CLASSES, tal_step=TAL_STEP, legacy=legacy, max_boxes=BOXES)
    step = make_train_step(None, optimizer, detection, accumulate_steps=parts, shardings=shardings)
    found = {}
    for number in range(1 if legacy else 2):
        state = dataclasses.replace(create_state(variables(), optimizer, 0), step=np.int32(number))
        state = jax.device_put(state, shardings)
        with jax.set_mesh(mesh):
            state, metrics = step(state, sharding.shard_batch(examples(), mesh, batch_size=BATCH), 0.05)
        found[number] = {
            "metrics": jax.device_get(metrics),
            "gradients": {name: before[name] - np.asarray(leaf) for name, leaf in flatten(state.params).items()},
            "batch_stats": {name: np.asarray(leaf) for name, leaf in flatten(state.batch_stats).items()},
        }
    return found


def compare(mesh_sizes, parts, legacy):
    """The largest differences from one device: metrics as shares, arrays as shares of the kind's largest number."""
    import numpy as np

    expected, got = steps(ONE, 1, legacy), steps(mesh_sizes, parts, legacy)
    answer = {}
    for number, one in expected.items():
        other = got[number]
        for kind in ("gradients", "batch_stats"):
            largest = max(np.abs(array).max() for array in one[kind].values())
            differences = [np.abs(other[kind][name] - array).max() / largest for name, array in one[kind].items()]
            answer[f"{kind} {number}"] = float(max(differences))
        names = ("loss", "varifocal_loss", "giou_loss", "dfl_loss", "gradient_norm")
        answer |= {f"{name} {number}": float(abs(other["metrics"][name] / one["metrics"][name] - 1)) for name in names}
    return answer


if __name__ == "__main__":
    from castling_jax.training import step as step_module

    step_module.forward_train = forward_train
    print(json.dumps({case: compare(*arguments) for case, arguments in CASES.items()}))
