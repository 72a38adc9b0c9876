"""The first 128 images of COCO, whose YOLO labels become COCO's files."""

import json

from PIL import Image

from tests.shared_data import unpack


def write_coco128(root, folder, *, count, splits=("train", "val")):
    """Writes a data set of the `count` images with the largest smallest box; skips the test where there is no data.

    All splits have the same images. A class has YOLO's number + 1 as its id, and areas are those of the boxes.

    Args:
      root: the data set's root.
      folder: where the archive is unpacked.
      count: number of images.
      splits: names.
    """
    source = unpack("coco128.tar", folder) / "coco128"
    labels = source / "object_detection" / "labels" / "train2017"
    boxes = {file.stem: [line.split() for line in file.read_text().splitlines()] for file in labels.glob("*.txt")}
    smallest = {stem: min((float(w) * float(h) for *_, w, h in rows), default=0) for stem, rows in boxes.items()}
    images, annotations = [], []
    for stem in sorted(sorted(smallest), key=lambda stem: -smallest[stem])[:count]:
        width, height = Image.open(source / "images" / "train2017" / f"{stem}.jpg").size
        images.append({"id": int(stem), "file_name": f"{stem}.jpg", "width": width, "height": height})
        for number, *shares in boxes[stem]:
            x, y, w, h = (float(share) * side for share, side in zip(shares, (width, height) * 2, strict=True))
            annotation = {"id": len(annotations) + 1, "image_id": int(stem), "category_id": int(number) + 1}
            annotation |= {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h, "iscrowd": 0}
            annotations.append(annotation)
    categories = [
        {"id": number, "name": f"class {number}"} for number in sorted({one["category_id"] for one in annotations})
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir(parents=True)
    for split in splits:
        (root / split).symlink_to(source / "images" / "train2017")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
