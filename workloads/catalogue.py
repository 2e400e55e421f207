"""Makes the workload that a configuration names."""

from workloads.config import WorkloadConfig
from workloads.registry import WORKLOADS
from workloads.timed_request import Workload


def make_workload(config: WorkloadConfig) -> Workload:
    """Raises `UserError` if options contradict each other or the trace cannot be read."""
    workload: Workload = WORKLOADS.load(config.workload)(config)
    return workload
