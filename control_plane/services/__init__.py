"""The services of proto/budgetguard/v1: each decodes, asks, publishes and encodes."""

# There is one admin key, so the audit cannot tell administrators apart.
ACTOR = "admin-key"
