"""Numbers and times as people read them on a page."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any


def figure(value: float) -> str:
    """A measured number with the digits that one compares by.

    >>> [figure(value) for value in (4.4108, 12.62, 522.62, 18601.9, 0.0004)]
    ['4.41', '12.6', '523', '18,602', '0.0004']
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    size = abs(value)
    if size < 0.1:
        return f"{value:.3g}"
    return f"{value:,.{2 if size < 10 else 1 if size < 100 else 0}f}"


def counted(value: float) -> str:
    """A count in its largest unit.

    >>> [counted(value) for value in (384, 35584, 4884480, 139399488, 8.03e9)]
    ['384', '35.6 K', '4.88 M', '139 M', '8.03 B']
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def bytes_of(value: float) -> str:
    """A size of files or of memory.

    >>> [bytes_of(value) for value in (512, 19.6e6, 3 * 2**30)]
    ['512 B', '19.6 MB', '3.22 GB']
    """
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """A time in the two largest units that it has.

    >>> [duration(value) for value in (0.96, 42.3, 262, 3780)]
    ['0.96 s', '42 s', '4 min 22 s', '1 h 03 min']
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def day(seconds: float) -> str:
    """A moment, given in seconds since 1970.

    >>> day(0)
    '1970-01-01 00:00 UTC'
    """
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def setting(value: Any) -> str:
    """A setting as it would be typed.

    >>> [setting(value) for value in (None, True, 1e-3, ["q_proj", "v_proj"], "all-linear")]
    ['null', 'true', '0.001', 'q_proj, v_proj', 'all-linear']
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(item)}" for key, item in value.items())
    return str(value)
