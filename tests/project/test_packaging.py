"""What the wheel holds, and what it says it needs."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from tests.tiny import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive of a copy of the tree, so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "tree", ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), "."],
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


@pytest.fixture(scope="module")
def metadata(wheel):
    _, files = wheel
    (content,) = (content.decode() for name, content in files.items() if name.endswith("/METADATA"))
    return Parser().parsestr(content)


def required(metadata, extra=None):
    """Names of the packages that the wheel, or one of its extras, needs."""
    found = set()
    for line in metadata.get_all("Requires-Dist"):
        of = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if (of and of[1]) == extra:
            found.add(re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"))
    return found


def test_the_versions_agree(metadata):
    import fsd_fast

    assert metadata["Version"] == fsd_fast.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(fsd_fast.__version__)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.MULTILINE)


def test_the_licence_is_an_expression(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"


def test_all_is_what_users_install(metadata):
    users = [required(metadata, extra) for extra in ("train", "deepspeed", "plot")]
    assert required(metadata, "all") == set().union(*users)
    assert required(metadata) == {"torch", "triton", "numpy"}


def test_every_import_is_declared(metadata):
    """A package that is imported and comes along with another one today may be gone with its next release."""
    imported = set()
    for folder in (ROOT / "fsd_fast", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"fsd_fast", "fsd_kernels"}
    names = {
        {"sklearn": "scikit-learn", "yaml": "pyyaml"}.get(name, name).replace("_", "-") for name in imported
    }
    assert names <= required(metadata) | required(metadata, "all")


def test_every_requirement_is_pinned(metadata):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    for extra in (None, *metadata.get_all("Provides-Extra")):
        assert required(metadata, extra) <= pins, extra


def test_setting_up_installs_into_a_virtual_environment_alone(tmp_path):
    # It stands for a Python that is no virtual environment, and can install nothing.
    python, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@" >> {calls}\n', encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "tools/setup_env.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"setup: {tmp_path} is no virtual environment" in done.stderr
    assert not calls.exists()
