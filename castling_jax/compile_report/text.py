"""Compile reports as text for a person: of a case, of a configuration on a pod, and of its sweep."""

from collections.abc import Callable, Iterable

from castling_jax.compile_report.chips import chip_of
from castling_jax.compile_report.figures import KernelFigures, RecipeReport, Report
from castling_jax.compile_report.pod import HONEST, Caveats, DoesNotFit, PodReport, Sweep, TokenStep
from castling_jax.sizes import size_text
from castling_jax.tables import Row, aligned
from castling_jax.training.timing import significant

LABEL_WIDTH = 150  # characters of an operation's label; its end says most
TITLES = {"train": "TRAINING STEP", "inference": "INFERENCE"}


def describe(report: Report, top: int) -> str:
    """The report on a case, with the `top` longest operations."""
    collectives = ", ".join(f"{kind} {_megabytes(size / 1e6)}" for kind, size in report.collectives.items())
    memory = {"temporary": report.temp_MB, "arguments": report.args_MB, "output": report.out_MB}
    lines = [
        f"{report.topology}, the compiler's estimate; not a measurement",
        *aligned(
            [
                # Designs of a kernel are compared by this figure, and are often alike to a percent.
                ("estimate", f"{significant(report.est_ms, 4)} ms"),
                ("prefetches", f"{_milliseconds(report.prefetch_ms)}, beside it"),
                ("HBM", ", ".join(f"{name} {_megabytes(size)}" for name, size in memory.items())),
                ("collectives", collectives or "none"),
            ],
            "l",
        ),
        *(f"incomplete: {sentence}" for sentence in report.incomplete),
        "longest operations",
        *aligned([(_milliseconds(ms), name, label[-LABEL_WIDTH:]) for ms, name, label in report.top[:top]], "rl"),
    ]
    if report.kernels:
        lines += [
            "kernels, and the share of its issue slots that each unit uses, in %",
            *aligned(_kernel_rows(report.kernels), "llr"),
        ]
    return "\n".join(lines)


def _kernel_rows(kernels: list[KernelFigures]) -> list[Row]:
    units = list(dict.fromkeys(unit for kernel in kernels for unit in kernel.utilization))
    rows: list[Row] = [["", "bound by", *units]]
    for kernel in kernels:
        # A kernel whose dump was not readable has no shares: its cells stay empty.
        shares = (f"{100 * kernel.utilization[unit]:.0f}" if unit in kernel.utilization else "" for unit in units)
        rows.append([kernel.name, kernel.bound, *shares])
    return rows


def describe_pod(pod: PodReport, top: int) -> str:
    """The report on a configuration, with the `top` longest operations of each program."""
    lines = [f"{pod.config} on {pod.topology}: {HONEST}."]
    for form, row in pod.programs.items():
        lines += ["", TITLES[form]]
        for attention, program in row.items():
            if isinstance(program, DoesNotFit):
                lines.append(f"  {attention}: {program.does_not_fit}")
        reports = pod.fitting(form)
        if reports:
            facts = next(iter(reports.values())).facts
            mesh = ", ".join(f"{axis} {size}" for axis, size in facts.mesh.items())
            lines.append(
                f"  {facts.model}, {size_text(facts.image_size)}; mesh {mesh}; {facts.images:,} images, "
                f"{facts.images_per_device:g} a chip"
            )
            lines += aligned(_rows(reports, chip_of(pod.topology).hbm_gigabytes))
        for attention, report in reports.items():
            lines.append(f"  longest operations, {attention}")
            rows = [(_milliseconds(ms), f"in {count}", label[-100:]) for ms, count, label in report.sources[:top]]
            lines += aligned(rows, "rrl", indent="    ")
    return "\n".join([*lines, "", *_not_counted(pod.caveats)])


def _rows(reports: dict[str, RecipeReport], hbm_gigabytes: float) -> list[Row]:
    """The figures of programs side by side, a column for each attention."""
    every = list(reports.values())

    def row(label: str, cell: Callable[[RecipeReport], str]) -> Row:
        return [label, *map(cell, every)]

    def each(
        prefix: str, parts: Callable[[RecipeReport], Iterable[str]], cell: Callable[[RecipeReport, str], str]
    ) -> list[Row]:
        """A row for each part that one of the programs has."""
        names = dict.fromkeys(name for report in every for name in parts(report))
        return [row(prefix + name, lambda report, name=name: cell(report, name)) for name in names]  # type: ignore[misc]

    rows = [
        ["", *reports],
        row("fits a chip", lambda report: "yes"),
        row(f"HBM, of {1e3 * hbm_gigabytes:,.0f} MB", lambda report: _megabytes(report.total_MB)),
        *each("  ", lambda report: report.held_MB, lambda report, kind: _megabytes(report.held_MB.get(kind, 0))),
        row("  activations", lambda report: _megabytes(report.activations_MB)),
        row("  other temporary", lambda report: _megabytes(report.temp_MB - report.activations_MB)),
        row(
            "  results, program",
            lambda report: _megabytes(report.total_MB - sum(report.held_MB.values()) - report.temp_MB),
        ),
        row("estimate", lambda report: f"{at_least(report)}{_milliseconds(report.est_ms)}"),
        row("links, added whole", lambda report: _milliseconds(report.links_total_ms)),
        *each("  ", lambda report: report.collectives, _sent),
        row("step", lambda report: f"{at_least(report)}{_milliseconds(report.step_ms)}"),
        row("images/s a chip", lambda report: f"{report.images_per_second_per_chip:,.0f}"),
        row("MFU", lambda report: f"{report.mfu:.1%}"),
        row("roofline: compute", lambda report: _milliseconds(report.roofline.compute_ms)),
        row("roofline: HBM", lambda report: _milliseconds(report.roofline.hbm_ms)),
        *each("in ", lambda report: report.parts_ms, lambda report, part: _milliseconds(report.parts_ms.get(part, 0))),
    ]
    if list(reports)[-1] == "softmax" and len(reports) > 1:
        rows.append(row("step, times softmax's", lambda report: f"{report.step_ms / every[-1].step_ms:.3f}"))
    return rows


def _sent(report: RecipeReport, kind: str) -> str:
    size, milliseconds = report.collectives.get(kind, 0) / 1e6, report.links_ms.get(kind, 0)
    return f"{_megabytes(size)}, {_milliseconds(milliseconds)}"


def describe_sweep(sweep: Sweep) -> str:
    """The sweep of a configuration."""
    first = sweep.chips[0].report
    pods: list[Row] = [("pod", "chips", "estimate", "links", "step", "times the first", "images/s")]
    for chips, topology, report in sweep.chips:
        pods.append(
            (
                topology,
                str(chips),
                f"{at_least(report)}{_milliseconds(report.est_ms)}",
                _milliseconds(report.links_total_ms),
                f"{at_least(report)}{_milliseconds(report.step_ms)}",
                f"{report.step_ms / first.step_ms:.3f}",
                f"{chips * report.images_per_second_per_chip:,.0f}",
            )
        )
    lines = [
        f"{sweep.config}, {sweep.topology}: {HONEST}.",
        "",
        f"{TITLES['train']}, {first.facts.images_per_device:g} images a chip",
        *aligned(pods),
    ]
    for form, row in sweep.tokens.items():
        rows: list[Row] = [("tokens", "images", *row)]
        for steps in zip(*row.values(), strict=True):
            rows.append((f"{steps[0].tokens:,}", str(steps[0].images), *map(_milliseconds_an_image, steps)))
        lines += ["", f"{TITLES[form]} on one chip, ms an image", *aligned(rows, "r")]
    return "\n".join([*lines, "", *_not_counted(sweep.caveats)])


def _milliseconds_an_image(step: TokenStep) -> str:
    if step.report is None:
        return "does not fit"
    return f"{at_least(step.report)}{significant(step.report.step_ms / step.images)}"


def _not_counted(caveats: Caveats) -> list[str]:
    return [
        "Not in these figures:",
        *(f"  - {sentence}" for sentence in caveats.not_counted),
        "  - where a time has > (more than) before it: operations that the compiler gives no estimate for",
    ]


def at_least(report: Report) -> str:
    """The sign before a program's time: > where the program takes longer than the estimate, else nothing."""
    return "> " if report.is_lower_bound else ""


def _milliseconds(value: float) -> str:
    return f"{significant(value)} ms"


def _megabytes(value: float) -> str:
    # Whole bytes: a difference of two sizes is not exactly 0 in floating point.
    return f"{significant(round(value, 6))} MB"
