"""Draw docs/images/architecture.svg: python docs/images/architecture.py (`make docs` does).

The layers come from the import contract in pyproject.toml. A box that names a missing file is an error, so that the figure
cannot outlive the tree that it shows."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYER_WORDS = {
    "jobs": "the mae commands",
    "runs": "config to graph, checks, summary",
    "stages": "snapshot, shard, pretrain, report",
    "reporting": "page, figures, terminal",
    "planning": "memory, hours, cost",
    "config": "fields of the YAML",
    "evaluation": "protocols, encoders, features",
    "training": "loop, engine, checkpoints, health",
    "weights": "weight files, ours and others'",
    "data": "images, sources, dataset, snapshots, sharding, feed",
    "tracking": "MLflow",
    "graph": "steps, receipts, runner",
    "cluster": "Ray",
    "storage": "file:// and s3://",
    "errors": "what can go wrong",
    "mae_core": "the mathematics",
}
CONFIG = [
    ("YAML", "jobs/configs/", "digits.yaml"),
    ("RunConfig", "pipeline/config/", "reading.py"),
    ("Steps", "pipeline/runs/", "workflow.py"),
    ("runner", "pipeline/graph/", "runner.py"),
    ("stage", "pipeline/stages/", "pretrain.py"),
    ("worker", "pipeline/training/", "loop/loop.py"),
]
WRITTEN = [
    ("source file", "pipeline/data/sources/", "listing.py"),
    ("intake", "pipeline/data/images/", "intake.py"),
    ("shard", "pipeline/data/sharding/", "shard_writer.py"),
    ("manifest", "pipeline/data/dataset/", "manifest.py"),
]
READ = [
    ("order", "pipeline/data/feed/", "order.py"),
    ("cache", "pipeline/data/feed/", "cache.py"),
    ("decode, crop", "pipeline/data/images/", "pictures.py"),
    ("micro-batch", "pipeline/training/", "engine/micro_batches.py"),
    ("loss", "mae_core/", "mae.py"),
]
STORED = "tars and manifest, checkpoints, encoders, cached features, receipts"
STYLE = """
    .page { fill: #ffffff; } .band { fill: #f7f8fa; stroke: #dfe3e8; }
    .box { fill: #e8f1fb; stroke: #3b7dbd; stroke-width: 1.4; }
    .plain { fill: #ffffff; stroke: #8a94a0; stroke-width: 1.2; } .dashed { stroke-dasharray: 5 4; }
    .t { font-size: 14px; font-weight: 600; fill: #1d2733; text-anchor: middle; }
    .s { font-size: 10.5px; fill: #4c5764; text-anchor: middle; }
    .n { font-size: 13px; font-weight: 600; fill: #1d2733; } .w { font-size: 11px; fill: #4c5764; text-anchor: end; }
    .l { font-size: 12px; font-weight: 600; fill: #80622f; }
    .a { stroke: #3b7dbd; stroke-width: 1.6; fill: none; marker-end: url(#h); }
    @media (prefers-color-scheme: dark) {
      .page { fill: #161b22; } .band { fill: #1c232d; stroke: #313a46; } .box { fill: #16304d; stroke: #5a9bd8; }
      .plain { fill: #222b36; stroke: #6b7685; } .t, .n { fill: #e8edf3; } .s, .w { fill: #aeb8c4; }
      .l { fill: #d3b578; } .a { stroke: #5a9bd8; }
    }"""


def text(kind: str, x: float, y: float, words: str) -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def box(x: float, y: float, width: float, lines: tuple[str, ...], kind: str = "box") -> list[str]:
    """A box of 58 with a title and one or two small lines."""
    title, *rest = lines
    first = y + (23 if len(rest) == 2 else 27)
    drawn = [f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="58" rx="6"/>']
    drawn.append(text("t", x + width / 2, first, title))
    return drawn + [text("s", x + width / 2, first + 16 + 12 * number, line) for number, line in enumerate(rest)]


def chain(y: float, widths: list[float], entries: list[tuple[str, str, str]]) -> list[str]:
    """Boxes from left to right over the left column, and the arrows between them."""
    gap = (660 - sum(widths)) / (len(entries) - 1)
    starts = [28 + sum(widths[:number]) + gap * number for number in range(len(entries))]
    drawn: list[str] = []
    for x, width, entry in zip(starts, widths, entries, strict=True):
        if not (ROOT / entry[1] / entry[2]).is_file():
            raise SystemExit(f"{entry[1]}{entry[2]} is gone: name the file that does this now")
        drawn += box(x, y, width, entry)
    return drawn + [arrow(right - gap, y + 29, right, y + 29) for right in starts[1:]]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow."""
    return f'<path class="a" d="M{x1:g} {y1:g}L{x2 - 1:g} {y2:g}"/>'


def band(x: float, y: float, width: float, height: float, title: str) -> list[str]:
    """A titled area."""
    area = f'<rect class="band" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>'
    return [area, text("l", x + 12, y + 20, title)]


def steps() -> list[str]:
    """The graph of a run: what is on the left is an input of what is on the right."""
    drawn = box(28, 186, 90, ("snapshot", "list once")) + box(148, 186, 100, ("shard", "images into tars"))
    drawn += box(278, 186, 130, ("pretrain", "Ray Train + DeepSpeed"))
    drawn += box(448, 152, 134, ("evaluate", "pretrained encoder"))
    drawn += box(448, 220, 134, ("evaluate", "random weights"), "plain dashed")
    drawn += box(612, 186, 76, ("report", "one page"))
    around = '<path class="a" d="M198 244V258Q198 264 204 264H447"/>'
    return [*drawn, around] + [
        arrow(*ends)
        for ends in (
            (118, 215, 148, 215),
            (248, 215, 278, 215),
            (408, 205, 448, 186),
            (582, 186, 612, 205),
            (582, 244, 612, 226),
        )
    ]


def layers() -> list[str]:
    """The import contract, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = next(contract["layers"] for contract in contracts if contract["name"] == "Imports go down only")
    drawn = band(716, 14, 308, 546, "LAYERS: imports go down only")
    for number, name in enumerate(names):
        y = 42 + number * 31
        short = name.removeprefix("pipeline.")
        drawn.append(
            f'<rect class="{"plain" if short == name else "box"}" x="728" y="{y:g}" width="284" height="26" rx="5"/>'
        )
        drawn += [text("n", 738, y + 18, short), text("w", 1003, y + 17, LAYER_WORDS[short])]
    return [*drawn, text("s", 870, 552, "blue: packages of pipeline/")]


def figure() -> str:
    """The whole SVG."""
    drawn = band(16, 14, 684, 104, "A CONFIGURATION becomes steps, and a step becomes workers") + chain(
        42, [94] * 6, CONFIG
    )
    drawn += band(16, 126, 684, 160, "A RUN is a graph of fingerprinted steps; a receipt means done") + steps()
    drawn += band(16, 294, 684, 188, "AN IMAGE is written once, then read in a computed order")
    drawn += chain(320, [142] * 4, WRITTEN) + chain(412, [114, 114, 130, 142, 98], READ)
    drawn.append('<path class="a" d="M617 378V388Q617 394 611 394H91Q85 394 85 400V411"/>')
    drawn += box(16, 494, 420, ("object store: a folder or s3://", STORED), "plain")
    drawn += box(450, 494, 250, ("MLflow: SQLite or a server", "parent = run, child = step"), "plain")
    drawn += layers()
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1040 574" font-family="Helvetica, Arial, sans-serif" role="img" '
        'aria-label="Architecture: from a configuration to workers, the steps of a run, the way of an image, the layers">'
    )
    marker = (
        '<defs><marker id="h" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#3b7dbd"/></marker></defs>'
    )
    page = '<rect class="page" width="1040" height="574" rx="8"/>'
    inside = [f"<style>{STYLE}\n  </style>", marker, page, *drawn]
    return "\n".join([head, *(f"  {line}" for line in inside), "</svg>\n"])


if __name__ == "__main__":
    (Path(__file__).parent / "architecture.svg").write_text(figure())
