from budgetguard.core.errors import AdminReason
from budgetguard.core.reasons import Reason
from budgetguard.v1.error_reason_pb2 import ErrorReason


def test_the_public_list_has_every_reason_and_no_other():
    ours = {reason.value for reason in Reason} | {reason.value for reason in AdminReason}
    assert len(ours) == len(Reason) + len(AdminReason)
    public = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118 - no mapping
    assert public == ours | {"UNSPECIFIED"}
