"""Makes the table of results from trials, and finds broken guarantees."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

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
    """The row of one trial; `docs/metrics.md` defines the columns."""
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
    """The row of hostile input. Every record counts as a request."""
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
    """Like `failings`, for hostile input."""
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
    """True if the answer differs from the bare engine's, or belongs to a request that was never sent."""
    request = book.requests.get(answer.request_id)
    return request is None or answer.token_ids != reference.token_ids(request)


def recovery_s(trial: Trial) -> float:
    """Longest time after the fault in which a slot owed an answer and gave none; NaN if a request has no outcome.

    Not the time until the next answer: some faults take effect late, and one slot may work while another stands still.
    """
    owed: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for received_ms, answer in first_answers(trial).values():
        owed[answer.slot].append((received_ms, answer.created_at_ms))
    stalls_ms = [stall for answers in owed.values() for stall in _stalls_ms(sorted(answers), trial.fault_ms)]
    return math.nan if trial.book.missing() or not trial.fault_ms else max(stalls_ms, default=math.nan) / 1000


def _stalls_ms(answers: Sequence[tuple[float, float]], fault_ms: float) -> Iterator[float]:
    """For each of a slot's answers `(received, request created)` since the fault, how long the slot had owed one."""
    oldest_owed_ms = math.inf
    before = [-math.inf, *(received_ms for received_ms, _ in answers)]
    for (received_ms, created_ms), before_ms in reversed(list(zip(answers, before, strict=False))):
        # All requests answered later are owed at this time.
        oldest_owed_ms = min(oldest_owed_ms, created_ms)
        if received_ms > fault_ms:
            yield received_ms - max(before_ms, oldest_owed_ms, fault_ms)


def slowest_s(trial: Trial) -> float:
    """Longest time from a request's creation until a reader had its first answer."""
    waited_ms = [received_ms - answer.created_at_ms for received_ms, answer in first_answers(trial).values()]
    return max(waited_ms, default=math.nan) / 1000


def first_answers(trial: Trial) -> dict[str, tuple[float, Response]]:
    """First answer of each request, with the time of receipt."""
    first: dict[str, tuple[float, Response]] = {}
    for received_ms, answer in trial.book.answers:
        first.setdefault(answer.request_id, (received_ms, answer))
    return first


def failings(trial: Trial, result: Row) -> list[str]:
    """Broken guarantees, a few words each; empty if there are none."""
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
        said.append("answers did not flow again")
    if {answer.request_id for _, answer in trial.book.answers} - set(trial.begun):
        said.append("answers came whose begin no engine has told of, so that repeated calls are not known")
    if not trial.evidence:
        said.append("nothing shows that the fault was there")
    return said


def named(request_ids: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(request_ids[:NAMED]) + (
        f" and {len(request_ids) - NAMED} more" if len(request_ids) > NAMED else ""
    )


def table(rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))
