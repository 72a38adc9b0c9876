import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from castling_jax.models.registry import create_model
from castling_jax.models.variables import apply, flatten, get_variables
from castling_jax.training.config import default_config
from castling_jax.training.losses import cross_entropy
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.state import create_state, parameters_sha256
from castling_jax.training.step import make_train_step
from tests.models import small

BATCH = {
    "image": jax.random.normal(jax.random.key(1), (6, 8, 8, 3)),
    "label": jnp.array([0, 1, 2, 3, 4, 5]),
}


def setup(**arguments):
    model = create_model("deit_micro", num_classes=10, **{"depth": 1, "embed_dim": 32} | arguments)
    optimizer = make_optimizer(default_config().optimizer, optax.constant_schedule(1e-3))
    state = create_state(jax.tree.map(jnp.copy, get_variables(model)), optimizer, seed=0)
    return model, state, make_train_step(model, optimizer, label_smoothing=0.1)


def test_loss_is_that_of_the_forward_pass():
    model, state, step = setup()
    logits, densities = apply(model, get_variables(model), BATCH["image"], mask_threshold=0.05, return_densities=True)
    expected = cross_entropy(logits, BATCH["label"], label_smoothing=0.1).mean()
    state, metrics = step(state, BATCH, 0.05)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    # One weight in 6 x 2 heads x 17 x 17 may fall on the other side of the threshold under another compilation.
    np.testing.assert_allclose(metrics["mask_density"], densities, atol=1e-3)
    assert int(state.step) == 1


def test_training_lowers_the_loss():
    _, state, step = setup()
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH, 0.02)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_step_without_branch_is_the_step_at_an_empty_mask():
    _, state, step = setup()
    linear_model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32, attention="linear_angular")
    optimizer = make_optimizer(default_config().optimizer, optax.constant_schedule(1e-3))
    expected, _ = make_train_step(linear_model, optimizer, label_smoothing=0.1)(jax.tree.map(jnp.copy, state), BATCH, 0)
    castled, metrics = step(state, BATCH, 1.0)
    chex.assert_trees_all_close(castled.params, expected.params, rtol=1e-6)
    np.testing.assert_array_equal(metrics["mask_density"], [0])


@pytest.mark.parametrize("threshold", [0.02, 1.0])
def test_two_runs_give_the_same_bits(threshold):
    digests = set()
    for _ in range(2):
        _, state, step = setup(drop_path_rate=0.5, depth=2)
        for _ in range(3):
            state, _ = step(state, BATCH, threshold)
        digests.add(parameters_sha256(state.params))
    assert len(digests) == 1


def test_drop_path_draws_anew_each_step():
    _, state, step = setup(drop_path_rate=0.9, depth=2)
    frozen = jax.tree.map(jnp.copy, state.params)
    losses = []
    for _ in range(4):
        state, metrics = step(dataclasses.replace(state, params=jax.tree.map(jnp.copy, frozen)), BATCH, 1.0)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) > 1


ONE_STAGE = {"embed_dim": (8,), "depth": (1,), "num_heads": (2,)}


@pytest.mark.parametrize("arguments", [ONE_STAGE, pytest.param({}, marks=pytest.mark.slow)])
def test_a_model_with_batch_norm_learns_its_statistics_too(arguments):
    model = small.small_levit(distilled=True, num_classes=10, **arguments)
    variables = small.random_variables(model)
    optimizer = optax.sgd(1e-2)
    state = create_state(jax.tree.map(jnp.copy, variables), optimizer, seed=0)
    batch = {"image": small.random_images(3, 112, 112), "label": jnp.array([3, 1, 4])}
    state, metrics = make_train_step(model, optimizer, label_smoothing=0.1)(state, batch, 0.035)
    # With momentum 0.9 the statistics are known by hand: those of the first convolution's output.
    kernel = np.asarray(variables["params"]["stem"]["conv1"]["linear"]["kernel"], np.float64)
    padded = np.pad(np.asarray(batch["image"], np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    mean = np.einsum("byxirc,rcio->o", windows, kernel) / windows[..., 0, 0, 0].size
    expected = 0.9 * variables["batch_stats"]["stem"]["conv1"]["bn"]["mean"] + 0.1 * mean
    np.testing.assert_allclose(state.batch_stats["stem"]["conv1"]["bn"]["mean"], expected, rtol=0, atol=1e-6)
    chex.assert_tree_all_finite((state.params, state.batch_stats, metrics))
    chex.assert_trees_all_equal_structs(state.variables, variables)
    # The step's gradient reaches every parameter, and every statistic moves; but the shifts of what a residual goes by,
    # which the batch norms behind take away.
    shifts = ("conv4/bn/bias", "proj/ln/bn/bias", "ln2/bn/bias")
    for path, leaf in flatten(state.variables).items():
        assert path.endswith(shifts) or np.any(leaf != flatten(variables)[path]), path
    assert int(state.step) == 1
