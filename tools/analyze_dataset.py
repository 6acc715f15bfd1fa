#!/usr/bin/env python3
"""
Look at the data of a config before training: what is annotated, what the input size makes of it,
and which keys of the config fit it better.

    python tools/analyze_dataset.py --config-file configs/gfl_R_18_FPN_bccd.yaml \
        --output output/analysis

The data is all of ``DATASETS.TRAIN``, beside ``DATASETS.TEST``. Pairs of KEY VALUE at the end
change the config, as for ``train_net.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from gfl_d2.analysis import analyze, format_report, save_picture
from gfl_d2.config import load_config
from gfl_d2.data import check_datasets, register_datasets, resolve_num_classes
from gfl_d2.engine.runs import parse_arguments
from gfl_d2.errors import InputError
from gfl_d2.files import atomic_write


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output '{folder}' cannot be written: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--max-images", type=int, default=2000, help="to assign anchors in; 0 for all (2000)"
    )
    args = parse_arguments(parser)

    try:
        cfg = load_config(args.config_file, args.opts)
        register_datasets(cfg)
        cfg = resolve_num_classes(cfg)
        check_datasets(cfg)
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
        analysis = analyze(cfg, args.max_images)
        with writing(args.output):
            with atomic_write(args.output / "analysis.json", "w") as file:
                json.dump(analysis.facts, file, indent=1)
            save_picture(args.output / "analysis.png", analysis)
    except InputError as error:
        sys.exit(f"Error: {error}")
    print(format_report(analysis))
    print(f"\nWritten: {args.output / 'analysis.json'}, {args.output / 'analysis.png'}")


if __name__ == "__main__":
    main()
