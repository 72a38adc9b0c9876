import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.dense import dense


def draw(*lead, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*lead, 6), (6, 4), (*lead, 4)))


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 3, 2)])
def test_product_and_gradients(monkeypatch, lead, dtype, platform):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    x, kernel, d_out = draw(*lead, dtype=dtype)
    out, pullback = jax.vjp(dense, x, kernel)
    d_x, d_kernel = pullback(d_out)
    wide_x, wide_kernel, wide_d = (np.asarray(array, np.float64) for array in (x, kernel, d_out))
    expected = {
        "out": (out, wide_x @ wide_kernel),
        "d_x": (d_x, wide_d @ wide_kernel.T),
        "d_kernel": (d_kernel, wide_x.reshape(-1, 6).T @ wide_d.reshape(-1, 4)),
    }
    for name, (found, exact) in expected.items():
        assert found.dtype == dtype
        # Sums of up to 12 products of numbers up to about 3, and the rounding of the result.
        bound = 40 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=bound, err_msg=name)


def test_second_derivatives_and_vmap():
    x, kernel, _ = draw(3, 5)

    def gradient(product, x, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel))), (0, 1))(x, kernel)

    def of(product):
        twice = jax.grad(lambda *arrays: sum(jnp.sum(part**2) for part in gradient(product, *arrays)), (0, 1))
        return twice(x, kernel), jax.vmap(functools.partial(gradient, product), (0, None))(x, kernel)

    # Both are sums of some tens of products of numbers of order one.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, of(dense), of(jnp.matmul))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    x, kernel, d_out = draw(4, 3)
    expected = jax.vjp(jnp.matmul, x, kernel)[1](d_out)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    with jax.set_mesh(mesh):
        x, d_out = jax.device_put((x, d_out), rows)
        found = jax.jit(lambda *arrays: jax.vjp(dense, *arrays[:2])[1](arrays[2]))(x, kernel, d_out)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_a_shard_map_that_tracks_varying_values():
    x, kernel, d_out = draw(4, 3)
    expected = jax.vjp(jnp.matmul, x, kernel)[1](d_out)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gradients = jax.shard_map(
        lambda x, kernel, d_out: jax.vjp(dense, x, kernel)[1](d_out),
        mesh=mesh,
        in_specs=(jax.P("data"), jax.P(), jax.P("data")),
        out_specs=(jax.P("data"), jax.P()),
    )
    found = jax.jit(gradients)(x, kernel, d_out)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
