"""The static check of the CUDA kernels: does it read what the tools print, count the right path, find what is wrong?

Programs are short, made of instructions as cuobjdump prints them.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SUMS = "_ZN4sedd43_GLOBAL__N__b56c716a_10_reverse_cu_d09d9e8b11sums_kernelIfEEvNS_13ReverseParamsENS_6TilingEPf"
GRADIENT = (
    "_ZN4sedd49_GLOBAL__N__301e6ede_16_score_entropy_cu_8e9966b815gradient_kernelILNS_6FamilyE1EfEEv"
    "NS_18ScoreEntropyParamsENS_6TilingEPKNS0_15GradientNumbersINS0_6VectorIT0_E4RealEEE"
)

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4sedd1cu12probs_kernelILNS_6FamilyE0EfLb1EEEvNS_1PE' for 'sm_100'
ptxas info    : Function properties for _ZN4sedd1cu12probs_kernelILNS_6FamilyE0EfLb1EEEvNS_1PE
    24 bytes stack frame, 24 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 448 bytes smem
ptxas info    : Compiling entry function '_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE' for 'sm_100'
ptxas info    : Function properties for _ZN4sedd1cu11exponentialEd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _ZN4sedd1cu13sample_kernelENS_16TransitionParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
ptxas info    : Compile time = 8.092 ms
"""

SASS = """\
	code for sm_90
		Function : _ZN4sedd1cu13sample_kernelENS_16TransitionParamsE
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*08d0*/              @!UP0 LDG.E.128 R4, desc[UR4][R30.64+0x200] ;                /* 0x000200041e040981 */
                                                                                          /* 0x000ea2000c1e1d00 */
        /*08e0*/               @P0 BRA P2, 0x17c0 ;                                       /* 0x0000000000007947 */
        /*08f0*/                   EXIT ;                                                 /* 0x000000000000794d */
        /*1970*/                   BRA 0x1970;                                            /* 0xfffffffc00fc7947 */
        /*1980*/                   NOP;                                                   /* 0x0000000000007918 */
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cuda_check")


def assemble(name: str, lines: list[str]) -> str:
    """Instructions, and labels with a colon, as cuobjdump -sass would print them."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    text = [f"\t\tFunction : {name}"]
    for at, line in enumerate(code):
        line = re.sub(r"\b(?:" + "|".join(labels or ["$^"]) + r")$", lambda m: f"{labels[m[0]]:#x}", line)
        guard, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        text.append(
            f"        /*{16 * at:04x}*/ {guard:>17} {rest} ;  /* 0x000fe20000000800 */\n  /* 0x000fe200078e00ff */"
        )
    return "\n".join(text)


def whole_vectors(stores: str = "") -> list[str]:
    """The fast path: four loads, then four vectors of four elements, each behind a branch."""
    lines = [f"@P{i} LDG.E.128 R{8 + 4 * i}, desc[UR4][R30.64+{512 * i:#x}]" for i in range(4)]
    for i in range(4):
        lines.append(f"@!P{i} BRA vector{i}")
        lines += [
            text for j in range(4) for text in (f"FADD R{8 + 4 * i + j}, R{8 + 4 * i + j}, -R28", "MUFU.EX2 R4, R5")
        ]
        lines += [stores.format(8 + 4 * i)] if stores else []
        lines.append(f"vector{i}:")
    return lines


SLOW = ["slow:", "LDG.E R7, desc[UR4][R6.64]", "MUFU.EX2 R11, R11", "@!P2 BRA P3, slow", "quick:"]
SUM = ["BRA.DIV UR4, apart", "SHFL.BFLY PT, R3, R32, 0x10, 0x1f", "@P0 EXIT", "STG.E desc[UR4][R2.64], R7", "EXIT"]
APART = ["apart:", "EXIT"]
START = ["S2R R23, SR_TID.X", "CALL.REL.NOINC divide", "@P0 EXIT"]
DIVIDE = ["divide:", "@P4 BRA short", "I2F.RP R4, R6", "short:", "MUFU.RCP R4, R4", "RET.REL.NODEC R2 0x0"]
WHOLE = [*START, *whole_vectors(), "@P0 BRA quick", *SLOW, *SUM, *APART, *DIVIDE]


def sums_kernel(check: Any, lines: list[str]) -> Any:
    log = f"Compiling entry function '{SUMS}' for 'sm_90'\nFunction properties for {SUMS}\n"
    log += "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 40 registers"
    (kernel,) = check.kernels_of("reverse", 90, log, assemble(SUMS, lines))
    return kernel


# ---- reading


def test_ptxas_report(check: Any) -> None:
    step, called, sample = check.parse_ptxas(PTXAS).values()
    assert (step.registers, step.shared) == (40, 448)
    assert step.local == {"stack frame": 24, "spill stores": 24, "spill loads": 80}
    assert (sample.registers, sample.shared) == (22, 0)
    assert called.registers == 0
    assert not any([*sample.local.values(), *called.local.values()])


def test_machine_code(check: Any) -> None:
    ((name, code),) = check.parse_sass(SASS).items()
    assert name == "_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE"
    assert [i.opcode for i in code] == ["LDG.E.128", "BRA", "EXIT", "BRA", "NOP"]
    assert [i.guard for i in code] == ["@!UP0", "@P0", "", "", ""]
    assert [i.kind for i in code] == ["load", "other", "other", "other", "other"]
    assert [i.target for i in code] == [-1, 0x17C0, -1, 0x1970, -1]
    assert code[0].operands == "R4, desc[UR4][R30.64+0x200]"


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (SUMS, ("sums_kernel", ["float32"])),
        (GRADIENT, ("gradient_kernel", ["uniform", "float32"])),
        (
            "_ZN1x8b12probs_kernelILNS_6FamilyE2ENS_8BFloat16ELb0EEEvNS_1PEiib",
            ("probs_kernel", ["vector", "bfloat16", "false"]),
        ),
        ("_ZN1x815entries_kernelILb0EdEEvNS_16TransitionParamsE", ("entries_kernel", ["false", "float64"])),
        ("_ZN1x7013sample_kernelENS_16TransitionParamsE", ("sample_kernel", [])),
        ("_ZN1x813unmask_kernelILNS_10UnmaskSumsE2ENS_4HalfEEEvNS_1PEii", ("unmask_kernel", ["both", "float16"])),
        ("_ZN1x11exponentialEd", None),
    ],
)
def test_names(check: Any, mangled: str, expected: Any) -> None:
    assert check.demangle(mangled) == expected


@pytest.mark.parametrize(
    ("stem", "mangled", "key"),
    [
        ("score_entropy", "_ZN1x811tile_kernelILb1ELNS_6FamilyE0EfEEvNS_1PE", "score_entropy.tile_kernel<true>"),
        ("score_entropy", "_ZN1x819tile_numbers_kernelILNS_6FamilyE0EfEEvNS_1PE", "score_entropy.tile_numbers_kernel"),
        ("reverse", "_ZN1x811tile_kernelILNS_6FamilyE2ENS_4HalfEEEvNS_1PEii", "reverse.tile_kernel"),
        (
            "reverse_mean",
            "_ZN1x818mean_sample_kernelILNS_6FamilyE0EfLb1EEEvNS_1PEii",
            "reverse_mean.mean_sample_kernel<true>",
        ),
        (
            "reverse_mean",
            "_ZN1x817mean_probs_kernelILNS_6FamilyE0EfLb1ELb0EEEvNS_1PEiii",
            "reverse_mean.mean_probs_kernel<true, false>",
        ),
    ],
)
def test_kernels_of_one_name_have_their_own_bounds(check: Any, stem: str, mangled: str, key: str) -> None:
    log = PTXAS.replace("_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE", mangled)
    (*_, kernel) = check.kernels_of(stem, 90, log, "")
    assert kernel.key == key
    assert key in check.BOUNDS


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        (90, 256, 64, 0, 32),  # 2,048 registers a warp: 8 warps a quarter, 4 blocks
        (90, 256, 65, 0, 24),  # 2,304: 7 warps a quarter, 28 in all, 3 blocks
        (80, 256, 48, 0, 40),
        (80, 768, 80, 0, 24),  # 2,560: 6 warps a quarter, one block of 24
        (90, 1024, 72, 0, 0),  # 28 warps, which a block of 32 exceeds
        (100, 32, 16, 0, 32),  # 32 blocks
        (120, 256, 32, 0, 48),
        (120, 32, 16, 0, 24),
        (90, 256, 16, 100 << 10, 16),  # 2 blocks in 228 KiB, with 1 KiB each for the system
        (120, 256, 16, 50 << 10, 8),
    ],
)
def test_occupancy(check: Any, arch: int, threads: int, registers: int, shared: int, warps: int) -> None:
    assert check.resident_warps(arch, threads, registers, shared) == warps


# ---- the path


def test_path_through_a_kernel(check: Any) -> None:
    kernel = sums_kernel(check, WHOLE)
    (path,) = kernel.paths
    # 3 to begin with and 3 of the division; 4 loads; 4 times a branch and 8 instructions; a branch; 5 to end with
    assert path.total == 6 + 4 + 4 * 9 + 1 + 5
    assert path.core == 4 + 4 * 9
    assert path.kinds == {"other": 14, "mufu": 1, "load": 4, "fp32": 16, "exp": 16, "narrow store": 1}
    assert (path.elements, path.double, path.together) == (16, 0, True)
    assert list(check.violations(kernel)) == []


def test_path_where_the_last_exit_is_guarded(check: Any) -> None:
    lines = [*whole_vectors("STG.E.128 desc[UR4][R28.64], R{}"), "@P0 EXIT", *SLOW[:-1], "EXIT"]
    (path,) = check.Graph(check.parse_sass(assemble(GRADIENT, lines))[GRADIENT]).main_paths()
    counts = check.Counts.of(path, 16)
    assert (counts.count("exp"), counts.count("store"), counts.count("narrow load")) == (16, 4, 0)
    assert path[-1].opcode == "EXIT"


def test_path_once_through_a_loop(check: Any) -> None:
    """Beside the loads the loop has a way without them, and a slow loop inside."""
    loop = ["head:", "@P5 BRA copied", *whole_vectors(), "@P0 BRA quick", *SLOW, "BRA next", "copied:", "MOV R1, R2"]
    lines = ["S2R R23, SR_TID.X", *loop, "next:", "STS [R5], R6", "@!P6 BRA head", "EXIT"]
    (path,) = check.Graph(check.parse_sass(assemble(SUMS, lines))[SUMS]).main_paths()
    assert len(path) == 1 + 4 + 4 * 9 + 1 + 1 + 2
    assert path[0].operands.startswith("0x")
    assert path[-1].guard == "@!P6"


def test_path_through_a_kernel_that_keeps_a_row(check: Any) -> None:
    """A loop that copies, and loops that read the copy; of loads from shared memory, one may wait for another."""
    copies = [f"LDGSTS.E.BYPASS.128 [R{17 + i}], desc[UR8][R18.64+{512 * i:#x}]" for i in range(4)]
    short = ["@P0 BRA partial", "@!PT LDS RZ, [RZ]", *copies, "BRA copied"]
    partial = ["partial:", "@P1 BRA skip", *copies, "skip:", "LDG.E R4, desc[UR4][R2.64]", "STS [R5], R4", "copied:"]
    copy = ["copy:", *short, *partial, "LDGDEPBAR", "@!P6 BRA copy"]
    reads = [re.sub(r"LDG.E.128 (R\d+), .*", r"LDS.128 \1, [R39]", line) for line in whole_vectors()]
    passes = [
        [f"pass{i}:", *(line.replace("vector", f"part{i}") for line in reads), f"@!P6 BRA pass{i}"] for i in range(2)
    ]
    last = [line.replace("vector", "last") for line in whole_vectors("STG.E.128 desc[UR4][R28.64], R{}")]
    last = ["pass2:", *(re.sub(r"LDG.E.128 (R\d+), .*", r"LDS.128 \1, [R39]", line) for line in last), "@!P6 BRA pass2"]
    passes[0].insert(2, "FADD R1, R8, R2")  # waits for the first load
    other = ["sum:", "LDS.64 R4, [R5]", "@!P6 BRA sum"]
    name = "_ZN4sedd1cu12probs_kernelILNS_6FamilyE0EfLb1EEEvNS_1PE"
    log = PTXAS.replace("24 bytes", "0 bytes").replace("80 bytes", "0 bytes").replace(", 448 bytes smem", "")
    code = ["S2R R23, SR_TID.X", *copy, *passes[0], *other, *passes[1], *last, "EXIT"]
    kernel, *_ = check.kernels_of("reverse", 90, log, assemble(name, code))
    assert [(path.total, path.count("copy"), path.count("kept")) for path in kernel.paths] == [
        (1 + 1 + 4 + 1 + 2, 4, 0),
        (4 + 4 * 9 + 2, 0, 4),
        (4 + 4 * 9 + 1, 0, 4),
        (4 + 4 * 10 + 1, 0, 4),
    ]
    assert list(check.violations(kernel)) == []


@pytest.mark.parametrize(
    ("arch", "dtype", "keeps"),
    [(80, "float32", False), (80, "bfloat16", True), (90, "float32", True), (120, "float32", False)],
)
def test_the_kernel_that_a_gpu_has_room_for(check: Any, arch: int, dtype: str, keeps: bool) -> None:
    counts = check.Counts(16, 100, 0, 0, True, {})
    kernels = [
        check.Kernel(arch, "reverse.probs_kernel", ["absorbing", dtype, flag], check.Resources(), 0, [counts] * paths)
        for flag, paths in (("true", 4), ("false", 3))
    ]
    (cost,) = check.costs(kernels)["reverse probabilities", "absorbing", dtype].values()
    assert cost.kernel.arguments[-1] == ("true" if keeps else "false")
    assert len(cost.paths) == (3 if keeps else 2)


LOOP = [*whole_vectors(), "@!P6 BRA head"]


def test_loads_of_a_draw_are_in_no_main_loop(check: Any) -> None:
    """The path leads through the innermost loop with 128-bit loads, not through what surrounds or follows it."""
    nested = ["outer:", "LDG.E.128 R4, desc[UR4][R2.64]", "head:", *LOOP, "BAR.SYNC 0x0", "@!P5 BRA outer"]
    voting = ["draw:", "LDG.E.128 R4, desc[UR4][R2.64]", "VOTE.ANY R5, PT, P6", "@!P5 BRA draw"]
    for lines in (nested, ["head:", *LOOP, "LDG.E.128 R4, desc[UR4][R2.64]"], ["head:", *LOOP, *voting]):
        (path,) = check.Graph(
            check.parse_sass(assemble(SUMS, ["S2R R23, SR_TID.X", *lines, "EXIT"]))[SUMS]
        ).main_paths()
        assert len(path) == 4 + 4 * 9 + 1


def test_alternatives_are_sorted_by_length(check: Any) -> None:
    mangled = SUMS.replace("11sums_kernel", "11tile_kernel")
    weights = ["weights:", "FADD R1, R2, R3", *whole_vectors(), "@!P6 BRA weights", "EXIT"]
    scores = ["scores:", *(line.replace("vector", "other") for line in whole_vectors()), "@!P6 BRA scores", "EXIT"]
    log = PTXAS.replace("_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE", mangled)
    (*_, kernel) = check.kernels_of("reverse", 90, log, assemble(mangled, ["@P0 BRA scores", *weights, *scores]))
    assert kernel.key == "reverse.tile_kernel"
    assert [path.total for path in kernel.paths] == [41, 42]


# ---- the rules


def changed(lines: list[str], old: str, new: str, count: int = 1) -> list[str]:
    assert any(old in line for line in lines)
    return "\n".join(lines).replace(old, new, count).split("\n")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["STL [R1], R2", *WHOLE], "local memory: 1 accesses"),
        (changed(WHOLE, "MUFU.EX2 R4, R5", "LDL.LU R4, [R1]"), "local memory: 1 accesses"),
        (changed(WHOLE, "LDG.E.128", "LDG.E.64"), "main loop 1: 3 128-bit loads, 4 wanted"),
        (changed(WHOLE, "LDG.E.128", "LDG.E", 4), "0 main loops with 128-bit accesses, 1 wanted"),
        (changed(WHOLE, "@P3 LDG", "FADD R1, R9, R2\n@P3 LDG"), "main loop 1: the loads wait for one another"),
        (changed(WHOLE, "FADD R9", "DADD R8"), "main loop 1: 1 double-precision instructions"),
        (changed(WHOLE, "MUFU.EX2 R4, R5", "FMUL R4, R5, R5"), "main loop 1: 15 MUFU.EX2 for 16 elements"),
    ],
)
def test_rules_of_the_machine_code(check: Any, lines: list[str], expected: str) -> None:
    assert expected in list(check.violations(sums_kernel(check, lines)))


@pytest.mark.parametrize(("more", "expected"), [(5, []), (4, ["main loop 1: 20 MUFU.EX2 for 16 elements"])])
def test_exponentials_beside_those_of_the_elements(check: Any, more: int, expected: list[str]) -> None:
    """A sum relative to the largest logit is rescaled once a vector, and once for the sum of all lanes."""
    mangled = SUMS.replace("11sums_kernel", "13others_kernel")
    log = PTXAS.replace("_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE", mangled)
    sass = assemble(mangled, [*whole_vectors(), *["MUFU.EX2 R4, R5"] * more, "EXIT"])
    assert list(check.violations(check.kernels_of("mean_prediction", 90, log, sass)[-1])) == expected


@pytest.mark.parametrize(("count", "expected"), [(8, []), (9, ["main loop 1: 9 double-precision instructions"])])
def test_numbers_of_a_row_among_the_loads(check: Any, count: int, expected: list[str]) -> None:
    mangled = GRADIENT.replace("score_entropy", "mean_prediction")
    log = PTXAS.replace("_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE", mangled)
    load, *rest = whole_vectors("STG.E.128 desc[UR4][R28.64], R{}")
    sass = assemble(mangled, [load, *["DMUL R40, R42, R44"] * count, *rest, "EXIT"])
    assert list(check.violations(check.kernels_of("mean_prediction", 90, log, sass)[-1])) == expected


@pytest.mark.parametrize("store", ["STG.E desc[UR4][R28.64], R{}", "STG.E.128 desc[UR4][R28.64], R{}"])
def test_stores(check: Any, store: str) -> None:
    log = PTXAS.replace("_ZN4sedd1cu13sample_kernelENS_16TransitionParamsE", GRADIENT)
    sass = assemble(GRADIENT, [*whole_vectors(store), "EXIT"])
    gradient = check.kernels_of("score_entropy", 90, log, sass)[-1]
    assert gradient.label == "score_entropy.gradient_kernel<uniform, float32>"
    missing = [] if ".128" in store else ["main loop 1: 0 128-bit stores, 4 wanted"]
    assert list(check.violations(gradient)) == missing


def test_rules_of_the_resources(check: Any) -> None:
    probs, *_ = check.kernels_of("reverse", 100, PTXAS, "")
    assert list(check.violations(probs)) == [
        "local memory: 24 bytes of stack frame, 24 bytes of spill stores, 80 bytes of spill loads",
        "448 bytes of static shared memory, none wanted where a row may take all",
        "0 main loops with 128-bit accesses, 4 wanted",
    ]
    (*_, sample) = check.kernels_of("another", 100, PTXAS, "")
    assert list(check.violations(sample)) == ["no bounds are stated for it in cuda_check.py"]
    (*_, sample) = check.kernels_of("transition", 100, PTXAS.replace("Used 22", "Used 65"), "")
    assert list(check.violations(sample)) == ["65 registers a thread, at most 64 wanted"]


# ---- the roofline and the page


def test_roofline(check: Any) -> None:
    kernel = sums_kernel(check, WHOLE)
    gpu = check.Gpu("small", 90, bytes=1e9, processors=2, clock=1e6, fp32=64)
    elements = 8192 * 50_258
    limits = {
        name: seconds / elements for name, seconds in check.Cost("sums", kernel, kernel.paths).seconds(gpu).items()
    }
    assert limits["memory"] == pytest.approx(4e-9)
    assert limits["issue"] == pytest.approx(52 / 16 / 128 / 2e6)
    assert limits["FP32"] == pytest.approx(16 / 16 / 64 / 2e6)
    assert limits["MUFU"] == pytest.approx(17 / 16 / 16 / 2e6)
    assert limits["L1"] == pytest.approx(4 * 512 / 128 / 512 / 2e6)


def test_page(check: Any, tmp_path: Path) -> None:
    docs = tmp_path / "kernels.md"
    docs.write_text(f"# Kernels\n\n{check.BEGIN}\nold\n{check.END}\nrest\n", encoding="utf-8")
    text = check.page("13.0", [sums_kernel(check, WHOLE)], [90], 0)
    check.refresh(docs, text)
    assert docs.read_text(encoding="utf-8") == f"# Kernels\n\n{check.BEGIN}\n\n{text}\n\n{check.END}\nrest\n"
    assert "NOTHING HERE IS MEASURED" in text
    assert re.search(r"reverse.sums_kernel +\| 40 +\| 64 +\| 256 +\| 48 of 64", text)
    docs.write_text("# Kernels\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="needs the lines"):
        check.refresh(docs, text)
    assert docs.read_text(encoding="utf-8") == "# Kernels\n"


# ---- the tools


def test_tools_are_found(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "path/other",
        "toolkit/bin/nvcc",
        "toolkit/bin/cuobjdump",
        "site/nvidia/cu13/bin/nvdisasm",
        "chosen/nvcc",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    for name in ("CUDACXX", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(check.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    assert check.find_tool("nvcc") == str(tmp_path / "toolkit/bin/nvcc")
    assert check.find_tool("nvdisasm") == str(tmp_path / "site/nvidia/cu13/bin/nvdisasm")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "chosen/nvcc"))
    assert check.find_tool("nvcc") == str(tmp_path / "chosen/nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert check.find_tool("cuobjdump", beside=str(tmp_path / "toolkit/bin/nvcc")) == str(
        tmp_path / "toolkit/bin/cuobjdump"
    )


@pytest.mark.parametrize(("there", "missing"), [([], "nvcc"), (["nvcc"], "cuobjdump")])
def test_without_tools(
    check: Any, there: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "find_tool", lambda name, beside=None: name if name in there else None)
    assert check.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cuda-check: {missing} ")


def test_unknown_architecture(check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        check.main(["--archs", "90,42"])
    assert stopped.value.code == 2
    assert "--archs: expected some of 80,90,100,120, got 90,42" in capsys.readouterr().err


@pytest.fixture
def nvcc(check: Any) -> str:
    found = check.find_tool("nvcc")
    if found is None or check.find_tool("cuobjdump", beside=found) is None:
        pytest.skip("needs nvcc and cuobjdump")
    return found


@pytest.mark.usefixtures("nvcc")
@pytest.mark.costly("csrc/*.h", "csrc/common", "csrc/cuda", "benchmarks/cuda_check.py")
@pytest.mark.timeout(1800)
def test_the_rules_hold_on_all_gpus(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--check-only"]) == 0, capsys.readouterr().out


@pytest.mark.usefixtures("nvcc")
def test_real_kernels(check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tools' output is understood."""
    out = tmp_path / "check.json"
    source = ROOT / "csrc" / "cuda" / "transition.cu"
    status = check.main([str(source), "--archs", "90", "--json", str(out), "--docs", str(tmp_path / "none.md")])
    report = json.loads(out.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert status == bool(report["violations"])
    assert all(line in printed for line in report["violations"])
    assert not any("not found" in line or "no bounds" in line for line in report["violations"])
    kernels = {f"{kernel['name']}<{', '.join(kernel['arguments'])}>": kernel for kernel in report["kernels"]}
    assert {"transition.entries_kernel<true, float32>", "transition.entries_kernel<false, float64>"} < kernels.keys()
    assert all(16 <= kernel["resources"]["registers"] <= 255 for kernel in kernels.values())
    (path,) = kernels["transition.entries_kernel<true, float32>"]["paths"]
    assert path["kinds"]["store"] >= 1
    assert path["elements"] == 16
    assert any(times["operation"][0] == "transition row or column" for times in report["times"])
