"""Put the measured figures into README's table and into the model card.

    python tests/benchmarks/readme_figures.py

Reads training_results/reference/*.json, as the other scripts of this folder wrote them, and
replaces what stands between two comment lines in README.rst, in the head of models/README.md and in
its text. A test compares them.
"""

import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "training_results" / "reference"
README = ROOT / "README.rst"
CARD = ROOT / "models" / "README.md"
NOT_MEASURED = "\N{EN DASH}"
EVALUATIONS = {"evaluation": "without labels", "evaluation_w1": "labels, w = 1",
               "evaluation_w2": "labels, w = 2"}  # fmt: skip


def read(name):
    """A measurement file."""
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))


def shown():
    """The slowest and the fastest machine on which fabrics were drawn: their records."""
    machines = read("bench_sampling")["machines"]
    return machines[:1] + machines[1:][-1:]


def rows():
    """[what, figure on each machine] of every line of the table."""
    machines = shown()
    trained = {record["hardware"]: record for record in read("bench_training")["machines"]}
    training = [trained.get(record["hardware"]) for record in machines]
    drawn = [{row["what"]: row for row in record["rows"]} for record in machines]
    whole = "ours: whole command"
    yield ["Sixteen new fabrics by ``exercise1_generate.py``, imports and files included",
           *(f"{row[f'{whole}, guided']['seconds']:.0f} s" for row in drawn)]  # fmt: skip
    yield ["The same with ``--guidance 1``, which asks the network once a step, not twice",
           *(f"{row[whole]['seconds']:.0f} s" for row in drawn)]  # fmt: skip
    yield ["Sixteen by the library's ``sample()``, fp32, 250 DDIM steps",
           *(f"{row['stock: sample(), DDIM']['seconds']:.0f} s, {row[whole]['times_faster']:.1f} "
             "times as long" for row in drawn)]  # fmt: skip
    timed = [record["stock_evaluations_timed"] for record in machines]
    if min(timed) < 250:
        yield ["\\   (estimated from so many of its 250 steps)", *map(str, timed)]
    names = [*dict.fromkeys(name for record in training if record for name in record["variants"])]
    for name in names:
        found = [record and record["variants"].get(name) for record in training]
        yield [f"Training step of 32 images, {words_for(name)}", *map(pace, found)]
    for name in names[:1] + names[1:][-1:]:
        found = [record and record["variants"].get(name) for record in training]
        yield [f"Memory of the process that trains, {words_for(name)}",
               *(f"{row['peak_memory_bytes'] / 1e9:.1f} GB" if row else NOT_MEASURED
                 for row in found)]  # fmt: skip


def words_for(variant):
    """A variant's name in words that stand alone."""
    return "the library's ``Trainer``, fp32" if variant == "stock" else variant


def pace(variant):
    """Seconds of a training step, and how many times as fast as the library's it is."""
    if not variant:
        return NOT_MEASURED
    times = variant["times_stock"]
    return f"{variant['seconds_per_step']:.2f} s" + f", {times:.2f} times as fast" * (times != 1)


def table():
    """The table as reStructuredText, and what was measured on one machine only."""
    head = ["", *(record["hardware"] for record in shown())]
    lines = [head, *rows()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    body = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines]  # fmt: skip
    body[0] = "\\" + body[0][1:]  # an empty cell would end the table
    fabrics, robustness = read("fabrics"), read("robustness")
    seconds, growth = fabrics["render"]["seconds"], robustness["memory_growth_bytes"] / 1e6
    others = (
        f"Drawing the 1,059 fabrics takes {seconds:.0f} s ({fabrics['hardware']}). In a test "
        f"{robustness['kills']} training processes were killed with ``kill -9`` and resumed, "
        f"{robustness['kills_during_a_save']} of them during a save; from step 1,000 to step 6,000 "
        f"of a small network memory grew by {growth:.1f} MB."
    )
    return "\n".join([rule, body[0], rule, *body[1:], rule, "", textwrap.fill(others, 100), ""])


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
