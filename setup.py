"""Packaging of MetroEM."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "metroem" / "__init__.py").read_text(), re.M
)
# Where this repository lives: `METROEM_URL=https://... python -m build`.
URL = os.environ.get("METROEM_URL", "").rstrip("/")

setup(
    name="metroem",
    version=VERSION[1] if VERSION else "0",
    description="Trains aligners for serial-section electron microscopy",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="MetroEM contributors",
    license_expression="Apache-2.0",
    keywords=["electron microscopy", "image registration", "connectomics"],
    url=URL or None,
    project_urls={"Changelog": f"{URL}/blob/main/CHANGELOG.md"} if URL else {},
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["metroem", "metroem.*"]),
    package_data={
        "metroem": [
            "py.typed",
            "**/*.json",
            "**/*.html",
            "**/*.css",
            "**/*.js",
            "**/templates/*.py",
            "models/pretrained/*",
        ],
    },
    # The three scripts that people know by name, on the PATH beside `metroem`.
    scripts=["download_image.py", "download_field.py", "train.py"],
    entry_points={"console_scripts": ["metroem=metroem.__main__:entry_point"]},
    install_requires=[
        "artificery>=0.0.3.3",
        "boto3",
        "cachetools",  # modelhouse imports it and does not declare it
        # Bounded: metroem/io/ sets the time limits of these two by private parts.
        "cloud-files>=6,<7",
        "cloud-volume>=12,<13",
        "crc32c",  # this and zstandard come with cloud-files
        "filelock>=4",
        "google-auth",
        "h5py",
        "modelhouse>=0.1.4",
        "msgspec>=0.22",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "requests",
        "scalenet>=0.1.0",
        "scipy",
        "tenacity",
        "tifffile",
        "torch>=2.6",
        "torchfields>=0.1.2",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "queue": ["task-queue"],  # of metroem align-stack --queue and worker
        "tensorboard": ["tensorboard"],  # of train.py --tensorboard
        "view": ["neuroglancer"],  # of metroem view
        "zarr": ["numcodecs"],  # of Zarr and N5 in blosc, lz4 and with filters
        # To lint, test and build docs/. requirements-dev.txt pins them.
        "dev": [
            "furo",
            "hypothesis",
            "ipykernel",
            "moto[s3,server]",
            "myst-parser",
            "nbclient",
            "neuroglancer",
            "numcodecs",
            "pip-audit",
            "pyright",
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "ruff",
            "sphinx",
            "sphinx-copybutton",
            "task-queue",
            "tensorboard",
        ],
    },
)
