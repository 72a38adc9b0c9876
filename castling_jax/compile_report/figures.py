"""The figures of a compiled program: what it costs of time, memory and links, by the TPU compiler's own estimate."""

import re
from collections import defaultdict
from typing import Any

from castling_jax.compile_report.chips import Chip, chip_of
from castling_jax.compile_report.compile import Compiled, compile_apart
from castling_jax.compile_report.dump import read_program
from castling_jax.compile_report.estimate import Estimator, Kernel, Row
from castling_jax.compile_report.links import link_ms
from castling_jax.compile_report.memory import activation_bytes
from castling_jax.models.macs import OTHER, parts

UPDATE = "update"  # what a training step does outside of the model: the optimiser, averages, mixing


def report(what: str, options: dict[str, Any], *, topology: str, devices: int) -> dict[str, Any]:
    """Compiles a case and adds up what the compiler says of it.

    Args:
      what: "layer", "model", "recipe" or "FILE.py:NAME".
      options: of layer, model and recipe, as their functions in cases.py take them.
      topology: such as "v5e:2x2".
      devices: how many of its devices are used, 0 for all.

    Returns:
      topology, and what `summarize` returns.

    Raises:
      InputError: libtpu is missing, or any of the arguments is wrong.
      DoesNotFitError: the program needs more memory than a device has.
    """
    chip = chip_of(topology)
    request = {"what": what, "options": options, "topology": topology, "devices": devices}
    return {"topology": topology} | summarize(compile_apart(request), chip)


def summarize(compiled: Compiled, chip: Chip) -> dict[str, Any]:
    """The report on a compiled program.

    Returns:
      est_ms; prefetch_ms; temp_MB, args_MB, out_MB; activations_MB, those of the temporary that are the forward
      pass's; held_MB, by kind, and facts, as the case has them; traffic_MB, what operations read and write;
      collectives, bytes by kind; links_ms, likewise; incomplete, sentences; top, [milliseconds, operation, label] of
      all operations, the dearest first; sources, [milliseconds, operations, label] of all operations that come from
      the same place in the program, likewise; parts_ms, the estimate by the model's parts; kernels, a dict for each
      Pallas kernel.
    """
    program = read_program(compiled.hlo)
    estimator = Estimator(program, compiled.kernels, chip)
    cost = estimator.computation(program.entry, times=1)
    rows = sorted(cost.rows, key=lambda row: (row.milliseconds, row.name, row.label), reverse=True)
    incomplete = set(estimator.incomplete)
    links: dict[str, float] = defaultdict(float)
    for times, sent in cost.sent:
        milliseconds = link_ms(sent, compiled.devices, chip)
        if milliseconds is None:
            incomplete.add(f"{sent.kind} ({sent.label}): between which devices is not known, nor its time")
        links[sent.kind] += times * (milliseconds or 0.0)
    memory = compiled.memory
    return {
        "est_ms": sum(row.milliseconds for row in rows),
        "prefetch_ms": cost.prefetched_bytes / chip.hbm_gigabytes_per_second / 1e6,
        "temp_MB": memory["temporary"] / 1e6,
        "args_MB": memory["arguments"] / 1e6,
        "out_MB": memory["outputs"] / 1e6,
        "total_MB": sum(memory.values()) / 1e6 - 2 * memory["aliased"] / 1e6,
        "activations_MB": min(activation_bytes(program), memory["temporary"]) / 1e6,
        "held_MB": {kind: size / 1e6 for kind, size in compiled.held.items() if size},
        "facts": compiled.facts,
        "traffic_MB": compiled.traffic_bytes / 1e6,
        "collectives": cost.collectives,
        "links_ms": dict(links),
        "incomplete": sorted(incomplete),
        "top": [
            [row.milliseconds, row.name, row.label + (f" [{_describe(row.kernel)}]" if row.kernel else "")]
            for row in rows
        ],
        "sources": _sources(rows),
        "parts_ms": parts_ms(rows),
        "kernels": [
            {
                "name": row.name,
                "ms": row.milliseconds,
                "cycles": row.kernel.cycles,
                "compute_ms": row.kernel.compute_ms,
                "traffic_ms": row.kernel.traffic_ms,
                "bound": row.kernel.bound,
                "utilization": row.kernel.utilization,
            }
            for row in rows
            if row.kernel
        ],
    }


def _sources(rows: list[Row]) -> list[list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        source = found.setdefault(row.label, [0.0, 0, row.label])
        source[0] += row.milliseconds
        source[1] += 1
    return sorted(found.values(), key=lambda source: -source[0])


def parts_ms(rows: list[Row]) -> dict[str, float]:
    """The estimate by the part of the model that an operation is of, of `parts`, OTHER and UPDATE, dearest first."""
    differentiated = any("jvp(" in row.label for row in rows)
    parts: dict[str, float] = defaultdict(float)
    for row in rows:
        outside = differentiated and "jvp(" not in row.label
        parts[UPDATE if outside else part_of(row.label)] += row.milliseconds
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def part_of(label: str) -> str:
    """The part, of `parts`, that an operation's label names last, itself or by a kernel of the part; else OTHER."""
    for word in reversed(re.findall(r"\w+", label)):
        for part in sorted(parts(), key=len, reverse=True):
            if word == part or word.startswith(f"{part}_"):  # as kernels' names do: masked_softmax_attend
                return part
    return OTHER


def _describe(kernel: Kernel) -> str:
    return f"kernel: {kernel.cycles:,} cycles, compute {kernel.compute_ms:.3f} ms, traffic {kernel.traffic_ms:.3f} ms"
