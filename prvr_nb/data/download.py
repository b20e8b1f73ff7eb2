"""Fetch the authors' feature packs."""
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from prvr_nb.files import UserError

# The authors' feature packs: Google Drive file ids.
PACKS = {
    "tvr": "1noQ5XkefygBr9Yq4b5E3AJ0b2wpCdPCI",
    "activitynet": "1WAhc_HUkapy6pAU3QywLHQX0hQ5KX9E3",
    "charades": "1GxedM5ycq9X__HlFdCwgBe6pNDnaN8T9",
    "qvhighlight": "1H6wtB2pkco4jtRy1gnn-PcfVyZDmojzQ",
}


def fetch(
    url: str,  # of an archive
    path: Path,  # where it should lie
) -> Path:  # the archive, whole
    "Download a file; what a broken download left is continued, and the final name is given only to a whole file."
    try:
        import gdown
    except ImportError:
        raise UserError("downloading needs gdown; run: pip install 'prvr_nb[download]'") from None
    try:
        return Path(gdown.download(url, str(path), resume=True))
    except Exception as error:
        raise UserError(f"{url} could not be fetched ({error}); run the command again to continue, "
                        "or use the links in data/README.md") from None


def archive_format(path: Path) -> str:
    "'zip' or 'tar', by the file's content."
    if zipfile.is_zipfile(path):
        return "zip"
    if tarfile.is_tarfile(path):
        return "tar"
    raise UserError(f"{path} is neither a zip nor a tar archive (a web page instead of the file?); download it again")


def unpack(
    archive: Path,  # holds a folder with TextData and FeatureData
    kind: str,  # 'zip' or 'tar'
    target: Path,  # the dataset's folder to make
) -> Path:  # the same folder
    "Unpack a feature pack beside its place and move it there when it is complete."
    safe = {"filter": "data"} if kind == "tar" else {}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
        try:
            shutil.unpack_archive(archive, folder, kind, **safe)
        except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, tarfile.TarError, zipfile.BadZipFile,
                zlib.error) as error:
            raise UserError(f"{archive} cannot be unpacked ({error}); free some space, "
                            "or delete it and download again") from None
        inside = next((p.parent for p in sorted(Path(folder).rglob("TextData"))), None)
        if inside is None:
            raise UserError(f"{archive} holds no folder TextData; it is not a feature pack, "
                            "see data/README.md for the layout")
        inside.rename(target)
    return target


def download(
    name: str,  # a key of PACKS
    root: str | Path,  # folder that holds the datasets
    url: str | None = None,  # another place to fetch the archive from
) -> Path:  # the dataset's folder
    "Fetch and unpack one of the authors' feature packs; run again, it continues where it stopped."
    if name not in PACKS:
        raise UserError(f"no feature pack is called {name}; choose one of {', '.join(PACKS)}")
    if url == "":
        raise UserError("--url is empty; name an address, or leave it out for the authors' pack")
    root = Path(root)
    if (root / name).exists():
        raise UserError(f"{root / name} exists already; remove it to download again, "
                        f"or run: prvr_data check {name} --root {root}")
    root.mkdir(parents=True, exist_ok=True)
    url = url or f"https://drive.google.com/uc?id={PACKS[name]}"
    archive = fetch(url, root / f"{name}-{zlib.crc32(url.encode()):08x}.archive")  # each address has a file of its own
    try:
        kind = archive_format(archive)
    except UserError:
        archive.unlink()  # useless: the next attempt begins anew
        raise
    target = unpack(archive, kind, root / name)
    archive.unlink()
    return target
