"""Pictures of a run.

    python -m castling_jax.tools.plots RUN

draws RUN/training.png anew from RUN/metrics.jsonl; a run that is still going on will do.
"""

import argparse
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from castling_jax.convert.files import check_bucket
from castling_jax.ops.errors import InputError
from castling_jax.training.metrics import METRICS_FILE, read_metrics

TRAINING_FILE = "training.png"


def draw_training(workdir: epath.Path) -> epath.Path:
    """Draws loss, accuracy of both forms, learning rate with threshold, and mask density per layer.

    Returns:
      The picture's path, WORKDIR/training.png.

    Raises:
      InputError: there are no metrics in workdir.
    """
    lines = read_metrics(workdir)
    if not lines:
        raise InputError(f"'{workdir}' has no metrics to draw: {METRICS_FILE} is missing or empty.")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    (loss_axis, accuracy_axis), (schedule_axis, density_axis) = axes

    loss_axis.plot(*_series(lines, "loss"), color="tab:gray", linewidth=0.8, label="training, of one batch")
    loss_axis.plot(*_series(lines, "eval_loss"), color="tab:blue", label="held out, inference form")
    loss_axis.set(title="Loss", ylabel="cross entropy (nats)", yscale="log")
    loss_axis.legend()

    accuracy_axis.plot(*_series(lines, "accuracy_train_form", 100), color="tab:orange", label="training form")
    accuracy_axis.plot(
        *_series(lines, "accuracy_inference_form", 100), color="tab:blue", linestyle="--", label="inference form"
    )
    accuracy_axis.set(title="Held-out accuracy", ylabel="%", ylim=(None, 101))
    accuracy_axis.legend(loc="lower right")

    schedule_axis.plot(*_series(lines, "learning_rate"), color="tab:green")
    schedule_axis.set(title="Learning rate and mask threshold", xlabel="step")
    schedule_axis.set_ylabel("learning rate", color="tab:green")
    threshold_axis = schedule_axis.twinx()
    threshold_axis.plot(*_series(lines, "mask_threshold"), color="tab:red")
    threshold_axis.set_ylabel("mask threshold", color="tab:red")
    threshold_axis.set_ylim(-0.03, 1.05)

    steps, densities = _series(lines, "mask_density")
    colors = plt.colormaps["viridis"](np.linspace(0, 0.9, densities.shape[1]))
    for layer, color in enumerate(colors):
        density_axis.plot(steps, 100 * densities[:, layer], color=color, label=f"{layer}")
    density_axis.set(title="Softmax weights kept by the mask", xlabel="step", ylabel="%")
    density_axis.legend(title="layer", ncols=2, fontsize="small")

    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path = workdir / TRAINING_FILE
    with path.open("wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return path


def _series(lines: list[dict[str, Any]], name: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
    chosen = [line for line in lines if name in line]
    return np.array([line["step"] for line in chosen]), scale * np.array([line[name] for line in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=epath.Path, help="the folder of a run, such as runs/digits")
    run = parser.parse_args().run
    try:
        check_bucket(run)
        print(draw_training(run))
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
