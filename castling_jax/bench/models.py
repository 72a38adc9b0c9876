"""Times whole models over the image size, and states the memory that they need."""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from castling_jax.bench.calls import PASSES, Row, batch_of, time_group
from castling_jax.bench.rivals import INFERENCE, MASK_THRESHOLD, OURS
from castling_jax.errors import InputError
from castling_jax.models.registry import abstract_model, create_model
from castling_jax.models.variables import Variables, apply, flatten, get_variables
from castling_jax.plots import SMALL, write_plain_numbers


def check_models(name: str, image_sizes: Sequence[int], rivals: Sequence[str], overrides: dict[str, Any]) -> None:
    """Builds the models that `measure_models` times, with shapes only, which takes a second.

    Raises:
      InputError: as `measure_models` does; or an override is one of the arguments that the benchmark sets.
    """
    if taken := sorted({"name", "attention", "form", "image_size"} & overrides.keys()):
        raise InputError(
            "the benchmark names its models' attentions, forms and sizes itself, after --model, --attentions and "
            f"--image-sizes: leave out --set {taken[0]}."
        )
    for (attention, form), size in itertools.product(_attentions(rivals).values(), image_sizes):
        abstract_model(name, attention=attention, form=form, image_size=size, **overrides)


def _attentions(rivals: Sequence[str], *, backward: bool = False) -> dict[str, tuple[str, str]]:
    """Label -> (attention, form) of each model. Gradients are of training forms, none of which folds batch norm."""
    models = OURS | {rival: (rival, "inference") for rival in rivals}
    if backward:
        return {label: (attention, "train") for label, (attention, _) in models.items() if label != INFERENCE}
    return models


def measure_models(
    name: str,
    image_sizes: Sequence[int],
    repeats: int,
    rivals: Sequence[str] = (),
    *,
    backward: bool = False,
    overrides: dict[str, Any] | None = None,
) -> list[Row]:
    """Times a whole model, castling in both forms against softmax.

    Args:
      name: the model's name.
      image_sizes: pixels a side.
      repeats: timed calls of each model.
      rivals: other attentions to time too.
      backward: whether the gradients by the parameters are timed too, of the training forms.
      overrides: other arguments of `create_model`.

    Returns:
      `time_group`'s rows with model, pass, image_size, tokens and batch added; and temporary_mib, the memory that the
      compiled program takes beside its arguments and results (not of timm's model).

    Raises:
      InputError: the model is unknown, does not take an attention or an override, or does not take an image size.
    """
    rows = []
    cases = list(itertools.product([False, True] if backward else [False], sorted(image_sizes)))
    for with_backward, size in (bar := tqdm(cases, unit="case")):
        bar.set_description(f"{name}, {PASSES[with_backward]}, {size} pixels")
        calls: dict[str, Callable[[], object]] = {}
        memory: dict[str, float] = {}
        for label, (attention, form) in _attentions(rivals, backward=with_backward).items():
            model = create_model(name, attention=attention, form=form, image_size=size, **(overrides or {}))
            variables = get_variables(model)
            tokens = _tokens(variables, size)
            pixels = np.random.default_rng(0).normal(size=(batch_of(tokens), size, size, 3)).astype(np.float32)
            function = _gradients if with_backward else apply
            arguments = variables, jnp.asarray(pixels)
            run = partial(function, model, mask_threshold=jnp.float32(MASK_THRESHOLD))
            compiled = jax.jit(run).lower(*arguments).compile()
            calls[label] = partial(compiled, *arguments)
            if (analysis := compiled.memory_analysis()) is not None:
                memory[label] = analysis.temp_size_in_bytes / 2**20
        if not with_backward:
            calls |= _timm_model(f"{name}_patch16_224", pixels)
        case = {"model": name, "pass": PASSES[with_backward], "image_size": size, "tokens": tokens}
        case |= {"batch": len(pixels)}
        rows += [case | row | _temporary(memory, row["name"]) for row in time_group(calls, repeats)]
    return rows


def draw_models(rows: Sequence[Row], title: str) -> Figure:
    """Time and memory of an image over the image size, all of them logarithmic; a row of pictures for each pass."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(13, 4.4 * len(passes)), layout="constrained")
    figure.suptitle(title)
    names = list(dict.fromkeys(row["name"] for row in rows))
    colors = {name: matplotlib.colormaps["tab10"](i % 10) for i, name in enumerate(names)}
    for kind, axes in zip(passes, figure.subplots(len(passes), 2, squeeze=False), strict=True):
        for name in names:
            shown = [row for row in rows if (row["name"], row["pass"]) == (name, kind)]
            if not shown:  # the inference form has no gradients
                continue
            sizes = [row["image_size"] for row in shown]
            style = {"color": colors[name], "marker": "o", "markersize": 4, "label": name}
            times = [row["milliseconds"]["median"] / row["batch"] for row in shown]
            axes[0].plot(sizes, times, **style)
            if all("temporary_mib" in row for row in shown):
                axes[1].plot(sizes, [row["temporary_mib"] / row["batch"] for row in shown], **style)
        axes[0].set(title=f"Time, {kind}", ylabel="milliseconds an image")
        axes[1].set(title=f"Memory beside parameters, images and results, {kind}", ylabel="MiB an image")
        ticks = sorted({row["image_size"] for row in rows})
        for axis in axes:
            axis.set(xlabel="pixels a side", xscale="log", yscale="log")
            axis.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            axis.xaxis.minorticks_off()
            write_plain_numbers(axis.yaxis)
            axis.grid(alpha=0.3, which="both")
        axes[1].legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _gradients(model: Any, variables: Variables, images: jax.Array, *, mask_threshold: jax.Array) -> Any:
    """Gradients by the parameters of the mean square of all outputs."""

    def loss(params: Any) -> jax.Array:
        outputs = apply(model, variables | {"params": params}, images, mask_threshold=mask_threshold)
        return sum((jnp.mean(jnp.square(x)) for x in jax.tree.leaves(outputs)), jnp.float32(0))

    return jax.grad(loss)(variables["params"])


def _tokens(variables: Variables, size: int) -> int:
    """Tokens of an image: what its positions are for; where there are none, its patches of 16 pixels."""
    found = [leaf.shape[1] for path, leaf in flatten(variables).items() if path.endswith("pos_embed")]
    return found[0] if found else (size // 16) ** 2


def _temporary(memory: dict[str, float], name: str) -> Row:
    return {"temporary_mib": memory[name]} if name in memory else {}


def _timm_model(name: str, images: np.ndarray) -> dict[str, Callable[[], object]]:
    """timm's softmax model, or nothing where timm is not installed or does not have it."""
    if not importlib.util.find_spec("timm"):
        return {}
    import timm
    import torch

    if not timm.is_model(name):
        return {}
    model = timm.create_model(name, img_size=images.shape[1]).eval()
    tensor = torch.tensor(np.moveaxis(images, 3, 1).copy())

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(tensor)

    return {"softmax, timm": run}
