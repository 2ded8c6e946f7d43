"""The repository root is the package ``tokenfab``."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Keeps this file out of the package that its own folder is."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

KERNELS = ["ml_dtypes>=0.5", "nvidia-ml-py>=12.560", "safetensors>=0.5", "torch>=2.11", "triton>=3.6"]
RAY = ["ray>=2.60"]
TEST = [
    "basedpyright>=1.31",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "playwright>=1.45",
    "pytest>=8.3",
    "pytest-benchmark>=5.3.1",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "setuptools>=70.1",
    "torchao>=0.18",
]

setup(
    cmdclass={"build_py": BuildPy},
    name="tokenfab",
    version=VERSION,
    description="What one GPU kernel contributes to the price of a token",
    python_requires=">=3.11",
    packages=[
        "tokenfab",
        "tokenfab.commands",
        "tokenfab.kernels",
        "tokenfab.bench",
        "tokenfab.costing",
        "tokenfab.costing.imports",
        "tokenfab.costing.levers",
        "tokenfab.costing.report",
        "tokenfab.costing.workload",
    ],
    package_dir={"tokenfab": "."},
    package_data={
        "tokenfab.bench": ["models/*.json", "recorded/*.json*", "templates/*.py", "tuned/*.json"],
        "tokenfab.costing": ["prices.toml"],
        "tokenfab.costing.levers": ["errors.json"],
        "tokenfab.costing.report": ["page.html", "page.js"],
    },
    install_requires=[
        "aiconfigurator-core>=0.12,<0.13",
        "click>=8.1",
        "msgspec>=0.19",
        "numpy>=1.26",
        "packaging>=23",
        "plotly>=6",
        "pyarrow>=16",
        "pyyaml>=6",
        "rich>=13",
    ],
    extras_require={"kernels": KERNELS, "ray": RAY, "test": [*TEST, *RAY]},
    entry_points={
        "console_scripts": ["tokenfab = tokenfab.__main__:main"],
        "pytest11": ["tokenfab = tokenfab.commands.pytest_plugin"],
    },
)
