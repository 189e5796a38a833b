"""The folder on disk: what is to be in it, what an earlier run left, and the work itself."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, duration, print_list
from ddpm_basics.fabrics.card import CARD, is_card, write_card
from ddpm_basics.fabrics.drawing import DATA_VERSION, IMAGE_SIZE, TRADITIONS, render
from ddpm_basics.fabrics.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from ddpm_basics.files import check_folder, remove_leftovers
from ddpm_basics.images import decode, find_images, label_of, save_picture

COUNT = 1059  # images, as many as the photographs that the course used
CHUNK = 8  # pictures that a worker process makes before it looks up
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# A worker that a script starts imports that script again, torch included: a few are enough.
WORKERS = min(CORES, 8)

Maker = Callable[[], Image.Image]  # makes a picture; UserError says what is wrong with its source


def draw_fabrics(
    output: Path, *, split: str = "train", count: int = COUNT, seed: int = 0,
    size: int = IMAGE_SIZE, workers: int = WORKERS, force: bool = False,
) -> None:  # fmt: skip
    """Draw fabrics 0 to count - 1 of a split into a folder, or those that it lacks.

    Prints what it did. Raises UserError when the folder holds anything else; with `force`,
    replaces there what was made before, and nothing of the user's.
    """
    names = list(TRADITIONS)
    labels = [names[index % len(names)] for index in range(count)]
    files = {f"{label}/{index:04d}.png": label for index, label in enumerate(labels)}
    makers = [partial(render, seed, index, split, size) for index in range(count)]
    plan = Manifest(
        version=DATA_VERSION, seed=seed, split=split, count=count, size=size, traditions=files
    )
    complete(output, plan, makers, workers, force)


def prepare_photographs(
    photos: Path, output: Path, *, size: int = IMAGE_SIZE, workers: int = CORES,
    skip_broken: bool = False, force: bool = False,
) -> None:  # fmt: skip
    """Crop the photographs in a folder and its subfolders to squares, into another folder.

    Prints what it did. Raises UserError as draw_fabrics does, and in the end for photographs that
    cannot be read, unless they are to be skipped.
    """
    own = output.resolve()
    if own in (photos.resolve(), *photos.resolve().parents):
        raise UserError(f"{photos} is in the output folder {output}: choose another --output.")
    found, others = find_images(photos)
    paths, left_out = (
        [path for path in some if own not in Path(os.path.realpath(path)).parents]
        for some in (found, others)
    )
    if not paths:
        raise UserError(f"{photos} holds no photographs: name another folder.")
    print_list(f"Left out of {photos}", [f"{path} ({others[path]})" for path in left_out])
    labels = [label_of(path, photos) or "photographs" for path in paths]
    files = {f"{label}/{index:04d}.png": label for index, label in enumerate(labels)}
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]  # 0: a dangling link
    lines = [
        f"{path.relative_to(photos).as_posix()} {length}\n"
        for path, length in zip(paths, sizes, strict=True)
    ]
    clean = "".join(lines).encode(errors="backslashreplace")  # a name may be no text
    listing = hashlib.sha256(clean).hexdigest()[:16]
    name = photos.resolve().name
    plan = Manifest(photos=name, listing=listing, count=len(paths), size=size, traditions=files)
    broken = complete(output, plan, [partial(decode, p, size) for p in paths], workers, force)
    for wrong in broken:
        print(f"Broken, left out: {wrong}", file=sys.stderr)
    if broken and not skip_broken:
        raise UserError(
            f"{len(broken)} photographs could not be read (see above): mend or remove them, or "
            "accept that with --skip-broken."
        )


def complete(
    output: Path, plan: Manifest, makers: Iterable[Maker], workers: int, force: bool
) -> list[str]:
    """Bring a folder to completion, say so, and return what is wrong with broken sources."""
    started = time.perf_counter()
    manifest = claim(output, plan, force)
    for folder in {output, *((output / file).parent for file in plan.traditions)}:
        remove_leftovers(folder)
    before, _ = read_back(output, manifest)
    done = before.keys() | manifest.broken.keys()
    missing = {f: make for f, make in zip(plan.traditions, makers, strict=True) if f not in done}
    if missing or manifest.sha256 is None:
        broken = manifest.broken | make_all(missing, output, workers)
        pixels, checksum = read_back(output, plan)
        if lost := plan.traditions.keys() - pixels.keys() - broken.keys():
            raise UserError(f"{output / min(lost)} cannot be read back: is the disk all right?")
        manifest = replace(plan, sha256=checksum, pixels=pixels, broken=broken)
        write_manifest(output, manifest)
    if manifest.photos is None:
        write_card(output, manifest)
    new = len(manifest.pixels) - len(before)
    took = duration(time.perf_counter() - started)
    print(f"{output} is complete: {len(manifest.pixels)} images, {new} of them new ({took}).")
    return list(manifest.broken.values())


def claim(output: Path, plan: Manifest, force: bool) -> Manifest:
    """Make the folder ready; return the manifest that is to be completed: an old one or the plan.

    Raises UserError rather than touch anything that this package did not write.
    """
    old = read_manifest(output)
    if old and not force:
        if old.plan() == plan:
            return old
        raise UserError(f"{output} holds {old}: choose another --output, or replace with --force.")
    ours = {MANIFEST, *old.traditions} if old else set()
    if is_card(output / CARD):
        ours.add(CARD)
    inside = [path for path in output.rglob("*") if path.is_file() and path.name[0] != "."]
    others = {path.relative_to(output).as_posix() for path in inside} - ours
    if others and not force:
        raise UserError(
            f"{output} holds files of your own, such as {min(others)}: choose another --output."
        )
    if taken := others & {MANIFEST, *plan.traditions}:
        raise UserError(
            f"{output / min(taken)} is not from this command, and not even --force replaces it: "
            "move it away or choose another --output."
        )
    if old:
        remove_pictures(output, old)
    check_folder(output)
    write_manifest(output, plan)
    return plan


def remove_pictures(output: Path, manifest: Manifest) -> None:
    """Remove the files that the manifest lists, then the folders that are empty without them."""
    for file in [*manifest.traditions, *([CARD] if is_card(output / CARD) else [])]:
        (output / file).unlink(missing_ok=True)
    for folder in {(output / file).parent for file in manifest.traditions}:
        remove_leftovers(folder)
        with suppress(OSError):  # something else is in it
            os.removedirs(folder)  # and those above it; the output folder holds its manifest


def read_back(output: Path, manifest: Manifest) -> tuple[dict[str, str], str]:
    """Read what stands in the folder; pictures that are missing or damaged are passed over.

    Returns {file: checksum of its pixels} and one checksum over all of them: SHA-256 of the bytes,
    row by row, red, green, blue. Raises UserError for a picture that somebody changed.
    """
    found, everything = {}, hashlib.sha256()
    for file in tqdm(manifest.traditions, "reading", unit="image", delay=2, leave=False):
        try:
            picture = decode(output / file)
        except UserError:
            continue
        pixels = picture.tobytes()
        found[file] = hashlib.sha256(pixels).hexdigest()[:16]
        written = manifest.pixels.get(file, found[file])
        if picture.size != (manifest.size, manifest.size) or found[file] != written:
            raise UserError(
                f"{output / file} was changed after this command wrote it: move it away and run "
                "this again, or replace everything with --force."
            )
        everything.update(pixels)
    return found, everything.hexdigest()


def make_all(makers: dict[str, Maker], output: Path, workers: int) -> dict[str, str]:
    """Make pictures with a progress bar; return {file: what is wrong with its source}."""
    jobs = [(output / file, make) for file, make in makers.items()]
    workers = min(workers, math.ceil(len(jobs) / 4 / CHUNK))  # one takes half a second to start
    broken = {}
    with (
        share_out(jobs, workers) as results,
        tqdm(results, output.name, len(jobs), unit="image") as bar,
    ):
        for file, wrong in zip(makers, bar, strict=True):
            if wrong:
                broken[file] = wrong
    return broken


def make_picture(job: tuple[Path, Maker]) -> str | None:
    """Make a picture and write it; return what is wrong with its source, if anything is."""
    path, make = job
    try:
        picture = make()
    except UserError as error:
        return str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(picture, path)
    return None


@contextmanager
def share_out(jobs: list[tuple[Path, Maker]], workers: int) -> Iterator[Iterable[str | None]]:
    """Give make_picture(job) for every job in order, by so many processes.

    When the block is left early, what is begun is finished. Raises UserError for a killed process.
    """
    if workers < 2:
        yield map(make_picture, jobs)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small
    context, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, signal.signal, ignore)
    try:
        with interrupts_held():
            results = pool.map(make_picture, jobs, chunksize=CHUNK)
        yield results
    except BrokenProcessPool:
        raise UserError("A worker process was killed: run this with --workers 1.") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes started in it never see one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has none
        yield
        return
    pressed: list[int] = []  # in spite of the mask, where a library's thread takes the signal
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)
