import jax
import jax.numpy as jnp
import numpy as np
import pytest

from castling_jax.ops.patches import convolve_patches

FORMAT = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def convolve(images, kernel):
    return convolve_patches(images, kernel, kernel.shape[:2], "VALID", dimension_numbers=FORMAT)


@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_a_patch_is_a_product_with_the_kernel(monkeypatch, platform):
    """And so are both gradients."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[platform](*arguments))
    rng = np.random.default_rng(0)
    images, kernel, d_out = (rng.normal(size=size) for size in ((2, 6, 12, 3), (2, 4, 3, 5), (2, 3, 3, 5)))
    out, pullback = jax.vjp(convolve, jnp.float32(images), jnp.float32(kernel))
    expected, *d_expected = np.empty((2, 3, 3, 5)), np.empty_like(images), np.zeros_like(kernel)
    for row in range(3):
        for column in range(3):
            place = slice(2 * row, 2 * row + 2), slice(4 * column, 4 * column + 4)
            of_patch = d_out[:, row, column]
            expected[:, row, column] = np.tensordot(images[:, *place], kernel, 3)
            d_expected[0][:, *place] = np.tensordot(of_patch, kernel, (1, 3))
            d_expected[1] += np.tensordot(images[:, *place], of_patch, (0, 0))
    # Sums of up to 24 products of numbers up to about 3.
    for found, exact in zip((out, *pullback(jnp.float32(d_out))), (expected, *d_expected), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


def test_a_tpu_multiplies_and_a_mesh_with_explicit_axes_convolves():
    images, kernel = jnp.ones((4, 4, 4, 3)), jnp.ones((2, 2, 3, 5))

    def text(**sharding):
        traced = jax.jit(convolve).trace(jax.device_put(images, **sharding), kernel)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    assert "stablehlo.convolution" not in text()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert "stablehlo.convolution" in text(device=jax.NamedSharding(mesh, jax.P("data")))
