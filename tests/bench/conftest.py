"""One target and one draft model for all tests that change neither."""

import pytest
from tiny_suites import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))
