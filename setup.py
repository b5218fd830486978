"""Hands the build of sedd_ext._C to CMake; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("sedd_ext: expected a Python with the GIL, got a free-threaded one, which has no limited API")


class CMakeBuild(build_ext):
    """Builds the one extension with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds into the folder where setuptools expects the extension."""
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        for old in target.parent.glob("_C.*so"):  # of another build, which Python might prefer to this one
            old.unlink()
        build = Path(self.build_temp).resolve() / "cmake"
        # Anew: what CMake remembers of the last build, such as pip's isolated Ninja or a compiler, may be gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "SEDD_VERSION": self.distribution.get_version(),
            "SEDD_CUDA": os.environ.get("SEDD_CUDA", "auto"),
            "SEDD_CUDA_ARCHS": os.environ.get("SEDD_CUDA_ARCHS", ""),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", source, "-B", build, *defines])
        subprocess.check_call(["cmake", "--build", build, "--target", "_C"])


setup(
    ext_modules=[Extension("sedd_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
