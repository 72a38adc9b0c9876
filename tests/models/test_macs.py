import pytest

from castling_jax.models.macs import Cost, count_costs, count_macs
from castling_jax.models.registry import abstract_model
from tests.models import small


def total(model):
    return sum(count_costs(model).values(), Cost())


# MACs are published to two decimals of a G, activations, here and below, to two of a M: they are timm's, in its
# results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv.
@pytest.mark.parametrize(
    ("name", "macs", "activations"),
    [("deit_tiny", 1.25e9, 5.97e6), ("deit_small", 4.60e9, 11.95e6), ("deit_base", 17.56e9, 23.9e6)],
)
def test_softmax_models_have_the_published_macs_and_activations(name, macs, activations):
    cost = total(abstract_model(name, attention="softmax"))
    assert cost.macs == pytest.approx(macs, abs=0.006e9)
    assert cost.activations == pytest.approx(activations, abs=0.006e6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "macs", "activations"),
    [
        ("128s", 305e6, 1.88e6),
        ("128", 406e6, 2.71e6),
        ("192", 658e6, 3.20e6),
        ("256", 1120e6, 4.23e6),
        ("384", 2353e6, 6.26e6),
    ],
)
def test_levits_macs_and_activations_are_the_published_ones(name, macs, activations):
    # Of both heads, whose second is 0.4 M. Published for LeViT-256 is a number that counting does not give.
    cost = total(abstract_model(f"levit_{name}", attention="softmax", distilled=True))
    assert cost.macs == pytest.approx(macs, rel=0.01)
    assert cost.activations == pytest.approx(activations, abs=0.006e6)


def test_mvitv2s_activations_are_the_published_ones():
    # Its MACs are tested beside the model.
    assert total(abstract_model("mvitv2_tiny", attention="softmax")).activations == pytest.approx(21.16e6, abs=0.006e6)


@pytest.mark.parametrize(
    ("attention", "form"),
    [("softmax", "train"), ("castling", "train"), ("castling", "inference"), ("angular", "train")],
)
def test_each_part_of_deit_tiny_is_counted_by_hand(attention, form):
    tokens, width, heads, depth, hidden, classes = 197, 192, 3, 12, 768, 1000
    head_dim = width // heads
    quadratic = Cost(2 * tokens**2 * width, heads * tokens**2 + tokens * width)
    linear = Cost(2 * tokens * width * head_dim, heads * head_dim**2 + tokens * width)
    attentions = {
        "softmax": {"softmax": quadratic},
        "angular": {"angular": quadratic},
        "castling": {"linear_angular": linear} | ({"masked_softmax": quadratic} if form == "train" else {}),
    }
    taps = {} if attention == "softmax" else {"token_kernel": Cost(9 * tokens * width, tokens * width)}
    block = attentions[attention] | taps
    block |= {
        "qkv": Cost(3 * tokens * width**2, 3 * tokens * width),
        "proj": Cost(tokens * width**2, tokens * width),
        "mlp": Cost(2 * tokens * width * hidden, tokens * (hidden + width)),
    }
    expected = {part: Cost(depth * cost.macs, depth * cost.activations) for part, cost in block.items()}
    expected["patch_embed"] = Cost(196 * 16 * 16 * 3 * width, 196 * width)
    expected["head"] = Cost(width * classes, classes)
    assert count_costs(abstract_model("deit_tiny", attention=attention, form=form)) == expected


@pytest.mark.parametrize("form", ["train", "inference"])
def test_castling_macs_are_counted_by_hand(form):
    tokens, width, heads, depth, hidden = 17, 64, 2, 4, 256
    attention = 2 * tokens * width * (width // heads) + 9 * tokens * width
    if form == "train":
        attention += 2 * tokens * tokens * width
    block = attention + tokens * (4 * width * width + 2 * width * hidden)
    expected = 16 * (2 * 2 * 3) * width + depth * block + width * 10
    assert count_macs(abstract_model("deit_micro", num_classes=10, form=form)) == expected


BLOCK = ["qkv", "masked_softmax", "linear_angular", "token_kernel", "proj", "mlp", "head"]
MVITV2_PARTS = {"patch_embed", "shortcut", "pool", "relative_positions", *BLOCK}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (small.small_model(remat=True), {"patch_embed", *BLOCK}),
        (small.small_model(distilled=True, token_conv="2d"), {"patch_embed", *BLOCK}),
        (small.small_levit(distilled=True), {"stem", *BLOCK}),
        (abstract_model("mvitv2_tiny", image_size=32, depths=(1, 1), embed_dim=8), MVITV2_PARTS),
    ],
    ids=["remat", "distilled", "levit", "mvitv2"],
)
def test_nothing_is_counted_outside_the_parts(model, parts):
    assert count_costs(model).keys() == parts


def test_another_image_size_costs_linearly_more_tokens():
    model = abstract_model("deit_micro", form="inference")
    small, large = count_macs(model), count_macs(model, 16)
    # 17 -> 65 tokens; the head is the same.
    head = 64 * 1000
    assert (large - head) / (small - head) == pytest.approx(65 / 17, rel=0.01)


def test_a_segmenters_resizing_is_not_counted():
    """Only its products and taps are, at a size that is padded and needs positions for another grid."""
    backbone = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 16, "token_conv": None}
    arguments = {"backbone": "deit_micro", "backbone_arguments": backbone, "attention": "linear_angular"}
    model = abstract_model("pyramid_segmenter", num_classes=5, image_size=32, head_channels=8, **arguments)
    costs = count_costs(model, (60, 96))
    points = [(64 // stride) * (96 // stride) for stride in (4, 8, 16, 32)]
    head = sum(count * (8 * 8 + 8 * 8) for count in points) + points[0] * 8 * 5
    assert costs["head"].macs == head
    tokens = 1 + points[2]
    block = tokens * (3 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 128)
    parts = ("qkv", "linear_angular", "proj", "mlp")
    assert sum(costs[part].macs for part in parts) == block
    assert costs.keys() == {*parts, "patch_embed", "pyramid", "head"}
