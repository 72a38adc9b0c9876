import dataclasses
import importlib.util
import json
import sys

import matplotlib.pyplot as plt
import pytest

from castling_jax.compile_report import pod
from castling_jax.compile_report.cases import Facts
from castling_jax.compile_report.compile import DoesNotFitError
from castling_jax.compile_report.figures import RecipeReport, summarize
from castling_jax.compile_report.pictures import draw_pod, draw_sweep
from castling_jax.compile_report.pod import Compiler, pod_report, sweep
from castling_jax.compile_report.text import describe_pod, describe_sweep
from castling_jax.tools import tpu_report
from tests.compile_report.texts import COMPILED
from tests.pictures import check_legible

CONFIG = "configs/digits.py"
FACTS = Facts(
    model="deit_micro",
    attention="castling",
    image_size=8,
    form="train",
    mesh={"data": 4},
    images=512,
    images_per_device=128.0,
    assumed=["the teacher", "so many images"],
    macs=1_000_000,
)
UNESTIMATED = ["fusion %fusion.9 (jit(f)/div): no estimate"]


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler; what was asked for. Softmax in training does not fit."""
    asked = []

    def report_recipe(options, *, topology, devices):
        asked.append((options, topology, devices))
        if options["attention"] == "softmax" and options["form"] == "train":
            raise DoesNotFitError("it does not fit a device: too large.")
        report = dataclasses.replace(summarize(COMPILED, topology), est_ms=10.0)
        facts = dataclasses.replace(FACTS, form=options["form"], attention=options["attention"])
        return RecipeReport(**vars(report), facts=facts)

    monkeypatch.setattr(pod, "report_recipe", report_recipe)
    return asked


def test_report_has_both_attentions_and_says_what_it_is(compiled, tmp_path):
    found = pod_report(CONFIG, topology="v5e:2x2", options={"batch": 128}, devices=0, compiler=Compiler(tmp_path))
    assert [(o["form"], o["attention"], topology, n) for o, topology, n in compiled] == [
        (form, attention, "v5e:2x2", 0) for form in ("inference", "train") for attention in ("castling", "softmax")
    ]
    text = describe_pod(found, top=1)
    for said in (
        "the TPU compiler's estimates; nothing here was measured on a TPU",
        "softmax: it does not fit a device: too large.",
        "HBM, of 16,911 MB",
        "activations",
        "0.00410 MB, 0.0000819 ms",
        "0.00704 ms",  # no part reads 0.00
        "roofline: compute",
        "- the teacher",
        "- so many images",
        "- traffic between slices",
    ):
        assert said in text
    assert text.count("%fusion") == 0  # by where they come from in the program, not by the compiler's names
    assert "in 1  jit(f)/while/body/tanh" in text
    assert "fits a chip" in text
    assert ">  " not in text
    row = found.programs["inference"]
    row["castling"] = dataclasses.replace(row["castling"], incomplete=UNESTIMATED)
    estimates = [row.split() for row in describe_pod(found, top=1).splitlines() if "estimate  " in row]
    assert estimates[0] == ["estimate", ">", "10.0", "ms", "10.0", "ms"]


def test_what_is_compiled_is_kept(compiled, tmp_path):
    for _ in range(2):
        pod_report(CONFIG, topology="v5e:2x2", options={"batch": 128}, devices=0, compiler=Compiler(tmp_path))
    assert len(compiled) == 4
    pod_report(CONFIG, topology="v5e:2x2", options={"batch": 64}, devices=0, compiler=Compiler(tmp_path))
    assert len(compiled) == 8
    overridden = {"batch": 64, "fields": ["--config.model.attention=linear_angular"]}
    found = pod_report(CONFIG, topology="v5e:2x2", options=overridden, devices=0, compiler=Compiler(tmp_path))
    assert [options["attention"] for options, *_ in compiled[8:]] == 2 * ["linear_angular", "softmax"]
    assert all(options["fields"] == overridden["fields"] for options, *_ in compiled[8:])
    assert found.config == f"{CONFIG} --config.model.attention=linear_angular"
    assert not list(tmp_path.rglob("*.part"))


def test_sweep_scales_chips_and_tokens(compiled, tmp_path):
    found = sweep(CONFIG, topology="v5e:4x8", options={"batch": 128}, compiler=Compiler(tmp_path))
    assert [step[:2] for step in found.chips] == [(8, "v5e:2x4"), (16, "v5e:4x4"), (32, "v5e:4x8")]
    assert all(o["batch"] == 128 for o, _, devices in compiled if devices == 0)
    castling = found.tokens["inference"]["castling"]
    assert [step[:2] for step in castling] == [(196, 128), (784, 32), (3136, 8), (7056, 3), (16384, 1)]
    assert all(step.report is None for step in found.tokens["train"]["softmax"])
    # A step of 10 ms and more for three images.
    castling[3] = castling[3]._replace(report=dataclasses.replace(castling[3].report, incomplete=UNESTIMATED))
    rows = [line.split() for line in describe_sweep(found).splitlines()]
    assert next(row for row in rows if row[:2] == ["7,056", "3"])[2:4] == [">", "3.33"]
    assert next(row for row in rows if row[:2] == ["3,136", "8"])[2] == "1.25"
    assert ["v5e:4x8", "32", "10.0", "ms"] in [row[:4] for row in rows]
    kept = json.loads(json.dumps(found.to_json()))
    assert kept["chips"][2][:2] == [32, "v5e:4x8"]
    assert kept["chips"][2][2]["step_ms"] == found.chips[2].report.step_ms
    assert kept["tokens"]["train"]["softmax"][0] == [196, 128, None]


def test_pictures_are_legible_and_no_bar_reads_zero(compiled, tmp_path):
    compiler = Compiler(tmp_path)
    found = pod_report(CONFIG, topology="v5e:2x2", options={"batch": 128}, devices=0, compiler=compiler)
    row = found.programs["inference"]
    row["castling"] = dataclasses.replace(row["castling"], est_ms=0.00774, links_ms={"all-reduce": 0.00456})
    row["softmax"] = dataclasses.replace(row["softmax"], links_ms={})
    figure = draw_pod(found)
    check_legible(figure)
    assert [axes.get_ylim()[0] for axes in figure.axes[:3]] == [0, 0, 0]
    (steps, links) = (axes for axes in figure.axes if axes.texts)
    assert [text.get_text() for text in steps.texts] == ["0.0123 ms", "10.0 ms", "10.0 ms"]
    assert [text.get_text() for text in links.texts] == ["0.00456 ms", "0 ms", "0.0000819 ms"]
    check_legible(draw_sweep(sweep(CONFIG, topology="v5e:4x8", options={"batch": 128}, compiler=compiler)))


@pytest.mark.parametrize("extra", [[], ["--sweep"]])
def test_command_line_keeps_text_figures_and_a_picture(compiled, tmp_path, monkeypatch, capsys, extra):
    arguments = ["tpu_report", f"--config={CONFIG}", "--topology=v5e:4x4", "--batch=128", f"--out={tmp_path}", *extra]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit:
        tpu_report.main()
    assert not exit.value.code
    said = capsys.readouterr().out
    stem = f"{'sweep' if extra else 'report'}-v5e-4x4"
    assert (tmp_path / f"{stem}.txt").read_text().strip() in said
    kept = json.loads((tmp_path / f"{stem}.json").read_text())
    assert kept["topology"] == "v5e:4x4"
    assert "nothing here was measured" in kept["what"]
    assert {"the teacher", "so many images"} < set(kept["not_counted"])
    picture = plt.imread(tmp_path / f"{stem}.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --config=NAME, or what to compile"),
        (["layer", "--sweep"], "--sweep goes with --config=NAME."),
        (["layer", "--config.seed=1"], "--config.seed=1 goes with --config=NAME."),
        (["layer", f"--config={CONFIG}"], "--config is reported on by itself: leave out 'layer'."),
        ([f"--config={CONFIG}", "--tokens=5"], "unknown option of --config 'tokens'"),
        ([f"--config={CONFIG}", "--sweep"], "--sweep needs --batch"),
        (["--config=configs/digit.py"], "there is no configuration file 'configs/digit.py'."),
        ([f"--config={CONFIG}", "--topology=v9x:2x2"], "unknown chip 'v9x'"),
        ([f"--config={CONFIG}", "--topology=v5e:4x4x4"], "a topology of v5e has 2 sides, as v5e:16x16, not"),
        ([f"--config={CONFIG}", "--topology=v4"], "a topology of v4 has 3 sides"),
        ([f"--config={CONFIG}", "--sweep", "--batch=8"], "--sweep goes up to one of v5e:2x4, v5e:4x4"),
        (
            ["--config=configs/_imagenet.py"],
            "'configs/_imagenet.py' is no configuration: it has no function get_config.",
        ),
        (
            [f"--config={CONFIG}", "--out=README.md"],
            "'README.md/programs' cannot be made (Not a directory): choose another folder for --out.",
        ),
    ],
)
def test_mistakes_are_one_sentence(compiled, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setattr(sys, "argv", ["tpu_report", f"--out={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as exit:
        tpu_report.main()
    assert said in exit.value.code


@pytest.mark.slow
def test_a_configuration_is_compiled_for_a_pod(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    options = {"config": CONFIG, "form": "train", "batch": 32, "mesh": "data:2,fsdp:2"}
    report = Compiler(tmp_path)(options, topology="v5e:2x2", devices=0)
    assert report.facts.images == 128
    assert report.incomplete == []
    held = report.held_MB
    # The optimiser has two moments of each parameter and a counter; both are split alike.
    assert held["optimiser"] == pytest.approx(2 * held["parameters"], rel=1e-4)
    assert held["images and labels"] == pytest.approx(32 * (8 * 8 * 3 + 4) / 1e6)  # a byte a colour; int32 labels
    assert 0 < report.activations_MB <= report.temp_MB
    assert sum(held.values()) <= report.args_MB <= report.total_MB
    assert {"all-reduce", "all-gather"} <= report.links_ms.keys()
    assert sum(report.parts_ms.values()) == pytest.approx(report.est_ms)
    assert {"mlp", "linear_angular", "masked_softmax"} <= report.parts_ms.keys()
