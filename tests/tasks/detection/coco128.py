"""The first 128 images of COCO, whose YOLO labels become COCO's files."""

import json

from PIL import Image

from tests.shared_data import unpack


def write_coco128(root, folder, *, count=128, **splits):
    """Writes ROOT/annotations and ROOT/SPLIT for each split, a slice of the first `count` images; skips without data.

    A class has YOLO's number + 1 as its id, and that as its name. Areas are those of the boxes.

    Args:
      root: the data set's root.
      folder: where the archive is unpacked.
      count: number of images.
      **splits: name -> the split's slice of the images.
    """
    source = unpack("coco128.tar", folder) / "coco128"
    files = sorted((source / "images" / "train2017").iterdir())[:count]
    (root / "annotations").mkdir(parents=True)
    for split, part in splits.items():
        (root / split).symlink_to(source / "images" / "train2017")
        images, annotations = [], []
        for file in files[part]:
            width, height = Image.open(file).size
            images.append({"id": int(file.stem), "file_name": file.name, "width": width, "height": height})
            labels = source / "object_detection" / "labels" / "train2017" / f"{file.stem}.txt"
            for line in labels.read_text().splitlines() if labels.exists() else ():
                number, *center_and_size = line.split()
                x, y, w, h = (
                    float(share) * side for share, side in zip(center_and_size, (width, height) * 2, strict=True)
                )
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": int(file.stem),
                        "category_id": int(number) + 1,
                        "bbox": [x - w / 2, y - h / 2, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
        found = sorted({annotation["category_id"] for annotation in annotations})
        categories = [{"id": number, "name": f"class {number}"} for number in found]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
