"""The engine over models of `transformers`."""

import logging

import torch
import transformers

from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.engine import EngineSetting
from inference_service.host_memory import keep_freed_memory
from inference_service.model import LoadedModel, load_model
from inference_service.packed_linear import pack_linears
from inference_service.support import checked

logger = logging.getLogger(__name__)


def make(config: EngineConfig, setting: EngineSetting) -> ContinuousEngine:
    """Raises `UserError` for a model that cannot be loaded, or that the engine would run wrong."""
    torch.set_num_threads(setting.threads)
    model = load_checked_model(config, setting.slot)
    cache = None
    if setting.open_cache is not None:
        cache = setting.open_cache(model.chunk_shape(setting.chunk_tokens), model.identity)
    return ContinuousEngine(
        model,
        config,
        cache,
        setting.chunk_tokens,
        setting.clock,
        name=f"transformers-{transformers.__version__}",
        on_begin=setting.on_begin,
        on_pass=setting.on_pass,
    )


def load_checked_model(config: EngineConfig, slot: int = 0) -> LoadedModel:
    """A loaded model that the pool is known to run as the model alone would. Raises `UserError`."""
    model = load_model(config, slot)
    if model.device.type == "cpu":
        keep_freed_memory()
    pack_linears(model.model)
    model = checked(model)
    # Made now and not by the first request: that takes a second where the vocabulary is large.
    logger.info("%s takes the texts of messages as %s", model.name, model.prompt_encoder.content_form)
    return model
