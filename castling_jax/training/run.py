"""One run, from a configuration to a finished summary; main.py, tools and notebooks call `run`.

`run` is the table of contents. The loop over the steps is in loop.py; how a batch changes the state is in step.py.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from castling_jax.convert.checkpoint import CHECKPOINTS, check_names, checkpoint_steps
from castling_jax.convert.inference_folder import save_inference
from castling_jax.convert.run_folder import CONFIG_FILE, INFERENCE, METRICS_FILE, suppression_of, write_config
from castling_jax.data.fingerprint import compare_data, fingerprint
from castling_jax.errors import InputError, printable, refusing_os_errors
from castling_jax.storage import absolute, as_path, reach_bucket, try_file, try_folder, write_atomically
from castling_jax.training.checkpoints import Checkpoints, Progress
from castling_jax.training.config import check_config
from castling_jax.training.config_files import join_run
from castling_jax.training.console import Console
from castling_jax.training.distributed import check_shared, refuse_different_data
from castling_jax.training.evaluate_run import Evaluation, summary_split, what_is_evaluated
from castling_jax.training.kernel_check import compare_kernels
from castling_jax.training.lock import one_writer
from castling_jax.training.loop import Loop
from castling_jax.training.metrics import Callback, MetricsWriter, check_callbacks
from castling_jax.training.preemption import PreemptionWatch
from castling_jax.training.profiling import PROFILE, Profiler
from castling_jax.training.setup import Setup, first_state, first_variables, set_up
from castling_jax.training.sharding import to_host, with_shardings
from castling_jax.training.state import parameter_table, parameters_sha256
from castling_jax.training.summary import SUMMARY_FILE, TRAINING_FILE, Summary, finish, read_summary
from castling_jax.training.tensorboard import EVENTS, TensorBoard

PARAMETERS_FILE = "parameters.txt"
DATA_FILE = "data.json"
FOLDERS = (CHECKPOINTS, INFERENCE, EVENTS)  # folders that a run writes into its workdir
FILES = (CONFIG_FILE, PARAMETERS_FILE, DATA_FILE, METRICS_FILE, TRAINING_FILE, SUMMARY_FILE)
INITIAL_SHARE = 0.01  # a larger share of initial weights in the final averages is worth a warning


@refusing_os_errors()
def run(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    profile: range | None = None,
    extend: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Summary:
    """Runs the training that `config` describes in `workdir`, or resumes it there.

    SIGTERM and, in the main thread, Ctrl-C or a notebook's interrupt save the state after the current step and raise
    Preempted; a second Ctrl-C raises KeyboardInterrupt once the checkpoint that is being written is complete.

    If a run was killed at any moment, the same call resumes it from the last checkpoint, and ends with the same
    parameters as a run that was not killed; for a finished run it returns the summary at once. A run may be resumed on
    another mesh or with another number of processes; float32 sums are then added in another order.

    Args:
      config: a configuration with the fields of `default_config`.
      workdir: the run's folder, the same for all processes. The run writes config.json, parameters.txt, data.json,
        metrics.jsonl, tensorboard/, checkpoints/ and, at the end, inference/, training.png, summary.json and, with
        config.dataset.test_split, evaluation/.
      profile: the steps to trace into workdir/profile; None traces no steps.
      extend: whether to train a finished run further, to a larger config.train.epochs. From there on its learning rate
        follows the schedule for all epochs, and its mask threshold does not fall. config.json keeps the earlier ends.
      callbacks: functions that process 0 calls as callback(step, figures) after each line of metrics.jsonl, with the
        line's figures: [lambda step, figures: wandb.log(figures, step)]. A resumed run calls them for its own lines
        only, not for the lines up to its checkpoint; steps that a killed run made beyond its checkpoint are made again,
        with their calls. A finished run makes no calls. An exception in a callback ends the run as any bug does (an
        OSError becomes an InputError), and the same call resumes the run from the last checkpoint.

    Returns:
      The summary. Process 0 alone measures both forms and draws; on the others the summary has training's figures.

    Raises:
      InputError: a field, a name, a size or a callback is wrong; workdir holds a run with another configuration or
        other data, or one to extend without its checkpoints, is being written by another run, or is not the same folder
        for all processes; or a file or a checkpoint cannot be written.
      DeterministicError: the loss or a gradient is not finite, as `config.train.on_nonfinite` says, or too many images
        are corrupt.
      Preempted: SIGTERM or Ctrl-C came, and the state was saved.
    """
    # 1. Find every mistake that can be found before anything is computed or written.
    check_callbacks(callbacks)
    workdir = as_path(workdir, "workdir")
    reach_bucket(workdir, for_a_run=True)
    check_config(config)
    summary = read_summary(workdir)
    if summary is not None or (workdir / CONFIG_FILE).exists():
        config = join_run(config, workdir / CONFIG_FILE, is_finished=summary is not None, extend=extend)
    elif extend:
        raise InputError(f"there is no run in '{workdir}' to extend.")
    ends = (*(config.train.extended_from or ()), config.train.epochs)
    summary_end = None if summary is None else summary.figures.get("epochs", ends[0])  # earlier versions lack "epochs"
    if summary is not None and summary_end == config.train.epochs:
        return summary
    folder = absolute(workdir / CHECKPOINTS)
    steps = checkpoint_steps(folder)
    if (extend or summary is not None) and not steps:
        raise InputError(
            f"a run is extended from its last checkpoint, and '{folder}' holds none: put it back, or choose another "
            "--workdir to train anew."
        )
    setup = set_up(config)
    config = setup.config
    check_names(folder)
    if steps and steps[-1] > setup.total_steps:  # the training split has become smaller
        raise InputError(
            f"'{folder}' holds a checkpoint of step {steps[-1]:,}, but with the {len(setup.train_set):,} images of the "
            f"training split the run has {setup.total_steps:,} steps: put the images back, or choose another --workdir."
        )
    is_writer = jax.process_index() == 0
    if is_writer:
        _try_places(workdir, profile)
    variables = {} if steps else first_variables(setup)  # a resumed run has its variables
    compare_kernels(setup)
    data = fingerprint(setup.train_set, setup.eval_set, setup.test_set)

    with contextlib.ExitStack() as stack:  # however the run ends, it closes all of these, and the lock last
        check_lock = stack.enter_context(one_writer(workdir))
        check_shared(workdir)
        refuse_different_data(data)
        # 2. Resume, or start.
        stack.enter_context(jax.set_mesh(setup.mesh))  # the attention's kernels split their work over this mesh
        checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, data=data)
        stack.enter_context(contextlib.closing(checkpoints))
        _record_data(setup, workdir, checkpoints.saved_data(), data)
        restored = checkpoints.restore(with_shardings(setup.state, setup.shardings))
        if is_writer:  # after everything that can refuse, because a refusal leaves an earlier run's files as they were
            write_config(workdir, config.to_dict())
            if summary is not None:  # the run is being extended; keep the summary of its earlier end
                (workdir / SUMMARY_FILE).rename(workdir / f"summary_of_{summary_end}_epochs.json")
            write_atomically(workdir / PARAMETERS_FILE, parameter_table(setup.state, setup.shardings).encode())
        state, progress = restored or (first_state(setup, variables), Progress(0.0))
        setup = keeping_threshold(setup, progress.mask_threshold)
        metrics = None
        if is_writer:
            metrics = _start_metrics(setup, workdir, int(state.step), callbacks)
            stack.enter_context(contextlib.closing(metrics))

        # 3. Train.
        watch = stack.enter_context(PreemptionWatch(checkpoints))
        # Inside the watch: a second SIGTERM must not kill the process while the last checkpoint is being written.
        stack.callback(checkpoints.wait)
        console = stack.enter_context(contextlib.closing(Console(setup, int(state.step), speaks=is_writer)))
        console.begin(workdir)
        loop = Loop(setup, checkpoints, metrics, console, should_stop=watch.reached, check_lock=check_lock)
        with Profiler(profile, workdir) as profiler:
            state, figures, train_seconds = loop.run(state, progress.train_seconds, profiler)

        # 4. Test, once.
        group, evaluated = "eval", figures
        if setup.test_set is not None:
            threshold = setup.threshold_at(setup.total_steps - 1)
            tested, answers = setup.test(state.weights, threshold)
            group, evaluated = "test", tested
            validation = figures | {"dataset": config.dataset.name, "split": config.dataset.eval_split}
            figures = tested | {"validation": validation}  # the test split may lack a figure, such as AP_large
            if is_writer:
                tested_on = what_is_evaluated(config, setup.task.name, setup.total_steps, threshold)
                Evaluation(figures | tested_on, answers, list(setup.test_set.classes)).write(workdir)

        # 5. Switch, and export the inference form: the purpose of the run.
        variables, params = to_host((state.weights[setup.exported], state.params), setup.mesh)
        figures = figures | {
            "dataset": config.dataset.name,
            "split": summary_split(config),
            "model": setup.model.spec.name,
            "task": setup.task.name,
            "exported": setup.exported,
            "mask_kind": setup.config.mask.kind,
            "mask_threshold": setup.threshold_at(setup.total_steps - 1),
            "steps": setup.total_steps,
            "epochs": config.train.epochs,
            "skipped_steps": state.skipped_steps,
            "train_seconds": train_seconds,
            "parameters_sha256": parameters_sha256(params),
        }
        if not is_writer:
            return Summary(workdir, figures)
        save_inference(
            workdir / INFERENCE,
            setup.model,
            variables,
            preprocessing=setup.preprocessing,
            classes=setup.train_set.classes or None,  # none: images without labels
            category_ids=data.get("category_ids"),
            suppression=suppression_of(config),
        )
        checkpoints.wait()
        if metrics is not None and metrics.tensorboard is not None:
            metrics.tensorboard.finish(setup.total_steps, config.to_dict(), evaluated, group=group)

        # 6. Measure both forms, draw, write.
        return finish(workdir, figures)


def _try_places(workdir: epath.Path, profile: range | None) -> None:
    """Tests every folder and file that the run will write; an InputError now is better than a failure hours later."""
    for name in ("", *FOLDERS, *([PROFILE] if profile else [])):
        try_folder(workdir / name)
    for name in FILES:
        try_file(workdir / name)


def _record_data(setup: Setup, workdir: epath.Path, before: Any, data: Any) -> None:
    """Refuses data that differs from the run's, or prints the changes if they are accepted; then records the data."""
    # A run of an earlier version has no record: `before` is None.
    accepted = compare_data(before or data, data, accept_changes=setup.config.dataset.accept_changes)
    if jax.process_index() == 0:
        recorded = data | {"preprocessing": setup.preprocessing.to_dict()}
        write_atomically(workdir / DATA_FILE, json.dumps(recorded, indent=2).encode())
        if accepted:
            print(f"The data has changed since the run began: {printable(accepted)}.", flush=True)


def keeping_threshold(setup: Setup, reached: float | None) -> Setup:
    """The setup with a mask threshold that does not fall below the one that was `reached`; None changes nothing.

    The schedule alone would fall, and open the mask again, if the data has grown and the run's end has moved with it.
    """
    if reached is None:  # a new run, or a checkpoint of an earlier version
        return setup
    return dataclasses.replace(setup, threshold_at=lambda step: max(reached, setup.threshold_at(step)))


def _start_metrics(setup: Setup, workdir: epath.Path, first_step: int, callbacks: Sequence[Callback]) -> MetricsWriter:
    """Builds the writer of metrics; prints where the run resumes, and warns if averages will keep initial weights."""
    tensorboard = None
    if setup.config.logging.tensorboard:
        tensorboard = TensorBoard(workdir, first_step=first_step, exported=setup.exported)
    metrics = MetricsWriter(workdir, first_step=first_step, tensorboard=tensorboard, callbacks=callbacks)
    if first_step:
        print(f"Going on from step {first_step} of {setup.total_steps} in {workdir}.", flush=True)
    elif tensorboard is not None:
        tensorboard.describe({name: (workdir / name).read_text() for name in (CONFIG_FILE, PARAMETERS_FILE)})
    decay = setup.config.train.ema_decay
    # Averages with decay d still have the share d^steps of the initial weights after that many steps.
    share = 0.0 if decay is None or setup.config.train.ema_warmup else decay**setup.total_steps
    if share > INITIAL_SHARE:
        print(
            f"At the end, {share:.0%} of the averaged weights will be the initial ones: {decay} to the power of "
            f"{setup.total_steps:,} steps. Set config.train.ema_warmup = True, or a smaller config.train.ema_decay.",
            flush=True,
        )
    return metrics
