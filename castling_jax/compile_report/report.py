"""The compile report as the command gives it: printed, and for a configuration kept in files too."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from castling_jax.compile_report.cases import OF_THE_COMMAND
from castling_jax.compile_report.figures import report
from castling_jax.compile_report.pictures import draw_pod, draw_sweep
from castling_jax.compile_report.pod import Compiler, PodReport, Sweep, pod_report, sweep
from castling_jax.compile_report.text import describe, describe_pod, describe_sweep
from castling_jax.errors import InputError, check_known
from castling_jax.plots import png
from castling_jax.storage import make_folder


def report_case(options: dict[str, Any], shared: Namespace) -> list[str]:
    """Prints the report on `layer`, `model` or a function in a file.

    Args:
      options: the options of the case.
      shared: the command's other options.

    Returns:
      A sentence for each thing in the program that could not be counted.

    Raises:
      InputError: the case, the topology or an option is wrong.
    """
    if ":" not in shared.what:
        check_known("case", shared.what, [*OF_THE_COMMAND, "FILE.py:NAME"])
    devices = shared.devices
    if devices is None:
        devices = 0 if "mesh" in options else 1
    figures = report(shared.what, options, topology=shared.topology, devices=devices)
    print(json.dumps(figures.to_json()) if shared.json else describe(figures, shared.top))
    return figures.incomplete


def report_config(options: dict[str, Any], shared: Namespace) -> list[str]:
    """Prints the report on a configuration, or its sweep, and keeps it as text, JSON and a picture.

    Args:
      options: options of the configuration's programs.
      shared: the command's other options.

    Returns:
      A sentence for each thing in the programs that could not be counted.

    Raises:
      InputError: the configuration or an option is wrong.
    """
    config, topology = shared.config, shared.topology
    if shared.what is not None:
        raise InputError(f"--config is reported on by itself: leave out {shared.what!r}.")
    for word in options:
        check_known("option of --config", word, ("batch", "image_size", "mesh", "remat"))
    options = options | ({"fields": shared.fields} if shared.fields else {})
    name = config.replace(".py", "").replace("configs/", "").replace("/", "_").replace(":", "-").replace(",", "-")
    out = shared.out or Path("tpu_reports") / name
    compiler = Compiler(out)
    figures: PodReport | Sweep
    if shared.sweep:
        if "batch" not in options or shared.devices is not None:
            raise InputError("--sweep needs --batch, the images of each chip, and takes no --devices.")
        figures = sweep(config, topology=topology, options=options, compiler=compiler)
        text, picture = describe_sweep(figures), draw_sweep(figures)
    else:
        devices = shared.devices or 0
        figures = pod_report(config, topology=topology, options=options, devices=devices, compiler=compiler)
        text, picture = describe_pod(figures, shared.top), draw_pod(figures)
    stem = f"{'sweep' if shared.sweep else 'report'}-{topology.replace(':', '-')}"
    figures_json = json.dumps(figures.to_json())
    make_folder(out)
    (out / f"{stem}.json").write_text(figures_json)
    (out / f"{stem}.txt").write_text(f"{text}\n")
    (out / f"{stem}.png").write_bytes(png(picture))
    print(figures_json if shared.json else f"{text}\n\nKept in {out}: {stem}.txt, {stem}.json and {stem}.png.")
    return figures.caveats.incomplete
