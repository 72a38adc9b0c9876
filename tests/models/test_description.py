import re
import sys
from pathlib import Path

import pytest

import castling_jax
from castling_jax.errors import InputError
from castling_jax.models import description
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.macs import OTHER, Cost, parts
from castling_jax.models.registry import MODELS, abstract_model
from castling_jax.models.variables import count_parameters, get_variables
from castling_jax.tools import describe
from tests.models import small

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["describe", *arguments])
    describe.main()
    return capsys.readouterr().out


def row(text, start):
    """The cells of the one line that starts so; two spaces stand for the gap between two cells."""
    pattern = r"\s{2,}".join(map(re.escape, start.split("  ")))
    (line,) = (line for line in text.splitlines() if re.match(rf"\s*{pattern}\s", line))
    return re.split(r"\s{2,}", line.strip())


def test_every_part_has_a_name():
    assert list(description.PART_NAMES) == [*parts(), OTHER]


@pytest.mark.slow
def test_the_command_shows_three_tables(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "deit_micro", "--num_classes", "10", "--set", "depth=2", "--form", "inference")
    assert text.startswith("deit_micro, 8 x 8 pixels, 10 classes, depth=2\n")
    tokens, width, hidden = 17, 64, 256
    shared = 16 * 12 * width + 2 * tokens * (4 * width**2 + 2 * width * hidden) + 10 * width
    quadratic, linear, taps = 2 * 2 * tokens**2 * width, 2 * 2 * tokens * width * 32, 2 * 9 * tokens * width
    parameters = 12 * width + width + tokens * width + width + 2 * (12 * width**2 + 13 * width) + 2 * width + 65 * 10
    expected = {
        "castling        train  ": (2 * 2 * 9, quadratic + linear + taps),
        "castling        inference  ": (2 * 2 * 9, linear + taps),
        "linear_angular  train and inference": (2 * 2 * 9, linear + taps),
        "softmax         train and inference": (0, quadratic),
        "angular         train and inference": (2 * 2 * 9, quadratic + taps),
    }
    for start, (added, macs) in expected.items():
        *_, held, counted, _ = row(text, start.strip())
        assert held == f"{parameters + added:,}"
        assert counted == f"{(shared + macs) / 1e6:,.2f} M"
    share = f"{100 * linear / (shared + linear + taps):.1f} %"
    assert row(text, "linear-angular: K^T V and Q (K^T V)")[1:3] == [f"{linear / 1e6:.2f} M", share]
    assert "softmax branch" not in text
    assert row(text, "blocks/0-1/attn/qkv") == [
        "blocks/0-1/attn/qkv",
        "bias [192], kernel [64, 192]",
        f"{2 * 193 * 64 + 2 * 128:,}",
    ]


def test_a_model_has_its_own_number_of_classes_unless_one_is_given(monkeypatch, capsys):
    monkeypatch.setattr(description, "describe", lambda model: f"{model.spec.num_classes} classes")
    assert run(monkeypatch, capsys, "picodet_s", "--image_size=160") == "80 classes\n"
    assert run(monkeypatch, capsys, "deit_micro", "--num_classes=7") == "7 classes\n"


def test_a_registered_attention_that_does_not_suit_a_model_is_left_out(monkeypatch):
    def for_eight_heads(q, k, v):
        return v.reshape(*v.shape[:2], 8, -1) + q

    try:
        castling_jax.register_attention("for_eight_heads", for_eight_heads)
        monkeypatch.setattr(description, "attentions_of", lambda name: ["softmax", "for_eight_heads"])
        text = description.describe(abstract_model("deit_micro", attention="softmax", depth=1))
        assert "for_eight_heads" not in text
        with pytest.raises(TypeError):
            description.describe(abstract_model("deit_micro", attention="for_eight_heads", depth=1))
    finally:
        del KINDS["for_eight_heads"]


@pytest.mark.parametrize("arguments", [{}, {"num_heads": (2, 4), "embed_dim": (8, 8), "depth": (2, 2)}])
def test_the_modules_parameters_are_all_of_the_models(arguments):
    model = small.small_levit(**arguments)
    modules = description.list_modules(model)
    assert sum(module.parameters for module in modules) == count_parameters(get_variables(model))
    assert len({module.path for module in modules}) == len(modules)


def test_blocks_between_others_are_counted_one_by_one():
    assert description._joint_path([("blocks", "10", "mlp"), ("blocks", "2", "mlp")]) == "blocks/2,10/mlp"


@pytest.mark.slow
def test_what_the_switch_drops_and_the_statistics_are_told():
    text = description.describe(abstract_model("levit_128s", **small.LEVIT_SIZES))
    biases = 2 * 7 * 7 + 2 * 7 * 7 + 3 * 4 * 4
    assert f"The switch drops {biases:,} of these, under softmax_branch." in text
    assert "running statistics of batch norm" in text
    # Folding makes a linear-angular LeViT smaller too, so its forms are told apart.
    assert row(text, "linear_angular  inference")[1] == "inference"


def test_all_models_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(description, "measure", lambda model: description.Size(1234, {"mlp": Cost(5_000_000, 60_000)}))
    monkeypatch.setattr(description, "abstract_model", lambda name, **arguments: None)
    _, *lines = run(monkeypatch, capsys).splitlines()
    assert [line.split()[0] for line in lines] == [name for name in castling_jax.list_models() for _ in range(3)]
    assert lines[1].split() == ["deit_tiny", "castling,", "train", "1,234", "5.00", "M", "0.06", "M"]


def test_overrides_are_literals_or_words():
    settings = ["distilled=True", "embed_dim=(8, 16)", "token_conv=2d", "token_kernel_size=None"]
    expected = {"distilled": True, "embed_dim": (8, 16), "token_conv": "2d", "token_kernel_size": None}
    assert description.parse_overrides(settings) == expected
    with pytest.raises(InputError, match=r"--set takes KEY=VALUE, such as distilled=True, not 'depth'\."):
        description.parse_overrides(["depth"])


def test_mistakes_are_sentences(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"unknown model 'deit_tin': did you mean 'deit_tiny'\?"):
        run(monkeypatch, capsys, "deit_tin")
    with pytest.raises(SystemExit, match=r"unknown form 'test'"):
        run(monkeypatch, capsys, "deit_micro", "--form", "test")
    with pytest.raises(SystemExit, match=r"--image_size needs one model: give its name, one of deit_tiny, "):
        run(monkeypatch, capsys, "--image_size", "896")


def documented():
    """The rows of the tables of docs/models.md whose first cell is a model's name: name -> cells."""
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("`") in MODELS:
            rows.setdefault(cells[0].strip("`"), []).append(cells[1:])
    return rows


def test_every_model_is_documented():
    assert list(documented()) == list(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_documented_figures_are_those_counted(name):
    distilled = {"distilled": True} if name.startswith("levit") else {}
    softmax, train, inference = (
        description._size_cells(description.measure(abstract_model(name, attention=attention, form=form, **distilled)))
        for attention, form in [("softmax", "train"), ("castling", "train"), ("castling", "inference")]
    )
    baseline, castling, activations = documented()[name]
    assert baseline[3:] == list(softmax[:2])
    assert castling[3:] == [*train[:2], *inference[:2]]
    assert activations[1:] == [softmax[2], train[2], inference[2]]
