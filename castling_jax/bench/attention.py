"""Times attention layers, whole models and the reading of images, on the machine at hand."""

import importlib.metadata
import itertools
import json
import math
import os
import platform
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import castling_jax
from castling_jax.bench.calls import PASSES, Row, batch_of, time_group
from castling_jax.bench.decode_speed import describe_reading, measure_reading
from castling_jax.bench.models import check_models, draw_models, measure_models
from castling_jax.bench.rivals import (
    INFERENCE,
    SOFTMAX,
    Layer,
    equimo_layers,
    our_layers,
    rival_layers,
    torch_layers,
)
from castling_jax.data.loader import processors
from castling_jax.errors import InputError
from castling_jax.models.description import parse_overrides
from castling_jax.plots import SMALL, png, write_plain_numbers
from castling_jax.storage import make_folder
from castling_jax.tables import Row as TableRow
from castling_jax.tables import aligned
from castling_jax.training.malloc import keep_freed_memory
from castling_jax.training.timing import significant

JSON_FILE, PICTURE_FILE, MODELS_PICTURE = "benchmark.json", "benchmark.png", "models.png"
SLOPE_POINTS = 3  # how many of the longest sequences a slope is fitted to
AGREEMENT = 1e-4  # largest mean difference between a peer's output and ours, as a share of the mean output


def peers_that_agree(ours: list[Layer], peers: list[Layer], channels: int, tokens: int) -> tuple[list[Layer], list]:
    """The peers whose output equals that of our layer of the same kind, and a sentence on each of the others."""
    x = _tokens(2, tokens, channels)
    expected = {layer.name: np.asarray(layer.prepare(x, False)()) for layer in ours}
    agreeing, notes = [], []
    for peer in peers:
        ours_out = expected[peer.same_as]
        difference = float(np.mean(np.abs(np.asarray(peer.prepare(x, False)()) - ours_out)) / np.mean(np.abs(ours_out)))
        if difference <= AGREEMENT:
            agreeing.append(peer)
        else:
            notes.append(f"{peer.name} is left out: its output differs from ours by {difference:.1e} of its size.")
    return agreeing, notes


def measure_layers(
    layers: list[Layer],
    token_counts: list[int],
    *,
    channels: int,
    heads: int,
    repeats: int,
    backward: bool,
    max_score_gib: float,
) -> tuple[list[Row], list[str]]:
    """Times the layers over the token counts.

    Returns:
      `time_group`'s rows with pass, tokens and batch added, and a sentence for each case that leaves layers out.
    """
    rows, notes = [], []
    cases = list(itertools.product([False, True] if backward else [False], sorted(token_counts)))
    for with_backward, tokens in (bar := tqdm(cases, unit="case")):
        batch = batch_of(tokens)
        bar.set_description(f"{PASSES[with_backward]}, {batch} x {tokens} tokens")
        gib = 4 * batch * heads * tokens**2 / 2**30
        # Quadratic layers would fill the memory and swap: one call has a few copies of its scores.
        timed = [layer for layer in layers if gib <= max_score_gib or not layer.quadratic]
        if len(timed) < len(layers) and not with_backward:
            notes.append(
                f"{tokens:,} tokens without quadratic layers: {gib:.1f} GiB of scores are over the limit of "
                f"{max_score_gib:g} GiB (--max-score-gib)."
            )
        x = _tokens(batch, tokens, channels)
        case = {"pass": PASSES[with_backward], "tokens": tokens, "batch": batch}
        calls = {layer.name: layer.prepare(x, with_backward) for layer in timed}
        rows += [case | row for row in time_group(calls, repeats)]
    return rows, notes


def _tokens(batch: int, tokens: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, tokens, channels)).astype(np.float32)


def slopes(rows: list[Row]) -> dict[str, dict[str, float]]:
    """pass -> name -> the exponent of the tokens in the time that a sequence takes: 1 is linear, 2 quadratic.

    The exponent is fitted to the SLOPE_POINTS longest sequences. The projections, which are linear, are in the time.
    """
    exponents: dict[str, dict[str, float]] = {}
    for (name, kind), (tokens, times, _) in _series(rows).items():
        if len(tokens) > 1:
            logs = np.log(tokens[-SLOPE_POINTS:]), np.log(times[-SLOPE_POINTS:])
            exponents.setdefault(kind, {})[name] = float(np.polyfit(*logs, 1)[0])
    return exponents


def _series(rows: list[Row]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(name, pass) -> tokens, median milliseconds a sequence, and its [min, max], all in the tokens' order."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        grouped.setdefault((row["name"], row["pass"]), []).append(row)
    series = {}
    for key, group in grouped.items():
        times = np.array([[row["milliseconds"][of] / row["batch"] for row in group] for of in ("median", "min", "max")])
        series[key] = np.array([row["tokens"] for row in group]), times[0], times[1:]
    return series


def draw(results: dict[str, Any]) -> Figure:
    """Time over tokens and, beside it, the ratio to softmax, both logarithmic; a row for each pass."""
    rows, exponents = results["layers"], results["slopes"]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(15, 4.6 * len(passes)), layout="constrained")
    axes = figure.subplots(len(passes), 2, squeeze=False)
    names = list(dict.fromkeys(row["name"] for row in rows))
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = {name: palette(i) for i, name in enumerate(names)}
    for kind, (time_axis, ratio_axis) in zip(passes, axes, strict=True):
        for (name, of), (tokens, times, limits) in _series(rows).items():
            if of != kind:
                continue
            line = "-" if name in (SOFTMAX, INFERENCE) else "--"
            style = {"color": colors[name], "marker": "o", "markersize": 4, "linestyle": line}
            slope = exponents.get(kind, {}).get(name)
            label = name if slope is None else f"{name} (slope {slope:.2f})"
            time_axis.errorbar(tokens, times, yerr=np.abs(limits - times), label=label, capsize=2, **style)
            ratios = [row for row in rows if (row["name"], row["pass"]) == (name, kind) and "ratio_to_softmax" in row]
            if ratios:
                spread = np.array([[row["ratio_to_softmax"][of] for of in ("min", "median", "max")] for row in ratios])
                counts = [row["tokens"] for row in ratios]
                ratio_axis.plot(counts, spread[:, 1], **style)
                ratio_axis.fill_between(counts, spread[:, 0], spread[:, 2], color=colors[name], alpha=0.15)
        time_axis.set(title=f"Attention layer, {kind}", ylabel="milliseconds a sequence")
        handles, labels = time_axis.get_legend_handles_labels()
        ratio_axis.legend(handles, labels, fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1))
        ratio_axis.set(title="Time relative to softmax (median, and range over the repeats)", ylabel="ratio")
        for axis in (time_axis, ratio_axis):
            axis.set(xlabel="tokens", xscale="log", yscale="log")
            ticks = sorted({row["tokens"] for row in rows})
            axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            axis.xaxis.minorticks_off()
            write_plain_numbers(axis.yaxis)
            axis.grid(alpha=0.3)
    settings = results["settings"]
    figure.suptitle(
        f"{settings['channels']} channels, {settings['heads']} heads, float32, projections included; "
        f"{_machine_line(results)}"
    )
    return figure


def describe(results: dict[str, Any]) -> str:
    """The figures as tables for a person."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {_cores(machine)}, {machine['device']}; load before {machine['load']:.1f}",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    ]
    layers = [(f"attention layer, {row['pass']}", row) for row in results["layers"]]
    models = [(f"{row['model']} at {row['image_size']} pixels, {row['pass']}", row) for row in results["models"]]
    lines += describe_reading(results["reading"])
    for title, group in itertools.groupby(layers + models, key=lambda pair: pair[0]):
        lines += ["", title, *aligned(_rows([row for _, row in group]), "rrlr")]
    for kind, exponents in results["slopes"].items():
        lines += ["", f"slope in tokens, {kind}, over the {SLOPE_POINTS} longest"]
        lines += aligned((name, f"{slope:.2f}") for name, slope in exponents.items())
    return "\n".join([*lines, *([""] if results["notes"] else []), *results["notes"]])


def _rows(measured: list[Row]) -> Iterator[TableRow]:
    """The table of one pass or model: the sizes where they change, the ratios where there are any, models' memory."""
    has_memory = any("temporary_mib" in row for row in measured)
    memory_header = ["MiB an image"] * has_memory
    yield "tokens", "batch", "", "median ms", "ratio to softmax: min", "median", "max", *memory_header
    last = None
    for row in measured:
        sizes = f"{row['tokens']:,}", str(row["batch"])
        ratios = [f"{value:.3f}" for value in row.get("ratio_to_softmax", {}).values()] or [""] * 3
        shown = sizes if sizes != last else ("", "")
        memory = [f"{row['temporary_mib'] / row['batch']:.1f}" if "temporary_mib" in row else ""] * has_memory
        yield *shown, row["name"], significant(row["milliseconds"]["median"]), *ratios, *memory
        last = sizes


def _cores(machine: dict[str, Any]) -> str:
    return "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"


def _machine_line(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['processor']}, {_cores(machine)}, JAX {results['versions']['jax']}"


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and its load: the figures depend on them."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor() or platform.machine(),
        "cores": processors(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan,
    }


def find_versions() -> dict[str, str]:
    """The versions of Python, this package, JAX, and the peers that are installed."""
    versions = {"python": platform.python_version(), "castling_jax": castling_jax.__version__}
    for name in ("jax", "jaxlib", "flax", "pillow", "torch", "timm", "equimo", "tensorflow-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a peer that is not here takes no part
            continue
    return versions


def measure_attention(arguments: Namespace) -> dict[str, Any]:
    """Times layers, unless --no-layers, and, with --models, models: their rows, slopes and notes."""
    rows: list[Row] = []
    notes: list[str] = []
    overrides = parse_overrides(arguments.set)
    if arguments.models:  # now, not after the layers' minutes
        check_models(arguments.model, arguments.image_sizes, arguments.attentions, overrides)
    if not arguments.no_layers:
        rows, notes = _measure_all_layers(arguments)
    models = []
    if arguments.models:
        models = measure_models(
            arguments.model,
            arguments.image_sizes,
            arguments.repeats,
            arguments.attentions,
            backward=arguments.backward,
            overrides=overrides,
        )
    return {"layers": rows, "slopes": slopes(rows), "models": models, "reading": [], "notes": notes}


def _measure_all_layers(arguments: Namespace) -> tuple[list[Row], list[str]]:
    layers, weights = our_layers(arguments.channels, arguments.heads)
    rivals = rival_layers(arguments.attentions, arguments.channels, arguments.heads)
    notes: list[str] = []
    if not arguments.no_peers:
        peers = torch_layers(weights) + equimo_layers(weights)
        peers, notes = peers_that_agree(layers, peers, arguments.channels, min(*arguments.tokens, 64))
        layers += peers
    rows, left_out = measure_layers(
        layers + rivals,
        arguments.tokens,
        channels=arguments.channels,
        heads=arguments.heads,
        repeats=arguments.repeats,
        backward=arguments.backward,
        max_score_gib=arguments.max_score_gib,
    )
    return rows, notes + left_out


def run(arguments: Namespace) -> dict[str, Any]:
    """Measures what the command line asks for, and writes the files.

    Args:
      arguments: the options of `castling_jax.tools.benchmark`.

    Returns:
      machine, versions, settings, layers, models, reading, slopes and notes, as benchmark.json has them.

    Raises:
      InputError: the heads do not divide the channels, the model is unknown or does not take a size, the C library
        cannot keep memory, or the folder cannot be made.
    """
    if arguments.keep_memory and not keep_freed_memory():
        raise InputError("--keep-memory needs glibc, the C library of most Linux systems, which this is not.")
    make_folder(arguments.out)
    results: dict[str, Any] = {
        "machine": describe_machine(),  # first: later the load is this benchmark's own
        "versions": find_versions(),
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
    }
    if arguments.loader:
        rows, notes = measure_reading(arguments.repeats)
        results |= {"layers": [], "slopes": {}, "models": [], "reading": rows, "notes": notes}
    else:
        results |= measure_attention(arguments)
    (arguments.out / JSON_FILE).write_text(json.dumps(results, indent=2))
    if results["layers"]:
        (arguments.out / PICTURE_FILE).write_bytes(png(draw(results)))
    if results["models"]:
        title = f"{' '.join([arguments.model, *arguments.set])}; {_machine_line(results)}"
        (arguments.out / MODELS_PICTURE).write_bytes(png(draw_models(results["models"], title)))
    return results
