"""What all tests share."""

import os

import pytest

# Two threads that fight another job are several times slower than one; toy models need no second.
os.environ.setdefault("OMP_NUM_THREADS", "1")


NO_DEVICE = "needs a CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none: `pytest -m gpu` then says so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the skipped tests lacked, without being asked by `-rs`."""
    skipped = terminalreporter.getreports("skipped")
    if lacking := sum(NO_DEVICE in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{lacking} tests skipped: each {NO_DEVICE}")
