"""Settings every test shares: no network, one torch thread, quiet tokenizers."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Configurations have two threads by default, which would spin where tests have the other core.
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
os.environ["SPECDEC_LOG"] = "off"  # the machine's log is not a test's

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("specdec.lossless")


@pytest.fixture(autouse=True)
def _one_thread():
    """A command sets the threads of its configuration, which must not reach the next test."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports():
    """Every training collects garbage; among all that was imported, that is half of its time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
