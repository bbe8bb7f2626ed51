"""The parts that any trainer needs and no paper explains."""
