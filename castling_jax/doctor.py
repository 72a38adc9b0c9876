"""Checks whether everything works: versions, devices, data, a round trip of ten steps; a TPU's kernels against XLA."""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from packaging.requirements import Requirement

import castling_jax
from castling_jax.compile_report.cases import load_case
from castling_jax.compile_report.chips import CHIPS
from castling_jax.compile_report.figures import report
from castling_jax.convert.weights import read
from castling_jax.data.sources import digits
from castling_jax.errors import InputError, in_one_sentence
from castling_jax.models.registry import abstract_model
from castling_jax.predictions import predict
from castling_jax.storage import try_folder
from castling_jax.training.config_files import load_config
from castling_jax.training.kernel_check import call_shapes, compare_kernel, kernel_calls
from castling_jax.training.run import run
from castling_jax.training.sharding import make_mesh
from castling_jax.training.timing import interleaved_seconds, medians, significant

PACKAGE = "castling_jax"
# Packages that not everybody needs, and their use.
OPTIONAL = {
    "libtpu": "to train on a TPU, and for the compile report: pip install 'jax[tpu]'",
    "gcsfs": "for workdirs in a bucket: pip install gcsfs",
    "tensorflow": "to prepare most of tensorflow-datasets' data, not to train: pip install tensorflow-cpu",
}
STEPS = 10
GIBIBYTE = 2**30
# One model of each family: plain, subsampling and pooling attention have different kernels.
MODELS = ("deit_base", "levit_256", "mvitv2_tiny")
MESH = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}
REPEATS = 20
TIMED = [(attention, form) for attention in ("castling", "softmax") for form in ("inference", "train")]


class Line(NamedTuple):
    """One line of the report.

    Attributes:
      ok: whether the subject is as it should be; None where that depends on what the reader wants to do.
      subject: what was looked at.
      finding: what was found, and what to do.
    """

    ok: bool | None
    subject: str
    finding: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "NO", None: "--"}[self.ok]
        return f"{mark}  {self.subject:20s} {self.finding}"


def examine() -> Iterator[Line]:
    """The machine's state, line by line, and a round trip: train, castle, convert, predict."""
    yield from versions()
    yield from devices()
    yield from data()
    for name, use in OPTIONAL.items():
        installed = importlib.util.find_spec(name) is not None
        yield Line(True if installed else None, name, "installed" if installed else f"not installed; needed {use}")
    yield from round_trip()


def versions() -> Iterator[Line]:
    """The versions of Python and of the required packages, compared with the tested ranges."""
    yield Line(True, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Line(True, PACKAGE, castling_jax.__version__)
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:  # a checkout that pip did not install
        lines = (Path(castling_jax.__file__).parents[1] / "requirements.txt").read_text().splitlines()
        requirements = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    for requirement in requirements:
        # Requirements of the extras, such as [tpu], hold for those who install the extra.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Line(False, requirement.name, f"not installed: pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Line(fits, requirement.name, version if fits else f"{version}: pip install '{requirement}'")


def devices() -> Iterator[Line]:
    """JAX's devices, and the machine's memory and disk."""
    visible = jax.devices()
    yield Line(True, "devices", f"{len(visible)} x {visible[0].device_kind}, platform {visible[0].platform}")
    limit = (visible[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        yield Line(True, "device memory", f"{limit / GIBIBYTE:.1f} GiB each")
    if visible[0].platform == "cpu" and importlib.util.find_spec("libtpu") is not None:
        yield Line(None, "TPU", "libtpu is installed, and JAX uses the CPU: there is no TPU, or JAX_PLATFORMS says so")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIBIBYTE
    free = shutil.disk_usage(Path.cwd()).free / GIBIBYTE
    yield Line(total > 2, "memory", f"{total:.1f} GiB in this machine, {os.cpu_count()} processors")
    yield Line(free > 1, "disk", f"{free:.1f} GiB free in '{Path.cwd()}'")


def data() -> Iterator[Line]:
    """The folder that data is read from, and the folder that runs are written to."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    prepared = sorted({path.parts[-3] for path in folder.glob("*/*/dataset_info.json")}) if folder.is_dir() else []
    contents = f"prepared: {', '.join(prepared)}" if prepared else "nothing is prepared; digits needs nothing"
    yield Line(True if prepared else None, "data", f"'{folder}', {contents}")
    try:
        try_folder("runs")
        yield Line(True, "runs", f"'{Path('runs').absolute()}' can be written to")
    except InputError as error:
        yield Line(False, "runs", str(error))


def round_trip() -> Iterator[Line]:
    """Ten steps on the digits, the switch, and predictions with the exported weights."""
    start = time.perf_counter()

    def done(stage: str, finding: str) -> Line:
        return Line(True, stage, f"{finding}, after {time.perf_counter() - start:.1f} s")

    stage = "train"
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = load_config("digits")
            config.model.update(depth=2, drop_path_rate=0.0)
            config.train.update(epochs=1, batch_size=1437 // STEPS)
            config.logging.update(progress=False, tensorboard=False)
            summary = run(config, Path(folder) / "run")
            yield done(stage, f"{summary.figures['steps']} steps of castling on the digits")
            stage = "castle"
            difference = summary.figures["max_difference"]
            if not difference <= 1e-5:
                raise InputError(f"the two forms' logits differ by {difference:.1e}, more than rounding explains.")
            yield done(stage, f"the two forms' logits differ by {difference:.1e} at most")
            stage = "convert"
            weights = read(summary.workdir / "inference")
            yield done(stage, f"the inference folder has {len(weights.classes or [])} classes")
            stage = "predict"
            test = digits("test")
            answers = predict(summary.workdir / "inference", list(test.images), top=1)
            right = sum(int(answer[0][0]) == label for answer, label in zip(answers, test.labels, strict=True))
            expected = round(len(test) * summary.figures["accuracy_inference_form"])
            # The two run in batches of different sizes: rounding may decide between two classes once.
            if abs(right - expected) > 1:
                raise InputError(f"predictions are right for {right} images, the evaluation's for {expected}.")
            yield done(stage, f"{len(answers)} images, the evaluation's accuracy")
        except Exception as error:  # a bug too: the doctor reports it and goes on
            yield Line(False, stage, f"{type(error).__name__}: {in_one_sentence(error)}")


def examine_tpu(names: Sequence[str] = MODELS, *, implementation: str = "auto") -> Iterator[Line]:
    """Compares each kernel with XLA on random numbers, forward and backward, and times with the compiler's estimates.

    Args:
      names: the models whose kernels are compared.
      implementation: as `create_model` takes it; "pallas" makes a CPU interpret the kernels.

    Raises:
      InputError: there is no TPU.
    """
    device = jax.devices()[0]
    if implementation == "auto" and device.platform != "tpu":
        raise InputError(f"--tpu is for a TPU, and JAX has {len(jax.devices())} x {device.device_kind} here.")
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        for dtype in ("bfloat16", "float32"):
            for name in names:
                models = [abstract_model(name, dtype=dtype, implementation=implementation)]
                for call in kernel_calls(models, mesh):
                    yield _compared(call, name, dtype, device.device_kind)
    yield from timed(KINDS.get(device.device_kind))


def _compared(call: Any, name: str, dtype: str, kind: str) -> Line:
    operation = call.operation.removesuffix("_attention")
    what = f"{call_shapes(call)} of {name}, {dtype}"
    try:
        share = compare_kernel(call, kind)
    except InputError as error:
        return Line(False, operation, str(error))
    except Exception as error:  # a kernel that does not compile or run: the others are still compared
        return Line(False, operation, f"{what}: {type(error).__name__}: {in_one_sentence(error)[:300]}")
    return Line(True, operation, f"{what}: as XLA, {share:.0%} of what rounding explains")


def timed(chip: str | None, **options: int) -> Iterator[Line]:
    """The time of DeiT-B's attention layer, measured here and estimated by the compiler.

    Args:
      chip: one of CHIPS; None leaves the estimates out.
      **options: options of the layer, as `castling_jax.compile_report.cases.layer` takes them.
    """
    for attention, form in TIMED:
        layer = {"attention": attention, "form": form} | options
        case = load_case("layer", layer, [])
        arguments = _random(case.arguments)
        call = functools.partial(jax.jit(case.function), *arguments)
        measured = 1e3 * medians(interleaved_seconds({"layer": call}, repeats=REPEATS))["layer"]
        finding = f"DeiT-B's attention layer, {attention}, {form}: measured {significant(measured)} ms"
        try:
            if chip is not None:
                topology = f"{chip}:{CHIPS[chip].pods[0]}"
                estimate = report("layer", layer, topology=topology, devices=1).est_ms
                finding += f", the compiler's estimate for a {chip} {significant(estimate)} ms"
            else:
                finding += ", no estimate for this chip"
        except InputError as error:  # the measured time is worth printing without libtpu too
            finding += f", no estimate ({in_one_sentence(error)})"
        yield Line(None, "time", finding)


def _random(shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.05 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)
