import pytest

from castling_jax.models.macs import count_macs
from castling_jax.models.registry import abstract_model


@pytest.mark.parametrize(("name", "published"), [("deit_tiny", 1.25e9), ("deit_small", 4.60e9), ("deit_base", 17.56e9)])
def test_softmax_models_have_the_published_macs(name, published):
    # Published to two decimals of a G.
    assert count_macs(abstract_model(name, attention="softmax")) == pytest.approx(published, abs=0.006e9)


@pytest.mark.parametrize(
    ("name", "published"),
    [("128s", 305e6), ("128", 406e6), ("192", 658e6), ("256", 1120e6), ("384", 2353e6)],
)
def test_levits_macs_are_the_published_ones(name, published):
    # Of both heads, whose second is 0.4 M. Published for LeViT-256 is a number that counting does not give.
    model = abstract_model(f"levit_{name}", attention="softmax", distilled=True)
    assert count_macs(model) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("form", ["train", "inference"])
def test_castling_macs_are_counted_by_hand(form):
    tokens, width, heads, depth, hidden = 17, 64, 2, 4, 256
    attention = 2 * tokens * width * (width // heads) + 9 * tokens * width
    if form == "train":
        attention += 2 * tokens * tokens * width
    block = attention + tokens * (4 * width * width + 2 * width * hidden)
    expected = 16 * (2 * 2 * 3) * width + depth * block + width * 10
    assert count_macs(abstract_model("deit_micro", num_classes=10, form=form)) == expected


def test_another_image_size_costs_linearly_more_tokens():
    model = abstract_model("deit_micro", form="inference")
    small, large = count_macs(model), count_macs(model, 16)
    # 17 -> 65 tokens; the head is the same.
    head = 64 * 1000
    assert (large - head) / (small - head) == pytest.approx(65 / 17, rel=0.01)
