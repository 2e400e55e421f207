"""Answers in a format: valid by an independent reference, whatever the model, the batch and the format are."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from engine_helpers import CHUNK, EOS_ID, MemoryCache, answers, ask, make_engine, tokens_of
from made_tokenizers import byte_level_bpe, metaspace_bpe, prefixed_bpe, unigram, word_piece
from transformers import PreTrainedTokenizerFast

from core.clock import ManualClock
from core.errors import UserError
from core.records import FinishReason, Request, ResponseFormat, Sampling
from inference_service import grammar_compiler
from inference_service.byte_tokenizer import byte_tokenizer
from inference_service.completion import Completion, Failure
from inference_service.config import EngineConfig
from inference_service.continuous_engine import ContinuousEngine
from inference_service.detokenize import answer_text
from inference_service.grammar import AnswerGrammar
from inference_service.grammar_compiler import Grammars
from inference_service.model import LoadedModel
from inference_service.sampling import BatchSampler
from inference_service.sequence_sampler import Draw, SequenceSampler, TokenRules
from inference_service.transformers_engine import load_checked_model

PROMPT = tokens_of(11, 19)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "\u00e9\U0001f600", None, 1.5]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "leaf": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]},
        "node": {
            "type": "object",
            "properties": {"l": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "r": {"$ref": "#/$defs/leaf"}},
            "required": ["l"],
            "additionalProperties": False,
        },
    },
    "$ref": "#/$defs/node",
}
TREE["$defs"]["leaf"]["additionalProperties"] = False
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "tree": TREE,
    "two forms": {"allOf": [{"type": "integer", "minimum": 10}, {"multipleOf": 7, "maximum": 10_000}]},
    "union": {"anyOf": [{"const": {"a": [1, {"b": None}]}}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    "quoted keys": {
        "type": "object",
        "properties": {'a"\\\n\u00e9': {"type": "null"}, "": {"enum": [True]}},
        "required": ['a"\\\n\u00e9', ""],
        "additionalProperties": False,
    },
    "pairs": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "date": {"type": "string", "format": "date"},
    "pattern and length": {"type": "string", "pattern": "^[a-z]*z$", "minLength": 3, "maxLength": 6},
    "500 values": {"enum": [f"v{number * 7919 % 10_007}" for number in range(500)]},
    "9 deep": json.loads('{"type":"array","minItems":1,"maxItems":1,"items":' * 9 + '{"type":"null"}' + "}" * 9),
    "options of the library": {"type": "integer", "maximum": 99, "minimum": 0, "x-guidance": {"lenient": True}},
}
EXPRESSIONS = (
    r"\d{4}-\d{2}-\d{2}",
    "(yes|no|maybe)?!",
    "^[^a-z\\n]{1,6}$",
    "(a+b?){1,4}c/\\\\",
    "\\w{2}\\s\\S",
    "(?i)[x-z]{3}|caf",
    "[\\d.]{2}\\\\d[^\\w\\d]",
    "(a|b)*a(a|b){5}c",
    "((x{1,5}){1,5}){1,5}y",
)
CHOICES = (
    ("a", "ab", "abc", "b"),
    ('say "so"', "back\\slash", "line\nbreak", "/x/", "#", "{}", "$1", "\x00", "\u00e9\U0001f600", "a b"),
    tuple(f"c{number}" for number in range(1000)),
)


def as_format(**fields: Any) -> ResponseFormat:
    """The format as it comes in a record."""
    return ResponseFormat.model_validate_json(json.dumps(fields))


def as_schema(schema: Any) -> ResponseFormat:
    return as_format(type="json_schema", json_schema={"schema": schema})


def is_valid(text: str, schema: Any) -> bool:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    return True


Check = Callable[[str], bool]
FORMATS: list[tuple[str, ResponseFormat, Check]] = [
    *((f"schema {name}", as_schema(one), lambda text, one=one: is_valid(text, one)) for name, one in SCHEMAS.items()),  # type: ignore[misc]
    *(
        (one, as_format(type="regex", regex=one), lambda text, one=one: re.fullmatch(one, text, re.ASCII) is not None)  # type: ignore[misc]
        for one in EXPRESSIONS
    ),
    *((str(one)[:40], as_format(type="choice", choice=one), one.__contains__) for one in CHOICES),
]


# Through the engine.


def byte(character: str) -> int:
    (token,) = byte_tokenizer()(character)["input_ids"]
    return int(token)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Iterable[LoadedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERTUNER_HOME", str(tmp_path_factory.mktemp("home")))
        yield load_checked_model(EngineConfig(model="default", device="cpu", max_model_len=768))


BLANKS = {byte(blank): -8.0 for blank in " \n\r\t"}


def engine_of(model: LoadedModel, cache: MemoryCache | None = None, rows: int = 32) -> ContinuousEngine:
    return ContinuousEngine(model, EngineConfig(max_running=rows, max_model_len=768), cache, CHUNK, ManualClock())


def test_500_answers_of_the_default_model_are_valid_and_change_no_other(default_model: LoadedModel) -> None:
    """In mixed batches, with reuse, at several temperatures; those without a format answer as alone."""
    checks: dict[str, Check] = {}
    requests: list[Request] = []
    for place, (name, response_format, check) in enumerate(FORMATS):
        # Of the long ones fewer.
        for number in range(8 if "properties" in response_format.model_dump_json() else 24):
            request_id = f"{name} {number}"
            checks[request_id] = check
            # Fewer blanks between the parts of JSON: the answers are as different, and half as long.
            sampling: dict[str, Any] = {
                "temperature": (1.0, 0.3, 3.0)[number % 3],
                "seed": number,
                "logit_bias": BLANKS,
            }
            if number % 4 == 1:
                sampling |= {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
            prompt = tokens_of(place % 5, 21)
            requests.append(ask(request_id, prompt, 600, response_format=response_format, **sampling))
    free = [ask(f"free {number}", tokens_of(number, 21), 16, temperature=1.0, seed=number) for number in range(4)]
    alone = {name: one.token_ids for name, one in answers(engine_of(default_model, rows=1).run(free)).items()}
    cache = MemoryCache(default_model.chunk_shape(CHUNK))
    engine = engine_of(default_model, cache)
    found = answers(engine.run(free))
    assert {name: found[name].token_ids for name in alone} == alone
    found |= answers(engine.run([*free[:2], *requests, *free[2:]]))
    assert {name: found[name].token_ids for name in alone} == alone
    assert len(checks) >= 500
    for name, check in checks.items():
        assert found[name].finish_reason is FinishReason.STOP, (name, found[name].text)
        assert check(found[name].text), (name, found[name].text)
        assert found[name].text == answer_text(default_model.tokenizer, PROMPT, found[name].token_ids)
    assert sum(found[name].local_tokens for name in checks) > 0
    # Alone as in company.
    for request in requests[:: len(requests) // 3]:
        one = answers(engine_of(default_model, rows=1).run([request]))[request.request_id]
        assert one.token_ids == found[request.request_id].token_ids
    texts = {name: {found[f"{name} {number}"].text for number in range(8)} for name, *_ in FORMATS}
    assert sum(len(different) > 3 for different in texts.values()) > len(FORMATS) / 2


def test_any_json_object(qwen2: LoadedModel) -> None:
    """A brace that ends it is made likely: a random model never comes to one."""
    sampling = {"temperature": 1.0, "logit_bias": {byte("}"): 9.0, byte('"'): 7.0}}
    response_format = as_format(type="json_object")
    requests = [ask(f"{n}", PROMPT, 40, seed=n, response_format=response_format, **sampling) for n in range(40)]
    found = answers(make_engine(qwen2, max_running=8).run(requests))
    complete = [one.text for one in found.values() if one.finish_reason is FinishReason.STOP]
    assert len(complete) > 10
    assert all(isinstance(json.loads(text), dict) for text in complete)
    assert any(json.loads(text) for text in complete)


def answer(model: LoadedModel, response_format: ResponseFormat, **fields: Any) -> Completion:
    return answers(make_engine(model).run([ask("a", PROMPT, response_format=response_format, **fields)]))["a"]


def reason(model: LoadedModel, response_format: ResponseFormat, **fields: Any) -> str:
    (failure,) = make_engine(model).run([ask("a", PROMPT, response_format=response_format, **fields)])
    assert isinstance(failure, Failure)
    return failure.reason


def test_text_is_any_text(qwen2: LoadedModel) -> None:
    plain = answers(make_engine(qwen2).run([ask("a", PROMPT)]))["a"]
    assert answer(qwen2, as_format(type="text")).token_ids == plain.token_ids


def test_an_answer_that_is_cut_is_the_beginning_of_a_valid_one(qwen2: LoadedModel) -> None:
    cut = answer(qwen2, as_format(type="regex", regex="(ab){20}"), max_new_tokens=5)
    assert (cut.text, cut.finish_reason) == ("ababa", FinishReason.LENGTH)


def test_end_tokens_come_where_the_text_is_complete_and_nowhere_else(qwen2: LoadedModel) -> None:
    """However likely they are made, and the request's stop tokens as well."""
    wanted = as_format(type="regex", regex="(ab)+")
    for fields in ({"logit_bias": {EOS_ID: 100.0}}, {"logit_bias": {66: 100.0}, "stop_token_ids": (66,)}):
        found = answer(qwen2, wanted, **fields)
        assert (found.text, found.finish_reason) == ("ab", FinishReason.STOP)
    # A stop token that is text as well: only after a complete text does it end the answer.
    found = answer(
        qwen2, as_format(type="regex", regex="ax*"), stop_token_ids=(byte("x"),), logit_bias={byte("x"): 100.0}
    )
    assert (found.text, found.finish_reason) == ("a", FinishReason.STOP)


def test_min_new_tokens_holds_as_long_as_more_text_is_allowed(qwen2: LoadedModel) -> None:
    biased = {"logit_bias": {EOS_ID: 100.0}, "min_new_tokens": 5}
    assert answer(qwen2, as_format(type="regex", regex="(ab)+"), **biased).text == "ababab"
    assert answer(qwen2, as_format(type="choice", choice=["abc"]), **biased).text == "abc"


def test_a_bias_does_not_get_around_a_format(qwen2: LoadedModel) -> None:
    wanted = as_format(type="choice", choice=["abc"])
    assert answer(qwen2, wanted, logit_bias={byte("x"): 100.0, byte("b"): -100.0}).text == "abc"


def test_each_of_several_answers_is_in_the_format(qwen2: LoadedModel) -> None:
    found = answer(qwen2, as_format(type="regex", regex="[a-z]{3}"), n=5, temperature=1.0, seed=2)
    texts = [one.text for one in found.choices]
    assert all(re.fullmatch("[a-z]{3}", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_stop_string_ends_an_answer_in_a_format_too(qwen2: LoadedModel) -> None:
    found = answer(qwen2, as_format(type="choice", choice=["one two"]), max_new_tokens=20, stop=(" t",))
    assert (found.text, found.finish_reason) == ("one", FinishReason.STOP)


def test_logprobs_are_by_the_models_own_logits_in_a_format_too(qwen2: LoadedModel) -> None:
    found = answer(qwen2, as_format(type="choice", choice=["ab"]), logprobs=1)
    ids = torch.tensor([[*PROMPT, *found.token_ids]])
    with torch.inference_mode():
        logits = qwen2.model(ids).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    assert found.logprobs is not None
    assert [one.logprob for one in found.logprobs] == pytest.approx(
        [float(row[token]) for row, token in zip(expected, found.token_ids, strict=True)], abs=1e-3
    )


def test_a_request_that_no_token_is_left_for_fails_alone(qwen2: LoadedModel) -> None:
    requests = [
        ask("plain", PROMPT),
        ask("stuck", PROMPT, response_format=as_format(type="choice", choice=["xy"]), stop_token_ids=(byte("y"),)),
        ask("fine", PROMPT, response_format=as_format(type="choice", choice=["xz"])),
    ]
    engine = make_engine(qwen2)
    done = {one.request.request_id: one for one in engine.run(requests)}
    stuck = done.pop("stuck")
    assert isinstance(stuck, Failure)
    assert stuck.reason.startswith("response_format: after 1 tokens no token is left")
    found = answers(done.values())
    assert found["fine"].text == "xz"
    assert found["plain"].token_ids == answers(make_engine(qwen2).run([requests[0]]))["plain"].token_ids
    assert engine.stats.failed_passes == 0


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (as_format(type="regex", regex="(a"), "response_format.regex: unclosed group; "),
        (as_format(type="regex", regex="(a)\\1"), "response_format.regex: backreferences are not supported; "),
        (as_format(type="regex", regex="a^b"), "response_format.regex: lookarounds not supported yet; "),
        (as_format(type="regex", regex="[^\\s\\S]"), "response_format.regex: no finite text satisfies it; "),
        (as_format(type="regex", regex="((a{1000}){1000}){1000}"), "response_format.regex: too large or too complex; "),
        (as_format(type="regex", regex="(" * 300 + "a" + ")" * 300), "response_format.regex: exceed the maximum"),
        (as_schema({"$ref": "#"}), "response_format.json_schema.schema: no finite text satisfies it; "),
        (as_schema({"type": "strnig"}), "response_format.json_schema.schema: Invalid type: strnig; "),
        (as_schema({"uniqueItems": True}), 'response_format.json_schema.schema: not supported: ["uniqueItems"]; '),
        (
            as_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}),
            'response_format.json_schema.schema: not supported: ["uniqueItems"]; ',
        ),
        (as_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "response_format.json_schema.schema: oneOf"),
        (as_schema({"$ref": "https://example.com/x.json"}), "response_format.json_schema.schema: Resource 'https://e"),
        (as_schema({"type": "string", "pattern": "(?=a)b"}), "response_format.json_schema.schema: look-around"),
        (as_schema({"minimum": 5, "maximum": 3, "type": "integer"}), "response_format.json_schema.schema: Unsatisf"),
        (as_schema({"type": "integer", "multipleOf": 1_000_003}), "response_format.json_schema.schema: the common"),
        (
            as_schema({"allOf": [{"type": "number", "multipleOf": n / 10} for n in (101, 103, 107, 109)]}),
            "response_format.json_schema.schema: the common multiple of all multipleOf is above 10000; ",
        ),
        (
            as_schema({"properties": {f"p{number}": {"type": "integer"} for number in range(20_000)}}),
            "response_format.json_schema.schema: too large or too complex; ",
        ),
        (
            as_schema(
                {"allOf": [{"anyOf": [{"required": [f"{i} {j}"]} for j in range(3)]} for i in range(12)]},
            ),
            "response_format.json_schema.schema: ",
        ),
    ],
)
def test_a_format_that_cannot_be_enforced_is_refused_by_name(
    qwen2: LoadedModel, response_format: ResponseFormat, expected: str
) -> None:
    for _ in range(2):
        refusal = reason(qwen2, response_format)
        assert refusal.startswith(expected)
        assert "\n" not in refusal
        assert len(refusal) < 500


# Without a model: tokenizers, end tokens, the batch.


def walk(answer_grammar: AnswerGrammar, tokens: int, seed: int) -> list[int] | None:
    """A random answer that the grammar allows; none where it is not complete after 200 tokens."""
    random = np.random.default_rng(seed)
    bits = np.empty(-(-tokens // 32), dtype=np.uint32)
    output: list[int] = []
    while len(output) < 200:
        may_end = answer_grammar.fill(bits, output)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        if may_end and (not len(allowed) or random.random() < 0.5):
            return output
        output.append(int(random.choice(allowed)))
    return None


@pytest.mark.parametrize("make", [byte_level_bpe, prefixed_bpe, metaspace_bpe])
def test_tokenizers_of_all_kinds_write_valid_answers(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """The logits are wider than the tokenizer, and some are narrower."""
    tokenizer = make()
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
    special = set(tokenizer.all_special_ids)
    prompt = tokenizer("The capital of France is")["input_ids"]
    texts = 0
    for name, response_format, check in FORMATS:
        for seed in range(4):
            for tokens in (len(tokenizer) + 70, len(tokenizer)):
                output = walk(grammars.of(response_format), tokens, seed)
                if output is None:
                    continue
                texts += 1
                text = answer_text(tokenizer, prompt, output)
                assert check(text), (name, text)
                assert not special & set(output)
                assert max(output, default=0) < len(tokenizer)
    assert texts > 100
    (narrow,) = {max(walk(grammars.of(as_format(type="regex", regex=".{30}")), tokens=64, seed=0) or [0]) < 64}
    assert narrow


@pytest.mark.parametrize("make", [unigram, word_piece])
def test_a_tokenizer_without_bytes_is_refused(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
    for _ in range(2):
        with pytest.raises(UserError, match=r"^response_format: not possible with this model's tokenizer \(can't det"):
            grammars.of(as_format(type="json_object"))


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"^response_format: this model has no end token"):
        Grammars(byte_tokenizer(), ()).of(as_format(type="json_object"))


def test_a_format_is_compiled_once_and_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = grammar_compiler._grammar

    def counted(response_format: ResponseFormat) -> str | None:
        compiled.append(response_format.regex or "")
        return real(response_format)

    monkeypatch.setattr(grammar_compiler, "_grammar", counted)
    monkeypatch.setattr(grammar_compiler, "KEPT_GRAMMARS", 2)
    grammars = Grammars(byte_tokenizer(), [EOS_ID])
    for name in ("a", "b", "a", "a", "c", "a", "b"):
        grammars.of(as_format(type="regex", regex=name))
    assert compiled == ["a", "b", "c", "b"]


NO_RULES = TokenRules()


def sampler_of(response_format: ResponseFormat, rules: TokenRules = NO_RULES, **sampling: Any) -> SequenceSampler:
    made = Grammars(byte_tokenizer(), [EOS_ID]).of(response_format)
    return SequenceSampler(Sampling(**sampling), rules, most_tokens=5, end_tokens=(EOS_ID,), grammar=made)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_p": 0.9, "top_k": 20}])
def test_draws_follow_the_softmax_over_what_the_grammar_allows(filters: dict[str, Any]) -> None:
    """Pearson's test, as for rows without a grammar; filters apply to what is left."""
    vocabulary, count = 4200, 3000
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    allowed = [byte(character) for character in "abcdefgh"]
    sampler = sampler_of(as_format(type="regex", regex="[a-h]{4000}"), temperature=0.8, seed=4, **filters)
    scores = torch.full((1, vocabulary), -torch.inf)
    scores[0, allowed] = logits[allowed] / 0.8
    plain = Sampling(temperature=1.0, **filters)
    order = scores[0].argsort(descending=True)
    share = torch.softmax(scores[0, order].double(), -1)
    kept = torch.ones(vocabulary, dtype=torch.bool)
    if plain.top_k:
        kept[plain.top_k :] = False
    share = torch.where(kept, share, 0.0) / share[kept].sum()
    kept &= share.cumsum(-1) - share < plain.top_p
    kept &= share >= plain.min_p * share[0]
    share = torch.where(kept, share, 0.0) / share[kept].sum()
    output = [allowed[0]] * count
    tokens = BatchSampler().sample(logits.repeat(count, 1), [Draw(sampler, output[:index]) for index in range(count)])
    found = Counter(tokens)
    assert set(found) <= set(allowed)
    statistic = sum(
        (found[int(token)] - count * float(part)) ** 2 / (count * float(part))
        for token, part in zip(order, share, strict=True)
        if part > 0
    )
    assert sum(found[int(token)] for token, part in zip(order, share, strict=True) if part > 0) == count
    assert statistic < 60


def test_rules_of_the_model_hold_within_a_grammar() -> None:
    logits = torch.zeros(1, 258)
    logits[0, [byte("a"), byte("b")]] = torch.tensor([2.0, 1.0])
    suppressing = sampler_of(as_format(type="regex", regex="[ab]*"), TokenRules(suppressed=(byte("a"),)))
    assert BatchSampler().sample(logits.clone(), [Draw(suppressing, ())]) == [byte("b")]
    # A forced end would make an incomplete text look complete.
    forcing = sampler_of(as_format(type="regex", regex="[ab]{9}"), TokenRules(forced_last=(EOS_ID,)))
    assert BatchSampler().sample(logits.clone(), [Draw(forcing, [byte("a")] * 4)]) == [byte("a")]
    excluding = sampler_of(as_format(type="choice", choice=["a"]), TokenRules(suppressed=(byte("a"),)))
    (error,) = BatchSampler().sample(logits.clone(), [Draw(excluding, ())])
    assert isinstance(error, UserError)


def test_a_value_that_is_not_finite_is_not_hidden_by_a_grammar() -> None:
    logits = torch.zeros(2, 258)
    logits[0, 200] = torch.nan
    samplers = [sampler_of(as_format(type="choice", choice=["a"])) for _ in range(2)]
    assert BatchSampler().sample(logits, [Draw(one, ()) for one in samplers]) == [None, byte("a")]


def test_logits_can_be_kept() -> None:
    """Whatever the rows are constrained by; the tokens are the same."""
    everything: dict[str, Any] = {
        "temperature": 0.8,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "logit_bias": {5: 2.0, 7: -100.0},
        "min_new_tokens": 9,
    }
    rules = TokenRules(suppressed=(5, 9), forced_last=(3, 4))
    samplers = [
        sampler_of(as_format(type="choice", choice=["aaaaab"]), seed=1, **everything),
        SequenceSampler(Sampling(seed=2, **everything), rules, prompt=[5, 5, 6], end_tokens=(EOS_ID,)),
        SequenceSampler(Sampling(seed=3), rules, most_tokens=5),
        SequenceSampler(Sampling(seed=4, temperature=1.0, top_k=5)),
    ]
    draws = [Draw(one, [byte("a")] * 4) for one in samplers]
    logits = torch.randn(len(draws), 300, generator=torch.Generator().manual_seed(5))
    kept = logits.clone()
    assert BatchSampler().sample(kept, draws, keeps_logits=True) == BatchSampler().sample(logits.clone(), draws)
    assert torch.equal(kept, logits)


def test_the_state_is_a_function_of_the_answer() -> None:
    """Asked again, or for an earlier place, it says the same."""
    made = Grammars(byte_tokenizer(), [EOS_ID]).of(as_format(type="regex", regex="ab|cd"))
    bits = np.empty(9, dtype=np.uint32)

    def allowed(text: str) -> tuple[list[int], bool]:
        may_end = made.fill(bits, [byte(character) for character in text])
        return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist(), may_end

    expected: Sequence[tuple[str, str, bool]] = [
        ("", "ac", False), ("a", "b", False), ("a", "b", False), ("ab", "", True), ("", "ac", False), ("cd", "", True)
    ]  # fmt: skip
    for text, after, may_end in expected:
        assert allowed(text) == (sorted(map(byte, after)), may_end)
