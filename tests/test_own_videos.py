"""A user's own folder, from video files to an answer: the README's commands in their order, each in a process."""
import configparser
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from makers import write_tiny_clip, write_video
from PIL import Image, ImageDraw

from prvr_nb import cli
from prvr_nb.config import read_config
from prvr_nb.data.corpus import check_corpus, corpus_paths, read_moments
from prvr_nb.videos.clip import encode_text, load_encoder
from prvr_nb.videos.index import VideoIndex
from prvr_nb.videos.search import open_searcher

ROOT = Path(__file__).parent.parent
QUERY = "a man opens the fridge"
SCENES = {QUERY: ("white", "rectangle", "navy"), "a dog runs over the grass": ("green", "ellipse", "brown"),
          "red, then orange: the sun sets": ("darkred", "ellipse", "orange"),
          "a train crosses the bridge": ("skyblue", "rectangle", "black"),
          "she says \"hello\" to the snow": ("silver", "ellipse", "purple")}
FILES = {"kitchen.mp4": "libx264", "park walk.webm": "libvpx-vp9", "old/tape.avi": "mpeg4", "evening.mkv": "libx264",
         "train.mov": "libx265", "snow.ts": "libx264", "disc.mpg": "mpeg2video", "upright.mp4": "libx264",
         "slides.mkv": "libx264", "short.webm": "libvpx-vp9"}


def pictures(sentence, n, size):
    "A scene: a shape that moves over a background."
    ground, shape, colour = SCENES[sentence]
    for i in range(n):
        image = Image.new("RGB", size, ground)
        getattr(ImageDraw.Draw(image), shape)([i * 3, 8, i * 3 + 24, 40], fill=colour)
        yield image


def make_video(path, codec, number):
    """Two scenes of different lengths, five pictures a second; returns what is seen when.

    One file is turned, one has pictures at odd times, one is shorter than a second.
    """
    first, second = (list(SCENES)[(number + i) % len(SCENES)] for i in (0, 2))
    cut, n, size = 10 + 5 * (number % 3), 30 + 5 * number, (96, 64) if number % 2 else (64, 64)
    shown = [*pictures(first, cut, size), *pictures(second, n - cut, size)]
    if path.name.startswith("short"):
        cut, n = 3, 3
    times, rate = [i / 25 for i in range(5 * n)], 25
    if path.name.startswith("slides"):
        times, rate = [i / 5 + 0.1 * (i % 2) for i in range(n)], 10
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [shown[int(5 * t + 0.01)] for t in times], times, rate=rate, codec=codec,
                rotation=90 * path.name.startswith("upright"))
    return [(first, 0, cut / 5)] + [(second, cut / 5, n / 5)] * (n > cut)


def readme_commands():
    "The lines of the README's block about a user's own folder, and the one for a folder without captions."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```\n(.*?)```", text, re.S) if "prvr_features videos" in block)
    alone = re.search(r"Without captions, `(.*?)`", text)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line], shlex.split(alone)


def call(folder, words):
    "A console script as its entry point in settings.ini starts it, in a process of its own; its standard output."
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    scripts = dict(line.strip().split("=") for line in config["DEFAULT"]["console_scripts"].split("\n"))
    module, function = scripts[words[0]].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", code, *words[1:]], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(capsys, words):
    "The same in this process."
    assert getattr(cli, f"{words[0].removeprefix('prvr_')}_command")([str(word) for word in words[1:]]) == 0
    return capsys.readouterr().out


def answers(text):
    "What prvr_search prints for one sentence: (score, start and end in seconds, strip, title) of each video."
    def seconds(clock):
        return sum(int(part) * 60**i for i, part in enumerate(reversed(clock.split(":"))))
    row = re.compile(r" *\d+  (-?\d\.\d+)  +([\d:]+)–([\d:]+)  (\S+)  (.+)")
    rows = [row.fullmatch(line).groups() for line in text.splitlines()[1:]]
    return [(float(score), seconds(start), seconds(end), strip, title) for score, start, end, strip, title in rows]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder as a user has it: my_videos, my_captions.csv, and a CLIP that is small and untrained."
    folder = tmp_path_factory.mktemp("home")
    with open(folder / "my_captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "sentence"])
        for number, (name, codec) in enumerate(FILES.items()):
            for sentence, _, _ in make_video(folder / "my_videos" / name, codec, number):
                rows.writerow([name, sentence])
    write_tiny_clip(folder / "clip", SCENES)
    return folder


@pytest.fixture(scope="module")
def answered(home):
    "What the four commands of the README print, of which only the model and the size of the training are changed."
    commands, _ = readme_commands()
    small = "--epochs 2 --batch-size 4 --hidden-size 32 --heads 2 --merge-schedule 32,16 --segment-levels 16,8".split()
    extra = {"prvr_features": ["--model", str(home / "clip")], "prvr_train": small}
    return [call(home, [*words, *extra.get(words[0], [])]) for words in commands]


def test_the_readme_goes_from_features_to_training_to_search():
    commands, alone = readme_commands()
    assert [words[0] for words in commands] == ["prvr_features", "prvr_train", "prvr_search", "prvr_search"]
    assert [words[1] for words in (*commands[2:], alone)] == ["build", "--index", "build"] and commands[3][-1] == QUERY


def test_ten_videos_become_a_corpus(home, answered):
    check_corpus(home / "data", "mine")  # raises with everything that is missing
    paths = corpus_paths(home / "data", "mine")
    ids = {re.sub(r"[ /]", "_", name.rsplit(".", 1)[0]): number for number, name in enumerate(FILES)}
    with h5py.File(paths.video) as video, h5py.File(paths.text) as text:
        assert set(video) == set(ids) == {key.partition("#")[0] for key in text}
        rows = {id: video[id][:] for id in ids}
    for id, number in ids.items():
        assert len(rows[id]) == (1 if id == "short" else 6 + number)  # a row for each second that has begun
        assert id == "short" or np.ptp(rows[id], axis=0).max() > 0.01  # which differ
    captions = [corpus_paths(home / "data", "mine", split).captions.read_text() for split in ("train", "val")]
    sizes = [len(text.splitlines()) for text in captions]
    assert sum(sizes) == 19 and min(sizes) >= 2 and "10 videos" in answered[0]


def test_training_leaves_a_run(home, answered):
    run = home / "runs" / "mine"
    assert {"config.json", "history.jsonl", "metrics.json", "best.safetensors"} <= {path.name for path in run.iterdir()}
    assert read_config(run / "config.json").dataset == "mine"
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["zero-shot teacher", "mine"]


def test_the_answer_lists_videos_with_moments_inside_them(home, answered):
    index = VideoIndex(home / "runs" / "mine" / "index")
    durations = {entry.title: entry.duration for entry in index.entries}
    assert set(durations) == set(FILES) and answered[3].splitlines()[0] == QUERY
    found = answers(answered[3])
    assert len({title for *_, title in found}) == 5
    assert [row[0] for row in found] == sorted((row[0] for row in found), reverse=True)
    for _, start, end, strip, title in found:
        assert 0 <= start < end < durations[title] + 1  # times are rounded to whole seconds
        assert re.fullmatch(r"[▁-█]*\[[▁-█]+\][▁-█]*", strip)


def test_terminal_json_and_python_agree(home, answered, capsys):
    folder = home / "runs" / "mine" / "index"
    printed, = json.loads(said(capsys, ["prvr_search", "--index", folder, QUERY, "--json", "--k", "10"]))
    hits, = open_searcher(folder).search([QUERY], 10)
    assert printed["query"] == QUERY and [row["id"] for row in printed["results"]] == [hit.id for hit in hits]
    assert len(hits) == 10 and [title for *_, title in answers(answered[3])] == [hit.title for hit in hits[:5]]
    for row, hit in zip(printed["results"], hits, strict=True):
        assert row["title"] == hit.title and row["score"] == pytest.approx(hit.score, abs=1e-5)
        assert row["relevance"] == pytest.approx(hit.curve.tolist(), abs=1e-4)
        times = row["seconds"]
        assert list(times.values()) == pytest.approx(hit.seconds, abs=1e-3)
        assert 0 <= times["start"] <= times["peak"] <= times["end"] <= row["duration"]


def test_without_captions_clip_alone_searches(home, tmp_path, monkeypatch, capsys):
    "The best frame of each video, and its second, are those that a loop over the stored rows finds."
    commands, build = readme_commands()
    made = tmp_path / "data"
    words = [word for word in commands[0] if word not in ("--captions", "my_captions.csv")]
    monkeypatch.chdir(home)
    said(capsys, [*words, "--model", home / "clip", "--root", made])
    assert not read_moments(made, "mine", "val") and not corpus_paths(made, "mine").captions.exists()
    build = [{"data": made, "runs/mine_index": tmp_path / "index"}.get(word, word) for word in build]
    assert "10 videos" in said(capsys, build)
    printed, = json.loads(said(capsys, ["prvr_search", "--index", tmp_path / "index", QUERY, "--json", "--k", "10"]))
    query = encode_text([QUERY], load_encoder(home / "clip", "cpu"))[0][-1]
    with h5py.File(corpus_paths(made, "mine").video) as file:
        unit = {id: file[id][:] / np.linalg.norm(file[id][:], axis=1, keepdims=True) for id in file}
    cosines = {id: rows @ query / np.linalg.norm(query) for id, rows in unit.items()}
    best = sorted((cosine.max() for cosine in cosines.values()), reverse=True)
    assert [row["score"] for row in printed["results"]] == pytest.approx(best, abs=2e-3)
    for row in printed["results"]:
        cosine, peak = cosines[row["id"]], row["seconds"]["peak"] / row["duration"]
        assert row["score"] == pytest.approx(cosine.max(), abs=2e-3)
        assert cosine[int(peak * len(cosine))] == pytest.approx(cosine.max(), abs=2e-3)
