"""Find damaged images in a dataset before training.

Read ``main.verify`` first. ``check`` defines what a sound image is; ``pool`` runs the decoders in processes that may
crash.
"""
