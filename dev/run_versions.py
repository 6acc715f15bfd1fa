#!/usr/bin/env python3
"""
Run the tests with several versions of Python, Detectron2 and PyTorch, each in an environment of its
own that is built under FOLDER:

    python dev/run_versions.py FOLDER --python python3.9 python3.13 --detectron2 pypi ~/detectron2
    python dev/run_versions.py FOLDER --python python3.10 --torch 2.4.1 0.19.1

--torch puts a pair of PyTorch and torchvision in place of those that are pinned, and a NumPy that
is old enough for it. A combination that has run is in FOLDER/results.json, and not run again; the
table of all that have run is printed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("Python", "PyTorch", "Detectron2", "tests", "passed", "skipped", "failed", "date")

# In the environment. Detectron2's main branch says 0.6 too; its extension tells them apart.
VERSIONS = """
import json, platform, detectron2, detectron2._C, torch
built = detectron2._C.__file__.endswith(".so")
print(json.dumps([platform.python_version(), torch.__version__.split("+")[0],
                  "main" if built else detectron2.__version__]))
"""


def run(*command: str | Path, log: Path) -> bool:
    """Whether the command succeeds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("a") as out:
        command = [str(part) for part in command]
        print("$", *command, file=out, flush=True)
        options = {"cwd": ROOT, "stdout": out, "stderr": subprocess.STDOUT}
        return subprocess.run(command, env=environment, **options).returncode == 0


def build(venv: Path, log: Path, python: str, detectron2: str, torch: list[str]) -> bool:
    script = ROOT / "dev" / "make_env.py"
    if not run(python, script, venv, "--detectron2", detectron2, "--this-python", log=log):
        return False
    if not torch:
        return True
    pair = (f"torch=={torch[0]}", f"torchvision=={torch[1]}", "numpy<2")
    return run(venv / "bin" / "python", "-m", "pip", "install", "-q", *pair, log=log)


def test(venv: Path, log: Path, tests: str) -> dict[str, str]:
    """The row of the table, but for what was asked for."""
    python = venv / "bin" / "python"
    output = subprocess.run([python, "-W", "ignore", "-c", VERSIONS], stdout=subprocess.PIPE)
    values = json.loads(output.stdout.decode().splitlines()[-1])
    selected = () if tests == "all" else ("-m", "not slow")
    options = ("-q", "-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=failed")
    run(python, "-m", "pytest", *options, *selected, "tests", log=log)
    # "3 failed, 3373 passed, 31 skipped, 821 warnings in 1985.25s (0:33:05)"
    last = next(x for x in reversed(log.read_text().splitlines()) if re.search(r" in [\d.]+s", x))
    counts = {name: number for number, name in re.findall(r"(\d+) ([a-z]+)", last)}
    failed = sum(int(counts.get(name, 0)) for name in ("failed", "error", "errors"))
    values += [tests, counts.get("passed", "0"), counts.get("skipped", "0"), str(failed)]
    return dict(zip(COLUMNS, [*values, str(datetime.date.today())]))


def read(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of environments, logs and results")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--detectron2", nargs="+", default=["pypi"], help="pypi, github, folders")
    parser.add_argument("--torch", nargs=2, default=[], metavar=("TORCH", "TORCHVISION"))
    parser.add_argument("--tests", choices=["fast", "all"], default="fast")
    parser.add_argument("--keep", action="store_true", help="the environments: 6 GB each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.json"
    for python in args.python:
        for detectron2 in args.detectron2:
            parts = (Path(python).resolve().name, Path(detectron2).name, *args.torch, args.tests)
            name = "-".join(parts)
            if name in read(results):
                print(f"{name}: has run already")
                continue
            venv, log = args.folder / name, args.folder / f"{name}.log"
            print(f"{name}: building, then testing; {log} tells more", flush=True)
            if build(venv, log, python, detectron2, args.torch):
                row = test(venv, log, args.tests)
                results.write_text(json.dumps({**read(results), name: row}, indent=1))
                print(f"{name}: {row['passed']} passed, {row['failed']} failed", flush=True)
            else:
                print(f"{name}: could not be built", flush=True)
            if not args.keep:
                shutil.rmtree(venv, ignore_errors=True)
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [[row[column] for column in COLUMNS] for row in read(results).values()]
    print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
