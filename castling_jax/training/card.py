"""A model card: what weights are, what they learnt from, and how well they do, filled in from a run."""

import json
from collections.abc import Mapping
from typing import Any

from castling_jax.convert.weights import Weights
from castling_jax.errors import printable
from castling_jax.models.macs import count_macs
from castling_jax.models.model import Model
from castling_jax.models.variables import count_parameters, flatten, get_variables
from castling_jax.storage import absolute
from castling_jax.training.config import default_config
from castling_jax.training.summary import SUMMARY_FILE

CARD_FILE = "README.md"


def model_card(weights: Weights, model: Model) -> str:
    """The card of an exported model, in Markdown.

    What the run does not say is marked TODO, for a person to write: the license of the data, and what the model is for.

    Args:
      weights: the source, as `castling_jax.convert.read` gives it. A finished run's summary is looked for beside it.
      model: what was exported.
    """
    spec, pixels, classes = model.spec, weights.preprocessing, weights.classes
    figures = _summary(weights)
    lines = [
        f"# {spec.name}, {spec.attention} attention",
        "",
        f"Inference form for images of {spec.image_size} x {spec.image_size} pixels and {spec.num_classes:,} classes, "
        f"made with castling_jax. `castling_jax.load_inference(FOLDER)` gives (model, variables), "
        "`castling_jax.predict(FOLDER, images)` the classes of images.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count_parameters(get_variables(model)):,} |",
        f"| MACs an image | {count_macs(model) / 1e6:,.2f} M |",
        f"| parameters' dtype | {spec.param_dtype} |",
    ]
    if pixels is not None:
        lines.append(f"| input | (pixel / 255 - {list(pixels.mean)}) / {list(pixels.std)}, RGB |")
    if figures:
        lines += [f"| {what} | {said} |" for what, said in _trained(figures).items()]
    if classes is not None and len(classes) <= 100:
        lines.append(f"| classes | {printable(', '.join(classes))} |")
    lines += ["| license of the data | TODO |", "| what it is for, and what not | TODO |"]
    if weights.config is not None:
        changed = _changed_fields(weights.config)
        lines += ["", "Fields of the configuration that differ from the defaults:", "", "```"]
        lines += [*(f"{name} = {printable(value)}" for name, value in changed.items()), "```"]
    return "\n".join(lines) + "\n"


def _summary(weights: Weights) -> dict[str, Any]:
    """The figures of the finished run that the weights come from; {} where it is unfinished or a later one."""
    path = absolute(weights.path)
    folder = path.parent.parent if weights.step is not None else path.parent
    try:
        figures = json.loads((folder / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return figures if weights.step in (None, figures.get("steps")) else {}


def _trained(figures: Mapping[str, Any]) -> dict[str, str]:
    """What a summary says, in words."""
    both = " / ".join(f"{100 * figures[f'accuracy_{form}_form']:.2f} %" for form in ("train", "inference"))
    return {
        "data": f"{printable(figures.get('dataset', '?'))}",
        "accuracy, training form / inference form": f"{both} of {figures['eval_images']:,} images of the split "
        f"{printable(figures.get('split', '?'))}",
        "training": f"{figures['steps']:,} steps; mask threshold {figures['mask_threshold']:g} at the end",
        "largest difference of the two forms' logits": f"{figures['max_difference']:.1e}",
        "SHA-256 of the trained parameters": f"{figures['parameters_sha256']}",
    }


def _changed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's configuration that are not the defaults, without where things lie on a machine."""
    defaults = flatten(json.loads(json.dumps(default_config().to_dict())))
    given = flatten({name: value for name, value in config.items() if name not in ("logging", "checkpoint", "mesh")})
    return {
        path.replace("/", "."): value
        for path, value in sorted(given.items())
        if path not in defaults or defaults[path] != value
    }
