"""The commands as a user runs them: flags, messages, exit codes, files."""
import dataclasses
import http.server
import json
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from prvr_nb.cli import data_command, demo_command, eval_command, train_command
from prvr_nb.config import Config, published_config
from prvr_nb.data.corpus import corpus_paths
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import to_released
from prvr_nb.data.toy import write_toy

ROW_KEYS = {"name", "r1", "r5", "r10", "r100", "sum_r", "text_intra", "text_total", "text_diff_norm", "video_intra", "video_total", "video_diff_norm", "spearman"}
SMALL = ["--epochs", "1", "--hidden", "16", "--heads", "2", "--batch", "8", "--merge-schedule", "16,8", "--drop", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, n_train=16, n_val=10)
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    assert train_command(["--dataset", "toy", "--root", str(root), "--out", str(out), *SMALL]) == 0
    return out


def test_train_leaves_a_run_folder(run):
    config = json.loads((run / "config.json").read_text())
    assert config.keys() == {f.name for f in dataclasses.fields(Config)} and config["hidden_size"] == 16 and config["merge_schedule"] == [16, 8]
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["zero-shot teacher", "small"]
    assert all(row.keys() == ROW_KEYS for row in rows)
    assert len((run / "history.jsonl").read_text().splitlines()) == 1
    assert (run / "best.safetensors").is_file() and not list(run.glob("*.part"))


def test_eval_repeats_the_numbers(run, root, tmp_path, capsys):
    assert eval_command(["--checkpoint", str(run), "--root", str(root), "--out", str(tmp_path / "eval")]) == 0
    trained = json.loads((run / "metrics.json").read_text())["rows"]
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"] == trained
    assert "zero-shot teacher" in capsys.readouterr().out


def test_eval_reads_a_released_checkpoint(root, tmp_path, capsys):
    path = tmp_path / "released.ckpt"
    torch.save({"state_dict": to_released(PRVRModel(published_config("toy"), 64, 64).state_dict())}, path)
    assert eval_command(["--checkpoint", str(path), "--root", str(root), "--dataset", "toy"]) == 0
    assert eval_command(["--checkpoint", str(path), "--root", str(root)]) == 1
    assert "add --dataset" in capsys.readouterr().err


@pytest.mark.parametrize("flag", "lr margin drop sft-factor loss-factor-clip loss-factor-frame tau epochs batch hidden heads seed hard-negative-epoch lambda-e lambda-a "
                                 "lambda-cbva variant no-tcpl no-cbva no-adaptive uniform-clips dataset root out".split())
def test_train_has_the_flag(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        train_command(["--help"])
    assert stop.value.code == 0 and f"--{flag}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "nowhere"], ["nowheretrain.caption.txt does not exist", "data/README.md"]),
    (["--dataset", "toy", "--heads", "7"], ["hidden is 64, not a multiple of heads = 7"]),
    (["--dataset", "toy", "--merge-schedule", "64,20"], ["merge_schedule (64, 20): 20 cannot follow 64"]),
    (["--dataset", "toy", "--lr", "-1", "--drop", "2"], ["lr is -1.0", "dropout is 2.0"]),
])
def test_mistakes_end_with_one_message_before_training(arguments, words, root, tmp_path, capsys):
    assert train_command([*arguments, "--root", str(root), "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("prvr_train: ") and all(word in message for word in words)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(run, root, capsys):
    before = (run / "history.jsonl").read_text()
    assert train_command(["--dataset", "toy", "--root", str(root), "--out", str(run), *SMALL]) == 1
    assert "holds a run already" in capsys.readouterr().err and (run / "history.jsonl").read_text() == before


def test_resume(run, root, tmp_path, capsys):
    new = ["--dataset", "toy", "--root", str(root), "--out", str(tmp_path / "run"), *SMALL]
    assert train_command([*new, "--resume", "--checkpoint-seconds", "0"]) == 0  # nothing is there: it starts
    table = capsys.readouterr().out.splitlines()[-2:]
    history = (tmp_path / "run" / "history.jsonl").read_text()
    assert history == (run / "history.jsonl").read_text()  # how often a state is saved makes no difference
    (tmp_path / "run" / "metrics.json").unlink()
    resume = ["--root", str(root), "--out", str(tmp_path / "run"), "--resume"]
    for _ in "evaluates once more", "finished":
        assert train_command(resume) == 0  # its settings are known, the dataset as well
        assert capsys.readouterr().out.splitlines()[-2:] == table
    assert (tmp_path / "run" / "history.jsonl").read_text() == history
    assert train_command([*resume, "--lr", "0.1"]) == 1 and "other settings (lr 0.0002)" in capsys.readouterr().err
    assert train_command([*resume, "--nonfinite", "skip"]) == 0


def test_a_collection_that_is_not_in_the_table_trains(root, tmp_path):
    for old, new in zip([*corpus_paths(root, "toy", "train"), corpus_paths(root, "toy", "val").captions], [*corpus_paths(tmp_path, "mine", "train"), corpus_paths(tmp_path, "mine", "val").captions]):
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(old.read_bytes())
    assert train_command(["--dataset", "mine", "--root", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["lr"], config["dropout"], config["tau"]) == (2e-4, 0.0, 0.7)  # the charades row, tau 0.7, and the flag for drop


def test_demo(root, tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--root", str(tmp_path / "data"), "--out", str(out), *SMALL]
    assert demo_command(flags) == 0
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["zero-shot teacher", "baseline", "full"] and all(row.keys() == ROW_KEYS for row in rows)
    page = (out / "report.html").read_text()
    assert page.count("<img") >= 4 and "http://" not in page and "https://" not in page
    assert "SumR" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert demo_command(["--root", str(tmp_path / "data"), "--out", str(tmp_path / "mine"), *SMALL]) == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_data_toy_and_check(tmp_path, capsys):
    assert data_command(["toy", "--root", str(tmp_path)]) == 0
    assert data_command(["check", "toy", "--root", str(tmp_path)]) == 0
    assert "toy train: 320 videos" in capsys.readouterr().out
    (tmp_path / "toy" / "TextData" / "toyval.caption.txt").unlink()
    assert data_command(["check", "toy", "--root", str(tmp_path)]) == 1
    assert "toyval.caption.txt does not exist" in capsys.readouterr().err


def test_check_warns_where_a_pack_differs_and_does_not_refuse(root, tmp_path, capsys):
    for split in "train", "val":
        for old, new in zip(corpus_paths(root, "toy", split), corpus_paths(tmp_path, "tvr", split)):
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(old.read_bytes())
    assert data_command(["check", "tvr", "--root", str(tmp_path)]) == 0
    assert "warning: the authors' pack has 17435 videos and 87175 queries" in capsys.readouterr().out


class Unreliable(http.server.BaseHTTPRequestHandler):
    "Serves one file with ranges; breaks off in the middle of the first answer."
    payload, asked = b"", []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.asked.append(start)
        body = self.payload[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.payload) - 1}/{len(self.payload)}")
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if len(self.asked) == 1 else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Unreliable.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/pack"
        httpd.shutdown()


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_download_continues_and_unpacks(kind, server, root, tmp_path, capsys):
    shutil.rmtree(root / "toy" / ".prepared", ignore_errors=True)
    archive, filler = tmp_path / f"pack.{kind}", root / "toy" / "FeatureData" / "filler.bin"
    filler.write_bytes(random.Random(0).randbytes(4_000_000))  # several of the pieces in which files arrive
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted((root / "toy").rglob("*.*")):
                file.write(path, Path("some folder/tvr") / path.relative_to(root / "toy"))
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(root / "toy", "some folder/tvr")
    Unreliable.payload = archive.read_bytes()
    target = tmp_path / "data"
    command = ["download", "tvr", "--root", str(target), "--url", server]
    assert data_command(command) == 1
    assert "run the command again to continue" in capsys.readouterr().err and not (target / "tvr").exists()
    assert data_command(command) == 0
    assert Unreliable.asked[-1] > 0  # it asked for the rest, not for everything
    for path in (root / "toy").rglob("*.*"):
        assert (target / "tvr" / path.relative_to(root / "toy")).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in target.iterdir()) == ["tvr"]
    assert data_command(command) == 1 and "exists already" in capsys.readouterr().err


def test_download_refuses_what_is_not_a_pack(server, tmp_path, capsys):
    Unreliable.payload, Unreliable.asked = b"<html>quota exceeded</html>" * 50, [0]
    assert data_command(["download", "tvr", "--root", str(tmp_path), "--url", server]) == 1
    assert "neither a zip nor a tar archive" in capsys.readouterr().err
    assert data_command(["download", "imagenet", "--root", str(tmp_path)]) == 1
    assert "choose one of tvr" in capsys.readouterr().err


def test_import_needs_neither_nbdev_nor_ipython():
    code = ("import sys\nfor name in 'nbdev execnb fastcore ghapi IPython ipykernel jupyterlab ipywidgets gdown'.split(): sys.modules[name] = None\n"
            "import pkgutil, importlib, prvr_nb\n"
            "for m in pkgutil.iter_modules(prvr_nb.__path__):\n"
            "    if m.name != '_modidx': importlib.import_module('prvr_nb.' + m.name)\n"
            "print(callable(prvr_nb.train))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr


def test_demo_keeps_the_old_one_when_a_setting_is_wrong(tmp_path, capsys):
    flags = ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "demo"), *SMALL]
    assert demo_command(flags) == 0
    (tmp_path / "demo" / "mine.txt").write_text("kept")
    before = (tmp_path / "demo" / "metrics.json").read_text()
    assert demo_command([*flags, "--heads", "7"]) == 1 and "heads = 7" in capsys.readouterr().err
    assert (tmp_path / "demo" / "metrics.json").read_text() == before
    assert demo_command(flags) == 0 and (tmp_path / "demo" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("command, flag", [(demo_command, "--dataset=toy"), (demo_command, "--no-tcpl")])
def test_what_a_command_decides_itself_is_no_flag(command, flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--root", str(tmp_path), "--out", str(tmp_path / "out"), flag])
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_corpus_without_anything_to_correlate_gives_valid_json(tmp_path):
    for split in "train", "val":
        paths = corpus_paths(tmp_path, "two", split)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        paths.captions.write_text("\n".join(f"{split}{i}#enc#0 a sentence" for i in range(2)))
        with h5py.File(paths.video, "a") as video, h5py.File(paths.text, "a") as text:
            for i in range(2):
                video[f"{split}{i}"], text[f"{split}{i}#enc#0"] = np.random.default_rng(i).normal(size=(3, 4)), np.ones((2, 4))
    assert train_command(["--dataset", "two", "--root", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"][-1]
    assert row["text_intra"] is None and row["text_diff_norm"] is None and row["spearman"] is None


@pytest.mark.parametrize("arguments, words", [
    (["--lr", "1e39"], "lr is 1e+39"), (["--dataset", "../toy"], "dataset is '../toy'"), (["--dataset", "toy/"], "without slashes"), (["--root", "FILE"], "cannot be read"), (["--out", "FILE"], "is a file"),
])
def test_odd_values_are_messages(arguments, words, root, tmp_path, capsys):
    file = tmp_path / "a file"
    file.write_text("x")
    given = ["--dataset", "toy", "--root", str(root), "--out", str(tmp_path / "run"), *SMALL, *[str(file) if a == "FILE" else a for a in arguments]]
    assert train_command(given) == 1
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_eval_does_not_overwrite_a_run(run, root, capsys):
    before = (run / "metrics.json").read_text()
    assert eval_command(["--checkpoint", str(run), "--root", str(root), "--out", str(run)]) == 1
    assert "holds a run" in capsys.readouterr().err and (run / "metrics.json").read_text() == before
