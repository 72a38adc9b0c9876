"""Pictures: of a run, and of what a configuration does to its images.

    python -m castling_jax plots RUN

draws RUN/training.png anew from RUN/metrics.jsonl; a run that is still going on will do.

    python -m castling_jax plots augment --config=configs/NAME.py [--out=FILE.png] [--examples=6]

draws a contact sheet: in each row an image of the training split, first as evaluation sees it, then as training does,
several times; below them mixed batches, with the labels' weights under each image.
"""

import sys
from collections.abc import Sequence

from etils import epath

from castling_jax.errors import check_at_least
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
    parser.add_argument("--out", type=any_path, help="the picture (runs/augment_NAME.png)")
    parser.add_argument("--examples", type=int, default=6, help="rows of single images (6)")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if words is None else words)
    options = make_parser(given).read(given)
    if "run" in options:
        from castling_jax.training.summary import save_picture

        reach_bucket(options.run)
        print(save_picture(options.run))
        return
    check_at_least("--examples", options.examples, 1)
    path = options.out or epath.Path("runs") / f"augment_{epath.Path(options.config.partition(':')[0]).stem}.png"
    try_file(path)

    from castling_jax.training.contact_sheet import draw_augmentations
    from castling_jax.training.overrides import load_overridden

    print(draw_augmentations(load_overridden(options.config, options.fields), path, examples=options.examples))


if __name__ == "__main__":
    main()
