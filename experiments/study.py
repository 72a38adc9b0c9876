"""A study: arms x learning rates x seeds. Each run has the study's configuration with a few fields changed."""

import dataclasses
import hashlib
import importlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from castling_jax.errors import InputError, check_known
from castling_jax.training.config import FIELDS

ROOT = Path(__file__).parents[1]
STUDIES = Path("experiments", "studies")  # relative to a checkout
RESULTS = ROOT / "experiments" / "results"  # RESULTS/STUDY/RUN.json
STARTS = "starts"  # the folder of runs that are no arm's, beside the others
START = "the run that this arm starts from"  # as the value of a field: that run's folder


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the alternatives that a study compares.

    Attributes:
      name: name of the arm in tables.
      changes: dotted fields of the configuration -> their values in this arm.
      seeds: seeds of the runs. A seed gives the same order of examples in every arm, so arms are compared seed by seed.
      learning_rates: rates of the runs, each with every seed; the report uses the one with the best validation
        accuracy.
      start: one of the study's `starts` or another arm, whose run with the same seed comes before this arm's. None for
        none.
    """

    name: str
    changes: Mapping[str, Any]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    start: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """The declaration of a study: a file in experiments/studies defines one as STUDY.

    Attributes:
      config: builds the configuration that all runs share: data, model and budget. Its eval_split is for validation.
      arms: the alternatives to compare.
      control: name of the arm that the others are compared with.
      test_split: the split that each finished run is tested on, once. None tests on the held-out split, for a study
        that only prepares another one, such as a choice of learning rates.
      about_data: a sentence about the data for every page that shows the study's figures.
      starts: name -> builder of the configuration of a run that arms start from, such as a pre-training. It is trained
        once for each seed, by the first run that needs it, and has no result of its own.
      contrasts: (arm, other arm) pairs that the study was made for, the most important one first. They are written down
        before the runs; all other differences are looked at afterwards.
    """

    config: Callable[[], ConfigDict]
    arms: tuple[Arm, ...]
    control: str
    test_split: str | None
    about_data: str
    starts: Mapping[str, Callable[[], ConfigDict]] = dataclasses.field(default_factory=dict)
    contrasts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        for name in (self.control, *itertools.chain(*self.contrasts)):
            check_known("arm", name, names)
        if len(set(names)) < len(names):
            raise InputError(f"two arms of a study have one name: {', '.join(names)}.")
        for arm in self.arms:
            if arm.start is not None:
                check_known("start", arm.start, (*self.starts, *names))
                self._check_start(arm)
            if (START in arm.changes.values()) != (arm.start is not None):
                raise InputError(f"the arm {arm.name!r} must name its start, and use START in a field, or neither.")

    def _check_start(self, arm: Arm) -> None:
        for start in self.arms:
            is_one_run = len(start.learning_rates) == 1 and start.start is None and {*arm.seeds} <= {*start.seeds}
            if start.name == arm.start and not is_one_run:
                raise InputError(
                    f"the arm {arm.name!r} cannot start from {start.name!r}: that arm must have one learning rate, no "
                    f"start, and all seeds of {arm.name!r}."
                )


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study."""

    study: str
    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder and of its result."""
        return f"{self.arm.name}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """Path of the finished run's result."""
        return RESULTS / self.study / f"{self.name}.json"

    def config(self, study: Study, start: Path | None = None) -> ConfigDict:
        """The run's configuration; `start` is the folder of the run that it starts from.

        Raises:
          InputError: the arm changes an unknown field.
        """
        config = study.config()
        for field, value in self.arm.changes.items():
            check_known("config field", field, FIELDS)
            config.update_from_flattened_dict({field: str(start) if value == START else value})
        config.optimizer.learning_rate = self.learning_rate
        # The run's own test at its end writes the answers to all images, which its result needs.
        config.dataset.test_split = study.test_split or config.dataset.eval_split
        return self._seeded(config)

    def start_of(self, study: Study) -> tuple[str, ConfigDict]:
        """The folder of the run that this one starts from, in the folder of the study's runs, and its configuration."""
        assert self.arm.start is not None
        for arm in study.arms:
            if arm.name == self.arm.start:
                start = Trial(self.study, arm, arm.learning_rates[0], self.seed)
                return start.name, start.config(study)
        return f"{STARTS}/{self.arm.start}-seed{self.seed}", self._seeded(study.starts[self.arm.start]())

    def _seeded(self, config: ConfigDict) -> ConfigDict:
        config.seed = self.seed
        config.logging.progress = config.logging.tensorboard = False
        return config


def study_names() -> list[str]:
    """Names of the studies in experiments/studies."""
    return sorted(path.stem for path in (ROOT / STUDIES).glob("*.py"))


def load_study(name: str) -> Study:
    """The STUDY of experiments/studies/NAME.py.

    Raises:
      InputError: there is no such file.
    """
    check_known("study", name, study_names())
    return importlib.import_module(f"experiments.studies.{name}").STUDY


def trials_of(name: str, study: Study) -> list[Trial]:
    """All runs of a study. First seeds come first, so that an unfinished study has results for every arm."""
    trials = [Trial(name, arm, rate, seed) for arm in study.arms for rate in arm.learning_rates for seed in arm.seeds]
    return sorted(trials, key=lambda trial: trial.arm.seeds.index(trial.seed))


def study_hash(name: str, root: Path = ROOT) -> str:
    """SHA-256 of a study's file in a checkout."""
    return _sha256([root / STUDIES / f"{name}.py"], root)


def code_hash(name: str, root: Path = ROOT) -> str:
    """SHA-256 of the code behind a study's results: names and contents of all files in castling_jax/, and the study."""
    package = sorted((root / "castling_jax").rglob("*"))
    return _sha256([*package, root / STUDIES / f"{name}.py"], root)


def _sha256(paths: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file() and path.parent.name != "__pycache__":
            content = path.read_bytes()
            # With the length, so that text cannot move between two files unnoticed.
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
