"""Stand-in for the C++ extension, which this installation of Detectron2 does not have."""


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is not available: this environment has Detectron2 without its "
        "C++ extension. Build one that has it with `make env DETECTRON2=github`, or "
        "`make env DETECTRON2=<checkout of Detectron2>`."
    )


# detectron2.utils.collect_env prints these three.
def get_compiler_version():
    return "none (installed without the C++ extension)"


def get_cuda_version():
    return "none (installed without the C++ extension)"


def has_cuda():
    return False
