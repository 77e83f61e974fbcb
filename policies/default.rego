# Every call is put to this package, as data.budgetguard.decision, between the rate limits and the hold.
#
# To refuse calls, add reasons to the set data.budgetguard.deny, here or in a file of your own beside this one:
#
#   package budgetguard
#
#   deny contains "gpt-4 is for production keys" if {
#     startswith(input.priced_model, "gpt-4")
#     not "prod" in input.tags
#   }
#
# input, an example:
#
#   {
#     "tenant_id": "acme",
#     "key_id": "k3j9x0a1b2c3d4e5",
#     "route": "openai.chat",
#     "model": "gpt-4o-mini-2024-07-18", # as it was sent
#     "priced_model": "gpt-4o-mini", # whose price it is charged by: one for all spellings of a model
#     "stream": false,
#     "estimate_usd": "0.00123",
#     "estimate_nanos": 1230000,
#     "output_tokens_bound": 4096,
#     "tags": ["company", "eng", "prod", "search"], # those sent or fixed on the key, and all above them
#     "session_id": "",
#     "time": "2026-01-31T12:00:00.000+00:00"
#   }
package budgetguard

default decision := {"allow": true, "reason": ""}

decision := {"allow": false, "reason": reasons} if {
	count(data.budgetguard.deny) > 0
	reasons := concat("; ", sort(data.budgetguard.deny))
}
