"""Says what a trained model sees in images.

    python -m castling_jax predict RUN IMAGES... [--top=5] [--csv=FILE] [--sheet=FILE.png]

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or shipped weights' name, such as digits. IMAGES are
files and folders; images in folders below count too. The numbers are those of the run's evaluation.

Each image is a line: its path, and the most probable classes. --csv writes the same as a table, and --sheet draws the
first images with their answers. Files that cannot be read are named, and the command then ends with status 1.

examples:
  python -m castling_jax predict runs/flowers holiday.jpg --top=3
  python -m castling_jax predict runs/flowers photos/ --csv=answers.csv --sheet=answers.png
"""

import csv
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from castling_jax.errors import InputError, printable
from castling_jax.tools.cli import Parser, ending_in_a_sentence, local_path

ON_A_SHEET = 48  # images


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or shipped weights' name")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--top", type=int, default=5, help="classes of each image (default: 5)")
    parser.add_argument("--csv", metavar="FILE", type=local_path, help="write the answers as a table")
    parser.add_argument("--sheet", metavar="FILE", type=local_path, help=f"draw the first {ON_A_SHEET} images, as PNG")
    return parser


@ending_in_a_sentence()
def main(words: Sequence[str] | None = None) -> None:
    options = make_parser().read(words)

    import numpy as np
    from tqdm import tqdm

    from castling_jax.convert.weights import read
    from castling_jax.data.decode import decode
    from castling_jax.errors import check_at_least
    from castling_jax.plots import draw_predictions
    from castling_jax.predictions import class_names, class_probabilities, each_image, rank, stream
    from castling_jax.storage import try_file, write_atomically

    check_at_least("--top", options.top, 1)
    for path in filter(None, (options.csv, options.sheet)):
        try_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    weights = read(options.run)
    names = class_names(weights)
    files = [path for _, path in each_image(options.images)]
    columns = [f"{kind}_{place}" for place in range(1, min(options.top, len(names)) + 1) for kind in ("class", "share")]
    rows: list[list[Any]] = [["image", *columns, "error"]]
    drawn: list[tuple[Any, Any]] = []
    unread, reader_left = 0, False
    for path, found in tqdm(stream(weights, files, class_probabilities), total=len(files), unit="image", disable=None):
        if isinstance(found, InputError):
            unread += 1
            rows.append([path, *[""] * len(columns), found])
            tqdm.write(str(found), file=sys.stderr)
            continue
        answer = rank(found, names, options.top)
        rows.append([path, *(word for pair in answer for word in pair), ""])
        said = ", ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in answer)
        if not reader_left:
            try:
                tqdm.write(f"{printable(path)}: {said}", file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # as in predict ... | head: the files are still written
                reader_left = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if len(drawn) < ON_A_SHEET:
            drawn.append((path, answer))
    if options.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(options.csv, text.getvalue().encode(errors="backslashreplace"))
    if options.sheet and drawn:
        assert weights.preprocessing is not None  # or `stream` would have refused
        pictures = [np.asarray(decode(path.read_bytes(), exif=weights.preprocessing.exif)) for path, _ in drawn]
        figure = draw_predictions(pictures, [answer for _, answer in drawn])
        figure.savefig(options.sheet, dpi=110, format="png")
    if unread:
        raise InputError(f"{unread:,} of {len(files):,} images cannot be read; they are named above.")


if __name__ == "__main__":
    main()
