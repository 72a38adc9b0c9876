import os
import platform
import subprocess
import sys

import pytest

from castling_jax.training import malloc


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_glibc_keeps_what_is_freed():
    # In a process of its own, as it is for good. 256 MiB, over any threshold of glibc's, are freed, asked for again and
    # written: the second time the pages are there already.
    program = f"""
import resource, runpy
assert runpy.run_path({malloc.__file__!r})["keep_freed_memory"]()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"1") * (1 << 28)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert faults[1] < faults[0] / 10, faults
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# 100 MB a call, more than the heap of a thread holds.
FAULTS = """
import resource

def count(*_):
    import jax, jax.numpy as jnp
    call, x = jax.jit(lambda x: jnp.sin(x @ x.T) @ x), jnp.ones((5000, 2))
    faults = []
    for _ in range(60):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(call(x))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[40:]) < 2 * faults[0], faults
    print("counted", flush=True)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_a_trainings_threads_keep_it_too(module):
    # While the heap grows, some calls need new pages; in a heap that the setting does not reach, nearly all do.
    program = f"""
{FAULTS}
from castling_jax.tools import {module}
keep = {module}.keep_freed_memory_on_cpu

def keep_and_replace():  # the command's work, which it imports after the setting
    keep()
    from castling_jax.training import process
    process.{module} = count

{module}.keep_freed_memory_on_cpu = keep_and_replace
{module}.main(["RUN"] if {module == "evaluate"} else [])
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.stdout == "counted\n", ended.stderr


def test_elsewhere_it_says_that_it_did_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not malloc.keep_freed_memory()
