"""The demo's images."""

from concurrent.futures import ThreadPoolExecutor

from jobs.digits import BAD, write_digits


def test_two_demos_that_begin_at_once_share_one_whole_tree(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: write_digits(tmp_path / "demo" / "digits"), range(2)))
    assert folders == {tmp_path / "demo" / "digits"}
    files = [path for path in (tmp_path / "demo" / "digits").rglob("*") if path.is_file()]
    assert len(files) == 1797 + len(BAD)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["digits"]
