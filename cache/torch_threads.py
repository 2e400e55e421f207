"""Limits PyTorch's own threads in background threads."""

import threading

import torch

_changing = threading.Lock()


def use_one_thread() -> None:
    """Let PyTorch compute in the calling thread only.

    By default, each thread that uses PyTorch gets an OpenMP team of its own, which stays. With more threads than cores,
    OpenMP does not spin while it waits for work. The team of the engine would have to be woken for every operation. A
    pass then takes half as long again, even while the background thread is idle.
    """
    with _changing:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # `set_num_threads` also changes the default for new threads, so another thread restores it.
        said_again = threading.Thread(target=torch.set_num_threads, args=(others,))
        said_again.start()
        said_again.join()
