#!/usr/bin/env python3
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def get_version():
    text = (ROOT / "gfl_d2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def get_long_description():
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="gfl_d2",
    version=get_version(),
    description="Generalized Focal Loss for Detectron2",
    long_description=get_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gfl_d2", "gfl_d2.*"]),
    # Through a link to the folder `configs`.
    package_data={
        "gfl_d2.distributions": ["page.html"],
        "gfl_d2.result_analysis": ["page.html"],
        "gfl_d2.model_zoo": [
            *("configs/*.yaml", "configs/*/*.yaml"),
            *("configs/lazy/*.py", "configs/lazy/*/*.py", "configs/lazy/*/*/*.py"),
        ],
    },
    python_requires=">=3.9",
    # Not listed: detectron2, which is not on PyPI, and torch and torchvision, which must come
    # as a matching pair that pip cannot choose. An installed Detectron2 has all three.
    install_requires=[
        "anyascii",
        "faster-coco-eval>=1.7",
        "fvcore",
        "numpy",
        "opencv-python",
        "pycocotools",
    ],
    extras_require={
        "calibration": ["scikit-learn"],
        "data": ["supervision>=0.31.2; python_version >= '3.10'"],
        "dev": ["hypothesis", "import-linter", "pytest", "ruff"],
        "export": ["onnx>=1.19", "onnxruntime>=1.19", "onnxscript>=0.5"],
        # NNCF, for int8, needs for Python 3.9 packages that are older than others want.
        "openvino": [
            "nncf>=3; python_version >= '3.10'",
            "onnx>=1.19",
            "onnxscript>=0.5",
            "openvino>=2025.3",
        ],
        "sahi": ["sahi>=0.12"],
        "timm": ["safetensors", "timm>=1.0.30"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
