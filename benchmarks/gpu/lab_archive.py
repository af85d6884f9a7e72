"""The folders of a run, small enough to travel: what going on needs, in a few files of at most PART_BYTES.

A round that the next one has replaced is needed for its mask alone, and is given theta's weights when it is unpacked.
So Conv-2 takes 17 MB for theta, as much for a dense round in flight, and at most 0.5 MB for each mask. A ticket follows
from the rest. Of numbers the first bytes are packed together, then the second, ...: they are alike.

    gpu-lab-runs-0.part   a line of JSON: part, parts, sha256 of all of them; then this part of a tar file
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from sparselottery.files import atomic, refusals_name
from sparselottery.lab.controls import MASK_ONLY
from sparselottery.lab.grid import PAUSED
from sparselottery.ticket import Ticket

PART_BYTES = 15 * 2**20
NAME = "gpu-lab-runs-{}.part"
ROUND = re.compile(r"round-(\d+)\.safetensors")
WORD = 4  # bytes of a float32


class Archive:
    """Of the folder ``runs``, in the folder ``results``. It remembers what it has packed: little changes in a round."""

    def __init__(self, runs: Path, results: Path, limit: int) -> None:
        self._runs, self._results, self._limit = runs, results, limit
        self._packed: dict[tuple, bytes] = {}

    def pack(self) -> list[str]:
        """Replace the parts; returns the states of paused trainings that the limit, in bytes, left out."""
        members = {}
        for path in sorted(self._runs.rglob("[!.]*.*")):
            with suppress(FileNotFoundError):  # a training that was paused has just ended
                if path.is_file() and (member := self._member(path)):
                    members[path] = member
        left_out = []
        for path in [path for path in members if path.name.endswith(PAUSED)]:
            if sum(len(content) for _, content in members.values()) > self._limit:
                del members[path]
                left_out.append(str(path.relative_to(self._runs)))
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in members.values():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        self._write(file.getvalue())
        return left_out

    def _member(self, path: Path) -> tuple[str, bytes] | None:
        """Name and content; None for what follows from the rest."""
        name = path.relative_to(self._runs).as_posix()
        if path.name == "ticket.safetensors":
            return None
        found = ROUND.fullmatch(path.name)
        replaced = found and (path.with_name(f"round-{int(found[1]) + 1:02d}.safetensors")).exists()
        kind = "json" if path.suffix == ".json" else "masks" if replaced else "bytes"
        stat = path.stat()
        key = name, kind, stat.st_mtime_ns, stat.st_size
        if key not in self._packed:
            content = {"json": _text, "masks": _masks, "bytes": _bytes}[kind](path)
            self._packed = {other: each for other, each in self._packed.items() if other[0] != name} | {key: content}
        return f"{kind}/{name}", self._packed[key]

    def _write(self, data: bytes) -> None:
        chunks = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
        head = {"parts": len(chunks), "sha256": hashlib.sha256(data).hexdigest()}
        self._results.mkdir(parents=True, exist_ok=True)
        for number, chunk in enumerate(chunks):
            with atomic(self._results / NAME.format(number)) as temporary:
                temporary.write_bytes(json.dumps({"part": number, **head}).encode() + b"\n" + chunk)
        for path in self._parts()[len(chunks) :]:
            path.unlink()

    def unpack(self) -> list[str]:
        """Write the files that the parts hold and the folder lacks; returns their names, [] without parts.

        Raises ValueError for parts that do not belong together, and for damaged ones.
        """
        data = b""
        heads = []
        for path in self._parts():
            with refusals_name(path):
                line, _, chunk = path.read_bytes().partition(b"\n")
                heads.append(json.loads(line))
            data += chunk
        if not heads:
            return []
        whole = {"parts": len(heads), "sha256": hashlib.sha256(data).hexdigest()}
        if heads != [{"part": number, **whole} for number in range(len(heads))]:
            raise ValueError(f"{self._results}: expected all parts {NAME.format('*')} of one archive, got {heads}")
        written = []
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for member, content in sorted(members.items()):  # bytes and json before masks, which need theta
            kind, _, name = member.partition("/")
            path = self._runs / name
            if not path.resolve().is_relative_to(self._runs.resolve()):
                raise ValueError(f"{self._results}: expected names in the folder of the runs, got {name!r}")
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                {"json": _write_text, "masks": _write_masks, "bytes": _write_bytes}[kind](path, content)
                written.append(name)
        return written

    def _parts(self) -> list[Path]:
        paths = self._results.glob(NAME.format("*"))
        return sorted(paths, key=lambda path: int(re.sub(r"\D", "", path.name)))


def _text(path: Path) -> bytes:
    return zlib.compress(path.read_bytes())


def _write_text(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(zlib.decompress(content))


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    words = np.frombuffer(raw, np.uint8, len(raw) // WORD * WORD).reshape(-1, WORD)
    return zlib.compress(words.T.tobytes() + raw[words.size :], 1)


def _write_bytes(path: Path, content: bytes) -> None:
    raw = zlib.decompress(content)
    planes = np.frombuffer(raw, np.uint8, len(raw) // WORD * WORD).reshape(WORD, -1)
    with atomic(path) as temporary:
        temporary.write_bytes(planes.T.tobytes() + raw[planes.size :])


def _masks(path: Path) -> bytes:
    masks = Ticket.load(path).masks
    return zlib.compress(b"".join(np.packbits(masks[name].numpy()).tobytes() for name in sorted(masks)), 1)


def _write_masks(path: Path, content: bytes) -> None:
    theta, raw, at, masks = Ticket.load(path.with_name("theta.safetensors")), zlib.decompress(content), 0, {}
    for name, start in sorted(theta.masks.items()):
        size = -(-start.numel() // 8)
        bits = np.unpackbits(np.frombuffer(raw, np.uint8, size, at), count=start.numel())
        masks[name], at = torch.from_numpy(bits).bool().view(start.shape), at + size
    masks = {name: masks[name] for name in theta.masks}
    Ticket(theta.weights, masks, {**theta.recipe, MASK_ONLY: True}, theta.architecture).save(path)
