#!/usr/bin/env python3
"""
Draw a small object detection dataset in COCO format: textured shapes of five classes, of very
different sizes, overlapping, some of them blurred, on cluttered backgrounds.

    python demo/make_dataset.py output/demo/data --seed 0 --train 600 --val 150

makes ``train.json``, ``val.json`` and the folders ``train`` and ``val``.

A class is a shape and prefers a hue; neighbouring classes share some hues. A box encloses the
*visible* part of its object: the pixels inside the picture that no later object covers. At least
half of every object can be seen, and every object is annotated.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

__all__ = ["CLASSES", "Scene", "draw_scene", "make_dataset"]

CLASSES = ("disc", "ring", "square", "triangle", "star")

# Sizes are for an image of this height, in pixels, and scale with it.
_REFERENCE_HEIGHT = 192
_MIN_RADIUS, _MAX_RADIUS = 12, 84
_MIN_OBJECTS, _MAX_OBJECTS = 2, 7
# At least this fraction of every object can be seen, in a box of at least this side in pixels.
_MIN_VISIBLE, _MIN_SIDE = 0.5, 6
# Mean difference between an object and what it covers, in the colour channel that differs most.
_MIN_CONTRAST = 60
_TRIES_PER_OBJECT = 20


@dataclass
class Scene:
    """A picture and what is in it."""

    # (H, W, 3), uint8, RGB.
    image: np.ndarray
    # (H, W), int16: index of the object seen at each pixel, -1 where there is none.
    owner: np.ndarray
    # Class index of each object.
    labels: list[int] = field(default_factory=list)

    def box(self, index: int) -> list[int]:
        """[x, y, width, height] of the visible part of an object, in pixels."""
        ys, xs = np.nonzero(self.owner == index)
        x, y = xs.min(), ys.min()
        return [int(v) for v in (x, y, xs.max() + 1 - x, ys.max() + 1 - y)]

    def area(self, index: int) -> int:
        """Visible area of an object in pixels."""
        return int((self.owner == index).sum())


@dataclass
class _Layer:
    """A square piece of a picture to be laid over it."""

    color: np.ndarray  # (S, S, 3), float32 in [0, 255]
    alpha: np.ndarray  # (S, S), float32 in [0, 1]
    label: int | None  # class index, None for a stick

    @property
    def solid(self) -> np.ndarray:
        """(S, S), bool: the pixels that it covers."""
        return self.alpha >= 0.5


def draw_scene(rng: np.random.Generator, width: int, height: int) -> Scene:
    """Draw a picture, ``width`` x ``height`` pixels. ``rng`` decides everything else."""
    scale = height / _REFERENCE_HEIGHT
    # Objects may stick out of the picture: it is cut out of a larger canvas at the end.
    margin = int(2 * _MAX_RADIUS * scale) + 4
    canvas = _draw_background(rng, width + 2 * margin, height + 2 * margin, scale)
    owner = np.full(canvas.shape[:2], -1, dtype=np.int16)
    window = (slice(margin, margin + height), slice(margin, margin + width))

    labels: list[int] = []
    full_areas: list[int] = []
    for _ in range(rng.integers(_MIN_OBJECTS, _MAX_OBJECTS + 1)):
        for _ in range(_TRIES_PER_OBJECT):
            layer = _draw_object(rng, scale) if rng.random() < 0.9 else _draw_stick(rng, scale)
            place = _choose_place(rng, layer, owner, window)
            index = -1 if layer.label is None else len(labels)
            areas = full_areas if layer.label is None else [*full_areas, layer.solid.sum()]
            covered = owner.copy()
            covered[place][layer.solid] = index
            if _stands_out(canvas[place], layer) and _is_visible(covered[window], areas):
                owner, full_areas = covered, areas
                labels += [] if layer.label is None else [layer.label]
                _composite(rng, canvas[place], layer)
                break

    image = canvas[window] + rng.normal(0, rng.uniform(1, 5), (height, width, 1))
    return Scene(image.clip(0, 255).astype(np.uint8), owner[window].copy(), labels)


def _stands_out(canvas: np.ndarray, layer: _Layer) -> bool:
    """Whether the colours of ``layer`` differ from those that it would cover."""
    difference = np.abs(layer.color - canvas).max(axis=2)
    return bool(difference[layer.solid].mean() >= _MIN_CONTRAST) if layer.solid.any() else False


def _is_visible(owner: np.ndarray, full_areas: list[int]) -> bool:
    """Whether enough can be seen of every object; ``full_areas`` are their areas uncovered."""
    for index, full_area in enumerate(full_areas):
        ys, xs = np.nonzero(owner == index)
        if len(ys) < max(_MIN_VISIBLE * full_area, 1):
            return False
        if min(np.ptp(ys), np.ptp(xs)) + 1 < _MIN_SIDE:
            return False
    return True


def _choose_place(
    rng: np.random.Generator, layer: _Layer, owner: np.ndarray, window: tuple[slice, slice]
) -> tuple[slice, slice]:
    """Where a layer goes on the canvas: anywhere, or near an object, to cover part of it."""
    side = len(layer.alpha)
    taken = np.argwhere(owner[window] >= 0)
    if len(taken) and rng.random() < 0.35:
        y, x = rng.choice(taken) + rng.integers(-side // 3, side // 3 + 1, 2)
        y, x = np.clip((y, x), 0, np.array(owner[window].shape) - 1)
    else:
        y, x = rng.integers(0, owner[window].shape)
    top, left = y + window[0].start - side // 2, x + window[1].start - side // 2
    return slice(top, top + side), slice(left, left + side)


def _composite(rng: np.random.Generator, canvas: np.ndarray, layer: _Layer) -> None:
    """Lay ``layer`` and its shadow over ``canvas``, which has the same size, in place."""
    reach = max(len(layer.alpha) // 16, 1)
    shift = np.float32([[1, 0, rng.integers(-reach, reach + 1)], [0, 1, reach]])
    shadow = cv2.warpAffine(layer.alpha, shift, layer.alpha.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), reach) * rng.uniform(0, 0.5)
    canvas *= 1 - shadow[..., None]
    canvas += layer.alpha[..., None] * (layer.color - canvas)


def _draw_object(rng: np.random.Generator, scale: float) -> _Layer:
    label = int(rng.integers(len(CLASSES)))
    # There are more small ones than large ones.
    radius = scale * rng.uniform(_MIN_RADIUS**0.5, _MAX_RADIUS**0.5) ** 2
    contours = _OUTLINES[CLASSES[label]](rng)
    squeeze = np.array([1, rng.uniform(0.75, 1)])
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    return _draw_layer(rng, [radius * (c * squeeze) @ turn for c in contours], radius, label)


def _draw_stick(rng: np.random.Generator, scale: float) -> _Layer:
    """A thin bar. It covers parts of objects, but is none."""
    length, thickness = scale * rng.uniform(15, _MAX_RADIUS), scale * rng.uniform(1, 3)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [length, thickness]
    return _draw_layer(rng, [corners @ _rotation(rng.uniform(0, np.pi))], length, None)


def _draw_layer(
    rng: np.random.Generator, contours: list[np.ndarray], radius: float, label: int | None
) -> _Layer:
    """
    Args:
        contours: polygons around (0, 0), each of shape (K, 2), in pixels. Where two overlap, there
            is a hole.
        radius: the largest distance of a point from (0, 0), in pixels.
        label: class index, None for a stick.
    """
    side = 2 * int(radius * 1.25 + 4)
    alpha = np.zeros((side, side), np.uint8)
    points = [np.round((c + side / 2) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(alpha, points, 255, cv2.LINE_AA, shift=4)
    texture = _draw_texture(rng, side, radius, label)
    layer = _Layer(texture, alpha.astype(np.float32) / 255, label)
    if rng.random() < 0.3:
        kernel = _blur_kernel(rng, radius)
        layer.alpha = cv2.filter2D(layer.alpha, -1, kernel)
        layer.color = cv2.filter2D(layer.color, -1, kernel, borderType=cv2.BORDER_REFLECT)
    return layer


def _blur_kernel(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Kernel of a lens out of focus, or of motion; much smaller than an object of this radius."""
    extent = rng.uniform(0.06, 0.18) * radius + 0.5
    size = 2 * int(extent + 1) + 1
    if rng.random() < 0.5:
        kernel = cv2.getGaussianKernel(size, extent / 2)
        return kernel @ kernel.T
    kernel = np.zeros((size, size), np.float32)
    step = extent * _rotation(rng.uniform(0, np.pi))[0]
    ends = [np.round((size // 2 + sign * step) * 16).astype(int).tolist() for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1, 1, cv2.LINE_AA, shift=4)
    return kernel / kernel.sum()


def _draw_texture(
    rng: np.random.Generator, side: int, radius: float, label: int | None
) -> np.ndarray:
    """
    A pattern of two shades of one hue, near the hue of the class, lit from one side.
    (side, side, 3), float32 in [0, 255].
    """
    hue = rng.random() if label is None else (label + rng.normal(0, 0.2)) / len(CLASSES) % 1
    x, y = np.meshgrid(*[np.arange(side, dtype=np.float32) - side / 2] * 2)
    direction = _rotation(rng.uniform(0, 2 * np.pi))[0]
    along, across = x * direction[0] + y * direction[1], y * direction[0] - x * direction[1]
    period = max(radius * rng.uniform(0.25, 0.8), 4)
    pattern = rng.choice(["plain", "stripes", "checks", "dots", "noise"])
    if pattern == "plain":
        mix = np.zeros_like(x)
    elif pattern == "stripes":
        mix = np.sin(along * (2 * np.pi / period)) > 0
    elif pattern == "checks":
        mix = np.sin(along * (np.pi / period)) * np.sin(across * (np.pi / period)) > 0
    elif pattern == "dots":
        mix = np.cos(along * (2 * np.pi / period)) + np.cos(across * (2 * np.pi / period)) > 0.8
    else:
        mix = _noise(rng, side, side, period)
    mix = mix.astype(np.float32)[..., None] * rng.uniform(0.3, 0.9)
    color = (1 - mix) * _random_color(rng, hue) + mix * _random_color(rng, hue)
    light = 1 + rng.uniform(0.1, 0.45) * along / radius
    return (color * light[..., None]).clip(0, 255).astype(np.float32)


def _draw_background(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """Clouds of two colours, a grain, and clutter. (height, width, 3), float32 in [0, 255]."""
    mix = sum(
        weight * _noise(rng, width, height, period * scale)
        for weight, period in ((0.6, 80), (0.3, 25), (0.2 * rng.random(), 6))
    )[..., None]
    colors = [_random_color(rng, max_saturation=0.4) for _ in range(2)]
    image = (1 - mix) * colors[0] + mix * colors[1]
    image *= 0.85 + 0.3 * _noise(rng, width, height, rng.uniform(1.5, 4) * scale)[..., None]
    image = np.ascontiguousarray(image.clip(0, 255), dtype=np.float32)
    for _ in range(rng.integers(5, 15)):
        _draw_clutter(rng, image, scale)
    return image


def _draw_clutter(rng: np.random.Generator, image: np.ndarray, scale: float) -> None:
    """Draw a line, arc, cross or irregular blob in place. None of them looks like a class."""
    height, width = image.shape[:2]
    center = rng.integers((0, 0), (width, height))
    length = scale * rng.uniform(6, 45)
    color = _random_color(rng, max_saturation=0.4).tolist()
    thickness = int(rng.integers(1, max(int(4 * scale), 2)))
    overlay = image.copy() if rng.random() < 0.5 else image
    kind = rng.choice(["line", "arc", "cross", "blob"])
    if kind == "line":
        end = center + length * _rotation(rng.uniform(0, 2 * np.pi))[0]
        cv2.line(overlay, center.tolist(), end.astype(int).tolist(), color, thickness)
    elif kind == "arc":
        axes = (length * rng.uniform(0.3, 1, 2)).astype(int).tolist()
        start = rng.uniform(0, 360)
        end = start + rng.uniform(40, 140)
        cv2.ellipse(overlay, center.tolist(), axes, 0, start, end, color, thickness)
    elif kind == "cross":
        arms = (length * _rotation(rng.uniform(0, np.pi / 2)) / 2).astype(int)
        for arm in arms:
            cv2.line(overlay, (center - arm).tolist(), (center + arm).tolist(), color, thickness)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = length * rng.uniform(0.15, 0.6, 9) * np.array([1, 0.6] * 5)[:9]
        points = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(overlay, [points.astype(np.int32)], color)
    if overlay is not image:  # then it is half transparent
        image += 0.5 * (overlay - image)


def _noise(rng: np.random.Generator, width: int, height: int, period: float) -> np.ndarray:
    """Smooth noise whose bumps are about ``period`` pixels wide. (height, width), in [0, 1]."""
    grid = rng.random((int(height / period) + 2, int(width / period) + 2), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def _random_color(
    rng: np.random.Generator, hue: float | None = None, max_saturation: float = 1.0
) -> np.ndarray:
    """RGB in [0, 255]; ``hue`` in [0, 1), random by default."""
    hue = rng.random() if hue is None else hue
    saturation = max_saturation * rng.uniform(0.5, 1)
    return rng.uniform(60, 255) * np.array(colorsys.hsv_to_rgb(hue, saturation, 1))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    points = _regular(10)
    points[1::2] *= rng.uniform(0.4, 0.55)
    return [points]


# Contours of each class, inside the unit circle.
_OUTLINES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "disc": lambda rng: [_regular(60)],
    "ring": lambda rng: [_regular(60), _regular(60, rng.uniform(0.45, 0.65))],
    "square": lambda rng: [_regular(4)],
    "triangle": lambda rng: [_regular(3)],
    "star": _star,
}


def make_dataset(
    folder: str,
    seed: int = 0,
    num_train: int = 600,
    num_val: int = 150,
    width: int = 256,
    height: int = 192,
) -> None:
    """
    Write ``train.json``, ``val.json`` and the pictures they name, in the folders ``train`` and
    ``val``. The same arguments give the same files. No picture is in both splits.

    Args:
        folder: to write into; made if needed.
        seed: of the random generator.
        num_train, num_val: pictures in each split.
        width, height: of every picture in pixels.
    """
    settings = {"seed": seed, "num_train": num_train, "num_val": num_val}
    settings.update(width=width, height=height)
    for split, (name, count) in enumerate((("train", num_train), ("val", num_val))):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            # A generator per picture: picture 7 is the same whatever the number of pictures.
            scene = draw_scene(np.random.default_rng((seed, split, index)), width, height)
            image = {"id": index + 1, "file_name": f"{index:05d}.jpg"}
            images.append({**image, "width": width, "height": height})
            for object_index, label in enumerate(scene.labels):
                annotation = {"id": len(annotations) + 1, "image_id": index + 1}
                annotation.update(category_id=label + 1, bbox=scene.box(object_index))
                annotation.update(area=scene.area(object_index), iscrowd=0)
                annotations.append(annotation)
            path = os.path.join(folder, name, image["file_name"])
            bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
            cv2.imwrite(path, bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])
        coco = {
            "info": {"description": "Drawn by demo/make_dataset.py", "settings": settings},
            "categories": [{"id": i + 1, "name": label} for i, label in enumerate(CLASSES)],
            "images": images,
            "annotations": annotations,
        }
        with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as file:
            json.dump(coco, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("folder", help="to write the dataset into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--train", dest="num_train", type=int, default=600, help="pictures in train"
    )
    parser.add_argument("--val", dest="num_val", type=int, default=150, help="pictures in val")
    parser.add_argument("--width", type=int, default=256, help="of a picture in pixels")
    parser.add_argument("--height", type=int, default=192, help="of a picture in pixels")
    make_dataset(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
