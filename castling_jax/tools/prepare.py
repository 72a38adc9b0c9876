"""Prepares a data set for training, once.

    python -m castling_jax prepare NAME [--data_dir=DIR] [--manual_dir=DIR] [--archives=DIR]
    python -m castling_jax prepare masks:ROOT [--ignore_label=N] [--first_label=N]

NAME is a data set of tensorflow-datasets, NAME[/CONFIG][:VERSION]; https://www.tensorflow.org/datasets/catalog lists
them. The command downloads it and writes it to DIR/NAME/VERSION as ArrayRecord files, which training reads at random
access without TensorFlow. Preparing most data sets does need TensorFlow, once, on any machine: pip install
tensorflow-cpu. An interrupted preparation starts anew, and leaves nothing behind that could pass for a whole one.

  imagenet2012       cannot be downloaded without an account. Get ILSVRC2012_img_train.tar (138 GB) and
                     ILSVRC2012_img_val.tar (6 GB) from https://image-net.org/download-images into one folder and name
                     it with --manual_dir. Takes a few hours, and another 145 GB in DIR.
  fashion_mnist      needs neither TensorFlow nor a network where Debian's package dataset-fashion-mnist is installed
                     (apt-get install dataset-fashion-mnist), or --archives names a folder with its four .gz files, or
                     with the published ones. Takes half a minute, and 40 MB.
  folder:PATH        images in PATH/SPLIT/CLASS/ or PATH/CLASS/ need no preparing: the command checks and counts them.
                     So it does with images:PATH, npz:FILE, coco:ROOT, voc:ROOT and masks:ROOT.

examples:
  python -m castling_jax prepare fashion_mnist
  python main.py --config=configs/fashion_mnist.py

  python -m castling_jax prepare imagenet2012 --data_dir=/data/tfds --manual_dir=/data/archives
"""

import sys
from argparse import Namespace

from castling_jax.tools.cli import Parser, any_path, command


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="the data set's name")
    parser.add_argument(
        "--data_dir", metavar="DIR", type=any_path, help="the folder of data sets; ~/tensorflow_datasets if not given"
    )
    parser.add_argument(
        "--manual_dir",
        metavar="DIR",
        type=any_path,
        help="the folder of archives that you downloaded; DIR/downloads/manual if not given",
    )
    parser.add_argument(
        "--archives", metavar="DIR", type=any_path, help="the folder of fashion_mnist's files; Debian's if not given"
    )
    parser.add_argument(
        "--ignore_label",
        metavar="N",
        type=int,
        default=255,
        help="masks:ROOT: the number of pixels without a class (255)",
    )
    parser.add_argument(
        "--first_label", metavar="N", type=int, default=0, help="masks:ROOT: the first class's number (0)"
    )
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    from absl import logging

    from castling_jax.data.prepare import prepare

    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets logs every place that it looks in
    try:
        print(prepare(**vars(options)))
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted; nothing is prepared.")


if __name__ == "__main__":
    main()
