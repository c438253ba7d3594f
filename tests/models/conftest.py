import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are tiny: on a busy machine, waiting for a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
