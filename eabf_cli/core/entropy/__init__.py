"""Attention entropy: its measurement, its pictures, and what it recommends."""
