"""Steps of the training that Detectron2 does not have."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..modeling import GFLCriterion
from ..modeling.criterion import LossSums
from .random_state import preserved_random_state

__all__ = [
    "AccumulatingTrainer", "BFloat16Trainer", "find_criterion", "load_step_state",
    "undivided_losses",
]  # fmt: skip

logger = logging.getLogger(__name__)


def load_step_state(step: SimpleTrainer, state: dict[str, Any]) -> None:
    """
    Load the ``state_dict`` of a step: its optimizer's state, and its scaler's, which starts anew if
    there is none.

    Raises:
        InputError: it is the state of another optimizer, or of other groups of parameters.
    """
    ours = step.state_dict()
    if "grad_scaler" in ours and "grad_scaler" not in state:
        logger.warning("The checkpoint is not of float16: the scaler of losses starts anew.")
        state = {**state, "grad_scaler": ours["grad_scaler"]}
    kinds = ["betas" in x["optimizer"]["param_groups"][0] for x in (state, ours)]
    if kinds[0] != kinds[1]:
        raise InputError("The optimizer is not that of the checkpoint")
    try:
        step.load_state_dict(state)
    except ValueError as error:
        raise InputError(f"The checkpoint's optimizer does not fit: {error}") from None


class BFloat16Trainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` whose forward pass runs under autocast to bfloat16. Weights, gradients
    and the optimizer stay in float32. bfloat16 has the range of float32, so gradients need no
    scaling, unlike those of Detectron2's :class:`AMPTrainer`; and it works on a CPU too.
    """

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device_type = next(self.model.parameters()).device.type
        with torch.autocast(device_type, dtype=torch.bfloat16):
            losses = self.model(data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class AccumulatingTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that computes the gradients of a batch in parts. The losses are divided
    by what the whole batch has of positives and weights, as without parts. These depend on the
    predictions, so that each part passes the model twice, the first time without gradients.

    It takes the place of another trainer, in whose precision it computes.
    """

    def __init__(self, step: SimpleTrainer, number: int):
        """
        Args:
            step: what it takes the place of.
            number: of parts, each of at least one image.

        Raises:
            InputError: see :func:`find_criterion`.
        """
        super().__init__(step.model, step.data_loader, step.optimizer)
        is_wrapped = isinstance(step.model, DistributedDataParallel)
        self._plain_model = step.model.module if is_wrapped else step.model
        self._criterion = find_criterion(self._plain_model, "SOLVER.ACCUMULATE 1")
        self._number = number
        self._scaler = step.grad_scaler if isinstance(step, AMPTrainer) else None
        self._dtype = torch.bfloat16 if isinstance(step, BFloat16Trainer) else None
        if self._scaler:
            self._dtype = torch.float16

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        size = -(-len(data) // self._number)
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        normalizers = self._find_normalizers(parts)
        self.optimizer.zero_grad()
        total: dict[str, Tensor] = {}
        with _normalized(self._criterion, normalizers):
            for i, part in enumerate(parts):
                # Processes exchange their gradients with the last part.
                waits = hasattr(self.model, "no_sync") and i < len(parts) - 1
                with self.model.no_sync() if waits else contextlib.nullcontext():
                    with self._autocast():
                        losses = self.model(part)
                    loss = sum(losses.values())
                    (self._scaler.scale(loss) if self._scaler else loss).backward()
                for name, loss in losses.items():
                    total[name] = total.get(name, 0) + loss.detach()
        self._write_metrics(total, data_time)
        if self._scaler:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()

    def _find_normalizers(self, parts: list[list[dict]]) -> Tensor:
        """Those of the whole batch. Neither BatchNorm nor random numbers notice it."""
        model = self._plain_model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # What the model logs here, it logs again in the other pass.
        with (
            undivided_losses(self._criterion) as sums,
            preserved_random_state(),
            EventStorage(get_event_storage().iter),
            torch.no_grad(),
            self._autocast(),
        ):
            for part in parts:
                model(part)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return self._criterion.normalizers(torch.stack([part.divisors for part in sums]).sum(dim=0))

    def _autocast(self) -> contextlib.AbstractContextManager:
        if not self._dtype:
            return contextlib.nullcontext()
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, dtype=self._dtype)

    def state_dict(self) -> dict:
        scaler = {"grad_scaler": self._scaler.state_dict()} if self._scaler else {}
        return {**super().state_dict(), **scaler}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self._scaler:
            self._scaler.load_state_dict(state_dict["grad_scaler"])


def find_criterion(model: nn.Module, remedy: str) -> GFLCriterion:
    """
    The criterion of GFL, of which losses can be added up over batches. Raises InputError, which
    names the remedy, if the model has none, its quality or assigner scales losses over the batch,
    or there is distillation, whose terms have divisors of their own.
    """
    criterion = getattr(model, "criterion", None)
    if not isinstance(criterion, GFLCriterion):
        raise InputError(
            f"{type(model).__name__} has not the criterion of GFL, whose losses can be added up "
            f"over batches: set {remedy}"
        )
    if criterion.distillation:
        raise InputError(
            "Losses of distillation (MODEL.GFL.DISTILL.TERMS) cannot be added up over batches: set "
            f"{remedy}"
        )
    for part in (criterion.quality, model.assigner):
        if not getattr(part, "adds_up", True):
            raise InputError(
                f"{type(part).__name__} (MODEL.GFL.QUALITY or ASSIGNER) scales losses over the "
                f"whole batch, so that parts of it do not add up: set {remedy}"
            )
    return criterion


@contextlib.contextmanager
def undivided_losses(criterion: GFLCriterion) -> Iterator[list[LossSums]]:
    """
    Within it the losses of the criterion are not divided, and processes do not wait for each other.
    It gives a list, to which each call adds the sums.
    """
    sums = []

    def change(module, args, kwargs):
        predictions, levels, samples, *_ = args
        sums.append(module.sums(predictions, levels, samples))
        return args, {**kwargs, "normalizers": torch.ones_like(sums[-1].divisors)}

    with _hooked(criterion, change):
        yield sums


def _normalized(
    criterion: GFLCriterion, normalizers: Tensor
) -> contextlib.AbstractContextManager[None]:
    return _hooked(
        criterion, lambda module, args, kwargs: (args, {**kwargs, "normalizers": normalizers})
    )


@contextlib.contextmanager
def _hooked(criterion: GFLCriterion, hook: Callable) -> Iterator[None]:
    handle = criterion.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
