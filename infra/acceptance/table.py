"""The table that ends gpu.sh: correctness, then for every model the step alone, the loop and the usual recipe side by side.

    python -m infra.acceptance.table < LINES      # the JSON lines of the parts

Exit code 1 if a check or a part failed."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks._timing import shown, table

Line = Mapping[str, Any]


def report(lines: Sequence[Line]) -> str:
    """Return the tables of all lines. What was not measured is a dash."""
    return "\n\n".join(part for part in (_correctness(lines), _speed(lines), _loader(lines), _failures(lines)) if part)


def succeeded(lines: Sequence[Line]) -> bool:
    """Return whether every part ran to its end and every check passed."""
    return bool(lines) and all(line.get("ok", "failed" not in line) for line in lines)


def _of(lines: Sequence[Line], benchmark: str) -> list[Line]:
    return [line for line in lines if line["benchmark"] == benchmark and "failed" not in line]


def _correctness(lines: Sequence[Line]) -> str:
    rows = [
        (
            line["check"],
            *(f"{line[key]:.1e}" for key in ("loss_off", "loss_bound", "norm_off", "norm_bound")),
            "yes" if line["ok"] else "NO",
        )
        for line in _of(lines, "correctness")
    ]
    return table(("check", "losses off by", "accepted", "norms off by", "accepted", "passed"), rows) if rows else ""


def _speed(lines: Sequence[Line]) -> str:
    by_benchmark = {
        name: {line["model"]: line for line in _of(lines, name)} for name in ("train_step", "loop", "usual")
    }
    models = list(dict.fromkeys(model for found in by_benchmark.values() for model in found))
    header = "model|step images/s|of the peak|loop images/s|of the peak|loop / step|usual images/s|loop / usual|GiB held|foreseen"
    return table(header.split("|"), [(model, *_speed_row(by_benchmark, model)) for model in models]) if models else ""


def _speed_row(by_benchmark: Mapping[str, Mapping[str, Line]], model: str) -> Iterator[str]:
    step, loop, usual = (by_benchmark[name].get(model, {}) for name in ("train_step", "loop", "usual"))
    for line in (step, loop):
        yield shown(line.get("images_per_s"), ".1f")
        yield f"{100 * line['mfu']:.1f} %" if line else shown(None)
    yield shown(_ratio(loop, step))
    yield shown(usual.get("images_per_s"), ".1f")
    yield shown(_ratio(loop, usual))
    yield shown(loop.get("held_gib"))
    yield shown(loop.get("foreseen_gib"))


def _ratio(ours: Line, theirs: Line) -> float | None:
    return ours["images_per_s"] / theirs["images_per_s"] if ours and theirs else None


def _loader(lines: Sequence[Line]) -> str:
    return "\n".join(
        f"loader alone, {line['workers']} workers: {line['processes_images_per_s']:.0f} images/s from processes, "
        f"{line['images_per_s_per_core'] * line['workers']:.0f} from threads"
        for line in _of(lines, "loader")
    )


def _failures(lines: Sequence[Line]) -> str:
    return "\n".join(
        f"{line['command']} failed ({line['failed']}); its messages are on standard error"
        for line in lines
        if "failed" in line
    )


def main() -> None:
    """Print the table of the lines on standard input."""
    lines = [json.loads(line) for line in sys.stdin if line.strip()]
    print(report(lines))
    raise SystemExit(not succeeded(lines))


if __name__ == "__main__":
    main()
