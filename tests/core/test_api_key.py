import pytest

from budgetguard.core.api_key import format_api_key, hash_secret, parse_api_key, secret_matches, tenant_id_from_name


def test_a_key_carries_its_tenant():
    text = format_api_key(tenant_id="acme-1", key_id="0123456789abcdef", secret=bytes(range(32)))
    parsed = parse_api_key(text)
    assert parsed is not None
    assert (parsed.tenant_id, parsed.key_id) == ("acme-1", "0123456789abcdef")
    assert secret_matches(secret=parsed.secret, secret_sha256=hash_secret(parsed.secret))
    assert not secret_matches(secret=parsed.secret[:-1] + "A", secret_sha256=hash_secret(parsed.secret))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk-proj-abc",
        "bg_acme_0123456789abcdef_",
        "bg_acme_0123456789abcdef_" + "a" * 42,
        "bg_acme_0123456789abcdef_" + "a" * 44,
        "bg_acme_0123456789abcdef_" + "a" * 42 + "!",
        "bg_ACME_0123456789abcdef_" + "a" * 43,
        "bg_-acme_0123456789abcdef_" + "a" * 43,
        "bg_" + "a" * 64 + "_0123456789abcdef_" + "a" * 43,
        "bg_acme_0123456789abcdef_" + "a" * 43 + "\n",
        "bg_acme_0123456789ABCDEF_" + "a" * 43,
    ],
)
def test_what_is_not_of_our_form_is_no_key(text):
    assert parse_api_key(text) is None


@pytest.mark.parametrize(
    ("name", "tenant_id"),
    [
        ("acme", "acme"),
        ("Acme Inc.", "acme-inc"),
        ("  Ünï  ", "n"),
        ("a" * 80, "a" * 63),
        ("a" * 62 + "  b", "a" * 62),
        ("日本", None),
        ("", None),
    ],
)
def test_a_tenant_id_is_its_name_as_a_slug(name, tenant_id):
    assert tenant_id_from_name(name) == tenant_id
