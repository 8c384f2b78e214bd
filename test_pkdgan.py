"""Tests of pkdgan.py and run_all.sh: offline, one to three minutes on two cores, by `pytest`."""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # much here is exact on a CPU alone; before torch looks

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn import metrics
from torchvision.transforms import functional as TF

import pkdgan as pk

HERE = Path(__file__).parent
TINY = ["--size", "16", "--teacher-width", "4", "--student-width", "2", "--normal", "0"]
TINY += ["--epochs", "2", "--epochs1", "2", "--epochs2", "1"]  # digits with these: seconds
SETTINGS = pk.parse(TINY)
PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"PATH": PYTHON, "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)  # these nets are too small for more


def settings(**changes):
    return argparse.Namespace(**vars(SETTINGS) | changes)


def tensor(*values):
    return torch.tensor(values)


def gan(width=4, size=16, channels=1, seed=0):
    torch.manual_seed(seed)
    return pk.GAN(size, channels, width, 10)


def images(n=4, size=16, channels=1):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def weights(net):
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unwatched(stage, gan, images_per_second):
    pass


def train(net, x, epochs=1, **changes):
    s = settings(**changes)
    pk.train_gan(net, x, s, epochs=epochs, lr=1e-3, stage="test", watch=unwatched)


def distill(teacher, student, x, joint, epochs=1, **changes):
    s = settings(**changes)
    pk.distill(teacher, student, x, s, epochs=epochs, joint=joint, stage="test", watch=unwatched)


# ==================================================================================================
# THE METHOD: losses, networks, which update touches what, the stages, the score
# ==================================================================================================


@pytest.mark.parametrize(
    "value, by_hand",
    [
        (pk.discriminator_loss(tensor(0.0), tensor(0.0)), math.log(2)),
        (
            pk.discriminator_loss(tensor(3.0), tensor(0.0)),
            (math.log(1 + math.exp(-3)) + math.log(2)) / 2,
        ),
        (
            pk.discriminator_loss(tensor(0.0), tensor(3.0)),
            (math.log(2) + math.log(1 + math.exp(3))) / 2,
        ),
        (pk.adversarial_loss(tensor(1.0, 2.0), tensor(1.0, 0.0)), 2),
        (pk.contextual_loss(tensor(1.0, -1.0), tensor(0.0, 1.0)), 1.5),
        (pk.latent_loss(tensor(1.0, 1.0), tensor(0.0, -1.0)), 2.5),
        (pk.latent_distillation_loss(tensor(1.0), tensor(0.0), tensor(1.0), tensor(3.0)), 5),
        (pk.adversarial_distillation_loss(tensor(1.0, 2.0), tensor(0.0, 2.0)), 0.5),
    ],
)
def test_loss_by_hand(value, by_hand):
    assert value.item() == pytest.approx(by_hand, abs=1e-6)


def test_attention_maps_by_hand():
    h = tensor([[1.0, 2.0]], [[1.0, 0.0]])[None]  # one image, two channels of 1 x 2
    q = tensor(1.0, 2.0) / 5**0.5
    assert torch.allclose(pk.attention_maps([h]), q)
    more = 7 * h.repeat(1, 3, 1, 1)  # neither the number of channels nor the scale counts
    small = torch.full((1, 1, 1, 1), 5.0)
    expected = torch.cat([q, q, torch.ones(1)]) / 3**0.5
    assert torch.allclose(pk.attention_maps([h, more, small]), expected)


def test_intermediate_distillation_by_hand():
    left, right = tensor([[5.0, 0.0]])[None], tensor([[0.0, 1.0]], [[0.0, 3.0]])[None]

    def loss(hidden_t, hidden_s, *x_hats):  # the maps are Q = [1, 0] and [0, 1]
        maps = pk.attention_maps(hidden_t), pk.attention_maps(hidden_s)
        return pk.intermediate_distillation_loss(*maps, *x_hats).item()

    assert loss([left], [right], tensor(1.0), tensor(0.5)) == pytest.approx(2.5)
    mean_over_blocks = loss([left, left], [right, left], tensor(1.0), tensor(1.0))
    assert mean_over_blocks == pytest.approx(1)


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 3), (64, 1)])
def test_shapes(size, channels):
    net, x = gan(3, size, channels), images(2, size, channels)
    out = net.g(x)
    halves = [size // 2 ** (i + 1) for i in range(int(math.log2(size)) - 2)]
    assert out.z.shape == out.z_hat.shape == (2, 10) and out.x_hat.shape == x.shape
    hidden = net.g.encode(x)[1] + net.g.decode(out.z[..., None, None])[1]
    assert [h.shape[2] for h in hidden] == halves + halves[::-1] and halves[-1] == 4
    assert out.q is None and torch.equal(net.g(x, maps=True).q, pk.attention_maps(hidden))
    logit, features = net.d(x)
    assert logit.shape == (2, 1) and out.x_hat.abs().max() <= 1
    assert features[-1].shape == (2, pk.block_widths(size, 3)[-1], 4, 4)
    for code in (out.z, out.z_hat):
        assert torch.allclose(code.norm(dim=1), torch.tensor(10.0).sqrt())


def test_upsample_is_dcgans_transposed_convolution():
    up, x = pk.upsample(3, 2), torch.randn(2, 3, 5, 5)
    by_window = up[0].weight.view(2, 2, 2, 3, 2, 2)  # (c_out, sub-pixel, c_in, window), 2 x 2 each
    kernel = by_window.permute(3, 0, 4, 1, 5, 2).flip(2, 4).reshape(3, 2, 4, 4)
    expected = F.conv_transpose2d(x, kernel, stride=2, padding=1)
    assert torch.allclose(up(x), expected, atol=1e-6)


@pytest.mark.parametrize("width", [3, 128])
def test_no_pixel_is_saturated_before_training(width):
    """tanh passes no gradient there: with nn.ConvTranspose2d's initial weights a wide teacher kept
    white dots for good."""
    x_hat = gan(width, 32).g(images(8, 32)).x_hat
    assert (x_hat.abs() > 0.99).float().mean() < 1e-3


def test_norm_is_that_of_a_batch_of_one():
    norms = [m for m in gan().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 5  # two blocks a net, less those at images
    assert {name for name, _ in gan().named_buffers()} == {"mean", "white"}  # of the score alone
    for norm in norms:
        x = torch.randn(3, norm.num_channels, 4, 4)
        alone = [F.batch_norm(image[None], None, None, training=True) for image in x]
        assert torch.allclose(norm(x), torch.cat(alone), atol=1e-5)


def test_training_computes_convolutions_alone_in_bfloat16():
    net, x, seen = gan(), images(2), []

    def losses(i):
        seen.append(net.g(x[i]))
        seen.append(net.g.encode(x[i])[1])
        return pk.gan_losses(net, x[i], seen[0], SETTINGS)

    pk.fit({net: 1e-3}, losses, x, SETTINGS, 1, "test", unwatched)
    out = seen[0]
    with torch.autocast("cpu", torch.bfloat16):
        logit, features = net.d(x)
        adv = pk.adversarial_loss(features[-1], features[-1])
        given = (out.z, out.x_hat, out.z_hat, logit, adv, pk.attention_maps(features))
    assert {t.dtype for t in given} == {torch.float32}
    bf16 = pk.native_bf16("cpu")
    assert seen[1][0].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert net.g.encode(x)[1][0].dtype == torch.float32


@pytest.mark.parametrize("dataset, ratio", [("cifar10", 24.45), ("mnist", 311.11), ("fmnist", 700)])
def test_default_widths_reach_the_papers_ratios(dataset, ratio, monkeypatch):
    monkeypatch.setattr(pk.timeit, "repeat", lambda *_, **__: [1.0] * 11)  # only counting here
    s, channels = pk.parse(["--dataset", dataset]), 3 if dataset == "cifar10" else 1
    x = torch.zeros(1, channels, s.size, s.size)
    widths = s.teacher_width, s.student_width
    teacher, student = (pk.cost(pk.GAN(s.size, channels, w, s.z_dim), x) for w in widths)
    assert teacher["flops"] / student["flops"] >= ratio and teacher["params"] > student["params"]


@pytest.mark.parametrize("teacher", [32, 64, 128])
def test_a_folders_student_is_at_least_fifty_times_cheaper(teacher, monkeypatch):
    monkeypatch.setattr(pk.timeit, "repeat", lambda *_, **__: [1.0] * 11)
    s = pk.parse(["--dataset", "folder", "--teacher-width", str(teacher)])
    x, widths = torch.zeros(1, 3, 32, 32), (s.teacher_width, s.student_width)
    flops = [pk.cost(pk.GAN(32, 3, width, s.z_dim), x)["flops"] for width in widths]
    assert flops[0] / flops[1] >= 50


def test_flops_by_hand():
    # one 4x4 convolution, 16x16 -> 8x8, 1 -> 1 channels: 2 * 16 * 64 operations; others likewise
    size, z = 16, 10
    encoder = 2 * 16 * (64 * 1 + 16 * 2) + 2 * 16 * 2 * z  # 1 -> 1 -> 2 -> z
    decoder = 2 * 16 * (z * 2 + 25 * 2 + 81 * 1)  # z -> 2 -> 1 -> 1, windows (4 + 1)^2, (8 + 1)^2
    discriminator = 2 * 16 * (64 * 1 + 16 * 2) + 2 * 16 * 2
    costs = pk.cost(gan(1, size), torch.zeros(300, 1, size, size))
    assert costs["flops"] == 2 * encoder + decoder + discriminator
    assert costs["MB"] == 4e-6 * sum(p.numel() for p in gan(1, size).g.parameters())
    assert 0 < costs["us_256"] < costs["us_1"]  # per image


def test_losses_are_weighted_sums_and_features_ds_last_block():
    t, s, x = gan(4), gan(2), images()
    w = settings(w_adv=2.0, w_con=3.0, w_lat=5.0, kd_inter=7.0, kd_latent=11.0, kd_adv=13.0)
    out_t, out_s = t.g(x, maps=True), s.g(x, maps=True)
    real, fake, of_t = s.d(x), s.d(out_s.x_hat), s.d(out_t.x_hat)
    loss_d, loss_g = pk.gan_losses(s, x, out_s, w)
    assert torch.allclose(loss_d, pk.discriminator_loss(real[0], fake[0]))
    adv, con = pk.adversarial_loss(real[1][-1], fake[1][-1]), pk.contextual_loss(x, out_s.x_hat)
    assert torch.allclose(loss_g, 2 * adv + 3 * con + 5 * pk.latent_loss(out_s.z, out_s.z_hat))
    loss_d, loss_g = pk.distillation_losses(s, out_t, out_s, w)
    assert torch.allclose(loss_d, 13 * pk.discriminator_loss(of_t[0], fake[0]))
    inter = pk.intermediate_distillation_loss(out_t.q, out_s.q, out_t.x_hat, out_s.x_hat)
    latent = pk.latent_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
    adv = pk.adversarial_distillation_loss(of_t[1][-1], fake[1][-1])
    assert torch.allclose(loss_g, 7 * inter + 11 * latent + 13 * adv)


def scale_losses(monkeypatch, of_d, of_g):
    """From here on, the losses that fit() is given are multiplied."""
    fit = pk.fit

    def scaled_fit(rates, losses, *rest, **how):
        def scaled(i):
            loss_d, loss_g = losses(i)
            return of_d * loss_d, of_g * loss_g

        fit(rates, scaled, *rest, **how)

    monkeypatch.setattr(pk, "fit", scaled_fit)


@pytest.mark.parametrize("case", ["alone", "step 1", "joint"])
@pytest.mark.parametrize("net", ["d", "g"])
def test_each_loss_moves_its_own_nets_alone(net, case, monkeypatch):
    """With the other loss times zero: what has a gradient at all, and what one update changes."""
    teacher, student = gan(4), gan(2)
    nets = {"t.g": teacher.g, "t.d": teacher.d, "s.g": student.g, "s.d": student.d}
    before = {name: weights(part) for name, part in nets.items()}
    share = {"d": (1, 0), "g": (0, 1)}[net]
    scale_losses(monkeypatch, *share)
    if case == "alone":
        train(student, images())
    else:
        distill(teacher, student, images(), case == "joint")
    moved = {name for name, part in nets.items() if not same(before[name], weights(part))}
    assert moved == ({f"t.{net}", f"s.{net}"} if case == "joint" else {f"s.{net}"})
    trained = {"s.d", "s.g"} | ({"t.d", "t.g"} if case == "joint" else set())
    assert {
        n for n, part in nets.items() if any(p.grad is not None for p in part.parameters())
    } == trained


def test_both_gradients_are_taken_before_either_net_moves(monkeypatch):
    """They stay in p.grad after an update, and are those of the losses of the nets as they were."""
    monkeypatch.setattr(pk, "native_bf16", lambda kind: False)
    net, x = gan(), images(1)
    expected = {}
    losses = pk.gan_losses(net, x, net.g(x), SETTINGS)
    for part, loss in zip((net.d, net.g), losses, strict=True):
        grads = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
        expected |= dict(zip(part.parameters(), grads, strict=True))
    before = weights(net)
    for lr, epochs in ((0.0, 3), (1e-3, 1)):  # nothing is left of an earlier update
        pk.train_gan(net, x, SETTINGS, epochs=epochs, lr=lr, stage="test", watch=unwatched)
        assert all(torch.allclose(p.grad, expected[p]) for p in net.parameters())
        assert same(before, weights(net)) == (lr == 0)


def test_step_1_learns_from_the_teacher_alone():
    """A GAN's own weights are of no effect, and the teacher is frozen."""
    teacher, ends = gan(4), []
    before = weights(teacher)
    for own in (0.0, 100.0):
        student = gan(2)
        distill(teacher, student, images(), False, w_adv=own, w_con=own, w_lat=own)
        ends.append(weights(student))
    assert same(*ends) and same(before, weights(teacher))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_step_1_asks_the_frozen_teacher_once_for_each_image(monkeypatch):
    """And what it made of an image is compared with what the student makes of the same one."""
    monkeypatch.setattr(pk, "native_bf16", lambda kind: False)
    teacher, student, x, asked = gan(4), gan(2), images(10), []
    teacher.g.register_forward_hook(lambda net, given, out: asked.extend(given[0]))
    fit = pk.fit

    def compared(rates, losses, *rest, **how):
        i = tensor(7, 2, 2)
        made = teacher.g(x[i], maps=True), student.g(x[i], maps=True)
        expected = pk.distillation_losses(student, *made, SETTINGS)
        assert torch.allclose(torch.stack([*losses(i)]), torch.stack(expected), rtol=1e-4)
        asked.clear()
        fit(rates, losses, *rest, **how)

    distill(teacher, student, x, False, epochs=3)
    assert len(asked) == 10 and all(map(torch.equal, asked, x))
    distill(teacher, student, x, True, epochs=3)
    assert len(asked) == 40
    monkeypatch.setattr(pk, "fit", compared)
    distill(teacher, student, x, False)
    assert asked == []


def joint_end(**changes):
    """Teacher and student after one joint update, with some settings changed."""
    teacher, student = gan(4), gan(2)
    distill(teacher, student, images(), True, **changes)
    return weights(teacher), weights(student)


def test_distillation_gradient_reaches_the_student_only():
    strong = joint_end(kd_inter=100.0, kd_latent=100.0, kd_adv=100.0)
    none = joint_end(kd_inter=0, kd_latent=0, kd_adv=0)
    assert same(strong[0], none[0]) and not same(strong[1], none[1])


@pytest.mark.parametrize("weight", ["w_adv", "w_con", "w_lat", "kd_inter", "kd_latent", "kd_adv"])
def test_every_weight_has_an_effect(weight):
    assert not same(joint_end()[1], joint_end(**{weight: 123.0})[1])


def test_kd_adv_weighs_in_the_discriminators_loss():
    """Jointly it has another loss beside it; in step 1 Adam cancels the weight of the only one."""
    d = [joint_end(kd_adv=kd_adv) for kd_adv in (0.1, 123.0)]
    d_student, d_teacher = (
        [{name: w for name, w in end[i].items() if name.startswith("d.")} for end in d]
        for i in (1, 0)
    )
    assert not same(*d_student) and same(*d_teacher)


def test_discriminator_is_trained_to_tell_real_from_fake():
    net, x = gan(), images(16)
    train(net, x, epochs=30)
    real, fake = (net.d(batch)[0] for batch in (x, net.g(x).x_hat))
    assert real.mean() > 0.3 > -0.3 > fake.mean()


def test_students_discriminator_learns_to_tell_teachers_from_students(monkeypatch):
    teacher, student, x = gan(4), gan(2), images(16)
    scale_losses(monkeypatch, 1, 0)
    distill(teacher, student, x, False, epochs=100)
    of_t, of_s = (student.d(net.g(x).x_hat)[0] for net in (teacher, student))
    assert of_t.mean() > 0.5 > -0.5 > of_s.mean()


class Noted(torch.optim.Adam):
    """Adam that notes the learning rates of each step, and itself."""

    rates, latest = [], None

    def step(self, *args):
        Noted.rates.append([group["lr"] for group in self.param_groups])
        Noted.latest = self
        return super().step(*args)


def fitted(monkeypatch, rates, x, epochs=1, **changes):
    """(all images, learning rates) of the updates of fit()."""
    shown, first = [], next(iter(rates))

    def losses(i):
        shown.append(x[i])
        nothing = [0 * sum(p.sum() for p in net.parameters()) for net in (first.d, first.g)]
        return nothing

    Noted.rates.clear()
    monkeypatch.setattr(torch.optim, "Adam", Noted)
    pk.fit(rates, losses, x, settings(**changes), epochs, "test", unwatched)
    return torch.cat(shown), list(Noted.rates)


def test_adam_has_dcgans_betas_and_a_rate_for_each_gan(monkeypatch):
    teacher, student = gan(4), gan(2)
    fitted(monkeypatch, {teacher: 0.5, student: 0.25}, images())
    groups = Noted.latest.param_groups
    assert [(group["max_lr"], group["betas"]) for group in groups] == [
        (0.5, (0.5, 0.999)),
        (0.25, (0.5, 0.999)),
    ]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(list(teacher.parameters())) + len(list(student.parameters()))


def test_learning_rate_warms_up_and_falls_to_zero(monkeypatch):
    _, rates = fitted(monkeypatch, {gan(1): 1.0}, images(10), epochs=4, batch=1)
    rates = [rate for (rate,) in rates]
    assert len(rates) == 40 and rates[0] < 0.1 and rates[39] < 0.01
    assert max(rates) == rates[5] == 1.0
    assert rates[22] == pytest.approx(0.5, rel=1e-3)  # the middle of a cosine
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_few_images_make_longer_epochs(monkeypatch):
    assert pk.parse(["--dataset", "folder"]).epoch_images == 4000
    x = images(3)
    seen, _ = fitted(monkeypatch, {gan(1): 1.0}, x, epoch_images=100, batch=64)
    counts = [sum(torch.equal(a, b) for b in seen) for a in x]
    assert counts == [33, 33, 33]


def test_a_stage_of_no_epochs_changes_nothing():
    net = gan()
    before = weights(net)
    train(net, images(), epochs=0)
    assert same(before, weights(net))


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A whole run on digits with --ablation: per stage the nets before and after, and what the
    stage saw."""
    stages, fit = {}, pk.fit

    def trace(train):
        def traced_train(*gans, x, args, stage, **how):
            note = stages[stage] = {"how": how, "batches": [], "rates": []}
            note["before"] = [weights(g) for g in gans]
            train(*gans, x=x, args=args, stage=stage, **how)
            note["after"] = [weights(g) for g in gans]

        return traced_train

    def traced_fit(rates, losses, x, args, epochs, stage, watch):
        def traced_losses(i):
            stages[stage]["batches"].append(x[i])
            return losses(i)

        Noted.rates.clear()
        fit(rates, traced_losses, x, args, epochs, stage, watch)
        stages[stage]["rates"] = list(Noted.rates)

    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "train_gan", trace(pk.train_gan))
        patch.setattr(pk, "distill", trace(pk.distill))
        patch.setattr(pk, "fit", traced_fit)
        patch.setattr(torch.optim, "Adam", Noted)
        result = pk.run(pk.parse([*TINY, "--normal", "3", "--ablation", "--out", str(out)]))
    return stages, result, out


def test_step_1_leaves_the_teacher_bit_identical(traced):
    step1, teacher = traced[0]["step1"], traced[0]["teacher"]
    assert same(step1["before"][0], step1["after"][0]) and step1["how"]["joint"] is False
    assert same(step1["before"][0], teacher["after"][0])
    assert not same(step1["before"][1], step1["after"][1])


def test_step_2_trains_both_from_where_they_stand(traced):
    step1, step2 = traced[0]["step1"], traced[0]["step2"]
    assert all(same(a, b) for a, b in zip(step1["after"], step2["before"], strict=True))
    assert not any(same(a, b) for a, b in zip(step2["before"], step2["after"], strict=True))
    assert step2["how"]["joint"] is True


def test_student_alone_step_1_and_rival_start_equal_and_see_the_same(traced):
    stages = traced[0]
    names = ("student_alone", "step1", "step2", "joint_only")
    alone, step1, step2, rival = (stages[name] for name in names)
    assert same(alone["before"][0], step1["before"][1])
    assert same(alone["before"][0], rival["before"][1])
    assert same(stages["teacher"]["before"][0], rival["before"][0])
    for a, b in zip(alone["batches"], rival["batches"], strict=True):
        assert torch.equal(a, b)
    for step in step1, step2:  # each begins with the first epoch's order
        assert all(map(torch.equal, step["batches"], alone["batches"]))
    assert len(step1["batches"]) + len(step2["batches"]) == len(alone["batches"])


def test_an_epoch_is_every_image_once_in_a_new_order(traced):
    x, *_ = pk.load_task(pk.parse([*TINY, "--normal", "3"]), "cpu")
    batches = traced[0]["teacher"]["batches"]
    half = len(batches) // 2
    epochs = [torch.cat(batches[:half]), torch.cat(batches[half:])]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(map(bytes_of, epoch)) == sorted(map(bytes_of, x))


def bytes_of(image):
    return image.contiguous().numpy().tobytes()


def test_learning_rates_of_the_stages(traced):
    s, stages = SETTINGS, traced[0]
    teacher, student = s.lr_teacher / s.teacher_width, s.lr_student
    peaks = {name: torch.tensor(stage["rates"]).max(0).values for name, stage in stages.items()}
    shares = {"teacher": [teacher], "student_alone": [student], "step1": [student]}
    shares |= {"step2": [s.lr_step2 * student, s.lr_step2_teacher * teacher]}
    shares |= {"joint_only": [student, teacher]}
    for name, expected in shares.items():
        assert torch.allclose(peaks[name], torch.tensor(expected), rtol=0.25), name
        assert len(peaks[name]) == len(expected)


def whitened(net, x):
    """The net with the whitening of images x."""
    net.mean, net.white = pk.whitening(net, x)
    return net


@pytest.mark.parametrize("kind", ["plain", "whitened"])
def test_score_depends_on_the_image_alone(kind):
    x = images(300)
    net = whitened(gan(), x) if kind == "whitened" else gan()
    scores = pk.score(net.train(), x)
    assert torch.equal(scores, pk.score(net.eval(), x))  # there is nothing that the mode changes
    order = torch.randperm(300)
    assert scores.std() > 0 and scores.dtype == torch.float32
    assert torch.allclose(pk.score(net, x[order]), scores[order], rtol=1e-5)
    alone = torch.cat([pk.score(net, image[None]) for image in x[:20]])
    assert torch.allclose(alone, scores[:20], rtol=1e-5)
    assert torch.allclose(pk.score(net, x[250:]), scores[250:], rtol=1e-5)


def test_plain_score_is_the_distance_of_the_codes():
    net, x = gan(), images(2)
    out = net.g(x)
    assert torch.allclose(pk.score(net, x), (out.z - out.z_hat).square().sum(1).sqrt())


def test_whitened_score_is_the_mahalanobis_length_of_the_residual():
    net, x = gan(), images(400)
    r = pk.in_parts(net.residual, x).double()
    m, inverse = r.mean(0), torch.linalg.inv(torch.cov(r.T, correction=0))
    by_hand = torch.stack([((v - m) @ inverse @ (v - m)).sqrt() for v in r])
    scores = pk.score(whitened(net, x), x)
    assert torch.allclose(scores.double(), by_hand, rtol=0.1)  # the covariance is shrunk a little
    assert torch.corrcoef(torch.stack([scores.double(), by_hand]))[0, 1] > 0.99
    assert scores.square().mean().item() == pytest.approx(10, rel=0.1)  # unit variance, z_dim 10


def test_whitening_does_without_more_images_than_dimensions():
    scores = pk.score(whitened(gan(), images(5)), images(50))
    assert scores.isfinite().all() and scores.std() > 0


def test_whitening_of_directions_that_hardly_vary(monkeypatch):
    """Found on CIFAR-10's cats: inverted in float32, such a covariance has no root."""
    r = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    r[:, 1:] *= 1e-3
    monkeypatch.setattr(pk, "in_parts", lambda f, x: r)
    mean, white = pk.whitening(gan(1), None)
    assert white.dtype == mean.dtype == torch.float32
    assert ((r - mean) @ white).std(0)[0].item() == pytest.approx(1, abs=0.05)


def test_auroc_is_in_percent_with_anomalies_high_plain_and_whitened(monkeypatch):
    """One residual of two numbers an image: the first is large on training images, too."""
    y = tensor(0, 0, 1, 1)
    monkeypatch.setattr(pk, "in_parts", lambda f, x: x)
    rng = torch.Generator().manual_seed(0)
    train = torch.randn(1000, 2, generator=rng) * tensor(10.0, 0.1)
    test = tensor([9.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 1.0])
    plain, white = pk.auroc(gan(1), train, test, y)
    assert plain == pytest.approx(50) and white == pytest.approx(100)
    assert pk.auroc(gan(1), train, test.flip(0), y)[1] == pytest.approx(0)
    with pytest.raises(ValueError, match="NaN"):
        pk.auroc(gan(1), train, test * math.nan, y)


def test_pca_knows_images_unlike_the_training_images():
    rng = torch.Generator().manual_seed(0)
    directions = torch.rand(3, 1, 32, 32, generator=rng)
    x, normal = (torch.randn(n, 3, generator=rng) for n in (100, 20))
    x, normal = (torch.einsum("ni,ichw->nchw", t, directions) for t in (x, normal))
    x_test = torch.cat([normal, torch.randn(20, 1, 32, 32, generator=rng)])
    y = (torch.arange(40) >= 20).long()
    assert pk.pca_auroc(x, x_test, y) == 100 and pk.pca_auroc(x, x_test, 1 - y) == 0


def test_p_values_by_hand():
    calibration = tensor(1.0, 2.0, 2.0, 3.0)
    p = pk.p_values(tensor(0.0, 1.0, 1.5, 2.0, 3.0, 3.5), calibration)
    assert p.tolist() == [1, 1, 4 / 5, 4 / 5, 2 / 5, 1 / 5]  # exact: p <= alpha is right at alpha
    assert pk.p_values(tensor(2.5), tensor(1.0, 2.0, 3.0)) == 0.5
    assert pk.p_values(tensor(7.0), torch.zeros(0)) == 1


def test_p_values_of_ties_that_another_device_rounds_otherwise():
    calibration = torch.full((99,), 2.0)
    assert pk.p_values(tensor(2.0 * (1 + 1e-6)), calibration) == 1
    assert pk.p_values(tensor(2.0 * (1 + 1e-3)), calibration) == 0.01


# ==================================================================================================
# THE PROGRAM: data, bad input, files, scoring, run_all.sh, the README
# ==================================================================================================


def test_training_set_is_the_normal_class_and_the_test_set_everything():
    x, c, x_test, c_test, classes = pk.load_images("digits", None, 16)
    assert x.shape == (1198, 1, 16, 16) and x_test.shape == (599, 1, 16, 16)
    assert classes == list("0123456789")
    train, test, y, name = pk.load_task(pk.parse([*TINY, "--normal", "7"]), "cpu")
    assert name == "7" and train.dtype == torch.float32 and train.min() == -1
    assert torch.equal(train, x[c == 7] / 127.5 - 1) and torch.equal(test, x_test / 127.5 - 1)
    assert torch.equal(y == 0, c_test == 7)


def test_val_shares_no_image_with_training_and_test(monkeypatch):
    numbers = torch.arange(100.0).view(100, 1, 1, 1)  # images that are their own number
    c = torch.arange(100) % 5
    fake = numbers, c, numbers + 100, c, list("01234")
    monkeypatch.setattr(pk, "load_images", lambda *_: fake)
    tasks = [
        pk.load_task(settings(normal=n, val=True, seed=seed), "cpu") for n, seed in ("20", "31")
    ]
    for normal, (train, val, y, _) in zip((2, 3), tasks, strict=True):
        train, val = (((t + 1) * 127.5).round().flatten().tolist() for t in (train, val))
        assert len(val) == 10 and len(train) == 20 - (y == 0).sum()
        assert not set(val) & (set(train) | set(range(100, 200)))
        assert {n % 5 for n in train} == {normal}
        assert y.tolist() == [int(n % 5 != normal) for n in val]
    assert torch.equal(tasks[0][1], tasks[1][1])  # the same whatever class and seed


def write_idx(path, array):
    """The format of MNIST's files: 0 0, type 8 (uint8), dimensions, sizes (big-endian), bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.flatten().tolist()))


@pytest.mark.parametrize(
    "dataset, folder, normal, name",
    [
        ("mnist", "MNIST", "3", "3"),
        ("fmnist", "FashionMNIST", "Coat", "Coat"),
        ("fmnist", "FashionMNIST", "4", "Coat"),
    ],
)
def test_idx_files(dataset, folder, normal, name, tmp_path):
    pictures = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    pictures[4] = 255
    labels = torch.arange(20, dtype=torch.uint8) % 10
    for split in ("train", "t10k"):
        write_idx(tmp_path / folder / "raw" / f"{split}-images-idx3-ubyte", pictures)
        write_idx(tmp_path / folder / "raw" / f"{split}-labels-idx1-ubyte", labels)
    args = pk.parse(["--dataset", dataset, "--normal", normal, "--data", str(tmp_path)])
    x, x_test, y_test, got = pk.load_task(args, "cpu")
    assert got == name and x.shape == (2, 1, 32, 32) and x_test.shape == (20, 1, 32, 32)
    index = int(normal) if normal.isdigit() else 4
    assert y_test.tolist() == [int(label != index) for label in labels]
    assert (x_test[4] == 1).all() and x_test.min() < -0.7


def test_cifar10_pickles(tmp_path, monkeypatch):
    """The real archive's layout: five training batches and one of test, planes R, G, B by rows."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]

    def put(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    planes = [[255] * 1024 + [0] * 1024 + [128] * 1024] * 10  # red 255, green 0, blue 128
    planes = torch.tensor(planes, dtype=torch.uint8).numpy()
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = [put(file, {"data": planes, "labels": list(range(10))}) for file in files]
    meta = dict(zip(("filename", "md5"), put("batches.meta", {"label_names": names}), strict=True))
    cls = torchvision.datasets.CIFAR10  # checks md5 sums of the real files: here, of the small ones
    monkeypatch.setattr(cls, "train_list", batches[:5])
    monkeypatch.setattr(cls, "test_list", batches[5:])
    monkeypatch.setattr(cls, "meta", meta | {"key": "label_names"})
    args = pk.parse(["--dataset", "cifar10", "--normal", "cat", "--data", str(tmp_path)])
    x, _, y_test, name = pk.load_task(args, "cpu")
    assert name == "cat" and x.shape == (5, 3, 32, 32)
    assert y_test.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
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


def load_folder(root, normal="good"):
    flags = ["--dataset", "folder", "--data", str(root), "--size", "16", "--normal", normal]
    return pk.load_task(pk.parse(flags), "cpu")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_folder_as_of_mvtec(mode, tmp_path):
    x, x_test, y_test, name = load_folder(make_folder(tmp_path, mode))
    assert name == "good" and x.shape == (3, 3, 16, 16)  # grey, too: a defect may have a colour
    assert y_test.tolist() == [0, 0, 0, 1, 1, 1]
    assert x[:, 0, 3, 3].tolist() == pytest.approx([i * 40 / 127.5 - 1 for i in range(3)])
    assert torch.equal(x_test[:3], x)  # the same pictures: both splits are read alike


def test_folder_classes_are_matched_by_name(tmp_path):
    make_folder(tmp_path, classes=("good", "bent"))  # "bent" sorts before "good" in test
    _, _, y_test, name = load_folder(tmp_path, normal="0")
    assert name == "good" and y_test.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = (images(1, 16, 3)[0] + 1) / 2
    upright = TF.to_pil_image(pixels)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    a, b = (pk.read_image(tmp_path / f"{name}.png", 16) for name in ("upright", "turned"))
    assert torch.equal(a, b)


SCENARIOS = {}


def in_background(scenario):
    """A test that is all waiting for other processes: it runs beside the others, on another core."""
    SCENARIOS[scenario.__name__] = scenario
    return lambda background: background[scenario.__name__].result()


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    wanted = [item.name for item in request.session.items if item.name in SCENARIOS]
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(SCENARIOS[n], tmp_path_factory.mktemp(n)) for n in wanted}


NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def command(*flags, cwd, **options):
    """Run pkdgan.py in a process of its own."""
    env = ENVIRONMENT | NO_NETWORK | options.pop("env", {})
    call = [sys.executable, str(HERE / "pkdgan.py"), *flags]
    pipes = {"capture_output": True, "text": True, "timeout": 170}
    return subprocess.run(call, cwd=cwd, env=env, check=False, **pipes | options)


def result_of(stdout):
    return json.loads(stdout.splitlines()[-1].removeprefix("RESULT "))


@in_background
def test_default_command(tmp_path):
    """Fewer epochs than that of the README, which .ci/run runs as it is."""
    done = command("--epochs", "4", "--epochs1", "4", "--epochs2", "2", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    result = result_of(done.stdout)
    stages = {"teacher": 4, "student_alone": 6, "step1": 4, "step2": 2}
    assert set(result["auroc"]) == {*stages, "teacher_step2"}
    assert set(result["images_per_second"]) == set(stages)
    assert all(50 < value <= 100 for value in result["auroc"].values())
    for key in ("params", "flops", "MB", "us_1", "us_256"):
        assert result[key]["teacher"] > result[key]["student"] > 0
    assert {"dataset", "normal", "seed", "split", "images", "ratio", "seconds"} <= set(result)
    assert {"settings", "device", "versions", "version", "bf16"} <= set(result)
    assert set(result["auroc_whitened"]) == set(result["auroc"]) and result["curve"] == {}
    assert all(80 < value <= 100 for value in result["auroc_whitened"].values())
    assert set(result["l1"]) == {"teacher", "student", "median_image"}
    assert 90 < result["baselines"]["pca"] <= 100
    for stage, epochs in stages.items():
        lines = [s for s in done.stdout.splitlines() if re.match(rf"{stage} \d+/{epochs}:", s)]
        assert len(lines) == epochs
        assert all("images/s" in line and "s left" in line for line in lines)
    row = []
    for auroc in (result["auroc"], result["auroc_whitened"]):
        row += [f"{auroc['step2']:.2f}", f"{auroc['step2'] - auroc['student_alone']:+.2f}"]
    assert ["step2", *row] in map(str.split, done.stdout.splitlines())
    folder = tmp_path / "runs" / "digits-8-seed0"
    assert sorted(f.name for f in (tmp_path / "runs").rglob("*.*")) == [
        "result.json",
        "samples.png",
        "student.pt",
        "student.pt2",
        "teacher.pt",
    ]
    assert json.loads((folder / "result.json").read_text()) == result
    advice = re.search(r"to score images: python pkdgan.py --score '(.+)' ", done.stdout)[1]
    assert (tmp_path / advice).samefile(folder / "student.pt")


def test_result_and_files_are_of_the_same_nets(traced):
    _, result, out = traced
    folder = out / "digits-3-seed0"
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    _, x_test, y_test, _ = pk.load_task(pk.parse([*TINY, "--normal", "3"]), "cpu")
    x, *_ = pk.load_task(pk.parse([*TINY, "--normal", "3"]), "cpu")
    stages = traced[0]
    for file, key, i in (("student.pt", "step2", 1), ("teacher.pt", "teacher", 0)):
        net, _ = pk.load_gan(folder / file)
        both = [result["auroc"][key], result["auroc_whitened"][key]]
        assert pk.auroc(net, x, x_test, y_test) == both
        white = 100 * metrics.roc_auc_score(y_test, pk.score(net, x_test))
        assert white == pytest.approx(both[1])  # what is saved scores by the whitened residual
        trained = stages[key]["after"][i]
        assert same(
            {k: v for k, v in net.state_dict().items() if "." in k},
            {k: v for k, v in trained.items() if "." in k},
        )
    normal = x_test[y_test == 0]
    x_hat = pk.in_parts(lambda part: net.g(part).x_hat, normal)
    median = x.median(0).values.expand_as(normal)
    assert result["l1"]["teacher"] == pytest.approx(F.l1_loss(x_hat, normal).item())
    assert result["l1"]["median_image"] == pytest.approx(F.l1_loss(median, normal).item())


def test_students_of_a_teacher_that_is_there(traced, tmp_path, monkeypatch, capsys):
    """--teacher gives the very run that trained the teacher, whatever seed made it; the curve's
    last points are the result's."""
    _, result, out = traced
    flags = [*TINY, "--normal", "3", "--out", str(tmp_path)]
    stages, train_gan = [], pk.train_gan
    monkeypatch.setattr(
        pk,
        "train_gan",
        lambda *a, stage, **k: (stages.append(stage), train_gan(*a, stage=stage, **k)),
    )
    for teacher in (out, out / "digits-3-seed0" / "teacher.pt"):
        again = pk.run(pk.parse([*flags, "--teacher", str(teacher), "--curve"]))
        rival = {"joint_only": result["auroc"]["joint_only"]}
        assert again["auroc"] | rival == result["auroc"] and stages == ["student_alone"]
        stages.clear()
        epochs = {"student_alone": 3, "step1": 2, "step2": 1}
        assert {stage: len(points) for stage, points in again["curve"].items()} == epochs
        for stage, points in again["curve"].items():
            assert points[-1] == [again["auroc"][stage], again["auroc_whitened"][stage]]
    alone = pk.run(pk.parse([*flags, "--epochs1", "0", "--epochs2", "0"]))  # a teacher and no more
    assert alone["auroc"]["teacher"] == result["auroc"]["teacher"]
    assert list(alone["images_per_second"]) == ["teacher"]
    capsys.readouterr()
    assert exit_code(*flags, "--teacher", str(tmp_path / "none")) == 1
    assert "none is no whole" in capsys.readouterr().err
    assert exit_code(*flags, "--teacher", str(out), "--z-dim", "7") == 1
    pk.run(pk.parse([*flags, "--teacher", str(out), "--no-whiten"]))
    net, _ = pk.load_gan(tmp_path / "digits-3-seed0" / "teacher.pt")
    assert not net.mean.any()  # that of the file was whitened


def test_no_whiten_leaves_the_papers_plain_score(tmp_path):
    s = pk.parse([*TINY, "--no-whiten", "--out", str(tmp_path)])
    result = pk.run(s)
    net, _ = pk.load_gan(tmp_path / "digits-0-seed0" / "student.pt")
    _, x_test, y_test, _ = pk.load_task(s, "cpu")
    plain = 100 * metrics.roc_auc_score(y_test, pk.score(net, x_test))
    assert plain == pytest.approx(result["auroc"]["step2"]) and not net.mean.any()


def test_equal_seeds_give_equal_results(tmp_path):
    def flags(name):
        return [*TINY, "--normal", "3", "--seed", name[1], "--out", str(tmp_path / name)]

    a = result_of(command(*flags("a0"), cwd=tmp_path).stdout)["auroc"]  # in a process of its own
    b, c = (pk.run(pk.parse(flags(name)))["auroc"] for name in ("b0", "c1"))
    assert a == b and a != c
    nets = [pk.load_gan(tmp_path / n / "digits-3-seed0" / "student.pt")[0] for n in ("a0", "b0")]
    assert same(*map(weights, nets))


def bad_folder(root, part):
    """A folder of images with one thing wrong."""
    file = make_folder(root) / "train" / "good" / "1.png"
    if part == "image":
        file.write_bytes(b"no image")
    elif part == "16 bits":
        Image.new("I;16", (40, 30), 5000).save(file)
    elif part == "truncated":
        file.write_bytes(file.read_bytes()[:60])
    else:
        (root / part).rename(root / "elsewhere")


FOLDER = ["--dataset", "folder", "--data"]
BAD_INPUT = [  # exit code, words of the message, flags
    (2, ["nosuch", "digits", "mnist", "fmnist", "cifar10", "folder"], ["--dataset", "nosuch"]),
    (2, ["cat", "0", "9"], ["--normal", "cat"]),
    (2, ["10", "0", "9"], ["--normal", "10"]),
    (2, ["--size", "16, 32, 64"], ["--size", "24"]),
    (2, ["--size", "16, 32, 64"], ["--size", "1073741824"]),
    (1, ["foreign/digits-8-seed0/teacher.pt"], ["--teacher", "foreign"]),
    (1, ["teacher", "--lr-"], ["--lr-teacher", "nan"]),
    (2, ["--what"], ["--what"]),
    (1, ["nosuch"], ["--device", "nosuch"]),
    (1, ["MNIST in empty", "online"], ["--dataset", "mnist", "--data", "empty"]),
    (1, ["CIFAR10 in empty", "online"], ["--dataset", "cifar10", "--data", "empty"]),
    (1, ["MNIST in broken", "delete"], ["--dataset", "mnist", "--data", "broken"]),
    (1, ["empty/train"], [*FOLDER, "empty"]),
    (1, ["without test/test"], [*FOLDER, "without test"]),
    (2, ["missing", "good"], [*FOLDER, "folder", "--normal", "missing"]),
    (2, ["scratch", "good"], [*FOLDER, "folder", "--normal", "scratch"]),
    (2, ["no AUROC"], [*FOLDER, "folder", "--normal", "good", "--val"]),
    (1, ["bad image/train/good/1.png"], [*FOLDER, "bad image"]),
    (1, ["bad truncated/train/good/1.png"], [*FOLDER, "bad truncated"]),
    (1, ["bad 16 bits/train/good/1.png", "8 bits"], [*FOLDER, "bad 16 bits"]),
    (1, ["teacher 1/20", "overflow", "--lr-"], ["--lr-teacher", "1e25"]),
    (1, ["Not a directory", "a file"], ["--out", "a file"]),
    (1, ["/proc"], ["--out", "/proc"]),
    (2, ["test_size"], ["--holdout", "1"]),
    (1, ["memory"], ["--teacher-width", "1000000"]),
    (1, ["missing.pt", "No such file"], ["--score", "missing.pt", "folder"]),
]


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory):
    """A folder with all that BAD_INPUT speaks of."""
    root = tmp_path_factory.mktemp("bad")
    make_folder(root / "folder")
    (root / "empty").mkdir()
    for part in ("test", "image", "truncated", "16 bits"):
        bad_folder(root / (f"without {part}" if part == "test" else f"bad {part}"), part)
    raw, nothing = root / "broken" / "MNIST" / "raw", torch.zeros(5, 2, 2, dtype=torch.uint8)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            write_idx(raw / f"{split}-{kind}-ubyte", nothing)
    (root / "a file").write_text("")
    (root / "foreign").mkdir()
    return root


def exit_code(*flags):
    try:
        return pk.main(flags)
    except SystemExit as end:  # argparse
        return end.code


@pytest.mark.parametrize(
    "code, words, flags", BAD_INPUT, ids=[" ".join(row[2]) for row in BAD_INPUT]
)
def test_bad_input_gets_one_clear_line(code, words, flags, bad_input, monkeypatch, capsys):
    monkeypatch.chdir(bad_input)
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pk, "describe", None)  # none of these may come to the end of the training
    assert exit_code("--size", "16", *flags) == code
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1 and stderr.startswith("pkdgan.py: "), stderr
    assert all(word in stderr for word in words), stderr
    assert not [f for f in bad_input.rglob("*") if f.is_file() and "runs" in f.parts]


def files_in(folder):
    return sorted(f.name for f in folder.rglob("*") if f.is_file())


def test_disk_full_leaves_no_half_written_file(tmp_path):
    limit = 10_000  # bytes a file may have: less than a checkpoint
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    done = command(*TINY, cwd=tmp_path, **full)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(r"step2 +\d", done.stdout)  # the figures are not lost
    assert files_in(tmp_path / "runs") == []


def test_a_folder_that_cannot_be_written_is_noticed_before_the_training(
    tmp_path, monkeypatch, capsys
):
    def denied(dir):
        raise PermissionError(f"Permission denied: {dir}")

    monkeypatch.setattr(pk.tempfile, "TemporaryFile", denied)  # tests may run as root
    monkeypatch.setattr(pk, "train_gan", None)
    assert exit_code(*TINY, "--out", str(tmp_path)) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_results_do_not_depend_on_the_export(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no export with this torch")

    monkeypatch.setattr(torch.export, "export", broken)
    assert exit_code(*TINY, "--out", str(tmp_path)) == 1
    assert "no export" in capsys.readouterr().err
    assert files_in(tmp_path) == ["result.json", "samples.png", "student.pt", "teacher.pt"]


def start(*flags, cwd, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    call = [sys.executable, str(HERE / "pkdgan.py"), *TINY, *flags]
    return subprocess.Popen(call, cwd=cwd, **pipes, **options)


def test_ctrl_c_leaves_no_half_written_file(tmp_path):
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start("--epochs", "5000", cwd=tmp_path, **default)  # background jobs may ignore it
    while not process.stdout.readline().startswith("teacher 2/"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines() == ["pkdgan.py: interrupted; no result is half-written"]
    assert files_in(tmp_path / "runs") == []


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = start("--epochs", "5000", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and process.stderr.read() == ""


# --------------------------------------------------------------------------------------- --score


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits that holds images out: (its folder, the images trained on, x_test, y_test)."""
    out, seen, fit = tmp_path_factory.mktemp("trained"), [], pk.fit

    def spy(rates, losses, x, *rest, **how):
        seen.append(x)
        fit(rates, losses, x, *rest, **how)

    s = pk.parse([*TINY, "--holdout", "0.4", "--out", str(out)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, "fit", spy)
        pk.run(s)
    _, x_test, y_test, _ = pk.load_task(s, "cpu")
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen)
    return out / "digits-0-seed0", seen[0], x_test, y_test


def png(path, x):
    """Write an image (1, h, w) in [-1, 1]."""
    TF.to_pil_image((x + 1) / 2).save(path)
    return str(path)


def save_student(path, net, calibration):
    content = {"version": pk.VERSION, "form": net.form, "weights": net.state_dict()}
    torch.save(content | {"calibration": calibration}, path)
    return str(path)


def scored(stdout):
    """The lines of --score as lists."""
    header, *lines = stdout.splitlines()
    assert header == "path\tscore\tp-value\tverdict"
    return [line.split("\t") for line in lines]


def test_calibration_images_are_not_trained_on(trained):
    folder, x_seen, *_ = trained
    x, *_ = pk.load_task(SETTINGS, "cpu")
    seen = {bytes_of(image) for image in x_seen}
    held = torch.stack([image for image in x if bytes_of(image) not in seen])
    assert len(held) == math.ceil(0.4 * len(x)) and len(held) + len(seen) == len(x)
    for file in ("student.pt", "teacher.pt"):
        net, calibration = pk.load_gan(folder / file)
        assert torch.equal(calibration, calibration.sort().values)
        one_by_one = torch.cat([pk.score(net, image[None]) for image in held])
        assert torch.equal(calibration, one_by_one.sort().values)  # as --score does it
    assert [pk.parse(["--dataset", name]).holdout for name in ("mnist", "folder")] == [0, 0.1]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.5])
def test_false_alarms_stay_within_alpha(alpha, trained):
    folder, _, x_test, y_test = trained
    net, calibration = pk.load_gan(folder / "student.pt")
    p = pk.p_values(pk.score(net, x_test), calibration)
    alarms, n = p[y_test == 0] <= alpha, len(calibration)
    # the promise is of the mean over calibrations
    deviation = (alpha * (1 - alpha) * (1 / len(alarms) + 1 / n)) ** 0.5
    assert alarms.float().mean() <= alpha + 3 * deviation
    caught = (p[y_test == 1] <= alpha).float().mean()
    assert caught > 0.5 > alarms.float().mean() - alpha  # not vacuous


def test_scores_of_a_thousand_images_and_a_broken_one(trained, tmp_path, monkeypatch, capsys):
    folder, _, x_test, _ = trained
    (tmp_path / "in").mkdir()
    for i in range(1000):
        png(tmp_path / "in" / f"{i:04}.png", x_test[i % len(x_test)])
    (tmp_path / "in" / "0500.png").write_bytes(b"no image")
    alone = png(tmp_path / "x.png", x_test[7])
    student = str(folder / "student.pt")
    monkeypatch.chdir(tmp_path)
    assert pk.main(["--score", student, "in", alone, "--alpha", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert [line.partition(" cannot")[0] for line in err.splitlines()[2:]] == [
        "pkdgan.py: in/0500.png",
        "pkdgan.py: no images, or not all of these 1001 could be read",
    ]
    lines = scored(out)
    paths = [f"in/{i:04}.png" for i in range(1000) if i != 500]
    assert [line[0] for line in lines] == [*paths, alone]
    net, calibration = pk.load_gan(student)
    for path, value, p, verdict in lines[:40] + lines[-1:]:
        x = pk.read_image(tmp_path / path, 16)[None, :1] / 127.5 - 1
        by_itself = pk.score(net, x)
        assert float(value) == pytest.approx(by_itself.item(), rel=1e-4)
        expected = (calibration >= by_itself * (1 - 1e-5)).sum() + 1
        assert float(p) == pytest.approx(expected.item() / (len(calibration) + 1), abs=1e-4)
        assert verdict == ("anomaly" if float(p) <= 0.1 else "-")
    assert lines[-1][1:] == lines[7][1:] and len({line[1] for line in lines}) > 500


@pytest.mark.parametrize("n, verdict", [(18, "-"), (19, "anomaly")])
def test_verdict_at_alpha_itself(n, verdict, tmp_path, capsys):
    student = save_student(tmp_path / "student.pt", gan(2), torch.zeros(n))
    assert pk.main(["--score", student, png(tmp_path / "a.png", torch.zeros(1, 16, 16))]) == 0
    out, err = capsys.readouterr()
    assert scored(out)[0][3] == verdict and f"p >= 1 / {n + 1}" in err


def test_score_without_held_out_images_says_so(traced, tmp_path, capsys):
    x, *_ = pk.load_task(SETTINGS, "cpu")
    student = str(traced[2] / "digits-3-seed0" / "student.pt")
    assert pk.main(["--score", student, png(tmp_path / "a.png", x[0])]) == 0
    out, err = capsys.readouterr()
    assert scored(out)[0][2:] == ["1", "-"] and len(err.splitlines()) == 2 and "--holdout" in err
    assert pk.main(["--score", student]) == 1 and "no images" in capsys.readouterr().err


@pytest.mark.parametrize("channels, mode", [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_score_adapts_images_as_training_does(channels, mode, tmp_path, capsys):
    net = gan(2, 16, channels)
    student = save_student(tmp_path / "student.pt", net, torch.arange(99.0))
    colour = 200 if mode == "L" else (200,) * len(mode)
    Image.new(mode, (40, 30), colour).save(tmp_path / "a.png")
    assert pk.main(["--score", student, str(tmp_path / "a.png")]) == 0
    out, err = capsys.readouterr()
    expected = pk.score(net, torch.full((1, channels, 16, 16), 200 / 127.5 - 1)).item()
    assert float(scored(out)[0][1]) == pytest.approx(expected, rel=1e-4)
    assert ("colour" in err) == (channels == 1)


def test_colour_that_a_grey_student_drops_is_mentioned_once(tmp_path, capsys):
    student = save_student(tmp_path / "student.pt", gan(2), torch.arange(99.0))
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file in files:
        Image.new("RGB", (16, 16), (200, 0, 0)).save(file)
    assert pk.main(["--score", student, *files]) == 0
    out, err = capsys.readouterr()
    assert len(scored(out)) == 3 and err.count("colour") == 1


def test_file_names_of_any_characters(tmp_path, monkeypatch):
    student = save_student(tmp_path / "student.pt", gan(2), torch.arange(99.0))
    for name in ("b\u00e4r", "tab\there", "new\nline"):
        png(tmp_path / f"{name}.png", torch.zeros(1, 16, 16))
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding="ascii"))
    assert pk.main(["--score", student, str(tmp_path)]) == 0
    names = [Path(line[0]).name for line in scored(stdout.getvalue().decode("ascii"))]
    assert names == ["b\\xe4r.png", "new\\nline.png", "tab\\there.png"]


@pytest.mark.parametrize(
    "kind",
    [
        "foreign",
        "text",
        "cut short",
        "version",
        "a pickled object",
        "a flipped bit",
        "NaN",
        "shape",
    ],
)
def test_checkpoint_that_is_none(kind, trained, tmp_path, capsys):
    path, whole = tmp_path / "file.pt", (trained[0] / "student.pt").read_bytes()
    saved = torch.load(trained[0] / "student.pt", weights_only=True)
    nan = {name: value / 0 for name, value in saved["weights"].items()}
    middle = len(whole) // 2
    objects = {
        "foreign": {"weights": 1},
        "version": saved | {"version": pk.VERSION + 1},
        "a pickled object": argparse.Namespace(a=1),
        "NaN": saved | {"weights": nan},
        "shape": saved | {"calibration": torch.zeros(3, 3)},
    }
    raw = {
        "text": b"text",
        "cut short": whole[:middle],
        "a flipped bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    if kind in objects:
        torch.save(objects[kind], path)
    else:
        path.write_bytes(raw[kind])
    assert pk.main(["--score", str(path), "x.png"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and len(err) < 400
    assert "file.pt is no whole student.pt" in err


def test_exported_student_needs_torch_alone(trained, tmp_path):
    folder, _, x_test, _ = trained
    torch.save(x_test[:300], tmp_path / "x.pt")
    code = """
import sys, torch
detector = torch.export.load(sys.argv[1]).module()
x = torch.load("x.pt")
scores = [detector(x), detector(x[:1]), detector(x[:7])]
scores[0].numpy()  # no gradient
assert not [name for name in detector.state_dict() if name.startswith("d.")]
torch.save(scores, "scores.pt")
assert "pkdgan" not in sys.modules
"""
    call = [sys.executable, "-c", code, folder / "student.pt2"]
    subprocess.run(call, cwd=tmp_path, check=True, env=ENVIRONMENT)
    sizes = [(folder / name).stat().st_size for name in ("student.pt", "student.pt2")]
    assert sizes[1] < sizes[0] + 250_000  # code and weights, no test images
    expected = pk.score(pk.load_gan(folder / "student.pt")[0], x_test[:300])
    for scores in torch.load(tmp_path / "scores.pt"):
        assert torch.allclose(scores, expected[: len(scores)], rtol=1e-5, atol=1e-5)


def test_samples_show_the_first_of_either_kind(trained):
    folder, _, x_test, y_test = trained
    student, teacher = (pk.load_gan(folder / file)[0] for file in ("student.pt", "teacher.pt"))
    picture = TF.pil_to_tensor(Image.open(folder / "samples.png"))[0] / 127.5 - 1

    def shown(row, column):
        top, left = 2 + row * 18, 2 + column * 18
        return picture[top : top + 16, left : left + 16]

    normal, anomalies = (x_test[y_test == kind] for kind in (0, 1))
    for column, x in ((0, normal[0]), (7, normal[7]), (8, anomalies[0]), (15, anomalies[7])):
        for row, expected in enumerate((x, teacher.g(x[None]).x_hat, student.g(x[None]).x_hat)):
            assert torch.allclose(shown(row, column), expected.squeeze(), atol=0.02)


# ------------------------------------------------------------------------------------- run_all.sh

FAST = ["--size", "16", "--teacher-width", "4", "--student-width", "2"]
FAST += ["--epochs", "1", "--epochs1", "1", "--epochs2", "1"]
KILLABLE = ["--epochs", "9"]
NO_RESULT = ["missing"] * 5


def run_all(out, *flags, start=subprocess.run, cwd=None, script=HERE / "run_all.sh", **variables):
    """run_all.sh on digits, classes 0 and 1, in a session of its own."""
    env = ENVIRONMENT | {"DATASETS": "digits", "NORMALS": "0 1", "OUT": str(out)} | variables
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    own = {"cwd": cwd or out.parent, "env": env, "start_new_session": True}
    return start(["bash", str(script), *FAST, *flags], **pipes, **own)


def fake_result(out, normal, seed, *flags, dataset="digits", **auroc):
    """A result.json as a run of run_all() writes it, with given AUROCs."""
    task = ["--dataset", dataset, "--normal", str(normal), "--seed", str(seed)]
    folder = out / f"{dataset}-{normal}-seed{seed}"
    folder.mkdir(parents=True)
    auroc = {"teacher": 90, "student_alone": 80, "step1": 85, "step2": 88} | auroc
    result = {"settings": vars(pk.parse([*FAST, *flags, *task])), "auroc": auroc, "ratio": 9.5}
    result["auroc_whitened"] = {stage: value + 1 for stage, value in auroc.items()}
    result |= {"device": "cpu", "versions": {"torch": "2"}, "version": pk.VERSION}
    result |= {"bf16": pk.native_bf16("cpu"), "normal": str(normal), "split": "test"}
    (folder / "result.json").write_text(json.dumps(result))
    return folder / "result.json"


def change(file, **content):
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def rows(stdout):
    """{first cell: the others} of the tables in a text."""
    lines = [line.strip("| ").split("|") for line in stdout.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@in_background
def test_run_all_two_at_a_time_lists_what_failed_then_skips(tmp_path):
    out = tmp_path / "my runs"
    done = run_all(out, JOBS="2", NORMALS="99 0 1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"no result: .*digits-99-seed0.log: pkdgan.py: --normal 99: ", done.stderr)
    files = {n: out / f"digits-{n}-seed0" / "result.json" for n in "01"}
    table = rows(done.stdout)
    assert table["99"] == table["mean"] == [*NO_RESULT, "0 of 1"]
    for n, file in files.items():
        result, cells = json.loads(file.read_text()), []
        both = result["auroc"], result["auroc_whitened"]
        for key in ("teacher", "student_alone", "step1", "step2"):
            cells.append(" / ".join(f"{auroc[key]:.2f}" for auroc in both))
        cells.append(" / ".join(f"{a['step2'] - a['student_alone']:.2f}" for a in both))
        assert table[n] == [*cells, "1 of 1"]
        log = (out / f"digits-{n}-seed0.log").read_text()
        assert log.splitlines()[-1].startswith("RESULT ")
    assert "[3/3] " in done.stdout and "0 min left" in done.stdout
    logs = {log: log.stat().st_mtime_ns for log in out.glob("*.log")}
    again = run_all(out)
    assert "2 runs, 2 of them finished before" in again.stdout and again.returncode == 0
    assert again.stderr == "" and rows(again.stdout)["0"] == table["0"] and len(logs) == 3
    assert {log: log.stat().st_mtime_ns for log in out.glob("*.log")} == logs


@in_background
def test_run_all_killed_and_started_again(tmp_path):
    out = tmp_path / "runs"
    finished = fake_result(out, 0, 0, *KILLABLE)
    killed = run_all(out, *KILLABLE, start=subprocess.Popen)
    log = out / "digits-1-seed0.log"
    while not (log.exists() and "teacher 2/9" in log.read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = finished.stat().st_mtime_ns
    again = run_all(out, *KILLABLE)
    assert "2 runs, 1 of them finished before" in again.stdout and again.returncode == 0
    table = rows(again.stdout)
    assert table["0"][0] == "90.00 / 91.00" and table["1"][-1] == "1 of 1"
    assert finished.stat().st_mtime_ns == kept and log.read_text().count("RESULT") == 1


@in_background
def test_run_all_shares_out_a_slurm_array(tmp_path):
    out = tmp_path / "runs"

    def task(number, **array):  # array: of --array=3-7:2
        variables = {f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()}
        variables |= {"SLURM_ARRAY_TASK_ID": number, "NORMALS": "0 1 2 3 4"}
        return run_all(out, **variables)

    for n in "013":
        fake_result(out, n, 0)
    last = task("7", MIN="3", STEP="2", COUNT="3")
    assert last.returncode == 0 and [file.name for file in out.glob("*.log")] == [
        "digits-2-seed0.log"
    ]
    assert "1 runs, 0 of them" in last.stdout and not rows(last.stdout)  # no table of a share
    gap = task("7", MIN="3", COUNT="2")  # --array=3,7
    assert gap.returncode == 2 and "--array" in gap.stderr and len(gap.stderr.splitlines()) == 1


@in_background
def test_run_all_table_by_hand(tmp_path):
    out = tmp_path / "runs"
    for seed, alone, step2 in ((0, 80, 90), (1, 84, 92)):
        fake_result(out, 0, seed, student_alone=alone, step2=step2)
    fake_result(out, 1, 0, "--ablation", "--curve", student_alone=70, step2=60, joint_only=50)
    fake_result(out, 2, 0, "--kd-adv", "0.5")  # another experiment
    done = run_all(out, JOBS="0", NORMALS="0 1 2", SEEDS="0 1")
    table = rows(done.stdout)
    assert done.returncode == 1 and done.stderr == "" and "9.50 : 1" in done.stdout
    means = ["90.00 ± 0.00 / 91.00 ± 0.00", "82.00 ± 2.83 / 83.00 ± 2.83"]
    means += ["85.00 ± 0.00 / 86.00 ± 0.00", "91.00 ± 1.41 / 92.00 ± 1.41"]
    means += ["9.00 ± 1.41 / 9.00 ± 1.41"]
    assert table["0"] == [*means, "missing", "2 of 2"]
    row = [f"{value:.2f} / {value + 1:.2f}" for value in (90, 70, 85, 60)]
    assert table["1"] == [*row, "-10.00 / -10.00", "50.00 / 51.00", "1 of 2"]
    assert table["2"] == [*NO_RESULT, "missing", "0 of 2"]
    assert table["mean"] == table["2"]  # never the mean of those that there are
    assert run_all(out, JOBS="0", NORMALS="0 0 1").returncode == 0  # a class named twice is one
    table = rows(run_all(out, JOBS="0", SEEDS="0 1").stdout)
    row = [f"{value:.2f} / {value + 1:.2f}" for value in (90, 75, 85, 75)]
    assert table["mean"] == [*row, "0.00 / 0.00", "missing", "1 of 2"]
    table = rows(run_all(out, "--ablation", JOBS="0").stdout)  # a result without rival is none then
    assert table["0"] == [*NO_RESULT, "missing", "0 of 1"] and table["1"][5] == "50.00 / 51.00"


@in_background
def test_run_all_takes_no_result_of_another_version_or_precision(tmp_path):
    out = tmp_path / "runs"
    change(fake_result(out, 0, 0), version=pk.VERSION - 1)
    change(fake_result(out, 1, 0), bf16=not pk.native_bf16("cpu"))
    change(fake_result(out, 2, 0), auroc={})
    (out / "x-seed0").mkdir()
    (out / "x-seed0" / "result.json").write_text("[1]")
    table = rows(run_all(out, JOBS="0", NORMALS="0 1 2").stdout)
    assert table["0"] == table["2"] == [*NO_RESULT, "0 of 1"] and table["1"][-1] == "1 of 1"
    starting = run_all(out, start=subprocess.Popen)
    assert "2 runs, 0 of them finished before" in starting.stdout.readline()
    os.killpg(starting.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "flags, variables, words",
    [
        ([], {"DATASETS": "digits nosuch"}, ["nosuch", "fmnist"]),
        (["--seed", "5"], {}, ["--seed", "SEEDS"]),
        (["--normal=7"], {}, ["--normal", "NORMALS"]),
        (["--dataset", "mnist"], {}, ["--dataset", "DATASETS"]),
        (["--out", "other"], {}, ["--out", "OUT"]),
        ([], {"JOBS": "many"}, ["JOBS=many"]),
    ],
)
def test_run_all_starts_nothing_on_a_usage_error(flags, variables, words, tmp_path):
    done = run_all(tmp_path / "runs", *flags, **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stdout == "" and not (tmp_path / "runs").exists()


@in_background
def test_run_all_where_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_all(tmp_path / "file")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "file" in done.stderr


@in_background
def test_run_all_takes_folders_from_where_it_is_called(tmp_path):
    file = fake_result(tmp_path / "mine", "good", 0, "--data", "parts", dataset="folder")
    how = {"DATASETS": "folder", "cwd": tmp_path, "JOBS": "0"}
    done = run_all(Path("mine"), "--data", "parts", NORMALS="good", **how)
    assert file.exists() and done.returncode == 0 and "| parts, AUROC" in done.stdout


@in_background
def test_run_all_where_there_is_only_python3(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "date", "dirname", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "python3").write_text("#!/bin/bash\ncat >/dev/null; echo called $*")
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = run_all(tmp_path / "runs", JOBS="0", PATH=str(tmp_path / "bin"))
    assert done.stdout == " ".join(["called - table", *FAST]) + "\n" and done.stderr == ""


# -------------------------------------------------------------------------------------- the texts


def test_readme_names_what_there_is():
    readme = (HERE / "README.md").read_text()
    named = set(re.findall(r"`([a-z_]+)\(", readme))
    assert {name for name in named if not hasattr(pk, name)} == set()
    losses = {name for name in vars(pk) if name.endswith("_loss")}
    assert losses <= named and len(losses) == 7
    known = {"--" + name.replace("_", "-") for name in vars(SETTINGS)} | {"--array", "--help"}
    shell = {"--no-whiten", "--upgrade"}
    assert set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", readme)) <= known | shell


def test_help_names_every_flag(capsys):
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in pk.SETTINGS)
    assert "--no-whiten" in text and "SETTINGS" in text


def test_everything_public_has_a_docstring():
    for name, item in vars(pk).items():
        if getattr(item, "__module__", "") == "pkdgan":
            assert item.__doc__, name
