"""Upstream's own code as a numerical reference for the tests: fetched, never copied, never imported by the package.

The package ``dinov2==0.0.1.dev2`` is put into the git-ignored folder ``.oracle/`` (:mod:`tests.oracle.fetch`), imported
without leaving a trace in ``sys.modules`` (:mod:`tests.oracle.loader`) with stand-ins for the CUDA-only libraries it
asks for (:mod:`tests.oracle.stand_ins`), and driven step by step on a CPU in fp32 (:mod:`tests.oracle.trainer`).
Read :class:`tests.oracle.trainer.OracleTrainer` first.
"""

from tests.oracle.fetch import OracleUnavailable, ensure_oracle, package_or_skip
from tests.oracle.loader import load_oracle
from tests.oracle.trainer import OracleTrainer, make_batch, oracle_config, preserved_rng, reduced_depth

__all__ = [
    "OracleTrainer",
    "OracleUnavailable",
    "ensure_oracle",
    "load_oracle",
    "make_batch",
    "oracle_config",
    "package_or_skip",
    "preserved_rng",
    "reduced_depth",
]
