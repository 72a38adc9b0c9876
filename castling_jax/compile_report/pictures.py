"""Pictures of compile reports."""

import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from castling_jax.compile_report.chips import Chip, chip_of
from castling_jax.compile_report.figures import RecipeReport
from castling_jax.compile_report.pod import HONEST, Caveats, PodReport, Sweep
from castling_jax.compile_report.text import at_least
from castling_jax.plots import SMALL, start_at_zero, write_plain_numbers
from castling_jax.training.timing import significant

LINKS = "links"
FOOTNOTE_WIDTH = 210  # characters
FORM_NAMES = {"train": "training", "inference": "inference"}


def draw_pod(pod: PodReport) -> Figure:
    """The memory, the time, the traffic between chips and the roofline of all programs of a report."""
    chip = chip_of(pod.topology)
    reports = {
        f"{attention},\n{FORM_NAMES[form]}": report
        for form in pod.programs
        for attention, report in pod.fitting(form).items()
    }
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(f"{pod.config} on {pod.topology}\n{HONEST}")
    (memory, times), (links, roofline) = figure.subplots(2, 2)

    temporary = {
        name: {"activations": report.activations_MB, "other temporary": report.temp_MB - report.activations_MB}
        for name, report in reports.items()
    }
    heights = _stack(memory, {name: report.held_MB | temporary[name] for name, report in reports.items()}, 1e-3)
    memory.axhline(chip.hbm_gigabytes, color="black", linestyle="--", linewidth=1)
    start_at_zero(memory, np.append(heights, chip.hbm_gigabytes))
    memory.set(title=f"HBM of a chip, of {chip.hbm_gigabytes:.1f} GB (dashed)", ylabel="GB")

    _stack(times, {name: report.parts_ms | {LINKS: report.links_total_ms} for name, report in reports.items()})
    for place, report in enumerate(reports.values()):
        step = f"{at_least(report)}{significant(report.step_ms)} ms"
        times.annotate(step, (place, report.step_ms), ha="center", va="bottom")
    times.set(title="A step, by the model's parts", ylabel="ms")

    _stack(links, {name: {k: size / 1e6 for k, size in r.collectives.items()} for name, r in reports.items()})
    for place, report in enumerate(reports.values()):
        height = sum(report.collectives.values()) / 1e6
        links.annotate(f"{significant(report.links_total_ms)} ms", (place, height), ha="center", va="bottom")
    links.set(title="What a chip is sent in a step, and the links' time for it", ylabel="MB")

    _roofline(roofline, reports, chip)
    _add_footnote(figure, pod.caveats)
    return figure


def _stack(axis: Any, columns: dict[str, dict[str, float]], scale: float = 1.0) -> np.ndarray:
    """Draws bars side by side, each a stack of parts, with room for a label above; returns the bars' heights."""
    kinds = dict.fromkeys(kind for parts in columns.values() for kind in parts)
    bottom = np.zeros(len(columns))
    colors = matplotlib.colormaps["tab20"](np.linspace(0, 1, 20))
    for kind, color in zip(kinds, [*colors, *colors], strict=False):
        heights = scale * np.array([parts.get(kind, 0.0) for parts in columns.values()])
        axis.bar(list(columns), heights, bottom=bottom, label=kind, color=color, width=0.6)
        bottom += heights
    start_at_zero(axis, 1.05 * bottom)
    if kinds:
        _legend(axis)
    return bottom


def _roofline(axis: Any, reports: dict[str, RecipeReport], chip: Chip) -> None:
    peak, bandwidth = chip.teraflops, chip.hbm_gigabytes_per_second / 1e3
    intensities = np.geomspace(10, 3000, 100)
    axis.loglog(intensities, np.minimum(peak, bandwidth * intensities), color="black")
    for name, report in reports.items():
        flops = report.roofline.flops
        intensity = flops / (report.traffic_MB * 1e6)
        axis.plot(intensity, flops / report.step_ms / 1e9, "o", label=name.replace("\n", " "))
    axis.set(
        title=f"Roofline: {peak:g} TFLOP/s and {chip.hbm_gigabytes_per_second:g} GB/s",
        xlabel="the model's operations to a byte of HBM traffic",
        ylabel="TFLOP/s of a chip",
    )
    for side in (axis.xaxis, axis.yaxis):
        write_plain_numbers(side)
    _legend(axis)
    axis.grid(True, which="both", alpha=0.3)


def _legend(axis: Any) -> None:
    """Draws the legend right of the axes, where it covers nothing."""
    axis.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1))


def draw_sweep(sweep: Sweep) -> Figure:
    """A step over the number of chips, and over the tokens of an image."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    chips, tokens = figure.subplots(1, 2)
    figure.suptitle(f"{sweep.config}, {sweep.topology}\n{HONEST}")
    _stack(chips, {f"{n}": {"compute": r.est_ms, LINKS: r.links_total_ms} for n, _, r in sweep.chips})
    images = sweep.chips[0].report.facts.images_per_device
    chips.set(title=f"Training step, {images:g} images a chip", xlabel="chips", ylabel="ms")

    for (form, row), style in zip(sweep.tokens.items(), ("-", "--"), strict=True):
        for (attention, series), color in zip(row.items(), ("tab:blue", "tab:red"), strict=False):
            reports = {step.tokens: (step.report, step.images) for step in series if step.report is not None}
            times = {count: report.step_ms / images for count, (report, images) in reports.items()}
            label = f"{attention}, {FORM_NAMES[form]}"
            too_large = [f"{step.tokens:,}" for step in series if step.report is None]
            if too_large:
                label += f" (does not fit at {', '.join(too_large)})"
            tokens.plot(list(times), list(times.values()), style, marker="o", color=color, label=label)
            more = [count for count, (report, _) in reports.items() if report.is_lower_bound]
            tokens.plot(more, [times[count] for count in more], "o", color=color, markerfacecolor="white")
    tokens.set(
        title="One chip; hollow: more than this,\nthe compiler has no estimate for some operation",
        xlabel="tokens of an image",
        ylabel="ms an image",
        xscale="log",
        yscale="log",
    )
    for side in (tokens.xaxis, tokens.yaxis):
        write_plain_numbers(side)
    tokens.grid(True, which="both", alpha=0.3)
    tokens.legend(fontsize=SMALL, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    _add_footnote(figure, sweep.caveats)
    return figure


def _add_footnote(figure: Any, caveats: Caveats) -> None:
    sentences = [sentence for sentence in caveats.not_counted if sentence not in caveats.incomplete]
    # A large model has dozens of operations without figures, which would fill the picture.
    if listed := len(caveats.incomplete):
        sentences.append(f"{listed} operations and loops that the compiler has no figures for, which the text lists")
    text = f"Not in these figures: {'; '.join(sentences)}."
    figure.supxlabel("\n".join(textwrap.wrap(text, FOOTNOTE_WIDTH)), fontsize=SMALL, x=0.01, ha="left")
