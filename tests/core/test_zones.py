"""Zones are those of the locked package, whatever the host has."""

import zoneinfo
from datetime import UTC, datetime
from importlib.resources import files

import pytest

from budgetguard.core.snapshot import WindowKind
from budgetguard.core.window import bounds
from budgetguard.core.zones import zone_names, zone_of
from tests.plugins.redis_calls import a_budget


def test_every_zone_can_be_read():
    moment = datetime(2026, 7, 1, tzinfo=UTC)
    assert len(zone_names()) > 500
    for name in zone_names():
        assert zone_of(name).key == name
        assert moment.astimezone(zone_of(name)).utcoffset() is not None


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "localtime", "posixrules", "Factory", "posix/Europe/Berlin", "right/UTC", "europe/berlin"),
        *("../zones", "/etc/localtime", "Europe", "Europe/Berlin\x00", "Mars/Olympus", "zone.tab"),
    ],
)
def test_what_is_no_zone_of_the_list_is_none(name):
    with pytest.raises(zoneinfo.ZoneInfoNotFoundError):
        zone_of(name)


@pytest.fixture
def host_whose_berlin_is_tokyo(tmp_path):
    (tmp_path / "Europe").mkdir()
    tokyo = files("tzdata").joinpath("zoneinfo", "Asia", "Tokyo").read_bytes()
    (tmp_path / "Europe" / "Berlin").write_bytes(tokyo)
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath([str(tmp_path)])
    zoneinfo.ZoneInfo.clear_cache()
    zone_of.cache_clear()
    yield
    zoneinfo.reset_tzpath(before)
    zoneinfo.ZoneInfo.clear_cache()
    zone_of.cache_clear()


@pytest.mark.usefixtures("host_whose_berlin_is_tokyo")
def test_a_host_s_own_files_move_no_window():
    noon_ms = int(datetime(2026, 7, 1, 12, tzinfo=UTC).timestamp()) * 1000
    assert datetime.fromtimestamp(noon_ms / 1000, zoneinfo.ZoneInfo("Europe/Berlin")).hour == 21
    window = bounds(a_budget(window=WindowKind.DAY, zone="Europe/Berlin"), noon_ms)
    assert window.starts_at_ms == noon_ms - 14 * 3_600_000
