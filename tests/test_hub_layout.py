"""The layout of the kernels hub: loaded by the package kernels, beside sedd_ext, with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_layout
import pytest

import sedd_ext

pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the variant is one for Linux")

PROGRAM = r'''
import sys
from pathlib import Path

import kernels
import torch


class Missing:
    """Stands for an environment in which these packages are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sedd", "sedd_ext", "pybind11"):
            raise ModuleNotFoundError(name, name=name)


sys.meta_path.insert(0, Missing())
hub = kernels.get_local_kernel(Path(sys.argv[1]))


def results(ext):
    torch.manual_seed(0)
    process = ext.Absorbing(300)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((8, 16), (301, 16), (301,)))
    x_0, x_t, sigma = torch.randint(300, (8,)), torch.full((8,), 300), torch.rand(8) + 0.1
    log_score = (hidden @ weight.T + bias).detach().requires_grad_()
    losses = [
        ext.score_entropy_loss(log_score, x_t, x_0, sigma, process, reduction="mean"),
        ext.mean_prediction_loss(log_score, x_t, x_0, sigma, process).sum(),
        ext.linear_score_entropy_loss(hidden, weight, bias, x_t, x_0, sigma, process).sum(),
    ]
    gradients = [torch.autograd.grad(loss, log_score)[0] for loss in losses[:2]]
    gradients += torch.autograd.grad(losses[2], (hidden, weight, bias))
    step = ext.Tweedie(sigma / 2)
    return [
        *losses,
        *gradients,
        ext.sample_transition(x_0, sigma, process),
        ext.reverse_probs(log_score.detach(), x_t, step, process),
        ext.reverse_sample(log_score.detach(), x_t, step, process),
        ext.linear_reverse_sample(hidden, weight, bias, x_t, step, process),
        *ext.unmask(log_score.detach()),
    ]


alone = results(hub)
compiled = torch.compile(hub.score_entropy_loss, fullgraph=True, backend="eager")
arguments = (torch.zeros(2, 9), torch.tensor([8, 8]), torch.tensor([1, 2]), 1.0, hub.Absorbing(8))
assert torch.equal(compiled(*arguments), hub.score_entropy_loss(*arguments))
assert not [name for name in sys.modules if name.split(".")[0] in ("sedd", "sedd_ext", "pybind11")]

del sys.meta_path[0]
import sedd_ext

assert sedd_ext._C.__file__ != hub._C.__file__
for one, other, again in zip(alone, results(sedd_ext), results(hub), strict=True):
    assert torch.equal(one, other) and torch.equal(one, again)
there, here = (getattr(torch.ops, ext.__name__).score_entropy.default for ext in (hub, sedd_ext))
assert str(there) == f"{hub.__name__}.score_entropy.default" and str(here) == "sedd_ext.score_entropy.default"

sys.path.insert(0, str(Path(hub.__file__).parents[0]))
del sys.modules["sedd_ext"]
import sedd_ext as older  # as older versions of kernels import it

assert older.score_entropy_loss is hub.score_entropy_loss
print("same")
'''


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "sedd-ext"
    hub_layout.write(Path(sedd_ext.__file__).parent, folder)
    return folder


def test_it_loads_alone_and_beside_the_package_with_the_same_results(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(repository)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(sedd_ext.__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"


def test_another_build_has_another_name(repository: Path, tmp_path: Path) -> None:
    (variant,) = (repository / "build").iterdir()
    package = tmp_path / "sedd_ext"
    package.mkdir()
    for path in (*variant.glob("*.py"), variant / "_C.abi3.so"):
        (package / path.name).write_bytes(path.read_bytes())
    same = hub_layout.write(package, tmp_path / "same")
    with open(package / "step.py", "a") as file:
        file.write("# changed\n")
    other = hub_layout.write(package, tmp_path / "other")
    names = [json.loads((folder / "metadata.json").read_text())["id"] for folder in (variant, same, other)]
    assert names[0] == names[1] != names[2]


def test_cuda_kernels_are_not_published_as_those_of_the_cpu(tmp_path: Path) -> None:
    module = tmp_path / "_C.abi3.so"
    module.write_bytes(Path(sedd_ext._C.__file__).read_bytes())
    if not sedd_ext._C.cuda:
        hub_layout.main([str(tmp_path), "--out", str(tmp_path / "out")])
        module.write_bytes(module.read_bytes() + b"score_entropy_workspace\0")
    with pytest.raises(ValueError, match="package: expected kernels of the CPU only, got CUDA kernels"):
        hub_layout.main([str(tmp_path), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_a_folder_without_the_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"package: expected .*_C\.abi3\.so, found none"):
        hub_layout.write(tmp_path, tmp_path / "out")
