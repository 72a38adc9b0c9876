"""Estimates what a function would cost on a TPU, with the TPU compiler and no TPU.

    python -m castling_jax report --config=deit:base --topology=v5e:16x16 [--mesh=data:64,fsdp:4]
    python -m castling_jax report --config=deit:base --topology=v5e:16x16 --sweep --batch=128
    python -m castling_jax report FILE.py:NAME [--topology=v5e:2x2] [--devices=1]
    python -m castling_jax report layer [--form=train] [--tokens=197] [--implementation=pallas] ...
    python -m castling_jax report model [--name=deit_base] [--form=train] [--image_size=224] ...
    python -m castling_jax report model --form=train --topology=v5e:16x16 --mesh=data:64,fsdp:4 --batch=32768

With --config it compiles what main.py would run on that pod, the training step and the inference of the configuration,
and both with softmax attention beside them. The report says whether they fit a chip's memory and what takes the space,
where the time goes, what chips send each other, and how long the links need for it. --sweep compiles for growing
numbers of chips and of tokens. The command prints the report and keeps it in --out as text, JSON and a picture; it
keeps the figures of each program too, so that the same command goes on after an interruption.

NAME is a function in FILE.py that returns (function, arguments) or (function, arguments, jit options). The arguments
are trees of jax.ShapeDtypeStruct, and are on all devices where they have no sharding; a NAME that makes shardings takes
an argument `devices`. `layer` is the attention layer of DeiT-B and `model` a whole model, both in bfloat16. With --mesh
`model` is the training step as a pod runs it, and the report is about each device's share.

It needs libtpu: pip install "jax[tpu]". Compiling takes seconds, or many minutes for the training step of a large
model. The report has:

  estimate     the cycles of all operations, one after the other. A loop counts times its trip count, a conditional by
               its longest branch, a predicated region (pl.when) by both sides. A Pallas kernel takes the bundles of its
               schedule or its traffic with HBM, whichever is longer. Copies and the like without an estimate take
               their traffic
  prefetches   asynchronous copies of whole arrays; they run beside the compute and are not in the estimate
  HBM          the memory that the program needs on a device; activations are counted from when arrays are made to when
               they are last used
  collectives  bytes of each kind's results on a device; their time is not in the estimate
  links        that time, by the published bandwidth of the links (castling_jax/compile_report/links.py says how)
  incomplete   what the program's text does not tell: a loop whose trip count depends on data (but not one over a few
               numbers), an operation without an estimate, work on the host. It counts once or not at all; with
               --strict the status is 1
  kernels      the share of issue slots that each unit uses. It shows what limits a kernel: at 100 % a unit could do no
               more; where no unit comes near, the kernel waits for results

An estimate ranks designs and shows where time goes; it is not a measurement.
"""

import argparse
import sys
from argparse import Namespace

from castling_jax.compile_report.chips import CHIPS
from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, command, local_path

SHARED = ("what", "topology", "devices", "top", "json", "strict", "config", "fields", "sweep", "out")


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
    parser.add_argument("what", nargs="?", help="FILE.py:NAME, layer or model; not with --config")
    parser.add_argument("--topology", default="v5e:2x2", help=f"a pod of {', '.join(CHIPS)}")
    parser.add_argument(
        "--devices",
        type=int,
        help="how many of its devices to use, 0 for all; if not given 1, or all with --mesh or --config",
    )
    parser.add_argument("--top", type=int, default=12, help="how many of the longest operations to print")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--strict", action="store_true", help="end with status 1 where something could not be counted")
    parser.add_config()
    pod = parser.add_argument_group("options of --config alone")
    pod.add_argument("--sweep", action="store_true", help="scale the chips, up to --topology, and the tokens")
    pod.add_argument(
        "--out", type=local_path, help="the folder for the report; tpu_reports/ and the config's name if not given"
    )
    # An option that is not given is absent, so that load_case notices an option of layer that is given to model.
    group = parser.add_argument_group("options of layer, model and --config", argument_default=argparse.SUPPRESS)
    group.add_argument("--form", help="layer and model: train or inference; train is forward and backward (inference)")
    group.add_argument("--attention", help="layer and model: an attention's name (castling)")
    group.add_argument(
        "--batch", type=int, help="images of all devices together (128); with --config, images of each device"
    )
    group.add_argument("--tokens", type=int, help="layer: number of tokens (197)")
    group.add_argument("--implementation", help="layer: auto, xla or pallas (auto)")
    group.add_argument("--name", help="model: its name (deit_base)")
    group.add_argument("--image_size", type=int, help="model and --config: pixels a side (the model's own)")
    group.add_argument("--depth", type=int, help="model: number of blocks (the model's own)")
    group.add_argument(
        "--mesh", help="model and --config: sizes of replica, data, fsdp and tensor, such as data:64,fsdp:-1"
    )
    group.add_argument(
        "--remat", action="store_true", help="model and --config: compute blocks again in the backward pass"
    )
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    of_a_config = ["--sweep"] * options.sweep + options.fields
    if options.config is None and of_a_config:
        raise InputError(f"{of_a_config[0]} goes with --config=NAME.")
    if options.config is None and options.what is None:
        raise InputError("give --config=NAME, or what to compile: FILE.py:NAME, layer or model.")

    from castling_jax.compile_report.report import report_case, report_config

    of_the_case = {word: value for word, value in vars(options).items() if word not in SHARED}
    incomplete = (report_case if options.config is None else report_config)(of_the_case, options)
    sys.exit(options.strict and bool(incomplete))


if __name__ == "__main__":
    main()
