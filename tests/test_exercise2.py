"""exercise2_explore.py and figures.py: each part's figure, numbers and film, on a small network."""

import ast
import contextlib
import io
import json
import math
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, write_blocks
from denoising_diffusion_pytorch import Unet
from matplotlib.figure import Figure
from PIL import Image
from tiny_networks import SIZE, bundled, make_diffusion, teach
from tqdm.auto import tqdm

from ddpm_basics import figures, hardware
from ddpm_basics.fabrics.drawing import TRADITIONS
from ddpm_basics.images import decode
from ddpm_basics.model import build_diffusion
from ddpm_basics.sampling import noise_levels, slerp, starting_noise
from ddpm_basics.steering import noised
from ddpm_basics.weight_files import load_weights

exercise1, exercise2 = load_script("exercise1_generate"), load_script("exercise2_explore")
SCRIPT = ROOT / "exercise2_explore.py"
TIMESTEPS = 60  # a process short enough to follow in full

# What the tests change at the top of the script, as the lesson asks learners to do.
QUICK = {
    "STEP_COUNTS": (5, 10, 30, 60),
    "FAST_STEP_COUNTS": (4, 8),
    "CAPTURE_TIMESTEPS": (999, 667, 333, 0),
    "MORPH_FABRICS": 3,
    "SHORT_STEPS": 3,
    "MORPH_FRAMES": 4,
    "GUIDANCES": (0, 1, 4),
    "STRENGTHS": (0.0, 0.5),
    "REGION_STEPS": 4,
    "COLOUR_WEIGHTS": (0, 10),
    "CLASSIFIED_FABRICS": 13,
    "COUNTED_FABRICS": 6,
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weight file of a tiny network with few timesteps, whose fabrics differ from each other."""
    path = tmp_path_factory.mktemp("weights") / "short.pt"
    torch.save(bundled(teach(make_diffusion(timesteps=TIMESTEPS))), path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Four fabrics of stripes in a subfolder."""
    folder = tmp_path_factory.mktemp("data") / "fabrics" / "stripes"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        stripes = np.repeat(rng.integers(0, 256, (8, 1, 3), dtype=np.uint8), 8, 0)
        Image.fromarray(np.repeat(stripes, 64, 1)).save(folder / f"{i:04d}.png")
    return folder.parent


def run_parts(folder, weights, data, parts, *options, code=0, **constants):
    """Run parts with other constants; returns (folder of the results, what was printed)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name, value in {**QUICK, **constants}.items():
            patch.setattr(exercise2, name, value)
        done = exercise2.main(["--part", *parts, "--weights", str(weights), "--data", str(data),
                               "--device", "cpu", "--precision", "fp32",
                               "--output-dir", str(folder), *map(str, options)])  # fmt: skip
    assert done == code, err.getvalue()
    return folder, Namespace(out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def explore(weights, data, tmp_path):
    """explore("a", RANDOM_SEED=7) runs parts with other constants."""

    def run(parts, *options, **more):
        return run_parts(tmp_path / "out", weights, data, parts, *options, **more)

    return run


@pytest.fixture(scope="session")
def everything(weights, data, tmp_path_factory):
    """All five parts, run once: what they leave is looked at by several tests."""
    return run_parts(tmp_path_factory.mktemp("everything"), weights, data, "abcde")


@pytest.fixture(scope="session")
def draw(weights):
    """draw(sampler, steps, seed): an image [h, w, c] as exercise 1 draws it."""
    diffusion, _ = load_weights(weights)

    def image(sampler, steps, seed):
        options = Namespace(sampler=sampler, steps=steps, guidance=1.0)
        images = exercise1.draw(diffusion, [seed], None, options, tqdm(disable=True))
        return images[0].permute(1, 2, 0).numpy()

    return image


def numbers(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def film(path):
    """Frames [n, h, w, 3] of a GIF, and how long each is shown."""
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0, "it does not repeat for ever"
        frames, durations = [], []
        for i in range(animation.n_frames):
            animation.seek(i)
            frames.append(np.array(animation.convert("RGB")).astype(float) / 255)
            durations.append(animation.info["duration"])
    return np.stack(frames), durations


def rms(one, other):
    return math.sqrt(((one - other) ** 2).mean())


# ---- a -------------------------------------------------------------------------------------------


def test_a_measures_one_pattern_at_all_step_counts(everything, draw):
    """Every distance again, from exercise 1's loop and one x_T."""
    folder, said = everything
    assert "117/117" in said.err, "the reference is drawn once, among the others"
    found = numbers(folder, "exercise2_sampling_comparison")
    assert [row["steps"] for row in found["ddim"]] == [5, 10, 30, 60]
    assert [row["steps"] for row in found["dpmpp"]] == [4, 8]
    reference = draw("ddim", TIMESTEPS, found["seed"])
    for sampler in ("ddim", "dpmpp"):
        for row in found[sampler]:
            image = draw(sampler, row["steps"], found["seed"])
            assert row["distance"] == pytest.approx(rms(image, reference), abs=1e-4)
            assert row["seconds"] > 0
    assert found["ddim"][-1]["distance"] == 0
    assert found["ddim"][0]["distance"] > found["ddim"][2]["distance"] > 0


def test_a_with_several_fabrics_and_few_step_counts(explore):
    folder, _ = explore("a", NUM_SAMPLES=5, STEP_COUNTS=(10,), FAST_STEP_COUNTS=(5,))
    found = numbers(folder, "exercise2_sampling_comparison")
    assert found["fabrics"] == 5
    assert len(found["ddim"]) == len(found["dpmpp"]) == 1
    assert found["ddim"][0]["distance"] > 0
    folder, _ = explore("a", STEP_COUNTS=(TIMESTEPS,), FAST_STEP_COUNTS=())
    found = numbers(folder, "exercise2_sampling_comparison")
    assert [row["distance"] for row in found["ddim"]] == [0], "the reference alone"


def test_a_leaves_out_more_steps_than_the_model_has(explore):
    folder, _ = explore("a", STEP_COUNTS=(30, 250), FAST_STEP_COUNTS=(4, 61))
    found = numbers(folder, "exercise2_sampling_comparison")
    assert [row["steps"] for row in found["ddim"]] == [30]
    assert [row["steps"] for row in found["dpmpp"]] == [4]


# ---- b -------------------------------------------------------------------------------------------


def test_b_captures_the_timesteps_asked_for(explore, draw):
    folder, _ = explore("b", CAPTURE_TIMESTEPS=(983, 750, 500, 250, 83, 0))
    found = numbers(folder, "reverse_diffusion_demo")
    assert found["steps"] == TIMESTEPS
    assert [row["t"] for row in found["captured"]] == [59, 45, 30, 15, 5, 0]
    distances = [row["distance_of_x_0"] for row in found["captured"]]
    assert distances[-1] == 0
    assert distances[0] > distances[3] > 0, "the guess does not come closer"
    assert 0.9 < found["captured"][0]["spread_of_x_t"] < 1.1, "it does not start from noise"

    frames, durations = film(folder / "reverse_diffusion_demo.gif")
    assert len(frames) == TIMESTEPS
    assert durations[-1] > 10 * durations[0]
    shown = frames[-1][8:200, 208:400]  # the right-hand panel of the last frame, 12 times as large
    assert rms(shown[6::12, 6::12], draw("ddim", TIMESTEPS, found["seed"])) < 0.05


def test_b_takes_the_nearest_time_that_is_visited(explore):
    steps = {"dpmpp": 20, "ddim": 15}
    folder, _ = explore("b", SAMPLING_STEPS=steps, CAPTURE_TIMESTEPS=(983, 0))
    assert [row["t"] for row in numbers(folder, "reverse_diffusion_demo")["captured"]] == [59, 3]


def test_another_seed_in_the_constant_or_on_the_command_line(explore):
    steps = {"dpmpp": 20, "ddim": 5}
    folder, _ = explore("b", RANDOM_SEED=7, SAMPLING_STEPS=steps)
    seven = (folder / "reverse_diffusion_demo.png").read_bytes()
    assert numbers(folder, "reverse_diffusion_demo")["seed"] == 7
    explore("b", "--seed", 7, SAMPLING_STEPS=steps)
    assert (folder / "reverse_diffusion_demo.png").read_bytes() == seven
    explore("b", SAMPLING_STEPS=steps)
    assert (folder / "reverse_diffusion_demo.png").read_bytes() != seven


# ---- c and d -------------------------------------------------------------------------------------


def alpha_bars(schedule, steps=1000):
    """The three schedules written down again from their papers."""
    if schedule == "linear":  # Ho 2020
        betas = np.linspace(1e-4, 0.02, steps)
    else:
        t = np.linspace(0, 1, steps + 1)
        if schedule == "cosine":  # Nichol & Dhariwal 2021
            curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        else:  # Jabri 2022, from -3 to 3
            curve = 1 / (1 + np.exp(6 * t - 3)) - 1 / (1 + np.exp(3))
        curve = curve / curve[0]
        betas = np.clip(1 - curve[1:] / curve[:-1], 0, 0.999)
    return np.cumprod(1 - betas)


def test_c_alpha_bar_and_snr(everything, data):
    folder, _ = everything
    found = numbers(folder, "forward_diffusion_demo")
    expected = alpha_bars("sigmoid")
    assert [row["t"] for row in found["captured"]] == [0, 100, 250, 500, 750, 999]
    for row in found["captured"]:
        assert row["alpha_bar"] == pytest.approx(expected[row["t"]], rel=2e-3)
        snr = expected[row["t"]] / (1 - expected[row["t"]])
        assert row["snr"] == pytest.approx(snr, rel=2e-3)
    assert found["fabric"].startswith(str(data))
    frames, _ = film(folder / "forward_diffusion_demo.gif")
    assert len(frames) == 51
    first, last = frames[0][16:264:16, 16:264:16], frames[-1][16:264:16, 16:264:16]
    fabric = np.asarray(decode(Path(found["fabric"]), SIZE)) / 255
    assert rms(first, fabric) < 0.03
    assert abs(np.corrcoef(last.ravel(), fabric.ravel())[0, 1]) < 0.05


def test_c_adds_noise_as_the_closed_form_says():
    x_0 = torch.rand(1, 3, 8, 8) * 2 - 1
    noise, _ = starting_noise([5], (3, 8, 8))
    levels = noise_levels(build_diffusion(dim=8, dim_mults=(1,), beta_schedule="sigmoid"))
    for t in (0, 500, 999):
        alpha_bar = alpha_bars("sigmoid")[t]
        expected = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise
        assert (noised(levels, x_0, t, noise) - expected).abs().max() < 1e-5
    assert torch.equal(noised(levels, x_0, -1, noise), x_0)


def test_c_takes_another_fabric_with_another_seed(explore):
    fabrics = set()
    for seed in range(4):
        folder, _ = explore("c", "--seed", seed)
        fabrics.add(numbers(folder, "forward_diffusion_demo")["fabric"])
    assert len(fabrics) > 1


def test_d_three_schedules(everything):
    folder, _ = everything
    found = numbers(folder, "noise_schedule_comparison")
    for schedule in ("linear", "cosine", "sigmoid"):
        expected = alpha_bars(schedule)
        rows = {row["t"]: row for row in found[schedule]}
        assert set(rows) == {0, 100, 250, 499, 500, 750, 999}
        for t, row in rows.items():
            assert row["alpha_bar"] == pytest.approx(expected[t], rel=5e-3)
            before = expected[t - 1] if t else 1
            assert row["beta"] == pytest.approx(1 - expected[t] / before, rel=5e-3)
    middle = {name: next(row for row in found[name] if row["t"] == 499)["alpha_bar"]
              for name in ("linear", "cosine", "sigmoid")}  # fmt: skip
    assert middle == pytest.approx({"linear": 0.079, "cosine": 0.494, "sigmoid": 0.5}, abs=0.001)


def test_without_data_the_network_draws_the_fabric(explore, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        folder, said = explore("cd", "--data", tmp_path / name)
        assert f"No fabrics in {tmp_path / name} (see 'python -m ddpm_basics.fabrics'" in said.out
        for figure in ("forward_diffusion_demo", "noise_schedule_comparison"):
            assert numbers(folder, figure)["fabric"] == "drawn by the network from seed 42"


def test_what_a_mac_leaves_beside_a_picture_is_none(tmp_path):
    for name in ("a.png", "._a.png", "._b.png", "._c.png"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    for seed in range(8):
        options = Namespace(data=tmp_path, seed=seed, picture=None)
        grey = Namespace(channels=1)
        lab = Namespace(options=options, noise=torch.zeros(1, 1, 16, 16), diffusion=grey)
        fabric, source = exercise2.find_fabric(lab)
        assert source == str(tmp_path / "a.png")
        assert fabric.shape == (1, 1, 16, 16), "grey, as the network is"


# ---- e -------------------------------------------------------------------------------------------


def test_slerp_stays_on_the_sphere():
    start, end = torch.randn(2, 3, 64, 64).unbind()
    assert torch.allclose(slerp(start, end, 0.0), start, atol=1e-5)
    assert torch.allclose(slerp(start, end, 1.0), end, atol=1e-5)
    between = slerp(start, end, 0.5)
    assert between.norm() == pytest.approx((start.norm() + end.norm()).item() / 2, rel=0.01)
    assert ((start + end) / 2).norm() < 0.75 * between.norm(), "a straight line would do as well"


def test_e_is_smooth_and_has_no_seam(everything, draw):
    folder, _ = everything
    found = numbers(folder, "ddpm_fabric_morph")
    frames, durations = film(folder / "ddpm_fabric_morph.gif")
    assert frames.shape == (found["frames"], 192, 192, 3)
    assert found["frames"] == QUICK["MORPH_FABRICS"] * QUICK["MORPH_FRAMES"]
    assert set(durations) == {60}
    steps = [rms(frame, frames[(i + 1) % len(frames)]) for i, frame in enumerate(frames)]
    # The GIF's 256 colours and its enlargement move each frame a little.
    assert max(steps) < found["largest_change"] + 0.03, "a jump, or a seam"
    assert sum(steps) / len(steps) == pytest.approx(found["mean_change"], abs=0.03)
    assert rms(frames[0], frames[len(frames) // 2]) > 0.1, "nothing moves"
    first = draw("dpmpp", QUICK["SHORT_STEPS"], found["seed"])
    assert rms(frames[0][6::12, 6::12], first) < 0.1, "it does not begin with the first fabric"

    clip = np.stack(list(imageio.mimread(folder / "ddpm_fabric_morph.mp4", memtest=False))) / 255
    assert clip.shape == frames.shape
    assert rms(clip[0], frames[0]) < 0.1


@pytest.mark.parametrize("tool", ["/nowhere", __file__], ids=["missing", "not to be executed"])
def test_e_does_without_ffmpeg_and_says_so_first(explore, monkeypatch, tmp_path, tool):
    def draw(*args, **more):
        assert "ffmpeg cannot be used (" in sys.stdout.getvalue()
        return drawn(*args, **more)

    drawn = exercise2.draw
    monkeypatch.setattr(exercise2, "draw", draw)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", tool)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ddpm_fabric_morph.mp4").touch()  # of an earlier run
    folder, said = explore("e")
    assert said.out.count("a .gif is written, but no .mp4") == 1
    assert said.err.count("Traceback") == 0
    assert {path.name for path in folder.iterdir()} == {
        "ddpm_fabric_morph.gif", "ddpm_fabric_morph.json", "ddpm_fabric_morph.mp4"}  # fmt: skip
    assert "ddpm_fabric_morph.mp4" not in said.out, "as if it had written it"


def test_the_morph_of_the_shipped_weights_is_smooth():
    """From frame to frame it changes by a small part of what lies between two fabrics."""
    record = json.loads((ROOT / "training_results/reference/ddpm_fabric_morph.json").read_text())
    assert record["frames"] == exercise2.MORPH_FABRICS * exercise2.MORPH_FRAMES
    assert record["largest_change"] < record["fabrics_apart"] / 3
    assert record["mean_change"] < record["fabrics_apart"] / 6


# ---- f and g -------------------------------------------------------------------------------------

STEERED = ["guidance_demo", "sdedit_demo", "inpainting_demo", "colour_demo", "classifier_demo",
           "tile_demo"]  # fmt: skip


@pytest.fixture(scope="session")
def told_weights(tmp_path_factory):
    """A weight file of a tiny network that knows the twelve traditions."""
    table = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    labels = {"names": sorted(TRADITIONS), "embedding": table}
    path = tmp_path_factory.mktemp("weights") / "told.pt"
    torch.save(bundled(teach(make_diffusion(timesteps=TIMESTEPS)), labels=labels), path)
    return path


@pytest.fixture(scope="session")
def steered(told_weights, tmp_path_factory):
    """Parts f and g, run once, on a hundred pictures."""
    folder = tmp_path_factory.mktemp("steered")
    data = write_blocks(tmp_path_factory.mktemp("blocks"), 100, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_basics.steering.CLASSIFIER_FABRICS", 24)
        patch.setattr("ddpm_basics.evaluation.features.CLASSIFIER_STEPS", 2)
        return run_parts(folder, told_weights, data, "fg")


def test_f_and_g_write_their_files(steered):
    folder, said = steered
    names = [*STEERED, "ideal_denoiser_demo"]
    assert {path.name for path in folder.iterdir()} == {
        ".cache", "tile_demo_single.png",
        *(f"{name}.png" for name in names), *(f"{name}.json" for name in names),
    }  # fmt: skip
    with Image.open(folder / "tile_demo_single.png") as tile:
        assert tile.size == (SIZE, SIZE)
    for name in names:
        with Image.open(folder / f"{name}.png") as figure:
            assert figure.width == 1400
        assert f"{name}.json, " in said.out


def test_f_numbers(steered):
    folder, _ = steered
    guided = numbers(folder, "guidance_demo")
    assert guided["labels"] == ["adinkra", "kente", "ndebele", "wax_print"]
    assert len({*guided["contrast"]}) == len(guided["at_the_ends"]) == 3
    noised = numbers(folder, "sdedit_demo")
    assert noised["distance"][0] < 1e-6 < noised["distance"][1], "strength 0 is the picture"
    around = numbers(folder, "inpainting_demo")
    assert around["contrast_at_the_border"].keys() == {"half", "frame"}
    near, nearer = numbers(folder, "colour_demo")["distance_of_mean_colour"]
    assert nearer < near
    judged = numbers(folder, "classifier_demo")
    assert judged["ways"] == ["no label", "classifier", "classifier-free"]
    assert all(0 <= share <= 1 for share in judged["recognised"])
    ordinary, rolled = numbers(folder, "tile_demo")["contrast_at_the_seam"]
    assert ordinary != rolled


def test_g_memory_copies(steered):
    found = numbers(steered[0], "ideal_denoiser_demo")
    assert (found["images"], found["fabrics"]) == (100, 6)
    assert found["copies"]["memory"] == 1
    assert found["copies"]["network"] < 1


def test_f_takes_what_the_reader_brings(told_weights, data, tmp_path):
    """A picture without contrast, a mask with a name that is no formula, labels, two figures."""
    Image.new("L", (40, 30), 128).save(tmp_path / "mine.png")
    mask = Image.new("1", (50, 50))
    mask.paste(1, (0, 0, 50, 20))
    mask.save(tmp_path / "$\\keep$.png")
    folder, _ = run_parts(
        tmp_path / "out", told_weights, data, ["sdedit_demo", "inpainting_demo"], "--picture",
        tmp_path / "mine.png", "--mask", tmp_path / "$\\keep$.png", "--label", "kuba", "kuba",
    )  # fmt: skip
    names = {path.stem for path in folder.iterdir()}
    assert names == {"sdedit_demo", "inpainting_demo"}
    assert numbers(folder, "sdedit_demo")["labels"] == ["kuba"]
    around = numbers(folder, "inpainting_demo")
    assert around["picture"] == str(tmp_path / "mine.png")
    assert around["label"] == ["kuba"]
    assert around["contrast_at_the_border"]["$\\keep$.png"]["the picture"] is None


@pytest.mark.parametrize(("option", "what"), [
    ("--picture", "none.jpg"), ("--mask", "none.png"), ("--data", "few")])  # fmt: skip
def test_what_will_not_do_is_refused_before_anything_is_drawn(option, what, weights, tmp_path):
    write_blocks(tmp_path / "few", 3, SIZE)
    _, said = run_parts(tmp_path / "out", weights, tmp_path / "few", "cfg", option,
                        tmp_path / what, code=1)  # fmt: skip
    assert what in said.err
    assert not [*tmp_path.glob("out/*")]


def test_f_without_labels(weights, data, tmp_path):
    """What needs them is skipped, in a sentence each."""
    only = [row for row in exercise2.PARTS if row[0] == "f" and row[2] != "colour_demo.png"]
    folder, said = run_parts(tmp_path / "out", weights, data, "f", PARTS=only)
    skipped = re.findall(r"skipped (\w+)\.png, as .* does not know (.*)\.", said.out)
    assert skipped == [("guidance_demo", "labels"), ("sdedit_demo", "labels"),
                       ("classifier_demo", "the twelve traditions in colour")]  # fmt: skip
    assert {path.stem for path in folder.iterdir()} == {
        "inpainting_demo", "tile_demo", "tile_demo_single"}  # fmt: skip


def test_the_figures_of_the_shipped_weights_show_what_they_say():
    record = {name: json.loads((ROOT / f"training_results/reference/{name}.json").read_text())
              for name in [*STEERED, "ideal_denoiser_demo"]}  # fmt: skip
    ordinary, rolled = record["tile_demo"]["contrast_at_the_seam"]
    assert rolled < 1.2
    assert ordinary > rolled + 0.3
    distances = record["sdedit_demo"]["distance"]
    assert distances == sorted(distances)
    colours = record["colour_demo"]["distance_of_mean_colour"]
    assert colours == sorted(colours, reverse=True)
    unlabelled, classifier, own_labels = record["classifier_demo"]["recognised"]
    assert unlabelled + 0.3 < classifier
    assert own_labels > 0.9
    copies = record["ideal_denoiser_demo"]["copies"]
    assert copies["memory"] == 1
    assert copies["network"] < 0.05
    assert record["guidance_demo"]["at_the_ends"] == sorted(record["guidance_demo"]["at_the_ends"])


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise2_explore")


def test_every_part_writes_its_files(everything):
    folder, said = everything
    drawn = {"exercise2_sampling_comparison", "reverse_diffusion_demo", "forward_diffusion_demo",
                "noise_schedule_comparison"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.png" for name in drawn),
        *(f"{name}.json" for name in (*drawn, "ddpm_fabric_morph")),
        "reverse_diffusion_demo.gif", "forward_diffusion_demo.gif", "ddpm_fabric_morph.gif",
        "ddpm_fabric_morph.mp4",
    }  # fmt: skip
    for name in drawn:
        with Image.open(folder / f"{name}.png") as figure:
            assert figure.width == 1400
    facts, *parts, end = said.out.splitlines()
    assert re.search(r"short\.pt: EMA weights, .* parameters .*; on CPU .* in fp32", facts)
    assert [line[:13] for line in parts] == [f"Part {part}: wrote" for part in "abcde"]
    assert "ddpm_fabric_morph.json, " in parts[-1]
    assert "ddpm_fabric_morph.mp4 in " in parts[-1]
    assert re.fullmatch(r"Done in \d+\.\d s\.", end)
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        assert (record["seed"], record["precision"]) == (42, "fp32")
        assert record["device"] == hardware.describe(torch.device("cpu"))
        assert record["seconds"] > 0


def test_started_in_another_folder(data, tmp_path):
    """As a student starts it: the shipped weights stand beside the script."""
    command = [sys.executable, str(SCRIPT), "--part", "d", "--data", str(data)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ROOT / 'models' / 'ddpm_african_fabrics.pt'}: ")
    assert {path.suffix for path in tmp_path.glob("noise_schedule_comparison.*")} == {
        ".png", ".json"}  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input(cli, weights, data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for options, words in {
        ("--weights", "none.pt"): "none.pt does not exist",
        ("--data", "broken"): "a.png cannot be read as an image",
        ("--data", "file"): "file is a file, not a folder",
        ("--data", data, "--output-dir", "file"): "Cannot write into file",
        ("--precision", "fp16", "--device", "cpu"): "fp16 needs a GPU",
        ("--picture", "none.jpg"): "none.jpg cannot be read as an image",
        ("--label", "kente"): "knows no kente.",
    }.items():
        done = cli.run("--part", "c", "--weights", weights, *options, cwd=tmp_path)
        assert done.code == 1, options
        assert words in done.sentence, options
    for options in ("--part z", "--part", "--seed -1", "--device toaster", "stray"):
        done = cli.run(*options.split(), cwd=tmp_path)
        assert done.code == 2, options
        assert "error: " in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("part", ["a", "b", "e"])
def test_ctrl_c(cli, tiny_weights, tmp_path, part):
    """With the script as it is, on a process of 1000 steps, there is time to interrupt it."""
    run = cli.start("--part", part, "--weights", tiny_weights, cwd=tmp_path)
    run.wait_until(lambda: f"{part}:   1%" in run.output("stderr"))
    run.send(signal.SIGINT)
    done = run.finish()
    assert done.code == 130
    assert "Traceback" not in done.stderr
    assert "Interrupted. The parts that were finished are in ." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_constants_that_the_lesson_changes_stand_at_the_top():
    tree = ast.parse(SCRIPT.read_text())
    first = next(node.lineno for node in tree.body if isinstance(node, ast.ClassDef))
    names = {node.targets[0].id for node in tree.body
             if isinstance(node, ast.Assign) and node.lineno < first}  # fmt: skip
    assert {
        "RANDOM_SEED",
        "SAMPLING_STEPS",
        "NUM_SAMPLES",
        *QUICK,
    } <= names


@pytest.mark.slow
def test_all_parts_as_they_are_with_a_thousand_steps(cli, data, tmp_path):
    """The constants untouched: 1000 DDIM steps, 120 frames."""
    torch.save(Unet(dim=8, dim_mults=(1, 2)).state_dict(), tmp_path / "tiny.pt")
    done = cli.run("--weights", "tiny.pt", "--data", data, cwd=tmp_path)
    assert done.code == 0, done.stderr
    found = numbers(tmp_path, "exercise2_sampling_comparison")
    assert [row["steps"] for row in found["ddim"]] == [50, 100, 250, 500, 1000]


# ---- figures.py ----------------------------------------------------------------------------------


def test_numbers_have_the_digits_that_count():
    values = {3.4e-7: "3e-7", 0.01234: "0.0123", 0.5: "0.5000", 4.561: "4.56", 3333.3: "3,333",
              0.0009: "9e-4", 999.4: "999", 1e6: "1,000,000"}  # fmt: skip
    assert {value: figures.number(value) for value in values} == values


def test_pixels_and_distances():
    x = torch.tensor([-3, -1, 0, 0.5, 1, 7], dtype=torch.bfloat16)
    assert figures.pixels(x).tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert figures.pixels(x).dtype == torch.float32
    assert figures.distance(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.3)) == (
        pytest.approx(0.3)
    )


def test_grey_stays_as_grey_as_it_is():
    axes = Figure().subplots()
    figures.show(axes, torch.tensor([[[0.4, 0.6]]]))
    (picture,) = axes.images
    assert picture.to_rgba(picture.get_array(), bytes=True)[0, :, 0].tolist() == [102, 153]


def test_curves_leave_out_what_was_not_measured():
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.25}]
    assert figures.curve(rows, "loss") == ([1, 3], [0.5, 0.25])
