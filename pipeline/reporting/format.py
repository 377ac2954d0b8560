"""format: split from pipeline.reporting.summaries."""


def clock(seconds: float | None) -> str:
    """`4.2 s`, `39 s`, `3:07`, `2:03:07`, `4 d 02:03`; `–` when unknown."""
    if seconds is None:
        return "–"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, minutes, secs = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def count(number: float) -> str:
    """`1 281 167`: thousands apart, narrow no-break spaces."""
    return f"{number:,.0f}".replace(",", "\u202f")
