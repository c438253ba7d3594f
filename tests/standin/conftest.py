import pytest

from stablekd_fast.bench.standin import standin


@pytest.fixture
def gpu():
    """Two GPUs that are not there."""
    with standin() as stand:
        yield stand
