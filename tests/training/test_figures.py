"""What a run hands to TensorBoard and to callbacks while it goes."""

import functools

import jax
import numpy as np
import pytest

from castling_jax.convert.run_folder import read_metrics
from castling_jax.tasks.classification import task
from castling_jax.training import summary
from castling_jax.training.run import run
from tests.training.test_loop import small_config
from tests.training.test_tensorboard import hparams_of, images_of, scalars_of


@pytest.fixture(scope="module", autouse=True)
def untimed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "measure_forms", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory):
    """A run of 2 steps with averaged weights, mixed batches and a test split; its folder, and what its steps saw."""
    seen = []

    def noted(images, labels, key, **options):
        mixed = mix(images, labels, key, **options)
        jax.debug.callback(lambda *batch: seen.append(batch), images, mixed[0])
        return mixed

    mix = task.mix
    config = small_config()
    config.dataset.update({"train_split": "minival", "eval_split": "minival", "test_split": "test", "mean": (0.3,) * 3})
    config.train.update({"epochs": 1, "ema_decay": 0.5})
    config.augment.update({"cutmix": 1.0})
    config.logging.update({"every_steps": 1, "tensorboard": True})
    workdir = tmp_path_factory.mktemp("shown") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "mix", noted)
        run(config, workdir)
        jax.effects_barrier()
    return config, workdir, seen


EVALUATED = [f"{kind}accuracy_{form}_form" for kind in ("", "top5_") for form in ("train", "inference")]
EVALUATED += ["loss", "max_difference", "images", "corrupt"]


@pytest.mark.slow
def test_all_figures_of_a_run_are_in_their_group_once(shown_run):
    _, workdir, _ = shown_run
    scalars = scalars_of(workdir)
    train = ("epoch", "loss", "learning_rate", "gradient_norm", "mask_threshold", "mask_density/layer_0")
    throughput = ("images_per_second", "images_per_second_per_chip", "data_wait_share", "eta_seconds")
    assert scalars.keys() == {
        *(f"train/{name}" for name in train),
        *(f"throughput/{name}" for name in throughput),
        *(f"{group}/{prefix}{name}" for group in ("eval", "test") for prefix in ("", "raw_") for name in EVALUATED),
    }
    for tag, values in scalars.items():
        assert [at for at, _ in values] == ([2] if tag.startswith(("eval/", "test/")) else [1, 2])
    lines = read_metrics(workdir)
    assert scalars["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert scalars["eval/loss"] == [(2, pytest.approx(lines[-1]["eval_loss"]))]
    assert [line["epoch"] for line in lines] == [0.5, 1]


@pytest.mark.slow
def test_the_final_figures_are_those_of_the_test_split_beside_the_configuration(shown_run):
    config, workdir, _ = shown_run
    fields, tags = hparams_of(workdir)
    assert (fields["model.name"], fields["train.ema_decay"]) == ("deit_micro", 0.5)
    assert fields["dataset.test_split"] == "test"
    assert tags == {f"test/{prefix}{name}" for prefix in ("", "raw_") for name in EVALUATED}
    figures = run(config, workdir).figures
    assert scalars_of(workdir)["test/loss"] == [(2, pytest.approx(figures["eval_loss"]))]
    assert [path.name.split(".")[0] for path in (workdir / "tensorboard").iterdir()] == ["events"]


@pytest.mark.slow
def test_the_first_images_are_shown_once_as_the_model_sees_them(shown_run):
    _, workdir, seen = shown_run
    (_, shown), (given, mixed), _ = seen  # what was shown, and both steps
    assert not np.array_equal(given, mixed)
    np.testing.assert_array_equal(shown, mixed[: len(shown)])
    ((_, _, picture),) = images_of(workdir)
    expected = [np.round(255 * np.clip(0.5 * image + 0.3, 0, 1)) for image in mixed[:16]]
    rows = np.concatenate([np.concatenate(expected[:8], axis=1), np.concatenate(expected[8:], axis=1)])
    np.testing.assert_allclose(picture, rows, atol=1)  # halves, such as 127.5, are rounded up or down


@pytest.mark.slow
def test_callbacks_are_called_for_each_line_of_the_call_and_end_the_run_by_what_they_raise(tmp_path):
    config, workdir = small_config(), tmp_path / "run"
    config.train.epochs = 1
    calls, again = [], []

    def stop_at_step_9(step, figures):
        calls.append(step)
        if step == 9:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config, workdir, callbacks=[stop_at_step_9])
    assert calls == [3, 6, 9]
    run(config, workdir, callbacks=(lambda step, figures: again.append({"step": step, **figures}),))
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [3, 6, 9, 11]
    assert again == lines[2:]  # from the checkpoint of step 8 on
    run(config, workdir, callbacks=[functools.partial(pytest.fail, "a finished run has no lines to make")])


def test_a_run_refuses_what_cannot_be_called(tmp_path, refuses):
    with refuses("callbacks must be a list of functions of (step, figures), not [3]"):
        run(small_config(), tmp_path / "run", callbacks=[3])
    assert not (tmp_path / "run").exists()
