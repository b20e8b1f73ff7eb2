"""The commands as a user runs them: flags, help, messages, exit codes, files."""
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

from prvr_nb import cli
from prvr_nb.cli import data_command, demo_command, eval_command, train_command
from prvr_nb.commands import say
from prvr_nb.config import Config, published_config
from prvr_nb.data.corpus import corpus_paths
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import to_released
from prvr_nb.videos.moments import FRACTION

ROW_KEYS = {"name", "r1", "r5", "r10", "r100", "sum_r", "mrr", "median_rank", "spearman",
            *(f"{side}_{name}" for side in ("text", "video") for name in ("intra", "total", "diff_norm"))}
SMALL = ["--epochs", "1", "--hidden-size", "16", "--heads", "2", "--batch-size", "8", "--merge-schedule", "16,8",
         "--dropout", "0"]
COMMANDS = [name for name in vars(cli) if name.endswith("_command")]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    assert train_command(["--dataset", "toy", "--root", str(root), "--out", str(out), *SMALL]) == 0
    return out


def failed(capsys, status):
    "The message of a command that ended with exit status 1."
    message = capsys.readouterr().err
    assert status == 1 and "\nprvr_" in "\n" + message and "Traceback" not in message
    return message


def copy_corpus(root, target, name, splits=("train", "val")):
    for split in splits:
        for old, new in zip(corpus_paths(root, "toy", split), corpus_paths(target, name, split), strict=True):
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, new)


# help

def test_help_waits_for_nothing_heavy():
    code = f"""
import sys
from prvr_nb import cli
for name in {COMMANDS}:
    try: getattr(cli, name)(["--help"])
    except SystemExit as end: assert end.code == 0, name
heavy = {{"torch", "transformers", "accelerate", "h5py", "av", "PIL", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert len(COMMANDS) == 10 and FRACTION == cli.FRACTION


def test_former_names_of_flags_are_understood_and_not_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        train_command(["--help"])
    shown = set(capsys.readouterr().out.replace(",", " ").split())
    assert stop.value.code == 0
    settings = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)}
    assert settings | {"--root", "--out", "--no-tcpl"} <= shown
    former = {"--batch": "7", "--hidden": "8", "--drop": "0.5", "--hard-negative-epoch": "1", "--lambda-e": "2",
              "--lambda-a": "3", "--warmup": "0.5", "--clip-weight": "0.25", "--no-omega-closure": None}
    assert not set(former) & shown
    given = [word for pair in former.items() for word in pair if word]
    assert train_command(["--root", "nowhere", "--out", "nowhere", *given]) == 1
    config = json.loads(capsys.readouterr().out)
    new = "batch_size hidden_size dropout hard_negative_start_epoch lambda_distance lambda_angle warmup_ratio"
    assert [config[name] for name in new.split()] == [7, 8, 0.5, 1, 2, 3, 0.5]
    assert config["clip_score_weight"] == 0.25 and config["transitive_closure"] is False


@pytest.mark.parametrize("command, flags, words", [
    (demo_command, ["--dataset=toy"], "unrecognized arguments"),
    (demo_command, ["--no-tcpl"], "unrecognized arguments"),
    (train_command, ["--checkpoint-seconds=nan"], "not a number of seconds"),
    (train_command, ["--checkpoint-seconds=-1"], "not a number of seconds"),
    (cli.bench_command, ["--budget=inf"], "not a number of seconds"),
    (train_command, ["--merge-schedule=16;8"], "not a list of whole numbers")])
def test_flags_that_argparse_refuses(command, flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--root", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_what_is_printed_cannot_steer_the_terminal(capsys, tmp_path):
    say("a\tb\nc\x1b[2J\x9b1m\r\x07é▁")
    assert capsys.readouterr().out == "a\tb\nc\ufffd[2J\ufffd1m\ufffd\ufffdé▁\n"
    name = "é\udcff\x1b[2J"  # not UTF-8
    done = subprocess.run([sys.executable, "-c", "import sys; from prvr_nb.cli import data_command as c; sys.exit(c())",
                           "check", name, "--root", str(tmp_path)],
                          capture_output=True, env={"PYTHONIOENCODING": "ascii"}, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"\x1b" not in done.stderr, done.stderr


# training and evaluation

def test_train_leaves_a_run_folder(run):
    config = json.loads((run / "config.json").read_text())
    assert config.keys() == {f.name for f in dataclasses.fields(Config)}
    assert config["hidden_size"] == 16 and config["merge_schedule"] == [16, 8]
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["zero-shot teacher", "small"]
    assert all(row.keys() == ROW_KEYS for row in rows)
    assert len((run / "history.jsonl").read_text().splitlines()) == 1
    assert (run / "best.safetensors").is_file() and not list(run.glob("*.part"))


def test_eval_repeats_the_numbers_and_overwrites_no_run(run, root, tmp_path, capsys):
    assert eval_command(["--checkpoint", str(run), "--root", str(root), "--out", str(tmp_path / "eval")]) == 0
    before = (run / "metrics.json").read_text()
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"] == json.loads(before)["rows"]
    assert "zero-shot teacher" in capsys.readouterr().out
    status = eval_command(["--checkpoint", str(run), "--root", str(root), "--out", str(run)])
    assert "holds a run" in failed(capsys, status) and (run / "metrics.json").read_text() == before


def test_eval_reads_a_released_checkpoint(root, tmp_path, capsys):
    path = tmp_path / "released.ckpt"
    torch.save({"state_dict": to_released(PRVRModel(published_config("toy"), 64, 64).state_dict())}, path)
    assert eval_command(["--checkpoint", str(path), "--root", str(root), "--dataset", "toy"]) == 0
    assert "add --dataset" in failed(capsys, eval_command(["--checkpoint", str(path), "--root", str(root)]))


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "nowhere"], ["nowheretrain.caption.txt does not exist", "data/README.md"]),
    (["--heads", "7"], ["hidden_size is 16, not a multiple of heads = 7"]),
    (["--merge-schedule", "64,20"], ["merge_schedule (64, 20): 20 cannot follow 64"]),
    (["--lr", "-1", "--drop", "2"], ["lr is -1.0", "dropout is 2.0"]),
    (["--lr", "1e39"], ["lr is 1e+39"]),
    (["--dataset", "../toy"], ["dataset is '../toy'"]),
    (["--dataset", "toy/"], ["without slashes"]),
    (["--root", "FILE"], ["toytrain.caption.txt"]),
    (["--out", "FILE"], ["is a file"]),
])
def test_mistakes_end_with_one_message_before_training(arguments, words, root, tmp_path, capsys):
    file = tmp_path / "a file"
    file.write_text("x")
    given = ["--dataset", "toy", "--root", str(root), "--out", str(tmp_path / "run"), *SMALL, *arguments]
    message = failed(capsys, train_command([str(file) if word == "FILE" else word for word in given]))
    assert all(word in message for word in words) and not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(run, root, capsys):
    before = (run / "history.jsonl").read_text()
    status = train_command(["--dataset", "toy", "--root", str(root), "--out", str(run), *SMALL])
    assert "holds a run already" in failed(capsys, status) and (run / "history.jsonl").read_text() == before


def test_resume(run, root, tmp_path, capsys):
    out = tmp_path / "run"
    new = ["--dataset", "toy", "--root", str(root), "--out", str(out), *SMALL]
    assert train_command([*new, "--resume", "--checkpoint-seconds", "0"]) == 0  # nothing is there: it starts
    table = capsys.readouterr().out.splitlines()[-2:]
    history = (out / "history.jsonl").read_text()
    assert history == (run / "history.jsonl").read_text()  # how often a state is saved makes no difference
    (out / "metrics.json").unlink()
    resume = ["--root", str(root), "--out", str(out), "--resume"]
    for _ in "evaluates once more", "finished":
        assert train_command(resume) == 0  # its settings are known, the dataset as well
        assert capsys.readouterr().out.splitlines()[-2:] == table
    assert (out / "history.jsonl").read_text() == history
    assert "other settings (lr 0.0002)" in failed(capsys, train_command([*resume, "--lr", "0.1"]))
    assert train_command([*resume, "--nonfinite", "skip"]) == 0


def test_a_dataset_that_is_not_in_the_table_trains(root, tmp_path):
    copy_corpus(root, tmp_path, "mine")
    assert train_command(["--dataset", "mine", "--root", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    # the charades row, tau 0.7, and the flag for dropout
    assert (config["lr"], config["dropout"], config["tau"]) == (2e-4, 0.0, 0.7)


def test_a_corpus_without_anything_to_correlate_gives_valid_json(tmp_path):
    for split in "train", "val":
        paths = corpus_paths(tmp_path, "two", split)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        paths.captions.write_text("\n".join(f"{split}{i}#enc#0 a sentence" for i in range(2)))
        with h5py.File(paths.video, "a") as video, h5py.File(paths.text, "a") as text:
            for i in range(2):
                video[f"{split}{i}"] = np.random.default_rng(i).normal(size=(3, 4))
                text[f"{split}{i}#enc#0"] = np.random.default_rng(i).normal(size=(2, 4))
    assert train_command(["--dataset", "two", "--root", str(tmp_path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"][-1]
    assert row["text_intra"] is None and row["text_diff_norm"] is None and row["spearman"] is None


def test_demo_replaces_a_demo_only(tmp_path, capsys):
    out = tmp_path / "demo"
    flags = ["--root", str(tmp_path / "data"), "--out", str(out), *SMALL]
    assert demo_command(flags) == 0
    before = (out / "metrics.json").read_text()
    rows = json.loads(before)["rows"]
    assert [row["name"] for row in rows] == ["zero-shot teacher", "baseline", "full"]
    assert all(row.keys() == ROW_KEYS for row in rows)
    page = (out / "report.html").read_text()
    assert page.count("<img") >= 4 and "http://" not in page and "https://" not in page
    assert "SumR" in capsys.readouterr().out
    (out / "mine.txt").write_text("kept")
    assert "heads = 7" in failed(capsys, demo_command([*flags, "--heads", "7"]))
    assert (out / "metrics.json").read_text() == before
    assert demo_command(flags) == 0 and (out / "mine.txt").read_text() == "kept"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    failed(capsys, demo_command([*flags[:2], "--out", str(tmp_path / "mine"), *SMALL]))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


# corpora

def test_data_toy_and_check(root, tmp_path, capsys):
    assert data_command(["toy", "--root", str(tmp_path)]) == 0
    assert data_command(["check", "toy", "--root", str(tmp_path)]) == 0
    assert "toy train: 320 videos" in capsys.readouterr().out
    (tmp_path / "toy" / "TextData" / "toyval.caption.txt").unlink()
    status = data_command(["check", "toy", "--root", str(tmp_path)])
    assert "toyval.caption.txt does not exist" in failed(capsys, status)
    copy_corpus(root, tmp_path, "tvr")  # a pack that differs from the authors' is no mistake
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
        httpd.handle_error = lambda *_: None  # the client hangs up
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/pack"
        httpd.shutdown()


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_download_continues_and_unpacks(kind, server, root, tmp_path, capsys):
    copy_corpus(root, tmp_path / "pack", "tvr")
    pack, archive = tmp_path / "pack" / "tvr", tmp_path / f"pack.{kind}"
    (pack / "FeatureData" / "filler.bin").write_bytes(random.Random(0).randbytes(4_000_000))  # several pieces
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(pack.rglob("*.*")):
                file.write(path, Path("folder/tvr") / path.relative_to(pack))
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(pack, "some folder/tvr")
    Unreliable.payload = archive.read_bytes()
    target = tmp_path / "data"
    command = ["download", "tvr", "--root", str(target), "--url", server]
    assert "run the command again to continue" in failed(capsys, data_command(command))
    assert not (target / "tvr").exists()
    assert data_command(command) == 0
    assert Unreliable.asked[-1] > 0  # it asked for the rest, not for everything
    for path in pack.rglob("*.*"):
        assert (target / "tvr" / path.relative_to(pack)).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in target.iterdir()) == ["tvr"]
    assert "exists already" in failed(capsys, data_command(command))


def test_download_refuses_what_is_not_a_pack(server, tmp_path, capsys):
    Unreliable.payload, Unreliable.asked = b"<html>quota exceeded</html>" * 50, [0]
    status = data_command(["download", "tvr", "--root", str(tmp_path), "--url", server])
    assert "neither a zip nor a tar archive" in failed(capsys, status)
    assert "choose one of tvr" in failed(capsys, data_command(["download", "imagenet", "--root", str(tmp_path)]))


def test_import_needs_neither_nbdev_nor_ipython():
    code = """
import importlib, pkgutil, sys
for name in 'nbdev execnb fastcore ghapi IPython ipykernel jupyterlab ipywidgets gdown'.split():
    sys.modules[name] = None
import prvr_nb
for m in pkgutil.walk_packages(prvr_nb.__path__, 'prvr_nb.'):
    if m.name != 'prvr_nb._modidx': importlib.import_module(m.name)
print(callable(prvr_nb.train))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr
