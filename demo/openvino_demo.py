#!/usr/bin/env python3
"""
Detect on photographs with OpenVINO, OpenCV and NumPy alone. Made to be copied.

    python tools/export_model.py --format openvino output/model_final.pth gfl.xml
    python demo/openvino_demo.py gfl.xml a.jpg b.jpg --output detected
"""

import argparse
import json
import os
import sys

import cv2
import numpy as np
import openvino


class Detector:
    def __init__(self, path):
        core = openvino.Core()
        model = core.read_model(path)
        has_info = model.has_rt_info("gfl_d2")
        self.info = json.loads(model.get_rt_info("gfl_d2").astype(str)) if has_info else {}
        # "bf16" takes half the time on processors that have it.
        self.model = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        if not self.info.get("nms") or self.info["input_format"] not in ("BGR", "RGB"):
            raise ValueError(f"{path} is no file of tools/export_model.py with NMS and colours")

    def __call__(self, image):
        """Boxes (D, 4) in pixels, x0, y0, x1, y1; scores (D,); labels (D,). Of a BGR image."""
        info, old = self.info, image.shape[:2]
        if info["size"]:  # as large as fits in
            scale = min(info["size"][0] / old[0], info["size"][1] / old[1])
        else:
            scale = min(info["min_size"] / min(old), info["max_size"] / max(old)) or 1
        height, width = (max(1, int(side * scale + 0.5)) for side in old)
        if info.get("resize_filter") == "opencv":
            pixels = cv2.resize(image, (width, height))
        else:
            pixels = resize(image, height, width)
        pixels = pixels if info["input_format"] == "BGR" else pixels[:, :, ::-1]
        step, least = info["size_divisibility"], info["min_side"]
        shape = info["size"] or [max(-(-side // step) * step, least) for side in (height, width)]
        images = np.zeros((1, 3, *shape), info["input_type"])  # with padding right and below
        images[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        inputs = {"images": images, "image_sizes": np.array([[height, width]])}
        outputs = self.model(inputs)
        boxes, scores, labels = (outputs[name] for name in ("boxes", "scores", "labels"))
        found = scores[0] > 0  # the file gives always as many
        boxes = boxes[0][found] * np.tile([old[1] / width, old[0] / height], 2)
        return boxes, scores[0][found], labels[0][found]


def resize(image, height, width):
    """As Pillow does in training. cv2.resize skips pixels where an image becomes smaller."""
    for axis, new in ((1, width), (0, height)):
        image = image.swapaxes(0, axis)
        old, parts = len(image), []
        for rows in np.array_split(np.arange(new), -(-new // 32)):
            distance = np.abs(np.arange(old) + 0.5 - (rows[:, None] + 0.5) * old / new)
            weights = np.maximum(1 - distance / max(1, old / new), 0)
            weights = np.rint(weights / weights.sum(1, keepdims=True) * 2**22) / 2**22
            used = np.flatnonzero(weights.any(0))
            near = slice(used[0], used[-1] + 1)
            part = np.tensordot(weights[:, near], image[near].astype(float), 1)
            parts.append((part + 0.5).astype(np.uint8))
        image = np.concatenate(parts).swapaxes(0, axis)
    return image


def main():
    parser = argparse.ArgumentParser(description="Detect on photographs.")
    parser.add_argument("model", help="a file of tools/export_model.py --format openvino")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--threshold", type=float, default=0.4, help="least score")
    parser.add_argument("--output", help="folder for pictures of what was found")
    args = parser.parse_args()
    try:
        detector = Detector(args.model)
    except Exception as error:  # OpenVINO has many
        sys.exit("Error: " + " ".join(str(error).split()))
    pictures = [os.path.join(args.output or "", os.path.basename(path)) for path in args.images]
    taken = {os.path.realpath(path) for path in args.images}
    for path in pictures if args.output else ():
        if os.path.realpath(path) in taken or not cv2.haveImageWriter(path):
            sys.exit(f"Error: {path} is one of the images, of two of them, or cannot be written")
        taken.add(os.path.realpath(path))
    names, status = detector.info["class_names"] or range(detector.info["num_classes"]), 0
    for path, picture in zip(args.images, pictures):
        image = cv2.imread(path)
        if image is None:
            print(f"{path} is no image that OpenCV reads", file=sys.stderr)
            status = 1
            continue
        for box, score, label in zip(*detector(image)):
            if score >= args.threshold:
                print(path, names[label], f"{score:.3f}", *(f"{side:.1f}" for side in box))
                corner, other = box[:2].astype(int).tolist(), box[2:].astype(int).tolist()
                cv2.rectangle(image, corner, other, (0, 200, 0), 2)
                text, place = f"{names[label]} {score:.2f}", (corner[0], max(corner[1], 12))
                cv2.putText(image, text, place, 0, 0.5, (0, 0, 200))
        if args.output:
            os.makedirs(args.output, exist_ok=True)
            cv2.imwrite(picture, image)
    sys.exit(status)


if __name__ == "__main__":
    main()
