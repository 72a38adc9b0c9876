"""images:PATH, images without labels."""

import os

import numpy as np
import pytest
from PIL import Image

from castling_jax.data.prepare import prepare
from castling_jax.data.sources import find_splits, load_dataset
from castling_jax.models.registry import abstract_model
from castling_jax.tasks.registry import check_dataset
from castling_jax.training.config_files import load_config
from castling_jax.training.contact_sheet import draw_sheet


@pytest.fixture
def photos(tmp_path):
    """20 images in two folders, whose names mean nothing, and a note."""
    for number in range(20):
        folder = tmp_path / ("march" if number % 2 else "april/week 1")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 32, 3), number, np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "note.txt").write_text("")
    return tmp_path


def test_all_images_below_the_folder(photos):
    dataset = load_dataset(f"images:{photos}", "train")
    assert (dataset.annotation, dataset.classes, dataset.num_classes, len(dataset)) == ("none", (), 0, 20)
    assert dataset[0] == {"image": (photos / dataset.files[0]).read_bytes()}
    assert dataset.describe(0) == f"'{photos}/april/week 1/0.png'"
    assert dataset.skipped == {".txt": 1}
    splits = find_splits(f"images:{photos}")
    assert splits == ("train without 10%", "10% of train")
    rest, held_out = (load_dataset(f"images:{photos}", split) for split in splits)
    assert len(held_out) == 2
    assert sorted([*rest.files, *held_out.files]) == list(dataset.files)
    assert rest.contents() != dataset.contents()


def test_folders_that_are_named_like_splits(photos):
    (photos / "march").rename(photos / "train")
    (photos / "april").rename(photos / "val")
    assert find_splits(f"images:{photos}") == ("train", "val")
    assert len(load_dataset(f"images:{photos}", "train")) == 10
    assert load_dataset(f"images:{photos}", "val").files[0] == "week 1/0.png"


def test_prepare_counts_and_says_the_command(photos):
    assert prepare(f"images:{photos}").splitlines() == [
        f"{photos}: images without labels",
        "  train without 10%: 18 images",
        "  10% of train: 2 images",
        "  skipped, because their names have no image's suffix: 1 .txt",
        "To learn from them, with images of 24 x 24 pixels:",
        f"  python main.py --config=images:24 --config.dataset.name=images:{photos}",
    ]


def test_a_name_that_is_not_utf8(photos):
    """Python has it with lone surrogates, which UTF-8 cannot encode."""
    contents = load_dataset(f"images:{photos}", "train").contents()
    (photos / "march" / "1.png").rename(photos / "march" / os.fsdecode(b"\xff.png"))
    assert load_dataset(f"images:{photos}", "train").contents() != contents


def test_the_augmentations_of_images_without_labels_are_drawn(photos):
    config = load_config("images:24")
    config.dataset.name = f"images:{photos}"
    config.model.update(depth=1, embed_dim=16, num_heads=1, decoder_depth=1)
    sheet = draw_sheet(config, examples=1)
    assert len([axis for axis in sheet.axes if axis.images]) == 8


def test_what_is_refused(photos, refuses):
    with refuses(f"there is no folder '{photos}/nowhere'"):
        load_dataset(f"images:{photos}/nowhere", "train")
    with refuses(f"unknown split of '{photos}' 'val' (known: train)"):
        load_dataset(f"images:{photos}", "val")
    (photos / "empty").mkdir()
    with refuses(f"the split 'train' of '{photos}/empty' holds no images (.bmp"):
        load_dataset(f"images:{photos}/empty", "train")
    with refuses("deit_micro needs images with label, and these have none."):
        check_dataset(abstract_model("deit_micro", num_classes=2), load_dataset(f"images:{photos}", "train"))


@pytest.mark.parametrize(("argument", "backbone", "patch"), [("24", "deit_micro", 3), ("224", "deit_tiny", None)])
def test_pre_training_and_what_follows_it_have_one_backbone(argument, backbone, patch):
    before, after = (load_config(f"{name}:{argument}").model for name in ("images", "masks"))
    assert (before.name, after.name) == ("mae", "pyramid_segmenter")
    for model in (before, after):
        assert (model.backbone, model.get("patch_size")) == (backbone, patch)


@pytest.mark.parametrize("name", ["images", "masks", "folder"])
def test_a_model_that_is_no_backbone_is_refused(refuses, name):
    with refuses("unknown model 'mae' (known: deit_tiny, "):
        load_config(f"{name}:224,mae")


def test_the_mask_starts_below_uniform_weights():
    cases = [("images", "224", 50), ("masks", "224", 197), ("images", "24", 17), ("masks", "24", 65)]
    for name, argument, tokens in [*cases, ("masks", "64,deit_micro", 1025), ("masks", "224,levit_128s", 197)]:
        assert load_config(f"{name}:{argument}").mask.start_threshold == min(0.02, 0.8 / tokens)
