"""The images of a training, in an order that can be entered anywhere."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import operator
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .preemption import SIGNALS
from .random_state import seeded_random_state

__all__ = ["TrainingLoader"]

# Which image, its number in the order of all that the training sees, in all processes, and the
# iteration.
_Sample = tuple[int, int, int]

# A signal to all processes of a job is not to end the workers before the training is saved. They
# end at the training's own, which they have to tell from others.
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")  # not on macOS


class TrainingLoader:
    """
    The batches of a training, without end, in the order of Detectron2's sampler
    (``DATALOADER.SAMPLER_TRAIN``) and in its groups of images that lie or stand
    (``ASPECT_RATIO_GROUPING``).

    Which image is in which batch, and every random number that its augmentation draws from
    Python's, NumPy's and PyTorch's generators, depend on the seed and on its number in that order
    alone. So batches do not depend on ``NUM_WORKERS``, and the order can be entered anywhere.
    Without groups a batch of all processes does not depend on their number either.
    """

    def __init__(
        self,
        cfg: CfgNode,
        records: Sequence[dict],
        mapper: Callable[[dict], dict | None],
    ):
        """
        Args:
            records: images in Detectron2's format. Each has "width" and "height". Worker processes
                share the memory of a :class:`DatasetFromList`.
            mapper: makes the model's input of one, which has "iteration" too. If it makes None,
                another image is drawn.
        """
        self._batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        self._cfg, self._mapper = cfg, mapper
        self._sizes = [(record["width"], record["height"]) for record in records]
        self._records = records
        self._seed, self.last_batch = None, []
        self.start(cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(), 0)

    def start(self, seed: int, iteration: int) -> None:
        """Iterators that are not in use yet begin with the batch of this iteration."""
        if seed != self._seed:
            self._seed, self._sampler = seed, self._build_sampler(seed)
        self._iteration = iteration

    def _build_sampler(self, seed: int) -> Iterable[int]:
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.SEED = seed
        # Some of Detectron2's samplers take SEED, others draw their seed.
        with seeded_random_state(seed):
            arguments = build_detection_train_loader.from_config(
                cfg, mapper=self._mapper, dataset=self._records
            )
        return arguments["sampler"]

    def __iter__(self) -> Iterator[list[dict]]:
        # Nothing of it runs, and no worker starts, before the first batch is taken.
        batches = itertools.islice(enumerate(self._batches()), self._iteration, None)
        samples = ((*sample, iteration) for iteration, batch in batches for sample in batch)
        workers = self._cfg.DATALOADER.NUM_WORKERS
        loader = DataLoader(
            _SeededDataset(self._records, self._mapper, self._seed),
            sampler=samples,
            collate_fn=operator.itemgetter(0),
            num_workers=workers,
            multiprocessing_context=_worker_start_method() if workers else None,
            worker_init_fn=_wait_for_the_training if _KNOWS_SENDERS else None,
            # It draws a number when it starts, which is not to be one of the training's.
            generator=torch.Generator(),
        )
        with _signals_left_to_the_training():
            elements = iter(loader)
        while True:
            self.last_batch = list(itertools.islice(elements, self._batch_size))
            yield self.last_batch

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Of images and their numbers."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        samples = ((index, n * processes + rank) for n, index in enumerate(self._sampler))
        if not self._cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            while True:
                yield list(itertools.islice(samples, self._batch_size))
        shapes = (
            {"width": self._sizes[index][0], "height": self._sizes[index][1], "sample": (index, n)}
            for index, n in samples
        )
        for batch in AspectRatioGroupedDataset(shapes, self._batch_size):
            yield [shape["sample"] for shape in batch]


class _SeededDataset(Dataset):
    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict | None], seed: int):
        self._records, self._mapper, self._seed = records, mapper, seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, sample: _Sample) -> Any:
        index, number, iteration = sample
        with seeded_random_state(self._seed, number):
            for i in itertools.chain([index], self._others()):
                element = self._mapper({**self._records[i], "iteration": iteration})
                if element is not None:
                    return element
        raise InputError("The mapper makes None of all images of DATASETS.TRAIN")

    def _others(self) -> Iterator[int]:
        yield from torch.randperm(len(self)).tolist()


def _worker_start_method() -> str:
    """That of the process, but no server of forks, which a signal to all processes would end."""
    method = multiprocessing.get_start_method()
    return "spawn" if method == "forkserver" else method


@contextlib.contextmanager
def _signals_left_to_the_training() -> Iterator[None]:
    """
    Processes that start in it have the signals blocked, in all threads: some libraries start
    theirs when they are imported, before any code of a worker runs.
    """
    if not _KNOWS_SENDERS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Spawned processes need a tracker. When it starts, Python up to 3.13 unblocks SIGTERM.
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_the_training(worker_id: int) -> None:
    threading.Thread(target=_end_with_the_training, daemon=True).start()


def _end_with_the_training() -> None:
    # Python terminates workers that are left, and waits for them.
    training = multiprocessing.parent_process().pid
    while signal.sigwaitinfo(SIGNALS).si_pid != training:
        pass
    os._exit(0)
