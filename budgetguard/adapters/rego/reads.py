"""What a decision can depend on, found in the compiled plan: never too little, so that a decision may be remembered.

Local 0 of every function is ``input``. A dot on it with a constant key reads that one member; a rule that is called
gets it as its own local 0. Any other mention, and all that is not recognised, counts as reading everything.
"""

from collections.abc import Iterator
from typing import Any

_INPUT = {"type": "local", "value": 0}
_DATA = {"type": "local", "value": 1}

# Builtins whose result follows from their arguments alone. An allow-list: what a later engine adds (a clock, chance,
# the network) is not taken for one of these. print is none: it is there to be seen at each call. The calendar is none:
# it reads the machine's time zones, and is only of use with a time, which is another at each call.
PURE_BUILTINS = """
abs and array.concat array.flatten array.reverse array.slice base64.decode base64.encode base64.is_valid
base64url.decode base64url.encode base64url.encode_no_pad bits.and bits.lsh bits.negate bits.or bits.rsh bits.xor ceil
concat contains count crypto.hmac.equal crypto.hmac.md5 crypto.hmac.sha1 crypto.hmac.sha256 crypto.hmac.sha512
crypto.md5 crypto.sha1 crypto.sha256 div endswith equal floor format_int glob.match glob.quote_meta graph.reachable
graph.reachable_paths gt gte hex.decode hex.encode indexof indexof_n internal.member_2 internal.member_3 intersection
is_array is_boolean is_null is_number is_object is_set is_string json.filter json.is_valid json.marshal
json.marshal_with_options json.patch json.remove json.unmarshal lower lt lte max min minus mul neq numbers.range
numbers.range_step object.filter object.get object.keys object.remove object.subset object.union object.union_n or
plus product regex.find_all_string_submatch_n regex.find_n regex.globs_match regex.is_valid regex.match regex.replace
regex.split regex.template_match rem replace round semver.compare semver.is_valid sort split sprintf startswith
strings.any_prefix_match strings.any_suffix_match strings.count strings.replace_n strings.reverse substring sum
to_number trim trim_left trim_prefix trim_right trim_space trim_suffix type_name union units.parse units.parse_bytes
upper urlquery.decode urlquery.decode_object urlquery.encode urlquery.encode_object uuid.parse walk yaml.is_valid
yaml.marshal yaml.unmarshal
"""

# The statements of OPA's intermediate representation; each names the locals that it touches.
_STATEMENTS = """
ArrayAppendStmt AssignIntStmt AssignVarStmt AssignVarOnceStmt BlockStmt BreakStmt CallStmt CallDynamicStmt DotStmt
EqualStmt IsArrayStmt IsDefinedStmt IsObjectStmt IsSetStmt IsUndefinedStmt LenStmt MakeArrayStmt MakeNullStmt
MakeNumberIntStmt MakeNumberRefStmt MakeObjectStmt MakeSetStmt NopStmt NotStmt NotEqualStmt ObjectInsertStmt
ObjectInsertOnceStmt ObjectMergeStmt ResetLocalStmt ResultSetAddStmt ReturnLocalStmt ScanStmt SetAddStmt WithStmt
"""

# Members that are no locals although they are numbers, or whose statements are looked at by themselves.
_NO_LOCALS = frozenset({"file", "row", "col", "index", "capacity", "block", "blocks"})


def fields_read(plan: dict[str, Any]) -> frozenset[str] | None:
    """Return the members of ``input`` that the decision can depend on.

    ``None`` is all of them, or more than ``input``: a clock, chance, the environment.
    """
    functions = plan["funcs"]["funcs"]
    rules = {function["name"] for function in functions}
    statements = list(_statements([functions, plan["plans"]]))
    called = {members["func"] for kind, members in statements if kind == "CallStmt"}
    builtins = {builtin["name"] for builtin in plan["static"]["builtin_funcs"]}
    if (
        any(function["params"][:2] != [0, 1] for function in functions)
        or not (called | builtins) - rules <= set(PURE_BUILTINS.split())
        or not {kind for kind, _ in statements} <= set(_STATEMENTS.split())
        or any(_names_input(_apart_from_usual(kind, members, rules)) for kind, members in statements)
    ):
        return None
    strings = [string["value"] for string in plan["static"]["strings"]]
    return frozenset(
        _unquoted(strings[members["key"]["value"]]) for kind, members in statements if _reads_field(kind, members)
    )


def _statements(part: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find every statement, with those in the blocks within it."""
    if isinstance(part, dict):
        if "stmt" in part:
            yield part["type"], part["stmt"]
        for member in part.values():
            yield from _statements(member)
    elif isinstance(part, list):
        for member in part:
            yield from _statements(member)


def _reads_field(kind: str, members: dict[str, Any]) -> bool:
    return kind == "DotStmt" and members["source"] == _INPUT and members["key"]["type"] == "string_index"


def _calls_rule(kind: str, members: dict[str, Any], rules: set[str]) -> bool:
    """Whether ``input`` goes on as the ``input`` of rules, whose own statements are in the plan."""
    called = kind == "CallDynamicStmt" or (kind == "CallStmt" and members["func"] in rules)
    return called and members["args"][:2] == [_INPUT, _DATA]


def _apart_from_usual(kind: str, members: dict[str, Any], rules: set[str]) -> dict[str, Any]:
    """Leave out the uses of ``input`` that are understood, and numbers that are no locals."""
    if _reads_field(kind, members) or kind == "MakeNumberIntStmt":
        return {"target": members["target"]}
    if _calls_rule(kind, members, rules):
        return {**members, "args": members["args"][2:]}
    return members


def _names_input(members: dict[str, Any]) -> bool:
    """Whether local 0 is read or set, as an operand or as a bare number."""
    return any(
        operand == _INPUT or (type(operand) is int and operand == 0)
        for name, member in members.items()
        if name not in _NO_LOCALS
        for operand in (member if isinstance(member, list) else [member])
    )


def _unquoted(key: str) -> str:
    """Strip the quotes that the engine leaves around some keys."""
    return key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
