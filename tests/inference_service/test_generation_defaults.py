"""A model's generation_config.json is honoured as by `generate`, or its unsupported fields are named at load."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from engine_helpers import (
    LAYERS_OF_TWO,
    MAX_LEN,
    answers,
    ask,
    load_tiny,
    make_engine,
    plain_answer,
    save_tiny,
    tokens_of,
)

from core.errors import UserError
from core.records import Sampling
from inference_service.config import EngineConfig, SamplingDefaults
from inference_service.generation_defaults import read_generation_defaults
from inference_service.transformers_engine import load_checked_model

PROMPTS = {f"p{seed}": tokens_of(seed, 12 + seed) for seed in (40, 3, 8)}
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "suppress_tokens": {"suppress_tokens": list(range(128))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(200))},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": list(range(60))},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "together": {
        "repetition_penalty": 1.2,
        "suppress_tokens": [1, 2, 3],
        "min_new_tokens": 3,
        "eos_token_id": [7, 256],
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", hf.Qwen2Config(**LAYERS_OF_TWO))


def write(path: Path, **settings: Any) -> Path:
    file = path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return path


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_greedy_answers_are_those_of_generate(path: Path, settings: dict[str, Any]) -> None:
    model = load_tiny(write(path, **settings))
    found = answers(make_engine(model).run([ask(name, prompt, 16) for name, prompt in PROMPTS.items()]))
    for name, prompt in PROMPTS.items():
        assert found[name].token_ids == plain_answer(model, prompt, 16)


def test_a_model_that_samples_does_so_unless_the_request_or_the_engine_says_otherwise(path: Path) -> None:
    write(path, do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    prompt = PROMPTS["p40"]
    requests = [ask("a", prompt, 8), ask("b", prompt, 8, temperature=0.0), ask("c", prompt, 8, temperature=1.5, seed=3)]
    found = answers(make_engine(load_tiny(path)).run(requests))
    common = {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    assert found["a"].sampling == Sampling(temperature=0.7, seed=found["a"].sampling.seed, **common)
    assert found["a"].sampling.seed is not None
    assert found["b"].sampling == Sampling(**common)
    assert found["c"].sampling == Sampling(temperature=1.5, seed=3, **common)
    neutral = EngineConfig(
        model=str(path), device="cpu", max_model_len=MAX_LEN, sampling_defaults=SamplingDefaults.NEUTRAL
    )
    found = answers(make_engine(load_checked_model(neutral)).run([ask("a", prompt, 8)]))
    assert found["a"].sampling == Sampling()


def test_a_temperature_counts_only_where_the_model_is_to_sample() -> None:
    assert read_generation_defaults({"temperature": 0.6, "top_p": 0.9}, 258, ()).sampling == Sampling(top_p=0.9)
    assert read_generation_defaults({"do_sample": True}, 258, ()).sampling == Sampling(temperature=1.0)


def test_what_is_not_honoured_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": 9, "eos_token_id": 3}
    read_generation_defaults({**neutral, "top_k": 5}, 258, ())
    assert caplog.messages == []
    read_generation_defaults({**neutral, "num_beams": 4, "no_repeat_ngram_size": 1, "bad_words_ids": [[1]]}, 258, ())
    assert caplog.messages == [
        "generation_config.json: not honoured: bad_words_ids=[[1]], no_repeat_ngram_size=1, num_beams=4"
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"suppress_tokens": "all"}, "suppress_tokens is no token id"),
        ({"suppress_tokens": list(range(258))}, "it forbids every token"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        read_generation_defaults(settings, 258, ())
