"""Prints what a trained model sees in images.

    python -m castling_jax predict RUN IMAGES... [--top=5] [--csv=FILE] [--sheet=FILE.png]
    python -m castling_jax predict RUN IMAGES... [--score=0.3] [--json=FILE] [--sheet=FILE.png]
    python -m castling_jax predict RUN IMAGES... [--labels=FOLDER] [--sheet=FILE.png]

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or a name of shipped weights, such as digits. IMAGES
are files and folders, whose subfolders are read too. Images are prepared as in the run's evaluation.

Each image has a line: its path, and the most probable classes. With a detector, the line has the objects whose
score is high enough; with a segmenter, the classes that cover most of the image; with a masked autoencoder, the
reconstruction's loss. --csv writes the answers as a table, and --sheet draws the first images with their answers.
--json writes a detector's boxes in COCO's format for results, with the images' paths as their ids, and category_name
beside category_id. The category ids are those of the data that the run learnt from; where weights of an earlier version
do not state them, the classes are counted from 1, in their order. --labels writes a segmenter's masks into a folder: a
PNG for each image, of its size and name, with the class's number in each pixel. It replaces its own masks there, and no
other files. The command names files that it cannot read, and then ends with status 1.

examples:
  python -m castling_jax predict runs/flowers holiday.jpg --top=3
  python -m castling_jax predict runs/flowers photos/ --csv=answers.csv --sheet=answers.png
  python -m castling_jax predict runs/cells photos/ --score=0.5 --json=boxes.json --sheet=boxes.png
  python -m castling_jax predict runs/streets photos/ --labels=masks --sheet=masks.png
"""

import collections
import csv
import io
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from castling_jax.errors import InputError, check, printable
from castling_jax.tools.cli import Parser, command, local_path

ON_A_SHEET = 48  # images
SOFTWARE = "castling_jax predict"  # in each mask of --labels; true masks, without it, are not replaced
SHOWN_SCORE = 0.3  # equal to castling_jax.postprocessing.SHOWN_SCORE, whose import --help must not wait for


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or a name of shipped weights")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_count("--top", None, "most classes (5 if not given) or objects (all) to name for each image")
    least = "smallest score of a detector's object; under the run's evaluation.score_threshold none are found"
    parser.add_argument("--score", type=float, default=SHOWN_SCORE, help=least)
    parser.add_argument("--csv", metavar="FILE", type=local_path, help="write the answers as a table")
    parser.add_argument("--json", metavar="FILE", type=local_path, help="write a detector's boxes in COCO's format")
    parser.add_argument("--labels", metavar="FOLDER", type=local_path, help="write a segmenter's masks, as PNGs")
    parser.add_argument("--sheet", metavar="FILE", type=local_path, help=f"draw the first {ON_A_SHEET} images, as PNG")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    import numpy as np
    from PIL import Image, PngImagePlugin
    from tqdm import tqdm

    from castling_jax.convert.weights import read
    from castling_jax.data.decode import decode
    from castling_jax.fields import number
    from castling_jax.plots import png
    from castling_jax.predictions import class_names, each_image, predictions_of, stream_predictions
    from castling_jax.storage import try_file, try_folder, write_atomically

    number("[0, 1]").check("--score", options.score)
    weights = read(options.run)
    names = class_names(weights)
    predictions = predictions_of(weights, names, top=options.top, score_threshold=options.score)
    if options.json:
        predictions.coco_results([])  # refuses other models than detectors
    if options.labels:
        predictions.label_map(None)  # refuses other models than segmenters
        try_folder(options.labels)
    written = list(filter(None, (options.csv, options.sheet, options.json)))
    for path in written:
        try_file(path)  # refuses a bad path now, before the images are computed
    files = [path for _, path in each_image(options.images)]
    masks = [options.labels / f"{path.stem}.png" for path in files] if options.labels else []
    images = set(map(os.path.realpath, files))
    for path in [*written, *masks]:
        check(os.path.realpath(path) not in images, f"'{path}' is one of the images, which it would replace.")
    for path in masks:
        check(
            not path.exists() or _is_answer(path),
            f"'{path}' was not written by this command, which would replace it: choose another --labels.",
        )
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.labels:
        twice = [name for name, count in collections.Counter(path.stem for path in files).items() if count > 1]
        check(not twice, f"--labels has one name for several images, {''.join(twice[:1])!r}: give them one by one.")
        options.labels.mkdir(parents=True, exist_ok=True)
    answers: list[tuple[Any, Any]] = []
    reader_left = False
    results = stream_predictions(weights, files, predictions)
    for path, answer in tqdm(results, total=len(files), unit="image", disable=None):
        answers.append((path, answer))
        # One broken file among thousands is named, and the others still get answers.
        if isinstance(answer, InputError):
            tqdm.write(str(answer), file=sys.stderr)
            continue
        if options.labels:
            file, text = io.BytesIO(), PngImagePlugin.PngInfo()
            text.add_text("Software", SOFTWARE)
            Image.fromarray(predictions.label_map(answer)).save(file, "PNG", pnginfo=text)
            write_atomically(options.labels / f"{path.stem}.png", file.getvalue())
        if not reader_left:
            try:
                tqdm.write(f"{printable(path)}: {predictions.text(answer)}", file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # as in predict ... | head: the files are still written
                reader_left = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    good = [(path, answer) for path, answer in answers if not isinstance(answer, InputError)]
    if options.csv:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(predictions.table(answers))
        write_atomically(options.csv, table.getvalue().encode(errors="backslashreplace"))
    if options.json:
        write_atomically(options.json, json.dumps(predictions.coco_results(good)).encode())
    if options.sheet and good:
        assert weights.preprocessing is not None  # `stream` refuses weights without it
        shown = good[:ON_A_SHEET]
        pictures = [np.asarray(decode(path.read_bytes(), exif=weights.preprocessing.exif)) for path, _ in shown]
        figure = predictions.draw(pictures, [answer for _, answer in shown])
        write_atomically(options.sheet, png(figure))
    unread = len(answers) - len(good)
    if unread:
        raise InputError(f"{unread:,} of {len(files):,} images cannot be read; they are named above.")


def _is_answer(path: Path) -> bool:
    """Whether a file is a mask that this command wrote."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False


if __name__ == "__main__":
    main()
