"""Steps of segmentation on forced host devices: python -m tests.tasks.segmentation.meshes.

Prints JSON, {case: {what: largest difference from one device}}. The model is a segmenter on a small LeViT, whose batch
norm couples a batch's images. The number of pixels that have a class differs from part to part.
"""

import dataclasses
import functools
import json

# case -> (devices and the sizes of replica, data, fsdp and tensor; parts of the batch)
ONE = (1, 1, 1, 1, 1)
CASES = {
    "2 data": ((2, 1, 2, 1, 1), 1),
    "4 replica x fsdp": ((4, 2, 1, 2, 1), 1),
    "8 data": ((8, 1, 8, 1, 1), 1),
    "1 in parts": (ONE, 2),
    "8 all but replica, in parts": ((8, 1, 2, 2, 2), 2),
}
BATCH, SIZE, CLASSES = 16, 32, 4


def examples():
    """Each image comes twice, with other masks: two parts have the batch's statistics, but not its sum of weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH // 2, SIZE, SIZE, 3), np.float32)
    masks = rng.integers(0, CLASSES, (BATCH, SIZE, SIZE)).astype(np.uint8)
    masks[rng.random(masks.shape) < np.tile([0.1, 0.8], BATCH // 2)[:, None, None]] = 255
    return {"image": np.repeat(images, 2, axis=0), "mask": masks}


def segmenter():
    from castling_jax.models.registry import abstract_model

    backbone = {"embed_dim": (8, 12), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 4}
    sizes = {"head_channels": 8, "num_classes": CLASSES, "image_size": SIZE}
    return abstract_model("pyramid_segmenter", backbone="levit_128s", backbone_arguments=backbone, **sizes)


@functools.cache
def step(mesh_sizes, parts):
    """What a step makes of the same state: metrics, gradients and statistics."""
    import jax
    import numpy as np
    import optax

    from castling_jax.models.variables import flatten
    from castling_jax.tasks.segmentation.task import Segmentation
    from castling_jax.training import sharding
    from castling_jax.training.state import create_state
    from castling_jax.training.step import make_train_step
    from tests.models.small import random_variables

    devices, *sizes = mesh_sizes
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:devices])
    # Gradient descent with a rate of 1: what the parameters lose is the gradient.
    optimizer, model = optax.sgd(1.0), segmenter()
    state = create_state(jax.tree.map(np.float32, random_variables(model)), optimizer, 0)
    before = jax.tree.map(np.array, flatten(state.params))
    shardings = sharding.state_shardings(state, mesh)
    task = Segmentation(num_classes=CLASSES, dice=0.5, exif=False)
    run = make_train_step(model, optimizer, task, accumulate_steps=parts, shardings=shardings)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        batch = sharding.shard_batch(examples(), mesh, batch_size=BATCH)
        state, metrics = run(jax.device_put(dataclasses.replace(state), shardings), batch, 0.05)
    return {
        "metrics": jax.device_get(metrics),
        "gradients": {name: before[name] - np.asarray(leaf) for name, leaf in flatten(state.params).items()},
        "batch_stats": {name: np.asarray(leaf) for name, leaf in flatten(state.batch_stats).items()},
    }


def compare(mesh_sizes, parts):
    """The largest differences from one device: metrics as shares, arrays as shares of the kind's largest number."""
    import numpy as np

    one, other = step(ONE, 1), step(mesh_sizes, parts)
    answer = {}
    for kind in ("gradients", "batch_stats"):
        largest = max(np.abs(array).max() for array in one[kind].values())
        differences = [np.abs(other[kind][name] - array).max() / largest for name, array in one[kind].items()]
        answer[kind] = float(max(differences))
    names = ("loss", "cross_entropy_loss", "dice_loss", "gradient_norm")
    return answer | {name: float(abs(other["metrics"][name] / one["metrics"][name] - 1)) for name in names}


if __name__ == "__main__":
    print(json.dumps({case: compare(*arguments) for case, arguments in CASES.items()}))
