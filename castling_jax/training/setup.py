"""Builds and checks a run's parts from its configuration, before anything is computed; then builds its first state."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from castling_jax.convert.run_folder import exported_weights, model_arguments, preprocessing_of
from castling_jax.data.arrays import ArrayDataset
from castling_jax.data.folder import parse_split, rest_of
from castling_jax.data.loader import Batch, TrainTransform, training_batches
from castling_jax.data.sources import HELD_OUT_SPLITS, Dataset, find_splits, load_dataset, path_of
from castling_jax.errors import InputError, Mistakes, check_at_most
from castling_jax.models.macs import count_macs
from castling_jax.models.model import Model
from castling_jax.models.registry import DENSE_MODELS, MODELS, abstract_model, create_model
from castling_jax.models.variables import Variables, get_variables
from castling_jax.normalization import to_pixels
from castling_jax.preprocessing import Preprocessing
from castling_jax.tasks.classification.losses import DISTILLATIONS
from castling_jax.tasks.registry import TASKS, check_dataset, task_of, unused_fields
from castling_jax.tasks.task import Answers, Task, Teacher
from castling_jax.training.config import check_config, check_unused
from castling_jax.training.evaluate import Evaluator, configured_evaluator, evaluate_weights
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.schedules import default_warmup, learning_rate_schedule, mask_threshold_schedule
from castling_jax.training.sharding import (
    check_batch,
    check_heads,
    make_mesh,
    place,
    process_rows,
    replicated,
    state_shardings,
    whole_over_fsdp,
)
from castling_jax.training.state import TrainState, create_state
from castling_jax.training.step import make_train_step, prepare_batch
from castling_jax.training.weights import initial_variables, read_teacher

LARGEST_BATCH = 128  # most images in a batch where config.train.batch_size leaves their number open


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
      config: the configuration, with values in those of FOUND_FIELDS that were None.
      mesh: the mesh that the run uses.
      train_set: examples to learn from.
      eval_set: held-out examples.
      test_set: examples that are evaluated once, at the end; None if there is no test split.
      train_transform: augmentation on the host, (example, random generator) -> example.
      model: the model in training form, with shapes only.
      steps_per_epoch: whole batches in an epoch.
      total_steps: steps of the run.
      learning_rate: step, counted from 0 -> learning rate.
      threshold_at: step, counted from 0 -> mask threshold.
      optimizer: turns gradients into updates.
      state: shapes of the state.
      shardings: a TrainState of shardings, for the state.
      task: the task to learn.
      train_step: the step from `make_train_step`.
    """

    config: ConfigDict
    mesh: Mesh
    train_set: Dataset
    eval_set: Dataset
    test_set: Dataset | None
    train_transform: TrainTransform
    model: Model
    steps_per_epoch: int
    total_steps: int
    learning_rate: optax.Schedule
    threshold_at: Callable[[int], float]
    optimizer: optax.GradientTransformation
    state: TrainState
    shardings: TrainState
    task: Task
    train_step: Callable[..., Any]

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the model's input in evaluation."""
        return preprocessing_of(self.config, self.model.spec.image_size)

    @property
    def exported(self) -> str:
        """The weights that the run exports: "raw" or "averaged"."""
        return exported_weights(self.config)

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """The endless stream of training batches from `first_step` on, with this process's rows of each batch."""
        config = self.config
        return training_batches(
            self.train_set,
            batch_size=config.train.batch_size,
            seed=config.seed,
            transform=self.train_transform,
            repeats=config.augment.repeats,
            first_step=first_step,
            rows=process_rows(config.train.batch_size, self.mesh),
            workers=config.dataset.workers,
            max_corrupt_share=config.dataset.max_corrupt_share,
        )

    def images_seen(self, state: TrainState, batch: dict[str, jax.Array], count: int) -> UInt8[np.ndarray, "..."]:
        """The first `count` images of a global batch as the state's next step will see them: augmented and mixed.

        All processes must call this together.

        Returns:
          The images [count, height, width, 3], no longer normalised.
        """
        parts = self.config.train.accumulate_steps

        @functools.partial(jax.jit, out_shardings=replicated(self.mesh))
        def first(batch: dict[str, jax.Array], key: jax.Array, step: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, step)
            options = {"preprocessing": self.preprocessing, "accumulate_steps": parts}
            return prepare_batch(self.task, batch, key, step, **options)["image"][:count]

        images = first(batch, state.key, state.step)
        return to_pixels(images, self.preprocessing)

    def evaluate(self, weights: Mapping[str, Variables], threshold: float) -> dict[str, float]:
        """The figures of `evaluate_weights` on the held-out examples, at a mask threshold."""
        return evaluate_weights(self._evaluator, weights, threshold, exported=self.exported)[0]

    def test(self, weights: Mapping[str, Variables], threshold: float) -> tuple[dict[str, float], Answers]:
        """The figures and answers of `evaluate_weights` on the test examples, which must exist, at a mask threshold."""
        assert self.test_set is not None
        evaluator = configured_evaluator(self.config, self.model, self.test_set, self.mesh)
        return evaluate_weights(evaluator, weights, threshold, exported=self.exported)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return configured_evaluator(self.config, self.model, self.eval_set, self.mesh)

    @functools.cached_property
    def macs(self) -> tuple[int, int]:
        """MACs of the forward pass in training form: (with the softmax branch, without it once its mask is empty)."""
        without = abstract_model(**self.model.spec.arguments(form="inference"))
        return count_macs(self.model), count_macs(without)


def set_up(
    config: ConfigDict,
    devices: Sequence[Any] | None = None,
    datasets: tuple[Dataset, Dataset] | None = None,
    teacher: Teacher | None = None,
) -> Setup:
    """Builds the parts of a run from `config`; no parameters are drawn, and no file is written.

    Args:
      config: a configuration with the fields of `default_config`.
      devices: the mesh's devices; None takes all.
      datasets: (examples to learn from, held-out examples), without a test set; None loads those named in `config`.
      teacher: a model to learn from; None takes the one that `config` names, if any.

    Raises:
      InputError: a field, a name or a size is wrong.
    """
    check_config(config)
    config = config.copy_and_resolve_references()
    if jax.config.read("jax_enable_x64"):
        raise InputError(
            "JAX_ENABLE_X64 must be off: a run computes in float32 or bfloat16, and 64 bits would draw other weights."
        )
    # Blocks that do not depend on each other report their mistakes together; a nested block needs the outer one.
    mistakes = Mistakes()
    with mistakes:
        train_set, eval_set, test_set = (*datasets, None) if datasets else _load_splits(config)
        _fit_to_data(config, len(train_set))
        with mistakes:
            total_steps, steps_per_epoch = _steps(config, len(train_set))
            earlier_ends = [epochs * steps_per_epoch for epochs in config.train.extended_from or ()]
            learning_rate = learning_rate_schedule(
                config.optimizer,
                batch_size=config.train.batch_size,
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                earlier_ends=earlier_ends,
            )
        with mistakes:
            # None where the images have no classes: a masked autoencoder needs none.
            model = abstract_model(num_classes=train_set.num_classes or None, **model_arguments(config))
            for split in filter(None, (train_set, eval_set, test_set)):
                check_dataset(model, split)
            preprocessing = preprocessing_of(config, model.spec.image_size)
            transform = augmentation(config, model, preprocessing)
            if isinstance(train_set, ArrayDataset):  # try one example: some augmentations refuse float pixels
                transform(train_set[0], np.random.default_rng(config.seed))
    with mistakes:
        mesh = make_mesh(config.mesh, devices)
        with mistakes:
            check_batch("config.evaluation.batch_size", config.evaluation.batch_size, mesh)
        if (batch_size := config.train.batch_size) is not None:  # None only if the data could not be read
            check_batch("config.train.batch_size", batch_size, mesh, parts=config.train.accumulate_steps)
    mistakes.report()
    with mistakes:
        check_heads(model, mesh)
    with mistakes:
        teacher = teacher or _teacher(config, model, mesh, train_set.classes)
        task = task_of(model).from_config(config, model, teacher, steps_per_epoch=steps_per_epoch)
    mistakes.report()
    # No mistakes from here on, so all names above are bound.
    optimizer = make_optimizer(config.optimizer, learning_rate)
    keeps_ema = config.train.ema_decay is not None
    state = jax.eval_shape(
        lambda variables: create_state(variables, optimizer, config.seed, ema=keeps_ema), get_variables(model)
    )
    shardings = state_shardings(state, mesh)
    train_step = make_train_step(
        model,
        optimizer,
        task,
        preprocessing=preprocessing,
        ema_decay=config.train.ema_decay,
        ema_warmup=config.train.ema_warmup,
        skip_nonfinite=config.train.on_nonfinite == "skip",
        accumulate_steps=config.train.accumulate_steps,
        shardings=shardings,
    )
    return Setup(
        config=config,
        mesh=mesh,
        train_set=train_set,
        eval_set=eval_set,
        test_set=test_set,
        train_transform=transform,
        model=model,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        threshold_at=mask_threshold_schedule(config.mask, total_steps=total_steps, earlier_ends=earlier_ends),
        optimizer=optimizer,
        state=state,
        shardings=shardings,
        task=task,
        train_step=train_step,
    )


def augmentation(config: ConfigDict, model: Model, preprocessing: Preprocessing) -> TrainTransform:
    """The transform of training examples: the one that the model's task makes from `config.augment`.

    Raises:
      InputError: `config` sets a field that the model does not use, or a field of `config.augment` is out of range.
    """
    check_unused(config, unused_fields(model), f"this {model.spec.name}")
    return task_of(model).train_transform(config.augment, preprocessing)


def named_splits(data: ConfigDict) -> tuple[str, str]:
    """The splits to learn from and to evaluate on; `find_splits` finds those that the group `data` leaves open.

    Raises:
      InputError: as `find_splits` does; the split to learn from would share images with a part that eval_split or
        test_split cuts from it; or the split to learn from is given but the data has no held-out split.
    """
    found, eval_split = "train", data.eval_split
    if eval_split is None:
        found, eval_split = find_splits(data.name, data_dir=data.data_dir)
        is_part = rest_of(eval_split) is not None or "[" in eval_split  # "10% of train", "train[90%:]"
        if is_part and data.train_split not in (None, found):
            raise InputError(
                f"{data.name} has no split {', '.join(HELD_OUT_SPLITS)}: give config.dataset.eval_split, or leave out "
                "config.dataset.train_split."
            )
    if path_of(data.name) is None:  # tensorflow-datasets has its own notation for parts, and digits has none
        train_split = data.train_split or found
        for field, split in (("eval_split", eval_split), ("test_split", data.test_split)):
            if split is not None and split.startswith(f"{train_split}["):
                raise InputError(
                    f"config.dataset.train_split = {train_split!r} must leave out {field} = {split!r}, so that no "
                    f"image is in both: '{train_split}[:90%]' leaves out '{train_split}[90%:]'."
                )
        return train_split, eval_split
    train_split = data.train_split or rest_of(eval_split) or found
    rests = [("eval_split", eval_split, rest_of(eval_split))]
    if data.test_split is not None and parse_split(data.test_split)[0] == parse_split(train_split)[0]:
        rests.append(("test_split", data.test_split, rest_of(data.test_split)))
        if train_split == found and data.train_split is None:
            train_split = rest_of(data.test_split) or found
    for field, split, rest in rests:
        if rest not in (None, train_split):
            raise InputError(
                f"config.dataset.train_split = {train_split!r} must be {rest!r} where {field} is {split!r}, so that no "
                "image is in both."
            )
    return train_split, eval_split


def held_out_split(data: ConfigDict) -> str:
    """The split to evaluate on, whatever the group `data` names to learn from.

    Raises:
      InputError: as `find_splits` does.
    """
    return data.eval_split if data.eval_split is not None else find_splits(data.name, data_dir=data.data_dir)[1]


def load_split(config: ConfigDict, split: str, classes: Sequence[str] | None = None) -> Dataset:
    """A split of the configuration's data set, with the annotations that its model learns from.

    Raises:
      InputError: as `load_dataset` does.
    """
    data, model = config.dataset, {**MODELS, **DENSE_MODELS}.get(config.model.name)
    annotation = None if model is None else TASKS[model[0].task].annotation  # an unknown name is refused elsewhere
    if annotation is None:
        classes = None  # no label is read, so images of any classes will do
    options = {"annotation": annotation, "ignore_label": data.ignore_label, "first_label": data.first_label}
    return load_dataset(data.name, split, data_dir=data.data_dir, classes=classes, **options)


def _load_splits(config: ConfigDict) -> tuple[Dataset, Dataset, Dataset | None]:
    """Loads the data sets to learn from, to evaluate on and to test on; writes the splits' names into `config`."""
    data = config.dataset
    data.train_split, data.eval_split = named_splits(data)
    train_set = load_split(config, data.train_split)
    # Each split's files may have other classes than the split to learn from, or have them in another order.
    classes = train_set.classes if train_set.annotation in ("boxes", "mask") else None
    test_set = None if data.test_split is None else load_split(config, data.test_split, classes)
    return train_set, load_split(config, data.eval_split, classes), test_set


def _fit_to_data(config: ConfigDict, images: int) -> None:
    """Fills in the batch size and the warm-up if the configuration leaves them open."""
    if config.train.batch_size is None:  # the largest power of two that leaves at least 8 steps in an epoch
        eighth = max(images // 8, 1)
        config.train.batch_size = min(LARGEST_BATCH, 2 ** (eighth.bit_length() - 1))
    if config.optimizer.warmup_epochs is None:
        config.optimizer.warmup_epochs = default_warmup(config.train.epochs)
    check_config(config)


def _steps(config: ConfigDict, images: int) -> tuple[int, int]:
    """(steps of the run, steps of an epoch)."""
    steps_per_epoch = images // config.train.batch_size
    check_at_most("config.train.batch_size", config.train.batch_size, images, "the images of the training split")
    return config.train.epochs * steps_per_epoch, steps_per_epoch


def first_variables(setup: Setup) -> Variables:
    """A new run's first variables, drawn or read from `init_from`, as NumPy arrays."""
    config = setup.config
    if config.init_from:
        variables = initial_variables(
            config.init_from, setup.model, reset_head=config.reset_head, ema=config.init_ema, seed=config.seed
        )
    else:
        arguments = model_arguments(config) | {"num_classes": setup.train_set.num_classes or None}
        variables = get_variables(create_model(rngs=nnx.Rngs(config.seed), **arguments))
    # NumPy arrays: `place` then sends each device only its own part.
    return jax.tree.map(np.asarray, variables)


def first_state(setup: Setup, variables: Variables) -> TrainState:
    """A new run's first state, on its mesh."""
    where = {"params": setup.shardings.params, "batch_stats": setup.shardings.batch_stats}
    placed = place(variables, {name: where[name] for name in variables})
    create = jax.jit(
        lambda variables: create_state(variables, setup.optimizer, setup.config.seed, ema=bool(setup.state.ema)),
        out_shardings=setup.shardings,
    )
    return create(placed)


def _teacher(config: ConfigDict, student: Model, mesh: Mesh, classes: Sequence[str]) -> Teacher | None:
    """The teacher that `config.distillation` names, on the mesh; None if there is none."""
    options = config.distillation
    if options.kind is None:
        if named := [name for name in ("teacher", "name") if options[name] is not None]:
            raise InputError(
                f"config.distillation.{named[0]} = {options[named[0]]!r} has no effect without a kind of loss: give "
                f"config.distillation.kind ({', '.join(DISTILLATIONS)})."
            )
        return None
    if options.teacher is None:
        raise InputError(
            f"config.distillation.kind = {options.kind!r} needs a teacher: give config.distillation.teacher."
        )
    preprocessing = preprocessing_of(config, student.spec.image_size)
    name = options.name or student.spec.name
    model, variables = read_teacher(options.teacher, name, student, preprocessing, classes)
    model = abstract_model(**model.spec.arguments(implementation=config.model.implementation))
    placed = place(variables, whole_over_fsdp(state_shardings(variables, mesh)))
    return Teacher(model, placed, kind=options.kind, alpha=options.alpha, temperature=options.temperature)
