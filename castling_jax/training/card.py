"""A model card, filled in from a run: the model, the data it learnt from, and how good it is."""

import json
from collections.abc import Mapping
from typing import Any

from castling_jax.convert.weights import Weights
from castling_jax.errors import printable
from castling_jax.models.macs import count_macs
from castling_jax.models.model import Model
from castling_jax.models.variables import count_parameters, flatten, get_variables
from castling_jax.sizes import image_shape
from castling_jax.storage import absolute
from castling_jax.tables import markdown
from castling_jax.tasks.registry import measures_of
from castling_jax.training.config import default_config
from castling_jax.training.summary import SUMMARY_FILE

CARD_FILE = "README.md"
LOADED = (
    "`castling_jax.load_inference(FOLDER)` returns (model, variables), and `castling_jax.predict(FOLDER, images)` "
    "returns the model's answers to images."
)
# Formats that castling_jax does not load.
USES = {
    "stablehlo": '`jax.export.deserialize(open("program.stablehlo", "rb").read()).call(images)` returns the outputs. '
    "It needs only jax and flatbuffers. `model.json` says how an image becomes the input."
}
NORMALIZED, PIXELS = "float32, normalised", "uint8 RGB pixels, which it normalises itself"


def model_card(weights: Weights, model: Model, format: str, *, uint8: bool = False) -> str:
    """The card of an exported model, in Markdown.

    The license of the data and the model's intended use are marked TODO, for a person to write.

    Args:
      weights: the source of the export, from `castling_jax.convert.read`. If it belongs to a finished run, the card
        shows the figures in the run's summary.
      model: the exported model.
      format: the export's format, one of `castling_jax.convert.inference_folder.PAYLOADS`.
      uint8: whether the exported program takes uint8 images.
    """
    spec, pixels, classes = model.spec, weights.preprocessing, weights.classes
    figures, sides = _summary(weights), " x ".join(map(str, image_shape(spec.image_size)))
    lines = [
        f"# {spec.name}, {spec.attention} attention",
        "",
        f"Inference form for images of {sides} pixels and {spec.num_classes:,} classes, "
        f"made with castling_jax. {USES.get(format, LOADED)}",
        "",
    ]
    rows = {
        "parameters": f"{count_parameters(get_variables(model)):,}",
        "MACs an image": f"{count_macs(model) / 1e6:,.2f} M",
        "parameters' dtype": str(spec.param_dtype),
    }
    if format in USES:
        rows["images of the program"] = (
            f"[batch, {sides.replace(' x ', ', ')}, {model.in_chans}], {PIXELS if uint8 else NORMALIZED}"
        )
    if pixels is not None:
        rows["input"] = f"(pixel / 255 - {list(pixels.mean)}) / {list(pixels.std)}, RGB"
    if figures:
        rows |= _trained(figures, averaged=weights.averaged)
    if classes is not None and len(classes) <= 100:
        rows["classes"] = printable(", ".join(classes))
    rows |= {"license of the data": "TODO", "intended use and limits": "TODO"}
    lines += markdown(("", ""), rows.items(), "l")
    if weights.config is not None:
        changed = _changed_fields(weights.config)
        lines += ["", "Fields of the configuration that differ from the defaults:", "", "```"]
        lines += [*(f"{name} = {printable(value)}" for name, value in changed.items()), "```"]
    return "\n".join(lines) + "\n"


def _summary(weights: Weights) -> dict[str, Any]:
    """The figures of the run that the weights come from; {} unless the run finished at the weights' step."""
    path = absolute(weights.path)
    # A checkpoint is in RUN/checkpoints/STEP, an inference folder in RUN/inference.
    folder = path.parent.parent if weights.step is not None else path.parent
    try:
        figures = json.loads((folder / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return figures if weights.step in (None, figures.get("steps")) else {}


def _trained(figures: Mapping[str, Any], *, averaged: bool | None) -> dict[str, str]:
    """The rows of a card's table that come from a summary: name -> text.

    Args:
      figures: the summary's figures.
      averaged: whether the card is of the moving averages; None for the weights that the run exports.
    """
    measure = measures_of(figures)[0]
    prefix = {None: "", False: "raw_", True: "averaged_"}[averaged]
    if not measure.is_in(figures, prefix):  # the run has only one kind of weights
        prefix = ""
    both = " / ".join(measure.texts(figures, prefix))
    return {
        "data": f"{printable(figures.get('dataset', '?'))}",
        f"{measure.name}, training form / inference form": f"{both} of {figures['eval_images']:,} images of the split "
        f"{printable(figures.get('split', '?'))}",
        "training": f"{figures['steps']:,} steps; mask threshold {figures['mask_threshold']:g} at the end",
        "largest difference between the two forms' outputs": f"{figures[f'{prefix}max_difference']:.1e}",
        "SHA-256 of the trained parameters": f"{figures['parameters_sha256']}",
    }


def _changed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's configuration that differ from the defaults, without those that concern the machine."""
    # Through JSON, as the run's own fields went: tuples become lists, which compare equal.
    defaults = flatten(json.loads(json.dumps(default_config().to_dict())))
    fields = flatten({name: value for name, value in config.items() if name not in ("logging", "checkpoint", "mesh")})
    return {
        path.replace("/", "."): value
        for path, value in sorted(fields.items())
        if path not in defaults or defaults[path] != value
    }
