"""Compute the features of a dataset and write them to a file. Read ``main.main`` first."""
