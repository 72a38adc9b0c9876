"""Prints a hash of every lowered program, to compare two commits on one machine.

    python scripts/programs.py > before.txt
    git checkout OTHER; python scripts/programs.py | diff before.txt -
    python scripts/programs.py --only='deit_tiny/*' --out=texts      # the programs' texts, to diff two of one name

Two commits that print the same hash for a program compute the same thing, operation by operation. There are two kinds
of programs. MODEL/ATTENTION/FORM is a forward pass: every model with the paper's attentions, and the first model of
each family with all others too, in both forms. step/NAME is the training step of one of six configurations, and
step/NAME/empty_mask the same step with the empty mask that ends a run.

A program is JAX's StableHLO for a CPU before the compiler sees it. Names of functions and of results, and source
locations, are left out; a long constant stands in the text as its own hash. Nothing is compiled, and no array is
allocated: the whole list takes two to three minutes. The hashes depend on JAX's version, so they are not committed.
"""

import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the commit's own package and configurations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import model_arguments
from castling_jax.data.sources import Unread
from castling_jax.models.attention.kinds import FORMS
from castling_jax.models.registry import MODELS, abstract_model, attentions_of
from castling_jax.models.variables import apply, get_variables
from castling_jax.storage import make_folder
from castling_jax.tasks.task import Teacher
from castling_jax.tools.cli import ending_in_a_sentence, local_path
from castling_jax.training.config import default_config
from castling_jax.training.setup import set_up
from castling_jax.training.sharding import batch_shapes
from configs import deit, digits, levit

IMAGES = 2
OF_THE_PAPER = ("castling", "linear_angular", "softmax", "angular")
FIRST_OF_FAMILY = {family: name for name, (family, _) in reversed(MODELS.items())}.values()
SYMBOL = re.compile(r"(?:func\.func(?: public| private)?|sdy\.mesh|module) @([^\s(]+)")
RESULT_NAME = re.compile(r'(?:, )?jax\.result_info = "[^"]*"')
LONG_CONSTANT = re.compile(r'"0x[0-9A-Fa-f]{65,}"')


def normalize(text: str) -> str:
    """A module's text without the names that its author chose, so that equal programs have equal texts.

    Functions and meshes are numbered in the order of their definitions. The targets of custom calls keep their names,
    which say what the calls compute.
    """
    text = LONG_CONSTANT.sub(lambda found: f'"sha256:{hashlib.sha256(found[0].encode()).hexdigest()}"', text)
    text = RESULT_NAME.sub("", text).replace(" {}", "")
    numbers = {name: f"@symbol_{i}" for i, name in enumerate(dict.fromkeys(SYMBOL.findall(text)))}
    return re.sub(r"(?<!custom_call )@([\w.$-]+)", lambda found: numbers.get(found[1], found[0]), text)


def hash_of(text: str) -> str:
    """The hash that is printed for a program: 64 bits, enough to tell a hundred programs apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    """The normalised text of a function's program for these shapes."""
    return normalize(jax.jit(function).lower(*arguments).as_text(debug_info=False))


def forward_pass(name: str, attention: str, form: str) -> str:
    """A model's logits and mask densities in evaluation mode, at the model's own image size."""
    model = abstract_model(name, attention=attention, form=form)
    size = model.spec.image_size
    images = jax.ShapeDtypeStruct((IMAGES, size, size, 3), jnp.float32)
    threshold = jax.ShapeDtypeStruct((), jnp.float32)

    def run(variables, images, threshold):
        return apply(model, variables, images, mask_threshold=threshold, return_densities=True)

    return lower(run, get_variables(model), images, threshold)


def training_step(make_config: Callable[[], ConfigDict], *, empty_mask: bool) -> str:
    """A configuration's training step on one device. The teacher, if any, is the run's own model with softmax."""
    config = make_config()
    config.evaluation.batch_size = config.train.batch_size
    data = Unread(1000 * config.train.batch_size, 10)
    teacher = None
    if config.distillation.kind is not None:
        arguments = model_arguments(config) | {"attention": "softmax", "num_classes": data.num_classes}
        model = abstract_model(form="inference", **arguments)
        options = config.distillation
        teacher = Teacher(model, get_variables(model), options.kind, options.alpha, options.temperature)
    setup = set_up(config, jax.devices()[:1], (data, data), teacher)
    batch = batch_shapes(setup.task.example_shapes(setup.model.spec.image_size), config.train.batch_size)
    taught = {} if teacher is None else teacher.variables
    if empty_mask:  # a threshold that is known while tracing leaves the branch out of the step
        return lower(
            lambda state, batch, taught: setup.train_step(state, batch, 1.0, taught), setup.state, batch, taught
        )
    return lower(setup.train_step, setup.state, batch, jax.ShapeDtypeStruct((), jnp.float32), taught)


def micro_config(**train: Any) -> ConfigDict:
    """The default configuration with the smallest model, in small batches of digits."""
    config = default_config()
    config.model.update({"name": "deit_micro", "depth": 2})
    config.train.update({"batch_size": 8, **train})
    return config


def recipe(module: Any, variant: str) -> ConfigDict:
    """A recipe of configs/, in small batches."""
    config = module.get_config(variant)
    config.train.batch_size = 8
    return config


def distillation() -> ConfigDict:
    """Hard distillation into the second head of a small model."""
    config = micro_config()
    config.model.distilled = True
    config.distillation.kind = "hard"
    return config


STEPS: dict[str, Callable[[], ConfigDict]] = {
    "digits": digits.get_config,
    "deit": functools.partial(recipe, deit, "tiny"),
    "levit": functools.partial(recipe, levit, "128s"),
    "distillation": distillation,
    "ema": functools.partial(micro_config, ema_decay=0.99),
    "accumulation": functools.partial(micro_config, accumulate_steps=2),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program by name; `text` lowers it."""

    name: str
    text: Callable[[], str]

    @property
    def file_name(self) -> str:
        return f"{self.name.replace('/', '-')}.mlir"


def programs() -> list[Program]:
    """All programs, in the order in which they are printed."""
    listed = [
        Program(f"{name}/{attention}/{form}", functools.partial(forward_pass, name, attention, form))
        for name in MODELS
        for attention in attentions_of(name)
        if attention in OF_THE_PAPER or name in FIRST_OF_FAMILY
        for form in FORMS
    ]
    for name, make_config in STEPS.items():
        for suffix, empty_mask in (("", False), ("/empty_mask", True)):
            text = functools.partial(training_step, make_config, empty_mask=empty_mask)
            listed.append(Program(f"step/{name}{suffix}", text))
    return listed


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to print, such as 'deit_*/softmax/*'")
    parser.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="also write each program's text to this folder"
    )
    options = parser.parse_args()
    matching = [program for program in programs() if fnmatch.fnmatchcase(program.name, options.only)]
    if not matching:
        parser.error(f"no program is called {options.only!r}: names are MODEL/ATTENTION/FORM and step/NAME")
    if options.out:
        make_folder(options.out)
    for number, program in enumerate(matching, start=1):
        print(f"{number} of {len(matching)}: {program.name}", file=sys.stderr)
        text = program.text()
        if options.out:
            (options.out / program.file_name).write_text(text)
        print(program.name, hash_of(text), flush=True)


if __name__ == "__main__":
    main()
