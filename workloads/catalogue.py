"""From a configuration to the workload it names."""

from workloads.azure import AzureWorkload
from workloads.burstgpt import BurstGPTWorkload
from workloads.config import WorkloadConfig, WorkloadKind
from workloads.independent import IndependentWorkload
from workloads.mooncake import MooncakeWorkload
from workloads.phases import PhasesWorkload
from workloads.timed_request import Workload


def make_workload(config: WorkloadConfig) -> Workload:
    """Raises `UserError` where options contradict each other or the trace cannot be read."""
    match config.workload:
        case WorkloadKind.PHASES:
            return PhasesWorkload(config)
        case WorkloadKind.MOONCAKE:
            return MooncakeWorkload(config)
        case WorkloadKind.AZURE:
            return AzureWorkload(config)
        case WorkloadKind.BURSTGPT:
            return BurstGPTWorkload(config)
        case WorkloadKind.INDEPENDENT:
            return IndependentWorkload(config)
