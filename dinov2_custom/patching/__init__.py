"""Fixes for a checkout of upstream: what the files in ``patches/`` rebind, and how they are applied.

Read ``main.main``; the fixes themselves are in ``packed``, ``fsdp``, ``datasets``, ``config`` and ``weights``.
"""
