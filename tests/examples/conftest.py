import pytest
import torch


@pytest.fixture
def one_thread():
    """As `accelerate launch` gives each process: other numbers of threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
