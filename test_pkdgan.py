"""Tests of pkdgan.py and run_all.sh: offline, about 3 minutes on two cores. `pytest` runs them all."""
import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import pkdgan as pk

HERE = Path(__file__).parent
TINY = ["--size", "16", "--teacher-width", "4", "--student-width", "2", "--epochs", "2", "--epochs1", "2", "--epochs2",
        "1", "--normal", "0"]  # digits with these: seconds
SETTINGS = pk.parse(TINY)
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)  # these nets are too small for more


def tensor(*values):
    return torch.tensor(values)


def gan(width=4, size=16, channels=1, seed=0):
    torch.manual_seed(seed)
    return pk.GAN(size, channels, width, z_dim=10)


def weights(net):
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adams(*gans, lr=1e-3):
    return [torch.optim.Adam([p for g in gans for p in getattr(g, net).parameters()], lr=lr) for net in ("d", "g")]


# ---------------------------------------------------------------- losses: the numbers in their docstrings

@pytest.mark.parametrize("value, by_hand", [
    (pk.discriminator_loss(tensor(0.), tensor(0.)), math.log(2)),
    (pk.discriminator_loss(tensor(3.), tensor(0.)), (math.log(1 + math.exp(-3)) + math.log(2)) / 2),
    (pk.discriminator_loss(tensor(0.), tensor(3.)), (math.log(2) + math.log(1 + math.exp(3))) / 2),
    (pk.adversarial_loss(tensor(1., 2.), tensor(1., 0.)), 2),
    (pk.contextual_loss(tensor(1., -1.), tensor(0., 1.)), 1.5),
    (pk.latent_loss(tensor(1., 1.), tensor(0., -1.)), 2.5),
    (pk.latent_distillation_loss(tensor(1.), tensor(0.), tensor(1.), tensor(3.)), 5),
    (pk.adversarial_distillation_loss(tensor(1., 2.), tensor(0., 2.)), 0.5),
])
def test_loss_by_hand(value, by_hand):
    assert value.item() == pytest.approx(by_hand, abs=1e-6)


def test_attention_map_by_hand():
    stage = tensor([[1., 2.]], [[1., 0.]])[None]  # one image, two channels of 1 x 2
    assert torch.allclose(pk.attention_map(stage), tensor([1., 2.]) / 5 ** 0.5)
    assert torch.allclose(pk.attention_map(7 * stage.repeat(1, 3, 1, 1)), pk.attention_map(stage))  # channels, scale


def test_intermediate_distillation_by_hand():
    left, right = tensor([[5., 0.]])[None], tensor([[0., 1.]], [[0., 3.]])[None]  # Q = [1, 0] and [0, 1]
    assert pk.intermediate_distillation_loss([left], [right], tensor(1.), tensor(.5)).item() == pytest.approx(2.5)
    assert pk.intermediate_distillation_loss([left, left], [right, left], tensor(1.), tensor(1.)).item() == \
        pytest.approx(1)  # the mean over stages
    with pytest.raises(ValueError):
        pk.intermediate_distillation_loss([left, left], [right], tensor(1.), tensor(1.))


# ------------------------------------------------------------------------------------------------ networks

@pytest.mark.parametrize("size, channels", [(16, 1), (32, 3), (64, 1)])
def test_shapes(size, channels):
    net, x = gan(3, size, channels), torch.rand(2, channels, size, size) * 2 - 1
    out, (logit, features) = net.g(x), net.d(x)
    halves = [size // 2 ** (i + 1) for i in range(int(math.log2(size)) - 2)]
    assert out.z.shape == out.z_hat.shape == (2, 10) and out.x_hat.shape == x.shape
    assert [stage.shape[2] for stage in out.stages] == halves + halves[::-1] and halves[-1] == 4
    assert logit.shape == (2,) and features.shape == (2, pk.stage_widths(size, 3)[-1], 4, 4)
    assert out.x_hat.abs().max() <= 1
    for code in (out.z, out.z_hat):
        assert torch.allclose(code.norm(dim=1), torch.tensor(10.).sqrt())


def test_upsample_is_dcgans_transposed_convolution():
    up, x = pk.Upsample(3, 2), torch.randn(2, 3, 5, 5)
    by_window = up.weight.view(2, 2, 2, 3, 2, 2)  # (c_out, sub-pixel, c_in, window), sub-pixel and window 2 x 2
    kernel = by_window.permute(3, 0, 4, 1, 5, 2).flip(2, 4).reshape(3, 2, 4, 4)
    assert torch.allclose(up(x), F.conv_transpose2d(x, kernel, stride=2, padding=1), atol=1e-6)


@pytest.mark.parametrize("width", [3, 128])
def test_no_pixel_is_saturated_before_training(width):
    """tanh passes no gradient there: with nn.ConvTranspose2d's initial weights a wide teacher kept white dots for good."""
    assert (gan(width, 32).g(torch.rand(8, 1, 32, 32) * 2 - 1).x_hat.abs() > 0.99).float().mean() < 1e-3


def test_norm_is_that_of_a_batch_of_one():
    norms = [m for m in gan().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 5 and not list(gan().buffers())  # 16 x 16: two stages a net, the first of encoders and D without
    for norm in norms:
        x = torch.randn(3, norm.num_channels, 4, 4)
        batch_of_one = torch.cat([F.batch_norm(image[None], None, None, training=True) for image in x])
        assert torch.allclose(norm(x), batch_of_one, atol=1e-5)


def test_training_passes_return_float32():
    net, x = gan(), torch.rand(2, 1, 16, 16)
    out, (logit, features) = pk.amp(net.g, x), pk.amp(net.d, x)
    assert {t.dtype for t in (out.z, out.x_hat, out.z_hat, logit, features)} == {torch.float32}
    assert out.stages[0].dtype == (torch.bfloat16 if pk.native_bf16("cpu") else torch.float32)
    assert net.g(x).stages[0].dtype == torch.float32


@pytest.mark.parametrize("dataset, ratio", [("cifar10", 24.45), ("mnist", 311.11), ("fmnist", 700)])
def test_default_widths_reach_the_papers_ratios(dataset, ratio):
    s, channels = pk.parse(["--dataset", dataset]), 3 if dataset == "cifar10" else 1
    x = torch.zeros(1, channels, s.size, s.size)
    teacher, student = (pk.cost(pk.GAN(s.size, channels, width, s.z_dim), x) for width in (s.teacher_width, s.student_width))
    assert teacher["flops"] / student["flops"] >= ratio and teacher["params"] > student["params"]


def test_flops_by_hand():
    # one 4x4 convolution, 16x16 -> 8x8, 1 -> 1 channels: 2 * 16 * 64 operations; every stage below likewise
    size, z = 16, 10
    encoder = 2 * 16 * (64 * 1 + 16 * 2) + 2 * 16 * 2 * z          # 1 -> 1 -> 2 -> z
    decoder = 2 * 16 * (z * 2 + 25 * 2 + 81 * 1)                    # z -> 2 -> 1 -> 1, (4 + 1)^2 and (8 + 1)^2 windows
    discriminator = 2 * 16 * (64 * 1 + 16 * 2) + 2 * 16 * 2
    costs = pk.cost(gan(1, size), torch.zeros(300, 1, size, size))
    assert costs["flops"] == 2 * encoder + decoder + discriminator
    assert costs["MB"] == 4e-6 * sum(p.numel() for p in gan(1, size).g.parameters())
    assert 0 < costs["us_256"] < costs["us_1"]  # per image


# ------------------------------------------------------------------------- updates: which net, which gradient

@pytest.mark.parametrize("case", ["alone", "step 1", "joint"])
def test_each_update_touches_its_own_nets_alone(case, monkeypatch):
    teacher, student = gan(4), gan(2)
    trained = {"alone": [student], "step 1": [student], "joint": [teacher, student]}[case]
    distill = () if case == "alone" else (teacher, student)
    nets = {"t.g": teacher.g, "t.d": teacher.d, "s.g": student.g, "s.d": student.d}
    changed, states = [], []

    def state(net):  # weights and gradients: a loss must not leave gradients in a net that it does not train either
        return weights(net) | {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    def spy(loss, optimizer, update=pk.update):
        before = {name: state(net) for name, net in nets.items()}
        update(loss, optimizer)
        states.append({name: state(net) for name, net in nets.items()})
        changed.append({name for name in nets if not same(before[name], states[-1][name])})

    monkeypatch.setattr(pk, "update", spy)
    pk.train_step(torch.rand(4, 1, 16, 16), trained, distill, case != "step 1", *adams(*trained), SETTINGS)
    assert changed == ([{"t.d", "s.d"}, {"t.g", "s.g"}] if case == "joint" else [{"s.d"}, {"s.g"}])
    assert all(same(states[-1][name], state(net)) for name, net in nets.items())  # and nothing changes besides


def test_step_1_learns_from_the_teacher_alone():
    """Without distillation weights there is nothing to learn from: the GAN's own weights are of no effect."""
    teacher, student = gan(4), gan(2)
    ends = []
    for own_weight in (0.0, 100.0):
        s, net = argparse.Namespace(**vars(SETTINGS)), copy.deepcopy(student)
        s.w_adv = s.w_con = s.w_lat = own_weight
        pk.train_step(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)), [net], (teacher, net), False,
                      *adams(net), s)
        ends.append(weights(net))
    assert same(*ends)


def joint_end(**changes):
    """Teacher and student after one joint update, with some settings changed."""
    teacher, student = gan(4), gan(2)
    s = argparse.Namespace(**vars(SETTINGS) | changes)
    pk.train_step(torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)), [teacher, student],
                  (teacher, student), True, *adams(teacher, student), s)
    return weights(teacher), weights(student)


def test_distillation_gradient_reaches_the_student_only():
    with_, without = joint_end(kd_inter=100.0, kd_latent=100.0, kd_adv=100.0), joint_end(kd_inter=0, kd_latent=0, kd_adv=0)
    assert same(with_[0], without[0]) and not same(with_[1], without[1])


@pytest.mark.parametrize("weight", ["w_adv", "w_con", "w_lat", "kd_inter", "kd_latent", "kd_adv"])
def test_every_weight_has_an_effect(weight):
    assert not same(joint_end()[1], joint_end(**{weight: 123.0})[1])


def test_discriminator_is_trained_to_tell_real_from_fake():
    net, x = gan(), torch.rand(16, 1, 16, 16)
    for _ in range(30):
        log = pk.train_step(x, [net], (), True, *adams(net, lr=1e-3), SETTINGS)
    assert log["D(x)"] > 0.6 > 0.4 > log["D(x_hat)"]


def test_students_discriminator_learns_to_tell_teachers_from_students():
    teacher, student, x = gan(4), gan(2), torch.rand(16, 1, 16, 16)
    opt_d, _ = adams(student)
    _, opt_g = adams(student, lr=0.0)
    for _ in range(100):
        log = pk.train_step(x, [student], (teacher, student), False, opt_d, opt_g, SETTINGS)
    assert log["D(x_hat_t)"] > 0.6 > 0.4 > log["D(x_hat_s)"]


# ---------------------------------------------------------------------------------- the stages of a whole run

@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A whole run on digits with --ablation: per stage the nets before and after, and the batches seen."""
    stages, fit, train_step = {}, pk.fit, pk.train_step

    def traced_step(x, trained, pair, own, opt_d, opt_g, s):
        stage = list(stages.values())[-1]
        stage["batches"].append(x.clone())
        stage["lr"].append([group["lr"] for group in opt_g.param_groups])
        stage["frozen"] = [not g.training and not any(p.requires_grad for p in g.parameters()) for g in pair
                           if g not in trained]
        return train_step(x, trained, pair, own, opt_d, opt_g, s)

    def traced_fit(name, rates, x, epochs, s, pair=(), own=True, first_epoch=0):
        gans = list(rates) + [g for g in pair if g not in rates]
        stages[name] = {"before": [weights(g) for g in gans], "batches": [], "lr": [], "own": own,
                        "trains_teacher": bool(pair) and pair[0] in rates}
        speed = fit(name, rates, x, epochs, s, pair, own, first_epoch)
        stages[name]["after"] = [weights(g) for g in gans]
        return speed

    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "fit", traced_fit)
        patch.setattr(pk, "train_step", traced_step)
        result = pk.run(pk.parse([*TINY, "--normal", "3", "--ablation", "--out", str(out)]))
    return stages, result, out


def test_step_1_leaves_the_teacher_bit_identical(traced):
    stage = traced[0]["step1"]  # nets: student, teacher
    assert same(stage["before"][1], stage["after"][1]) and not same(stage["before"][0], stage["after"][0])
    assert stage["frozen"] == [True] and stage["own"] is False
    assert same(stage["before"][1], traced[0]["teacher"]["after"][0])


def test_step_2_trains_both_from_where_they_stand(traced):
    step2, step1 = traced[0]["step2"], traced[0]["step1"]  # nets: teacher, student
    assert same(step2["before"][0], step1["after"][1]) and same(step2["before"][1], step1["after"][0])
    assert not any(same(a, b) for a, b in zip(step2["before"], step2["after"]))
    assert step2["trains_teacher"] and step2["own"]


def test_student_alone_step_1_and_rival_start_equal_and_see_the_same(traced):
    stages = traced[0]
    alone, step1, step2, rival = (stages[name] for name in ("student alone", "step1", "step2", "joint only"))
    assert same(alone["before"][0], step1["before"][0]) and same(alone["before"][0], rival["before"][1])
    assert same(stages["teacher"]["before"][0], rival["before"][0])
    both_steps = step1["batches"] + step2["batches"]
    assert len(both_steps) == len(alone["batches"]) == len(rival["batches"])  # as many student updates
    for a, b, c in zip(both_steps, alone["batches"], rival["batches"]):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_an_epoch_is_every_image_once_in_a_new_order(traced):
    x, *_ = pk.load_task(pk.parse([*TINY, "--normal", "3"]), "cpu")
    batches = traced[0]["teacher"]["batches"]
    epochs = [torch.cat(batches[:len(batches) // 2]), torch.cat(batches[len(batches) // 2:])]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(image.numpy().tobytes() for image in epoch) == sorted(image.numpy().tobytes() for image in x)


def test_learning_rates_end_near_zero_and_keep_their_ratio(traced):
    lrs = torch.tensor(traced[0]["step2"]["lr"])
    s = SETTINGS
    assert torch.allclose(lrs[:, 0] / lrs[:, 1], torch.tensor(s.lr_teacher * 128 / s.teacher_width / s.lr_student))
    assert lrs[-1, 1] < 0.2 * lrs[:, 1].max() and lrs[:, 1].max() <= s.lr_step2 * s.lr_student


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the step here updates nothing
def test_flips_mirror_half_of_the_images():
    x = torch.rand(200, 1, 16, 16)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "train_step", lambda batch, *_: seen.append(batch) or {"loss": torch.zeros(())})
        s = argparse.Namespace(**vars(SETTINGS) | {"flip": True})
        pk.fit("test", {gan(1): 0.0}, x, 1, s)
    as_is, mirrored = ({t.numpy().tobytes() for t in images} for images in (x, x.flip(-1).contiguous()))
    kinds = [(t.contiguous().numpy().tobytes() in as_is) - (t.contiguous().numpy().tobytes() in mirrored) for t in torch.cat(seen)]
    assert set(kinds) == {1, -1} and 60 < kinds.count(-1) < 140


def test_few_images_of_a_folder_make_longer_epochs(tmp_path, monkeypatch, capsys):
    root, seen = make_folder(tmp_path / "parts"), []
    monkeypatch.setattr(pk, "fit", lambda stage, rates, x, *_, **how: seen.append(x) or 1.0)
    result = pk.run(pk.parse([*TINY[:6], "--dataset", "folder", "--data", str(root), "--out", str(tmp_path / "runs")]))
    assert result["images"]["train"] == 3 and "training images 3, 1333 times an epoch" in capsys.readouterr().out
    assert [len(x) for x in seen] == [3999] * 4 and torch.equal(seen[0][:3], seen[0][-3:])


def test_result_and_files(traced):
    _, result, out = traced
    folder = out / "digits-3-seed0"
    assert sorted(file.name for file in folder.iterdir()) == [
        "result.json", "samples.png", "student.pt", "student.pt2", "teacher.pt"]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    x, x_test, y_test, _ = pk.load_task(pk.parse([*TINY, "--normal", "3"]), "cpu")
    for file, key in (("student.pt", "step2"), ("teacher.pt", "teacher_step2")):
        saved = torch.load(folder / file, weights_only=True)
        net = pk.GAN(**saved["form"])
        net.load_state_dict(saved["weights"])
        assert pk.auroc(net, x_test, y_test) == result["auroc"][key]
        assert saved["settings"]["dataset"] == "digits"


# ---------------------------------------------------------------------------------------------- evaluation

def test_score_depends_on_the_image_alone():
    net, x = gan(), torch.rand(300, 1, 16, 16) * 2 - 1
    net.train()
    scores = pk.score(net.g, x)
    order = torch.randperm(300)
    assert scores.std() > 0 and not net.g.training
    assert torch.allclose(pk.score(net.g, x[order]), scores[order], rtol=1e-5)
    assert torch.allclose(torch.cat([pk.score(net.g, image[None]) for image in x[:20]]), scores[:20], rtol=1e-5)
    assert torch.allclose(pk.score(net.g, x[250:]), scores[250:], rtol=1e-5)


def test_scoring_one_image_leaves_onednn_as_it_was():
    before = torch._C._get_mkldnn_enabled()
    pk.score(gan().g, torch.zeros(1, 1, 16, 16))
    assert torch._C._get_mkldnn_enabled() == before


def test_score_is_the_distance_of_the_codes():
    net, x = gan(), torch.rand(2, 1, 16, 16)
    out = net.g(x)
    assert torch.allclose(pk.score(net.g, x), (out.z - out.z_hat).square().sum(1).sqrt())


def test_auroc_is_in_percent_with_anomalies_high(monkeypatch):
    y = tensor(0, 0, 1, 1)
    monkeypatch.setattr(pk, "score", lambda g, x: x)
    assert pk.auroc(gan(1), tensor(.1, .2, .8, .9), y) == 100
    assert pk.auroc(gan(1), tensor(.1, .8, .2, .9), y) == 75
    with pytest.raises(pk.RunError, match="NaN"):
        pk.auroc(gan(1), tensor(.1, math.nan, .2, .9), y)


# ---------------------------------------------------------------------------------------------------- data

def test_training_set_is_the_normal_class_and_the_test_set_everything():
    x, c, x_test, c_test, classes = pk.load_images("digits", None, 16)
    assert x.shape == (1198, 1, 16, 16) and x_test.shape == (599, 1, 16, 16) and classes == list("0123456789")
    train, test, y = pk.one_class_split(x, c, x_test, c_test, 7)
    assert torch.equal(train, x[c == 7]) and torch.equal(test, x_test) and torch.equal(y == 0, c_test == 7)


def test_val_shares_no_image_with_training_and_test():
    index = torch.arange(100)  # images that are their own number
    train, val, y = pk.one_class_split(index, index % 5, index + 100, index % 5, 2, val=True)
    assert len(val) == 10 and len(train) == 20 - (y == 0).sum()
    assert not set(val.tolist()) & (set(train.tolist()) | set(range(100, 200)))
    assert set((train % 5).tolist()) == {2} and torch.equal(y, (val % 5 != 2).long())
    other = pk.one_class_split(index, index % 5, index + 100, index % 5, 3, val=True)
    assert torch.equal(val, other[1])  # the same whatever the class


def test_split_does_not_depend_on_the_seed():
    a, b = (pk.load_task(pk.parse([*TINY, "--val", "--seed", seed]), "cpu") for seed in ("0", "5"))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_images_are_in_minus_one_to_one_and_classes_go_by_index_or_name():
    x, x_test, y_test, name = pk.load_task(pk.parse([*TINY, "--normal", "8"]), "cpu")
    assert name == "8" and x.dtype == torch.float32 and x.min() == -1 and 0.8 < x.max() <= 1


def write_idx(path, array):
    """The format of MNIST's files: 0 0, type 8 (uint8), dimensions, sizes (big-endian), bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.flatten().tolist()))


@pytest.mark.parametrize("dataset, folder, normal, name", [
    ("mnist", "MNIST", "3", "3"), ("fmnist", "FashionMNIST", "Coat", "Coat"), ("fmnist", "FashionMNIST", "4", "Coat")])
def test_idx_files(dataset, folder, normal, name, tmp_path):
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    images[4] = 255
    labels = torch.arange(20, dtype=torch.uint8) % 10
    for split in ("train", "t10k"):
        write_idx(tmp_path / folder / "raw" / f"{split}-images-idx3-ubyte", images)
        write_idx(tmp_path / folder / "raw" / f"{split}-labels-idx1-ubyte", labels)
    x, x_test, y_test, got = pk.load_task(pk.parse(["--dataset", dataset, "--normal", normal, "--data", str(tmp_path)]), "cpu")
    assert got == name and x.shape == (2, 1, 32, 32) and x_test.shape == (20, 1, 32, 32)
    assert y_test.tolist() == [int(label != int(normal if normal.isdigit() else 4)) for label in labels]
    assert (x_test[4] == 1).all() and x_test.min() < -0.7


def test_cifar10_pickles(tmp_path, monkeypatch):
    """The real archive's layout: five training batches and one of test, row-major planes R, G, B."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()

    def put(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    planes = torch.tensor([[255] * 1024 + [0] * 1024 + [128] * 1024] * 10, dtype=torch.uint8).numpy()  # red 255, blue 128
    batches = [put(file, {"data": planes, "labels": list(range(10))})
               for file in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]]
    cls = torchvision.datasets.CIFAR10  # it checks the published files' md5 sums: here, those of the small ones
    monkeypatch.setattr(cls, "train_list", batches[:5])
    monkeypatch.setattr(cls, "test_list", batches[5:])
    monkeypatch.setattr(cls, "meta", dict(zip(("filename", "md5"), put("batches.meta", {"label_names": names})), key="label_names"))
    x, x_test, y_test, name = pk.load_task(pk.parse(["--dataset", "cifar10", "--normal", "cat", "--data", str(tmp_path)]), "cpu")
    assert name == "cat" and x.shape == (5, 3, 32, 32) and y_test.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert x[0, :, 5, 5].tolist() == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-6)


def make_folder(root, mode="RGB", classes=("good", "scratch"), count=3):
    """MVTec AD's layout: train has good only, test has good and the defects."""
    for split in ("train", "test"):
        for k, name in enumerate(classes[:1] if split == "train" else classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = 40 * i + 90 * k if mode == "L" else (40 * i, 90 * k, 7)
                Image.new(mode, (40, 30), colour).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_image_folder_as_of_mvtec(mode, channels, tmp_path):
    root = make_folder(tmp_path, mode)
    x, x_test, y_test, name = pk.load_task(
        pk.parse(["--dataset", "folder", "--normal", "good", "--data", str(root), "--size", "16"]), "cpu")
    assert name == "good" and x.shape == (3, channels, 16, 16) and y_test.tolist() == [0, 0, 0, 1, 1, 1]
    assert x[:, 0, 3, 3].tolist() == pytest.approx([i * 40 / 127.5 - 1 for i in range(3)])
    assert torch.equal(x_test[:3], x)  # the same pictures: training and test images are read alike


def test_folder_classes_are_matched_by_name(tmp_path):
    make_folder(tmp_path, classes=("good", "bent"))  # "bent" sorts before "good" in test
    task = pk.load_task(pk.parse(["--dataset", "folder", "--data", str(tmp_path), "--size", "16"]), "cpu")
    assert task[3] == "good" and task[2].tolist() == [1, 1, 1, 0, 0, 0]


def test_download_is_moved_in_place_whole_or_not_at_all(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train=True, download=False):
            self.file = Path(root, "MNIST", "raw", "file")
            if download:
                self.file.parent.mkdir(parents=True)
                self.file.write_text("half")
                if fail:
                    raise KeyboardInterrupt
            if not self.file.exists():
                raise RuntimeError("not found")

    monkeypatch.setitem(pk.TORCHVISION, "mnist", (Fake, "MNIST/raw/file"))
    fail = True
    with pytest.raises(KeyboardInterrupt):
        pk.load_torchvision("mnist", tmp_path / "data")
    assert list((tmp_path / "data").rglob("*")) == []  # nothing half-written, nothing that a later run takes for whole
    fail = False
    pk.load_torchvision("mnist", tmp_path / "data")
    assert [f.name for f in (tmp_path / "data").rglob("*")] == ["MNIST", "raw", "file"]


def test_another_run_may_have_downloaded_meanwhile(tmp_path, monkeypatch):
    class Raced:
        def __init__(self, root, train=True, download=False):
            for place in (Path(root), tmp_path) if download else ():
                (place / "MNIST" / "raw").mkdir(parents=True)
            self.there = (Path(root) / "MNIST" / "raw").exists()

    monkeypatch.setitem(pk.TORCHVISION, "mnist", (Raced, "MNIST/raw/file"))
    assert all(split.there for split in pk.load_torchvision("mnist", tmp_path))
    assert [f.name for f in tmp_path.rglob("*")] == ["MNIST", "raw"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, data):
        with open(self, "wb") as f:
            f.write(data[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pk.run(pk.parse([*TINY, "--out", str(tmp_path)]))
    assert [f.name for f in tmp_path.rglob("*")] == ["digits-0-seed0"]


# -------------------------------------------------------------------------------------------- command line

NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def command(*flags, cwd, **options):
    env = os.environ | NO_NETWORK | {"OMP_NUM_THREADS": "1"}  # these nets are too small for more
    return subprocess.run([sys.executable, str(HERE / "pkdgan.py"), *flags], cwd=cwd, env=env, text=True,
                          capture_output=True, timeout=170, **options)


def test_default_command(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("RESULT ")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert set(result["auroc"]) == {"teacher", "student_alone", "step1", "step2", "teacher_step2"}
    assert all(50 < value <= 100 for value in result["auroc"].values())
    assert set(result["params"]) == set(result["flops"]) == {"teacher", "student"}
    s = pk.parse([])
    for stage, epochs in (("teacher", s.epochs), ("student alone", s.epochs1 + s.epochs2), ("step1", s.epochs1),
                          ("step2", s.epochs2)):
        progress = [line for line in done.stdout.splitlines() if re.match(rf"{stage} \d+/{epochs}:", line)]
        assert len(progress) == epochs and all("images/s" in line and "s left" in line for line in progress)
    assert len(list((tmp_path / "runs").rglob("*.*"))) == 5


def test_equal_seeds_give_equal_results(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda run: command(*TINY, "--normal", "3", "--seed", run[1], "--out", run, cwd=tmp_path), ("a0", "b0", "c1"))
    a, b, c = (json.loads(d.stdout.splitlines()[-1].removeprefix("RESULT "))["auroc"] for d in done)
    assert a == b and a != c
    assert same(*(torch.load(tmp_path / run / "digits-3-seed0" / "student.pt", weights_only=True)["weights"] for run in ("a0", "b0")))


def bad_folder(root, part):
    make_folder(root)
    if part == "image":
        (root / "train" / "good" / "1.png").write_bytes(b"no image")
    elif part == "16 bits":
        Image.new("I;16", (40, 30), 5000).save(root / "train" / "good" / "1.png")
    elif part == "truncated":
        file = root / "train" / "good" / "1.png"
        file.write_bytes(file.read_bytes()[:60])
    else:
        for file in sorted((root / part).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (root / part).rmdir()


BAD_INPUT = [  # exit code, words of the message, flags
    (2, ["nosuch", "digits", "mnist", "fmnist", "cifar10", "folder"], ["--dataset", "nosuch"]),
    (2, ["cat", "0", "9"], ["--normal", "cat"]),
    (2, ["10", "0", "9"], ["--normal", "10"]),
    (2, ["0", "9"], ["--normal", "9" * 30]),
    (2, ["--size 24", "power of two"], ["--size", "24"]),
    (2, ["--batch 0", "at least 1"], ["--batch", "0"]),
    (2, ["--lr-student nan"], ["--lr-student", "nan"]),
    (2, ["--seed -1"], ["--seed", "-1"]),
    (2, ["--what"], ["--what"]),
    (2, ["--device", "nosuch"], ["--device", "nosuch"]),
    (1, ["mnist", "empty/MNIST/raw", "train"], ["--dataset", "mnist", "--data", "empty"]),
    (1, ["cifar10", "empty/cifar-10-batches-py", "data_batch"], ["--dataset", "cifar10", "--data", "empty"]),
    (1, ["mnist", "broken/MNIST", "delete"], ["--dataset", "mnist", "--data", "broken"]),
    (1, ["empty", "train/<class>", "test/<class>"], ["--dataset", "folder", "--data", "empty"]),
    (1, ["test/<class>"], ["--dataset", "folder", "--data", "without test"]),
    (2, ["missing", "0 (good)"], ["--dataset", "folder", "--data", "folder", "--normal", "missing"]),
    (2, ["scratch", "0 (good)"], ["--dataset", "folder", "--data", "folder", "--normal", "scratch"]),
    (1, ["no AUROC", "validation"], ["--dataset", "folder", "--data", "folder", "--normal", "good", "--val"]),
    (1, ["bad image/train/good/1.png"], ["--dataset", "folder", "--data", "bad image"]),
    (1, ["bad truncated/train/good/1.png"], ["--dataset", "folder", "--data", "bad truncated"]),
    (1, ["bad 16 bits/train/good/1.png", "8 bits"], ["--dataset", "folder", "--data", "bad 16 bits"]),
    (1, ["teacher, epoch 1", "NaN or Inf", "learning rates"], ["--lr-teacher", "1e9"]),
    (1, ["cannot write", "--out"], ["--out", "a file"]),
    (2, ["--holdout 1"], ["--holdout", "1"]),
    (1, ["missing.pt", "No such file"], ["--score", "missing.pt", "folder"]),
]


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory):
    """A folder with all that BAD_INPUT speaks of."""
    root = tmp_path_factory.mktemp("bad")
    make_folder(root / "folder")
    for part in ("test", "image", "truncated", "16 bits"):
        bad_folder(root / (f"without {part}" if part == "test" else f"bad {part}"), part)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            write_idx(root / "broken" / "MNIST" / "raw" / f"{split}-{kind}-ubyte", torch.zeros(5, 2, 2, dtype=torch.uint8))
    (root / "a file").write_text("")
    return root


@pytest.mark.parametrize("code, words, flags", BAD_INPUT, ids=[" ".join(flags) for *_, flags in BAD_INPUT])
def test_bad_input_gets_one_clear_line(code, words, flags, bad_input, monkeypatch, capsys):
    monkeypatch.chdir(bad_input)
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    assert pk.main(["--size", "16", *flags]) == code
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1 and stderr.startswith("pkdgan.py: ") and all(word in stderr for word in words), stderr
    assert not [f for f in bad_input.glob("runs/*/*")] and not list((bad_input / "empty").glob("*"))


def test_exit_code_is_that_of_main(tmp_path):
    done = command("--dataset", "nosuch", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_batch_larger_than_the_training_set_is_said(tmp_path):
    done = command(*TINY, "--batch", "5000", cwd=tmp_path)
    assert done.returncode == 0 and re.search("--batch 5000 is more than the 119 training images: one update", done.stdout)


def test_disk_full_leaves_no_half_written_file(tmp_path):
    limit = 10_000  # bytes a file may have: less than a checkpoint
    done = command(*TINY, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "cannot write" in done.stderr
    assert "| step2 |" in done.stdout  # the figures are not lost
    assert [f for f in (tmp_path / "runs").rglob("*") if f.is_file()] == []


def test_ctrl_c_leaves_no_half_written_file(tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "pkdgan.py"), *TINY, "--epochs", "5000"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # a shell's background jobs ignore SIGINT
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not process.stdout.readline().startswith("teacher 2/"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.splitlines() == ["pkdgan.py: interrupted; nothing half-written is left"]
    assert [f for f in (tmp_path / "runs").rglob("*") if f.is_file()] == []


# ------------------------------------------------------------------------------------- using a trained student

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits that holds images out: (its folder, the images trained on, x_test, y_test)."""
    out, seen, fit = tmp_path_factory.mktemp("trained"), [], pk.fit

    def spy(stage, rates, x, *rest, **how):
        seen.append(x)
        return fit(stage, rates, x, *rest, **how)

    s = pk.parse([*TINY, "--holdout", "0.4", "--out", str(out)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "fit", spy)
        pk.run(s)
    _, x_test, y_test, _ = pk.load_task(s, "cpu")
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen)
    return out / "digits-0-seed0", seen[0], x_test, y_test


def png(path, x):
    """Write an image (1, h, w) in [-1, 1]."""
    torchvision.transforms.functional.to_pil_image((x + 1) / 2).save(path)
    return str(path)


def scored(stdout):
    """The lines of --score as lists."""
    header, *lines = stdout.splitlines()
    assert header == "path\tscore\tp-value\tverdict"
    return [line.split("\t") for line in lines]


def test_p_values_by_hand():
    calibration = tensor(1., 2., 2., 3.)
    p = pk.p_values(tensor(0., 1., 1.5, 2., 3., 3.5), calibration)
    assert p.tolist() == [1, 1, 4 / 5, 4 / 5, 2 / 5, 1 / 5]  # exact, so that p <= alpha is right at alpha itself
    assert pk.p_values(tensor(2.5), tensor(1., 2., 3.)) == 0.5 and pk.p_values(tensor(7.), torch.zeros(0)) == 1


def test_calibration_images_are_not_trained_on(trained):
    folder, x_seen, *_ = trained
    x, *_ = pk.load_task(SETTINGS, "cpu")
    seen = {image.numpy().tobytes() for image in x_seen}
    held = torch.stack([image for image in x if image.numpy().tobytes() not in seen])
    assert len(held) == int(0.4 * len(x)) and len(held) + len(seen) == len(x)
    for file in ("student.pt", "teacher.pt"):
        net, calibration = pk.load_gan(folder / file)
        assert torch.equal(calibration, calibration.sort().values)
        assert torch.allclose(calibration, pk.score(net.g, held).sort().values, rtol=1e-4)
    assert [pk.parse(["--dataset", name]).holdout for name in ("mnist", "folder")] == [0, 0.1]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.5])
def test_false_alarms_stay_within_alpha(alpha, trained):
    folder, _, x_test, y_test = trained
    net, calibration = pk.load_gan(folder / "student.pt")
    p = pk.p_values(pk.score(net.g, x_test), calibration)
    alarms, n = p[y_test == 0] <= alpha, len(calibration)
    deviation = (alpha * (1 - alpha) * (1 / len(alarms) + 1 / n)) ** 0.5  # the promise is of the mean over calibrations
    assert alarms.float().mean() <= alpha + 3 * deviation
    assert (p[y_test == 1] <= alpha).float().mean() > 0.5 > alarms.float().mean() - alpha  # not vacuous


def test_scores_of_a_thousand_images_and_a_broken_one(trained, tmp_path):
    folder, _, x_test, _ = trained
    (tmp_path / "in").mkdir()
    for i in range(1000):
        png(tmp_path / "in" / f"{i:04}.png", x_test[i % len(x_test)])
    (tmp_path / "in" / "0500.png").write_bytes(b"no image")
    alone = png(tmp_path / "x.png", x_test[7])
    done = command("--score", str(folder / "student.pt"), "in", alone, "--alpha", "0.1", cwd=tmp_path)
    assert done.returncode == 1
    assert [line.partition(" cannot")[0] for line in done.stderr.splitlines()] == [
        "pkdgan.py: in/0500.png", "pkdgan.py: 1 of 1001 images could not be scored"]
    lines = scored(done.stdout)
    assert [line[0] for line in lines] == [f"in/{i:04}.png" for i in range(1000) if i != 500] + [alone]
    net, calibration = pk.load_gan(folder / "student.pt")
    for path, value, p, verdict in lines[:40] + lines[-1:]:
        x = pk.read_image(tmp_path / path, 16)[None].float().mean(1, keepdim=True) / 127.5 - 1
        by_itself = pk.score(net.g, x)
        assert float(value) == pytest.approx(by_itself.item(), rel=1e-4)
        assert float(p) == pytest.approx(((calibration >= by_itself).sum() + 1).item() / (len(calibration) + 1), abs=1e-4)
        assert verdict == ("anomaly" if float(p) <= 0.1 else "normal")
    assert lines[-1][1:] == lines[7][1:] and len({line[1] for line in lines}) > 500


@pytest.mark.parametrize("n, verdict", [(18, ""), (19, "anomaly")])
def test_verdict_at_alpha_itself(n, verdict, tmp_path, capsys):
    net = gan(2, 16)
    torch.save({"version": pk.VERSION, "form": net.form, "weights": net.state_dict(), "calibration": torch.zeros(n)},
               tmp_path / "student.pt")
    assert pk.main(["--score", str(tmp_path / "student.pt"), png(tmp_path / "a.png", torch.zeros(1, 16, 16))]) == 0
    out, err = capsys.readouterr()
    assert scored(out)[0][3] == verdict and ("19 would do" in err) == (n == 18)


def test_score_without_held_out_images_says_so(traced, tmp_path, capsys):
    x, *_ = pk.load_task(SETTINGS, "cpu")
    student = traced[2] / "digits-3-seed0" / "student.pt"
    assert pk.main(["--score", str(student), png(tmp_path / "a.png", x[0])]) == 0
    out, err = capsys.readouterr()
    assert scored(out)[0][2:] == ["", ""] and len(err.splitlines()) == 1 and "--holdout" in err and "19" in err
    assert pk.main(["--score", str(student)]) == 1 and "no image" in capsys.readouterr().err


@pytest.mark.parametrize("channels, mode", [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_score_adapts_images_as_training_does(channels, mode, tmp_path, capsys):
    net = gan(2, 16, channels)
    torch.save({"version": pk.VERSION, "form": net.form, "weights": net.state_dict(), "calibration": torch.arange(99.)},
               tmp_path / "student.pt")
    Image.new(mode, (40, 30), 200 if mode == "L" else (200,) * len(mode)).save(tmp_path / "a.png")
    assert pk.main(["--score", str(tmp_path / "student.pt"), str(tmp_path / "a.png")]) == 0
    x = torch.full((1, channels, 16, 16), 200 / 127.5 - 1)
    assert float(scored(capsys.readouterr().out)[0][1]) == pytest.approx(pk.score(net.g, x).item(), rel=1e-4)


@pytest.mark.parametrize("kind, word", [("foreign", "KeyError"), ("text", "student.pt"), ("cut short", "student.pt"),
                                        ("newer", "newer"), ("a pickled object", "student.pt")])
def test_checkpoint_that_is_none(kind, word, trained, tmp_path, capsys):
    path, whole = tmp_path / "file.pt", (trained[0] / "student.pt").read_bytes()
    saved = torch.load(trained[0] / "student.pt", weights_only=True)
    content = {"foreign": {"weights": 1}, "newer": saved | {"version": pk.VERSION + 1}}
    if kind in content:
        torch.save(content[kind] if kind != "a pickled object" else argparse.Namespace(a=1), path)
    else:
        path.write_bytes(b"text" if kind == "text" else whole[:len(whole) // 2])
    assert pk.main(["--score", str(path), "x.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "file.pt" in err and word in err and len(err) < 300


def test_exported_student_needs_torch_alone(trained, tmp_path):
    folder, _, x_test, _ = trained
    torch.save(x_test[:300], tmp_path / "x.pt")
    code = ("import sys, torch; d = torch.export.load(sys.argv[1]).module(); x = torch.load('x.pt'); "
            "torch.save([d(x), d(x[:1]), d(x[:7])], 'scores.pt'); assert 'pkdgan' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, folder / "student.pt2"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    expected = pk.score(pk.load_gan(folder / "student.pt")[0].g, x_test[:300])
    for scores in torch.load(tmp_path / "scores.pt"):
        assert torch.allclose(scores, expected[:len(scores)], rtol=1e-5, atol=1e-5)


def test_samples_show_what_they_say(trained):
    folder, _, x_test, y_test = trained
    student, teacher = (pk.load_gan(folder / file)[0].g for file in ("student.pt", "teacher.pt"))
    order = pk.score(student, x_test).argsort(descending=True)
    anomalies, normal = order[y_test[order] == 1], order[y_test[order] == 0]
    picture = torchvision.transforms.functional.pil_to_tensor(Image.open(folder / "samples.png"))[0, ::2, ::2] / 127.5 - 1
    cell, left = 16 + 2, 110
    for group, index in enumerate((order[:8], anomalies[len(anomalies) // 2 - 4:][:8], normal[len(normal) // 2 - 4:][:8],
                                   order[-8:])):
        for row, images in enumerate((x_test[index], teacher(x_test[index]).x_hat, student(x_test[index]).x_hat)):
            for k in range(8):
                top, start = 2 + (3 * group + row) * cell, left + 2 + k * cell
                assert torch.allclose(picture[top:top + 16, start:start + 16], images[k, 0], atol=0.02)


# ---------------------------------------------------------------------------------------------- run_all.sh

FAST = ["--size", "16", "--teacher-width", "4", "--student-width", "2", "--epochs", "1", "--epochs1", "1", "--epochs2",
        "1"]


def run_all(out, *flags, start=subprocess.run, **variables):
    """run_all.sh on digits, classes 0 and 1, in a session of its own."""
    return start(["bash", str(HERE / "run_all.sh"), *FAST, *flags], text=True, cwd=out.parent, start_new_session=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 env=ENVIRONMENT | {"DATASETS": "digits", "NORMALS": "0 1", "OUT": str(out)} | variables)


def fake_result(out, normal, seed, *flags, **auroc):
    """A result.json as a run of run_all() writes it, with given AUROCs."""
    s = vars(pk.parse([*FAST, *flags, "--normal", str(normal), "--seed", str(seed)]))
    folder = out / f"digits-{normal}-seed{seed}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(
        {"settings": s, "auroc": dict(teacher=90, student_alone=80, step1=85, step2=88) | auroc, "normal": str(normal),
         "split": "test", "device": "cpu", "versions": {"torch": "2"}, "ratio": 9.5}))
    return folder / "result.json"


def rows(stdout):
    """{first cell: the others} of the tables in a text."""
    lines = [line.strip("| ").split("|") for line in stdout.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_run_all_two_at_a_time_then_skips(tmp_path):
    out = tmp_path / "runs"
    done = run_all(out, JOBS="2")
    assert done.returncode == 0 and done.stderr == ""
    results = {n: json.loads((out / f"digits-{n}-seed0" / "result.json").read_text()) for n in "01"}
    table = rows(done.stdout)
    for n, result in results.items():
        auroc = result["auroc"]
        gain = auroc["step2"] - auroc["student_alone"]
        assert table[n] == [*(f"{auroc[key]:.2f}" for key in ("teacher", "student_alone", "step1", "step2")),
                            f"{gain:+.2f}", "1 of 1"]
        assert (out / f"digits-{n}-seed0.log").read_text().splitlines()[-1].startswith("RESULT ")
    assert "[2/2] digits-" in done.stdout and "0 min left" in done.stdout
    logs = {log: log.stat().st_mtime_ns for log in out.glob("*.log")}
    again = run_all(out)
    assert "2 of them finished before" in again.stdout and rows(again.stdout) == table and again.returncode == 0
    assert {log: log.stat().st_mtime_ns for log in out.glob("*.log")} == logs and len(logs) == 2
    other = run_all(out, "--kd-adv", "0.5", JOBS="0")  # results for other settings are none for these
    assert other.returncode == 1 and rows(other.stdout)["0"] == ["missing"] * 5 + ["0 of 1"]


@pytest.mark.parametrize("victim", ["everything", "run_all.sh alone"])
def test_run_all_killed_and_started_again(victim, tmp_path):
    out = tmp_path / "runs"
    finished = fake_result(out, 0, 0, "--epochs", "9")
    killed = run_all(out, "--epochs", "9", start=subprocess.Popen)
    log = out / "digits-1-seed0.log"
    while not (log.exists() and "teacher 2/9" in log.read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL if victim == "everything" else signal.SIGSTOP)
    killed.kill()  # alone, its run goes on, and must be neither lost nor done twice
    killed.wait()
    before, kept = log.read_text(), finished.stat().st_mtime_ns
    again = run_all(out, "--epochs", "9", start=subprocess.Popen)
    assert "2 runs, 1 of them finished before" in again.stdout.readline()
    if victim != "everything":
        time.sleep(0.5)  # it waits for the run that it has not started
        os.killpg(killed.pid, signal.SIGCONT)
    table = rows(again.communicate(timeout=170)[0])
    assert again.returncode == 0 and table["0"][0] == "90.00" and finished.stat().st_mtime_ns == kept
    assert table["1"][-1] == "1 of 1" and log.read_text().count("RESULT") == log.read_text().count("teacher 1/9") == 1
    assert log.read_text().startswith(before) == (victim != "everything")  # gone on with, or begun anew


def test_run_all_lists_what_failed(tmp_path):
    done = run_all(tmp_path / "runs", NORMALS="99 0")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("no result: digits-99-seed0: pkdgan.py: --normal 99: no such")
    table = rows(done.stdout)
    assert table["99"] == table["mean"] == ["missing"] * 5 + ["0 of 1"] and table["0"][-1] == "1 of 1"


def test_run_all_shares_out_a_slurm_array(tmp_path):
    out, classes = tmp_path / "runs", "0 1 2 3 4"

    def task(number, JOBS, **array):  # array: of --array=3-7:2
        return run_all(out, JOBS=JOBS, NORMALS=classes, SLURM_ARRAY_TASK_ID=number,
                       **{f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()})

    last = task("7", "1", MIN="3", STEP="2", COUNT="3")
    assert last.returncode == 0 and [file.name for file in out.glob("*.log")] == ["digits-2-seed0.log"]
    first = task("3", "0", MIN="3", STEP="2", COUNT="3")
    assert re.findall(r"digits-(.)-seed0: not started", first.stderr) == ["0", "3"] and first.returncode == 1
    by_number = task("4", "0")  # without the other variables: run number 4
    assert re.findall(r"digits-(.)-seed0: not started", by_number.stderr) == ["4"]
    gap = task("7", "1", MIN="3", COUNT="2")  # --array=3,7
    assert gap.returncode == 2 and "--array" in gap.stderr and len(gap.stderr.splitlines()) == 1
    for n in "0134":
        fake_result(out, n, 0)
    assert not rows(last.stdout + first.stdout)  # a share's table would say "missing"
    command = last.stdout.splitlines()[-1].partition(": ")[2]
    table = subprocess.run(command, shell=True, cwd=HERE, text=True, capture_output=True, env=ENVIRONMENT)
    assert table.returncode == 0 and rows(table.stdout)["mean"][-1] == "1 of 1" and "missing" not in table.stdout


def test_run_all_table_by_hand(tmp_path):
    out = tmp_path / "runs"
    for seed, alone, step2 in ((0, 80, 90), (1, 84, 92)):
        fake_result(out, 0, seed, student_alone=alone, step2=step2)
    fake_result(out, 1, 0, "--ablation", student_alone=70, step2=60, joint_only=50)
    fake_result(out, 2, 0, "--kd-adv", "0.5")  # another experiment
    done = run_all(out, JOBS="0", NORMALS="0 1 2", SEEDS="0 1")
    assert done.returncode == 1 and [line for line in done.stderr.splitlines()] == [
        f"no result: digits-{run}: not started" for run in ("2-seed0", "1-seed1", "2-seed1")]
    table = rows(done.stdout)
    assert table["0"] == ["90.00 ± 0.00", "82.00 ± 2.83", "85.00 ± 0.00", "91.00 ± 1.41", "+9.00 ± 1.41", "missing", "2 of 2"]
    assert table["1"] == ["90.00", "70.00", "85.00", "60.00", "-10.00", "50.00", "1 of 2"]
    assert table["2"] == table["mean"] == ["missing"] * 6 + ["0 of 2"]  # never the mean of those that there are
    table = rows(run_all(out, JOBS="0", SEEDS="0 1").stdout)
    assert table["mean"] == ["90.00", "75.00", "85.00", "75.00", "+0.00", "missing", "1 of 2"]
    assert "9.50 : 1" in done.stdout
    table = rows(run_all(out, "--ablation", JOBS="0").stdout)  # a result without the rival is none for --ablation
    assert table["0"] == ["missing"] * 6 + ["0 of 1"] and table["1"][5] == "50.00"


def test_run_all_starts_nothing_on_a_usage_error(tmp_path):
    done = run_all(tmp_path / "runs", DATASETS="digits nosuch")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nosuch" in done.stderr and "fmnist" in done.stderr
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------- the text around it

def test_readme_names_what_there_is():
    readme = (HERE / "README.md").read_text()
    named = set(re.findall(r"`([a-z_]+)\(", readme))
    assert {name for name in named if not hasattr(pk, name)} == set()
    losses = {name for name, _ in inspect.getmembers(pk, inspect.isfunction) if name.endswith("_loss")}
    assert losses <= named and len(losses) == 7
    known = {"--" + name.replace("_", "-") for name in vars(SETTINGS)} | {"--score", "--alpha", "--array"}
    assert set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", readme)) <= known | {"--help"}


def test_everything_public_has_a_docstring():
    for name, item in inspect.getmembers(pk, lambda item: getattr(item, "__module__", "") == "pkdgan"):
        assert inspect.getdoc(item), name
