"""Prints what a trained model sees in images.

    python -m castling_jax predict RUN IMAGES... [--top=5] [--csv=FILE] [--sheet=FILE.png]
    python -m castling_jax predict RUN IMAGES... [--score=0.3] [--json=FILE] [--sheet=FILE.png]

RUN is a run's folder, RUN/checkpoints/STEP, an inference folder, or a name of shipped weights, such as digits. IMAGES
are files and folders, whose subfolders are read too. Images are prepared as in the run's evaluation.

Each image has a line: its path, and the most probable classes. With a detector, the line has the objects whose
score is high enough. --csv writes the answers as a table, and --sheet draws the first images with their answers. --json
writes a detector's boxes in COCO's format for results, with the images' paths as their ids. The command names files
that it cannot read, and then ends with status 1.

examples:
  python -m castling_jax predict runs/flowers holiday.jpg --top=3
  python -m castling_jax predict runs/flowers photos/ --csv=answers.csv --sheet=answers.png
  python -m castling_jax predict runs/cells photos/ --score=0.5 --json=boxes.json --sheet=boxes.png
"""

import csv
import io
import json
import os
import sys
from argparse import Namespace
from typing import Any

from castling_jax.errors import InputError, printable
from castling_jax.tools.cli import Parser, command, local_path

ON_A_SHEET = 48  # images
SHOWN_SCORE = 0.3  # equal to castling_jax.postprocessing.SHOWN_SCORE, whose import --help must not wait for


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run's folder, a checkpoint's, an inference folder, or a name of shipped weights")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_count("--top", None, "most classes (5 if not given) or objects (all) to name for each image")
    parser.add_argument("--score", type=float, default=SHOWN_SCORE, help="smallest score of a detector's object")
    parser.add_argument("--csv", metavar="FILE", type=local_path, help="write the answers as a table")
    parser.add_argument("--json", metavar="FILE", type=local_path, help="write a detector's boxes in COCO's format")
    parser.add_argument("--sheet", metavar="FILE", type=local_path, help=f"draw the first {ON_A_SHEET} images, as PNG")
    return parser


@command(make_parser)
def main(options: Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from castling_jax.convert.weights import read
    from castling_jax.data.decode import decode
    from castling_jax.fields import number
    from castling_jax.plots import draw_objects, draw_predictions
    from castling_jax.predictions import class_names, each_image, stream_predictions
    from castling_jax.storage import try_file, write_atomically

    number("[0, 1]").check("--score", options.score)
    weights = read(options.run)
    names = class_names(weights)
    is_detector = weights.model is not None and weights.model.task == "detection"
    if options.json and not is_detector:
        raise InputError("--json is for a detector's boxes: a classifier's answers go to --csv.")
    for path in filter(
        None, (options.csv, options.sheet, options.json)
    ):  # refuse a bad path now, before the images are computed
        try_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    files = [path for _, path in each_image(options.images)]
    answers: list[tuple[Any, Any]] = []
    reader_left = False
    results = stream_predictions(weights, files, names, top=options.top, score_threshold=options.score)
    for path, answer in tqdm(results, total=len(files), unit="image", disable=None):
        answers.append((path, answer))
        # One broken file among thousands is named, and the others still get answers.
        if isinstance(answer, InputError):
            tqdm.write(str(answer), file=sys.stderr)
            continue
        texts = [f"{printable(name)} {_score_text(score, is_detector)}" for name, score, *_ in answer]
        if not reader_left:
            try:
                tqdm.write(f"{printable(path)}: {', '.join(texts) or 'nothing'}", file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # as in predict ... | head: the files are still written
                reader_left = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    good = [(path, answer) for path, answer in answers if not isinstance(answer, InputError)]
    if options.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(_object_rows(answers) if is_detector else _class_rows(answers))
        write_atomically(options.csv, text.getvalue().encode(errors="backslashreplace"))
    if options.json:
        write_atomically(options.json, json.dumps(_coco_results(good, names)).encode())
    if options.sheet and good:
        assert weights.preprocessing is not None  # `stream` refuses weights without it
        shown = good[:ON_A_SHEET]
        pictures = [np.asarray(decode(path.read_bytes(), exif=weights.preprocessing.exif)) for path, _ in shown]
        figure = (draw_objects if is_detector else draw_predictions)(pictures, [answer for _, answer in shown])
        figure.savefig(options.sheet, dpi=110, format="png")
    unread = len(answers) - len(good)
    if unread:
        raise InputError(f"{unread:,} of {len(files):,} images cannot be read; they are named above.")


def _score_text(score: float, is_detector: bool) -> str:
    return f"{score:.2f}" if is_detector else f"{100 * score:.1f} %"


def _class_rows(answers: list[tuple[Any, Any]]) -> list[list[Any]]:
    """A table with a line for each image: its most probable classes, or why it cannot be read."""
    count = max((len(answer) for _, answer in answers if not isinstance(answer, InputError)), default=0)
    header = [f"{kind}_{place}" for place in range(1, count + 1) for kind in ("class", "share")]
    rows = [["image", *header, "error"]]
    for path, answer in answers:
        unread = isinstance(answer, InputError)
        words = [""] * len(header) if unread else [word for pair in answer for word in pair]
        rows.append([path, *words, answer if unread else ""])
    return rows


def _object_rows(answers: list[tuple[Any, Any]]) -> list[list[Any]]:
    """A table with a line for each object, and one for each image without any or that cannot be read."""
    rows = [["image", "class", "score", "x0", "y0", "x1", "y1", "error"]]
    for path, answer in answers:
        if isinstance(answer, InputError):
            rows.append([path, *[""] * 6, str(answer)])
            continue
        rows += [[path, name, score, *box, ""] for name, score, box in answer] or [[path, *[""] * 7]]
    return rows


def _coco_results(answers: list[tuple[Any, Any]], names: list[str]) -> list[dict[str, Any]]:
    """COCO's results, with the images' paths as ids and the classes counted from 1."""
    return [
        {
            "image_id": str(path),
            "category_id": names.index(name) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for path, answer in answers
        for name, score, (x0, y0, x1, y1) in answer
    ]


if __name__ == "__main__":
    main()
