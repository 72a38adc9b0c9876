"""Pictures: arrays in, matplotlib figures out. `png` turns a figure into a file; a notebook shows it as it is.

The smallest text is SMALL points high. At DPI that is 12 pixels, enough to keep a digit's strokes apart.
"""

import colorsys
import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator

from castling_jax.errors import InputError

DPI = 110
SMALL = 8  # points
DENSITY_TITLES = {"threshold": "Softmax weights kept by the mask", "fade": "Softmax branch kept by the fade"}
MOST_MARKED = 20  # a line with at most so many points has a marker at each
MOST_NAMED = 30  # a picture with at most so many classes shows their names, and a confusion matrix its counts
MOST_IN_A_COLUMN = 16  # names of a legend beside axes
MOST_LETTERS = 24  # longer names are cut off

GOLDEN_RATIO = 0.618034  # multiples of it, without their whole part, are spread evenly, however many they are

Series = tuple[np.ndarray, np.ndarray]  # steps, and the values at them
Color = tuple[float, float, float]


def png(figure: Figure, metadata: dict[str, Any] | None = None) -> bytes:
    """The figure as the bytes of a PNG file; `metadata` is stored in it as named texts."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A class's name may have any letter; the picture shows a box for a letter that the font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(file, format="png", dpi=DPI, metadata=metadata)
    return file.getvalue()


def draw_training(
    history: dict[str, np.ndarray],
    *,
    mask_kind: str = "threshold",
    measure: str = "accuracy",
    title: str = "Held-out accuracy",
    is_share: bool = True,
    loss: str = "cross entropy (nats)",
) -> Figure:
    """Draws a run's loss, its measure in both forms, the learning rate with the mask, and each layer's mask density.

    Args:
      history: a run's logged figures from `castling_jax.training.metrics.read_history`; curves that it lacks are left
        out.
      mask_kind: what empties the softmax branch: "threshold" or "fade".
      measure: name of the task's measure; `history` has it as MEASURE_train_form and MEASURE_inference_form.
      title: title of the measure's axes.
      is_share: whether the measure is a share, shown in percent up to 100.
      loss: name of the loss, with its unit.

    Raises:
      InputError: the mask kind is unknown.
    """
    # Not pyplot's figure: pyplot keeps figures in memory until they are closed.
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic(
        [["loss", "measure"], ["schedule", "density"], ["schedule", "layers"]], sharex=True, height_ratios=(2, 1, 1)
    )

    loss_axis, measure_axis, schedule_axis = axes["loss"], axes["measure"], axes["schedule"]
    _plot(loss_axis, _series(history, "loss"), color="tab:gray", linewidth=0.8, label="training, of one batch")
    if "eval_loss" in history:  # a detector's evaluation computes no loss
        _plot(loss_axis, _series(history, "eval_loss"), color="tab:blue", label="held out, inference form")
    loss_axis.set(title="Loss", ylabel=loss, yscale="log")
    write_plain_numbers(loss_axis.yaxis)

    scale = 100 if is_share else 1
    train_form, inference_form = (_series(history, f"{measure}_{form}_form", scale) for form in ("train", "inference"))
    _plot(measure_axis, train_form, color="tab:orange", label="training form")
    _plot(measure_axis, inference_form, color="tab:blue", linestyle="--", label="inference form")
    measure_axis.set(title=title, ylabel="%" if is_share else measure)
    if is_share:
        lowest = max(0, min(measure_axis.get_ylim()[0], 90))  # so that a measure that is always 100 % has an axis too
        measure_axis.set(ylim=(lowest, 100))
    for axis in (loss_axis, measure_axis):
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, frameon=False)  # below the curves
        _add_epochs(axis, _steps_per_epoch(history))

    rates = _series(history, "learning_rate")
    _plot(schedule_axis, rates, color="tab:green")
    start_at_zero(schedule_axis, rates[1])
    schedule_axis.set(title=f"Learning rate and mask {mask_kind}", xlabel="step")
    schedule_axis.set_ylabel("learning rate", color="tab:green")
    threshold_axis = schedule_axis.twinx()
    _plot(threshold_axis, _series(history, "mask_threshold"), color="tab:red")
    threshold_axis.set_ylabel(f"mask {mask_kind}", color="tab:red")
    threshold_axis.set_ylim(0, 1.05)

    _draw_density(figure, (axes["density"], axes["layers"]), _series(history, "mask_density"), mask_kind)
    loss_axis.set_xlim(0, np.max(history["step"], initial=1))  # for all axes: they share x
    for axis in (loss_axis, measure_axis, schedule_axis):
        axis.grid(alpha=0.3)
    return figure


def draw_density(
    steps: Int[np.ndarray, "steps"],
    densities: Float[np.ndarray, "steps layers"],
    *,
    mask_kind: str = "threshold",
    steps_per_epoch: float | None = None,
) -> Figure:
    """The mask density over training: the mean over layers, and below it a heat map with a row for each layer.

    Args:
      steps: rising step numbers, such as `summary.history["step"]`.
      densities: share that the mask or the fade keeps, from 0 to 1; rows with a NaN are left out.
      mask_kind: what empties the softmax branch: "threshold" or "fade".
      steps_per_epoch: scale of an axis of epochs above the picture; None draws no such axis.

    Raises:
      InputError: the shapes are not [steps] and [steps, layers], or the mask kind is unknown.
    """
    steps, densities = np.asarray(steps), np.asarray(densities, np.float64)
    if densities.ndim != 2 or steps.shape != densities.shape[:1]:
        shapes = f"{list(steps.shape)} and {list(densities.shape)}"
        raise InputError(f"steps and densities must be of shapes [steps] and [steps, layers], not {shapes}.")
    figure = Figure(figsize=(7, 5), layout="constrained")
    mean_axis, layers_axis = figure.subplots(2, sharex=True)
    series = _series({"step": steps, "density": densities}, "density")
    _draw_density(figure, (mean_axis, layers_axis), series, mask_kind)
    _add_epochs(mean_axis, steps_per_epoch)
    return figure


def draw_confusion(
    counts: Int[np.ndarray, "classes classes"], classes: Sequence[str], *, unit: str = "images"
) -> Figure:
    """A confusion matrix: the share of each class's images that got each answer, with counts where there is room.

    Args:
      counts: number of images by label (row) and answer (column).
      classes: names of the classes.
      unit: what is counted. Pixels are so many that percentages stand in the place of their counts.
    """
    count = len(classes)
    side = min(3 + 0.45 * count, 16)  # inches
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label=f"% of the class's {unit}", shrink=0.8)
    axis.set(xlabel="answer", ylabel="class", title="Answers of the inference form")
    if count > MOST_NAMED:
        return figure
    names = [_shortened(name) for name in classes]
    axis.set_xticks(range(count), names, rotation=90, parse_math=False)
    axis.set_yticks(range(count), names, parse_math=False)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        text = f"{counts[row, column]:,}" if unit == "images" else f"{100 * shares[row, column]:.1f}"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=SMALL)
    return figure


class _PlainLogFormatter(LogFormatter):
    """Writes 0.02 where matplotlib's formatter writes 2 x 10^-2 on a logarithmic axis."""

    def __call__(self, value: float, position: int | None = None) -> str:
        # An empty label means that matplotlib leaves this tick out, to keep the labels apart.
        label = super().__call__(value, position)
        return f"{value:,.15f}".rstrip("0").rstrip(".") if label else ""


def write_plain_numbers(axis: Axis) -> None:
    """Makes a logarithmic axis (a figure's `xaxis` or `yaxis`) write numbers without powers of ten."""
    axis.set_major_formatter(_PlainLogFormatter())
    axis.set_minor_formatter(_PlainLogFormatter())


def start_at_zero(axis: Axes, values: np.ndarray, fallback: float = 1) -> None:
    """Makes the y-axis reach from 0 to just above the largest value, or to `fallback` if all values are 0."""
    largest = np.max(values, initial=0)
    axis.set_ylim(0, 1.05 * largest if largest > 0 else fallback)


def _draw_density(figure: Figure, axes: tuple[Axes, Axes], series: Series, kind: str) -> None:
    """Draws densities [steps, layers]: their mean in the first axes, the heat map of the layers in the second."""
    if kind not in DENSITY_TITLES:
        raise InputError(f"mask_kind must be one of {', '.join(DENSITY_TITLES)}, not {kind!r}.")
    (mean_axis, layers_axis), (steps, densities) = axes, series
    mean_axis.set(title=DENSITY_TITLES[kind], ylabel="%, mean of layers")
    mean_axis.grid(alpha=0.3)
    layers_axis.set(xlabel="step", ylabel="layer")
    for axis in (layers_axis.xaxis, layers_axis.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    percents = 100 * densities
    start_at_zero(mean_axis, percents, 100)
    if not percents.size:  # a run may be evaluated before it logs its first densities
        return
    _plot(mean_axis, (steps, percents.mean(axis=1)), color="tab:purple")
    # Each step's column reaches back to the step before it. The first step has none before it: it repeats the next
    # step's width or, if it is the only one, starts at step 0.
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else min(0, steps[0] - 1)
    rows = np.arange(percents.shape[1] + 1) - 0.5
    image = layers_axis.pcolormesh(np.append(first, steps), rows, percents.T, vmin=0, vmax=mean_axis.get_ylim()[1])
    layers_axis.invert_yaxis()  # the first layer on top
    figure.colorbar(image, ax=axes, label="%, each layer", aspect=40)


def _plot(axis: Axes, series: Series, **style: Any) -> None:
    """Draws a line; if it has few points each gets a marker, because a line through one point is invisible."""
    steps, values = series
    marker = "o" if 0 < len(steps) <= MOST_MARKED else None
    # Without clipping, a curve at 0 or 100 % is drawn with its full width on the border of the axes.
    axis.plot(steps, values, marker=marker, markersize=4, clip_on=not len(steps), zorder=3, **style)


def _add_epochs(axis: Axes, steps_per_epoch: float | None) -> None:
    """Adds an axis of epochs above the axes, unless the steps of an epoch are unknown."""
    if steps_per_epoch is not None:
        functions = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        axis.secondary_xaxis("top", functions=functions).set_xlabel("epoch")


def _steps_per_epoch(history: dict[str, np.ndarray]) -> float | None:
    """Steps in an epoch; None if the history has no epochs, because an earlier version wrote it."""
    steps, epochs = _series(history, "epoch")
    return steps[-1] / epochs[-1] if len(steps) else None


def _series(history: dict[str, np.ndarray], name: str, scale: float = 1) -> Series:
    """The steps at which this figure was logged, and its values there times `scale`."""
    if name not in history:
        return np.empty(0), np.empty(0)
    values = history[name]
    # All figures share one list of steps, and NaN fills the steps at which a figure was not logged.
    is_logged = ~np.isnan(values.reshape(len(values), -1)).any(axis=1)
    return history["step"][is_logged], scale * values[is_logged]


def draw_predictions(
    images: Sequence[UInt8[np.ndarray, "height width 3"]], answers: Sequence[Sequence[tuple[str, float]]]
) -> Figure:
    """A sheet of images, each with its most probable classes, at most three.

    Args:
      images: the images; their sizes may differ.
      answers: for each image, (class, probability) pairs, the most probable first.

    Raises:
      InputError: there is nothing to draw.
    """
    columns, rows = _columns_and_rows("image", len(images), most=6)
    figure = Figure(figsize=(2.2 * columns, 2.9 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, image, answer in zip(axes, images, answers, strict=False):
        axis.imshow(image)
        lines = [f"{_shortened(name)} {100 * share:.0f} %" for name, share in answer[:3]]
        axis.set_title("\n".join(lines), fontsize=9, loc="left", parse_math=False)
    for axis in axes:
        axis.set_axis_off()
    return figure


def _columns_and_rows(what: str, count: int, *, most: int) -> tuple[int, int]:
    """The columns, at most `most`, and the rows of a sheet of `count` pictures, each of which shows a `what`.

    Raises:
      InputError: there is nothing to draw.
    """
    if not count:
        raise InputError(f"there is no {what} to draw.")
    columns = min(count, most)
    return columns, -(-count // columns)


def _shortened(name: str) -> str:
    """A class's name as a picture can show it: printable and not too long."""
    name = name if name.isprintable() else name.encode("unicode_escape").decode()
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…"


def draw_attention(
    weights: Mapping[str, Float[np.ndarray, "heads queries keys"]],
    image: UInt8[np.ndarray, "height width 3"],
    grid: tuple[int, int],
    *,
    query: int,
) -> Figure:
    """The weights that one query gives the patches of an image: a row for each kind of weights, a column for each head.

    All heads in a row share one colour scale. Weights for tokens before the patches, such as the class token, are not
    drawn. If the queries are the same tokens as the keys, a square marks the query's own patch, and the colour scale
    ends at the largest weight of any other patch, because linear-angular attention adds 1/2 at the query's own patch.

    Args:
      weights: one image's weights, such as
        {name: array[0] for name, array in castling_jax.attention_maps(...).items()}.
      image: drawn in grey under the weights.
      grid: (rows, columns) of the patches; they are the last rows * columns keys.
      query: index of the query among all queries, such as 0 for DeiT's class token.

    Raises:
      InputError: there are no weights, or a kind has fewer keys than the grid has patches, or no such query.
    """
    if not weights:
        raise InputError("there is no kind of weights to draw.")
    patches = grid[0] * grid[1]
    heads = max(len(array) for array in weights.values())
    figure = Figure(figsize=(1 + 2 * heads, 0.4 + 2.3 * len(weights)), layout="constrained")
    axes = figure.subplots(len(weights), heads, squeeze=False)
    for head, axis in enumerate(axes[0]):
        axis.set_title(f"head {head}", fontsize=9)
    grey = np.asarray(image, np.float64).mean(axis=2)
    height, width = grey.shape
    for row, (name, array) in zip(axes, weights.items(), strict=True):
        _, queries, keys = array.shape
        if keys < patches or not 0 <= query < queries:
            raise InputError(
                f"{name} has {queries} queries and {keys} keys, so no query {query} or no grid of {patches} patches."
            )
        patch_weights = np.asarray(array, np.float64)[:, query, keys - patches :]
        own_patch = query - (keys - patches) if queries == keys else -1  # negative: the query stands on no patch
        other_weights = patch_weights if own_patch < 0 else np.delete(patch_weights, own_patch, axis=1)
        largest = np.abs(other_weights).max(initial=0) or 1.0
        # Linear-angular weights can be negative: then white is 0, and red and blue are the signs.
        limits = {"cmap": "RdBu_r", "vmin": -largest} if patch_weights.min() < 0 else {"cmap": "magma", "vmin": 0}
        for axis, head_weights in zip(row, patch_weights, strict=False):
            axis.imshow(grey, cmap="gray", extent=(0, width, height, 0))
            colours = axis.imshow(
                head_weights.reshape(grid), extent=(0, width, height, 0), alpha=0.7, vmax=largest, **limits
            )
            if own_patch >= 0:
                side = (width / grid[1], height / grid[0])
                corner = (own_patch % grid[1] * side[0], own_patch // grid[1] * side[1])
                axis.add_patch(Rectangle(corner, *side, fill=False, edgecolor="lime", linewidth=1.5))
            axis.set(xticks=[], yticks=[])
        for axis in row[len(patch_weights) :]:
            axis.set_axis_off()
        row[0].set_ylabel(name, fontsize=9)
        extend = "max" if patch_weights.max() > largest else "neither"
        bar = figure.colorbar(colours, ax=row.tolist(), aspect=12, extend=extend)
        bar.ax.tick_params(labelsize=SMALL)
        bar.locator = MaxNLocator(4)
    return figure


def draw_taps(kernels: Sequence[Float[np.ndarray, "taps heads"] | Float[np.ndarray, "rows columns heads"]]) -> Figure:
    """The learnt taps of each layer's token kernel, all in one colour scale; zero taps, as in a new model, are white.

    A kernel over tokens is drawn as a row of taps for each head. Kernels over the grid stand side by side, one for each
    head.

    Args:
      kernels: each layer's token kernel, such as a DeiT's params["blocks"]["0"]["attn"]["token_kernel"].

    Raises:
      InputError: there is nothing to draw.
    """
    arrays = [np.asarray(kernel, np.float64) for kernel in kernels]
    columns, rows = _columns_and_rows("token kernel", len(arrays), most=3)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.8 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    largest = max(np.abs(array).max() for array in arrays) or 1.0
    for layer, (axis, kernel) in enumerate(zip(axes, arrays, strict=False)):
        taps, heads = kernel.shape[-2:]
        if kernel.ndim == 2:
            picture, labels = kernel.T, ("tap", "head")
            axis.set_xticks(range(taps), [str(tap - taps // 2) for tap in range(taps)])
            axis.set_yticks(range(heads))
        else:
            # imshow leaves a column of NaN transparent, which shows the grey background between two heads.
            gap = np.full((len(kernel), 1), np.nan)
            picture = np.hstack([part for head in range(heads) for part in (kernel[:, :, head], gap)][:-1])
            labels = ("head", "")
            axis.set_xticks(np.arange(heads) * (taps + 1) + (taps - 1) / 2, range(heads))
            axis.set_yticks([])
            axis.set_facecolor("lightgrey")
        colours = axis.imshow(picture, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.tick_params(labelsize=SMALL)
    for axis in axes[len(arrays) :]:
        axis.set_axis_off()
    figure.colorbar(colours, ax=axes.tolist(), label="weight of the value", aspect=30)
    return figure


def draw_boxes(
    image: UInt8[np.ndarray, "height width 3"],
    boxes: Float[np.ndarray, "boxes 4"],
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
) -> Figure:
    """An image with boxes on it, and below it the colour of each class.

    Args:
      image: uint8, or floats in [0, 1].
      boxes: x0, y0, x1, y1 in pixels of the image.
      labels: the class of each box.
      scores: the score of each box, such as a probability; it is written after the class.
    """
    height, width = image.shape[:2]
    side = 7 / max(height, width)  # inches a pixel
    figure = Figure(figsize=(max(width * side, 3), max(height * side, 2) + 0.5), layout="constrained")
    axis = figure.subplots()
    axis.imshow(image)
    draw_boxes_on(axis, boxes, labels, scores)
    axis.set(xticks=[], yticks=[])
    _add_class_legend(figure, {name: f"{_shortened(name)} {list(labels).count(name)}" for name in labels}, columns=4)
    return figure


def draw_objects(
    images: Sequence[UInt8[np.ndarray, "height width 3"]],
    answers: Sequence[Sequence[tuple[str, float, tuple[float, float, float, float]]]],
) -> Figure:
    """A sheet of images with the objects that a detector found, and below them the colour of each class.

    Args:
      images: the images; their sizes may differ.
      answers: for each image, (class, score, (x0, y0, x1, y1)) of each object, in pixels of the image.

    Raises:
      InputError: there is nothing to draw.
    """
    columns, rows = _columns_and_rows("image", len(images), most=3)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, image, answer in zip(axes, images, answers, strict=False):
        axis.imshow(image)
        names, scores, boxes = zip(*answer, strict=True) if answer else ((), (), ())
        draw_boxes_on(axis, np.array(boxes), names, scores)
    for axis in axes:
        axis.set_axis_off()
    _add_class_legend(figure, {name: _shortened(name) for answer in answers for name, *_ in answer}, columns=4)
    return figure


def draw_reconstructions(answers: Sequence[Mapping[str, Any]]) -> Figure:
    """A sheet of images: each as it is, with its hidden patches in grey, and with them filled in.

    Args:
      answers: "original", "masked" and "reconstruction" of each image, uint8 [height, width, 3].

    Raises:
      InputError: there is nothing to draw.
    """
    names = ("original", "masked", "reconstruction")
    columns, rows = _columns_and_rows("image", len(answers), most=3)
    figure = Figure(figsize=(4.2 * columns, 1.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 3 * columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for triple, answer in zip(axes.reshape(-1, 3), answers, strict=False):
        for axis, name in zip(triple, names, strict=True):
            axis.imshow(answer[name])
    for axis, title in zip(axes[0], names * columns, strict=True):
        axis.set_title(title, fontsize="small")
    return figure


def draw_detections(pictures: Sequence[tuple[Any, Any, Any]]) -> Figure:
    """A sheet of images, each drawn twice: with its true boxes on the left, with the detected boxes on the right.

    Below the images is the colour of each class, since small boxes have no room for its name.

    Args:
      pictures: (image, truth, detections) for each image: the image is uint8 [height, width, 3], and the other two are
        the arguments of `draw_boxes_on` from `boxes` on, (boxes, labels, scores).

    Raises:
      InputError: there is nothing to draw.
    """
    columns, rows = _columns_and_rows("image", len(pictures), most=2)
    figure = Figure(figsize=(6.4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for pair, (image, *drawn) in zip(axes.reshape(-1, 2), pictures, strict=False):
        for axis, boxes in zip(pair, drawn, strict=True):
            axis.imshow(image)
            draw_boxes_on(axis, *boxes)
    for axis, title in zip(axes[0], ("annotated", "detected") * columns, strict=True):
        axis.set_title(title, fontsize="medium", loc="left")
    names = {name: _shortened(name) for _, *drawn in pictures for _, labels, _ in drawn for name in labels}
    _add_class_legend(figure, names, columns=4 * columns)
    return figure


def draw_segmentation(pictures: Sequence[Sequence[np.ndarray]], classes: Sequence[str]) -> Figure:
    """A sheet of images, each drawn once for each of its masks: the true one first, if there are two.

    Below the images is the colour of each class that they show.

    Args:
      pictures: for each image, the image, uint8 [height, width, 3], and one or two masks, uint8 [height, width]; a mask
        may have fewer pixels than the image.
      classes: names of the classes.

    Raises:
      InputError: there is nothing to draw.
    """
    titles = ("annotated", "answered") if {len(one) for one in pictures} == {3} else ("",)
    columns, rows = _columns_and_rows("image", len(pictures), most=2 if len(titles) == 2 else 3)
    figure = Figure(figsize=(3.6 * len(titles) * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, len(titles) * columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for group, (image, *masks) in zip(axes.reshape(-1, len(titles)), pictures, strict=False):
        height, width = image.shape[:2]
        for axis, mask in zip(group, masks, strict=True):
            axis.imshow(image)
            axis.imshow(color_labels(mask), extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    for axis, title in zip(axes[0], titles * columns, strict=True):
        axis.set_title(title, fontsize="medium", loc="left")
    shown = {label for _, *masks in pictures for mask in masks for label in np.unique(mask).tolist()}
    labels = [label for label in sorted(shown) if label < len(classes)][:MOST_NAMED]
    entries = [(_shortened(classes[label]), _color_of_label(label)) for label in labels]
    _add_legend(figure, entries, columns=3 * columns)
    return figure


def color_labels(mask: UInt8[np.ndarray, "height width"]) -> Float[np.ndarray, "height width 4"]:
    """A mask as a layer to draw over its image, RGBA: each class in its colour; pixels without a class are clear."""
    colors = [(*_color_of_label(label), 0.6) for label in range(254)]
    return np.array([*colors, (0, 0, 0, 0), (0, 0, 0, 0)])[mask]  # 254 and 255 are no classes


def draw_precision_recall(precision: Float[np.ndarray, "ious recalls classes"], classes: Sequence[str]) -> Figure:
    """Precision over recall: at IoU 0.50 for each class, and the mean over the classes at several IoUs.

    Args:
      precision: at the IoUs 0.50, 0.55, ..., 0.95 and the recalls 0, 0.01, ..., 1, as COCO's evaluation computes it;
        -1 for a class without objects.
      classes: names of the classes.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    class_axis, iou_axis = figure.subplots(1, 2, sharey=True)
    recalls = np.linspace(0, 1, precision.shape[1])
    has_objects = (precision >= 0).all((0, 1))
    for number in np.flatnonzero(has_objects).tolist():
        name, values = classes[number], precision[0, :, number]
        label = f"{_shortened(name)} {values.mean():.2f}"
        class_axis.plot(recalls, values, color=_color_of(name), linewidth=1.2, label=label)
    for place in range(0, len(precision), 3):
        values = precision[place][:, has_objects].mean(-1)
        grey = str(0.08 * place)  # matplotlib takes such a string as a grey, from "0" (black) to "1" (white)
        iou_axis.plot(recalls, values, color=grey, label=f"IoU {0.5 + 0.05 * place:.2f}: {values.mean():.2f}")
    class_axis.set(xlabel="recall", ylabel="precision", title="AP50 by class", xlim=(0, 1), ylim=(0, 1.02))
    iou_axis.set(xlabel="recall", title="mean over the classes", xlim=(0, 1))
    for axis, count in ((class_axis, has_objects.sum()), (iou_axis, 1)):
        if count <= MOST_NAMED:
            style = {"ncols": 1 + count // MOST_IN_A_COLUMN, "frameon": False, "fontsize": SMALL}
            _without_math(axis.legend(loc="upper left", bbox_to_anchor=(1, 1), **style))
    return figure


def draw_boxes_on(
    axis: Axes,
    boxes: Float[np.ndarray, "boxes 4"],
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
) -> None:
    """Draws boxes on an image that `axis` already shows, and writes the class into each box that has room for it.

    A class has the same colour in every picture. Large boxes are drawn first, so that they do not hide the small ones.

    Args:
      axis: the axes with the image, whose units are pixels.
      boxes: x0, y0, x1, y1 in pixels of the image.
      labels: the class of each box.
      scores: the score of each box; None writes the classes alone.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) - 0.5  # imshow puts the centre of pixel i at i, not at i + 0.5
    inches = axis.get_window_extent().transformed(axis.figure.dpi_scale_trans.inverted()).size
    pixels = np.abs([np.diff(axis.get_xlim())[0], np.diff(axis.get_ylim())[0]])
    points = 72 * min(inches / pixels)  # points (1/72 inch) that a pixel of the image takes
    for index in np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1), kind="stable"):
        (left, top, right, bottom), color = boxes[index], _color_of(labels[index])
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.5))
        text = _shortened(labels[index]) + ("" if scores is None else f" {scores[index]:.2f}")
        # A letter is about 0.6 times as wide as high.
        if 0.6 * SMALL * len(text) < points * (right - left) and points * (bottom - top) > 1.3 * SMALL:
            style = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
            axis.text(
                left, top, text, color="white", fontsize=SMALL, va="top", bbox=style, clip_on=True, parse_math=False
            )


def _add_class_legend(figure: Figure, texts: Mapping[str, str], *, columns: int) -> None:
    """Adds the colour of each class, with its text, below all axes."""
    _add_legend(figure, [(texts[name], _color_of(name)) for name in sorted(texts)], columns=columns)


def _add_legend(figure: Figure, entries: Sequence[tuple[str, Color]], *, columns: int) -> None:
    """Adds texts with their colours below all axes."""
    handles, texts = [Rectangle((0, 0), 1, 1, color=color) for _, color in entries], [text for text, _ in entries]
    if entries:
        style = {"ncols": columns, "frameon": False, "fontsize": SMALL}
        _without_math(figure.legend(handles, texts, loc="outside lower center", **style))


def _without_math(legend: Legend) -> None:
    """Shows a dollar sign in a class's name as it is."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _color_of_label(label: int) -> Color:
    """A class's colour by its number: neighbouring numbers are far apart in hue, as many classes cover one picture."""
    return colorsys.hls_to_rgb(label * GOLDEN_RATIO % 1, (0.4, 0.6, 0.25)[label % 3], 0.85)


def _color_of(name: str) -> Color:
    """A class's colour, by its name alone; dark enough for white letters on it."""
    hue = int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:2]) / 2**16
    red, green, blue = colorsys.hls_to_rgb(hue, 0.38, 0.85)
    return red, green, blue
