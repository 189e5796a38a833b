"""The lesson: it builds, its numbers are those of the files, its links lead on, its code runs."""

import csv
import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from conftest import ROOT, write_blocks
from tiny_networks import bundled, make_diffusion

from ddpm_basics import steering
from ddpm_basics.fabrics.drawing import TRADITIONS
from ddpm_basics.model import build_diffusion
from ddpm_basics.sampling import noise_levels
from ddpm_basics.weight_files import load_weights

DOCS = ROOT / "docs"
REFERENCE = ROOT / "training_results" / "reference"
MAIN = ["index", "1_noise", "2_denoising", "3_training"]
SIDE = ["under_the_hood", "making_it_fast", "the_weights", "troubleshooting", "teaching",
        "references", "playground", "other_data"]  # fmt: skip
PAGES = MAIN + SIDE


def page_source(name):
    return (DOCS / f"{name}.rst").read_text(encoding="utf-8")


def main_line():
    """The four main pages, one after the other."""
    return "\n".join(map(page_source, MAIN))


def build(source, output, *options):
    """Run Sphinx on a folder; returns the finished process."""
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", *options]
    return subprocess.run([*command, source, output], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built lesson."""
    output = tmp_path_factory.mktemp("lesson")
    done = build(DOCS, output)
    assert done.returncode == 0, done.stderr
    return output


# ---- What does not need the whole page -----------------------------------------------------------


def test_parts_stand_in_the_order_of_the_course():
    titles = re.findall(r"^(.+)\n=+$", main_line(), re.M)
    order = ["12.3.1 - DDPM Basics: Denoising Diffusion", "What you will learn", "The way through",
             "Get ready", "Quick start", "1 - Noise", "The idea", "From picture to noise",
             "Exercise 1: generate (execute)", "2 - Denoising", "The step back", "The U-Net",
             "Sampling", "Exercise 2: explore (modify)", "3 - Training", "One step",
             "Exercise 3: train (create)", "What the weights have learned", "How good is it?",
             "Summary", "Check yourself"]  # fmt: skip
    assert titles == order


def test_every_concept_ends_with_a_question_to_predict():
    parts = re.split(r"^(?:\.\. _([\w-]+):|Part g.*|One step)\n", main_line(), flags=re.M)
    asked = [name for name, text in zip(parts[1::2], parts[2::2], strict=True)
             if "Predict, then reveal" in text and ".. dropdown:: Reveal" in text]  # fmt: skip
    assert asked == ["concept-1", "concept-2", "exercise-1", "concept-3", "labels-and-guidance",
                     "concept-4", "part-f", None, None, "how-good"]  # fmt: skip


def test_eight_quiz_questions():
    assert main_line().count(".. quiz::") == 8


def test_no_code_maps_to_unit_range_twice():
    for name in PAGES:
        for block in code_blocks(page_source(name)):
            assert "sample(" not in block.text or "+ 1) / 2" not in block.text


def test_no_number_of_a_measurement_is_typed():
    """Seconds, minutes, megabytes and ratios come from files; quotations and settings do not."""
    for name in PAGES:
        prose = re.sub(r":measured:`[^`]*`|^\.\. code-block::.*?(?=^\S)", "",
                       page_source(name), flags=re.M | re.S)  # fmt: skip
        typed = re.findall(r"\d[\d.,]* (?:seconds|minutes|hours|s per|MB|GB|GiB|GFLOP)\b", prose)
        allowed = {"90 minutes", "0.57 GB", "3 GB"}  # of a class; of a citation; of a download
        assert [t for t in typed if t not in allowed] == [], name


def test_shares_that_page_2_shows_as_counts():
    """It multiplies what each way of asking reached by the number of fabrics, 12."""
    assert json.loads((REFERENCE / "classifier_demo.json").read_text())["fabrics"] == 12
    assert page_source("2_denoising").count("| *12 d`") == 3


def test_network_facts_are_those_of_the_library():
    """The layers in lesson_facts.json, found anew with forward hooks on the library's network."""
    from denoising_diffusion_pytorch import Unet
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

    facts = json.loads((REFERENCE / "lesson_facts.json").read_text())["network"]
    unet = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=3, flash_attn=False)
    seen = {}
    for name, module in unet.named_modules():
        module.register_forward_hook(
            lambda m, i, o, n=name: seen.__setitem__(n, (type(m).__name__, tuple(o.shape[1:])))
        )
    with torch.no_grad():
        unet(torch.zeros(1, 3, 64, 64), torch.tensor([1]))
    for layer in facts["layers"]:
        size, channels = layer["size_out"], layer["channels_out"]
        assert seen[layer["name"]][1] == (channels, size, size)
        if "attention" in layer["kind"]:
            kind = {"Attention": "full", "LinearAttention": "linear"}[seen[layer["name"]][0]]
            assert layer["kind"] == f"{kind} attention"
    assert facts["parameters"] == sum(w.numel() for w in unet.parameters()) == 35_711_491
    modules = list(unet.modules())
    assert facts["rms_norms"] == sum(isinstance(m, library.RMSNorm) for m in modules)
    assert facts["group_norms"] == sum(isinstance(m, torch.nn.GroupNorm) for m in modules)


def test_diagram_shows_the_layers_of_the_network():
    layers = json.loads((REFERENCE / "lesson_facts.json").read_text())["network"]["layers"]
    attention = {row["name"]: row for row in layers if "attention" in row["kind"]}
    drawn = re.findall(
        r'<g data-layer="([\w.]+)" data-size="(\d+)" data-channels="(\d+)" '
        r'data-attention="(\w+)">(.*?)</g>', (DOCS / "_parts" / "unet.html").read_text(), re.S,
    )  # fmt: skip
    assert len(drawn) == len(attention) == 9
    for name, size, channels, kind, inside in drawn:
        row = attention["mid_attn" if name == "mid" else f"{name}.2"]
        assert (row["size_in"], row["channels_in"]) == (int(size), int(channels)), name
        assert row["kind"] == f"{kind} attention", name
        assert f"{size}×{size}, {channels} channels" in inside
        assert f"{kind} attention" in inside


def test_faults_are_named(tmp_path):
    """A figure that is missing, changed or outdated, a number that is missing: each by its name."""
    docs, reference = tmp_path / "docs", tmp_path / "training_results" / "reference"
    for folder in ("_ext", "_static"):
        shutil.copytree(DOCS / folder, docs / folder)
    shutil.copy(DOCS / "conf.py", docs)
    reference.mkdir(parents=True)
    (reference / "some.json").write_text('{"a": {"b": 2.5}, "rows": [{"n": 1}]}')
    (tmp_path / "weights.pt").write_text("new")
    (docs / "images").mkdir()
    for name in ("good", "changed", "outdated", "unlisted"):
        (docs / "images" / f"{name}.webp").write_bytes(name.encode())
    sums = load_script_from(DOCS / "_ext" / "measured.py").sha256
    listed = {
        f"docs/images/{name}.webp": {
            "sha256": sums(docs / "images" / f"{name}.webp"),
            "made_from": {"weights.pt": sums(tmp_path / "weights.pt")},
        }
        for name in ("good", "changed", "outdated")
    }
    listed["docs/images/changed.webp"]["sha256"] = "0" * 64
    listed["docs/images/outdated.webp"]["made_from"]["weights.pt"] = "0" * 64
    (docs / "images" / "figures.json").write_text(json.dumps(listed))
    names = ("good", "changed", "outdated", "unlisted", "absent")
    figures = "".join(f".. image:: images/{n}.webp\n   :alt: {n}\n\n" for n in names)
    (docs / "index.rst").write_text(
        f"Title\n=====\n\n:measured:`some.json a.b | .2f` :measured:`some.json a.c`\n"
        f":measured:`other.json a`\n\n{figures}\n.. transcript:: one\n\n"
        ".. math::\n\n   \\unheardof{x}\n"
    )
    done = build(docs, tmp_path / "out")
    assert done.returncode == 1
    for fault in ("some.json has no 'a.c'", "training_results/reference/other.json is missing",
                  "images/absent.webp", "changed.webp is not the file",
                  "outdated.webp is out of date: weights.pt has changed",
                  "unlisted.webp is not listed", "transcripts.json is missing",
                  "formula not understood"):  # fmt: skip
        assert fault in done.stderr, fault
    assert "good.webp" not in done.stderr
    assert ">2.50</span>" in (tmp_path / "out" / "index.html").read_text()


def test_minutes_are_those_of_what_can_be_seen(tmp_path):
    """Folded words do not count; a command takes what it was measured to take, or is missed."""
    docs, reference = tmp_path / "docs", tmp_path / "training_results" / "reference"
    shutil.copytree(DOCS / "_ext", docs / "_ext")
    reference.mkdir(parents=True)
    (docs / "images").mkdir()
    (docs / "images" / "figures.json").write_text("{}")
    (docs / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(docs / '_ext')!r})\n"
        "extensions = ['sphinx_design', 'measured', 'minutes']\n"
    )
    (reference / "transcripts.json").write_text('{"a": {"command": "first", "seconds": 59}}')
    (reference / "commands.json").write_text('{"seconds": {"second": 301}}')
    console = ".. code-block:: console\n\n{}   $ {}\n\n"
    words = "word " * 598
    (docs / "index.rst").write_text(
        f":minutes:`index` :minutes:`index reading` :minutes:`index running`\n\n{words}end end\n\n"
        f".. dropdown:: Folded\n\n   {words}\n\n   .. code-block:: console\n\n      $ third\n\n"
        + console.format("", "first") + console.format("", "second")
    )  # fmt: skip
    done = build(docs, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "<p>9 3 6</p>" in (tmp_path / "out" / "index.html").read_text()
    with (docs / "index.rst").open("a") as page:
        page.write(console.format("", "third"))
    done = build(docs, tmp_path / "out")
    assert "commands.json has no 'seconds[third]'" in done.stderr


def load_script_from(path):
    """Import a Python file by its path."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The pages as files --------------------------------------------------------------------------


@functools.cache
def read_page(path):
    return Page(path)


class Page(HTMLParser):
    """Links, anchors, pictures and measured numbers of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.images, self.measured, self.loads = [], set(), [], [], []
        self.open = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[key] for key in ("id", "name") if a.get(key)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        if tag in ("img", "script", "source", "video", "iframe") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and "stylesheet" in a.get("rel", ""):
            self.loads.append(a["href"])
        if tag == "span" and "data-source" in a:
            self.open = [a["data-source"], a["data-key"], a["data-form"], ""]
            self.measured.append(self.open)

    def handle_data(self, data):
        if self.open:
            self.open[3] += data

    def handle_endtag(self, tag):
        if tag == "span":
            self.open = None


@pytest.fixture(scope="session")
def pages(site):
    return {name: read_page(site / f"{name}.html") for name in PAGES}


def from_file(source, key):
    """Look a number up, independently of the extension that wrote it."""
    path = REFERENCE / source
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            value = list(csv.DictReader(file))
    else:
        value = json.loads(path.read_text(encoding="utf-8"))
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", key):
        if name:
            value = value[name]
        elif "=" in index:
            field, wanted = index.split("=")
            value = next(row for row in value if str(row[field]) == wanted)
        else:
            value = value[int(index)] if isinstance(value, list) else value[index]
    return value


def test_numbers_are_those_of_the_files(pages):
    count = 0
    for name, page in pages.items():
        for source, key, form, text in page.measured:
            value = from_file(source, key)
            count += 1
            if not re.search(r"[defg%]$", form):
                assert text == str(value), (name, source, key)
                continue
            factor = re.match(r"([*/])([\d.e+]+) ?", form)
            if factor:
                number = float(factor[2])
                value = float(value) * (number if factor[1] == "*" else 1 / number)
            shown = text.replace(",", "")
            shown = float(shown[:-1]) / 100 if shown.endswith("%") else float(shown)
            spread = {"d": 0.5, "%": 0.005}.get(form[-1])
            if spread is None:
                digits = int(re.search(r"\.(\d+)[efg]", form)[1])
                leading = 10 ** math.floor(math.log10(abs(float(value)) or 1))
                size = {"f": 1, "e": leading, "g": 10 * leading}[form[-1]] * 10**-digits
                spread = 0.51 * size
            assert abs(shown - float(value)) <= spread * 1.001, (name, source, key, text, value)
    assert count > 60


def test_links_inside_resolve(site, pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                assert parts.scheme in ("https", ""), link
                continue
            target = (site / unquote(parts.path)) if parts.path else site / f"{name}.html"
            assert target.exists(), f"{name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in read_page(target).anchors, f"{name}: {link}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).scheme, f"{name}: {address}"
            assert not address.startswith("//"), f"{name}: {address}"
            assert (site / urlsplit(address).path).exists(), f"{name}: {address}"
    for sheet in site.rglob("*.css"):
        for address in re.findall(r"url\(['\"]?([^'\")]+)", sheet.read_text(errors="replace")):
            assert not address.startswith(("http", "//")), f"{sheet}: {address}"


def test_pictures_have_alternative_text(pages):
    for name, page in pages.items():
        for image in page.images:
            assert image.get("alt", "").strip(), f"{name}: {image.get('src')}"


def test_downloads_are_the_files_themselves(site):
    found = {path.name: path for path in (site / "_downloads").rglob("*") if path.is_file()}
    labs = {path.name for path in (DOCS / "labs").glob("*.ipynb")}
    assert set(found) == {"ddpm_from_scratch.py", "ddpm_from_scratch.ipynb", *labs}
    for name, path in found.items():
        folder = DOCS / "labs" if name in labs else DOCS
        assert path.read_bytes() == (folder / name).read_bytes(), name


@pytest.fixture(scope="module")
def bundle(site, tmp_path_factory):
    """The lesson's zip, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(site / "ddpm_basics.zip") as file:
        file.extractall(folder)
    return folder


def test_the_bundle_holds_the_files_themselves(bundle, pages):
    assert "ddpm_basics.zip" in pages["index"].links
    originals = [*ROOT.glob("exercise*.py"), *(ROOT / "ddpm_basics").rglob("*.py"),
                 *(DOCS / "labs").glob("*.ipynb")]  # fmt: skip
    names = ("requirements.txt", "requirements-extras.txt", "README.rst", "LICENSE",
             "models/README.md", "models/ddpm_african_fabrics.pt")  # fmt: skip
    originals += [ROOT / name for name in names]
    found = {path for path in bundle.rglob("*") if path.is_file()}
    assert found == {bundle / "ddpm_basics" / path.relative_to(ROOT) for path in originals}
    for path in originals:
        copy = bundle / "ddpm_basics" / path.relative_to(ROOT)
        assert copy.read_bytes() == path.read_bytes(), path


def test_the_bundle_runs_from_any_folder(bundle, tmp_path):
    script = bundle / "ddpm_basics" / "exercise1_generate.py"
    command = [sys.executable, script, "--num-samples", "1", "--steps", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["exercise1_output.png"]


def test_the_same_lesson_makes_the_same_bundle(bundle, site, tmp_path):
    app = SimpleNamespace(builder=SimpleNamespace(format="html"), outdir=tmp_path)
    load_script_from(DOCS / "_ext" / "bundle.py").write_bundle(app, None)
    again, first = tmp_path / "ddpm_basics.zip", site / "ddpm_basics.zip"
    assert again.read_bytes() == first.read_bytes()


def test_every_figure_is_shown_at_700_pixels_or_less(pages):
    for page in pages.values():
        for image in page.images:
            width = re.search(r"width: (\d+)px", image.get("style", ""))
            assert not width or int(width[1]) <= 700, image


# ---- The code on the pages -----------------------------------------------------------------------


class Block:
    """A code block of a page: language, classes, text, line."""

    def __init__(self, language, classes, text, line):
        self.language, self.classes, self.text, self.line = language, classes, text, line


def code_blocks(source):
    """All code-block directives of a reStructuredText page, in order."""
    lines, found, i = source.splitlines(), [], 0
    while i < len(lines):
        match = re.match(r"( *)\.\. code-block:: (\w+)$", lines[i])
        i += 1
        if not match:
            continue
        start, inner, body = i, len(match[1]) + 3, []
        while i < len(lines) and (not lines[i].strip() or lines[i].startswith(" " * inner)):
            body.append(lines[i][inner:])
            i += 1
        options = [line for line in body if re.match(r":\w+:", line)]
        classes = " ".join(options).partition(":class:")[2].split()
        text = "\n".join(line for line in body if line not in options).strip("\n") + "\n"
        found.append(Block(match[2], classes, text, start))
    return found


def small_weights(path):
    """Untrained weights of a small network with the twelve labels, in the bundled format."""
    names = sorted(TRADITIONS)
    labels = {"names": names, "embedding": torch.zeros(len(names), 32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(bundled(make_diffusion(), labels=labels), path)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a fresh clone, with a small network and few, small fabrics."""
    place = tmp_path_factory.mktemp("clone")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, place)
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ddpm_basics", place / "ddpm_basics", ignore=caches)
    weights = place / "models" / "ddpm_african_fabrics.pt"
    small_weights(weights)
    write_blocks(place / "african_fabric_processed", 120, size=16)
    with pytest.MonkeyPatch.context() as patch:  # of 24 fabrics instead of 1,200
        patch.setattr(steering, "CLASSIFIER_FABRICS", 24)
        levels = noise_levels(load_weights(weights)[0])
        steering.tradition_classifiers(place / ".cache", levels, 16, torch.device("cpu"))
    return place


@pytest.mark.parametrize("pages", [MAIN, ["troubleshooting"], ["making_it_fast"]])
def test_python_on_the_pages_runs(pages, clone, monkeypatch):
    """All Python blocks of some pages in order, in one namespace, on a small network."""
    monkeypatch.chdir(clone)
    smaller = {"dim=64": "dim=8", "dim_mults=(1, 2, 4, 8)": "dim_mults=(1, 2)",
               "image_size=64": "image_size=16",
               "sampling_timesteps=50": "sampling_timesteps=3", "3, 64, 64": "3, 16, 16",
               "range(diffusion.num_timesteps)": "range(0, 1000, 400)"}  # fmt: skip
    names, ran = {}, 0
    for name in pages:
        for block in code_blocks(page_source(name)):
            if block.language != "python" or {"edit", "from-scratch"} & set(block.classes):
                continue
            text = block.text
            for old, new in smaller.items():
                text = text.replace(old, new)
            exec(compile(text, f"{name}.rst, line {block.line}", "exec"), names)
            ran += 1
    assert ran >= (4 if pages == MAIN else 1)
    if pages == MAIN:
        assert (clone / "quick_start.png").exists()
        assert 0 <= names["fabrics"].min() <= names["fabrics"].max() <= 1


def test_quick_start_snippet_fits_the_real_network():
    """The snippet as printed builds the network of 35.7M parameters, with the weights' process."""
    block = next(b for b in code_blocks(page_source("index")) if "GaussianDiffusion(" in b.text)
    names = {}
    exec(block.text.split("checkpoint =")[0], names)
    diffusion = names["diffusion"]
    assert sum(w.numel() for w in diffusion.model.parameters()) == 35_711_491
    assert diffusion.objective == "pred_v"
    expected = build_diffusion()
    assert diffusion.betas.equal(expected.betas)
    assert diffusion.is_ddim_sampling


def test_modifications_of_the_script_from_scratch_run(tmp_path):
    blocks = [b for b in code_blocks(page_source("under_the_hood")) if "from-scratch" in b.classes]
    assert len(blocks) == 2
    source = (DOCS / "ddpm_from_scratch.py").read_text()
    write_blocks(tmp_path / "data", 20)
    for i, block in enumerate(blocks):
        edited = source.replace(
            'if __name__ == "__main__"', block.text + '\nif __name__ == "__main__"'
        )
        script = tmp_path / f"modified{i}.py"
        script.write_text(edited)
        subprocess.run([sys.executable, script, "--data", "data", "--steps", "2", "--dim", "8"],
                       cwd=tmp_path, check=True, capture_output=True)  # fmt: skip
        assert (tmp_path / "from_scratch.png").exists()
        (tmp_path / "from_scratch.png").unlink()


SMALL_TRAINING = "--steps 2 --dim 8 --dim-mults 1 2 --batch-size 2 --image-size 16 --save-every 2"


def commands(block):
    """The command lines of a console block, made small where they train or judge."""
    found = []
    for line in re.findall(r"^\$ (.*)", block.text, re.M):
        if "--train" in line.split():
            line += f" {SMALL_TRAINING}"
        if "ddpm_basics.evaluation" in line:  # which judges no pictures of 16 pixels
            line = re.sub(
                r"(evaluation) \w+", r"\1 judged0 --train judged1 --heldout judged2", line
            )
        found.append(line)
    return found


def test_commands_on_the_pages_run(clone, tmp_path, serve):
    """Every shell command and every edit of a constant, as the exercises say, in their order."""
    place = tmp_path / "clone"
    shutil.copytree(clone, place)
    for seed in range(3):
        write_blocks(place / f"judged{seed}", 240, 24, seed)
    ran, originals = 0, {p.name: p.read_text() for p in place.glob("*.py")}
    for block in code_blocks(main_line()):
        if "no-test" in block.classes:
            continue
        if "edit" in block.classes:
            script = block.classes[block.classes.index("edit") + 1]
            edited = originals[script]
            for line in block.text.splitlines():
                constant = line.split(" = ")[0]
                edited, count = re.subn(rf"^{constant} = .*$", line, edited, flags=re.M)
                assert count == 1, f"{script} has no constant {constant}"
            (place / script).write_text(edited)
            if script == "exercise1_generate.py":
                run_command(f"python {script}", place)
                ran += 1
                (place / script).write_text(originals[script])
        if block.language == "console":
            for command in commands(block):
                run_command(command, place, serve)
                ran += 1
            for script, text in originals.items():
                (place / script).write_text(text)
    assert ran >= 10  # otherwise the pages are not read any more


def run_command(command, place, serve=None):
    """Run one command line of the lesson in a folder, with this Python.

    With `serve`, a script that nobody has edited does not import its libraries once more.
    """
    words = shlex.split(command)
    assert words[0] == "python", command
    script = place / words[1]
    if serve and words[1] != "-m" and script.read_text() == (ROOT / words[1]).read_text():
        done = serve(script.stem).run(*words[2:], cwd=place)
        code = done.code
    else:
        done = subprocess.run([sys.executable, *words[1:]], cwd=place, check=False, text=True,
                              capture_output=True)  # fmt: skip
        code = done.returncode
    assert code == 0, f"{command}: {done.stderr[-1500:]}"
    return done.stdout


def skeleton(text):
    """A program's output without its numbers and without what only a small network changes."""
    text = re.sub(r"\bon .* in (fp32|bf16|fp16)\b", "on HARDWARE in PRECISION", text)
    text = re.sub(r"\d[\d.,:x-]*\d|\d", "N", text)
    text = re.sub(r"\bN (s|minutes|hours)\b", "N TIME", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("key", ["exercise1", "exercise2", "verify"])
def test_printed_output_is_what_the_commands_print(key, clone, tmp_path):
    """The outputs shown on the page against those of the same commands on a small network."""
    shown = json.loads((REFERENCE / "transcripts.json").read_text())[key]
    place = tmp_path / "clone"
    shutil.copytree(clone, place)
    if key == "verify":  # its output lists the folders of the real data set
        shutil.rmtree(place / "african_fabric_processed")
        write_blocks(place / "african_fabric_processed", 120, size=64)
        shown["output"] = re.sub(r"^  \w+ +\d+\n", "", shown["output"], flags=re.M)
    if key == "exercise2":  # the small clone has its classifiers, and draws nothing for them
        shown["output"] = re.sub(r"^\.cache/.*\n", "", shown["output"], flags=re.M)
    printed = run_command(shown["command"], place)
    if key == "verify":
        printed = re.sub(r"^  \w+ +\d+\n", "", printed, flags=re.M)
    assert skeleton(printed) == skeleton(shown["output"])
