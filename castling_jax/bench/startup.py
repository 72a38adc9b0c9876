"""Times the parts of a start of training, up to its second step: CPU seconds of fresh processes."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time

from castling_jax.tables import aligned

STARTS = ("first start", "second start")  # the second one finds the compilation cache that the first one filled


def measure_starts(config: str, repeats: int) -> dict[str, dict[str, float]]:
    """{start: {part: CPU seconds of all threads, the least of the repeats}}, of a configuration, by its name.

    Raises:
      InputError: the configuration is unknown, or its training cannot be set up.
    """
    from castling_jax.training.config_files import load_config
    from castling_jax.training.setup import set_up

    set_up(load_config(config))  # what is wrong is said here, before processes start whose errors nobody sees
    measured: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
            for start in STARTS:
                command = [sys.executable, "-c", f"from {__name__} import start; start({config!r})"]
                ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                measured[start].append(json.loads(ended.stdout.splitlines()[-1]))
    return {start: {part: min(one[part] for one in parts) for part in parts[0]} for start, parts in measured.items()}


def start(name: str) -> None:
    """Starts the training that a configuration describes, in this process, and prints the parts as JSON.

    It makes main.py's calls, without the run's folder: its lock, its log and its checkpoints.
    """
    parts: dict[str, float] = {}

    def took(part: str) -> None:
        parts[part] = time.process_time() - sum(parts.values())

    took("Python")
    import jax

    importlib.import_module("flax.nnx")

    took("import jax and flax")
    from castling_jax.training import process
    from castling_jax.training.config_files import load_config
    from castling_jax.training.console import describe_start
    from castling_jax.training.setup import first_state, first_variables, set_up
    from castling_jax.training.sharding import shard_batch

    took("import all else")
    config = load_config(name)
    process.distributed.use_compilation_cache(process.default_workdir(name) / "compiled")
    setup = set_up(config)
    took("read the data, check, shapes")
    variables = first_variables(setup)
    took("draw the variables")
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, variables)
        took("first state")
        describe_start(setup, process.default_workdir(name))
        took("describe: two traces for MACs")
        batch = shard_batch(next(setup.batches()), setup.mesh, batch_size=setup.config.train.batch_size)
        took("first batch")
        for part in ("first step, compiled or loaded", "second step"):
            state, result = setup.train_step(state, batch, setup.threshold_at(0))
            jax.block_until_ready((state, result))
            took(part)
    print(json.dumps(parts))


def describe_starts(starts: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table of `measure_starts`' results."""
    rows = [(part, *(f"{starts[start][part]:.2f}" for start in STARTS)) for part in starts[STARTS[0]]]
    totals = [f"{sum(starts[start].values()):.2f}" for start in STARTS]
    return aligned([("CPU seconds", *STARTS), *rows, ("together", *totals)])
