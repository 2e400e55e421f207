"""Tokenizers of the common kinds, trained in milliseconds on the text below."""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The capital of France is Paris. The capital of Italy is Rome, and that of Spain is Madrid.",
    "A user asks; an assistant answers.\nSystem prompts come first, and they are short.\n\n  Two spaces here.",
    "It's 3.14 or 2,718? na\u00efve caf\u00e9 \u00fcber stra\u00dfe \u4e2d\u6587 \U0001f600",
)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
TURNS = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """A tokenizer like those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # The tokens for tool calls are not special tokens.
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("wordlet", normalized=False)])
    return _finished(tokenizer, eos_token="<|im_end|>")


def prefixed_bpe() -> PreTrainedTokenizerFast:
    """A tokenizer like those of Llama 2 and Mistral: SentencePiece BPE with byte fallback and special tokens."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def metaspace_bpe() -> PreTrainedTokenizerFast:
    """The same, with a pre-tokenizer that adds a space only at the very beginning."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer like those of T5 and XLNet: the most likely segmentation, in which special tokens are pieces too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_bos(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer like that of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return _finished(tokenizer, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: made for made in (byte_level_bpe, prefixed_bpe, metaspace_bpe, unigram, word_piece)
}


def _sentencepiece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False, limit_alphabet=60
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Bytes are pieces of the vocabulary and not special tokens.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] not in BYTES]
    content["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(content))


def _with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _finished(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _finished(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in TURNS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]
    fast.chat_template = TEMPLATE
    return fast
