"""`predict`: a line an image, a table, a sheet; corrupt files are named and the others go on."""

import csv

import numpy as np
import pytest
from PIL import Image

from castling_jax.predictions import predict
from castling_jax.tools import predict as command


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("deep" if number == 2 else "") / f"{number}.png")
    return folder


def test_lines_a_table_and_a_sheet(images, tmp_path, capsys):
    table, sheet = tmp_path / "new" / "answers.csv", tmp_path / "new" / "answers.png"
    command.main(["digits", str(images), "--top=2", f"--csv={table}", f"--sheet={sheet}"])
    lines = capsys.readouterr().out.splitlines()
    files = [images / "0.png", images / "1.png", images / "deep" / "2.png"]
    expected = predict("digits", files, top=2)
    assert lines == [
        f"{file}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in answer)
        for file, answer in zip(files, expected, strict=True)
    ]
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class_1", "share_1", "class_2", "share_2", "error"]
    assert [row[0] for row in rows[1:]] == list(map(str, files))
    assert [(row[1], float(row[2])) for row in rows[1:]] == [answer[0] for answer in expected]
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"


def test_corrupt_files_are_named_and_the_status_is_one(images, tmp_path, capsys):
    (images / "broken.jpg").write_bytes(b"no image")
    table = tmp_path / "answers.csv"
    with pytest.raises(SystemExit) as ended:
        command.main(["digits", str(images), f"--csv={table}"])
    assert ended.value.code == "1 of 4 images cannot be read; they are named above."
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert f"'{images}/broken.jpg': " in captured.err
    with table.open(newline="") as file:
        broken = list(csv.reader(file))[3]
    assert broken[0] == f"{images}/broken.jpg"
    assert broken[1:-1] == [""] * 10
    assert broken[-1].startswith(f"'{images}/broken.jpg': ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digts", "x.png"], "'digts' is neither a run's folder"),
        (["digits", "nowhere"], "1 of 1 images cannot be read"),
        (["digits", "x.png", "--top=0"], "--top must be at least 1, not 0"),
        (["digits", "x.png", "--csv=/dev/null/answers.csv"], "'/dev/null' is a file"),
    ],
)
def test_mistakes_are_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert said in str(ended.value.code)
