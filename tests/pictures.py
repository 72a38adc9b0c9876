"""What every picture of the project keeps to."""

from matplotlib.text import Text

LEAST_POINTS = 8  # of a text, at the size that is saved


def check_legible(figure):
    """Checks that texts are large enough, that numbers are plain, and that no legend lies on any axes."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts
    for text in texts:
        assert text.get_fontsize() >= LEAST_POINTS, text
    for tick in tick_labels(figure):
        assert "$" not in tick, tick  # which 10^-1 is written with, its exponent smaller than the text
    for legend in (axes.get_legend() for axes in figure.axes):
        if legend is not None:
            assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def tick_labels(figure):
    """The labels of all axes' ticks, minor ones too."""
    return [
        label.get_text()
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
        if label.get_text()
    ]
