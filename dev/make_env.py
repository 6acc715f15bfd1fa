#!/usr/bin/env python3
"""
Build the virtual environment of the project: pinned packages and Detectron2.

By default Detectron2 0.6 is installed from PyPI, where its Python sources (and not its C++
ones) are published as ``pb1-detectron2``. They are pinned by hash, brought up to date by a
few counted substitutions and installed under their own name, ``detectron2``.
``--detectron2`` chooses a build with the C++ extension instead: ``github``, or a checkout.

Each step is recorded when it is done, so this may be interrupted anywhere and run again.
Needs nothing but the standard library, on Linux or macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "dev" / "requirements"
RECIPE = ROOT / "dev" / "detectron2"  # files added to Detectron2's sources from PyPI

LOCK_FILE = ".gfl_d2.lock"  # its presence marks an environment as ours
STATE_FILE = ".gfl_d2.json"  # the steps of the installation that are done

GITHUB = "https://github.com/facebookresearch/detectron2.git"
GITHUB_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"

SDIST = "pb1-detectron2"
SDIST_VERSION = "0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# (files, pattern, replacement, expected number of matches in these files together)
SUBSTITUTIONS = (
    # NumPy removed its aliases of the builtins in 1.24.
    ("**/*.py", r"\bnp\.(bool|float|int|str)\b", r"\1", 19),
    # Pillow removed Image.LINEAR in 10.
    ("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR", 1),
    # setuptools removed pkg_resources in 82.
    (
        "detectron2/model_zoo/model_zoo.py",
        r"^import pkg_resources$",
        "import importlib.resources",
        1,
    ),
    (
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*("detectron2\.model_zoo"), os\.path\.join\(',
        r"str(importlib.resources.files(\1).joinpath(",
        1,
    ),
    # Caffe2 is gone from PyTorch; without this line, tracing and scripting can be imported.
    ("detectron2/export/__init__.py", r"^from \.api import \*\n", "", 1),
)

# Run in a new environment.
SMOKE_TEST = """
import sys, torch, torchvision, detectron2, detectron2.layers
try:
    import cv2
except ImportError as e:
    sys.exit(f"OpenCV does not load ({e}). On Debian and Ubuntu, `apt install libgl1 "
             "libglib2.0-0` provides the system's libraries that it needs.")
torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
print(f"    torch {torch.__version__}, torchvision {torchvision.__version__}, "
      f"detectron2 {detectron2.__version__}, opencv {cv2.__version__}")
"""


class EnvError(Exception):
    """The environment cannot be built; the message says why and what to do."""


def say(message):
    print(f"==> {message}", flush=True)


def run(*command):
    """Run a command; raise EnvError if it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0")
    command = [str(part) for part in command]
    # close_fds: the command shares the lock, and keeps it if this process alone is killed.
    code = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, close_fds=False).returncode
    if code != 0:
        raise EnvError(f"this command failed with exit status {code}: {' '.join(command)}")


def venv_python(venv):
    return venv / "bin" / "python"


def pip(venv, *arguments):
    run(venv_python(venv), "-m", "pip", *arguments)


def has_modules(venv, *names):
    """Whether the environment's Python runs and finds these top-level modules."""
    code = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    try:
        command = [str(venv_python(venv)), "-I", "-c", code, *names]
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def check_sha256(path, expected):
    """Raise EnvError unless the file has this SHA-256."""
    actual = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if actual != expected:
        raise EnvError(
            f"{Path(path).name} has SHA-256 {actual} instead of {expected}: refused. "
            "The download is damaged, or the index serves another file."
        )


def unpack(archive, folder, sha256):
    """Unpack an sdist with this SHA-256, and return the folder that it contains."""
    check_sha256(archive, sha256)
    with tarfile.open(archive) as tar:
        # The filter exists since the security releases of 2023; the hash is checked anyway.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (path for path in Path(folder).iterdir() if path.is_dir())
    return source


def substitute(source, substitutions):
    """
    Apply (files, pattern, replacement, count) substitutions under a folder. Raise EnvError if
    a pattern does not match exactly `count` times, as these are then not the sources that the
    substitutions were made for.
    """
    for files, pattern, replacement, expected in substitutions:
        count = 0
        for path in sorted(Path(source).glob(files)):
            text = path.read_text(encoding="utf-8")
            text, n = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            if n:
                path.write_text(text, encoding="utf-8")
            count += n
        if count != expected:
            raise EnvError(
                f"'{pattern}' was replaced {count} times in {files} instead of {expected} times"
            )


def install_from_pypi(venv):
    """Install the Python sources of Detectron2 0.6 as the distribution `detectron2`."""
    with tempfile.TemporaryDirectory(prefix="gfl_d2-") as tmp:
        tmp = Path(tmp)
        requirement = tmp / "sdist.txt"
        requirement.write_text(f"{SDIST}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
        # pip checks the hash before it runs the sdist's setup.py, for its metadata.
        pip(venv, "download", "-q", "--require-hashes", "--no-deps", "--no-build-isolation",
            "--no-binary", SDIST, "-d", tmp / "download", "-r", requirement)  # fmt: skip
        (archive,) = (tmp / "download").iterdir()
        source = unpack(archive, tmp / "source", SDIST_SHA256)

        # Only what is to be installed, so that substitutions are counted there alone.
        package = tmp / "package"
        package.mkdir()
        for name in ("detectron2", "projects", "LICENSE"):
            shutil.move(str(source / name), str(package / name))
        substitute(package, SUBSTITUTIONS)
        shutil.copy(RECIPE / "_C.py", package / "detectron2")
        shutil.copy(RECIPE / "setup.py", package)

        wheels = tmp / "wheels"
        pip(venv, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, package)
        pip(venv, "install", "-q", "--force-reinstall", "--no-deps", "--no-index",
            "--find-links", wheels, f"detectron2=={SDIST_VERSION}")  # fmt: skip


def digest_files(paths, salt=""):
    """Return a digest of the files' names and contents."""
    digest = hashlib.sha256(salt.encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def detectron2_source(choice):
    """
    Return what to install, as a dict that changes when it has to be installed again. Its
    `requirement` is for pip; it is None for the sources on PyPI.
    """
    if choice == "pypi":
        recipe = digest_files(RECIPE.glob("*.py"), repr((SDIST_SHA256, SUBSTITUTIONS)))
        return {"choice": choice, "requirement": None, "version": recipe}
    if choice == "github":
        requirement = f"detectron2 @ git+{GITHUB}@{GITHUB_COMMIT}"
        return {"choice": choice, "requirement": requirement, "version": GITHUB_COMMIT}
    if not (Path(choice) / "detectron2" / "__init__.py").is_file():
        raise EnvError(f"DETECTRON2={choice} is not 'pypi', 'github' or a Detectron2 checkout")
    commit = ""
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", choice, "rev-parse", "HEAD"]
        git = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        commit = git.stdout.decode().strip()
    return {"choice": choice, "requirement": choice, "version": commit}


def install_packages(venv):
    def install(name, *arguments):
        pip(venv, "install", "-q", "--require-hashes", "-r", REQUIREMENTS / name, *arguments)

    say("Installing pip and the build tools")
    install("build.txt")
    say("Installing PyTorch and the other packages (3 GB to download, 5 GB on disk)")
    install("env.txt", "--no-build-isolation")


def install_detectron2(venv, source):
    pip(venv, "uninstall", "-qq", "-y", "detectron2")
    # What an interrupted installation left: an old extension would hide the stand-in.
    for name in ("[d~]etectron2", "[d~]etectron2-*.dist-info"):
        for path in venv.glob(f"lib/python*/site-packages/{name}"):
            shutil.rmtree(path)
    if source["requirement"] is None:
        say(f"Installing Detectron2 {SDIST_VERSION} from PyPI, without its C++ extension")
        install_from_pypi(venv)
    else:
        say(f"Building Detectron2 from {source['requirement']} (a minute or more)")
        pip(venv, "install", "-q", "--no-deps", "--no-build-isolation", source["requirement"])


def install_checkout(venv):
    say("Installing gfl_d2 in editable mode, and checking that Detectron2 loads")
    pip(venv, "install", "-q", "--no-deps", "--no-build-isolation", "-e", ROOT)
    run(venv_python(venv), "-I", "-W", "ignore", "-c", SMOKE_TEST)


def read_state(venv):
    try:
        return json.loads((venv / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def write_state(venv, state):
    temporary = venv / (STATE_FILE + ".tmp")
    temporary.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(temporary, venv / STATE_FILE)


@contextlib.contextmanager
def locked(venv):
    """Hold the environment's lock, waiting for another process that builds it."""
    venv.mkdir(parents=True, exist_ok=True)
    with open(venv / LOCK_FILE, "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another process that is building {venv}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def create_venv(venv):
    """Create an empty environment, in place of what an interrupted build left there."""
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    say(f"Creating {venv} with Python {sys.version.split()[0]}")
    try:
        run(sys.executable, "-m", "venv", venv)
    except EnvError as e:
        raise EnvError(
            f"{e}\nOn Debian and Ubuntu, `apt install python3-venv` provides what it needs; "
            "PYTHON=<interpreter> chooses another Python."
        ) from e


def make_env(venv, choice=None, this_python=False):
    """
    Build the environment, or bring it up to date, or do nothing if it is.

    Args:
        venv (Path): its folder.
        choice (str): 'pypi', 'github' or the folder of a Detectron2 checkout. None keeps the
            Detectron2 that the environment has, and means 'pypi' for a new one.
        this_python (bool): whether it must be one of the Python that runs this script.
    """
    if venv.is_dir() and any(venv.iterdir()) and not (venv / LOCK_FILE).exists():
        if choice is None and has_modules(venv, "torch", "torchvision", "detectron2", "pytest"):
            say(f"{venv} was not built by make env: used as it is")
            return
        raise EnvError(f"{venv} exists and was not built by make env; choose another VENV=")

    with locked(venv):
        state = read_state(venv) if has_modules(venv) else {}
        version = "{}.{}".format(*sys.version_info)
        if this_python and state.get("python", version) != version:
            raise EnvError(
                f"{venv} has Python {state['python']}, not {version}: choose another VENV=, or "
                "remove it first (make distclean)"
            )
        if choice not in (None, "pypi", "github"):
            choice = str(Path(choice).expanduser().resolve())
        source = None
        if choice is None and os.path.isabs(state.get("choice", "")):
            # Not rebuilt for a change in its checkout, unless asked to.
            source = state.get("detectron2")
        wanted = {
            "packages": digest_files(REQUIREMENTS.glob("*.txt")),
            "detectron2": source or detectron2_source(choice or state.get("choice", "pypi")),
            "checkout": str(ROOT),
        }
        install = {
            "packages": install_packages,
            "detectron2": lambda venv: install_detectron2(venv, wanted["detectron2"]),
            "checkout": install_checkout,
        }

        # The state holds the steps that are done. An installation of packages that was
        # interrupted cannot be mended, only begun again.
        if "packages" not in state:
            create_venv(venv)
            state = {"python": version}
        elif not has_modules(venv, "torch", "torchvision", "pytest"):
            state["packages"] = None
        if not has_modules(venv, "detectron2"):
            state["detectron2"] = None

        steps = list(wanted)
        undone = next((i for i, step in enumerate(steps) if state.get(step) != wanted[step]), None)
        if undone is None:
            say(f"{venv} is up to date, nothing to do")
            return
        state = {k: v for k, v in state.items() if k not in steps[undone:]}
        state["choice"] = wanted["detectron2"]["choice"]
        for step in steps[undone:]:
            write_state(venv, state)
            install[step](venv)
            state[step] = wanted[step]
        write_state(venv, state)
        say(f"{venv} is ready")


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("venv", type=Path, help="folder of the virtual environment")
    parser.add_argument("--detectron2", help="pypi (default), github, or a checkout's folder")
    parser.add_argument(
        "--this-python", action="store_true", help="refuse an environment of another Python"
    )
    args = parser.parse_args()
    try:
        if sys.version_info < (3, 9):  # noqa: UP036
            raise EnvError("Python 3.9 or newer is needed; choose one with PYTHON=<interpreter>")
        make_env(args.venv.expanduser().absolute(), args.detectron2 or None, args.this_python)
    except EnvError as e:
        sys.exit(f"make env: {e}")
    except KeyboardInterrupt:
        sys.exit("make env: interrupted; run it again to continue")


if __name__ == "__main__":
    main()
