import dataclasses
import importlib.util
import json
import sys

import pytest

from castling_jax.compile_report import report as report_module
from castling_jax.compile_report.figures import summarize
from castling_jax.compile_report.text import describe
from castling_jax.errors import InputError
from castling_jax.tools import tpu_report
from tests.compile_report.texts import COMPILED

SIZE = 2048
CASES = f"""
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl

def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

def product():
    return jnp.matmul, (of({SIZE}, {SIZE}), of({SIZE}, {SIZE}))

def until():
    def run(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x))
    return run, (of(512, 512), jax.ShapeDtypeStruct((), jnp.int32))

def double(x, out):
    out[...] = 2 * x[...]

def kernel():
    x, blocks = of(1024, 128), pl.BlockSpec((128, 128), lambda i: (i, 0))
    return pl.pallas_call(double, grid=(8,), in_specs=[blocks], out_specs=blocks, out_shape=x), (x,)
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """run(arguments...) -> (status, what was printed), of the command line."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["tpu_report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            tpu_report.main()
        return exit.value.code, capsys.readouterr().out

    return main


def test_description_has_the_figures():
    report = summarize(COMPILED, "v5e:2x2")
    text = describe(dataclasses.replace(report, incomplete=["sort %sort.1 (): no estimate"]), top=2)
    assert "estimate     0.007041 ms" in text
    assert "temporary 2.00 MB, arguments 0.00800 MB, output 0.00410 MB" in text
    assert "all-reduce 0.00410 MB" in text
    assert "incomplete: sort %sort.1 (): no estimate" in text
    assert "%fusion.3" in text
    assert "%all-reduce.1" not in text
    assert text.splitlines()[-2].split() == ["bound", "by", "MXU", "VLOAD"]
    assert text.splitlines()[-1].split() == ["%scale.1", "VLOAD", "1", "15"]


def test_command_line(monkeypatch, run):
    asked = []

    def report(what, options, **rest):
        asked.append((what, options, rest))
        if what == "wrong.py:name":
            raise InputError("there is no file 'wrong.py'.")
        return dataclasses.replace(summarize(COMPILED, rest["topology"]), incomplete=["something"])

    monkeypatch.setattr(report_module, "report", report)
    arguments = ["layer", "--form=train", "--tokens=5", "--topology=v6e:2x2", "--devices=0", "--json"]
    status, out = run(*arguments)
    assert status == 0
    assert json.loads(out)["incomplete"] == ["something"]
    assert asked == [("layer", {"form": "train", "tokens": 5}, {"topology": "v6e:2x2", "devices": 0})]
    assert run(*arguments, "--strict")[0] == 1
    run("model", "--mesh=data:-1", "--json")
    run("model", "--json")
    assert [(options, rest["devices"]) for _, options, rest in asked[2:]] == [({"mesh": "data:-1"}, 0), ({}, 1)]
    assert run("wrong.py:name")[0] == "there is no file 'wrong.py'."
    assert run("lair")[0] == "unknown case 'lair': did you mean 'layer'? (known: layer, model, FILE.py:NAME)"
    assert run("recipe")[0].startswith("unknown case 'recipe'")  # --config compiles it
    assert len(asked) == 5


@pytest.mark.slow
def test_compiled_for_a_tpu(run, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    file = tmp_path / "cases.py"
    file.write_text(CASES)

    status, out = run(f"{file}:product", "--json", "--strict")
    figures = json.loads(out)
    peak_ms = 2 * SIZE**3 / 197e12 * 1e3  # of a v5e; the compiler takes its schedule to fill it by 80 % and more
    assert status == 0
    assert peak_ms <= figures["est_ms"] <= 1.25 * peak_ms
    assert figures["args_MB"] == pytest.approx(2 * 2 * SIZE**2 / 1e6)
    assert figures["out_MB"] == pytest.approx(2 * SIZE**2 / 1e6)

    status, out = run(f"{file}:until", "--strict")
    assert status == 1
    assert "trip count is not a constant" in out

    status, out = run(f"{file}:kernel", "--json", "--strict")
    (kernel,) = json.loads(out)["kernels"]
    assert status == 0
    assert kernel["traffic_ms"] == pytest.approx(2 * 1024 * 128 * 2 / 819e6)
    assert {"MXU", "VALU", "XLU", "VLOAD", "VSTORE"} <= kernel["utilization"].keys()
    assert all(0 <= share <= 1 for share in kernel["utilization"].values())
    assert kernel["utilization"]["VALU"] > 0
