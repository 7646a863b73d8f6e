"""Where results go: checking output paths before any work, writing files, telling what failed. Commands live in `commands`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .errors import InputError


if TYPE_CHECKING:
    import trimesh

    from .geometry.views import Views
    from .geometry.volume import SparseVolume


MESH_SUFFIXES = (".glb", ".obj", ".ply", ".stl", ".usdz")
PREVIEW_SUFFIXES = (".png", ".gif", ".mp4")
PREVIEW_VIEWS, PREVIEW_SIZE = 8, 160


@dataclass
class Job:
    """One input and where what is made of it goes."""

    source: Path
    mesh: Path
    preview: Path | None
    intermediates: Path | None
    unlit: bool = False
    shadings: Sequence[str] = ("soft",)
    note: str = ""  # to be told with the time

    def files(self) -> list[Path]:
        """All that is written, or written over."""
        from .geometry.export import companions

        files = [self.mesh, *companions(self.mesh), *([] if self.preview is None else [self.preview])]
        if self.intermediates is not None:
            files += [self.intermediates / name for name in ("cameras.json", "volume.safetensors", "coarse.ply")]
            files += (self.intermediates / "views").glob("*")
        return files

    def write(
        self,
        mesh: trimesh.Trimesh,
        views: Views,
        volume: SparseVolume | None = None,
        coarse: trimesh.Trimesh | None = None,
    ) -> None:
        """Write the mesh and whatever else was asked for."""
        from .geometry.export import export_mesh

        if self.intermediates is not None:
            _write_intermediates(self.intermediates, views, volume, coarse)
        export_mesh(mesh, self.mesh, unlit=self.unlit)
        if self.preview is not None:
            _write_preview(self.preview, mesh, views, self.shadings)


def plan(
    sources: list[Path],
    output: Path,
    preview: Path | None = None,
    intermediates: Path | None = None,
    unlit: bool = False,
    shadings: Sequence[str] | None = None,
    inputs: Sequence[Path] = (),
) -> list[Job]:
    """Where every output goes; refuses what could not be written, and what would be written over, before any work.

    Args:
        sources: Inputs that an output is made of each.
        output, preview, intermediates, unlit, shadings: As the options say.
        inputs: What is read beside the sources, files and folders of files.
    """
    many = len(sources) > 1
    to_file = output.suffix != "" and not output.is_dir()
    if to_file and output.suffix.lower() not in MESH_SUFFIXES:
        raise InputError(f"-o {output}: got {output.suffix!r}, expected {', '.join(MESH_SUFFIXES)}, or a folder.")
    if to_file and many:
        raise InputError(f"-o {output}: is one file, but there are {len(sources)} inputs. Pass a folder.")
    if unlit and to_file and output.suffix.lower() != ".glb":
        raise InputError(f"--unlit: only a .glb can be unlit, but -o is {output}.")
    if shadings and preview is None:
        raise InputError("--shading: is of a preview. Pass --preview FILE as well.")
    if preview is not None:
        if preview.suffix.lower() not in PREVIEW_SUFFIXES:
            raise InputError(f"--preview {preview}: got {preview.suffix!r}, expected {', '.join(PREVIEW_SUFFIXES)}.")
        if preview.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
            raise InputError(f"--preview {preview}: MP4 needs pip install 'one2345pp[video]'; .gif does not.")
        check_file(preview, "--preview")
    if intermediates is not None:
        check_folder(intermediates, "--save-intermediates")
    if to_file:
        check_file(output, "-o")
    else:
        check_folder(output, "-o")
    jobs = [
        Job(
            source,
            output if to_file else output / f"{stem}.glb",
            preview.with_name(f"{preview.stem}-{stem}{preview.suffix}") if preview and many else preview,
            intermediates / stem if intermediates and many else intermediates,
            unlit,
            shadings or ("soft",),
        )
        for source, stem in zip(sources, _distinct_stems(sources), strict=True)
    ]
    _check_overwriting(jobs, [*sources, *inputs])
    if not to_file:
        output.mkdir(parents=True, exist_ok=True)
    return jobs


def _check_overwriting(jobs: list[Job], inputs: list[Path]) -> None:
    """Refuse outputs that are inputs, or each other."""
    read = {file.resolve() for one in inputs for file in (one, *one.glob("*"), *one.glob("*/*")) if file.is_file()}
    written: set[Path] = set()
    for file in (file for job in jobs for file in job.files()):
        place = file.resolve()
        if place in read:
            raise InputError(f"{file}: is an input, and would be written over. Choose another name or folder.")
        if place in written:
            raise InputError(f"{file}: two outputs have this name. Choose another for one of them.")
        written.add(place)


def _distinct_stems(sources: list[Path]) -> list[str]:
    """File stems; a stem that occurs again is numbered."""
    stems: list[str] = []
    for source in sources:
        base, number = source.stem or source.resolve().stem, 2
        stem = base
        while stem in stems:
            stem, number = f"{base}-{number}", number + 1
        stems.append(stem)
    return stems


def check_file(path: Path, option: str) -> None:
    """Refuse a path where no file could be written."""
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder, expected a file name.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {path.parent} is not writable. Choose another.")


def check_folder(path: Path, option: str) -> None:
    """Refuse a path that is not, and could not become, a folder to write in; those above it are made with it."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not place.is_dir():
        raise InputError(f"{option} {path}: {place} is a file, expected a folder.")
    if not os.access(place, os.W_OK):
        raise InputError(f"{option} {path}: {place} is not writable. Choose another folder.")


def run_all(jobs: list[Job], run: Callable[[Job], None], quiet: bool = False, statuses: list[int] | None = None) -> int:
    """Run every job and tell what was written. A job that fails does not stop the others.

    Args:
        jobs: What to do.
        run: Does one job.
        quiet: Tell failures only.
        statuses: Exit statuses of failures so far.

    Returns:
        The exit status: 1 if one failed inside, else 2 if one could not be used, else 0.
    """
    statuses = [] if statuses is None else statuses
    for job in jobs:
        start = time.monotonic()
        if attempt(job, run, statuses) and not quiet:
            note = f", {job.note}" if job.note else ""
            tell(f"{job.mesh}  {time.monotonic() - start:.1f} s{note}", sys.stdout)
    return 1 if 1 in statuses else max(statuses, default=0)


def attempt(job: Job, work: Callable[[Job], object], statuses: list[int]) -> bool:
    """Whether `work(job)` went well; if not, says so and adds the exit status."""
    try:
        work(job)
    except Exception as error:
        statuses.append(report(error, str(job.source)))
        return False
    return True


def report(error: Exception, about: str = "") -> int:
    """Tell the person, in one line if they can mend it, and return the exit status that belongs to it."""
    about = f"{about}: " if about and about not in str(error) else ""
    if isinstance(error, InputError):
        tell(f"one2345pp: error: {about}{' '.join(str(error).split())}", sys.stderr)
        return 2
    tell("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
    tell(f"one2345pp: failed: {about}{type(error).__name__}: {error}", sys.stderr)
    return 1


def tell(text: str, stream: TextIO | None) -> None:
    """Write a line. A stream that cannot show a character shows its number; one that is closed or full does not stop the work."""
    if stream is None:
        return
    try:
        try:
            stream.write(text + "\n")
        except UnicodeEncodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode() + "\n")
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # what is left in its buffer would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def library_log(quiet: bool) -> Iterator[None]:
    """While it is open, what the package logs is told on stderr; of a quiet command, errors alone."""
    handler = _LineHandler()
    handler.setFormatter(logging.Formatter("one2345pp: %(message)s"))
    log = logging.getLogger("one2345pp")
    level = log.level
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _LineHandler(logging.Handler):
    """Tells records on stderr, as it is then."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record), sys.stderr)


def _write_intermediates(
    folder: Path, views: Views, volume: SparseVolume | None, coarse: trimesh.Trimesh | None
) -> None:
    """`views/000.png ...`, `cameras.json` naming them, and of `volume.safetensors` and `coarse.ply` what there is; `reconstruct` reads
    the folder."""
    from .geometry.export import export_mesh

    views.save(folder)
    if volume is not None:
        volume.save(folder / "volume.safetensors")
    if coarse is not None:
        export_mesh(coarse, folder / "coarse.ply")


def _write_preview(path: Path, mesh: trimesh.Trimesh, views: Views, shadings: Sequence[str]) -> None:
    """Views above the mesh seen by the same cameras, a row for each shading; or the mesh turning."""
    from .geometry.render import contact_sheet, render, turntable

    if path.suffix.lower() != ".png":
        turntable(mesh, path, shadings=shadings)
        return
    shown = views[:PREVIEW_VIEWS]
    rows = [list(render(mesh, shown.rig, PREVIEW_SIZE, shading=shading)) for shading in shadings]
    sheet = contact_sheet([list(shown), *rows], size=PREVIEW_SIZE)
    partial = path.with_name(path.name + ".part")
    sheet.save(partial, format="PNG")
    partial.replace(path)
