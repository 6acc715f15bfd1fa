"""Loading weights so that what does not fit is an error, not a line in the log."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from .errors import InputError, name_some
from .files import atomic_write

__all__ = ["GFLCheckpointer"]

# Parameters that depend on the number of classes: fine-tuning on other data starts them anew.
_CLASS_DEPENDENT = re.compile(r"^head\.cls_score\.")
# Not in all ImageNet weights: offsets of deformable convolutions, and statistics of BatchNorm
# (which FrozenBatchNorm2d fills in).
_OPTIONAL = re.compile(
    r"\.((conv2_offset|conv_offsets\.\d+)\.(weight|bias)|running_(mean|var)|num_batches_tracked)$"
)
# A ResNet layer under whatever prefix. Weights of a bare ResNet, which Detectron2 matches by the
# ends of their names, keep these names where they fit nothing. Their classifier ("fc") may.
_RESNET_LAYER = re.compile(r"(^|\.)(stem\.conv\d|res\d\.\d+)\.")
_RESNET = "backbone.bottom_up"
# How many parameters a message names.
_NUM_NAMED = 3


class GFLCheckpointer(DetectionCheckpointer):
    """
    :class:`DetectionCheckpointer` that refuses weights which fit only in part, where Detectron2
    logs warnings and goes on with random values in the gaps.

    A model for fine-tuning may start from a detector with another number of classes (the
    classifier then starts anew), or from a file that lacks whole parts of it, such as ImageNet
    weights, which have neither FPN nor head. A part of which only some parameters fit is an error.
    For evaluation, and to resume training, every parameter has to be there and fit.

    Files are written whole or not at all: after a kill at any time, ``last_checkpoint`` names a
    checkpoint that can be loaded.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **kwargs: Any
    ):
        """
        Args:
            model: to load weights into.
            save_dir: as in :class:`DetectionCheckpointer`.
            complete: require every parameter, as evaluation does.
            kwargs: as in :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager()
        self.complete = complete
        self._path = ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As :meth:`load`, from the last checkpoint in ``save_dir`` if there is one to resume."""
        if resume and self.has_checkpoint():
            self.complete = True
        return super().resume_or_load(path, resume=resume)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        As :meth:`DetectionCheckpointer.load`.

        Raises:
            InputError: the file is missing, is no checkpoint, or does not fit the model. The model
                is then unchanged, except where the file fits in part.
        """
        self._path = path
        if path:
            self._check_exists(path)
        elif self.complete:
            self.logger.warning("MODEL.WEIGHTS is empty: the weights are random.")
        return super().load(path, *args, **kwargs)

    def _check_exists(self, path: str) -> None:
        try:
            # Detectron2 reads options from what follows a "?".
            local_path = self.path_manager.get_local_path(path.partition("?")[0])
        except OSError as error:  # a download that failed
            raise InputError(f"Weights file {path} cannot be fetched: {error}") from None
        if not os.path.isfile(local_path):
            raise InputError(f"Weights file {path} does not exist")

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            checkpoint = super()._load_file(filename)
        # Bytes that are no checkpoint can make unpickling raise anything.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"Weights file {self._path} cannot be read: {reason}") from None
        weights = checkpoint["model"]
        is_state_dict = isinstance(weights, Mapping) and all(
            isinstance(value, (torch.Tensor, np.ndarray)) for value in weights.values()
        )
        if not is_state_dict:
            raise InputError(
                f"Weights file {self._path} is not a checkpoint of a model: it does not map names "
                "to tensors"
            )
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        shapes = {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
        incompatible = super()._load_model(checkpoint)
        wrong = {name: (there, here) for name, there, here in incompatible.incorrect_shapes}
        wrong.update(self._find_wrong_shapes(incompatible, shapes))
        missing = [name for name in incompatible.missing_keys if name not in wrong]
        unexpected = [
            end
            for end in incompatible.unexpected_keys
            if not any(name.endswith(f".{end}") for name in wrong)
        ]
        if self.complete:
            missing = [name for name in missing if not name.endswith(".num_batches_tracked")]
        else:
            wrong, missing, unexpected = self._gaps(wrong, missing, unexpected)
        if wrong or missing or unexpected:
            raise InputError(_describe(self._path, wrong, missing, unexpected))
        self._report_new_classifier(incompatible)
        return incompatible

    def _find_wrong_shapes(
        self, incompatible, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, tuple]:
        """
        The parameters that Detectron2 has left out when it matched the ends of names, as their
        shapes differ: it reports these as missing in the file and unexpected in the model.

        Args:
            incompatible: names that did not fit.
            shapes: of everything in the file, by name.

        Returns:
            dict: name in the model -> shape in the file, shape in the model.
        """
        model = self.model.state_dict()
        return {
            name: (shapes[end], tuple(model[name].shape))
            for name in incompatible.missing_keys
            for end in incompatible.unexpected_keys
            if name.endswith(f".{end}") and shapes.get(end, model[name].shape) != model[name].shape
        }

    def _gaps(
        self, wrong: dict[str, tuple], missing: list[str], unexpected: list[str]
    ) -> tuple[dict[str, tuple], list[str], list[str]]:
        """
        Of the names that did not fit, those that a file to start training from may not have.
        """
        loaded = set(self.model.state_dict()).difference(wrong, missing)
        parts = {_part(name) for name in loaded if not _OPTIONAL.search(name)}
        if not parts:  # nothing fits: all of it is wrong
            return wrong, missing, unexpected
        return (
            {name: value for name, value in wrong.items() if not _CLASS_DEPENDENT.search(name)},
            [name for name in missing if _part(name) in parts and not _OPTIONAL.search(name)],
            [
                name
                for name in unexpected
                if _part(name) in parts or (_RESNET in parts and _RESNET_LAYER.search(name))
            ],
        )

    def _report_new_classifier(self, incompatible) -> None:
        """Put one warning in the place of Detectron2's for the parameters that start anew."""
        names = [name for name, _, _ in incompatible.incorrect_shapes]
        if names:
            _, there, here = incompatible.incorrect_shapes[0]
            self.logger.warning(
                f"{self._path} is of a model with another number of classes, so {len(names)} "
                f"parameters start anew: {', '.join(names)} (the first has shape {there} there, "
                f"{here} here)"
            )
        incompatible.incorrect_shapes.clear()
        for name in names:
            incompatible.missing_keys.remove(name)


class _AtomicPathManager:
    """Detectron2's, but that it writes local files by :func:`atomic_write`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> contextlib.AbstractContextManager:
        if mode not in ("w", "wb") or "://" in path:
            return PathManager.open(path, mode, **kwargs)
        return atomic_write(path) if mode == "wb" else _atomic_write_text(path)


@contextlib.contextmanager
def _atomic_write_text(path: str) -> Iterator[IO[str]]:
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.detach()  # writes the rest


def _part(name: str) -> str:
    """The part of the model that a parameter belongs to, e.g. backbone.bottom_up, head.scales."""
    return ".".join(name.split(".")[:2])


def _describe(path: str, wrong: dict[str, tuple], missing: list[str], unexpected: list[str]) -> str:
    shapes = [f"{name} is {there}, not {here}" for name, (there, here) in wrong.items()]
    problems = [
        f"{what} ({len(names)}): {name_some(names, _NUM_NAMED)}"
        for names, what in (
            (shapes, "Of another shape than in the model"),
            (missing, "Not in the file"),
            (unexpected, "Not in the model"),
        )
        if names
    ]
    return f"Weights file {path} does not fit the model. {'. '.join(problems)}"
