"""The shipped sweeps of the paper's ablations: every row has its member, on the paper's configuration and on a small one."""

import pytest
from run_kit import ROOT

from pipeline.config.sweeps import read_sweep
from pipeline.runs.sweeps.sweep import SweepOptions, load_sweep

FOLDER = ROOT / "jobs/configs/ablations"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PANELS = {
    "decoder_depth": ("table 1a", 5, 0),
    "decoder_width": ("table 1b", 5, 0),
    "mask_token": ("table 1c", 2, 0),
    "target": ("table 1d", 3, 1),
    "augmentation": ("table 1e", 3, 1),
    "mask_sampling": ("table 1f", 4, 0),
    "mask_ratio": ("figure 5", 10, 0),
    "schedule": ("figure 7", 5, 0),
}
"""Panel of the paper, rows with a member, rows that are not built."""
DEFAULT = {"finetune": 84.9, "linear": 73.5}
"""ViT-L with the paper's default settings, a row of every panel."""


def test_every_panel_has_a_file():
    assert sorted(PANELS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_the_paper_has_its_member(name, tmp_path):
    panel, rows, not_built = PANELS[name]
    file = read_sweep(FOLDER / f"{name}.yaml")
    assert file.paper.source.endswith(panel)
    assert (len(file.paper.rows), len(file.not_built)) == (rows, not_built)
    assert DEFAULT in [row.scores for row in file.paper.rows]
    overrides = [f"data.source={tmp_path}", f"store={tmp_path / 'store'}"]
    sweep = load_sweep(FOLDER / f"{name}.yaml", SweepOptions(overrides=overrides))
    assert [sweep.published(member.point) for member in sweep.members] == list(file.paper.rows)
    for member in sweep.members:
        assert member.config.model.encoder.embed_dim == 1024
        assert member.config.pretrain.epochs == member.point.get("pretrain.epochs", 800)
        if name != "target":
            assert member.config.model.target == "raw"


@pytest.mark.parametrize("name", FILES)
def test_every_panel_applies_to_a_small_configuration(name, tmp_path):
    overrides = [f"data.source={tmp_path}", f"store={tmp_path / 'store'}"]
    if name == "target":  # a patch of 4 x 4 RGB pixels has 48 values, and the paper's PCA 96 coefficients
        overrides.append("model.pca_components=24")
    options = SweepOptions(config=ROOT / "jobs/configs/digits.yaml", overrides=overrides)
    sweep = load_sweep(FOLDER / f"{name}.yaml", options)
    assert len(sweep.members) == PANELS[name][1]
    assert {member.config.model.encoder.embed_dim for member in sweep.members} == {96}
    if name == "mask_ratio":
        assert {member.config.pretrain.epochs for member in sweep.members} == {100}  # `set` is for the paper's own
        # the snapshot, the shards and the two evaluations of the random encoder are the same objects
        common = set.intersection(*({step.title for step in member.run.steps} for member in sweep.members))
        assert common == {"snapshot", "shard", "finetune-digits-random-s0", "linear-digits-random-s0"}
