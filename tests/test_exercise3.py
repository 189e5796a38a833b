"""exercise3_train.py: what its command line takes, and where a run would end before it begins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image

from ddpm_basics.data import DEFAULT
from ddpm_basics.model import build_diffusion

ex3 = load_script("exercise3_train")


@pytest.fixture
def parsed(monkeypatch):
    """parsed(*words) -> the options that the exercise would train with."""
    seen = []
    monkeypatch.setattr(ex3, "train", seen.append)

    def parse(*words):
        assert ex3.main(["--train", *words]) == 0
        return seen.pop()

    return parse


CONSTANTS = {
    "RANDOM_SEED": "seed", "IMAGE_SIZE": "image_size", "BATCH_SIZE": "batch_size",
    "GRADIENT_ACCUMULATE": "gradient_accumulate", "LEARNING_RATE": "lr", "TRAIN_STEPS": "steps",
    "SAVE_EVERY": "save_every", "LOG_EVERY": "log_every", "DIM": "dim", "DIM_MULTS": "dim_mults",
    "TIMESTEPS": "timesteps", "RESULTS_DIR": "results_dir", "WEIGHTS_OUT": "weights_out",
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_the_constants_are_the_defaults(parsed, monkeypatch, name):
    """Whoever changes one at the top of the script changes the run."""
    assert str(getattr(parsed(), CONSTANTS[name])) == str(getattr(ex3, name))
    changed = {"DIM_MULTS": (1, 2), "RESULTS_DIR": "there", "WEIGHTS_OUT": "there.pt"}.get(name, 8)
    monkeypatch.setattr(ex3, name, changed)
    assert str(getattr(parsed(), CONSTANTS[name])) == str(changed)


def test_network_and_process_are_the_courses(parsed):
    options = parsed()
    assert (options.data, options.batch_size, options.steps, options.lr) == (
        DEFAULT, 32, 100_000, 2e-4)  # fmt: skip
    assert (options.schedule, options.objective, options.lr_final) == (
        "sigmoid", "pred_v", None)  # fmt: skip
    diffusion = build_diffusion(options.dim, options.dim_mults, weights_on="meta")
    assert sum(p.numel() for p in diffusion.model.parameters()) == 35_711_491


def test_quick_gives_way_to_what_was_typed(parsed):
    quick, real = parsed("--quick"), parsed()
    assert quick.results_dir != real.results_dir
    assert quick.weights_out != real.weights_out
    assert {name: getattr(quick, name) for name in ex3.QUICK} == ex3.QUICK
    for name, words in {
        "steps": ["--steps", "100000"],  # also where it is what counts without --quick
        "image_size": ["--image-size", "64"],
        "dim_mults": ["--dim-mults", "1", "2", "4", "8"],
        "objective": ["--objective", "pred_noise"],
        "results_dir": ["--results-dir", "training_results"],
    }.items():
        for order in (["--quick", *words], [*words, "--quick"]):
            options = parsed(*order)
            kind = type(getattr(options, name))
            typed = [int(word) for word in words[1:]] if kind is list else kind(words[1])
            assert getattr(options, name) == typed
            others = ex3.QUICK.keys() - {name}
            assert all(getattr(options, other) == ex3.QUICK[other] for other in others)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "--verify --train"),
        ("--train --verify", "not allowed with"),
        ("--train --steps 0", "--steps"),
        ("--train --steps many", "--steps"),
        ("--train --batch-size -3", "--batch-size"),
        ("--train --lr nan", "--lr"),
        ("--train --lr -1", "--lr"),
        ("--train --keep 1", "--keep"),
        ("--train --schedule cubic", "--schedule"),
        ("--train --device tpu", "--device"),
        ("--train --compile maybe", "--compile"),
        ("--train --objective pred_noise --loss-weight min5", "--loss-weight min5 weights the"),
        ("--train --image-size 60", "--image-size must be a multiple of 8"),
        ("--train --quick --dim-mults 1 2 2 2 2 2 2", "--image-size must be a multiple of 64"),
        ("--train --crop 30", "--crop must be a multiple of 8"),
        ("--train --crop 128", "--crop 128 is larger than the images: --image-size 64"),
        ("--train --dim 6", "--dim must be a multiple of 4"),
        ("--train --step 7", "--step"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, named, capsys):
    with pytest.raises(SystemExit) as leaving:
        ex3.main(words.split())
    assert leaving.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_that_processes_cannot_share(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ex3, "Accelerator", lambda **_: SimpleNamespace(num_processes=3))
    assert ex3.main(["--train", "--device", "cpu"]) == 1
    assert "--batch-size 32 cannot be shared equally by 3 processes" in capsys.readouterr().err


def test_progress_samples_are_drawn_in_batches(tmp_path):
    """No more images at once than training has, and the same whatever their number."""
    diffusion = build_diffusion(8, (1, 2), image_size=8, timesteps=10, labels=("a", "b", "c"))
    torch.nn.init.normal_(diffusion.label_table)
    seen, sheets = set(), []
    diffusion.model.register_forward_pre_hook(lambda module, inputs: seen.add(len(inputs[0])))
    for share in (1, 5, 16):
        options = SimpleNamespace(seed=3, results_dir=tmp_path)
        ex3.draw_samples(SimpleNamespace(
            options=options, share=share, ema=SimpleNamespace(ema_model=diffusion), step=share,
            device=torch.device("cpu"), precision="fp32",
        ))  # fmt: skip
        with Image.open(tmp_path / f"sample-{share}.png") as picture:
            sheets.append(np.asarray(picture).astype(int)[40:])  # without the title
    assert seen == {1, 5, 16}
    assert all(abs(sheet - sheets[0]).max() <= 8 for sheet in sheets)  # rounding, walked ten steps
    assert sheets[0].std() > 10


def test_memory_error_names_the_settings_that_fit(serve, tiny_data, tmp_path):
    """The child process may take 600 MB more than it has; the batch needs far more."""
    words = "--steps 5 --image-size 8 --dim 8 --dim-mults 1 2 --device cpu --batch-size 65536"
    done = serve("exercise3_train").run(
        "--train", "--data", tiny_data, *words.split(), cwd=tmp_path, limit_memory=600_000_000
    )
    assert done.code == 1
    assert "--batch-size 32768 --gradient-accumulate 2" in done.sentence
