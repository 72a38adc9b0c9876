"""Prints what a trained model sees in images.

    python -m castling_jax predict RUN IMAGES... [--top=5] [--csv=FILE] [--sheet=FILE.png]

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or a name of shipped weights, such as digits. IMAGES
are files and folders, whose subfolders are read too. Images are prepared as in the run's evaluation.

Each image has a line: its path, and the most probable classes. --csv writes the same as a table, and --sheet draws the
first images with their answers. The command names files that it cannot read, and then ends with status 1.

examples:
  python -m castling_jax predict runs/flowers holiday.jpg --top=3
  python -m castling_jax predict runs/flowers photos/ --csv=answers.csv --sheet=answers.png
"""

import csv
import io
import os
import sys
from argparse import Namespace
from typing import Any

from castling_jax.errors import InputError, printable
from castling_jax.tools.cli import Parser, command, local_path

ON_A_SHEET = 48  # images


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or a name of shipped weights")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_count("--top", 5, "classes to name for each image")
    parser.add_argument("--csv", metavar="FILE", type=local_path, help="write the answers as a table")
    parser.add_argument("--sheet", metavar="FILE", type=local_path, help=f"draw the first {ON_A_SHEET} images, as PNG")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from castling_jax.convert.weights import read
    from castling_jax.data.decode import decode
    from castling_jax.plots import draw_predictions
    from castling_jax.predictions import class_names, class_probabilities, each_image, rank, stream
    from castling_jax.storage import try_file, write_atomically

    for path in filter(None, (options.csv, options.sheet)):  # before all images are computed
        try_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    weights = read(options.run)
    names = class_names(weights)
    files = [path for _, path in each_image(options.images)]
    columns = [f"{kind}_{place}" for place in range(1, min(options.top, len(names)) + 1) for kind in ("class", "share")]
    rows: list[list[Any]] = [["image", *columns, "error"]]
    drawn: list[tuple[Any, Any]] = []
    unread, reader_left = 0, False
    results = stream(weights, files, class_probabilities)
    for path, probabilities in tqdm(results, total=len(files), unit="image", disable=None):
        # One broken file among thousands is named, and the others are still answered.
        if isinstance(probabilities, InputError):
            unread += 1
            rows.append([path, *[""] * len(columns), probabilities])
            tqdm.write(str(probabilities), file=sys.stderr)
            continue
        answer = rank(probabilities, names, options.top)
        rows.append([path, *(word for pair in answer for word in pair), ""])
        classes = ", ".join(f"{printable(name)} {100 * share:.1f} %" for name, share in answer)
        if not reader_left:
            try:
                tqdm.write(f"{printable(path)}: {classes}", file=sys.stdout)
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
        assert weights.preprocessing is not None  # `stream` refuses weights without it
        pictures = [np.asarray(decode(path.read_bytes(), exif=weights.preprocessing.exif)) for path, _ in drawn]
        figure = draw_predictions(pictures, [answer for _, answer in drawn])
        figure.savefig(options.sheet, dpi=110, format="png")
    if unread:
        raise InputError(f"{unread:,} of {len(files):,} images cannot be read; they are named above.")


if __name__ == "__main__":
    main()
