"""Says in one sentence what to do when PyTorch, torchvision or Detectron2 does not load."""

import importlib

_INSTALL_TORCH = "pip install torch torchvision"
_REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
_DETECTRON2 = "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
_INSTALL_DETECTRON2 = f"pip install {_DETECTRON2}"
_REBUILD_DETECTRON2 = f"pip install --force-reinstall --no-deps {_DETECTRON2}"

# (module to load, what to call it, command if it is missing, command if it does not load).
# detectron2.layers loads Detectron2's C++ extension, where there is one.
_MODULES = (
    ("torch", "PyTorch", _INSTALL_TORCH, _REINSTALL_TORCH),
    ("torchvision", "torchvision", _INSTALL_TORCH, _REINSTALL_TORCH),
    ("detectron2.layers", "Detectron2", _INSTALL_DETECTRON2, _REBUILD_DETECTRON2),
)

# Modules whose distribution has another name.
_DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "Pillow", "yaml": "PyYAML"}


def check_dependencies():
    """
    Load PyTorch, torchvision and Detectron2.

    Raises:
        ImportError: one of them is missing or does not load, for instance a torchvision built
            for another PyTorch. The message has the command that mends it.
    """
    for module, name, install, reinstall in _MODULES:
        try:
            importlib.import_module(module)
        # A library that does not fit PyTorch raises RuntimeError, OSError or AttributeError too.
        except Exception as e:
            missing = (e.name or "").partition(".")[0] if isinstance(e, ModuleNotFoundError) else ""
            if missing == module.partition(".")[0]:
                problem, command = "which is not installed", install
            elif missing:
                problem = f"which needs '{missing}', which is not installed"
                command = f"pip install {_DISTRIBUTIONS.get(missing, missing)}"
            else:
                problem = f"which is installed but does not load ({type(e).__name__}: {e})"
                command = reinstall
            raise ImportError(f"gfl_d2 needs {name}, {problem}: run `{command}`.") from e
