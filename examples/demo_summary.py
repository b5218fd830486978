"""The summary at the end of ``make demo``: what the results of a run mean, and what to try next.

``python examples/demo_summary.py RUN`` reads ``RUN/eval/perplexity.json``, written by ``sedd eval perplexity --json``.
"""

import json
import os
import sys
import textwrap
from pathlib import Path


def summary(run: Path) -> str:
    """Explains the results in words."""
    figures = json.loads((run / "eval" / "perplexity.json").read_text(encoding="utf-8"))
    state = json.loads((Path(figures["model"]) / "state.json").read_text(encoding="utf-8"))
    texts = figures["texts"]
    scored = texts["validation text"]
    model, bigram, unigram = (texts[name]["bits_per_byte"] for name in ("validation text", "bigram", "unigram"))
    if model < bigram:
        verdict = (
            "So the model uses more context than the previous byte. Expect samples with the layout of Python "
            "code and some of its keywords, but with misspelt names and without meaning: this is what a model of this "
            "size learns in minutes."
        )
    elif model < unigram:
        verdict = (
            "So the model has learnt how frequent each byte is, but it gains less from the context than a table of "
            "pairs of bytes. Expect samples of random letters and spaces, and train longer."
        )
    else:
        verdict = (
            "So the model has not yet learnt how frequent each byte is. Expect samples without structure, and train "
            "longer."
        )
    return (
        f"After {state['step']:,} steps ({state['elapsed'] / 60:.1f} minutes) the model needs at most {model:.2f} bits "
        f"per byte of text that it was not trained on: an upper bound, measured on {scored['blocks']:,} blocks "
        f"({scored['bytes']:,} bytes). On the same blocks a bigram model, which sees only the byte before, needs "
        f"{bigram:.2f} bits, and a unigram model, which sees none, {unigram:.2f}. {verdict}"
    )


def main() -> None:
    """Prints the summary and commands to try next."""
    run = Path(sys.argv[1])
    sedd = os.path.relpath(Path(sys.executable).parent / "sedd")
    print("\n" + textwrap.fill(summary(run), 100))
    print(f"""
What to try next:
  {sedd} train --run_dir {run} --resume --max_minutes 30     continue training, to 30 minutes in total
  {sedd} sample {run} --live                                 watch the model generate a text
  {sedd} report {run}                                        create a page about the run
  {sedd} train --run_dir runs/mine --data.source FILE.txt     train on your own text
The README explains how to use the operators in your own trainer; examples/bert.py is a complete example.""")


if __name__ == "__main__":
    main()
