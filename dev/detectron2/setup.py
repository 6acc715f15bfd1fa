"""Installs the Python sources of Detectron2 0.6; see install_from_pypi in make_env.py."""

from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 0.6, Python sources only",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "Pillow",
        "cloudpickle",
        "fvcore",
        "hydra-core",
        "iopath",
        "matplotlib",
        "omegaconf",
        "pycocotools",
        "tabulate",
        "tensorboard",
        "termcolor",
        "tqdm",
        "yacs",
    ],
)
