"""The lossless suite: pytest tests that a drafter keeps the target's output.

`specdec check TYPE` runs it, and so does
`pytest -p specdec.lossless --pyargs specdec.lossless --drafter TYPE`, as this is the plugin.
"""

from typing import Any


def pytest_addoption(parser: Any) -> None:
    about = "type of a drafter, pkg.module:Class, or JSON with options; may be given again"
    parser.addoption("--drafter", action="append", default=[], metavar="TYPE", help=about)


def pytest_configure(config: Any) -> None:
    import torch

    config.addinivalue_line("markers", "slow: decodes much")
    torch.set_num_threads(1)  # tiny models are slower with more
