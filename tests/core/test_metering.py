from dataclasses import replace

import pytest

from budgetguard.core.events import DETAIL_CHARS_MAX
from budgetguard.core.handoff import Handoff
from budgetguard.core.metering import Origin, Seen, conclude, origin_of
from budgetguard.core.money import CALL_NANOS_MAX
from budgetguard.core.operation import End, OperationFacts
from budgetguard.core.pricing import RateCard
from budgetguard.core.usage import Usage

# $1 a million input tokens, $4 out; priority costs double.
CARD = RateCard(
    version="price/1",
    rates={
        "default": {"input_tokens": ((-1, 10**9),), "output_tokens": ((-1, 4 * 10**9),)},
        "priority": {"input_tokens": ((-1, 2 * 10**9),), "output_tokens": ((-1, 8 * 10**9),)},
    },
)
JSON_CALL = Handoff(
    facts=OperationFacts(
        operation_id="op",
        tenant_id="acme",
        key_id="key",
        held_at_ms=1,
        api="openai.chat",
        provider_id="openai",
        model="gpt-4o-mini",
        price_version=CARD.version,
        stream=False,
    ),
    counters=("b:1:0",),
    hold_nanos=100_000 + 400_000,
    input_tokens_bound=100,
    output_tokens_bound=100,
    rate_card=CARD,
    service_tier="default",
)
STREAM = replace(JSON_CALL, facts=replace(JSON_CALL.facts, stream=True))
USAGE = Usage(input_tokens=20, output_tokens=10)
ANSWERED = Seen(forwarded=True, status=200, code_details="via_upstream", complete=True)


def end_of(handoff, seen):
    settlement = conclude(handoff, seen, ended_at_ms=7)
    assert settlement.handoff is handoff
    assert settlement.ended_at_ms == 7
    assert settlement.status == seen.status
    assert settlement.usage == seen.usage
    return settlement.end, settlement.amount_nanos


@pytest.mark.parametrize("handoff", [JSON_CALL, STREAM])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_reported_usage_is_what_a_call_costs_whatever_its_status(handoff, status):
    seen = replace(ANSWERED, usage=USAGE, status=status)
    assert end_of(handoff, seen) == (End.CONFIRMED, 20 * 1000 + 10 * 4000)


SEARCH_NANOS = 25_000_000
SEARCHES = replace(JSON_CALL, search_nanos=SEARCH_NANOS, hold_nanos=JSON_CALL.hold_nanos + SEARCH_NANOS)


def test_a_search_that_is_certain_is_charged_when_the_usage_tells_of_none():
    settlement = conclude(SEARCHES, replace(ANSWERED, usage=USAGE, remark="and more"), ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.CONFIRMED, 60_000 + SEARCH_NANOS)
    assert settlement.detail == "$0.025 of it for a web search; and more"
    told = replace(USAGE, web_searches=0)
    settlement = conclude(SEARCHES, replace(ANSWERED, usage=told), ended_at_ms=7)
    assert (settlement.amount_nanos, settlement.detail) == (60_000, "")


def test_a_search_is_in_an_estimate_too_and_in_no_release():
    cut = Seen(forwarded=True, status=200, code_details="via_upstream", output_tokens=10)
    settlement = conclude(SEARCHES, cut, ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 100_000 + 40_000 + SEARCH_NANOS)
    assert settlement.detail == "cut off before its usage; $0.025 of it for a web search"
    assert end_of(SEARCHES, replace(cut, output_tokens=None)) == (End.ESTIMATED, SEARCHES.hold_nanos)
    refused = conclude(SEARCHES, replace(ANSWERED, status=400), ended_at_ms=7)
    assert (refused.end, refused.amount_nanos, refused.detail) == (End.RELEASED, 0, "the provider answered 400")


@pytest.mark.parametrize(
    ("asked", "served", "charged", "factor"),
    [
        ("default", None, "default", 1),
        ("priority", None, "priority", 2),
        ("default", "priority", "priority", 2),
        ("priority", "default", "default", 1),
        ("priority", "scale", "default", 1),
    ],
)
def test_the_tier_that_was_served_is_charged(asked, served, charged, factor):
    seen = replace(ANSWERED, usage=USAGE, service_tier=served)
    settlement = conclude(replace(JSON_CALL, service_tier=asked), seen, ended_at_ms=7)
    assert settlement.rate_tier == charged
    assert settlement.amount_nanos == factor * 60_000


def test_a_provider_may_bill_more_than_the_hold():
    assert end_of(JSON_CALL, replace(ANSWERED, usage=Usage(input_tokens=20, output_tokens=1000))) == (
        End.CONFIRMED,
        4_020_000,
    )


def test_no_amount_is_more_than_a_call_can_carry():
    usage = Usage(input_tokens=2**53, output_tokens=2**53)
    assert end_of(JSON_CALL, replace(ANSWERED, usage=usage)) == (End.CONFIRMED, CALL_NANOS_MAX)


def test_a_call_without_output_needs_no_count_of_it():
    embeddings = replace(JSON_CALL, output_tokens_bound=0, hold_nanos=100_000)
    assert end_of(embeddings, replace(ANSWERED, usage=Usage(input_tokens=20))) == (End.CONFIRMED, 20_000)


@pytest.mark.parametrize("usage", [Usage(input_tokens=20), Usage(output_tokens=10), Usage()])
def test_half_a_report_is_an_estimate_of_at_least_the_hold(usage):
    settlement = conclude(JSON_CALL, replace(ANSWERED, usage=usage), ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 500_000)
    assert settlement.detail == "usage reported in part"


def test_half_a_report_over_the_hold_counts_in_full():
    usage = Usage(input_tokens=1000)
    assert end_of(JSON_CALL, replace(ANSWERED, usage=usage)) == (End.ESTIMATED, 1_000_000)


def test_a_running_total_of_a_stream_that_was_cut_is_the_least_it_cost():
    cut = replace(ANSWERED, complete=False, usage=USAGE, output_tokens=2)
    assert end_of(STREAM, cut) == (End.ESTIMATED, 100_000 + 2 * 4000)
    over = replace(cut, usage=Usage(input_tokens=90, output_tokens=60))
    assert end_of(STREAM, over) == (End.ESTIMATED, 90_000 + 240_000)


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (503, "no_healthy_upstream"),
        (503, "cluster_not_found"),
        (413, "request_payload_too_large"),
        (503, "upstream_reset_before_response_started{overflow}"),
        (503, "upstream_reset_before_response_started{connection_timeout}"),
        (
            503,
            "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}",
        ),
        (503, "upstream_reset_before_response_started{remote_refused_stream_reset}"),
    ],
)
@pytest.mark.parametrize("handoff", [JSON_CALL, STREAM])
def test_what_never_left_costs_nothing(handoff, status, details):
    seen = Seen(forwarded=True, status=status, code_details=details)
    assert end_of(handoff, seen) == (End.RELEASED, 0)
    assert origin_of(details) is Origin.EDGE_BEFORE_FORWARDING


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (504, "response_timeout"),
        (504, "stream_idle_timeout"),
        (503, "upstream_reset_before_response_started{connection_termination}"),
        (503, "upstream_reset_before_response_started{remote_reset}"),
        (502, "upstream_reset_before_response_started{protocol_error|http1.codec_error}"),
        (503, "upstream_reset_after_response_started{remote_connection_failure}"),
        (503, "overflow"),
        (503, ""),
    ],
)
@pytest.mark.parametrize("handoff", [JSON_CALL, STREAM])
def test_what_may_have_reached_the_provider_is_charged_its_hold(handoff, status, details):
    seen = Seen(forwarded=True, status=status, code_details=details)
    assert end_of(handoff, seen) == (End.ESTIMATED, 500_000)
    assert origin_of(details) is Origin.EDGE


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 502, 503])
def test_the_provider_s_own_errors_cost_nothing(status):
    assert end_of(JSON_CALL, replace(ANSWERED, status=status)) == (End.RELEASED, 0)
    assert end_of(STREAM, replace(ANSWERED, status=status, complete=False)) == (End.RELEASED, 0)


@pytest.mark.parametrize("status", [408, 504, 524])
def test_a_gateway_that_did_not_wait_for_the_model_proves_nothing(status):
    assert end_of(JSON_CALL, replace(ANSWERED, status=status)) == (End.ESTIMATED, 500_000)
    assert end_of(JSON_CALL, replace(ANSWERED, status=status, error_object=True)) == (End.RELEASED, 0)


@pytest.mark.parametrize("handoff", [JSON_CALL, STREAM])
def test_a_call_that_was_held_back_costs_nothing(handoff):
    assert end_of(handoff, Seen(forwarded=False)) == (End.RELEASED, 0)


@pytest.mark.parametrize("status", [200, 204, 307])
def test_an_answer_without_usage_is_charged_its_hold(status):
    settlement = conclude(JSON_CALL, replace(ANSWERED, status=status), ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 500_000)
    assert settlement.detail == "no usage reported"


def test_a_json_answer_that_was_cut_is_charged_its_hold():
    settlement = conclude(JSON_CALL, replace(ANSWERED, complete=False), ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 500_000)
    assert settlement.detail == "cut off before its usage"


@pytest.mark.parametrize(
    ("counted", "nanos"),
    [(0, 100_000), (7, 100_000 + 7 * 4000), (100, 500_000), (5000, 500_000)],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_stream_without_usage_is_charged_its_input_and_what_was_counted_up_to_its_hold(counted, nanos, complete):
    assert end_of(STREAM, replace(ANSWERED, complete=complete, output_tokens=counted)) == (End.ESTIMATED, nanos)


def test_an_estimate_is_at_the_tier_that_was_held_for():
    held = replace(STREAM, service_tier="priority", hold_nanos=1_000_000)
    assert end_of(held, replace(ANSWERED, complete=False, output_tokens=7)) == (End.ESTIMATED, 200_000 + 7 * 8000)


def test_a_client_that_leaves_before_the_answer():
    gone = Seen(forwarded=True)
    settlement = conclude(JSON_CALL, gone, ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 500_000)
    assert settlement.detail == "ended before an answer"
    assert end_of(STREAM, replace(gone, output_tokens=0)) == (End.ESTIMATED, 100_000)


def test_a_detail_is_bounded():
    seen = Seen(forwarded=True, status=503, code_details="no_healthy_upstream{" + "x" * 1000)
    assert len(conclude(JSON_CALL, seen, ended_at_ms=7).detail) == DETAIL_CHARS_MAX


def test_a_stream_that_was_ended_here_says_why_and_an_overrun_is_told_whatever_the_end():
    seen = replace(ANSWERED, complete=False, output_tokens=7, closed="stream closed: budget b is exhausted")
    settlement = conclude(STREAM, seen, ended_at_ms=7)
    assert (settlement.end, settlement.amount_nanos) == (End.ESTIMATED, 100_000 + 7 * 4000)
    assert settlement.detail == "stream closed: budget b is exhausted"
    assert conclude(STREAM, replace(ANSWERED, usage=USAGE, remark="overrun"), ended_at_ms=7).detail == "overrun"
    cut = replace(seen, closed="", remark="overrun")
    assert conclude(STREAM, cut, ended_at_ms=7).detail == "cut off before its usage; overrun"
