"""Write a weight file for other tools.

    python -m ddpm_basics.model export models/ddpm_african_fabrics.pt --to safetensors
    python -m ddpm_basics.model export models/playground_32.pt --to onnx

What they need to know stands in the metadata: what the network predicts, schedule and timesteps,
size, clipping, labels, licence and where the weights come from.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ddpm_basics.console import duration, new_parser, run_command
from ddpm_basics.export import FORMATS, describe_weights
from ddpm_basics.files import check_output
from ddpm_basics.options import add_process, process_of
from ddpm_basics.weight_files import load_weights


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(
        "Write a weight file for other tools, with what they need to know in its metadata.",
        prog="python -m ddpm_basics.model",
    )
    add = parser.add_argument
    add("command", choices=["export"], help="what to do")
    add("file", type=Path, metavar="FILE", help="weight file, of any kind that exercise 1 takes")
    add("--to", choices=[*FORMATS], required=True,
        help="safetensors: the weights, which exercise 1 loads, too; onnx: the network, which "
        "needs no PyTorch (requirements-extras.txt)")  # fmt: skip
    add("--output", type=Path, metavar="FILE",
        help="file to write (default: in this folder, under the same name)")  # fmt: skip
    add_process(parser)
    return parser.parse_args(argv)


def export(options: argparse.Namespace) -> None:
    """Load, write, say so. Raises UserError."""
    started = time.perf_counter()
    output = options.output or Path(options.file.name).with_suffix(f".{options.to}")
    check_output(output, f".{options.to}", may_replace=False)
    diffusion, facts = load_weights(options.file, **process_of(options))
    print(facts.describe(options.file))
    FORMATS[options.to](diffusion, output, describe_weights(options.file, facts))
    size, seconds = output.stat().st_size / 1e6, time.perf_counter() - started
    print(f"Wrote {output} ({size:.1f} MB) in {duration(seconds)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse_options(argv)
    return run_command(
        lambda: export(options),
        after_interrupt="Nothing was written.",
        if_memory_ends="close other programs.",
    )


if __name__ == "__main__":
    sys.exit(main())
