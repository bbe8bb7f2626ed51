import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are faster on one thread; before torch is imported

import pytest

from infra import training


@pytest.fixture(autouse=True)
def no_picture_at_the_end_of_a_run(request, monkeypatch):
    """A run ends with curve.png, which takes most of a second; only the tests of the curves want it."""
    if request.path.name != "test_curves.py":
        monkeypatch.setattr(training, "draw_run", lambda out: None)
