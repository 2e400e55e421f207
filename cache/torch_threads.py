"""Threads beside the engine's, which compute by themselves."""

import threading

import torch

_changing = threading.Lock()


def use_one_thread() -> None:
    """Let torch use no further threads for what this thread computes.

    Each thread that torch computes in would get a team of OpenMP's of its own, which stays. With more teams than cores
    OpenMP lets no thread wait for the next piece of work awake: the engine's own team would have to be woken for every
    operation of a pass, which took half as long again, even while this thread did nothing.
    """
    with _changing:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # That also says how many the threads begin with that do not exist yet.
        said_again = threading.Thread(target=torch.set_num_threads, args=(others,))
        said_again.start()
        said_again.join()
