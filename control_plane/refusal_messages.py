"""Between the messages of refusal.proto and the values of core."""

from budgetguard.core.attempts import RecordedAttempt, RefusalGroup
from budgetguard.v1 import refusal_pb2
from control_plane.messages import timestamp

REFUSAL_GROUPS = {
    refusal_pb2.CountRefusalsRequest.GROUP_BY_UNSPECIFIED: RefusalGroup.REASON,
    refusal_pb2.CountRefusalsRequest.REASON: RefusalGroup.REASON,
    refusal_pb2.CountRefusalsRequest.API_KEY: RefusalGroup.API_KEY,
    refusal_pb2.CountRefusalsRequest.DAY: RefusalGroup.DAY,
    refusal_pb2.CountRefusalsRequest.MINUTE: RefusalGroup.MINUTE,
}


def refusal_message(recorded: RecordedAttempt) -> refusal_pb2.RefusedCall:
    """Spell a refused call."""
    attempt = recorded.attempt
    message = refusal_pb2.RefusedCall(
        operation_id=attempt.operation_id,
        tenant_id=attempt.tenant_id,
        api_key_id=attempt.key_id,
        api=attempt.api,
        provider_id=attempt.provider_id,
        model=attempt.model,
        reason=attempt.reason.value,
        http_status=attempt.status,
        message=attempt.message,
        tags=attempt.tags,
        session_id=attempt.session_id,
        end_user=attempt.end_user,
        refuse_time=timestamp(attempt.refused_at_ms),
        record_time=timestamp(recorded.recorded_at_ms),
    )
    message.facts.update(dict(attempt.facts))
    return message
