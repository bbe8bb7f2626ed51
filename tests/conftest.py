import pytest

import train_ift
import train_uft


@pytest.fixture(autouse=True)
def no_picture_at_the_end_of_a_run(request, monkeypatch):
    """A run ends with curve.png, which takes most of a second; only the tests of the curves want it."""
    if request.path.name != "test_curves.py":
        for trainer in (train_ift, train_uft):
            monkeypatch.setattr(trainer, "draw_run", lambda out: None)
