"""Checkpoints for others: written from any source of ours, verified, and published."""
