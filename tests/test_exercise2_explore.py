"""exercise2_explore.py: each part's figure, numbers and film, with a small network."""

import ast
import contextlib
import importlib.util
import io
import json
import math
import re
import signal
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from PIL import Image

from ddpm_basics.console import UserError
from ddpm_basics.model import load_weights
from ddpm_basics.sampling import SAMPLERS, sample_ddim, starting_noise

exercise1 = load_script("exercise1_generate")
SCRIPT = ROOT / "exercise2_explore.py"
SIZE, TIMESTEPS = 16, 60  # a process short enough to follow in full

# What the tests change at the top of the script, as the lesson asks learners to do.
QUICK = {
    "STEP_COUNTS": "(5, 10, 30, 60)",
    "FAST_STEP_COUNTS": "(4, 8)",
    "CAPTURE_TIMESTEPS": "(59, 40, 20, 0)",
    "MORPH_FABRICS": "3",
    "MORPH_STEPS": "3",
    "MORPH_FRAMES": "(9, 14)",
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A tiny network that has seen colour ramps, so that its fabrics differ from each other."""
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=3)
    diffusion = GaussianDiffusion(unet, image_size=SIZE, timesteps=TIMESTEPS,
                                  objective="pred_noise", beta_schedule="sigmoid")  # fmt: skip
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    ramp = torch.linspace(0, 1, SIZE)
    for _ in range(60):
        colors, slopes = torch.rand(8, 3, 1, 1), torch.rand(8, 1, 1, 1)
        diffusion((colors + slopes * ramp) / 2 * torch.ones(SIZE, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    ema = {f"ema_model.{name}": value for name, value in diffusion.state_dict().items()}
    config = {"process": {"image_size": SIZE, "objective": "pred_noise"}}
    torch.save({"step": 60, "version": "2.3.4", "ema": ema, "config": config}, path)
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


def edited(folder, **constants):
    """Write the script with other constants at its top, as a learner would; return the module."""
    source = SCRIPT.read_text()
    for name, value in {**QUICK, **constants}.items():
        source, count = re.subn(rf"^{name} = .*?(?=  #|$)", f"{name} = {value}", source, flags=re.M)
        assert count == 1, name
    path = folder / "edited_exercise2.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("edited_exercise2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_parts(place, weights, data, parts, *options, code=0, **constants):
    """Run parts of an edited copy; returns (folder of the results, what was printed)."""
    module, out, err = edited(place, **constants), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        done = module.main(["--part", *parts, "--weights", str(weights), "--data", str(data),
                            "--device", "cpu", "--precision", "fp32",
                            "--output-dir", str(place / "out"),
                            *map(str, options)])  # fmt: skip
    said = SimpleNamespace(out=out.getvalue(), err=err.getvalue())
    assert done == code, said.err
    return place / "out", said


@pytest.fixture
def explore(weights, data, tmp_path):
    """explore("a", RANDOM_SEED="7") runs parts with other constants."""

    def run(parts, *options, **more):
        return run_parts(tmp_path, weights, data, parts, *options, **more)

    return run


@pytest.fixture(scope="session")
def everything(weights, data, tmp_path_factory):
    """All five parts, run once: what they leave is looked at by several tests."""
    return run_parts(tmp_path_factory.mktemp("everything"), weights, data, "abcde")


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


def test_a_measures_one_pattern_at_all_step_counts(everything, weights):
    """Every distance again, from exercise 1's samplers and one x_T."""
    folder, said = everything
    with Image.open(folder / "exercise2_sampling_comparison.png") as figure:
        assert figure.width == 1400
    assert "Part a: wrote" in said.out
    assert "117/117" in said.err, "the reference is drawn once, among the others"
    found = numbers(folder, "exercise2_sampling_comparison")
    assert [row["steps"] for row in found["ddim"]] == [5, 10, 30, 60]
    assert [row["steps"] for row in found["dpmpp"]] == [4, 8]
    diffusion, _ = load_weights(weights)
    x_T, _ = starting_noise([found["seed"]], (3, SIZE, SIZE))
    reference = sample_ddim(diffusion, x_T, TIMESTEPS, min_signal=exercise1.MIN_SIGNAL)
    for sampler in ("ddim", "dpmpp"):
        for row in found[sampler]:
            image = SAMPLERS[sampler](diffusion, x_T, row["steps"], min_signal=exercise1.MIN_SIGNAL)
            assert row["distance"] == pytest.approx(rms(image, reference), abs=1e-4)
            assert row["seconds"] > 0
    assert found["ddim"][-1]["distance"] == 0
    assert found["ddim"][0]["distance"] > found["ddim"][2]["distance"] > 0


def test_a_with_several_images_at_one_step_count(explore):
    folder, _ = explore("a", NUM_SAMPLES="5", STEP_COUNTS="(10,)", FAST_STEP_COUNTS="(5,)")
    found = numbers(folder, "exercise2_sampling_comparison")
    assert found["fabrics"] == 5
    assert len(found["ddim"]) == len(found["dpmpp"]) == 1


def test_mosaic_keeps_every_image(tmp_path):
    module = edited(tmp_path)
    images = torch.arange(1, 6).reshape(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    board = module.mosaic(images)
    assert board.shape == (3, 4, 6)
    assert [round(v, 1) for v in board[0, ::2, ::2].flatten().tolist()] == [
        0.1, 0.2, 0.3, 0.4, 0.5, 1.0]  # fmt: skip
    assert torch.equal(module.mosaic(images[:1]), images[0])


def test_a_refuses_more_steps_than_the_model_has(explore):
    _, said = explore("a", code=1, FAST_STEP_COUNTS="(4, 61)")
    assert "61 steps are too many: the model has 60" in said.err


# ---- b -------------------------------------------------------------------------------------------


def test_b_captures_the_timesteps_asked_for(explore, weights):
    folder, _ = explore("b", CAPTURE_TIMESTEPS="(59, 45, 30, 15, 5, 0)")
    found = numbers(folder, "reverse_diffusion_demo")
    assert [row["t"] for row in found["captured"]] == [59, 45, 30, 15, 5, 0]
    distances = [row["distance_of_x_0"] for row in found["captured"]]
    assert distances[-1] == 0
    assert distances[0] > distances[3] > 0, "the guess does not come closer"
    assert 0.9 < found["captured"][0]["spread_of_x_t"] < 1.1, "it does not start from noise"

    frames, durations = film(folder / "reverse_diffusion_demo.gif")
    assert len(frames) == TIMESTEPS
    assert durations[-1] > 10 * durations[0]
    diffusion, _ = load_weights(weights)
    x_T, _ = starting_noise([found["seed"]], (3, SIZE, SIZE))
    images = sample_ddim(diffusion, x_T, TIMESTEPS, min_signal=exercise1.MIN_SIGNAL)
    image = images[0].permute(1, 2, 0).numpy()
    shown = frames[-1][8:200, 208:400]  # the right-hand panel of the last frame, 12 times as large
    assert rms(shown[6::12, 6::12], image) < 0.05


def test_b_takes_the_nearest_time_that_is_visited(explore):
    steps = '{"dpmpp": 20, "ddim": 15}'
    folder, _ = explore("b", SAMPLING_STEPS=steps, CAPTURE_TIMESTEPS="(59, 0)")
    assert [row["t"] for row in numbers(folder, "reverse_diffusion_demo")["captured"]] == [59, 3]


def test_another_seed_in_the_constant_or_on_the_command_line(explore):
    folder, _ = explore("b", RANDOM_SEED="7")
    seven = (folder / "reverse_diffusion_demo.png").read_bytes()
    assert numbers(folder, "reverse_diffusion_demo")["seed"] == 7
    explore("b", "--seed", 7)
    assert (folder / "reverse_diffusion_demo.png").read_bytes() == seven


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
    first, last = frames[0][8:264:4, 8:264:4], frames[-1][8:264:4, 8:264:4]
    with Image.open(found["fabric"]) as picture:
        fabric = np.array(picture.convert("RGB")) / 255
    assert rms(first, fabric) < 0.03
    assert abs(np.corrcoef(last.ravel(), fabric.ravel())[0, 1]) < 0.05


def test_c_adds_noise_as_the_closed_form_says(tmp_path):
    module = edited(tmp_path)
    fabric, noise = torch.rand(3, 8, 8), torch.randn(3, 8, 8)
    process = module.make_process("sigmoid")
    for t in (0, 500, 999):
        alpha_bar = alpha_bars("sigmoid")[t]
        expected = math.sqrt(alpha_bar) * (fabric * 2 - 1) + math.sqrt(1 - alpha_bar) * noise
        assert (module.add_noise(process, fabric, t, noise) - expected).abs().max() < 1e-5


def test_d_three_schedules(explore):
    folder, _ = explore("d", "--weights", "none.pt")  # needs no network
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
    with Image.open(folder / "noise_schedule_comparison.png") as figure:
        assert figure.width == 1400


def test_without_data_the_network_draws_the_fabric(explore, tmp_path):
    folder, said = explore("cd", "--data", tmp_path / "nowhere")
    assert "There are no fabrics" in said.out
    assert "python -m ddpm_basics.fabrics" in said.out
    assert "drawn by the network" in numbers(folder, "forward_diffusion_demo")["fabric"]
    _, said = explore(
        "c", "--data", tmp_path / "nowhere", "--weights", tmp_path / "none.pt", code=1
    )
    assert "none.pt does not exist" in said.err


def test_photographs_are_cropped_not_squeezed(tmp_path):
    module = edited(tmp_path)
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = (0, 200, 0)
    Image.fromarray(wide).save(tmp_path / "PHOTO.JPG", quality=95)
    fabric = module.read_fabric(tmp_path / "PHOTO.JPG")
    assert fabric.shape == (3, 64, 64)
    assert fabric[1, :, 4:-4].min() > 0.7
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(UserError, match=r"broken\.png is no image"):
        module.read_fabric(tmp_path / "broken.png")


# ---- e -------------------------------------------------------------------------------------------


def test_slerp_stays_on_the_sphere(tmp_path):
    module = edited(tmp_path)
    start, end = torch.randn(2, 3, 64, 64).unbind()
    assert torch.allclose(module.slerp(start, end, torch.tensor(0.0)), start, atol=1e-5)
    assert torch.allclose(module.slerp(start, end, torch.tensor(1.0)), end, atol=1e-5)
    between = module.slerp(start, end, torch.tensor(0.5))
    assert between.norm() == pytest.approx((start.norm() + end.norm()).item() / 2, rel=0.01)
    assert ((start + end) / 2).norm() < 0.75 * between.norm(), "a straight line would do as well"


def test_e_is_smooth_and_has_no_seam(everything):
    folder, said = everything
    found = numbers(folder, "ddpm_fabric_morph")
    frames, _ = film(folder / "ddpm_fabric_morph.gif")
    assert len(frames) == found["frames"]
    steps = [rms(frame, frames[(i + 1) % len(frames)]) for i, frame in enumerate(frames)]
    # The GIF's 256 colours and its enlargement move each frame a little.
    assert max(steps) < found["largest_change"] + 0.03
    assert steps[-1] < found["largest_change"] + 0.03, "there is a seam"
    assert f"more than {found['largest_change']:.3f}" in said.out
    halfway = rms(frames[0], frames[len(frames) // 2])
    assert halfway > 0.1, "nothing moves"

    clip = np.stack(list(imageio.mimread(folder / "ddpm_fabric_morph.mp4", memtest=False))) / 255
    assert clip.shape == (len(frames), 256, 256, 3)
    assert rms(clip[0], frames[0]) < 0.1
    assert found["gif_bytes"] == (folder / "ddpm_fabric_morph.gif").stat().st_size <= 6_000_000


@pytest.mark.parametrize(("aim", "frames"), [("9.9", 9), ("0.0", 14)])
def test_e_adds_frames_where_the_fabric_changes_fast(explore, aim, frames):
    folder, _ = explore("e", MORPH_CHANGE=aim)
    assert numbers(folder, "ddpm_fabric_morph")["frames"] == frames


def test_e_frames_in_between_make_it_smoother(tmp_path, weights):
    largest = {}
    for aim in (9.9, 0.0):
        module = edited(tmp_path, MORPH_CHANGE=aim)
        lab = module.Laboratory(module.parse_options(["--weights", str(weights)]))
        images = module.draw_loop(lab)
        largest[aim] = max(module.changes(images))
    assert largest[0.0] < largest[9.9]


def test_e_becomes_smaller_until_it_fits(explore):
    folder, _ = explore("e", MORPH_BYTES="60_000")
    frames, _ = film(folder / "ddpm_fabric_morph.gif")
    assert frames.shape[1] < 256


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise2_explore")


def test_every_part_writes_its_files(everything):
    folder, said = everything
    assert {path.name for path in folder.iterdir()} == {
        "exercise2_sampling_comparison.png", "exercise2_sampling_comparison.json",
        "reverse_diffusion_demo.png", "reverse_diffusion_demo.gif", "reverse_diffusion_demo.json",
        "forward_diffusion_demo.png", "forward_diffusion_demo.gif", "forward_diffusion_demo.json",
        "noise_schedule_comparison.png", "noise_schedule_comparison.json",
        "ddpm_fabric_morph.gif", "ddpm_fabric_morph.mp4", "ddpm_fabric_morph.json",
    }  # fmt: skip
    lines = [line for line in said.out.splitlines() if line.startswith("Part ")]
    assert [line[:12] for line in lines] == [f"Part {part}: wrote"[:12] for part in "abcde"]
    assert re.fullmatch(r"Done in \d+\.\d s\.", said.out.splitlines()[-1])
    assert said.out.count("parameters") == 1, "the weights are loaded once"
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["seed"] == 42
        assert record["device"].startswith("cpu: ")


def test_bad_input(cli, data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for options, words in {
        ("--part", "a", "--weights", "none.pt"): "none.pt does not exist",
        ("--part", "c", "--data", "broken"): "a.png is no image that can be read",
        ("--part", "c", "--data", data, "--output-dir", "file"): "file",
        ("--part", "c", "--precision", "fp16", "--device", "cpu"): "fp16 needs a GPU",
    }.items():
        done = cli.run(*options, cwd=tmp_path)
        assert done.code == 1, options
        assert words in done.sentence, options
    for options in ("--part z", "--part", "--seed -1", "--device toaster", "stray"):
        done = cli.run(*options.split(), cwd=tmp_path)
        assert done.code == 2, options
        assert "error: " in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]


@pytest.mark.parametrize("part", ["a", "b", "e"])
def test_ctrl_c(cli, tmp_path, part):
    """With the script as it is, on a process of 1000 steps, there is time to interrupt it."""
    unet = Unet(dim=8, dim_mults=(1, 2))
    torch.save(unet.state_dict(), tmp_path / "tiny.pt")
    run = cli.start("--part", part, "--weights", "tiny.pt", cwd=tmp_path)
    run.wait_until(lambda: f"{part}:   1%" in run.output("stderr"))
    run.send(signal.SIGINT)
    done = run.finish()
    assert done.code == 130
    assert "Traceback" not in done.stderr
    assert "Interrupted. The parts that were finished are in ." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]


def test_the_constants_that_the_lesson_changes_stand_at_the_top():
    tree = ast.parse(SCRIPT.read_text())
    first = next(node.lineno for node in tree.body if isinstance(node, ast.ClassDef))
    names = {node.targets[0].id for node in tree.body
             if isinstance(node, ast.Assign) and node.lineno < first}  # fmt: skip
    assert {"RANDOM_SEED", "SAMPLING_STEPS", "STEP_COUNTS", "CAPTURE_TIMESTEPS"} <= names


def test_all_scripts_draw_with_the_same_bound():
    scripts = [load_script(name) for name in ("exercise2_explore", "exercise3_train")]
    assert {script.MIN_SIGNAL for script in scripts} == {exercise1.MIN_SIGNAL}


@pytest.mark.slow
def test_all_parts_as_they_are_with_a_thousand_steps(cli, data, tmp_path):
    """The constants untouched: 1000 DDIM steps, 120 frames."""
    torch.save(Unet(dim=8, dim_mults=(1, 2)).state_dict(), tmp_path / "tiny.pt")
    done = cli.run("--weights", "tiny.pt", "--data", data, cwd=tmp_path)
    assert done.code == 0, done.stderr
    found = numbers(tmp_path, "exercise2_sampling_comparison")
    assert [row["steps"] for row in found["ddim"]] == [50, 100, 250, 500, 1000]
    assert (tmp_path / "ddpm_fabric_morph.gif").stat().st_size <= 6_000_000
