"""Experiments: what is run, what is kept, and what is computed from it."""
import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.cli import experiment_command
from prvr_nb.config import make_config, published_config
from prvr_nb.data.prepared import prepare
from prvr_nb.evaluation.embeddings import teacher_embeddings
from prvr_nb.evaluation.metrics import retrieval_metrics, retrieval_ranks
from prvr_nb.evidence import experiments, results
from prvr_nb.files import UserError

SMALL = dict(epochs=1, hidden_size=16, heads=2, batch_size=8, merge_schedule=(16, 8), dropout=0.)
FLAGS = ["--epochs", "1", "--hidden", "16", "--heads", "2", "--batch", "8", "--merge-schedule", "16,8", "--drop", "0"]


def small(**settings):
    return published_config("toy", **{**SMALL, **settings})


@pytest.fixture(scope="module")
def splits(root):
    return experiments.open_splits(root, small(), 0.25)


@pytest.fixture(scope="module")
def corpus(root):
    return prepare(root, small(), ("train",), quiet=True)[0]


@pytest.fixture(scope="module")
def ablation(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ablation"
    experiments.run_experiment("ablation", "toy", root, out, seeds=2, share=0.25, quiet=True, **SMALL)
    return out


def test_a_part_of_a_part_gives_the_batches_of_the_whole(corpus):
    part = corpus.select([9, 4, 1, 7]).select([2, 0])  # sorted or not, as it was asked for
    which = [corpus.split.videos.index(video) for video in part.split.videos]
    assert [c.video for c in part.split.captions] == [part.split.videos[v] for v in part.split.query_video]
    assert part.split.captions == [c for v in which for c in corpus.split.captions if c.video == corpus.split.videos[v]]
    for mine, theirs in zip(part.batch([1, 0]), corpus.batch(which[::-1]), strict=True):
        assert_close(mine, theirs, rtol=0, atol=0)


def test_held_out_videos_are_none_of_the_others_and_always_the_same(corpus):
    train, selection = experiments.hold_out(corpus, 0.25)
    assert len(selection.split.videos) == 5 and len(train.split.videos) == 15
    assert set(train.split.videos) | set(selection.split.videos) == set(corpus.split.videos)
    torch.manual_seed(5)
    assert experiments.hold_out(corpus, 0.25)[1].split.videos == selection.split.videos
    for share in 0., 0.05, 0.95, 1.:
        with pytest.raises(UserError, match="both need two"):
            experiments.hold_out(corpus, share)


@pytest.mark.parametrize("rate", [25, 50, 75, 100])
@pytest.mark.parametrize("start, end", [(128, 32), (40, 16), (16, 5), (8, 8)])
def test_merging_lengths_fall_by_at_most_half_and_end_where_they_should(start, end, rate):
    counts = experiments.merge_lengths(start, end, rate)
    assert counts[0] == start and counts[-1] == end
    assert all((n + 1) // 2 <= m < n for n, m in pairwise(counts))
    if rate == 75 and start == 128:
        assert counts == (128, 80, 50, 32)  # the paper's


def test_rows_differ_in_their_switches_only():
    assert published_config("toy", **experiments.ROWS["+ adaptive (full)"]) == published_config("toy")
    rows = experiments.ROWS.values()
    steps = [{k for k, v in after.items() if v != before.get(k)} for before, after in pairwise(rows)]
    assert steps == [{"tcpl"}, {"cbva"}, {"uniform_clips"}, {"adaptive"}]
    paper = published_config("toy", **experiments.CONTROLS["full, paper's variant"])
    assert (paper.cbva_similarity, paper.tcpl_average, paper.transitive_closure) == ("cosine", "off_diagonal", False)


@pytest.mark.parametrize("dataset, overrides", [("toy", {}), ("flickr", dict(merge_schedule=(40, 26, 16)))])
def test_sensitivity_changes_one_setting_and_never_repeats_the_full_method(dataset, overrides):
    full = published_config(dataset, **overrides)
    rows = experiments.EXPERIMENTS["sensitivity"](dataset, overrides)
    assert len({stem for stem, *_ in rows}) == len(rows)
    for _, _, settings in rows:
        changed = published_config(dataset, **{**overrides, **settings})
        assert changed != full
        assert {k for k, v in asdict(changed).items() if v != asdict(full)[k]} <= set(settings)
    assert set(experiments.sensitivity_settings(full)) == {name.rsplit(" = ", 1)[0] for _, name, _ in rows}


def test_an_experiment_keeps_every_row_and_seed_under_its_name(ablation):
    runs = results.read_runs(ablation)
    assert list(runs) == [*experiments.ROWS, *experiments.CONTROLS]
    assert all([run["seed"] for run in found] == [0, 1] for found in runs.values())
    assert runs["L_base, mean-pooled"][0]["val"]["video_diff_norm"] is None  # one vector per video
    for path in ablation.glob("*_seed*.json"):
        run = experiments.read_stored(path)
        assert path.name == f"{experiments.ROW_FILE_STEMS[run['row']]}_seed{run['seed']}.json"


def test_files_are_plain_small_and_without_sentences(ablation, splits):
    words = {c.sentence for c in splits.val.split.captions}
    for path in ablation.iterdir():
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
        assert path.stat().st_size < 100_000 and not any(sentence in path.read_text() for sentence in words)


def test_ranks_in_a_file_give_its_recall(ablation):
    for run in (run for found in results.read_runs(ablation).values() for run in found):
        recall = retrieval_metrics(torch.tensor(run["ranks"]))
        assert all(abs(recall[key] - run["val"][key]) < 1e-3 for key in recall)
        assert abs(results.per_query_sum_r(run["ranks"]).mean() - run["val"]["sum_r"]) < 1e-3


def test_the_epoch_is_chosen_on_held_out_videos(root, splits, tmp_path):
    config = small(seed=3, **{**experiments.BASE, "epochs": 4})
    experiments.run_once("x", config, root, tmp_path / "x.json", 0.25)
    run = experiments.read_stored(tmp_path / "x.json")
    curve = [line["sum_r"] for line in run["history"]]
    assert run["best_epoch"] == int(np.argmax(curve)) and abs(max(curve) - run["selection"]["sum_r"]) < 1e-3
    assert make_config(run["config"], "x") == config and len(run["ranks"]) == len(splits.val.split.captions)
    assert all(line["r5"] == 100 for line in run["history"]) and run["val"]["r5"] < 100  # five videos against twelve
    assert run["held_out"] == 0.25 and "spearman" in run["history"][0]


def test_untrained_rows_by_hand(splits):
    e, rows, video = teacher_embeddings(splits.val), experiments.untrained_rows(splits), splits.val.queries.video
    best = torch.einsum("qd,vld->qvl", e.queries, e.frames).amax(2)
    mean = e.queries @ F.normalize(e.frames.mean(1), dim=1).T
    for name, scores in {"zero-shot": best, "zero-shot, mean-pooled": mean}.items():
        own = scores.gather(1, video[:, None])
        assert_close(torch.tensor(rows[name]["ranks"]).double(),
                     (1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2).double())
    assert rows["zero-shot"]["ranks"] == retrieval_ranks(e, video, 0.).tolist()


def test_facts_about_queries(root, splits):
    facts, captions = experiments.describe_queries(splits.val, root, "toy"), splits.val.split.captions
    assert {len(x) for x in facts.values()} == {len(captions)}
    assert all(0 < share <= 1 for share in facts["moment_share"]) and all(n >= 1 for n in facts["moments"])
    same = [i for i, c in enumerate(captions) for d in captions if c.sentence == d.sentence and c.video != d.video]
    assert all(facts["nearest_wrong"][i] > 0.999 for i in same)  # the same sentence about another video


def test_the_command_continues_and_refuses_other_settings(root, tmp_path, capsys):
    flags = ["ablation", "--root", str(root), "--out", str(tmp_path), "--held-out", "0.25", *FLAGS]
    assert experiment_command(flags) == 0
    stored = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert len(stored) == 8 and "corpus.json" in stored
    (tmp_path / "full_seed0.json").unlink()
    assert experiment_command(flags) == 0  # only the missing run is made
    assert {p.name for p in tmp_path.glob("*.json") if p.stat().st_mtime_ns != stored[p.name]} == {"full_seed0.json"}
    assert experiment_command([*flags, "--lr", "1e-3"]) == 1 and "other settings (lr)" in capsys.readouterr().err
    assert experiment_command([*flags, "--held-out", "0.5"]) == 1 and "held out share" in capsys.readouterr().err
    for text in "{", "[]", '{"config": {}}', "":
        (tmp_path / "l_base_seed0.json").write_text(text)
        assert experiment_command(flags) == 1
        complaint = capsys.readouterr().err
        assert "l_base_seed0.json is not" in complaint and "delete it to train it again" in complaint


def test_the_command_offers_what_there_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment_command(["--help"])
    text = capsys.readouterr().out  # written down a second time, so that --help need not import PyTorch
    assert "{" + ",".join(experiments.EXPERIMENTS) + "}" in text and f"(default: {experiments.HELD_OUT})" in text
    for flag in "--seed=3", "--no-tcpl", "--pooling=mean", "--variant=paper":  # what an experiment decides itself
        with pytest.raises(SystemExit):
            experiment_command(["ablation", "--root", str(tmp_path), "--out", str(tmp_path / "out"), flag])
        assert "unrecognized arguments" in capsys.readouterr().err


def test_differences_are_paired(ablation):
    assert results.per_query_sum_r([1, 2, 6, 11, 101]).tolist() == [400, 300, 200, 100, 0]
    runs = results.read_runs(ablation)
    change = results.paired_differences(runs["L_base"], runs["+ TCPL"])
    assert_close(change.mean(1), results.values(runs["+ TCPL"]) - results.values(runs["L_base"]), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="other seeds"):
        results.paired_differences(runs["L_base"], runs["+ TCPL"][:1])


def test_bootstrap_on_cases_that_can_be_worked_out():
    video = np.array([0, 0, 1, 2])
    assert results.bootstrap(np.full((3, 4), 2.), video) == (2, 2, 2)
    only_seeds = results.bootstrap(np.array([[1.] * 4, [3.] * 4]), video)
    assert only_seeds == (2, 1, 3) and only_seeds.direction == 1
    mixed = results.bootstrap(np.array([[10., 10, -10, -10]]), video)
    assert mixed.low == -10 and mixed.high == 10 and mixed.direction == 0
    assert results.bootstrap(-np.ones((2, 4)), video).direction == -1


def test_bootstrap_is_wider_when_queries_of_a_video_move_together():
    differences = np.repeat(np.random.default_rng(0).normal(0, 10, 100), 5)[None].repeat(3, 0)
    together = results.bootstrap(differences, np.repeat(np.arange(100), 5))
    alone = results.bootstrap(differences, np.arange(500))
    assert together.high - together.low > 1.8 * (alone.high - alone.low)  # about sqrt(5)


def test_contingency_adds_up():
    table = results.contingency([1, 20, 3, 40], [2, 3, 50, 60])
    assert table == {"both": 25, "only ours": 25, "only theirs": 25, "neither": 25}


def test_groups_hold_every_known_query_once():
    rng = np.random.default_rng(0)
    numbers, ranks = rng.integers(0, 6, 200).astype(float), rng.integers(1, 30, (3, 200))
    numbers[:20] = np.nan
    groups = results.recall_by(ranks, numbers)
    assert sum(n for _, _, n, _ in groups) == 180 and all(a[1] < b[0] for a, b in pairwise(groups))
    assert_close(sum(n * r for _, _, n, r in groups) / 180, 100 * (ranks[:, 20:] <= 10).mean(1))


def test_tables_have_a_line_per_row(ablation):
    experiment = results.read_experiment(ablation)
    lines = results.results_table(experiment).splitlines()
    assert len(lines) == 2 + 3 + len(experiments.ROWS) + len(experiments.CONTROLS)
    assert lines[5].startswith("| L_base |") and lines[5].count("±") == 8
    assert lines[-2].startswith("| L_base, mean-pooled |") and "–" in lines[-2]
    one, two = (results.summary_table({name: experiment for name in names}).splitlines() for names in ("a", "ab"))
    assert all(b == a + a.split("|", 2)[2] for a, b in zip(one[2:], two[2:], strict=True))  # the same cells again
