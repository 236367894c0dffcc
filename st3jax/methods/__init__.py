"""Sparse-training methods, one file each; none knows another."""
