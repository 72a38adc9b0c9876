"""mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) of a batch, on the device.

As timm's Mixup does in its "batch" mode: one weight and one box for a batch, or for each `mix_rows` rows of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Images = Float[Array, "batch height width channels"]
Targets = Float[Array, "batch classes"]
GROUP = 16  # images among which partners are: more than are augmented repeatedly, and few enough to be on one device


def soft_labels(labels: Int[Array, "batch"], num_classes: int, label_smoothing: float = 0.0) -> Targets:
    """One-hot labels of which the share `label_smoothing` is spread evenly over all classes; float32."""
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

    What a step does is a function of the key and of the whole batch, whatever the mesh. Partners are near each other,
    so that on a mesh where a device has a multiple of 16 images none are exchanged; and not so near that they would be
    the same image, augmented repeatedly.

    Args:
      images: in any units; mixing is linear.
      labels: their classes.
      key: of this step.
      mixup: alpha of mixup's weight, Beta(alpha, alpha); 0 is no mixup.
      cutmix: alpha of CutMix's, before its box is cut off at the image's border; 0 is no CutMix.
      switch: probability of CutMix rather than mixup, where there are both.
      probability: of a batch to be mixed at all.
      num_classes: of the labels.
      label_smoothing: share of each label that is spread over all classes.
      mix_rows: rows that share one draw, a divisor of the batch; None, or more than the batch has, is all of them. The
        published recipes draw once a process, so once for each process' rows.

    Returns:
      The images, in their dtype, and what they are to be told to be, float32; of each, the targets sum to one.
    """
    targets = soft_labels(labels, num_classes, label_smoothing)
    if not mixup and not cutmix:
        return images, targets

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        """Whether it is CutMix, the own weight, and which rows and columns of pixels are in the box."""
        mixed_key, switch_key, weight_key, box_key = jax.random.split(key, 4)
        is_cutmix = jax.random.uniform(switch_key) < (switch if mixup and cutmix else float(cutmix > 0))
        alpha = jnp.where(is_cutmix, cutmix, mixup)
        weight = jax.random.beta(weight_key, alpha, alpha)
        weight = jnp.where(jax.random.uniform(mixed_key) < probability, weight, 1.0)
        in_rows, in_columns = _box(box_key, weight, images.shape[1], images.shape[2])
        # CutMix's weight is the area that was in fact left.
        left = 1.0 - jnp.mean(in_rows[:, None] * in_columns)
        return is_cutmix, jnp.where(is_cutmix, left, weight), in_rows, in_columns

    rows = min(mix_rows or len(images), len(images))
    keys = key[None] if rows == len(images) else jax.random.split(key, len(images) // rows)
    # Looked up, not repeated: XLA would split the draws over a mesh like the repeated rows, and devices would then wait
    # for one another in the loops of the beta distribution. So each makes all draws, which are few.
    draw_of_row = np.arange(len(images)) // rows
    is_cutmix, weight, in_rows, in_columns = (drawn[draw_of_row] for drawn in jax.vmap(draw)(keys))
    weight = weight[:, None]
    outside = 1.0 - in_rows[:, :, None] * in_columns[:, None, :]
    own = jnp.where(is_cutmix[:, None, None], outside, weight[:, None])[..., None].astype(images.dtype)
    mixed = own * images + (1 - own) * partners(images)
    return mixed, weight * targets + (1 - weight) * partners(targets)


def partners(rows: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Rows in the order of their partners: 8 further on or back, in pairs; from the batch's end if 16 do not divide it.

    Over a whole batch that is spread over a pod, what is exchanged would take the links longer than gradients do.
    """
    if len(rows) % GROUP:
        return rows[::-1]
    return rows.reshape(-1, 2, GROUP // 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def _box(
    key: jax.Array, weight: jax.Array, height: int, width: int
) -> tuple[Float[Array, "height"], Float[Array, "width"]]:
    """1 at the rows and the columns of a box of the image's shape and 1 - weight of its area, cut off at the border."""
    share = jnp.sqrt(1 - weight)
    row_key, column_key = jax.random.split(key)
    return _interval(row_key, share, height), _interval(column_key, share, width)


def _interval(key: jax.Array, share: jax.Array, size: int) -> Float[Array, "size"]:
    """1 within `share` of the size around a random pixel, the larger half of what is odd behind it."""
    length = (size * share).astype(jnp.int32)
    center = jax.random.randint(key, (), 0, size)
    pixel = jnp.arange(size)
    return ((pixel >= center - length // 2) & (pixel < center + (length + 1) // 2)).astype(jnp.float32)
