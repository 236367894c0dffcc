"""The page that a run leaves: everything that is worth sharing, in one file."""
