"""vLLM in a process with its own environment: loads a model and answers each list of prompts that it reads.

    python vllm_offline.py MODEL MAX_LEN ROWS THREADS

Needs vLLM and nothing of this project. It writes JSON lines: `ready` once, with versions and threads; then, for each
line `{"prompts": [[token id, ...], ...], "tokens": n}`, the answers of `n` tokens each and their duration in seconds.
"""

import json
import os
import sys
import time
from typing import Any

import torch
import vllm


def main() -> None:
    model, max_len, rows, threads = sys.argv[1], *map(int, sys.argv[2:5])
    # Libraries print to stdout; the benchmark must read only our lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = vllm.LLM(
        model=model,
        dtype="float32",
        max_model_len=max_len,
        max_num_seqs=rows,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        # Scheduler, worker and caller are in one process, as in our engine.
        distributed_executor_backend="uni",
    )
    # Its worker binds one thread to each of its cores.
    if torch.get_num_threads() != threads:
        raise SystemExit(f"vLLM runs with {torch.get_num_threads()} threads instead of {threads}")
    _say(out, ready={"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        order = json.loads(line)
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=order["tokens"], ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        began_s = time.perf_counter()
        done = engine.generate(prompts, sampling, use_tqdm=False)
        took_s = time.perf_counter() - began_s
        _say(out, took_s=took_s, answers=[list(one.outputs[0].token_ids) for one in done])


def _say(out: Any, **said: Any) -> None:
    out.write(json.dumps(said) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
