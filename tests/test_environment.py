"""The environment's construction, the packaging, and what `import gfl_d2` says without them."""

import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gfl_d2

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def load(path, name="loaded"):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_env = load(ROOT / "dev" / "make_env.py")
NUMPY, PILLOW, RESOURCES_IMPORT, RESOURCES_USE, CAFFE2 = make_env.SUBSTITUTIONS


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def with_count(substitution, count):
    return (*substitution[:3], count)


class TestSubstitutions:
    def test_numpy_aliases(self, tmp_path):
        source = "np.int np.int64 np.int_ np.float np.float32 np.bool np.bool_ np.str inp.int\n"
        a = write(tmp_path, "a.py", source)
        b = write(tmp_path, "folder/b.py", "x.astype(np.bool)\n")
        make_env.substitute(tmp_path, [with_count(NUMPY, 5)])
        expected = "int np.int64 np.int_ float np.float32 bool np.bool_ str inp.int\n"
        assert a.read_text() == expected
        assert b.read_text() == "x.astype(bool)\n"

    def test_image_linear(self, tmp_path):
        path = write(tmp_path, PILLOW[0], "Image.LINEAR, Image.LINEAR_2, Image.BILINEAR\n")
        make_env.substitute(tmp_path, [PILLOW])
        assert path.read_text() == "Image.BILINEAR, Image.LINEAR_2, Image.BILINEAR\n"

    def test_model_zoo_resources_are_found(self, tmp_path, monkeypatch):
        path = write(
            tmp_path,
            RESOURCES_USE[0],
            "import os\n"
            "import pkg_resources\n"
            "found = pkg_resources.resource_filename(\n"
            '    "detectron2.model_zoo", os.path.join("configs", "folder/a.yaml")\n'
            ")\n",
        )
        make_env.substitute(tmp_path, [RESOURCES_IMPORT, RESOURCES_USE])
        assert "pkg_resources" not in path.read_text()
        name = "detectron2.model_zoo"
        package = load(write(tmp_path, "model_zoo/__init__.py", ""), name)
        monkeypatch.setitem(sys.modules, name, package)
        found = runpy.run_path(str(path))["found"]
        assert found == str(tmp_path / "model_zoo" / "configs" / "folder" / "a.yaml")

    def test_caffe2_line(self, tmp_path):
        path = write(tmp_path, CAFFE2[0], "from .api import *\nfrom .flatten import A\n")
        make_env.substitute(tmp_path, [CAFFE2])
        assert path.read_text() == "from .flatten import A\n"

    @pytest.mark.parametrize("expected", [0, 1, 3])
    def test_other_count_is_refused(self, tmp_path, expected):
        write(tmp_path, "a.py", "np.int\nnp.bool\n")
        message = f"replaced 2 times in .* instead of {expected} times"
        with pytest.raises(make_env.EnvError, match=message):
            make_env.substitute(tmp_path, [with_count(NUMPY, expected)])


class TestSdist:
    @pytest.fixture
    def archive(self, tmp_path):
        write(tmp_path, "package-1.0/module.py", "x = 1\n")
        with tarfile.open(tmp_path / "package-1.0.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "package-1.0", "package-1.0")
        return tmp_path / "package-1.0.tar.gz"

    def test_unpacked_if_the_hash_is_right(self, archive, tmp_path):
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        source = make_env.unpack(archive, tmp_path / "out", digest)
        assert (source / "module.py").read_text() == "x = 1\n"

    def test_refused_before_unpacking_if_it_is_not(self, archive, tmp_path):
        with pytest.raises(make_env.EnvError, match="SHA-256"):
            make_env.unpack(archive, tmp_path / "out", make_env.SDIST_SHA256)
        assert not (tmp_path / "out").exists()


class FakeInstallation:
    """Replaces what make_env runs; records it, and can be interrupted once before a step ends."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.interrupt_in = None
        self.removed_modules = set()
        steps = ("create_venv", "install_packages", "install_detectron2", "install_checkout")
        for step in steps:
            monkeypatch.setattr(make_env, step, self.replacement(step, getattr(make_env, step)))
        monkeypatch.setattr(make_env, "has_modules", self.has_modules)
        monkeypatch.setattr(make_env, "run", lambda *command: None)

    def replacement(self, step, original):
        def replaced(venv, *args):
            self.calls.append(step if not args else f"{step} {args[0]['choice']}")
            if step == "create_venv":
                original(venv)
            write(venv, f"bin/{step}", "half")
            if step == self.interrupt_in:
                self.interrupt_in = None
                raise KeyboardInterrupt
            write(venv, f"bin/{step}", "whole")

        return replaced

    def has_modules(self, venv, *names):
        return (venv / "bin").is_dir() and not self.removed_modules & set(names)

    def make_env(self, venv, *args, **kwargs):
        self.calls.clear()
        make_env.make_env(venv, *args, **kwargs)
        return list(self.calls)


ALL_STEPS = ["create_venv", "install_packages", "install_detectron2 pypi", "install_checkout"]


class TestMakeEnv:
    @pytest.fixture
    def fake(self, monkeypatch):
        return FakeInstallation(monkeypatch)

    @pytest.fixture
    def venv(self, tmp_path):
        return tmp_path / "venv"

    @pytest.fixture
    def checkout(self, tmp_path):
        write(tmp_path, "checkout/detectron2/__init__.py", "")
        return str((tmp_path / "checkout").resolve())

    def test_second_time_does_nothing(self, fake, venv, capsys):
        assert fake.make_env(venv) == ALL_STEPS
        assert fake.make_env(venv) == []
        assert "nothing to do" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "step, expected",
        [
            ("create_venv", ALL_STEPS),
            ("install_packages", ALL_STEPS),
            ("install_detectron2", ALL_STEPS[2:]),
            ("install_checkout", ALL_STEPS[3:]),
        ],
    )
    def test_interrupted_step_is_done_again(self, fake, venv, step, expected):
        fake.interrupt_in = step
        with pytest.raises(KeyboardInterrupt):
            fake.make_env(venv)
        assert fake.make_env(venv) == expected
        assert {path.read_text() for path in (venv / "bin").iterdir()} == {"whole"}
        assert fake.make_env(venv) == []

    def test_unfinished_environment_is_emptied(self, fake, venv):
        fake.interrupt_in = "install_packages"
        with pytest.raises(KeyboardInterrupt):
            fake.make_env(venv)
        left = write(venv, "lib/left.py", "")
        fake.make_env(venv)
        assert not left.exists()

    def test_another_detectron2_replaces_the_first(self, fake, venv, checkout):
        fake.make_env(venv)
        from_checkout = [f"install_detectron2 {checkout}", "install_checkout"]
        assert fake.make_env(venv, checkout) == from_checkout
        assert fake.make_env(venv, checkout) == []
        assert fake.make_env(venv) == [], "without a choice, what is there is used"
        assert fake.make_env(venv, "pypi") == ALL_STEPS[2:]
        fake.interrupt_in = "install_detectron2"
        with pytest.raises(KeyboardInterrupt):
            fake.make_env(venv, checkout)
        assert fake.make_env(venv) == from_checkout, "an interrupted choice is not forgotten"

    def test_change_of_a_checkout_is_built_on_request_only(self, fake, venv, checkout, monkeypatch):
        fake.make_env(venv, checkout)
        source = {**make_env.detectron2_source(checkout), "version": "another commit"}
        monkeypatch.setattr(make_env, "detectron2_source", lambda choice: source)
        assert fake.make_env(venv) == []
        assert fake.make_env(venv, checkout)[0] == f"install_detectron2 {checkout}"

    def test_checkout_that_is_gone_can_still_be_used(self, fake, venv, checkout):
        fake.make_env(venv, checkout)
        os.rename(checkout, checkout + "-moved")
        assert fake.make_env(venv) == []

    def test_changed_requirements_are_installed(self, fake, venv, tmp_path, monkeypatch):
        fake.make_env(venv)
        monkeypatch.setattr(make_env, "REQUIREMENTS", tmp_path)
        assert fake.make_env(venv) == ALL_STEPS[1:]

    def test_removed_packages_are_installed_again(self, fake, venv):
        fake.make_env(venv)
        fake.removed_modules = {"detectron2"}
        assert fake.make_env(venv) == ALL_STEPS[2:]
        fake.removed_modules = {"pytest"}
        assert fake.make_env(venv) == ALL_STEPS[1:]

    def test_other_environments_are_left_alone(self, fake, venv, capsys):
        write(venv, "bin/python", "")
        assert fake.make_env(venv) == []
        assert "used as it is" in capsys.readouterr().out
        with pytest.raises(make_env.EnvError, match="not built by make env"):
            fake.make_env(venv, "pypi")
        fake.removed_modules = {"detectron2"}
        with pytest.raises(make_env.EnvError, match="not built by make env"):
            fake.make_env(venv)
        assert [path.name for path in venv.rglob("*")] == ["bin", "python"]

    def test_environment_of_another_python_is_refused(self, fake, venv):
        fake.make_env(venv)
        state = make_env.read_state(venv)
        make_env.write_state(venv, {**state, "python": "3.1"})
        assert fake.make_env(venv) == []
        with pytest.raises(make_env.EnvError, match=r"has Python 3\.1, not"):
            fake.make_env(venv, this_python=True)

    def test_unknown_detectron2_is_refused(self, fake, venv, tmp_path):
        with pytest.raises(make_env.EnvError, match="not 'pypi', 'github' or a Detectron2"):
            fake.make_env(venv, str(tmp_path))
        assert fake.calls == []


def pinned(name, python):
    """Return {package: [specifiers]} of a file of pinned packages, on Linux with this Python."""
    text = (ROOT / "dev" / "requirements" / name).read_text().replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        requirement, *hashes = line.split(" --hash=")
        if line.startswith("#"):
            continue
        assert hashes and all(x.strip().startswith("sha256:") for x in hashes), line
        requirement = Requirement(requirement)
        environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
        }
        if requirement.marker is None or requirement.marker.evaluate(environment):
            specifiers = found.setdefault(canonicalize_name(requirement.name), [])
            specifiers.append(str(requirement.specifier))
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["build", "env", "lint"])
def test_every_requirement_has_one_version(name, python):
    found = pinned(f"{name}.txt", python)
    for specifiers in found.values():
        assert len(specifiers) == 1 and specifiers[0].startswith("=="), found
    # What is asked for is there.
    for line in (ROOT / "dev" / "requirements" / f"{name}.in").read_text().splitlines():
        if line and line[0] not in "#-":
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or marker.evaluate({"python_version": python}):
                (specifier,) = found[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(specifier[2:]), line


def test_stand_in_for_the_extension():
    extension = load(ROOT / "dev" / "detectron2" / "_C.py")
    assert not hasattr(extension, "deform_conv_forward")
    with pytest.raises(AttributeError, match=r"without its C\+\+ extension.*make env DETECTRON2="):
        extension.nms_rotated(None)
    assert not extension.has_cuda()
    assert "without" in extension.get_compiler_version()
    assert "without" in extension.get_cuda_version()


# Imports gfl_d2 from stand-ins of its dependencies: -S hides the environment's packages.
IMPORT = """
try:
    import gfl_d2
except ImportError as e:
    print(type(e).__name__, type(e.__cause__).__name__, e)
"""


@pytest.mark.parametrize(
    "modules, cause, sentence",
    [
        (
            {},
            "ModuleNotFoundError",
            "gfl_d2 needs PyTorch, which is not installed: run `pip install torch torchvision`.",
        ),
        (
            {"torch": "raise OSError('libcudart.so: cannot open')"},
            "OSError",
            "gfl_d2 needs PyTorch, which is installed but does not load (OSError: libcudart.so: "
            "cannot open): run `pip install --force-reinstall torch torchvision`.",
        ),
        (
            {"torch": "", "torchvision": "raise RuntimeError('operator nms does not exist')"},
            "RuntimeError",
            "gfl_d2 needs torchvision, which is installed but does not load (RuntimeError: "
            "operator nms does not exist): "
            "run `pip install --force-reinstall torch torchvision`.",
        ),
        (
            {"torch": "", "torchvision": ""},
            "ModuleNotFoundError",
            "gfl_d2 needs Detectron2, which is not installed: run `pip install "
            "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'`.",
        ),
        (
            {"torch": "", "torchvision": "", "detectron2": "import cv2.gapi"},
            "ModuleNotFoundError",
            "gfl_d2 needs Detectron2, which needs 'cv2', which is not installed: "
            "run `pip install opencv-python`.",
        ),
        (
            {
                "torch": "",
                "torchvision": "",
                "detectron2": "",
                "detectron2/layers": "raise ImportError('_C.so: undefined symbol')",
            },
            "ImportError",
            "gfl_d2 needs Detectron2, which is installed but does not load (ImportError: _C.so: "
            "undefined symbol): run `pip install --force-reinstall --no-deps "
            "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'`.",
        ),
    ],
    ids=["no torch", "broken torch", "broken torchvision", "no detectron2", "no cv2", "broken _C"],
)
def test_import_without_a_dependency(tmp_path, modules, cause, sentence):
    for name, text in modules.items():
        write(tmp_path, f"{name}/__init__.py", text)
    result = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == f"ImportError {cause} {sentence}"


@pytest.mark.slow
def test_import_opens_no_connection():
    code = (
        "import sys\n"
        "def audit(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        sys.exit(f'{event} {args}')\n"
        "sys.addaudithook(audit)\n"
        "import gfl_d2, gfl_d2.analysis, gfl_d2.checkpoint, gfl_d2.conversion, gfl_d2.data\n"
        "import gfl_d2.deploy, gfl_d2.distributions, gfl_d2.engine, gfl_d2.model_zoo\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_setup_metadata(monkeypatch):
    metadata = {}
    monkeypatch.setattr("setuptools.setup", metadata.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert metadata["name"] == "gfl_d2"
    assert metadata["version"] == gfl_d2.__version__
    assert metadata["license"] == "Apache-2.0"
    assert metadata["python_requires"] == ">=3.9"
    assert {"gfl_d2", "gfl_d2.modeling"} <= set(metadata["packages"])
    assert all(name.split(".")[0] == "gfl_d2" for name in metadata["packages"])
    # pip must not choose these for users who have their own.
    required = {Requirement(line).name for line in metadata["install_requires"]}
    assert not required & {"torch", "torchvision", "detectron2"}
    assert set(metadata["extras_require"]) == {
        "calibration", "data", "dev", "export", "openvino", "sahi", "timm",
    }  # fmt: skip


def test_make_help_lists_every_target():
    result = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = (line for line in makefile.splitlines() if line.startswith(".PHONY:"))
    for target in phony.split()[1:]:
        assert target == "help" or f"make {target} " in result.stdout
