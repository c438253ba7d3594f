import pytest


@pytest.fixture(autouse=True)
def no_more_threads(one_thread):
    """One for all of these tests."""
