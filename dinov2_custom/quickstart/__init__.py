"""The quickstart: train on tiles of real photographs in minutes, and show what was learned. Start at ``main``."""
