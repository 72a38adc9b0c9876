"""The figures of a compiled program: its time, memory and traffic on the links, by the TPU compiler's own estimate."""

import dataclasses
import re
from collections import defaultdict
from typing import Any, NamedTuple

from castling_jax.compile_report.cases import Facts
from castling_jax.compile_report.chips import Chip, chip_of
from castling_jax.compile_report.compile import Compiled, compile_apart
from castling_jax.compile_report.dump import read_program
from castling_jax.compile_report.estimate import NO_ESTIMATE, Cost, Estimator, Kernel, Row
from castling_jax.compile_report.links import link_ms
from castling_jax.compile_report.memory import activation_bytes
from castling_jax.models.macs import OTHER, parts
from castling_jax.training.throughput import FLOPS_PER_MAC
from castling_jax.training.timing import significant

UPDATE = "update"  # what a training step does outside of the model: the optimiser, averages, mixing


class Operation(NamedTuple):
    """An operation of a program.

    Attributes:
      ms: milliseconds of all its runs.
      name: the compiler's name for it.
      label: the place in the traced program that it comes from.
    """

    ms: float
    name: str
    label: str


class Source(NamedTuple):
    """All operations that come from the same place in the traced program.

    Attributes:
      ms: their milliseconds.
      operations: their number.
      label: the place.
    """

    ms: float
    operations: int
    label: str


@dataclasses.dataclass(frozen=True)
class KernelFigures:
    """A Pallas kernel of a program.

    Attributes:
      name: the compiler's name for it.
      ms: milliseconds of all its runs.
      cycles: bundles of one run, loops times their trips.
      compute_ms: milliseconds of these bundles.
      traffic_ms: milliseconds of one run's traffic with HBM.
      bound: the unit that limits it, or "HBM".
      utilization: unit -> share of its issue slots that are used, from 0 to 1.
    """

    name: str
    ms: float
    cycles: int
    compute_ms: float
    traffic_ms: float
    bound: str
    utilization: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled program costs each chip. MB are 10^6 bytes.

    Attributes:
      topology: the chips that it is compiled for, such as "v5e:2x2".
      est_ms: milliseconds of all operations, one after the other; collectives take none.
      prefetch_ms: milliseconds of asynchronous copies, which run beside the operations.
      temp_MB: temporary arrays.
      args_MB: arguments.
      out_MB: outputs, those that take the place of arguments among them.
      total_MB: all memory that the program needs.
      activations_MB: the part of `temp_MB` that the forward pass leaves for the backward pass.
      held_MB: kind of argument -> MB, such as "parameters"; {} where the case does not tell them apart.
      traffic_MB: what all operations read and write, as XLA counts it.
      collectives: kind -> bytes of the results.
      links_ms: kind of collective -> milliseconds that the links need.
      incomplete: a sentence for each thing that could not be counted.
      top: all operations, the longest first.
      sources: the operations by their place in the traced program, the longest first.
      parts_ms: part of the model -> milliseconds, the longest first.
      kernels: the Pallas kernels, the longest first.
    """

    topology: str
    est_ms: float
    prefetch_ms: float
    temp_MB: float  # noqa: N815, as the keys of the files are called
    args_MB: float  # noqa: N815
    out_MB: float  # noqa: N815
    total_MB: float  # noqa: N815
    activations_MB: float  # noqa: N815
    held_MB: dict[str, float]  # noqa: N815
    traffic_MB: float  # noqa: N815
    collectives: dict[str, int]
    links_ms: dict[str, float]
    incomplete: list[str]
    top: list[Operation]
    sources: list[Source]
    parts_ms: dict[str, float]
    kernels: list[KernelFigures]

    @property
    def is_lower_bound(self) -> bool:
        """Whether the program takes longer than `est_ms`: the compiler has no estimate for some operation."""
        return any(NO_ESTIMATE in sentence for sentence in self.incomplete)

    def to_json(self) -> dict[str, Any]:
        """The figures as dicts and lists, by the attributes' names; `facts` are those of a configuration's program."""
        return {"facts": {}} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The shortest times of a step that the chip's peak and its memory allow.

    Attributes:
      flops: the model's operations on one chip, two for each multiply-accumulate.
      compute_ms: milliseconds that they take at the chip's peak.
      hbm_ms: milliseconds that the program's traffic takes at HBM's bandwidth.
    """

    flops: float
    compute_ms: float
    hbm_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeReport(Report):
    """The report on a program of a configuration, and what follows for a step with its number of images.

    Attributes:
      facts: the configuration's model, mesh and images.
    """

    facts: Facts

    @property
    def links_total_ms(self) -> float:
        """Milliseconds that the links need for all collectives."""
        return sum(self.links_ms.values())

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the estimate, and the links' time after it."""
        return self.est_ms + self.links_total_ms

    @property
    def images_per_second_per_chip(self) -> float:
        return 1e3 * self.facts.images_per_device / self.step_ms

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the model's operations as a share, from 0 to 1, of those that fit into a step."""
        return self.roofline.compute_ms / self.step_ms

    @property
    def roofline(self) -> Roofline:
        chip = chip_of(self.topology)
        per_mac = FLOPS_PER_MAC if self.facts.form == "train" else 2
        flops = per_mac * self.facts.macs * self.facts.images_per_device
        return Roofline(flops, flops / chip.teraflops / 1e9, self.traffic_MB / chip.hbm_gigabytes_per_second)

    def to_json(self) -> dict[str, Any]:
        """The attributes and the properties of a step, as dicts and lists."""
        step = ("links_total_ms", "step_ms", "images_per_second_per_chip", "mfu")
        roofline = {"roofline": dataclasses.asdict(self.roofline)}
        return super().to_json() | {name: getattr(self, name) for name in step} | roofline

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> "RecipeReport":
        """The report from its attributes alone, as `dataclasses.asdict` and JSON write them."""
        values = {
            "facts": Facts(**figures["facts"]),
            "top": [Operation(*row) for row in figures["top"]],
            "sources": [Source(*row) for row in figures["sources"]],
            "kernels": [KernelFigures(**row) for row in figures["kernels"]],
        }
        return cls(**figures | values)


def report(what: str, options: dict[str, Any], *, topology: str, devices: int) -> Report:
    """Compiles a case and adds up the compiler's figures.

    Args:
      what: "layer", "model" or "FILE.py:NAME".
      options: options of layer or model, as their functions in cases.py take them.
      topology: the pod, such as "v5e:2x2".
      devices: how many of its devices are used, 0 for all.

    Raises:
      InputError: libtpu is missing, or one of the arguments is wrong.
      DoesNotFitError: the program needs more memory than a device has.
    """
    return summarize(_compile(what, options, topology, devices), topology)


def report_recipe(options: dict[str, Any], *, topology: str, devices: int) -> RecipeReport:
    """Compiles a configuration's program; arguments and errors are those of `report`, for `cases.recipe`."""
    compiled = _compile("recipe", options, topology, devices)
    return RecipeReport(**vars(summarize(compiled, topology)), facts=Facts(**compiled.facts))


def _compile(what: str, options: dict[str, Any], topology: str, devices: int) -> Compiled:
    chip_of(topology)  # refuses an unknown chip before minutes are spent
    return compile_apart({"what": what, "options": options, "topology": topology, "devices": devices})


def summarize(compiled: Compiled, topology: str) -> Report:
    """The report on a compiled program."""
    chip = chip_of(topology)
    program = read_program(compiled.hlo)
    estimator = Estimator(program, compiled.kernels, chip)
    cost = estimator.computation(program.entry, times=1)
    rows = sorted(cost.rows, key=lambda row: (row.milliseconds, row.name, row.label), reverse=True)
    links, unknown = _links_ms(cost, compiled.devices, chip)
    memory = compiled.memory
    return Report(
        topology=topology,
        est_ms=sum(row.milliseconds for row in rows),
        prefetch_ms=cost.prefetched_bytes / chip.hbm_gigabytes_per_second / 1e6,
        temp_MB=memory["temporary"] / 1e6,
        args_MB=memory["arguments"] / 1e6,
        out_MB=memory["outputs"] / 1e6,
        # Aliased outputs are in the sum three times: as arguments, as outputs, and as themselves.
        total_MB=sum(memory.values()) / 1e6 - 2 * memory["aliased"] / 1e6,
        activations_MB=min(activation_bytes(program), memory["temporary"]) / 1e6,
        held_MB={kind: size / 1e6 for kind, size in compiled.held.items() if size},
        traffic_MB=compiled.traffic_bytes / 1e6,
        collectives=cost.collectives,
        links_ms=links,
        incomplete=sorted(estimator.incomplete | unknown),
        top=[Operation(row.milliseconds, row.name, _label(row)) for row in rows],
        sources=_sources(rows),
        parts_ms=parts_ms(rows),
        kernels=[_kernel_figures(row, row.kernel) for row in rows if row.kernel],
    )


def _links_ms(cost: Cost, devices: list[list[int]], chip: Chip) -> tuple[dict[str, float], set[str]]:
    """Milliseconds on the links by kind of collective, and a sentence for each collective of unknown devices."""
    links: dict[str, float] = defaultdict(float)
    unknown = set()
    for times, sent in cost.sent:
        milliseconds = link_ms(sent, devices, chip)
        if milliseconds is None:
            unknown.add(f"{sent.kind} ({sent.label}): between which devices is not known, nor its time")
        links[sent.kind] += times * (milliseconds or 0.0)
    return dict(links), unknown


def _sources(rows: list[Row]) -> list[Source]:
    sources: dict[str, Source] = {}
    for row in rows:
        ms, operations, _ = sources.get(row.label, Source(0.0, 0, row.label))
        sources[row.label] = Source(ms + row.milliseconds, operations + 1, row.label)
    return sorted(sources.values(), key=lambda source: -source.ms)


def parts_ms(rows: list[Row]) -> dict[str, float]:
    """The estimate by the part of the model: one of `parts`, OTHER or UPDATE -> milliseconds, the longest first."""
    # A training step differentiates the model and nothing else: what is not under jvp( is then the update.
    differentiated = any("jvp(" in row.label for row in rows)
    parts: dict[str, float] = defaultdict(float)
    for row in rows:
        outside = differentiated and "jvp(" not in row.label
        parts[UPDATE if outside else part_of(row.label)] += row.milliseconds
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def part_of(label: str) -> str:
    """The part that a label names last, by the part's own name or by a kernel's; OTHER where it names none."""
    for word in reversed(re.findall(r"\w+", label)):
        # The longest name first: one part's name may begin with another's.
        for part in sorted(parts(), key=len, reverse=True):
            if word == part or word.startswith(f"{part}_"):  # kernels' names are like masked_softmax_attend
                return part
    return OTHER


def _kernel_figures(row: Row, kernel: Kernel) -> KernelFigures:
    return KernelFigures(
        name=row.name,
        ms=row.milliseconds,
        cycles=kernel.cycles,
        compute_ms=kernel.compute_ms,
        traffic_ms=kernel.traffic_ms,
        bound=kernel.bound,
        utilization=kernel.utilization,
    )


def _label(row: Row) -> str:
    if row.kernel is None:
        return row.label
    compute, traffic = significant(row.kernel.compute_ms), significant(row.kernel.traffic_ms)
    return f"{row.label} [kernel: {row.kernel.cycles:,} cycles, compute {compute} ms, traffic {traffic} ms]"
