"""Writes the features that a trained model gives images.

    python -m castling_jax features RUN IMAGES --out=FILE.npz

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or shipped weights' name. IMAGES is a folder; the
folders in it are labels. FILE.npz has `features` [images, channels], the mean of the last stage's tokens, `labels` and
`files`, for NumPy and for `probe`.

example:
  python -m castling_jax features runs/flowers photos/train --out=train.npz
"""

from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or shipped weights' name")
    parser.add_argument("images", type=local_path, help="a folder of images")
    parser.add_argument("--out", metavar="FILE.npz", type=local_path, required=True, help="the file to write")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    from castling_jax.probe import save_features

    found = save_features(options.run, options.images, options.out)
    images, channels = found.features.shape
    print(f"{options.out}: {channels:,} features of {images:,} images, {len({*found.labels}):,} labels")


if __name__ == "__main__":
    main()
