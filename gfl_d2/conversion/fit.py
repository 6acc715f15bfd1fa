"""Which config weights need."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..config import load_config
from ..errors import InputError
from .facts import LEGACY_CENTERS, Facts, describe

__all__ = [
    "TRAINABLE_BATCH_NORMS",
    "Difference",
    "check_config",
    "find_configs",
    "find_differences",
    "suggest_command",
]

TRAINABLE_BATCH_NORMS = ("BN", "NaiveSyncBN", "SyncBN", "nnSyncBN")


@dataclass(frozen=True)
class Difference:
    """A key whose value in a config is not what weights need."""

    key: str
    in_config: Any
    in_weights: Any


def find_differences(facts: Facts, cfg: CfgNode) -> list[Difference]:
    """The keys whose values in a config are not what weights need."""
    differences = []
    for key, needed in facts.config.items():
        value = functools.reduce(lambda node, name: node[name], key.split("."), cfg)
        if isinstance(needed, list):
            value = list(value)
        if key == "MODEL.RESNETS.NORM" and value in ("FrozenBN", *TRAINABLE_BATCH_NORMS):
            continue
        if value != needed:
            differences.append(Difference(key, value, needed))
    return differences


def check_config(facts: Facts, cfg: CfgNode, config_file: str) -> list[Difference]:
    """
    Check that weights fit a config.

    Args:
        facts: about the weights.
        cfg: from the file.
        config_file: for messages.

    Returns:
        list[Difference]: what fits and yet has to be changed: old anchor centres.

    Raises:
        InputError: they do not; the message names each key and both its values.
    """
    differences = find_differences(facts, cfg)
    advice = [d for d in differences if d.key == LEGACY_CENTERS and d.in_weights]
    wrong = [
        f"{d.key} is {d.in_config!r}, not {d.in_weights!r}" for d in differences if d not in advice
    ]
    if wrong:
        raise InputError(
            f"Config file '{config_file}' does not fit the weights, which are of "
            f"{describe(facts)}. In the config {'; '.join(wrong)}"
        )
    return advice


def find_configs(
    facts: Facts, config_files: Iterable[str | os.PathLike]
) -> list[tuple[str, list[Difference]]]:
    """
    Args:
        facts: about weights.
        config_files: to choose from. Bases of others, and those of other models, do not count.

    Returns:
        list[tuple]: the files that fit best, each with the keys that have to be changed: the same
        number of them for each file.
    """
    found = []
    for config_file in sorted(os.fspath(file) for file in config_files):
        if os.path.basename(config_file).startswith("Base-"):
            continue
        try:
            cfg = load_config(config_file, ["MODEL.DEVICE", "cpu"])
        except InputError:  # not what is asked here
            continue
        if cfg.MODEL.META_ARCHITECTURE == "GFL":
            found.append((config_file, find_differences(facts, cfg)))
    fewest = min((len(differences) for _, differences in found), default=0)
    return [(file, differences) for file, differences in found if len(differences) == fewest]


def suggest_command(
    facts: Facts,
    config_file: str,
    differences: Iterable[Difference],
    weights: str,
    opts: Iterable[str] = (),
) -> str:
    """
    The command that evaluates weights, or that starts training from those of a backbone.

    Args:
        facts: about the weights.
        config_file: to use.
        differences: keys of it to change.
        weights: their file.
        opts: alternately keys and values, to change besides.
    """
    words = ["python", "train_net.py", "--config-file", config_file]
    words += ["--eval-only"] if facts.is_detector else []
    words += ["MODEL.WEIGHTS", weights, *opts]
    for difference in differences:
        is_norm = difference.key == "MODEL.RESNETS.NORM"  # to evaluate, or to start from
        words += [difference.key, "FrozenBN" if is_norm else str(difference.in_weights)]
    return shlex.join(words)
