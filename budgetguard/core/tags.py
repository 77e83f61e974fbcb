"""A tenant's tags: a tree in which spend rolls up. How ids are spelled, how large it may be, who is above whom."""

import re
from collections.abc import Iterable

from budgetguard.core.snapshot import TagSpec

# Tags are sent as a list with commas, and paths are spelled with slashes: an id has neither.
TAG_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,62}", re.ASCII)
TAG_ID_EXPECTED = "1 to 63 letters, digits or any of . _ : -, the first a letter or a digit"

# Each tag of a call costs a counter for each budget on it, and travels with the call: a tree is no file system.
TAG_DEPTH_MAX = 16
# They travel to the data plane in one record, which is loaded again after each change: about 700 KB.
TAGS_PER_TENANT_MAX = 10_000

PATH_SEPARATOR = "/"


class TagTree:
    """The tags of one tenant record, by id."""

    def __init__(self, tags: Iterable[TagSpec]) -> None:
        self._tags = {tag.tag_id: tag for tag in tags}
        # Found once a tag, then remembered: a record lives for many calls.
        self._lines: dict[str, tuple[str, ...]] = {}

    def __contains__(self, tag_id: str) -> bool:
        """Whether there is such a tag, active or not."""
        return tag_id in self._tags

    def line(self, tag_id: str) -> tuple[str, ...]:
        """Return a tag's id and those of all its ancestors, the root last."""
        line = self._lines.get(tag_id)
        if line is None:
            parent_id = self._tags[tag_id].parent_id
            line = (tag_id, *(self.line(parent_id) if parent_id else ()))
            self._lines[tag_id] = line
        return line

    def inactive(self, tag_id: str) -> str | None:
        """Return the nearest tag that closes this one: itself or an ancestor; ``None`` when it is open."""
        return next((id_ for id_ in self.line(tag_id) if not self._tags[id_].active), None)


def path_of(tag_id: str, *, parent_path: str) -> str:
    """Spell where a tag is: ``company/eng/search``. ``parent_path`` is empty for a root."""
    return f"{parent_path}{PATH_SEPARATOR}{tag_id}" if parent_path else tag_id


def depth_of(path: str) -> int:
    """Return how many tags a path names: 1 for a root."""
    return path.count(PATH_SEPARATOR) + 1


def is_at_or_below(path: str, ancestor_path: str) -> bool:
    """Whether a path is the other one or leads through it."""
    return path == ancestor_path or path.startswith(ancestor_path + PATH_SEPARATOR)


def moved_path(path: str, *, old_root: str, new_root: str) -> str:
    """Return the new path of a tag at or below ``old_root``, which becomes ``new_root``."""
    return new_root + path[len(old_root) :]
