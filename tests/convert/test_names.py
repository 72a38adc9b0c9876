"""Weights under others' names and in others' wrappings give the logits that timm's model gives."""

import argparse
import logging

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from castling_jax import apply
from castling_jax.convert import from_torch, read, read_state_dict, to_torch
from tests.convert.test_torch import GOLDEN_FILES, golden_model
from tests.models import small

HIDDEN, HEADS = 48, 3  # of the golden DeiTs


def logits_of(file, state_dict):
    images = jnp.asarray(file["input_nchw"].transpose(0, 2, 3, 1))
    return apply(golden_model(file), from_torch(golden_model(file), state_dict), images)


def close_to_timms(file, state_dict):
    # 3 blocks of sums of up to 192 terms of order one, in float32 and in another order than PyTorch's.
    chex.assert_trees_all_close(logits_of(file, state_dict), jnp.asarray(file["logits"]), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return small.small_model()


@pytest.fixture(scope="module")
def state_dict(model):
    return to_torch(model, small.random_variables(model))


# Hugging Face, written from its modeling_vit.py and modeling_deit.py


def hugging_face(weights, family, *, teacher):
    base = f"{family}."
    out = {
        f"{base}embeddings.cls_token": weights["cls_token"],
        f"{base}embeddings.position_embeddings": weights["pos_embed"],
        f"{base}embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        f"{base}embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
    }
    if "dist_token" in weights:
        out[f"{base}embeddings.distillation_token"] = weights["dist_token"]
    for kind in ("weight", "bias"):
        for block in range(3):
            theirs, ours = f"{base}encoder.layer.{block}", f"blocks.{block}"
            query, key, value = np.split(weights[f"{ours}.attn.qkv.{kind}"], 3)
            out[f"{theirs}.attention.attention.query.{kind}"] = query
            out[f"{theirs}.attention.attention.key.{kind}"] = key
            out[f"{theirs}.attention.attention.value.{kind}"] = value
            out[f"{theirs}.attention.output.dense.{kind}"] = weights[f"{ours}.attn.proj.{kind}"]
            out[f"{theirs}.intermediate.dense.{kind}"] = weights[f"{ours}.mlp.fc1.{kind}"]
            out[f"{theirs}.output.dense.{kind}"] = weights[f"{ours}.mlp.fc2.{kind}"]
            out[f"{theirs}.layernorm_before.{kind}"] = weights[f"{ours}.norm1.{kind}"]
            out[f"{theirs}.layernorm_after.{kind}"] = weights[f"{ours}.norm2.{kind}"]
        out[f"{base}layernorm.{kind}"] = weights[f"norm.{kind}"]
        out[f"{'cls_' if teacher else ''}classifier.{kind}"] = weights[f"head.{kind}"]
        if teacher:
            out[f"distillation_classifier.{kind}"] = weights[f"head_dist.{kind}"]
    return out


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_hugging_faces_names(golden, tmp_path, name, prefix):
    file = golden(name)
    teacher = "distilled" in name
    theirs = hugging_face(file.group("weights"), "deit" if teacher else "vit", teacher=teacher)
    theirs = {f"{prefix}{key}": np.ascontiguousarray(value) for key, value in theirs.items()}
    close_to_timms(file, theirs)
    save_file(theirs, tmp_path / "model.safetensors")
    close_to_timms(file, read_state_dict(tmp_path / "model.safetensors"))
    chex.assert_trees_all_equal(read(tmp_path / "model.safetensors").variables, file.group("weights"))


def test_hugging_faces_bare_model_has_a_pooler_and_no_head(golden, caplog):
    file = golden("deit_small_cfg")
    theirs = hugging_face(file.group("weights"), "vit", teacher=False)
    bare = {key.removeprefix("vit."): value for key, value in theirs.items() if not key.startswith("classifier")}
    bare |= {"pooler.dense.weight": np.ones((HIDDEN, HIDDEN)), "pooler.dense.bias": np.ones(HIDDEN)}
    with caplog.at_level(logging.WARNING):
        variables = from_torch(golden_model(file), bare, reset_head=True)
    assert "holds a pooler" in caplog.text
    expected = from_torch(golden_model(file), file.group("weights"))
    chex.assert_trees_all_equal(variables["params"]["blocks"], expected["params"]["blocks"])


def test_a_projection_that_is_not_whole_is_told_of(refuses, golden):
    file = golden("deit_small_cfg")
    theirs = hugging_face(file.group("weights"), "vit", teacher=False)
    del theirs["vit.encoder.layer.1.attention.attention.key.weight"]
    with refuses("'blocks.1.attn.qkv.weight'", "'blocks.1.attn.query.weight'"):
        from_torch(golden_model(file), theirs)


# big_vision, written from its models/vit.py, and the original release's layout


def big_vision(weights, *, original):
    def heads(array):  # [out, in] -> [in, heads, head_dim]
        return array.T.reshape(HIDDEN, HEADS, -1)

    norm2, attention, mlp = (
        ("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
        if original
        else ("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
    )
    out = {
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding" if original else "pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for block in range(3):
        theirs, ours = f"Transformer/encoderblock_{block}", f"blocks.{block}"
        for name, part in (("LayerNorm_0", "norm1"), (norm2, "norm2")):
            out[f"{theirs}/{name}/scale"] = weights[f"{ours}.{part}.weight"]
            out[f"{theirs}/{name}/bias"] = weights[f"{ours}.{part}.bias"]
        for number, part in enumerate(("query", "key", "value")):
            kernel = np.split(weights[f"{ours}.attn.qkv.weight"], 3)[number]
            out[f"{theirs}/{attention}/{part}/kernel"] = heads(kernel)
            bias = np.split(weights[f"{ours}.attn.qkv.bias"], 3)[number]
            out[f"{theirs}/{attention}/{part}/bias"] = bias.reshape(HEADS, -1)
        out[f"{theirs}/{attention}/out/kernel"] = weights[f"{ours}.attn.proj.weight"].T.reshape(HEADS, -1, HIDDEN)
        out[f"{theirs}/{attention}/out/bias"] = weights[f"{ours}.attn.proj.bias"]
        for number in (0, 1):
            out[f"{theirs}/{mlp}/Dense_{number}/kernel"] = weights[f"{ours}.mlp.fc{number + 1}.weight"].T
            out[f"{theirs}/{mlp}/Dense_{number}/bias"] = weights[f"{ours}.mlp.fc{number + 1}.bias"]
    return out


@pytest.mark.parametrize(("prefix", "original"), [("", True), ("params/", False), ("opt/target/", True)])
def test_big_visions_npz(golden, tmp_path, prefix, original):
    file = golden("deit_small_cfg")
    theirs = {f"{prefix}{key}": value for key, value in big_vision(file.group("weights"), original=original).items()}
    np.savez(tmp_path / "vit.npz", **theirs, **({"opt/state/step": np.int32(3)} if prefix.startswith("opt") else {}))
    read_back = read_state_dict(tmp_path / "vit.npz")
    chex.assert_trees_all_equal(read_back, file.group("weights"))
    close_to_timms(file, read_back)
    close_to_timms(file, theirs)


def test_big_visions_positions_are_the_patches_alone_where_the_class_token_comes_after(golden):
    file = golden("deit_small_cfg")
    weights = file.group("weights")
    weights["pos_embed"] = weights["pos_embed"] * (np.arange(17) > 0)[:, None]  # none for the class token
    theirs = big_vision(weights, original=False)
    theirs["pos_embedding"] = theirs["pos_embedding"][:, 1:]
    expected = logits_of(file, weights)
    chex.assert_trees_all_equal(logits_of(file, theirs), expected)


def test_big_visions_scanned_blocks_and_bfloat16_without_its_name(golden, tmp_path):
    file = golden("deit_small_cfg")
    theirs = big_vision(file.group("weights"), original=False)
    first = [name for name in theirs if "encoderblock_0" in name]
    for name in first:
        stacked = np.stack([theirs.pop(name.replace("block_0", f"block_{block}")) for block in range(3)])
        theirs[name.replace("encoderblock_0", "encoderblock")] = stacked
    close_to_timms(file, theirs)
    np.savez(tmp_path / "vit.npz", **{name: value.astype(ml_dtypes.bfloat16) for name, value in theirs.items()})
    expected = {name: value.astype(ml_dtypes.bfloat16) for name, value in file.group("weights").items()}
    chex.assert_trees_all_equal(
        read_state_dict(tmp_path / "vit.npz"), {name: value.astype(np.float32) for name, value in expected.items()}
    )


# Wrappings


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "state_dict.", "backbone.", "net.", "module._orig_mod.", "vit."]
)
def test_one_prefix_before_all_names_is_taken_off(model, state_dict, tmp_path, prefix):
    wrapped = {f"{prefix}{name}": value for name, value in state_dict.items()} | {"n_averaged": np.array(3)}
    expected = from_torch(model, state_dict)
    chex.assert_trees_all_equal(from_torch(model, wrapped), expected)
    for suffix in ("npz", "NPZ", "SafeTensors"):
        path = tmp_path / f"weights.{suffix}"
        if suffix == "SafeTensors":
            save_file(wrapped, path)
        else:
            with path.open("wb") as file:
                np.savez(file, **wrapped)
        chex.assert_trees_all_equal(read_state_dict(path), state_dict)


@pytest.mark.parametrize("name", ["small_levit", "small_mvit"])
def test_a_prefix_before_other_models_names(name):
    model = getattr(small, name)()
    variables = small.random_variables(model)
    wrapped = {f"module.{key}": value for key, value in to_torch(model, variables).items()}
    chex.assert_trees_all_equal(from_torch(model, wrapped), variables)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=1), "epoch": 3, "optimizer": {"a": weights}},
        lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        lambda weights: {"checkpoint": {"net": weights}, "step": 3},
        lambda weights: {"anything": weights},
    ],
)
def test_a_dict_that_has_the_weights_among_other_things(model, state_dict, wrap):
    chex.assert_trees_all_equal(from_torch(model, wrap(state_dict)), from_torch(model, state_dict))


@pytest.mark.parametrize(
    ("raw", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")]
)
def test_of_raw_weights_and_their_average_which_is_read_is_said_and_chosen(
    refuses, model, state_dict, caplog, raw, average
):
    other = {name: value + 1 for name, value in state_dict.items()}
    both = {average: other, raw: state_dict}
    with caplog.at_level(logging.WARNING):
        chex.assert_trees_all_equal(from_torch(model, both), from_torch(model, state_dict))
    assert f"weights under '{raw}' and their moving average under '{average}': the former are read" in caplog.text
    caplog.clear()
    for ema, expected in [(False, state_dict), (True, other)]:
        chex.assert_trees_all_equal(from_torch(model, both, ema=ema), from_torch(model, expected))
    assert not caplog.text
    chex.assert_trees_all_equal(from_torch(model, {average: other}), from_torch(model, other))
    with refuses("a state dict holds no moving average"):
        from_torch(model, state_dict, ema=True)
    with refuses("holds no weights but a moving average"):
        from_torch(model, {average: other}, ema=False)


def test_what_blocks_is_named(refuses, model, state_dict):
    with refuses("its keys are teacher, student"):
        from_torch(model, {"teacher": state_dict, "student": state_dict})
    with refuses("its keys are model, and it holds argparse.Namespace"):
        from_torch(model, {"model": argparse.Namespace()})
    with refuses("holds int under 'epoch', among arrays"):
        from_torch(model, state_dict | {"epoch": 3})
    with refuses("a state dict must be a dict of names to arrays, not argparse.Namespace"):
        from_torch(model, argparse.Namespace())


# Numbers


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_floating_types_of_all_kinds_are_read(model, state_dict, dtype):
    rounded = {name: value.astype(dtype) for name, value in state_dict.items()}
    expected = {name: value.astype(np.float32) for name, value in rounded.items()}
    chex.assert_trees_all_equal(from_torch(model, rounded), from_torch(model, expected))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_integers_are_no_weights(refuses, model, state_dict, dtype):
    with refuses("1 arrays that are no weights: 'head.weight' is of", dtype):
        from_torch(model, state_dict | {"head.weight": state_dict["head.weight"].astype(dtype)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(refuses, model, state_dict, value):
    broken = state_dict["norm.weight"].copy()
    broken[3] = value
    with refuses("'norm.weight' has 1 of 24 numbers that are not finite"):
        from_torch(model, state_dict | {"norm.weight": broken})
    with refuses("not finite"):  # float32 does not hold it
        from_torch(model, state_dict | {"norm.weight": np.full(24, 1e300)})


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "blocks.1.gamma_2", "blocks.1.lambda_1"])
def test_layer_scale_is_said(refuses, model, state_dict, name):
    with refuses(f"{name!r} belongs to layer scale, which DeiT III has and deit_micro does not"):
        from_torch(model, state_dict | {name: np.ones(24)})


def test_pytorchs_tensors_in_memory(model, state_dict):
    torch = pytest.importorskip("torch")
    expected = from_torch(model, state_dict)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state_dict.items()}
    parameters = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
    for given in (tensors, parameters, {"state_dict": parameters}):
        chex.assert_trees_all_equal(from_torch(model, given), expected)
    rounded = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in state_dict.items()}
    brain = {name: value.bfloat16() for name, value in tensors.items()}
    chex.assert_trees_all_equal(from_torch(model, brain), from_torch(model, rounded))


@pytest.mark.parametrize("suffix", ["pth", "pth.tar", "PTH", "ckpt"])
def test_a_training_scripts_file(model, state_dict, tmp_path, suffix):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in state_dict.items()}
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / f"weights.{suffix}")
    chex.assert_trees_all_equal(read_state_dict(tmp_path / f"weights.{suffix}"), state_dict)


@pytest.mark.parametrize("suffix", ["png", "json", "index", "npy", ""])
def test_another_suffix_is_said(refuses, tmp_path, suffix):
    path = (tmp_path / "weights").with_suffix(f".{suffix}" if suffix else "")
    path.write_bytes(b"\x89PNG")
    for reader in (read, read_state_dict):
        with refuses(f"'{path}' is no file of weights, whose names end in .safetensors, .npz, .pth"):
            reader(path)


def safetensors_of(dtype, data):
    header = f'{{"a.weight":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,2]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + data


def test_a_safetensors_file_of_eight_bits(refuses, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_of("F8_E4M3", bytes([0x38, 0xBC])))
    # 0x38: exponent 7, the bias, and no fraction; 0xbc: the sign, and half.
    np.testing.assert_array_equal(read_state_dict(path)["a.weight"], np.float32([1, -1.5]))
    path.write_bytes(safetensors_of("F8_E8M0", bytes(2)))
    with refuses(str(path), "F8_E8M0"):
        read_state_dict(path)
