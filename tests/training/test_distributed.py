import contextlib
import json
import zlib

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils

from castling_jax.training import distributed


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was given, a call each; nothing is joined."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: calls.append(given))
    return calls


def test_the_hosts_of_a_pod_find_each_other(joined, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    distributed.initialize(None, None, None)
    assert joined == [(None, None, None)]


def test_where_there_is_no_cluster_this_is_the_only_process(monkeypatch):
    def no_cluster(*given, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    distributed.initialize(None, None, None)


def test_on_a_cpu_no_cluster_is_looked_for(joined, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.initialize(None, None, None)
    assert joined == []


def test_elsewhere_all_is_given(joined, refuses):
    distributed.initialize("localhost:1234", 2, 1)
    assert joined == [("localhost:1234", 2, 1)]
    with refuses("--coordinator, --num_processes and --process_id go together"):
        distributed.initialize("localhost:1234", None, 0)
    with refuses("--process_id must be from 0 to 1, not 2"):
        distributed.initialize("localhost:1234", 2, 2)
    with refuses("--coordinator must be HOST:PORT, not 'localhost'"):
        distributed.initialize("localhost", 2, 0)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("seen", [True, False])
def test_a_folder_that_not_all_processes_see_is_refused(monkeypatch, refuses, tmp_path, index, seen):
    """Another process's part is played here."""
    folder = epath.Path(tmp_path / "run")
    monkeypatch.setattr(distributed, "SHARING_SECONDS", 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda token: 7)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.array([mine, seen]))

    def reach(name):
        if index == 1 and seen:
            folder.mkdir(parents=True)
            (folder / "shared").write_text("7")

    monkeypatch.setattr(multihost_utils, "sync_global_devices", reach)
    with contextlib.nullcontext() if seen else refuses(f"not all processes see one '{folder}'"):
        distributed.check_shared(folder)
    assert (folder / "shared").exists() == (index == 1 and seen)  # which process 0 removes


@pytest.mark.parametrize("others", [5, 6])
def test_other_data_on_another_process_is_refused(monkeypatch, refuses, others):
    """Another process's part is played here."""
    data, other = ({"classes": ["a", "b"], "training": {"images": images}} for images in (5, others))

    def gather(mine):
        assert mine.dtype == np.uint32
        return np.array([mine, zlib.crc32(json.dumps(other, sort_keys=True).encode())])

    distributed.refuse_different_data(data)  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with contextlib.nullcontext() if others == 5 else refuses("not all processes see the same data (this one has 5"):
        distributed.refuse_different_data(data)


@pytest.mark.parametrize("own", [None, "/elsewhere"])
def test_compiled_programs_are_kept_with_the_run_unless_the_environment_says_where(monkeypatch, own):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *given: updates.append(given))
    theirs = {"JAX_COMPILATION_CACHE_DIR": own, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": own and "2"}
    for name, value in theirs.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    distributed.use_compilation_cache(epath.Path("gs://bucket/run/compiled"))
    folder, seconds = ("jax_compilation_cache_dir", "gs://bucket/run/compiled"), distributed.CACHED_SECONDS
    assert updates == ([] if own else [folder, ("jax_persistent_cache_min_compile_time_secs", seconds)])


def test_a_process_alone_ends_as_usual(capsys):
    with pytest.raises(SystemExit) as ended:
        distributed.end("main.py: no.", status=3)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "main.py: no.\n"
