"""The three samplers against the library, against closed-form answers, and against themselves."""

import itertools
import json
import math
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, load_script
from scipy.integrate import solve_ivp

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import bench_sampling
import measure_samplers
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

from ddpm_basics.console import UserError
from ddpm_basics.files import file_digest
from ddpm_basics.model import build_diffusion
from ddpm_basics.sampling import (
    SAMPLERS,
    asinh_times,
    asked_timesteps,
    choose_times,
    even_times,
    noise_levels,
    predict_x_0,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp,
    starting_noise,
)

exercise1 = load_script("exercise1_generate")
REFERENCE = ROOT / "training_results" / "reference"
SHAPE = (3, 16, 16)
ALL_SAMPLERS = sorted(SAMPLERS)


@pytest.fixture(scope="module")
def trained():
    """A tiny network that has learned something, so that its x_0 is not clipped everywhere."""
    torch.manual_seed(0)
    diffusion = build_diffusion(dim=8, dim_mults=(1, 2), image_size=16)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    ramp = torch.linspace(0, 1, 16)
    for _ in range(60):
        colors, slopes = torch.rand(8, 3, 1, 1), torch.rand(8, 1, 1, 1)
        loss = diffusion((colors + slopes * ramp) / 2 * torch.ones(16, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.6, "the stand-in has learned nothing"
    return diffusion.eval()


@pytest.fixture(scope="module")
def x_T():
    return starting_noise(range(2), SHAPE)[0]


def library_sample(monkeypatch, diffusion, x_T, steps, eta=0.0):
    """The library's own sample(), made to start from x_T and to take our images' noise."""
    generators = starting_noise(range(len(x_T)), SHAPE)[1]
    monkeypatch.setattr(diffusion, "sampling_timesteps", steps)
    monkeypatch.setattr(diffusion, "is_ddim_sampling", steps < diffusion.num_timesteps)
    monkeypatch.setattr(diffusion, "ddim_sampling_eta", eta)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: x_T.clone())
        patch.setattr(torch, "randn_like", lambda _: fresh(generators))
        return diffusion.sample(batch_size=len(x_T))


REAL_RANDN = torch.randn


def fresh(generators):
    return torch.stack([REAL_RANDN(SHAPE, generator=generator) for generator in generators])


@pytest.mark.parametrize("steps", [50, 250])
def test_ddim_equals_the_library(monkeypatch, trained, x_T, steps):
    expected = library_sample(monkeypatch, trained, x_T, steps)
    images = sample_ddim(trained, x_T, steps)
    assert (images - expected).abs().max() < 1e-4
    assert images.std() > 0.05, "a constant image would agree as well"


def test_ddpm_equals_the_library(monkeypatch, trained, x_T):
    expected = library_sample(monkeypatch, trained, x_T, 1000)
    x_T, generators = starting_noise(range(2), SHAPE)
    images = sample_ddpm(trained, x_T, 1000, generators=generators)
    assert (images - expected).abs().max() < 1e-4


def test_eta_one_equals_the_library_and_ancestral_sampling(monkeypatch, trained, x_T):
    expected = library_sample(monkeypatch, trained, x_T, 50, eta=1.0)
    for sample, extra in ((sample_ddim, {"eta": 1.0}), (sample_ddpm, {})):
        x_T, generators = starting_noise(range(2), SHAPE)
        images = sample(trained, x_T, 50, generators=generators, **extra)
        assert (images - expected).abs().max() < 1e-4


def test_ddim_takes_all_the_steps_without_any_noise(trained, x_T):
    first = sample_ddim(trained, x_T, 1000)
    again = sample_ddim(trained, x_T, 1000)
    near = sample_ddim(trained, x_T, 500)
    assert torch.equal(first, again)
    assert (first - near).abs().mean() < 0.01, "more steps lead to another image"


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
def test_x_0_equals_the_library_for_every_objective(trained, x_T, objective):
    diffusion = build_diffusion(8, (1, 2), 3, 16, objective=objective).eval()
    diffusion.model.load_state_dict(trained.model.state_dict())
    for t in (0, 400, 999):
        times = torch.full((len(x_T),), t)
        with torch.inference_mode():
            expected = diffusion.model_predictions(x_T, times, clip_x_start=True).pred_x_start
            x_0 = predict_x_0(diffusion, x_T, t)
        # At t = 999 both divide by alpha_t = 0.0005, and their rounding grows with it.
        assert (x_0 - expected).abs().max() < (1e-3 if t == 999 else 1e-4)


# ---- Convergence, where the answer is known ------------------------------------------------------

MEANS = torch.tensor([[-0.5, 0.3], [0.5, 0.4], [0.1, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.15


class ExactMixture:
    """The perfect network for images of two pixels that follow a mixture of three Gaussians."""

    objective = "pred_noise"

    def __init__(self, timesteps):
        betas = library.linear_beta_schedule(timesteps)
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.num_timesteps = timesteps
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()

    def x_0(self, x_t, alpha, sigma):
        """E[x_0 | x_t] for points x_t [n, 2]: each Gaussian's own, weighted by its likelihood."""
        variance = (alpha * SPREAD) ** 2 + sigma**2
        distance = ((x_t[:, None] - alpha * MEANS) ** 2).sum(-1)
        share = (WEIGHTS.log() - distance / (2 * variance)).softmax(-1)
        means = (MEANS * sigma**2 + alpha * SPREAD**2 * x_t[:, None]) / variance
        return (share[..., None] * means).sum(1)

    def model(self, x_t, times):
        """The noise in images [n, 2, 1, 1] at times [n], in float64."""
        assert x_t.dtype == torch.float64, "the sampler has dropped precision"
        alpha = self.sqrt_alphas_cumprod[times[0]]
        sigma = self.sqrt_one_minus_alphas_cumprod[times[0]]
        flat = x_t.flatten(1)
        return ((flat - alpha * self.x_0(flat, alpha, sigma)) / sigma).reshape(x_t.shape)

    def exact(self, x_T):
        """Follow the probability-flow ODE, d(x/sigma)/d(lambda) = e^lambda x_0, to t = 0."""

        def level(log_snr):
            return 1 / math.sqrt(1 + math.exp(-2 * log_snr)), 1 / math.sqrt(
                1 + math.exp(2 * log_snr)
            )

        def slope(log_snr, ratio):
            alpha, sigma = level(log_snr)
            points = torch.tensor(ratio).reshape(-1, 2) * sigma
            return (alpha / sigma * self.x_0(points, alpha, sigma)).flatten().numpy()

        log_snr = (self.sqrt_alphas_cumprod / self.sqrt_one_minus_alphas_cumprod).log()
        start = (x_T.flatten(1) / self.sqrt_one_minus_alphas_cumprod[-1]).flatten().numpy()
        path = solve_ivp(
            slope, (log_snr[-1], log_snr[0]), start, method="DOP853", rtol=1e-10, atol=1e-11
        )
        alpha, sigma = level(log_snr[0])
        return self.x_0(torch.tensor(path.y[:, -1]).reshape(-1, 2) * sigma, alpha, sigma)


@pytest.fixture(scope="module")
def mixture():
    """The exact network (10,000 timesteps: the grid is finer than any error), noise and answer."""
    network = ExactMixture(10_000)
    x_T = starting_noise(range(64), (2, 1, 1))[0].double()
    return network, x_T, network.exact(x_T)


def order_of(sample, mixture, step_counts):
    """Fit error = c * steps^-order; return (order, the errors)."""
    network, x_T, exact = mixture
    errors = []
    for steps in step_counts:
        x_0 = sample(network, x_T, steps).flatten(1) * 2 - 1
        assert x_0.dtype == torch.float64
        errors.append((x_0 - exact).square().mean().sqrt().item())
    logs = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(step_counts, errors)])  # noqa: B905
    centred = logs - logs.mean(0)
    return -(centred[:, 0] @ centred[:, 1] / centred[:, 0].square().sum()).item(), errors


def test_the_exact_answer_is_on_the_mixture(mixture):
    _, _, exact = mixture
    nearest = torch.cdist(exact, MEANS).min(1).values
    assert nearest.mean() < 2 * SPREAD
    assert len(torch.cdist(exact, MEANS).argmin(1).unique()) == len(MEANS)


def test_ddim_converges_with_order_one(mixture):
    order, errors = order_of(sample_ddim, mixture, (20, 40, 80, 160, 320))
    assert 0.8 < order < 1.25, errors
    assert errors[-1] < 0.01


def test_dpmpp_converges_with_order_two(mixture):
    order, errors = order_of(sample_dpmpp, mixture, (20, 40, 80, 160))
    assert 1.8 < order < 2.6, errors
    assert errors[-1] < 1e-3


def test_dpmpp_beats_ddim_with_far_fewer_steps(mixture):
    """As exercise 1 draws: with its number of steps, and without asking in nearly pure noise."""
    steps = exercise1.SAMPLING_STEPS["dpmpp"]
    spared = {"min_signal": exercise1.MIN_SIGNAL}
    fast, slow = (partial(s, **spared) for s in (sample_dpmpp, sample_ddim))
    _, (few, fewer) = order_of(fast, mixture, (steps, 2 * steps))
    _, (many, more) = order_of(slow, mixture, (5 * steps // 2, 10 * steps))
    assert few < many
    assert fewer < more


# ---- Where next to nothing is to be seen ---------------------------------------------------------


class BlindInNoise(ExactMixture):
    """Exact, but for a small error of the noise wherever alpha is below 0.03."""

    def model(self, x_t, times):
        noise = super().model(x_t, times)
        return noise + 0.3 * (self.sqrt_alphas_cumprod[times[0]] < 0.03)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 400), ("dpmpp", 40)])
def test_min_signal_keeps_errors_in_pure_noise_out(mixture, name, steps):
    exact_network, x_T, exact = mixture
    sample = SAMPLERS[name]

    def error(network, min_signal):
        x_0 = sample(network, x_T, steps, min_signal=min_signal).flatten(1) * 2 - 1
        return (x_0 - exact).square().mean().sqrt().item()

    spoilt, spared = error(BlindInNoise(10_000), 0), error(BlindInNoise(10_000), 0.03)
    assert spared == error(exact_network, 0.03), "it was asked all the same"
    assert spared < spoilt / 3
    assert spared < 0.005, "what min_signal itself costs an exact network"


@pytest.mark.parametrize("name", ALL_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 12, 1000])
def test_below_min_signal_the_network_is_not_asked(monkeypatch, trained, name, steps):
    x_T, generators = starting_noise([0], SHAPE)
    network, asked, guesses = trained.model.forward, [], {}

    def spy(x_t, times):
        asked.append(times[0].item())
        return network(x_t, times)

    monkeypatch.setattr(trained.model, "forward", spy)
    sample = SAMPLERS[name]
    sample(trained, x_T, steps, lambda t, _, x_0: guesses.update({t: x_0}), generators,
           min_signal=0.03)  # fmt: skip
    alpha, _ = noise_levels(trained)
    assert len(guesses) == steps
    assert asked == [t for t in guesses if alpha[t] >= 0.03]
    assert all((x_0 == 0).all() for t, x_0 in guesses.items() if alpha[t] < 0.03)
    if steps > 1:
        assert max(guesses) == 999
        assert max(asked) == 996
        assert len(asked) == min(steps - 1, 997)


def test_networks_that_divide_by_nothing_are_always_asked(trained):
    assert asked_timesteps(trained, 0) == 1000
    assert asked_timesteps(trained, 0.03) == 997
    for objective in ("pred_v", "pred_x0"):
        diffusion = build_diffusion(8, (1, 2), 3, 16, objective=objective)
        assert asked_timesteps(diffusion, 0.03) == 1000


# ---- What all samplers promise -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_callback_range_and_length(trained, name):
    x_T, generators = starting_noise(range(2), SHAPE)
    seen = []

    def note(t, x_t, x_0):
        assert x_t.shape == x_0.shape == x_T.shape
        assert x_t.dtype == x_0.dtype == torch.float32
        assert x_0.abs().max() <= 1
        seen.append(t)

    images = SAMPLERS[name](trained, x_T, 12, note, generators)
    assert len(seen) == 12
    assert seen[0] == 999
    assert all(later < earlier for earlier, later in itertools.pairwise(seen))
    assert images.shape == x_T.shape
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_an_image_does_not_depend_on_its_company(trained, name):
    sample = SAMPLERS[name]

    def draw(seeds):
        x_T, generators = starting_noise(seeds, SHAPE)
        return sample(trained, x_T, 20, generators=generators)

    together = draw(range(16))
    alone = torch.cat([draw([seed]) for seed in (3, 0, 15)])
    assert (together[[3, 0, 15]] - alone).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().mean() > 0.01, "all images are the same"


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_bf16_is_for_the_network_alone(monkeypatch, trained, name):
    network, inside, outside = trained.model.forward, set(), set()

    def spy(x_t, times):
        output = network(x_t, times)
        inside.add(output.dtype)
        return output

    def draw(precision):
        x_T, generators = starting_noise(range(2), SHAPE)
        return SAMPLERS[name](
            trained,
            x_T,
            20,
            lambda t, x_t, x_0: outside.update({x_t.dtype, x_0.dtype}),
            generators,
            precision=precision,
        )

    expected = draw(torch.float32)
    monkeypatch.setattr(trained.model, "forward", spy)
    images = draw(torch.bfloat16)
    assert inside == {torch.bfloat16}
    assert outside == {torch.float32}
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_one_step_and_too_many_steps(trained, name):
    x_T, generators = starting_noise([0], SHAPE)
    sample = SAMPLERS[name]
    assert sample(trained, x_T, 1, generators=generators).shape == (1, *SHAPE)
    with pytest.raises(UserError, match="1001 steps"):
        sample(trained, x_T, 1001, generators=generators)


def test_dpmpp_takes_its_times_evenly_in_the_asinh_of_lambda(mixture):
    """Up to the interval that crosses what cannot be seen; and one more would reach t = 0."""
    alpha, sigma = levels = noise_levels(mixture[0])
    *times, end = asinh_times(levels, 20)
    assert (times[0], end) == (9_999, -1)
    reached = [*times[2:], 0]
    places = [math.asinh((math.log(alpha[t] / sigma[t]) + 1.7) / 1.8) for t in reached]
    gaps = torch.tensor(places).diff()
    assert gaps.mean() > 0.1
    assert gaps.max() - gaps.min() < 0.1 * gaps.mean(), "what moving to the nearest t brings"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_every_number_of_steps_has_its_times(schedule, timesteps):
    diffusion = build_diffusion(8, (1, 2), 3, 16, timesteps, beta_schedule=schedule)
    levels = noise_levels(diffusion)
    for steps in {1, 2, 3, 4, 5, 9, 20, 50, 333, 900, 999, timesteps}:
        if steps > timesteps:
            continue
        for times in (
            even_times(levels, steps),
            asinh_times(levels, steps),
            choose_times(levels, steps, timesteps - 3, even_times),
            choose_times(levels, steps, timesteps - 3, asinh_times),
        ):
            assert len(times) == steps + 1
            assert times[0] == timesteps - 1 or steps == 1
            assert times[-1] == -1
            assert all(later < earlier for earlier, later in itertools.pairwise(times))


def test_starting_noise_depends_on_the_seed_alone():
    together, _ = starting_noise(range(10, 15), SHAPE)
    alone, _ = starting_noise([12], SHAPE)
    assert torch.equal(together[2], alone[0])
    assert abs(together.mean()) < 0.05
    assert 0.95 < together.std() < 1.05
    _, (generator,) = starting_noise([12], SHAPE)
    assert not torch.equal(torch.randn(SHAPE, generator=generator), alone[0])


# ---- The measurement behind the default number of steps ------------------------------------------


@pytest.fixture
def small_file(trained, tmp_path):
    """The tiny network as a bundled weight file."""
    state = {f"ema_model.{key}": value for key, value in trained.state_dict().items()}
    config = {
        "network": {"dim": 8, "dim_mults": [1, 2], "channels": 3},
        "process": {"image_size": 16, "timesteps": 1000, "objective": "pred_noise",
                    "beta_schedule": "sigmoid"},
    }  # fmt: skip
    file = {"step": 60, "version": "2.3.4", "ema": state, "config": config}
    torch.save(file, tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.fixture
def measure(monkeypatch, small_file, tmp_path):
    """measure(images): tests/benchmarks/measure_samplers.py with fewer runs; returns its record."""
    monkeypatch.setattr(measure_samplers, "REFERENCE", ("ddim", 300))
    monkeypatch.setattr(measure_samplers, "RUNS", [("ddim", 250), ("dpmpp", 4), ("dpmpp", 100)])

    def run(images, *more):
        output = tmp_path / "samplers.json"
        measure_samplers.main(["--weights", str(small_file), "--images", str(images),
                               "--device", "cpu", "--precision", "fp32", "--seed", "0",
                               "--output", str(output), *more])  # fmt: skip
        return json.loads(output.read_text())

    return run


def test_measured_distances(measure, trained):
    """Each figure again, from the samplers themselves; a second run adds what is missing."""
    first, record = measure(1), measure(3)
    assert first["rows"][0]["standard_error"] is None, "one image has no spread"
    assert list(record["distances"]) == ["0", "1", "2"]
    assert record["distances"]["0"] == first["distances"]["0"]
    x_T = starting_noise(range(3), SHAPE)[0]
    reference = sample_ddim(trained, x_T, 300, min_signal=exercise1.MIN_SIGNAL)
    for row, run in zip(record["rows"], measure_samplers.RUNS, strict=True):
        images = SAMPLERS[run[0]](trained, x_T, run[1], min_signal=exercise1.MIN_SIGNAL)
        expected = (images - reference).square().mean((1, 2, 3)).sqrt()
        assert row["distance"] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert row["standard_error"] == pytest.approx(expected.std().item() / 3**0.5, abs=1e-4)
    assert record["rows"][0]["as_near_as_ddim_250"] == 1
    near = [row["steps"] for row in record["rows"][1:]
            if row["distance"] <= record["rows"][0]["distance"]]  # fmt: skip
    assert record["enough_steps"] == min(near, default=None)


def test_kept_results_of_ddim_are_used_again(measure, tmp_path):
    first = measure(2, "--keep", str(tmp_path / "kept"))
    assert first["rows"][0]["distance"] > 0
    kept = {path.name.split("_")[3]: path for path in (tmp_path / "kept").iterdir()}
    assert kept.keys() == {"ddim300", "ddim250"}
    kept["ddim250"].write_bytes(kept["ddim300"].read_bytes())
    (tmp_path / "samplers.json").unlink()
    again = measure(2, "--keep", str(tmp_path / "kept"))
    assert again["rows"][0]["distance"] == 0
    assert again["rows"][1] == first["rows"][1]


def test_the_default_number_of_steps_is_enough():
    """Exercise 1 takes as many as the measurement on the shipped weights supports."""
    record = json.loads((REFERENCE / "samplers.json").read_text())
    shipped = file_digest(ROOT / exercise1.WEIGHTS)
    assert record["weights"] == shipped, "other weights: run tests/benchmarks/measure_samplers.py"
    distance = {(row["sampler"], row["steps"]): row["distance"] for row in record["rows"]}
    ours = distance["DPM-Solver++", exercise1.SAMPLING_STEPS["dpmpp"]]
    assert ours <= distance["DDIM", 250]
    assert record["images"] >= 64
    assert record["min_signal"] == exercise1.MIN_SIGNAL


def test_the_benchmark_counts_the_middle_run(monkeypatch, small_file, tmp_path, capsys):
    """bench_sampling.py with two of stock's steps, and a command that takes 5, 2 and 9 seconds."""
    monkeypatch.setattr(bench_sampling, "RUNS_BEFORE", 1)
    monkeypatch.setattr(bench_sampling, "RUNS_AFTER", 2)
    one_run = bench_sampling.time_command
    real, told = [], iter([5.0, 2.0, 9.0])

    def time_command(*arguments):
        if not real:  # the command itself; once is enough
            real.append(one_run(*arguments))
        return next(told)

    monkeypatch.setattr(bench_sampling, "time_command", time_command)
    output = tmp_path / "bench" / "bench_sampling.json"
    bench_sampling.main(["--weights", str(small_file), "--images", "2", "--device", "cpu",
                         "--precision", "fp32", "--stock-evaluations", "2",
                         "--output", str(output)])  # fmt: skip
    record = json.loads(output.read_text())
    stock, drawing, command = record["rows"]
    assert (len(stock["runs"]), len(drawing["runs"]), len(command["runs"])) == (1, 2, 3)
    assert command["seconds"] == 5
    assert command["times_faster"] == pytest.approx(stock["seconds"] / 5)
    assert real[0] > sum(drawing["runs"]) / 2, "the command draws, and starts and writes besides"
    steps = exercise1.SAMPLING_STEPS["dpmpp"]
    assert stock["evaluations"] == 2 * 250
    assert drawing["evaluations"] == command["evaluations"] == 2 * (steps - 1), "pure noise is free"
    assert "Stock was timed over 2 steps and scaled to 250." in capsys.readouterr().out
