import contextlib
import logging
import os
import socket
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import settings

# The same examples every time, however slow the machine is at the moment.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config):
    lines = {
        "markers": ["slow: takes seconds, or starts processes; `make test-fast` leaves it out"],
        # Those of tracing are about what is constant in a trace: the tests use it at other sizes.
        "filterwarnings": ["error:::gfl_d2", "ignore::torch.jit.TracerWarning:gfl_d2"],
    }
    for name, values in lines.items():
        for value in values:
            config.addinivalue_line(name, value)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """What is remembered of datasets is not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """
    What a program sets up for its log ends with the test that ran it. Pytest before 9 sees nothing
    of a logger that does not hand on what it gets.
    """
    loggers = [logging.getLogger(name) for name in ("gfl_d2", "detectron2", "fvcore")]
    before = [(logger, logger.propagate, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, propagate, level, handlers in before:
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(level)


@pytest.fixture
def logged_by_training():
    """What Detectron2 logs of a training that ends with an error: a list that fills."""
    logger, handler = logging.getLogger("detectron2.engine.train_loop"), logging.Handler()
    filters, records = logger.filters[:], []
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.filters = filters


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """A test that connects to another machine fails."""
    connect = socket.socket.connect

    def connect_here(self, address):
        is_here = self.family == socket.AF_UNIX or address[0] in ("localhost", "127.0.0.1", "::1")
        assert is_here, f"a test connects to {address}"
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with photographs and their annotations, where there is one."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"  # of the checkout
    folder = Path(os.environ.get("GFL_D2_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no photographs to test with: set GFL_D2_TEST_DATA")
    return folder


@pytest.fixture
def clean_catalogs():
    """Forgets the datasets that a test registers."""
    with forgotten_datasets():
        yield


@pytest.fixture(scope="module")
def clean_catalogs_of_module():
    """The same, for those of a module."""
    with forgotten_datasets():
        yield


@contextlib.contextmanager
def forgotten_datasets():
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [set(catalog) for catalog in catalogs]
    yield
    for catalog, names in zip(catalogs, before):
        for name in set(catalog) - names:
            catalog.remove(name)
