#!/usr/bin/env python3
"""
Mutation testing: change the code in thousands of small ways, one at a time, and see whether a test
notices (pip install mutmut==3.8.1 into the environment first):

    .venv/bin/python dev/run_mutants.py output/mutants losses
    .venv/bin/python dev/run_mutants.py output/mutants reading

FOLDER gets a copy of the checkout, in which mutmut works; what it has tried is not tried again. The
table counts per file, and FOLDER/GROUP/survived.txt has the changes that no test noticed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELING, DATA = "gfl_d2/modeling", "gfl_d2/data"
# What is changed, and the tests that are to notice.
GROUPS = {
    "losses": (
        [f"{MODELING}/{x}.py" for x in (
            "losses", "background_loss", "focal_quality", "iou_aware_quality", "quality",
            "assigner", "box_ops", "criterion", "box_representation")],
        ["losses", "losses_reference", "background_loss", "quality", "box_representation",
         "assigner", "assigner_reference", "gfl", "gfl_reference", "sapd", "distillation",
         "numerics", "components", "ablations", "uncertainty", "training_steps"],
    ),
    "reading": (
        [f"{DATA}/{x}.py" for x in (
            "coco_format", "coco_data", "json_values", "registration", "images")],
        ["coco_format", "coco_variants", "data", "read_coco", "registration", "images",
         "dataset_mapper", "other_formats", "predictor"],
    ),
}  # fmt: skip
SETTINGS = """
[tool.mutmut]
source_paths = ["gfl_d2"]
only_mutate = {files}
also_copy = {others}
pytest_add_cli_args = ["-m", "not slow", "-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
"""
# Hypothesis runs in many processes there, and remembers nothing.
PROFILE = "derandomize=True, database=None, suppress_health_check=list(HealthCheck)"


def copy_checkout(folder: Path, files: list[str], tests: list[str]) -> None:
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_symlink():
            (folder / name).unlink()  # a link is not written over
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for name in files:
        path = folder / name
        path.write_text(undecorate(path.read_text()))
    conftest = folder / "tests" / "conftest.py"
    text = conftest.read_text().replace("derandomize=True", PROFILE)
    conftest.write_text(
        text.replace("from hypothesis import", "from hypothesis import HealthCheck,")
    )
    others = sorted({name.split("/")[0] for name in tracked} - {"gfl_d2", ".gitignore"})
    settings = SETTINGS.format(
        files=json.dumps(files),
        others=json.dumps(others),
        tests=json.dumps([f"tests/test_{name}.py" for name in tests]),
    )
    (folder / "pyproject.toml").write_text(settings)


def undecorate(text: str) -> str:
    """With ``with torch.no_grad()`` for the decorator: mutmut changes no decorated function."""
    lines = text.splitlines()
    functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]
    for function in sorted(functions, key=lambda x: -x.lineno):
        if [ast.unparse(x) for x in function.decorator_list] != ["torch.no_grad()"]:
            continue
        body = function.body[1:] if ast.get_docstring(function) else function.body
        first = body[0].lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
        inside = [f"    {line}" if line else line for line in lines[first : function.end_lineno]]
        indent = " " * body[0].col_offset
        lines[first : function.end_lineno] = [f"{indent}with torch.no_grad():", *inside]
        del lines[function.decorator_list[0].lineno - 1]
    return "\n".join(lines) + "\n"


def code_of(function: ast.FunctionDef) -> tuple[list[str], str]:
    """Its lines without the docstring, and the same without what stands in strings."""
    function.name = "f"
    if ast.get_docstring(function):
        del function.body[0]
    lines = ast.unparse(function).splitlines()
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return lines, ast.unparse(function)


def read_results(folder: Path, name: str) -> tuple[dict[str, int], list[str]]:
    """Counts of a file, and the changes that survived."""
    path = folder / "mutants" / name
    codes = json.loads(path.with_name(f"{path.name}.meta").read_text())["exit_code_by_key"]
    text = path.read_text()
    functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]
    code = {x.name: code_of(x) for x in functions}
    counts = {"mutants": len(codes), "killed": 0, "survived": 0, "of them text": 0, "not tried": 0}
    survived = []
    for key, status in codes.items():
        if status is None:
            counts["not tried"] += 1
        elif status not in (0, 5, 33):  # it passes, or no test runs it
            counts["killed"] += 1
        else:
            counts["survived"] += 1
            mutant = key.rpartition(".")[2]
            original = re.sub(r"__mutmut_\d+$", "__mutmut_orig", mutant)
            changed = [line for line in code[mutant][0] if line not in code[original][0]]
            is_text = code[mutant][1] == code[original][1]
            counts["of them text"] += is_text
            survived.append(f"{key}{' (text)' * is_text}\n    " + "\n    ".join(changed))
    return counts, survived


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", action="store_true", help="show what there is, run nothing")
    args = parser.parse_args()
    folder, (files, tests) = args.folder.resolve() / args.group, GROUPS[args.group]
    if not args.results:
        copy_checkout(folder, files, tests)
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(args.processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True)
    rows, everything = {}, []
    for name in files:
        rows[name], survived = read_results(folder, name)
        everything += survived
    rows["all"] = {key: sum(row[key] for row in rows.values()) for key in rows[files[0]]}
    (folder / "survived.txt").write_text("\n".join([*everything, ""]))
    print(f"{'':44}", *(f"{key:>12}" for key in rows["all"]))
    for name, row in rows.items():
        print(f"{name:44}", *(f"{value:12,}" for value in row.values()))


if __name__ == "__main__":
    main()
