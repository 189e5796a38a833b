"""sampling.py in exercise 1's loop: against the library, against the exact answer, and itself."""

import copy
import itertools
import json
import math
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, load_script
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from scipy.integrate import quad, solve_ivp
from tqdm.auto import tqdm

from ddpm_basics import sampling
from ddpm_basics.console import UserError
from ddpm_basics.files import file_digest
from ddpm_basics.hardware import autocast, prepare_to_sample
from ddpm_basics.model import LabelledUnet, build_diffusion, label_vectors
from ddpm_basics.options import WEIGHTS
from ddpm_basics.sampling import (
    CLEANEST,
    NOISIEST,
    dpmpp_step,
    even_times,
    guided_output,
    log_snr_times,
    noise_levels,
    predict_x_0,
    starting_noise,
)
from ddpm_basics.weight_files import load_weights

exercise1 = load_script("exercise1_generate")
SHAPE = (3, 16, 16)
SAMPLERS = ("ddim", "ddpm", "dpmpp")


def draw(diffusion, sampler, steps, seeds=range(2), labels=None, guidance=1.0):
    """Draw images with the loop of exercise 1."""
    options = Namespace(sampler=sampler, steps=steps, guidance=guidance)
    return exercise1.draw(diffusion, list(seeds), labels, options, tqdm(disable=True))


@pytest.fixture(scope="module")
def trained(tiny_weights):
    """A tiny network that has learned something, so that its x_0 is not clipped everywhere."""
    return load_weights(tiny_weights)[0]


@pytest.fixture
def one_colour(monkeypatch):
    """one_colour(diffusion): the perfect network, in its place, for pixels near a grey of 0.65."""

    def replace(diffusion):
        def forward(x_t, times, x_self_cond=None):
            levels = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
            alpha, sigma = (level[times].reshape(-1, 1, 1, 1) for level in levels)
            noise = sigma * (x_t - alpha * 0.3) / ((alpha * 0.25) ** 2 + sigma**2)
            return (noise - sigma * x_t) / alpha  # v of that noise

        monkeypatch.setattr(diffusion.model, "forward", forward)
        return diffusion

    return replace


@pytest.fixture
def quick(one_colour, trained):
    """The same process around that network: quick at 1000 steps."""
    return one_colour(trained)


@pytest.fixture
def visited(monkeypatch):
    """Fills with (t, x_t, x_0) at every step of the loop."""
    seen = []

    def note(diffusion, levels, x_t, t, labels, guidance):
        x_0 = predict_x_0(diffusion, levels, x_t, t, labels, guidance)
        seen.append((t, x_t, x_0))
        return x_0

    monkeypatch.setattr(exercise1, "predict_x_0", note)
    return seen


# ---- Against the library -------------------------------------------------------------------------


def library_sample(monkeypatch, diffusion, steps, eta=0.0):
    """The library's own sample(), made to start from our x_T and to take our images' noise."""
    x_T, generators = starting_noise(range(2), SHAPE)
    real_randn = torch.randn
    monkeypatch.setattr(diffusion, "sampling_timesteps", steps)
    monkeypatch.setattr(diffusion, "is_ddim_sampling", steps < diffusion.num_timesteps)
    monkeypatch.setattr(diffusion, "ddim_sampling_eta", eta)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: x_T.clone())
        patch.setattr(torch, "randn_like", lambda _: torch.stack(
            [real_randn(SHAPE, generator=generator) for generator in generators]))  # fmt: skip
        return diffusion.sample(batch_size=len(x_T))


@pytest.mark.parametrize(
    ("network", "sampler", "steps", "eta"),
    [("trained", "ddim", 50, 0), ("quick", "ddim", 250, 0), ("trained", "ddpm", 50, 1),
     ("quick", "ddpm", 1000, 0)],
)  # fmt: skip
def test_samplers_equal_the_library(monkeypatch, request, network, sampler, steps, eta):
    """DDIM; ancestral sampling, which with fewer than all the steps is DDIM with eta = 1."""
    diffusion = request.getfixturevalue(network)
    expected = library_sample(monkeypatch, diffusion, steps, eta)
    images = draw(diffusion, sampler, steps)
    assert (images - expected).abs().max() < 1e-4
    assert images.std() > 0.05, "a constant image would agree as well"


def test_ddim_takes_all_the_steps_without_any_noise(quick):
    """The library, asked for all the steps, takes ancestral ones."""
    most, again, fewer = (draw(quick, "ddim", steps) for steps in (1000, 1000, 500))
    assert torch.equal(most, again)
    assert (most - fewer).abs().mean() < 0.002, "more steps lead to another image"
    assert most.std() > 0.05


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
def test_x_0_equals_the_library_for_every_objective(trained, objective):
    diffusion = build_diffusion(8, (1, 2), 3, 16, objective=objective).eval()
    diffusion.model.load_state_dict(trained.model.state_dict())
    x_T, _ = starting_noise(range(2), SHAPE)
    for t in (0, 400, 999):
        times = torch.full((len(x_T),), t)
        with torch.inference_mode():
            expected = diffusion.model_predictions(x_T, times, clip_x_start=True).pred_x_start
            x_0 = predict_x_0(diffusion, noise_levels(diffusion), x_T, t)
        # At t = 999 both divide by alpha_t = 0.0005, and their rounding grows with it.
        assert (x_0 - expected).abs().max() < (1e-3 if t == 999 else 1e-4)


# ---- Guidance ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(labelled_weights):
    """A network with three labels, x_t, their vectors, its levels."""
    diffusion, _ = load_weights(labelled_weights)
    x_t, _ = starting_noise(range(3), SHAPE)
    return diffusion, x_t, label_vectors(diffusion, diffusion.label_names, range(3))


@torch.inference_mode()
def test_guidance_zero_and_one_are_the_two_plain_networks(told):
    diffusion, x_t, labels = told
    t = torch.full((3,), 600)
    without = diffusion.model(x_t, t)
    with_label = LabelledUnet(diffusion)(x_t, t, torch.arange(3))
    assert (without - with_label).abs().mean() > 0.01
    for guidance, expected in {0: without, 1: with_label}.items():
        output = guided_output(diffusion, x_t, 600, labels, guidance)
        assert torch.allclose(output, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(guided_output(diffusion, x_t, 600, None, 1.0),
                       guided_output(diffusion, x_t, 600, labels, 0.0))  # fmt: skip
    for guidance in (0.3, 1.0001, 2, 5):
        output = guided_output(diffusion, x_t, 600, labels, guidance)
        expected = without + guidance * (with_label - without)
        assert torch.allclose(output, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_counts_in_every_sampler(told, sampler):
    """Also where it is below 1; and of the first label, whose place is 0."""
    diffusion, _, labels = told
    first = labels[:1].expand(2, -1)
    plain = draw(diffusion, sampler, 8)
    w = {w: draw(diffusion, sampler, 8, labels=first, guidance=w) for w in (0, 0.5, 1, 3)}
    assert torch.equal(w[0], plain)
    for one, other in ((0.5, 0), (0.5, 1), (1, 0), (3, 1)):
        assert (w[one] - w[other]).abs().mean() > 0.005, (one, other)


@torch.inference_mode()
@pytest.mark.parametrize("t", [30, 600])
def test_guidance_is_the_same_for_noise_and_v(told, t):
    """Both are sums of x_t and x_0, so it moves x_0 alike."""
    diffusion, x_t, labels = told
    levels = noise_levels(diffusion)
    guesses = [predict_x_0(diffusion, levels, x_t, t, labels, w) for w in (0, 1, 2)]
    small = (torch.stack(guesses).abs() < 0.9).all(0)  # none of the three was clipped
    assert small.float().mean() > 0.05
    moved = guesses[0] + 2 * (guesses[1] - guesses[0])
    assert (guesses[2] - moved)[small].abs().max() < 1e-4


# ---- Convergence, where the answer is known ------------------------------------------------------

MEANS = torch.tensor([[-0.5, 0.3], [0.5, 0.4], [0.1, -0.5]], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
SPREAD = 0.15


class ExactMixture:
    """The perfect network for images of two pixels that follow a mixture of three Gaussians."""

    objective, channels, image_size = "pred_v", 2, (1, 1)

    def __init__(self, timesteps=10_000):  # so many that the grid is finer than any error
        self.betas = library.linear_beta_schedule(timesteps)
        alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self.num_timesteps = timesteps
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()

    def x_0(self, x_t, alpha, sigma):
        """E[x_0 | x_t] for points x_t [n, 2]: each Gaussian's own, weighted by its likelihood."""
        variance = (alpha * SPREAD) ** 2 + sigma**2
        distance = ((x_t[:, None] - alpha * MEANS) ** 2).sum(-1)
        share = (SHARES.log() - distance / (2 * variance)).softmax(-1)
        means = (MEANS * sigma**2 + alpha * SPREAD**2 * x_t[:, None]) / variance
        return (share[..., None] * means).sum(1)

    def model(self, x_t, times):
        """v of images [n, 2, 1, 1] at times [n], in float64."""
        assert x_t.dtype == torch.float64, "the sampler has dropped precision"
        alpha = self.sqrt_alphas_cumprod[times[0]]
        sigma = self.sqrt_one_minus_alphas_cumprod[times[0]]
        flat = x_t.flatten(1)
        v = (alpha * flat - self.x_0(flat, alpha, sigma)) / sigma
        return v.reshape(x_t.shape)

    def exact(self, x_T):
        """Follow the probability-flow ODE, d(x/sigma)/d(lambda) = e^lambda x_0, to t = 0."""

        def level(log_snr):
            alpha, sigma = (1 / math.sqrt(1 + math.exp(sign * 2 * log_snr)) for sign in (-1, 1))
            return alpha, sigma

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


def double_noise(seeds, shape):
    x_T, generators = starting_noise(seeds, shape)
    return x_T.double(), generators


@pytest.fixture(scope="module")
def exact():
    """What 64 points of noise become, without any error of a sampler."""
    return ExactMixture().exact(double_noise(range(64), (2, 1, 1))[0])


@pytest.fixture
def error(monkeypatch, exact):
    """error(sampler, steps): the root mean square distance to the exact answer."""
    monkeypatch.setattr(exercise1, "starting_noise", double_noise)

    def measure(sampler, steps):
        images = draw(ExactMixture(), sampler, steps, range(64))
        assert images.dtype == torch.float64
        return (images.flatten(1) * 2 - 1 - exact).square().mean().sqrt().item()

    return measure


def test_the_exact_answer_is_on_the_mixture(exact):
    nearest = torch.cdist(exact, MEANS).min(1)
    assert nearest.values.mean() < 2 * SPREAD
    assert len(nearest.indices.unique()) == len(MEANS)


@pytest.mark.parametrize(
    ("sampler", "step_counts", "low", "high", "last"),
    [("ddim", (20, 40, 80, 160, 320), 0.8, 1.25, 0.01),
     ("dpmpp", (20, 40, 80, 160), 2.5, 3.4, 1e-4)],
)  # fmt: skip
def test_order_of_convergence(error, monkeypatch, sampler, step_counts, low, high, last):
    """Fits error = c * steps^-order: first order for DDIM, third for DPM-Solver++.

    For that it has to walk to the very end: a guess at CLEANEST errs however many the steps.
    """
    monkeypatch.setattr(sampling, "CLEANEST", 99)
    errors = [error(sampler, steps) for steps in step_counts]
    x, y = (torch.tensor(values).double().log() for values in (step_counts, errors))
    order = -((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum())
    assert low < order < high, errors
    assert errors[-1] < last


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_step_of_dpmpp_is_exact_where_its_parabola_is(known):
    """With no guess, one, two before it: where x_0 is constant, a line, a parabola over lambda."""
    levels = noise_levels(ExactMixture(1000))
    a, b, c = 0.3, -0.2 * (known > 0), 0.1 * (known > 1)

    def guess(log_snr):
        return torch.tensor(a + b * log_snr + c * log_snr**2, dtype=torch.float64)

    t, s, before = 500, 430, (560, 640)[:known]
    past = [(guess(levels.log_snr(one)), one) for one in before]
    start, end = levels.log_snr(t), levels.log_snr(s)
    x_t = torch.tensor(0.7, dtype=torch.float64)
    x_s = dpmpp_step(levels, x_t, guess(start), t, s, past)
    # d(x / sigma) / d(lambda) = e^lambda x_0
    change = quad(lambda log_snr: math.exp(log_snr) * guess(log_snr).item(), start, end)[0]
    assert x_s.item() == pytest.approx(levels.sigma[s] * (0.7 / levels.sigma[t] + change), rel=1e-6)


def test_dpmpp_beats_ddim_with_far_fewer_steps(error):
    steps = exercise1.SAMPLING_STEPS["dpmpp"]
    assert error("dpmpp", steps) < error("ddim", 5 * steps // 2)
    assert error("dpmpp", steps) < 0.01, "what the guess at CLEANEST costs"


# ---- What all samplers promise -------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 12])
def test_steps_shapes_and_ranges(trained, visited, sampler, steps):
    images = draw(trained, sampler, steps)
    times = [t for t, _, _ in visited]
    assert len(times) == steps
    assert times[0] == 999
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    for _, x_t, x_0 in visited:
        assert x_t.shape == x_0.shape == images.shape == (2, *SHAPE)
        assert x_0.abs().max() <= 1
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_is_no_black_picture(monkeypatch, trained, sampler, value):
    forward = trained.model.forward
    monkeypatch.setattr(
        trained.model, "forward", lambda x_t, t: forward(x_t, t) * (1 if t > 900 else value)
    )
    with pytest.raises(UserError, match=r"at t = 8.. is not finite"):
        draw(trained, sampler, 12)


def test_one_row_of_time_serves_all_images(monkeypatch, quick):
    """Products of one row and of several are rounded differently: in bf16 by a grey level."""
    network, rows = quick.model.forward, set()

    def spy(x_t, times):
        rows.add(tuple(times.shape))
        return network(x_t, times)

    monkeypatch.setattr(quick.model, "forward", spy)
    draw(quick, "ddim", 5, range(16))
    assert rows == {(1,)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bf16_is_for_the_network_alone(monkeypatch, trained, visited, sampler):
    expected = draw(trained, sampler, 20)
    visited.clear()
    cpu, diffusion, inside = torch.device("cpu"), copy.deepcopy(trained), set()
    prepare_to_sample(diffusion, cpu, "bf16")
    network = diffusion.model.forward

    def spy(x_t, times):
        output = network(x_t, times)
        inside.add(output.dtype)
        return output

    monkeypatch.setattr(diffusion.model, "forward", spy)
    with autocast(cpu, "bf16"):
        images = draw(diffusion, sampler, 20)
    assert inside == {torch.bfloat16}
    assert {x.dtype for _, x_t, x_0 in visited for x in (x_t, x_0)} == {torch.float32}
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.02


def test_starting_noise_depends_on_the_seed_alone():
    together, _ = starting_noise(range(10, 15), SHAPE)
    alone, (generator,) = starting_noise([12], SHAPE)
    assert torch.equal(together[2], alone[0])
    assert abs(together.mean()) < 0.05
    assert 0.95 < together.std() < 1.05
    assert not torch.equal(torch.randn(SHAPE, generator=generator), alone[0])


# ---- Lists of times ------------------------------------------------------------------------------


def test_dpmpp_takes_its_times_evenly_in_log_snr():
    """From where something can be seen in x_t, whatever comes before, to where little is left."""
    levels = noise_levels(ExactMixture())
    *times, end = log_snr_times(levels, 20)
    assert (times[0], end) == (9_999, -1)
    gaps = torch.tensor([levels.log_snr(t) for t in times[1:]]).diff()
    assert gaps.mean() == pytest.approx((CLEANEST - NOISIEST) / 19, rel=1e-2)
    early = gaps[:12]  # later, where neighbouring t lie far apart in lambda, the nearest t counts
    assert early.max() - early.min() < 0.01 * gaps.mean()
    assert gaps.max() < 1.2 * gaps.mean()
    assert levels.log_snr(times[-1]) == pytest.approx(CLEANEST, abs=0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_every_number_of_steps_has_its_times(schedule, timesteps):
    diffusion = build_diffusion(8, (1, 2), 3, 16, timesteps, beta_schedule=schedule)
    levels = noise_levels(diffusion)
    for steps in {1, 2, 3, 4, 5, 9, 20, 50, 333, 900, 999, timesteps}:
        if steps > timesteps:
            continue
        for times in (even_times(levels, steps), log_snr_times(levels, steps)):
            assert len(times) == steps + 1
            assert times[0] == timesteps - 1 or steps == 1
            assert times[-1] == -1
            assert all(later < earlier for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("timesteps", [100, 1000])
def test_dpmpp_ends_in_finite_pixels_whatever_the_steps(one_colour, schedule, timesteps):
    diffusion = one_colour(build_diffusion(8, (1,), 3, 8, timesteps, beta_schedule=schedule))
    for steps in (1, 2, 3, 20, timesteps // 2, timesteps):
        images = draw(diffusion, "dpmpp", steps)
        assert images.isfinite().all()
        assert images.mean() == pytest.approx(0.65, abs=0.05), steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedules_that_end_in_pure_noise(sampler):
    """No signal at all is left at the end (Lin 2023); so it is with 20 timesteps of `linear`."""
    diffusion = build_diffusion(8, (1, 2), 3, 16, 20, beta_schedule="linear")
    assert diffusion.alphas_cumprod[-1] == 0
    assert draw(diffusion, sampler, 10).isfinite().all()


def test_more_steps_than_timesteps_are_refused(trained):
    for spread in (even_times, log_snr_times):
        with pytest.raises(UserError, match=r"^1001 steps are too many: the model has 1000"):
            spread(noise_levels(trained), 1001)


@pytest.mark.parametrize(
    ("name", "images", "guidance"),
    [("samplers", 64, None), ("samplers_guided", 16, exercise1.GUIDANCE)],
)
def test_the_default_number_of_steps_is_enough(name, images, guidance):
    """Exercise 1 takes as many as the measurements on the shipped weights support."""
    record = json.loads((ROOT / f"training_results/reference/{name}.json").read_text())
    shipped = file_digest(ROOT / WEIGHTS)
    assert record["weights"] == shipped, "other weights: run tests/benchmarks/measure_samplers.py"
    distance = {(row["sampler"], row["steps"]): row["distance"] for row in record["rows"]}
    ours = distance["DPM-Solver++", exercise1.SAMPLING_STEPS["dpmpp"]]
    assert ours <= distance["DDIM", 250]
    assert (record["images"], record["guidance"]) == (images, guidance)
