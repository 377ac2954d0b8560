"""The page of a comparison: one HTML file with everything in it, interactive without a network.

Vega, Vega-Lite and vega-embed come once for the whole page, from vl-convert. Names and paths are escaped."""

import base64
import datetime
import io
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.reporting.comparison.charts import AXES, charts
from pipeline.reporting.comparison.tables import TEST_NOTE, UNKNOWN, amount, p_text
from pipeline.reporting.comparison.values import Comparison, Panel, score_columns
from pipeline.reporting.format import count
from pipeline.tracking import redact_text

IMAGES_SHOWN = 4
"""Images of the reconstructions."""
_VISIBLE, _AFTER = 1, 3
"""Columns of reconstructions.npz, after the original."""
_TILE = 112
"""Pixels of a picture's side on the page."""


def render_page(comparison: Comparison) -> str:
    """Return the page as HTML."""
    import vl_convert

    loader = jinja2.PackageLoader("pipeline.reporting", package_path="")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "hidden": redact_text, "amount": amount, "p": p_text}
    return environment.get_template("comparison/comparison.html").render(
        comparison=comparison,
        names=[row.name for row in comparison.rows],
        columns=score_columns(comparison.rows),
        specs=charts(comparison),
        axes=[axis if axis != "hours" else comparison.hours_unit for axis in AXES],
        axis_values=AXES,
        test_note=TEST_NOTE.format(tests=len(comparison.tests)),
        methods=list(dict.fromkeys(one.test for one in comparison.tests)),
        reconstructions=reconstructions(comparison.panels),
        unknown=UNKNOWN,
        tile=_TILE,
        runtime=vl_convert.javascript_bundle(),  # type: ignore[call-arg]  # its stub lacks the default
        created=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def reconstructions(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return, per image that all runs show, its original and each run's picture of it; empty without such an image.

    Runs of earlier versions kept no ids: their images are matched by their place, as far as the originals are equal."""
    if not panels:
        return []
    first = panels[0]
    shown: list[dict[str, Any]] = []
    for index in range(len(first.pictures)):
        places = [_place(panel, first, index) for panel in panels]
        if None not in places and len(shown) < IMAGES_SHOWN:
            runs = {
                panel.run: [_tile(panel.pictures[place, column]) for column in (_VISIBLE, _AFTER)]
                for panel, place in zip(panels, places, strict=True)
                if place is not None
            }
            shown.append(
                {
                    "original": _tile(first.pictures[index, 0]),
                    "id": first.ids[index] if first.ids else None,
                    "runs": runs,
                }
            )
    return shown


def _place(panel: Panel, first: Panel, index: int) -> int | None:
    """Return where a panel has the image that the first one has at `index`."""
    if panel.ids and first.ids:
        same = panel.digest == first.digest and first.ids[index] in panel.ids
        return panel.ids.index(first.ids[index]) if same else None
    there = index < len(panel.pictures) and np.array_equal(panel.pictures[index, 0], first.pictures[index, 0])
    return index if there else None


def _tile(image: NDArray[np.uint8]) -> str:
    """Return a picture as a data URI: small ones without loss, since their pixels can be counted."""
    kind, out = "png" if image.shape[0] <= _TILE else "jpeg", io.BytesIO()
    Image.fromarray(image).save(out, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
