"""mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) of a batch, on the device.

As in the "batch" mode of timm's Mixup, one weight and one box serve the whole batch, or each `mix_rows` of its rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from castling_jax.ops.mesh import mesh_in_use

Images = Float[Array, "batch height width channels"]
Targets = Float[Array, "batch classes"]
# Partners are in one group of so many images: larger than the usual number of repeats of an image, and small enough to
# be on one device.
GROUP = 16


def soft_labels(labels: Int[Array, "batch"], num_classes: int, label_smoothing: float = 0.0) -> Targets:
    """One-hot labels, float32; the share `label_smoothing` of each is spread evenly over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def mix(
    images: Images,
    labels: Int[Array, "batch"],
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    probability: float,
    num_classes: int,
    label_smoothing: float = 0.0,
    mix_rows: int | None = None,
) -> tuple[Images, Targets]:
    """Mixes every image with its partner in the batch, and their labels by the same weights.

    The result depends on the key and on the whole batch alone, not on the mesh. Partners are close together: if every
    device has a multiple of 16 images, no images are exchanged between devices. But they are far enough apart not to be
    repeats of the same image.

    Args:
      images: images in any units; mixing is linear.
      labels: each image's class.
      key: this step's random key.
      mixup: alpha of mixup's weight, which is drawn from Beta(alpha, alpha); 0 turns mixup off.
      cutmix: alpha of CutMix's weight, before its box is cut off at the image's border; 0 turns CutMix off.
      switch: probability of CutMix rather than mixup, if both are on.
      probability: probability that a batch is mixed at all.
      num_classes: number of classes.
      label_smoothing: share of each label that is spread over all classes.
      mix_rows: number of rows that share one draw, a divisor of the batch; None, or more than the batch has, means all
        rows. The published recipes draw once in each process, so `mix_rows` is a process's share of the batch there.

    Returns:
      (images, targets): the mixed images in their dtype, and their float32 targets, which sum to one for each image.
    """
    targets = soft_labels(labels, num_classes, label_smoothing)
    if not mixup and not cutmix:
        return images, targets

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        """(is it CutMix, weight of the image itself rather than its partner, rows in the box, columns in the box)."""
        mixed_key, switch_key, weight_key, box_key = jax.random.split(key, 4)
        is_cutmix = jax.random.uniform(switch_key) < (switch if mixup and cutmix else float(cutmix > 0))
        alpha = jnp.where(is_cutmix, cutmix, mixup)
        weight = jax.random.beta(weight_key, alpha, alpha)
        # A batch that is not mixed has the weight 1, so the program has no branch.
        weight = jnp.where(jax.random.uniform(mixed_key) < probability, weight, 1.0)
        in_rows, in_columns = _box(box_key, weight, images.shape[1], images.shape[2])
        # The border may have cut the box: the label's weight is the area that really remains.
        remaining = 1.0 - jnp.mean(in_rows[:, None] * in_columns)
        return is_cutmix, jnp.where(is_cutmix, remaining, weight), in_rows, in_columns

    rows = min(mix_rows or len(images), len(images))
    # One draw uses the step's key itself; a split into one key would be another key.
    keys = key[None] if rows == len(images) else jax.random.split(key, len(images) // rows)
    draws = jax.vmap(draw)(keys)
    if len(keys) > 1:
        # Indexed, not repeated: XLA would shard repeated draws over the mesh like the rows, and the devices would wait
        # for each other in the loops that sample the beta distribution. This way each device makes all draws, which are
        # few.
        draws = tuple(drawn[np.arange(len(images)) // rows] for drawn in draws)
    is_cutmix, weight, in_rows, in_columns = draws
    weight = weight[:, None]
    outside = 1.0 - in_rows[:, :, None] * in_columns[:, None, :]
    # CutMix weighs each pixel by 0 or 1, mixup all pixels alike; so one formula mixes both.
    pixel_weight = jnp.where(is_cutmix[:, None, None], outside, weight[:, None])[..., None].astype(images.dtype)
    return mix_with_partners(images, pixel_weight), mix_with_partners(targets, weight)


def mix_with_partners(rows: Float[Array, "batch ..."], weight: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """weight * row + (1 - weight) * its partner, for each row.

    A row's partner is 8 rows on or 8 rows back, within groups of 16; if 16 does not divide the batch, it is the row in
    the same place of the reversed batch. Reversing a batch that is spread over a pod would move every image, which
    takes the links longer than the gradients do.
    """

    def mixed(row: Array, partner: Array, weight: Array) -> Array:
        return weight * row + (1 - weight) * partner

    if len(rows) % GROUP:
        return mixed(rows, rows[::-1], weight)
    by_half = rows.reshape(-1, 2, GROUP // 2, *rows.shape[1:])
    devices = max(mesh_in_use((rows,)).size, 1)
    if len(rows) % (GROUP * devices):  # a group may be on several devices
        return mixed(rows, by_half[:, ::-1].reshape(rows.shape), weight)
    # The same half by half, because XLA:TPU copies images to exchange them (docs/kernels.md).
    weights = jnp.broadcast_to(weight, (len(rows), *weight.shape[1:])).reshape(-1, 2, GROUP // 2, *weight.shape[1:])
    both = [mixed(by_half[:, half], by_half[:, 1 - half], weights[:, half]) for half in (0, 1)]
    return jnp.stack(both, axis=1).reshape(rows.shape)


def _box(
    key: jax.Array, weight: jax.Array, height: int, width: int
) -> tuple[Float[Array, "height"], Float[Array, "width"]]:
    """Rows and columns (1 inside, 0 outside) of a box with the image's aspect ratio and 1 - weight of its area.

    The box is cut off at the image's border.
    """
    share = jnp.sqrt(1 - weight)
    row_key, column_key = jax.random.split(key)
    return _interval(row_key, share, height), _interval(column_key, share, width)


def _interval(key: jax.Array, share: jax.Array, size: int) -> Float[Array, "size"]:
    """1 in an interval of `share * size` pixels around a random pixel; an odd length has its larger half after it."""
    length = (size * share).astype(jnp.int32)
    center = jax.random.randint(key, (), 0, size)
    pixel = jnp.arange(size)
    return ((pixel >= center - length // 2) & (pixel < center + (length + 1) // 2)).astype(jnp.float32)
