"""Measures features by two simple classifiers.

    python -m castling_jax probe TRAIN.npz TEST.npz [--neighbours=20]

Both files are written by `features`. The classifiers learn from the first and are measured on the second: one votes
among the nearest neighbours, the other is linear (logistic regression). Nothing is chosen by the second file.

example:
  python -m castling_jax probe train.npz test.npz
"""

from collections.abc import Sequence

from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("train", metavar="TRAIN.npz", type=local_path, help="features to learn from")
    parser.add_argument("test", metavar="TEST.npz", type=local_path, help="features to measure on")
    parser.add_argument("--neighbours", type=int, default=20, help="that vote (default: 20)")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    from castling_jax.probe import probe, read_features

    found = probe(read_features(options.train), read_features(options.test), neighbours=options.neighbours)
    print(
        f"{found['test_images']:,} images of {found['classes']:,} classes, learnt from {found['train_images']:,}:\n"
        f"  {found['neighbours']} nearest neighbours  {100 * found['knn_accuracy']:6.2f} %\n"
        f"  linear                {100 * found['linear_accuracy']:6.2f} %"
    )


if __name__ == "__main__":
    main()
