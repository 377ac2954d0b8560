"""Where results come from, as a tree at the terminal and as JSON.

A node is a score, an encoder, a checkpoint, a dataset (its manifest), its shards, a listing, a source, or a file in question."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.text import Text
from rich.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Node:
    """A thing that was made, or that something was made from. What is empty or None is not known, or does not apply."""

    id: str
    kind: str
    """`score`, `encoder`, `checkpoint`, `weights`, `dataset`, `shards`, `listing`, `source`, `report`, `file`."""
    name: str
    text: str = ""
    """What it holds: `62.5 % of 400 images`."""
    fingerprint: str = ""
    digest: str = ""
    """Of the content: SHA-256 of the file, or the dataset's digest."""
    uri: str = ""
    time: float | None = None
    """When it was made, in seconds since 1970."""
    generation: int | None = None
    sources: tuple[str, ...] = ()
    """Ids of what it was made from."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A graph of nodes, seen from some of them."""

    title: str
    nodes: Mapping[str, Node]
    roots: Sequence[str]
    """Ids at the top of the tree."""
    below: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Id -> ids of what is shown below it: its sources or, backwards, what was made from it."""
    notes: Sequence[str] = ()


def lineage_tree(lineage: Lineage) -> Tree:
    """Return the tree. What is below several nodes is shown in full below the first."""
    tree, seen = Tree(Text(lineage.title, style="bold"), guide_style="dim"), set[str]()

    def add(branch: Tree, ids: Iterable[str]) -> None:
        for id_ in ids:
            node = lineage.nodes[id_]
            again, more = id_ in seen, lineage.below.get(id_, ())
            seen.add(id_)
            below = branch.add(_label(node, again=again and bool(more)))
            if not again:
                add(below, more)

    add(tree, lineage.roots)
    for note in lineage.notes:
        tree.add(Text(note, style="dim"))
    return tree


def _label(node: Node, *, again: bool) -> Text:
    label = Text.assemble((f"{node.kind} ", "cyan"), (node.name, "bold"), f"  {node.text}" if node.text else "")
    if again:
        return label.append("  (as above)", style="dim")
    about = [
        f"fingerprint {node.fingerprint[:12]}" if node.fingerprint else "",
        f"digest {node.digest[:12]}" if node.digest else "",
        f"g{node.generation:04d}" if node.generation is not None else "",
        datetime.fromtimestamp(node.time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if node.time else "",
    ]
    label.append("".join(f"  {one}" for one in about if one), style="dim")
    return label.append(f"\n{node.uri}", style="dim") if node.uri else label


def lineage_json(lineage: Lineage) -> dict[str, Any]:
    """Return the graph: `{"title", "roots", "nodes": {id: {..., "sources", "below"}}, "notes"}`."""
    nodes = {id_: asdict(node) | {"below": list(lineage.below.get(id_, ()))} for id_, node in lineage.nodes.items()}
    return {"title": lineage.title, "roots": list(lineage.roots), "nodes": nodes, "notes": list(lineage.notes)}
