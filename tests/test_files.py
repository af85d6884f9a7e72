"""Files that cannot be written, and places where none may be."""

import os
import platform
import re
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sparselottery import convert, export, prune
from sparselottery.export import FORMATS
from sparselottery.files import atomic, write_safetensors
from sparselottery.ticket import Ticket


def converted():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    return convert(net, prune(net, 0.8))


@contextmanager
def full_disk(limit=100):
    """No file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_oserror_and_leaves_nothing(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model = converted()
    with full_disk(), pytest.raises(OSError):
        export(model, tmp_path / "out", format=format)
    assert not os.listdir(tmp_path)
    export(model, tmp_path / "out", format=format)  # the disk has room again


def test_a_full_disk_keeps_the_ticket_that_was_there(tmp_path):
    path, model = tmp_path / "a.safetensors", converted()
    Ticket.from_model(model, {"n": 1}).save(path)
    with full_disk(), pytest.raises(OSError):
        Ticket.from_model(model, {"n": 2}).save(path)
    assert Ticket.load(path).recipe == {"n": 1}
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("format", ["safetensors", "dense", "torch-csr", "npz", "pt2"])
def test_a_missing_folder_is_an_oserror(format, tmp_path):
    with pytest.raises(OSError):
        export(converted(), tmp_path / "none" / "out", format=format)


def test_special_files_are_refused_and_stay(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for link in (pipe, tmp_path / "link"):
        if link is not pipe:
            link.symlink_to(pipe)
        with pytest.raises(OSError, match="got a device, a pipe or a socket"):
            Ticket.from_model(converted()).save(link)
    with pytest.raises(OSError, match="/dev/full"):
        export(converted(), "/dev/full", format="safetensors")
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(exists, tmp_path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    with atomic(link) as temporary:
        assert temporary.parent == target.parent  # a rename does not cross file systems
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "store") == ["real"]


def test_errors_name_the_path_that_was_given(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for path, what in ((tmp_path / "nowhere/a", "No such file"), (tmp_path / "full", "Directory not empty")):
        told = f"{what}.*: {re.escape(repr(str(path)))}$"
        with pytest.raises(OSError, match=told), atomic(path) as temporary:
            temporary.mkdir()


def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")), full_disk(), atomic(path) as temporary:
        temporary.write_text("half" * 100)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


def test_what_killed_processes_left_is_removed(tmp_path):
    """A later write of the same name does it; files of others, of processes that run and of other machines stay."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, host, path = child.pid, platform.node(), tmp_path / "a[1]"
    (tmp_path / f".a[1].{host}.{dead}.tmp").mkdir()
    (tmp_path / f".a[1].{host}.{dead}.tmp" / "part").touch()
    stay = {f".a[1].{host}.{os.getppid()}.tmp", f".a[1].elsewhere.{dead}.tmp", f".a1.{host}.{dead}.tmp"}
    stay |= {f".a[1].{host}.{10**30}.tmp", f".a[1].{host}.b.tmp"}
    for name in stay:
        (tmp_path / name).touch()
    with atomic(path) as temporary:
        temporary.touch()
    assert set(os.listdir(tmp_path)) == stay | {"a[1]"}
    (tmp_path / f".a[1].{host}.{dead}.tmp").touch()
    with atomic(path) as temporary:
        temporary.touch()
    assert set(os.listdir(tmp_path)) == stay | {"a[1]"}


def test_others_may_read_it_if_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "file", {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("format", ["safetensors", "torch-csr", "torch-bsr", "dense"])
def test_equal_exports_have_equal_bytes(format, tmp_path):
    net = converted()
    for number in range(12):
        export(net, tmp_path / str(number), format=format)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_equal_tickets_of_files_have_equal_bytes(tmp_path):
    """The order of the tensors in memory is that of their names, whatever order the file's reader gives."""
    Ticket.from_model(converted()).save(tmp_path / "ticket")
    written = set()
    for number in range(12):
        ticket = Ticket.load(tmp_path / "ticket")
        assert list(ticket.dense()) == ["0.bias", "2.bias"]
        export(ticket, tmp_path / str(number), format="npz")
        written.add(tuple(path.read_bytes() for path in sorted((tmp_path / str(number)).iterdir())))
    assert len(written) == 1
