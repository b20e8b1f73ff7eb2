"""Caption files of videos and of images: spellings, mistakes, ids, splits, composed videos."""
import csv
import io
import json
import os
import random

import numpy as np
import pytest
from makers import ended, numbered, quarters
from PIL import Image

from prvr_nb.files import UserError
from prvr_nb.videos.captions import Row, held_out, read_rows, table_rows, video_id
from prvr_nb.videos.images import compose, open_image, read_image_captions

LAYOUT = "v0#enc#0 a man opens the fridge\nv1#enc#0 two dogs run\n"


@pytest.mark.parametrize("text", [
    LAYOUT, "video,sentence\nv0.mp4,a man opens the fridge\nv1, two dogs  run\n",
    "\ufeffvideo\tsentence\tstart\tend\r\nv0\ta man opens the fridge\t\t\r\nv1\ttwo dogs run\t\t\r\n",
    '{"video": "v0", "sentence": "a man opens the fridge"}\n\n'
    '{"video": "v1.webm", "sentence": "two dogs run", "start": null, "end": null}'])
def test_spellings_of_captions(tmp_path, text):
    (tmp_path / "captions").write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / "captions") == [Row("v0", "a man opens the fridge"), Row("v1", "two dogs run")]


@pytest.mark.parametrize("text, message", [
    ("clip,text\nv0,a dog\n", "no column video and no column sentence; write video,sentence there"),
    ("video,sentence\nv0,a man, who waits\n", "row of v0 has more columns.*double quotes"),
    ("video,sentence\nv0,\n", "caption 1: video or sentence is missing; mend or delete it"),
    ("video,sentence,start,end\nv0,a dog,1,\n", "caption 1: start and end belong together"),
    ("video,sentence,start,end\nv0,a dog,5,2\n", "caption 1: 5.0–2.0 is not a stretch of time"),
    ("video,sentence,start,end\nv0,a dog,one,2\n", "caption 1: could not convert"),
    ("video,sentence,start,end\nv0,a dog,nan,2\n", "caption 1: nan–2.0 is not a stretch of time"),
    ('{"video": "v0"\n', "not JSON"), ("{" + '"a": [' * 99_999, "not JSON"),
    ('{"video": "v0", "sentence": 3}\n', "caption 1: video or sentence is missing"),
    ('{"video": "v0", "sentence": "a", "start": 1' + "0" * 400 + ', "end": 3}', "caption 1: int too large"),
    ("", "is empty"),
    ('video,sentence\nv0,"a man\nv1,two dogs\nv2,a cat\n', "double quote before a man is not closed in its line"),
    ('video,sentence\nv0,"a man\nv1,two dogs"\nv2,a cat\n', "double quote before a man is not closed in its line"),
    ('video,sentence\nv0,a cat\nv1,"a man\n', "double quote before a man is not closed in its line")])
def test_captions_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "captions").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "captions")


@pytest.mark.parametrize("reader", [read_rows, read_image_captions])
def test_a_pipe_is_not_waited_for(tmp_path, reader):
    os.mkfifo(tmp_path / "captions")
    assert "is not a regular file" in str(ended(reader, tmp_path / "captions"))


def test_half_a_character_is_replaced(tmp_path):
    (tmp_path / "captions").write_text('{"video": "v\\ud800", "sentence": "a \\udfff dog"}')
    assert read_rows(tmp_path / "captions") == [Row("v?", "a ? dog")]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_that_csv_writes_is_read_back(delimiter):
    rng = random.Random(0)
    for _ in range(300):
        cells = ["".join(rng.choices('ab",\t;\'é ▁', k=rng.randint(1, 8))) for _ in range(2 * rng.randint(1, 6))]
        rows = list(zip(cells[::2], cells[1::2], strict=True))
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([("video", "sentence"), *rows])
        entries = table_rows(text.getvalue().split("\r\n")[:-1], ("video", "sentence"), "captions.csv")
        quoted = [cell if '"' in cell or delimiter in cell else cell.lstrip(" ") for cell in cells]
        assert [entry[name] for entry in entries for name in ("video", "sentence")] == quoted


def test_ids():
    assert video_id("a/My day #1.MP4") == video_id("a/My day #1") == "a_My_day_1"
    assert video_id("v_a.b.c.mkv") == "v_a.b.c" and video_id("cafe\u0301") == "caf\u00e9"


def test_split_is_a_seeded_share():
    ids = [f"v{n}" for n in range(1000)]
    assert len(held_out(ids, 0.2, 0)) == 200
    assert held_out(ids, 0.2, 0) == held_out(ids[::-1], 0.2, 0) != held_out(ids, 0.2, 1)
    sizes = [(1, 0.2), (3, 0.2), (4, 0.01), (4, 0.99), (5, 0.99)]
    assert [len(held_out(ids[:n], share, 0)) for n, share in sizes] == [0, 1, 2, 2, 3]


# images

def test_spellings_of_image_captions(tmp_path):
    pairs = [(f"sub/{n}.png", text) for n in range(3) for text in (f"picture {n}, one", f"picture {n} two .\n")]
    with (tmp_path / "captions.txt").open("w") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *((n, t.strip()) for n, t in pairs)])
    (tmp_path / "captions.json").write_text(json.dumps({
        "images": [{"id": 100 + n, "file_name": f"sub/{n}.png"} for n in range(3)],
        "annotations": [{"image_id": 100 + i // 2, "caption": text} for i, (_, text) in enumerate(pairs)]}, indent=1))
    one, other = read_image_captions(tmp_path / "captions.txt"), read_image_captions(tmp_path / "captions.json")
    assert one == other and one["sub/2.png"] == ["picture 2, one", "picture 2 two ."]
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(UserError, match="not COCO's"):
        read_image_captions(tmp_path / "wrong.json")


@pytest.mark.parametrize("n", [*range(3, 30), 500])
def test_composition_uses_every_image_once(n):
    videos = compose([f"{i}" for i in range(n)], seed=n)
    assert sorted(file for video in videos for file, _ in video) == sorted(str(i) for i in range(n))
    assert all(3 <= len(video) <= 6 for video in videos)
    assert all(4 <= rows <= 12 for video in videos for _, rows in video)
    assert videos == compose([f"{i}" for i in range(n)][::-1], seed=n)


def test_photographs_are_turned_as_their_note_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    quarters().save(tmp_path / "p.jpg", exif=exif, quality=95)
    image = open_image(tmp_path / "p.jpg")
    assert image.size == (64, 96) and int(np.argmax(image.getpixel((32, 20)))) == 0


def test_what_is_no_photograph_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in str(ended(open_image, tmp_path / "pipe.jpg"))
    numbered(3).save(tmp_path / "a.eps", format="EPS")  # opening it would start another program
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(OSError, match="cannot identify"):
        open_image(tmp_path / "a.jpg")
