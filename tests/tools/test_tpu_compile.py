import importlib.util

import pytest

from castling_jax.tools.tpu_compile import compile_apart

CASE = """
import jax, jax.numpy as jnp

def too_large():
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    return lambda x: x @ x, (x,)

def broken():
    raise RuntimeError("this is a bug")
"""


def test_missing_compiler_is_said_in_a_sentence(monkeypatch, tmp_path, refuses):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses("libtpu, the TPU compiler, is not installed", 'pip install "jax[tpu]"'):
        compile_apart({}, tmp_path)


@pytest.mark.slow
def test_what_does_not_compile_is_said_in_a_sentence(tmp_path, refuses):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    file = tmp_path / "case.py"
    file.write_text(CASE)
    request = {"what": f"{file}:too_large", "options": {}, "topology": "v5e:2x2", "devices": 1}
    with refuses("it does not fit a device of v5e:2x2"):
        compile_apart(request, tmp_path)
    with refuses("there is no topology 'v5e:3x7'"):
        compile_apart(request | {"topology": "v5e:3x7"}, tmp_path)
    with refuses("--devices must be from 0 (all) to 4"):
        compile_apart(request | {"devices": 5}, tmp_path)
    with pytest.raises(SystemExit, match="RuntimeError: this is a bug"):
        compile_apart(request | {"what": f"{file}:broken"}, tmp_path)
