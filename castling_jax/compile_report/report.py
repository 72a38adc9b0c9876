"""The compile report as text and files: of a case, of a configuration on a pod, and of its sweep."""

import json
from pathlib import Path
from typing import Any

from castling_jax.compile_report.figures import report
from castling_jax.compile_report.pictures import draw_pod, draw_sweep
from castling_jax.compile_report.pod import Compiler, describe_pod, describe_sweep, pod_report, sweep
from castling_jax.errors import InputError, check_known
from castling_jax.plots import png
from castling_jax.storage import make_folder

LABEL_WIDTH = 150


def describe(figures: dict[str, Any], top: int) -> str:
    """The report for a person, with so many of the dearest operations."""
    collectives = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in figures["collectives"].items())
    memory = (("temporary", "temp_MB"), ("arguments", "args_MB"), ("output", "out_MB"))
    lines = [
        f"{figures['topology']}, the compiler's estimate; not a measurement",
        f"  estimate     {figures['est_ms']:.3f} ms",
        f"  prefetches   {figures['prefetch_ms']:.3f} ms, beside it",
        f"  HBM          {', '.join(f'{name} {figures[key]:,.1f} MB' for name, key in memory)}",
        f"  collectives  {collectives or 'none'}",
        *(f"incomplete: {what}" for what in figures["incomplete"]),
        "dearest operations",
        *(f"  {ms:9.3f} ms  {name}  {label[-LABEL_WIDTH:]}" for ms, name, label in figures["top"][:top]),
    ]
    if figures["kernels"]:
        lines += [
            "kernels, and the share of its issue slots that each unit uses, in %",
            *_kernel_table(figures["kernels"]),
        ]
    return "\n".join(lines)


def _kernel_table(kernels: list[dict[str, Any]]) -> list[str]:
    width = max(len(kernel["name"]) for kernel in kernels)
    units = list(dict.fromkeys(unit for kernel in kernels for unit in kernel["utilization"]))
    lines = [f"  {'':{width}}  {'bound by':12}  {'  '.join(units)}"]
    for kernel in kernels:
        used = kernel["utilization"]
        shares = "  ".join(f"{100 * used[unit]:{len(unit)}.0f}" if unit in used else " " * len(unit) for unit in units)
        lines.append(f"  {kernel['name']:{width}}  {kernel['bound']:12}  {shares}")
    return lines


def report_case(options: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    """The report on `layer`, `model` or a function in a file, printed.

    Args:
      options: of the case.
      shared: by name, the other options of the command.

    Returns:
      What could not be counted of the program.

    Raises:
      InputError: the case, the topology or an option is wrong.
    """
    devices = shared["devices"] if shared["devices"] is not None else 0 if "mesh" in options else 1
    figures = report(shared["what"], options, topology=shared["topology"], devices=devices)
    print(json.dumps(figures) if shared["json"] else describe(figures, shared["top"]))
    return figures["incomplete"]


def report_config(options: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    """The report on a configuration, or its sweep: printed, and kept as text, JSON and a picture.

    Returns:
      What could not be counted of the programs.

    Raises:
      InputError: the configuration or an option is wrong.
    """
    config, topology = shared["config"], shared["topology"]
    if shared["what"] is not None:
        raise InputError(f"--config is reported on by itself: leave out {shared['what']!r}.")
    for word in options:
        check_known("option of --config", word, ("batch", "image_size", "mesh", "remat"))
    options = options | ({"fields": shared["fields"]} if shared["fields"] else {})
    name = config.replace(".py", "").replace("configs/", "").replace("/", "_").replace(":", "-").replace(",", "-")
    out = shared["out"] or Path("tpu_reports") / name
    compiler = Compiler(out)
    if shared["sweep"]:
        if "batch" not in options or shared["devices"] is not None:
            raise InputError("--sweep needs --batch, the images of each chip, and takes no --devices.")
        found = sweep(config, topology=topology, options=options, compiler=compiler)
        text, draw = describe_sweep(found), draw_sweep
    else:
        found = pod_report(
            config, topology=topology, options=options, devices=shared["devices"] or 0, compiler=compiler
        )
        text, draw = describe_pod(found, shared["top"]), draw_pod
    stem = f"{'sweep' if shared['sweep'] else 'report'}-{topology.replace(':', '-')}"
    make_folder(out)
    (out / f"{stem}.json").write_text(json.dumps(found))
    (out / f"{stem}.txt").write_text(f"{text}\n")
    (out / f"{stem}.png").write_bytes(png(draw(found)))
    print(json.dumps(found) if shared["json"] else f"{text}\n\nKept in {out}: {stem}.txt, {stem}.json and {stem}.png.")
    return found["incomplete"]
