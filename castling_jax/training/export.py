"""Exports a trained model's inference form: tabulates what happens to each parameter, writes the files, checks them."""

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from castling_jax.convert.checkpoint import CHECKPOINTS
from castling_jax.convert.inference import check_switch, largest_difference, to_inference
from castling_jax.convert.inference_folder import (
    MODEL_FILE,
    PAYLOADS,
    check_uint8,
    compute_outputs,
    load_inference,
    program_outputs,
    save_inference,
)
from castling_jax.convert.plan import Fate, plan
from castling_jax.convert.run_folder import CONFIG_FILE, preprocessing_of
from castling_jax.convert.weights import read
from castling_jax.data.loader import evaluation_batches
from castling_jax.errors import InputError, check_at_most, printable
from castling_jax.models.attention.kinds import KINDS
from castling_jax.models.model import Model
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import Variables, count_parameters, flatten
from castling_jax.normalization import model_input, to_pixels
from castling_jax.postprocessing import Suppression
from castling_jax.preprocessing import Preprocessing
from castling_jax.sizes import size_text
from castling_jax.storage import absolute, is_remote, reach_bucket, try_folder, write_atomically
from castling_jax.tables import aligned
from castling_jax.tasks.registry import task_of
from castling_jax.tasks.task import Task
from castling_jax.training.card import CARD_FILE, model_card
from castling_jax.training.config_files import run_config
from castling_jax.training.setup import held_out_split, load_split
from castling_jax.training.summary import SUMMARY_FILE

CHECK_BATCHES = 4  # of `Predictions.batch_size`: 128 images, and fewer where an image has many outputs
# How far logits of order one may differ if the arithmetic is the same except for the order of sums.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
LOST_DETECTIONS = 0.01  # share of detections that rounding may turn over in another program
OTHER_PIXELS = 1e-3  # share of pixels to which rounding may give another class


def convert(
    path: str | os.PathLike,
    out: epath.Path,
    *,
    format: str,
    ema: bool | None,
    bfloat16: bool,
    check: bool,
    nms: bool = True,
    uint8: bool = False,
) -> None:
    """Converts weights to an inference folder, and describes each step on standard output.

    Args:
      path: the weights, as `castling_jax.convert.read` takes them.
      out: the folder to write.
      format: a format of `save_inference`.
      ema: whether to convert the moving averages; None converts the weights that the run exports.
      bfloat16: whether parameters are stored in bfloat16.
      check: whether to compare the forms and the written files on held-out images.
      nms: whether a detector's program suppresses, and returns detections instead of all scores and boxes.
      uint8: whether a program takes uint8 pixels and normalises them itself.

    Raises:
      InputError: what `read` and `save_inference` raise, the source names no model, or a check fails.
    """
    # The target is checked before the source is read, which may take minutes.
    if uint8:
        check_uint8(format)
    reach_bucket(out)
    _check_out(out)
    source = read(path, ema=ema)
    if source.model is None:
        raise InputError(f"'{path}' does not say which model it belongs to, as a run and an inference folder do.")
    if uint8 and source.preprocessing is None:
        raise InputError(
            f"'{path}' does not say how an image becomes its model's input, so its program cannot take uint8 images."
        )
    spec = source.model.spec
    variables = to_inference(source.variables, dtype=jnp.bfloat16 if bfloat16 else None)
    param_dtype = "bfloat16" if bfloat16 else spec.param_dtype
    model = abstract_model(**spec.arguments(form="inference", param_dtype=param_dtype))
    about = f"{source.path}" if source.step is None else f"{source.path}, step {source.step:,}"
    about += ", moving average" if source.averaged else ""
    print(f"{spec.name}, {spec.attention}, {size_text(spec.image_size)}, {spec.num_classes} classes: {about}\n")
    if source.step is not None and not (absolute(source.path).parent.parent / SUMMARY_FILE).exists():
        threshold = f", whose mask threshold is {source.mask_threshold:g}" if source.mask_threshold is not None else ""
        print(f"This run is not finished: the conversion takes its step {source.step:,}{threshold}.\n")
    print(table(source.variables, variables))
    config = run_config(source.config)
    if check:
        config.dataset.eval_split = held_out_split(config.dataset)
        preprocessing = source.preprocessing or preprocessing_of(config, spec.image_size)
        sent = held_out_images(task_of(source.model), preprocessing, config)
        if uint8 and sent.dtype != np.uint8:  # a data set of floats
            sent = to_pixels(sent, preprocessing)
        images = model_input(jnp.asarray(sent), preprocessing)
        print(f"\nOn {len(images)} images of {printable(config.dataset.name)} {printable(config.dataset.eval_split)}:")
        for line in compare_forms(source.model, source.variables, source.mask_threshold, images):
            print(f"  {line}")
    # Only now: if the two forms differ, nothing is written.
    suppression = source.suppression if nms and model.task == "detection" else None
    save_inference(
        *(out, model, variables),
        format=format,
        preprocessing=source.preprocessing,
        classes=source.classes,
        category_ids=source.category_ids,
        suppression=suppression,
        uint8=uint8,
    )
    if check:
        pixels = sent if uint8 else None
        print(f"  {compare_written(out, format, model, variables, images, suppression, pixels=pixels)}")
        if param_dtype != spec.param_dtype:
            print(f"  {compare_cast(source.model, source.variables, model, variables, images)}")
    if not (out / CARD_FILE).exists():  # a card that a person has filled in stays
        write_atomically(
            out / CARD_FILE, model_card(source, model, format, uint8=uint8).encode(errors="backslashreplace")
        )
    size = _bytes(out / PAYLOADS[format]) + _bytes(out / MODEL_FILE)
    print(f"\nWrote {out}: {PAYLOADS[format]}, {MODEL_FILE} and {CARD_FILE}, {size / 1e6:,.2f} MB.")


def _check_out(out: epath.Path) -> None:
    """Refuses a folder that cannot be written to, or that belongs to a run: the files would get mixed."""
    # Resolved, because a link may lead into a run's folder.
    where = out if is_remote(out) else epath.Path(Path(out).resolve())
    for run in (where, *where.parents):
        is_run = (run / CONFIG_FILE).exists() or (run / CHECKPOINTS).exists()
        if is_run and (where == run or where.relative_to(run).parts[0] == CHECKPOINTS):
            raise InputError(
                f"'{out}' belongs to a run: give a folder for the conversion alone, such as '{out}-converted'."
            )
    try_folder(out)


def _bytes(path: epath.Path) -> int:
    return sum(map(_bytes, path.iterdir())) if path.is_dir() else path.stat().length


def table(before: Variables, after: Variables) -> str:
    """A table of both forms' arrays and what happened to each; arrays of equal blocks share a line."""
    old, new, fates = flatten(before), flatten(after), plan(before)
    lines: Counter[tuple[str, str, str, str]] = Counter()
    for path in sorted(old.keys() | new.keys()):
        pattern = re.sub(r"blocks/\d+/", "blocks/*/", path)
        lines[pattern, _shape(old.get(path)), _shape(new.get(path)), _fate(path, old, new, fates)] += 1
    rows = [("", "source", "inference form", "")]
    for (pattern, shape, new_shape, fate), times in lines.items():
        counts = [f"{times} x {text}" if times > 1 and text else text for text in (shape, new_shape)]
        rows.append((pattern, counts[0] or "-", counts[1] or "-", fate))
    rows.append(("parameters", f"{count_parameters(before):,}", f"{count_parameters(after):,}", ""))
    statistics = sum(leaf.size for path, leaf in old.items() if not path.startswith("params/"))
    if statistics:
        rows.append(("batch statistics", f"{statistics:,}", "0", ""))
    text = "\n".join(aligned(rows, "lrrl"))
    actions = Counter(fate.action for fate in fates.values())
    return text + "\n  " + ", ".join(f"{times} arrays {action}" for action, times in actions.items()) + "."


def _shape(leaf: np.ndarray | None) -> str:
    return "" if leaf is None else f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _fate(path: str, old: dict[str, Any], new: dict[str, Any], fates: dict[str, Fate]) -> str:
    """What happened to an array, in words; "" if nothing did."""
    if path not in old:  # only folding creates arrays: the bias of a layer that had none
        return "the batch norm's shift"
    action, target, _ = fates[path]
    if action == "dropped":
        return "dropped with the softmax branch"
    if target != path:
        return "folded into linear" if action == "folded" else "averaged into head"
    if action == "kept":
        return "" if old[path].dtype == new[path].dtype else "cast"
    return "folded with batch norm" if action == "folded" else "averaged with the second head"


def held_out_images(task: type[Task], preprocessing: Preprocessing, config: ConfigDict) -> np.ndarray:
    """Up to CHECK_BATCHES batches of held-out images, [batch, height, width, 3], from the task's `eval_transform`.

    `model_input` turns them into the model's input. Corrupt images are left out, and more of them than
    config.dataset.max_corrupt_share raise an InputError.
    """
    dataset = load_split(config, config.dataset.eval_split)
    if preprocessing.crop_mode == "slide":  # a window is an image like any other
        preprocessing = dataclasses.replace(preprocessing, crop_mode="squash")
    transform = task.eval_transform(preprocessing)
    count = min(CHECK_BATCHES * task.predictions.batch_size, len(dataset))
    share = config.dataset.max_corrupt_share
    batch = next(evaluation_batches(dataset, batch_size=count, transform=transform, max_corrupt_share=share))
    return batch["image"][batch["weight"] > 0]


def compare_forms(model: Model, variables: Variables, mask_threshold: float | None, images: jax.Array) -> list[str]:
    """Sentences about the difference that the switch makes on these images.

    Args:
      model: the model, in either form.
      variables: the model's variables.
      mask_threshold: the threshold that training has reached, for a castling model in training form.
      images: the model's input, floats.

    Raises:
      InputError: the two forms differ although they must be equal.
    """
    spec = model.spec
    if spec.form == "inference":
        return ["the source is in inference form already"]
    outputs = _outputs(abstract_model(**spec.arguments(form="inference")), to_inference(variables), images)
    if KINDS[spec.attention].inference is not None:
        assert mask_threshold is not None
        # At the reached threshold the forms may differ by as much as the mask still keeps. Only at 1 must they agree.
        report = check_switch(model, variables, images, mask_threshold)
        mask_kind = spec.arguments().get("mask_kind", "threshold")
        kept = ", ".join(f"{density:.2%}" for density in report["densities"])
        lines = [
            f"at the mask {mask_kind} {mask_threshold:g} the two forms' outputs differ by at most "
            f"{report['max_difference']:.1e}; softmax weights kept, by layer: {kept}",
            f"at 1 by at most {report['max_difference_at_one']:.1e}",
        ]
        difference = report["max_difference_at_one"]
    else:
        difference = _difference(_outputs(model, variables, images), outputs, images)
        lines = [f"the two forms' outputs differ by at most {difference:.1e}"]
    _refuse_beyond(spec.dtype, difference, outputs, "the two forms' outputs")
    return lines


def compare_written(
    out: epath.Path,
    format: str,
    model: Model,
    variables: Variables,
    images: jax.Array,
    suppression: Suppression | None,
    *,
    pixels: UInt8[np.ndarray, "batch height width 3"] | None = None,
) -> str:
    """Reads the written folder back, and compares its outputs, or a program's detections, with the model's.

    Args:
      out: the folder.
      format: its format.
      model: the model in inference form.
      variables: the model's variables.
      images: the model's input.
      suppression: how a detector's program suppresses; None if it does not.
      pixels: the images as a program for uint8 takes them; None for a program that takes `images`.

    Raises:
      InputError: the outputs differ by more than rounding.
    """
    in_program = suppression if format == "stablehlo" else None
    if format == "stablehlo":
        expected = _outputs(model, variables, images, in_program, compute=program_outputs)
        program = jax.export.deserialize(bytearray((out / PAYLOADS[format]).read_bytes()))
        outputs = jax.device_get(program.call(images if pixels is None else pixels))
        if model.task == "segmentation":
            share = float(np.mean(outputs != expected))
            check_at_most("the share of pixels of another class in the program", share, OTHER_PIXELS, "the limit")
            return f"the written program, read back, gives {1 - share:.2%} of the pixels the model's class"
    else:
        expected = _outputs(model, variables, images)
        outputs = _outputs(*load_inference(out), images)
    if in_program is not None:
        count, lost = _lost_detections(outputs, expected, max(images.shape[1:3]), TOLERANCES[model.spec.dtype])
        if lost > LOST_DETECTIONS * count:
            raise InputError(f"{lost:,} of the model's {count:,} detections are not in those of '{out}', read back.")
        return f"the written program, read back, gives {count - lost:,} of the model's {count:,} detections"
    difference = _difference(outputs, expected, images)
    _refuse_beyond(model.spec.dtype, difference, expected, f"the outputs of '{out}', read back, and of the model")
    return "the written files, read back, give the same outputs" + (f" to {difference:.1e}" if difference else "")


def compare_cast(
    source: Model, source_variables: Variables, model: Model, variables: Variables, images: jax.Array
) -> str:
    """A sentence about how casting the parameters to another dtype changes the outputs on these images."""
    uncast = abstract_model(**source.spec.arguments(form="inference"))
    before, after = _outputs(uncast, to_inference(source_variables), images), _outputs(model, variables, images)
    changed = f"{model.spec.param_dtype} parameters change them by at most {_difference(before, after, images):.1e}"
    if isinstance(before, Mapping):  # a detector answers with boxes, of which many are nearly equal
        return changed
    return f"{changed}, and the answer for {int(np.sum(before.argmax(-1) != after.argmax(-1)))} images"


def _outputs(
    model: Model,
    variables: Variables,
    images: jax.Array,
    suppression: Suppression | None = None,
    compute: Callable[..., Any] = compute_outputs,
) -> Any:
    return jax.device_get(jax.jit(functools.partial(compute, model, suppression=suppression))(variables, images))


def _difference(one: Any, other: Any, images: jax.Array) -> float:
    return float(largest_difference(one, other, max(images.shape[1:3])))


def _lost_detections(found: Any, expected: Any, side: int, tolerance: float) -> tuple[int, int]:
    """(number of expected detections, number of them that have no twin among the found ones), in whatever order.

    Rounding may swap two detections with nearly the same score, or drop one whose overlap is at the threshold.
    """
    apart = np.abs(expected["boxes"][:, :, None] - found["boxes"][:, None]).max(-1) / side
    apart = np.maximum(apart, np.abs(expected["scores"][:, :, None] - found["scores"][:, None]))
    same = expected["classes"][:, :, None] == found["classes"][:, None]
    is_there = (same & (apart <= tolerance)).any(-1)
    is_real = expected["classes"] >= 0
    return int(is_real.sum()), int((is_real & ~is_there).sum())


def _refuse_beyond(dtype: str, difference: float, outputs: Any, what: str) -> None:
    # A dict's differences are shares already, as `largest_difference` computes them.
    scale = 1.0 if isinstance(outputs, Mapping) else max(1.0, float(np.max(np.abs(outputs))))
    allowed = TOLERANCES[dtype] * scale
    if not difference <= allowed:  # this way around NaN is refused as well
        raise InputError(f"{what} differ by {difference:.1e}, more than the {allowed:.1e} that rounding explains.")
