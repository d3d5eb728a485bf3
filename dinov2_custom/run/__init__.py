"""Launch tasks: from a command line to running processes.

Read ``submit.submit_jobs`` first. SLURM jobs are in ``slurm.py`` (refusals in ``refusal.py``, requeueing in
``requeue.py``), local processes in ``local.py``, and the code that each process runs in ``process.py``.
"""
