"""Corpora on disk: every kind of damage is reported at once with file, place and remedy; odd but healthy ones pass.

Each test writes a small corpus in the released layout, breaks it, and reads it with `check_corpus` and with `prepare`.
"""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from prvr_nb.config import published_config
from prvr_nb.data.corpus import (
    Moment,
    Problems,
    check_corpus,
    corpus_paths,
    read_captions,
    read_features,
    read_moments,
    read_split,
)
from prvr_nb.data.prepared import MAX_TOKENS, prepare, prepare_split
from prvr_nb.files import UserError
from prvr_nb.method.model import prepare_videos
from prvr_nb.method.tokens import l2_normalise

NAME, WIDTH = "tiny", 6
HEALTHY = {
    "train": {"a": (4, [3, 2]), "b": (5, [4, 1])},
    "val": {"c": (3, [2, 2]), "d": (6, [5])},
}  # video → frames, tokens of its queries


def write(root, splits=HEALTHY, name=NAME, prefix="", width=WIDTH):
    "Write a corpus; `prefix` precedes ids in captions and text keys, not in the video file. Returns training paths."
    rng, paths = np.random.default_rng(0), corpus_paths(root, name, "train")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(paths.video, "w") as video_file, h5py.File(paths.text, "w") as text_file:
        for split, videos in splits.items():
            lines = []
            for video, (frames, tokens) in videos.items():
                video_file[video] = rng.normal(size=(frames, width)).astype(np.float32)
                for k, length in enumerate(tokens):
                    text_file[f"{prefix}{video}#enc#{k}"] = rng.normal(size=(length, width)).astype(np.float32)
                    lines.append(f"{prefix}{video}#enc#{k} someone does something\n")
            corpus_paths(root, name, split).captions.write_text("".join(lines), encoding="utf-8")
    return paths


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def put(path, key, array=None):
    "Replace an entry of a feature file, or delete it."
    with h5py.File(path, "a") as file:
        del file[key]
        if array is not None:
            file[key] = array


def damage_inside(path, key):
    "Overwrite the stored bytes of one compressed entry: the file opens, the entry does not decompress."
    put(path, key)
    with h5py.File(path, "a") as file:
        data = file.create_dataset(
            key, data=np.random.default_rng(0).normal(size=(40, WIDTH)), chunks=(40, WIDTH), compression="gzip"
        )
        chunk = data.id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)


def dangling(path, key):
    "An entry that points nowhere."
    put(path, key)
    with h5py.File(path, "a") as file:
        file[key] = h5py.SoftLink("/nowhere")


def put_group(path, key):
    put(path, key)
    with h5py.File(path, "a") as file:
        file.create_group(key)


def put_virtual(path, key):
    "What is left of a virtual dataset when its source has gone: it reads as zeros."
    put(path, key)
    layout = h5py.VirtualLayout((3, WIDTH), "f4")
    layout[:] = h5py.VirtualSource("gone.h5", key, (3, WIDTH))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(key, layout)


def put_huge(path, key):
    put(path, key)
    with h5py.File(path, "a") as file:
        file.create_dataset(key, (2**23, 2**10), "f4")


def holding(value):
    array = np.ones((3, WIDTH))
    array[1, 2] = value
    return array


# name → (damage to the training paths, file that must be named, line or key, remedy)
CASES = {
    "no caption file": (lambda p: p.captions.unlink(), "captions", "does not exist", "see data/README.md"),
    "no text features": (lambda p: p.text.unlink(), "text", "does not exist", "see data/README.md"),
    "no video features": (lambda p: p.video.unlink(), "video", "does not exist", "see data/README.md"),
    "empty caption file": (lambda p: p.captions.write_text(""), "captions", "is empty", "one line per query"),
    "blank caption file": (lambda p: p.captions.write_text("\n \n"), "captions", "is empty", "one line per query"),
    "caption file in Latin-1": (
        lambda p: p.captions.write_bytes("a#enc#0 café\n".encode("latin-1")),
        "captions", "not UTF-8", "save it as UTF-8"),
    "line without id": (
        lambda p: edit(p.captions, "a#enc#1 ", ""),
        "captions", "line 2: no caption id", "write '<video id>#enc#<k> <sentence>'"),
    "line without video": (
        lambda p: edit(p.captions, "a#enc#1", "#enc#1"),
        "captions", "line 2: no caption id", "write '<video id>#enc#<k> <sentence>'"),
    "line without text": (
        lambda p: edit(p.captions, "b#enc#0 someone does something", "b#enc#0  "),
        "captions", "line 3: caption b#enc#0 has no text", "add the sentence or delete the line"),
    "duplicate id": (
        lambda p: edit(p.captions, "b#enc#1", "a#enc#0"),
        "captions", "line 4: caption id a#enc#0 stands in line 1 already", "ids must be unique"),
    "one video": (
        lambda p: p.captions.write_text("a#enc#0 someone\na#enc#1 someone\n"),
        "captions", "names 1 video", "at least two"),
    "query without features": (
        lambda p: put(p.text, "a#enc#1"), "text", "a#enc#1", "extract its features or remove its captions"),
    "video without features": (
        lambda p: put(p.video, "b"), "video", "entry b", "extract its features or remove its captions"),
    "query without tokens": (
        lambda p: put(p.text, "a#enc#1", np.zeros((0, WIDTH))),
        "text", "entry a#enc#1 has no tokens", "extract it again or remove its captions"),
    "video without frames": (
        lambda p: put(p.video, "a", np.zeros((0, WIDTH))),
        "video", "entry a has no frames", "extract it again or remove its captions"),
    "video of one row without a frame axis": (
        lambda p: put(p.video, "a", np.ones(WIDTH)), "video", "entry a has shape (6,)", "store one row per frame"),
    "video without columns": (
        lambda p: put(p.video, "a", np.ones((3, 0))), "video", "entry a has shape (3, 0)", "store one row per frame"),
    "last video of another width": (
        lambda p: put(p.video, "b", np.ones((3, 9))),
        "video", "entry b has 9 columns", "use one feature extractor for all"),
    "query of another width": (
        lambda p: put(p.text, "b#enc#0", np.ones((3, 9))),
        "text", "entry b#enc#0 has 9 columns where the others have 6", "use one feature extractor for all"),
    "first query of another width": (
        lambda p: put(p.text, "a#enc#0", np.ones((3, 9))),
        "text", "entry a#enc#0 has 9 columns where the others have 6", "use one feature extractor for all"),
    "NaN in a video": (
        lambda p: put(p.video, "b", holding(np.nan)), "video", "entry b holds NaN or infinity", "extract it again"),
    "infinity in a video": (
        lambda p: put(p.video, "b", holding(np.inf)), "video", "entry b holds NaN or infinity", "extract it again"),
    "NaN in a query": (
        lambda p: put(p.text, "b#enc#0", holding(np.nan)),
        "text", "entry b#enc#0 holds NaN or infinity", "extract it again"),
    "minus infinity in a query": (
        lambda p: put(p.text, "b#enc#0", holding(-np.inf)),
        "text", "entry b#enc#0 holds NaN or infinity", "extract it again"),
    "truncated video features": (
        lambda p: p.video.write_bytes(p.video.read_bytes()[:-700]),
        "video", "cannot be opened as HDF5", "copy or download it again"),
    "text features that are not HDF5": (
        lambda p: p.text.write_bytes(b"<html>quota exceeded</html>"),
        "text", "cannot be opened as HDF5", "copy or download it again"),
    "damaged entry": (
        lambda p: damage_inside(p.video, "b"), "video", "entry b cannot be read", "copy or download the file again"),
    "dangling entry": (
        lambda p: dangling(p.text, "b#enc#0"),
        "text", "entry b#enc#0 cannot be read", "copy or download the file again"),
    "words instead of numbers": (
        lambda p: put(p.video, "b", "frames"), "video", "entry b has type object", "store float16 or float32"),
    "group instead of numbers": (
        lambda p: put_group(p.video, "b"), "video", "entry b is a group", "store one array per id"),
    "zeros": (
        lambda p: put(p.video, "b", np.zeros((3, WIDTH))), "video", "entry b holds zeros only", "extract it again"),
    "all equal": (
        lambda p: [put(p.video, key, np.ones((3, WIDTH))) for key in "ab"],
        "video", "all 2 entries are equal", "extract the features again"),
    "link to another file": (
        lambda p: put(p.video, "b", h5py.ExternalLink("other.h5", "b")),
        "video", "entry b is a link to another file", "copy the features into this one"),
    "virtual dataset": (
        lambda p: put_virtual(p.video, "b"),
        "video", "entry b is a virtual dataset", "copy the features into this file"),
    "more than any video": (lambda p: put_huge(p.video, "b"), "video", "entry b declares 34.4 GB", "are not read"),
    "caption file that is a pipe": (
        lambda p: (p.captions.unlink(), os.mkfifo(p.captions)),
        "captions", "is not a regular file", "see data/README.md"),
    "video file that is a pipe": (
        lambda p: (p.video.unlink(), os.mkfifo(p.video)), "video", "does not exist", "see data/README.md"),
}
READERS = {
    "check": lambda root, splits: check_corpus(root, NAME, splits),
    "prepare": lambda root, splits: prepare(root, published_config(NAME), splits, quiet=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_healthy_corpus_passes(tmp_path, reader):
    write(tmp_path)
    assert len(READERS[reader](tmp_path, ("train", "val"))) == 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_with_file_place_and_remedy(tmp_path, case, reader):
    damage, file, place, remedy = CASES[case]
    paths = write(tmp_path)
    damage(paths)
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path, ("train",))
    header, *found = str(caught.value).splitlines()
    assert header == f"{tmp_path / NAME}: 1 problem"
    assert len(found) == 1 and str(getattr(paths, file)) in found[0]
    assert place in found[0] and remedy in found[0]


@pytest.mark.parametrize("reader", READERS)
def test_all_problems_of_all_files_and_splits_come_at_once(tmp_path, reader):
    paths = write(tmp_path)
    val = corpus_paths(tmp_path, NAME, "val")
    edit(paths.captions, "a#enc#1 someone does something", "a#enc#1")
    edit(val.captions, "c#enc#1 ", "")
    put(paths.video, "b", holding(np.nan))
    put(paths.video, "d")
    put(paths.text, "a#enc#0", np.zeros((0, WIDTH)))
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path, ("train", "val"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / NAME}: 5 problems\n") and len(message.splitlines()) == 6
    for part in (
        f"{paths.captions}, line 2",
        f"{val.captions}, line 2",
        f"{paths.video}, entry b ",
        f"{paths.video}, entry d:",
        f"{paths.text}, entry a#enc#0 ",
    ):
        assert message.count(part) == 1


@pytest.mark.parametrize("limit, shown", [(0, 0), (1, 1), (3, 3), (4, 4), (99, 4)])
def test_the_limit_cuts_the_list_and_not_the_count(tmp_path, limit, shown):
    paths = write(tmp_path)
    for key in ("a#enc#0", "a#enc#1", "b#enc#0", "b#enc#1"):
        put(paths.text, key)
    with pytest.raises(UserError) as caught:
        check_corpus(tmp_path, NAME, ("train",), limit=limit)
    message = str(caught.value)
    assert "4 problems" in message and message.count("no such entry") == shown
    assert (f"… and {4 - shown} more" in message) == (shown < 4)


def test_a_missing_corpus_names_each_file_once(tmp_path):
    with pytest.raises(UserError) as caught:
        check_corpus(tmp_path, NAME)
    paths = [*corpus_paths(tmp_path, NAME, "train"), corpus_paths(tmp_path, NAME, "val").captions]
    assert "4 problems" in str(caught.value)
    for path in paths:
        assert str(caught.value).count(f"{path} does not exist") == 1


@pytest.mark.parametrize("reader", READERS)
def test_splits_of_different_widths_are_refused(tmp_path, reader):
    paths = write(tmp_path)
    for video in HEALTHY["val"]:
        put(paths.video, video, np.random.default_rng(len(video) + ord(video)).normal(size=(3, 9)))
    with pytest.raises(UserError, match="splits differ in .* use one feature extractor for all"):
        READERS[reader](tmp_path, ("train", "val"))


def test_an_odd_first_entry_does_not_accuse_the_others(tmp_path):
    paths = write(tmp_path, {"train": {f"v{i}": (3, [2]) for i in range(9)}})
    put(paths.video, "v0", np.ones((3, 9)))
    problems = Problems()
    good = [i for i, _ in read_features(paths.video, [f"v{i}" for i in range(9)], "frame", problems)]
    assert good == list(range(1, 9))
    assert len(problems.found) == 1 and "entry v0 has 9 columns where the others have 6" in problems.found[0]


def test_counts_that_differ_from_the_published_pack_only_warn(tmp_path):
    write(tmp_path, name="charades")
    lines = check_corpus(tmp_path, "charades")
    assert [line.startswith("  warning: the authors' pack has ") for line in lines] == [False, True, False, True]


def test_float16_features_are_read_as_float32(tmp_path):
    paths = write(tmp_path)
    put(paths.video, "a", np.full((2, WIDTH), 0.1, dtype=np.float16))
    ((_, array),) = read_features(paths.video, ["a"], "frame", Problems())
    assert array.dtype == np.float32 and array.shape == (2, WIDTH)


def test_caption_lines_end_at_newlines_only(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa#enc#0 one\u2028two\r\n\nb#enc#0   three four \n".encode())
    problems = Problems()
    captions = read_captions(file, problems)
    assert not problems.found
    assert captions == [("a#enc#0", "a", "one\u2028two"), ("b#enc#0", "b", "three four")]


def test_videos_are_those_that_captions_name_in_order_of_their_first_caption(tmp_path):
    paths = write(tmp_path)
    paths.captions.write_text("b#enc#0 x\na#enc#0 x\nb#enc#1 x\n")
    split = read_split(tmp_path, NAME, "train", Problems())
    assert split.videos == ["b", "a"] and split.query_video.tolist() == [0, 1, 0]


# ---- ids with v_


def test_activitynet_captions_carry_a_prefix_that_the_videos_lack(tmp_path):
    splits = {"train": {"a": (4, [3]), "b": (5, [2, 2])}}
    write(tmp_path / "with", splits, "activitynet", prefix="v_")
    write(tmp_path / "without", splits, "activitynet")
    config = published_config("activitynet")
    (with_prefix,), (without,) = (
        prepare(tmp_path / name, config, ("train",), quiet=True) for name in ("with", "without")
    )
    assert with_prefix.split.videos == ["v_a", "v_b"]
    assert_close(with_prefix.videos.frames, without.videos.frames)
    assert_close(with_prefix.queries.tokens, without.queries.tokens)


def test_the_exact_spelling_wins_over_the_one_without_prefix(tmp_path):
    paths = write(tmp_path)
    with h5py.File(paths.video, "a") as file:
        file["v_a"] = np.full((1, WIDTH), 7.0)
    got = {i: array for i, array in read_features(paths.video, ["v_a", "v_b", "a"], "frame", Problems())}
    assert got[0].shape == (1, WIDTH) and (got[0] == 7).all()
    assert got[1].shape == (5, WIDTH) and got[2].shape == (4, WIDTH)


# ---- from files to batches

RAGGED = {"val": {"long": (300, [3] * 40), "single": (1, [1]), "pair": (7, [12, 5])}}


@pytest.fixture
def ragged(tmp_path):
    "A prepared split of videos with 300, 1 and 7 frames and with 40, 1 and 2 queries, and its files."
    write(tmp_path, RAGGED)
    (corpus,) = prepare(tmp_path, published_config(NAME), ("val",), quiet=True)
    return corpus, corpus_paths(tmp_path, NAME, "val")


def test_videos_of_one_frame_and_of_many_are_prepared_alike(ragged):
    corpus, paths = ragged
    videos = corpus.videos
    assert videos.frames.shape == (3, 128, WIDTH) and videos.clips.shape == (3, 32, WIDTH)
    assert all(x.isfinite().all() for x in videos)
    assert_close(videos.sizes.sum(1), torch.full((3,), 128.0))
    assert (videos.frame_to_clip[:, 0] == 0).all() and (videos.frame_to_clip[:, -1] == 31).all()
    assert set(videos.frame_to_clip.diff(dim=1).unique().tolist()) == {0, 1}
    with h5py.File(paths.video) as file:
        frame = l2_normalise(torch.from_numpy(file["single"][:]))
    assert_close(videos.frames[1], frame.expand(128, WIDTH))
    assert_close(videos.clips[1], frame.expand(32, WIDTH))
    assert videos.omega[1] == 1 and videos.clip_to_segment[1].max() == 4  # as uniform as can be: five segments


@pytest.mark.parametrize("which", [[0, 1, 2], [2, 0], [1], [1, 2], [0]])
def test_a_batch_holds_its_videos_with_all_their_queries(ragged, which):
    corpus, paths = ragged
    batch = corpus.batch(which)
    names = [list(RAGGED["val"])[v] for v in which]
    lengths = [n for name in names for n in RAGGED["val"][name][1]]
    assert batch.frames.shape == (len(which), 128, WIDTH) and batch.tokens.shape == (len(lengths), max(lengths), WIDTH)
    assert batch.mask.shape == batch.tokens.shape[:2] and batch.mask.sum(1).tolist() == lengths
    assert batch.video.tolist() == [b for b, name in enumerate(names) for _ in RAGGED["val"][name][1]]
    assert not batch.tokens[~batch.mask].any()
    for field in ("frames", "clips", "sizes", "frame_to_clip", "clip_to_segment"):
        assert_close(getattr(batch, field), getattr(corpus.videos, field)[which])
    with h5py.File(paths.text) as file:
        texts = [
            torch.from_numpy(file[f"{name}#enc#{k}"][:]) for name in names for k in range(len(RAGGED["val"][name][1]))
        ]
    for row, mask, teacher, text in zip(batch.tokens, batch.mask, batch.teacher, texts, strict=True):
        assert_close(row[mask], l2_normalise(text))
        assert_close(teacher, l2_normalise(text[-1]))


def test_queries_find_their_video_when_captions_are_interleaved(tmp_path):
    paths = write(tmp_path)
    paths.captions.write_text("b#enc#0 x\na#enc#0 x\nb#enc#1 x\na#enc#1 x\n")
    (corpus,) = prepare(tmp_path, published_config(NAME), ("train",), quiet=True)
    batch = corpus.batch([1, 0])  # a, then b
    assert batch.video.tolist() == [0, 0, 1, 1] and batch.mask.sum(1).tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize("length", [1, 76, 77, 78, 200])
def test_of_long_queries_the_first_76_tokens_and_eos_are_kept(tmp_path, length):
    write(tmp_path, {"val": {"a": (4, [length]), "b": (4, [2])}})
    (corpus,) = prepare(tmp_path, published_config(NAME), ("val",), quiet=True)
    with h5py.File(corpus.split.paths.text) as file:
        text = l2_normalise(torch.from_numpy(file["a#enc#0"][:]))
    batch = corpus.batch([0])
    assert MAX_TOKENS == 77 and batch.tokens.shape == (1, min(length, 77), WIDTH)
    assert_close(batch.tokens[0, :-1], text[:-1][:76])
    assert_close(batch.tokens[0, -1], text[-1])
    assert_close(batch.teacher[0], text[-1])


def test_preparing_depends_on_neither_company_nor_chance(tmp_path):
    write(tmp_path, {"val": {f"v{i}": (n, [2]) for i, n in enumerate((1, 2, 63, 127, 128, 129, 400))}})
    config, problems = published_config(NAME), Problems()
    torch.manual_seed(0)
    together = prepare_split(tmp_path, config, "val", problems, chunk=256, quiet=True)
    shutil.rmtree(tmp_path / NAME / ".prepared")  # or the second would be the first, from the cache
    torch.manual_seed(1)
    alone = prepare_split(tmp_path, config, "val", problems, chunk=1, quiet=True)
    for name, a, b in zip(together.videos._fields, together.videos, alone.videos, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("overrides", [{}, {"adaptive": False}, {"uniform_clips": True}])
def test_one_frame_is_enough_for_every_variant(variant, overrides):
    videos = prepare_videos([np.ones((1, WIDTH), np.float32)], published_config(NAME, variant, **overrides))
    assert all(x.isfinite().all() for x in videos)
    assert_close(videos.sizes.sum(1), torch.tensor([128.0]))
    assert videos.clip_to_segment.max() + 1 == (32 if overrides.get("adaptive") is False else 5)


# ---- moments


def write_moments(root, name, file, rows):
    folder = root / name / "TextData"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows),
        encoding="utf-8",
    )


def test_moments_of_tvr(tmp_path):
    write_moments(
        tmp_path,
        "tvr",
        "tvr_val_release.jsonl",
        [
            {
                "vid_name": "friends_1",
                "desc": " Ross sits.\u2028 ",
                "ts": [1.5, 4],
                "duration": 60.0,
                "desc_id": 1,
                "type": "v",
            },
            "",
            {"vid_name": "friends_1", "desc": "Ross sits again.", "ts": [30, 33], "duration": 60.0},
        ],
    )
    write_moments(
        tmp_path, "tvr", "tvr_train_release.jsonl", [{"vid_name": "other", "desc": "x", "ts": [0, 1], "duration": 2}]
    )
    moments = read_moments(tmp_path, "tvr", "val")
    assert moments == {
        ("friends_1", "Ross sits."): [Moment(1.5, 4, 60)],
        ("friends_1", "Ross sits again."): [Moment(30, 33, 60)],
    }
    assert list(read_moments(tmp_path, "tvr", "train")) == [("other", "x")]


def test_moments_of_qvhighlights(tmp_path):
    write_moments(
        tmp_path,
        "qvhighlight",
        "highlight_val_release.jsonl",
        [
            {
                "qid": 1,
                "vid": "x_60_210",
                "query": "A dog runs",
                "duration": 150,
                "relevant_windows": [[0, 4], [30, 36]],
                "saliency_scores": [[1, 2, 3]],
            }
        ],
    )
    assert read_moments(tmp_path, "qvhighlight", "val") == {
        ("x_60_210", "A dog runs"): [Moment(0, 4, 150), Moment(30, 36, 150)]
    }


def test_a_sentence_that_a_video_has_twice_keeps_both_moments(tmp_path):
    row = {"vid_name": "v", "desc": "He waves.", "ts": [0, 2], "duration": 9}
    write_moments(tmp_path, "tvr", "tvr_val_release.jsonl", [row, {**row, "ts": [5, 7]}, row])
    assert read_moments(tmp_path, "tvr", "val") == {("v", "He waves."): [Moment(0, 2, 9), Moment(5, 7, 9)]}


def test_a_corpus_without_annotations_has_no_moments(tmp_path):
    write(tmp_path)
    assert read_moments(tmp_path, NAME, "val") == {}


@pytest.mark.parametrize(
    "row",
    [
        "not json",
        "[1, 2]",
        {"vid": "a", "query": "x", "duration": 9},
        {"vid": "a", "query": 3, "duration": 9, "relevant_windows": []},
        {"vid": "a", "query": "x", "duration": "long", "relevant_windows": [[0, 1]]},
        {"vid_name": "a", "desc": "x", "ts": [1], "duration": 9},
    ],
)
def test_an_unreadable_annotation_is_named_with_file_and_line(tmp_path, row):
    good = {"vid": "a", "query": "good", "duration": 9, "relevant_windows": [[0, 1]]}
    write_moments(tmp_path, "qvhighlight", "highlight_val_release.jsonl", [good, row])
    with pytest.raises(UserError) as caught:
        read_moments(tmp_path, "qvhighlight", "val")
    path = tmp_path / "qvhighlight" / "TextData" / "highlight_val_release.jsonl"
    assert f"{path}, line 2" in str(
        caught.value
    ) and "it needs desc|query, vid|vid_name, duration and ts|relevant_windows" in str(caught.value)


def test_annotations_in_another_encoding_are_named_with_the_line(tmp_path):
    write_moments(tmp_path, "tvr", "tvr_val_release.jsonl", [])
    path = tmp_path / "tvr" / "TextData" / "tvr_val_release.jsonl"
    path.write_bytes('{"vid_name": "a", "desc": "café", "ts": [0, 1], "duration": 9}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="line 1"):
        read_moments(tmp_path, "tvr", "val")
