"""What a function would cost on a TPU, by the TPU compiler's own estimate, with no TPU at hand.

    python -m castling_jax report --config=deit:base --topology=v5e:16x16 [--mesh=data:64,fsdp:4]
    python -m castling_jax report --config=deit:base --topology=v5e:16x16 --sweep --batch=128
    python -m castling_jax report FILE.py:NAME [--topology=v5e:2x2] [--devices=1]
    python -m castling_jax report layer [--form=train] [--tokens=197] [--implementation=pallas] ...
    python -m castling_jax report model [--name=deit_base] [--form=train] [--image_size=224] ...
    python -m castling_jax report model --form=train --topology=v5e:16x16 --mesh=data:64,fsdp:4 --batch=32768

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
  links        that time, by the published bandwidth of the links (castling_jax/compile_report/links.py says how)
  incomplete   what cannot be known from the program: a loop whose trip count depends on data (but not one over a few
               numbers), an operation without an estimate, work on the host. It counts once or not at all; with
               --strict the status is 1
  kernels      the share of issue slots that each unit uses, by which one sees what a kernel is bound by: at 100 % a
               unit could do no more. Where none comes near, the kernel waits for results

An estimate ranks designs and shows where time goes; it is not a measurement.
"""

import argparse
import sys
from collections.abc import Sequence

from castling_jax.compile_report.chips import CHIPS
from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path

SHARED = ("what", "topology", "devices", "top", "json", "strict", "config", "fields", "sweep", "out")


def make_parser() -> Parser:
    parser = Parser(__doc__, fields=True)
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
    parser.add_config()
    pod = parser.add_argument_group("of a configuration")
    pod.add_argument("--sweep", action="store_true", help="scale its chips, up to those of --topology, and its tokens")
    pod.add_argument(
        "--out", type=local_path, help="where the report is kept; default tpu_reports/ and the config's name"
    )
    # What is not given is absent, so that an option of layer that is given to model is noticed.
    group = parser.add_argument_group("options of layer, model and --config", argument_default=argparse.SUPPRESS)
    group.add_argument("--form", help="train or inference; train is forward and backward (default inference)")
    group.add_argument("--attention", help="an attention's name (default castling)")
    group.add_argument(
        "--batch", type=int, help="images of all devices together (default 128); with --config, of each device"
    )
    group.add_argument("--tokens", type=int, help="of layer (default 197)")
    group.add_argument("--implementation", help="of layer: auto, xla or pallas (default auto)")
    group.add_argument("--name", help="of model (default deit_base)")
    group.add_argument("--image_size", type=int, help="of model and --config: pixels a side (default the model's own)")
    group.add_argument("--depth", type=int, help="of model: blocks (default the model's own)")
    group.add_argument(
        "--mesh", help="of model and --config: sizes of replica, data, fsdp and tensor, such as data:64,fsdp:-1"
    )
    group.add_argument(
        "--remat", action="store_true", help="of model and --config: compute blocks again in the backward pass"
    )
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = vars(make_parser().read(words))
    shared = {word: options.pop(word) for word in SHARED}
    if shared["config"] is None and (shared["sweep"] or shared["fields"]):
        given = "--sweep" if shared["sweep"] else shared["fields"][0]
        raise InputError(f"{given} goes with --config=NAME.")
    if shared["config"] is None and shared["what"] is None:
        raise InputError("give --config=NAME, or what to compile: FILE.py:NAME, layer or model.")

    from castling_jax.compile_report.report import report_case, report_config

    incomplete = (report_case if shared["config"] is None else report_config)(options, shared)
    sys.exit(shared["strict"] and bool(incomplete))


if __name__ == "__main__":
    main()
