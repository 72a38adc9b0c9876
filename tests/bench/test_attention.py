import json

import numpy as np
import pytest
from PIL import Image

from castling_jax.bench import attention, rivals
from castling_jax.bench.models import _attentions, draw_models
from castling_jax.models.attention.core import Places
from castling_jax.models.deit import DeiT, DeiTConfig
from castling_jax.models.registry import MODELS
from castling_jax.tools import benchmark
from tests.pictures import check_legible

TINY = ["--channels=8", "--heads=2", "--repeats=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of everything on tiny sizes, in which the quadratic layers are left out at 40 tokens."""
    out = tmp_path_factory.mktemp("benchmark")
    limit = 4 * 32 * 2 * 39**2 / 2**30  # just under the scores at 40 tokens, 32 x 2 x 40^2 numbers of 4 bytes
    arguments = [
        *TINY,
        "--attentions=bridge",
        "--tokens=40,9",
        "--backward",
        f"--max-score-gib={limit}",
        f"--out={out}",
        "--no-peers",
    ]
    nano = DeiTConfig(image_size=8, patch_size=2, embed_dim=8, depth=1, num_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "deit_nano", (DeiT, nano))
        arguments += ["--models", "--model=deit_nano", "--image-sizes=8"]
        results = attention.run(benchmark.make_parser().read(arguments))
    return out, results


@pytest.mark.slow
def test_every_case_is_timed_and_what_is_too_long_is_said(finished):
    _, results = finished
    names = {}
    for row in results["layers"]:
        assert 0 < row["milliseconds"]["min"] <= row["milliseconds"]["median"] <= row["milliseconds"]["max"]
        names.setdefault((row["pass"], row["tokens"], row["batch"]), []).append(row["name"])
    ours = ["softmax", "castling, inference form", "castling, training form", "bridge"]
    linear = ["castling, inference form", "bridge"]
    assert names == {
        (kind, tokens, batch): ours if tokens < 40 else linear
        for kind in ("forward", "forward and backward")
        for tokens, batch in ((9, 128), (40, 32))
    }
    (note,) = results["notes"]
    assert note.startswith("40 tokens without quadratic layers: ")
    assert note.endswith("(--max-score-gib).")


@pytest.mark.slow
def test_ratios_are_to_softmax_of_the_same_run(finished):
    _, results = finished
    for row in results["layers"] + results["models"]:
        if row["tokens"] == 40:
            assert "ratio_to_softmax" not in row
        elif row["name"] == "softmax":
            assert set(row["ratio_to_softmax"].values()) == {1.0}
        else:
            ratio = row["ratio_to_softmax"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


@pytest.mark.slow
def test_models_are_timed_in_both_forms(finished):
    _, results = finished
    rows = [(row["model"], row["image_size"], row["tokens"], row["batch"]) for row in results["models"]]
    assert set(rows) == {("deit_nano", 8, 17, 64)}
    names = ["softmax", "castling, inference form", "castling, training form", "bridge"]
    assert [(row["pass"], row["name"]) for row in results["models"]] == [
        *(("forward", name) for name in names),
        *(("forward and backward", name) for name in names if name != "castling, inference form"),
    ]


def test_gradients_are_of_training_forms():
    """Softmax's gradients pass the batch norms that castling's pass."""
    assert _attentions(["bridge"], backward=True) == {
        "softmax": ("softmax", "train"),
        "castling, training form": ("castling", "train"),
        "bridge": ("bridge", "train"),
    }


@pytest.mark.slow
def test_files_hold_the_figures_and_a_picture(finished):
    out, results = finished
    assert json.loads((out / "benchmark.json").read_text()) == results
    assert {"jax", "castling_jax"} <= results["versions"].keys()
    assert results["machine"]["cores"] >= 1
    with Image.open(out / "benchmark.png") as picture:
        assert picture.size > (1000, 800)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_the_pictures_are_legible(finished):
    out, results = finished
    check_legible(attention.draw(results))
    check_legible(draw_models(results["models"], "deit_nano"))
    assert (out / "models.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_models_alone_are_timed_with_the_memory_that_they_need(tmp_path, capsys):
    """Softmax weights of 4 heads at 256 tokens, a MiB an image, are in softmax's program and not in castling's."""
    backbone = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 4}
    changes = {"backbone": "deit_micro", "backbone_arguments": backbone, "head_channels": 8, "num_classes": 2}
    overrides = [f"--set={name}={value}" for name, value in changes.items()]
    options = ["--no-layers", "--models", "--backward", "--no-peers", "--repeats=1"]
    benchmark.main([*options, "--model=pyramid_segmenter", "--image-sizes=16,64", *overrides, f"--out={tmp_path}"])
    assert {file.name for file in tmp_path.iterdir()} == {"benchmark.json", "models.png"}
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert not results["layers"]
    memory = {
        row["name"]: row["temporary_mib"] / row["batch"]
        for row in results["models"]
        if (row["pass"], row["image_size"]) == ("forward", 64)
    }
    assert memory["softmax"] > 4 * 257**2 * 4 / 2**20
    assert memory["castling, inference form"] < memory["softmax"]
    assert "pyramid_segmenter at 64 pixels, forward and backward" in capsys.readouterr().out


@pytest.mark.slow
def test_no_time_reads_zero(finished):
    _, results = finished
    row = results["layers"][0] | {"milliseconds": dict.fromkeys(("min", "median", "max"), 0.00123)}
    assert "  0.00123  " in attention.describe(results | {"layers": [row]})


@pytest.mark.slow
def test_table_shows_rows_slopes_and_notes(finished):
    _, results = finished
    text = attention.describe(results)
    for expected in ("attention layer, forward and backward", "deit_nano at 8 pixels", "slope in tokens, forward,"):
        assert expected in text
    assert text.endswith(results["notes"][-1])


def test_slope_is_the_exponent_over_the_longest_sequences():
    def row(tokens, batch):
        time = batch * max(tokens, 100) ** 2  # flat at first, then quadratic
        return {
            "pass": "forward",
            "name": "a",
            "tokens": tokens,
            "batch": batch,
            "milliseconds": dict.fromkeys(("min", "median", "max"), time),
        }

    rows = [row(tokens, batch) for tokens, batch in ((400, 1), (10, 16), (100, 4), (200, 2))]
    assert attention.slopes(rows)["forward"]["a"] == pytest.approx(2)
    assert attention.slopes(rows[:1]) == {}


@pytest.mark.parametrize(("tokens", "batch"), [(49, 32), (197, 8), (577, 2), (1024, 2), (2048, 1), (16384, 1)])
def test_batch_keeps_the_work_bounded(tokens, batch):
    assert attention.batch_of(tokens) == batch


def test_a_peer_that_computes_something_else_is_left_out():
    layers, _ = rivals.our_layers(8, 2)
    other = rivals.Layer("other", "softmax", False, layers[1].prepare)
    same = rivals.Layer("same", "softmax", False, layers[0].prepare)
    agreeing, (note,) = attention.peers_that_agree(layers, [other, same], 8, 5)
    assert agreeing == [same]
    assert note.startswith("other is left out: its output differs from ours by ")


@pytest.mark.parametrize("library", ["torch", "equimo"])
def test_peers_compute_the_same_as_our_layers(library):
    pytest.importorskip(library)
    layers, weights = rivals.our_layers(32, 2)
    theirs = {"torch": rivals.torch_layers, "equimo": rivals.equimo_layers}[library](weights)
    assert theirs
    agreeing, notes = attention.peers_that_agree(layers, theirs, 32, 20)
    assert (agreeing, notes) == (theirs, [])
    x = np.random.default_rng(0).normal(size=(2, 20, 32)).astype(np.float32)
    for layer in theirs:
        *_, gradient = layer.prepare(x, True)()
        (ours,) = [one for one in layers if one.name == layer.same_as]
        *_, expected = ours.prepare(x, True)()
        np.testing.assert_allclose(np.asarray(gradient), expected, atol=1e-4 * np.max(np.abs(expected)))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--tokens=49,many"], ("--tokens", "'49,many'")),
        (["--tokens="], ("--tokens", "''")),
        (["--image-sizes=0"], ("--image-sizes", "'0'")),
        (["--repeats=0"], ("--repeats", "0")),
        (["--channels=10", "--heads=3"], ("3 heads", "10")),
        (["--models", "--model=deit_micr"], ("deit_micr", "deit_micro")),
        (["--models", "--model=levit_128s", "--image-sizes=32,33"], ("33 x 33 pixels", "16")),
        (["--models", "--model=deit_micro", "--image-sizes=8", "--attentions=windw"], ("windw", "window")),
        (["--models", "--set=depht=3"], ("depht", "depth")),
        (["--models", "--set=image_size=16"], ("--image-sizes", "leave out --set image_size")),
        (["--models", "--set=attention=window"], ("--attentions", "leave out --set attention")),
    ],
)
def test_bad_input_is_refused_in_a_sentence_before_anything_is_timed(
    refuses, tmp_path, monkeypatch, arguments, fragments
):
    monkeypatch.setattr(attention, "measure_layers", lambda *_, **__: pytest.fail("layers are timed first"))
    with refuses(*fragments):
        attention.run(benchmark.make_parser().read([*arguments, f"--out={tmp_path}"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--startup=digits", "--loader"], "--startup times something else, which --loader does not change"),
        (["--startup=digits", "--tokens=4", "--models"], "which --models, --tokens does not change"),
        (["--loader", "--model=deit_base"], "--loader times something else, which --model does not change"),
        (["--no-layers"], "--no-layers times models alone: give --models too."),
        (["--max-score-gib=nan"], "--max-score-gib must be above 0, not nan."),
    ],
)
def test_flags_without_an_effect_are_refused(arguments, said):
    with pytest.raises(SystemExit, match=said):
        benchmark.main(arguments)


def test_reading_is_measured_instead(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "measure_reading", lambda repeats: ([], [f"{repeats} repeats."]))
    benchmark.main(["--loader", "--repeats=3", f"--out={tmp_path}"])
    assert json.loads((tmp_path / "benchmark.json").read_text())["notes"] == ["3 repeats."]
    assert not (tmp_path / "benchmark.png").exists()
    printed = capsys.readouterr().out
    assert "3 repeats." in printed
    assert "benchmark.png" not in printed


def test_command_line_says_what_is_wrong_without_a_traceback():
    with pytest.raises(SystemExit, match=r"--repeats must be at least 1, not 0."):
        benchmark.main(["--repeats=0"])


def test_tokens_stand_on_the_largest_square():
    assert rivals.places_of(197) == Places((14, 14), 1)
    assert rivals.places_of(64) == Places((8, 8), 0)


def test_an_unknown_attention_is_refused(refuses):
    with refuses("unknown attention 'windows'", "'window'"):
        attention.measure_attention(benchmark.make_parser().read([*TINY, "--attentions=windows"]))
