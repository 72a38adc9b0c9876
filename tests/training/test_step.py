import dataclasses
import functools
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx

from castling_jax.models.registry import create_model
from castling_jax.models.variables import apply, bind, flatten, get_variables
from castling_jax.tasks.classification.losses import cross_entropy
from castling_jax.tasks.classification.task import Classification
from castling_jax.tasks.task import Teacher
from castling_jax.training.config import default_config
from castling_jax.training.optimizers import make_optimizer
from castling_jax.training.state import create_state, parameters_sha256
from castling_jax.training.step import make_train_step
from tests.models import small

BATCH = {
    "image": jax.random.normal(jax.random.key(1), (6, 8, 8, 3)),
    "label": jnp.array([0, 1, 2, 3, 4, 5]),
}
TASK = Classification(num_classes=10, label_smoothing=0.1)


def setup(options=MappingProxyType({}), ema=False, **arguments):
    model = create_model("deit_micro", num_classes=10, **{"depth": 1, "embed_dim": 32} | arguments)
    optimizer = make_optimizer(default_config().optimizer, optax.constant_schedule(1e-3))
    state = create_state(jax.tree.map(jnp.copy, get_variables(model)), optimizer, seed=0, ema=ema)
    options = dict(options)
    task = dataclasses.replace(TASK, teacher=options.pop("teacher", None))
    return model, state, make_train_step(model, optimizer, task, **options)


def smoothed(labels):
    return 0.9 * jax.nn.one_hot(labels, 10) + 0.01


def test_loss_is_that_of_the_forward_pass():
    model, state, step = setup()
    logits, densities = apply(model, get_variables(model), BATCH["image"], mask_threshold=0.05, return_densities=True)
    expected = cross_entropy(logits, smoothed(BATCH["label"])).mean()
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
    expected, _ = make_train_step(linear_model, optimizer, TASK)(jax.tree.map(jnp.copy, state), BATCH, 0)
    castled, metrics = step(state, BATCH, 1.0)
    chex.assert_trees_all_close(castled.params, expected.params, rtol=1e-6)
    np.testing.assert_array_equal(metrics["mask_density"], [0])


@pytest.mark.parametrize("threshold", [0.02, pytest.param(1.0, marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    _, state, whole = setup()
    _, same, parts = setup({"accumulate_steps": 3})
    expected, expected_metrics = whole(state, BATCH, 0.02)
    found, metrics = parts(same, BATCH, 0.02)
    # Means of means: other sums of float32. Adam's first step is a sign, which a gradient of nothing but rounding
    # turns, so the moments are compared.
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
    chex.assert_trees_all_close(found.opt_state[0].mu, expected.opt_state[0].mu, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["deit", pytest.param("levit", marks=pytest.mark.slow)])
def test_moving_averages_follow_all_variables(family):
    if family == "deit":
        _, state, step = setup({"ema_decay": 0.75}, ema=True)
        batch = BATCH
    else:
        model = small.small_levit(num_classes=10, **ONE_STAGE)
        optimizer = optax.sgd(1e-2)
        state = create_state(jax.tree.map(jnp.copy, small.random_variables(model)), optimizer, seed=0, ema=True)
        step = make_train_step(model, optimizer, TASK, ema_decay=0.75)
        batch = {"image": small.random_images(3, 112, 112), "label": jnp.array([3, 1, 4])}
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.ema)
    for _ in range(3):
        state, _ = step(state, batch, 0.02)
        new = {name: state.variables[name] for name in state.ema}
        expected = jax.tree.map(lambda mean, value: 0.75 * mean + 0.25 * value, expected, new)
    assert state.ema.keys() == ({"params"} if family == "deit" else {"params", "batch_stats"})
    chex.assert_trees_all_close(state.ema, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-7)
    assert state.weights["averaged"] is state.ema


def moved(mean, new, *, share):
    return (1 - share) * mean + share * new


def test_warmed_up_averages_soon_leave_the_initial_weights_behind():
    _, state, step = setup({"ema_decay": 0.99996, "ema_warmup": True}, ema=True)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for k in range(4):
        state, _ = step(state, BATCH, 0.02)
        share = 1 - min(0.99996, (1 + k) / (10 + k))
        expected = jax.tree.map(functools.partial(moved, share=share), expected, state.params)
    chex.assert_trees_all_close(state.ema["params"], jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-7)
    # Far on it is the decay itself, to float32's rounding: 1 - 0.99996 in float32 would be off by a thousandth.
    state = dataclasses.replace(state, step=jnp.int32(10_000_000), ema=jax.tree.map(jnp.zeros_like, state.ema))
    state, _ = step(state, BATCH, 0.02)
    chex.assert_trees_all_close(state.ema["params"], jax.tree.map(lambda value: 4e-5 * value, state.params), rtol=1e-5)


@pytest.mark.parametrize("fault", ["image", pytest.param("gradient", marks=pytest.mark.slow)])
@pytest.mark.parametrize("threshold", [pytest.param(0.02, marks=pytest.mark.slow), 1.0])
def test_a_step_that_is_not_finite_can_be_skipped(fault, threshold):
    _, state, step = setup({"ema_decay": 0.9, "skip_nonfinite": True}, ema=True)
    _, same, plain = setup({"ema_decay": 0.9}, ema=True)
    state, _ = step(state, BATCH, threshold)
    same, _ = plain(same, BATCH, threshold)
    # One program picks from two states, so that it may fuse other sums.
    chex.assert_trees_all_close(state.ema, same.ema, rtol=1e-5, atol=1e-7)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    batch = dict(BATCH)
    if fault == "image":
        batch["image"] = BATCH["image"].at[0, 0, 0, 0].set(jnp.inf)
    else:  # the loss is finite, and the gradients' norm beyond float32
        kernel = state.params["head"]["kernel"]
        huge = {**state.params, "head": {**state.params["head"], "kernel": kernel + 1e25 * jnp.eye(*kernel.shape)}}
        state = dataclasses.replace(state, params=huge)
        before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    state, metrics = step(state, batch, threshold)
    assert np.isfinite(metrics["loss"]) == (fault == "gradient")
    assert not np.isfinite(metrics["gradient_norm"])
    chex.assert_trees_all_equal((state.params, state.opt_state, state.ema), before)
    assert int(state.step) == 2
    assert state.skipped_steps == 1


@pytest.mark.slow
def test_batch_norms_statistics_are_skipped_too():
    model = small.small_levit(num_classes=10, **ONE_STAGE)
    optimizer = optax.sgd(1e-2)
    state = create_state(jax.tree.map(jnp.copy, small.random_variables(model)), optimizer, seed=0)
    before = jax.tree.map(np.asarray, state.variables)
    step = make_train_step(model, optimizer, TASK, skip_nonfinite=True)
    images = small.random_images(3, 112, 112).at[0, 0, 0, 0].set(jnp.nan)
    state, _ = step(state, {"image": images, "label": jnp.array([3, 1, 4])}, 1.0)
    chex.assert_trees_all_equal(state.variables, before)
    assert int(state.step) == 1


@pytest.mark.parametrize("kind", ["hard", pytest.param("soft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("distilled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_teacher_is_learnt_from_by_the_last_head(kind, distilled):
    teacher_model = create_model("deit_micro", attention="softmax", num_classes=10, depth=1, rngs=nnx.Rngs(5))
    variables = get_variables(teacher_model)
    teacher = Teacher(teacher_model, variables, kind=kind, alpha=0.3, temperature=2.0)
    model, state, step = setup({"teacher": teacher}, distilled=distilled)
    heads, _ = bind(model, get_variables(model)).head_logits(BATCH["image"], mask_threshold=0.0)
    taught = np.asarray(apply(teacher_model, variables, BATCH["image"]), np.float64)
    student = np.asarray(heads[-1], np.float64)
    if kind == "hard":
        other = -scipy.special.log_softmax(student, axis=-1)[np.arange(6), taught.argmax(-1)]
    else:
        p, q = scipy.special.softmax(taught / 2, axis=-1), scipy.special.softmax(student / 2, axis=-1)
        other = 4 * scipy.special.rel_entr(p, q).sum(-1)
    own = -(smoothed(BATCH["label"]) * scipy.special.log_softmax(np.asarray(heads[0], np.float64), axis=-1)).sum(-1)
    _, metrics = step(state, BATCH, 0.0)
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(0.7 * own + 0.3 * other)), rel=1e-5)


ONE_STAGE = {"embed_dim": (8,), "depth": (1,), "num_heads": (2,)}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [ONE_STAGE, {}])
def test_a_model_with_batch_norm_learns_its_statistics_too(arguments):
    model = small.small_levit(distilled=True, num_classes=10, **arguments)
    variables = small.random_variables(model)
    optimizer = optax.sgd(1e-2)
    state = create_state(jax.tree.map(jnp.copy, variables), optimizer, seed=0)
    batch = {"image": small.random_images(3, 112, 112), "label": jnp.array([3, 1, 4])}
    state, metrics = make_train_step(model, optimizer, TASK)(state, batch, 0.035)
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


class WeighedTask(Classification):
    """A loss of two terms over a sum of weights that depends on the model's outputs, as a detector's does."""

    def loss(self, outputs, batch, held):
        logits = outputs.mean(axis=0)
        distances = ((logits - batch["target"]) ** 2).sum(-1)
        weights = jax.lax.stop_gradient(self.scale * (1 + jnp.abs(logits[:, 0])))
        return {"near": distances, "small": 0.1 * (logits**2).sum(-1)}, weights

    scale = 3.0


class NearlyNothing(WeighedTask):
    scale = 1e-3  # the weights of a batch of six sum to less than 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WeighedTask, NearlyNothing])
def test_a_loss_is_divided_once_by_the_weights_of_the_whole_batch(kind):
    task = kind(num_classes=10)
    model = create_model("deit_micro", num_classes=10, depth=1, embed_dim=32, attention="linear_angular")
    variables = get_variables(model)

    def expected_loss(params):
        logits = apply(model, {"params": params}, BATCH["image"])
        weights = kind.scale * (1 + np.abs(np.asarray(apply(model, variables, BATCH["image"])[:, 0])))
        distances = jnp.sum((logits - jax.nn.one_hot(BATCH["label"], 10)) ** 2)
        return (distances + 0.1 * jnp.sum(logits**2)) / max(weights.sum(), 1)

    loss, gradients = jax.value_and_grad(expected_loss)(variables["params"])
    for parts in (1, 3):
        optimizer = optax.sgd(1.0)  # what the parameters lose is the gradient
        state = create_state(jax.tree.map(jnp.copy, variables), optimizer, seed=0)
        state, metrics = make_train_step(model, optimizer, task, accumulate_steps=parts)(state, BATCH, 1.0)
        # Sums of six and of three times two float32 numbers.
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics["near_loss"] + metrics["small_loss"]) == pytest.approx(float(loss), rel=1e-5)
        found = jax.tree.map(jnp.subtract, variables["params"], state.params)
        chex.assert_trees_all_close(found, gradients, rtol=1e-3, atol=1e-5)
