"""Captions of one's own videos: tables that are read, splits that are written."""
import csv
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from prvr_nb.data.corpus import Problems, corpus_paths, read_lines
from prvr_nb.files import UserError, replace_file
from prvr_nb.videos.frames import VIDEO_SUFFIXES

class Row(NamedTuple):
    "One sentence about a video."
    video:str # id
    sentence:str
    start:float|None=None # seconds
    end:float|None=None # seconds

def video_id(name:str)->str: # id in the corpus
    "The id of a video: its path in its folder without the ending; '/', '#' and white space become '_'."
    name = unicodedata.normalize("NFC", name.strip()).encode("utf-8", "replace").decode()
    if Path(name).suffix.lower() in VIDEO_SUFFIXES:
        name = name[:name.rindex(".")]
    return re.sub(r"[\s#/\\]+", "_", name)

def parse_row(entry:dict)->Row: # with the video's id
    "A row of a table or of JSON lines; raises ValueError with what is wrong."
    if not all(isinstance(entry.get(name), str) and entry[name].strip() for name in ("video", "sentence")):
        raise ValueError("video or sentence is missing")
    start, end = (None if entry.get(name) in (None, "") else float(entry[name]) for name in ("start", "end"))
    if (start is None) != (end is None):
        raise ValueError("start and end belong together")
    if start is not None and not 0 <= start < end < math.inf:
        raise ValueError(f"{start}–{end} is not a stretch of time in seconds")
    sentence = entry["sentence"].encode("utf-8", "replace").decode() # JSON can spell half a character
    return Row(video_id(entry["video"]), " ".join(sentence.split()), start, end)

def content_lines(path:str|Path)->list: # its lines, without empty ones
    "What a caption file says; raises UserError when it cannot be read."
    problems = Problems()
    lines = [line.rstrip("\r") for line in read_lines(Path(path), problems) if line.strip()]
    problems.raise_if_any("captions")
    return lines

def table_rows(lines:list, needed:tuple, path:str|Path)->list: # of dict, column → text
    "Rows of a CSV or TSV file whose header has the columns that are needed; one row a line."
    delimiter = "\t" if "\t" in lines[0] else ","
    table = csv.DictReader([line + "\n" for line in lines], delimiter=delimiter, skipinitialspace=True)
    missing = [name for name in needed if name not in (table.fieldnames or [])]
    if missing:
        raise UserError(f"{path}: its first line names no column {' and no column '.join(missing)}; "
                        f"write {','.join(needed)} there")
    try:
        entries = list(table)
    except csv.Error as error:
        raise UserError(f"{path}, row {table.line_num}: {error}; mend or delete it") from None
    for entry in entries:
        if None in entry:
            raise UserError(f"{path}: the row of {entry[needed[0]]} has more columns than the first line; "
                            "put a sentence with commas into double quotes")
        open_cell = next((text for text in entry.values() if "\n" in (text or "")), None)
        if open_cell: # it may have swallowed the rows below it
            raise UserError(f"{path}: the double quote before {open_cell.splitlines()[0]:.60} is not closed in its "
                            "line; close it, and write a sentence in one line")
    return entries

def caption_entries(lines:list, path:str|Path)->list: # of dict, or of what JSON holds instead
    "What a caption file says, whichever of the three spellings it has."
    first = lines[0].split()[0]
    if "#enc#" in first:
        return [{"video": line.partition("#")[0], "sentence": line.partition(" ")[2]} for line in lines]
    if not first.startswith("{"):
        return table_rows(lines, ("video", "sentence"), path)
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: a line is not JSON ({error}); write one object a line") from None

def read_rows(path:str|Path)->list: # of Row
    "Sentences about videos, in the file's order; raises UserError with everything that is wrong."
    problems, rows = Problems(), []
    for number, entry in enumerate(caption_entries(content_lines(path), path), 1):
        try:
            rows.append(parse_row(entry))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            problems.add(f"{path}, caption {number}: {error}; mend or delete it")
    problems.raise_if_any("captions")
    return rows

def held_out(videos:Iterable, share:float, seed:int)->set: # ids for validation
    "The share of videos with the smallest seeded checksums; of four or more, both sides get at least two."
    ranked = sorted(set(videos), key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).hexdigest())
    return set(ranked[:min(max(round(share * len(ranked)), 2), max(len(ranked) - 2, 0))])

def write_split(root:str|Path, dataset:str, split:str, rows:list, infos:dict):
    "Caption file of a split, and its moments in TVR's spelling if there are any; replaces those of an earlier run."
    path, counts, lines, moments = corpus_paths(root, dataset, split).captions, Counter(), [], []
    for row in rows:
        lines.append(f"{row.video}#enc#{counts[row.video]} {row.sentence}")
        counts[row.video] += 1
        if row.start is not None:
            about = {"duration": infos[row.video]["duration"], "ts": [row.start, row.end]}
            moments.append(json.dumps({"vid_name": row.video, "desc": row.sentence, **about}))
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in (path, lines), (path.with_name(f"{dataset}_{split}_release.jsonl"), moments):
        if content:
            replace_file(target, ("\n".join(content) + "\n").encode())
        else:
            target.unlink(missing_ok=True)

def usable_rows(rows:list, ids:Iterable)->list: # of Row
    "Sentences about the videos that are there; raises UserError when there are none."
    usable = [row for row in rows if row.video in ids]
    if not usable:
        named = ", ".join(sorted({row.video for row in rows})[:3])
        raise UserError(f"no caption belongs to a video that can be used; captions name {named}, "
                        f"the videos are {', '.join(sorted(ids)[:3])}")
    return usable

def write_captions(root:str|Path, dataset:str, rows:list, infos:dict, val_share:float, seed:int)->list: # notes
    "Caption files of both splits; sentences about videos without features are left out."
    usable, lost = usable_rows(rows, infos), sorted({row.video for row in rows} - set(infos))
    videos, notes = {row.video for row in usable}, []
    val = held_out(videos, val_share, seed)
    for split in "train", "val":
        write_split(root, dataset, split, [row for row in usable if (row.video in val) == (split == "val")], infos)
    if lost:
        names = ", ".join(lost[:3]) + ", …" * (len(lost) > 3)
        notes.append(f"captions of {len(lost)} video{'s' * (len(lost) > 1)} without features left out ({names})")
    if len(videos) < 4:
        notes.append("training needs captions of at least 4 videos, two for each split")
    return notes
