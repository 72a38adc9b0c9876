"""Small data sets of masks, written by the tests."""

import io

import numpy as np
from PIL import Image

SIZES = [(24, 30), (20, 18), (32, 32), (16, 28)]  # of the images, (height, width)
NAMES = ("sky", "road", "car")
VOID = 11


def png(pixels, mode=None):
    """An encoded image of uint8 pixels; with the mode "P" they are indices into a palette."""
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, "L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    elif mode is not None:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def labels(size, seed=0, classes=3, void=VOID):
    """Blocks of 4 x 4 pixels, each of a class or, one in eight, of none."""
    rng = np.random.default_rng(seed)
    rows, columns = (-(-side // 4) for side in size)
    blocks = rng.integers(0, classes, (rows, columns)).astype(np.uint8)
    blocks[rng.random(blocks.shape) < 1 / 8] = void
    return blocks.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]


def picture(mask, seed=0):
    """An image that tells the classes of its mask: a colour for each, and noise."""
    colours = np.random.default_rng(7).integers(0, 200, (256, 3))
    noise = np.random.default_rng(seed).integers(0, 40, (*mask.shape, 3))
    return (colours[mask] + noise).astype(np.uint8)


def write_masks(root, split="train", *, sizes=SIZES, names=NAMES, void=VOID, seed=0):
    """Writes a split's images and masks, and the file of the classes' names unless `names` is None."""
    for folder in (root / split, root / f"{split}_labels"):
        folder.mkdir(parents=True)
    if names is not None:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    for number, size in enumerate(sizes):
        mask = labels(size, seed + number, void=void)
        (root / split / f"{number:03}.png").write_bytes(png(picture(mask, seed + number)))
        (root / f"{split}_labels" / f"{number:03}.png").write_bytes(png(mask, "P" if number % 2 else None))
    return root
