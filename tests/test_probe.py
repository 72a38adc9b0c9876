"""Features in a file, and the two classifiers that measure them."""

import numpy as np
import pytest
from PIL import Image

import castling_jax
from castling_jax.convert.weights import read
from castling_jax.data.sources import digits
from castling_jax.probe import Features, probe, read_features, save_features
from castling_jax.tools import features as features_command
from castling_jax.tools import probe as probe_command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits in a folder for each class: 200 to learn from, 60 to measure on."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 200), ("test", 60)):
        data = digits(split)
        for index in range(count):
            folder = root / split / f"{data.labels[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(255 * data.images[index])).save(folder / f"{index:03}.png")
    return root


@pytest.mark.slow
def test_features_and_probe_as_commands(folders, tmp_path, capsys):
    for split in ("train", "test"):
        features_command.main(["digits", str(folders / split), f"--out={tmp_path}/{split}.npz"])
    assert f"{tmp_path}/train.npz: 64 features of 200 images, 10 labels" in capsys.readouterr().out
    probe_command.main([f"{tmp_path}/train.npz", f"{tmp_path}/test.npz", "--neighbours=5"])
    said = capsys.readouterr().out
    assert said.startswith("60 images of 10 classes, learnt from 200:\n  5 nearest neighbours")
    found = read_features(tmp_path / "test.npz")
    weights = read("digits")
    pixels = castling_jax.preprocess(folders / "test" / str(found.files[7]), weights.preprocessing)
    last = castling_jax.features(weights.model, weights.variables, pixels)[-1]
    # The mean of 4 x 4 tokens in a batch of 32 and alone: some roundings of 6e-8 of numbers of about 1.
    np.testing.assert_allclose(found.features[7], np.asarray(last).mean((1, 2))[0], rtol=0, atol=2e-6)
    assert found.labels[7] == found.files[7].split("/")[0]


def test_the_classifiers_are_what_they_are_called():
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 8))
    labels = np.repeat(["a", "b", "c"], 40)
    vectors = np.repeat(centres, 40, axis=0) + 0.05 * random.normal(size=(120, 8))
    train, test = (Features(vectors[half::2], labels[half::2], labels[half::2]) for half in (0, 1))
    easy = probe(train, test, neighbours=3)
    assert (easy["knn_accuracy"], easy["linear_accuracy"]) == (1.0, 1.0)
    # By hand: the label of the nearest by cosine.
    noisy = Features(random.normal(size=(60, 8)), train.labels, train.files)
    cosine = (test.features / np.linalg.norm(test.features, axis=1)[:, None]) @ (
        noisy.features / np.linalg.norm(noisy.features, axis=1)[:, None]
    ).T
    expected = np.mean(noisy.labels[cosine.argmax(1)] == test.labels)
    assert probe(noisy, test, neighbours=1)["knn_accuracy"] == pytest.approx(expected)


def test_what_is_refused(folders, tmp_path, refuses):
    with refuses("must end in .npz, not"):
        save_features("digits", folders / "test", tmp_path / "features.csv")
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "x.png")
    save_features("digits", tmp_path / "flat", tmp_path / "flat.npz")
    with refuses("flat.npz' has images without a label"):
        read_features(tmp_path / "flat.npz")
    with refuses("nowhere.npz' is no file of features"):
        read_features(tmp_path / "nowhere.npz")
    one = Features(np.zeros((2, 4)), np.array(["a", "b"]), np.array(["", ""]))
    np.savez(tmp_path / "good.npz", **one._asdict())
    whole = (tmp_path / "good.npz").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole.replace(b"\0" * 16, b"\1" * 16)):
        (tmp_path / "other.npz").write_bytes(content)
        with refuses("other.npz' is no file of features"):
            read_features(tmp_path / "other.npz")
    np.save(tmp_path / "bad.npy", one.features)
    with refuses("bad.npy' is no file of features"):
        read_features(tmp_path / "bad.npy")
    np.savez(tmp_path / "other.npz", **one._replace(labels=np.array(["a"]))._asdict())
    with refuses("other.npz' is no file of features: its arrays are not of the same images."):
        read_features(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", **one._replace(features=np.full((2, 4), np.nan))._asdict())
    with refuses("other.npz' has features that are not finite."):
        read_features(tmp_path / "other.npz")
    with refuses("neighbours (--neighbours) must be at most", "2", "not 20"):
        probe(one, one)
    with refuses("a probe needs at least two labels to tell apart, not 'a' alone"):
        probe(Features(one.features, np.array(["a", "a"]), one.files), one, neighbours=1)
    with refuses("channels come from different models"):
        probe(one, Features(np.zeros((2, 5)), one.labels, one.files), neighbours=1)
    with refuses("no training image has the label 'c'"):
        probe(one, Features(np.zeros((1, 4)), np.array(["c"]), np.array([""])), neighbours=1)
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "x.png").write_bytes(b"no image")
    with refuses("bad/a/x.png'"):
        save_features("digits", tmp_path / "bad", tmp_path / "bad.npz")
    assert not (tmp_path / "bad.npz").exists()
