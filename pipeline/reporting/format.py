"""Durations and counts as people read them.

The same words in the terminal, on the page and in MLflow. Neither function fails: what is unknown
becomes a dash."""


def clock(seconds: float | None) -> str:
    """Return a duration in seconds as `4.2 s`, `39 s`, `3:07`, `2:03:07` or `4 d 02:03`; None, unknown, as `–`."""
    if seconds is None:
        return "–"
    if seconds < 59.5:  # from here on rounding gives a full minute
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, minutes, secs = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def count(number: float) -> str:
    """Return `1 281 167`: groups of three, set apart by narrow no-break spaces (ISO 80000-1)."""
    return f"{number:,.0f}".replace(",", "\u202f")
