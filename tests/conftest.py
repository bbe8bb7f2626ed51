import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are faster on one thread; before torch is imported

import pytest

from infra import training


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in two processes where pytest-xdist is installed; -n 0 runs it in one."""
    whole = config.args_source is not config.ArgsSource.ARGS and config.option.markexpr == "not slow"
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


@pytest.fixture(autouse=True)
def no_picture_at_the_end_of_a_run(request, monkeypatch):
    """A run ends with curve.png, which takes most of a second; only the tests of the curves want it."""
    if request.path.name != "test_curves.py":
        monkeypatch.setattr(training, "draw_run", lambda out: None)
