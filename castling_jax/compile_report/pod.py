"""What a configuration would cost on a pod: its training step and inference, with its attention and with softmax.

All figures come from the TPU compiler's estimates (figures.py) and from the links' published bandwidth (links.py).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from castling_jax.compile_report.chips import chip_of
from castling_jax.compile_report.compile import DoesNotFitError
from castling_jax.compile_report.figures import RecipeReport, report_recipe
from castling_jax.errors import InputError
from castling_jax.models.attention.kinds import FORMS
from castling_jax.storage import make_folder
from castling_jax.training.overrides import load_overridden

HONEST = "the TPU compiler's estimates; nothing here was measured on a TPU"
NOT_COUNTED = (
    "collectives and compute that run at the same time: the links' time is added to the step whole",
    "latencies of collectives, about a microsecond a link, and other traffic on the links",
    "HBM bandwidth that prefetches and compute take from each other",
    "the host: reading and augmenting images, sending them to the chips, evaluation, checkpoints",
    "traffic between slices: the pod is one slice",
)
PACKAGE = Path(__file__).parents[1]
TOP = 60  # how many of the longest operations are kept
PATCH = 16  # pixels to a token's side, in every model that is swept
TOKEN_SIZES = (224, 448, 896, 1344, 2048)  # pixels: 196, 784, 3,136, 7,056 and 16,384 tokens


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A program that needs more memory than a chip has.

    Attributes:
      does_not_fit: the compiler's sentence.
    """

    does_not_fit: str

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


Program = RecipeReport | DoesNotFit


class Compiler:
    """Compiles a configuration's programs and keeps their figures, so that an interrupted report can go on.

    Args:
      folder: the folder for the figures. Each program has a file, and so has each version of JAX, libtpu and this code.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "programs"
        code = b"".join(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py")))
        installed = {package.name: package.version for package in importlib.metadata.distributions()}
        self.versions = {name: installed.get(name) for name in ("jax", "libtpu")}
        self.versions["castling_jax"] = hashlib.sha256(code).hexdigest()[:8]

    def __call__(self, options: dict[str, Any], *, topology: str, devices: int) -> Program:
        """The program of `cases.recipe` with these options; of its operations only the longest.

        Raises:
          InputError: the folder cannot be made, or `report_recipe` refuses an argument.
        """
        # The configuration's values belong to the key: its file may change under the same name.
        request = {
            "what": "recipe",
            "options": options,
            "topology": topology,
            "devices": devices,
            "versions": self.versions,
            "settings": load_overridden(options["config"], options.get("fields", ())).to_dict(),
        }
        values = (options[name] for name in sorted(options) if name != "fields")
        words = [str(value).replace("/", "_") for value in ("recipe", topology, *values)]
        digest = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:8]
        file = self.folder / f"{'-'.join(words)[:120]}-{digest}.json"
        if file.is_file():
            figures = json.loads(file.read_text())["figures"]
            return DoesNotFit(**figures) if "does_not_fit" in figures else RecipeReport.from_json(figures)
        make_folder(self.folder)  # before minutes are spent
        print(f"compiling {' '.join(words)} ...", file=sys.stderr, flush=True)
        program: Program
        try:
            report = report_recipe(options, topology=topology, devices=devices)
            # The longest operations are all that a report shows; a large model has ten thousand.
            longest = {name: getattr(report, name)[:TOP] for name in ("top", "sources", "kernels")}
            program = dataclasses.replace(report, **longest)
        except DoesNotFitError as error:
            program = DoesNotFit(str(error))
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"request": request, "figures": dataclasses.asdict(program)}, default=str))
        temporary.replace(file)
        return program


@dataclasses.dataclass(frozen=True)
class Caveats:
    """What the figures of some programs leave out.

    Attributes:
      what: a sentence that says what the figures are.
      incomplete: what the compiler has no figures for.
      not_counted: what no such figures count, what was taken for granted, and `incomplete`.
    """

    what: str
    incomplete: list[str]
    not_counted: list[str]


def caveats(reports: Iterable[RecipeReport]) -> Caveats:
    """The caveats of all these reports, each once."""
    reports = list(reports)
    incomplete = sorted({sentence for report in reports for sentence in report.incomplete})
    assumed = dict.fromkeys(sentence for report in reports for sentence in report.facts.assumed)
    return Caveats(HONEST, incomplete, [*NOT_COUNTED, *assumed, *incomplete])


@dataclasses.dataclass(frozen=True)
class PodReport:
    """A configuration's programs on one pod.

    Attributes:
      config: the configuration's name and the words that override its fields, as on the command line.
      topology: the pod, such as "v5e:16x16".
      programs: form -> attention -> program; inference comes first.
    """

    config: str
    topology: str
    programs: dict[str, dict[str, Program]]

    def fitting(self, form: str) -> dict[str, RecipeReport]:
        """The reports on the programs of a form that fit a chip, by attention."""
        return {name: report for name, report in self.programs[form].items() if isinstance(report, RecipeReport)}

    @property
    def caveats(self) -> Caveats:
        return caveats(report for form in self.programs for report in self.fitting(form).values())

    def to_json(self) -> dict[str, Any]:
        """The attributes and the caveats as dicts and lists."""
        programs = {
            form: {attention: program.to_json() for attention, program in row.items()}
            for form, row in self.programs.items()
        }
        return vars(self) | {"programs": programs} | dataclasses.asdict(self.caveats)


def pod_report(config: str, *, topology: str, options: dict[str, Any], devices: int, compiler: Compiler) -> PodReport:
    """Compiles a configuration's training step and inference for a pod, with its attention and with softmax.

    Args:
      config: FILE.py or FILE.py:ARGUMENT.
      topology: the pod, such as "v5e:16x16".
      options: mesh, batch (on each device) and image_size replace the configuration's; fields has the words
        --config.GROUP.FIELD=VALUE that override it.
      devices: how many of the pod's devices are used, 0 for all.
      compiler: compiles the programs.

    Raises:
      InputError: the configuration, the topology or an option is wrong.
    """
    chip_of(topology)  # refuses an unknown chip before anything is compiled
    programs: dict[str, dict[str, Program]] = {form: {} for form in reversed(FORMS)}
    for form, row in programs.items():
        for attention in _attentions(config, options):
            asked = {"config": config, "form": form, "attention": attention} | options
            row[attention] = compiler(asked, topology=topology, devices=devices)
    return PodReport(_named(config, options), topology, programs)


def _attentions(config: str, options: dict[str, Any]) -> list[str]:
    """The configuration's attention and softmax, or softmax alone."""
    return list(dict.fromkeys((load_overridden(config, options.get("fields", ())).model.attention, "softmax")))


def _named(config: str, options: dict[str, Any]) -> str:
    return " ".join([config, *options.get("fields", ())])


class PodStep(NamedTuple):
    """A training step on one size of pod.

    Attributes:
      chips: how many chips the pod has.
      topology: the pod.
      report: the report on the step.
    """

    chips: int
    topology: str
    report: RecipeReport


class TokenStep(NamedTuple):
    """A program on one chip, for images of one size.

    Attributes:
      tokens: tokens of an image.
      images: images in one call.
      report: the report on the program; None where it does not fit the chip.
    """

    tokens: int
    images: int
    report: RecipeReport | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A configuration on growing pods, and on one chip with growing images.

    Attributes:
      config: as in a PodReport.
      topology: the largest pod.
      chips: training steps with the same number of images on each chip.
      tokens: form -> attention -> programs with about the same number of tokens in a call; training of all but the
        smallest images computes blocks again in the backward pass.
    """

    config: str
    topology: str
    chips: list[PodStep]
    tokens: dict[str, dict[str, list[TokenStep]]]

    @property
    def reports(self) -> Iterator[RecipeReport]:
        """All reports, those on pods first."""
        yield from (step.report for step in self.chips)
        series = (series for row in self.tokens.values() for series in row.values())
        yield from (step.report for steps in series for step in steps if step.report is not None)

    @property
    def caveats(self) -> Caveats:
        return caveats(self.reports)

    def to_json(self) -> dict[str, Any]:
        """The attributes and the caveats as dicts and lists."""
        tokens = {
            form: {attention: [_step_to_json(step) for step in series] for attention, series in row.items()}
            for form, row in self.tokens.items()
        }
        steps = {"chips": [_step_to_json(step) for step in self.chips], "tokens": tokens}
        return vars(self) | steps | dataclasses.asdict(self.caveats)


def _step_to_json(step: PodStep | TokenStep) -> list[Any]:
    return [*step[:2], None if step.report is None else step.report.to_json()]


def sweep(config: str, *, topology: str, options: dict[str, Any], compiler: Compiler) -> Sweep:
    """Scales a configuration: over pods at the same images on each chip, and over images at the same tokens in a call.

    Args:
      config: FILE.py or FILE.py:ARGUMENT.
      topology: one of the chip's pods; the sweep ends at it.
      options: as `pod_report` takes them; batch is needed.
      compiler: compiles the programs.

    Raises:
      InputError: the configuration, the topology or an option is wrong, or a training step does not fit its pod.
    """
    pods = chip_of(topology).pods
    chip, _, sides = topology.partition(":")
    if sides not in pods:
        raise InputError(f"--sweep goes up to one of {', '.join(f'{chip}:{pod}' for pod in pods)}, not {topology!r}.")
    attentions = _attentions(config, options)
    chips = []
    for pod in pods[: pods.index(sides) + 1]:
        asked = {"config": config, "form": "train", "attention": attentions[0]} | options
        program = compiler(asked, topology=f"{chip}:{pod}", devices=0)
        if isinstance(program, DoesNotFit):
            raise InputError(program.does_not_fit)
        chips.append(PodStep(math.prod(map(int, pod.split("x"))), f"{chip}:{pod}", program))
    tokens: dict[str, dict[str, list[TokenStep]]] = {
        form: {name: [] for name in attentions} for form in reversed(FORMS)
    }
    for pixels in TOKEN_SIZES:
        count = (pixels // PATCH) ** 2
        # Fewer images as they grow: a call keeps the tokens of the first size.
        images = max(1, options["batch"] * (TOKEN_SIZES[0] // PATCH) ** 2 // count)
        for form, row in tokens.items():
            for attention, series in row.items():
                asked = {
                    "config": config,
                    "form": form,
                    "attention": attention,
                    "image_size": pixels,
                    "batch": images,
                    "mesh": "data:1",
                    "remat": pixels > TOKEN_SIZES[0],
                    "fields": options.get("fields", ()),
                }
                program = compiler(asked, topology=f"{chip}:{pods[0]}", devices=1)
                series.append(TokenStep(count, images, None if isinstance(program, DoesNotFit) else program))
    return Sweep(_named(config, options), topology, chips, tokens)
