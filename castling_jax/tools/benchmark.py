"""Times the attention against softmax, on the machine at hand.

    python -m castling_jax benchmark [--backward] [--models] [--attentions=NAMES] [--out=DIR]

times one attention layer with its projections (float32) over growing numbers of tokens: castling in its inference and
its training form, and softmax, which is jax.nn.dot_product_attention. Where they are installed (pip install torch timm
equimo), PyTorch's softmax attention, the castling block in plain PyTorch and Equimo's castling layer join the run.
The calls take turns, so other work on the machine slows all of them alike. Read the ratios to softmax, whose range over
the repeats is printed too, rather than the milliseconds. The batch falls as the tokens grow: a call has about 2,048
tokens, or one sequence where that is longer. --attentions=window,bridge adds layers of other attentions, and models too
with --models; tokens stand on the largest square grid, and the rest stand before it. The command writes
DIR/benchmark.json (every figure, the machine, versions) and DIR/benchmark.png (time over tokens).
--models times a whole model too, castling in both forms, and states the memory that the compiled program takes beside
its parameters, images and results: --models --model=deit_micro --image-sizes=8,64,128. It draws DIR/models.png. --set
gives the model other arguments, and --no-layers times models alone:

    python -m castling_jax benchmark --no-layers --models --model=pyramid_segmenter --set backbone=deit_small

On two CPU cores the layers take about five minutes, and with --backward and --models all take twenty or more.

    python -m castling_jax benchmark --loader [--out=DIR]

times how training images are read instead, from JPEGs to random crops, on one core. Pillow, which decodes whole images,
and where it is installed TensorFlow, which decodes crops, are timed beside it (pip install tensorflow-cpu). It writes
DIR/benchmark.json alone.

    python -m castling_jax benchmark --startup=digits [--repeats=3]

times the start of a training run instead, of this configuration: the CPU time of each part, with an empty compilation
cache and with the one that the first start filled. It writes no file.
"""

import argparse
from argparse import Namespace
from pathlib import Path

from castling_jax.errors import InputError
from castling_jax.tools.cli import Parser, command, local_path

TOKENS = "49,197,577,1024,4096,16384"


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=integers, default=TOKENS, help="sequence lengths, with commas")
    parser.add_count("--channels", 384, "width of the layer, by default DeiT-S's")
    parser.add_count("--heads", 6, "heads of the layer")
    parser.add_count("--repeats", 11, "timed calls of each layer and model")
    parser.add_argument(
        "--attentions", type=names, default="", help="other attentions to time, with commas, such as window,bridge"
    )
    parser.add_argument("--backward", action="store_true", help="time the gradients too")
    parser.add_argument("--models", action="store_true", help="time whole models too")
    parser.add_argument("--no-layers", action="store_true", help="time models alone")
    parser.add_argument("--model", default="deit_tiny", help="the model's name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another argument of create_model, such as backbone=deit_small; may be repeated",
    )
    parser.add_argument("--image-sizes", type=integers, default="224,384,512", help="its image sizes, with commas")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="make malloc keep freed memory (Linux): long calls then take half the time",
    )
    parser.add_argument("--loader", action="store_true", help="time how images are read instead")
    parser.add_argument("--startup", metavar="CONFIG", help="time a start of this configuration's training instead")
    parser.add_argument("--no-peers", action="store_true", help="leave out PyTorch, timm and Equimo")
    parser.add_argument(
        "--max-score-gib",
        type=float,
        default=1.0,
        help="leave out softmax and training forms where one copy of a call's scores takes more GiB",
    )
    parser.add_argument("--out", type=local_path, default=Path("runs/benchmark"), help="the folder to write")
    return parser


def integers(text: str) -> list[int]:
    """An argparse type: "197,49" -> [49, 197]."""
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) for item in items):
        raise argparse.ArgumentTypeError(f"takes whole numbers of at least 1 with commas between them, not {text!r}")
    return sorted({int(item) for item in items})


def names(text: str) -> list[str]:
    """An argparse type: "window,bridge" -> ["window", "bridge"]."""
    return [name for name in text.split(",") if name]


def refuse_idle_flags(options: Namespace) -> None:
    """Refuses flags that another flag leaves without an effect.

    Raises:
      InputError: there are such flags, or nothing would be timed.
    """
    defaults = vars(make_parser().parse_args([]))
    changed = {name for name, value in vars(options).items() if name in defaults and value != defaults[name]}
    for mode, takes in (("startup", {"repeats"}), ("loader", {"repeats", "out"})):
        if mode in changed and (others := sorted(changed - takes - {mode})):
            flags = ", ".join("--" + name.replace("_", "-") for name in others)
            raise InputError(f"--{mode} times something else, which {flags} does not change: leave one of them out.")
    if options.no_layers and not options.models:
        raise InputError("--no-layers times models alone: give --models too.")
    if not options.max_score_gib > 0:
        raise InputError(f"--max-score-gib must be above 0, not {options.max_score_gib:g}.")


@command(make_parser)
def main(options: Namespace) -> None:
    refuse_idle_flags(options)
    if options.startup is not None:
        from castling_jax.bench.startup import describe_starts, measure_starts

        print("\n".join(describe_starts(measure_starts(options.startup, options.repeats))))
        return
    from castling_jax.bench.attention import JSON_FILE, MODELS_PICTURE, PICTURE_FILE, describe, run

    results = run(options)
    print(describe(results))
    print(f"\n{options.out / JSON_FILE}")
    if results["layers"]:
        print(options.out / PICTURE_FILE)
    if results["models"]:
        print(options.out / MODELS_PICTURE)


if __name__ == "__main__":
    main()
