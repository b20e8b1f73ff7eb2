"""The toy corpus, the models trained on it, and their comparison."""
import json
import shutil
from pathlib import Path

from accelerate import PartialState

from prvr_nb.config import published_config
from prvr_nb.data.prepared import prepare
from prvr_nb.data.toy import write_toy
from prvr_nb.evaluation.embeddings import embed, teacher_embeddings
from prvr_nb.evaluation.report import write_report
from prvr_nb.evidence.experiments import ROWS
from prvr_nb.files import UserError, hold_folder, write_json
from prvr_nb.training.checkpoints import load_checkpoint, open_checkpoint
from prvr_nb.training.loop import train
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.index import MANIFEST, build_index
from prvr_nb.videos.search import open_searchers


RUNS = {"baseline": ROWS["L_base"], "full": ROWS["+ adaptive (full)"]}


def fresh_folder(
    out:Path, # folder of an older demo, or nothing
)->Path: # without an older demo's results
    "A folder for a demo; what is not a demo's is not touched."
    if out.exists() and any(out.iterdir()) and not (out/"demo.json").exists():
        raise UserError(f"{out} holds something that is not a demo; choose another --out")
    for name in RUNS: shutil.rmtree(out/name, ignore_errors=True)
    for name in "metrics.json", "report.html": (out/name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out/"demo.json", {"runs": list(RUNS)})
    return out


def run_demo(
    root:str|Path, # folder that holds the collections; 'toy' is written into it
    out:str|Path, # folder for runs, metrics.json and report.html
    quiet:bool=False, # no progress bars
    n_train:int=320, # training videos of the toy corpus
    n_val:int=200, # its validation videos
    **overrides, # settings for both runs
)->list: # rows: zero-shot teacher, baseline, full
    "Toy corpus → baseline and full method → one table and one page."
    configs = {name: published_config("toy", **{**switches, **overrides}) for name, switches in RUNS.items()} # a mistake ends here
    out, rows, histories, embeddings = fresh_folder(Path(out)), [], {}, {}
    write_toy(root, n_train, n_val)
    for name, config in configs.items():
        corpora = prepare(root, config, quiet=quiet)
        *zero, row = train(config, root, out/name, quiet, corpora)
        rows += [row] if rows else [*zero, row]
        histories[name] = [json.loads(line) for line in (out/name/"history.jsonl").read_text(encoding="utf-8").splitlines()]
        embeddings[name] = embed(load_checkpoint(out/name/"best.safetensors"), corpora[1], PartialState().device)
    write_json(out/"metrics.json", {"rows": rows, "split": "val"})
    embeddings = {"teacher": teacher_embeddings(corpora[1]), **embeddings}
    write_report(out/"report.html", rows, histories, embeddings, corpora[1], root, "toy")
    return rows


QUICK_RUNS = dict(epochs=8, lr=3e-4, dropout=0., merge_schedule=(24, 16, 12)) # what a demo of seconds can afford

N_TRAIN, N_VAL = 320, 200 # videos of its corpus; the second ones are indexed

def demo_corpus(
    folder:Path, # of the demo, held
):
    "The toy corpus of a demo; what another demo left is removed, what is not a demo's is not touched."
    mark, about = folder/"demo.json", {"runs": {name: {**switches, **QUICK_RUNS} for name, switches in RUNS.items()}, "videos": [N_TRAIN, N_VAL]}
    about = json.loads(json.dumps(about))
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == about: return
    if not mark.exists() and any(path.name != ".lock" for path in folder.iterdir()): raise UserError(f"{folder} holds something that is not a demo; choose another folder")
    for name in "data", "zero-shot", *RUNS: shutil.rmtree(folder/name, ignore_errors=True)
    write_json(mark, {})
    write_toy(folder/"data", N_TRAIN, N_VAL)
    write_json(mark, about)

def demo_index(
    folder:Path, # of the demo, held
    name:str, # of a run, or 'zero-shot'
    quiet:bool, # no progress bars
)->Path: # of the index
    "Train a model and index the videos, as far as that has not been done."
    run, index = folder/name, folder/name/"index"
    if (index/MANIFEST).exists(): return index
    embedder = Embedder(None, published_config("toy", **QUICK_RUNS))
    if name in RUNS:
        train(published_config("toy", **{**RUNS[name], **QUICK_RUNS}), folder/"data", run, quiet, resume=True)
        embedder = Embedder(open_checkpoint(run)[0])
    build_index(index, embedder, folder/"data", "toy", "val", checkpoint=run if name in RUNS else None, quiet=quiet)
    return index


DEMO = {"full method": "full", "baseline": "baseline", "zero-shot CLIP": "zero-shot"} # columns of the demo's panel and their folders

def demo_indexes(
    folder:str|Path, # to make, or of an earlier demo
    quiet:bool=True, # no progress bars
)->dict: # name of a method → folder of its index
    "Toy corpus, baseline, full method and their indexes; what is there is used."
    folder = Path(folder)
    with hold_folder(folder, "being prepared by another process; wait for it", "folder"):
        demo_corpus(folder)
        return {title: demo_index(folder, name, quiet) for title, name in DEMO.items()}

def demo_searchers(
    folder:str|Path, # to make, or of an earlier demo
    quiet:bool=True, # no progress bars
)->dict: # name of a method → Searcher
    "Searchers for the panel without any data: three methods on the toy corpus, trained for seconds."
    return open_searchers(demo_indexes(folder, quiet))
