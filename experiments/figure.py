"""The one figure of docs/evidence.md: accuracy over measured inference time, and castling minus its controls."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.estimates import Estimate

SEEDS = 3  # from which an interval is drawn; with two it would be 3.6 times as wide, and hide the others
MARGIN = 0.5  # points: castling counts as no worse than softmax if the interval is above -MARGIN (cifar10_main)

# (attention, estimate of the accuracy in percent by tokens, milliseconds per image by tokens)
Line = tuple[str, dict[int, Estimate], dict[int, float]]

# (control, learning rates of castling and of that control, castling minus that control in points)
Difference = tuple[str, tuple[float | None, float | None], Estimate]


def draw(lines: Sequence[Line], differences: Sequence[Difference]) -> Figure:
    """Left, a line per attention, from few tokens to many; right, a row per control. Bars are 95 % intervals.

    Args:
      lines: accuracies and times.
      differences: castling minus its controls.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels: set[tuple[float, str]] = set()
    for number, (name, accuracies, milliseconds) in enumerate(lines):
        # Attentions with one inference form have the same times: thinner bars let those of earlier lines show.
        width = 2 * (len(lines) - number)
        tokens = sorted(accuracies)
        times, means = [milliseconds[count] for count in tokens], [accuracies[count].mean for count in tokens]
        (line,) = left.plot(times, means, "o-", label=name)
        for time, count in zip(times, tokens, strict=True):
            one = accuracies[count]
            text = f"{count}" if one.n >= SEEDS else f"{count}, n = {one.n}"
            if (time, text) not in labels:  # lines with the same times would write one label over the other
                left.annotate(text, (time, one.mean), textcoords="offset points", xytext=(5, 5))
                labels.add((time, text))
            if one.n >= SEEDS:
                left.vlines(time, *one.interval, color=line.get_color(), linewidth=width, alpha=0.7)
    counts = sorted({count for _, accuracies, _ in lines for count in accuracies})
    title = f"{' and '.join(map(str, counts))} tokens, 4 epochs"
    left.set(xlabel="inference, ms per image on one core", ylabel="test accuracy (%)", title=title)
    left.margins(x=0.2)  # room for the labels
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    right.axvline(0, color="black", linewidth=0.8)
    rows = []
    for place, (name, (rate, control_rate), difference) in enumerate(differences):
        rows.append(f"{name} ({rate:g}, {control_rate:g}), n = {difference.n}")
        if name == "softmax":
            label = None if right.patches else "margin"
            right.barh(place, 2 * MARGIN, left=-MARGIN, height=1, color="0.85", label=label, zorder=0)
        right.plot(difference.mean, place, "o", color="tab:blue")
        if difference.n >= SEEDS:
            right.hlines(place, *difference.interval, color="tab:blue")
    right.set_yticks(range(len(differences)), rows)
    right.set_ylim(len(differences) - 0.5, -0.5)
    right.set(xlabel="castling minus control (points)", title="64 tokens, 15 epochs (equal-time: 19)")
    right.set_ylabel("control (castling's rate, its own), n seeds")
    figure.legend(loc="outside lower center", ncols=len(lines) + 1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
