"""Pictures of compile reports."""

import textwrap
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from castling_jax.compile_report.chips import chip_of
from castling_jax.compile_report.pod import HONEST, Figures, at_least, is_more
from castling_jax.plots import SMALL, start_at_zero, write_plain_numbers
from castling_jax.training.timing import significant

LINKS = "links"
FOOTNOTE_WIDTH = 210  # characters


def draw_pod(found: Figures) -> Figure:
    """What is held in HBM, where time goes, what is sent, and the roofline, of all programs of a report."""
    chip = chip_of(found["topology"])
    programs = {
        f"{attention},\n{'training' if form == 'train' else form}": figures
        for form, row in found["programs"].items()
        for attention, figures in row.items()
        if "does_not_fit" not in figures
    }
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle(f"{found['config']} on {found['topology']}\n{HONEST}")
    (memory, times), (links, roofline) = figure.subplots(2, 2)

    temporary = {
        name: {
            "activations": figures["activations_MB"],
            "other temporary": figures["temp_MB"] - figures["activations_MB"],
        }
        for name, figures in programs.items()
    }
    held = _stack(memory, {name: {**figures["held_MB"], **temporary[name]} for name, figures in programs.items()}, 1e-3)
    memory.axhline(chip.hbm_gigabytes, color="black", linestyle="--", linewidth=1)
    start_at_zero(memory, np.append(held, chip.hbm_gigabytes))
    memory.set(title=f"HBM of a chip, of {chip.hbm_gigabytes:.1f} GB (dashed)", ylabel="GB")

    _stack(times, {name: {**f["parts_ms"], LINKS: f["links_total_ms"]} for name, f in programs.items()})
    for place, figures in enumerate(programs.values()):
        step = f"{at_least(figures)}{significant(figures['step_ms'])} ms"
        times.annotate(step, (place, figures["step_ms"]), ha="center", va="bottom")
    times.set(title="A step, by the model's parts", ylabel="ms")

    _stack(links, {name: {k: size / 1e6 for k, size in f["collectives"].items()} for name, f in programs.items()})
    for place, figures in enumerate(programs.values()):
        height = sum(figures["collectives"].values()) / 1e6
        links.annotate(f"{significant(figures['links_total_ms'])} ms", (place, height), ha="center", va="bottom")
    links.set(title="What a chip is sent in a step, and the links' time for it", ylabel="MB")

    _roofline(roofline, programs, chip)
    _add_footnote(figure, found)
    return figure


def _stack(axis: Any, columns: dict[str, dict[str, float]], scale: float = 1.0) -> np.ndarray:
    """Bars side by side, each of parts one above the other, with room for a label above; returns their heights."""
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


def _roofline(axis: Any, programs: dict[str, Figures], chip: Any) -> None:
    peak, bandwidth = chip.teraflops, chip.hbm_gigabytes_per_second / 1e3
    intensities = np.geomspace(10, 3000, 100)
    axis.loglog(intensities, np.minimum(peak, bandwidth * intensities), color="black")
    for name, figures in programs.items():
        flops = figures["roofline"]["flops"]
        intensity = flops / (figures["traffic_MB"] * 1e6)
        axis.plot(intensity, flops / figures["step_ms"] / 1e9, "o", label=name.replace("\n", " "))
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
    """Right of the axes, where it covers nothing."""
    axis.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1))


def draw_sweep(found: Figures) -> Figure:
    """A step over the chips it runs on, and over the tokens of an image."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    chips, tokens = figure.subplots(1, 2)
    figure.suptitle(f"{found['config']}, {found['topology']}\n{HONEST}")
    steps = {f"{count}": figures for count, _, figures in found["chips"]}
    _stack(chips, {n: {"compute": f["est_ms"], LINKS: f["links_total_ms"]} for n, f in steps.items()})
    images = found["chips"][0][2]["facts"]["images_per_device"]
    chips.set(title=f"Training step, {images:g} images a chip", xlabel="chips", ylabel="ms")

    for (form, row), style in zip(found["tokens"].items(), ("-", "--"), strict=True):
        for (attention, series), color in zip(row.items(), ("tab:blue", "tab:red"), strict=False):
            there = {count: figures["step_ms"] / batch for count, batch, figures in series if figures}
            label = f"{attention}, {'training' if form == 'train' else form}"
            too_large = [f"{count:,}" for count, _, figures in series if not figures]
            if too_large:
                label += f" (does not fit at {', '.join(too_large)})"
            more = [count for count, _, figures in series if figures and is_more(figures)]
            tokens.plot(list(there), list(there.values()), style, marker="o", color=color, label=label)
            tokens.plot(more, [there[count] for count in more], "o", color=color, markerfacecolor="white")
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
    _add_footnote(figure, found)
    return figure


def _add_footnote(figure: Any, found: Figures) -> None:
    listed = len(found["incomplete"])
    said = [sentence for sentence in found["not_counted"] if sentence not in found["incomplete"]]
    said += [f"{listed} operations and loops that the compiler has no figures for, which the text lists"] * bool(listed)
    text = f"Not in these figures: {'; '.join(said)}."
    figure.supxlabel("\n".join(textwrap.wrap(text, FOOTNOTE_WIDTH)), fontsize=SMALL, x=0.01, ha="left")
