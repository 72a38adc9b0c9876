import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from castling_jax.models.registry import abstract_model
from castling_jax.models.variables import flatten, get_variables, unflatten
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import adaptive_clip, decay_mask, layer_rates, make_optimizer


def test_relative_positions_are_decayed_and_attention_biases_are_not():
    for name, path, decays in [
        ("mvitv2_tiny", "stages/0/blocks/0/attn/softmax_branch/rel_pos_h", True),
        ("levit_128s", "stages/0/blocks/0/attn/softmax_branch/attention_biases", False),
    ]:
        assert flatten(decay_mask(get_variables(abstract_model(name))["params"]))[path] is decays


def test_only_matrices_are_decayed():
    params = get_variables(abstract_model("deit_micro", distilled=True))["params"]
    decayed = {path for path, decays in flatten(decay_mask(params)).items() if decays}
    assert decayed == {path for path in flatten(params) if path.endswith("/kernel")}
    for path in ("cls_token", "dist_token", "pos_embed", "blocks/0/attn/token_kernel", "blocks/0/norm1/scale"):
        assert path in flatten(params)
        assert path not in decayed


def test_first_step_is_adamw_by_hand():
    config = default_config().optimizer
    params = {"kernel": jnp.array([[2.0, -3.0]]), "bias": jnp.array([1.0])}
    gradients = {"kernel": jnp.array([[0.1, -0.2]]), "bias": jnp.array([0.3])}
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # After bias correction the first step of Adam is the gradient's sign; epsilon 1e-8 over 0.1 shows at 1e-7.
    expected = {
        "kernel": -0.01 * (np.sign(gradients["kernel"]) + config.weight_decay * params["kernel"]),
        "bias": -0.01 * np.sign(gradients["bias"]),
    }
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_sgd_goes_by_pytorchs_rule():
    """g += decay * p, b = momentum * b + g, p -= rate * b (torch.optim.SGD), in float64, with a rate of each step."""
    config = default_config().optimizer
    config.update({"name": "sgd", "momentum": 0.8, "weight_decay": 0.1})
    rates = [0.1, 0.3, 0.05, 0.2]
    optimizer = make_optimizer(config, lambda step: jnp.asarray(rates)[step])
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in ("kernel", "bias")}
    expected, buffers = {name: array.astype(float) for name, array in params.items()}, {"kernel": 0.0, "bias": 0.0}
    state = optimizer.init(params)
    for rate in rates:
        gradients = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in params}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            buffers[name] = 0.8 * buffers[name] + gradients[name] + decay * expected[name]
            expected[name] = expected[name] - rate * buffers[name]
            np.testing.assert_allclose(params[name], expected[name], rtol=0, atol=1e-6)  # a few roundings of float32


def test_sgd_clips_before_it_adds_the_decay():
    config = default_config().optimizer
    config.update({"name": "sgd", "weight_decay": 0.5, "clip_norm": 1e-3})
    params = {"kernel": jnp.full((2, 2), 3.0)}
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    updates, _ = optimizer.update({"kernel": jnp.full((2, 2), 7.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * (0.5e-3 + 0.5 * 3.0), rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 1e-12])
def test_gradients_are_clipped_together(clip_norm):
    config = default_config().optimizer
    config.clip_norm = clip_norm
    params = {"kernel": jnp.zeros((2, 2))}
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    updates, _ = optimizer.update({"kernel": jnp.ones((2, 2))}, optimizer.init(params), params)
    largest = float(jnp.max(jnp.abs(jax.tree.leaves(updates)[0])))
    # Clipped far below Adam's epsilon of 1e-8, the step all but vanishes.
    assert largest < 1e-5 if clip_norm else largest == pytest.approx(0.01, rel=1e-5)


def test_adaptive_clip_of_biases_and_taps_goes_by_heads():
    rng = np.random.default_rng(0)
    weights = {"attention_biases": rng.standard_normal((3, 16)), "token_kernel": rng.standard_normal((3, 3, 4))}
    weights = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in weights.items()}
    gradients = jax.tree.map(lambda leaf: 2 * leaf[::-1], weights)
    optimizer = adaptive_clip(0.01)
    clipped, _ = optimizer.update(gradients, optimizer.init(weights), weights)
    # Brock et al.'s equation 3 with a norm for each head.
    for name, axes in (("attention_biases", (1,)), ("token_kernel", (0, 1))):
        norms = [np.sqrt(np.sum(np.square(tree[name]), axes, keepdims=True)) for tree in (weights, gradients)]
        expected = gradients[name] * np.minimum(1, 0.01 * norms[0] / norms[1])
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)


def test_adaptive_clip_goes_by_each_units_weights():
    config = default_config().optimizer
    config.adaptive_clip = 0.01
    rng = np.random.default_rng(0)
    weights, gradients = rng.standard_normal((2, 6, 4)).astype(np.float32)
    gradients[:, 0] *= 1e-4  # one unit stays below its limit
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state = optimizer.init({"kernel": jnp.asarray(weights)})
    _, state = optimizer.update({"kernel": jnp.asarray(gradients)}, state, {"kernel": jnp.asarray(weights)})
    limit = 0.01 * np.linalg.norm(weights, axis=0)
    expected = gradients * np.minimum(1, limit / np.linalg.norm(gradients, axis=0))
    (moments,) = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (6, 4)][:1]  # 0.1 of the gradient, first
    np.testing.assert_allclose(moments, 0.1 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "depth", "layers"),
    [
        (
            "deit_micro",
            {},
            4,
            {"cls_token": 0, "pos_embed": 0, "patch_embed/proj/bias": 0, "blocks/0/norm1/bias": 1}
            | {"blocks/3/mlp/fc1/kernel": 4, "norm/scale": 5, "head/kernel": 5},
        ),
        (
            "levit_128s",
            {},
            9 + 2,  # its two downsampling attentions count as layers
            {"stem/conv1/bn/scale": 0, "stages/0/blocks/1/mlp/ln1/bn/bias": 2}
            | {"stages/1/downsample/mlp/ln1/bn/bias": 3, "stages/1/blocks/0/mlp/ln1/bn/bias": 4, "head/bn/scale": 12},
        ),
        (
            "picodet_s",
            {"backbone": "deit_micro", "image_size": 160},
            4,
            {"backbone/pos_embed": 0, "backbone/blocks/2/norm1/bias": 3, "backbone/norm/bias": 5}
            | {"neck/top_down_blocks/1/blocks/0/pointwise/linear/kernel": 5},
        ),
        (
            "mae",
            {"backbone": "deit_micro", "image_size": 8},
            4,
            {"backbone/blocks/3/norm1/bias": 4, "decoder_blocks/0/norm1/bias": 5, "mask_token": 5},
        ),
    ],
)
def test_early_layers_learn_at_lower_rates(name, arguments, depth, layers):
    """The layers are counted by hand here, as BEiT's get_num_layer_for_vit counts them."""
    rates = flatten(layer_rates(get_variables(abstract_model(name, **arguments))["params"], 0.5))
    for path, layer in layers.items():
        assert rates[path] == 0.5 ** (depth + 1 - layer), path


def test_layer_decay_scales_the_whole_update():
    """AdamW's update, weight decay included, as if each layer had a learning rate of its own."""
    config = default_config().optimizer
    rng = np.random.default_rng(0)
    paths = ("patch_embed/kernel", "blocks/0/kernel", "blocks/0/bias", "blocks/1/kernel", "head/kernel")
    params, gradients = (
        unflatten({path: rng.standard_normal((2, 3)).astype(np.float32) for path in paths}) for _ in range(2)
    )
    updates = []
    for decay in (None, 0.75):
        config.layer_decay = decay
        optimizer = make_optimizer(config, optax.constant_schedule(0.01))
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    expected = jax.tree.map(lambda update, rate: update * rate, updates[0], layer_rates(params, 0.75))
    chex.assert_trees_all_close(updates[1], expected, rtol=1e-6)
