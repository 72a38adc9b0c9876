"""The size of an image: pixels a side, or (height, width)."""

ImageSize = int | tuple[int, int]


def image_shape(image_size: ImageSize) -> tuple[int, int]:
    """(height, width) in pixels."""
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


def size_text(image_size: ImageSize) -> str:
    """The size as a person reads it: "224 pixels" or "320 x 416 pixels"."""
    return f"{image_size} pixels" if isinstance(image_size, int) else f"{image_size[0]} x {image_size[1]} pixels"
