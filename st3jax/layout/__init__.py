"""What each axis of a kernel is, and who says so."""
