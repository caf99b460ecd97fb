"""What the wheel holds."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.tiny import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the tree so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "tree", ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "."],
        cwd=folder / "tree",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_two_packages_and_nothing_else(wheel):
    name, files = wheel
    assert re.fullmatch(r"fsd_fast-[0-9.]+-py3-none-any\.whl", name)
    top = {entry.split("/")[0] for entry in files}
    assert {entry for entry in top if not entry.endswith(".dist-info")} == {"fsd_fast", "fsd_kernels"}


def test_the_wheel_holds_every_module(wheel):
    _, files = wheel
    for base, package in ((ROOT, "fsd_fast"), (ROOT / "kernels", "fsd_kernels")):
        modules = [path for path in (base / package).rglob("*.py") if "__pycache__" not in path.parts]
        assert {path.relative_to(base).as_posix() for path in modules} <= set(files)


def test_types_and_licence_travel_along(wheel):
    _, files = wheel
    assert {"fsd_fast/py.typed", "fsd_kernels/py.typed"} <= set(files)
    assert any(name.endswith("LICENSE") and b"Apache License" in content for name, content in files.items())


def test_the_console_script(wheel):
    _, files = wheel
    (entry_points,) = (content for name, content in files.items() if name.endswith("entry_points.txt"))
    parsed = configparser.ConfigParser()
    parsed.read_string(entry_points.decode())
    assert dict(parsed["console_scripts"]) == {"fsd-fast": "fsd_fast.cli:main"}


def test_the_versions_agree(wheel):
    import fsd_fast

    _, files = wheel
    (metadata,) = (content.decode() for name, content in files.items() if name.endswith("/METADATA"))
    assert f"\nVersion: {fsd_fast.__version__}\n" in metadata
