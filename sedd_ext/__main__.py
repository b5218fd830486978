"""``python -m sedd_ext``: what was built, and what of it this machine uses."""

import torch

from sedd_ext import _C


def describe() -> str:
    """Version, instruction sets, CUDA or not, and threads, one to a line."""
    isas = ", ".join(f"{isa} (in use)" if isa == _C.isa() else isa for isa in _C.available_isas())
    lines = {
        "sedd_ext": f"{_C.__version__}, built with {_C.compiler}",
        "torch": torch.__version__,
        "instruction sets": isas,
        "CUDA kernels": f"built with nvcc {_C.cuda}" if _C.cuda else "not built",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }
    return "\n".join(f"{name + ':':18}{value}" for name, value in lines.items())


if __name__ == "__main__":
    print(describe())
