"""What tests share; read only, since others read it too.

Fixtures (made once in a test run):
    root        folder that holds the dataset 'toy': 20 training videos (steps of 6, 6, 6 and 2), 12 for validation
    small_run   folder of a finished run of `small_config()` on `root`: three epochs; see prvr_nb/training/runs.py

Functions (`from conftest import …`):
    small_config(**overrides)   a configuration whose epoch takes a tenth of a second
    history_of(out)             lines of a run's history.jsonl
    free_port()                 a port of this machine that nobody uses

A test that writes makes a folder of its own (`tmp_path`), or copies one of these.
"""
import json
import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1") # the sums of several threads differ in their last bits

SMALL = dict(hidden_size=16, heads=2, epochs=3, batch_size=6, merge_schedule=(16, 12, 8), segment_levels=(8, 5),
             lr=2e-3, seed=3, hard_negative_start_epoch=1)


def small_config(**overrides):
    from prvr_nb.config import published_config
    return published_config("toy", **{**SMALL, **overrides})


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    from prvr_nb.data.toy import write_toy
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, n_train=20, n_val=12)
    return folder


@pytest.fixture(scope="session")
def small_run(root, tmp_path_factory):
    from prvr_nb.training.loop import train
    out = tmp_path_factory.mktemp("runs") / "small"
    train(small_config(), root, out, quiet=True)
    return out
