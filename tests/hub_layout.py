"""Writes sedd_ext in the layout of the kernels hub of Hugging Face, ready to upload.

``python tests/hub_layout.py dist/sedd_ext-*.whl --out build/hub/sedd-ext`` takes the files from a wheel, or from a
folder ``sedd_ext`` with its compiled module. Then ``kernels.get_local_kernel(Path("build/hub/sedd-ext"))`` loads the
operators; it needs torch, numpy and kernels.

The files are those of the wheel, unchanged: their imports are relative, the compiled module uses only Python's limited
API, and operators are registered under the name of the package, which here is the kernel's ``id``. The id contains a
hash of the files, so that several versions can be loaded in one process. Only kernels of the CPU are written: the hub
wants the GPUs of a CUDA build listed, and no GPU has run these kernels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

VARIANT = f"torch-stable-abi26-cpu-{platform.machine()}-linux"
"""For torch 2.6 and all later ones: the compiled module does not use torch at all."""
COMPATIBILITY = '''"""The kernel, for versions of the package kernels that look for it in a folder of its name."""

import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).parent.parent
_name = json.loads((_folder / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({name: getattr(sys.modules[_name], name) for name in sys.modules[_name].__all__})
'''


def write(package: Path, out: Path, license_name: str = "MIT") -> Path:
    """Writes the layout into the folder ``out``, which it replaces.

    Args:
        package: the folder ``sedd_ext`` of an installed or unpacked package.
        out: the kernel's repository.
        license_name: the licence in the metadata.

    Returns:
        The folder of the variant.

    Raises:
        ValueError: the package has no module that fits every version of Python.
    """
    modules = [package / "_C.abi3.so"]
    if not modules[0].is_file():
        raise ValueError(f"package: expected {modules[0]}, found none; build it with pip install -e .")
    files = {path.name: path.read_bytes() for path in (*sorted(package.glob("*.py")), *modules)}
    identity = hashlib.sha256(b"".join(digest(data) for _, data in sorted(files.items()))).hexdigest()[:10]
    files["sedd_ext/__init__.py"] = COMPATIBILITY.encode()
    metadata = {
        "name": "sedd-ext",
        "id": f"_sedd_ext_cpu_{identity}",
        "version": 0,  # as the hub asks while an interface may change
        "license": license_name,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest(data)).decode() for name, data in sorted(files.items())},
        },
    }
    files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    shutil.rmtree(out, ignore_errors=True)
    variant = out / "build" / VARIANT
    for name, data in files.items():
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_bytes(data)
    return variant


def check_cpu_only(package: Path) -> None:
    """Raises a ValueError if the module of a package has CUDA kernels, and would be published as one without."""
    module = package / "_C.abi3.so"
    if module.is_file() and b"score_entropy_workspace\0" in module.read_bytes():
        raise ValueError(
            f"package: expected kernels of the CPU only, got CUDA kernels in {module}; build with SEDD_CUDA=off"
        )


def digest(data: bytes) -> bytes:
    """The SHA-256 digest of a file."""
    return hashlib.sha256(data).digest()


def main(arguments: Iterable[str] | None = None) -> None:
    """Writes the layout and prints its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="a wheel, or a folder sedd_ext with its compiled module")
    parser.add_argument("--out", type=Path, required=True, help="folder of the kernel's repository; it is replaced")
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        package = options.package
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                wheel.extractall(folder)
            package = Path(folder) / "sedd_ext"
        check_cpu_only(package)
        print(write(package, options.out))


if __name__ == "__main__":
    sys.exit(main())
