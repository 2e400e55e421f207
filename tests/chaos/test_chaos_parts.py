"""The parts of the chaos suite without a cluster: load, ledger, figure, hostile records, the slow proxy."""

import json
import math
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from core.records import MAX_RECORD_BYTES, DeadLetter, Request, Response
from operators.config import JobConfig
from tests.chaos.begins import BeginLog
from tests.chaos.figure import draw
from tests.chaos.hostile import MUTATIONS, Hostile, Verdicts, mixed_records
from tests.chaos.load import Book, LoadShape, ReceivedRecord, SteadyLoad
from tests.chaos.proxy import SlowProxy
from tests.chaos.scenario import Trial
from tests.chaos.table import COLUMNS, failings, recovery_s, row, slowest_s, table
from tests.core.test_records import RESPONSE

SHAPE = LoadShape(requests=50, rate_per_s=10.0, seed=4)
BEGAN_MS = 1_000_000.0
COUNT = 1600


def created(name: str, at_s: float) -> Request:
    return Request(
        request_id=name, session_id="s", user_id="u", max_new_tokens=4, created_at_ms=BEGAN_MS + 1000 * at_s, prompt="p"
    )


def answer(request: Request, slot: int = 0, token_ids: tuple[int, ...] = (1, 2)) -> Response:
    said: dict[str, Any] = {
        "request_id": request.request_id, "created_at_ms": request.created_at_ms, "slot": slot, "token_ids": token_ids,
        "output_tokens": len(token_ids),
    }  # fmt: skip
    return Response.model_validate(RESPONSE | said)


class KnownAnswers:
    """A reference with the same answer to every request."""

    model = "m"

    def learn(self, requests: Any) -> None:
        pass

    def token_ids(self, request: Request) -> tuple[int, ...]:
        return 1, 2


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Requests at 0, 1, ..., 9 s; each takes 0.5 s, but slot 1 stands still from the fault at 3.6 s until 8.5 s."""
    book = Book()
    begins = BeginLog(tmp_path / "begins")
    lines = []
    for second in range(10):
        request = created(f"t/{second}", second)
        book.sent(request)
        slot = second % 2
        at_s = max(8.5, second + 0.5) if slot == 1 and second > 3 else second + 0.5
        book.outcomes.append(ReceivedRecord(BEGAN_MS + 1000 * at_s, answer(request, slot)))
        lines.append(f"DEBUG request {request.request_id!r} begins")
    lines += ["DEBUG request 't/5' begins", "DEBUG request 'another/5' begins", "ERROR request 't/6' failed"]
    (tmp_path / "begins" / "begins.log").write_text("\n".join(lines) + "\n")
    book.outcomes.sort(key=lambda one: one.received_ms)
    for one in book.outcomes:
        assert isinstance(one.record, Response)
        book._responses[one.record.request_id] = one.record
    return Trial(
        scenario="t", job=JobConfig(parallelism=2), shape=SHAPE, book=book, copies=0, unacknowledged=0,
        fault_ms=BEGAN_MS + 3600, healed_ms=BEGAN_MS + 5000, begins=begins, restarts=1, evidence="seen", problems=(),
    )  # fmt: skip


def test_every_tenth_request_is_sent_again_under_its_id() -> None:
    requests = list(SteadyLoad("a", SHAPE))
    assert requests == list(SteadyLoad("a", SHAPE))
    assert len(requests) == SteadyLoad("a", SHAPE).requests == 55
    assert [one.at_ms for one in requests] == sorted(one.at_ms for one in requests)
    twice = [name for name, count in Counter(one.request_id for one in requests).items() if count == 2]
    assert twice == [f"a/steady-4-{index:06d}" for index in range(0, 50, 10)]
    assert {one.request_id[2:] for one in SteadyLoad("b", SHAPE)} == {one.request_id[2:] for one in requests}


def test_a_burst_comes_ten_times_as_fast() -> None:
    due_ms: dict[str, float] = {}
    for one in SteadyLoad("a", replace(SHAPE, burst_factor=10.0)):
        due_ms.setdefault(one.request_id, one.at_ms)
    gaps_ms = [after - before for before, after in pairwise(sorted(due_ms.values()))]
    assert [round(gap_ms) for gap_ms in gaps_ms] == [100] * 15 + [10] * 20 + [100] * 14


def test_recovery_is_that_of_the_slot_that_takes_longest(trial: Trial) -> None:
    # Slot 1 owes an answer from the creation of request 5 on, and gives it at 8.5 s.
    assert recovery_s(trial) == pytest.approx(3.5)
    assert slowest_s(trial) == pytest.approx(3.5)
    # The stall counts from a fault in the middle of it; without a fault, an answer takes half a second.
    assert recovery_s(replace(trial, fault_ms=BEGAN_MS + 7000)) == pytest.approx(1.5)
    assert recovery_s(replace(trial, fault_ms=BEGAN_MS + 8900)) == pytest.approx(0.5)
    trial.book.sent(created("t/lost", 9.5))
    assert math.isnan(recovery_s(trial))


def test_a_row_has_the_columns_and_a_promise_that_is_kept_says_nothing(trial: Trial) -> None:
    result = row(trial, KnownAnswers())  # type: ignore[arg-type]
    assert tuple(table([result]).columns) == COLUMNS
    assert COLUMNS[:9] == (
        "scenario", "requests", "answered", "dead_lettered", "lost", "duplicated", "wrong", "recovery_s",
        "repeated_engine_calls",
    )  # fmt: skip
    assert [result[name] for name in COLUMNS[1:7]] == [10, 10, 0, 0, 0, 0]
    assert result["repeated_engine_calls"] == 1
    assert failings(trial, result) == []


def test_a_promise_that_is_not_kept_is_told(trial: Trial) -> None:
    trial.book.sent(created("t/lost", 9.5))
    trial.book.response(answer(created("t/1", 1.0)))
    trial.book.response(answer(created("t/2", 2.0), token_ids=(1, 3)))
    trial.book.response(answer(created("nobody's", 2.0)))
    broken = replace(trial, evidence="", unacknowledged=2, problems=("it did not drain",))
    said = " | ".join(failings(broken, row(broken, KnownAnswers())))  # type: ignore[arg-type]
    for part in (
        "did not drain",
        "take 2",
        "lost t/lost",
        "2 second outcomes (t/1, t/2)",
        "2 answers are not",
        "nothing",
    ):
        assert part in said
    assert "no engine has told of" in said


def test_the_figure_is_drawn(trial: Trial, tmp_path: Path) -> None:
    draw([trial, replace(trial, scenario="another", fault_ms=0.0)], tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").stat().st_size > 15_000


def test_hostile_records_are_of_every_kind_and_the_same_each_time() -> None:
    records = list(mixed_records(seed=2, count=COUNT))
    assert [one.raw for one in records] == [one.raw for one in mixed_records(seed=2, count=COUNT)]
    good = [one.good for one in records if one.good is not None]
    assert len(good) == COUNT / 8
    sizes = [len(one.raw) for one in records if one.raw is not None]
    assert None in {one.raw for one in records}
    assert b"" in {one.raw for one in records}
    assert max(sizes) > MAX_RECORD_BYTES >= min(size for size in sizes if size > MAX_RECORD_BYTES - 2000)
    requests = [one.raw for one in records if one.raw is not None and _valid(one.raw)]
    assert 0.1 < len(requests) / COUNT < 0.5
    ids = [Request.from_json(raw).request_id for raw in requests]
    assert len(set(ids)) == len(ids)
    assert len(MUTATIONS) > 10


def _valid(raw: bytes) -> bool:
    try:
        Request.from_json(raw)
    except Exception:
        return False
    return True


def test_each_hostile_record_is_accounted_for_by_its_place() -> None:
    fields = created("good", 0).model_dump(exclude_none=True)
    good = Request(**fields)
    raws = [json.dumps(fields | {"request_id": name}).encode() for name in ("good", "answered", "silent", "refused")]
    records = {(0, place): Hostile(raw) for place, raw in enumerate((*raws, b"{", None))}
    records[0, 0] = Hostile(raws[0], good)
    book = Book()
    for name, token_ids in (("good", (1, 2)), ("answered", (9,)), ("answered", (9,))):
        book.response(answer(created(name, 0), token_ids=token_ids))
    for place in (3, 4, 17):
        book.dead_letter(DeadLetter.of(b"", reason="r", stage="decode", topic="t", partition=0, offset=place))
    verdicts = Verdicts(records, book, 0, ())
    assert verdicts.lost == [(0, 2), (0, 5)]
    assert verdicts.doubled == [(0, 1)]
    assert verdicts.foreign == 1
    assert verdicts.wrong(KnownAnswers()) == 0  # type: ignore[arg-type]
    book.outcomes.clear()
    assert Verdicts(records, book, 0, ()).wrong(KnownAnswers()) == 1  # type: ignore[arg-type]


def test_the_proxy_holds_what_comes_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo, args=(server,), daemon=True).start()
        proxy = SlowProxy(server.getsockname())
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"one")
            assert client.recv(10) == b"one"
            proxy.delay_s = 0.2
            began_s = time.monotonic()
            client.sendall(b"two")
            assert client.recv(10) == b"two"
            assert time.monotonic() - began_s >= 0.2
            proxy.close()
            assert client.recv(10) == b""


def _echo(server: socket.socket) -> None:
    connection, _ = server.accept()
    while piece := connection.recv(100):
        connection.sendall(piece)


def test_the_table_leaves_empty_what_is_not_known(trial: Trial) -> None:
    result = row(replace(trial, fault_ms=0.0), KnownAnswers())  # type: ignore[arg-type]
    assert pd.isna(table([result])["recovery_s"][0])
