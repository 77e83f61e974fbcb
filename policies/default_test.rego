package budgetguard_test

call := {
	"tenant_id": "acme",
	"key_id": "k3j9x0a1b2c3d4e5",
	"route": "openai.chat",
	"model": "gpt-4o-mini",
	"stream": false,
	"estimate_usd": "0.00123",
	"estimate_nanos": 1230000,
	"output_tokens_bound": 4096,
	"tags": ["eng", "search"],
	"session_id": "",
	"time": "2026-01-31T12:00:00.000+00:00",
}

test_allows_without_a_reason_to_deny if {
	data.budgetguard.decision == {"allow": true, "reason": ""} with input as call
}

test_allows_an_empty_set_of_reasons if {
	data.budgetguard.decision == {"allow": true, "reason": ""} with data.budgetguard.deny as set()
}

test_denies_with_the_reason if {
	expected := {"allow": false, "reason": "no"}
	data.budgetguard.decision == expected with input as call with data.budgetguard.deny as {"no"}
}

test_denies_with_all_reasons_in_order if {
	expected := {"allow": false, "reason": "a; b"}
	data.budgetguard.decision == expected with input as call with data.budgetguard.deny as {"b", "a"}
}
