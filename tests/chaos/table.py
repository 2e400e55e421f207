"""From trials to the table of results, and what is missing in it."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from core.records import Response
from tests.chaos.hostile import Verdicts
from tests.chaos.load import Book, Reference
from tests.chaos.scenario import Trial
from tests.chaos.stack import RunningJob

COLUMNS = (
    "scenario",
    "requests",
    "answered",
    "dead_lettered",
    "lost",
    "duplicated",
    "wrong",
    "recovery_s",
    "repeated_engine_calls",
    "slowest_s",
    "restarts",
    "copies",
    "evidence",
    "rate_per_s",
    "parallelism",
    "model",
    "seed",
)
NAMED = 3
Row = Mapping[str, object]


def row(trial: Trial, reference: Reference) -> Row:
    """The figures of one trial; `docs/metrics.md` says what each means."""
    book = trial.book
    reference.learn(book.requests.values())
    return {
        "scenario": trial.scenario,
        "requests": len(book.all_sent),
        "answered": len(book.responses),
        "dead_lettered": len(book.dead_letters),
        "lost": len(book.missing()),
        "duplicated": book.duplicates,
        "wrong": sum(is_wrong(book, answer, reference) for _, answer in book.answers),
        "recovery_s": recovery_s(trial),
        "repeated_engine_calls": len(trial.begun) - len(set(trial.begun)),
        "slowest_s": slowest_s(trial),
        "restarts": trial.restarts,
        "copies": trial.copies,
        "evidence": trial.evidence,
        "rate_per_s": trial.shape.rate_per_s,
        "parallelism": trial.job.parallelism,
        "model": reference.model,
        "seed": trial.shape.seed,
    }


def hostile_row(run: RunningJob, verdicts: Verdicts, reference: Reference, seed: int) -> Row:
    """The figures of hostile input; a record counts as a request, whatever it is."""
    refused, lost, doubled = len(verdicts.refused), len(verdicts.lost), len(verdicts.doubled)
    begun = run.begins.request_ids()
    return {
        "scenario": "hostile",
        "requests": len(verdicts.records),
        "answered": len(verdicts.answers),
        "dead_lettered": refused,
        "lost": lost,
        "duplicated": doubled,
        "wrong": verdicts.wrong(reference) + verdicts.foreign,
        "recovery_s": math.nan,
        "repeated_engine_calls": len(begun) - len(set(begun)),
        "slowest_s": math.nan,
        "restarts": verdicts.restarts,
        "copies": 0,
        "evidence": f"{refused} records were refused",
        "rate_per_s": math.nan,
        "parallelism": run.config.parallelism,
        "model": reference.model,
        "seed": seed,
    }


def hostile_failings(verdicts: Verdicts, result: Row) -> list[str]:
    """As `failings`."""
    said = list(verdicts.problems)
    for what, places in (("no outcome for", verdicts.lost), ("more than one outcome for", verdicts.doubled)):
        if places:
            said.append(f"{what} {named([f'{partition}-{offset}' for partition, offset in places])}")
    if result["wrong"]:
        said.append(f"{result['wrong']} good requests were not answered as by the engine alone, or answers are foreign")
    if verdicts.restarts:
        said.append(f"the job was restarted {verdicts.restarts} times")
    return said


def is_wrong(book: Book, answer: Response, reference: Reference) -> bool:
    """Whether it is another answer than the engine alone gives, or one to a request that nobody has sent."""
    request = book.requests.get(answer.request_id)
    return request is None or answer.token_ids != reference.token_ids(request)


def recovery_s(trial: Trial) -> float:
    """From the fault until every slot has answered a request that was created after it; nan if one never did.

    A slot that goes on answering must not hide that another one stands still.
    """
    first_ms: dict[int, float] = {}
    for received_ms, answer in trial.book.answers:
        if answer.created_at_ms >= trial.fault_ms:
            first_ms.setdefault(answer.slot, received_ms)
    if not trial.fault_ms or set(range(trial.job.parallelism)) - set(first_ms):
        return math.nan
    return (max(first_ms[slot] for slot in range(trial.job.parallelism)) - trial.fault_ms) / 1000


def slowest_s(trial: Trial) -> float:
    """The longest that a request waited for its first answer, from its creation to the reader of the responses."""
    first_ms: dict[str, float] = {}
    for received_ms, answer in trial.book.answers:
        first_ms.setdefault(answer.request_id, received_ms)
    requests = trial.book.requests
    waited_ms = [at - requests[name].created_at_ms for name, at in first_ms.items() if name in requests]
    return max(waited_ms, default=math.nan) / 1000


def failings(trial: Trial, result: Row) -> list[str]:
    """What of the promise was not kept, a few words each; empty where all was."""
    said = list(trial.problems)
    if trial.unacknowledged:
        said.append(f"Kafka did not take {trial.unacknowledged} records")
    if trial.book.missing():
        said.append(f"lost {named(trial.book.missing())}")
    if result["duplicated"]:
        said.append(f"{result['duplicated']} second outcomes ({named(trial.book.doubled)})")
    if result["wrong"]:
        said.append(f"{result['wrong']} answers are not those of the engine alone")
    if math.isnan(recovery_s(trial)):
        said.append("a slot has answered nothing that was asked after the fault")
    if {answer.request_id for _, answer in trial.book.answers} - set(trial.begun):
        said.append("answers came whose begin no engine has told of, so that repeated calls are not known")
    if not trial.evidence:
        said.append("nothing shows that the fault was there")
    return said


def named(request_ids: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(request_ids[:NAMED]) + (
        f" and {len(request_ids) - NAMED} more" if len(request_ids) > NAMED else ""
    )


def table(rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))
