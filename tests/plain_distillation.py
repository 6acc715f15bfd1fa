"""Terms of distillation as they are defined, one location and box after the other, in float64."""

from __future__ import annotations

import statistics

import torch

from gfl_d2.modeling import giou_loss

BINS = 17


class Place:
    """A location of a level: its anchor and what student and teacher predict there."""

    def __init__(self, level, x, y, half, student, teacher):
        self.level, self.x, self.y = level, x, y
        self.anchor = (x - half, y - half, x + half, y + half)
        (self.logits, self.values), (self.teacher_logits, self.teacher_values) = student, teacher


def places_of_image(student, teacher, image, size, strides, divisibility=32):
    """All locations that are not padding. Predictions are maps of class logits and box values."""
    places = []
    for level, stride in enumerate(strides):
        height, width = (-(-x // divisibility) * divisibility for x in size)
        for row in range(-(-height // stride)):
            for column in range(-(-width // stride)):
                maps = [
                    [m[level][image, :, row, column] for m in part] for part in (student, teacher)
                ]
                places.append(Place(level, column * stride, row * stride, 4 * stride, *maps))
    return places


def iou(a, b):
    left, top, right, bottom = (f(x, y) for f, x, y in zip((max, max, min, min), a, b))
    intersection = max(right - left, 0) * max(bottom - top, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return intersection / (sum(areas) - intersection)


def diou(a, b):
    corners = zip((min, min, max, max), a, b)
    left, top, right, bottom = (f(x, y) for f, x, y in corners)
    x, y = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    return iou(a, b) - (x**2 + y**2) / ((right - left) ** 2 + (bottom - top) ** 2)


def atss_candidates(places, box, topk=9):
    """The nearest places of each level, and the threshold of their IoUs."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    found = []
    for level in {place.level for place in places}:
        of_level = [place for place in places if place.level == level]
        found += sorted(of_level, key=lambda p: (p.x - x) ** 2 + (p.y - y) ** 2)[:topk]
    values = [iou(place.anchor, box) for place in found]
    return found, statistics.mean(values) + statistics.stdev(values)


def positives_of_image(places, boxes):
    """The positives by ATSS, each once."""
    found = []
    for box in boxes:
        candidates, threshold = atss_candidates(places, box)
        for place in candidates:
            x, y = place.x, place.y
            is_inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if is_inside and iou(place.anchor, box) >= threshold and place not in found:
                found.append(place)
    return found


def soft_divergence(logits, teacher_logits, temperature):
    """T^2 times the mean, over what is in a distribution, of its divergence from the teacher's."""
    student, teacher = ((x / temperature).softmax(dim=0) for x in (logits, teacher_logits))
    return temperature**2 * (teacher * (teacher / student).log()).mean()


def sum_of_sides(place, temperature=10):
    sides = place.values.view(4, BINS), place.teacher_values.view(4, BINS)
    return sum(soft_divergence(s, t, temperature) for s, t in zip(*sides))


def plain_ld(images, boxes):
    total = 0
    for places, of_image in zip(images, boxes):
        for place in positives_of_image(places, of_image):
            weight = place.logits.detach().sigmoid().max()
            total = total + weight * sum_of_sides(place) / 4
    return 0.25 * total


def plain_vlr(images, boxes):
    total = 0
    for places, of_image in zip(images, boxes):
        thresholds = [atss_candidates(places, box)[1] for box in of_image]
        for place in places:
            overlaps = [
                iou(place.anchor, box)
                for box, threshold in zip(of_image, thresholds)
                if threshold / 4 <= diou(place.anchor, box) < threshold
            ]
            total = total + max(overlaps, default=0) * sum_of_sides(place) / 16
    return 0.25 * total


def plain_kd(images, boxes):
    of_level = {}
    for places, of_image in zip(images, boxes):
        for place in positives_of_image(places, of_image):
            loss = soft_divergence(place.logits, place.teacher_logits, 2)
            of_level.setdefault(place.level, []).append(loss)
    return 10 * sum(sum(losses) / len(losses) for losses in of_level.values())


def plain_bckd(images, boxes):
    """The loss of the classes, and that of the boxes."""
    class_loss = box_loss = 0
    num_pos = sum(max(len(positives_of_image(*pair)), 1) for pair in zip(images, boxes))
    for place in (place for places in images for place in places):
        score, target = place.logits.sigmoid(), place.teacher_logits.sigmoid()
        entropy = -target * score.log() - (1 - target) * (1 - score).log()
        class_loss = class_loss + (entropy * (target - score).abs()).sum()
        weight = (target - score).abs().max().detach()
        bins = torch.arange(BINS).double()
        left, right = (
            (x.view(4, BINS).softmax(dim=1) * bins).sum(dim=1)
            for x in (place.values, place.teacher_values)
        )
        box, teacher_box = (torch.cat((-x[:2], x[2:]))[None] for x in (left, right))
        box_loss = box_loss + weight * giou_loss(box, teacher_box)[0]
    return class_loss / num_pos, 4 * box_loss / num_pos
