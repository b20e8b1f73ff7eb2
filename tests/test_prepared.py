"""Prepared splits: what the cache holds, when it is made anew, what interruptions leave, and what a batch holds."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import prvr_nb.data.prepared as prepared
from prvr_nb.config import Config, published_config
from prvr_nb.data.corpus import Problems, corpus_paths, read_features, read_split
from prvr_nb.data.prepared import PreparedSplit, Queries, bytes_per_video, pack_queries, prepare, prepare_split
from prvr_nb.files import UserError
from prvr_nb.method.model import Batch, Videos, prepare_videos

NAME, WIDTH = "tiny", 6
CONFIG = dict(merge_schedule=(16, 10, 8), segment_levels=(5, 3))


@pytest.fixture(autouse=True)
def no_other_cache(monkeypatch, tmp_path):
    "Neither the user's cache nor PRVR_CACHE takes part."
    monkeypatch.delenv("PRVR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def write(root, n_videos=9, seed=0, name=NAME):
    "A corpus of two splits with 1 to 40 frames and 1 to 6 queries a video, captions of different videos interleaved."
    rng, paths = np.random.default_rng(seed), corpus_paths(root, name, "train")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(paths.video, "w") as video_file, h5py.File(paths.text, "w") as text_file:
        for split in ("train", "val"):
            ids = [f"{split}{v}#enc#{k}" for v in range(n_videos) for k in range(rng.integers(1, 7))]
            rng.shuffle(ids)
            for v in range(n_videos):
                video_file[f"{split}{v}"] = rng.normal(size=(rng.integers(1, 40), WIDTH)).astype(np.float32)
            for id in ids:
                text_file[id] = rng.normal(size=(rng.integers(1, 9), WIDTH)).astype(np.float32)
            corpus_paths(root, name, split).captions.write_text("".join(f"{id} words\n" for id in ids))
    return paths


def config(**overrides):
    return published_config(NAME, **{**CONFIG, **overrides})


def get(root, split="train", **overrides):
    return prepare(root, config(**overrides), (split,), quiet=True)[0]


def entries(root, name=NAME):
    "Everything in the cache beside the features, the lock aside."
    place = Path(root) / name / ".prepared"
    return sorted(p.name for p in place.iterdir() if p.name != "lock") if place.exists() else []


def direct(root, c, split="train"):
    "The same split from the files, without a cache."
    problems = Problems()
    s = read_split(root, NAME, split, problems)
    videos = prepare_videos([a for _, a in read_features(s.paths.video, s.videos, "frame", problems)], c)
    queries = pack_queries(
        [a for _, a in read_features(s.paths.text, [x.id for x in s.captions], "token", problems)], s.query_video
    )
    assert not problems.found
    half = (lambda x: x.half()) if c.precision == "bf16" else (lambda x: x)
    return PreparedSplit(
        s,
        videos._replace(frames=half(videos.frames), clips=half(videos.clips)),
        queries._replace(tokens=half(queries.tokens)),
    )


def assert_same(a, b):
    "Equal bit for bit, with types and shapes."
    assert a.split.videos == b.split.videos and a.split.captions == b.split.captions
    names = (*Videos._fields, *Queries._fields)
    for name, x, y in zip(names, (*a.videos, *a.queries), (*b.videos, *b.queries), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.fixture
def never_read(monkeypatch):
    "Arms a trap: from now on reading features fails."

    def arm():
        def trap(*args):
            raise AssertionError("features were read although the cache has them")

        monkeypatch.setattr(prepared, "read_features", trap)
        monkeypatch.setattr(h5py, "File", trap)

    return arm


# ---- hits


@pytest.mark.parametrize("overrides", [{}, {"precision": "bf16"}, {"variant": "paper"}, {"uniform_clips": True}])
def test_fresh_and_cached_are_what_the_files_give(tmp_path, never_read, overrides):
    write(tmp_path)
    expected = {split: direct(tmp_path, config(**overrides), split) for split in ("train", "val")}
    fresh = prepare(tmp_path, config(**overrides), quiet=True)
    assert len(entries(tmp_path)) == 2
    never_read()
    cached = prepare(tmp_path, config(**overrides), quiet=True)
    for split, a, b in zip(("train", "val"), fresh, cached, strict=True):
        assert_same(a, expected[split])
        assert_same(b, expected[split])


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])
def test_the_size_of_a_chunk_does_not_matter(tmp_path, chunk):
    write(tmp_path)
    got = prepare_split(tmp_path, config(), "train", Problems(), chunk=chunk, quiet=True)
    expected = direct(tmp_path, config())
    for name, x, y in zip(Videos._fields, got.videos, expected.videos, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


UNRELATED = dict(
    variant="released",
    epochs=3,
    batch_size=7,
    lr=1e-3,
    warmup_ratio=0.5,
    weight_decay=0.0,
    patience=2,
    seed=1,
    hidden_size=8,
    heads=2,
    dropout=0.0,
    sft_factor=1.0,
    margin=0.3,
    loss_factor_clip=1.0,
    loss_factor_frame=1.0,
    hard_negative_start_epoch=1,
    hard_pool_size=3,
    clip_score_weight=0.5,
    tcpl=False,
    lambda_distance=1.0,
    lambda_angle=1.0,
    tcpl_average="off_diagonal",
    cbva=False,
    lambda_cbva=1.0,
    cbva_similarity="cosine",
    cbva_normalisation="softmax",
)
RELATED = dict(
    merge_schedule=(16, 12, 8),
    merge_similarity="cosine",
    uniform_clips=True,
    adaptive=False,
    tau=0.5,
    transitive_closure=False,
    segment_levels=(4, 3),
    precision="bf16",
)


def test_every_setting_is_called_related_or_unrelated():
    later = {"dataset", *UNRELATED, *RELATED}
    for f in fields(Config):  # settings that come later must be judged, too
        if f.name not in later:
            assert prepared.settings_of(config()) == prepared.settings_of(config(**{f.name: f.default})), f.name
    assert later <= {f.name for f in fields(Config)}


@pytest.mark.parametrize("name", UNRELATED)
def test_settings_of_training_share_one_entry(tmp_path, never_read, name):
    write(tmp_path)
    expected = get(tmp_path)
    never_read()
    assert_same(get(tmp_path, **{name: UNRELATED[name]}), expected)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("name", RELATED)
def test_settings_of_preparation_have_entries_of_their_own(tmp_path, name):
    write(tmp_path)
    before = get(tmp_path)
    after = get(tmp_path, **{name: RELATED[name]})
    assert_same(after, direct(tmp_path, config(**{name: RELATED[name]})))
    assert len(entries(tmp_path)) == 2
    assert_same(get(tmp_path), before)


def test_strict_thresholds_of_the_paper_have_an_entry_of_their_own(tmp_path):
    write(tmp_path)
    same = {f.name: getattr(config(), f.name) for f in fields(Config) if f.name not in ("dataset", "variant")}
    assert len(entries(tmp_path)) == 0
    get(tmp_path), get(tmp_path, variant="paper", **same)
    assert len(entries(tmp_path)) == 2


def test_the_longest_query_is_part_of_the_key(tmp_path, monkeypatch):
    write(tmp_path)
    get(tmp_path)
    monkeypatch.setattr(prepared, "MAX_TOKENS", 3)
    assert get(tmp_path).queries.start.diff().max() == 3


# ---- changed sources


def append(path, video):
    with h5py.File(path, "a") as file:
        file[video][0] = 0


CHANGES = {
    "captions, same size and time": lambda p: (
        lambda s: (
            p.captions.write_text(p.captions.read_text().replace("words", "wards")),
            os.utime(p.captions, ns=(s.st_atime_ns, s.st_mtime_ns)),
        )
    )(p.captions.stat()),
    "video file touched": lambda p: os.utime(p.video, ns=(1, p.video.stat().st_mtime_ns + 1)),
    "text file touched": lambda p: os.utime(p.text, ns=(1, p.text.stat().st_mtime_ns + 1)),
    "video grown, same time": lambda p: (
        lambda s: (
            p.video.write_bytes(p.video.read_bytes() + b" "),
            os.utime(p.video, ns=(s.st_atime_ns, s.st_mtime_ns)),
        )
    )(p.video.stat()),
    "frames": lambda p: append(p.video, "train0"),
    "frames, same size and time": lambda p: (
        lambda s: (append(p.video, "train0"), os.utime(p.video, ns=(s.st_atime_ns, s.st_mtime_ns)))
    )(p.video.stat()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_source_makes_a_new_entry_and_removes_the_old_one(tmp_path, change):
    paths = write(tmp_path)
    old = get(tmp_path)
    get(tmp_path, tau=0.1)
    get(tmp_path, "val")
    before, frames = set(entries(tmp_path)), old.videos.frames.clone()
    CHANGES[change](paths)
    assert_same(get(tmp_path), direct(tmp_path, config()))
    after = set(entries(tmp_path))
    assert {e for e in after if e.startswith("train")}.isdisjoint(before) and len(
        [e for e in after if e.startswith("train")]
    ) == 1
    assert {e for e in after if e.startswith("val")} == {
        e for e in before if e.startswith("val")
    }  # another split's are its own business
    assert torch.equal(old.videos.frames, frames)  # who has mapped the old one keeps it


@pytest.mark.parametrize("which", ["captions", "text", "video"])
def test_a_vanished_file_is_missed_although_its_contents_are_cached(tmp_path, which):
    paths = write(tmp_path)
    get(tmp_path)
    getattr(paths, which).unlink()
    with pytest.raises(UserError) as caught:
        get(tmp_path)
    assert str(caught.value).count(f"{getattr(paths, which)} does not exist; see data/README.md") == 1


def test_problems_leave_nothing_behind(tmp_path):
    paths = write(tmp_path)
    with h5py.File(paths.video, "a") as file:
        del file["train8"]
    with h5py.File(paths.text, "a") as file:
        file["train0#enc#0"][0, 0] = np.nan
    with pytest.raises(UserError, match="2 problems"):
        prepare(tmp_path, config(), quiet=True)
    assert entries(tmp_path) == []


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    paths = write(tmp_path)

    def meddling(path, *args):
        yield from read_features(path, *args)
        os.utime(paths.video, ns=(1, 1))

    monkeypatch.setattr(prepared, "read_features", meddling)
    with pytest.raises(UserError, match="changed while they were read; run again"):
        get(tmp_path)
    assert entries(tmp_path) == []


# ---- damaged entries


def flip(path, zero=False):
    data = bytearray(path.read_bytes())
    data[-40:-8] = bytes(32) if zero else bytes([data[-40] ^ 1]) + data[-39:-8]
    path.write_bytes(data)


DAMAGE = {
    "no manifest": lambda e: (e / "manifest.json").unlink(),
    "manifest cut short": lambda e: (e / "manifest.json").write_text((e / "manifest.json").read_text()[:-40]),
    "manifest of another kind": lambda e: (e / "manifest.json").write_text("[1, 2]"),
    "pipe in place of a file": lambda e: ((e / "clips.npy").unlink(), os.mkfifo(e / "clips.npy")),
    "file missing": lambda e: (e / "clips.npy").unlink(),
    "file cut short": lambda e: os.truncate(e / "frames.npy", 100),
    "file too long": lambda e: (e / "start.npy").open("ab").write(b"12345678"),
    "folder in place of a file": lambda e: ((e / "tokens.npy").unlink(), (e / "tokens.npy").mkdir()),
    "one bit flipped": lambda e: flip(e / "frames.npy"),
    "a block of zeros": lambda e: flip(e / "tokens.npy", zero=True),
    "empty": lambda e: (shutil.rmtree(e), e.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(tmp_path, damage):
    write(tmp_path)
    get(tmp_path)
    (name,) = entries(tmp_path)
    DAMAGE[damage](tmp_path / NAME / ".prepared" / name)
    assert_same(get(tmp_path), direct(tmp_path, config()))
    assert entries(tmp_path) == [name]


def test_writing_to_a_tensor_does_not_change_the_cache(tmp_path):
    write(tmp_path)
    get(tmp_path).videos.frames.zero_()
    assert_same(get(tmp_path), direct(tmp_path, config()))


def test_the_manifest_says_what_it_describes(tmp_path):
    write(tmp_path)
    corpus = get(tmp_path, precision="bf16")
    (entry,) = (tmp_path / NAME / ".prepared").glob("train-*")
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["settings"]["dtype"] == "float16" and manifest["settings"]["merge_schedule"] == [16, 10, 8]
    paths = corpus.split.paths
    assert manifest["source"] == prepared.fingerprint(paths.captions, paths.text, paths.video)
    assert manifest["crc32"].keys() == {*Videos._fields, "tokens", "start"}
    for name in Videos._fields:  # plain numpy files
        assert torch.equal(torch.from_numpy(np.load(entry / f"{name}.npy")), getattr(corpus.videos, name))


# ---- places


def test_prvr_cache_is_always_used(tmp_path, monkeypatch, never_read):
    write(tmp_path), write(tmp_path / "other", seed=1)
    monkeypatch.setenv("PRVR_CACHE", str(tmp_path / "cache"))
    one, two = get(tmp_path), get(tmp_path / "other")
    assert entries(tmp_path) == [] == entries(tmp_path / "other")
    assert len(list((tmp_path / "cache").glob("tiny-*/train-*/manifest.json"))) == 2
    assert not torch.equal(one.videos.frames, two.videos.frames)
    never_read()
    monkeypatch.chdir(tmp_path)
    assert_same(get("."), one)  # the same corpus by another name
    assert_same(get(tmp_path / "other"), two)


def refuse(monkeypatch, *places):
    "Folders in which nothing can be made, as the file system would say it (root may write anywhere)."
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        if any(Path(p) in (self, *self.parents) for p in places):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_a_folder_that_cannot_be_written_is_said_with_the_room_and_the_remedy(tmp_path, monkeypatch):
    paths = write(tmp_path, n_videos=300)
    refuse(monkeypatch, tmp_path / NAME)
    with pytest.raises(UserError) as caught:
        get(tmp_path)
    room = (300 * bytes_per_video(config(), WIDTH) + paths.text.stat().st_size) / 1e6
    for part in str(tmp_path / NAME / ".prepared"), "Permission denied", f"{room:,.1f} MB", "set PRVR_CACHE":
        assert part in str(caught.value)


def test_a_read_only_corpus_that_brings_its_cache_needs_no_other(tmp_path, monkeypatch, never_read):
    write(tmp_path)
    fresh = get(tmp_path)
    refuse(monkeypatch, tmp_path / NAME)
    never_read()
    assert_same(get(tmp_path), fresh)


# ---- several processes, interruptions, a full disk

PREPARE = f"""
import sys, time
import prvr_nb.data.prepared as prepared
from prvr_nb.config import published_config
slow = float(sys.argv[2])
real = prepared.prepare_videos
def prepare_videos(arrays, config):
    print("preparing", flush=True)
    time.sleep(slow)
    return real(arrays, config)
prepared.prepare_videos = prepare_videos
corpus, = prepared.prepare(sys.argv[1], published_config({NAME!r}, **{CONFIG!r}), ("train",), quiet=True)
print("frames", float(corpus.videos.frames.double().sum()), flush=True)
"""


def start(root, slow=0.0, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(root), str(slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_two_processes_at_once_prepare_once(tmp_path):
    write(tmp_path)
    processes = [start(tmp_path, slow=1.0) for _ in range(2)]
    printed = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], printed
    assert sum(out.count("preparing") for out, _ in printed) == 1
    frames = {line for out, _ in printed for line in out.splitlines() if line.startswith("frames")}
    assert frames == {f"frames {float(direct(tmp_path, config()).videos.frames.double().sum())}"}
    assert len(entries(tmp_path)) == 1


def test_a_killed_process_leaves_nothing_that_loads(tmp_path):
    write(tmp_path)
    process = start(tmp_path, slow=60.0)
    assert process.stdout.readline().strip() == "preparing"  # the text is written, the videos are not
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (left,) = entries(tmp_path)
    assert left.endswith(".part") and (tmp_path / NAME / ".prepared" / left / "tokens.npy").exists()
    assert prepared.open_entry(tmp_path / NAME / ".prepared" / left) is None
    assert_same(get(tmp_path), direct(tmp_path, config()))  # the lock died with the process
    assert len(entries(tmp_path)) == 1 and entries(tmp_path)[0].startswith("train-")


@pytest.mark.parametrize("limit", [0, 1000, 8000])
def test_a_file_that_cannot_grow_ends_with_a_clear_message(tmp_path, limit):
    write(tmp_path, n_videos=40)
    process = start(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith(
        "prvr_nb.files.UserError: prepared features cannot be stored in"
    ), errors
    assert "File too large" in last and " MB" in last and "PRVR_CACHE" in last
    assert entries(tmp_path) == []
    assert_same(get(tmp_path), direct(tmp_path, config()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["tokens", "start", "frames", "omega"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch, name):
    write(tmp_path)
    real = prepared.EntryWriter.add

    def add(self, **tensors):
        real(self, **tensors)
        if name in tensors:  # what is small waits in a buffer and fails later, when it is flushed or closed
            self.writers[name].file.close()
            self.writers[name].file = open("/dev/full", "wb")
            self.writers[name].file.write(b"1234")

    with monkeypatch.context() as patch:
        patch.setattr(prepared.EntryWriter, "add", add)
        with pytest.raises(
            UserError, match=r"No space left on device\); they take about .* MB: make room, or set PRVR_CACHE"
        ):
            get(tmp_path)
    assert entries(tmp_path) == []
    assert_same(get(tmp_path), direct(tmp_path, config()))


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "prepare_videos", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    assert entries(tmp_path) == []
    assert_same(get(tmp_path), direct(tmp_path, config()))


# ---- batches


def old_batch(corpus, which):
    "The definition: for every video of the batch all queries of the corpus are looked at."
    which = torch.as_tensor(which)
    place, query = (corpus.queries.video[None] == which[:, None]).nonzero(as_tuple=True)
    spans = [(int(corpus.queries.start[q]), int(corpus.queries.start[q + 1])) for q in query]
    longest = max(end - start for start, end in spans)
    tokens, mask = (
        torch.zeros(len(spans), longest, corpus.queries.tokens.shape[1], dtype=corpus.queries.tokens.dtype),
        torch.zeros(len(spans), longest, dtype=torch.bool),
    )
    for i, (start, end) in enumerate(spans):
        tokens[i, : end - start], mask[i, : end - start] = corpus.queries.tokens[start:end], True
    teacher = torch.stack([corpus.queries.tokens[end - 1] for _, end in spans]).float()
    return Batch(*(x[which] for x in corpus.videos[:5]), tokens, mask, teacher, place)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_is_what_the_definition_says(tmp_path, precision):
    write(tmp_path, n_videos=30)
    corpus = get(tmp_path, precision=precision)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        n = int(torch.randint(1, 31, (), generator=generator))
        which = torch.randperm(30, generator=generator)[:n]
        for name, x, y in zip(Batch._fields, corpus.batch(which), old_batch(corpus, which), strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y), name
    assert corpus.batch([3, 3]).video.bincount().tolist() == 2 * [int((corpus.queries.video == 3).sum())]


@pytest.mark.parametrize(
    "which",
    [
        [4, 0, 2],
        (4, 0, 2),
        range(4, -1, -2),
        np.array([4, 0, 2]),
        torch.tensor([4, 0, 2]),
        torch.tensor([4, 0, 2], dtype=torch.int32),
        iter([4, 0, 2]),
    ],
)
def test_a_batch_takes_any_kind_of_indices(tmp_path, which):
    write(tmp_path)
    corpus = get(tmp_path)
    expected = [4, 2, 0] if isinstance(which, range) else [4, 0, 2]
    for name, x, y in zip(Batch._fields, corpus.batch(which), old_batch(corpus, expected), strict=True):
        assert torch.equal(x, y), name


def test_types_that_the_losses_rely_on(tmp_path):
    write(tmp_path)
    for precision, stored in ("fp32", torch.float32), ("bf16", torch.float16):
        batch = get(tmp_path, precision=precision).batch([1, 2])
        assert batch.frames.dtype == batch.clips.dtype == batch.tokens.dtype == stored
        assert batch.teacher.dtype == batch.sizes.dtype == torch.float32 and batch.mask.dtype == torch.bool
        assert batch.frame_to_clip.dtype == batch.clip_to_segment.dtype == batch.video.dtype == torch.int64


def test_half_precision_rounds_what_was_normalised_in_float32(tmp_path):
    write(tmp_path)
    full, half = get(tmp_path), get(tmp_path, precision="bf16")
    assert torch.equal(half.videos.frames, full.videos.frames.half()) and torch.equal(
        half.queries.tokens, full.queries.tokens.half()
    )
    for name in ("sizes", "frame_to_clip", "clip_to_segment", "omega"):  # no rounding before merging
        assert torch.equal(getattr(full.videos, name), getattr(half.videos, name))


def on_meta(corpus):
    "The corpus as if on a device that cannot be asked for a value: any read of a number there is an error."
    return corpus._replace(
        videos=Videos(*(x.to("meta") for x in corpus.videos)),
        queries=corpus.queries._replace(tokens=corpus.queries.tokens.to("meta")),
    )


def test_a_batch_waits_for_no_device(tmp_path):
    write(tmp_path)
    corpus = get(tmp_path)
    expected = corpus.batch([5, 1, 8])
    for name, x, y in zip(Batch._fields, on_meta(corpus).batch([5, 1, 8]), expected, strict=True):
        assert x.device.type == "meta" and x.shape == y.shape and x.dtype == y.dtype, name


def test_the_work_of_a_batch_does_not_grow_with_the_corpus():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        "The largest result of any operation that is no view of the corpus."

        numel = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                self.numel = max(self.numel, out.numel())
            return out

    sizes = []
    for n in (10, 4000):
        videos = Videos(
            torch.zeros(n, 4, 1),
            torch.zeros(n, 2, 1),
            torch.ones(n, 2),
            torch.zeros(n, 4, dtype=torch.long),
            torch.zeros(n, 2, dtype=torch.long),
            torch.zeros(n),
        )
        queries = pack_queries([np.ones((2, 1), np.float32)] * (3 * n), np.arange(3 * n) % n)
        with Largest() as seen:
            PreparedSplit(None, videos, queries).batch([7, 2])
        sizes.append(seen.numel)
    assert sizes[0] == sizes[1] <= 3 * 2 * 2 * 2


# ---- on a GPU


def test_a_corpus_moves_only_where_it_fits(tmp_path, monkeypatch):
    write(tmp_path)
    corpus = get(tmp_path)
    assert corpus.to("cpu") is corpus
    assert corpus.n_bytes == sum(x.numel() * x.element_size() for x in (*corpus.videos, *corpus.queries))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: (moved.append(self), self)[1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (corpus.n_bytes + prepared.RESERVE - 1, 10**12))
    assert corpus.to("cuda") is corpus and not moved
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (corpus.n_bytes + prepared.RESERVE, 10**12))
    corpus.to("cuda")
    assert {id(x) for x in moved} == {id(x) for x in (*corpus.videos, corpus.queries.tokens)}  # indices stay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_resident_corpus_gives_the_same_batches_without_a_wait(tmp_path):
    write(tmp_path)
    corpus = get(tmp_path)
    resident = corpus.to("cuda")
    assert resident.videos.frames.is_cuda and not resident.queries.start.is_cuda
    resident.batch([0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = resident.batch([5, 1, 8])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, x, y in zip(Batch._fields, batch, corpus.batch([5, 1, 8]), strict=True):
        assert x.is_cuda and torch.equal(x.cpu(), y), name


@pytest.mark.parametrize("precision, width, expected", [("fp32", 768, 492_936), ("bf16", 768, 247_176)])
def test_the_stated_bytes_of_a_video(tmp_path, precision, width, expected):
    assert bytes_per_video(published_config("tvr", precision=precision), width) == expected
    write(tmp_path)
    videos = get(tmp_path, precision=precision).videos
    assert sum(x.nbytes for x in videos) == 9 * bytes_per_video(config(precision=precision), WIDTH)
