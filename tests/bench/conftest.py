"""One target and one draft model for all tests that change neither, and what was measured."""

import pytest
from tiny_suites import save_models

from specdec.bench import runner


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def measured(monkeypatch):
    """An entry for every call that is measured."""
    calls, real = [], runner.measure_call
    monkeypatch.setattr(runner, "measure_call", lambda *given: calls.append(1) or real(*given))
    return calls
