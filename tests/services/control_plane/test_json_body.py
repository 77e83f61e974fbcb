"""The reader of REST bodies, against every request that there is."""

import json
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from budgetguard.core.errors import InvalidError
from budgetguard.core.money import COUNTER_NANOS_MAX, format_usd, parse_usd
from budgetguard.v1 import budget_pb2, price_pb2, tenant_pb2
from control_plane.__main__ import SERVICES
from control_plane.json_body import HTTP_BODY, read_http_body

READABLE = {
    FieldDescriptor.TYPE_BOOL,
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_ENUM,
    FieldDescriptor.TYPE_MESSAGE,
}
SPECIAL = {"google.protobuf.Duration", "google.protobuf.Timestamp", "google.protobuf.FieldMask", "google.api.HttpBody"}
METHODS = [method for file in SERVICES for service in file.services_by_name.values() for method in service.methods]


def read(request: Any, body: str | bytes) -> Any:
    request.http_body.CopyFrom(HttpBody(data=body.encode() if isinstance(body, str) else body))
    read_http_body(request)
    return request


def fields_below(message: Any) -> list[Any]:
    found = []
    for field in message.fields:
        found.append(field)
        nested = field.message_type
        if nested is not None and nested.full_name not in SPECIAL:
            found += fields_below(nested)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_request_with_a_body_can_be_read(method):
    if HTTP_BODY not in method.input_type.fields_by_name:
        return
    for field in fields_below(method.input_type):
        assert field.type in READABLE, field.full_name
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.message_type.full_name in SPECIAL:
            assert field.is_repeated is False


@given(st.integers(min_value=0, max_value=COUNTER_NANOS_MAX))
def test_an_amount_written_as_a_number_is_exact(nanos):
    request = read(budget_pb2.CreateBudgetRequest(), f'{{"amountUsd":{format_usd(nanos)}}}')
    assert parse_usd(request.amount_usd) == nanos


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body):
    refusal: InvalidError | None = None
    try:
        read(budget_pb2.SetBudgetsRequest(), body)
    except InvalidError as error:
        refusal = error
    assert refusal is None or refusal.violations


FIELDS = (
    "budgets",
    "tenantId",
    "period",
    "amountUsd",
    "startDate",
    "mode",
    "usd",
    "updateMask",
    "clamp",
    "\ud800",
    "x",
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(FIELDS), _JSON, max_size=5), st.sampled_from(METHODS))
def test_any_json_is_read_or_refused_by_name(members, method):
    if HTTP_BODY not in method.input_type.fields_by_name:
        return
    try:
        read(method.input_type._concrete_class(), json.dumps(members))
    except InvalidError as error:
        for violation in error.violations:
            violation.field.encode()
            assert violation.expected


def test_an_empty_body_is_an_empty_object():
    assert read(tenant_pb2.CreateTenantRequest(), b" ") == tenant_pb2.CreateTenantRequest()


def test_without_a_body_nothing_changes():
    request = tenant_pb2.CreateTenantRequest(name="typed")
    read_http_body(request)
    assert request == tenant_pb2.CreateTenantRequest(name="typed")


def test_both_spellings_of_a_name():
    body = '{"rate_limit_per_min": 1, "outputTokensMax": 2}'
    request = read(tenant_pb2.CreateTenantRequest(), body)
    assert (request.rate_limit_per_min, request.output_tokens_max) == (1, 2)


def test_the_members_of_an_update_are_its_mask():
    request = read(tenant_pb2.UpdateTenantRequest(tenant_id="acme"), '{"tenantId":"acme","clamp":null,"name":"x"}')
    assert sorted(request.update_mask.paths) == ["clamp", "name"]
    masked = read(tenant_pb2.UpdateTenantRequest(), '{"clamp":true,"outputTokensMax":5,"updateMask":"outputTokensMax"}')
    assert list(masked.update_mask.paths) == ["output_tokens_max"]


def test_a_map_of_amounts_keeps_their_digits():
    request = read(price_pb2.PutPriceRequest(), '{"usd":{"input_tokens":0.1500,"output_tokens":"0.60"}}')
    assert dict(request.usd) == {"input_tokens": "0.1500", "output_tokens": "0.60"}


def test_only_so_many_wrong_fields_are_named():
    body = "{" + ",".join(f'"f{number}":1' for number in range(50)) + "}"
    with pytest.raises(InvalidError) as raised:
        read(tenant_pb2.CreateTenantRequest(), body)
    assert len(raised.value.violations) == 10


@pytest.mark.parametrize(
    ("spelled", "seconds", "nanos"),
    [
        ("3600s", 3600, 0),
        ("1.5s", 1, 500_000_000),
        ("0.000000001s", 0, 1),
        ("30m", 1800, 0),
        ("12h", 43_200, 0),
        ("90d", 7_776_000, 0),
        ("315576000000s", 315_576_000_000, 0),
    ],
)
def test_a_duration_is_read_exactly(spelled, seconds, nanos):
    request = read(budget_pb2.CreateBudgetRequest(), json.dumps({"rollingPeriod": spelled}))
    assert (request.rolling_period.seconds, request.rolling_period.nanos) == (seconds, nanos)


@pytest.mark.parametrize(
    "spelled",
    [
        3600,
        "3600",
        "1.5h",
        "-1s",
        "1w",
        "",
        "s",
        " 1s",
        "1s ",
        "1e3s",
        "\N{ARABIC-INDIC DIGIT ONE}s",
        "315576000001s",
        "999999999999d",
        True,
        [],
    ],
)
def test_what_is_no_duration_is_refused_by_name(spelled):
    with pytest.raises(InvalidError) as invalid:
        read(budget_pb2.CreateBudgetRequest(), json.dumps({"rollingPeriod": spelled}))
    assert [violation.field for violation in invalid.value.violations] == ["rollingPeriod"]


@pytest.mark.parametrize("spelled", ["each_session", "EACH_SESSION", "session", "Session"])
def test_a_value_may_be_named_without_the_prefix_of_its_enum(spelled):
    request = read(budget_pb2.CreateBudgetRequest(), json.dumps({"each": spelled}))
    assert request.each == budget_pb2.Budget.EACH_SESSION


@pytest.mark.parametrize("spelled", ["unspecified", "each_unspecified", "EACH_EACH_SESSION", "s", "", 3, None, ["x"]])
def test_other_names_of_a_value_are_refused(spelled):
    if spelled is None:
        assert read(budget_pb2.CreateBudgetRequest(), '{"each":null}').each == 0
        return
    with pytest.raises(InvalidError):
        read(budget_pb2.CreateBudgetRequest(), json.dumps({"each": spelled}))


def test_a_list_of_numbers_names_each_wrong_one():
    request = read(budget_pb2.CreateBudgetRequest(), '{"thresholdBps":[1,100000]}')
    assert list(request.threshold_bps) == [1, 100_000]
    with pytest.raises(InvalidError) as invalid:
        read(budget_pb2.CreateBudgetRequest(), '{"thresholdBps":[1,"2",3.5,null,{}]}')
    assert [v.field for v in invalid.value.violations] == [f"thresholdBps[{index}]" for index in (1, 2, 3, 4)]
    with pytest.raises(InvalidError):
        read(budget_pb2.CreateBudgetRequest(), '{"thresholdBps":5000}')
