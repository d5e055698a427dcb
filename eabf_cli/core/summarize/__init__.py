"""Summaries of documents: prompt, window, reading and writing."""
