"""Rewrite a dataset: checked, shrunk, converted, tiled, in shards.

Read ``main.prepare`` first. ``change`` converts one image, ``tiles`` cuts huge images, ``parts`` writes the output.
"""
