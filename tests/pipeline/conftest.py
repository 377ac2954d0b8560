"""Finished steps for the training stages to read: shards with labels and without, and a pretrained encoder."""

import pytest
from training_kit import Teams, make_shards, picture, pretrain_here, write_images


@pytest.fixture(scope="session")
def partly_labelled(tmp_path_factory):
    """The same, with five images more in train/ and two in test/ that lie in no class folder."""
    folder = tmp_path_factory.mktemp("partly")
    write_images(folder / "images")
    for split, count in (("train", 5), ("test", 2)):
        for index in range(count):
            (folder / "images" / split / f"stray-{index}.png").write_bytes(picture(5000 + 10 * count + index, "noise"))
    return make_shards(folder, folder / "images")


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory):
    """Images without class folders."""
    folder = tmp_path_factory.mktemp("unlabelled")
    write_images(folder / "images", classes=())
    return make_shards(folder, folder / "images")


@pytest.fixture(scope="session")
def teams(tmp_path_factory):
    made = Teams(tmp_path_factory.mktemp("teams"), {})
    yield made
    made.close()


@pytest.fixture(scope="session")
def pretrained(teams, shards, tmp_path_factory):
    """The tiny autoencoder after two epochs, by the real stage."""
    return teams(1).run(pretrain_here, shards, tmp_path_factory.mktemp("pretrain"))[0]
