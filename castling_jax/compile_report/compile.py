"""Compiles a case for TPUs with no TPU at hand, in separate processes: libtpu reads its environment only once."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from castling_jax.compile_report.cases import Case, load_case
from castling_jax.compile_report.dump import SCHEDULE_DUMP, UTILIZATION_DUMP
from castling_jax.compile_report.kernels import KernelSchedule, compile_kernels, find_kernels
from castling_jax.errors import InputError

LIBTPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu would ask a server for these settings, and a machine without a TPU has no such server.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
STDERR_LINES = 15  # how many lines of a compiler process that crashed are shown


class DoesNotFitError(InputError):
    """A program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and what the compiler says about it.

    Attributes:
      hlo: the text of the scheduled program.
      memory: bytes on each device: arguments, outputs, aliased (outputs that take the place of arguments), temporary
        and code.
      traffic_bytes: what all operations read and write, as XLA counts it; NaN where XLA does not count it.
      held: kind of argument -> bytes on each device, for cases that tell their arguments apart.
      facts: the case's `Facts` as a dict; {} for cases without them.
      devices: coordinates in the torus of each device of the program's mesh.
      kernels: the program's Pallas kernels by their `kernel_key`; {} where nobody asked for them.
    """

    hlo: str
    memory: dict[str, int]
    traffic_bytes: float
    held: dict[str, int]
    facts: dict[str, Any]
    devices: list[list[int]]
    kernels: dict[str, KernelSchedule] = dataclasses.field(default_factory=dict)


def compile_apart(request: dict[str, Any], *, schedules: bool = True) -> Compiled:
    """Compiles in other processes: one compiles the program while another compiles the schedules of its kernels.

    Args:
      request: the arguments of `compile_case`.
      schedules: whether to compile the kernels' schedules too.

    Raises:
      InputError: libtpu is not installed, or `compile_case` refuses the request.
      SystemExit: a process crashed; the message ends with the last lines of its output.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            'libtpu, the TPU compiler, is not installed: run pip install "jax[tpu]" (650 MB, no TPU is needed).'
        )
    jobs = ("program", "kernels") if schedules else ("program",)
    with tempfile.TemporaryDirectory(prefix="tpu_report_") as folder:
        work = Path(folder)
        (work / "request.json").write_text(json.dumps(request))
        processes = [_start(job, work) for job in jobs]
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:  # Ctrl-C must not leave a compiler running for minutes
            for process in processes:
                process.kill()
        answers = [
            _answer(process, output, work / f"{job}.json")
            for process, output, job in zip(processes, outputs, jobs, strict=True)
        ]
    kernels = answers[1] if schedules else {}
    return Compiled(**answers[0], kernels={key: KernelSchedule(**figures) for key, figures in kernels.items()})


def _start(job: str, work: Path) -> subprocess.Popen[str]:
    options = [os.environ.get("LIBTPU_INIT_ARGS", "")]
    if job == "kernels":
        options += [
            f"--xla_jf_dump_to={work / 'llo'}",
            "--xla_jf_dump_llo_text=true",
            # Dumps of all 70 compiler passes would take three times as long as compiling; two of them are read.
            f"--xla_jf_dump_llo_pass_label_regex={SCHEDULE_DUMP}|{UTILIZATION_DUMP}",
        ]
    environment = LIBTPU_ENVIRONMENT | {"LIBTPU_INIT_ARGS": " ".join(options).strip()}
    return subprocess.Popen(
        [sys.executable, "-m", "castling_jax.compile_report.compile", job, work],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _answer(process: subprocess.Popen[str], output: str, file: Path) -> dict[str, Any]:
    if process.returncode:
        last = output.splitlines()[-STDERR_LINES:]
        raise SystemExit("\n".join([*last, f"the compiler's process ended with status {process.returncode}"]))
    answer = json.loads(file.read_text())
    if "error" in answer:
        raise (InputError if answer["fits"] else DoesNotFitError)(answer["error"])
    return answer


def compile_case(*, what: str, options: dict[str, Any], topology: str, devices: int) -> Compiled:
    """Compiles a case, without its kernels' schedules, in a process that has LIBTPU_ENVIRONMENT.

    Args:
      what: the case, as `load_case` takes it.
      options: its options, as `load_case` takes them.
      topology: the pod, such as "v5e:2x2".
      devices: how many of its devices are used, 0 for all. Arguments without a sharding are copied to each of them.

    Raises:
      InputError: the topology is unknown or has fewer devices, or `load_case` refuses the case.
      DoesNotFitError: the program needs more memory than a device has.
    """
    used = _devices(topology, devices)
    case, traced = _trace(what, options, used)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # a bug, which keeps its traceback
            raise
        raise DoesNotFitError(f"it does not fit a device of {topology}: {_sentence(error)}") from error
    memory = compiled.memory_analysis()
    parts = {
        "arguments": "argument",
        "outputs": "output",
        "aliased": "alias",
        "temporary": "temp",
        "code": "generated_code",
    }
    return Compiled(
        hlo=compiled.as_text(),
        memory={name: getattr(memory, f"{part}_size_in_bytes") for name, part in parts.items()},
        traffic_bytes=(compiled.cost_analysis() or {}).get("bytes accessed", math.nan),
        held={kind: sum(map(_device_bytes, jax.tree.leaves(tree))) for kind, tree in case.held.items()},
        facts={} if case.facts is None else dataclasses.asdict(case.facts),
        devices=[list(device.coords) for device in (used if case.mesh is None else case.mesh.devices.flat)],
    )


def compile_case_kernels(
    dump: Path, *, what: str, options: dict[str, Any], topology: str, devices: int
) -> dict[str, KernelSchedule]:
    """The schedules of a case's Pallas kernels by their `kernel_key`.

    Args:
      dump: the folder that libtpu's environment names for its dumps.
      what: the case; this and the other arguments are those of `compile_case`.
      options: its options.
      topology: the pod.
      devices: how many of its devices are used.
    """
    used = _devices(topology, devices)
    _, traced = _trace(what, options, used)
    return compile_kernels(find_kernels(traced.jaxpr.jaxpr), used[0], dump)


def _trace(what: str, options: dict[str, Any], devices: list[Any]) -> tuple[Case, Any]:
    case = load_case(what, options, devices)
    everywhere = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: (
            leaf
            if getattr(leaf, "sharding", None) is not None
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        ),
        case.arguments,
    )
    # jax.set_mesh refuses a topology's devices, which can hold no arrays; an abstract mesh has none.
    with contextlib.nullcontext() if case.mesh is None else use_abstract_mesh(case.mesh.abstract_mesh):
        return case, jax.jit(case.function, **case.jit_options).trace(*arguments)


def _device_bytes(leaf: Any) -> int:
    """Bytes of an array on each device."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _devices(topology: str, count: int) -> list[Any]:
    # JAX shows the two cores of a v4's chip as one device only where it is asked to; v5p needs no asking.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        known = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"there is no topology {topology!r}: {_sentence(error)}") from error
    if not 0 <= count <= len(known):
        raise InputError(f"--devices must be from 0 (all) to {len(known)}, the number in {topology}, not {count}.")
    return known[:count] if count else known


def _sentence(error: Exception) -> str:
    """The first sentence of an XLA error, without its code."""
    first = str(error).splitlines()[0].split(": ", 1)[-1]
    return first.split(". ")[0].rstrip(".") + "."


def main() -> None:
    job, work = sys.argv[1], Path(sys.argv[2])
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache leaves no dump
    request = json.loads((work / "request.json").read_text())
    answer: dict[str, Any]
    try:
        if job == "program":
            answer = dataclasses.asdict(compile_case(**request))
            del answer["kernels"]
        else:
            kernels = compile_case_kernels(work / "llo", **request)
            answer = {key: dataclasses.asdict(kernel) for key, kernel in kernels.items()}
    except InputError as error:  # the parent process raises it again
        answer = {"error": str(error), "fits": not isinstance(error, DoesNotFitError)}
    (work / f"{job}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
