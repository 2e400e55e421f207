"""From a request to the token ids of its prompt."""

from jinja2 import TemplateError

from core.errors import UserError
from core.records import Request
from inference_service.protocol import ServedModel


def prompt_tokens(request: Request, model: ServedModel) -> list[int]:
    """Token ids of the request's prompt, whichever of the three forms it has.

    Raises `UserError` for another model's name, a prompt that is empty, too long or outside the vocabulary, and
    messages where the tokenizer has no chat template.
    """
    if request.model is not None and request.model != model.name:
        raise UserError(f"model: this job serves {model.name!r}, not {request.model!r}")
    if request.prompt_token_ids is not None:
        form, tokens = "prompt_token_ids", list(request.prompt_token_ids)
    elif request.messages is not None:
        if not model.tokenizer.chat_template:
            raise UserError(f"messages: the tokenizer of {model.name!r} has no chat template; send prompt instead")
        chat = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # many templates raise for roles or an order of turns that they do not know
            reason = " ".join(str(error).split())
            raise UserError(f"messages: the chat template of {model.name!r} does not take them: {reason}") from error
        # The template writes the special tokens itself; adding them again would double them.
        form, tokens = "messages", model.tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        form, tokens = "prompt", model.tokenizer(request.prompt)["input_ids"]
    if not tokens:
        raise UserError(f"{form}: no token in it; send some text")
    # A tokenizer may know more tokens than the model; on a GPU such an index would end the whole process.
    if max(tokens) >= model.vocab_size:
        raise UserError(f"{form}: token {max(tokens)} is outside the vocabulary of {model.vocab_size} tokens")
    if len(tokens) >= model.max_len:
        raise UserError(
            f"{form}: {len(tokens)} tokens leave no room for an answer in the {model.max_len} that the engine holds; "
            "shorten it or raise --max-model-len"
        )
    return tokens
