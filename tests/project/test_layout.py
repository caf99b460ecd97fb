"""The arrows between the packages, and what importing them brings in."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.tiny import ROOT, in_subprocess

KERNELS = ROOT / "kernels"
OURS = {"fsd_fast", "fsd_kernels", "benchmarks", "train_ds", "tests"}
OPS = ("intra_cka", "gram", "structure", "kmeans")


def _files(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


ENGINE_FILES, FAST_FILES = _files(KERNELS / "fsd_kernels"), _files(ROOT / "fsd_fast")
PACKAGE_FILES = [*ENGINE_FILES, *FAST_FILES, ROOT / "train_ds.py"]


def _module_name(path):
    base = KERNELS if KERNELS in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """Absolute names of everything a file imports anywhere in it, in functions too: modules and their members."""
    package = _module_name(path) if path.name == "__init__.py" else _module_name(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                found.add(argument.value)
    return found


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


def _name(path):
    return str(path.relative_to(ROOT))


def test_the_walk_sees_every_way_to_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "fsd_fast" / "data" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\nfrom .two import c\nfrom .. import losses\n"
        "def f():\n    import importlib\n    from d import e\n    importlib.import_module('g.h')\n"
    )
    assert {"a.b", "fsd_fast.data.two", "fsd_fast.losses", "d.e", "g.h"} <= imports(path)


def test_every_op_has_its_rooms():
    for op in OPS:
        folder = KERNELS / "fsd_kernels" / op
        rooms = {"__init__.py", "api.py", "reference.py", "eager.py", "triton.py"}
        assert rooms <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", ENGINE_FILES, ids=_name)
def test_kernels_need_torch_alone(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "fsd_kernels"}
    if path.name in ("triton.py", "_triton.py"):
        allowed.add("triton")
    assert roots(path) <= allowed


@pytest.mark.parametrize("path", ENGINE_FILES, ids=_name)
def test_implementations_do_not_import_each_other(path):
    names = {part for name in imports(path) if name.startswith("fsd_kernels") for part in name.split(".")}
    if path.name == "reference.py":
        assert not roots(path) & OURS
    if path.name == "eager.py":
        assert not names & {"triton", "_triton"}
    if path.name in ("triton.py", "_triton.py"):
        assert "eager" not in names


@pytest.mark.parametrize("path", FAST_FILES, ids=_name)
def test_distillation_knows_nothing_of_triton(path):
    assert not roots(path) & {"triton", "benchmarks", "train_ds", "tests"}
    assert not any(name.startswith("fsd_kernels") and "triton" in name for name in imports(path))


# A room, a package or module right under fsd_fast, imports from rooms to its right alone.
ROOMS = (
    "cli commands sweep analysis training memory models losses cache clustering metrics data distributed shutdown "
    "files sections untrusted versions"
)


def _room(name):
    return name.split(".")[1]


def _rooms_imported(path):
    known = set(ROOMS.split())
    return {_room(name) for name in imports(path) if name.startswith("fsd_fast.")} & known


@pytest.mark.parametrize("path", FAST_FILES, ids=_name)
def test_rooms_import_one_way(path):
    order, name = ROOMS.split(), ".".join(_module_name(path))
    if name == "fsd_fast":
        return
    assert _room(name) in order, "a new room has no place in the order yet"
    later = order[order.index(_room(name)) :]
    assert _rooms_imported(path) <= set(later)


def test_the_guide_has_the_rooms_and_their_order():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    order = re.search(r"to its right alone:\n\n```\n(.*?)```", text, re.DOTALL)
    assert order is not None
    assert order[1].split() == ROOMS.split()
    layout = set(re.findall(r"^fsd_fast/(\w+)(?:/|\.py)  ", text, re.MULTILINE))
    assert layout == set(ROOMS.split())


def test_every_room_exists():
    names = {path.stem for path in (ROOT / "fsd_fast").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(ROOMS.split()) <= names


def _lines_of_code(function):
    """Lines of a function without its docstring, which says what it says."""
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


@pytest.mark.parametrize("path", FAST_FILES, ids=_name)
def test_modules_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert _lines_of_code(node) <= 60, node.name


def test_the_entry_is_a_thin_one():
    assert roots(ROOT / "train_ds.py") & OURS == {"fsd_fast"}


def test_nothing_that_is_installed_imports_the_benchmarks_or_tests():
    for path in PACKAGE_FILES:
        assert not roots(path) & {"benchmarks", "tests"}, _name(path)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_no_pickles_and_no_global_seed(path):
    assert not roots(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert not used & {"torch.load", "torch.save", "np.load", "np.save", "numpy.load"}
    assert not used & {"torch.manual_seed", "torch.random.manual_seed", "np.random.seed", "random.seed"}


@pytest.mark.parametrize("path", [p for p in ENGINE_FILES if p.name == "triton.py"], ids=_name)
def test_kernels_use_no_atomics(path):
    called = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name) and "atomic" in ast.unparse(node)
    ]
    assert called == []


def test_kernels_folder_is_no_package():
    assert not (KERNELS / "__init__.py").exists()


def _imported_by(statement):
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(in_subprocess(["-c", program], PYTHONPATH=str(KERNELS)).split())


def test_importing_the_kernels_brings_in_torch_alone():
    names = _imported_by("import fsd_kernels")
    assert {"fsd_kernels", "torch"} <= names
    assert not names & {"transformers", "deepspeed", "accelerate", "datasets", "fsd_fast", "sklearn"}
    # torch imports triton by itself in some versions; what counts is that ours is not the one who does.
    assert "triton" not in names - _imported_by("import torch")


def test_importing_the_losses_brings_in_no_training_library():
    names = _imported_by("import fsd_fast")
    assert "fsd_fast" in names
    assert not names & {"deepspeed", "transformers", "datasets", "benchmarks"}


def test_the_losses_run_with_the_base_packages_alone():
    blocked = (
        "accelerate datasets deepspeed huggingface_hub matplotlib safetensors scipy sklearn tqdm transformers"
    )
    program = (
        f"import sys\nfor name in {blocked.split()}: sys.modules[name] = None\n"
        "import torch, fsd_fast\n"
        "x = torch.randn(2, 3, 4, requires_grad=True)\n"
        "fsd_fast.IntraFeatureLoss()(x, torch.randn(2, 3, 5)).backward()\n"
        "print(bool(x.grad.abs().sum() > 0))"
    )
    assert in_subprocess(["-c", program], PYTHONPATH=str(KERNELS)).split() == ["True"]


def test_kernels_of_another_project_are_not_shadowed():
    # As under the launcher: the root comes first on the path. transformers then looks for a package "kernels".
    out = in_subprocess(
        [
            "-c",
            "import sys; sys.path.insert(0, '.')\n"
            "import train_ds\n"
            "import transformers.models.bert\n"
            "from transformers.utils.import_utils import is_kernels_available\n"
            "print('kernels available:', is_kernels_available())\n"
            "print('entry:', train_ds.__file__)\n"
            "from importlib.util import find_spec\n"
            "print('package:', getattr(find_spec('kernels'), 'origin', None))",
        ],
        PYTHONPATH="",
    )
    said = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert Path(ROOT, said["entry"]).resolve() == ROOT / "train_ds.py"
    # transformers sees the package of that name where it is installed, and nowhere else.
    installed = any(found.name == "kernels" for found in metadata.distributions())
    assert said["kernels available"] == str(installed)
    # A folder without __init__.py gives way to an installed package, whichever comes first on the path.
    assert str(ROOT / "kernels") not in said["package"]
    assert not Path(said["package"]).is_relative_to("kernels")
