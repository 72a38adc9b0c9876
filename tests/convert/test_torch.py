import logging
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from castling_jax.convert import from_torch, read_state_dict, to_torch
from castling_jax.convert.torch import backbone_to_torch
from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten
from castling_jax.sizes import image_shape
from tests.models import small, test_mvitv2
from tests.models.test_position import resize_with_interp, resize_with_pillow

GOLDEN_FILES = ["deit_small_cfg", "deit_distilled_small_cfg"]


def golden_model(file, **arguments):
    meta = file.meta
    sizes = {word: meta[word] for word in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes")}
    sizes |= {"image_size": meta["img_size"], "distilled": meta.get("distilled", False), "attention": "softmax"}
    return abstract_model("deit_tiny", **(sizes | arguments))


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_timms_weights_come_back_as_they_were(golden, caplog, name):
    file = golden(name)
    model, weights = golden_model(file), file.group("weights")
    with caplog.at_level(logging.WARNING):
        variables = from_torch(model, weights)
    assert not caplog.records
    back = to_torch(model, variables)
    assert back.keys() == weights.keys()
    chex.assert_trees_all_equal(back, weights)
    assert all(isinstance(value, np.ndarray) and value.dtype == np.float32 for value in back.values())
    assert all(value.flags.c_contiguous for value in back.values())


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_castlings_taps_start_at_zero_and_are_listed(golden, caplog, name):
    file = golden(name)
    with caplog.at_level(logging.WARNING):
        variables = from_torch(golden_model(file, attention="castling"), file.group("weights"))
    taps = [f"params/blocks/{i}/attn/token_kernel" for i in range(file.meta["depth"])]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(path in record.getMessage() for path in taps)
    leaves = flatten(variables)
    for path in taps:
        chex.assert_trees_all_equal(leaves[path], jnp.zeros((9, 3)))
    # The rest is what a softmax model gets.
    softmax = flatten(from_torch(golden_model(file), file.group("weights")))
    chex.assert_trees_all_equal({path: leaf for path, leaf in leaves.items() if path not in taps}, softmax)


@pytest.mark.parametrize("kind", ["castling", "linear_angular", "angular"])
@pytest.mark.parametrize(("token_conv", "size"), [("1d", 9), ("1d", 1), ("2d", 3), ("2d", 1)])
def test_random_taps_make_the_round_trip(kind, token_conv, size):
    model = small.small_model(attention=kind, token_conv=token_conv, token_kernel_size=size, distilled=True)
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    rows = 1 if token_conv == "1d" else size
    shape = (3, 1, size, 1) if token_conv == "1d" else (3, 1, rows, size)
    assert state_dict["blocks.1.attn.dconv.weight"].shape == shape
    chex.assert_trees_all_equal(from_torch(model, state_dict), variables)


def test_names_and_layouts_are_torchs():
    model = small.small_model(token_conv="2d")
    variables = small.random_variables(model)
    state_dict, params = to_torch(model, variables), variables["params"]
    block = params["blocks"]["1"]
    expected = {
        "blocks.1.attn.qkv.weight": block["attn"]["qkv"]["kernel"].T,
        "blocks.1.norm2.weight": block["norm2"]["scale"],
        "blocks.1.mlp.fc1.bias": block["mlp"]["fc1"]["bias"],
        "head.weight": params["head"]["kernel"].T,
        "cls_token": params["cls_token"],
    }
    chex.assert_trees_all_equal({name: state_dict[name] for name in expected}, expected)
    row, column, channel, feature = 0, 1, 2, 5
    patch, taps = params["patch_embed"]["proj"]["kernel"], block["attn"]["token_kernel"]
    assert state_dict["patch_embed.proj.weight"][feature, channel, row, column] == patch[row, column, channel, feature]
    assert state_dict["blocks.1.attn.dconv.weight"][2, 0, row, column] == taps[row, column, 2]


def test_parameters_are_held_in_the_models_dtype_and_written_in_float32():
    model = small.small_model(param_dtype=jnp.bfloat16)
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    assert {value.dtype for value in state_dict.values()} == {np.dtype(np.float32)}
    back = from_torch(model, state_dict)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(back, variables)


@pytest.mark.parametrize("name", GOLDEN_FILES)
@pytest.mark.parametrize(("image_size", "side"), [(56, 7), (16, 2)])
def test_a_position_embedding_of_another_image_size_is_resized(golden, name, image_size, side):
    file = golden(name)
    weights = file.group("weights")
    variables = from_torch(golden_model(file, image_size=image_size), weights)
    prefix = 2 if file.meta.get("distilled") else 1
    expected = resize_with_pillow(weights["pos_embed"], (4, 4), (side, side), prefix)
    chex.assert_trees_all_close(variables["params"]["pos_embed"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_size", [16, (16, 32), (32, 8), (6, 32)])
def test_a_position_embedding_of_a_grid_that_is_not_square_is_resized_from_it(image_size):
    source, model = small.small_model(image_size=(8, 32)), small.small_model(image_size=image_size)
    state_dict = to_torch(source, small.random_variables(source))
    fitted = from_torch(model, state_dict, source=source)["params"]["pos_embed"]
    # 64 patches, as on a grid of 8 x 8.
    expected = resize_with_pillow(state_dict["pos_embed"], (4, 16), model.grid, 1)
    chex.assert_trees_all_close(fitted, expected, rtol=0, atol=1e-5)


def test_a_grid_that_is_known_does_not_change_weights_that_fit(refuses):
    model = small.small_model(image_size=(8, 32))
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    chex.assert_trees_all_equal(from_torch(model, state_dict, source=model), variables)
    chex.assert_trees_all_equal(from_torch(model, state_dict), variables)
    with refuses("source must be a model or None, not str"):
        from_torch(model, state_dict, source="deit_micro")
    other = small.small_model(image_size=(8, 16))  # is not the model that the weights belong to
    with refuses("'pos_embed' is (1, 65, 24), not (1, 257, 24)"):
        from_torch(small.small_model(image_size=32), state_dict, source=other)


# A masked autoencoder's encoder


def small_mae():
    backbone = {word: small.SIZES[word] for word in ("embed_dim", "depth", "num_heads", "patch_size")}
    decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    return abstract_model("mae", image_size=8, backbone="deit_micro", backbone_arguments=backbone, **decoder)


def test_fine_tuning_a_masked_autoencoder_warns_of_nothing(caplog):
    source, model = small_mae(), small.small_model(global_pool="avg")
    with caplog.at_level(logging.INFO):
        from_torch(model, to_torch(source, small.random_variables(source)), reset_head=True)
    decoder, norm = caplog.records
    assert {decoder.levelno, norm.levelno} == {logging.INFO}
    assert "arrays of a masked autoencoder's decoder are left out" in decoder.getMessage()
    assert norm.getMessage() == (
        "The encoder's last norm (norm.bias, norm.weight) is left out: fc_norm takes its place."
    )


# MViTv2


def test_mvitv2s_weights_come_back_as_they_were(golden):
    file = golden("mvitv2_small_cfg")
    model, weights = test_mvitv2.golden_model(file, attention="softmax"), file.group("weights")
    chex.assert_trees_all_equal(to_torch(model, from_torch(model, weights)), weights)


def test_in_a_castling_mvitv2_relative_positions_are_the_branchs(golden, caplog):
    file = golden("mvitv2_small_cfg")
    weights, model = file.group("weights"), test_mvitv2.golden_model(file)
    with caplog.at_level(logging.WARNING):
        variables = from_torch(model, weights)
    leaves = flatten(variables)
    (record,) = caplog.records
    assert "4 token kernels" in record.getMessage()
    for stage, block, heads in [(0, 0, 1), (1, 0, 2), (1, 1, 2), (2, 0, 4)]:
        attention = f"stages/{stage}/blocks/{block}/attn"
        chex.assert_trees_all_equal(leaves[f"params/{attention}/token_kernel"], jnp.zeros((3, 3, heads)))
        for word in ("rel_pos_h", "rel_pos_w"):
            table = weights[f"{attention}/{word}".replace("/", ".")]
            chex.assert_trees_all_equal(leaves[f"params/{attention}/softmax_branch/{word}"], jnp.asarray(table))
    # The way back has the taps too, and no level that timm lacks.
    back = to_torch(model, variables)
    assert back.keys() - weights.keys() == {
        path[7:].replace("/", ".").replace("token_kernel", "dconv.weight")
        for path in leaves
        if path.endswith("token_kernel")
    }
    chex.assert_trees_all_equal({name: back[name] for name in weights}, weights)
    chex.assert_trees_all_equal(from_torch(model, back), variables)


def test_relative_positions_of_another_image_size_are_resized(golden):
    file = golden("mvitv2_small_cfg")
    model = test_mvitv2.golden_model(file, image_size=96)
    leaves = flatten(from_torch(model, file.group("weights")))
    path = "stages/0/blocks/0/attn/{}rel_pos_h"
    # 24 x 24 tokens in the place of 16 x 16.
    expected = resize_with_interp(file[f"weights/{path.format('').replace('/', '.')}"], 47)
    chex.assert_trees_all_close(
        # Positions of up to 31 are known to float32's rounding, 2e-6 of a step.
        leaves[f"params/{path.format('softmax_branch/')}"],
        jnp.asarray(expected, jnp.float32),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(31,), (30, 24), (31, 23), (1, 31, 24)])
def test_a_table_of_relative_positions_that_cannot_be_one(refuses, golden, shape):
    file = golden("mvitv2_small_cfg")
    name = "stages.0.blocks.0.attn.rel_pos_h"
    with refuses(repr(name), "(31, 24)", str(shape)):
        from_torch(test_mvitv2.golden_model(file), file.group("weights") | {name: np.zeros(shape, np.float32)})


def test_each_axis_of_a_grid_has_relative_positions_of_its_own():
    source, model = small.small_mvit(image_size=(32, 64)), small.small_mvit(image_size=(64, 32))
    state_dict = to_torch(source, small.random_variables(source))
    leaves = flatten(from_torch(model, state_dict, source=source))
    for word, length in (("rel_pos_h", 31), ("rel_pos_w", 15)):
        expected = resize_with_interp(state_dict[f"stages.0.blocks.0.attn.{word}"], length)
        fitted = leaves[f"params/stages/0/blocks/0/attn/softmax_branch/{word}"]
        chex.assert_trees_all_close(fitted, jnp.asarray(expected, jnp.float32), rtol=0, atol=1e-5)


def test_a_mvitv2_without_its_classifier_has_no_last_norm():
    model = small.small_mvit()
    variables = small.random_variables(model)
    bare = {
        name: value for name, value in to_torch(model, variables).items() if name.split(".")[0] not in ("norm", "head")
    }
    params = from_torch(model, bare, reset_head=True)["params"]
    chex.assert_trees_all_equal(params["stages"], variables["params"]["stages"])
    assert np.all(params["norm"]["scale"] == 1)


# LeViT


def golden_levit(file, **arguments):
    meta = file.meta
    sizes = {word: meta[word] for word in ("embed_dim", "key_dim", "depth", "num_heads", "num_classes")}
    sizes |= {"image_size": meta["img_size"], "distilled": meta.get("distilled", False), "attention": "softmax"}
    return abstract_model("levit_128s", **(sizes | arguments))


@pytest.mark.parametrize("name", ["levit_small_cfg", "levit_distilled_small_cfg"])
def test_a_levits_weights_come_back_as_they_were(golden, caplog, name):
    file = golden(name)
    model, weights = golden_levit(file), file.group("weights")
    counters = {f"{name[:-13]}.num_batches_tracked": np.int64(7) for name in weights if name.endswith(".running_mean")}
    with caplog.at_level(logging.WARNING):
        variables = from_torch(model, weights | counters)
    assert not caplog.records
    chex.assert_trees_all_equal(to_torch(model, variables), weights)


@pytest.mark.parametrize("kind", ["castling", "linear_angular", "angular", "softmax"])
def test_random_levits_make_the_round_trip(kind):
    model = small.small_levit(attention=kind, distilled=True)
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    assert ("stages.0.blocks.0.attn.attention_biases" in state_dict) == (kind in ("castling", "softmax"))
    assert not any("softmax_branch" in name for name in state_dict)
    chex.assert_trees_all_equal(from_torch(model, state_dict), variables)


def test_a_levits_fused_rows_are_ordered_head_first():
    model = small.small_levit(attention="softmax")
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    cases = [
        ("0", "blocks/0/attn/qkv", 2, {"q": 4, "k": 4, "v": 8}),
        ("1", "downsample/attn_downsample/kv", 2, {"k": 4, "v": 16}),
    ]
    for stage, path, heads, dims in cases:
        node, stats = (variables[part]["stages"][stage] for part in ("params", "batch_stats"))
        for name in path.split("/"):
            node, stats = node[name], stats[name]
        theirs = f"stages.{stage}.{path.replace('/', '.')}"
        row, own_start = 0, dict(zip(dims, np.cumsum([0, *dims.values()]) * heads, strict=False))
        for head in range(heads):
            for part, dim in dims.items():
                for i in range(dim):
                    own = own_start[part] + head * dim + i
                    np.testing.assert_array_equal(
                        state_dict[f"{theirs}.linear.weight"][row], node["linear"]["kernel"][:, own]
                    )
                    assert state_dict[f"{theirs}.bn.weight"][row] == node["bn"]["scale"][own]
                    assert state_dict[f"{theirs}.bn.running_var"][row] == stats["bn"]["var"][own]
                    row += 1


def test_a_castling_levit_takes_the_softmaxs_biases_into_its_branch(golden, caplog):
    file = golden("levit_small_cfg")
    weights = file.group("weights")
    with caplog.at_level(logging.WARNING):
        leaves = flatten(from_torch(golden_levit(file, attention="castling"), weights))
    (record,) = caplog.records
    assert "stages/2/downsample/attn_downsample/token_kernel" in record.getMessage()
    biases = leaves["params/stages/1/blocks/0/attn/softmax_branch/attention_biases"]
    np.testing.assert_array_equal(biases, weights["stages.1.blocks.0.attn.attention_biases"])


@pytest.mark.parametrize("kind", ["linear_angular", "angular"])
def test_a_linear_levit_leaves_the_softmaxs_biases_out_and_says_so(golden, caplog, kind):
    file = golden("levit_small_cfg")
    with caplog.at_level(logging.WARNING):
        leaves = flatten(from_torch(golden_levit(file, attention=kind, token_conv=None), file.group("weights")))
    (record,) = caplog.records
    assert "stages.1.blocks.0.attn.attention_biases" in record.getMessage()
    assert not any(path.endswith("attention_biases") for path in leaves)


@pytest.mark.parametrize("image_size", [128, 32])
def test_biases_of_another_image_size_are_fitted(golden, image_size):
    file = golden("levit_small_cfg")
    weights = file.group("weights")
    leaves = flatten(from_torch(golden_levit(file, image_size=image_size), weights))
    side = image_size // 16
    fitted = np.asarray(leaves["params/stages/0/blocks/0/attn/attention_biases"]).reshape(2, side, side)
    table = weights["stages.0.blocks.0.attn.attention_biases"].reshape(2, 4, 4)
    for down, across in np.ndindex(side, side):
        np.testing.assert_array_equal(fitted[:, down, across], table[:, min(down, 3), min(across, 3)])


@pytest.mark.parametrize("image_size", [128, (256, 64), (32, 48)])
def test_biases_of_a_grid_that_is_not_square_are_fitted_from_it(image_size):
    source, model = (
        small.small_levit(attention="softmax", image_size=(64, 256)),
        small.small_levit(image_size=image_size),
    )
    state_dict = to_torch(source, small.random_variables(source))
    leaves = flatten(from_torch(model, state_dict, source=source))
    # 64 offsets, as on a grid of 8 x 8.
    table = state_dict["stages.0.blocks.0.attn.attention_biases"].reshape(2, 4, 16)
    height, width = (side // 16 for side in image_shape(image_size))
    fitted = np.asarray(leaves["params/stages/0/blocks/0/attn/softmax_branch/attention_biases"])
    for down, across in np.ndindex(height, width):
        np.testing.assert_array_equal(
            fitted.reshape(2, height, width)[:, down, across], table[:, min(down, 3), min(across, 15)]
        )


@pytest.mark.parametrize("backbone", ["levit_128s", "deit_micro"])
def test_a_detectors_backbone_is_written_as_the_classifiers(backbone):
    arguments = {
        "levit_128s": {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8},
        "deit_micro": {"depth": 1, "patch_size": 16},
    }[backbone]
    model = abstract_model(
        "picodet_s", image_size=160, neck_channels=16, num_convs=1, backbone=backbone, backbone_arguments=arguments
    )
    classifier = abstract_model(backbone, image_size=160, num_classes=3, **arguments)
    variables = small.random_variables(model)
    state_dict = backbone_to_torch(model, variables)
    expected = flatten({name: tree.get("backbone", {}) for name, tree in variables.items()})
    leaves = flatten(from_torch(classifier, state_dict, reset_head=True))
    without_head = {path: leaf for path, leaf in leaves.items() if path.split("/")[1] != "head"}
    chex.assert_trees_all_equal(without_head, expected)
    whole = to_torch(model, variables)
    within = {name.removeprefix("backbone."): array for name, array in whole.items() if name.startswith("backbone.")}
    chex.assert_trees_all_equal(within, state_dict)
    chex.assert_trees_all_equal(from_torch(model, whole), variables)


def test_biases_that_are_no_square_are_refused(refuses):
    model = small.small_levit(attention="softmax")
    name = "stages.0.blocks.0.attn.attention_biases"
    state_dict = to_torch(model, small.random_variables(model))
    for shape in [(2, 48), (3, 49), (49,)]:
        with refuses(repr(name), "(2, 49)"):
            from_torch(model, state_dict | {name: np.zeros(shape, np.float32)})


# A new head


@pytest.mark.parametrize("make", [small.small_model, small.small_levit, small.small_mvit])
def test_a_head_of_other_classes_starts_at_zero_where_asked(refuses, make):
    model = make()
    variables = small.random_variables(model)
    state_dict, other = to_torch(model, variables), make(num_classes=3)
    with refuses("it holds 2 of another shape", "'head.", "reset_head=True"):
        from_torch(other, state_dict)
    before, after = flatten(variables), flatten(from_torch(other, state_dict, reset_head=True))
    assert before.keys() == after.keys()
    new = {path for path in before if before[path].shape != after[path].shape}
    assert {path.split("/")[1] for path in new} == {"head"}
    assert {path.split("/")[-1] for path in new} == {"kernel", "bias"}
    chex.assert_trees_all_equal({path: after[path] for path in new}, {path: 0 * after[path] for path in new})
    kept = before.keys() - new
    chex.assert_trees_all_equal({path: after[path] for path in kept}, {path: before[path] for path in kept})


def test_a_head_that_fits_is_not_reset_and_one_that_is_missing_is():
    model = small.small_model(distilled=True)
    variables = small.random_variables(model)
    state_dict = to_torch(model, variables)
    chex.assert_trees_all_equal(from_torch(model, state_dict, reset_head=True), variables)
    headless = {name: value for name, value in state_dict.items() if not name.startswith("head")}
    reset = from_torch(model, headless, reset_head=True)["params"]
    assert not any(np.any(leaf) for name in ("head", "head_dist") for leaf in reset[name].values())
    chex.assert_trees_all_equal(reset["blocks"], variables["params"]["blocks"])


def test_a_new_levit_head_has_the_running_statistics_of_a_new_model():
    model = small.small_levit()
    state_dict = to_torch(model, small.random_variables(model))
    headless = {name: value for name, value in state_dict.items() if not name.startswith("head")}
    norm = from_torch(model, headless, reset_head=True)["batch_stats"]["head"]["bn"]
    chex.assert_trees_all_equal(norm, {"mean": jnp.zeros(12), "var": jnp.ones(12)})


# Files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_safetensors_file_is_read_in_float32(tmp_path, dtype):
    arrays = {"a.weight": jnp.asarray([[1.5, -2, 1 / 3]], dtype), "count": jnp.asarray(7, jnp.int32)}
    save_file(arrays, tmp_path / "weights.safetensors")
    read = read_state_dict(tmp_path / "weights.safetensors")
    assert {name: type(value) for name, value in read.items()} == dict.fromkeys(arrays, np.ndarray)
    assert read["a.weight"].dtype == np.float32
    np.testing.assert_array_equal(read["a.weight"], np.asarray(arrays["a.weight"], np.float32))
    assert read["count"].dtype == np.int32


@pytest.mark.parametrize("data", [b"", b"no safetensors", b"cut"])
def test_a_damaged_safetensors_file(refuses, tmp_path, data):
    path = tmp_path / "weights.safetensors"
    save_file({"a": jnp.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8] if data == b"cut" else data)
    with refuses("weights.safetensors", "damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_npz_file_is_read_in_float32(tmp_path, dtype):
    arrays = {"a.weight": np.asarray([[1.5, -2, 1 / 3]], dtype), "count": np.asarray(7, np.int32)}
    np.savez(tmp_path / "weights.npz", **arrays)
    read = read_state_dict(tmp_path / "weights.npz")
    assert {name: value.dtype.name for name, value in read.items()} == {"a.weight": "float32", "count": "int32"}
    chex.assert_trees_all_equal(read, {name: value.astype(read[name].dtype) for name, value in arrays.items()})


@pytest.mark.parametrize("content", ["cut", "empty", "text", "array", "objects", "texts"])
def test_an_npz_file_without_weights(refuses, tmp_path, content):
    path = tmp_path / "weights.npz"
    things = {"objects": np.asarray([{}, 3], object), "texts": np.asarray(["a"])}
    np.savez(path, a=things.get(content, np.ones(1000)))
    if content in ("cut", "empty", "text"):
        path.write_bytes({"cut": path.read_bytes()[:-500], "empty": b"", "text": b"weights"}[content])
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    with refuses(str(path), "holds 'a' of dtype" if content == "texts" else "is damaged or no .npz file"):
        read_state_dict(path)


def test_a_file_that_is_not_there(refuses, tmp_path):
    for path in (tmp_path, tmp_path / "nothing.pth"):
        with refuses(str(path), "no file"):
            read_state_dict(path)


def test_without_torch_a_torch_file_says_so(refuses, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with refuses("weights.pth", "pip install torch", ".safetensors"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema"])
def test_a_torch_file_is_read_where_its_weights_are(golden, tmp_path, key):
    torch = pytest.importorskip("torch")
    file = golden("deit_small_cfg")
    weights = {name: torch.from_numpy(value) for name, value in file.group("weights").items()}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "weights.pth")
    read = read_state_dict(tmp_path / "weights.pth")
    chex.assert_trees_all_equal(read, file.group("weights"))
    from_torch(golden_model(file), read)


def test_a_torch_file_is_read_in_float32(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(
        {"half": torch.ones(2).half(), "brain": torch.ones(2).bfloat16(), "count": torch.tensor(3)}, tmp_path / "a.pth"
    )
    read = read_state_dict(tmp_path / "a.pth")
    assert {name: value.dtype.name for name, value in read.items()} == {
        "half": "float32",
        "brain": "float32",
        "count": "int64",
    }


@pytest.mark.parametrize("content", ["cut", "empty", "text", "list", "numbers", "code"])
def test_a_torch_file_without_weights(refuses, tmp_path, content):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    things = {"list": [torch.ones(2)], "numbers": {"model": {"a": 3}}, "code": {"model": print}}
    torch.save(things.get(content, {"a": torch.ones(1000)}), path)
    if content in ("cut", "empty", "text"):
        path.write_bytes({"cut": path.read_bytes()[:-500], "empty": b"", "text": b"weights"}[content])
    with refuses("weights.pth", "holds"):
        read_state_dict(path)


def test_what_is_converted_is_a_copy():
    model = small.small_model()
    state_dict = to_torch(model, small.random_variables(model))
    variables = from_torch(model, state_dict)
    before = jax.tree.map(np.array, variables)
    for array in state_dict.values():
        array += 1  # in place, as PyTorch's optimisers do
    chex.assert_trees_all_equal(variables, before)
    written = to_torch(model, before)
    for array in written.values():
        array += 1
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, variables))


# Refusals


@pytest.fixture
def model():
    return small.small_model()


@pytest.fixture
def state_dict(model):
    return to_torch(model, small.random_variables(model))


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.norm1.bias", "pos_embed"])
def test_a_missing_name(refuses, model, state_dict, name):
    del state_dict[name]
    with refuses("lacks", repr(name), "deit_micro"):
        from_torch(model, state_dict)


@pytest.mark.parametrize("name", ["head_dist.weight", "blocks.2.norm1.bias", "module.head.weight"])
def test_an_unknown_name(refuses, model, state_dict, name):
    with refuses(repr(name), "deit_micro does not have"):
        from_torch(model, state_dict | {name: np.zeros(3)})


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (1, 1, 24), (1, 18, 24), (2, 17, 24), (3, 1, 7, 1)])
@pytest.mark.parametrize(
    "name", ["head.weight", "norm.bias", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.dconv.weight"]
)
def test_an_array_of_another_shape(refuses, model, state_dict, name, shape):
    # Of a position embedding the message may say what it is rather than its name.
    with refuses("pos" if name == "pos_embed" else repr(name)):
        from_torch(model, state_dict | {name: np.zeros(shape, np.float32)})


def test_a_table_that_cannot_be_fitted_is_told_of_as_it_was_given(refuses, golden):
    file = golden("mvitv2_small_cfg")
    model = test_mvitv2.golden_model(file)
    name = next(name for name in file.group("weights") if name.endswith("rel_pos_h"))
    with refuses(f"{name!r} is (15, 3), not"):
        from_torch(model, file.group("weights") | {name: np.zeros((15, 3), np.float32)})


def test_a_state_dict_that_is_none(refuses, model):
    with refuses("a state dict must be a dict of names to arrays, not list"):
        from_torch(model, [])


def test_a_softmax_model_has_no_place_for_taps(refuses, state_dict):
    with refuses("'blocks.0.attn.dconv.weight'", "a token kernel, which attention='softmax' does not have"):
        from_torch(small.small_model(attention="softmax"), state_dict)


def test_a_folded_model(refuses, state_dict):
    model = small.small_model(form="inference")
    with refuses("inference form", 'form="train"', "to_inference"):
        from_torch(model, state_dict)
    with refuses("inference form", 'form="train"', "to_inference"):
        to_torch(model, small.random_variables(model))


def test_to_torch_refuses_variables_that_are_not_the_models(refuses, model):
    variables = small.random_variables(model)
    del variables["params"]["norm"]
    with refuses("lack 'params/norm/bias'"):
        to_torch(model, variables)


def test_all_that_does_not_fit_is_listed(refuses, model, state_dict):
    for name in [name for name in state_dict if name.startswith("blocks.0.")]:
        del state_dict[name]
    del state_dict["blocks.1.attn.dconv.weight"]  # is no mistake: it starts at zero
    state_dict |= {"extra.a": np.zeros(1), "extra.b": np.zeros(1), "norm.bias": np.zeros(9)}
    with refuses(
        "deit_micro: it lacks 12 of the model's tensors: 'blocks.0.attn.proj.bias'",
        "and 6 more; it holds 2 that deit_micro does not have: 'extra.a', 'extra.b'; ",
        "it holds 1 of another shape: 'norm.bias' is (9,), not (24,).",
    ):
        from_torch(model, state_dict)


def test_another_architectures_weights(refuses, state_dict):
    model = small.small_levit()
    with refuses("levit_128s: it lacks", "that levit_128s does not have: 'blocks.0.attn.dconv.weight'"):
        from_torch(model, state_dict)
