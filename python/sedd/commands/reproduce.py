"""``sedd reproduce``: trains and evaluates the rows of a paper's table, and sets the figures beside the paper's."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from sedd.commands import train
from sedd.commands.command import Argument, Command
from sedd.commands.comparison import provenance, write_comparison
from sedd.commands.measures import MEASURES
from sedd.config import TrainConfig, flat
from sedd.files import naming, whole_file, write_json
from sedd.hints import program
from sedd.options import build, check_one_of, check_options, checked
from sedd.plain import read_json
from sedd.progress import console, printable
from sedd.recipes import Scale, load_recipe, load_setting, recipe_names
from sedd.recipes.plan import Job, Plan, data_file, make_plan
from sedd.training.checkpoint import list_checkpoints, read_state

__all__ = ["ReproduceOptions", "check_job", "reproduce"]

ABOUT = """Reproduce a table or a figure of the papers.

Trains and evaluates row after row, and writes OUT/NAME-SCALE.html and .md: the figures beside those of the paper, and
whether they have the paper's order. A second call continues where the first one stopped. Tables that need the same runs
share them.

Scales: full (the paper's model, data and budget), small (two cores, about an hour, files that you give with --data) and
smoke (seconds, made-up text, to see that everything works).

examples:
  sedd reproduce list
      all tables and figures, and what runs here
  sedd reproduce sedd-table2 --data text8=text8.txt
      bits per character of D3PM, SEDD and an autoregressive model
  sedd reproduce sedd-table2 --scale smoke
  sedd reproduce sedd-table1 --scale full --commands
      print the commands, to run them on a cluster; a later call without --commands evaluates their runs
"""

PARTS = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}
"""Where the parts of a file begin and end. For text8, they are those of the papers."""


@dataclass
class ReproduceOptions:
    """Reproduction"""

    scale: Scale = "small"
    """full, small or smoke."""
    out: str = "reproduce"
    """Folder of all runs, results and pages."""
    seeds: int = 1
    """Number of runs for each row, with different seeds. Errors then contain the spread of the seeds."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("seeds",))


def reproduce(recipe: str, options: ReproduceOptions, data: Sequence[str], commands: bool) -> int:
    """Runs a recipe, or lists all of them."""
    if recipe == "list":
        _list(options.scale)
        return 0
    check_one_of("recipe", recipe, ["list", *recipe_names()])
    table = load_recipe(recipe)
    setting = load_setting(table.setting, options.scale)
    out = Path(options.out).absolute()
    plan = make_plan(table, options.scale, out, _files(data, setting.inputs), options.seeds)
    if not plan.jobs:
        known = [row.elsewhere for row in table.rows.values()]
        reasons = dict.fromkeys(str(reason) for reason in plan.cells.values() if reason not in known)
        raise ValueError(f"recipe: no row of {recipe} can run at scale {options.scale}: {'; '.join(reasons)}")
    for job in plan.jobs.values():
        check_job(job)
    folder = out / options.scale
    if commands:
        _prepare(plan, folder, data)
        for job in plan.jobs.values():
            if job.evaluation is not None:
                _make_folder(job.results.parent)
            print(command_line(job))
        return 0
    return _Runner(plan, out, data).run()


# -- what there is -----------------------------------------------------------------------------------------------------


def _list(scale: Scale) -> None:
    """Prints all recipes."""
    out = console()
    gpus = torch.cuda.device_count()
    table = Table("recipe", "paper", "shows", title="sedd reproduce NAME --scale full, small or smoke")
    for column in ("rows", "run here", "expected time: full", "small", "files for small"):
        table.add_column(column)
    for name in recipe_names():
        recipe = load_recipe(name)
        times, here = {}, []
        for at in get_args(Scale):
            setting = load_setting(recipe.setting, at)
            plan = make_plan(recipe, at, Path(), dict.fromkeys(setting.inputs, Path("FILE")))
            times[at] = _duration(plan.minutes, setting.gpus) if plan.jobs else "-"
            if plan.jobs and setting.gpus <= min(gpus, 1):  # jobs run in one process
                here.append(at)
            if at == "small":
                small = sorted(_inputs_of(plan))
        table.add_row(
            name,
            f"{recipe.paper}, {recipe.place}",
            recipe.title,
            str(len(recipe.rows)),
            ", ".join(here) or "-",
            times["full"],
            times["small"],
            ", ".join(small),
        )
    out.print(table)
    out.print("Give files as --data NAME=FILE. Their contents:")
    described: dict[str, str] = {}
    for name in recipe_names():
        described |= load_setting(load_recipe(name).setting, scale).inputs
    for name, about in sorted(described.items()):
        out.print(f"  {name}: {about}")


def _inputs_of(plan: Plan) -> set[str]:
    return {name for name, _ in plan.data}


def _duration(minutes: float, gpus: int = 0) -> str:
    """A time in words; with GPUs, as their time altogether."""
    if gpus and minutes * gpus >= 60 * 24:
        return f"{minutes * gpus / 60 / 24:,.0f} GPU days"
    if minutes >= 90:
        return f"{minutes / 60:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"


# -- data --------------------------------------------------------------------------------------------------------------


def _files(given: Sequence[str], inputs: Mapping[str, str]) -> dict[str, Path]:
    """The files of ``--data NAME=FILE`` by name."""
    files = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not equals:
            raise ValueError(f"data: expected NAME=FILE, got {word!r}")
        check_one_of("data", name, inputs)
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"data: {name}: no such file: {path}")
        files[name] = Path(path).expanduser().absolute()
    return files


def _prepare(plan: Plan, folder: Path, given: Sequence[str]) -> None:
    """Makes the files in ``folder`` that the jobs read: parts of the user's files, or made-up text.

    Raises:
        ValueError: a file is not the one that ``folder`` has results of.
    """
    files = _files(given, plan.setting.inputs)
    _check_same(files, folder / "files.json")
    for name, part in sorted(plan.data, key=str):
        path = data_file(folder, name, part)
        made_up = plan.setting.scale == "smoke"
        if path.exists() or not (part or made_up):
            continue
        _make_folder(path.parent)
        content = _made_up() if made_up else _content(files[name])
        if part is not None:
            begin, end = (_cut(content, share) for share in PARTS[part])
            content = content[begin:end]
        with whole_file(path) as temporary:
            temporary.write_bytes(content)


def _check_same(files: Mapping[str, Path], path: Path) -> None:
    """Compares the content of files with that of the first call, and adds that of others, by their SHA-256."""
    known = read_json(path) if path.is_file() else {}
    found = {name: _digest(file) for name, file in files.items()}
    for name, digest in found.items():
        if known.get(name, digest) != digest:
            raise ValueError(
                f"data: {name}: expected the file of the results in {path.parent}, got {files[name]} with another "
                "content; give that file, or another --out"
            )
    if found.keys() - known.keys():
        _make_folder(path.parent)
        write_json(path, {**known, **found})


def _digest(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of the files in a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(repr([(name, _digest(path / name)) for name in found]).encode()).hexdigest()


def _content(path: Path) -> bytes:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _cut(content: bytes, share: float) -> int:
    """Where a part begins: at a share of the text, or at the next line of a text that has lines."""
    place = round(share * len(content))
    line = content.find(b"\n", place)
    return place if line < 0 or place == 0 else line + 1


def _made_up() -> bytes:
    """20,000 letters of made-up words, of which few are frequent, always the same."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(1, 7))) for _ in range(100)]
    return " ".join(generator.choices(words, weights=[1 / (i + 1) for i in range(100)], k=6000)).encode()[:20_000]


# -- jobs --------------------------------------------------------------------------------------------------------------


def check_job(job: Job) -> Any:
    """The options of a job, as its command takes them.

    Raises:
        ValueError: the command has no such option, or refuses its value.
    """
    kind: Any = TrainConfig if job.command == "train" else MEASURES[job.command].options
    return build(kind, checked(kind, job.options))


def command_line(job: Job) -> str:
    """The command that does the same as a job."""
    words = ["train"] if job.command == "train" else ["eval", job.command, job.model]
    options = dict(job.options)
    words += options.pop("texts", [])
    for name, value in flat(options).items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name}", text.lower() if isinstance(value, bool) else text]
    if job.evaluation is not None:
        words += ["--json", str(job.results)]
    return f"{program()} {shlex.join(words)}"


def _do(job: Job) -> int:
    """Runs a job; returns the exit code of its command."""
    if job.command == "train":
        resume = (job.folder / "config.json").is_file()
        if resume:
            _check_resumable(job)
        return train.COMMAND.run(given=checked(TrainConfig, job.options), config=(), resume=resume)
    _make_folder(job.results.parent)
    options = dataclasses.replace(check_job(job), json=str(job.results))
    return MEASURES[job.command].run(job.model, options)


def _check_resumable(job: Job) -> None:
    """Raises a ValueError if the run that is there has other options, apart from how a step is divided."""
    stored = flat(read_json(job.folder / "config.json"))
    wanted = flat(check_job(job).to_dict())
    for options in (stored, wanted):
        options["sequences of a step"] = options.pop("batch_size") * options.pop("accumulate")
    for name in ("sequences of a step", *(name for name in flat(job.options) if name in wanted and name != "run_dir")):
        if stored.get(name) != wanted[name]:
            raise ValueError(
                f"out: expected a run with {name} = {wanted[name]} in {job.folder}, got {stored.get(name)}; give "
                f"another --out, or delete {job.folder}"
            )


class _Runner:
    """Runs the jobs of a plan that are not finished.

    Args:
        plan: the plan.
        out: folder of all results.
        data: the user's files, as words.
    """

    def __init__(self, plan: Plan, out: Path, data: Sequence[str]) -> None:
        self.plan, self.out, self.data = plan, out, data
        self.console = console(stderr=True)
        self.failed: dict[str, str] = {}  # why, by job
        self.expected = self.spent = 0.0  # minutes of the jobs that this process has finished

    def run(self) -> int:
        """Returns 0; 1 if a job failed; 128 + the number of the signal that stopped training."""
        scale = self.plan.setting.scale
        _make_folder(self.out / scale)
        _prepare(self.plan, self.out / scale, self.data)
        jobs = list(self.plan.jobs.values())
        left = [job for job in jobs if not self.finished(job)]
        self.say(f"{self.plan.recipe.name} at scale {scale}: {len(jobs) - len(left)} of {len(jobs)} jobs are finished")
        self.pages()
        for job in left:
            number = jobs.index(job) + 1
            if broken := [need for need in self.plan.needs[job.name] if need in self.failed]:
                self.failed[job.name] = f"needs {broken[0]}, which failed"
                continue
            pending = sum(other.minutes for other in left[left.index(job) :])
            self.say(f"{number} of {len(jobs)}: {_doing(job)}; about {_duration(self.pace() * pending)} left")
            try:
                code = self.finish(job)
            except KeyboardInterrupt:
                self.say(f"stopped in {job.name}; the same command continues")
                raise
            except Exception as error:  # one that this job's libraries raise, too; the other jobs are still run
                self.failed[job.name] = " ".join(str(error).split()) or type(error).__name__
                self.say(f"{job.name} failed: {self.failed[job.name]}")
                continue
            if code:
                self.say(f"stopped in {job.name}; the same command continues")
                return code
            self.pages()
        page, markdown = self.pages()
        self.say(f"{page}: open it in a browser; the same as Markdown: {markdown.name}")
        return 1 if self.failed else 0

    def pace(self) -> float:
        """How much longer jobs take here than expected."""
        return self.spent / self.expected if self.expected else 1.0

    def finish(self, job: Job) -> int:
        """Runs a job and writes its record."""
        started, clock = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic()
        if code := _do(job):
            return code
        seconds = time.monotonic() - clock
        if job.evaluation is None:  # also those of earlier processes
            seconds = read_state(list_checkpoints(job.folder)[-1])["elapsed"]
        self.expected, self.spent = self.expected + job.minutes, self.spent + seconds / 60
        _make_folder(job.record.parent)
        done = {"command": command_line(job), "options": job.options, "started": started, "seconds": seconds}
        done["trained"] = self.trained(job)
        write_json(job.record, {**done, **provenance(getattr(check_job(job), "seed", None))})
        return 0

    def trained(self, job: Job) -> dict[str, str]:
        """When the trainings that a job needs were started, by name, as far as they are finished."""
        needs = [self.plan.jobs[name] for name in self.plan.needs[job.name]]
        return {need.name: read_json(need.record)["started"] for need in needs if need.record.is_file()}

    def finished(self, job: Job) -> bool:
        """Whether the job's record and its results are there.

        Raises:
            ValueError: it is that of another job, or of another training.
        """
        if not job.record.is_file() or (job.evaluation is not None and not job.results.is_file()):
            return False
        record = read_json(job.record)
        if record.get("options") != job.options:
            raise ValueError(
                f"out: expected results of the same options and files in {job.record}, got others; give another --out, "
                f"or delete {job.folder}"
            )
        earlier = record.get("trained", {})
        for name, started in self.trained(job).items():
            if earlier.get(name, started) != started:
                raise ValueError(
                    f"out: expected results of the training of {name} that began at {started} in {job.record}, got "
                    f"those of one that began at {earlier[name]}; delete {job.record} and {job.results}"
                )
        return True

    def pages(self) -> tuple[Path, Path]:
        """Writes the comparison of what is finished."""
        return write_comparison(self.plan, self.failed)

    def say(self, text: str) -> None:
        """Prints a line, and adds it to the log."""
        self.console.print(text)
        path = self.out / "log.txt"
        with naming(path), open(path, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(text)}\n")


def _make_folder(path: Path) -> None:
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


def _doing(job: Job) -> str:
    return f"training {job.run}" if job.evaluation is None else f"evaluating {job.name}"


COMMAND = Command(
    "reproduce",
    ABOUT,
    reproduce,
    ReproduceOptions,
    arguments=(
        Argument("recipe", "A recipe, or list for all of them."),
        Argument(
            "--data",
            "A file of yours that the recipe reads, as NAME=FILE; sedd reproduce list shows the names. May be given "
            "more than once.",
            {"action": "append", "default": [], "metavar": "NAME=FILE"},
        ),
        Argument(
            "--commands",
            "Print the commands instead of running them. Jobs of a cluster may run them in any order that keeps "
            "training before evaluation.",
            {"action": "store_true"},
        ),
    ),
)
