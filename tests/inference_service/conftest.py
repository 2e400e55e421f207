"""Tiny models with random weights, built once and loaded by the normal code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_helpers import GPT2, LAYERS_OF_TWO, load_tiny, save_tiny
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from inference_service.model import LoadedModel

CONFIGS = {
    "qwen2": lambda: Qwen2Config(**LAYERS_OF_TWO),
    "llama": lambda: LlamaConfig(**LAYERS_OF_TWO, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**GPT2),
}
ONE_BY_ONE = "qwen2 one by one"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: models this small are slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(folder / name, make()) for name, make in CONFIGS.items()}


@pytest.fixture(scope="session")
def tiny_models(tiny_paths: dict[str, Path]) -> dict[str, LoadedModel]:
    models = {name: load_tiny(path) for name, path in tiny_paths.items()}
    return models | {ONE_BY_ONE: replace(models["qwen2"], packs=False)}


@pytest.fixture(params=[*sorted(CONFIGS), ONE_BY_ONE])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    """Each architecture in turn, and one with packed passes switched off."""
    return tiny_models[request.param]


@pytest.fixture
def qwen2(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["qwen2"]
