"""How many tokens a request's input can come to at the most, from what is sent."""

import json
from dataclasses import dataclass
from typing import Any

from budgetguard.core.providers import fields
from budgetguard.core.providers.openai_audio import audio_tokens_max
from budgetguard.core.providers.openai_files import file_tokens_max
from budgetguard.core.providers.openai_images import (
    billed_beyond_window,
    encoded_image_tokens_max,
    image_tokens_max,
)
from budgetguard.core.providers.openai_usage import text_bytes

# What the chat format itself adds: role and separators of a message, a tool's frame, the answer's opening.
MESSAGE_TOKENS = 8
TOOL_TOKENS = 16
ANSWER_TOKENS = 3

# Members that the model never sees.
_NOT_INPUT = frozenset(
    {
        "model",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
        "service_tier",
        "stream_options",
        "encoding_format",
        "include",
        "truncation",
        "reasoning_effort",
        "verbosity",
        "stop",
    }
)

_IMAGES = frozenset({"image_url", "input_image", "computer_screenshot"})
# Kept at the provider, or packed, or of media that OpenAI's API does not take (other providers' do): a file of chat
# completions is a PDF; a container has files of its own.
_SEEN_ELSEWHERE = frozenset(
    {
        "audio_url",
        "code_interpreter_call",
        "document",
        "file",
        "image",
        "input_video",
        "item_reference",
        "video",
        "video_url",
    }
)
# Members that hold content parts; what else is nested in a message or item is shown as some rendering of its JSON.
_PARTS = frozenset({"content", "output", "summary"})


@dataclass(frozen=True, slots=True)
class InputBound:
    """Input tokens at the most: ``None`` when the model reads what was not sent.

    ``beyond_window`` comes on top and is billed without taking part of the model's context window.
    """

    tokens: int | None
    beyond_window: int


def input_bound(request: dict[str, Any], *, name: str) -> InputBound:
    """Bound the input: a token stands for at least one byte of text.

    ``name`` is the member that the messages, or input items, stand in: an array, a string or nothing.

    Raises:
        InvalidRequestError: a member that is metered is of the wrong type; it is named by its path.
    """
    reader = _Reader(str(request.get("model")))
    tokens = ANSWER_TOKENS
    given = request.get(name)
    if isinstance(given, list):
        for index, message in enumerate(given):
            tokens += MESSAGE_TOKENS + reader.message(message, f"{name}[{index}]")
    else:
        tokens += MESSAGE_TOKENS + text_bytes(given)
    for member, value in request.items():
        if member == name or member in _NOT_INPUT or value is None or isinstance(value, bool | int | float):
            continue
        if isinstance(value, str):
            tokens += text_bytes(value)
        else:  # tools and schemas are shown to the model in some rendering of their JSON
            tokens += len(_compact(value)) + TOOL_TOKENS * (len(value) if isinstance(value, list) else 1)
    return InputBound(None if reader.unseen else tokens, reader.beyond_window)


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def has_audio(value: Any) -> bool:
    """Say whether sound is in a request, at any depth: sent, asked for, or of an earlier answer by its id."""
    if isinstance(value, list):
        return any(has_audio(item) for item in value)
    if not isinstance(value, dict):
        return False
    if value.get("type") == "input_audio" or isinstance(value.get("audio"), dict):
        return True
    return any(has_audio(item) for item in value.values())


class _Reader:
    """Bounds messages and their parts, naming each by its path when it is not what it has to be.

    ``unseen``: something is read that was not sent, so there is no bound but the context window.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._images_beyond_window = billed_beyond_window(model)
        self.unseen = False
        self.beyond_window = 0

    def message(self, value: Any, at: str) -> int:
        """Bound one message or item."""
        if not isinstance(value, dict):
            raise fields.wrong(at, "an object", value)
        if isinstance(value.get("audio"), dict):  # sound of an earlier answer, by its id
            self.unseen = True
        if value.get("type") is None and value.get("role") is None and value.get("id") is not None:
            self.unseen = True  # a reference whose type was left out
        return self._object(value, at)

    def _part(self, value: Any, at: str) -> int:
        """Bound a content part, or what stands where one may. Media count by their own bound, not as their text."""
        if isinstance(value, str):
            return text_bytes(value)
        if isinstance(value, list):
            return sum(1 + self._part(item, f"{at}[{index}]") for index, item in enumerate(value))
        if isinstance(value, dict):
            return self._object(value, at)
        return 0 if value is None or isinstance(value, bool) else len(str(value))

    def _object(self, value: dict[str, Any], at: str) -> int:
        kind = fields.named(value.get("type"), f"{at}.type", str, "a string")
        if kind in _SEEN_ELSEWHERE:
            self.unseen = True
            return 0
        if kind in _IMAGES:
            return self._image(value, at)
        if kind == "input_audio":
            return self._audio(value, at)
        if kind == "input_file":
            return self._file(value, at)
        if kind == "image_generation_call":
            return self._picture(fields.named(value.get("result"), f"{at}.result", str, "a base64 string"))
        tokens = 0
        if kind is None and isinstance(value.get("image"), str):  # a short spelling that is not documented
            tokens += self._count_image(encoded_image_tokens_max(self._model, encoded=None, detail=None))
        for key, item in value.items():
            tokens += text_bytes(key)
            if key == "content":
                _check_content(item, f"{at}.content")
            if isinstance(item, dict | list) and key not in _PARTS:
                tokens += len(_compact(item))
            else:
                tokens += self._part(item, f"{at}.{key}")
        return tokens

    def _image(self, part: dict[str, Any], at: str) -> int:
        url, detail = part.get("image_url"), part.get("detail")
        fields.named(detail, f"{at}.detail", str, "a string")
        if isinstance(url, dict):
            inner = fields.named(url.get("detail"), f"{at}.image_url.detail", str, "a string")
            detail = _dearer_detail(detail, inner) if inner else detail
            url = fields.named(url.get("url"), f"{at}.image_url.url", str, "a string")
        fields.named(url, f"{at}.image_url", str, "a string or an object with a url")
        return self._count_image(image_tokens_max(self._model, url=url, detail=detail))

    def _picture(self, encoded: str | None) -> int:
        """Bound a picture that an earlier answer made: sent again, or kept at the provider."""
        return self._count_image(encoded_image_tokens_max(self._model, encoded=encoded, detail=None))

    def _count_image(self, tokens: int) -> int:
        if not self._images_beyond_window:
            return tokens
        self.beyond_window += tokens
        return 0

    def _audio(self, part: dict[str, Any], at: str) -> int:
        sound = fields.named(part.get("input_audio"), f"{at}.input_audio", dict, "an object") or {}
        data = fields.named(sound.get("data"), f"{at}.input_audio.data", str, "a base64 string")
        if data is None:
            self.unseen = True
            return 0
        return audio_tokens_max(data)

    def _file(self, part: dict[str, Any], at: str) -> int:
        told = {name: fields.named(part.get(name), f"{at}.{name}", str, "a string") for name in _FILE_FIELDS}
        tokens = file_tokens_max(told["file_data"], filename=told["filename"])
        if tokens is None or told["file_id"] or told["file_url"]:
            self.unseen = True
            return 0
        return tokens


def _check_content(value: Any, at: str) -> None:
    if value is not None and not isinstance(value, str | list):
        raise fields.wrong(at, "a string or an array of parts", value)
    for index, item in enumerate(value) if isinstance(value, list) else ():
        if not isinstance(item, dict | str):
            raise fields.wrong(f"{at}[{index}]", "an object or a string", item)


_FILE_FIELDS = ("file_data", "filename", "file_id", "file_url", "detail")


def _dearer_detail(one: str | None, other: str) -> str | None:
    """Choose between two details of one image: a part says it at one place, and which of two counts is not told."""
    return other if one is None or one == other else None


def choices_max(request: dict[str, Any], *, most: int) -> int:
    """Return how many answers are written: ``n``, or ``best_of`` of which only ``n`` are shown."""
    shown = fields.count(request, "n") or 1
    written = fields.count(request, "best_of") or shown
    for name, value in (("n", shown), ("best_of", written)):
        if value > most:
            raise fields.wrong(name, f"at most {most} choices", value)
    if written < shown:
        raise fields.wrong("best_of", f"at least n, which is {shown}", written)
    return written


def prediction_tokens_max(request: dict[str, Any]) -> int:
    """Bound the output that is billed for a predicted answer, whatever is written instead of it.

    Source: "any tokens provided that are not part of the final completion are still charged at completion token rates"
    (developers.openai.com/api/docs/guides/predicted-outputs).
    """
    prediction = fields.named(request.get("prediction"), "prediction", dict, "an object") or {}
    content = prediction.get("content")
    if content is not None and not isinstance(content, str | list):
        raise fields.wrong("prediction.content", "a string or an array of parts", content)
    return text_bytes(content)
