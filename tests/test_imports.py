"""Who may import whom: __main__ -> tools -> bench -> training -> tasks -> {data, convert, plots} -> models -> ops."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "castling_jax"
RANKS = {
    "suggestions": -1,
    "errors": 0,
    "sizes": 0,
    "tables": 0,
    "storage": 1,
    "fields": 1,
    "preprocessing": 2,
    "postprocessing": 2,
    "ops": 2,
}
RANKS |= {"normalization": 3, "models": 3, "data": 4, "convert": 4, "plots": 4, "maps": 4}
RANKS |= {"tasks": 5, "predictions": 6, "probe": 7, "training": 7, "bench": 8, "compile_report": 9}
RANKS |= {"doctor": 10, "tools": 11, "__main__": 12}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in RANKS)
OPS_MAY_IMPORT = {"jax", "jaxtyping", "numpy", "castling_jax", *sys.stdlib_module_names}


def names_of(node, path):
    """The modules an import statement names in full; `from a import b` names a.b, which may be a module too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = list(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else []
    module = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


def imports(path, *, at_import_time=False):
    """All that a file imports, or what importing it imports: functions' bodies only run later."""
    found, pending = [], [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += names_of(node, path)
        if not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found


def parts_imported(path):
    """The parts of the package that a file imports; the package itself, which has them all, is one."""
    ours = [name.split(".") for name in imports(path) if name.split(".")[0] == "castling_jax"]
    return {name[1] if len(name) > 1 and name[1] in RANKS else "castling_jax" for name in ours}


def identify(path):
    return str(path.relative_to(ROOT))


def test_the_parts_are_all_there():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders | {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *RANKS}


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_go_downwards(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for imported in parts_imported(path):
        # The package itself has training's names, so it is for the parts above.
        rank = RANKS["training"] if imported == "castling_jax" else RANKS[imported]
        assert imported == part or rank < RANKS[part], f"{part} imports {imported}"


def test_nothing_imports_the_main_program():
    for path in FILES:
        assert not {"main", "configs", "tests"} & {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("path", [path for path in FILES if PACKAGE / "ops" in path.parents], ids=identify)
def test_ops_import_jax_alone(path):
    assert {name.split(".")[0] for name in imports(path)} <= OPS_MAY_IMPORT


def test_torch_and_tensorflow_are_never_needed_to_import_the_package():
    for path in [PACKAGE / "__init__.py", *FILES]:
        heavy = {"torch", "torchvision", "timm", "tensorflow", "tensorflow_datasets"}
        assert not heavy & {name.split(".")[0] for name in imports(path, at_import_time=True)}, path


# Names of modules that are not those of their packages, and what is imported only where it is installed.
PACKAGES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "ml_dtypes": "jax",
}
WHERE_INSTALLED = {"torch", "timm", "equimo", "equinox", "google", "tensorflow", "libtpu", "castling_jax"}


def test_what_is_imported_is_required():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines if line[:1].isalpha()}
    imported = {name.split(".")[0] for path in FILES for name in imports(path)}
    third_party = imported - set(sys.stdlib_module_names) - WHERE_INSTALLED
    missing = {name for name in third_party if PACKAGES.get(name, name).lower().replace("-", "_") not in required}
    assert not missing


# What takes long to import, and is not needed for a command's first answer or a run's first step.
PUBLIC_NAMES = "for name in castling_jax.__all__:\n    name == 'plots' or getattr(castling_jax, name)"
SETTING_UP = """
from castling_jax.training.setup import first_state, first_variables, set_up

setup = set_up(castling_jax.load_config("digits"))
first_state(setup, first_variables(setup))
next(setup.batches())
"""
SLOW = ("matplotlib", "scipy", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets", "pandas")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("", ("jax", "numpy", "PIL", *SLOW)),
        ("castling_jax.create_model", ("orbax", "grain", "PIL", "jax.experimental.pallas", *SLOW)),
        ("castling_jax.predict", ("orbax", "grain", "jax.experimental.pallas", *SLOW)),
        ("import castling_jax.training.config_help", ("orbax", "grain", "jax.experimental.pallas", *SLOW)),
        (PUBLIC_NAMES, ("grain._src.python.dataset", "jax.experimental.pallas", *SLOW)),
        (SETTING_UP, SLOW),
    ],
    ids=["the package", "a model", "predictions", "a configuration's check", "all of the API", "a run's setup"],
)
def test_slow_packages_are_imported_where_they_are_used(code, absent):
    check = f"import sys\nimport castling_jax\n{code}\nprint(*sorted(sys.modules.keys() & {set(absent)!r}))"
    ended = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
