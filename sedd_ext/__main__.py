"""``python -m sedd_ext`` prints what was built and what this machine uses of it."""

import torch

from . import _C


def _cuda() -> str:
    """Whether CUDA kernels were built, and the devices that can run them."""
    if not _C.cuda:
        return "not built"
    if torch.version.cuda is None:
        devices = f"no use here, as torch {torch.__version__} knows no CUDA devices"
    elif not torch.cuda.is_available():
        devices = "no GPU or driver found"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"built with nvcc {_C.cuda}; {devices}"


def describe() -> str:
    """Version, instruction sets, CUDA or not, and threads, one to a line."""
    isas = ", ".join(f"{isa} (in use)" if isa == _C.isa() else isa for isa in _C.available_isas())
    lines = {
        "sedd_ext": f"{_C.__version__}, built with {_C.compiler}",
        "torch": torch.__version__,
        "instruction sets": isas,
        "CUDA kernels": _cuda(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }
    return "\n".join(f"{name + ':':18}{value}" for name, value in lines.items())


if __name__ == "__main__":
    print(describe())
