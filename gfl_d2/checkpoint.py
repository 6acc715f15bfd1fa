"""
Loading weights so that what does not fit is an error, not a line in the log, and saving them with
what describes the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from .config import load_config, parse_config
from .errors import InputError, name_some
from .files import AtomicPathManager
from .inflation import inflate_stem
from .plain_checkpointer import PlainCheckpointer
from .plain_data import check_weights, find_refused, load_torch

__all__ = [
    "BEST_MODEL", "GFLCheckpointer", "describe_model", "describe_problems", "find_config",
    "get_local_path", "load_checkpoint_config",
]  # fmt: skip

# Of the best evaluation, without what a training would be resumed from.
BEST_MODEL = "model_best.pth"

# Parameters that depend on the number of classes: fine-tuning on other data starts them anew.
_CLASS_DEPENDENT = re.compile(r"^head\.cls_score\.")
# Not in all ImageNet weights: offsets of deformable convolutions, relative positions of a ViT, and
# statistics of BatchNorm (which FrozenBatchNorm2d fills in).
_OPTIONAL = re.compile(
    r"\.((conv2_offset|conv_offsets\.\d+)\.(weight|bias)|rel_pos_.|running_\w+|num_batches_tracked)$"
)
# A ResNet layer under whatever prefix. Weights of a bare ResNet, which Detectron2 matches by the
# ends of their names, keep these names where they fit nothing. Their classifier ("fc") may.
_RESNET_LAYER = re.compile(r"(^|\.)(stem\.conv\d|res\d\.\d+)\.")
_RESNET = "backbone.bottom_up"
# What training alone uses of a GFL: parameters of an assigner.
_TRAINING_ONLY = "assigner."


class GFLCheckpointer(PlainCheckpointer):
    """
    :class:`DetectionCheckpointer` that refuses weights which fit only in part, where Detectron2
    logs warnings and goes on with random values in the gaps.

    A model for fine-tuning may start from a detector with another number of classes (the
    classifier then starts anew), or from a file that lacks whole parts of it, such as ImageNet
    weights, which have neither FPN nor head. A part of which only some parameters fit is an error.
    For evaluation, and to resume training, every parameter has to be there and fit. Those of an
    assigner, which only training uses, may be missing in evaluation, in the file or in the model.
    Weights for images of 3 channels may start a model for others: see :func:`inflate_stem`.

    Nothing in a file is executed: see :class:`PlainCheckpointer`.

    Files are written whole or not at all: after a kill at any time, ``last_checkpoint`` names a
    checkpoint that can be loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        averaged: bool | None = None,
        description: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            complete: require every parameter, as evaluation does.
            averaged: take the averages (``MODEL_EMA``) if a file has any; None: as ``complete``.
            description: saved with the weights, see :func:`describe_model`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.description = dict(description or {})
        self.path_manager = AtomicPathManager()
        self.complete = complete
        self._is_resuming = False
        self.averaged = complete if averaged is None else averaged

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Raises InputError, and saves nothing, if a weight is NaN or infinite, or as
        :meth:`check_states` does.
        """
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        wrong = [name for name, tensor in tensors if not tensor.isfinite().all()]
        if wrong:
            raise InputError(
                f"Weights are NaN or infinite: {name_some(wrong)}. Nothing is saved; the last "
                "checkpoint is of before. Lower SOLVER.BASE_LR, or set "
                "SOLVER.CLIP_GRADIENTS.ENABLED True"
            )
        self.check_states(**kwargs)
        super().save(name, **{**self.description, **kwargs})

    def check_states(self, **others: Any) -> None:
        """
        Raises InputError if what is saved beside the model holds more than tensors and plain data,
        as the state of a hook may: it could not be read again.
        """
        states = {name: part.state_dict() for name, part in self.checkpointables.items()}
        for name, state in {**states, **others}.items():
            refused = find_refused(state, name)
            if refused:
                raise InputError(
                    f"A checkpoint could not be resumed: {refused}, and only tensors and plain "
                    "data are read. Convert it in state_dict()"
                )

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As :meth:`load`, from the last checkpoint in ``save_dir`` if there is one to resume."""
        if resume and self.has_checkpoint():
            self.complete = self._is_resuming = True
            self._find_last()
        return super().resume_or_load(path, resume=resume)

    def _find_last(self) -> None:
        path = self.get_checkpoint_file()
        if "://" in path or os.path.isfile(path):
            return
        names = sorted((x for x in os.listdir(self.save_dir) if x.endswith(".pth")), reverse=True)
        there = name_some([x for x in names if x != BEST_MODEL])  # which has no optimizer
        raise InputError(
            f"{self.save_dir}/last_checkpoint names {os.path.basename(path)!r}, which is gone: "
            f"write another name into it ({there or 'there is none'}), or delete it to start anew"
        )

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        Raises:
            InputError: the file is missing, is no checkpoint, or does not fit the model. The model
                is then unchanged, except where the file fits in part.
        """
        if path:
            get_local_path(path)
        elif self.complete:
            self.logger.warning("MODEL.WEIGHTS is empty: the weights are random.")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = super()._load_file(filename)
        if self._is_resuming and "trainer" in self.checkpointables and "trainer" not in checkpoint:
            raise InputError(
                f"{self._path} has weights, but no state of a training to resume: start from it by "
                "MODEL.WEIGHTS, without --resume, in another OUTPUT_DIR"
            )
        if self.averaged and "ema" in checkpoint:
            self.logger.info(f"Taking the averages of weights (MODEL_EMA) in {self._path}")
            checkpoint["model"] = checkpoint.pop("ema")
        elif self.complete and "ema" in checkpoint and not self.checkpointables:
            self.logger.warning(f"{self._path} has averages too: MODEL_EMA.ENABLED True takes them")
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        check_weights(checkpoint["model"], self._path)
        names = self.description.get("class_names", [])
        trained = checkpoint.get("class_names", [])
        if self._is_resuming and names != trained and sorted(names) == sorted(trained):
            raise InputError(
                f"{self._path} was trained with the classes in another order: set "
                f"DATASETS.CLASSES {list(trained)}"
            )
        name = "" if self.complete else inflate_stem(checkpoint["model"], self.model.state_dict())
        if name:
            self.logger.warning(
                f"{self._path} is for images of 3 channels: {name} was changed to shape "
                f"{tuple(checkpoint['model'][name].shape)}. Channels beyond the third have weights "
                "of 0, and stay without effect if MODEL.BACKBONE.FREEZE_AT freezes the stem"
            )
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
            if not self._is_resuming:
                missing, unexpected = (
                    [name for name in names if not name.startswith(_TRAINING_ONLY)]
                    for names in (missing, unexpected)
                )
        else:
            wrong, missing, unexpected = self._gaps(wrong, missing, unexpected)
        shapes = [f"{name} is {there}, not {here}" for name, (there, here) in wrong.items()]
        problems = {
            "Of another shape than in the model": shapes,
            "Not in the file": missing,
            "Not in the model": unexpected,
        }
        if any(problems.values()):
            raise InputError(
                f"Weights file {self._path} does not fit the model. {describe_problems(problems)}"
            )
        self._report_new_classifier(incompatible)
        return incompatible

    def _find_wrong_shapes(self, incompatible, shapes: dict[str, tuple]) -> dict[str, tuple]:
        """
        The parameters that Detectron2 has left out when it matched the ends of names, as their
        shapes differ: it reports these as missing in the file and unexpected in the model. Name in
        the model -> shape in the file, shape in the model.
        """
        model, wrong = self.model.state_dict(), {}
        for end in incompatible.unexpected_keys:
            names = [name for name in incompatible.missing_keys if name.endswith(f".{end}")]
            shape = shapes.get(end)
            # An end that several names have, such as "norm.weight", is of none of them.
            if len(names) == 1 and shape not in (None, tuple(model[names[0]].shape)):
                wrong[names[0]] = shape, tuple(model[names[0]].shape)
        return wrong

    def _gaps(
        self, wrong: dict[str, tuple], missing: list[str], unexpected: list[str]
    ) -> tuple[dict[str, tuple], list[str], list[str]]:
        """Of the names that did not fit, those for which a file to start training from is wrong."""
        loaded = set(self.model.state_dict()).difference(wrong, missing)
        parts = {_part(name) for name in loaded if not _OPTIONAL.search(name)}
        if not parts:  # nothing fits: all of it is wrong
            return wrong, missing, unexpected
        layers = [n for n in unexpected if _RESNET in parts and _RESNET_LAYER.search(n)]
        return (
            {name: value for name, value in wrong.items() if not _CLASS_DEPENDENT.search(name)},
            [name for name in missing if _part(name) in parts and not _OPTIONAL.search(name)],
            [name for name in unexpected if _part(name) in parts or name in layers],
        )

    def _report_new_classifier(self, incompatible) -> None:
        """Put one warning in the place of Detectron2's for the parameters that start anew."""
        if not incompatible.incorrect_shapes:
            return
        names = [name for name, _, _ in incompatible.incorrect_shapes]
        _, there, here = incompatible.incorrect_shapes[0]
        self.logger.warning(
            f"{self._path} is of a model with another number of classes, so {len(names)} "
            f"parameters start anew: {', '.join(names)} (the first has shape {there} there, "
            f"{here} here)"
        )
        incompatible.incorrect_shapes.clear()
        for name in names:
            incompatible.missing_keys.remove(name)


def describe_model(cfg: CfgNode, class_names: Iterable[str] | None = None) -> dict[str, Any]:
    """
    What a checkpoint carries beside the weights, so that it can be used alone, as plain data:
    "config", in yaml, and "class_names", a list of str, where they are known.
    """
    names = [str(name) for name in class_names or ()]
    return {"config": cfg.dump(), **({"class_names": names} if names else {})}


def load_checkpoint_config(path: str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode:
    """
    The config that a checkpoint carries, with the checkpoint as ``MODEL.WEIGHTS``, changed by
    ``KEY VALUE`` pairs and checked: see :func:`gfl_d2.config.parse_config`. Only tensors and plain
    data are read: nothing in the file is executed.

    Raises:
        InputError: the file is missing or carries no config, or a key or value is wrong.
    """
    path = os.fspath(path)
    local_path = get_local_path(path)
    # A .pkl is of a model zoo, of which no file has a config.
    content = None if local_path.endswith(".pkl") else load_torch(local_path, path)
    text = content.get("config") if isinstance(content, Mapping) else None
    if not isinstance(text, str):
        raise InputError(
            f"Weights file {path} carries no config: give a config, as --config-file to a script, "
            "or as Predictor(cfg) with the file as cfg.MODEL.WEIGHTS"
        )
    return parse_config(text, path, opts)


def find_config(config_file: str | None, opts: Sequence[str]) -> CfgNode:
    """
    The config of a file, or else that of the checkpoint which ``MODEL.WEIGHTS`` names in the
    ``KEY VALUE`` pairs. Raises InputError as :func:`load_checkpoint_config`, and if there is none.
    """
    weights = dict(zip(opts[::2], opts[1::2])).get("MODEL.WEIGHTS")
    if config_file:
        return load_config(config_file, opts)
    if not weights:
        raise InputError(
            "Give --config-file. Only with MODEL.WEIGHTS of a checkpoint that carries its config "
            "it may be left out"
        )
    return load_checkpoint_config(weights, opts)


def get_local_path(path: str) -> str:
    """Where the file is, after a download if need be. Raises InputError if there is none."""
    try:
        # Detectron2 reads options from what follows a "?".
        local_path = PathManager.get_local_path(path.partition("?")[0])
    except OSError as error:  # a download that failed
        raise InputError(f"Weights file {path} cannot be fetched: {error}") from None
    if not os.path.isfile(local_path):
        raise InputError(f"Weights file {path} does not exist")
    return local_path


def _part(name: str) -> str:
    """The part of the model that a parameter belongs to, e.g. backbone.bottom_up, head.scales."""
    return ".".join(name.split(".")[:2])


def describe_problems(problems: Mapping[str, Collection[str]], number: int = 3) -> str:
    """What is wrong -> names of parameters, as sentences with ``number`` names each at most."""
    return ". ".join(
        f"{what} ({len(names)}): {name_some(names, number)}"
        for what, names in problems.items()
        if names
    )
