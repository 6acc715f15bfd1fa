"""Signals, kills, full disks: what there is to resume from afterwards."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.engine import HookBase, defaults
from torch.nn.parallel import DistributedDataParallel

import test_exact_resume as exact
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.engine import Trainer, claim_output_folder, runs
from gfl_d2.engine.preemption import SIGNALS
from gfl_d2.errors import InputError
from gfl_d2.files import lock_folder, remove_unfinished
from scripts import load_script

kills = load_script("dev/survive_kills.py")


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    exact.write_standing_images(tmp_path)
    return tmp_path


class Signals(HookBase):
    """Sends a signal to this process, and to its workers, in an iteration."""

    def __init__(self, number, iteration):
        self._number, self._iteration = number, iteration

    def before_step(self):
        if self.trainer.iter == self._iteration:
            pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
            # The sender is another process, as it would be.
            subprocess.run(["kill", f"-{int(self._number)}", *map(str, pids)], check=True)


def train(folder, *opts, number=None, iteration=None, resume=False):
    """The iterations that a training made, and the status that it asks for."""
    cfg = exact.make_config(folder, *opts, "OUTPUT_DIR", folder / "parts")
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks([Signals(number, iteration)])
    try:
        trainer.train()
    except SystemExit as end:
        return trainer.iter, end.code
    return trainer.iter, 0


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_signal(dataset, number):
    """To workers too, as schedulers send it. A checkpoint of the same iteration is not repeated."""
    before = [signal.getsignal(number) for number in SIGNALS]
    exact.train(dataset, "whole")
    opts = ("DATALOADER.NUM_WORKERS", 2)
    assert train(dataset, *opts, number=number, iteration=3) == (3, 143)
    names = {path.name for path in (dataset / "parts").glob("model_*")}
    assert names == {"model_0000002.pth", "model_0000003.pth"}
    assert train(dataset, *opts, number=number, iteration=5, resume=True) == (5, 143)
    # After the last iteration there is nothing to go on with.
    assert train(dataset, *opts, number=number, iteration=7, resume=True) == (8, 0)
    exact.assert_equal(exact.read(dataset / "parts"), exact.read(dataset / "whole"))
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("is_longer", [False, True])
def test_kill_before_the_final_model(dataset, is_longer):
    """
    With the checkpoint of the last iteration on disk there is no step to go on with. A training
    made longer has the final model of the shorter one.
    """
    opts = ("SOLVER.CHECKPOINT_PERIOD", 4, "MODEL_EMA.ENABLED", True)
    train(dataset, *opts)
    output = dataset / "parts"
    expected = exact.read(output)
    (output / "model_final.pth").unlink()
    if is_longer:
        (output / "model_0000003.pth").rename(output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_0000007.pth")
    assert train(dataset, *opts, resume=True) == (9, 0)
    exact.assert_equal(exact.read(output), expected)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"


@pytest.fixture
def start_method():
    before = multiprocessing.get_start_method()
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_signals_to_workers(dataset, start_method, method, monkeypatch):
    """
    They outlive those of others, whichever of their threads gets one. Python ends those that are
    left when it ends, and waits for them.
    """
    # Threads that start when NumPy is imported, before any of the worker's own code.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    multiprocessing.set_start_method(method, force=True)
    # The first batch waits for an image of each worker.
    opts = ("DATALOADER.NUM_WORKERS", 2, "SOLVER.IMS_PER_BATCH", 2)
    cfg = exact.make_config(dataset, *opts)
    others = multiprocessing.active_children()
    batches = iter(Trainer.build_train_loader(cfg))
    next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    assert len(workers) == 2
    for number in (*SIGNALS, *SIGNALS, *SIGNALS):
        subprocess.run(["kill", f"-{int(number)}", *(str(w.pid) for w in workers)], check=True)
        assert len(next(batches)) == 2
    for worker in workers:
        assert worker.is_alive()
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0


def train_second(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    defaults.create_ddp_model = lambda model, **kwargs: DistributedDataParallel(model, **kwargs)
    # Only the second process gets the signal.
    result = train(folder, number=signal.SIGTERM, iteration=4 if rank else None)
    (folder / f"{rank}.txt").write_text(repr(result))
    sys.exit(result[1])


@pytest.mark.slow
def test_signal_to_one_of_two_processes(dataset):
    with pytest.raises(mp.ProcessExitedException) as error:
        mp.spawn(train_second, args=(dataset,), nprocs=2)
    assert error.value.exit_code == 143
    assert [(dataset / f"{rank}.txt").read_text() for rank in range(2)] == ["(4, 143)"] * 2
    assert (dataset / "parts" / "last_checkpoint").read_text() == "model_0000004.pth"


@pytest.mark.slow
def test_kills(tmp_path):
    """Three of those of `dev/survive_kills.py`."""
    assert sum(kills.survive(tmp_path, 3, 6).values()) == 3


def test_kills_would_be_noticed(tmp_path):
    torch.save({"iteration": 1}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert kills.last_iteration(tmp_path) == 1
    torch.save({"iteration": 3}, tmp_path / "model_0000003.pth")
    with pytest.raises(AssertionError, match="more than one checkpoint back"):
        kills.last_iteration(tmp_path)
    (tmp_path / "model_0000003.pth").write_bytes(b"half")
    with pytest.raises(Exception):  # noqa: B017  (unpickling may raise anything)
        kills.last_iteration(tmp_path)


def test_what_kills_leave_is_removed(tmp_path):
    names = [f".model_0000001.pth.{'0a' * 16}.tmp", f".last_checkpoint.{'b' * 32}.tmp"]
    others = ["model_0000001.pth", ".hidden", f".model.pth.{'g' * 32}.tmp"]
    for name in (*names, *others):
        (tmp_path / name).touch()
    remove_unfinished(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set(others)


# The output folder


def start_process(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def hold_lock(folder, locked):
    lock = lock_folder(folder)
    locked.set()
    time.sleep(600)
    lock.close()


def is_refused(folder):
    """Whether another process does not get the lock of a folder."""

    def lock():
        try:
            lock_folder(str(folder))
        except InputError:
            os._exit(3)

    process = start_process(lock)
    process.join()
    assert process.exitcode in (0, 3)
    return process.exitcode == 3


def test_folder_of_a_running_training(tmp_path):
    folder, locked = str(tmp_path / "output"), multiprocessing.Event()
    process = start_process(hold_lock, folder, locked)
    locked.wait()
    for lock in (lock_folder, claim_output_folder):
        with pytest.raises(InputError, match=rf"runs \(process {process.pid} on "):
            lock(folder)
    process.kill()
    process.join()
    claim_output_folder(folder).close()


def test_lock_stays_when_the_folder_is_read(tmp_path):
    """And when one of two holders in this process is gone."""
    locks = [lock_folder(str(tmp_path)), lock_folder(f"{tmp_path}/.")]
    (tmp_path / "training.lock").read_bytes()
    del locks[0]
    assert is_refused(tmp_path)
    del locks[0]
    assert not is_refused(tmp_path)


def test_a_folder_that_was_deleted_is_made_and_locked_anew(tmp_path):
    """An earlier trainer of this process may hold its lock still, in a notebook for instance."""
    folder = tmp_path / "output"
    earlier = lock_folder(str(folder))
    for made in (False, True):
        shutil.rmtree(folder)
        if made:
            folder.mkdir()
        lock = claim_output_folder(str(folder))
        assert (folder / "training.lock").read_text()
        assert lock_folder(str(folder)) is lock is not earlier
        assert is_refused(folder)
        earlier = lock


def test_another_process_of_the_same_name(tmp_path, monkeypatch):
    """Each of two containers may have a process 1, on a host of one name."""
    locked = multiprocessing.Event()
    process = start_process(hold_lock, str(tmp_path), locked)
    locked.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        with pytest.raises(InputError, match=rf"runs \(process {process.pid} on "):
            lock_folder(str(tmp_path))
    process.kill()
    process.join()


def test_lock_is_not_that_of_workers(tmp_path):
    """They may live on for seconds."""
    lock, started = lock_folder(str(tmp_path)), multiprocessing.Event()

    def work():
        started.set()
        time.sleep(600)

    worker = start_process(work)
    started.wait()
    lock.close()
    assert not is_refused(tmp_path)
    worker.kill()
    worker.join()


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"OUTPUT_DIR .*file/output cannot be written to: Not a "):
        claim_output_folder(str(tmp_path / "file" / "output"))
    assert claim_output_folder("s3://bucket/output") is None


def test_space_is_checked_before_training(dataset, monkeypatch, caplog):
    """The size that is told is that of the files, but for what is small."""
    opts = ("MODEL_EMA.ENABLED", True, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2)
    for optimizer in ("SGD", "AdamW"):
        name = f"{optimizer}_run"
        opts = (*opts, "SOLVER.OPTIMIZER", optimizer, "OUTPUT_DIR", dataset / name)
        trainer = Trainer(exact.make_config(dataset, *opts))
        size = runs._checkpoint_size(trainer.checkpointer, trainer.optimizer)
        trainer.train()
        actual = (dataset / name / "model_final.pth").stat().st_size
        assert 0.8 * actual < size < actual
    assert "free space" not in caplog.text

    def set_free(free):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: usage)

    set_free(1.5 * size)
    trainer = Trainer(exact.make_config(dataset, *opts, "OUTPUT_DIR", dataset / "warned"))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "up to 2 checkpoints" in caplog.text
    set_free(0.9 * size)
    with pytest.raises(InputError, match=r"OUTPUT_DIR .* free space, but a checkpoint takes"):
        trainer.train()


@pytest.fixture
def small_disk():
    """No file may be larger than 1 MB, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(tmp_path, small_disk):
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    message = r"model_0000002\.pth cannot be written: File too large.*--resume"
    with pytest.raises(InputError, match=message):
        checkpointer.save("model_0000002", iteration=2, large=torch.zeros(10**6))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last_checkpoint", "model_0000001.pth"}
    assert checkpointer.resume_or_load("")["iteration"] == 1


def test_other_errors_while_saving_are_bugs(tmp_path):
    checkpointer = GFLCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    with (
        pytest.raises(RuntimeError, match="mine"),
        checkpointer.path_manager.open(str(tmp_path / "model.pth"), "wb"),
    ):
        raise RuntimeError("mine")
