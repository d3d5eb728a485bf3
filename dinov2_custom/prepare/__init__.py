"""Write a dataset again: checked, shrunk, converted, tiled, in shards. Read ``main.prepare`` first."""
