"""Large freed blocks are reused without page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from inference_service.host_memory import keep_freed_memory
torch.set_num_threads(1)
assert keep_freed_memory()
for _ in range(5):
    held = [torch.ones(4 << 20) for _ in range(6)]
    del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    held = [torch.ones(4 << 20) for _ in range(6)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_serve_the_next_tensors_of_their_size() -> None:
    # In a new process, whose heap no other test has changed.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    # The heap has grown by now. Without reuse, five times six blocks of 16 MiB would be 122,880 page faults.
    assert int(done.stdout) < 4096
