"""Training from a configuration to a finished run, resumable at any moment, on any number of processes."""

import collections
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.profiler
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from castling_jax.convert.inference_folder import save_inference
from castling_jax.data.fingerprint import check_same_data, fingerprint
from castling_jax.models.macs import count_macs
from castling_jax.models.registry import abstract_model
from castling_jax.storage import absolute, copy_folder, is_remote, write_atomically
from castling_jax.training.checkpoints import BEST, CHECKPOINTS, Checkpoints, Progress, checkpoint_steps
from castling_jax.training.config import exported_weights
from castling_jax.training.config_files import CONFIG_FILE, check_same_run
from castling_jax.training.distributed import check_shared
from castling_jax.training.evaluate import configured_evaluator, evaluate_weights
from castling_jax.training.finite import FiniteCheck
from castling_jax.training.kernel_check import check_kernels
from castling_jax.training.lock import one_writer
from castling_jax.training.metrics import MetricsWriter
from castling_jax.training.preemption import Preempted, PreemptionWatch
from castling_jax.training.setup import Setup, configured_batches, first_state, first_variables, set_up
from castling_jax.training.sharding import shard_batch, to_host, with_shardings
from castling_jax.training.state import TrainState, parameter_table, parameters_sha256
from castling_jax.training.throughput import Meter, peak_flops

PARAMETERS_FILE = "parameters.txt"
DATA_FILE = "data.json"
STEPS_AHEAD = 3  # so many steps are sent off to the devices before the first of them is done
INITIAL_SHARE = 0.01  # of averaged weights: more of the initial ones than this is said
PROFILE = "profile"  # a run's folder of traces


def train(config: ConfigDict, workdir: epath.PathLike, *, profile: range | None = None) -> dict[str, Any]:
    """Runs the training that `config` describes, or what is left of it, in `workdir`.

    SIGTERM and, in the main thread, Ctrl-C or a notebook's interrupt save the state after the step and raise
    Preempted; a second Ctrl-C raises KeyboardInterrupt, once the checkpoint that is being written is whole.

    The same command, started again after a run was killed at any moment, goes on from the last checkpoint and ends
    with the same parameters as a run that was not killed. It may go on over another mesh or on another number of
    processes; then sums of float32 are made in another order.

    Args:
      config: as `default_config` gives it.
      workdir: gets config.json, parameters.txt, data.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end,
        inference/. All processes see the same one.
      profile: the steps that are traced into workdir/profile.

    Returns:
      The figures of the last evaluation, as `evaluate_weights` gives them; exported ("raw" or "averaged"), steps,
      skipped_steps, train_seconds, parameters_sha256.

    Raises:
      InputError: a field, a name or a size is wrong, workdir holds another configuration's run or one of other data, is
        being written by another run or is not one for all processes, or a checkpoint cannot be written.
      DeterministicError: the loss or a gradient is not finite, as `config.train.on_nonfinite` says, or too many images
        are corrupt.
      Preempted: SIGTERM or Ctrl-C came, and the state was saved.
    """
    # The order is important. 1. Everything that can be refused is refused before the first file is written.
    workdir = epath.Path(workdir)
    setup = set_up(config)
    if (workdir / CONFIG_FILE).exists():
        check_same_run(config, workdir / CONFIG_FILE)
    folder = absolute(workdir / CHECKPOINTS)
    variables = {} if checkpoint_steps(folder) else first_variables(setup)  # a run that goes on has its own
    is_writer = jax.process_index() == 0
    check_kernels(setup)
    data = fingerprint(setup.train_set, setup.eval_set)

    with contextlib.ExitStack() as stack:  # however it ends, what is being written is finished
        check_lock = stack.enter_context(one_writer(workdir))
        check_shared(workdir)
        if is_writer:
            write_atomically(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2).encode())
            write_atomically(workdir / PARAMETERS_FILE, parameter_table(setup.state, setup.shardings).encode())
        stack.enter_context(jax.set_mesh(setup.mesh))  # over which the attention's kernels split their work
        # 2. The state; 3. its place in an earlier, interrupted run of the same configuration.
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(folder, keep=config.checkpoint.keep, data=data))
        )
        before = checkpoints.saved_data()  # of an earlier version's run None
        accepted = check_same_data(before or data, data, accept_changes=config.dataset.accept_changes)
        if is_writer:
            write_atomically(workdir / DATA_FILE, json.dumps(data, indent=2).encode())
            if accepted:
                print(f"The data has changed since the run began: {accepted}.", flush=True)
        restored = checkpoints.restore(with_shardings(setup.state, setup.shardings))
        state, progress = restored or (first_state(setup, variables), Progress(0.0))
        first_step = int(state.step)
        metrics = None
        if is_writer:
            writer = MetricsWriter(workdir, first_step=first_step, tensorboard=config.logging.tensorboard)
            metrics = stack.enter_context(contextlib.closing(writer))
            if first_step:
                print(f"Going on from step {first_step} of {setup.total_steps} in {workdir}.", flush=True)
            else:
                metrics.describe({name: (workdir / name).read_text() for name in (CONFIG_FILE, PARAMETERS_FILE)})
            _say_what_averages_keep(setup)
        watch = stack.enter_context(PreemptionWatch(checkpoints))
        stack.callback(checkpoints.wait)  # while a signal does not kill: SIGTERM may come twice
        state, figures, train_seconds = _loop(
            setup,
            state,
            checkpoints,
            watch,
            metrics,
            seconds_before=progress.train_seconds,
            trace=_tracer(profile, workdir),
            check_lock=check_lock,
        )

        # 5. What the run was for: the inference form, and its figures.
        exported = exported_weights(config)
        variables, params = to_host((state.weights[exported], state.params), setup.mesh)
        if is_writer:
            save_inference(workdir / "inference", setup.model, variables)
    return {
        **figures,
        "exported": exported,
        "mask_threshold": setup.threshold_at(setup.total_steps - 1),
        "steps": setup.total_steps,
        "skipped_steps": state.skipped_steps,
        "train_seconds": train_seconds,
        "parameters_sha256": parameters_sha256(params),
    }


def _loop(
    setup: Setup,
    state: TrainState,
    checkpoints: Checkpoints,
    watch: PreemptionWatch,
    metrics: MetricsWriter | None,
    *,
    seconds_before: float,
    trace: Callable[[int | None, TrainState], None],
    check_lock: Callable[[], None],
) -> tuple[TrainState, dict[str, float], float]:
    """4. The steps from the state's own to the last: the state, the last evaluation's figures, and the seconds."""
    config, total_steps = setup.config, setup.total_steps
    step = first_step = int(state.step)
    batches = configured_batches(setup, first_step=step)
    evaluator = configured_evaluator(config, setup.model, setup.eval_set, setup.mesh)
    exported = exported_weights(config)
    peak = peak_flops()
    macs = (0, 0) if peak is None else _macs(setup)  # which takes two traces of the model, for this share alone
    meter = Meter(batch_size=config.train.batch_size, step=step, total_steps=total_steps, peak=peak)
    say = functools.partial(tqdm.write, file=sys.stderr) if metrics is not None else lambda _: None
    finite = FiniteCheck(config.train.on_nonfinite, config.train.max_skips, checkpoints.folder, say)
    best = checkpoints.best()
    start = saved_at = time.perf_counter()
    sent: collections.deque[Any] = collections.deque(maxlen=STEPS_AHEAD)
    figures: dict[str, float] = {}
    silent = metrics is None or not config.logging.progress
    # Metrics are of the step itself, not averages: an interrupted run writes the same lines.
    with tqdm(total=total_steps, initial=step, unit="step", disable=silent) as bar:
        while step < total_steps:
            # The step is sent off, with its batch on the devices already; the one STEPS_AHEAD before it is done.
            trace(step, state)
            threshold = setup.threshold_at(step)
            with meter.waiting():
                batch = shard_batch(next(batches), setup.mesh, batch_size=config.train.batch_size)
            state, result = setup.train_step(state, batch, threshold)
            step += 1
            finite.add(step, result["loss"], result["gradient_norm"])
            sent.append(result["loss"])
            jax.block_until_ready(sent[0])
            bar.update()

            # What is due after it, on all processes the same.
            is_last = step == total_steps
            logs = is_last or step % config.logging.every_steps == 0
            evaluates = is_last or step % (config.evaluation.every_epochs * setup.steps_per_epoch) == 0
            preempted = watch.reached(step)
            saves = is_last or preempted or step % config.checkpoint.every_steps == 0
            saves = saves or _is_time(config.checkpoint.every_minutes, saved_at, logs=logs)
            if logs or evaluates or saves:
                finite.check()  # before anything is kept
                check_lock()

            line: dict[str, Any] = {}
            if logs:
                line = _line(setup, state, result, step=step) | meter.read(step, macs=macs[threshold >= 1])
                bar.set_postfix(
                    {"loss": f"{float(result['loss']):.3f}", "images/s": f"{line['images_per_second']:,.0f}"}
                )
            if evaluates:
                with meter.paused():
                    figures = evaluate_weights(evaluator, state.weights, threshold, exported=exported)
                line |= {"accuracy": figures["accuracy_train_form"], "mask_threshold": threshold, **figures}
                if figures[BEST] > best:
                    best, saves = figures[BEST], True
            if line and metrics is not None:
                metrics.write(step, line)
            if saves:
                if metrics is not None:
                    metrics.flush()
                saved_at = time.perf_counter()
                seconds = seconds_before + saved_at - start
                checkpoints.save(state, Progress(seconds, figures if evaluates else None, threshold))
            if preempted and not is_last:
                raise Preempted(step)
        trace(None, state)
        jax.block_until_ready(state)
    seconds = seconds_before + (time.perf_counter() - start if step > first_step else 0)
    if not figures:
        threshold = setup.threshold_at(total_steps - 1)
        figures = evaluate_weights(evaluator, state.weights, threshold, exported=exported)
    return state, figures, seconds


def _line(setup: Setup, state: TrainState, result: dict[str, jax.Array], *, step: int) -> dict[str, Any]:
    """What metrics.jsonl says of a step; of one that is not finite, and was skipped, without its loss and gradients."""
    skipped = state.skipped_steps
    line = {
        # Of this update: the optimiser counts only those that were made.
        "learning_rate": float(setup.learning_rate(step - 1 - skipped)),
        "mask_threshold": setup.threshold_at(step - 1),
    }
    if setup.config.train.on_nonfinite == "skip":
        line["skipped_steps"] = skipped
    loss, norm, density = jax.device_get((result["loss"], result["gradient_norm"], result["mask_density"]))
    if np.isfinite(loss) and np.isfinite(norm):
        line |= {"loss": float(loss), "gradient_norm": float(norm), "mask_density": density.tolist()}
    return line


def _is_time(minutes: float, since: float, *, logs: bool) -> bool:
    """Whether it is time for a checkpoint: by process 0's clock, of which the others hear at a step that is logged.

    There all processes wait for the devices anyway; to ask at every step would make them wait for each other.
    """
    is_time = time.perf_counter() - since >= 60 * minutes
    if jax.process_count() == 1:
        return is_time
    return logs and bool(multihost_utils.broadcast_one_to_all(np.int32(is_time)))


def _say_what_averages_keep(setup: Setup) -> None:
    """Says, before the first step, that too much of the averaged weights will be what the run started with."""
    decay = setup.config.train.ema_decay
    share = 0.0 if decay is None or setup.config.train.ema_warmup else decay**setup.total_steps
    if share > INITIAL_SHARE:
        print(
            f"At the end, {share:.0%} of the averaged weights will be the initial ones: {decay} to the power of "
            f"{setup.total_steps:,} steps. Set config.train.ema_warmup = True, or a smaller config.train.ema_decay.",
            flush=True,
        )


def _macs(setup: Setup) -> tuple[int, int]:
    """Of the forward pass in training form, with the softmax branch and, its mask empty, without."""
    without = abstract_model(**setup.model.spec.arguments(form="inference"))
    return count_macs(setup.model), count_macs(without)


def _tracer(profile: range | None, workdir: epath.Path) -> Callable[[int | None, TrainState], None]:
    """What starts and stops the profiler: called before each step with its number, and with None behind the last."""
    running = False
    folder = workdir / PROFILE
    # The profiler has a way of its own to buckets, with other credentials, so it does not go there.
    written = epath.Path(tempfile.mkdtemp()) if profile is not None and is_remote(folder) else folder

    def trace(step: int | None, state: TrainState) -> None:
        nonlocal running
        wanted = profile is not None and step in profile
        if running != wanted:
            jax.block_until_ready(state)  # steps that were started before, or are to be seen, are done
            if wanted:
                jax.profiler.start_trace(written)
            else:
                jax.profiler.stop_trace()
                if written != folder:
                    copy_folder(written, folder)
                    written.rmtree()
        running = wanted

    return trace
