"""From files to batches of pixels and labels."""
