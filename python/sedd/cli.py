"""The command line: ``sedd train | sample | infill | eval | report | convert | info``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sedd import commands
from sedd.config import TrainConfig, read_options
from sedd.files import RunLock
from sedd.generative import GenerativeOptions, generative
from sedd.harness import HarnessOptions, harness
from sedd.hints import program
from sedd.latency import LatencyOptions, latency
from sedd.options import add_options, build, check_one_of, checked, did_you_mean, renamed, tree
from sedd.perplexity import PerplexityOptions, perplexity
from sedd.plain import merged
from sedd.progress import printable
from sedd.report import ReportOptions, report
from sedd.schedule import SCHEDULES

Options = TypeVar("Options")


ABOUT = """Score-entropy diffusion language models: train one, let it write, fill gaps, measure it.

  sedd train --max_minutes 5
      learn from the text of this Python installation
  sedd sample runs/default --live
      watch the model write
  sedd infill runs/default 'def {{8}}(self, {{12}}) -> bool:'
  sedd eval perplexity runs/default
      bits per byte, beside unigram and bigram models
  sedd report runs/default
      all of it on one page

SEDD_DEBUG=1 in the environment shows the traceback of an error.
"""

TRAIN = """Train a model on text.

Without options a small model learns from the sources and documentation of this Python installation. The run folder
holds everything: config.json, metrics.jsonl, TensorBoard scalars and checkpoints. Ctrl-C, SIGTERM and SIGHUP save and
stop; --resume goes on, bit for bit as if there had been no break. One process at a time may train in a run folder.

Without a GPU, training uses all CPUs that the process may use, within the CPU quota of a container. If other processes
use them too, set OMP_NUM_THREADS to the number of free ones. sedd sets GOMP_SPINCOUNT, so that a waiting thread
occupies its CPU for about 50 microseconds only, unless you set GOMP_SPINCOUNT, OMP_WAIT_POLICY or a KMP_ variable.

Lists are written as 0.9,0.98. Dashes in the names of options may replace underscores: --run-dir is --run_dir.

examples:
  sedd train
  sedd train --data.source book.txt --run_dir runs/book --max_minutes 30
  sedd train --data.source Salesforce/wikitext --data.subset wikitext-103-raw-v1 --tokenizer gpt2 \\
      --model.preset small --batch_size 32 --accumulate 16 --lr 3e-4 --warmup 2500 --ema 0.9999 --run_dir runs/small
      the paper's settings
  sedd train --process uniform --schedule geometric --schedule_params.sigma_max 20 --run_dir runs/uniform
  sedd train --config runs/book/config.json --lr 1e-3 --run_dir runs/book2
  sedd train --run_dir runs/book --resume --steps 40000
  sedd train --init runs/book --data.source mine.txt --run_dir runs/mine --lr 3e-4 --lr_schedule linear --steps 5000
  sedd train --tokenizer tokenizer.json --data.source book.txt --lr_schedule wsd --max_minutes 60 --run_dir runs/pieces
  tensorboard --logdir runs
"""

SAMPLE = """Let a model write text from nothing.

examples:
  sedd sample runs/default
  sedd sample runs/default --num 3 --steps 64 --seed 7
  sedd sample runs/default --live
  sedd sample runs/default/checkpoints/step_00000500 --json texts.json
"""

INFILL = """Let a model fill the gaps of a text.

In the text, {{n}} is a gap of n unknown tokens (bytes, characters or word pieces, as the model was trained); everything
else is kept exactly. Gaps may stand anywhere, and as many as you like; where they stand together they are one.

examples (quote the text, so that the shell leaves it alone):
  sedd infill runs/default 'The standard library {{80}}'
      continue a text
  sedd infill runs/default '{{80}} and that is the end.'
      write what comes before
  sedd infill runs/default 'def {{10}}(path):{{60}}return result'
      fill several gaps
  sedd infill runs/default --num 4 --live "$(cat draft.txt)"
      a file that contains gaps
"""

EVAL = """Measure a model as the papers do.

examples:
  sedd eval perplexity runs/default
      on its validation text, beside unigram and bigram models
  sedd eval perplexity models/sedd-small wikitext2 ptb
      on the papers' test sets
  sedd eval generative runs/default
      what it writes, judged by another model
  sedd eval harness models/sedd-small --tasks piqa
      tasks of lm-evaluation-harness
  sedd eval latency runs/default
      against an autoregressive model with cache
"""

PERPLEXITY = """Measure how well a model predicts text it was not trained on.

Prints, for each text, the upper bound on the negative log-likelihood (theorem 3.6 of SEDD, with its prior term), by
Monte Carlo over the noise level, with its standard error. Perplexity is exp(mean nats per token); "mean of exp" is the
mean over blocks of exp(nats per token), the averaging of the SEDD paper. Without a text the run's validation text is
scored, beside what a unigram and a bigram model, counted on the run's training text, get on the same blocks.

A text is one of wikitext2, wikitext103, lambada, lm1b and ptb (the test sets of the papers, from the Hugging Face hub,
with their detokenisers), a file, a folder, or the name of a hub data set. Documents are closed with end-of-text, joined
and cut into blocks of the model's length.

examples:
  sedd eval perplexity runs/default
  sedd eval perplexity runs/default other.txt --draws 64 --json figures.json
  sedd eval perplexity models/sedd-small wikitext2 lambada ptb lm1b --draws 1000 --json zero-shot.json
  sedd eval perplexity models/sedd-small wiki.test.raw --detokenizer wikitext
  sedd eval perplexity models/sedd-small news.txt --documents line --detokenizer lm1b
  sedd eval perplexity runs/default --plot bound.png
"""

GENERATIVE = """Measure what a model writes.

With each sampler and number of steps the model writes texts. Printed are their perplexity under another language model,
the judge, with its standard error, and how varied they are: the entropy of a text's own token frequencies, the fraction
of its tokens that are different ones, and the fraction that stand among the 100 tokens before them; beside real text,
where there is some. A low perplexity with a low entropy is repetition, not quality.

examples:
  sedd eval generative runs/default --steps 16,64,256 --plot steps.png
  sedd eval generative models/sedd-small --num 1000 --steps 32,128,1024 --json generative.json
  sedd eval generative runs/default --judge ~/models/SmolLM2-135M.gguf
      a judge that needs no network
  sedd eval generative runs/default --mauve unconditional,prefix,infill --text real.txt
"""

HARNESS = """Evaluate on tasks of EleutherAI's lm-evaluation-harness.

An answer's likelihood is the bound for it alone, the question kept clean, under the same noise for all answers to one
question. Greedy answers (LAMBADA) write the likeliest token where the model is surest, one after the other. Text is
generated by infilling. The harness's own command line works too: python -m sedd.lm_eval_model --model sedd
--model_args pretrained=MODEL,draws=128 --tasks ...

examples:
  sedd eval harness models/sedd-small --tasks lambada_openai --limit 200
  sedd eval harness models/sedd-small --tasks hellaswag,piqa,arc_easy,winogrande --json tasks.json
  sedd eval harness runs/default --tasks mine --include_path tasks/
"""

LATENCY = """Measure how long a sample takes, against an autoregressive transformer of the same shape.

The twin, which has a key-value cache, is a GPT-2 of the same width, depth, heads and vocabulary with random weights,
from transformers. The times are taken in turns. Prints seconds and tokens per second, and the number of steps at which
both take equally long. In place of a model, tiny, small or medium measures an untrained one of that size: time does not
depend on the weights.

examples:
  sedd eval latency runs/default --plot latency.png
  sedd eval latency small --length 1024 --steps 16,64,256,1024 --batch_sizes 1,8,32 --json latency.json
"""

CONVERT = """Write a model of any known format as a folder of safetensors, ready for the Hugging Face hub.

SOURCE is a run, a Hugging Face repository (config.json with model.safetensors or pytorch_model.bin), a training run of
the released SEDD code (.hydra/config.yaml with checkpoints-meta/checkpoint.pth) or a Lightning checkpoint whose network
is called backbone. Averaged weights are taken where there are any. The folder OUT gets config.json, model.safetensors
and a model card; every command of sedd takes it in place of a run.

examples:
  sedd convert runs/default models/default
  sedd convert louaaron/sedd-small models/sedd-small
  sedd convert last.ckpt models/mine --config config.yaml
      where the checkpoint does not say what it is; config.yaml then holds two lines:
      graph: {type: absorb}
      noise: {type: loglinear}
"""

REPORT = """Gather a run into one HTML page: losses, likelihood, evaluations, samples, and a text on its way from noise.

The page is a single file that needs no network. What `sedd eval ... --json` and `--plot` wrote into the folder eval of
the run is part of it.

examples:
  sedd report runs/default
  sedd eval generative runs/default --json runs/default/eval/generative.json --plot runs/default/eval/generative.png
  sedd report runs/default --steps 128 --out page.html
"""

INFO = """Show what is installed: versions, kernels, presets, registered names; or what a run is.

examples:
  sedd info
  sedd info runs/default
"""

MEASURES: dict[str, tuple[str, type, Callable[[str, Any], int]]] = {
    "perplexity": (PERPLEXITY, PerplexityOptions, perplexity),
    "generative": (GENERATIVE, GenerativeOptions, generative),
    "harness": (HARNESS, HarnessOptions, harness),
    "latency": (LATENCY, LatencyOptions, latency),
}
"""What ``sedd eval`` measures: help, options, and the function that takes a model and the options."""

COMMANDS = ("train", "sample", "infill", "eval", "report", "convert", "info")
RUN_HELP = (
    "A run folder (its best checkpoint is used), one checkpoint folder, or a model: a folder, a checkpoint file, or a "
    "repository of the Hugging Face hub (see sedd convert)."
)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a mistake; examples in the help keep their lines."""

    def __init__(self, **kwargs: Any) -> None:
        help = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(formatter_class=help, allow_abbrev=False, **kwargs)

    def shortened(self) -> str:
        """Returns the usage without the list of options, which the help explains one by one."""
        places = [action for action in self._actions if not action.option_strings]
        words = [f"[{action.dest.upper()}]" if action.nargs in ("?", "*") else action.dest.upper() for action in places]
        return " ".join([self.prog, "[options]", *words])

    def error(self, message: str) -> NoReturn:
        """Called by argparse with what is wrong."""
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(prog=program(), description=ABOUT)
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, about: str, to: Any = subcommands) -> _Parser:
        description, _, examples = about.partition("\nexamples")
        command: _Parser = to.add_parser(
            name, help=description.partition("\n")[0], description=description, epilog=f"examples{examples}"
        )
        command.set_defaults(parser=command)
        return command

    train = add("train", TRAIN)
    train.add_argument(
        "--config", action="append", default=[], help="Read options from a file, JSON or YAML, such as the config.json "
        "of a run. Options on the command line come before it."
    )  # fmt: skip
    train.add_argument("--resume", action="store_true", help="Continue the run in --run_dir.")
    add_options(train, TrainConfig, keys={"schedule_params": _schedule_params()})
    sample, infill = add("sample", SAMPLE), add("infill", INFILL)
    measures = add("eval", EVAL).add_subparsers(dest="measure", metavar="MEASURE", required=True)
    measure = {name: add(name, about, to=measures) for name, (about, _, _) in MEASURES.items()}
    for command in (sample, infill, *measure.values()):
        command.add_argument("run", help=RUN_HELP)
    infill.add_argument("template", help="The text, with {{n}} for n unknown tokens.")
    for command in (sample, infill):
        command.add_argument("--live", action="store_true", help="Watch the first text emerge, step by step.")
    add_options(sample, commands.SampleOptions)
    add_options(infill, commands.SamplingOptions)
    measure["perplexity"].add_argument("texts", nargs="*", help="What to score; nothing: the run's validation text.")
    for name, command in measure.items():
        add_options(command, MEASURES[name][1], skip={"texts"})
    convert = add("convert", CONVERT)
    convert.add_argument("source", help=RUN_HELP)
    convert.add_argument("out", help="The folder to write.")
    convert.add_argument("--config", help="JSON or YAML with entries of config.json that come before the source's own.")
    page = add("report", REPORT)
    page.add_argument("run", help="A run folder, or one checkpoint folder.")
    add_options(page, ReportOptions)
    about = add("info", INFO)
    about.add_argument("run", nargs="?", help=RUN_HELP)
    for command in (train, sample, infill, *measure.values(), convert, page, about):
        command.usage = command.shortened()
    return parser


def _schedule_params() -> dict[str, str]:
    """The parameters of all schedules, and which of them has it."""
    found: dict[str, list[str]] = {}
    for name, kind in SCHEDULES.items():
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            found.setdefault(field.name, []).append(f"{name} (default: {field.default:g})")
    return {name: f"Parameter of the schedule {' and of '.join(schedules)}." for name, schedules in found.items()}


def _parse(argv: list[str]) -> argparse.Namespace:
    """Reads a command line; dashes in the names of options are underscores too."""
    end = argv.index("--") if "--" in argv else len(argv)
    for place, word in enumerate(argv[:end]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            argv[place] = f"--{name.replace('-', '_')}{equals}{value}"
    for place, kind, known in ((0, "command", COMMANDS), (1, "measure", MEASURES)):
        if argv[place : place + 1] and not argv[place].startswith("-") and argv[:place] in ([], ["eval"]):
            check_one_of(kind, argv[place], known)
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        name, program = unknown[0].partition("=")[0], given.parser.prog
        if name.startswith("-"):
            raise ValueError(f"{name}: {program} has no such option{did_you_mean(name, _names(given))} "
                             f"(see {program} --help)")  # fmt: skip
        raise ValueError(f"unexpected {name!r}: write what is not an option in one place, and quote text with spaces "
                         f"(see {program} --help)")  # fmt: skip
    return given


def _names(given: argparse.Namespace) -> list[str]:
    """The options of the command that was given."""
    return [name for action in given.parser._actions for name in action.option_strings]


def _options(kind: type[Options], given: argparse.Namespace, files: Sequence[Path | str] = ()) -> Options:
    """Makes a dataclass of options: first of what stands in files, then of what is given on the command line."""
    return build(kind, _values(kind, given, files))


def _values(kind: type, given: argparse.Namespace, files: Sequence[Path | str] = ()) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    words = tree({name: value for name, value in vars(given).items() if name.split(".")[0] in fields})
    values: dict[str, Any] = {}
    for file in files:
        values = merged(values, read_options(file))
    return merged(values, checked(kind, words, "--", words=True))


def _train(given: argparse.Namespace) -> int:
    files = list(given.config)
    run_dir = _values(TrainConfig, given, files).get("run_dir", TrainConfig.run_dir)
    saved = Path(run_dir) / "config.json"
    if given.resume and not saved.is_file():
        raise FileNotFoundError(f"run_dir: nothing to resume in {run_dir}: it has no config.json")
    if not given.resume:
        config = _options(TrainConfig, given, files)  # a mistake in it leaves no folder
    with RunLock(Path(run_dir)) as lock:
        if given.resume:
            # the options of the run come first, and what is given now changes them
            config = dataclasses.replace(_options(TrainConfig, given, [saved, *files]), run_dir=run_dir)
        return commands.train(config, given.resume, lock)


def _run(given: argparse.Namespace) -> int:
    if given.command == "train":
        return _train(given)
    if given.command == "sample":
        return commands.sample(given.run, _options(commands.SampleOptions, given), given.live)
    if given.command == "infill":
        return commands.infill(given.run, given.template, _options(commands.SamplingOptions, given), given.live)
    if given.command == "eval":
        _, kind, measure = MEASURES[given.measure]
        return measure(given.run, _options(kind, given))
    if given.command == "report":
        return report(given.run, _options(ReportOptions, given))
    if given.command == "convert":
        return commands.convert(given.source, given.out, given.config)
    return commands.info(given.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 1 if the work failed; 2 for a mistake in the command or its files; 128 + n after signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words:
            _parser().print_help(sys.stderr)
            return 2
        given = _parse(words)
        with renamed({name[2:]: name for name in _names(given) if name.startswith("--")}):
            return _run(given)
    except KeyboardInterrupt:
        print("sedd: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("SEDD_DEBUG"):
            raise
        # what a file or a name holds must not steer the terminal
        print(f"sedd: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
