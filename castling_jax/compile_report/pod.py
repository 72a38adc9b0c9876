"""What a configuration would cost on a pod: training step and inference of its attention, and of softmax beside it.

All of it is of the TPU compiler's estimates (figures.py), and of the links' published bandwidth (links.py).
"""

import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from castling_jax.compile_report.chips import chip_of
from castling_jax.compile_report.compile import DoesNotFitError
from castling_jax.compile_report.estimate import NO_ESTIMATE
from castling_jax.compile_report.figures import report
from castling_jax.errors import InputError
from castling_jax.models.attention.kinds import FORMS
from castling_jax.storage import make_folder
from castling_jax.training.overrides import load_overridden
from castling_jax.training.throughput import FLOPS_PER_MAC

Figures = dict[str, Any]
HONEST = "the TPU compiler's estimates; nothing here was measured on a TPU"
NOT_COUNTED = (
    "what collectives and the compute do at the same time: the links' time is added to the step whole",
    "latencies of collectives, about a microsecond a link, and what else is on the links",
    "what prefetches and the compute take from each other of HBM's bandwidth",
    "the host: reading and augmenting images, sending them to the chips, evaluation, checkpoints",
    "traffic between slices: the pod is one slice",
)
PACKAGE = Path(__file__).parents[1]
TOP = 60  # of the dearest operations, that are kept
PATCH = 16  # pixels to a token's side, of all that is swept
TOKEN_SIZES = (224, 448, 896, 1344, 2048)  # pixels: 196, 784, 3,136, 7,056 and 16,384 tokens


class Compiler:
    """Compiles what is asked for, and keeps the figures in a folder, so that what breaks off goes on.

    Args:
      folder: where they are kept, a file for each program and the versions of JAX, libtpu and this code.

    """

    def __init__(self, folder: Path):
        self.folder = folder / "programs"
        code = b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
        installed = {package.name: package.version for package in importlib.metadata.distributions()}
        self.versions = {name: installed.get(name) for name in ("jax", "libtpu")}
        self.versions["castling_jax"] = hashlib.sha256(code).hexdigest()[:8]

    def __call__(self, what: str, options: dict[str, Any], *, topology: str, devices: int) -> Figures:
        """What `report` returns, without all operations but the dearest; or {"does_not_fit": a sentence}.

        Raises:
          InputError: the folder cannot be made; and what `report` raises.
        """
        request = {
            "what": what,
            "options": options,
            "topology": topology,
            "devices": devices,
            "versions": self.versions,
        }
        if "config" in options:
            request["settings"] = load_overridden(options["config"], options.get("fields", ())).to_dict()
        values = (options[name] for name in sorted(options) if name != "fields")
        words = [str(value).replace("/", "_") for value in (what, topology, *values)]
        digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:8]
        file = self.folder / f"{'-'.join(words)[:120]}-{digest}.json"
        if file.is_file():
            return json.loads(file.read_text())["figures"]
        make_folder(self.folder)  # before minutes are spent
        print(f"compiling {' '.join(words)} ...", file=sys.stderr, flush=True)
        try:
            figures = report(what, options, topology=topology, devices=devices)
            figures |= {word: figures[word][:TOP] for word in ("top", "sources", "kernels")}
        except DoesNotFitError as error:
            figures = {"does_not_fit": str(error)}
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"request": request, "figures": figures}, default=str))
        temporary.replace(file)
        return figures


def pod_report(config: str, *, topology: str, options: dict[str, Any], devices: int, compiler: Compiler) -> Figures:
    """Compiles a configuration's training step and inference for a pod, with its attention and with softmax.

    Args:
      config: FILE.py or FILE.py:ARGUMENT.
      topology: such as "v5e:16x16".
      options: mesh, batch (of a device) and image_size, where they are not the configuration's; fields, the words
        --config.GROUP.FIELD=VALUE that override it.
      devices: how many of the pod's are used; 0 is all.
      compiler: of its programs.

    Returns:
      config; topology; programs, form -> attention -> figures as `with_step` completes them; and what `caveats` says.

    Raises:
      InputError: the configuration, the topology or an option is wrong.
    """
    chip_of(topology)  # or refuses it, before anything is compiled
    attentions = dict.fromkeys((load_overridden(config, options.get("fields", ())).model.attention, "softmax"))
    programs: dict[str, dict[str, Figures]] = {form: {} for form in reversed(FORMS)}
    for form, row in programs.items():
        for attention in attentions:
            asked = {"config": config, "form": form, "attention": attention} | options
            figures = compiler("recipe", asked, topology=topology, devices=devices)
            row[attention] = figures if "does_not_fit" in figures else with_step(figures)
    compiled = [figures for row in programs.values() for figures in row.values() if "does_not_fit" not in figures]
    return {"config": _named(config, options), "topology": topology, "programs": programs} | caveats(compiled)


def _named(config: str, options: dict[str, Any]) -> str:
    return " ".join([config, *options.get("fields", ())])


def with_step(figures: Figures) -> Figures:
    """Figures of a recipe's program, and what follows from them.

    Returns:
      links_total_ms; step_ms, the estimate and the links' time; images_per_second_per_chip; mfu, the model's operations
      as a share of what the chip could do in step_ms; roofline: flops of a chip, compute_ms that they take at its
      peak, hbm_ms that reading and writing takes; besides all that the figures have.
    """
    chip = chip_of(figures["topology"])
    facts = figures["facts"]
    per_mac = FLOPS_PER_MAC if facts["form"] == "train" else 2
    flops = per_mac * facts["macs"] * facts["images_per_device"]
    links = sum(figures["links_ms"].values())
    step = figures["est_ms"] + links
    compute = flops / chip.teraflops / 1e9
    return figures | {
        "links_total_ms": links,
        "step_ms": step,
        "images_per_second_per_chip": 1e3 * facts["images_per_device"] / step,
        "mfu": compute / step,
        "roofline": {
            "flops": flops,
            "compute_ms": compute,
            "hbm_ms": figures["traffic_MB"] / chip.hbm_gigabytes_per_second,
        },
    }


def describe_pod(found: Figures, top: int) -> str:
    """The report for a person, with so many of each program's dearest operations."""
    chip = chip_of(found["topology"])
    lines = [f"{found['config']} on {found['topology']}: {HONEST}."]
    for form, row in found["programs"].items():
        lines += ["", "TRAINING STEP" if form == "train" else "INFERENCE"]
        for attention, figures in row.items():
            if "does_not_fit" in figures:
                lines.append(f"  {attention}: {figures['does_not_fit']}")
        fitting = {attention: figures for attention, figures in row.items() if "does_not_fit" not in figures}
        if fitting:
            facts = next(iter(fitting.values()))["facts"]
            mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
            lines.append(
                f"  {facts['model']}, {facts['image_size']} pixels; mesh {mesh}; {facts['images']:,} images, "
                f"{facts['images_per_device']:g} a chip"
            )
            lines += _table(_rows(fitting, chip.hbm_gigabytes), list(fitting))
        for attention, figures in fitting.items():
            lines.append(f"  dearest operations, {attention}")
            lines += [
                f"    {ms:9.3f} ms  in {count:3}  {label[-100:]}" for ms, count, label in figures["sources"][:top]
            ]
    return "\n".join([*lines, "", *_not_counted(found)])


def caveats(programs: Iterable[Figures]) -> Figures:
    """What figures of programs are not.

    Returns:
      what: a sentence; incomplete: what the compiler has no figures for; not_counted: these, what was taken for
      granted, and what no such figures count.
    """
    incomplete = sorted({sentence for figures in programs for sentence in figures["incomplete"]})
    assumed = dict.fromkeys(sentence for figures in programs for sentence in figures["facts"]["assumed"])
    return {"what": HONEST, "incomplete": incomplete, "not_counted": [*NOT_COUNTED, *assumed, *incomplete]}


Row = tuple[str, list[str]]


def _rows(programs: dict[str, Figures], hbm_gigabytes: float) -> list[Row]:
    """What there is to say of programs, in columns side by side."""
    every = list(programs.values())

    def row(label: str, cell: Any) -> Row:
        return label, [cell(figures) for figures in every]

    def union(key: str) -> Iterable[str]:
        return dict.fromkeys(kind for figures in every for kind in figures[key])

    held = [
        row(f"  {kind}", lambda figures, kind=kind: f"{figures['held_MB'].get(kind, 0):,.1f} MB")
        for kind in union("held_MB")
    ]
    sent = [
        row(
            f"  {kind}",
            lambda figures, kind=kind: (
                f"{figures['collectives'].get(kind, 0) / 1e6:,.1f} MB, {figures['links_ms'].get(kind, 0):.2f} ms"
            ),
        )
        for kind in union("collectives")
    ]
    return [
        row("fits a chip", lambda figures: "yes"),
        row(f"HBM, of {1e3 * hbm_gigabytes:,.0f} MB", lambda figures: f"{figures['total_MB']:,.1f} MB"),
        *held,
        row("  activations", lambda figures: f"{figures['activations_MB']:,.1f} MB"),
        row("  other temporary", lambda figures: f"{figures['temp_MB'] - figures['activations_MB']:,.1f} MB"),
        row(
            "  results, program",
            lambda figures: f"{figures['total_MB'] - sum(figures['held_MB'].values()) - figures['temp_MB']:,.1f} MB",
        ),
        row("estimate", lambda figures: f"{at_least(figures)}{figures['est_ms']:,.2f} ms"),
        row("links, added whole", lambda figures: f"{figures['links_total_ms']:,.2f} ms"),
        *sent,
        row("step", lambda figures: f"{at_least(figures)}{figures['step_ms']:,.2f} ms"),
        row("images/s a chip", lambda figures: f"{figures['images_per_second_per_chip']:,.0f}"),
        row("MFU", lambda figures: f"{figures['mfu']:.1%}"),
        row("roofline: compute", lambda figures: f"{figures['roofline']['compute_ms']:,.2f} ms"),
        row("roofline: HBM", lambda figures: f"{figures['roofline']['hbm_ms']:,.2f} ms"),
        *(
            row(f"in {part}", lambda figures, part=part: f"{figures['parts_ms'].get(part, 0):,.2f} ms")
            for part in union("parts_ms")
        ),
        *(
            [("step, times softmax's", [f"{figures['step_ms'] / every[-1]['step_ms']:.3f}" for figures in every])]
            if list(programs)[-1] == "softmax" and len(programs) > 1
            else []
        ),
    ]


def _table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    cells = [("", list(names)), *rows]
    label_width = max(len(label) for label, _ in cells)
    widths = [max(len(row[column]) for _, row in cells) for column in range(len(names))]
    return [
        f"  {label:{label_width}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for label, row in cells
    ]


def sweep(config: str, *, topology: str, options: dict[str, Any], compiler: Compiler) -> Figures:
    """Scales a configuration: chips at fixed images a chip, and tokens at fixed tokens a chip, with `remat`.

    Args:
      config: FILE.py or FILE.py:ARGUMENT.
      topology: that says which chip, and up to how many of them.
      options: as `pod_report` takes them; batch is needed.
      compiler: of its programs.

    Returns:
      chips, a list of (devices, topology, figures) of training steps; tokens, form -> attention -> a list of (tokens,
      images of a chip, figures or None where it does not fit) on one chip; and what `caveats` says.

    Raises:
      InputError: the configuration, the topology or an option is wrong.
    """
    pods = chip_of(topology).pods
    chip, _, sides = topology.partition(":")
    if sides not in pods:
        raise InputError(f"--sweep goes up to one of {', '.join(f'{chip}:{pod}' for pod in pods)}, not {topology!r}.")
    attentions = dict.fromkeys((load_overridden(config, options.get("fields", ())).model.attention, "softmax"))
    chips = []
    for pod in pods:
        asked = {"config": config, "form": "train", "attention": next(iter(attentions))} | options
        figures = compiler("recipe", asked, topology=f"{chip}:{pod}", devices=0)
        if "does_not_fit" in figures:
            raise InputError(figures["does_not_fit"])
        chips.append((_product(pod), f"{chip}:{pod}", with_step(figures)))
        if pod == sides:
            break
    images = options["batch"]
    tokens: dict[str, dict[str, list[Any]]] = {form: {a: [] for a in attentions} for form in reversed(FORMS)}
    for pixels in TOKEN_SIZES:
        count = (pixels // PATCH) ** 2
        batch = max(1, images * (TOKEN_SIZES[0] // PATCH) ** 2 // count)
        for form, row in tokens.items():
            for attention, series in row.items():
                asked = {
                    **{"config": config, "form": form, "attention": attention, "image_size": pixels},
                    **{"batch": batch, "mesh": "data:1", "remat": pixels > TOKEN_SIZES[0]},
                    **{"fields": options.get("fields", ())},
                }
                figures = compiler("recipe", asked, topology=f"{chip}:{pods[0]}", devices=1)
                series.append((count, batch, None if "does_not_fit" in figures else with_step(figures)))
    compiled = [figures for *_, figures in chips]
    compiled += [
        figures for row in tokens.values() for series in row.values() for *_, figures in series if figures is not None
    ]
    facts = {"config": _named(config, options), "topology": topology}
    return facts | {"chips": chips, "tokens": tokens} | caveats(compiled)


def describe_sweep(found: Figures) -> str:
    """A sweep for a person."""
    first = found["chips"][0][2]["step_ms"]
    lines = [
        f"{found['config']}, {found['topology']}: {HONEST}.",
        "",
        f"TRAINING STEP, {found['chips'][0][2]['facts']['images_per_device']:g} images a chip",
        f"  {'pod':>10}  {'chips':>5}  {'estimate':>9}  {'links':>7}  {'step':>9}  {'times the first':>15}  images/s",
        *(
            f"  {pod:>10}  {count:5}  {f['est_ms']:6.2f} ms  {f['links_total_ms']:4.2f} ms  {f['step_ms']:6.2f} ms  "
            f"{f['step_ms'] / first:15.3f}  {count * f['images_per_second_per_chip']:,.0f}"
            for count, pod, f in found["chips"]
        ),
    ]
    for form, row in found["tokens"].items():
        lines += ["", f"{'TRAINING STEP' if form == 'train' else 'INFERENCE'} on one chip, ms an image"]
        lines.append(f"  {'tokens':>8}  {'images':>6}  " + "  ".join(f"{attention:>14}" for attention in row))
        for series in zip(*row.values(), strict=True):
            cells = [f"{at_least(f)}{f['step_ms'] / batch:.3f}" if f else "does not fit" for _, batch, f in series]
            lines.append(f"  {series[0][0]:8,}  {series[0][1]:6}  " + "  ".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, "", *_not_counted(found)])


def _not_counted(found: Figures) -> list[str]:
    return [
        "Not in these figures:",
        *(f"  - {what}" for what in found["not_counted"]),
        "  - of what stands behind > (more than), operations that the compiler gives no estimate for",
    ]


def at_least(figures: Figures) -> str:
    """What stands before a program's time: nothing, or > where it takes more than is counted."""
    return "> " if is_more(figures) else ""


def is_more(figures: Figures) -> bool:
    """Whether a program takes more than its estimate: there is none for some operation."""
    return any(NO_ESTIMATE in sentence for sentence in figures["incomplete"])


def _product(pod: str) -> int:
    return math.prod(int(side) for side in pod.split("x"))
