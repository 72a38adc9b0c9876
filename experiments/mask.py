"""How the mask of the softmax branch empties in training, and what the switch would cost on the way."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from castling_jax.tables import markdown

HEADER = "epoch", "threshold", "density of the mask in each layer, %", "drop at the switch, points"


def evaluations_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations during a training, for a result.

    Args:
      metrics: lines of the run's metrics.jsonl.

    Returns:
      For each evaluation: epoch, mask_threshold, mask_density [layers] (the share of weights that the mask leaves, in
      the latest batch that was logged), and accuracy_train_form and accuracy_inference_form on the validation split.
      Empty where no mask ever left a weight: the attention has none.
    """
    found: list[dict[str, Any]] = []
    density: list[float] = []
    for line in metrics:
        density = line.get("mask_density", density)
        if "accuracy_train_form" in line:
            names = ("epoch", "mask_threshold", "accuracy_train_form", "accuracy_inference_form")
            found.append({name: line[name] for name in names} | {"mask_density": density})
    return found if any(any(line.get("mask_density", ())) for line in metrics) else []


def table(runs: list[list[dict[str, Any]]]) -> list[str]:
    """Lines of a table of means over the runs of an arm, which have the same evaluations.

    Args:
      runs: each run's `evaluations_of`.
    """
    densities, drops = _figures(runs)
    rows = []
    for one, density, drop in zip(runs[0], densities, drops.T, strict=True):
        spread = f" ± {drop.std(ddof=1):.2f}" if len(drop) > 1 else ""
        shares = ", ".join(f"{100 * share:.1f}" for share in density)
        rows.append((f"{one['epoch']:g}", f"{one['mask_threshold']:.3f}", shares, f"{drop.mean():.2f}{spread}"))
    return markdown(HEADER, rows, "l")


def draw(runs: list[list[dict[str, Any]]], title: str) -> Figure:
    """Density over epochs, one line per layer; and the drop at the switch over the density, one dot per evaluation."""
    densities, drops = _figures(runs)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer, shares in enumerate(densities.T):
        left.plot([one["epoch"] for one in runs[0]], 100 * shares, "o-", label=f"layer {layer + 1}")
    left.set(title=title, xlabel="epoch", ylabel="density of the mask (%)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    for drop in drops:
        right.plot(100 * densities.mean(axis=1), drop, "o", color="tab:blue", alpha=0.5)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title("a dot for each seed and epoch")
    right.set(xlabel="density of the mask, mean of the layers (%)", ylabel="drop at the switch (points)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _figures(runs: Iterable[list[dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """Densities [evaluations, layers], means over the runs, and drops [runs, evaluations] in points."""
    densities = np.mean([[one["mask_density"] for one in run] for run in runs], axis=0)
    drops = [[100 * (one["accuracy_train_form"] - one["accuracy_inference_form"]) for one in run] for run in runs]
    return densities, np.array(drops)
