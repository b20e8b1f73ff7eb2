"""A corpus of videos that are composed of captioned images: every shot is a moment with known captions."""
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prvr_nb.files import UserError
from prvr_nb.videos.captions import Row, content_lines, table_rows
from prvr_nb.videos.clip import DEFAULT_MODEL, Encoder
from prvr_nb.videos.features import Recipe, Source, check_recipe, find_files, make_corpus, state_of
from prvr_nb.videos.frames import check_regular, frame_at, reason

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF") # nothing that would start another program, like EPS

def coco_captions(content:dict)->list: # of (file name, sentence)
    "COCO's spelling: images with ids, annotations with image ids."
    files = {image["id"]: image["file_name"] for image in content["images"]}
    return [(files[note["image_id"]], note["caption"]) for note in content["annotations"]]

def read_image_captions(path:str|Path)->dict: # file name → list of sentences
    "Captions in COCO's JSON or in a table with the columns image and caption, like Flickr8k's captions.txt."
    lines, captions = content_lines(path), {}
    if lines[0].lstrip().startswith("{"):
        try:
            pairs = coco_captions(json.loads("\n".join(lines)))
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not COCO's caption file ({error!r}); "
                            "it needs images (id, file_name) and annotations (image_id, caption)") from None
    else:
        pairs = [(entry["image"], entry["caption"]) for entry in table_rows(lines, ("image", "caption"), path)]
    for name, sentence in pairs:
        if name and sentence and sentence.strip():
            captions.setdefault(name.strip(), []).append(" ".join(sentence.split()))
    return captions

def compose(files:Iterable, seed:int)->list: # per video, a list of [file, rows]
    "Shuffle images into videos of 3–6 shots of 4–12 rows; each image is used once."
    rng, left = np.random.default_rng(seed), sorted(files)
    if len(left) < 3:
        raise UserError(f"{len(left)} captioned images were found; a composed video needs at least 3, "
                        "so check that the captions name the files in the folder")
    rng.shuffle(left)
    videos = []
    while left:
        fits = [n for n in range(3, 7) if len(left) == n or len(left) >= n + 3] # leave none, or enough for another
        n = int(rng.choice(fits))
        videos.append([[str(file), int(rng.integers(4, 13))] for file in left[:n]])
        left = left[n:]
    return videos

def open_image(path:Path)->Any: # PIL image, RGB
    "An image as a viewer shows it: turned as its EXIF note says."
    from PIL import Image, ImageOps
    check_regular(path)
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        return ImageOps.exif_transpose(image).convert("RGB")

def composed_images(folder:Path, shots:list, rate:float, info:dict)->Iterator: # (PIL image, rows)
    "The shots of a composed video; an image that cannot be read is left out. `info` gets shots, duration and notes."
    info.update(shots=[], duration=0.)
    for file, rows in shots:
        try:
            image = open_image(folder/file)
        except Exception as error: # a file from anywhere can raise anything
            info.setdefault("notes", []).append(f"without {file}: {reason(error)}")
            continue
        start, info["duration"] = info["duration"], round(info["duration"] + rows / rate, 6)
        info["shots"].append({"file": file, "start": start, "end": info["duration"]})
        yield image, rows

def composed_sources(folder:str|Path, captions:dict, rate:float, seed:int)->list: # of Source
    "Composed videos out of the captioned images of a folder."
    folder, sources = Path(folder), []
    found = {path.as_posix() for path in find_files(folder, IMAGE_SUFFIXES)}
    for number, shots in enumerate(compose(found & set(captions), seed)):
        key = {"images": [[*shot, state_of(folder/shot[0])] for shot in shots], "rate": rate}
        sources.append(Source(f"composed_{number:05d}", key, partial(composed_images, folder, shots, rate)))
    return sources

def shot_rows(infos:dict, captions:dict)->list: # of Row
    "Every caption of every shot, with the shot as its moment."
    return [Row(id, sentence, shot["start"], shot["end"]) for id, info in sorted(infos.items())
            for shot in info["shots"] for sentence in captions[shot["file"]]]

def extract_images(
    folder:str|Path, # of images, searched with its subfolders
    root:str|Path, # folder that holds the datasets
    dataset:str, # name of the one to make
    captions:str|Path, # caption file
    model:str|Path|Encoder=DEFAULT_MODEL, # for load_encoder, or loaded
    **settings, # see Recipe
)->list: # report, one line each
    "A corpus of composed videos out of a folder of captioned images."
    recipe = check_recipe(Recipe(folder, root, dataset, **settings))
    sentences = read_image_captions(captions)
    sources = composed_sources(folder, sentences, recipe.rate, recipe.seed)
    return make_corpus(recipe, sources, partial(shot_rows, captions=sentences), model)

def picture_at(manifest:dict, video:str, seconds:float)->Any: # PIL image, RGB
    "What a video of a dataset shows at a time."
    entry, folder = manifest["videos"][video], Path(manifest["folder"])
    if "file" in entry:
        return frame_at(folder/entry["file"], seconds)
    shots = [shot for shot in entry["shots"] if shot["start"] <= seconds]
    return open_image(folder/shots[-1]["file"])
