"""The model that needs no download: a Qwen2 of about 30 M random parameters with a byte-level tokenizer.

It is built once from a seed, saved in the ordinary format and loaded by the ordinary code, so that everything runs on
a machine without a model hub. Its answers mean nothing; its work is that of a real transformer. Results made with it
carry its name.
"""

import os
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from inference_service.byte_tokenizer import byte_tokenizer

NAME = "random-qwen2-30m"
SEED = 0


def default_model_path() -> Path:
    """Folder of the default model, which the first call builds.

    It is below `$INFERTUNER_HOME`, or in the folder `.local` beside the code.
    """
    home = Path(os.environ.get("INFERTUNER_HOME") or Path(__file__).resolve().parents[1] / ".local")
    path = home / "models" / NAME
    if not (path / "config.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            build_default_model(Path(made) / NAME)
            # Several workers may build at once: the first to rename wins and the others' copies are equal to it.
            try:
                (Path(made) / NAME).rename(path)
            except OSError:
                if not (path / "config.json").exists():
                    raise
    return path


def build_default_model(path: Path, seed: int = SEED) -> None:
    """Write weights, configuration and tokenizer to `path`, equal for equal `seed`."""
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        # Wider than the usual 0.02, with which the model would repeat its last token for ever.
        initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
