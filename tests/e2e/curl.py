"""Does what a curl command line would do, on machines that have no curl."""

import httpx

_TAKE_A_VALUE = {"-H": "header", "-d": "data", "-X": "method"}
_SHOW_MORE_OR_LESS = {"-i", "-s"}


def run_curl(words: list[str]) -> httpx.Response:
    """Run the words of a command; an option that is not known here fails the test."""
    assert words[0] == "curl"
    given: dict[str, list[str]] = {name: [] for name in _TAKE_A_VALUE.values()}
    urls: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if word in _TAKE_A_VALUE:
            given[_TAKE_A_VALUE[word]].append(next(rest))
        elif word not in _SHOW_MORE_OR_LESS:
            assert not word.startswith("-"), f"{word}: this stand-in for curl does not know it"
            urls.append(word)
    (url,) = urls
    body = given["data"][0] if given["data"] else None
    method = given["method"][0] if given["method"] else "GET" if body is None else "POST"
    headers = {"content-type": "application/x-www-form-urlencoded"} if body is not None else {}
    headers |= {name.lower(): value for name, value in (header.split(": ", 1) for header in given["header"])}
    return httpx.request(method, url, headers=headers, content=body, timeout=20)
