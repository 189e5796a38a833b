"""Put the measured figures into README's table.

    python tests/benchmarks/readme_figures.py

Reads training_results/reference/*.json, as the other scripts of this folder wrote them, and
replaces what stands between two comment lines in README.rst. A test compares the two.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "training_results" / "reference"
README = ROOT / "README.rst"
BLOCK = re.compile(r"(?<=\.\. figures: readme_figures\.py\n\n).*?(?=\n\.\. end of figures)", re.S)


def read(name):
    """A measurement file."""
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))


def rows():
    """(what, figure) of every line of the table."""
    fabrics, training = read("fabrics"), read("bench_training")
    sampling, robustness = read("bench_sampling"), read("robustness")
    by_name = {row["what"]: row for row in sampling["rows"]}
    stock, ours = by_name["stock: sample(), DDIM"], by_name["ours: whole command"]
    load = fabrics["render"]["load_of_the_machine_before"]
    busy = f", on a machine with a load of {load}" if load > 1 else ""
    yield (f"1,059 fabrics drawn by ``python -m ddpm_basics.fabrics``{busy}",
           f"{fabrics['render']['seconds']:.0f} s")  # fmt: skip
    yield ("Sixteen new fabrics by ``exercise1_generate.py``, imports and files included",
           f"{ours['seconds']:.0f} s")  # fmt: skip
    timed = sampling["stock_evaluations_timed"]
    scaled = f", scaled up from {timed}" if timed < 250 else ""
    yield (f"The same by the library's ``sample()``, fp32, 250 DDIM steps{scaled}",
           f"{stock['seconds']:.0f} s ({ours['times_faster']:.1f} times as long)")  # fmt: skip
    for name, variant in training["variants"].items():
        figure = f"{variant['seconds_per_step']:.2f} s"
        if name != "stock":
            figure += f", {variant['times_stock']:.2f} times stock"
        yield f"Training step of {training['batch_size']} images, {name}", figure
    best = list(training["variants"].items())[-1]
    for name, variant in (("stock", training["variants"]["stock"]), best):
        yield (f"Memory of the process that trains, {name}",
               f"{variant['peak_memory_bytes'] / 1e9:.1f} GB")  # fmt: skip
    yield ("Training processes killed (``kill -9``) and resumed; while saving",
           f"{robustness['kills']}; {robustness['kills_during_a_save']}")  # fmt: skip
    yield ("Growth of memory from step 1,000 to step 6,000 of a small network",
           f"{robustness['memory_growth_bytes'] / 1e6:.1f} MB")  # fmt: skip


def table():
    """The table as reStructuredText, and where its figures were taken."""
    lines = list(rows())
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    rule = "=" * widths[0] + "  " + "=" * widths[1]
    body = [f"{what:<{widths[0]}}  {figure}" for what, figure in lines]
    machines = sorted({read("bench_training")["hardware"], read("robustness")["hardware"]})
    where = f"Measured on: {'; '.join(machines)}, torch {read('bench_training')['torch']}."
    return "\n".join([rule, *body, rule, "", where, ""])


def main():
    """Replace the table."""
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: table(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
