"""Data sets that TFDS does not have, as TFDS builders of our own."""
