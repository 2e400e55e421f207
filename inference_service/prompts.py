"""From a request to the token ids of its prompt, and to those that end its answer."""

from core.errors import UserError
from core.records import Request, Sampling
from inference_service.grammar import AnswerGrammar
from inference_service.protocol import ServedModel
from inference_service.sequence_sampler import TokenRules


def prompt_tokens(request: Request, model: ServedModel) -> list[int]:
    """Token ids of the request's prompt, whichever of the three forms it has.

    Raises `UserError` for another model's name, a prompt that is empty, too long or outside the vocabulary, and
    messages that the chat template does not take as they are.
    """
    if request.model is not None and request.model != model.name:
        raise UserError(f"model: this job serves {model.name!r}, not {request.model!r}")
    if request.prompt_token_ids is not None:
        form, tokens = "prompt_token_ids", list(request.prompt_token_ids)
    elif request.messages is not None:
        form, tokens = "messages", model.prompt_encoder.encode_messages(request.messages)
    else:
        form, tokens = "prompt", model.prompt_encoder.encode_prompt(request.prompt or "")
    if not tokens:
        raise UserError(f"{form}: no token in it; send some text")
    # A tokenizer may know more tokens than the model; on a GPU such an index would end the whole process.
    if max(tokens) >= model.vocab_size:
        raise UserError(f"{form}: token {max(tokens)} is outside the vocabulary of {model.vocab_size} tokens")
    if len(tokens) >= model.max_len:
        raise UserError(f"{form}: {len(tokens)} tokens leave no room for an answer in the {_longest(model)}")
    return tokens


def end_tokens_of(request: Request, sampling: Sampling, rules: TokenRules, model: ServedModel) -> frozenset[int]:
    """Token ids that end the answer: the model's own, unless they are ignored, and the request's.

    Raises `UserError` for token ids outside the vocabulary, and where no token is left that an answer may begin with.
    """
    for field, tokens in (("stop_token_ids", request.stop_token_ids), ("logit_bias", request.logit_bias)):
        if tokens and max(tokens) >= model.vocab_size:
            raise UserError(f"{field}: token {max(tokens)} is outside the vocabulary of {model.vocab_size} tokens")
    own = () if request.ignore_eos else model.eos_token_ids
    ends = frozenset((*own, *(request.stop_token_ids or ())))
    if sampling.min_new_tokens and len(ends.union(rules.suppressed, rules.suppressed_first)) >= model.vocab_size:
        raise UserError("min_new_tokens: every token may end the answer, or is suppressed; lower it to 0")
    return ends


def grammar_of(request: Request, model: ServedModel) -> AnswerGrammar | None:
    """The grammar of the request's answer; none where it may be any text. Raises `UserError`."""
    wanted = request.response_format
    return None if wanted is None or wanted.type == "text" else model.grammars.of(wanted)


def _longest(model: ServedModel) -> str:
    if model.own_limit is not None:
        return f"{model.max_len} that the model itself holds ({model.own_limit}); shorten it"
    return f"{model.max_len} that the engine holds; shorten it or raise --max-model-len"
