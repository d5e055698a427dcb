"""The library behind the commands: it knows no click and prints nothing."""
