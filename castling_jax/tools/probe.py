"""Measures features with two simple classifiers.

    python -m castling_jax probe TRAIN.npz TEST.npz [--neighbours=20]

`features` writes both files. The classifiers learn from the first and are measured on the second: one votes among the
nearest neighbours, the other is linear (logistic regression). The second file takes part in no choice.

example:
  python -m castling_jax probe train.npz test.npz
"""

from argparse import Namespace

from castling_jax.tools.cli import Parser, command, local_path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("train", metavar="TRAIN.npz", type=local_path, help="features to learn from")
    parser.add_argument("test", metavar="TEST.npz", type=local_path, help="features to measure on")
    parser.add_argument("--neighbours", type=int, default=20, help="how many neighbours vote")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from castling_jax.probe import probe, read_features
    from castling_jax.tables import aligned

    figures = probe(read_features(options.train), read_features(options.test), neighbours=options.neighbours)
    rows = [
        (f"{figures['neighbours']} nearest neighbours", f"{100 * figures['knn_accuracy']:.2f} %"),
        ("linear", f"{100 * figures['linear_accuracy']:.2f} %"),
    ]
    print(
        f"{figures['test_images']:,} images of {figures['classes']:,} classes, learnt from {figures['train_images']:,}:"
    )
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
