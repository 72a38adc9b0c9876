import io

import numpy as np
import pytest
from PIL import Image

from castling_jax.bench import decode_speed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decode_speed, "SIZES", ((60, 80), (120, 160)))
    monkeypatch.setattr(decode_speed, "SIDE", 16)


def test_every_reader_is_timed_at_every_size(small):
    rows, notes = decode_speed.measure_reading(2, count=4)
    readers, _ = decode_speed.find_readers()
    assert [(row["height"], row["width"], row["name"]) for row in rows] == [
        (height, width, name) for height, width in decode_speed.SIZES for name in readers
    ]
    for row in rows:
        assert row["images_per_second"]["min"] > 0
        assert row["ratio_to_pillow"]["min"] <= row["ratio_to_pillow"]["median"] <= row["ratio_to_pillow"]["max"]
        if row["name"] == decode_speed.WHOLE:
            assert set(row["ratio_to_pillow"].values()) == {1.0}
    text = "\n".join(decode_speed.describe_reading(rows))
    assert text.count("JPEGs of") == 2
    assert all(text.count(f"{name} ") == 2 for name in readers)
    assert all("left out" in note for note in notes)


def test_without_tensorflow_a_note_says_so(monkeypatch):
    monkeypatch.setattr(decode_speed.importlib.util, "find_spec", lambda name: None)
    readers, (note,) = decode_speed.find_readers()
    assert list(readers)[:3] == [decode_speed.WHOLE, "castling_jax", "castling_jax, bilinear"]
    assert not any("tf.data" in name for name in readers)
    assert note == "TensorFlow is not installed: tf.data's decode_and_crop_jpeg is left out."


def test_images_are_jpegs_of_a_photographs_detail():
    ((data, (top, left, height, width)),) = decode_speed.synthetic_crops(1, 375, 500)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (500, 375))
        assert np.asarray(image).std() > 30
    assert 60e3 < len(data) < 150e3
    assert top + height <= 375
    assert left + width <= 500
