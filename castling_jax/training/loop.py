"""Training from a configuration to a finished run, resumable at any moment."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from castling_jax.convert.files import save_inference, write_atomically
from castling_jax.data.loader import training_batches
from castling_jax.data.sources import load_dataset
from castling_jax.models.registry import create_model
from castling_jax.models.variables import get_variables
from castling_jax.ops.errors import InputError
from castling_jax.training.checkpoints import CHECKPOINTS, Checkpoints, Progress
from castling_jax.training.config import CONFIG_FILE, check_config, check_same_run, model_arguments
from castling_jax.training.evaluate import make_evaluator
from castling_jax.training.metrics import MetricsWriter
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.restore import checkpoint_steps, initial_variables
from castling_jax.training.schedules import learning_rate_schedule, mask_threshold_schedule
from castling_jax.training.sharding import check_batch, make_mesh, replicate, shard_batch
from castling_jax.training.state import create_state, parameters_sha256
from castling_jax.training.step import make_train_step


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the training that `config` describes, or what is left of it, in `workdir`.

    The same command, started again after a run was killed at any moment, goes on from the last checkpoint and ends
    with the same parameters as a run that was not killed.

    Args:
      config: as `default_config` gives it.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, inference/.

    Returns:
      The figures of the last evaluation, and steps, train_seconds, parameters_sha256.

    Raises:
      InputError: a field, a name or a size is wrong, or workdir holds another configuration's run; or the loss is no
        longer finite.
    """
    # The order is important. 1. Everything that can be refused is refused before the first file is written.
    check_config(config)
    if (workdir / CONFIG_FILE).exists():
        check_same_run(config, workdir / CONFIG_FILE)
    mesh = make_mesh()
    check_batch("train.batch_size", config.train.batch_size, mesh)
    check_batch("evaluation.batch_size", config.evaluation.batch_size, mesh)
    train_set = load_dataset(config.dataset.name, config.dataset.train_split)
    eval_set = load_dataset(config.dataset.name, config.dataset.eval_split)
    batches = training_batches(
        train_set,
        batch_size=config.train.batch_size,
        seed=config.seed,
        shift_pixels=config.dataset.shift_pixels,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps_per_epoch = len(train_set) // config.train.batch_size
    total_steps = config.train.epochs * steps_per_epoch
    learning_rate = learning_rate_schedule(config.optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    threshold_at = mask_threshold_schedule(config.mask, total_steps=total_steps)
    model = create_model(num_classes=train_set.num_classes, rngs=nnx.Rngs(config.seed), **model_arguments(config))
    variables = get_variables(model)
    if config.init_from and not checkpoint_steps(workdir / CHECKPOINTS):  # a run that goes on has its own
        variables = initial_variables(Path(config.init_from), model, reset_head=config.reset_head)

    # 2. The state; 3. its place in an earlier, interrupted run of the same configuration.
    optimizer = make_optimizer(config.optimizer, learning_rate)
    state = replicate(create_state(variables, optimizer, config.seed), mesh)
    train_step = make_train_step(model, optimizer, label_smoothing=config.loss.label_smoothing)
    evaluate = make_evaluator(model, eval_set, batch_size=config.evaluation.batch_size, mesh=mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    is_writer = jax.process_index() == 0
    if is_writer:
        write_atomically(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2).encode())
    with contextlib.ExitStack() as stack:  # however it ends, what is being written is finished
        stack.enter_context(jax.set_mesh(mesh))  # over which the attention's kernels split their work
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(workdir / CHECKPOINTS, keep=config.checkpoint.keep))
        )
        restored = checkpoints.restore(state)
        train_seconds = 0.0
        if restored is not None:
            state, progress = restored
            batches.set_state(progress.data)
            train_seconds = progress.train_seconds
        step = int(state.step)
        if step:
            print(f"Going on from step {step} of {total_steps} in {workdir}.")
        metrics = None
        if is_writer:
            writer = MetricsWriter(workdir, first_step=step, tensorboard=config.logging.tensorboard)
            metrics = stack.enter_context(contextlib.closing(writer))

        # 4. The loop. Metrics are of the step itself, not averages: an interrupted run writes the same lines.
        shows_progress = is_writer and config.logging.progress
        bar = stack.enter_context(tqdm(total=total_steps, initial=step, unit="step", disable=not shows_progress))
        start = logged = time.perf_counter()
        logged_step = step
        figures: dict[str, float] = {}
        while step < total_steps:
            threshold = threshold_at(step)
            state, result = train_step(state, shard_batch(next(batches), mesh), threshold)
            step += 1
            bar.update()
            is_last = step == total_steps
            line: dict[str, Any] = {}
            if step % config.logging.every_steps == 0 or is_last:
                loss = float(result["loss"])
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss is {loss} at step {step}: try a smaller config.optimizer.learning_rate."
                    )
                now = time.perf_counter()
                images_per_second = (step - logged_step) * config.train.batch_size / (now - logged)
                logged, logged_step = now, step
                line = {
                    "loss": loss,
                    "learning_rate": float(learning_rate(step - 1)),
                    "mask_threshold": threshold,
                    "mask_density": [float(density) for density in result["mask_density"]],
                    "images_per_second": images_per_second,
                }
                bar.set_postfix({"loss": f"{loss:.3f}", "images/s": f"{images_per_second:,.0f}"})
            if step % (config.evaluation.every_epochs * steps_per_epoch) == 0 or is_last:
                figures = evaluate(state.variables, threshold)
                line |= {"accuracy": figures["accuracy_train_form"], **figures}
            if line and metrics is not None:
                metrics.write(step, line)
            if step % config.checkpoint.every_steps == 0 or is_last:
                seconds = train_seconds + time.perf_counter() - start
                checkpoints.save(state, Progress(batches.get_state(), seconds))
        jax.block_until_ready(state)
        train_seconds += time.perf_counter() - start

    # 5. What the run was for: the inference form, and its figures.
    if not figures:
        figures = evaluate(state.variables, threshold_at(total_steps - 1))
    if is_writer:
        save_inference(workdir / "inference", model, state.variables)
    return {
        **figures,
        "mask_threshold": threshold_at(total_steps - 1),
        "steps": total_steps,
        "train_seconds": train_seconds,
        "parameters_sha256": parameters_sha256(state.params),
    }
