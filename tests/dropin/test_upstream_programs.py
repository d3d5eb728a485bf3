"""Upstream's own programs, the files of its package, run on this one: whatever ``dinov2.<x>`` they import is ours.

They ask for a GPU by name. The copies that run here ask for the CPU, nothing else is changed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.dropin.test_workflow import TINY, write_imagenet
from tests.oracle import OracleUnavailable, ensure_oracle
from tests.test_alias import site  # noqa: F401 - a fixture

GPU_TO_CPU = (
    ('torch.device("cuda")', 'torch.device("cpu")'),
    ("torch.cuda.current_device()", 'torch.device("cpu")'),
    ("torch.cuda.synchronize()", "pass"),
    ("torch.cuda.amp.autocast(", 'torch.autocast("cpu", '),
    ("partial(torch.cuda.amp.autocast, ", 'partial(torch.autocast, "cpu", '),
    (".cuda(non_blocking=True)", ""),
    (".cuda()", ""),
)
