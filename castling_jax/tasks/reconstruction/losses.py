"""The loss of a masked autoencoder (He et al., CVPR 2022, section 3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from castling_jax.models.mae import patches_of

EPSILON = 1e-6  # under the root of a patch's variance, as in the authors' code


def reconstruction_loss(
    reconstruction: Float[Array, "batch patches pixels"],
    mask: Float[Array, "batch patches"],
    images: Float[Array, "batch height width channels"],
    *,
    patch_size: int,
    normalize: bool,
) -> Float[Array, "batch"]:
    """Each image's squared error, averaged over a patch's pixels and then over the hidden patches.

    Args:
      reconstruction: the predicted pixels of each patch, in the order of `patches_of`.
      mask: 1 for a hidden patch, 0 for a visible one.
      images: the whole images.
      patch_size: side of a patch in pixels.
      normalize: whether the target is a patch with mean 0 and variance 1, `norm_pix_loss` in the authors' code.
    """
    targets = patches_of(images, patch_size)
    if normalize:
        mean, deviation = patch_statistics(targets)
        targets = (targets - mean) / deviation
    errors = jnp.mean(jnp.square(reconstruction - targets), axis=-1)
    return jnp.sum(errors * mask, axis=-1) / jnp.sum(mask, axis=-1)


def patch_statistics(
    patches: Float[Array, "batch patches pixels"],
) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Mean and standard deviation over each patch's pixels; the variance is the unbiased one."""
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return jnp.mean(patches, axis=-1, keepdims=True), jnp.sqrt(variance + EPSILON)


def paste(
    reconstruction: Float[Array, "batch patches pixels"],
    mask: Float[Array, "batch patches"],
    images: Float[Array, "batch height width channels"],
    *,
    patch_size: int,
    normalized: bool,
) -> Float[Array, "batch patches pixels"]:
    """The visible patches of the images, and the reconstruction in place of the hidden ones, in the images' units.

    A reconstruction of normalised patches gets the hidden patch's own mean and deviation back: it has no others.
    """
    patches = patches_of(images, patch_size)
    if normalized:
        mean, deviation = patch_statistics(patches)
        reconstruction = reconstruction * deviation + mean
    return jnp.where(mask[:, :, None] > 0, reconstruction, patches)
