"""The page is one file: it loads nothing from outside, escapes everything, and holds all the numbers."""

import re

import numpy as np

from pipeline.reporting.page import Card, DatasetCard, ReportData, render_page
from pipeline.reporting.reconstructions import reconstruction_grid_png
from pipeline.reporting.summaries import Score, StepRow

PNG = reconstruction_grid_png(np.zeros((1, 4, 8, 8, 3), np.uint8))
HOSTILE = '"><script>alert(1)</script><img src=http://evil/x.png>'


def report() -> ReportData:
    return ReportData(
        title="digits-vit-tiny",
        summary="A summary in one line.",
        created="24 November 2026",
        scores=[
            Score(
                protocol="linear", dataset="digits", encoder="pretrained", values=(0.97, 0.98), images=36, labels=1437
            ),
            Score(protocol="linear", dataset="digits", encoder="random", values=(0.84,)),
            Score(protocol="knn", dataset=HOSTILE, encoder="random", values=(0.1,)),
        ],
        cards=[Card(label="pretraining", value="2:03:41", note="3 generations")],
        reconstructions_png=PNG,
        reconstructions_note="5 held-out images",
        curves_png=PNG,
        scores_png=PNG,
        datasets=[
            DatasetCard(
                name="digits",
                source="s3://AK:SECRETPW@bucket/digits/",
                listed=12345,
                stored=12340,
                served=12300,
                duplicates=40,
                quarantined=5,
                splits=("test: 36 images, 36 labelled, 10 classes; train has none of zebra",),
                reasons=((f"train/{HOSTILE}/1.png", "truncated"),),
                digest="9f2c" * 16,
            )
        ],
        steps=[
            StepRow(name="pretrain", state="done", fingerprint="1c22a0b3d4e5" + "0" * 52, seconds=7421, generation=3)
        ],
        config={"model": {"mask_ratio": 0.75}, "aws": {"secret_access_key": "TOPSECRET"}},
        versions={"torch": "2.15.0"},
        hardware={"workers": "2, ZeRO-1"},
        command="mae run jobs/configs/digits.yaml",
        addresses={"tracking": "http://me:SECRETPW@host:5000"},
    )


def test_the_page_needs_nothing_from_outside():
    page = render_page(report())
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?\s*(?!data:image/png;base64,)[^"'>\s]+""", page_tags(page))
    assert not re.search(r"@import|url\(|<script|<link|<iframe", page)
    assert page.count("data:image/png;base64,") == 3


def page_tags(page: str) -> str:
    return " ".join(re.findall(r"<[a-z][^>]*>", page))


def test_a_hostile_class_name_is_only_text():
    page = render_page(report())
    assert "<script" not in page
    assert "<img src=http" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_every_number_is_there():
    page = render_page(report()).replace("\u202f", " ")
    for text in ["36 test images", "1 437", "only 36 test images: one of them more or less", "train has none of zebra"]:
        assert text in page
    for text in ["97.5 ± 0.7 %", "84.0 %", "+13.5", "97.0 · 98.0", "12 345", "12 340", "12 300", "40", "and 4 more"]:
        assert text in page
    for text in [
        "9f2c" * 16,
        "1c22a0b3d4e5",
        "2:03:41",
        "mask_ratio: 0.75",
        "2.15.0",
        "ZeRO-1",
        "mae run jobs/configs",
    ]:
        assert text in page


def test_no_secret_travels_with_the_page():
    page = render_page(report())
    assert "SECRETPW" not in page
    assert "TOPSECRET" not in page
    assert "s3://***@bucket/digits/" in page


def test_a_run_without_results_still_has_a_page_without_empty_sections():
    page = render_page(ReportData(title="early", summary="Stopped at once.", created="now"))
    assert "early" in page
    assert "<h2>" not in page
