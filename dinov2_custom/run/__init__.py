"""From a command line to running processes. Read ``submit.py`` first."""
