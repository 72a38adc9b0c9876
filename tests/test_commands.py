"""The commands, and what `import castling_jax` and --help leave unimported."""

import ast
import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import castling_jax
from castling_jax import __main__ as commands
from castling_jax.errors import InputError
from castling_jax.training.overrides import load_overridden

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "castling_jax" / "tools"
HEAVY = ("jax", "flax", "numpy", "matplotlib", "ml_collections", "orbax", "tensorflow")

# Each line of the output is (arguments, modules of HEAVY that are imported then), of a child for each command.
PROBE = f"""
import json, os, sys
import castling_jax
print(json.dumps(["import", [name for name in {HEAVY} if name in sys.modules]]), flush=True)
from castling_jax import __main__ as commands
for arguments in ([], ["--help"], *([name, "--help"] for name in commands.COMMANDS), ["plots", "augment", "--help"]):
    if os.fork():
        os.wait()
        continue
    printed = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["castling-jax", *arguments]
    try:
        commands.main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    line = json.dumps([arguments, [name for name in {HEAVY} if name in sys.modules]])
    os.write(printed, line.encode() + b"\\n")
    os._exit(0)
"""


def run(*arguments, folder=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder or ROOT)


def test_the_package_the_list_and_every_help_import_nothing_heavy():
    probed = run("-c", PROBE)
    lines = [json.loads(line) for line in probed.stdout.splitlines()]
    assert len(lines) == 1 + 2 + len(commands.COMMANDS) + 1, probed.stderr
    for about, imported in lines:
        assert imported == [], about


def test_every_module_of_tools_is_a_command():
    assert {path.stem for path in TOOLS.glob("*.py")} == {"__init__", "cli", *commands.COMMANDS.values()}
    for module in commands.COMMANDS.values():
        assert callable(importlib.import_module(f"castling_jax.tools.{module}").main)


def test_the_list_has_a_line_for_each_command():
    listed = run("-m", "castling_jax")
    assert listed.returncode == 0
    usage, *lines = listed.stdout.splitlines()
    assert usage == "usage: python -m castling_jax COMMAND [...]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(commands.COMMANDS)
    assert "  train          Trains a model." in lines
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (["castling_jax", "trian"], "unknown command 'trian': did you mean 'train'? (known: train, evaluate, "),
        (["castling_jax", "--config=digits"], "give a command before --config=digits: one of train, evaluate, "),
        (["castling_jax", "summary"], "the following arguments are required: run; --help lists what this command "),
        (["castling_jax", "summary", "a", "b"], "unexpected argument 'b'; --help lists what this command takes."),
        (["castling_jax", "convert", "a", "b", "--formt=c"], "unknown flag --formt: did you mean --format?"),
        (["castling_jax.tools.cli"], "cli is no command: python -m castling_jax lists the commands."),
    ],
)
def test_mistakes_are_one_sentence(module, said):
    ended = run("-m", *module)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "castling-jax evaluate: 'nowhere' is neither a run's folder with checkpoints, "),
        (["nowhere", "--config=digits"], "castling-jax evaluate: an evaluation takes the run's own configuration: "),
        (
            ["nowhere", "--config.seed=7"],
            "castling-jax evaluate: an evaluation takes the run as it was configured, and does not heed seed: ",
        ),
    ],
)
def test_evaluate_is_mains_evaluation(monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("castling_jax.training.process.handle_signals", lambda program: None)  # for good
    monkeypatch.setattr("castling_jax.training.process.start", lambda options: None)
    monkeypatch.setattr(sys, "argv", ["castling-jax", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("start", "usage"),
    [
        (["-m", "castling_jax", "convert"], "usage: python -m castling_jax convert ["),
        (["-m", "castling_jax.tools.convert"], "usage: python -m castling_jax.tools.convert ["),
        (["main.py"], "usage: main.py ["),
        (["castling-jax", "convert"], "usage: castling-jax convert ["),
    ],
)
def test_usage_is_what_was_typed(tmp_path, start, usage):
    if start[0] == "castling-jax":  # as pip writes it
        (tmp_path / start[0]).write_text("from castling_jax.__main__ import main\nmain()\n")
        start = [str(tmp_path / start[0]), *start[1:]]
    assert run(*start, "--help").stdout.startswith(usage)


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(["main.py", "--help-config"], marks=pytest.mark.slow), ["main.py", "--help"], ["-m", "castling_jax"]],
)
def test_a_reader_that_left_is_no_mistake(arguments):
    command = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == (b"", 0)


WITH_FIELDS = [
    ["train", "--config=digits", "--check"],
    ["compare", "--config=digits"],
    ["plots", "augment", "--config=digits"],
    ["feeding", "--config=digits"],
    ["report", "--config=digits"],
]


@pytest.mark.parametrize("command", WITH_FIELDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["--config.train.epoch=1"], "unknown config field 'train.epoch': did you mean 'train.epochs'?"),
        (["--config.seed", "-1"], "config.seed must be an integer from 0 to 4294967295, not -1."),
        (["--config.seed=x", "--config.train.epochs=y"], "2 mistakes:\nflag --config.seed=x: "),
        (["--learning_rate=1"], "unknown flag --learning_rate: did you mean --config.optimizer.learning_rate?"),
    ],
)
def test_fields_are_refused_by_the_same_sentences(monkeypatch, tmp_path, command, fields, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["castling-jax", *command, *fields])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert said in ended.value.code
    assert list(tmp_path.iterdir()) == []


def test_fields_reach_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("castling_jax.training.comparison.compare", lambda config, *_: seen.append(config) or {})
    monkeypatch.setattr(
        "castling_jax.training.contact_sheet.draw_augmentations", lambda config, *_, **__: seen.append(config)
    )
    monkeypatch.setattr("castling_jax.bench.loader_speed.measure", lambda config, **_: seen.append(config) or exit())
    for command in WITH_FIELDS[1:4]:
        monkeypatch.setattr(sys, "argv", ["castling-jax", *command, "--config.mask.end=0.5", "--config.seed", "7"])
        with contextlib.suppress(SystemExit):
            commands.main()
    assert [(config.mask.end, config.seed) for config in seen] == 3 * [(0.5, 7)]


def test_fields_of_every_type_are_read():
    words = ["--config.augment.crop_scale=(0.5,1.0)", "--noconfig.reset_head", "--config.model.image_size=16"]
    config = load_overridden("digits", [*words, "--config.dataset.exif", "--config.dataset.test_split=test"])
    assert (config.augment.crop_scale, config.reset_head, config.model.image_size) == ((0.5, 1.0), False, 16)
    assert (config.dataset.exif, config.dataset.test_split) == (True, "test")
    nones = [f"--config.{name}=None" for name in ("dataset.test_split", "augment.scale_range", "model.norm_pix_loss")]
    config = load_overridden("camvid", [*nones, "--config.model.backbone=deit_tiny", "--config.seed=7"])
    assert (config.dataset.test_split, config.augment.scale_range, config.model.norm_pix_loss) == (None, None, None)
    assert (config.model.backbone, config.seed) == ("deit_tiny", 7)
    assert load_overridden("digits", []).model.image_size is None  # nothing is kept for the next one


def names_for_type_checkers():
    """The names that castling_jax imports under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "castling_jax" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return sorted(alias.asname or alias.name for node in block.body for alias in node.names)


def test_every_public_name_is_there():
    scope = {}
    exec("from castling_jax import *", scope)
    assert sorted(scope.keys() - {"__builtins__"}) == sorted(castling_jax.__all__) == names_for_type_checkers()
    assert sorted(castling_jax._PLACES) == sorted(castling_jax.__all__)
    assert set(castling_jax.__all__) < set(dir(castling_jax))
    for name in castling_jax.__all__:
        value = getattr(castling_jax, name)
        assert value.__doc__, name
        assert getattr(value, "__name__", name).rpartition(".")[2] in (name, "run"), name
    with pytest.raises(AttributeError, match="module 'castling_jax' has no attribute 'normalize'"):
        castling_jax.normalize  # noqa: B018
    assert issubclass(castling_jax.InputError, ValueError) and castling_jax.InputError is InputError
