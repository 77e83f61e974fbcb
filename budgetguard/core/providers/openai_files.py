"""How many tokens a file comes to at the most, from what is sent of it.

Source: the guide "File inputs" (developers.openai.com/api/docs/guides/file-inputs): of a PDF the text and a picture of
each page are read, of a spreadsheet its rows and a summary that the provider writes, of other documents the text alone.
"""

import re

from budgetguard.core.money import ceil_div
from budgetguard.core.providers.image_size import base64_of_data_url, decoded_head

# What stands around a file: its name and separators.
_FRAME_TOKENS = 32
# Text in an older encoding may take two bytes of UTF-8, or one and a half, for each byte.
_UTF8_BYTES_A_BYTE = 2

# Text as it is. What is packed (PDF, office documents) can be far more than it weighs, and tables are summed up.
_TEXT_NAME = re.compile(
    r".*\.(c|cc|cpp|cs|css|go|h|html?|java|jsx?|json|log|markdown|md|mjs|php|py|rb|rs|rst|sh|sql|tex|toml|tsx?|txt|xml|ya?ml)",
    re.IGNORECASE | re.DOTALL,
)
_TEXT_KINDS = ("data:text/plain;", "data:text/markdown;", "data:text/html;", "data:application/json;")
# A PDF is one wherever its mark stands in the first kibibyte; office documents and archives are ZIP files.
_MARK_CHARS = 2_048
_PACKED = (b"%PDF", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")


def file_tokens_max(file_data: str | None, *, filename: str | None) -> int | None:
    """Bound a file that is sent in base64; ``None`` when its text can be longer than it is, or it was not sent."""
    if file_data is None or _TEXT_NAME.fullmatch(filename or "") is None:
        return None
    encoded = base64_of_data_url(file_data)
    if encoded is None:
        encoded = file_data
    elif not file_data.lower().startswith(_TEXT_KINDS):
        return None
    head = decoded_head(encoded, _MARK_CHARS)
    if not head or any(mark in head for mark in _PACKED):
        return None
    name_bytes = len((filename or "").encode("utf-8", "surrogatepass"))
    return ceil_div(len(encoded) * 3, 4) * _UTF8_BYTES_A_BYTE + name_bytes + _FRAME_TOKENS
