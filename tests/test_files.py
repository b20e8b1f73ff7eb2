"""Files and folders are whole or not there: after errors, full disks and kills; folders are held by one process."""
import errno
import fcntl
import json
import os
import time

import processes
import pytest

from prvr_nb.files import UserError, hold_folder, read_json, replace_file, replacing, write_json


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_and_a_folder_are_replaced(tmp_path):
    for content in b"one", b"two":
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    with replacing(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "inside").write_text("here")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "folder" / "inside").read_text() == "here"


def disk_is_full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, exists):
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", disk_is_full) # everything is written, and then not stored
    with pytest.raises(OSError, match=r"No space left on device.*/file'"):
        replace_file(path, b"new")
    assert names(tmp_path) == ["file"] * exists and (not exists or path.read_bytes() == b"old")


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        write_json(path, float("nan"))
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in tmp_path / "file" / "inside", tmp_path / "missing" / "inside":
        with pytest.raises(OSError) as caught:
            replace_file(path, b"")
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "copy"):
        (tmp_path / "source").read_bytes() # another file's error keeps its name
    assert caught.value.filename == str(tmp_path / "source")


def write_half_and_die(path):
    def die(descriptor):
        os.ftruncate(descriptor, 2)
        os._exit(0)
    os.fsync = die
    replace_file(path, b"new content")


def test_a_kill_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    processes.run(write_half_and_die, path)
    assert path.read_bytes() == b"old" and (tmp_path / "file.part").read_bytes() == b"ne"
    replace_file(path, b"new") # what the killed process left is no obstacle
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"new"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "file.json"
    with pytest.raises(UserError, match="does not exist; do this"):
        read_json(path, "do this")
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not JSON .*; do this"):
        read_json(path, "do this")
    write_json(path, {"a": [1, "é"]})
    assert read_json(path, "") == json.loads(path.read_bytes()) == {"a": [1, "é"]}


# ---------------------------------------------------------------- one process at a time

def hold(folder):
    with hold_folder(folder, "held", "folder"):
        (folder / "held").write_text("")
        time.sleep(60)


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    folder = tmp_path / "folder"
    process, = processes.start(hold, folder)
    while not (folder / "held").exists():
        time.sleep(0.001)
    with pytest.raises(UserError, match="folder is held"), hold_folder(folder, "held", "folder"):
        pass
    process.kill()
    process.join()
    with hold_folder(folder, "held", "folder"):
        pass


def test_places_that_cannot_be_held(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*; choose another --out"):
        with hold_folder(tmp_path / "file" / "inside", "", "--out"):
            pass

    def refuse(*_): # a file system without locks
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_folder(tmp_path / "folder", "", ""):
        assert (tmp_path / "folder").is_dir()
