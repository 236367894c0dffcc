"""Which weights go first, and the threshold of each leaf that follows from it."""
