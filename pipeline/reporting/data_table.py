"""What was understood of a source, as a table for a terminal: splits, classes, examples, and what was passed over."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.data.dataset.facts import SplitLabels
from pipeline.data.sources.splits import SplitOrigin
from pipeline.reporting.format import count
from pipeline.reporting.terminal import plain_table

ORIGINS: Mapping[SplitOrigin, str] = {
    "folders": "names of folders",
    "names": "names of files",
    "column": "the split column",
    "hash": "a keyed hash (data.test_share)",
}
_CLASSES_SHOWN = 5


def data_table(
    name: str,
    splits: Mapping[str, SplitLabels],
    *,
    unit: str,
    classes: Sequence[str] | None,
    origin: SplitOrigin | None = None,
    label_tables: Mapping[str, int] | None = None,
    image_folders: bool = False,
    passed_over: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> RenderableType:
    """Return the table of one source. `unit`: what is counted; `classes`: None if they are not known yet.

    `label_tables`: tables beside the images -> images that they label. `image_folders`: whether all are in folders `images`."""
    table = plain_table(["split"], numbers=[unit, *(["classes", "unlabelled"] if classes is not None else [])])
    for split, known in splits.items():
        numbers = [count(known.images)]
        if classes is not None:
            numbers += [count(known.classes), count(known.images - known.labelled)]
        table.add_row(Text(split, style="bold"), *map(Text, numbers))
    # lines rather than a column: paths are of any length, and numbers must not be cut for them
    lines = [
        Text(f"{split} such as {', '.join(known.examples[:2])}", style="dim")
        for split, known in splits.items()
        if known.examples
    ]
    lines += [Text(f"splits from {ORIGINS[origin]}", style="dim")] if origin else []
    lines += (
        [Text("every file is in a folder such as images/, which is not taken for a class", style="dim")]
        if image_folders
        else []
    )
    lines += [
        Text(f"labels of {count(images)} images from {path}", style="dim")
        for path, images in (label_tables or {}).items()
    ]
    if classes:
        more = f" and {count(len(classes) - _CLASSES_SHOWN)} more" if len(classes) > _CLASSES_SHOWN else ""
        lines.append(Text(f"classes {', '.join(classes[:_CLASSES_SHOWN])}{more}", style="dim"))
    if passed_over:
        endings = ", ".join(f"{count(number)} {ending}" for ending, number in passed_over.items())
        lines.append(Text(f"passed over {count(sum(passed_over.values()))} other files: {endings}"))
    lines += [Text(f"note: {note}", style="yellow") for note in notes]
    return Group(Text(name, style="bold"), table, *lines)
