import numpy as np
import pytest
from PIL import Image

import castling_jax.plots
from castling_jax.convert.run_folder import write_config
from castling_jax.errors import InputError
from castling_jax.tasks.classification.task import Classification
from castling_jax.tools import plots
from castling_jax.training import contact_sheet
from castling_jax.training.config import default_config
from castling_jax.training.config_files import load_config
from castling_jax.training.metrics import MetricsWriter
from castling_jax.training.summary import save_picture
from tests.data.box_files import write_coco
from tests.pictures import check_legible


def test_picture_is_drawn_from_the_metrics_alone(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=0)
    for step in range(1, 20):
        line = {"loss": 2 / step, "learning_rate": 1e-3, "mask_threshold": step / 20, "mask_density": [0.5, 1 / step]}
        if step % 5 == 0:
            line |= {"accuracy_train_form": 0.9, "accuracy_inference_form": 0.8, "eval_loss": 1.0}
        writer.write(step, line)
    writer.close()
    with Image.open(save_picture(tmp_path)) as picture:
        assert picture.size > (800, 500)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_a_run_that_has_evaluated_before_it_logged_is_drawn(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=0)
    evaluation = {"accuracy_train_form": 0.9, "accuracy_inference_form": 0.8, "eval_loss": 1.0, "mask_threshold": 0.1}
    writer.write(5, evaluation)
    writer.close()
    assert save_picture(tmp_path).exists()


def test_a_detectors_picture_is_drawn_anew_as_a_detectors(tmp_path, monkeypatch):
    """By the command too, at any time: before the first evaluation nothing but config.json tells the task."""
    writer = MetricsWriter(tmp_path, first_step=0)
    writer.write(5, {"loss": 1.0, "learning_rate": 1e-3, "mask_threshold": 0.5})
    writer.close()
    config = default_config()
    config.model.update(name="picodet_s", backbone="deit_micro", patch_size=16, image_size=160)
    config.mask.kind = "fade"
    write_config(tmp_path, config.to_dict())
    drawn = []
    draw = castling_jax.plots.draw_training

    def keep(history, **options):
        drawn.append(draw(history, **options))
        return drawn[0]

    monkeypatch.setattr(castling_jax.plots, "draw_training", keep)
    plots.main([str(tmp_path)])
    texts = [axis.get_title() for axis in drawn[0].axes] + [axis.get_ylabel() for axis in drawn[0].axes]
    for said in ("Held-out mAP", "varifocal + GIoU + distribution focal loss", "Softmax branch kept by the fade"):
        assert said in texts, texts


def test_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics to draw: metrics.jsonl is missing or empty"):
        save_picture(tmp_path)


CONFIG = """
from castling_jax.training.config import (default_config)


def get_config():
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 1})
    config.augment.update(AUGMENT)
    return config
"""


def sheet_of(folder, augment, *arguments):
    (folder / "few.py").write_text(CONFIG.replace("AUGMENT", repr(augment)))
    plots.main(["augment", f"--config={folder / 'few.py'}", f"--out={folder / 'deep' / 'sheet.png'}", *arguments])
    with Image.open(folder / "deep" / "sheet.png") as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.slow
def test_contact_sheet_shows_single_images_and_mixed_batches(tmp_path, monkeypatch, capsys):
    shown = []
    show = contact_sheet._show
    monkeypatch.setattr(
        contact_sheet, "_show", lambda axis, image, *rest: shown.append(image) or show(axis, image, *rest)
    )
    plain = sheet_of(tmp_path, {}, "--examples=2")
    assert capsys.readouterr().out.strip() == str(tmp_path / "deep" / "sheet.png")
    rows = np.reshape(shown, (2, contact_sheet.COLUMNS, 8, 8, 3))
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))  # nothing is done to them
    shown.clear()
    mixed = sheet_of(tmp_path, {"shift_pixels": 1, "mixup": 0.8, "cutmix": 1.0}, "--examples=2")
    after = np.reshape(shown, (2 + contact_sheet.BATCHES, contact_sheet.COLUMNS, 8, 8, 3))
    np.testing.assert_array_equal(after[:2, 0], rows[:, 0])  # as evaluation sees them
    assert len({image.tobytes() for image in after[0]}) > 3
    assert mixed.shape[0] > plain.shape[0]


def test_the_contact_sheet_is_legible():
    config = load_config("digits")
    config.augment.mixup = 0.8
    check_legible(contact_sheet.draw_sheet(config, examples=1))


def test_wide_images_leave_no_gaps():
    config = load_config("digits")
    config.model.image_size = (8, 32)
    figure = contact_sheet.draw_sheet(config, examples=6)
    figure.draw_without_rendering()
    shown = sum(axis.bbox.height for axis in figure.axes[:: contact_sheet.COLUMNS])
    assert shown > 0.4 * figure.bbox.height  # rows as high as they are wide would make it a fifth


def test_a_corrupt_image_is_passed_over(tmp_path):
    """A detector's data set, in whose sheet the next image stands in the corrupt one's place."""
    (write_coco(tmp_path, "train") / "train" / "000.jpg").write_bytes(b"no image")
    config = load_config("cells")
    config.dataset.update(name=f"coco:{tmp_path}", eval_split="train")
    figure = contact_sheet.draw_sheet(config, examples=1)
    assert figure.axes[0].get_ylabel() == "0 boxes"  # the second image's


def test_labels_of_mixed_images_are_their_heaviest():
    task = Classification(num_classes=4, label_smoothing=0.12)  # 0.03 for each class
    classes = ["cat", "dog", "owl", "fox\n"]
    assert task.caption({"target": np.array([0.03, 0.61, 0.03, 0.33])}, classes) == "dog: 0.61, fox\\n: 0.33"
    assert task.caption({"target": np.array([0.91, 0.03, 0.03, 0.03])}, classes) == "cat: 0.91"
    assert task.caption({"label": 2}, classes) == "owl"
    two = Classification(num_classes=2)
    assert two.caption({"target": np.array([0.3, 0.7])}, classes) == "dog: 0.70, cat: 0.30"
    assert two.caption({"target": np.array([0.5, 0.5])}, classes) == "cat: 0.50, dog: 0.50"
    assert two.caption({"target": np.array([0.0, 1.0])}, classes) == "dog: 1.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["augment", "--config=nowhere.py"], "there is no configuration file 'nowhere.py'."),
        (["augment", "--config=configs/digits.py", "--examples=0"], "--examples must be at least 1, not 0."),
        (["nowhere"], "'nowhere' has no metrics to draw"),
    ],
)
def test_command_line_says_what_is_wrong_without_a_traceback(arguments, message):
    with pytest.raises(SystemExit, match=message):
        plots.main(arguments)


def test_a_wrong_field_is_refused(tmp_path):
    (tmp_path / "few.py").write_text(CONFIG.replace("AUGMENT", "{'flip': 2.0}"))
    with pytest.raises(InputError, match="config.augment.flip must be a number in"):
        load_config(str(tmp_path / "few.py"))


@pytest.mark.parametrize(("arguments", "said"), [(["--help"], "RUN"), (["augment", "--help"], "--examples")])
def test_help_tells_of_both_pictures(capsys, arguments, said):
    with pytest.raises(SystemExit, match="0"):
        plots.main(arguments)
    text = capsys.readouterr().out
    assert said in text
    assert "contact sheet" in text
