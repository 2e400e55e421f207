"""The workloads. A new one needs its own file and one line here."""

from core.registry import Registry

WORKLOADS = Registry(
    {
        "phases": "workloads.phases:PhasesWorkload",
        "mooncake": "workloads.mooncake:MooncakeWorkload",
        "azure": "workloads.azure:AzureWorkload",
        "burstgpt": "workloads.burstgpt:BurstGPTWorkload",
        "independent": "workloads.independent:IndependentWorkload",
    }
)
"""Each entry makes a `Workload` from a `WorkloadConfig`."""
