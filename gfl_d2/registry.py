"""Registries of the parts that ``MODEL.GFL`` chooses by a short name."""

from collections.abc import Callable

from fvcore.common.registry import Registry as FvcoreRegistry

from .errors import InputError

__all__ = [
    "ASSIGNER_REGISTRY", "BOX_REPRESENTATION_REGISTRY", "DISTILLATION_REGISTRY",
    "QUALITY_REGISTRY", "Registry",
]  # fmt: skip


class Registry(FvcoreRegistry):
    """
    fvcore's registry with short names in the place of class names. It is itself named by the config
    key that takes them, such as "MODEL.GFL.QUALITY":

        @QUALITY_REGISTRY.register("joint")
        class JointQuality(...):
            @classmethod
            def from_config(cls, cfg): ...
    """

    def register(self, name: str) -> Callable[[type], type]:
        """
        A decorator that registers a class, which has a class method ``from_config(cfg)``, an
        assigner ``from_config(cfg, input_shape)``: the shape of each level's feature.
        """

        def register(cls: type) -> type:
            self._do_register(name, cls)
            return cls

        return register

    def get(self, name: str) -> type:
        """Raises InputError if no class is registered under this name."""
        if not isinstance(name, str) or name not in self:
            names = ", ".join(repr(name) for name, _ in self)
            raise InputError(f"{self._name} must be one of {names}, got {name!r}")
        return super().get(name)


QUALITY_REGISTRY = Registry("MODEL.GFL.QUALITY")
BOX_REPRESENTATION_REGISTRY = Registry("MODEL.GFL.BOX_REPRESENTATION")
ASSIGNER_REGISTRY = Registry("MODEL.GFL.ASSIGNER")
DISTILLATION_REGISTRY = Registry("MODEL.GFL.DISTILL.TERMS")
