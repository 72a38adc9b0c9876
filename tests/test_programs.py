"""scripts/programs.py: what its hashes depend on."""

import jax
import jax.numpy as jnp

from castling_jax.models.registry import MODELS
from castling_jax.ops import norms
from scripts import programs

NAME = "deit_micro/castling/inference"
SOURCE = """
def {name}(x):
    inner = jax.jit(lambda x: jnp.sin(x) * {factor})
    return {{"{result}": inner(x)}}
"""


def lowered(*, name="f", result="out", factor=2, lines=0):
    """The text of a small program written with these names, so many lines down its file."""
    scope = {"jax": jax, "jnp": jnp}
    exec(compile("\n" * lines + SOURCE.format(name=name, result=result, factor=factor), f"{name}.py", "exec"), scope)
    return programs.lower(scope[name], jax.ShapeDtypeStruct((3,), jnp.float32))


def text_of(name):
    return next(program for program in programs.programs() if program.name == name).text()


def test_names_and_source_locations_do_not_matter_but_constants_do():
    assert lowered() == lowered(name="another", result="logits", lines=7)
    assert lowered() != lowered(factor=3)


def test_long_constants_stand_as_their_hash():
    def program(step):
        constant = jnp.arange(0, 1000 * step, step, dtype=jnp.float32)
        return programs.lower(lambda x: x + jax.device_get(constant), jax.ShapeDtypeStruct((1000,), jnp.float32))

    assert len(program(1)) < 2000
    assert program(1) == program(1) != program(2)


def test_a_models_hash_is_the_same_again_and_another_with_another_constant(monkeypatch):
    before = text_of(NAME)
    assert text_of(NAME) == before
    monkeypatch.setattr(norms, "ZERO_SQUARED_NORM", 1e-18)
    assert programs.hash_of(text_of(NAME)) != programs.hash_of(before)


def test_every_model_is_listed_once():
    names = [program.name for program in programs.programs()]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {*MODELS, "step"}


def test_main_prints_a_line_a_program_and_writes_the_texts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["programs.py", f"--only={NAME}", f"--out={tmp_path}"])
    programs.main()
    (line,) = capsys.readouterr().out.splitlines()
    (file,) = tmp_path.iterdir()
    assert line.split() == [NAME, programs.hash_of(file.read_text())]
