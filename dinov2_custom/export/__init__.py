"""Trained weights in the layouts of other libraries, each checked there. Read ``main.main``."""
