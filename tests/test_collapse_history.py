"""Recordings of a training: laws of what is kept, the same numbers as an unwatched run, files that are safe to read, repeated and refused."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.cli import collapse_command
from prvr_nb.evidence.recordings import (
    KINDS_OF_PAIRS, RECORDED, as_int8, centred_gap, choose_videos, cluster, epochs_of, nearest, neighbour_shares,
    pair_means, read_recording, record, record_once, topics_of, toy_topic, write_recording,
)
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.evaluation.collapse import collapse
from prvr_nb.evaluation.embeddings import embed
from prvr_nb.evaluation.rows import evaluate
from prvr_nb.evidence.experiments import Splits, open_splits
from prvr_nb.method.model import PRVRModel
from prvr_nb.data.toy import EVENTS, write_toy
from prvr_nb.training.loop import train

TINY = dict(seed=0, epochs=2, hidden_size=16, heads=2, batch_size=8)


def unit(*shape, seed=0, mean=0.):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean, dim=-1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_toy(folder, n_train=24, n_val=24)
    return folder


@pytest.fixture(scope="module")
def config():
    return published_config("toy", **TINY)


@pytest.fixture(scope="module")
def splits(root, config) -> Splits:
    return open_splits(root, config)


@pytest.fixture(scope="module")
def recording(config, splits):
    return record(config, splits.train, splits.val, quiet=True)


# ---------------------------------------------------------------- numbers

@pytest.mark.parametrize("seed", range(3))
def test_pair_means_and_shares_against_loops(seed):
    g = torch.Generator().manual_seed(seed)
    x, video, topic = unit(23, 5, seed=seed, mean=0.3), torch.randint(6, (23,), generator=g), torch.randint(4, (23,), generator=g)
    sums, counts, found = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))
    for i in range(23):
        for j in range(23):
            if i == j: continue
            kind = int(video[i] == video[j]), int(topic[i] == topic[j])
            sums[kind] += float(x[i] @ x[j])
            counts[kind] += 1
    assert_close(pair_means(x, video, topic), torch.from_numpy(sums / counts), rtol=1e-5, atol=1e-6)
    near = [sorted((j for j in range(23) if j != i), key=lambda j: -float(x[i] @ x[j]))[:4] for i in range(23)]
    assert nearest(x, 4).tolist() == near == nearest(x, 4, side=5).tolist()
    for i, others in enumerate(near):
        for j in others: found[int(video[i] == video[j]), int(topic[i] == topic[j])] += 1 / 92
    assert_close(neighbour_shares(torch.tensor(near), video, topic), torch.from_numpy(found))


def test_kinds_without_pairs_are_nan():
    x, one = unit(5, 3), torch.zeros(5, dtype=torch.long)
    means = pair_means(x, one, torch.arange(5))
    assert means.isnan().tolist() == [[True, True], [False, True]]
    assert len(KINDS_OF_PAIRS) == means.numel()


def test_nearest_of_few_queries():
    assert nearest(unit(3, 4)).shape == (3, 2)
    assert sorted(map(tuple, nearest(F.normalize(torch.ones(2, 4), dim=1)).tolist())) == [(0,), (1,)] # equal captions


@pytest.mark.parametrize("squared_mean", [0., 0.5, 4.])
def test_a_common_mean_cancels_in_the_centred_gap(squared_mean):
    content, video = F.normalize(F.pad(unit(40, 12, mean=0.2).double(), (0, 1)), dim=1), torch.arange(40) // 4
    intra, total, _ = collapse(content, video, 10)
    moved = content.clone()
    moved[:, -1] = squared_mean**0.5 # orthogonal to every content
    moved_intra, moved_total, _ = collapse(F.normalize(moved, dim=1), video, 10)
    assert centred_gap(moved_intra, moved_total) == pytest.approx(centred_gap(intra, total), abs=1e-12)
    assert centred_gap(1., total) == 1 and centred_gap(total, total) == 0


def test_topics():
    for topic, (name, events) in enumerate(EVENTS.items()):
        assert {toy_topic(f"a man in red {event}") for event in events} == {topic}, name
    x = F.normalize(torch.eye(3).repeat_interleave(5, 0) + 0.1 * unit(15, 3), dim=1)
    groups = cluster(x, 3)
    assert len(groups.unique()) == 3 and all(len(g.unique()) == 1 for g in groups.split(5))


def test_chosen_videos_share_topics():
    g = torch.Generator().manual_seed(1)
    video, topic = torch.arange(60).repeat_interleave(4), torch.randint(6, (60,), generator=g).repeat_interleave(4)
    topic[::4] = 7 # one query of each video is about something else
    chosen = choose_videos(video, topic)
    home = topic[1::4][chosen]
    assert chosen == sorted(set(chosen)) and len(chosen) == 12 and home.bincount().sort(descending=True).values[:4].tolist() == [3, 3, 3, 3]
    assert choose_videos(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0])) == [0, 2] # fewer topics, a video without queries


# ---------------------------------------------------------------- a recording

def test_laws_of_the_arrays(recording, splits):
    facts, arrays = recording
    shown = arrays["shown"]
    assert all(array.dtype in (np.int8, np.int32) for array in arrays.values())
    assert arrays["similarity"].shape == (TINY["epochs"] + 1, len(shown), len(shown)) and arrays["neighbours"].shape == (TINY["epochs"] + 1, len(shown), 5)
    for matrices in arrays["similarity"], arrays["teacher_similarity"][None], arrays["teacher_centred_similarity"][None]:
        assert (matrices == matrices.swapaxes(1, 2)).all() and (np.diagonal(matrices, axis1=1, axis2=2) == 127).all()
        assert matrices.min() < 127 # not everything is alike
    for name in "neighbours", "teacher_neighbours", "teacher_centred_neighbours":
        near = arrays[name].reshape(-1, len(shown), 5)
        assert not (near == shown[:, None]).any() and near.min() >= 0 and near.max() < len(splits.val.split.captions)
        assert all(len(set(row)) == 5 for row in near.reshape(-1, 5).tolist())
    assert set(arrays["video"][shown]) == set(choose_videos(splits.val.queries.video, topics_of(splits.val, "toy")))
    assert np.isin(np.flatnonzero(np.isin(arrays["video"], arrays["video"][shown])), shown).all() # all queries of the chosen videos
    for numbers in facts["history"]: assert sum(numbers["neighbours"]) == pytest.approx(1)


def test_a_run_nobody_watches_has_the_same_numbers(recording, root, config, splits, tmp_path):
    facts, arrays = recording
    train(config, root, tmp_path/"run", quiet=True, corpora=(splits.train, splits.val))
    rows = [json.loads(line) for line in (tmp_path/"run"/"history.jsonl").read_text().splitlines()]
    assert len(rows) == TINY["epochs"] == len(facts["history"]) - 1
    for row, numbers in zip(rows, facts["history"][1:]):
        assert {key: row[key] for key in numbers.keys() & row.keys()} == {key: numbers[key] for key in numbers.keys() & row.keys()} and "sum_r" in row


def test_first_and_last_entry_are_the_models_of_epochs_of(recording, config, splits):
    facts, arrays = recording
    shown = torch.from_numpy(arrays["shown"]).long()
    first = True
    for model in epochs_of(config, splits.train, quiet=True):
        if first:
            torch.manual_seed(config.seed)
            untrained = PRVRModel(config, splits.train.videos.frames.shape[2], splits.train.queries.tokens.shape[1])
            assert all(torch.equal(a, b) for a, b in zip(untrained.state_dict().values(), model.cpu().state_dict().values()))
            assert evaluate(untrained, splits.val).items() <= facts["history"][0].items()
            assert (as_int8(embed(untrained, splits.val).queries[shown]) == arrays["similarity"][0]).all()
            first = False
    assert evaluate(model, splits.val).items() <= facts["history"][-1].items()
    x = embed(model, splits.val).queries.cpu()
    assert np.abs((x @ x.T)[shown][:, shown].numpy() - arrays["similarity"][-1] / 127).max() <= 0.5 / 127 + 1e-6
    assert (nearest(x)[shown].numpy() == arrays["neighbours"][-1]).all()
    assert (arrays["similarity"][0] != arrays["similarity"][-1]).any() # something was learnt


def test_no_sentence_of_other_corpora(config, splits, recording):
    assert set(recording[0]["sentences"].values()) <= {c.sentence for c in splits.val.split.captions} and len(recording[0]["sentences"]) >= len(recording[1]["shown"])
    facts, arrays = record(replace(config, dataset="other", epochs=1), splits.train, splits.val, quiet=True)
    assert "sentences" not in facts
    text = json.dumps(facts)
    assert not any(c.sentence in text or c.video in text for c in splits.val.split.captions)


# ---------------------------------------------------------------- files

def test_files_are_small_and_hold_no_pickle(recording, tmp_path):
    path = tmp_path/"new"/"run.json"
    write_recording(path, *recording)
    facts, arrays = read_recording(path)
    assert arrays.keys() == recording[1].keys() and all((arrays[name] == array).all() for name, array in recording[1].items())
    assert facts["history"][-1]["sum_r"] == pytest.approx(recording[0]["history"][-1]["sum_r"], rel=1e-5)
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file: assert not any(file[name].dtype.hasobject for name in file)
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 60_000 and len(list(path.parent.iterdir())) == 2
    before = path.with_suffix(".npz").read_bytes()
    write_recording(path, *recording)
    assert path.with_suffix(".npz").read_bytes() == before # equal content, equal file


def test_a_pickle_is_refused(recording, tmp_path):
    path = tmp_path/"run.json"
    write_recording(path, recording[0], {**recording[1], "similarity": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(UserError, match="no recording"): read_recording(path)


@pytest.mark.parametrize("damage", ["json", "npz", "cut", "missing json", "missing npz", "other npz", "list"])
def test_damaged_recordings(recording, tmp_path, damage):
    path = tmp_path/"run.json"
    write_recording(path, *recording)
    arrays = path.with_suffix(".npz")
    if damage == "json": path.write_text("{")
    if damage == "list": path.write_text("[]")
    if damage == "npz": arrays.write_bytes(b"no zip file")
    if damage == "cut": arrays.write_bytes(arrays.read_bytes()[:-200])
    if damage == "missing json": path.unlink()
    if damage == "missing npz": arrays.unlink()
    if damage == "other npz": np.savez_compressed(arrays, **{**recording[1], "similarity": recording[1]["similarity"][:1]})
    with pytest.raises(UserError, match="does not exist; prvr_collapse" if "missing" in damage else "no recording; delete both"): read_recording(path)


def test_what_is_there_is_kept_and_other_settings_are_refused(recording, config, tmp_path):
    path = tmp_path/"run.json"
    write_recording(path, *recording)
    before = [(file, file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())]
    record_once(config, tmp_path/"nowhere", path, quiet=True) # there is no corpus: nothing may be read
    for other in dict(lr=1e-3), dict(seed=1), dict(tcpl=False):
        with pytest.raises(UserError, match=f"other settings.*{next(iter(other))}.*choose another --out"): record_once(replace(config, **other), tmp_path/"nowhere", path)
    assert [(file, file.read_bytes(), file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())] == before


def test_command(root, tmp_path, capsys):
    flags = ["--root", str(root), "--out", str(tmp_path/"out"), "--epochs", "1", "--hidden", "16", "--heads", "2", "--batch", "8"]
    assert collapse_command(flags) == 0
    assert sorted(file.name for file in (tmp_path/"out").iterdir()) == [f"{name}_seed0.{end}" for name in RECORDED for end in ("json", "npz")]
    (_, baseline), (_, full) = ((name, read_recording(tmp_path/"out"/f"{name}_seed0.json")) for name in RECORDED)
    assert not baseline[0]["config"]["tcpl"] and full[0]["config"]["tcpl"] and full[0]["config"]["cbva"]
    assert (baseline[1]["shown"] == full[1]["shown"]).all() and (baseline[1]["similarity"][0] == full[1]["similarity"][0]).all() # the same queries, the same initial weights
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path/"out").iterdir())]
    assert collapse_command(flags) == 0 and [file.stat().st_mtime_ns for file in sorted((tmp_path/"out").iterdir())] == times # continued: nothing left to do
    capsys.readouterr()
    assert collapse_command([*flags, "--lr", "1e-3"]) == 1
    assert "made with other settings (lr)" in capsys.readouterr().err
    assert collapse_command(["--root", str(tmp_path), "--out", str(tmp_path/"new")]) == 1 # no corpus
    assert not (tmp_path/"new").exists() and "toy" in capsys.readouterr().err


def test_the_stored_recordings():
    "What the notebook shows: small, complete, both of the same queries."
    from pathlib import Path
    folder = Path(__file__).parent.parent/"runs"/"collapse_toy"
    for name, settings in RECORDED.items():
        facts, arrays = read_recording(folder/f"{name}_seed0.json")
        assert all(facts["config"][key] == value for key, value in settings.items()) and len(facts["history"]) == facts["config"]["epochs"] + 1
        assert sum((folder/f"{name}_seed0{end}").stat().st_size for end in (".json", ".npz")) < 150_000
