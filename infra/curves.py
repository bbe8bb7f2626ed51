"""The name under which the trainers import it; it goes when they import it from experiments.plot."""

from experiments.plot import draw_run as draw_run
