"""A run's folder as a run leaves it, without the run."""

import json
import shutil

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath

from castling_jax.convert.checksums import checksums
from castling_jax.convert.run_folder import write_config
from castling_jax.training.checkpoints import Checkpoints, Progress
from castling_jax.training.config import default_config
from castling_jax.training.state import create_state
from tests.models import small

SIZES = {"embed_dim": (8, 12), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 4, "image_size": 32}


def write_run(folder, model):
    """A run of a small LeViT with checkpoints of the steps 2 and 10, whose variables are of the seeds 2 and 10."""
    folder.mkdir()
    config = default_config()
    config.model.update({"name": "levit_128s", "distilled": True, **SIZES})
    write_config(epath.Path(folder), config.to_dict())
    lines = [{"step": step, "mask_threshold": step / 40} for step in (1, 5, 10)] + [{"step": 10, "accuracy": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoints = Checkpoints(epath.Path(folder / "checkpoints"), keep=2, data={"classes": ["a", "b"]})
    for step in (2, 10):
        state = create_state(small.random_variables(model, seed=step), optax.adam(1e-3), 0)
        object.__setattr__(state, "step", jnp.int32(step))
        checkpoints.save(state, Progress(1.0, mask_threshold=step / 20))
    checkpoints.close()
    return folder


def write_averages(folder, run, variables, average):
    """A checkpoint of the step 5, as Orbax has it, with `run`'s config.json; its folder."""
    state = variables | {"ema": average}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave({"checksums": checksums(state)})}
        manager.save(5, args=ocp.args.Composite(**items))
    shutil.copy(run / "config.json", folder)
    return folder / "checkpoints" / "5"
