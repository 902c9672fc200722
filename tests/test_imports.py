"""Imports point one way: between the packages, inside `nas`, and out to libraries that few files may know.

The files are parsed, never imported, so a forbidden import is found inside a function as well.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each package may import of this project.
MAY_IMPORT = {
    "nas": ("nas",),
    "analysis": ("analysis", "nas.genotype"),
    "experiments": ("experiments", "analysis", "nas"),
    "benchmarks": ("benchmarks", "experiments", "analysis", "nas"),
}

# Libraries, and the only modules that may import them.
ONLY_IN = {
    "mlflow": ("experiments.tracking",),
    "optuna": ("experiments.tune",),
    "pyarrow": ("nas.data", "nas.sources", "analysis.records"),
    "ray": ("experiments.worker", "experiments.cluster", "experiments.schedulers", "experiments.tune"),
}

# What must work without torch: descriptions of architectures, and all that reads records.
TORCH_FREE = ("nas", "nas.genotype", "nas.published", "nas.spaces", "nas.stability", "analysis")

# The order inside `nas`: a module may import those of the lines above its own. Modules on one line may not
# import one another; where one of them should, split the line. A package means its __init__.py, hence last.
ORDER = (
    ("nas",),
    ("nas.config",),
    ("nas.streams",),
    ("nas.execution",),
    ("nas.genotype",),
    ("nas.published",),
    ("nas.spaces.space",),
    ("nas.spaces.cell",),
    ("nas.spaces",),
    ("nas.gates",),
    ("nas.schedule",),
    ("nas.ops",),
    ("nas.files",),
    ("nas.sources",),
    ("nas.data",),
    ("nas.costs",),
    ("nas.draw",),
    ("nas.network",),
    ("nas.supernets.stacked",),
    ("nas.supernets.cell",),
    ("nas.supernets.edge_form",),
    ("nas.supernets",),
    ("nas.samplers",),
    ("nas.state",),
    ("nas.arch_updates", "nas.searchers"),
    ("nas.early_stop",),
    ("nas.methods",),
    ("nas.metrics",),
    ("nas.curvature", "nas.proxies", "nas.stability"),
    ("nas.measures",),
    ("nas.search",),
    ("nas.retrain",),
    ("nas.trial",),
    ("nas.footprint",),
    ("nas.papers",),
)
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Names of the modules that `source`, the text of `module`, imports anywhere; of this project or not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            up = node.level - is_package
            base = ".".join(
                [*parents[: len(parents) - up], *filter(None, [node.module])]
                if node.level
                else [node.module or ""]
            )
            # `from nas import search` imports a module, `from nas.search import run_search` a name in one.
            found |= {name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return found


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    return imports(path.read_text(), module, is_package=path.name == "__init__.py")


@pytest.mark.parametrize("module", FILES)
def test_packages_import_one_way(module: str) -> None:
    allowed = MAY_IMPORT[module.split(".")[0]]
    ours = {name for name in imports_of(module) if name.split(".")[0] in (*MAY_IMPORT, "tests")}
    wrong = {name for name in ours if not any(within(name, package) for package in allowed)}
    assert not wrong, f"{module} imports {sorted(wrong)}; it may import only {allowed}"


@pytest.mark.parametrize("module", FILES)
def test_libraries_stay_in_their_files(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(module)}
    wrong = {library for library, homes in ONLY_IN.items() if library in libraries and module not in homes}
    assert not wrong, f"{module} imports " + ", ".join(
        f"{library}, which only {ONLY_IN[library]} may" for library in wrong
    )


@pytest.mark.parametrize("module", [name for name in FILES if within(name, "nas")])
def test_modules_of_nas_import_only_earlier_ones(module: str) -> None:
    assert module in RANK, (
        f"{module} has no place in the import order; add it to ORDER in tests/test_imports.py"
    )
    later = {
        name
        for name in imports_of(module) & FILES.keys()
        if within(name, "nas") and RANK.get(name, 0) >= RANK[module]
    }
    assert not later, (
        f"{module} imports {sorted(later)}, which ORDER in tests/test_imports.py does not place before it"
    )


@pytest.mark.parametrize("module", FILES)
def test_descriptions_and_analysis_need_no_torch(module: str) -> None:
    if any(module == name or (name != "nas" and within(module, name)) for name in TORCH_FREE):
        assert not {name.split(".")[0] for name in imports_of(module)} & {"torch", "torchvision"}


def test_importing_nas_imports_nothing() -> None:
    assert imports_of("nas") == set()


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("import ray.tune as tune", "nas.search", False, {"ray.tune"}),
        ("from nas import genotype, __doc__", "nas.search", False, {"nas", "nas.genotype"}),
        ("from nas.genotype import Cell", "nas.search", False, {"nas.genotype"}),
        ("from . import genotype", "nas.search", False, {"nas.genotype"}),
        ("from .genotype import Cell", "nas", True, {"nas.genotype"}),
        ("from ..genotype import Cell", "nas.spaces.cell", False, {"nas.genotype"}),
        ("def f():\n    import ray", "nas.search", False, {"ray"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, module: str, is_package: bool, expected: set[str]) -> None:
    assert imports(source, module, is_package) == expected
