"""The training step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from castling_jax.data.mixing import mix
from castling_jax.models.model import Model
from castling_jax.models.variables import Variables, apply, forward_train
from castling_jax.ops.checks import is_known_empty
from castling_jax.training.losses import cross_entropy, distillation_loss
from castling_jax.training.sharding import replicated, whole_over_fsdp
from castling_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
NO_MIXING = MappingProxyType({"mixup": 0.0, "cutmix": 0.0, "switch": 0.5, "probability": 1.0})
TrainStep = Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Another model that is learnt from.

    Attributes:
      model: in inference form.
      variables: its.
      kind: of the loss, as `distillation_loss` takes it.
      alpha: the loss's share.
      temperature: as `distillation_loss` takes it.
    """

    model: Model
    variables: Variables
    kind: str
    alpha: float
    temperature: float


def mix_batch(batch: Batch, key: jax.Array, *, accumulate_steps: int, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The images and targets that a step learns from: the batch, mixed by `mix` with these options.

    Args:
      batch: the global one.
      key: of the step: the state's, with the step folded in.
      accumulate_steps: of the step, whose parts have the keys below it.
      **options: of `mix`.
    """
    return mix(batch["image"], batch["label"], jax.random.fold_in(key, accumulate_steps), **options)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float,
    mixing: Mapping[str, Any] = NO_MIXING,
    teacher: Teacher | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    skip_nonfinite: bool = False,
    accumulate_steps: int = 1,
    shardings: Any = None,
) -> TrainStep:
    """Builds (state, batch, threshold) -> (state, metrics); the state is donated.

    The metrics are loss, gradient_norm (before any clip) and mask_density [layers].

    The threshold is traced below 1, so that a schedule does not recompile the step; from 1 on the mask is empty and
    the step is another program, compiled without the softmax branch. A threshold that is traced already is below 1.

    Args:
      model: in training form.
      optimizer: its state is in the TrainState.
      label_smoothing: share of each label that is spread over all classes.
      mixing: of `mix`: mixup, cutmix, switch and probability.
      teacher: learnt from besides the labels: by the second head where there are two, which then learns from it alone
        (Touvron et al., DeiT, section 4), else by the one.
      ema_decay: of the moving averages; None where the state keeps none.
      ema_warmup: the decay of step k, counted from 0, is at most (1 + k) / (10 + k), so that the averages soon leave
        the initial weights behind (TensorFlow's ExponentialMovingAverage, num_updates).
      skip_nonfinite: a step whose loss or gradient norm is not finite changes nothing of the state but the step's
        number. It then needs the gradients' norm before the first parameter is updated.
      accumulate_steps: in so many parts the batch goes through the model, one after the other, for less memory. The
        gradients are those of the whole batch; batch norm's statistics are each part's.
      shardings: a TrainState of shardings, as the state has them; None leaves them to the compiler.
    """
    mixed: Callable[[Batch, jax.Array], tuple[jax.Array, jax.Array]] = functools.partial(
        mix_batch,
        accumulate_steps=accumulate_steps,
        num_classes=model.spec.num_classes,
        label_smoothing=label_smoothing,
        **mixing,
    )

    def place(tree: Any, where: Any) -> Any:
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, where)

    def loss_of_heads(logits: jax.Array, batch: Batch, teacher_variables: Variables) -> jax.Array:
        if teacher is None:
            return jnp.mean(cross_entropy(logits.mean(axis=0), batch["target"]))
        taught = apply(teacher.model, teacher_variables, batch["image"])
        own = cross_entropy(logits[0], batch["target"])
        others = distillation_loss(logits[-1], taught, kind=teacher.kind, temperature=teacher.temperature)
        return jnp.mean((1 - teacher.alpha) * own + teacher.alpha * others)

    def gradients_of(
        params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array, teacher_variables: Variables
    ) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, densities, new_stats = forward_train(
                model, {"params": params, "batch_stats": batch_stats}, batch["image"], mask_threshold=threshold, key=key
            )
            return loss_of_heads(logits, batch, teacher_variables), (densities, new_stats)

        (loss, (densities, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        gradients = place(gradients, shardings and shardings.params)
        return (gradients, {"loss": loss, "mask_density": densities}), batch_stats

    def accumulated(
        params: Any, batch_stats: Any, batch: Batch, threshold: ArrayLike, key: jax.Array, teacher_variables: Variables
    ) -> Any:
        def part_of(batch_stats: Any, index: jax.Array, examples: Batch) -> Any:
            part_key = jax.random.fold_in(key, index)
            return gradients_of(params, batch_stats, examples, threshold, part_key, teacher_variables)

        def add_part(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            total, batch_stats = carry
            terms, batch_stats = part_of(batch_stats, *part)
            return (jax.tree.map(jnp.add, total, terms), batch_stats), None

        parts = jnp.arange(accumulate_steps), jax.tree.map(lambda rows: _interleaved(rows, accumulate_steps), batch)
        shapes, _ = jax.eval_shape(part_of, batch_stats, *jax.tree.map(lambda part: part[0], parts))
        zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        (total, batch_stats), _ = jax.lax.scan(add_part, (zero, batch_stats), parts)
        return jax.tree.map(lambda leaf: leaf / accumulate_steps, total), batch_stats

    def step(
        state: TrainState, batch: Batch, teacher_variables: Variables, threshold: ArrayLike
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        images, targets = mixed(batch, key)
        # Gathered once, here: left to itself, the compiler gathers activations too where that looks cheaper.
        params = place(state.params, shardings and whole_over_fsdp(shardings.params))
        run = gradients_of if accumulate_steps == 1 else accumulated
        (gradients, metrics), batch_stats = run(
            params, state.batch_stats, {"image": images, "target": targets}, threshold, key, teacher_variables
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        if ema_decay is not None:
            # 1 - decay, each term exact: 1 - 0.99996 of float32 numbers would be off by a thousandth.
            share = jnp.maximum(1 - ema_decay, 9 / (10 + state.step)) if ema_warmup else 1 - ema_decay
            averages = {name: new.variables[name] for name in state.ema}
            new = dataclasses.replace(new, ema=optax.incremental_update(averages, state.ema, share))
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        if skip_nonfinite:
            is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            new = _select(is_finite, new, state)
        return new, metrics

    # The state stays where it is, and the metrics are wanted everywhere.
    everywhere = None if shardings is None else replicated(shardings.step.mesh)
    out_shardings = None if shardings is None else (shardings, everywhere)
    with_branch = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    # A number known while tracing, not an argument: the operations see that the mask is empty.
    without_branch = jax.jit(functools.partial(step, threshold=1.0), donate_argnums=0, out_shardings=out_shardings)
    held = {} if teacher is None else teacher.variables

    # The teacher's variables are an argument of the program, for they would be a constant of it otherwise.
    def train_step(
        state: TrainState, batch: Batch, threshold: float, teacher_variables: Variables = held
    ) -> tuple[TrainState, Metrics]:
        if is_known_empty(threshold):
            return without_branch(state, batch, teacher_variables)
        return with_branch(state, batch, teacher_variables, jnp.float32(threshold))

    return train_step


def _select(is_finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or the old one with the new one's step: the data and the random keys go on."""
    chosen = {
        name: jax.tree.map(functools.partial(jnp.where, is_finite), getattr(new, name), getattr(old, name))
        for name in ("params", "batch_stats", "opt_state", "ema")
    }
    return dataclasses.replace(new, **chosen)


def _interleaved(rows: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] -> [parts, batch // parts, ...], every parts-th row together: each device splits its own rows."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)
