"""What all tests share: JAX on the CPU, the golden files, and how a refusal has to look."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# Before anything imports jax. The tests' processes share what one of them has compiled: that is most of their time.
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="castling_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs too: most are small
# Compiling is most of what is left, and LLVM's optimisation half of that.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# An operation's place in the source, written into each program, takes a tenth of the time in which it is made.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if metadata.version("jaxlib").startswith("0.10."):
    # Of the other half, these emitters take half again. Later versions of XLA have no others.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import contextlib
import gc
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# The shape annotations of the operations and of detection are checked at run time, in every test. They are imported by
# name, because the package imports its modules only when they are used.
with install_import_hook(["castling_jax.ops", "castling_jax.tasks.detection"], "beartype.beartype"):
    import castling_jax.ops
    import castling_jax.tasks.detection

# Traced programs are many small objects that live on. Looking through them after each 700 takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

GOLDEN = Path(__file__).parent / "golden"
# The files whose tests take longest. The tests begin with them, so that their processes end together.
LONG = {"test_configs", "test_loop", "test_main", "test_maps", "test_meshes", "test_notebooks", "test_pod"}
LONG |= {"test_detectors", "test_picodet", "test_sharding", "test_snippets", "test_step", "test_tpu"}
LONG |= {"test_zero_gradients"}


def pytest_addoption(parser):
    parser.addoption("--first-parameters", action="store_true", help="run each test with its first parameters only")


@pytest.hookimpl(trylast=True)  # after pytest's own choice, by -m
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)
    if config.getoption("--first-parameters"):
        firsts: dict[str, pytest.Item] = {}
        for item in items:
            firsts.setdefault(item.nodeid.partition("[")[0], item)
        kept = set(firsts.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = firsts.values()


class Golden(dict):
    """The arrays of a golden file by name; `meta` is what its model was made from."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as file:
            super().__init__({key: file[key] for key in file.files if key != "meta"})
            self.meta = json.loads(str(file["meta"]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names start with `prefix`/, without it."""
        return {key.removeprefix(f"{prefix}/"): value for key, value in self.items() if key.startswith(f"{prefix}/")}


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets a file's compiled programs at its end: a process with all tests' programs would take more than 5 GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def golden():
    """golden(name) -> Golden, from tests/golden/NAME.npz."""
    return Golden


@pytest.fixture
def refuses():
    """`with refuses("this", "that"):` expects an InputError of one sentence that says this and that."""

    @contextlib.contextmanager
    def expect(*fragments: str):
        # A caller does not have the run-time checks of the annotations, which would come first here.
        jaxtyping_config.update("jaxtyping_disable", True)
        try:
            with pytest.raises(castling_jax.InputError) as caught:
                yield
        finally:
            jaxtyping_config.update("jaxtyping_disable", False)
        message = str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert message.endswith((".", "?", ")")), message
        assert "\n" not in message, message
        assert not re.search(r"[.!?]\s+[A-Z]", message), f"more than one sentence: {message}"
        for fragment in fragments:
            assert fragment in message, message

    return expect
