"""What `mae shards` shows of a dataset: a contact sheet with histograms as one PNG, and tables for the terminal.

As in all figures here, the background is transparent and text is mid-grey, for light pages and dark
ones. A frame marks what is not served: orange for a duplicate, red for an image that cannot be read.
Shapes: images [H, W, 3] uint8 of any size. Units: pixels, bytes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.data.dataset.dataset_writer import repaired_images
from pipeline.data.dataset.facts import ContradictionFacts, CopyFacts, DatasetFacts, LabelledImage, NearDuplicateFacts
from pipeline.data.dataset.integrity import Finding, Verification
from pipeline.data.dataset.survey import ShownImage, Survey
from pipeline.reporting.figures import BLUE, DOTS_PER_INCH, FAINT, GREEN, PURPLE, STYLE, as_png
from pipeline.reporting.format import count
from pipeline.reporting.reconstructions import INK, half_blocks, plain_font
from pipeline.reporting.terminal import plain_table

ORANGE, RED = "#d55e00", "#c8102e"
_TILE = 168
_GAP = 14
_WORDS = 40
"""Height in pixels of the two lines of text below a tile."""
_COLUMNS = 8
_LABELS = 30
_REASONS = 12
_IN_TERMINAL = 4
_SHOWN_FINDINGS = 40
_FILE_NAME = 20


def survey_png(survey: Survey) -> bytes:
    """Return the contact sheet with the histograms below it, as PNG bytes."""
    sheet = contact_sheet(survey.shown)
    charts = Image.open(io.BytesIO(histograms_png(survey, width=sheet.width)))
    whole = Image.new("RGBA", (max(sheet.width, charts.width), sheet.height + _GAP + charts.height))
    whole.paste(sheet, (0, 0))
    whole.paste(charts, (0, sheet.height + _GAP))
    out = io.BytesIO()
    whole.save(out, format="PNG", optimize=True)
    return out.getvalue()


def contact_sheet(shown: Sequence[ShownImage]) -> Image.Image:
    """Return rows of eight tiles with label, size and mark.

    Small images are enlarged by a whole factor with hard edges."""
    rows = max(1, -(-len(shown) // _COLUMNS))
    size = (_COLUMNS * (_TILE + _GAP) - _GAP, rows * (_TILE + _WORDS + _GAP) - _GAP)
    sheet = Image.new("RGBA", size)
    draw = ImageDraw.Draw(sheet)
    bold, plain = plain_font("DejaVuSans-Bold", 13), plain_font("DejaVuSans", 12)
    for number, one in enumerate(shown):
        left = number % _COLUMNS * (_TILE + _GAP)
        top = number // _COLUMNS * (_TILE + _WORDS + _GAP)
        mark, colour = mark_of(one)
        if one.image is not None:
            tile = fitted(one.image, _TILE)
            sheet.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))
        if mark:
            draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline=colour, width=4)
            draw.text((left + 8, top + 6), mark, font=bold, fill=colour, stroke_width=3, stroke_fill="white")
        label = one.label or "no label"
        draw.text((left, top + _TILE + 4), _cut(label, bold), font=bold, fill=INK)
        words = f"{one.width} × {one.height}, {bytes_text(one.bytes)}"
        draw.text((left, top + _TILE + 21), _cut(words, plain), font=plain, fill=INK)
    return sheet


def mark_of(shown: ShownImage) -> tuple[str, str]:
    """Return the word and the colour that mark a tile, or two empty strings for an image that training reads."""
    if shown.image is None:
        return "unreadable", RED
    return ("", "") if shown.served else ("duplicate", ORANGE)


def fitted(image: NDArray[np.uint8], side: int) -> Image.Image:
    """Return the whole image, scaled into a square of `side` pixels."""
    picture = Image.fromarray(image)
    longest = max(picture.size)
    if longest <= side:
        factor = side // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture


def histograms_png(survey: Survey, *, width: int) -> bytes:
    """Return histograms of sizes, labels and reasons for quarantine as PNG bytes, `width` pixels wide."""
    labels = _top(survey.label_counts, _LABELS)
    reasons = _top({refusals.reason: refusals.count for refusals in survey.refusals}, _REASONS)
    tall = max(len(labels), len(reasons), 4)
    with rc_context(STYLE | {"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(width / DOTS_PER_INCH, 3.1 + 0.17 * tall), layout="constrained")
        upper, lower = list(figure.subfigures(2, 1, height_ratios=[2.3, 0.8 + 0.17 * tall], squeeze=False)[:, 0])
        panels: Sequence[Axes] = upper.subplots(1, 4)
        aspects = survey.widths / np.maximum(1, survey.heights)
        _histogram(panels[0], survey.widths, "Width, pixels", BLUE)
        _histogram(panels[1], survey.heights, "Height, pixels", BLUE)
        _histogram(panels[2], aspects, "Width / height", GREEN)
        _histogram(panels[3], survey.lengths, "Bytes", PURPLE)
        panels[3].xaxis.set_major_formatter(EngFormatter(sep=""))
        below: Sequence[Axes] = lower.subplots(1, 2)
        named = {name or "no label": number for name, number in labels.items()}
        title = (
            f"Labels, {len(named)} of {len(survey.label_counts)}" if len(survey.label_counts) > _LABELS else "Labels"
        )
        _bars(below[0], named, title, BLUE, places=tall)
        _bars(below[1], reasons, "Quarantine, by reason" if reasons else "Nothing in quarantine", ORANGE, places=tall)
        return as_png(figure)


def survey_table(survey: Survey) -> RenderableType:
    """Return splits, refused images and near duplicates. Print it with soft_wrap=True."""
    numbers = ["listed", "served", "duplicates", "quarantined", "classes", "shards", "in shards"]
    table = plain_table(["split"], numbers=numbers)
    for one in survey.splits:
        counts = one.counts
        figures = (counts.listed, counts.served, counts.duplicates, counts.quarantined, one.classes, one.shards)
        table.add_row(Text(one.split, style="bold"), *map(count, figures), bytes_text(one.shard_bytes))
    parts: list[RenderableType] = [table, ""]
    kept = survey.policies.get("kept", 0) + survey.policies.get("indexed", 0)
    if len(survey.lengths):
        parts.append(
            Text(
                f"{count(kept)} of {count(len(survey.lengths))} images kept their bytes; sides {_range(survey.widths)} x "
                f"{_range(survey.heights)} pixels, median size {bytes_text(float(np.median(survey.lengths)))}"
            )
        )
    if repaired := repaired_images(survey.policies):
        parts.append(Text(f"{count(repaired)} of them had a harmless fault and were repaired"))
    for refusals in survey.refusals:
        parts.append(Text.assemble(("\nquarantine  ", "dim"), (refusals.reason, "bold"), f"  {count(refusals.count)}"))
        parts += [_line(f"  {source}  ", detail) for source, detail in refusals.examples]
    return Group(
        *parts,
        *_contradiction_lines(survey.contradictions),
        *_copy_lines(survey.copies),
        *_near_lines(survey.near_duplicates),
    )


def others_table(facts: DatasetFacts) -> RenderableType | None:
    """Return the files of tars that belong to no sample, by reason, or None if there are none. Print it with soft_wrap=True."""
    parts: list[RenderableType] = []
    for reason, number in (facts.other_reasons or {}).items():
        parts.append(Text.assemble(("\nno sample  ", "dim"), (reason, "bold"), f"  {count(number)}"))
        parts += [_line("  ", source) for source in (facts.other_examples or {}).get(reason, ())]
    return Group(*parts) if parts else None


def _contradiction_lines(facts: ContradictionFacts) -> list[RenderableType]:
    if not facts.images:
        return []
    said = (
        f"  {count(facts.images)} images have {count(facts.copies)} copies with different labels; each label keeps one"
    )
    return [Text.assemble(("\ncontradicting labels", "dim"), said), *map(_labelled_pair, facts.examples)]


def _copy_lines(facts: CopyFacts) -> list[RenderableType]:
    if not facts.across:
        return []
    said = f"  {count(facts.across)} images are in several splits, byte for byte"
    if facts.conflicting:
        said += f", {count(facts.conflicting)} of them with different labels"
    return [Text.assemble(("\ncopies across splits", "dim"), said), *map(_labelled_pair, facts.examples)]


def _labelled_pair(pair: tuple[LabelledImage, LabelledImage]) -> Text:
    one, other = (f"{image.source} ({image.label or 'no label'})" for image in pair)
    return _line(f"  {one}  ", f"and {other}")


def unreadable_line(survey: Survey) -> str:
    """Return how many of the images chosen for the sheet cannot be read, or an empty string if all can."""
    unreadable = [one for one in survey.shown if one.image is None]
    if not unreadable:
        return ""
    first = unreadable[0]
    return (
        f"{len(unreadable)} of {len(survey.shown)} images cannot be read; `mae shards verify` says why. First: "
        f"{first.source}: {first.trouble}"
    )


def near_line(facts: NearDuplicateFacts) -> str:
    """Return the near duplicates across splits in one sentence."""
    left_out = f"; {count(facts.flat)} images of nearly one colour are left out" if facts.flat else ""
    many = f"{count(facts.held_out)} of {count(facts.compared)} images of val and test"
    if facts.aligned is None:
        return f"{many} look like one of train (perceptual hashes within {facts.distance} of 64 bits){left_out}"
    details = [
        f"{count(number)} {what}"
        for number, what in ((facts.same_pixels, "pixel for pixel"), (facts.conflicting, "with another label"))
        if number
    ]
    unread = f"; {count(facts.unread)} images could not be read" if facts.unread else ""
    listed = f" ({', '.join(details)})" if details else ""
    return f"{many} seem to be copies of one of train{listed}{left_out}{unread}"


def terminal_sheet(shown: Sequence[ShownImage], *, columns: int = 18) -> Table:
    """Return a few images in half blocks, for terminals with colours."""
    some = [one for one in shown if one.image is not None][:_IN_TERMINAL]
    grid = Table.grid(padding=(0, 2))
    for _ in some:
        grid.add_column(justify="center", width=columns)
    grid.add_row(
        *(half_blocks(np.asarray(fitted(one.image, 64)), columns=columns) for one in some if one.image is not None)
    )
    grid.add_row(*(Text(one.label or "no label", style="dim", overflow="ellipsis", no_wrap=True) for one in some))
    return grid


def verification_table(verification: Verification) -> RenderableType:
    """Return what was read, and every finding with its repair. Print it with soft_wrap=True."""
    read = (
        f"{verification.step}  {count(verification.shards)} shards, {count(verification.samples)} images, "
        f"{bytes_text(verification.bytes)} read: "
    )
    if verification.clean:
        return Text.assemble(read, ("all as written", "green"))
    shards = {finding.shard for finding in verification.findings if finding.shard is not None}
    wrong = _several(len(verification.findings), "damage") + (f" in {_several(len(shards), 'shard')}" if shards else "")
    parts: list[RenderableType] = [Text.assemble(read, (wrong, "red")), ""]
    shown = verification.findings[:_SHOWN_FINDINGS]
    table = plain_table(["shard", "damage", "sample", "source"], numbers=[], rest=["file"])
    for finding in shown:
        shard = "–" if finding.shard is None else str(finding.shard)
        name = finding.where.rpartition("/")[2]
        short = name if len(name) <= _FILE_NAME else f"{name[: _FILE_NAME - 5]}….tar"
        table.add_row(
            shard, Text(finding.damage, style="red"), finding.sample or "–", Text(finding.source or "–"), short
        )
    parts += [table, ""]
    parts += [_line(f"{_name(finding)}  ", finding.what) for finding in shown]
    if len(verification.findings) > len(shown):
        parts.append(Text(f"and {count(len(verification.findings) - len(shown))} more: --json lists all", style="dim"))
    repairs: dict[str, list[str]] = {}
    for finding in verification.findings:
        addresses = repairs.setdefault(finding.repair, [])
        addresses += [address for address in finding.delete if address not in addresses]
    for repair, addresses in repairs.items():
        parts.append(_line("\nrepair  ", repair))
        parts += [_line("  ", address) for address in addresses[:_SHOWN_FINDINGS]]
    return Group(*parts)


def bytes_text(size: float) -> str:
    """Return a size in powers of 1000: `812 B`, `34.1 KB`, `128 MB`."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        # 999.5 and not 1000: it would be shown as 1000
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("TB has no upper limit")


def _several(number: int, what: str) -> str:
    return f"{count(number)} {what}{'s' if number != 1 else ''}"


def _name(finding: Finding) -> str:
    if finding.shard is None:
        return finding.where.rpartition("/")[2]
    return f"shard {finding.shard}" + (f" sample {finding.sample}" if finding.sample else "")


def _near_lines(facts: NearDuplicateFacts) -> list[RenderableType]:
    if not facts.compared and not facts.flat:
        return []
    lines: list[RenderableType] = [_line("\nnear duplicates  ", near_line(facts))]
    for pair in facts.examples:
        labels = f" ({pair.held_out_label}, {pair.train_label})" if pair.held_out_label != pair.train_label else ""
        lines.append(_line("  ", f"{pair.held_out} and {pair.train}{labels}"))
    if facts.held_out:
        lines.append(
            _line(
                "  ", "Take them out of one split, or say in results that training saw them: --leaks FILE.csv lists all"
            )
        )
    return lines


def _line(name: str, text: str) -> Text:
    line = Text.assemble((name, "dim"), text)
    line.no_wrap, line.overflow = True, "ignore"
    return line


def _histogram(axes: Axes, values: NDArray[np.generic], title: str, colour: str) -> None:
    axes.set_title(title)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if low == high:  # hist() would fill the panel with one bar, as if all sizes occurred
        axes.bar([low], [len(values)], width=max(abs(low), 1) * 0.05, color=colour)
        axes.set_xlim(low - max(abs(low), 1) * 0.5, low + max(abs(low), 1) * 0.5)
    else:
        axes.hist(values, bins=min(40, max(8, len(np.unique(values)))), color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _bars(axes: Axes, counts: Mapping[str, int], title: str, colour: str, *, places: int) -> None:
    """Draw horizontal bars from the top; `places` of them would fill the panel."""
    axes.set_title(title)
    axes.grid(visible=False, axis="y")
    if not counts:
        axes.set_axis_off()
        return
    rows = range(len(counts))
    axes.barh(rows, list(counts.values()), color=colour, height=0.72)
    axes.set_yticks(rows, [name if len(name) <= 28 else f"{name[:27]}…" for name in counts])
    # upside down, so that the first bar is on top
    axes.set_ylim(places - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines["left"].set_color(FAINT)


def _top(counts: Mapping[str, int], most: int) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: -entry[1])[:most])


def _range(values: NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _cut(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Return as much of a text as fits below a tile."""
    if font.getlength(text) <= _TILE:
        return text
    while text and font.getlength(f"{text}…") > _TILE:
        text = text[:-1]
    return f"{text}…"
