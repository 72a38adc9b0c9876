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


def test_elsewhere_it_says_that_it_did_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not malloc.keep_freed_memory()
