"""model.py: four kinds of weight file read, bad ones refused, the bundled kind written."""

import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import Trainer, Unet
from denoising_diffusion_pytorch.classifier_free_guidance import Unet as ClassUnet
from denoising_diffusion_pytorch.version import __version__ as library_version
from ema_pytorch import EMA
from PIL import Image
from tiny_networks import SIZE, bundled, make_diffusion

from ddpm_basics.console import UserError
from ddpm_basics.model import LabelledUnet, build_diffusion, label_vectors
from ddpm_basics.weight_files import export_weights, load_weights


def same_state(diffusion, expected, tolerance=1e-6):
    state = diffusion.state_dict()
    assert state.keys() == expected.keys()
    return all(torch.allclose(state[k], expected[k].float(), atol=tolerance) for k in expected)


def ema_of(path):
    """The averaged weights of a checkpoint, with torch alone."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return {k.removeprefix("ema_model."): v for k, v in checkpoint["ema"].items()
            if k.startswith("ema_model.")}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """save(state) -> the path of a weight file."""

    def write(state, name="weights.pt"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return write


# ---- Four kinds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer_checkpoint(tmp_path_factory):
    """Made by the library's own Trainer, in two steps on a hundred noise images."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        picture.save(folder / "data" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "denoising_diffusion_pytorch.denoising_diffusion_pytorch.cpu_count", lambda: 0
        )
        trainer = Trainer(
            make_diffusion("pred_v", "cosine"), folder / "data", train_batch_size=16,
            train_num_steps=2, save_and_sample_every=1000, calculate_fid=False,
            results_folder=str(folder / "results"),
        )  # fmt: skip
        trainer.train()
        trainer.save(1)
    return folder / "results" / "model-1.pt", trainer.ema.ema_model.state_dict()


def test_a_checkpoint_of_the_librarys_trainer(trainer_checkpoint):
    path, ema = trainer_checkpoint
    diffusion, facts = load_weights(path)
    assert same_state(diffusion, ema)
    raw = torch.load(path, weights_only=True)["model"]
    assert raw.keys() == ema.keys(), "the raw network would have fitted as well"
    assert not same_state(diffusion, raw)
    said = facts.describe(path)
    for fact in (str(path), "EMA weights of a training checkpoint, step 2,", library_version,
                 "predicts v (pred_v), cosine schedule, 1000 timesteps",
                 "64 pixels (assumed: image size)"):  # fmt: skip
        assert fact in said


def test_the_bundled_file(tiny_weights):
    diffusion, facts = load_weights(tiny_weights)
    assert same_state(diffusion, ema_of(tiny_weights))
    assert {p.dtype for p in diffusion.parameters()} == {torch.float32}
    assert not diffusion.training
    parameters = sum(p.numel() for p in make_diffusion().model.parameters())
    assert facts.describe(tiny_weights) == (
        f"{tiny_weights}: EMA weights, step 1,234, library 2.3.4; {parameters:,} parameters "
        "(width 8 x 1-2, 3 channels); predicts v (pred_v), sigmoid schedule, "
        "1000 timesteps, 16 pixels"
    )


@pytest.mark.parametrize("kind", ["trainer", "bundled"])
def test_the_librarys_own_classes_load_it_too(kind, tiny_weights, trainer_checkpoint):
    path = tiny_weights if kind == "bundled" else trainer_checkpoint[0]
    diffusion = make_diffusion()
    diffusion.load_state_dict(ema_of(path))
    assert same_state(load_weights(path, SIZE)[0], diffusion.state_dict())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["diffusion", "unet"])
def test_bare_state_dicts(save, part, prefix):
    """Also those that torch.compile or DistributedDataParallel have left their names in."""
    diffusion = make_diffusion()
    source = diffusion if part == "diffusion" else diffusion.model
    path = save({prefix + key: value for key, value in source.state_dict().items()})
    loaded, facts = load_weights(path)
    assert same_state(loaded, diffusion.state_dict())
    assert facts.step is None
    if part == "diffusion":
        assert facts.kind == "bare weights"
        assert facts.assumed == ("image_size",)
    else:
        assert facts.kind == "bare U-Net weights"
        assert facts.describe(path).endswith(
            "(assumed: objective, schedule, timesteps, image size)"
        )


@pytest.mark.parametrize("place", ["ema_model.", "ema_model.model.", "ema_model.model.downs.0."])
def test_a_compiled_network_inside_a_checkpoint(save, place):
    checkpoint = bundled(make_diffusion())
    checkpoint["ema"] = {key.replace(place, f"{place}_orig_mod."): value
                         for key, value in checkpoint["ema"].items()}  # fmt: skip
    assert same_state(load_weights(save(checkpoint))[0], make_diffusion().state_dict(), 1e-3)


def test_keys_that_are_no_names_do_no_harm(save):
    checkpoint = bundled(make_diffusion())
    checkpoint["ema"][7] = torch.zeros(1)
    assert same_state(load_weights(save(checkpoint))[0], make_diffusion().state_dict(), 1e-3)


# ---- What a file does not say in words -----------------------------------------------------------


@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("schedule", ["sigmoid", "cosine", "linear"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
def test_objective_and_schedule_are_read_from_the_buffers(save, objective, schedule, min_snr):
    """They compute; what the config says about them does not."""
    diffusion = make_diffusion(objective, schedule, min_snr_loss_weight=min_snr)
    claims = bundled(make_diffusion())["config"]
    bare = save(diffusion.state_dict(), "bare.pt")
    for path in (bare, save(bundled(diffusion, config=claims), "claims.pt")):
        loaded, facts = load_weights(path, SIZE)
        assert (facts.objective, facts.schedule) == (objective, schedule)
        assert loaded.objective == objective
        assert torch.equal(loaded.alphas_cumprod, diffusion.alphas_cumprod)


def test_what_a_file_does_not_say_may_be_typed_and_nothing_else(save, tiny_weights):
    unet = save(make_diffusion().model.state_dict())
    loaded, facts = load_weights(unet, SIZE, "pred_noise", "linear")
    assert (loaded.objective, loaded.image_size) == ("pred_noise", (SIZE, SIZE))
    assert torch.equal(loaded.betas, make_diffusion(beta_schedule="linear").betas)
    assert facts.assumed == ("timesteps",)
    assert load_weights(tiny_weights, SIZE, "pred_v", "sigmoid")[1].assumed == ()
    for typed, words in {
        (99, None, None): "image_size: 16 in the file, 99 here",
        (None, "pred_noise", None): "objective: pred_v in the file, pred_noise here",
        (None, None, "linear"): "schedule: sigmoid in the file, linear here",
    }.items():
        with pytest.raises(UserError, match=words):
            load_weights(tiny_weights, *typed)


def test_labels_of_a_macs_folders(labelled_weights, save):
    state = torch.load(labelled_weights, weights_only=True)
    state["labels"]["names"][0] = "cafe\u0301"
    assert load_weights(save(state), SIZE)[1].labels[0] == "caf\u00e9"


def test_noise_prediction_where_no_signal_is_left(save):
    """The library's own weight is then 0 / 0."""
    state = make_diffusion("pred_noise", "linear", timesteps=20).state_dict()
    assert not state["loss_weight"].isfinite().all()
    assert load_weights(save(state), SIZE)[1].objective == "pred_noise"


def test_both_sides_of_a_square_may_be_stated(save):
    path = save(bundled(make_diffusion(), config={"image_size": [SIZE, SIZE]}))
    assert load_weights(path)[1].image_size == SIZE


def test_weights_in_other_peoples_wrapping(save):
    """The library's EMA alone is as good as in its checkpoint; other entries are named."""
    diffusion = make_diffusion()
    assert load_weights(save(EMA(diffusion).state_dict()), SIZE)[1].kind == "EMA weights"
    state = diffusion.state_dict()
    for content in ({"state_dict": state}, {"optimizer": {}, "state_dict": state}):
        with pytest.raises(UserError, match="weights in an entry 'state_dict' and no EMA"):
            load_weights(save(content))


def test_the_number_of_timesteps_is_read_from_the_buffers(save):
    loaded, facts = load_weights(save(make_diffusion(timesteps=50).state_dict()), SIZE)
    assert loaded.num_timesteps == facts.timesteps == 50


def test_a_schedule_of_ones_own_comes_with_the_file(save):
    diffusion = make_diffusion(schedule_fn_kwargs={"tau": 0.7})
    loaded, facts = load_weights(save(diffusion.state_dict()), SIZE)
    assert facts.schedule == "custom"
    assert torch.equal(loaded.alphas_cumprod, diffusion.alphas_cumprod)


@pytest.mark.parametrize(
    ("dim", "dim_mults", "channels"), [(12, (1, 3, 4), 1), (8, (2,), 4), (4, (1, 2, 4, 8), 3)]
)
def test_width_multipliers_and_channels_are_read_from_the_shapes(save, dim, dim_mults, channels):
    state = Unet(dim=dim, dim_mults=dim_mults, channels=channels).state_dict()
    loaded, facts = load_weights(save(state), SIZE)
    assert (facts.dim, facts.dim_mults, facts.channels) == (dim, dim_mults, channels)
    assert loaded.channels == channels
    assert loaded.image_size == (SIZE, SIZE)


# ---- Refusals ------------------------------------------------------------------------------------


class Attack:
    """Unpickled the ordinary way, this would create the file named."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def bad_weights(folder, weights):
    """{file name: what its refusal says}; writes the files."""
    whole = weights.read_bytes()
    (folder / "empty.pt").touch()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    middle = bytearray(whole)
    middle[200:900] = b"\0" * 700
    (folder / "damaged.pt").write_bytes(middle)
    (folder / "text.pt").write_text("These are no weights.\n" * 9)
    (folder / "page.pt").write_text("<!doctype html><title>404</title>")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (folder / "folder.pt").mkdir()
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "no weights")
    Image.new("RGB", (4, 4)).save(folder / "picture.pt", format="PNG")
    torch.save(Attack(folder / "owned"), folder / "attack.pt")
    torch.save({"ema": {"ema_model.x": Attack(folder / "owned")}}, folder / "inside.pt")
    torch.save(Attack(folder / "owned"), folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Attack(folder / "owned"), 2))
    (folder / "new_pickle.pt").write_bytes(pickle.dumps(Attack(folder / "owned"), 5))
    torch.save(torch.ones(3), folder / "tensor.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    diffusion = make_diffusion()
    torch.save(bundled(diffusion, version="1.11.1"), folder / "one.pt")
    old = {k: v for k, v in diffusion.state_dict().items() if "mem_kv" not in k}
    torch.save(old, folder / "unnamed_one.pt")
    torch.save({k: v for k, v in diffusion.state_dict().items() if k != "model.init_conv.bias"},
               folder / "missing_key.pt")  # fmt: skip
    torch.save(ClassUnet(dim=8, dim_mults=(1, 2), num_classes=3).state_dict(),
               folder / "classes.pt")  # fmt: skip
    strange = diffusion.state_dict()
    strange["loss_weight"] = torch.linspace(3, 4, 1000)
    torch.save(strange, folder / "strange.pt")
    broken = diffusion.state_dict()
    broken["model.init_conv.bias"] = torch.full((8,), float("nan"))
    torch.save(broken, folder / "nan.pt")
    torch.save(diffusion.state_dict() | {"model.init_conv.bias": "words"}, folder / "words.pt")
    torch.save(bundled(diffusion, config={"image_size": [32, 48]}), folder / "oblong.pt")
    table = torch.zeros(2, 32)
    table[1] = float("nan")
    labels = {"names": ["a", "b"], "embedding": table}
    torch.save(bundled(diffusion, labels=labels), folder / "nan_label.pt")
    one_byte = bytearray(whole)
    one_byte[len(whole) // 2] ^= 0xFF
    (folder / "flipped.pt").write_bytes(one_byte)
    torch.save(make_diffusion(timesteps=10, beta_schedule="linear").state_dict(),
               folder / "beyond.pt")  # fmt: skip
    shutil.copy(folder / "pointer.pt", folder / "pointer.safetensors")
    lacks = r"model.init_conv.bias: none in the file, \(8,\) here"
    no_file = "is damaged or no PyTorch weight file"
    return {
        "absent.pt": "does not exist", "empty.pt": "is empty", "cut.pt": "is cut off",
        "damaged.pt": "is damaged", "text.pt": no_file, "page.pt": no_file,
        "pointer.pt": "git lfs pull", "folder.pt": "is a folder", "zip.pt": no_file,
        "picture.pt": no_file, "attack.pt": r"wants to run code \(posix.system\)",
        "inside.pt": r"run code \(posix.system in its entry 'ema_model.x'\)",
        "old.pt": r"wants to run code \(posix.system\)",
        "pickle.pt": r"wants to run code \(posix.system\)", "new_pickle.pt": "nothing but tensors",
        "tensor.pt": "no weights but a Tensor", "nothing.pt": "holds no U-Net",
        "linear.pt": "holds no U-Net", "one.pt": "denoising-diffusion-pytorch 1.11.1",
        "unnamed_one.pt": "but one of its version 1", "classes.pt": "of its network with classes",
        "missing_key.pt": lacks, "words.pt": lacks,
        "strange.pt": "its loss weight fits no objective", "nan.pt": "not all finite",
        "nan_label.pt": "not all finite", "flipped.pt": "do not fit its checksums",
        "beyond.pt": "its betas go beyond 1", "pointer.safetensors": "git lfs pull",
        "oblong.pt": r"image size of \[32, 48\]: only square",
    }  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="the attack is a shell command")
def test_bad_weight_files_get_one_sentence_each(tiny_weights, tmp_path, recwarn):
    for name, words in bad_weights(tmp_path, tiny_weights).items():
        with pytest.raises(UserError, match=words) as refusal:
            load_weights(tmp_path / name)
        sentence = str(refusal.value)
        assert name in sentence, "the file is not named"
        assert "\n" not in sentence, name
        assert sentence.endswith("."), name
    assert not (tmp_path / "owned").exists(), "code in a weight file was run"
    assert [str(warning.message) for warning in recwarn] == []


ARCHITECTURES = {
    "self_condition: True in the file, False here": {"self_condition": True},
    "learned_variance: True in the file, False here": {"learned_variance": True},
    "init_dim: 16 in the file, dim here": {"init_dim": 16},
    "attn_heads: 2 in the file, 4 here; attn_dim_head: 16 in the file": {
        "attn_heads": 2,
        "attn_dim_head": 16,
    },
    "full_attn: [True, True] in the file, the last here": {"full_attn": (True, True)},
    "learned_sinusoidal_cond: True in the file": {"learned_sinusoidal_cond": True},
}


@pytest.mark.parametrize("words", ARCHITECTURES)
def test_what_differs_in_another_architecture_is_named(save, words):
    """In the library's own words, and nothing else."""
    path = save(Unet(dim=8, dim_mults=(1, 2), **ARCHITECTURES[words]).state_dict())
    with pytest.raises(UserError) as refusal:
        load_weights(path)
    assert words in str(refusal.value)
    assert str(refusal.value).count("in the file") == words.count("in the file")


def test_an_image_size_that_the_network_cannot_halve(save):
    path = save(make_diffusion().model.state_dict())
    with pytest.raises(UserError, match=r"multiple of 2: the U-Net in .* halves it 1 times"):
        load_weights(path, image_size=15)


# ---- Labels --------------------------------------------------------------------------------------


@pytest.fixture
def inputs():
    """x_t, timesteps, and labels of which the second image has none."""
    return torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 500, 999]), torch.tensor([1, -1, 0])


def build(labels=("a", "b")):
    torch.manual_seed(1)
    return build_diffusion(8, (1, 2), 3, SIZE, labels=labels)


def test_a_table_of_zeros_changes_nothing(inputs):
    """Equal in bits: with it, without it, and in the library's own network."""
    x_t, t, labels = inputs
    theirs, plain, with_table = make_diffusion().model, build(()), build()
    with torch.no_grad():
        expected = theirs(x_t, t)
        for output in (LabelledUnet(plain)(x_t, t, labels), plain.model(x_t, t),
                       LabelledUnet(with_table)(x_t, t, labels)):  # fmt: skip
            assert torch.equal(output, expected)
    assert plain.state_dict().keys() == make_diffusion().state_dict().keys()


def test_a_label_is_added_to_the_embedding_of_the_time(inputs):
    """Image by image; without one the output stays the plain network's."""
    x_t, t, labels = inputs
    diffusion = build()
    with torch.no_grad():
        diffusion.label_table.normal_()
        output, plain = LabelledUnet(diffusion)(x_t, t, labels), diffusion.model(x_t, t)
        for i, label in enumerate(labels):
            if label >= 0:
                hook = diffusion.model.time_mlp.register_forward_hook(
                    lambda module, x, y, row=label: y + diffusion.label_table[row]
                )
                expected = diffusion.model(x_t[[i]], t[[i]])[0]
                hook.remove()
                assert not torch.allclose(expected, plain[i], rtol=0.01), "it does nothing"
                assert torch.allclose(output[i], expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(output[1], plain[1], rtol=1e-4, atol=1e-5)


def test_the_table_has_a_gradient_whatever_the_batch(inputs):
    x_t, t, _ = inputs
    for labels, rows in (([-1, -1, -1], []), ([1, 1, -1], [1]), ([0, 1, 1], [0, 1])):
        diffusion = build()
        LabelledUnet(diffusion)(x_t, t, torch.tensor(labels)).square().sum().backward()
        moved = diffusion.label_table.grad.abs().sum(1) > 0
        assert moved.nonzero().flatten().tolist() == rows


def test_images_take_labels_in_turn():
    diffusion = build(("a", "b", "c"))
    with torch.no_grad():
        diffusion.label_table.copy_(torch.arange(3)[:, None])
    assert label_vectors(diffusion, ("c", "a"), [4, 5, 8])[:, 0].tolist() == [2, 0, 2]
    assert label_vectors(diffusion, (), [0, 1]) is None


def test_labels_come_with_the_file(labelled_weights, tiny_weights, save):
    diffusion, facts = load_weights(labelled_weights)
    labels = torch.load(labelled_weights, weights_only=True)["labels"]
    assert facts.labels == diffusion.label_names == ("a", "b", "c/d")
    assert torch.equal(diffusion.label_table, labels["embedding"])
    assert facts.describe(labelled_weights).endswith("16 pixels, 3 labels")
    assert load_weights(tiny_weights)[1].labels == ()
    whole = torch.load(labelled_weights, weights_only=True)
    for wrong in ({"names": ["a"], "embedding": labels["embedding"]}, {"names": ["a"]},
                  {"names": ["a"], "embedding": torch.zeros(1, 8)}):  # fmt: skip
        with pytest.raises(UserError, match=r"label_table: .* in the file, \(1, 32\) here"):
            load_weights(save({**whole, "labels": wrong}))


# ---- Writing -------------------------------------------------------------------------------------


def test_exported_weights_are_read_again(tmp_path):
    diffusion, path = build(), tmp_path / "new" / "weights.pt"
    torch.nn.init.normal_(diffusion.label_table)
    config = bundled(diffusion)["config"]
    assert export_weights(diffusion, path, 77, config) is None
    loaded, facts = load_weights(path)
    assert (facts.step, facts.version, facts.objective) == (77, library_version, "pred_v")
    assert facts.assumed == ()
    for name, tensor in loaded.state_dict().items():
        expected = diffusion.state_dict()[name]
        if name in dict(diffusion.named_parameters()) and name != "label_table":
            expected = expected.half().float()
        assert torch.equal(tensor, expected), name
    ema = torch.load(path, weights_only=True)["ema"]
    assert {v.dtype for k, v in ema.items() if ".model." in k} == {torch.float16}
    assert ema["ema_model.betas"].dtype == torch.float32
    assert (facts.labels, "ema_model.label_table" in ema) == (("a", "b"), False)


def test_weights_that_are_there_already_are_kept(tmp_path):
    path, config = tmp_path / "weights.pt", bundled(make_diffusion())["config"]
    path.write_text("the first")
    assert export_weights(build(), path, 1, config) == tmp_path / "weights.previous.pt"
    assert export_weights(build(), path, 2, config) == tmp_path / "weights.previous-2.pt"
    assert (tmp_path / "weights.previous.pt").read_text() == "the first"
    steps = [load_weights(tmp_path / name)[1].step for name in ("weights.previous-2.pt", path)]
    assert steps == [1, 2]
    assert len(list(tmp_path.iterdir())) == 3
