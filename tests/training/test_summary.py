import json

import jax
import pytest
from etils import epath

from castling_jax.convert.inference_folder import save_inference
from castling_jax.models.registry import abstract_model, create_model
from castling_jax.models.variables import get_variables
from castling_jax.training import summary
from castling_jax.training.metrics import MetricsWriter

FORMS = ("train", "inference")
FIGURES = {
    "accuracy_train_form": 0.75,
    "accuracy_inference_form": 0.5,
    "eval_loss": 1.0,
    "max_difference": 0.0,
    "mask_threshold": 1.0,
    "model": "deit_micro",
    "steps": 3,
    "train_seconds": 2.0,
    "parameters_sha256": "0" * 64,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32)
    save_inference(workdir / "inference", model, get_variables(model))
    writer = MetricsWriter(workdir, first_step=0)
    line = {"loss": 1.0, "learning_rate": 1.0, "mask_threshold": 1.0, "mask_density": [0.5]}
    writer.write(3, line | {"accuracy_train_form": 1, "accuracy_inference_form": 1, "eval_loss": 1})
    writer.close()
    return workdir, summary.finish(workdir, FIGURES).figures


def test_summary_is_written_and_read_back(finished):
    workdir, written = finished
    assert json.loads((workdir / "summary.json").read_text()) == written == summary.read_summary(workdir).figures
    assert FIGURES.items() <= written.items()
    assert summary.read_summary(workdir / "inference") is None


def test_both_forms_are_counted_and_timed(finished):
    _, written = finished
    assert written["parameters_train_form"] == written["parameters_inference_form"]
    # Per layer the branch is two products of tokens x tokens x width.
    assert written["macs_train_form"] - written["macs_inference_form"] == 2 * 17 * 17 * 32
    assert written["speed"].keys() == {"image_size", "tokens", "train_form_ms", "inference_form_ms"}
    assert (written["speed"]["image_size"], written["speed"]["tokens"]) == (8, 17)  # as the run's images
    assert min(written["speed"]["train_form_ms"], written["speed"]["inference_form_ms"]) > 0


def test_forms_are_timed_as_the_run_computes(tmp_path, monkeypatch):
    built = []

    def build(*arguments, **options):
        built.append(abstract_model(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(summary, "abstract_model", build)
    model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32, image_size=16, dtype="bfloat16")
    speed = summary.measure_forms(model.spec.arguments())
    assert [(one.spec.form, one.spec.image_size, one.spec.dtype) for one in built] == [
        ("train", 16, "bfloat16"),
        ("inference", 16, "bfloat16"),
    ]
    assert (speed["image_size"], speed["tokens"]) == (16, 65)


def test_a_finished_run_says_how_it_computes(tmp_path, finished, monkeypatch):
    workdir, _ = finished
    model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32, image_size=16, dtype="bfloat16")
    save_inference(tmp_path / "inference", model, get_variables(model))
    (tmp_path / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    timed = []
    monkeypatch.setattr(summary, "measure_forms", timed.append)
    summary.finish(tmp_path, FIGURES)
    assert [(arguments["image_size"], arguments["dtype"]) for arguments in timed] == [(16, "bfloat16")]


def test_short_times_keep_their_digits(finished):
    _, written = finished
    speed = {"image_size": 8, "tokens": 17, "train_form_ms": 0.00412, "inference_form_ms": 1234.5}
    lines = [line.split() for line in summary.describe(written | {"speed": speed}).splitlines()]
    assert ["time", "an", "image,", "17", "tokens", "0.00412", "ms", "1,234", "ms"] in lines


def test_description_shows_both_forms_and_the_files(finished):
    workdir, written = finished
    text = summary.describe(written)
    assert "75.00 %" in text
    assert "50.00 %" in text
    assert str(workdir / "training.png") in text


def test_raw_and_averaged_weights_stand_side_by_side(finished):
    _, written = finished
    both = {
        f"{kind}_accuracy_{form}_form": share for kind, share in (("raw", 0.75), ("averaged", 0.131)) for form in FORMS
    }
    text = summary.describe(written | both | {"exported": "raw", "skipped_steps": 2})
    assert "3 steps (2 skipped) in 2 s" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["raw", "weights,", "exported", "75.00", "%", "75.00", "%"] in lines
    assert ["averaged", "weights", "13.10", "%", "13.10", "%"] in lines


@pytest.mark.parametrize(
    "text", [b'{"model":', b"[]", b"{}", b"null", b"3", b'"x"', b"\xff", b'{"speed": 1, "files": []}']
)
def test_a_damaged_summary_is_one_sentence(tmp_path, refuses, text):
    (tmp_path / "summary.json").write_bytes(text)
    with refuses("summary.json' is damaged", "remove it"):
        summary.read_summary(tmp_path)


def test_a_run_is_finished_where_its_speed_cannot_be_measured(finished, monkeypatch, capsys):
    def measure(arguments):
        assert summary.read_summary(workdir).figures["speed"] is None  # written before
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    workdir, _ = finished
    monkeypatch.setattr(summary, "measure_forms", measure)
    written = summary.finish(workdir, FIGURES).figures
    assert summary.read_summary(workdir).figures == written
    assert "time an image" not in summary.describe(written)
    assert "could not be measured: RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_a_notebook_shows_a_table(finished):
    _, written = finished
    shown = summary.Summary(epath.Path("run"), written)._repr_html_()
    assert shown.startswith("<p>deit_micro: ")
    assert "<tr><td>held-out accuracy</td><td>" in shown
    hostile = summary.Summary(epath.Path("run"), written | {"dataset": "<script>", "split": "x", "eval_images": 3})
    assert "<script>" not in hostile._repr_html_()
