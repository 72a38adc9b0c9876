"""What a function would cost on a TPU, by the TPU compiler's own estimate, with no TPU at hand.

    python -m castling_jax.tools.tpu_report --config=configs/deit.py:base --topology=v5e:16x16 [--mesh=data:64,fsdp:4]
    python -m castling_jax.tools.tpu_report --config=configs/deit.py:base --topology=v5e:16x16 --sweep --batch=128
    python -m castling_jax.tools.tpu_report FILE.py:NAME [--topology=v5e:2x2] [--devices=1]
    python -m castling_jax.tools.tpu_report layer [--form=train] [--tokens=197] [--implementation=pallas] ...
    python -m castling_jax.tools.tpu_report model [--name=deit_base] [--form=train] [--image_size=224] ...
    python -m castling_jax.tools.tpu_report model --form=train --topology=v5e:16x16 --mesh=data:64,fsdp:4 --batch=32768

With --config it compiles what main.py would run on that pod, the training step and the inference of the configuration,
and both with softmax attention beside them: whether it fits and what of, where time goes, what chips send each other
and how long the links need for it. --sweep does so for growing numbers of chips and of tokens. The report is printed,
and kept in --out as text, JSON and a picture; what was compiled is kept too, so that the same command goes on.

NAME is a function of FILE.py that returns (function, arguments) or (function, arguments, jit options); the arguments
are trees of jax.ShapeDtypeStruct, on all devices where they have no sharding. For shardings of its own NAME takes an
argument `devices`. `layer` is the attention layer of DeiT-B and `model` a whole model, both in bfloat16; with --mesh it
is the training step as a pod runs it, each device's share of which is what the report is of.

It needs libtpu: pip install "jax[tpu]". Compiling takes from seconds to many minutes, for the training step of a large
model. What it tells:

  estimate     the cycles of all operations, one after the other. A loop counts times its trip count, of a conditional
               the dearest branch, of a predicated region (pl.when) both sides. A Pallas kernel takes the bundles of its
               schedule or its traffic with HBM, whichever is longer; copies and the like without an estimate their
               traffic
  prefetches   asynchronous copies of whole arrays; they run beside the compute and are not in the estimate
  HBM          what the program needs of a device's memory; its activations by when arrays are made and last used
  collectives  bytes of each kind's results on a device; their time is not in the estimate
  links        that time, by the published bandwidth of the links (castling_jax/tools/tpu_links.py says how)
  incomplete   what cannot be known from the program: a loop whose trip count depends on data (but not one over a few
               numbers), an operation without an estimate, work on the host. It counts once or not at all; with
               --strict the status is 1
  kernels      the share of issue slots that each unit uses, by which one sees what a kernel is bound by: at 100 % a
               unit could do no more. Where none comes near, the kernel waits for results

An estimate ranks designs and shows where time goes; it is not a measurement.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from castling_jax.errors import InputError, check_known
from castling_jax.models.attention.kinds import FORMS, KINDS
from castling_jax.ops.checks import IMPLEMENTATIONS
from castling_jax.tools.folders import ending_in_a_sentence, local_path, make_folder
from castling_jax.tools.tpu_chips import CHIPS
from castling_jax.tools.tpu_figures import report
from castling_jax.tools.tpu_plots import draw_pod, draw_sweep
from castling_jax.tools.tpu_pod import Compiler, describe_pod, describe_sweep, pod_report, sweep
from castling_jax.training.sharding import AXES

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


@ending_in_a_sentence("tpu_report: ")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="FILE.py:NAME, layer or model; without it, --config is reported on")
    parser.add_argument("--topology", default="v5e:2x2", help=f"a pod of {', '.join(CHIPS)}; by default %(default)s")
    parser.add_argument(
        "--devices",
        type=int,
        help="how many of its devices to use, 0 for all; default 1, or with --mesh or --config all",
    )
    parser.add_argument("--top", type=int, default=12, help="how many of the dearest operations to print; default 12")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--strict", action="store_true", help="status 1 where something could not be counted")
    pod = parser.add_argument_group("of a configuration")
    pod.add_argument("--config", help="configs/NAME.py or configs/NAME.py:VARIANT,ATTENTION")
    pod.add_argument("--sweep", action="store_true", help="scale its chips, up to those of --topology, and its tokens")
    pod.add_argument(
        "--out", type=local_path, help="where the report is kept; default tpu_reports/ and the config's name"
    )
    # What is not given is absent, so that an option of layer that is given to model is noticed.
    group = parser.add_argument_group("options of layer, model and --config", argument_default=argparse.SUPPRESS)
    group.add_argument("--form", help=f"{' or '.join(FORMS)}; train is forward and backward (default inference)")
    group.add_argument("--attention", help=f"{', '.join(KINDS)} (default castling)")
    group.add_argument(
        "--batch", type=int, help="images of all devices together (default 128); with --config, of each device"
    )
    group.add_argument("--tokens", type=int, help="of layer (default 197)")
    group.add_argument("--implementation", help=f"of layer: {', '.join(IMPLEMENTATIONS)} (default auto)")
    group.add_argument("--name", help="of model (default deit_base)")
    group.add_argument("--image_size", type=int, help="of model and --config: pixels a side (default the model's own)")
    group.add_argument("--depth", type=int, help="of model: blocks (default the model's own)")
    group.add_argument(
        "--mesh", help=f"of model and --config: sizes of {', '.join(AXES)}, such as data:64,fsdp:-1 (others are 1)"
    )
    group.add_argument(
        "--remat", action="store_true", help="of model and --config: compute blocks again in the backward pass"
    )
    options = vars(parser.parse_args())
    words = ("what", "topology", "devices", "top", "json", "strict", "config", "sweep", "out")
    shared = {word: options.pop(word) for word in words}
    if shared["sweep"] and shared["config"] is None:
        raise InputError("--sweep goes with --config=configs/NAME.py.")
    if shared["config"] is not None:
        incomplete = report_config(options, shared)
    elif shared["what"] is None:
        raise InputError("give --config=configs/NAME.py, or what to compile: FILE.py:NAME, layer or model.")
    else:
        devices = shared["devices"] if shared["devices"] is not None else 0 if "mesh" in options else 1
        figures = report(shared["what"], options, topology=shared["topology"], devices=devices)
        print(json.dumps(figures) if shared["json"] else describe(figures, shared["top"]))
        incomplete = figures["incomplete"]
    sys.exit(shared["strict"] and bool(incomplete))


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
    draw(found, out / f"{stem}.png")
    print(json.dumps(found) if shared["json"] else f"{text}\n\nKept in {out}: {stem}.txt, {stem}.json and {stem}.png.")
    return found["incomplete"]


if __name__ == "__main__":
    main()
