"""The documents name only files, functions, commands and error messages that exist, and all of the public API."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import castling_jax
from castling_jax.__main__ import COMMANDS
from castling_jax.models.attention.kinds import KINDS
from castling_jax.training.config import FIELDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "castling_jax"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]
TOP_FOLDERS = {".ci", "castling_jax", "configs", "docs", "experiments", "scripts", "tests"}
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}  # as "training/" in a document
SOURCE = re.compile(r"\.(py|sh|md)$")
PLACEHOLDERS = re.compile(r"\b(NAME|FILE|COMMAND)\b")  # the reader puts a name there
DIRECTIVE = re.compile(r"^```\{.*?^```", re.DOTALL | re.MULTILINE)  # Sphinx checks what it names: make docs
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
URL = re.compile(r"(https?|gs)://[^\s`)]*")
PATH = re.compile(r"[\w.*-]*[\w*-](?:/[\w.*-]*)*(?::[A-Za-z_][\w.]*)?")
MODULE = re.compile(r"-m (castling_jax[\w.]*)")
COMMAND = re.compile(r"python (?:-m castling_jax (\w+)|main\.py)((?: +[^\s#`;)]+)*)")
TREE = re.compile(r"```tree\n(.*?)```", re.DOTALL)


def is_of_the_repository(path):
    """Whether a path in a document is meant to be a file or a folder of the repository, not one of a run."""
    first, slash, _ = path.partition("/")
    return bool(slash and first in TOP_FOLDERS | ROOMS) or bool(SOURCE.search(path))


def find(path):
    """The files that a path means: from the root or the package's folder, or anywhere if it is only a file's name."""
    found = [file for folder in (ROOT, PACKAGE) for file in folder.glob(path.rstrip("/"))]
    if not found and "/" not in path:
        found = [file for top in TOP_FOLDERS for file in (ROOT / top).rglob(path)]
    return found


def paths_named(text):
    """(path, name of a function or class in it or "") of all paths in code, without the drawn tree."""
    for code in CODE.findall(URL.sub(" ", TREE.sub(" ", DIRECTIVE.sub(" ", text)))):
        for word in PATH.findall(code):
            path, _, name = word.partition(":")
            if is_of_the_repository(path) and not PLACEHOLDERS.search(path):
                yield path.rstrip("."), name


def paths_drawn(text):
    """The paths of a tree that is drawn by indentation: folders end in a slash, files may stand under another file."""
    for tree in TREE.findall(text):
        folders = []
        for line in tree.splitlines():
            name = line.split()[0]
            indent = line.index(name)
            folders = [folder for folder in folders if folder[0] < indent]
            yield "".join([*(folder[1] for folder in folders), name])
            if name.endswith("/"):
                folders.append((indent, name))


def commands_shown(text):
    """(command, its words) of all command lines in a string, without brackets and what stands for more of the same."""
    for command, rest in COMMAND.findall(text.replace("\\\n", " ")):
        words = re.sub(r"[\[\]|`]|\.\.\.", " ", rest.partition(" #")[0]).split()
        if not PLACEHOLDERS.search(command):
            yield command or "train", words


def defines(file, name):
    """Whether a file defines a function or class, or Class.method, of this name."""
    source = file.read_text()
    return all(re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE) for part in name.split("."))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document):
    text = document.read_text()
    for path, name in paths_named(text):
        files = find(path)
        assert files, f"{document.name} names {path}"
        # After a configuration's file comes its variant, deit.py:base, which tests/test_configs.py tries.
        known = [file for file in files if file.parent.name == "configs" or not name or defines(file, name)]
        assert known, f"{document.name} names {path}:{name}"
    for link in LINK.findall(text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"
    for module in MODULE.findall(text):
        files = [(ROOT / module.replace(".", "/")).with_suffix(".py"), ROOT / module.replace(".", "/") / "__main__.py"]
        assert any(file.exists() for file in files), f"{document.name} runs {module}"


def unknown_flags(command, words):
    """The flags of a command line that the command does not take."""
    tool = importlib.import_module(f"castling_jax.tools.{COMMANDS[command]}")
    parser = tool.make_parser(words) if command == "plots" else tool.make_parser()
    known = {"--config.GROUP.FIELD"} if parser.takes_fields else set()
    known |= {f"--config.{field}" for field in FIELDS if parser.takes_fields}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    return flags - known - parser._option_string_actions.keys()


TOOLS = [PACKAGE / "tools" / f"{name}.py" for name in COMMANDS.values()]
SHOWN = [*DOCUMENTS, *TOOLS, *sorted((ROOT / "scripts" / "pod").glob("*.sh"))]


@pytest.mark.parametrize("document", SHOWN, ids=lambda path: path.name)
def test_command_lines_have_flags_that_exist(document):
    for command, words in commands_shown(document.read_text()):
        assert command in COMMANDS, f"{document.name} runs {command}"
        assert not unknown_flags(command, words), f"{document.name}: {command} {' '.join(words)}"


def test_a_flag_that_does_not_exist_is_seen():
    text = (
        "`python -m castling_jax convert a [--chek]`\npython main.py --config=deit:small \\\n  --config.sed=1  # --no\n"
    )
    shown = list(commands_shown(text))
    assert shown == [("convert", ["a", "--chek"]), ("train", ["--config=deit:small", "--config.sed=1"])]
    assert [unknown_flags(*line) for line in shown] == [{"--chek"}, {"--config.sed"}]


def test_the_drawn_house_has_only_rooms_that_exist():
    drawn = list(paths_drawn((ROOT / "docs" / "architecture.md").read_text()))
    assert len(drawn) > 100
    for path in drawn:
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_the_drawn_house_is_what_the_imports_say():
    done = subprocess.run(
        [sys.executable, "scripts/draw_house.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_path_that_does_not_exist_is_seen():
    text = "`ops/angular.py`, `ops/circular.py`, `runs/a.json`, `training/run.py:walk`\n```bash\npython mian.py\n```"
    named = list(paths_named(text))
    assert named == [("ops/angular.py", ""), ("ops/circular.py", ""), ("training/run.py", "walk"), ("mian.py", "")]
    assert [path for path, _ in named if not find(path)] == ["ops/circular.py", "mian.py"]
    assert not defines(find("training/run.py")[0], "walk")
    assert list(paths_drawn("```tree\na/\n    b.py  x\n        c.py  y\n    d/\n        e.py\nf.py\n```")) == [
        "a/",
        "a/b.py",
        "a/c.py",
        "a/d/",
        "a/d/e.py",
        "f.py",
    ]


def test_every_attention_has_a_row_and_other_papers_are_in_order():
    text = (ROOT / "docs" / "models.md").read_text()
    ours, others = (
        re.findall(r"^\| `(\w+)` \|", text.split(f"\n## {title}\n")[1].split("\n## ")[0], re.MULTILINE)[1:]
        for title in ("Kinds of attention", "Other attentions")
    )
    assert sorted(ours + others) == sorted(KINDS)
    assert others == sorted(others)


def documented(text):
    """The names that the directives of the API page document, with their modules."""
    names, module = [], ""
    for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", text, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        elif directive != "automodule":
            names.append(f"{module}.{name}")
    return names


def test_the_api_page_has_every_public_name_once():
    modules = {name: getattr(castling_jax, name) for name in ("ops", "convert", "plots")}
    public = {f"castling_jax.{name}" for name in castling_jax.__all__ if name not in modules}
    public |= {f"castling_jax.{name}.{part}" for name in ("ops", "convert") for part in modules[name].__all__}
    public |= {
        f"castling_jax.plots.{name}"
        for name, value in vars(modules["plots"]).items()
        if name == "png" or (name.startswith("draw_") and callable(value))
    }
    assert sorted(documented((ROOT / "docs" / "api.md").read_text())) == sorted(public)


def sentences_of(source):
    """The texts of a Python file as patterns, in which anything stands where an f-string puts a value."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for parts in texts for part in parts}
    texts += [[node] for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
    for parts in texts:
        words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(word) for word in words if isinstance(word, str)) > 8:  # shorter ones would match many sentences
            yield "".join(".+" if word is None else re.escape(word) for word in words)


def says(patterns, sentence):
    """Whether one of the patterns is the sentence, or several are, one after another."""
    if any(pattern.fullmatch(sentence) for pattern in patterns):
        return True
    cuts = [found.end() for found in re.finditer(r"[:,] ", sentence)]
    return any(
        any(pattern.fullmatch(sentence[:cut]) for pattern in patterns) and says(patterns, sentence[cut:])
        for cut in cuts
    )


def test_error_messages_are_quoted_as_the_code_says_them():
    text = (ROOT / "docs" / "mistakes.md").read_text()
    quoted = re.findall(r"^- `(.+)`$", text, re.MULTILINE)
    assert len(quoted) == text.count("\n- ") >= 20
    files = [path.read_text() for path in PACKAGE.rglob("*.py")]
    patterns = [re.compile(pattern) for source in files for pattern in sentences_of(source)]
    for sentence in quoted:
        assert says(patterns, sentence), f"no file says {sentence!r}"


def test_another_message_is_seen():
    source = 'f"{name} must be at least {low}, not {value}.", f"the run has {fields}: ", "choose another folder."'
    patterns = [re.compile(pattern) for pattern in sentences_of(source)]
    assert len(patterns) == 3
    assert says(patterns, "config.train.epochs must be at least 1, not 0.")
    assert says(patterns, "the run has seed = 1: choose another folder.")
    assert not says(patterns, "config.train.epochs should be at least 1, not 0.")
    assert not says(patterns, "the run has seed = 1: choose another one.")
