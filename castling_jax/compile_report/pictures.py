"""Pictures of compile reports."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from castling_jax.compile_report.chips import chip_of
from castling_jax.compile_report.pod import HONEST, Figures, at_least, is_more

LINKS = "links"
FOOTNOTE_WIDTH = 240  # characters


def draw_pod(found: Figures, file: Path) -> None:
    """Draws what is held in HBM, where time goes, what is sent, and the roofline, of all programs of a report."""
    chip = chip_of(found["topology"])
    programs = {
        f"{attention},\n{'training' if form == 'train' else form}": figures
        for form, row in found["programs"].items()
        for attention, figures in row.items()
        if "does_not_fit" not in figures
    }
    figure, axes = plt.subplots(2, 2, figsize=(15, 9), layout="constrained")
    figure.suptitle(f"{found['config']} on {found['topology']}\n{HONEST}")
    (memory, times), (links, roofline) = axes

    temporary = {
        name: {
            "activations": figures["activations_MB"],
            "other temporary": figures["temp_MB"] - figures["activations_MB"],
        }
        for name, figures in programs.items()
    }
    _stack(memory, {name: {**figures["held_MB"], **temporary[name]} for name, figures in programs.items()}, 1e-3)
    memory.axhline(chip.hbm_gigabytes, color="black", linestyle="--", linewidth=1)
    memory.set(title=f"HBM of a chip, of {chip.hbm_gigabytes:.1f} GB (dashed)", ylabel="GB")

    _stack(times, {name: {**f["parts_ms"], LINKS: f["links_total_ms"]} for name, f in programs.items()})
    for place, figures in enumerate(programs.values()):
        step = f"{at_least(figures)}{figures['step_ms']:.1f} ms"
        times.annotate(step, (place, figures["step_ms"]), ha="center", va="bottom")
    times.set(title="A step, by the model's parts", ylabel="ms")

    _stack(links, {name: {k: size / 1e6 for k, size in f["collectives"].items()} for name, f in programs.items()})
    for place, figures in enumerate(programs.values()):
        height = sum(figures["collectives"].values()) / 1e6
        links.annotate(f"{figures['links_total_ms']:.2f} ms", (place, height), ha="center", va="bottom")
    links.set(title="What a chip is sent in a step, and the links' time for it", ylabel="MB")

    _roofline(roofline, programs, chip)
    _add_footnote(figure, found)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _stack(axis: Any, columns: dict[str, dict[str, float]], scale: float = 1.0) -> None:
    """Bars side by side, each of parts one above the other."""
    kinds = dict.fromkeys(kind for parts in columns.values() for kind in parts)
    bottom = np.zeros(len(columns))
    colors = plt.colormaps["tab20"](np.linspace(0, 1, 20))
    for kind, color in zip(kinds, [*colors, *colors], strict=False):
        heights = scale * np.array([parts.get(kind, 0.0) for parts in columns.values()])
        axis.bar(list(columns), heights, bottom=bottom, label=kind, color=color, width=0.6)
        bottom += heights
    axis.margins(y=0.12)
    if kinds:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


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
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(True, which="both", alpha=0.3)


def draw_sweep(found: Figures, file: Path) -> None:
    """Draws a step over the chips it runs on, and over the tokens of an image."""
    figure, (chips, tokens) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
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
    tokens.grid(True, which="both", alpha=0.3)
    tokens.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    _add_footnote(figure, found)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _add_footnote(figure: Any, found: Figures) -> None:
    listed = len(found["incomplete"])
    said = [sentence for sentence in found["not_counted"] if sentence not in found["incomplete"]]
    said += [f"{listed} operations and loops that the compiler has no figures for, which the text lists"] * bool(listed)
    text = f"Not in these figures: {'; '.join(said)}."
    figure.supxlabel("\n".join(textwrap.wrap(text, FOOTNOTE_WIDTH)), fontsize=7, x=0.01, ha="left")
