"""Tensors on disk, computed once: an entry is a folder of memory-mapped .npy files with a manifest and checksums."""
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from prvr_nb.files import UserError

BLOCK = 2**20  # bytes that are summed at once


def cache_folder(
    dataset_folder: Path,  # <root>/<dataset>
) -> Path:
    "Beside the features, or in a folder of its own under PRVR_CACHE when that is set."
    place = os.environ.get("PRVR_CACHE")
    if not place:
        return dataset_folder / ".prepared"
    name = hashlib.sha256(str(dataset_folder.resolve()).encode()).hexdigest()[:16]
    return Path(place).expanduser() / f"{dataset_folder.name}-{name}"


def sampled_hash(
    path: Path,  # a regular file
    samples: int = 64,  # pieces of 4 KB, evenly spread
) -> str:
    "Size, time of the last change and some of the contents: what has changed nearly always shows in one of them."
    about = path.stat()
    found = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for k in range(samples):
            file.seek(about.st_size * k // samples)
            found.update(file.read(4096))
    return found.hexdigest()


def fingerprint(
    captions: Path,  # hashed whole
    *features: Path,  # hashed by samples
) -> dict | None:  # None when a file is missing or is no regular file
    "What the files of a split are."
    if not all(path.is_file() for path in (captions, *features)):
        return None
    found = {"captions": hashlib.sha256(captions.read_bytes()).hexdigest()}
    return found | {f"{path.parent.name}/{path.name}": sampled_hash(path) for path in features}


class RowWriter:
    "An .npy file that grows row by row; plain writes, so that a full disk is an OSError and no signal."

    def __init__(self, path: Path, like: np.ndarray):
        self.file, self.shape, self.dtype = path.open("wb"), [0, *like.shape[1:]], like.dtype
        self.write_header()

    def write_header(self):  # numpy leaves room in it for the number of rows to grow
        about = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": tuple(self.shape)}
        npy.write_array_header_1_0(self.file, about)

    def add(self, rows: np.ndarray):
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data.cast("B") if rows.size else b"")
        self.shape[0] += len(rows)

    def close(self):
        self.file.seek(0)
        self.write_header()
        self.file.close()


class EntryWriter:
    "Writes the tensors of an entry, chunk by chunk."

    def __init__(self, folder: Path):
        self.folder, self.writers = folder, {}

    def add(self, **tensors: Tensor):
        "Append rows to tensors."
        for name, rows in tensors.items():
            rows = rows.numpy()
            if name not in self.writers:
                self.writers[name] = RowWriter(self.folder / f"{name}.npy", rows)
            self.writers[name].add(rows)

    def finish(self, **about):
        "Close the files and describe them."
        for writer in self.writers.values():
            writer.close()
        sums = {name: checksum(self.folder / f"{name}.npy") for name in self.writers}
        (self.folder / "manifest.json").write_text(json.dumps({**about, "crc32": sums}, indent=1), encoding="utf-8")

    def close(self):
        "Let go of the files of an entry that is given up."
        for writer in self.writers.values():
            writer.file.close()


def checksum(path: Path) -> int:
    "CRC-32 of a file."
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found


def open_entry(
    entry: Path,  # folder
) -> dict | None:  # name → tensor, read from disk when it is used; None when the entry is missing or damaged
    "Memory-map an entry after its checksums are compared; writing to a tensor changes no file."
    if not all(path.is_file() for path in entry.glob("*")):  # a pipe would wait for ever
        return None
    try:
        sums = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))["crc32"]
        if any(checksum(entry / f"{name}.npy") != found for name, found in sums.items()):
            return None
        return {name: torch.from_numpy(np.load(entry / f"{name}.npy", mmap_mode="c")) for name in sums}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_outdated(
    place: Path,  # folder of entries, locked
    split: str,  # 'train', 'val' or 'test'
    source: dict,  # the files as they are now
    damaged: Path,  # the entry that is to be made anew
):
    "Delete the entries of a split whose source has changed, and what killed processes have left behind."
    for entry in place.glob(f"{split}-*"):
        try:
            current = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))["source"] == source
        except (OSError, ValueError, KeyError, TypeError):
            current = False
        if entry == damaged or not current:
            shutil.rmtree(entry, ignore_errors=True)


def cannot_store(
    error: OSError,
    place: Path,  # folder of entries
    n_bytes: float,  # about what they take
) -> UserError:
    "The sentence for a cache that cannot be written."
    return UserError(f"prepared features cannot be stored in {place} ({error.strerror or error}); they take about "
                     f"{n_bytes / 1e6:,.1f} MB: make room, or set PRVR_CACHE to a folder that has it")
