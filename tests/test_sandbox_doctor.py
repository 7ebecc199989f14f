from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import doctor
from sandbox.doctor import GIB, Check


def test_every_line_of_this_machine_has_a_status_and_failures_a_cure() -> None:
    """A failure without a cure sends the user to the issue tracker."""
    for check in doctor.checks():
        assert check.status == "ok" or check.cure, check


def test_one_failure_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI scripts read the exit code, not the text; a warning is no failure."""
    lines: list[str] = []
    found = [Check("ok", "a", "1"), Check("warn", "b", "2", "mend b")]
    monkeypatch.setattr(doctor, "checks", lambda: iter(found))
    assert doctor.doctor(lines.append) == 0
    found.append(Check("fail", "c", "3", "mend c"))
    assert doctor.doctor(lines.append) == 1
    assert lines[-1].startswith("fail") and lines[-1].endswith("->  mend c")


def _versions(**versions: str) -> Any:
    def version_of(package: str) -> str:
        try:
            return versions[package]
        except KeyError:
            raise metadata.PackageNotFoundError(package) from None

    return version_of


def test_mismatched_torchvision_is_named_with_its_cure() -> None:
    """Users saw `operator torchvision::nms does not exist` and reinstalled the wrong package."""
    versions = _versions(torch="2.11.0+cu130", torchvision="0.29.2")
    check = doctor.check_pair(versions, lambda _: ["numpy", "torch==2.15.0"], lambda: None)
    assert check.status == "fail"
    assert "torchvision 0.29.2 with torch 2.11.0" in check.detail
    assert "it needs torch ==2.15.0" in check.detail and "uv sync" in check.cure


def test_a_local_build_of_the_right_release_matches() -> None:
    """CUDA wheels are called 2.15.0+cu132, which a plain comparison takes for another release."""
    versions = _versions(torch="2.15.0+cu132", torchvision="0.30.0+cu132")
    check = doctor.check_pair(versions, lambda _: ["torch==2.15.0"], lambda: None)
    assert check.status == "ok"


def test_a_pair_that_matches_on_paper_must_run() -> None:
    """A CPU wheel of one and a CUDA wheel of the other satisfy each other's requirements."""

    def broken() -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nlong explanation")

    versions = _versions(torch="2.15.0", torchvision="0.30.0")
    check = doctor.check_pair(versions, lambda _: ["torch==2.15.0"], broken)
    assert check.status == "fail" and check.cure
    assert "\n" not in str(check) and "nms does not exist" in check.detail


def test_missing_packages_are_reported_not_raised() -> None:
    """The doctor must not die of the illness it looks for."""
    assert doctor.check_version("lightning", _versions()).status == "fail"
    assert doctor.check_pair(_versions(torch="2.15.0")).status == "fail"

    def load(name: str) -> Any:
        raise OSError("libcudart.so: cannot open shared object file")

    check = doctor.check_import("torch", load)
    assert check.status == "fail" and "libcudart" in check.detail


def test_video_decoders_are_optional() -> None:
    """decord has no wheels for ARM and macOS: its absence is a warning, and av is enough."""

    def only_av(name: str) -> Any:
        if name == "av":
            return SimpleNamespace(__version__="18.1.0")
        raise ModuleNotFoundError(name)

    def none(name: str) -> Any:
        raise ModuleNotFoundError(name)

    def broken(name: str) -> Any:
        raise OSError("libav.so.60 is missing")

    assert doctor.check_decoders(only_av) == Check("ok", "video", "av 18.1.0")
    assert doctor.check_decoders(none).status == "warn"
    assert "libav.so.60" in doctor.check_decoders(broken).detail


def test_disk_and_threads() -> None:
    """A full disk shows up as a torn checkpoint, oversubscribed threads as a run 4x slower."""
    assert doctor.check_disk(GIB // 2).status == "fail"
    assert doctor.check_disk(5 * GIB).status == "warn"
    assert doctor.check_disk(50 * GIB).status == "ok"


def test_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than cores fight each other; nothing else would tell."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert doctor.check_threads(2).status == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.check_threads(2).status == "ok"


def test_looking_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagnosis that creates `runs/` wherever it is asked litters the disk."""
    monkeypatch.chdir(tmp_path)
    assert doctor.check_writable(Path("runs")).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the first checkpoint finds out, an hour into the run."""

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = doctor.check_writable(tmp_path)
    assert check.status == "fail" and "Permission denied" in check.detail


def test_old_python_is_refused() -> None:
    """The failure of an older interpreter is a syntax error deep in a module."""
    assert doctor.check_python((3, 10, 4)).status == "fail"
    assert doctor.check_python((3, 11, 0)).status == "ok"
