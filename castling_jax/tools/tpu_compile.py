"""Compiles a case for TPUs with no TPU at hand, in a process of its own: libtpu reads its environment only once."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from castling_jax.ops.errors import InputError
from castling_jax.tools.tpu_cases import load_case
from castling_jax.tools.tpu_dump import SCHEDULE_DUMP, UTILIZATION_DUMP
from castling_jax.tools.tpu_traffic import kernel_traffic

LIBTPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu asks for these, and on a machine without a TPU nobody answers.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
STDERR_LINES = 15  # shown where compilation ends in a bug


def compile_apart(request: dict[str, Any], work: Path, *, schedules: bool = True) -> dict[str, Any]:
    """Compiles in another process, which leaves the dumps of the schedules in work/llo.

    Args:
      request: the arguments of `compile_case`.
      work: an empty folder.
      schedules: without them, a large program compiles several times as fast.

    Returns:
      What `compile_case` does.

    Raises:
      InputError: libtpu is not installed; and what `compile_case` raises.
      SystemExit: anything else went wrong there; it has the end of what was said.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            'libtpu, the TPU compiler, is not installed: run pip install "jax[tpu]" (650 MB, no TPU is needed).'
        )
    request_file, answer_file = work / "request.json", work / "answer.json"
    request_file.write_text(json.dumps(request))
    process = subprocess.run(
        [sys.executable, "-m", "castling_jax.tools.tpu_compile", request_file, answer_file],
        env=os.environ | _environment(work / "llo" if schedules else None),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        said = process.stdout.splitlines()[-STDERR_LINES:]
        raise SystemExit("\n".join([*said, f"the compiler's process ended with status {process.returncode}"]))
    answer = json.loads(answer_file.read_text())
    if "error" in answer:
        raise InputError(answer["error"])
    return answer


def _environment(dump: Path | None) -> dict[str, str]:
    options = [os.environ.get("LIBTPU_INIT_ARGS", "")]
    if dump is not None:
        options += [
            f"--xla_jf_dump_to={dump}",
            "--xla_jf_dump_llo_text=true",
            # Writing what each of 70 passes makes of a kernel would take three times as long as compiling.
            f"--xla_jf_dump_llo_pass_label_regex={SCHEDULE_DUMP}|{UTILIZATION_DUMP}",
        ]
    return LIBTPU_ENVIRONMENT | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from the cache leaves no dump
        "LIBTPU_INIT_ARGS": " ".join(options).strip(),
    }


def compile_case(*, what: str, options: dict[str, Any], topology: str, devices: int) -> dict[str, Any]:
    """Compiles a case; libtpu's environment must be set.

    Args:
      what: as `load_case` takes it.
      options: likewise.
      topology: such as "v5e:2x2".
      devices: how many of its devices are used, 0 for all. Arguments without a sharding are on each of them.

    Returns:
      hlo, the scheduled program; traffic, of its Pallas kernels; temp_bytes, argument_bytes and output_bytes, in the
      HBM of a device.

    Raises:
      InputError: there is no such topology, or so many devices, or the program does not fit their memory; and what
        `load_case` raises.
    """
    chosen = _devices(topology, devices)
    function, arguments, jit_options, mesh = load_case(what, options, chosen)
    everywhere = NamedSharding(Mesh(np.array(chosen), ("devices",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: (
            leaf
            if getattr(leaf, "sharding", None) is not None
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        ),
        arguments,
    )
    # A topology's devices hold no arrays, so that jax.set_mesh refuses them.
    with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, **jit_options).trace(*arguments)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"it does not fit a device of {topology}: {_sentence(error)}") from error
    memory = compiled.memory_analysis()
    return {
        "hlo": compiled.as_text(),
        "traffic": kernel_traffic(traced.jaxpr.jaxpr),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def _devices(topology: str, count: int) -> list[Any]:
    # The two cores of a v4's chip are one device, as they are of a v5p's; this must be asked for.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        known = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"there is no topology {topology!r}: {_sentence(error)}") from error
    if not 0 <= count <= len(known):
        raise InputError(f"--devices must be from 0 (all) to {len(known)}, all that {topology} has, not {count}.")
    return known[:count] if count else known


def _sentence(error: Exception) -> str:
    """The first sentence of an error of XLA's, without its code."""
    first = str(error).splitlines()[0].split(": ", 1)[-1]
    return first.split(". ")[0].rstrip(".") + "."


def main() -> None:
    request_file, answer_file = map(Path, sys.argv[1:])
    try:
        answer = compile_case(**json.loads(request_file.read_text()))
    except InputError as error:
        answer = {"error": str(error)}
    answer_file.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
