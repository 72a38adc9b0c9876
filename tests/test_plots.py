import itertools
import warnings

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from castling_jax import plots
from castling_jax.plots import (
    DENSITY_TITLES,
    draw_attention,
    draw_boxes,
    draw_boxes_on,
    draw_confusion,
    draw_density,
    draw_detections,
    draw_objects,
    draw_precision_recall,
    draw_predictions,
    draw_reconstructions,
    draw_segmentation,
    draw_taps,
    draw_training,
)
from tests.pictures import check_legible

STEPS_PER_EPOCH = 55


def history_of(lines, *, layers=4, evaluations=1, density=0.5, loss=(2.5, 0.1), rate=1e-3):
    """A run's history: the loss falls from one value to the other, and the last lines have an evaluation."""
    steps = np.arange(20, 20 * lines + 1, 20)
    evaluated = np.where(np.arange(lines) >= lines - evaluations, 1.0, np.nan)
    return {
        "step": steps,
        "epoch": steps / STEPS_PER_EPOCH,
        "loss": np.geomspace(*loss, lines),
        "eval_loss": evaluated * loss[1],
        "accuracy_train_form": evaluated * 0.75,
        "accuracy_inference_form": evaluated * 0.5,
        "learning_rate": np.full(lines, rate),
        "mask_threshold": np.linspace(0.02, 1, lines),
        "mask_density": np.full((lines, layers), density),
    }


def axes_of(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def map_of(figure):
    """The axes of the heat map, and its mesh."""
    ((axes, mesh),) = (
        (axes, mesh)
        for axes in figure.axes
        for mesh in axes.collections
        if isinstance(mesh, QuadMesh) and axes.get_ylabel() == "layer"
    )
    return axes, mesh


PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)

MASK = np.repeat(np.uint8([0, 1, 255]), 10)[:, None].repeat(40, 1)
TRUTH = (np.float32([[2, 3, 33, 27]]), ["owl"], None)
FOUND = (np.float32([[3, 3, 33, 27], [1, 1, 3, 3]]), ["owl", "a$t$"], np.float32([0.9, 0.4]))


def attention_of(prefix, *, heads, rows=3, columns=4):
    """Random weights of two kinds among prefix tokens and a grid of patches; those of one kind can be negative."""
    tokens = prefix + rows * columns
    random = np.random.default_rng(0).uniform(-1, 1, (heads, tokens, tokens))
    return {"masked_softmax": np.abs(random), "linear_angular": random}


def boxes_on(figure):
    """The figure, with a box on its first axes."""
    draw_boxes_on(figure.axes[0], np.float32([[2, 3, 33, 27]]), ["owl"])
    return figure


FIGURES = {
    "draw_training": lambda: draw_training(history_of(30, evaluations=6)),
    "draw_density": lambda: draw_density(np.arange(1, 9), np.full((8, 24), 0.5), steps_per_epoch=3),
    "draw_attention": lambda: draw_attention(attention_of(1, heads=3), PHOTOGRAPH, (3, 4), query=6),
    "draw_taps": lambda: draw_taps([np.random.default_rng(0).normal(size=(9, 3))] * 12),
    "draw_predictions": lambda: draw_predictions([PHOTOGRAPH] * 2, [[("a", 0.9), ("b", 0.1)]] * 2),
    "draw_boxes": lambda: draw_boxes(PHOTOGRAPH, np.float32([[2, 3, 33, 27]]), ["owl"], scores=[0.75]),
    "draw_reconstructions": lambda: draw_reconstructions(
        [{"original": PHOTOGRAPH, "masked": PHOTOGRAPH, "reconstruction": PHOTOGRAPH}] * 4
    ),
    "draw_objects": lambda: draw_objects([PHOTOGRAPH] * 4, [[("owl", 0.75, (2, 3, 33, 27))], [], [], []]),
    "draw_boxes_on": lambda: boxes_on(draw_predictions([PHOTOGRAPH], [[("a", 0.9)]])),
    "draw_detections": lambda: draw_detections([(PHOTOGRAPH, TRUTH, FOUND)] * 3),
    "draw_segmentation": lambda: draw_segmentation([(PHOTOGRAPH, MASK, MASK[::2, ::2])] * 3, ["owl", "sky"]),
    "draw_precision_recall": lambda: draw_precision_recall(
        np.full((10, 101, 30), 0.5), [f"class {i}" for i in range(30)]
    ),
    "draw_confusion": lambda: draw_confusion(np.diag(range(1000, 1030)), [f"class {i}" for i in range(30)]),
}


def test_no_picture_is_forgotten_here():
    assert FIGURES.keys() == {name for name in vars(plots) if name.startswith("draw_")}


@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_large_enough_and_legends_are_off_the_curves(name):
    check_legible(FIGURES[name]())


def test_a_single_point_of_any_line_is_seen():
    figure = draw_training(history_of(1))
    lines = [line for axes in figure.axes for line in axes.lines]
    assert len(lines) == 7
    for line in lines:
        assert len(line.get_xdata()) == 1
        assert line.get_marker() == "o"
    _, mesh = map_of(figure)
    assert np.ptp(mesh.get_coordinates()[..., 0]) > 0


def test_a_single_evaluation_is_seen_and_many_points_are_a_line():
    figure = draw_training(history_of(300))
    assert {line.get_marker() for line in axes_of(figure, "Held-out accuracy").lines} == {"o"}
    training, held_out = axes_of(figure, "Loss").lines
    assert (training.get_marker(), held_out.get_marker()) == ("None", "o")


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ((0.7, 0.69), {"0.69", "0.698", "0.7"}),
        ((2.4, 0.14), {"2", "1", "0.4"}),
        ((9.0, 0.0002), {"1", "0.01", "0.001"}),
    ],
)
def test_numbers_of_a_logarithmic_axis_are_written_out(loss, expected):
    figure = draw_training(history_of(30, loss=loss))
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes_of(figure, "Loss").yaxis.get_ticklabels(which="both")]
    assert expected <= set(labels)
    assert all(set(label) <= set("0123456789.,") for label in labels)


@pytest.mark.parametrize(("density", "limits"), [(0, (0, 100)), (1, (0, 105)), (0.004, (0, 0.42))])
def test_density_starts_at_zero_and_has_room_for_what_is_there(density, limits):
    for figure in (
        draw_training(history_of(5, density=density)),
        draw_density(np.arange(1, 6), np.full((5, 3), density)),
    ):
        assert axes_of(figure, DENSITY_TITLES["threshold"]).get_ylim() == pytest.approx(limits)
        _, mesh = map_of(figure)
        assert mesh.get_clim() == pytest.approx(limits)


@pytest.mark.parametrize(("accuracy", "lowest"), [(0, 0), (1, 90)])
def test_no_axis_reaches_below_zero(accuracy, lowest):
    history = history_of(5, rate=0, density=0) | {"accuracy_train_form": np.full(5, accuracy)}
    history["accuracy_inference_form"] = history["accuracy_train_form"]
    figure = draw_training(history)
    assert axes_of(figure, "Held-out accuracy").get_ylim() == (lowest, 100)
    assert axes_of(figure, "Learning rate and mask threshold").get_ylim() == (0, 1)
    assert all(axes.get_ylim()[0] >= 0 for axes in figure.axes if axes.get_ylabel() != "layer")


@pytest.mark.parametrize("layers", [1, 4, 12, 24])
def test_density_has_the_mean_and_a_row_for_each_layer(layers):
    steps, densities = np.array([10, 20, 40]), np.random.default_rng(0).uniform(size=(3, layers))
    figure = draw_density(steps, densities)
    (line,) = axes_of(figure, DENSITY_TITLES["threshold"]).lines
    np.testing.assert_allclose(line.get_xydata(), np.stack([steps, 100 * densities.sum(1) / layers], axis=1))
    axes, mesh = map_of(figure)
    np.testing.assert_allclose(mesh.get_array(), 100 * densities.T)
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 20, 40])
    assert axes.get_ylim() == (layers - 0.5, -0.5)  # the first layer on top
    check_legible(figure)
    assert {0} <= {tick for tick in axes.get_yticks() if -0.5 <= tick <= layers - 0.5} <= set(range(layers))
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_densities_without_a_value_are_left_out():
    densities = np.array([[0.5, 0.5], [np.nan, np.nan], [0.25, 0.75]])
    _, mesh = map_of(draw_density([1, 2, 3], densities))
    np.testing.assert_array_equal(mesh.get_array(), [[50, 25], [50, 75]])


def test_a_fade_is_named():
    assert axes_of(draw_density([1], [[0.5]], mask_kind="fade"), DENSITY_TITLES["fade"])


@pytest.mark.parametrize(("steps", "densities"), [([1, 2], [0.5, 0.5]), ([1, 2], [[0.5]])])
def test_densities_of_another_shape_are_refused(refuses, steps, densities):
    with refuses("steps and densities must be of shapes [steps] and [steps, layers]", str(list(np.shape(densities)))):
        draw_density(np.array(steps), np.array(densities))


def test_a_mask_of_another_kind_is_refused(refuses):
    with refuses("mask_kind must be one of threshold, fade, not 'foo'."):
        draw_density([1], [[0.5]], mask_kind="foo")


@pytest.mark.parametrize(
    "draw",
    [
        *(lambda: plots.draw_predictions([], []), lambda: plots.draw_objects([], []), lambda: plots.draw_taps([])),
        *(lambda: plots.draw_reconstructions([]), lambda: plots.draw_detections([])),
        lambda: plots.draw_segmentation([], ["sky"]),
        lambda: plots.draw_attention({}, PHOTOGRAPH, (3, 4), query=0),
    ],
)
def test_a_sheet_of_nothing_is_refused(refuses, draw):
    with refuses("there is no ", " to draw."):
        draw()


def epochs_of(axes):
    """The axis of epochs above the axes, if there is one."""
    return next((axis for axis in axes.child_axes if axis.get_xlabel() == "epoch"), None)


def test_epochs_stand_above_the_steps():
    figure = draw_training(history_of(11))
    for title in ("Loss", "Held-out accuracy"):
        epochs = epochs_of(axes_of(figure, title))
        figure.draw_without_rendering()
        assert epochs.get_xlim() == pytest.approx((0, 220 / STEPS_PER_EPOCH))
    assert epochs_of(draw_density([1], [[0.5]], steps_per_epoch=7).axes[0])
    assert not epochs_of(draw_density([1], [[0.5]]).axes[0])


def test_what_a_history_lacks_is_left_out():
    figure = draw_training({"step": np.array([5]), "eval_loss": np.array([1.0])})
    assert epochs_of(axes_of(figure, "Loss")) is None
    check_legible(figure)


def pictures_of(figure, kind):
    """The arrays that the axes of a row show over the image."""
    (first,) = (axes for axes in figure.axes if axes.get_ylabel() == kind)
    row = first.get_subplotspec().rowspan
    return [axes for axes in figure.axes if axes.get_subplotspec() and axes.get_subplotspec().rowspan == row]


def test_attention_is_the_querys_row_of_weights_on_the_grid():
    weights = attention_of(1, heads=3)
    figure = draw_attention(weights, PHOTOGRAPH, (3, 4), query=6)
    for kind, array in weights.items():
        drawn = [axes for axes in pictures_of(figure, kind) if len(axes.images) == 2]
        assert len(drawn) == 3
        for head, axes in enumerate(drawn):
            np.testing.assert_allclose(axes.images[1].get_array(), array[head, 6, 1:].reshape(3, 4))
            assert axes.images[1].get_clim()[1] == np.abs(np.delete(array[:, 6], [0, 6], axis=1)).max()
            (square,) = axes.patches  # token 6 is patch 5, in row 1 and column 1, of 10 x 10 pixels
            assert square.get_xy() == (10, 10)
    limits = {kind: pictures_of(figure, kind)[0].images[1].get_clim() for kind in weights}
    assert limits["masked_softmax"][0] == 0
    assert limits["linear_angular"][0] == -limits["linear_angular"][1]


def test_the_class_token_has_no_square():
    figure = draw_attention(attention_of(1, heads=1), PHOTOGRAPH, (3, 4), query=0)
    assert not any(axes.patches for axes in figure.axes if len(axes.images) == 2)


@pytest.mark.parametrize(("grid", "query"), [((4, 4), 0), ((3, 4), 13), ((3, 4), -1)])
def test_attention_without_such_a_grid_or_query_is_refused(refuses, grid, query):
    with refuses("13 queries and 13 keys", f"no query {query} or no grid of {grid[0] * grid[1]}"):
        draw_attention(attention_of(1, heads=1), PHOTOGRAPH, grid, query=query)


def test_taps_over_tokens_and_over_the_grid_are_drawn_head_by_head():
    rng = np.random.default_rng(0)
    tokens, grid = rng.normal(size=(9, 2)), rng.normal(size=(3, 3, 4))
    figure = draw_taps([tokens, grid])
    first, second = (axes for axes in figure.axes if axes.get_title())
    np.testing.assert_allclose(first.images[0].get_array(), tokens.T)
    assert [label.get_text() for label in first.get_xticklabels()] == [str(tap) for tap in range(-4, 5)]
    np.testing.assert_allclose(second.images[0].get_array()[:, 4:7], grid[:, :, 1])
    assert first.images[0].get_clim() == second.images[0].get_clim()
    check_legible(figure)


def test_taps_of_a_new_model_are_drawn():
    check_legible(draw_taps([np.zeros((9, 3))]))


class TestBoxes:
    BOXES = np.float32([[0, 0, 30, 20], [5, 5, 8, 8], [10, 12, 40, 30]])
    LABELS = ("owl", "cat", "owl")

    def test_rectangles_are_on_the_edges_of_pixels(self):
        (axis,) = draw_boxes(PHOTOGRAPH, self.BOXES, self.LABELS).axes
        found = sorted((*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches)
        assert found == [(-0.5, -0.5, 30, 20), (4.5, 4.5, 3, 3), (9.5, 11.5, 30, 18)]
        # The picture's own edges are at -0.5 and 39.5: a box of the whole image is its frame.
        assert axis.get_xlim() == (-0.5, 39.5)

    def test_names_stand_in_boxes_that_have_room_for_them(self):
        figure = draw_boxes(PHOTOGRAPH, self.BOXES, self.LABELS, scores=[0.5, 0.25, 0.125])
        (axis,) = figure.axes
        # The largest box is drawn first, and the cat's is too small for its name.
        assert [text.get_text() for text in axis.texts] == ["owl 0.50", "owl 0.12"]
        check_legible(figure)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["cat 1", "owl 2"]

    def test_a_class_has_one_colour_everywhere(self):
        colors = [
            {label: patch.get_edgecolor() for label, patch in zip(labels, axis.patches, strict=True)}
            for labels in (("owl", "cat"), ("cat", "dog"))
            for axis in draw_boxes(PHOTOGRAPH, np.float32([[0, 0, 30, 20], [5, 5, 8, 8]]), labels).axes
        ]
        assert colors[0]["cat"] == colors[1]["cat"]
        assert len({*colors[0].values(), *colors[1].values()}) == 3

    def test_no_boxes_and_odd_names(self):
        assert draw_boxes(PHOTOGRAPH, np.zeros((0, 4)), []).legends == []
        figure = draw_boxes(PHOTOGRAPH, self.BOXES[:1], ["$a\n\ud800" * 30])
        check_legible(figure)
        assert "\n" not in figure.axes[0].texts[0].get_text()

    def test_a_letter_that_the_font_lacks_is_no_warning(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert plots.png(draw_boxes(PHOTOGRAPH, self.BOXES[:1], ["\N{CAT} \N{CJK UNIFIED IDEOGRAPH-732B}"]))
        assert not [str(one.message) for one in caught if "Glyph" in str(one.message)]

    def test_boxes_on_given_axes(self):
        figure = draw_predictions([PHOTOGRAPH], [[("owl", 0.5)]])
        (axis,) = figure.axes
        draw_boxes_on(axis, self.BOXES, self.LABELS)
        assert len(axis.patches) == 3


class TestSegmentation:
    def test_the_true_mask_is_on_the_left_and_the_answer_on_the_right(self):
        figure = draw_segmentation([(PHOTOGRAPH, MASK, MASK[::2, ::2])] * 3, ["owl", "sky"])
        assert [axis.get_title(loc="left") for axis in figure.axes[:4]] == ["annotated", "answered"] * 2
        truth, answer = (axis.images[1] for axis in figure.axes[:2])
        assert truth.get_extent() == answer.get_extent()  # a mask of fewer pixels covers the image all the same
        layer = np.asarray(truth.get_array())
        assert (layer[MASK == 255, 3] == 0).all()  # no class: the image shows through
        assert len(np.unique(layer[MASK < 255], axis=0)) == 2
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["owl", "sky"]

    def test_one_mask_an_image(self):
        figure = draw_segmentation([(PHOTOGRAPH, np.zeros_like(MASK))] * 2, ["owl", "sky"])
        assert [len(axis.images) for axis in figure.axes] == [2, 2]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["owl"]


class TestDetections:
    def test_truth_is_on_the_left_and_detections_on_the_right(self):
        figure = draw_detections([(PHOTOGRAPH, TRUTH, FOUND)] * 3)
        shapes = [len(axis.patches) for axis in figure.axes]
        assert shapes == [1, 2, 1, 2, 1, 2, 0, 0]
        assert [axis.get_title(loc="left") for axis in figure.axes[:4]] == ["annotated", "detected"] * 2
        assert not any(axis.axison for axis in figure.axes)
        assert [text.get_text() for text in figure.axes[0].texts] == ["owl"]
        assert [text.get_text() for text in figure.axes[1].texts] == ["owl 0.90"]

    def test_classes_without_room_for_their_names_are_below_the_images(self):
        figure = draw_detections([(PHOTOGRAPH, TRUTH, FOUND)])
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a$t$", "owl"]
        figure.draw_without_rendering()
        assert not any(legend.get_window_extent().overlaps(axis.bbox) for axis in figure.axes)

    def test_classes_without_room_for_their_names_are_below_the_objects(self):
        tiny = ("gnat", 0.5, (1, 1, 3, 3))
        figure = draw_objects([PHOTOGRAPH] * 2, [[("owl", 0.75, (2, 3, 33, 27)), tiny], [tiny]])
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["gnat", "owl"]
        assert figure.axes[1].patches[0].get_edgecolor() == legend.get_patches()[0].get_facecolor()
        assert draw_objects([PHOTOGRAPH], [[]]).legends == []

    def test_images_without_boxes(self):
        nothing = (np.zeros((0, 4)), [], None)
        assert draw_detections([(PHOTOGRAPH, nothing, nothing)]).legends == []


class TestPrecisionRecall:
    def test_curves_are_of_the_classes_with_objects_and_of_their_mean(self):
        precision = np.random.default_rng(0).random((10, 101, 3))
        precision[..., 1] = -1
        by_class, by_iou = draw_precision_recall(precision, ["owl", "cat", "a$t$"]).axes
        for line, number in zip(by_class.lines, (0, 2), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), precision[0, :, number])
            np.testing.assert_allclose(line.get_xdata(), np.arange(101) / 100)
        for line, place in zip(by_iou.lines, (0, 3, 6, 9), strict=True):
            np.testing.assert_allclose(line.get_ydata(), precision[place][:, [0, 2]].mean(-1))
        names = [text.get_text() for text in by_class.get_legend().get_texts()]
        assert names == [f"owl {precision[0, :, 0].mean():.2f}", f"a$t$ {precision[0, :, 2].mean():.2f}"]
        titles = [text.get_text().split(":")[0] for text in by_iou.get_legend().get_texts()]
        assert titles == ["IoU 0.50", "IoU 0.65", "IoU 0.80", "IoU 0.95"]

    def test_many_classes_have_no_legend(self):
        figure = draw_precision_recall(np.full((10, 101, 80), 0.5), [str(i) for i in range(80)])
        assert figure.axes[0].get_legend() is None
        check_legible(figure)
