"""The shape of the two packages: who may import whom, what is public, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import asyncckpt
import stagers

ROOT = Path(__file__).parents[1]
# `open_storage` imports the two when it is called, to choose one by the URL.
CHOSEN_WHEN_CALLED = {("storage", "storage_local"), ("storage", "storage_fsspec")}
IMPORT_QUIETLY = """
import sys
def refuse_sockets(event, args):
    if event.startswith("socket."):
        raise AssertionError(event)
sys.addaudithook(refuse_sockets)
import asyncckpt, stagers
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def listed_modules(package_doc: str) -> list[str]:
    """The modules that the layout in a package's docstring names, in its order."""
    rows = re.findall(r"^    (\w[\w, ]*?)(?:  +\S.*)?$", package_doc.partition("General layout")[2], re.MULTILINE)
    return [name for row in rows for name in row.rstrip(",").split(", ")]


def imports_of(path: Path, package: str) -> set[str]:
    """The modules of `package` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}."):
            found.add(node.module.removeprefix(f"{package}."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix(f"{package}.") for a in node.names if a.name.partition(".")[0] == package}
    return found


def test_each_module_imports_only_modules_above_it():
    """The order in the package's docstring is complete, and the order in which a reader meets everything."""
    for package in (asyncckpt, stagers):
        folder, modules = ROOT / package.__name__, listed_modules(package.__doc__)
        # a package in the list is a folder of modules that share its place; integrations stand last, each for itself
        found = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        assert sorted(modules) == sorted(found - {"__init__", "integrations"}), package
        for index, module in enumerate(modules):
            files = sorted((folder / module).glob("*.py")) or [folder / f"{module}.py"]
            imported = set().union(*(imports_of(file, package.__name__) for file in files))
            own = {name for name in imported if name.partition(".")[0] == module and len(files) > 1}
            below = imported - own - set(modules[:index])
            assert not {(module, name) for name in below} - CHOSEN_WHEN_CALLED, f"{package.__name__}.{module}"


def test_stagers_never_imports_asyncckpt():
    """`stagers` is useful alone."""
    assert not [path for path in (ROOT / "stagers").glob("*.py") if imports_of(path, "asyncckpt")]


def test_every_public_name_is_in_all():
    """What `from asyncckpt import ...` offers is `__all__`, and every name there stands once and exists."""
    for package in (asyncckpt, stagers):
        tree = ast.parse(Path(package.__file__).read_text())
        imported = [a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
        assert sorted(package.__all__) == sorted(imported), package


def test_an_import_is_light_and_opens_no_socket():
    """Clients of object stores and the tools of the demo load when they are needed, not before."""
    found = subprocess.run([sys.executable, "-c", IMPORT_QUIETLY], capture_output=True, text=True, cwd=ROOT, check=True)
    late = {"s3fs", "gcsfs", "obstore", "aiohttp", "botocore", "matplotlib", "rich", "torchdata"}
    assert not set(found.stdout.split()) & late
