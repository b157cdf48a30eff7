"""The shape of the code: short functions, short modules, and imports that point one way."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from sys import stdlib_module_names

import pytest
from conftest import ROOT

from emoshare.backbone_emoshare import FAMILIES

# Lines of code in a function's body, without docstring, comments and empty lines.
MAX_FUNCTION_LINES = 50
MAX_FLAT_MODULE_LINES = 500
MAX_ENTRY_POINT_LINES = 100  # of train.py and reproduce.py
FOLDERS = (".", "benchmarks", "commands", "conversations", "dataset_script", "evaluation", "metrics", "reproduction")
FOLDERS += ("serving", "tests", "training")
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix(): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
}
FLAT = [name for name in MODULES if name.endswith("_emoshare")]
ENTRY_POINTS = ("app", "cli", "convert_released_checkpoint", "handler", "reproduce", "train")
FAMILY_MODULES = sorted({type(family).__module__.rpartition(".")[2] for family in FAMILIES})
MODEL_MODULES = ["modeling_emoshare", "head_emoshare", "losses_emoshare", "frames_emoshare", *FAMILY_MODULES]
MODEL_PACKAGES = {"torch", "transformers"}
# Imported by the function that needs it, if it is installed.
OPTIONAL_PACKAGES = {"finetuning_emoshare": {"peft"}}
# Where files are fetched or published.
COMES_WITH_TRANSFORMERS = {"huggingface_hub", "safetensors"}


def test_modules_are_found():
    assert {"modeling_emoshare", "training/__init__", "tests/test_structure", "benchmarks/machine"} <= set(MODULES)
    assert len(FLAT) >= 12


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text())


def lines_of_code(function, lines):
    """Lines of the body that are neither its docstring, nor empty, nor a comment alone."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    return sum(
        bool(line.strip()) and not line.strip().startswith("#")
        for line in lines[body[0].lineno - 1 : function.end_lineno]
    )


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    lines = MODULES[module].read_text().splitlines()
    functions = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef)]
    lengths = [(function.name, lines_of_code(function, lines)) for function in functions]
    assert [(name, length) for name, length in lengths if length > MAX_FUNCTION_LINES] == []


@pytest.mark.parametrize("module", FLAT)
def test_flat_modules_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_FLAT_MODULE_LINES


@pytest.mark.parametrize("module", ["train", "reproduce"])
def test_entry_points_are_thin(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_ENTRY_POINT_LINES


@cache
def imports_of(module):
    """A module's imports, at any level: modules of this repository, and names of packages."""
    own, packages = set(), set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = module.split("/")[: -node.level]
                base = ".".join(filter(None, ["emoshare", *folder, base]))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "emoshare":
                own.add(module_named(name))
            else:
                packages.add(name.split(".")[0])
    return own - {module}, packages - set(stdlib_module_names)


def module_named(name):
    """The module of this repository that `name` is, or is in: `emoshare.training.heads.fit` -> `training/heads`."""
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for candidate in ("/".join(parts[:end]), "/".join([*parts[:end], "__init__"])):
            if candidate in MODULES:
                return candidate
    raise AssertionError(f"{name} is not in the repository")


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(("tests/", "benchmarks/"))])
def test_nothing_imports_an_entry_point(module):
    imported, _ = imports_of(module)
    assert imported & set(ENTRY_POINTS) == set()


@pytest.mark.parametrize("module", FLAT)
def test_flat_modules_import_flat_modules_relatively_and_nothing_else_of_ours(module):
    imported, packages = imports_of(module)
    assert imported <= set(FLAT)
    absolute = [
        ast.unparse(node)
        for node in ast.walk(tree_of(module))
        if (isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "emoshare")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "emoshare" for alias in node.names))
    ]
    assert absolute == []  # a model repository has no such package
    assert "emoshare" not in packages


@pytest.mark.parametrize("package", ["dataset_script", "evaluation"])
def test_evaluation_and_corpora_know_nothing_of_training(package):
    for module in MODULES:
        if module.startswith(f"{package}/"):
            imported, _ = imports_of(module)
            assert [name for name in imported if name.startswith("training/")] == [], module


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imports_of(module)[0] for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1][::-1]))


@pytest.mark.parametrize("module", MODEL_MODULES)
def test_a_model_needs_torch_and_transformers_alone(module):
    _, packages = imports_of(module)
    assert packages <= MODEL_PACKAGES
    for needed in all_imports(module):
        _, packages = imports_of(needed)
        assert packages <= MODEL_PACKAGES | COMES_WITH_TRANSFORMERS | OPTIONAL_PACKAGES.get(needed, set()), needed


def all_imports(module):
    """The modules that a module imports, and those that they import."""
    found, waiting = set(), [module]
    while waiting:
        for name in imports_of(waiting.pop())[0] - found:
            found.add(name)
            waiting.append(name)
    return found
