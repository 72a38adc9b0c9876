"""Writes a trained model's features of images.

    python -m castling_jax features RUN IMAGES --out=FILE.npz

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or the name of shipped weights. IMAGES is a folder
whose folders name the labels. FILE.npz has `features` [images, channels], the mean of the last stage's tokens, `labels`
and `files`, for NumPy and for `probe`.

example:
  python -m castling_jax features runs/flowers photos/train --out=train.npz
"""

from argparse import Namespace

from castling_jax.tools.cli import Parser, command, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or a name of shipped weights")
    parser.add_argument("images", type=local_path, help="a folder of images")
    parser.add_argument("--out", metavar="FILE.npz", type=local_path, required=True, help="the file to write")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.probe import save_features

    saved = save_features(options.run, options.images, options.out)
    images, channels = saved.features.shape
    print(f"{options.out}: {channels:,} features of {images:,} images, {len({*saved.labels}):,} labels")


if __name__ == "__main__":
    main()
