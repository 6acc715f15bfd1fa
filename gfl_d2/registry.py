"""Registries of the parts that ``MODEL.GFL`` chooses by a short name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fvcore.common.registry import Registry as FvcoreRegistry

from .errors import InputError

__all__ = ["ASSIGNER_REGISTRY", "BOX_REPRESENTATION_REGISTRY", "QUALITY_REGISTRY", "Registry"]

_Class = TypeVar("_Class", bound=type)


class Registry(FvcoreRegistry):
    """
    fvcore's registry with short names in the place of class names:

        @QUALITY_REGISTRY.register("joint")
        class JointQuality(...):
            @classmethod
            def from_config(cls, cfg): ...
    """

    def __init__(self, key: str):
        """
        Args:
            key: the config key whose values are the names, e.g. "MODEL.GFL.QUALITY".
        """
        super().__init__(key)

    def register(self, name: str) -> Callable[[_Class], _Class]:
        """A decorator that registers a class, which has a class method ``from_config(cfg)``."""

        def register(cls: _Class) -> _Class:
            self._do_register(name, cls)
            return cls

        return register

    def get(self, name: str) -> type:
        """
        Raises:
            InputError: no class is registered under this name.
        """
        if name not in self:
            names = ", ".join(repr(name) for name, _ in self)
            raise InputError(f"{self._name} must be one of {names}, got {name!r}")
        return super().get(name)


QUALITY_REGISTRY = Registry("MODEL.GFL.QUALITY")
BOX_REPRESENTATION_REGISTRY = Registry("MODEL.GFL.BOX_REPRESENTATION")
ASSIGNER_REGISTRY = Registry("MODEL.GFL.ASSIGNER")
