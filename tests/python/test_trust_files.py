"""Files that are written: whole or not at all, through links, over devices, with the permissions that were there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from attnrb import LearnedGains, Rebalance
from attnrb.policies import HeadProfile, ModelShape
from attnrb.reports.files import write_whole

NEW = "new é\n"


def profile(path: Path) -> None:
    HeadProfile([[1.0, 2.0]], keep=1).save(path)


def learned(path: Path) -> None:
    LearnedGains(ModelShape(layers=2, heads=2), Rebalance()).save(path)


def policy(path: Path) -> None:
    path.parent.joinpath(Rebalance.file).symlink_to(path)
    Rebalance().save_pretrained(path.parent)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_whole(path, NEW),
    "profile": profile,
    "policy": policy,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_and_permissions_stay(tmp_path: Path, write: Callable[[Path], None]) -> None:
    file, link = tmp_path / "a" / "file.json", tmp_path / "b" / "link.json"
    file.parent.mkdir()
    link.parent.mkdir()
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    write(link)
    assert link.is_symlink() and not file.is_symlink()
    assert file.read_text("utf-8") not in ("old", "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [each.name for each in file.parent.iterdir()] == ["file.json"]


def test_a_link_to_nothing_makes_the_file_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text("utf-8") == NEW


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    """A device likewise: ``--json /dev/null`` of a superuser must not put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, NEW)
        assert os.read(reader, 100).decode() == NEW
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only"), OSError(16, "busy")])
@pytest.mark.parametrize("where", ["tempfile.mkstemp", "os.replace"])
def test_a_file_that_cannot_be_replaced_is_written_to(tmp_path: Path, where: str, error: OSError) -> None:
    (tmp_path / "old").write_text("old")
    with mock.patch(where, side_effect=error):
        write_whole(tmp_path / "old", NEW)
        with pytest.raises(OSError, match=str(error.strerror)):
            write_whole(tmp_path / "new", NEW)
    assert (tmp_path / "old").read_text("utf-8") == NEW
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    with mock.patch("os.replace", side_effect=OSError(28, "full")), pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "old", NEW)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, NEW)
    assert not any(tmp_path.iterdir())


def test_a_name_that_is_no_utf8_may_stand_in_a_report(tmp_path: Path) -> None:
    name = os.fsdecode(b"run\xff.jsonl")
    write_whole(tmp_path / "report.json", json.dumps({"run": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == {"run": name}


def test_learnt_gains_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "gains.safetensors").symlink_to(tmp_path / "far.safetensors")
    learned(tmp_path / "gains.safetensors")
    assert (tmp_path / "gains.safetensors").is_symlink()
    again = LearnedGains.load(tmp_path / "far.safetensors")
    assert torch.isfinite(again.gains).all() and again.gains.shape[1] == 2
