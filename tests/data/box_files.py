"""Small data sets with boxes in COCO's and PASCAL VOC's files, written by the tests."""

import io
import json

import numpy as np
from PIL import Image

SIZES = [(60, 80), (50, 40), (64, 64), (30, 90)]  # of the images, (height, width)
NAMES = ("cat", "dog", "owl")


def jpeg(size, seed=0):
    """An image of a size, (height, width)."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size[::-1]).save(file, "JPEG")
    return file.getvalue()


def random_corners(size, count, rng):
    """So many boxes (x0, y0, x1, y1) inside an image, in whole pixels."""
    height, width = size
    across, down = (
        np.sort(np.array([rng.choice(side + 1, 2, replace=False) for _ in range(count)])) for side in (width, height)
    )
    return np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], -1).tolist()


def coco_content(*, counts=(3, 0, 2, 1), category_ids=(7, 2, 90), first_image=100, seed=0):
    """A file of COCO's, as a dict: images in falling order of their ids, annotations in any order."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": first_image - 3 * i, "file_name": f"{i:03}.jpg", "height": size[0], "width": size[1]}
        for i, size in enumerate(SIZES)
    ]
    annotations = []
    for image, size, count in zip(images, SIZES, counts, strict=True):
        for x0, y0, x1, y1 in random_corners(size, count, rng) if count else []:
            annotations.append(
                {
                    "id": len(annotations) + 1000,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": [x0 + 0.25, y0, x1 - x0 - 0.25, y1 - y0],
                    "area": 0.5 * (x1 - x0) * (y1 - y0),
                    "iscrowd": int(rng.random() < 0.3),
                    "segmentation": [[0.0] * 8],
                }
            )
    rng.shuffle(annotations)
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root, split="train2017", content=None):
    """Writes a split's file of annotations and its images."""
    content = coco_content() if content is None else content
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for number, image in enumerate(content["images"]):
        (root / split / image["file_name"]).write_bytes(jpeg(SIZES[number % len(SIZES)], number))
    return root


OBJECT = """
  <object>
    <name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>
    <bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>"""


def voc_file(size, objects):
    """A file of VOC's, of objects (name, difficult, xmin, ymin, xmax, ymax)."""
    listed = "".join(OBJECT.format(*one) for one in objects)
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>wrong.png</filename>{shape}{listed}\n</annotation>"


def write_voc(root, splits=None, seed=0):
    """Writes images 0 to 3, each with as many objects as its number, and the lists of the splits."""
    rng = np.random.default_rng(seed)
    splits = splits or {"train": (0, 2, 3), "val": (1,)}
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate(SIZES):
        corners = random_corners(size, number, rng) if number else []
        objects = [(rng.choice(NAMES), int(rng.random() < 0.3), *one) for one in corners]
        (root / "Annotations" / f"image {number}.xml").write_text(voc_file(size, objects))
        (root / "JPEGImages" / f"image {number}.jpg").write_bytes(jpeg(size, number))
    for split, numbers in splits.items():
        lines = "".join(f"image {number}\n" for number in numbers)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines + "\n")
    return root
