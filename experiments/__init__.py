"""The scripts behind the README's numbers."""
