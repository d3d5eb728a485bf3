"""Features of a dataset, into a file. Read ``main.main``."""
