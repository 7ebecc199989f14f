"""`sandbox doctor`: does this machine have what the sandbox needs, and if not, what cures it?

Every check is a function of what it is given and returns one line, so tests can feed it fakes.
Heavy packages are imported one at a time and only here, each guarded: a broken one must not hide
what the others have to say.
"""

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from sandbox.runs import RUNS

SYNC = "uv sync"
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report; ``cure`` says what to do about a warning or a failure."""

    status: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    cure: str = ""

    def __str__(self) -> str:
        cure = f"  ->  {self.cure}" if self.cure else ""
        return f"{self.status:<5} {self.name:<12} {self.detail}{cure}"


def doctor(print_line: Callable[[str], None] = print) -> int:
    """Run every check, print its line, and return the exit code: 1 if any failed."""
    failed = False
    for check in checks():
        print_line(str(check))
        failed |= check.status == "fail"
    return int(failed)


def checks() -> Iterator[Check]:
    """All checks, in the order in which a reader would ask."""
    yield check_python(sys.version_info[:3])
    yield check_import("torch")
    # open_clip takes seconds to import and brings nothing that its version does not say.
    for package in ("torchvision", "lightning", "open_clip_torch", "tokenizers", "pillow"):
        yield check_version(package)
    yield check_pair()
    yield check_decoders()
    yield from check_devices()
    yield check_threads(os.cpu_count() or 1)
    yield check_disk(shutil.disk_usage(_existing(RUNS)).free)
    yield check_writable(RUNS)


def check_python(version: Sequence[int]) -> Check:
    """The interpreter is new enough."""
    found = ".".join(map(str, version))
    if tuple(version) < (3, 11):
        return Check("fail", "python", f"{found} is older than 3.11", "uv sync --python 3.11")
    return Check("ok", "python", f"{found} on {platform.system()} {platform.machine()}")


def check_version(
    package: str, version_of: Callable[[str], str] = metadata.version, cure: str = SYNC
) -> Check:
    """The package is installed; it is not imported."""
    try:
        return Check("ok", package, version_of(package))
    except metadata.PackageNotFoundError:
        return Check("fail", package, "not installed", cure)


def check_import(module: str, load: Callable[[str], Any] = importlib.import_module) -> Check:
    """The module imports, native libraries included."""
    try:
        return Check("ok", module, str(load(module).__version__))
    except Exception as error:  # a broken native library raises whatever it likes
        return Check("fail", module, f"does not import: {_brief(error)}", SYNC)


def check_pair(
    version_of: Callable[[str], str] = metadata.version,
    requires: Callable[[str], list[str] | None] = metadata.requires,
    call_nms: Callable[[], Any] | None = None,
) -> Check:
    """Torch and torchvision belong together: the requirement holds and a native operator runs."""
    name = "vision pair"
    try:
        torch_version, vision_version = version_of("torch"), version_of("torchvision")
    except metadata.PackageNotFoundError as error:
        return Check("fail", name, f"{error.name} is not installed", SYNC)
    pair = f"torchvision {vision_version} with torch {torch_version}"
    for requirement in map(Requirement, requires("torchvision") or []):
        # "2.15.0+cu130" satisfies "==2.15.0": a local build of the same release.
        public = torch_version.split("+")[0]
        if requirement.name == "torch" and not requirement.specifier.contains(public, True):
            wanted = f"it needs torch {requirement.specifier}"
            return Check("fail", name, f"{pair}: mismatch, {wanted}", SYNC)
    try:
        (call_nms or _nms)()
    except Exception as error:
        detail = f"{pair}: mismatch, torchvision.ops.nms fails ({_brief(error)})"
        return Check("fail", name, detail, f"{SYNC} --reinstall-package torchvision")
    return Check("ok", name, f"{pair}: nms runs")


def _nms() -> None:
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)


def check_decoders(load: Callable[[str], Any] = importlib.import_module) -> Check:
    """A video decoder imports. Without one, folders and lists of frames still work."""
    found, broken = [], []
    for module in ("decord", "av"):
        try:
            found.append(f"{module} {load(module).__version__}")
        except ModuleNotFoundError:
            continue
        except Exception as error:
            broken.append(f"{module} does not import: {_brief(error)}")
    if found:
        return Check("ok", "video", "; ".join(found + broken))
    detail = "; ".join(broken) or "no decoder; folders and lists of frames work without"
    return Check("warn", "video", detail, f"{SYNC} --extra video")


def check_devices(torch: Any = None) -> Iterator[Check]:
    """The devices that training would use."""
    if torch is None:
        try:
            import torch
        except Exception:
            return  # check_import has said so
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {device.total_memory / GIB:.0f} GiB"
            yield Check("ok", f"cuda:{index}", detail)
    elif torch.backends.mps.is_available():
        yield Check("ok", "device", "mps")
    elif shutil.which("nvidia-smi"):
        detail = f"an NVIDIA driver is there, but torch {torch.__version__} cannot use it"
        yield Check("warn", "device", detail, "update the driver, or install torch for its CUDA")
    else:
        yield Check("ok", "device", "cpu")


def check_threads(cores: int) -> Check:
    """Threads asked for do not outnumber the cores: they would fight each other."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > cores:
        return Check(
            "warn", "threads", f"OMP_NUM_THREADS={asked} on {cores} cores", f"set it to {cores}"
        )
    return Check("ok", "threads", f"{asked or cores} of {cores} cores")


def check_disk(free: int) -> Check:
    """There is room for checkpoints."""
    detail = f"{free / GIB:.1f} GiB free for runs"
    if free < GIB:
        return Check("fail", "disk", detail, "free some space, or start on another disk")
    if free < 10 * GIB:
        return Check("warn", "disk", detail, "enough for small runs only")
    return Check("ok", "disk", detail)


def check_writable(directory: Path) -> Check:
    """Runs can be stored: their directory, or the one it would be made in, takes a file."""
    place = _existing(directory)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check("ok", "runs", f"{directory.resolve()} is writable")
    except OSError as error:
        cure = f"chmod u+w {place}, or start elsewhere"
        return Check("fail", "runs", f"cannot write in {place}: {error.strerror}", cure)


def _existing(path: Path) -> Path:
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _brief(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
