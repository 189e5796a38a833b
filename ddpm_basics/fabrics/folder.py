"""The folder on disk: what is to be in it, what an earlier run left, and the work itself."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ddpm_basics.console import UserError
from ddpm_basics.fabrics.drawing import DATA_VERSION, TRADITIONS, render
from ddpm_basics.fabrics.photographs import BrokenPhotograph, find_photographs, photograph
from ddpm_basics.files import write_atomically

MANIFEST = "manifest.json"
MADE_BY = ("ddpm_basics.fabrics", "prepare_fabrics.py")  # now, and in older folders
CHUNK = 8  # images that a worker process makes between two looks at the clock


@dataclass(frozen=True)
class Picture:
    """A picture to make: where it goes in the folder, its label, and what it is made from."""

    file: str
    label: str
    source: int | Path  # the index of a drawn fabric, or a photograph


def plan_fabrics(options: argparse.Namespace) -> tuple[dict, list[Picture]]:
    """Return what tells one set of drawn fabrics from another, and its pictures."""
    settings = {
        "version": DATA_VERSION,
        "seed": options.seed,
        "split": options.split,
        "count": options.count,
        "size": options.size,
    }
    names = list(TRADITIONS)
    labels = [names[index % len(names)] for index in range(options.count)]
    return settings, [Picture(f"{x}/{i:04d}.png", x, i) for i, x in enumerate(labels)]


def plan_photographs(options: argparse.Namespace) -> tuple[dict, list[Picture]]:
    """Return what tells one set of photographs from another, and its pictures. Raises UserError."""
    folder = Path(options.photos)
    paths, others = find_photographs(folder, options.output)
    if others:
        print(f"{others} other files in {folder} are left out.")
    pictures, listing = [], hashlib.sha256()
    for index, path in enumerate(paths):
        inside = path.relative_to(folder)
        label = inside.parent.as_posix() if inside.parent != Path(".") else "photographs"
        pictures.append(Picture(f"{label}/{index:04d}.png", label, path))
        listing.update(f"{inside.as_posix()} {path.stat().st_size}\n".encode())
    settings = {
        "photos": folder.resolve().name,
        "listing": listing.hexdigest()[:16],  # of the photographs' names and lengths
        "count": len(pictures),
        "size": options.size,
    }
    return settings, pictures


def read_manifest(output: Path) -> dict | None:
    """Return the manifest that an earlier run left; None where there is none of ours."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["made_by"] not in MADE_BY:
            return None
        files = [Path(file) for file in manifest["traditions"]]
        dict(manifest.get("pixels", {})), dict(manifest.get("broken", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    safe = not any(file.is_absolute() or ".." in file.parts for file in files)
    return manifest if safe else None


def write_manifest(output: Path, settings: dict, pictures: list[Picture], **results) -> None:
    """Note what the folder holds, or is going to hold as long as its sha256 is null."""
    manifest = {"made_by": MADE_BY[0], **settings, "sha256": None, **results}
    manifest["traditions"] = {picture.file: picture.label for picture in pictures}
    with write_atomically(output / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe(manifest: dict) -> str:
    """Say in a few words what a folder holds."""
    count, size, photos, split, seed, version = (
        manifest.get(key) for key in ("count", "size", "photos", "split", "seed", "version")
    )
    what = f"{count} images of {size}x{size}"
    if photos:
        return f"{what} from the photographs in '{photos}'"
    return f"{what} ({split}, seed {seed}, version {version})"


def other_files(output: Path, manifest: dict | None) -> list[str]:
    """Return the files in the folder that this command did not write, hidden ones aside."""
    ours = {MANIFEST, *manifest["traditions"]} if manifest else set()
    inside = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    seen = [path.as_posix() for path in inside if not path.name.startswith(".")]
    return sorted(set(seen) - ours)


def claim(output: Path, settings: dict, pictures: list[Picture], force: bool) -> dict:
    """Make the folder ready; return the manifest of an earlier run that is to be completed.

    Without one, or under --force, write a new manifest and return {}. Raises UserError rather than
    touch anything that this command did not write.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose a folder with --output.")
    old = read_manifest(output)
    if old and not force:
        if all(old.get(key) == value for key, value in settings.items()):
            return old
        raise UserError(
            f"{output} holds {describe(old)}: choose another --output, or render anew with --force."
        )
    others = other_files(output, old)
    if others and not force:
        raise UserError(
            f"{output} holds files of your own, such as {others[0]}: choose another --output."
        )
    taken = sorted({MANIFEST, *(picture.file for picture in pictures)}.intersection(others))
    if taken:
        raise UserError(
            f"{output / taken[0]} is not from this command, and not even --force replaces it: "
            "move it away or choose another --output."
        )
    if old:
        remove_written(output, old)
    output.mkdir(parents=True, exist_ok=True)
    write_manifest(output, settings, pictures)
    return {}


def remove_written(output: Path, manifest: dict) -> None:
    """Remove the files that the manifest lists, then the folders that are empty without them."""
    for file in manifest["traditions"]:
        (output / file).unlink(missing_ok=True)
    remove_leftovers(output, manifest["traditions"])
    folders = {parent for file in manifest["traditions"] for parent in Path(file).parents}
    for folder in sorted(folders - {Path(".")}, reverse=True):
        if (output / folder).is_dir() and not any((output / folder).iterdir()):
            (output / folder).rmdir()


def remove_leftovers(output: Path, files) -> None:
    """Remove the temporary files of a run that was killed in the middle of writing."""
    for folder in {output, *((output / file).parent for file in files)}:
        for path in [*folder.glob(".*.tmp.png"), *folder.glob(".manifest.*.tmp.json")]:
            path.unlink(missing_ok=True)


def read_back(output: Path, pictures: list[Picture], size: int) -> tuple[dict, str]:
    """Decode what stands in the folder.

    Returns a short checksum for each whole picture of the right size, and one over the pixels of
    all of them in order: SHA-256 of their bytes, row by row, red, green, blue.
    """
    found, everything = {}, hashlib.sha256()
    for picture in tqdm(pictures, "reading", unit="image", delay=2, leave=False):
        try:
            with Image.open(output / picture.file) as image:
                if image.size != (size, size) or image.mode != "RGB":
                    continue
                pixels = image.tobytes()
        except (OSError, ValueError, SyntaxError):
            continue  # missing or damaged: it will be made again
        found[picture.file] = hashlib.sha256(pixels).hexdigest()[:16]
        everything.update(pixels)
    return found, everything.hexdigest()


def make_some(pictures: list[Picture], settings: dict, output: Path) -> list[tuple]:
    """Make a few pictures and write them; return (file, None or what is wrong with its source)."""
    results = []
    for picture in pictures:
        try:
            if isinstance(picture.source, int):
                seed, split = settings["seed"], settings["split"]
                pixels = render(seed, picture.source, split, settings["size"])
            else:
                pixels = photograph(picture.source, settings["size"])
        except BrokenPhotograph as error:
            results.append((picture.file, str(error)))
            continue
        with write_atomically(output / picture.file) as temporary:
            Image.fromarray(pixels).save(temporary)
        results.append((picture.file, None))
    return results


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process: a worker first finishes what it is writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes started in it never see one."""
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    mask(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})
    try:
        yield
    finally:
        mask(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})


def make_all(pictures: list[Picture], settings: dict, output: Path, workers: int) -> dict:
    """Make all pictures with a progress bar; return what is wrong with those that are broken."""
    for folder in {(output / picture.file).parent for picture in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    work = functools.partial(make_some, settings=settings, output=output)
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)]
    workers = min(workers, -(-len(chunks) // 4))  # a process takes half a second to start
    broken, pool, results = {}, None, map(work, chunks)
    with tqdm(total=len(pictures), desc=output.name, unit="image") as bar:
        try:
            if workers > 1:
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(workers, context, ignore_interrupts)
                with interrupts_held():
                    results = pool.map(work, chunks)
            for done in results:
                broken.update((file, wrong) for file, wrong in done if wrong)
                bar.update(len(done))
        except BrokenProcessPool:
            raise UserError("A worker process was killed: run this with --workers 1.") from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return broken


def refuse_changed(output: Path, manifest: dict, found: dict) -> None:
    """Raise UserError when a picture in a complete folder is no longer the one that was written."""
    for file, pixels in manifest.get("pixels", {}).items():
        if found.get(file, pixels) != pixels:
            raise UserError(
                f"{output / file} was changed after this command wrote it: move it away and run "
                "this again, or render everything anew with --force."
            )


def prepare(options: argparse.Namespace) -> None:
    """Bring the folder to completion. Raises UserError."""
    started = time.perf_counter()
    settings, pictures = (plan_photographs if options.photos else plan_fabrics)(options)
    output, size = options.output, settings["size"]
    manifest = claim(output, settings, pictures, options.force)
    remove_leftovers(output, [picture.file for picture in pictures])
    found, _ = read_back(output, pictures, size)
    refuse_changed(output, manifest, found)
    broken = manifest.get("broken", {})
    missing = [p for p in pictures if p.file not in found and p.file not in broken]
    if missing or not manifest.get("sha256"):
        broken = {**broken, **make_all(missing, settings, output, options.workers)}
        found, checksum = read_back(output, pictures, size)
        lost = [p.file for p in pictures if p.file not in found and p.file not in broken]
        if lost:
            raise UserError(f"{output / lost[0]} cannot be read back: is the disk all right?")
        notes = {"broken": broken} if options.photos else {}
        kept = [picture for picture in pictures if picture.file in found]
        write_manifest(output, settings, pictures, sha256=checksum, pixels=found, **notes)
        shares = Counter(picture.label for picture in kept)
        print(f"{len(kept)} images in {len(shares)} folders:", *share_words(shares))
    report(output, len(found), len(missing) - len(broken), time.perf_counter() - started)
    for wrong in broken.values():
        print(f"Broken, left out: {wrong}", file=sys.stderr)
    if broken and not options.skip_broken:
        raise UserError(
            f"{len(broken)} photographs could not be read (see above): mend or remove them, or "
            "accept that with --skip-broken."
        )


def share_words(shares: Counter) -> list[str]:
    """Say how many images each label has, the first twenty of them."""
    words = [f"{label} {count}" for label, count in sorted(shares.items())]
    return [", ".join(words[:20] + ["..."] * (len(words) > 20))]


def report(output: Path, count: int, new: int, seconds: float) -> None:
    """Print the closing line."""
    if new <= 0:
        print(f"{output} is complete: {count} images, nothing to do ({seconds:.1f} s).")
    elif new < count:
        print(f"{output} is complete now: {new} images added to {count - new} ({seconds:.1f} s).")
    else:
        print(f"Wrote {count} images and {MANIFEST} to {output} in {seconds:.1f} s.")
