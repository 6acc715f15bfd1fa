#!/usr/bin/env python3
"""
Judge a model by the detections that an evaluation wrote: precision and recall, kinds of errors and
what they cost, confused classes, the best thresholds, how far scores are IoUs, worst images.

    python tools/analyze_results.py --config-file configs/gfl_R_18_FPN_bccd.yaml \
        --results output --output output/report

The dataset is the first of ``DATASETS.TEST``. Several ``--results`` are compared, a row for each.
KEY VALUE pairs at the end change the config, as for ``train_net.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gfl_d2.calibration import load_calibration, save_calibration
from gfl_d2.checkpoint import find_config
from gfl_d2.coco_evaluation import max_detections
from gfl_d2.data import check_registered, register_datasets
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError, name_some
from gfl_d2.result_analysis import (
    HALVES,
    ResultSet,
    analyze_results,
    check_fitting,
    fit_calibration,
    format_comparison,
    format_report,
    load_result_set,
    write_report,
)
from gfl_d2.results import find_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--config-file", help="may be left out with MODEL.WEIGHTS that carry it")
    parser.add_argument(
        "--results",
        action="append",
        help="OUTPUT_DIR of a run, by default the config's, or a file of results; may be repeated",
    )
    parser.add_argument("--output", type=Path, help="folder for report.html, report.json, pictures")
    parser.add_argument("--score-thr", type=float, default=0.3, help="of the confusion matrix")
    parser.add_argument("--tp-iou-thr", type=float, default=0.5, help="of the confusion matrix")
    parser.add_argument("--num-images", type=int, default=4, help="worst and best ones to draw")
    parser.add_argument("--half", choices=HALVES, help="take only this half of the images")
    parser.add_argument("--calibration", type=Path, help="map scores by this file first")
    parser.add_argument("--fit", type=Path, help="write a calibration for TEST.CALIBRATION instead")
    args = parse_arguments(parser)

    try:
        check_arguments(args)
        cfg = find_config(args.config_file, args.opts)
        if not cfg.DATASETS.TEST:
            raise InputError("DATASETS.TEST names no dataset")
        dataset = cfg.DATASETS.TEST[0]
        register_datasets(cfg, [dataset], check_images=False)
        check_registered(cfg, [dataset])
        limit = max_detections(cfg.TEST.DETECTIONS_PER_IMAGE)
        paths = [find_results(path, dataset) for path in args.results or [cfg.OUTPUT_DIR]]
        results = {str(path): load(dataset, path, args) for path in paths}
        if args.fit:
            fit(args.fit, next(iter(results.values())), limit, args.half)
            return
        analyses = {
            path: analyze_results(one, limit, args.score_thr, args.tp_iou_thr)
            for path, one in results.items()
        }
        if len(analyses) > 1:
            print(format_comparison(analyses))
            return
        path, analysis = next(iter(analyses.items()))
        print(format_report(analysis))
        if args.output:
            about = {"dataset": dataset, "results": path, "half": args.half}
            about |= {"calibration": args.calibration and str(args.calibration)}
            about |= analysis.results.count()
            try:
                files = write_report(args.output, analysis, about, args.num_images)
            except OSError as error:
                raise InputError(f"--output {args.output} cannot be written: {error}") from None
            print(f"\nWritten: {', '.join(map(str, files))}")
    except InputError as error:
        sys.exit(f"Error: {error}")


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("score_thr", "tp_iou_thr"):
        option = f"--{name.replace('_', '-')}"
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"{option} must be from 0 to 1, not {getattr(args, name)}")
    if args.num_images < 0:
        raise InputError(f"--num-images must be 0 or more, not {args.num_images}")
    several = len(args.results or ()) > 1
    if several and (args.output or args.fit):
        raise InputError("--output and --fit are for one file of results: give one --results")
    if args.fit:
        if args.calibration or args.output:
            raise InputError(
                "--fit goes without --calibration and --output: it fits, and judges not"
            )
        check_fitting()
        if not args.fit.parent.is_dir():
            raise InputError(f"--fit {args.fit}: there is no folder {args.fit.parent}")
    if args.output:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {args.output} cannot be made: {error}") from None


def load(dataset: str, path: Path, args: argparse.Namespace) -> ResultSet:
    results = load_result_set(dataset, path)
    if args.calibration:
        calibration = load_calibration(args.calibration)
        calibration.check_classes(results.class_names, f"'{dataset}'")
        scores = calibration.apply(results.scores, results.classes)
        results = results.replace_scores(scores)
    return results.take_half(args.half) if args.half else results


def fit(path: Path, results: ResultSet, limit: int, half: str | None) -> None:
    name = f"{results.dataset} ({half} half)" if half else results.dataset
    calibration = fit_calibration(results, limit, name)
    save_calibration(path, calibration)
    without = [name for name in results.class_names if name not in calibration.curves]
    print(f"Written: {path}, fitted on {name}; curves of {len(calibration.curves)} classes")
    if without:
        print(
            f"Too few objects found, so these classes keep their scores: {name_some(without, 10)}"
        )


if __name__ == "__main__":
    main()
