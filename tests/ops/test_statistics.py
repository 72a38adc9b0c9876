import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.statistics import Statistics, channel_statistics, dense_with_statistics

WIDTHS = (6, 4, 8)


def draw(*lead, dtype=jnp.float32):
    """x, kernels, and gradients of the results and of their statistics."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, (*lead, 5))
    kernels = [rng.normal(size=(5, width)) for width in WIDTHS]
    d_parts = [rng.normal(size=(*lead, width)) for width in WIDTHS]
    d_statistics = Statistics(*(np.float32(10 * rng.normal(size=sum(WIDTHS))) for _ in range(2)))
    return *jax.tree.map(lambda array: jnp.asarray(array, dtype), (x, kernels, d_parts)), d_statistics


def weighted_results(x, kernels, d_parts, d_statistics):
    """The sum of all results times their gradients, in NumPy's float64."""
    parts = [x @ kernel for kernel in kernels]
    channels = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts], 1)
    total = sum(np.sum(part * d_part) for part, d_part in zip(parts, d_parts, strict=True))
    return total + channels.mean(0) @ d_statistics.mean + (channels**2).mean(0) @ d_statistics.mean_square


@pytest.mark.parametrize("platform", ["tpu", "default"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (2, 9), (2, 3, 2)])
def test_gradients_are_central_differences(monkeypatch, lead, dtype, platform):
    """The results' weighted sum is a polynomial of degree 2 in x, and in the kernels: central differences are exact."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, **forms: forms.get(platform, forms["default"])(*arguments)
    )
    x, kernels, *d_results = draw(*lead, dtype=dtype)
    (parts, statistics), pullback = jax.vjp(dense_with_statistics, x, kernels)
    jax.tree.map(np.testing.assert_array_equal, statistics, channel_statistics(parts))
    gradients = pullback((d_results[0], d_results[1]))
    assert jax.tree.map(lambda array: array.dtype, gradients) == jax.tree.map(lambda array: array.dtype, (x, kernels))
    wide_x, wide_kernels, *wide_d = jax.tree.map(lambda array: np.asarray(array, np.float64), (x, kernels, *d_results))
    of_x, of_kernels = jax.tree.map(lambda array: np.asarray(array, np.float64), gradients)
    rng = np.random.default_rng(1)
    for _ in range(5):
        along_x, *along = (rng.normal(size=array.shape) for array in (wide_x, *wide_kernels))
        for found, there, back in (
            (np.sum(of_x * along_x), (wide_x + along_x, wide_kernels), (wide_x - along_x, wide_kernels)),
            (
                sum(np.sum(one * way) for one, way in zip(of_kernels, along, strict=True)),
                (wide_x, [kernel + way for kernel, way in zip(wide_kernels, along, strict=True)]),
                (wide_x, [kernel - way for kernel, way in zip(wide_kernels, along, strict=True)]),
            ),
        ):
            exact = (weighted_results(*there, *wide_d) - weighted_results(*back, *wide_d)) / 2
            # Each gradient is a sum of up to 100 numbers of up to about 10, and so is the sum along the direction.
            assert abs(found - exact) <= 100 * float(jnp.finfo(dtype).eps) * np.sqrt(found**2 + 10**2)


@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_bfloat16_is_as_exact_where_the_gradients_terms_cancel(monkeypatch, platform):
    """Batch norm's gradient, from x with a mean of three deviations and an upstream gradient with a mean of one."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *array, **forms: forms.get(platform, forms["default"])(*array)
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 1, (3136, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(16, 8)) / 4, jnp.bfloat16)
    upstream = rng.normal(1, 1, (3136, 8))

    def normalised(x, kernel):
        (y,), statistics = dense_with_statistics(x, [kernel])
        deviation = jnp.sqrt(statistics.mean_square - statistics.mean**2)
        return jnp.sum((y.astype(jnp.float32) - statistics.mean) / deviation * upstream)

    found = jax.grad(normalised, (0, 1))(x, kernel)
    # The same in float64: y - mean and the gradient have the directions of the ones and of y removed.
    wide_x, wide_kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = wide_x @ wide_kernel
    deviation, hat = y.std(0), (y - y.mean(0)) / y.std(0)
    d_y = (upstream - upstream.mean(0) - hat * (hat * upstream).mean(0)) / deviation
    for name, one, exact in zip(["x", "kernel"], found, (d_y @ wide_kernel.T, wide_x.T @ d_y), strict=True):
        share = np.linalg.norm(np.asarray(one, np.float64) - exact) / np.linalg.norm(exact)
        # JAX's own rounds d_y to bfloat16, 2^-9 of a mean that x then multiplies; ours sums in float32.
        assert share < (0.1 if platform == "default" else 0.015), (name, share)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    x, kernels, *d_results = draw(4, 3)

    def gradients(x, kernels, d_parts, d_statistics):
        return jax.vjp(dense_with_statistics, x, kernels)[1]((d_parts, d_statistics))

    expected = gradients(x, kernels, *d_results)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    with jax.set_mesh(mesh):
        x, d_parts = jax.device_put((x, d_results[0]), jax.NamedSharding(mesh, jax.P("data")))
        found = jax.jit(gradients)(x, kernels, d_parts, d_results[1])
    # Sums of 12 products of numbers of up to about 10.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4), found, expected)


@pytest.mark.parametrize(("platform", "by_products"), [("tpu", True), ("cpu", False)])
def test_only_a_tpu_multiplies_x_with_itself(platform, by_products):
    x, kernels, *d_results = draw(4, 3)

    def gradients(x, kernels, d_parts, d_statistics):
        return jax.vjp(dense_with_statistics, x, kernels)[1]((d_parts, d_statistics))

    text = jax.jit(gradients).trace(x, kernels, *d_results).lower(lowering_platforms=(platform,)).as_text()
    assert ("tensor<5x5xf32>" in text) == ("HIGHEST" in text) == by_products


def test_in_a_shard_map():
    """Each device's gradient of the kernel that all share."""
    x, kernels, *_ = draw(4, 3)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(x, kernels):
        def total(kernels):
            parts, statistics = dense_with_statistics(x, kernels)
            return sum(jnp.sum(part**2) for part in parts) + jnp.sum(statistics.mean)

        return jax.lax.psum(jax.grad(total)(kernels), "data")

    found = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P()))(
        x, kernels
    )
    for one, kernel in zip(found, kernels, strict=True):
        expected = 2 * jnp.tensordot(x, x @ kernel, ((0, 1), (0, 1))) + jnp.mean(x, (0, 1))[:, None]
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-4)
