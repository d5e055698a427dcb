"""Training data: where it is read from, how it becomes tokens, which samples are drawn."""
