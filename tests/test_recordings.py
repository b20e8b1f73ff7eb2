"""Recordings of a training: invariants of what is kept, an unwatched run's numbers, files read safely and refused."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.cli import collapse_command
from prvr_nb.config import published_config
from prvr_nb.data.toy import EVENTS
from prvr_nb.evaluation.collapse import collapse
from prvr_nb.evaluation.embeddings import embed
from prvr_nb.evaluation.rows import evaluate
from prvr_nb.evidence import recordings
from prvr_nb.evidence.experiments import open_splits
from prvr_nb.files import UserError
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.fast import use_fast_modules
from prvr_nb.training.loop import train

CONFIG = published_config("toy", seed=0, epochs=2, hidden_size=16, heads=2, batch_size=8)


def unit(*shape, seed=0, mean=0.):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean, dim=-1)


@pytest.fixture(scope="module")
def splits(root):
    return open_splits(root, CONFIG)


@pytest.fixture(scope="module")
def recording(splits):
    return recordings.record(CONFIG, splits.train, splits.val, quiet=True)


def test_pair_means_and_neighbours_against_loops():
    g = torch.Generator().manual_seed(0)
    x, video, topic = unit(23, 5, mean=0.3), torch.randint(6, (23,), generator=g), torch.randint(4, (23,), generator=g)
    sums, counts, found = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))
    for i in range(23):
        others = [j for j in range(23) if j != i]
        near = sorted(others, key=lambda j: -float(x[i] @ x[j]))[:4]  # noqa: B023
        assert recordings.nearest(x, 4)[i].tolist() == near == recordings.nearest(x, 4, side=5)[i].tolist()
        for j in others:
            kind = int(video[i] == video[j]), int(topic[i] == topic[j])
            sums[kind] += float(x[i] @ x[j])
            counts[kind] += 1
            found[kind] += (j in near) / 92
    assert_close(recordings.pair_means(x, video, topic), torch.from_numpy(sums / counts), rtol=1e-5, atol=1e-6)
    assert_close(recordings.neighbour_shares(recordings.nearest(x, 4), video, topic), torch.from_numpy(found))


def test_few_queries_and_kinds_without_pairs():
    means = recordings.pair_means(unit(5, 3), torch.zeros(5, dtype=torch.long), torch.arange(5))
    assert means.isnan().tolist() == [[True, True], [False, True]] and len(recordings.KINDS_OF_PAIRS) == means.numel()
    assert recordings.nearest(unit(3, 4)).shape == (3, 2)
    assert sorted(recordings.nearest(F.normalize(torch.ones(2, 4), dim=1)).tolist()) == [[0], [1]]  # equal captions


@pytest.mark.parametrize("squared_mean", [0.5, 4.])
def test_a_common_mean_cancels_in_the_centred_gap(squared_mean):
    content, video = F.normalize(F.pad(unit(40, 12, mean=0.2).double(), (0, 1)), dim=1), torch.arange(40) // 4
    intra, total, _ = collapse(content, video, 10)
    moved = content.clone()
    moved[:, -1] = squared_mean**0.5  # orthogonal to every content
    moved_intra, moved_total, _ = collapse(F.normalize(moved, dim=1), video, 10)
    gap = recordings.centred_gap(intra, total)
    assert recordings.centred_gap(moved_intra, moved_total) == pytest.approx(gap, abs=1e-12)
    assert recordings.centred_gap(1., total) == 1 and recordings.centred_gap(total, total) == 0


def test_topics():
    for topic, events in enumerate(EVENTS.values()):
        assert {recordings.toy_topic(f"a man in red {event}") for event in events} == {topic}
    groups = recordings.cluster(F.normalize(torch.eye(3).repeat_interleave(5, 0) + 0.1 * unit(15, 3), dim=1), 3)
    assert len(groups.unique()) == 3 and all(len(g.unique()) == 1 for g in groups.split(5))


def test_chosen_videos_share_topics():
    g = torch.Generator().manual_seed(1)
    topic = torch.randint(6, (60,), generator=g).repeat_interleave(4)
    topic[::4] = 7  # one query of each video is about something else
    chosen = recordings.choose_videos(torch.arange(60).repeat_interleave(4), topic)
    assert chosen == sorted(set(chosen)) and len(chosen) == 12
    assert topic[1::4][chosen].bincount().sort(descending=True).values[:4].tolist() == [3, 3, 3, 3]
    assert recordings.choose_videos(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0])) == [0, 2]  # 1 has no queries


def test_invariants_of_the_arrays(recording, splits):
    facts, arrays = recording
    shown, video = arrays["shown"], arrays["video"]
    assert all(array.dtype in (np.int8, np.int32) for array in arrays.values())
    assert arrays["similarity"].shape == (3, len(shown), len(shown))
    assert arrays["neighbours"].shape == (3, len(shown), 5)
    for name in "similarity", "teacher_similarity", "teacher_centred_similarity":
        matrices = arrays[name].reshape(-1, len(shown), len(shown))
        assert (matrices == matrices.swapaxes(1, 2)).all() and (matrices.diagonal(axis1=1, axis2=2) == 127).all()
        assert matrices.min() < 127  # not everything is alike
    for name in "neighbours", "teacher_neighbours", "teacher_centred_neighbours":
        near = arrays[name].reshape(-1, len(shown), 5)
        assert not (near == shown[:, None]).any() and near.min() >= 0 and near.max() < len(video)
        assert all(len(set(row)) == 5 for row in near.reshape(-1, 5).tolist())
    topic = recordings.topics_of(splits.val, "toy")
    assert set(video[shown]) == set(recordings.choose_videos(splits.val.queries.video, topic))
    assert set(np.flatnonzero(np.isin(video, video[shown]))) == set(shown)  # all queries of the chosen videos
    assert all(sum(numbers["neighbours"]) == pytest.approx(1) for numbers in facts["history"])


def test_a_run_nobody_watches_has_the_same_numbers(recording, root, splits, tmp_path):
    train(CONFIG, root, tmp_path / "run", quiet=True, corpora=(splits.train, splits.val))
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    for line, numbers in zip(map(json.loads, lines), recording[0]["history"][1:], strict=True):
        both = line.keys() & numbers.keys()
        assert "sum_r" in both and {key: line[key] for key in both} == {key: numbers[key] for key in both}


def test_the_first_entry_is_the_untrained_model(recording, splits):
    facts, arrays = recording
    shown = torch.from_numpy(arrays["shown"]).long()
    torch.manual_seed(CONFIG.seed)
    widths = splits.train.videos.frames.shape[2], splits.train.queries.tokens.shape[1]
    untrained = use_fast_modules(PRVRModel(CONFIG, *widths))  # as training has it
    assert evaluate(untrained, splits.val).items() <= facts["history"][0].items()
    assert (recordings.as_int8(embed(untrained, splits.val).queries[shown]) == arrays["similarity"][0]).all()
    assert (arrays["similarity"][0] != arrays["similarity"][-1]).any()  # something was learnt


def test_no_sentence_of_other_corpora(splits, recording):
    sentences = {c.sentence for c in splits.val.split.captions}
    assert set(recording[0]["sentences"].values()) <= sentences
    assert len(recording[0]["sentences"]) >= len(recording[1]["shown"])
    facts, _ = recordings.record(replace(CONFIG, dataset="other", epochs=1), splits.train, splits.val, quiet=True)
    text = json.dumps(facts)
    assert "sentences" not in facts and not any(sentence in text for sentence in sentences)


def test_files_are_small_and_hold_no_pickle(recording, tmp_path):
    path = tmp_path / "new" / "run.json"
    recordings.write_recording(path, *recording)
    facts, arrays = recordings.read_recording(path)
    assert arrays.keys() == recording[1].keys() and all((arrays[k] == v).all() for k, v in recording[1].items())
    assert facts["history"][-1]["sum_r"] == pytest.approx(recording[0]["history"][-1]["sum_r"], rel=1e-5)
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 60_000
    before = path.with_suffix(".npz").read_bytes()
    recordings.write_recording(path, *recording)
    assert path.with_suffix(".npz").read_bytes() == before  # equal content, equal file


@pytest.mark.parametrize("damage", ["json", "list", "npz", "cut", "pickle", "other npz", "no json", "no npz"])
def test_damaged_recordings(recording, tmp_path, damage):
    path, (facts, arrays) = tmp_path / "run.json", recording
    similarity = {"pickle": np.array([{"a": 1}], dtype=object), "other npz": arrays["similarity"][:1]}
    recordings.write_recording(path, facts, {**arrays, "similarity": similarity.get(damage, arrays["similarity"])})
    stored = path.with_suffix(".npz")
    if damage in ("json", "list"):
        path.write_text("{" if damage == "json" else "[]")
    if damage in ("npz", "cut"):
        stored.write_bytes(b"no zip file" if damage == "npz" else stored.read_bytes()[:-200])
    if damage.startswith("no "):
        path.with_suffix("." + damage[3:]).unlink()
    expected = "does not exist; prvr_collapse" if damage.startswith("no ") else "no recording; delete both"
    with pytest.raises(UserError, match=expected):
        recordings.read_recording(path)


def test_the_command_keeps_what_is_there_and_refuses_other_settings(root, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--root", str(root), "--out", str(out), *"--epochs 1 --hidden 16 --heads 2 --batch 8".split()]
    assert collapse_command(flags) == 0
    paths = [out / f"{name}_seed0.json" for name in recordings.RECORDED]
    assert set(out.iterdir()) == {*paths, *(path.with_suffix(".npz") for path in paths)}
    (base, base_arrays), (full, arrays) = map(recordings.read_recording, paths)
    assert not base["config"]["tcpl"] and full["config"]["tcpl"] and full["config"]["cbva"]
    assert (base_arrays["shown"] == arrays["shown"]).all()
    assert (base_arrays["similarity"][0] == arrays["similarity"][0]).all()  # the same initial weights
    times = [file.stat().st_mtime_ns for file in sorted(out.iterdir())]
    assert collapse_command(flags) == 0 and collapse_command([*flags, "--lr", "1e-3"]) == 1
    assert "made with other settings (lr)" in capsys.readouterr().err
    with pytest.raises(UserError, match="other settings.*seed.*choose another --out"):
        recordings.record_once(replace(CONFIG, seed=1, epochs=1), tmp_path / "nowhere", out / "full_seed0.json")
    assert [file.stat().st_mtime_ns for file in sorted(out.iterdir())] == times
    assert collapse_command(["--root", str(tmp_path), "--out", str(tmp_path / "new")]) == 1  # no dataset
    assert not (tmp_path / "new").exists() and "toy" in capsys.readouterr().err
