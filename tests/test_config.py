"""The configuration: what is refused, the published values, the paper's schedule, files of today and of before."""
import json
import math
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from prvr_nb.config import (
    PAPER,
    PUBLISHED,
    RENAMED,
    Config,
    differences,
    make_config,
    next_length,
    paper_schedule,
    published_config,
    read_config,
    schedule_problems,
)
from prvr_nb.files import UserError, write_json

RANGED = [(f.name, f.metadata[side], step) for f in fields(Config) for side, step in (("minimum", -1), ("maximum", 1))
          if type(f.default) in (int, float) and math.isfinite(f.metadata[side])]


@pytest.mark.parametrize("name, limit, step", RANGED)
def test_a_range_ends_where_its_field_says(name, limit, step):
    kind = type(getattr(Config(), name))
    beyond = limit + step if kind is int else limit + step * max(1e-13, abs(limit) * 1e-6)
    with pytest.raises(UserError, match=rf"\b{name} is .* must be"):
        Config(**{name: kind(beyond)})
    assert getattr(Config(**{name: limit}, **({"heads": 1} if name == "hidden_size" else {})), name) == limit


def test_every_number_has_a_lower_limit():
    assert {name for name, _, step in RANGED if step < 0} == {f.name for f in fields(Config)
                                                               if type(f.default) in (int, float)}


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_a_value_of_the_wrong_kind_is_named(name):
    for value in None, object(), {}, "seven":
        if not (isinstance(getattr(Config(), name), str) and isinstance(value, str)):
            with pytest.raises(UserError, match=rf"\b{name} is .* must be"):
                Config(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("lr", math.nan), ("lr", math.inf), ("lr", "0.1"), ("epochs", 2.5), ("heads", True), ("tcpl", 1),
    ("variant", "mine"), ("merge_schedule", "128,80"), ("merge_schedule", 128), ("merge_schedule", (128, 80.5)),
    ("merge_schedule", (128, 32)), ("merge_schedule", ()), ("merge_schedule", (32, 40)), ("segment_levels", (32, 8)),
    ("segment_levels", (20, 0)), ("dataset", ""), ("dataset", "a/b"), ("dataset", ".."), ("pooling", "mean")])
def test_values_as_a_hand_edited_file_may_hold_them(name, value):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        Config(**{name: value})


def test_everything_wrong_is_said_at_once():
    wrong = dict(lr=-1., margin=-1., precision="fp8", hidden_size=30, merge_schedule=(128, 32), epochs="many")
    with pytest.raises(UserError) as caught:
        Config(**wrong)
    assert all(name in str(caught.value) for name in wrong) and "not a multiple of heads = 4" in str(caught.value)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="somewhere: no setting is called margn, taw; .*margin"):
        make_config({"margn": 1, "taw": 2, "tau": 0.5}, "somewhere")
    with pytest.raises(UserError, match="margn"):
        published_config("tvr", margn=0.5)
    for value in [1, 2], 3, None:
        with pytest.raises(UserError, match="somewhere"):
            make_config(value, "somewhere")


def test_published_values():
    rows = {"tvr": (3e-4, 0.1, 0.20, 0.09, 0.05, 0.04, 0.80),
            "activitynet": (2.5e-4, 0.2, 0.31, 0.6, 0.02, 0.04, 0.80),
            "charades": (2e-4, 0.2, 0.25, 0.6, 0.02, 0.04, 0.85),
            "qvhighlight": (2.5e-4, 0.2, 0.31, 0.6, 0.02, 0.04, 0.70)}
    shared = dict(batch_size=128, epochs=100, patience=10, seed=9527, hidden_size=384, heads=4, weight_decay=0.01,
                  warmup_ratio=0.01, lambda_distance=15, lambda_angle=30, lambda_cbva=0.1, clip_score_weight=0.4,
                  hard_negative_start_epoch=20, hard_pool_size=20, merge_schedule=(128, 80, 52, 32),
                  segment_levels=(32, 20, 12, 8, 5))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        c = published_config(name)
        assert (c.lr, c.margin, c.dropout, c.sft_factor, c.loss_factor_clip, c.loss_factor_frame, c.tau) == row
        assert c.dataset == name and {key: getattr(c, key) for key in shared} == shared


def test_variants_differ_in_the_seven_options():
    released, paper = published_config("tvr"), published_config("tvr", "paper")
    assert set(differences(released, paper)) == {"variant", *PAPER} and len(PAPER) == 7
    assert paper.merge_schedule == (128, 80, 50, 32) and paper.levels == (32, 20, 12, 8, 6, 5)
    assert published_config("tvr", "paper", transitive_closure=True).transitive_closure # one's own value wins


def test_a_configuration_is_frozen_and_survives_a_file(tmp_path):
    config, path = published_config("charades", "paper", tau=0.6), tmp_path / "config.json"
    with pytest.raises(FrozenInstanceError):
        config.tau = 0.1
    write_json(path, asdict(config))
    assert read_config(path) == config
    earlier = {new: old for old, new in RENAMED.items()}
    write_json(path, {earlier.get(name, name): value for name, value in asdict(config).items()})
    assert read_config(path) == config


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="does not exist"):
        read_config(path)
    for text, part in (('{"lr": 0.1,', "is not JSON"), ("[1]", "names with values"), ('{"lr": "a"}', "lr"),
                       ('{"rl": 1}', "rl")):
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            read_config(path)
    assert json.loads(path.read_text()) == {"rl": 1}


def test_schedule_problems_against_all_disjoint_pairs():
    for n in range(1, 40):
        accepted = {m for m in range(0, n + 3) if not schedule_problems("s", (n, m))}
        assert accepted == {n - k for k in range(1, n // 2 + 1)}
    assert schedule_problems("s", (7,)) == [] and schedule_problems("s", ()) and schedule_problems("s", (0,))
    assert len(schedule_problems("s", (128, 32, 5))) == 2


def test_paper_schedule():
    for rate in 0., 25., 50., 75., 100.:
        for n in range(5, 200): # the largest even number that the rule allows, found by counting down
            allowed = [m for m in range(0, n + 2, 2) if m <= n - n / 2 * rate / 100 + 1]
            assert next_length(n, rate) == max(allowed[-1], 5)
    assert paper_schedule() == (128, 80, 50, 32) and paper_schedule(32, 5) == (32, 20, 12, 8, 6, 5)
    assert paper_schedule(32, 32) == (32,)
    for start, end in (64, 32), (10, 3), (10, 20):
        with pytest.raises(UserError, match=f"never {end}"):
            paper_schedule(start, end)
