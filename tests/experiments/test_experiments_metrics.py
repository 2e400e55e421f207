"""The formulas of docs/metrics.md, on examples computed by hand, and properties for any records."""

import json
import math
import random

import pytest
from experiment_samples import BEGIN_MS, dead_letter, made_runs, response, run_of
from hypothesis import given
from hypothesis import strategies as st

from cache.registry import SIZING
from core.records import Choice, FinishReason, Response
from experiments import cache_metrics, metrics
from experiments.cache_experiments import with_strategy
from operators.config import JobConfig

SEED_HEADER = "strategy,total_requests,cache_hits,hit_rate_percent,avg_latency_ms,strategy_config"


def four() -> list[Response]:
    """A miss, a local hit, a remote hit, and a hit in both tiers; 40 prompt tokens in all."""
    return [
        response(request_id="a", computed_tokens=10, e2e_ms=100.0, batch_id="x", batch_size=2),
        response(request_id="b", local_tokens=8, computed_tokens=2, e2e_ms=200.0, batch_id="x", batch_size=2),
        response(request_id="c", remote_tokens=4, computed_tokens=6, e2e_ms=300.0, batch_id="y"),
        response(request_id="d", local_tokens=5, remote_tokens=3, computed_tokens=2, e2e_ms=1000.0, batch_id="z"),
    ]


def test_a_request_is_a_hit_if_any_token_came_from_either_tier() -> None:
    answers = metrics.frame(four())
    assert cache_metrics.cache_hits(answers) == 3
    assert cache_metrics.hit_rate_percent(answers) == 75.0
    assert cache_metrics.tier_hits(answers, "local") == 2
    assert cache_metrics.tier_hits(answers, "remote") == 2


def test_token_rates_weigh_requests_by_their_length() -> None:
    answers = metrics.frame(four())
    assert cache_metrics.token_hit_rate_percent(answers) == pytest.approx(100 * 20 / 40)
    assert cache_metrics.token_share_percent(answers, "local") == pytest.approx(100 * 13 / 40)
    assert cache_metrics.token_share_percent(answers, "remote") == pytest.approx(100 * 7 / 40)


def test_latency_is_from_creation_to_the_last_token() -> None:
    answers = metrics.frame(four())
    assert metrics.mean(answers, "e2e_ms") == 400.0
    assert metrics.percentile(answers, "e2e_ms", 50) == 250.0
    # Rank 0.95 * 3 = 2.85 lies between the third and the fourth.
    assert metrics.percentile(answers, "e2e_ms", 95) == pytest.approx(300 + 0.85 * 700)


def test_throughput_is_over_first_creation_to_last_token() -> None:
    late = response(request_id="e", created_at_ms=BEGIN_MS + 3000, e2e_ms=1000.0, output_tokens=6)
    answers = metrics.frame([response(), late])
    assert metrics.span_s(answers) == 4.0
    assert metrics.throughput_req_per_s(answers) == 0.5
    assert metrics.output_tokens_per_s(answers) == 2.0


def test_a_batch_counts_once_however_many_requests_it_held() -> None:
    assert metrics.avg_batch_size(metrics.frame(four())) == pytest.approx((2 + 1 + 1) / 3)


def test_times_that_do_not_exist_are_left_out_of_means() -> None:
    tokenless = response(request_id="n", output_tokens=0, ttft_ms=None, tpot_ms=None)
    answers = metrics.frame([response(ttft_ms=60.0, tpot_ms=10.0), tokenless])
    assert metrics.mean(answers, "ttft_ms") == 60.0
    assert metrics.percentile(answers, "tpot_ms", 95) == 10.0


def test_the_parts_of_a_request_are_those_of_its_way() -> None:
    # Arrived at 30, prefill at 50, first token at 60, one step of 40 until 100, left with its batch at 130.
    made = response(wait_ms=20.0, ttft_ms=60.0, tpot_ms=40.0, inference_ms=50.0, e2e_ms=130.0)
    (parts,) = metrics.parts_ms(metrics.frame([made])).to_dict("records")
    assert parts == {"transit": 30.0, "wait": 20.0, "prefill": 10.0, "decode": 40.0, "leaving": 30.0}
    assert list(metrics.began_at_ms(metrics.frame([made]))) == [made.created_at_ms + 50.0]


def test_the_step_that_ended_an_answer_is_decode_too() -> None:
    fields = {"output_tokens": 2, "tpot_ms": 10.0, "ttft_ms": 60.0, "inference_ms": 40.0, "e2e_ms": 90.0}
    ended, cut = (response(finish_reason=reason, **fields) for reason in ("stop", "length"))
    assert list(metrics.parts_ms(metrics.frame([ended, cut]))["decode"]) == [20.0, 10.0]


def test_the_parts_of_a_request_for_several_answers_add_up() -> None:
    further = (Choice(text="", token_ids=(1,) * 3, finish_reason=FinishReason.STOP),)
    fields = {"token_ids": (1, 1), "further_choices": further, "output_tokens": 5, "tpot_ms": 10.0}
    made = response(wait_ms=20.0, ttft_ms=60.0, inference_ms=40.0, e2e_ms=90.0, **fields)
    (parts,) = metrics.parts_ms(metrics.frame([made])).to_dict("records")
    assert parts == {"transit": 30.0, "wait": 20.0, "prefill": 10.0, "decode": 30.0, "leaving": 0.0}


def test_an_answer_without_a_token_was_all_prefill() -> None:
    late = response(output_tokens=0, ttft_ms=None, tpot_ms=None, finish_reason="deadline", inference_ms=30.0)
    (parts,) = metrics.parts_ms(metrics.frame([late])).to_dict("records")
    assert parts == {"transit": 50.0, "wait": 20.0, "prefill": 30.0, "decode": 0.0, "leaving": 0.0}


def ran(begin_ms: float, end_ms: float, slot: int = 0) -> Response:
    """A response of a request in the slot's engine from `begin_ms` to `end_ms`."""
    took = end_ms - begin_ms
    return response(slot=slot, wait_ms=begin_ms, ttft_ms=begin_ms + took / 2, tpot_ms=took / 2, inference_ms=took,
                    e2e_ms=end_ms)  # fmt: skip


def test_a_slot_is_busy_while_any_request_is_in_it() -> None:
    # 10-40 and 20-30 and 35-50 overlap, 90-100 does not: 50 of 100 ms.
    answers = metrics.frame([ran(90, 100), ran(10, 40), ran(35, 50), ran(20, 30)])
    assert metrics.busy_share_percent(answers, slots=1) == pytest.approx(50)
    # A slot that had nothing to do counts as well.
    assert metrics.busy_share_percent(answers, slots=2) == pytest.approx(25)
    assert metrics.busy_share_percent(metrics.frame([ran(0, 100), ran(50, 100, slot=1)]), slots=2) == pytest.approx(75)


def test_a_load_is_kept_up_with_however_long_one_answer_takes() -> None:
    # Offered 3.03 requests/s.
    for gap_ms, kept in ((330.0, True), (500.0, False)):
        made = [response(request_id=str(n), created_at_ms=BEGIN_MS + gap_ms * n, e2e_ms=9e3) for n in range(20)]
        answers = metrics.frame(made)
        assert metrics.departure_rate(answers) == pytest.approx(1000 / gap_ms)
        assert metrics.keeps_up(run_of(*made), answers) is kept


def looked_up(at_ms: float, capacity: int, slot: int = 0) -> Response:
    """A response with its lookup at `at_ms`, and its answer 10 ms later."""
    return response(
        request_id=f"{slot}-{at_ms}",
        slot=slot,
        ttft_ms=10.0,
        tpot_ms=None,
        inference_ms=10.0,
        e2e_ms=10.0,
        created_at_ms=BEGIN_MS + at_ms,
        cache_capacity_chunks=capacity,
    )


def test_capacity_is_weighed_by_the_time_that_it_held() -> None:
    # 100 chunks for 30 ms, then 50 for the 10 ms until the last answer.
    answers = metrics.frame([looked_up(0, 100), looked_up(30, 50)])
    assert cache_metrics.mean_capacity_chunks(answers) == pytest.approx((100 * 30 + 50 * 10) / 40)
    assert cache_metrics.peak_capacity_chunks(answers) == 100


def test_capacity_adds_up_over_slots() -> None:
    first, second = [looked_up(0, 100), looked_up(30, 50)], [looked_up(0, 7, slot=1), looked_up(20, 9, slot=1)]
    answers = metrics.frame([*first, *second])
    assert cache_metrics.mean_capacity_chunks(answers) == pytest.approx(87.5 + (7 * 20 + 9 * 20) / 40)
    assert cache_metrics.peak_capacity_chunks(answers) == 109


def test_the_row_has_the_seeds_columns_first_and_all_of_ours() -> None:
    run = run_of(*four(), dead_letters=(dead_letter(),), duplicates=2)
    row = cache_metrics.row(run)
    assert tuple(row) == cache_metrics.COLUMNS
    assert ",".join(row).startswith(SEED_HEADER)
    assert (row["strategy"], row["total_requests"], row["cache_hits"]) == ("STATIC", 4, 3)
    assert (row["dead_letters"], row["duplicates"]) == (1, 2)
    assert row["mean_capacity_bytes"] == row["mean_capacity_chunks"] * 1000
    assert (row["device"], row["workload"], row["offered_rate"]) == ("cpu", "phases", 3.03)


def test_a_run_without_answers_has_empty_cells_and_no_error() -> None:
    row = cache_metrics.row(run_of(dead_letters=(dead_letter(),)))
    assert (row["total_requests"], row["cache_hits"], row["dead_letters"]) == (0, 0, 1)
    assert all(math.isnan(row[name]) for name in ("hit_rate_percent", "p99_latency_ms", "mean_capacity_chunks"))


def test_strategy_config_holds_what_the_strategy_reads() -> None:
    static, fluid = (
        json.loads(cache_metrics.strategy_config(with_strategy(JobConfig(), strategy)))
        for strategy in ("STATIC", "FLUID")
    )
    assert static == {"capacity_chunks": JobConfig().cache.sizing.capacity_chunks}
    assert fluid["fluid_grow_factor"] == 1.25
    assert fluid["max_capacity_chunks"] == 384
    assert not any(name.startswith(("frequency", "mrc", "budget")) for name in fluid)


def test_strategy_config_of_mrc_has_the_budget_where_there_is_one() -> None:
    own = with_strategy(JobConfig(), "MRC")
    alone = json.loads(cache_metrics.strategy_config(own))
    assert (alone["mrc_goal"], alone["mrc_target_hit_rate"]) == ("hit_rate", 0.75)
    sizing = own.cache.sizing.model_copy(update={"budget_chunks": 300})
    shared = own.model_copy(update={"cache": own.cache.model_copy(update={"sizing": sizing})})
    assert json.loads(cache_metrics.strategy_config(shared)) == alone | {"budget_chunks": 300}


def test_one_row_a_run_in_their_order() -> None:
    assert list(cache_metrics.table(made_runs(20))["strategy"]) == list(SIZING)


TOKENS = st.integers(0, 500)
RESPONSES = st.lists(
    st.builds(
        lambda tokens, at_ms, took_ms, slot, capacity: response(
            slot=slot,
            local_tokens=tokens[0],
            remote_tokens=tokens[1],
            computed_tokens=tokens[2] + 1,
            created_at_ms=BEGIN_MS + at_ms,
            ttft_ms=took_ms,
            tpot_ms=None,
            inference_ms=took_ms,
            e2e_ms=took_ms,
            cache_capacity_chunks=capacity,
        ),
        st.tuples(TOKENS, TOKENS, TOKENS),
        st.floats(0, 1e6),
        st.floats(0.1, 1e5),
        st.integers(0, 3),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=20,
)


@given(RESPONSES)
def test_shares_add_up_and_rates_stay_in_their_range(responses: list[Response]) -> None:
    answers = metrics.frame(responses)
    shares = [cache_metrics.token_share_percent(answers, tier) for tier in cache_metrics.TIERS]
    assert sum(shares) == pytest.approx(100)
    assert cache_metrics.token_hit_rate_percent(answers) == pytest.approx(shares[0] + shares[1])
    hits = cache_metrics.cache_hits(answers)
    assert max(cache_metrics.tier_hits(answers, tier) for tier in ("local", "remote")) <= hits <= len(responses)


@given(RESPONSES)
def test_parts_add_up_to_the_latency(responses: list[Response]) -> None:
    answers = metrics.frame(responses)
    assert list(metrics.parts_ms(answers).sum(axis=1)) == pytest.approx(list(answers["e2e_ms"]), abs=1e-6)


@given(RESPONSES)
def test_percentiles_are_ordered_and_within_the_values(responses: list[Response]) -> None:
    answers = metrics.frame(responses)
    values = [metrics.percentile(answers, "e2e_ms", percent) for percent in (0, 50, 95, 99, 100)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (answers["e2e_ms"].min(), answers["e2e_ms"].max())


@given(RESPONSES)
def test_mean_capacity_lies_between_the_least_and_the_peak(responses: list[Response]) -> None:
    answers = metrics.frame(responses)
    least = answers.groupby("slot")["cache_capacity_chunks"].min().sum()
    mean, peak = cache_metrics.mean_capacity_chunks(answers), cache_metrics.peak_capacity_chunks(answers)
    assert least - 1e-6 <= mean <= peak + 1e-6


@given(RESPONSES, st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(responses: list[Response], dice: random.Random) -> None:
    # Two lookups of one slot at the same time have no defined order.
    began = metrics.began_at_ms(metrics.frame(responses))
    unique = list({(made.slot, at_ms): made for made, at_ms in zip(responses, began, strict=True)}.values())
    shuffled = dice.sample(unique, len(unique))
    for metric in (
        cache_metrics.mean_capacity_chunks,
        metrics.throughput_req_per_s,
        cache_metrics.token_hit_rate_percent,
    ):
        assert metric(metrics.frame(unique)) == pytest.approx(metric(metrics.frame(shuffled)))
