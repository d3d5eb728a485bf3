import pytest

from tests.cuda_host.build import Unavailable
from tests.cuda_host.run import environment


@pytest.fixture(scope="session")
def preloaded():
    """Return the environment of a process with the stand-in of the CUDA runtime."""
    try:
        return environment()
    except Unavailable as e:
        pytest.skip(f"no stand-in of the CUDA runtime: {e}")
