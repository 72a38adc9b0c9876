"""Turns a trained model into its inference form, for good.

    python -m castling_jax convert SOURCE OUT [--format=safetensors] [--no-ema] [--bfloat16] [--check] [--no-nms]
                                              [--uint8]

drops the softmax branch, folds batch norm into the layers beside it, and prints what became of every parameter.
SOURCE is a run's folder (the newest checkpoint is read, or the inference folder where there are no checkpoints), the
folder of one checkpoint, RUN/checkpoints/STEP, or an inference folder. OUT is a folder that describes itself in
model.json: the model's name and arguments, how an image becomes its input, the names of its classes, versions and a
checksum. A conversion that fails leaves no OUT behind that could pass for a whole one.

formats:
  safetensors   OUT/variables.safetensors; castling_jax.load_inference(OUT) gives (model, variables)
  orbax         OUT/variables.orbax, a checkpoint; load_inference reads it too
  stablehlo     OUT/program.stablehlo, the forward pass with the weights inside, for CPUs, TPUs and GPUs and any number
                of images. It needs only jax and flatbuffers to run:

                  program = jax.export.deserialize(open("OUT/program.stablehlo", "rb").read())
                  logits = program.call(images)  # [batch, size, size, 3] in float32, as castling_jax.preprocess makes
                                                 # them, or any program that does what model.json's preprocessing says

                With --uint8 the program takes the pixels themselves, uint8 [batch, size, size, 3], and normalises them.
                A detector's program returns a dict: boxes [batch, detections, 4] in pixels of the model's input,
                scores, classes (-1 for none) and count; with --no-nms the scores and boxes of all points. A segmenter's
                program returns the class of each pixel of its input, int32 [batch, height, width].

examples:
  python -m castling_jax convert runs/digits exported --check
  python -m castling_jax convert runs/digits/checkpoints/1000 exported --format=orbax --bfloat16
  python -m castling_jax convert runs/digits/inference program --format=stablehlo --uint8 --check
"""

import argparse
from argparse import Namespace

from castling_jax.tools.cli import Parser, any_path, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", help="a run's folder, a checkpoint's, or an inference folder")
    parser.add_argument("out", type=any_path, help="the folder to write; an earlier conversion there is replaced")
    parser.add_argument("--format", default="safetensors", help="safetensors, orbax or stablehlo")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="export the moving average of the parameters, or the raw parameters; if not given, the ones that the "
        "run's config.train.export names",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="hold the parameters in bfloat16, half the size; the model still computes in its own dtype",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the two forms and the written files on held-out images of the run's dataset, or on the digits",
    )
    parser.add_argument(
        "--nms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether a detector's program drops overlapping boxes itself, or returns all scores and boxes",
    )
    parser.add_argument(
        "--uint8",
        action="store_true",
        help="have a program take uint8 images, a quarter of the bytes, and normalise them itself",
    )
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from absl import logging

    from castling_jax.training.export import convert

    logging.set_verbosity(logging.ERROR)  # Orbax logs every file
    convert(
        options.source,
        options.out,
        format=options.format,
        ema=options.ema,
        bfloat16=options.bfloat16,
        check=options.check,
        nms=options.nms,
        uint8=options.uint8,
    )


if __name__ == "__main__":
    main()
