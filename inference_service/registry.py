"""The engines: to add one, write its module and add its line."""

from core.registry import Registry

ENGINES = Registry(
    {
        "transformers": "inference_service.transformers_engine:make",
        "simulated": "inference_service.simulated:make",
    }
)
"""For each value of `--engine`, its `inference_service.engine.MakeEngine`."""
