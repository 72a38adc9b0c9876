"""The training step: one for all tasks.

Start reading at `step`, inside make_train_step. The task defines the content of a batch and the loss
(castling_jax/tasks/task.py).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from castling_jax.models.model import Model
from castling_jax.models.variables import forward_train
from castling_jax.ops.checks import is_known_empty
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.images import finish_images
from castling_jax.tasks.task import Batch, Task
from castling_jax.training.sharding import replicated, whole_over_fsdp
from castling_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]


def prepare_batch(
    task: Task,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    *,
    preprocessing: Preprocessing | None,
    accumulate_steps: int = 1,
) -> Batch:
    """Finishes the images of a step's batch, and calls `task.prepare` on it.

    Args:
      task: the task to learn.
      batch: the global batch.
      key: the step's key: the state's key with the step's number folded in.
      step: the step's number, from 0.
      preprocessing: the normalisation of uint8 images; None if all images are floats, normalised already.
      accumulate_steps: number of parts of the batch; part i's key is `key` with i folded in.
    """
    # The first numbers that no part uses, so that mixing, erasing and drop-path are independent.
    mixing_key, erasing_key = (jax.random.fold_in(key, accumulate_steps + index) for index in range(2))
    return task.prepare(finish_images(batch, preprocessing, erasing_key), mixing_key, step)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    task: Task,
    *,
    preprocessing: Preprocessing | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    skip_nonfinite: bool = False,
    accumulate_steps: int = 1,
    shardings: Any = None,
) -> TrainStep:
    """Builds (state, batch, threshold) -> (state, metrics); the state is donated.

    The metrics are loss, gradient_norm (before clipping), mask_density [layers] and, for a loss with several terms,
    each term as NAME_loss.

    The loss is a sum over the global batch divided by another sum over the global batch, over all devices and all
    parts. So neither the mesh nor accumulation changes the loss that is minimised.

    Below 1 the threshold is traced, so a schedule does not recompile the step. From 1 on the mask is empty, and the
    step is another program, compiled without the softmax branch. A traced threshold is assumed to be below 1.

    Args:
      model: the model to train, in training form.
      optimizer: the optimiser; its state is in the TrainState.
      task: the task to learn.
      preprocessing: the normalisation of uint8 images, which the step computes; None refuses uint8 images, and takes
        floats that are normalised already, as it does with any preprocessing.
      ema_decay: decay of the moving averages; None if the state keeps none.
      ema_warmup: whether the decay at step k, counted from 0, is at most (1 + k) / (10 + k), so that the averages soon
        forget the initial weights (TensorFlow's ExponentialMovingAverage, num_updates).
      skip_nonfinite: whether a step with a loss or a gradient norm that is not finite leaves the state unchanged,
        except for the step's number. The norm of all gradients is then needed before any parameter is updated.
      accumulate_steps: number of parts in which the batch goes through the model, one after another, to save memory.
        The gradients are the whole batch's, but batch norm computes its statistics for each part.
      shardings: the state's shardings, as a TrainState; None leaves them to the compiler.
    """

    def place(tree: Any, where: Any) -> Any:
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, where)

    def gradients_of(
        params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array, held: Any
    ) -> Any:
        def total_of(params: Any) -> tuple[jax.Array, Any]:
            outputs, densities, new_stats = forward_train(
                model, {"params": params, "batch_stats": batch_stats}, batch["image"], mask_threshold=threshold, key=key
            )
            # Means over the rows, not sums: a part's terms then have the whole batch's scale, and parts are averaged.
            terms, weights = task.loss(outputs, batch, held)
            totals, weight = jax.tree.map(jnp.mean, (dict(terms), weights))
            return functools.reduce(operator.add, totals.values()), (totals, weight, densities, new_stats)

        (_, (totals, weight, densities, batch_stats)), gradients = jax.value_and_grad(total_of, has_aux=True)(params)
        # Scattered over fsdp at once: devices then keep and sum only their shards of the gradients.
        gradients = place(gradients, shardings and shardings.params)
        return (gradients, totals, weight, densities), batch_stats

    def accumulated(
        params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array, held: Any
    ) -> Any:
        def part_of(batch_stats: Any, index: jax.Array, examples: Batch) -> Any:
            part_key = jax.random.fold_in(key, index)
            return gradients_of(params, batch_stats, examples, threshold, part_key, held)

        def add_part(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            sums, batch_stats = carry
            terms, batch_stats = part_of(batch_stats, *part)
            return (jax.tree.map(jnp.add, sums, terms), batch_stats), None

        # A scan, not a Python loop: the compiler must not run two parts at once, which would take the memory again.
        parts = jnp.arange(accumulate_steps), jax.tree.map(lambda rows: _interleaved(rows, accumulate_steps), batch)
        shapes, _ = jax.eval_shape(part_of, batch_stats, *jax.tree.map(lambda part: part[0], parts))
        zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        (sums, batch_stats), _ = jax.lax.scan(add_part, (zero, batch_stats), parts)
        return jax.tree.map(lambda leaf: leaf / accumulate_steps, sums), batch_stats

    def step(state: TrainState, batch: Batch, held: Any, threshold: ArrayLike) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        batch = prepare_batch(
            task, batch, key, state.step, preprocessing=preprocessing, accumulate_steps=accumulate_steps
        )
        # Gathered over fsdp once, here. Without this constraint, the compiler may gather activations instead if that
        # looks cheaper to it.
        params = place(state.params, shardings and whole_over_fsdp(shardings.params))
        run = gradients_of if accumulate_steps == 1 else accumulated
        (gradients, totals, weight, densities), batch_stats = run(
            params, state.batch_stats, batch, threshold, key, held
        )
        if weight is not None:
            # `weight` is a mean over rows. A sum of weights below 1 counts as 1, so that a batch without any object
            # does not divide by zero.
            divisor = jnp.maximum(weight, 1 / len(batch["image"]))
            gradients, totals = jax.tree.map(lambda leaf: leaf / divisor, (gradients, totals))
        metrics = {"loss": functools.reduce(operator.add, totals.values()), "mask_density": densities}
        if len(totals) > 1:
            metrics |= {f"{name}_loss": total for name, total in totals.items()}
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        if ema_decay is not None:
            # 1 - decay is computed in Python's float64: in float32, 1 - 0.99996 is off by a thousandth.
            share = jnp.maximum(1 - ema_decay, 9 / (10 + state.step)) if ema_warmup else 1 - ema_decay
            averages = {name: new.variables[name] for name in state.ema}
            new = dataclasses.replace(new, ema=optax.incremental_update(averages, state.ema, share))
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        if skip_nonfinite:
            is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            new = _select(is_finite, new, state)
        return new, metrics

    # The new state has the old one's shardings, so that it can reuse the donated buffers. The metrics are on every
    # device, because every process checks the loss.
    everywhere = None if shardings is None else replicated(shardings.step.mesh)
    out_shardings = None if shardings is None else (shardings, everywhere)
    with_branch = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    # Here the threshold is a Python number, not a traced argument, so the operations know that the mask is empty.
    without_branch = jax.jit(functools.partial(step, threshold=1.0), donate_argnums=0, out_shardings=out_shardings)

    # `held` is an argument of the program; in a closure, a teacher's variables would become constants of it.
    def train_step(
        state: TrainState, batch: Batch, threshold: float, held: Any = task.held
    ) -> tuple[TrainState, Metrics]:
        if is_known_empty(threshold):
            return without_branch(state, batch, held)
        return with_branch(state, batch, held, jnp.float32(threshold))

    return train_step


def _select(is_finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state if finite, else the old state with the new step, so that the data and the random keys move on."""
    selected = {
        name: jax.tree.map(functools.partial(jnp.where, is_finite), getattr(new, name), getattr(old, name))
        for name in ("params", "batch_stats", "opt_state", "ema")
    }
    return dataclasses.replace(new, **selected)


def _interleaved(rows: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] -> [parts, batch // parts, ...] with every parts-th row in a part: no row leaves its device."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)
