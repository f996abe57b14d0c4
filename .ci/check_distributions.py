"""Check the wheels and source distributions in a folder: metadata, licence, and that nothing stranger is inside."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename


def main(folder: Path) -> None:
    """Print one line for each file; the first thing that is wrong ends the process."""
    wheels = {parse_wheel_filename(path.name)[:2]: path for path in folder.glob("*.whl")}
    sdists = {parse_sdist_filename(path.name): path for path in folder.glob("*.tar.gz")}
    require(wheels.keys() == sdists.keys() and wheels, f"wheels {sorted(wheels)} and sdists {sorted(sdists)} differ")
    for name, version in sorted(wheels):
        package = name.replace("-", "_")
        with zipfile.ZipFile(wheels[name, version]) as wheel:
            files = wheel.namelist()
            info = f"{package}-{version}.dist-info"
            text = wheel.read(f"{info}/METADATA")
        tops = {file.partition("/")[0] for file in files}
        # What the core reads of an adapter may stand beside a package whose import is its framework's.
        require(tops - {f"{package}_models.py"} == {package, info}, f"{name}: the wheel holds {sorted(tops)}")
        require(f"{package}/py.typed" in files, f"{name}: no py.typed")
        check_metadata(name, Metadata.from_email(text, validate=True))
        with tarfile.open(sdists[name, version]) as sdist:
            inside = [member.partition("/")[2] for member in sdist.getnames()]
        strangers = [
            file for file in inside if file.startswith(("plugins", "contrib", ".ci", ".venv", "dist", "build"))
        ]
        require(not strangers, f"{name}: the source distribution holds {strangers[:3]}")
        require("LICENSE" in inside and "README.md" in inside, f"{name}: LICENSE or README.md is missing")
        print(f"{name} {version}: {len(files)} files in the wheel, {len(inside)} in the source distribution")


def check_metadata(name: str, data: Metadata) -> None:
    """What an index and a reader want to know is there."""
    require(canonicalize_name(data.name) == name, f"{name}: the metadata are of {data.name}")
    require(data.license_expression == "Apache-2.0", f"{name}: licence {data.license_expression}")
    require(data.license_files == ["LICENSE"], f"{name}: licence files {data.license_files}")
    require(str(data.requires_python) == ">=3.11", f"{name}: Python {data.requires_python}")
    require(data.description_content_type == "text/markdown" and data.description, f"{name}: no README inside")
    require(data.summary, f"{name}: no summary")


def require(truth: object, text: str) -> None:
    """End the process with a message where something does not hold."""
    if not truth:
        raise SystemExit(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
