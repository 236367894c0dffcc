"""ProbMask, with its random masks and the projection of its probabilities."""
