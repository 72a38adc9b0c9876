"""Draws a run, or what a configuration does to its images.

    python -m castling_jax plots RUN

draws RUN/training.png anew from RUN/metrics.jsonl. The run may still be going on.

    python -m castling_jax plots augment --config=configs/NAME.py [--out=FILE.png] [--examples=6]

draws a contact sheet. Each row shows an image of the training split, first as evaluation sees it and then several times
as training does. Below them are mixed batches, with the labels' weights under each image.
"""

import sys
from collections.abc import Sequence

from etils import epath

from castling_jax.storage import reach_bucket, try_file
from castling_jax.tools.cli import Parser, any_path, ending_in_a_sentence


def make_parser(words: Sequence[str] = ()) -> Parser:
    """The parser for `plots RUN`, or for `plots augment` where that is the first word."""
    if list(words[:1]) != ["augment"]:
        parser = Parser(__doc__)
        parser.add_argument("run", type=any_path, help="the folder of a run, such as runs/digits, or: augment")
        return parser
    parser = Parser(__doc__, fields=True)
    parser.add_argument("augment", choices=["augment"], help="draw what a configuration does to its images")
    parser.add_config(required=True)
    parser.add_argument("--out", type=any_path, help="the picture to write; runs/augment_NAME.png if not given")
    parser.add_count("--examples", 6, "rows of single images")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    options = make_parser(words).read(words)
    if "run" in options:
        from castling_jax.training.summary import save_picture

        reach_bucket(options.run)
        print(save_picture(options.run))
        return
    path = options.out or epath.Path("runs") / f"augment_{epath.Path(options.config.partition(':')[0]).stem}.png"
    try_file(path)

    from castling_jax.training.contact_sheet import draw_augmentations
    from castling_jax.training.overrides import load_overridden

    print(draw_augmentations(load_overridden(options.config, options.fields), path, examples=options.examples))


if __name__ == "__main__":
    main()
