"""What a function would cost on a TPU, by the TPU compiler's own estimate, with no TPU at hand.

    python -m castling_jax.tools.tpu_report FILE.py:NAME [--topology=v5e:2x2] [--devices=1]
    python -m castling_jax.tools.tpu_report layer [--form=train] [--tokens=197] [--implementation=pallas] ...
    python -m castling_jax.tools.tpu_report model [--name=deit_base] [--form=train] [--image_size=224] ...
    python -m castling_jax.tools.tpu_report model --form=train --topology=v5e:16x16 --mesh=data:64,fsdp:4 --batch=32768

NAME is a function of FILE.py that returns (function, arguments) or (function, arguments, jit options); the arguments
are trees of jax.ShapeDtypeStruct, on all devices where they have no sharding. For shardings of its own NAME takes an
argument `devices`. `layer` is the attention layer of DeiT-B and `model` a whole model, both in bfloat16; with --mesh it
is the training step as a pod runs it, each device's share of which is what the report is of.

It needs libtpu: pip install "jax[tpu]". Compiling takes from seconds to many minutes, for the training step of a large
model. What it tells:

  estimate     the cycles of all operations, one after the other. A loop counts times its trip count, of a conditional
               the dearest branch, of a predicated region (pl.when) both sides. A Pallas kernel takes the bundles of its
               schedule or its traffic with HBM, whichever is longer
  prefetches   asynchronous copies of whole arrays; they run beside the compute and are not in the estimate
  HBM          what the program needs of a device's memory
  collectives  bytes of each kind's results on a device; their time is not in the estimate
  incomplete   what cannot be known from the program: a loop whose trip count depends on data, an operation without an
               estimate, work on the host. It counts once or not at all; with --strict the status is 1
  kernels      the share of issue slots that each unit uses, by which one sees what a kernel is bound by: at 100 % a
               unit could do no more. Where none comes near, the kernel waits for results

An estimate ranks designs and shows where time goes; it is not a measurement.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from castling_jax.models.attention import ATTENTIONS, FORMS
from castling_jax.ops.checks import IMPLEMENTATIONS
from castling_jax.ops.errors import InputError, check_known
from castling_jax.tools.tpu_compile import compile_apart
from castling_jax.tools.tpu_dump import read_program
from castling_jax.tools.tpu_estimate import CHIPS, Estimator, Kernel
from castling_jax.training.sharding import AXES

LABEL_WIDTH = 150


def report(what: str, options: dict[str, Any], *, topology: str, devices: int) -> dict[str, Any]:
    """Compiles a case and adds up what the compiler says of it.

    Args:
      what: "layer", "model" or "FILE.py:NAME".
      options: of layer and model, as their functions in tpu_cases take them.
      topology: such as "v5e:2x2".
      devices: how many of its devices are used, 0 for all.

    Returns:
      topology; est_ms; prefetch_ms; temp_MB, args_MB, out_MB; collectives, bytes by kind; incomplete, sentences; top,
      [milliseconds, operation, label] of all operations, the dearest first; kernels, a dict for each Pallas kernel.

    Raises:
      InputError: libtpu is missing, or any of the arguments is wrong, or the program does not fit a device.
    """
    chip = topology.split(":")[0]
    check_known("chip", chip, CHIPS)
    with tempfile.TemporaryDirectory(prefix="tpu_report_") as folder:
        work = Path(folder)
        request = {"what": what, "options": options, "topology": topology, "devices": devices}
        return {"topology": topology} | summarize(compile_apart(request, work), work / "llo", chip)


def summarize(compiled: dict[str, Any], dump: Path, chip: str) -> dict[str, Any]:
    """The report on what `compile_case` returned, with the dumps it left."""
    program = read_program(compiled["hlo"])
    estimator = Estimator(program, compiled["traffic"], dump, CHIPS[chip])
    cost = estimator.computation(program.entry, times=1)
    rows = sorted(cost.rows, key=lambda row: (row.milliseconds, row.name, row.label), reverse=True)
    return {
        "est_ms": sum(row.milliseconds for row in rows),
        "prefetch_ms": cost.prefetched_bytes / CHIPS[chip].hbm_gigabytes_per_second / 1e6,
        "temp_MB": compiled["temp_bytes"] / 1e6,
        "args_MB": compiled["argument_bytes"] / 1e6,
        "out_MB": compiled["output_bytes"] / 1e6,
        "collectives": dict(cost.collectives),
        "incomplete": sorted(estimator.incomplete),
        "top": [
            [row.milliseconds, row.name, row.label + (f" [{_describe(row.kernel)}]" if row.kernel else "")]
            for row in rows
        ],
        "kernels": [
            {
                "name": row.name,
                "ms": row.milliseconds,
                "cycles": row.kernel.cycles,
                "compute_ms": row.kernel.compute_ms,
                "traffic_ms": row.kernel.traffic_ms,
                "bound": row.kernel.bound,
                "utilization": row.kernel.utilization,
            }
            for row in rows
            if row.kernel
        ],
    }


def _describe(kernel: Kernel) -> str:
    return f"kernel: {kernel.cycles:,} cycles, compute {kernel.compute_ms:.3f} ms, traffic {kernel.traffic_ms:.3f} ms"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="FILE.py:NAME, layer or model")
    parser.add_argument("--topology", default="v5e:2x2", help=f"a pod of {', '.join(CHIPS)}; by default %(default)s")
    parser.add_argument(
        "--devices", type=int, help="how many of its devices to use, 0 for all; default 1, or with --mesh all"
    )
    parser.add_argument("--top", type=int, default=12, help="how many of the dearest operations to print; default 12")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--strict", action="store_true", help="status 1 where something could not be counted")
    # What is not given is absent, so that an option of layer that is given to model is noticed.
    group = parser.add_argument_group("options of layer and model", argument_default=argparse.SUPPRESS)
    group.add_argument("--form", help=f"{' or '.join(FORMS)}; train is forward and backward (default inference)")
    group.add_argument("--attention", help=f"{', '.join(ATTENTIONS)} (default castling)")
    group.add_argument("--batch", type=int, help="images of all devices together (default 128)")
    group.add_argument("--tokens", type=int, help="of layer (default 197)")
    group.add_argument("--implementation", help=f"of layer: {', '.join(IMPLEMENTATIONS)} (default auto)")
    group.add_argument("--name", help="of model (default deit_base)")
    group.add_argument("--image_size", type=int, help="of model: pixels a side (default the model's own)")
    group.add_argument("--depth", type=int, help="of model: blocks (default the model's own)")
    group.add_argument("--mesh", help=f"of model: sizes of {', '.join(AXES)}, such as data:64,fsdp:-1 (others are 1)")
    group.add_argument("--remat", action="store_true", help="of model: compute blocks again in the backward pass")
    options = vars(parser.parse_args())
    if options["devices"] is None:
        options["devices"] = 0 if "mesh" in options else 1
    shared = {word: options.pop(word) for word in ("what", "topology", "devices", "top", "json", "strict")}
    try:
        figures = report(shared["what"], options, topology=shared["topology"], devices=shared["devices"])
    except InputError as error:
        sys.exit(f"tpu_report: {error}")
    print(json.dumps(figures) if shared["json"] else describe(figures, shared["top"]))
    sys.exit(shared["strict"] and bool(figures["incomplete"]))


if __name__ == "__main__":
    main()
