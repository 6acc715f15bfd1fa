#!/usr/bin/env python3
"""
Give a target of fuzz.py files that coverage of the package guides. A fault ends it.

    pip install atheris
    python tests/fuzz_by_coverage.py config 12000
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings

import atheris

with atheris.instrument_imports(include=["gfl_d2"]):
    import fuzz


def main() -> None:
    name, count = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fuzz.make_folder(folder)
        test = fuzz.make_test(fuzz.TARGETS[name], int(count), folder, lambda outcome: None)
        arguments = [sys.argv[0], f"-runs={count}", "-max_len=4096", "-len_control=0"]
        atheris.Setup(arguments, test.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
