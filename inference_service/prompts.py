"""From a request to the token ids of its prompt."""

from core.errors import UserError
from core.records import Request
from inference_service.model import LoadedModel


def prompt_tokens(request: Request, model: LoadedModel) -> list[int]:
    """Token ids of the request's prompt, whichever of the three forms it has.

    Raises `UserError` for another model's name, a prompt that is empty, too long or outside the vocabulary, and
    messages where the tokenizer has no chat template.
    """
    if request.model is not None and request.model != model.name:
        raise UserError(f"model: this job serves {model.name!r}, not {request.model!r}")
    if request.prompt_token_ids is not None:
        tokens = list(request.prompt_token_ids)
        if max(tokens) >= model.vocab_size:
            raise UserError(f"prompt_token_ids: {max(tokens)} is outside the vocabulary of {model.vocab_size} tokens")
    elif request.messages is not None:
        if not model.tokenizer.chat_template:
            raise UserError(f"messages: the tokenizer of {model.name!r} has no chat template; send prompt instead")
        chat = [{"role": message.role, "content": message.content} for message in request.messages]
        text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself; adding them again would double them.
        tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = model.tokenizer(request.prompt)["input_ids"]
    if not tokens:
        raise UserError("prompt: no token in it; send some text")
    if len(tokens) >= model.max_len:
        raise UserError(
            f"prompt: {len(tokens)} tokens leave no room for an answer in the {model.max_len} that the engine holds; "
            "shorten it or raise --max-model-len"
        )
    return tokens
