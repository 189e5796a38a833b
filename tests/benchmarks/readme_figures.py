"""Put the measured figures into README's table and into the model card.

    python tests/benchmarks/readme_figures.py

Reads training_results/reference/*.json, as the other scripts of this folder wrote them, and
replaces what stands between two comment lines in README.rst, in the head of models/README.md and in
its text. A test compares them.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "training_results" / "reference"
README = ROOT / "README.rst"
CARD = ROOT / "models" / "README.md"
EVALUATIONS = {"evaluation": "without labels", "evaluation_w1": "labels, w = 1",
               "evaluation_w2": "labels, w = 2"}  # fmt: skip


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
    guided = by_name["ours: whole command, guided"]
    yield ("Sixteen new fabrics by ``exercise1_generate.py``, imports and files included",
           f"{guided['seconds']:.0f} s")  # fmt: skip
    yield "The same with ``--guidance 1``: one evaluation a step", f"{ours['seconds']:.0f} s"
    timed = sampling["stock_evaluations_timed"]
    scaled = f", scaled up from {timed}" if timed < 250 else ""
    yield (f"Sixteen by the library's ``sample()``, fp32, 250 DDIM steps{scaled}",
           f"{stock['seconds']:.0f} s, {ours['times_faster']:.1f} times the last line")  # fmt: skip
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
    drawing = read("bench_sampling")["hardware"]
    others = read("bench_training")
    where = (f"Measured on: {drawing['cpu']}, torch {drawing['torch']} (drawing); "
             f"{others['hardware']}, torch {others['torch']} (the rest).")  # fmt: skip
    return "\n".join([rule, *body, rule, "", where, ""])


def results():
    """The results in the card's head, in the form of a model hub's index."""
    lines = []
    for name, label in EVALUATIONS.items():
        report = read(name)
        metrics = {
            "distance to held-out fabrics over the floor": report["headline"]["median_ratio"],
            "share unclear to a classifier": report["traditions"]["unclear_share"],
            "share of copies": report["headline"]["copy_share"],
        }
        lines += [
            "      - task: {type: unconditional-image-generation}",
            f"        dataset: {{type: african_fabric_processed, name: 'held out; {label}'}}",
            "        metrics:",
        ]
        lines += [f"          - {{type: {what.split()[-1]}, name: {what}, value: {value:.3g}}}"
                  for what, value in metrics.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def evaluations():
    """The card's table: a column for each way of drawing."""
    columns = []
    for name, label in EVALUATIONS.items():
        report = read(name)
        own, unclear = report["headline"], report["traditions"]["unclear_share"]
        real = report["traditions"]["unclear_share_heldout"]
        contrast = [
            report["colours"][kind]["contrast"]["rgb"][0] for kind in ("samples", "heldout")
        ]
        (rare, least), (common, most) = own["rarest_tradition"], own["commonest_tradition"]
        columns.append({
            "": f"{label}, {report['sizes']['samples']:,} samples",
            "---": "---",
            "distance, times the floor: median": f"{own['median_ratio']:.2f}",
            "the same at worst": f"{own['worst_ratio']:.2f} ({own['worst_ratio_of']})",
            "unclear, and of held-out fabrics": f"{100 * unclear:.1f} %, {100 * real:.1f} %",
            "copies of training images": f"{100 * own['copy_share']:.1f} %",
            "rarest tradition, times its share": f"{rare}, {least:.2f}",
            "commonest tradition": f"{common}, {most:.2f}",
            "contrast inside a fabric (red), over held-out": f"{contrast[0] / contrast[1]:.2f}",
        })  # fmt: skip
    rows = [" | ".join([what, *(column[what] for column in columns)]) for what in columns[0]]
    return "".join(f"| {row} |\n" for row in rows)


BLOCKS = [  # file, the comment lines around a block, what makes it
    (README, r"\.\. figures: readme_figures\.py\n\n", r"\n\.\. end of figures", table),
    (CARD, r"# figures: readme_figures\.py\n", r"# end of figures", results),
    (CARD, r"<!-- figures: readme_figures\.py -->\n\n", r"\n<!-- end of figures", evaluations),
]


def filled(path, start, end, make):
    """The text of a file with a block made anew. Raises ValueError if its comments are gone."""
    text = path.read_text(encoding="utf-8")
    block = re.compile(f"(?<={start}).*?(?={end})", re.S)
    if not block.search(text):
        raise ValueError(f"{path} has no comment lines around its figures any more")
    return block.sub(lambda _: make(), text, count=1)


def main():
    """Replace the blocks."""
    for path, *block in BLOCKS:
        path.write_text(filled(path, *block), encoding="utf-8")


if __name__ == "__main__":
    main()
