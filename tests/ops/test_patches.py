import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.patches import convolve_patches

FORMAT = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def convolve(images, kernel, **options):
    return convolve_patches(images, kernel, kernel.shape[:2], "VALID", dimension_numbers=FORMAT, **options)


@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_a_patch_is_a_product_with_the_kernel(monkeypatch, platform):
    """And both gradients are such products, whatever computes the patches."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    rng = np.random.default_rng(0)
    images, kernel, d_out = (rng.normal(size=size) for size in ((2, 6, 12, 3), (2, 4, 3, 5), (2, 3, 3, 5)))
    out = convolve(jnp.float32(images), jnp.float32(kernel))
    differentiated, pullback = jax.vjp(convolve, jnp.float32(images), jnp.float32(kernel))
    expected, *d_expected = np.empty((2, 3, 3, 5)), np.empty_like(images), np.zeros_like(kernel)
    for row in range(3):
        for column in range(3):
            place = slice(2 * row, 2 * row + 2), slice(4 * column, 4 * column + 4)
            of_patch = d_out[:, row, column]
            expected[:, row, column] = np.tensordot(images[:, *place], kernel, 3)
            d_expected[0][:, *place] = np.tensordot(of_patch, kernel, (1, 3))
            d_expected[1] += np.tensordot(images[:, *place], of_patch, (0, 0))
    # Sums of up to 24 products of numbers up to about 3.
    found_and_exact = zip(pullback(jnp.float32(d_out)), d_expected, strict=True)
    for found, exact in ((out, expected), (differentiated, expected), *found_and_exact):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


def test_a_tpu_multiplies_but_for_gradients_and_on_explicit_axes():
    images, kernel = jnp.ones((4, 4, 4, 3)), jnp.ones((2, 2, 3, 5))

    def text(function=convolve, **sharding):
        traced = jax.jit(function).trace(jax.device_put(images, **sharding), kernel)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    assert "stablehlo.convolution" not in text()
    assert "HIGHEST" in text(functools.partial(convolve, precision="highest"))
    assert "stablehlo.dot_general" not in text(jax.grad(lambda images, kernel: jnp.sum(convolve(images, kernel)), 1))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert "stablehlo.convolution" in text(device=jax.NamedSharding(mesh, jax.P("data")))
