"""Names as other libraries write them, and mistyped ones: what `check_known` proposes."""

import pytest

import castling_jax
from castling_jax.errors import check_known
from castling_jax.models.attention.kinds import FORMS, KINDS
from castling_jax.models.registry import DENSE_MODELS, DTYPES, MODELS
from castling_jax.suggestions import SYNONYMS, suggest
from castling_jax.training.config import FIELDS


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vit_base_patch16_224", "deit_base"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny"),
        ("deit_base_distilled_patch16_384", "deit_base"),
        ("deit3_small_patch16_224", "deit_small"),
        ("facebook/deit-tiny-patch16-224", "deit_tiny"),
        ("google/vit-base-patch16-224-in21k", "deit_base"),
        ("vit_b_16", "deit_base"),
        ("levit_conv_256", "levit_256"),
        ("levit_256.fb_dist_in1k", "levit_256"),
        ("LeViT-128S", "levit_128s"),
        ("mvit_v2_s", "mvitv2_small"),
        ("mvitv2_tinny", "mvitv2_tiny"),
        ("resnet50", None),
    ],
)
def test_models(theirs, ours):
    assert suggest(theirs, MODELS) == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.img_size", "model.image_size"),
        ("model.atention", "model.attention"),
        ("model.drop_path", "model.drop_path_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("opt.lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.weight_dacay", "optimizer.weight_decay"),
        ("optim.wd", "optimizer.weight_decay"),
        ("trian.epochs", "train.epochs"),
        ("train.num_epochs", "train.epochs"),
        ("dataset.batch_size", "train.batch_size"),
        ("dataset.num_workers", "dataset.workers"),
        ("trian.x", None),
        ("optimizer.foo", None),
    ],
)
def test_configuration_fields(theirs, ours):
    assert suggest(theirs, FIELDS) == ours


@pytest.mark.parametrize(
    ("theirs", "known", "ours"),
    [
        ("eval", FORMS, "inference"),
        ("training", FORMS, "train"),
        ("bf16", DTYPES, "bfloat16"),
        ("fp32", DTYPES, "float32"),
        ("linear", KINDS, "linear_angular"),
        ("swin", KINDS, "window"),
        ("mhsa", KINDS, "softmax"),
        ("Castling", KINDS, "castling"),
    ],
)
def test_other_names(theirs, known, ours):
    assert suggest(theirs, known) == ours


def test_what_is_proposed_exists():
    words = {name.rpartition(".")[2] for name in FIELDS} | {*MODELS, *KINDS, *FORMS, *DTYPES}
    words |= {"deit", "form", "in_chans", "num_classes", "rngs", "workdir"}
    assert {ours for meant in SYNONYMS.values() for ours in meant} <= words


def test_sentences(refuses):
    with refuses("unknown form 'eval': did you mean 'inference'? (known: train, inference)"):
        castling_jax.create_model("deit_micro", form="eval")
    with refuses(
        "unknown model 'resnet50' (known: deit_tiny, ",
        "mvitv2_base, picodet_s, picodet_m, picodet_l, pyramid_segmenter, mae).",
    ):
        castling_jax.create_model("resnet50")
    with refuses("unknown argument of deit_tiny 'img_size': did you mean 'image_size'?"):
        castling_jax.create_model("deit_tiny", img_size=32)
    with refuses("unknown argument of deit_tiny 'attn': did you mean 'attention'?"):
        castling_jax.create_model("deit_tiny", attn="softmax")
    with refuses("unknown config field 'trian.x' (known: train.epochs, train.batch_size, ", "train.max_skips)."):
        check_known("config field", "trian.x", FIELDS)


def test_models_are_listed():
    assert castling_jax.list_models() == [*MODELS, *DENSE_MODELS]
    assert castling_jax.list_models("levit_128*") == ["levit_128s", "levit_128"]
    assert castling_jax.list_models(pattern="resnet*") == []
