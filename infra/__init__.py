"""What any trainer needs and no paper explains."""
