"""How fast sixteen fabrics are drawn: the library as the course used it, against exercise 1.

    python tests/benchmarks/bench_sampling.py                         everything, in full
    python tests/benchmarks/bench_sampling.py --stock-evaluations 5   stock from 5 of its 250 steps
    python tests/benchmarks/bench_sampling.py --engines               ONNX Runtime and OpenVINO, too
    python tests/benchmarks/bench_sampling.py --random                without the weight file

Stock is sample() of denoising-diffusion-pytorch in fp32 with 250 DDIM steps. Ours is timed in two
ways: drawing alone, after a warm-up, and the whole command in a process of its own, with its
imports and files. Stock takes minutes, in which a machine shared with others can become slower or
faster, so the command runs twice before it and three times after, drawing three times after; the
middle one counts, of its seconds until the progress bar shows, too. Where the weights know labels,
ours are drawn with them at w = 1, and the command runs twice more with its own guidance, which asks
the network twice a step. Writes a table, and this machine's entry in
training_results/reference/bench_sampling.json, the slowest machine first.

The unit is one evaluation of the network for one image. Nearly all of it are convolutions, so the
limit is the rate at which this machine convolves: that of the network's own convolutions, each with
the input that it gets, in a loop of nothing else. --engines asks one evaluation of eight images of
the engines, too (requirements-extras.txt, and pip install openvino), all in fp32.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from denoising_diffusion_pytorch import GaussianDiffusion  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import exercise1_generate as exercise1  # noqa: E402
from ddpm_basics import hardware  # noqa: E402
from ddpm_basics.console import new_parser  # noqa: E402
from ddpm_basics.export import write_onnx  # noqa: E402
from ddpm_basics.files import read_json, write_json  # noqa: E402
from ddpm_basics.model import build_diffusion  # noqa: E402
from ddpm_basics.options import DEVICES, PRECISIONS, default_weights  # noqa: E402
from ddpm_basics.weight_files import export_weights, load_weights  # noqa: E402

STOCK_STEPS = 250
OUR_STEPS = exercise1.SAMPLING_STEPS["dpmpp"]
RUNS_BEFORE, RUNS_AFTER, RUNS_GUIDED = 2, 3, 2  # of ours; of stock there is one
BATCH = exercise1.BATCH_SIZE["cpu"]  # images at once, where single evaluations are timed


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=default_weights(), help="weight file")
    add("--random", action="store_true", help="random weights, which are as fast")
    add("--images", type=int, default=16, help="how many to draw")
    add("--stock-evaluations", type=int, default=STOCK_STEPS,
        help="time so many of stock's DDIM steps and scale up to 250")  # fmt: skip
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=PRECISIONS, default="auto", help="of ours")
    add("--engines", action="store_true", help="time what other engines take, too")
    add("--output", type=Path, help="file to write",
        default=ROOT / "training_results" / "reference" / "bench_sampling.json")  # fmt: skip
    return parser.parse_args(argv)


def make_random(path):
    """Save a network like the shipped one, untrained; return its path."""
    diffusion = build_diffusion(labels=["a", "b"])
    export_weights(diffusion, path, 0, {"objective": "pred_v", "schedule": "sigmoid"})
    return path


def timed(work, device):
    """Run work() once; return the seconds until the device has finished, too."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    started = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - started


def operations_per_image(diffusion):
    """Count the multiplications and additions of the network for one image."""
    x_t = torch.zeros(1, diffusion.channels, *diffusion.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion.model(x_t, torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


@torch.inference_mode()
def convolution_rate(weights, device, precision):
    """Measure the network's convolutions alone: operations per second, the best of five rounds."""
    diffusion, _ = load_weights(weights)
    hardware.prepare_to_sample(diffusion, device, precision)
    calls = []
    convolutions = [one for one in diffusion.model.modules() if isinstance(one, torch.nn.Conv2d)]
    hooks = [one.register_forward_pre_hook(lambda *call: calls.append(call))
             for one in convolutions]  # fmt: skip
    x_t = torch.randn(BATCH, diffusion.channels, *diffusion.image_size, device=device)
    x_t = x_t.contiguous(memory_format=torch.channels_last)
    with hardware.autocast(device, precision):
        diffusion.model(x_t, torch.zeros(BATCH, dtype=torch.long, device=device))
    for hook in hooks:
        hook.remove()

    inputs = [(one, x.to(one.weight.dtype)) for one, (x,) in calls]

    def convolve():
        for one, x in inputs:
            one(x)

    with FlopCounterMode(display=False) as counter:
        convolve()
    return counter.get_total_flops() / min(timed(convolve, device) for _ in range(5))


def start_engines(diffusion, x_t, t, folder):
    """Export a network; return {engine: a call that evaluates it in fp32}."""
    import onnxruntime
    import openvino

    path, inputs = Path(folder, "network.onnx"), {"x_t": x_t.numpy(), "t": t.numpy()}
    write_onnx(diffusion, path, {})
    if diffusion.label_names:
        inputs["label"] = torch.full_like(t, -1).numpy()
    threads, options = torch.get_num_threads(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    return {"ONNX Runtime": lambda: torch.from_numpy(session.run(None, inputs)[0]),
            "OpenVINO": lambda: torch.from_numpy(compiled(inputs)[0])}  # fmt: skip


@torch.no_grad()
def time_engines(weights):
    """Seconds of one evaluation of an image in fp32, the best of five; all must agree to 1e-4."""
    diffusion, _ = load_weights(weights)
    network, t = diffusion.model.eval(), torch.full((BATCH,), 500)
    x_t = torch.randn(BATCH, diffusion.channels, *diffusion.image_size)
    expected, rows, cpu = network(x_t, t), [], torch.device("cpu")

    def add(name, call):
        assert torch.allclose(call(), expected, atol=1e-4), f"{name} computes something else"
        seconds = min(timed(call, cpu) for _ in range(5)) / BATCH
        first = rows[0]["seconds_per_evaluation"] if rows else seconds
        rows.append({"engine": name, "seconds_per_evaluation": seconds,
                     "times_stock": first / seconds})  # fmt: skip

    add("stock", lambda: network(x_t, t))
    with tempfile.TemporaryDirectory() as folder:
        for name, call in start_engines(diffusion, x_t, t, folder).items():
            add(name, call)
    # Not before the others: it tells the C library to keep freed memory, which helps stock, too.
    hardware.prepare_to_sample(diffusion, cpu, "fp32")
    add("ours", lambda: network(x_t, t))
    return rows


def time_stock(weights, device, options):
    """Seconds of the library's own sample(), fp32, from fewer steps scaled up if asked for."""
    diffusion, facts = load_weights(weights)
    stock = GaussianDiffusion(
        diffusion.model, image_size=diffusion.image_size, timesteps=facts.timesteps,
        objective=facts.objective, beta_schedule=facts.schedule,
        sampling_timesteps=options.stock_evaluations,
    ).to(device)  # fmt: skip
    if device.type == "cuda":
        stock.sample(batch_size=options.images)  # warm-up
    seconds = timed(lambda: stock.sample(batch_size=options.images), device)
    return seconds * STOCK_STEPS / options.stock_evaluations


def time_drawing(weights, device, precision, count):
    """Seconds of exercise 1's drawing, imports, loading and files left out."""
    diffusion, facts = load_weights(weights)
    hardware.prepare_to_sample(diffusion, device, precision)

    def draw(steps):
        ours = Namespace(seed=0, sampler="dpmpp", steps=steps, labels=facts.labels, guidance=1.0,
                         batch_size=None, samples_dir=None)  # fmt: skip
        exercise1.draw_all(diffusion, list(range(count)), ours, precision, True)

    draw(2)  # warm-up
    return timed(lambda: draw(OUR_STEPS), device)


def time_command(weights, options, *more):
    """Seconds of the whole command in a process of its own: until its end, and its first bar."""
    command = [sys.executable, str(ROOT / "exercise1_generate.py"), "--weights", str(weights),
               "--num-samples", str(options.images), "--device", options.device,
               *more, "--precision", options.precision]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
        printed = b""
        while b"%|" not in printed:  # of the progress bar
            printed += (letter := process.stderr.read(1))
            assert letter, printed.decode()
        first_bar = time.perf_counter() - started
        process.communicate()
        assert process.returncode == 0, printed.decode()
        return time.perf_counter() - started, first_bar


def measure(options, weights):
    """Time everything; return the record that goes into the file."""
    device = hardware.pick_device(options.device)
    diffusion, facts = load_weights(weights)
    precision = hardware.pick_precision(options.precision, device, diffusion)
    operations = operations_per_image(diffusion)
    record = {
        "hardware": hardware.describe(device), "load": os.getloadavg()[0],
        "torch": str(torch.__version__), "images": options.images, "image_size": facts.image_size,
        "parameters": facts.parameters, "gflop_per_evaluation": operations / 1e9,
        "stock_evaluations_timed": options.stock_evaluations, "rows": [],
    }  # fmt: skip
    as_trained = ["--guidance", "1"] if facts.labels else []  # one evaluation a step, as in stock
    both = [time_command(weights, options, *as_trained) for _ in range(RUNS_BEFORE)]
    stock_seconds = time_stock(weights, device, options)
    both += [time_command(weights, options, *as_trained) for _ in range(RUNS_AFTER)]
    command, first_bar = zip(*both, strict=True)
    record["seconds_to_first_bar"] = statistics.median(first_bar)
    guided = [time_command(weights, options)[0] for _ in range(RUNS_GUIDED if facts.labels else 0)]
    # Not before stock: drawing tells the C library to keep freed memory, which helps stock, too.
    drawing = [time_drawing(weights, device, precision, options.images) for _ in range(RUNS_AFTER)]
    rates = {name: convolution_rate(weights, device, name) for name in {"fp32", precision}}
    record["convolution_gflops"] = {name: rate / 1e9 for name, rate in rates.items()}
    for name, per_image, used, runs in (
        ("stock: sample(), DDIM", STOCK_STEPS, "fp32", [stock_seconds]),
        ("ours: drawing", OUR_STEPS, precision, drawing),
        ("ours: whole command", OUR_STEPS, precision, command),
        ("ours: whole command, guided", 2 * OUR_STEPS, precision, guided),
    ):
        if not runs:
            continue
        evaluations, seconds = per_image * options.images, statistics.median(runs)
        record["rows"].append({
            "what": name, "precision": used, "seconds": seconds, "runs": [*runs],
            "evaluations": evaluations,
            "seconds_per_evaluation": seconds / evaluations,
            "times_faster": stock_seconds / seconds,
            "share_of_convolution_rate": operations * evaluations / seconds / rates[used],
        })  # fmt: skip
    if options.engines:
        record["engines"] = time_engines(weights)
    return record


def keep(path, record, speed):
    """Put a record into a file instead of this machine's earlier one, the slowest machine first."""
    machines = (read_json(path) or {}).get("machines", [])
    machines = [one for one in machines if one["hardware"] != record["hardware"]] + [record]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machines": sorted(machines, key=speed)})


def speed(record):
    """Evaluations a second of the whole command."""
    return 1 / next(row["seconds_per_evaluation"] for row in record["rows"]
                    if row["what"] == "ours: whole command")  # fmt: skip


def show(record):
    """Print the table."""
    print(f"\n{record['images']} images of {record['image_size']} pixels, "
          f"{record['gflop_per_evaluation']:.2f} GFLOP each evaluation, on {record['hardware']}, "
          f"load {record['load']:.1f}")  # fmt: skip
    if record["stock_evaluations_timed"] < STOCK_STEPS:
        print(f"Stock was timed over {record['stock_evaluations_timed']} steps and scaled to 250.")
    print(f"{'':24}{'precision':>10}{'seconds':>10}{'evaluations':>13}{'s each':>10}"
          f"{'faster':>9}{'of conv':>11}")  # fmt: skip
    for row in record["rows"]:
        print(f"{row['what']:24}{row['precision']:>10}{row['seconds']:>10.2f}"
              f"{row['evaluations']:>13}{row['seconds_per_evaluation']:>10.5f}"
              f"{row['times_faster']:>8.1f}x{row['share_of_convolution_rate']:>10.0%}")  # fmt: skip
    for row in record.get("engines", []):
        print(f"{row['engine']:24}{row['seconds_per_evaluation']:.5f} s an evaluation in fp32, "
              f"{row['times_stock']:.2f} times stock")  # fmt: skip


def main(argv=None):
    """Measure, print the table, write the file."""
    options = parse_options(argv)
    with tempfile.TemporaryDirectory() as folder:
        random = make_random(Path(folder) / "random.pt") if options.random else None
        record = measure(options, random or options.weights.resolve())
    show(record)
    keep(options.output, record, speed)
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
