"""Pictures: arrays in, matplotlib figures out. `figure.savefig(path)` writes one; a notebook shows it."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

DENSITY_TITLES = {"threshold": "Softmax weights kept by the mask", "fade": "Softmax branch kept by the fade"}
MOST_NAMED = 30  # classes of a confusion matrix that have their names and counts
MOST_LETTERS = 24  # of a name


def draw_training(history: dict[str, np.ndarray], *, mask_kind: str = "threshold") -> Figure:
    """A run's loss, accuracy of both forms, learning rate with mask threshold, and mask density of each layer.

    Args:
      history: as `castling_jax.training.metrics.read_history` gives it; what it lacks is left out.
      mask_kind: what empties the softmax branch: "threshold" or "fade".
    """
    figure = Figure(figsize=(11, 7), layout="constrained")  # not pyplot's, which would keep it
    axes = figure.subplots(2, 2, sharex=True)
    (loss_axis, accuracy_axis), (schedule_axis, density_axis) = axes

    loss_axis.plot(*_series(history, "loss"), color="tab:gray", linewidth=0.8, label="training, of one batch")
    loss_axis.plot(*_series(history, "eval_loss"), color="tab:blue", label="held out, inference form")
    loss_axis.set(title="Loss", ylabel="cross entropy (nats)", yscale="log")
    loss_axis.legend()

    accuracy_axis.plot(*_series(history, "accuracy_train_form", 100), color="tab:orange", label="training form")
    accuracy_axis.plot(
        *_series(history, "accuracy_inference_form", 100), color="tab:blue", linestyle="--", label="inference form"
    )
    accuracy_axis.set(title="Held-out accuracy", ylabel="%", ylim=(None, 101))
    accuracy_axis.legend(loc="lower right")

    schedule_axis.plot(*_series(history, "learning_rate"), color="tab:green")
    schedule_axis.set(title=f"Learning rate and mask {mask_kind}", xlabel="step")
    schedule_axis.set_ylabel("learning rate", color="tab:green")
    threshold_axis = schedule_axis.twinx()
    threshold_axis.plot(*_series(history, "mask_threshold"), color="tab:red")
    threshold_axis.set_ylabel(f"mask {mask_kind}", color="tab:red")
    threshold_axis.set_ylim(-0.03, 1.05)

    steps, densities = _series(history, "mask_density")
    layers = densities.shape[1] if len(steps) else 0  # a run may have evaluated before it first logged
    for layer, color in enumerate(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, layers))):
        density_axis.plot(steps, 100 * densities[:, layer], color=color, label=f"{layer}")
    density_axis.set(title=DENSITY_TITLES[mask_kind], xlabel="step", ylabel="%")
    if layers:
        density_axis.legend(title="layer", ncols=2, fontsize="small")

    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure


def draw_confusion(counts: Int[np.ndarray, "classes classes"], classes: Sequence[str]) -> Figure:
    """A confusion matrix: the share of each class's images that got each answer, with counts where there is room.

    Args:
      counts: of images; row is the label, column the answer.
      classes: their names.
    """
    count = len(classes)
    side = min(3 + 0.45 * count, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the class's images", shrink=0.8)
    axis.set(xlabel="answer", ylabel="class", title="Answers of the inference form")
    if count > MOST_NAMED:
        return figure
    names = [_shortened(name) for name in classes]
    axis.set_xticks(range(count), names, rotation=90, parse_math=False)
    axis.set_yticks(range(count), names, parse_math=False)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize="small")
    return figure


def _series(history: dict[str, np.ndarray], name: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have this figure, and its values."""
    if name not in history:
        return np.empty(0), np.empty(0)
    values = history[name]
    there = ~np.isnan(values.reshape(len(values), -1)).any(axis=1)
    return history["step"][there], scale * values[there]


def draw_predictions(
    images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Sequence[tuple[str, float]]]
) -> Figure:
    """A sheet of images, each with its most probable classes, at most three.

    Args:
      images: of any sizes.
      answers: for each image, (class, probability) pairs, the most probable first.
    """
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.9 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, image, answer in zip(axes, images, answers, strict=False):
        axis.imshow(image)
        lines = [f"{_shortened(name)} {100 * share:.0f} %" for name, share in answer[:3]]
        axis.set_title("\n".join(lines), fontsize=9, loc="left", parse_math=False)
    for axis in axes:
        axis.set_axis_off()
    return figure


def _shortened(name: str) -> str:
    """A class's name as a picture can show it."""
    name = name if name.isprintable() else name.encode("unicode_escape").decode()
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"
