"""The toy corpus, the models trained on it, and their comparison."""
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from prvr_nb.config import published_config
from prvr_nb.data.prepared import prepare
from prvr_nb.data.toy import write_toy
from prvr_nb.evaluation.embeddings import embed, teacher_embeddings
from prvr_nb.evaluation.report import write_report
from prvr_nb.evidence.experiments import ROWS
from prvr_nb.files import UserError, hold_folder, read_json, write_json
from prvr_nb.training.checkpoints import load_checkpoint, open_checkpoint
from prvr_nb.training.loop import train
from prvr_nb.training.runs import read_history
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.index import MANIFEST, build_index

RUNS = {"baseline": ROWS["L_base"], "full": ROWS["+ adaptive (full)"]}
COLUMNS = {"full method": "full", "baseline": "baseline", "zero-shot CLIP": "zero-shot"} # of the page → folders
QUICK_RUNS = dict(epochs=8, lr=3e-4, dropout=0., merge_schedule=(24, 16, 12)) # what a page's models can afford
N_TRAIN, N_VAL = 320, 200 # videos of its corpus; the second ones are indexed
MARK = "demo.json" # says that a folder is a demo's


@contextmanager
def one_thread()->Iterator:
    "Models of this size train as fast on one thread; beside other work, several would mostly wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

def check_folder(folder:Path, flag:str): # what to choose another of
    "Raise UserError for a folder that holds something else than a demo."
    if folder.exists() and not (folder/MARK).exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder} holds something that is not a demo; choose another {flag}")

def remove_results(folder:Path):
    "Remove what an older demo made; its corpus stays."
    for name in *RUNS, "zero-shot":
        shutil.rmtree(folder/name, ignore_errors=True)
    for name in "metrics.json", "report.html":
        (folder/name).unlink(missing_ok=True)

@one_thread()
def run_demo(
    root:str|Path, # folder that holds the datasets; 'toy' is written into it
    out:str|Path, # folder for runs, metrics.json and report.html
    quiet:bool=False, # no progress bars
    n_train:int=320, # training videos of the toy corpus
    n_val:int=200, # its validation videos
    **overrides, # settings for both runs
)->list: # rows: zero-shot teacher, baseline, full
    "Toy corpus → baseline and full method → one table and one page."
    configs = {name: published_config("toy", **{**row, **overrides}) for name, row in RUNS.items()} # mistakes end here
    out, rows, histories, embeddings = Path(out), [], {}, {}
    check_folder(out, "--out")
    write_toy(root, n_train, n_val) # only when it is complete do older results go
    out.mkdir(parents=True, exist_ok=True)
    write_json(out/MARK, {"runs": list(RUNS)})
    remove_results(out)
    for name, config in configs.items():
        corpora = prepare(root, config, quiet=quiet)
        *zero, row = train(config, root, out/name, quiet, corpora)
        rows += [row] if rows else [*zero, row]
        histories[name] = read_history(out/name)
        embeddings[name] = embed(load_checkpoint(out/name/"best.safetensors"), corpora[1], PartialState().device)
    write_json(out/"metrics.json", {"rows": rows, "split": "val"})
    embeddings = {"teacher": teacher_embeddings(corpora[1]), **embeddings}
    write_report(out/"report.html", rows, histories, embeddings, corpora[1], root, "toy")
    return rows


def demo_corpus(folder:Path): # of the demo, held
    "The toy corpus of a page's demo, made again where the settings have changed."
    check_folder(folder, "folder")
    settings = {"runs": {name: {**row, **QUICK_RUNS} for name, row in RUNS.items()}, "videos": [N_TRAIN, N_VAL]}
    settings = json.loads(json.dumps(settings)) # lists instead of tuples
    mark = folder/MARK
    if mark.exists() and read_json(mark, f"delete {folder}") == settings:
        return
    write_json(mark, {}) # a demo's, but not finished
    write_toy(folder/"data", N_TRAIN, N_VAL)
    remove_results(folder)
    write_json(mark, settings)

def demo_index(folder:Path, name:str, quiet:bool)->Path: # of the demo, held; of a run, or 'zero-shot'
    "Train a model and index the videos, as far as that has not been done."
    run, index = folder/name if name in RUNS else None, folder/name/"index"
    if (index/MANIFEST).exists():
        return index
    embedder = Embedder(None, published_config("toy", **QUICK_RUNS))
    if run:
        train(published_config("toy", **RUNS[name], **QUICK_RUNS), folder/"data", run, quiet, resume=True)
        embedder = Embedder(open_checkpoint(run)[0])
    build_index(index, embedder, folder/"data", "toy", "val", checkpoint=run, quiet=quiet)
    return index

@one_thread()
def demo_indexes(folder:str|Path, quiet:bool=True)->dict: # name of a method → folder of its index
    "Toy corpus, baseline, full method and their indexes; what is there is used, the rest is made."
    folder = Path(folder)
    with hold_folder(folder, "being prepared by another process; wait for it", "folder"):
        demo_corpus(folder)
        return {title: demo_index(folder, name, quiet) for title, name in COLUMNS.items()}
