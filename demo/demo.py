#!/usr/bin/env python3
"""
Detect on photographs, a video or a camera, and draw what was found.

    python demo/demo.py --input photos --output detected --opts MODEL.WEIGHTS output/model_final.pth

A checkpoint of a training carries its config; other weights need --config-file. Files that cannot
be read are listed at the end, and the exit status is 1; all others are done.

--json has COCO's result format. As photographs belong to no dataset, "image_id" is the path below
the folder that all of them are in, and "category_id" is the class's number in the model, from 0.
For a video, "image_id" is the number of the frame, from 0. (Results of a dataset, with its ids, are
those of train_net.py --eval-only.) --csv has the same as a table; boxes are corners in pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator

from outputs import (
    Stopped,
    check_can_show,
    check_file,
    csv_file,
    json_file,
    pictures,
    video_file,
    window,
)
from sources import find_files, name_files, open_video, plan_pictures, plan_video, read_frames
from tqdm import tqdm

from gfl_d2.checkpoint import find_config
from gfl_d2.deploy import Predictor
from gfl_d2.errors import InputError

# tqdm's own would turn the rate over where it is below 1.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", help="not needed if the weights carry their config")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", help="images, patterns such as 'photos/*.jpg', and folders"
    )
    source.add_argument("--video-input", help="a video file, or an address that OpenCV opens")
    source.add_argument(
        "--webcam", action="store_true", help="the first camera; Esc or Ctrl-C ends"
    )
    parser.add_argument(
        "--output", help="a folder, or for one image a picture, for a video a video; without "
        "--output, --json and --csv, a window is opened"
    )  # fmt: skip
    parser.add_argument("--json", help="file to write in COCO's result format")
    parser.add_argument("--csv", help="file to write as a table")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.4, help="for all outputs, in [0, 1)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="of images of the same size")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="changes of the config; the last option"
    )  # fmt: skip
    return parser


def make_predictor(args: argparse.Namespace) -> Predictor:
    if not 0 <= args.confidence_threshold < 1:
        raise InputError(
            f"--confidence-threshold must be in [0, 1), not {args.confidence_threshold}"
        )
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be 1 or more, not {args.batch_size}")
    opts = ["TEST.PRECISION", args.precision] if args.precision else []
    cfg = find_config(args.config_file, [*opts, *args.opts]).clone()
    cfg.defrost()
    if not cfg.TEST.CALIBRATION:  # the model's threshold is for scores without it
        for model in (cfg.MODEL.GFL, cfg.MODEL.RETINANET):
            model.SCORE_THRESH_TEST = args.confidence_threshold
    if not cfg.MODEL.WEIGHTS:
        raise InputError("Give the weights: --opts MODEL.WEIGHTS and a file")
    return Predictor(cfg)


def main() -> None:
    args = get_parser().parse_args()
    try:
        sys.exit(run(args))
    except InputError as error:
        sys.exit(f"Error: {error}")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    files = [path for path in (args.json, args.csv) if path]
    is_shown = not (args.output or files)
    if is_shown:
        check_can_show()
    outputs = [os.path.realpath(path) for path in (args.output, *files) if path]
    if len(set(outputs)) < len(outputs):
        raise InputError("--output, --json and --csv must name different files")
    for path in files:
        check_file(path)
    with contextlib.ExitStack() as stack:
        if args.input:
            images = find_files(args.input, args.output)
            names, total = name_files(images), len(images)
            source = zip(names, images)
            plan = args.output and plan_pictures(args.output, images, names)
        else:
            video = stack.enter_context(open_video(0 if args.webcam else args.video_input))
            source, total = read_frames(video), video.num_frames
            plan = args.output and plan_video(args.output, args.video_input or "webcam")
        predictor = make_predictor(args)
        writers = []
        if args.output and args.input:
            writers.append(pictures(plan, predictor.metadata))
        elif args.output:
            output = video_file(plan, video.frames_per_second, predictor.metadata)
            writers.append(stack.enter_context(output))
        elif is_shown:
            writers.append(stack.enter_context(window(not args.input, predictor.metadata)))
        for path, output in ((args.json, json_file), (args.csv, csv_file)):
            if path:
                writers.append(stack.enter_context(output(path, predictor.metadata)))
        detected = detect(predictor, source, args.batch_size, is_live=args.webcam)
        progress = tqdm(detected, total=total, unit=" images", bar_format=_BAR)
        problems = write_all(progress, writers, args.confidence_threshold, not args.input)
    if problems:
        print("Not done:", *problems, sep="\n  ", file=sys.stderr)
    return 1 if problems else 0


def detect(
    predictor: Predictor, source: Iterable[tuple], batch_size: int, is_live: bool
) -> Iterator[tuple]:
    """Yields name, image, and its detections or the InputError."""
    named, given = itertools.tee(source)
    images = (image for _, image in given)
    if is_live:  # nothing is read ahead, which would come late
        results = map(predictor, images)
    else:
        results = predictor(images, batch_size=batch_size, errors="return")
    for (name, image), result in zip(named, results):
        yield name, image, result


def write_all(detected: Iterable[tuple], writers: list, threshold: float, is_video: bool) -> list:
    """
    Write what was detected with scores above ``threshold``, until the end or until the user stops
    it. Returns the problems. One of a video ends it.
    """
    problems, name = [], None
    try:
        for name, image, result in detected:
            try:
                if isinstance(result, InputError):
                    raise result
                detections = result["instances"].to("cpu")
                detections = detections[detections.scores > threshold]
                for write in writers:
                    write(name, image, detections)
            except InputError as error:
                if is_video:
                    raise
                problems.append(error)
    except KeyboardInterrupt:
        problems.append(f"Interrupted: what comes after {name}")
    except Stopped:
        pass
    return problems


if __name__ == "__main__":
    main()
