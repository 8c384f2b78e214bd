"""Tests of pkdgan.py and run_all.sh: offline, a minute on two cores, by `pytest`. First the method,
by values found by hand and code written a second time from the equations, then the program."""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # much here is exact on a CPU alone; before torch looks
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # more may wait for ever where a thread of pytest forks

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

import pkdgan as pk

HERE = Path(__file__).parent
FAST = ["--size", "16", "--teacher-width", "4", "--student-width", "2", "--epoch-images", "40"]
FAST += ["--epochs", "2", "--epochs1", "2", "--epochs2", "1"]  # digits with these: seconds
PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"PATH": PYTHON, "OMP_NUM_THREADS": "1"}
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
OWN = {"w_adv": 2.0, "w_con": 3.0, "w_lat": 5.0}
KD = {"kd_inter": 100.0, "kd_latent": 50.0, "kd_adv": 10.0}
torch.set_num_threads(1)  # these nets are too small for more


def tensor(*values):
    return torch.tensor(values)


def small_gan(width=4, size=16, channels=1, seed=0):
    torch.manual_seed(seed)
    return pk.GAN(size, channels, width, 10)


def teacher_and_student():
    return small_gan(4), small_gan(2)


def images(n=4, size=16, channels=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def tiny_settings(**changes):
    tiny = {"teacher_width": 4, "student_width": 2, "z_dim": 10, "batch": 4}
    tiny |= {"epochs": 2, "epochs1": 2, "epochs2": 1} | OWN | KD
    return SimpleNamespace(**vars(pk.DEFAULTS) | tiny | changes)


def fit_gans(losses, data, rates, *, epochs=1, epoch_images=1, batch=4, seed=0, report=print):
    order = {"epoch_images": epoch_images, "batch": batch, "seed": seed}
    pk.fit(losses, data, rates, epochs=epochs, report=report, **order)


def whitened(net, x):
    pk.whiten(net, x)
    return net


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    """To the last few bits of what an update of about 1e-3 makes of weights below 1."""
    return all(torch.allclose(a[name], b[name], rtol=1e-5, atol=2e-6) for name in a)


def python(*words, cwd, start=subprocess.run, **options):
    """A Python in a process of its own, without a network."""
    env = ENVIRONMENT | NO_NETWORK
    return start([sys.executable, *words], cwd=cwd, env=env, **PIPES, **options)


SCENARIOS = {}


def in_background(scenario):
    """A test that waits for other processes: it runs beside the others, and without torch here."""
    SCENARIOS[scenario.__name__] = scenario
    return lambda background: background[scenario.__name__].result() and None


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    wanted = [item.name for item in request.session.items if item.name in SCENARIOS]
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(SCENARIOS[n], tmp_path_factory.mktemp(n)) for n in wanted}


# ==================================================================================================
# THE METHOD: losses, networks, one update, what a stage moves, the stages, the score
# ==================================================================================================


LEFT, RIGHT = tensor([1.0, 0.0]), tensor([0.0, 1.0])  # attention maps of one image
BY_HAND = [
    (pk.discriminator_loss(tensor(0.0), tensor(0.0)), math.log(2)),
    (pk.discriminator_loss(tensor(3.0), tensor(0.0)), 0.3708673),
    (pk.discriminator_loss(tensor(0.0), tensor(3.0)), 1.8708673),
    (pk.adversarial_loss(tensor(1.0, 2.0), tensor(1.0, 0.0)), 2),
    (pk.contextual_loss(tensor(1.0, -1.0), tensor(0.0, 1.0)), 1.5),
    (pk.latent_loss(tensor(1.0, 1.0), tensor(0.0, -1.0)), 2.5),
    (pk.latent_distillation_loss(tensor(1.0), tensor(0.0), tensor(1.0), tensor(3.0)), 5),
    (pk.adversarial_distillation_loss(tensor(1.0, 2.0), tensor(0.0, 2.0)), 0.5),
    (pk.intermediate_distillation_loss(LEFT, RIGHT, tensor(1.0), tensor(0.5)), 2.5),
]


@pytest.mark.parametrize("value, by_hand", BY_HAND)
def test_loss_by_hand(value, by_hand):
    assert value.item() == pytest.approx(by_hand, abs=1e-6)


def test_attention_maps_by_hand():
    h = tensor([[1.0, 2.0]], [[1.0, 0.0]])[None]  # one image, two channels of 1 x 2
    q = tensor(1.0, 2.0) / 5**0.5
    assert torch.allclose(pk.attention_maps([h]), q)
    more = 7 * h.repeat(1, 3, 1, 1)  # neither the number of channels nor the scale counts
    expected = torch.cat([q, q, torch.ones(1)]) / 3**0.5
    assert torch.allclose(pk.attention_maps([h, more, torch.full((1, 1, 1, 1), 5.0)]), expected)


def test_no_gradient_reaches_what_is_real_or_the_teachers():
    t, s = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    of_features = pk.adversarial_loss(t, s) + pk.adversarial_distillation_loss(t, s)
    of_both = pk.latent_distillation_loss, pk.intermediate_distillation_loss
    sum((loss(t, s, t, s) for loss in of_both), of_features).backward()
    assert t.grad is None and s.grad is not None
    (teacher, student), x = teacher_and_student(), images()
    out_t, out_s = teacher.g(x, attention=True), student.g(x, attention=True)
    sum(pk.distillation_losses(student, out_t, out_s, **KD)).backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 3), (64, 1)])
def test_shapes(size, channels):
    net, x = small_gan(3, size, channels), images(2, size, channels)
    out, (logit, features) = net.g(x, attention=True), net.d(x)
    assert out.z.shape == out.z_hat.shape == (2, 10) and out.x_hat.shape == x.shape
    halves = [size // 2 ** (i + 1) for i in range(int(math.log2(size)) - 2)]
    hidden = net.g.encode(x)[1] + net.g.decode(out.z[..., None, None])[1]
    assert [h.shape[2] for h in hidden] == halves + halves[::-1] and halves[-1] == 4
    assert torch.equal(out.attention, pk.attention_maps(hidden)) and net.g(x).attention is None
    assert logit.shape == (2, 1) and out.x_hat.abs().max() <= 1
    assert features[-1].shape == (2, pk.block_widths(size, 3)[-1], 4, 4)
    for code in (out.z, out.z_hat):
        assert torch.allclose(code.norm(dim=1), torch.tensor(10.0).sqrt())
    assert torch.allclose(pk.score(net, x), (out.z - out.z_hat).square().sum(1).sqrt())  # plain


def test_upsample_is_dcgans_transposed_convolution():
    """But for initial weights: no pixel of a wide net is saturated, where tanh has no gradient."""
    up, x = pk.upsample(3, 2), torch.randn(2, 3, 5, 5)
    by_window = up[0].weight.view(2, 2, 2, 3, 2, 2)  # (c_out, sub-pixel, c_in, window), 2 x 2 each
    kernel = by_window.permute(3, 0, 4, 1, 5, 2).flip(2, 4).reshape(3, 2, 4, 4)
    expected = F.conv_transpose2d(x, kernel, stride=2, padding=1)
    assert torch.allclose(up(x), expected, atol=1e-6)
    assert (small_gan(128, 32).g(images(8, 32)).x_hat.abs() > 0.99).float().mean() < 1e-3


def test_norm_is_that_of_a_batch_of_one():
    norms = [m for m in small_gan().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 5  # two blocks a net, less those at images
    for norm in norms:
        x = torch.randn(3, norm.num_channels, 4, 4)
        alone = [F.batch_norm(image[None], None, None, training=True) for image in x]
        assert torch.allclose(norm(x), torch.cat(alone), atol=1e-5)


def test_training_computes_convolutions_alone_in_bfloat16():
    """And that only where a device has it; losses and scores are float32."""
    net, x, seen = small_gan(), images(2), []

    def losses(net, x):
        seen.extend([net.g.encode(x), net.g(x, attention=True), net.d(x)])
        return pk.gan_losses(net, x, seen[1], **OWN)

    fit_gans(losses, [x], {net: 1e-3})
    (z, hidden), out, (logit, _) = seen
    assert {t.dtype for t in (z, *out, logit, *net.g.encode(x)[1])} == {torch.float32}
    assert hidden[0].dtype == (torch.bfloat16 if pk.native_bf16("cpu") else torch.float32)


def test_gradients_of_a_weights_uses_are_summed_in_float32(monkeypatch):
    """Also where both are computed in bfloat16: D sees real and fake images."""
    monkeypatch.setattr(pk, "native_bf16", lambda kind: True)

    def gradients(*parts):
        def losses(net, x):
            g = 0 * sum(p.sum() for p in net.g.parameters())
            return sum(net.d(x[part])[0].square().mean() for part in parts), g

        net = small_gan()
        fit_gans(losses, [images(8)], {net: 0.0}, batch=8)
        return [p.grad for p in net.d.parameters()]

    real, fake, both = gradients([0, 1, 2]), gradients([3, 4]), gradients([0, 1, 2], [3, 4])
    assert all(torch.equal(a + b, c) for a, b, c in zip(real, fake, both, strict=True))


# -------------------------------------------------------------------------------------- one update


def one_cycle(peak, update, updates):
    """The learning rate of an update, the first is 0: from peak / 25 up to the peak during the
    first 15 %, then down to almost nothing, on halves of a cosine."""
    top = 0.15 * updates - 1
    if update <= top:
        start, end, way = peak / 25, peak, update / top
    else:
        start, end, way = peak, peak / 25e4, (update - top) / (updates - 1 - top)
    return end + (start - end) * (1 + math.cos(math.pi * way)) / 2


def naive_discriminator_loss(d, real, fake):
    """Cross-entropy of real, 1, and fake, 0. Images are detached: no generator moves by it."""
    real_is_1 = d(real.detach())[0].sigmoid().log().mean()
    fake_is_0 = (1 - d(fake.detach())[0].sigmoid()).log().mean()
    return -(real_is_1 + fake_is_0) / 2


def naive_generator_loss(gan, x, out):
    """L_G with OWN's weights."""
    feature, feature_hat = gan.d(x)[1][-1].detach(), gan.d(out.x_hat)[1][-1]
    adv = ((feature - feature_hat) ** 2).mean()
    return 2 * adv + 3 * (x - out.x_hat).abs().mean() + 5 * ((out.z - out.z_hat) ** 2).mean()


def naive_distillation_loss(d, out_t, out_s):
    """L_KD with KD's weights; everything of the teacher's is detached."""
    z, x_hat, z_hat, attention = (value.detach() for value in out_t)
    inter = ((attention - out_s.attention) ** 2).sum(1).mean() + (x_hat - out_s.x_hat).abs().mean()
    latent = ((z - out_s.z) ** 2).mean() + ((z_hat - out_s.z_hat) ** 2).mean()
    feature_t, feature_s = d(x_hat)[1][-1].detach(), d(out_s.x_hat)[1][-1]
    return 100 * inter + 50 * latent + 10 * ((feature_t - feature_s) ** 2).mean()


def naive_training(stage, teacher, student, x, rate_t, rate_s):
    """An epoch as one would write it from the equations: an Adam for the discriminators, one for
    the generators, and both losses are known before either moves."""
    moving = [(student, rate_s), (teacher, rate_t)] if stage == "step 2" else [(student, rate_s)]
    d_groups = [{"params": gan.d.parameters(), "peak": rate} for gan, rate in moving]
    g_groups = [{"params": gan.g.parameters(), "peak": rate} for gan, rate in moving]
    adams = [torch.optim.Adam(groups, betas=(0.5, 0.999)) for groups in (d_groups, g_groups)]
    torch.manual_seed(1)  # seed 0, epoch 1
    parts = torch.randperm(len(x)).split(4)
    for update, indices in enumerate(parts):
        part, loss_d, loss_g = x[indices], 0, 0
        out_t, out_s = teacher.g(part, attention=True), student.g(part, attention=True)
        if stage != "alone":
            loss_d = 10 * naive_discriminator_loss(student.d, out_t.x_hat, out_s.x_hat)
            loss_g = naive_distillation_loss(student.d, out_t, out_s)
        if stage != "step 1":
            loss_d = loss_d + naive_discriminator_loss(student.d, part, out_s.x_hat)
            loss_g = loss_g + naive_generator_loss(student, part, out_s)
        if stage == "step 2":
            loss_d = loss_d + naive_discriminator_loss(teacher.d, part, out_t.x_hat)
            loss_g = loss_g + naive_generator_loss(teacher, part, out_t)
        for adam, loss in zip(adams, (loss_d, loss_g), strict=True):
            adam.zero_grad()
            loss.backward(inputs=[p for group in adam.param_groups for p in group["params"]])
        for adam in adams:
            for group in adam.param_groups:
                group["lr"] = one_cycle(group["peak"], update, len(parts))
            adam.step()


def of_frozen(teacher, x):
    with torch.no_grad():
        return teacher.g(x, attention=True)


@pytest.mark.parametrize("updates", [1, 20])
@pytest.mark.parametrize("stage", ["alone", "step 1", "step 2"])
def test_a_naive_update_gives_the_same_weights(stage, updates, monkeypatch):
    """fit() and its stages against naive_training(). Alone, an update is the last of its schedule,
    the rate of which is 1 / 250,000 of the peak."""
    monkeypatch.setattr(pk, "native_bf16", lambda kind: False)
    scale = 250_000 if updates == 1 else 1
    x, rate_t, rate_s = images(4 * updates), 1e-3 * scale, 2e-3 * scale
    (teacher, student), (t, s) = teacher_and_student(), teacher_and_student()
    rates = {student: rate_s, teacher: rate_t} if stage == "step 2" else {student: rate_s}
    losses = {"alone": partial(pk.gan_losses, **OWN)}
    losses["step 1"] = partial(pk.step1_losses, KD)
    losses["step 2"] = partial(pk.step2_losses, OWN, KD)
    data = [x, *of_frozen(teacher, x)] if stage == "step 1" else [x]
    fit_gans(losses[stage], data, rates)
    before = weights(t), weights(s)
    naive_training(stage, t, s, x, rate_t, rate_s)
    assert close(weights(teacher), weights(t)) and close(weights(student), weights(s))
    assert not close(before[1], weights(student))
    assert same(before[0], weights(teacher)) != (stage == "step 2")  # bit by bit, buffers, too
    assert all(p.grad is None for p in teacher.parameters()) != (stage == "step 2")


# ---------------------------------------------------------------------------------- fit and stages


def test_an_epoch_is_every_image_once_in_an_order_of_seed_and_epoch():
    x, net = torch.arange(10), small_gan(1)

    def shown(**how):
        found = []  # all images of an otherwise idle fit(), in order

        def losses(net, part, same):
            assert torch.equal(part, same)  # rows of whatever data there is stay together
            found.extend(part.tolist())
            return [0 * sum(p.sum() for p in part.parameters()) for part in (net.d, net.g)]

        fit_gans(losses, [x, x.clone()], {net: 0.0}, **how)
        return found

    first, both = shown(), shown(epochs=2)
    assert both[:10] == first != both[10:] and shown(seed=1) != first
    assert sorted(first) == sorted(both[10:]) == [*range(10)]
    longer = shown(epoch_images=35, batch=64)  # few images make longer epochs
    assert sorted(longer) == sorted([*range(10)] * 3)


def test_fit_reports_mean_losses_and_stops_at_an_overflow():
    net, reports, steps = small_gan(1), [], iter([1.0, 3.0, 5.0, math.inf])

    def losses(net, x):
        d, g = (0 * sum(p.sum() for p in part.parameters()) for part in (net.d, net.g))
        value = next(steps)
        return d + value, g + 2 * value

    with pytest.raises(FloatingPointError, match="epoch 2"):
        fit_gans(
            losses, [images(8)], {net: 0.0}, epochs=2, report=lambda *what: reports.append(what)
        )
    assert reports == [(1, 2.0, 4.0)]


def stages_by_hand(x, s):
    """What train_stages() does, call by call, with rates as the header's table has them."""

    def trained(losses, rates, epochs, *given):
        fit_gans(losses, [x, *given], rates, epochs=epochs, seed=s.seed)

    lr_t = 32 / 4 * s.lr_teacher  # inversely as the width, 4
    teacher, alone, step1 = (small_gan(width, seed=s.seed) for width in (4, 2, 2))
    moving, step2 = small_gan(4), small_gan(2)
    own = partial(pk.gan_losses, **OWN)
    trained(own, {teacher: lr_t}, s.epochs)
    trained(own, {alone: s.lr_student}, s.epochs1 + s.epochs2)
    given = of_frozen(teacher, x)
    trained(partial(pk.step1_losses, KD), {step1: s.lr_student}, s.epochs1, *given)
    moving.load_state_dict(teacher.state_dict())  # copies: step 2 changes no earlier net
    step2.load_state_dict(step1.state_dict())
    rates = {step2: s.lr_step2 * s.lr_student, moving: s.lr_step2_teacher * lr_t}
    trained(partial(pk.step2_losses, OWN, KD), rates, s.epochs2)
    return {"teacher": teacher, "student_alone": alone, "step1": step1, "step2": step2}


@pytest.mark.parametrize("seed", [0, 7])
def test_stages_are_those_of_the_table(seed):
    x, s, reports = images(12), tiny_settings(seed=seed), []

    nets = pk.train_stages(x, s, lambda stage, epoch, *_: reports.append((stage, epoch)))
    expected = stages_by_hand(x, s)
    assert list(nets) == list(expected)
    for stage in nets:
        assert same(weights(nets[stage]), weights(whitened(expected[stage], x))), stage
    epochs = {"teacher": 2, "student_alone": 3, "step1": 2, "step2": 1}
    assert reports == [(stage, k) for stage, n in epochs.items() for k in range(1, n + 1)]


def test_what_the_frozen_teacher_makes_is_made_once_and_keeps_no_graph(monkeypatch):
    seen, step1_losses = [], pk.step1_losses

    def spy(kd_weights, student, x, *of_teacher):
        seen.append(of_teacher)
        return step1_losses(kd_weights, student, x, *of_teacher)

    monkeypatch.setattr(pk, "step1_losses", spy)
    nets = pk.train_stages(x := images(12), tiny_settings(batch=12))
    assert len(seen) == 2 and not any(field.requires_grad for made in seen for field in made)
    torch.manual_seed(1)  # seed 0, epoch 1
    expected = of_frozen(nets["teacher"], x[torch.randperm(12)])
    for field, by_hand in zip(seen[0], expected, strict=True):
        assert torch.allclose(field, by_hand, atol=1e-5)


def test_the_rival_is_a_step_2_of_fresh_nets():
    """By flags alone: equal to fit() of step 2's losses on fresh nets at full rates, bit by bit."""
    rival = {"epochs": 0, "epochs1": 0, "epochs2": 2, "lr_step2": 1, "lr_step2_teacher": 1}
    rival |= {"teacher_width": 4, "student_width": 2, "z_dim": 10, "batch": 4} | OWN | KD
    s = pk.parse([f"--{name.replace('_', '-')}={value}" for name, value in rival.items()])
    x, (teacher, student) = images(12), teacher_and_student()
    rates = {student: s.lr_student, teacher: 8 * s.lr_teacher}
    fit_gans(partial(pk.step2_losses, OWN, KD), [x], rates, epochs=2)
    nets = pk.train_stages(x, s)
    assert same(weights(nets["step2"]), weights(whitened(student, x)))
    assert same(weights(nets["teacher"]), weights(whitened(small_gan(4), x)))


@in_background
def test_upper_half_pasted_alone_trains(tmp_path):
    """The method knows nothing of files, flags, pictures and printing."""
    method, *program = re.split("^# ====", (HERE / "pkdgan.py").read_text(), flags=re.MULTILINE)
    assert len(program) == 1 and method.count("\n") <= 450
    assert not re.search(r"(import|from) +(argparse|torchvision|PIL|pathlib)", method)
    assert "print(" not in method and "open(" not in method
    (tmp_path / "method.py").write_text(method)
    code = f"""
import sys
sys.modules["torchvision"] = sys.modules["PIL"] = None
import torch, method
vars(method.DEFAULTS).update({vars(tiny_settings())})
nets = method.train_stages(x := torch.rand(12, 1, 16, 16) * 2 - 1)
assert " ".join(nets) == "teacher student_alone step1 step2" and nets["step2"](x).shape == (12,)
"""
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------- the score


def test_score_depends_on_the_image_alone():
    x, order = images(300), torch.randperm(300)
    net = whitened(small_gan(), x)
    scores = pk.score(net.train(), x)
    assert torch.equal(scores, pk.score(net.eval(), x))  # there is nothing that the mode changes
    assert scores.std() > 0 and scores.dtype == torch.float32
    assert torch.allclose(pk.score(net, x[order]), scores[order], rtol=1e-5)
    alone = torch.cat([pk.score(net, image[None]) for image in x[:20]])
    assert torch.allclose(alone, scores[:20], rtol=1e-5)


def test_whitened_score_is_the_mahalanobis_length_of_the_residual():
    net, x = small_gan(), images(400)
    r = pk.in_parts(net.residual, x).double()
    m, inverse = r.mean(0), torch.linalg.inv(torch.cov(r.T, correction=0))
    by_hand = torch.stack([((v - m) @ inverse @ (v - m)).sqrt() for v in r])
    scores = pk.score(whitened(net, x), x)
    assert torch.allclose(scores.double(), by_hand, rtol=0.1)  # the covariance is shrunk a little
    assert torch.corrcoef(torch.stack([scores.double(), by_hand]))[0, 1] > 0.99
    assert scores.square().mean().item() == pytest.approx(10, rel=0.1)  # unit variance, z_dim 10


def of_residuals(z_dim):
    """Stands for a GAN whose residual of an "image" is the image, its m and W plain."""
    net = SimpleNamespace(residual=lambda r: r, residual_mean=torch.zeros(z_dim))
    net.residual_whitener, net.distance = torch.eye(z_dim), partial(pk.GAN.distance, net)
    return net


def test_whitening_of_directions_that_hardly_vary():
    r = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    r[:, 1:] *= 1e-3  # inverted in float32, such a covariance has no root
    net = whitened(of_residuals(256), r)
    spread = ((r - net.residual_mean) @ net.residual_whitener).std(0)[0]
    assert spread.item() == pytest.approx(1, abs=0.05) and spread.dtype == torch.float32


def test_auroc_is_in_percent_with_anomalies_high_plain_and_whitened():
    """Residuals of two numbers: the first is large on training images, too."""
    rng, y = torch.Generator().manual_seed(0), tensor(0, 0, 1, 1)
    net = whitened(of_residuals(2), torch.randn(1000, 2, generator=rng) * tensor(10.0, 0.1))
    test = tensor([9.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 1.0])
    both = pk.auroc(test.norm(dim=1), y), pk.auroc(net.distance(test), y)
    assert both == pytest.approx((50, 100)) and pk.auroc(net.distance(test), 1 - y) == 0
    with pytest.raises(ValueError, match="NaN"):
        pk.auroc(net.distance(test * math.nan), y)


# ==================================================================================================
# THE PROGRAM: flags, data, bad input, a run and its files, scoring, tables, run_all.sh, the README
# ==================================================================================================


def exit_code(*flags):
    try:
        return pk.main(flags) or 0
    except SystemExit as end:  # argparse
        return end.code


def one_line(stderr):
    assert len(stderr.splitlines()) == 1 and stderr.startswith("pkdgan.py: "), stderr
    return stderr


def test_settings_are_the_tables_rows():
    rows = pk.rows_of('\nhead  default  range\n  a_b  1e-3  0..  what, "it" is\n  c  "x"  x|y  C\n')
    assert [*map(tuple, rows)] == [("a_b", 1e-3, "0..", 'what, "it" is'), ("c", "x", "x|y", "C")]
    args = pk.parse(["--dataset", "mnist", "--epochs", "0", "--holdout", "0", "--batch", "1"])
    assert args.epochs == args.holdout == 0 and args.batch == 1  # the ends of ranges
    assert f"--student-width {args.student_width} " in pk.PER_DATASET["mnist"] + " "


def test_help_explains_every_flag_and_prints_its_default(capsys):
    assert exit_code("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default, _, what in pk.rows_of(pk.PROGRAM + pk.METHOD):
        assert f" --{name.replace('_', '-')}" in text and len(what) > 15
        assert f"{' '.join(what.split())} ({default})" in text
    assert "--score" in text and "--table" in text and "'fmnist'" in text


OUT_OF_RANGE = """--epochs -1, --epochs1 -1, --batch 0, --batch 1.5, --z-dim 0, --teacher-width 0
--student-width -3, --epoch-images 0, --holdout 1, --holdout -0.1, --alpha 0, --alpha 1, --alpha nan
--lr-student -1, --lr-student inf, --lr-teacher nan, --w-adv nan, --seed -1, --seed x, --size 24"""


@pytest.mark.parametrize("words", re.split(r", |\n", OUT_OF_RANGE))
def test_a_value_out_of_range_gets_one_line_that_names_the_flag(words, capsys):
    flag, value = words.split()
    assert exit_code(flag, value) == 2
    out, err = capsys.readouterr()
    assert flag in one_line(err) and value in err and out == ""


def flops(width, size, channels, z_dim):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = pk.GAN(size, channels, width, z_dim)
        net.d(net.g(torch.zeros(1, channels, size, size)).x_hat)
    return counter.get_total_flops()


PAPERS = [("cifar10", 24.45), ("mnist", 311.11), ("fmnist", 700), ("folder", 50)]


@pytest.mark.parametrize("dataset, ratio", PAPERS)
def test_default_widths_reach_the_papers_ratios(dataset, ratio):
    s, channels = pk.parse(["--dataset", dataset]), 1 if "mnist" in dataset else 3
    both = [flops(width, s.size, channels, s.z_dim) for width in (s.teacher_width, s.student_width)]
    assert both[0] / both[1] >= ratio


def test_pca_knows_images_unlike_the_training_images():
    x = images(1, 32) * torch.linspace(-1, 1, 120).view(-1, 1, 1, 1)
    other = images(1, 32, seed=1) * torch.linspace(2, 4, 20).view(-1, 1, 1, 1)
    x_test, y = torch.cat([x[100:], other]), torch.arange(40) > 19
    assert pk.pca_auroc(SimpleNamespace(x=x[:100], x_test=x_test, y_test=y)) == 100
    assert pk.pca_auroc(SimpleNamespace(x=x[:100], x_test=x_test, y_test=~y)) == 0


# -------------------------------------------------------------------------------------------- data


def task_of(*flags):
    return pk.load_task(pk.parse([*FAST, *flags]))


def test_training_set_is_the_normal_class_and_the_test_set_everything():
    """Held out are the last images: neighbours are often alike, such as photographs of one part. A
    random choice would hold out siblings of images that were trained on."""
    args = pk.parse(FAST)
    (x, names, classes), (x_test, kinds, _) = (pk.load_split(args, s) for s in ("train", "test"))
    assert x.shape == (1198, 1, 16, 16) and x_test.shape == (599, 1, 16, 16)
    every = x[[name == "7" for name in names]] / 127.5 - 1
    for share, seed in (("0", "0"), ("0.1", "0"), ("0.5", "0"), ("0.5", "1")):
        task = task_of("--normal", "7", "--holdout", share, "--seed", seed)
        assert torch.equal(torch.cat([task.x, task.x_held]), every)
        assert len(task.x_held) == math.ceil(float(share) * len(every))
    assert task.normal == "7" and task.classes == classes == list("0123456789")
    assert torch.equal(task.x_test, x_test / 127.5 - 1) and task.x.dtype == torch.float32
    assert task.y_test == [kind != "7" for kind in kinds] and task.kinds == kinds


CASES = [("mnist", "3"), ("fmnist", "Coat"), ("fmnist", "3"), ("cifar10", "Coat")]


@pytest.mark.parametrize("dataset, normal", CASES)
def test_data_sets_of_torchvision(dataset, normal, monkeypatch):
    """Classes by index or name; grey (N, h, w), colour (N, h, w, 3)."""
    source = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
    colour = dataset == "cifar10"
    pixels = torch.randint(0, 256, (240, 32, 32, 3) if colour else (240, 28, 28)).byte()
    names = [f"{k} - name" for k in range(10)] if dataset == "mnist" else ["a", "b", "c", "Coat"]
    targets = torch.arange(240) % len(names)

    def split(root, train, download):
        half = slice(0, 120) if train else slice(120, None)
        data = pixels[half].numpy() if colour else pixels[half]
        of_split = targets[half].tolist() if colour else targets[half]
        return SimpleNamespace(data=data, classes=names, targets=of_split)

    monkeypatch.setattr(torchvision.datasets, source, split)
    task = task_of("--dataset", dataset, "--normal", normal, "--size", "32")
    assert task.normal == names[3] and task.classes == names
    assert task.y_test == [k != 3 for k in targets[120:]]
    assert task.kinds == [names[k] for k in targets[120:]]
    assert task.x.shape == (120 // len(names), 3 if colour else 1, 32, 32)
    expected = pixels[120:].permute(0, 3, 1, 2) / 127.5 - 1 if colour else None
    assert not colour or torch.equal(task.x_test, expected)


def picture(seed, size=(24, 24), mode="RGB"):
    n = size[0] * size[1] * len(mode)
    return Image.frombytes(mode, size, random.Random(seed).randbytes(n))


def make_folder(root, classes=("good", "scratch"), train=12, test=3, trained=1):
    """MVTec AD's layout: train has the first class or classes, test has all."""
    for split, names, count in (("train", classes[:trained], train), ("test", classes, test)):
        for name in names if count else ():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(f"{split}/{name}/{i}").save(root / split / name / f"{i:02}.png")
    return root


FOLDER = ["--dataset", "folder", "--data"]


def folder_task(root, normal="good", holdout="0"):
    return task_of(*FOLDER, str(root), "--normal", normal, "--holdout", holdout)


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
    args = pk.parse(["--dataset", "cifar10", "--data", str(tmp_path)])
    x, kinds, classes = pk.load_split(args, "train")
    x_test, kinds_test, _ = pk.load_split(args, "test")
    assert classes == kinds_test == names and kinds == names * 5
    assert x.shape == (50, 3, 32, 32) and x_test.shape == (10, 3, 32, 32)
    assert x[7, :, 5, 5].tolist() == [255, 0, 128]


def test_image_folder_as_of_mvtec(tmp_path):
    """In test/, "bent" is before "good", but classes are matched by name."""
    make_folder(tmp_path, classes=("good", "bent", "scratch"))
    make_folder(tmp_path / "ground_truth", train=0)
    task = folder_task(tmp_path, holdout="0.1")
    assert task.normal == "good" and task.classes == ["good"]
    assert task.kinds == ["bent"] * 3 + ["good"] * 3 + ["scratch"] * 3
    assert task.y_test == [kind != "good" for kind in task.kinds]
    assert len(task.x) == 10 and len(task.x_held) == 2
    for file, x in (("train/good/00", task.x[0]), ("test/good/02", task.x_test[5])):
        image = Image.open(tmp_path / f"{file}.png").resize((16, 16), Image.Resampling.BILINEAR)
        assert torch.equal(x, TF.pil_to_tensor(image) / 127.5 - 1)


def test_classes_are_folders_and_those_named_by_numbers_are_names_alone(tmp_path):
    make_folder(tmp_path, classes=("1", "2", "3"), trained=3)
    assert [folder_task(tmp_path, name).normal for name in "123"] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="--normal 0: the classes are 1, 2, 3"):
        folder_task(tmp_path, "0")
    picture(1).save(tmp_path / "test" / "contact-sheet.png")  # of no class: left out or refused
    with contextlib.suppress(OSError, ValueError):
        assert set(folder_task(tmp_path, "1").kinds) == {"1", "2", "3"}


def test_a_folder_is_walked_in_one_way(tmp_path, capsys):
    """Links are followed, hidden is left out, what is no image is counted, names do not matter."""
    root = make_folder(tmp_path / "parts", train=10)
    good, link = root / "train" / "good", make_folder(tmp_path / "elsewhere", train=1)
    names = {"z1.PNG": "PNG", "z2": "BMP", "z3.gif": "GIF", "z4.jfif": "JPEG", "z[5].x": "TIFF"}
    for name, kind in names.items():
        picture(name).save(good / name, kind)
    (good / "zlink").symlink_to(link / "train" / "good")
    (good / "zz.png").mkdir()  # a folder named like an image
    for hidden in (".ipynb_checkpoints", "@eaDir", ".@__thumb"):
        for place in (good, root / "test", root / "test" / "scratch"):
            (place / hidden / "00.png").mkdir(parents=True)
            picture(0).save(place / hidden / "a.png")
            picture(0).save(place / hidden / "00.png" / "thumb.jpg")
    for other in (good / "Thumbs.db", root / "test" / "notes.txt"):
        other.write_text("no image")
    task = folder_task(root)
    assert len(task.x) == 10 + 5 + 1 and task.classes == ["good"] == [task.normal]
    assert task.kinds == ["good"] * 3 + ["scratch"] * 3
    train, test = capsys.readouterr().err.splitlines()
    assert "left out 3 files" in train and "left out 4 files" in test
    files = [str(file.relative_to(good)) for file in pk.image_files(good)]
    assert files == [f"{i:02}.png" for i in range(10)] + [*names, "zlink/00.png"]


@pytest.mark.parametrize("count, pictures", [(2, 2), (30, 1), (30, 2), (30, 9), (12, 12)])
def test_too_few_or_equal_images_are_refused_before_the_training(count, pictures, tmp_path):
    """Dots at different places make different images."""
    (tmp_path / "train" / "good").mkdir(parents=True)
    for i in range(count):
        dot = Image.new("L", (16, 16))
        dot.putpixel((i % pictures, 5), 255)
        dot.save(tmp_path / "train" / "good" / f"{i}.png")
    refused = pytest.raises(ValueError, match=f"{count} images.* 10 different")
    with refused if pictures < 10 else contextlib.nullcontext():
        folder_task(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white_whatever_its_colour(mode, tmp_path):
    """The upper half is, the lower one is grey. In a palette and in RGB one colour is."""
    for value in (0, 77, 255):
        image = Image.new("RGBA", (32, 32), (100, 100, 100, 255))
        image.paste((value, value, value, 0), (0, 0, 32, 16))
        image = image.convert("RGB").quantize(4) if mode == "P" else image.convert(mode)
        how = {"transparency": image.getpixel((0, 0))} if mode in ("P", "RGB") else {}
        image.save(tmp_path / "a.png", **how)
        x = pk.read_image(tmp_path / "a.png", 16)
        assert (x[:, :7] == 255).all() and (x[:, 9:] == 100).all()


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (4, 2), (2, 3)])
def test_png_files_of_16_bits_are_refused_or_scaled(colour_type, channels, tmp_path):
    """Pillow clips grey to 255, but takes the high byte of colours and of grey with alpha."""
    png, row = b"\x89PNG\r\n\x1a\n", zlib.compress(b"\0" + b"\x12\x34" * channels)
    head = bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, colour_type, 0, 0, 0])
    for part in (b"IHDR" + head, b"IDAT" + row, b"IEND"):
        png += (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    (tmp_path / "deep.png").write_bytes(png)
    if channels == 1:
        with pytest.raises(OSError, match="deep.png.*more than 8 bits"):
            pk.read_image(tmp_path / "deep.png", 16)
    else:
        seen = 0x12 if channels == 3 else 238  # 0x12 of 255 opaque, on white
        assert (pk.read_image(tmp_path / "deep.png", 16) == seen).all()


BAD_INPUT = [  # exit code, words of the message, flags
    (2, ["--normal cat", "0", "9"], ["--normal", "cat"]),
    (2, ["--normal 12", "0", "9"], ["--normal", "12"]),
    (2, ["--teacher", "8"], ["--teacher", "8"]),  # no flag is cut short
    (1, ["nosuch"], ["--device", "nosuch"]),
    (1, ["no MNIST in", "none", "online"], ["--dataset", "mnist", "--data", "none"]),
    (1, ["no MNIST in", "broken", "delete"], ["--dataset", "mnist", "--data", "broken"]),
    (2, ["none", "train/CLASS"], [*FOLDER, "none"]),
    (2, ["scratch", "good"], [*FOLDER, "folder", "--normal", "scratch"]),
    (2, ["10 different"], [*FOLDER, "folder", "--normal", "good", "--holdout", "0.5"]),
    (1, ["truncated/train/good/01.png"], [*FOLDER, "truncated", "--normal", "good"]),
    (1, ["overflow", "learning rates"], ["--lr-teacher", "1e25"]),
    (1, ["a file"], ["--out", "a file"]),
    (1, ["missing.pt", "No such file"], ["--score", "missing.pt", "folder"]),
]


@pytest.mark.parametrize("code, words, flags", BAD_INPUT, ids=[" ".join(r[2]) for r in BAD_INPUT])
def test_bad_input_gets_one_clear_line(code, words, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "folder")
    cut = make_folder(tmp_path / "truncated") / "train/good/01.png"
    cut.write_bytes(cut.read_bytes()[:200])
    Path("broken/MNIST/raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        Path("broken/MNIST/raw", f"{name}-ubyte").write_bytes(b"")
    Path("a file").write_text("")
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pk, "cost", None)  # none of these may come to the end of the training
    assert exit_code("--size", "16", *flags) == code
    stderr = one_line(capsys.readouterr().err)
    assert all(word in stderr for word in words), stderr
    assert not [*Path("runs").rglob("*.*")]


# ------------------------------------------------------------------------------ a run and its files

FILES = ["result.json", "student.pt", "student.pt2"]


def names_in(folder):
    return sorted(file.name for file in folder.rglob("*") if not file.is_dir())


def run_here(*flags):
    args, stdout = pk.parse([*FAST, *flags]), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        pk.run(args)
    text = next(Path(args.out).glob("*/result.json")).read_text()
    return stdout.getvalue(), json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on digits with images held out: (stdout, result, folder, task)."""
    flags = ["--normal", "0", "--holdout", "0.4", "--out", str(tmp_path_factory.mktemp("digits"))]
    return *run_here(*flags), Path(flags[-1], "digits-0-seed0"), task_of(*flags)


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A run on coloured images without test/: (stdout, result, folder)."""
    root = make_folder(tmp_path_factory.mktemp("own") / "my parts", train=40, test=0)
    flags = ["--normal", "good", "--holdout", "0.5", "--alpha", "0.2", "--out", str(root / "out")]
    return *run_here(*FOLDER, str(root), *flags), root / "out" / "my parts-good-seed0"


def test_a_run_prints_and_writes_what_it_found(digits_run):
    stdout, result, folder, task = digits_run
    lines, rows = stdout.splitlines(), [*map(str.split, stdout.splitlines())]
    assert lines[0] == f"digits-0-seed0: {len(task.x)} images, {len(task.x_held)} held out, on cpu"
    assert lines[1].startswith("test: {'") and "'0': 59" in lines[1] and "'8': 58" in lines[1]
    epochs = {"teacher": 2, "student_alone": 3, "step1": 2, "step2": 1}
    assert list(result["auroc"]) == list(result["auroc_whitened"]) == [*epochs, "gain"]
    for stage, n in epochs.items():
        reports = [line for line in lines if re.match(rf"{stage} \d+: loss_D ", line)]
        assert len(reports) == n and all(line.endswith("s left") for line in reports)
    for values in (result["auroc"], result["auroc_whitened"]):
        assert values["gain"] == values["step2"] - values["student_alone"]
    for stage, plain in result["auroc"].items():
        assert [stage, f"{plain:.2f}", f"{result['auroc_whitened'][stage]:.2f}"] in rows
    assert ["PCA", f"{result['baselines']['pca']:.2f}"] in rows and "few held out" in lines[-2]
    assert f"has {result['ratio']:.0f} times as many FLOPs" in stdout
    for kind in "0123456789":
        assert f"% flagged of {kind}, by alpha: {{0.05: " in stdout  # .01 is out of reach
    assert [*result["flops"].values()] == [flops(w, 16, 1, pk.DEFAULTS.z_dim) for w in (4, 2)]
    assert result["params"]["student"] < result["params"]["teacher"]
    assert 0 < result["us_256"]["student"] < result["us_1"]["student"]  # per image
    assert {"dataset", "normal", "seed", "seconds", "bf16", "version", "classes"} <= set(result)
    no_effect = {"out", "device", "skip_finished", "alpha", "score", "table"}
    assert result["alpha"] == 0.05
    assert vars(pk.parse([])).keys() - result["settings"].keys() == no_effect
    assert names_in(folder) == FILES and f"--score '{folder}/student.pt' " in lines[-1]


def test_time_left_is_that_of_all_stages(monkeypatch, capsys):
    """From the first epoch on; a teacher's epoch takes 1, others .2, .2 and 1.5."""
    now = [0.0]
    monkeypatch.setattr(pk, "monotonic", lambda: now[0])
    report = pk.progress(SimpleNamespace(epochs=2, epochs1=5, epochs2=2))
    plan = [("teacher", 1)] * 2 + [("student_alone", 0.2)] * 7 + [("step1", 0.2)] * 5
    for stage, seconds in plan + [("step2", 1.5)] * 2:
        now[0] += 10 * seconds
        report(stage, 1, 0.0, 0.0)
    left = [int(line.split()[-3]) for line in capsys.readouterr().out.splitlines()]
    total = 10 * (2 + 0.2 * 12 + 3)
    assert left[0] == pytest.approx(total - 10, abs=1) and left[-1] == 0
    assert left[2] == pytest.approx(total - 22, abs=1) and left == sorted(left, reverse=True)


def test_the_saved_student_is_the_one_of_the_result(digits_run):
    _, result, folder, task = digits_run
    net, calibration = pk.load_gan(folder / "student.pt")
    r = pk.in_parts(net.residual, task.x_test)
    figures = [pk.auroc(scores, task.y_test) for scores in (r.norm(dim=1), net.distance(r))]
    assert figures == [result[key]["step2"] for key in ("auroc", "auroc_whitened")]
    one_by_one = torch.cat([pk.score(net, image[None]) for image in task.x_held])
    assert torch.allclose(calibration, one_by_one.sort().values, rtol=1e-5)  # p_values() allows it


def test_good_photographs_alone_make_a_detector(folder_run):
    stdout, result, folder = folder_run
    assert result["auroc"] == result["auroc_whitened"] == result["flagged"] == {}
    assert names_in(folder) == FILES and result["images"] == {"test": 0}
    assert stdout.count("no AUROC: ") == 1 and "test: {}" in stdout and ": nan" not in stdout
    assert "20 images, 20 held out" in stdout and result["threshold"] > 0


def test_a_finished_run_is_not_made_again(digits_run, folder_run, monkeypatch, capsys):
    """Of the same settings, version and precision, wherever it is called from."""
    monkeypatch.setattr(pk, "train_stages", lambda *given: 1 / 0)

    def trains(*flags):
        assert exit_code(*FAST, "--skip-finished", *flags) in (0, 1)
        return "finished before" not in capsys.readouterr().out

    flags = ["--normal", "0", "--holdout", "0.4", "--out", str(digits_run[2].parent)]
    assert not trains(*flags) and not trains(*flags, "--device", "cpu")
    for changed in (["--kd-adv", "3"], ["--seed", "1"], ["--normal", "1"]):
        assert trains(*flags, *changed)
    root, file = folder_run[2].parents[1], folder_run[2] / "result.json"
    monkeypatch.chdir(root.parent)
    flags = ["--normal", "good", "--holdout", "0.5", "--out", "my parts/out", "--alpha", "0.2"]
    for data in ("my parts", "./my parts/", str(root)):  # one folder has one name
        assert not trains(*flags, *FOLDER, data)
    text = file.read_text()
    for key in ("version", "bf16"):
        file.write_text(json.dumps(json.loads(text) | {key: None}))
        assert trains(*flags, *FOLDER, str(root))
    file.write_text(text)


@pytest.mark.parametrize("number, earlier", [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_stop_in_the_export_leaves_no_mix_of_runs(number, earlier, tmp_path, monkeypatch, capsys):
    """An earlier run's files stay as they are; no new file, and no temporary folder."""
    folder = tmp_path / "digits-0-seed0"
    folder.mkdir()
    for name in FILES if earlier else ():
        (folder / name).write_text("earlier")

    def stopped(*given, **named):  # here the export would go on for a second
        assert len(names_in(folder)) > 3 * earlier
        signal.raise_signal(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    monkeypatch.setattr(torch.export, "export", stopped)
    monkeypatch.setattr(pk, "pca_auroc", lambda task: 50.0)
    idle = ["--epochs", "0", "--epochs1", "0", "--epochs2", "0"]
    assert exit_code(*FAST, *idle, "--normal", "0", "--out", str(tmp_path)) == 130
    assert "interrupted" in one_line(capsys.readouterr().err)
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == (dict.fromkeys(FILES, "earlier") if earlier else {})


def test_a_stop_between_two_files_leaves_no_result(tmp_path, monkeypatch):
    """result.json is the mark of a whole run: the first to go and the last to come."""
    for name in FILES:
        (tmp_path / name).write_text("earlier")
    task = SimpleNamespace(x=images())
    monkeypatch.setattr(pk.Path, "replace", lambda file, to: shutil.copy(file, to) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pk.save(SimpleNamespace(alpha=0.1), task, small_gan(2), torch.zeros(3), tmp_path, {})
    assert names_in(tmp_path) == FILES[1:]


@in_background
def test_signals_a_full_disk_and_a_closed_pipe_leave_no_file(tmp_path):
    def started(*flags, before=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)):
        call = [HERE / "pkdgan.py", *FAST, "--normal", "0", *flags]  # SIGINT may be ignored else
        return python(*call, cwd=tmp_path, start=subprocess.Popen, preexec_fn=before)

    for number in (signal.SIGINT, signal.SIGTERM):
        process = started("--epochs", "5000")
        while not process.stdout.readline().startswith("teacher 2:"):
            assert process.poll() is None
        process.send_signal(number)
        stderr = process.communicate(timeout=60)[1]
        assert stderr == "pkdgan.py: interrupted; no result is half-written\n"
        assert process.returncode == 130
    limit = [10_000] * 2  # bytes a file may have: less than a student.pt
    full = started(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    piped = started("--epochs", "5000")
    piped.stdout.readline()
    piped.stdout.close()
    stdout, stderr = full.communicate()
    assert full.returncode == 1 and one_line(stderr)
    assert re.search(r"step2 +\d", stdout)  # the figures are not lost
    assert piped.wait(timeout=60) == 1 and len(piped.stderr.read().splitlines()) <= 1
    assert names_in(tmp_path) == []


def test_p_values_by_hand():
    p = pk.p_values(tensor(0.0, 1.0, 1.5, 2.0, 3.0, 3.5), tensor(1.0, 2.0, 2.0, 3.0))
    assert p.tolist() == [1, 1, 4 / 5, 4 / 5, 2 / 5, 1 / 5]  # exact: p <= alpha is right at alpha
    assert pk.p_values(tensor(2.5), tensor(1.0, 2.0, 3.0)) == 0.5
    assert pk.p_values(tensor(7.0), torch.zeros(0)) == 1
    ties = torch.full((99,), 2.0)  # rounded otherwise on another device
    assert pk.p_values(tensor(2 + 2e-6, 2 + 2e-3), ties).tolist() == [1, 0.01]


def flagged_of(scores, kinds, calibration, alpha=0.05):
    """shares_flagged() on "images" that are their scores, by a "student" that gives them back."""
    x = tensor(*scores).view(-1, 1, 1, 1)
    args, task = SimpleNamespace(alpha=alpha), SimpleNamespace(x_test=x, kinds=kinds)
    return pk.shares_flagged(args, task, torch.nn.Flatten(0), calibration)


def test_shares_flagged_by_hand():
    calibration = torch.arange(1.0, 20.0)  # 1 to 19: p = (1 + how many are not below) / 20
    scores = [3.0, 18.5, 19.5, 12.0] + [17.0, 19.5, 1.0] + [20.0, 20.0, 18.5, 18.5]
    kinds = ["good"] * 4 + ["notch"] * 3 + ["scratch"] * 4
    flagged = flagged_of(scores, kinds, calibration, alpha=0.2)
    assert list(flagged) == ["good", "notch", "scratch"]
    assert flagged["good"] == {0.05: 25, 0.1: 50, 0.2: 50}  # .01 is out of reach
    assert flagged["notch"] == {0.05: 33.3, 0.1: 33.3, 0.2: 66.7}
    assert flagged["scratch"] == {0.05: 50, 0.1: 100, 0.2: 100}


@pytest.mark.parametrize("held, alphas", [(8, []), (9, [0.1]), (99, [0.01, 0.05, 0.1])])
def test_shares_flagged_are_of_alphas_that_enough_held_out_allow(held, alphas):
    flagged = flagged_of([0.5, 2.0], ["good", "bad"], torch.zeros(held))
    assert flagged == (
        {kind: dict.fromkeys(alphas, 100) for kind in ("bad", "good")} if alphas else {}
    )


@pytest.mark.parametrize("alpha, rank", [("0.05", 0), ("0.1", 1), ("0.19", 2)])
def test_threshold_is_that_of_the_verdicts_or_too_few_are_held_out(alpha, rank, tmp_path):
    """Ten of them: 1 / 11 is the least p-value."""
    flags = ["--normal", "8", "--holdout", "0.086", "--alpha", alpha, "--out", str(tmp_path)]
    idle = ["--epochs", "0", "--epochs1", "0", "--epochs2", "0"]
    stdout, result = run_here(*idle, *flags)
    _, calibration = pk.load_gan(tmp_path / "digits-8-seed0" / "student.pt")
    threshold = calibration[-rank].item() if rank else None
    assert result["threshold"] == threshold and len(calibration) == 10
    shown = f"{threshold:.4g}" if rank else "nan"
    assert f"threshold at {alpha}: {shown} (nan: few held out)" in stdout
    assert (alpha in result["flagged"]["8"]) == bool(rank) and "% flagged of 8" in stdout
    if rank:
        around = torch.tensor([threshold, threshold * 1.001])
        assert (pk.p_values(around, calibration) <= float(alpha)).tolist() == [False, True]


def save_student(path, net, calibration):
    content = {"version": pk.VERSION, "form": net.form, "weights": net.state_dict()}
    torch.save(content | {"calibration": calibration.tolist()}, path)
    return str(path)


def scored(stdout):
    """The lines of --score as lists."""
    header, *lines = stdout.splitlines()
    assert header == "path\tscore\tp-value\tverdict"
    return [line.split("\t") for line in lines]


def test_scores_of_a_folder_and_a_broken_image(digits_run, tmp_path, monkeypatch, capsys):
    _, _, folder, task = digits_run
    monkeypatch.chdir(tmp_path)
    Path("in/@eaDir/000.png").mkdir(parents=True)
    files = [f"in/{i:03}.png" for i in range(60)] + ["alone.png"]
    for file, x in zip(files, [*task.x_test[:60], task.x_test[7]], strict=True):
        TF.to_pil_image((x + 1) / 2).save(file)
    for file in ("in/notes.txt", "in/@eaDir/000.png/x.db"):
        Path(file).write_text("no image")
    student = str(folder / "student.pt")
    assert exit_code("--score", student, "in", "alone.png", "--alpha", "0.1") == 0
    out, err = capsys.readouterr()
    assert "in: left out 2 files" in one_line(err)
    lines, (net, calibration) = scored(out), pk.load_gan(student)
    for file, (name, value, p, verdict) in zip(files, lines, strict=True):
        by_itself = pk.score(net, pk.read_image(file, 16)[None, :1] / 127.5 - 1)
        assert name == file
        assert float(value) == pytest.approx(by_itself.item(), rel=1e-3)
        assert float(p) == pytest.approx(pk.p_values(by_itself, calibration).item(), rel=1e-3)
        assert verdict == ("anomaly" if float(p) <= 0.1 else "-")
    assert lines[-1][1:] == lines[7][1:] and len({line[1] for line in lines}) > 50
    Path("in/050.png").write_bytes(Path("in/050.png").read_bytes()[:60])
    assert exit_code("--score", student, "in", "--alpha", "0.1") == 1  # after what comes before it
    out, err = capsys.readouterr()
    assert scored(out) == lines[:50] and "in/050.png cannot be used" in err.splitlines()[-1]
    assert exit_code("--score", student) == 1 and "no images" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("n, verdict", [(0, "?"), (18, "?"), (19, "anomaly")])
def test_verdict_at_alpha_itself_and_where_too_few_are_held_out(n, verdict, tmp_path, capsys):
    net = small_gan(2)
    student = save_student(tmp_path / "student.pt", net, torch.zeros(n))
    Image.new("RGB", (40, 30), (200, 100, 0)).save(tmp_path / "a.png")  # grey: the mean of these
    assert exit_code("--score", student, str(tmp_path / "a.png")) == 0
    out, err = capsys.readouterr()
    value = pk.score(net, torch.full((1, 1, 16, 16), 100 / 127.5 - 1)).item()
    assert float(scored(out)[0][1]) == pytest.approx(value, rel=1e-3)
    assert scored(out)[0][2:] == [f"{1 / (n + 1):.4g}", verdict]
    assert ("--alpha 0.05" in one_line(err)) if verdict == "?" else err == ""


def test_checkpoint_that_is_none(digits_run, tmp_path, capsys):
    path, whole = tmp_path / "file.pt", (digits_run[2] / "student.pt").read_bytes()
    saved, half = torch.load(digits_run[2] / "student.pt", weights_only=True), len(whole) // 2
    bad = [b"text", whole[:half], {"weights": 1}, SimpleNamespace(a=1)]
    other = {name: weight[..., :1] for name, weight in saved["weights"].items()}
    for content in [*bad, saved | {"version": pk.VERSION - 1}, saved | {"weights": other}]:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert exit_code("--score", str(path), "x.png") == 1
        out, err = capsys.readouterr()
        assert out == "" and "file.pt is no whole student.pt" in one_line(err) and len(err) < 400


DEVICE_SCRIPT = """
import json, sys, torch
from PIL import Image, ImageOps
files = {"about.json": ""}
detector = torch.export.load("student.pt2", extra_files=files).module()
about = json.loads(files["about.json"])
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGBA")
image = image.resize((about["form"][0], about["form"][0]), Image.Resampling.BILINEAR)
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
x = torch.tensor(list(image.tobytes())).view(1, *image.size, 3).permute(0, 3, 1, 2)
score, calibration = detector(x / 127.5 - 1).item(), about["calibration"]
p = (1 + sum(c >= score * (1 - 1e-5) for c in calibration)) / (1 + len(calibration))
print(f"{score:.4g}\\t{p:.4g}\\t{'anomaly' if p <= about['alpha'] else '-'}")
"""


def test_on_a_device_torch_and_pillow_give_the_programs_verdicts(folder_run, monkeypatch, capsys):
    """By README.md's Python that reads about.json, if there is some: called with an image, beside a
    student.pt2, it prints score, p-value and verdict, to the digit."""
    monkeypatch.chdir(folder_run[2])
    readme, exif = (HERE / "README.md").read_text(), Image.Exif()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    script = next((block for block in blocks if "about.json" in block), DEVICE_SCRIPT)
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    imports = re.findall(r"^(?:from|import) (.+?)(?: import.*)?$", script, re.MULTILINE)
    assert set(", ".join(imports).split(", ")) <= {"json", "sys", "torch", "PIL"}
    Path("script.py").write_text(script)
    exif[0x0112] = 6
    picture(0, (50, 30)).save("turned.jpg", exif=exif)
    picture(1, (50, 30), "RGBA").save("clear.png")
    Image.new("RGB", (16, 16)).save("black.png")
    verdicts = set()
    for file in ("turned.jpg", "clear.png", "black.png", "../../train/good/03.png"):
        assert exit_code("--alpha", "0.2", "--score", "student.pt", file) == 0
        expected = scored(capsys.readouterr().out)[0][1:]
        monkeypatch.setattr(sys, "argv", ["script.py", file])
        runpy.run_path("script.py")
        assert capsys.readouterr().out.split()[-3:] == expected
        verdicts.add(expected[2])
    assert verdicts == {"anomaly", "-"}


def test_exported_student_is_whole_and_names_no_device(digits_run):
    """So that it can be moved; and it has neither discriminator nor images."""
    files, folder, x = {"about.json": ""}, digits_run[2], digits_run[3].x_test[:300]
    exported = torch.export.load(folder / "student.pt2", extra_files=files)
    for node in exported.graph.nodes:
        assert "device" not in node.kwargs and torch.device not in map(type, node.args)
    detector, (net, held) = exported.module(), pk.load_gan(folder / "student.pt")
    about = {"version": pk.VERSION, "form": [16, 1, 2, 256], "alpha": 0.05}
    assert json.loads(files["about.json"]) == about | {"calibration": held.tolist()}
    assert not [name for name in detector.state_dict() if name.startswith("d.")]
    sizes = [(folder / name).stat().st_size for name in ("student.pt", "student.pt2")]
    assert sizes[1] < sizes[0] + 250_000
    for n in (300, 1, 7):
        assert torch.allclose(detector(x[:n]), pk.score(net, x[:n]), rtol=1e-5, atol=1e-5)


def write_result(out, normal, seed, *, pair="digits, 4 : 2", more=(), **auroc):
    auroc = {"teacher": 90.0, "student_alone": 80.0, "step1": 85.0, "step2": 88.0} | auroc
    auroc["gain"] = auroc["step2"] - auroc["student_alone"]
    result = {"auroc": auroc, "auroc_whitened": {k: v + (k != "gain") for k, v in auroc.items()}}
    result |= {"version": pk.VERSION, "pair": pair, "classes": ["0", "1", "2"]} | dict(more)
    file = out / f"{pair[:4]}-{normal}-seed{seed}" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result | {"normal": normal, "seed": seed}))


def test_table_by_hand(tmp_path, capsys):
    """A row a class and their mean over seeds, no mean where a class is missing; results of another
    version or without an AUROC are none."""
    for seed, alone, step2 in ((0, 80, 90), (1, 84, 92)):
        write_result(tmp_path, "0", seed, student_alone=alone, step2=step2)
    write_result(tmp_path, "1", 0, student_alone=70, step2=60)
    write_result(tmp_path, "2", 0, more={"version": pk.VERSION - 1})
    write_result(tmp_path, "0", 0, pair="parts, 8 : 2", more={"classes": ["0"]})
    write_result(tmp_path, "0", 0, pair="z, 8 : 2", more={"auroc": {}, "auroc_whitened": {}})
    assert exit_code("--table", str(tmp_path)) == 0
    plain, white, parts, _ = re.split(r"\n(?:digits|parts), .*\n\n", capsys.readouterr().out)[1:]
    means = "90.00 ± 0.00 | 82.00 ± 2.83 | 85.00 ± 0.00 | 91.00 ± 1.41 | 9.00 ± 1.41 | 2"
    head, _, *rows = plain.splitlines()
    assert head == "| class | teacher | student_alone | step1 | step2 | gain | n |"
    missing = " | ".join(["missing"] * 5)
    assert rows[:2] == [f"| 0 | {means} |", "| 1 | 90.00 | 70.00 | 85.00 | 60.00 | -10.00 | 1 |"]
    assert rows[2:] == [f"| 2 | {missing} | 0 |", f"| mean | {missing} | 0 |"]
    assert "| 1 | 91.00 | 71.00 | 86.00 | 61.00 | -10.00 | 1 |" in white
    assert "| mean | 90.00 | 80.00 | 85.00 | 88.00 | 8.00 | 1 |" in parts
    for normal in "12":
        write_result(tmp_path, normal, 1, step2=82)
    assert exit_code("--table", str(tmp_path)) == 0
    mean = f"| mean | 90.00 | {244 / 3:.2f} | 85.00 | {256 / 3:.2f} | 4.00 | 1 |"
    assert mean in capsys.readouterr().out
    assert sys.stdout.errors == "backslashreplace" and sys.stdout.line_buffering  # "±"; at once


# -------------------------------------------------------------------------------------- run_all.sh

STUB = """
import os, sys, time
with open("calls.txt", "a") as calls:
    print(os.getpid(), os.environ.get("OMP_NUM_THREADS"), *sys.argv[1:], file=calls)
if "nosuch" in sys.argv:
    sys.exit(print("no such data set", file=sys.stderr) or 2)
if "--table" in sys.argv:
    print("the tables")
elif "--skip-finished" in sys.argv:
    time.sleep(60 if "--slow" in sys.argv else 0.3)
    print("first line")
    sys.exit("no such class" if "99" in sys.argv else 0)
"""  # stands for pkdgan.py


def run_all(tmp_path, *flags, start=subprocess.run, pkdgan=STUB, **variables):
    """run_all.sh beside a pkdgan.py in a folder with a blank, called from the folder above."""
    home = tmp_path / "of mine"
    home.mkdir(exist_ok=True)
    script = shutil.copy(HERE / "run_all.sh", home)
    (home / "pkdgan.py").write_text(pkdgan)
    env = ENVIRONMENT | {"DATASETS": "digits", "NORMALS": "0 1", "OUT": "my runs"} | variables
    call = ["bash", variables.get("SCRIPT", script), *flags]
    return start(call, cwd=tmp_path, env=env, start_new_session=True, **PIPES)


def calls(tmp_path, word="--skip-finished"):
    """The stub's calls with a word: [process, threads, flags...] of each."""
    file = tmp_path / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split() for line in lines if word in line.split()]


def runs_of(tmp_path):
    """(data set, seed, class) of each run, in order."""
    flags = [dict(pairwise(words)) for words in calls(tmp_path)]
    return [(its["--dataset"], its["--seed"], its["--normal"]) for its in flags]


def test_run_all_runs_each_once_then_prints_the_tables(tmp_path):
    done = run_all(tmp_path, "--kd-adv", "3", DATASETS="digits folder", SEEDS="0 5")
    assert (done.returncode, done.stderr) == (0, "")
    every = [(d, s, n) for d in ("digits", "folder") for s in "05" for n in "01"]
    assert runs_of(tmp_path) == every
    assert all(" ".join(words).count("--kd-adv 3") == 1 for words in calls(tmp_path))
    *lines, last = done.stdout.splitlines()
    logs = [f"my runs/{d}-{n}-seed{s}.log" for d, s, n in every]
    assert lines == [f"[{k}/8] {log}" for k, log in enumerate(logs, 1)] and last == "the tables"
    assert calls(tmp_path, "--table")[-1][2:] == ["--table", "my", "runs"]
    assert run_all(tmp_path, NORMALS="1").returncode == 0
    log = (tmp_path / "my runs" / "digits-1-seed0.log").read_text()
    assert log == "first line\n" * 2  # appended: nothing is lost


def test_run_all_two_at_a_time_names_what_failed(tmp_path):
    began = time.monotonic()
    done = run_all(tmp_path, JOBS="2", NORMALS="99 a/b 0 1 2 3", OMP_NUM_THREADS="4")
    assert done.returncode == 1 and time.monotonic() - began < 6 * 0.3 + 0.5
    failed = "no result: my runs/digits-99-seed0.log: no such class"
    assert done.stderr.splitlines() == [failed]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [f"[{k}/6]" for k in range(1, 7)]
    assert any(line.endswith(failed) for line in lines) and lines[-1] == "the tables"
    assert {words[1] for words in calls(tmp_path)} == {"2"}  # threads: those of a job


def test_run_all_says_at_once_what_is_finished_and_keeps_what_stands_in_a_file(tmp_path):
    """Such as Slurm's, to which stdout and stderr go."""
    file = tmp_path / "both.txt"
    file.write_text("of others\n")
    with open(file, "a") as both:
        pipes = {"stdout": both, "stderr": both}
        how = {"start": lambda call, **options: subprocess.Popen(call, **options | pipes)}
        started = run_all(tmp_path, NORMALS="0 99 1 2 3 4 99", **how)
        while len(calls(tmp_path)) < 5:
            assert started.poll() is None
        assert "[2/7] " in file.read_text()
        started.wait()
    text = file.read_text()
    assert text.startswith("of others\n[1/7] ") and all(f"[{k}/7] " in text for k in range(1, 8))


def alive(process):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_run_all_ends_with_all_its_runs(number, tmp_path):
    started = run_all(tmp_path, "--slow", JOBS="2", NORMALS="0 1 2 3", start=subprocess.Popen)
    while len(calls(tmp_path)) < 2:
        assert started.poll() is None
    running = [words[0] for words in calls(tmp_path)]
    assert all(map(alive, running))
    started.send_signal(number)
    assert "tables" not in started.communicate(timeout=20)[0] and started.returncode != 0
    time.sleep(1)
    assert len(calls(tmp_path)) == 2 and not any(map(alive, running))


def test_run_all_shares_out_a_slurm_array(tmp_path):
    def task(number, **array):  # array: of --array=3-7:2
        variables = {f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()}
        copy = shutil.copy(HERE / "run_all.sh", tmp_path / "slurm_script")  # Slurm starts a copy
        variables |= {"SLURM_ARRAY_TASK_ID": number, "SCRIPT": str(copy)}
        variables |= {"SLURM_SUBMIT_DIR": str(tmp_path / "of mine")}
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        done = run_all(tmp_path, "--kd-adv", "3", NORMALS="0 1 2 3 4", **variables)
        assert "tables" not in done.stdout  # no table of a share
        return done.returncode, done.stderr.count("\n"), [run[2] for run in runs_of(tmp_path)]

    shares = [task(number, MIN="3", STEP="2", COUNT="3") for number in "357"]
    assert shares == [(0, 0, ["0", "3"]), (0, 0, ["1", "4"]), (0, 0, ["2"])]
    assert task("7", MIN="3", COUNT="2") == (2, 1, [])  # --array=3,7
    assert task("9", MIN="0", COUNT="10") == (0, 0, [])  # more tasks than runs


USAGE = [("no such data set", [], {"DATASETS": "digits nosuch"}), ("SEEDS", ["--seed", "5"], {})]
USAGE += [("NORMALS", ["--normal=7"], {}), ("DATASETS", ["--dataset", "mnist"], {})]
USAGE += [("OUT", ["--out", "other"], {})] + [(f"JOBS={n}", [], {"JOBS": n}) for n in ("x", "0")]


@pytest.mark.parametrize("words, flags, variables", USAGE)
def test_run_all_starts_nothing_on_a_usage_error(words, flags, variables, tmp_path):
    done = run_all(tmp_path, *flags, **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert done.stdout == "" and not (tmp_path / "my runs").exists()


@in_background
def test_run_all_takes_no_flags_that_pkdgan_refuses(tmp_path):
    """Said once, before any run."""
    real = {"pkdgan": (HERE / "pkdgan.py").read_text(), "NORMALS": "99"}
    for flags in (["--what"], ["--batch", "0"]):
        done = run_all(tmp_path, *flags, **real)
        assert done.returncode == 2 and flags[0] in done.stderr
        assert not (tmp_path / "my runs").exists()


def test_run_all_where_out_is_a_file_or_there_is_only_python3(tmp_path):
    (tmp_path / "my runs").write_text("")
    done = run_all(tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "runs" in done.stderr
    (tmp_path / "bin").mkdir()
    for name in ("bash", "awk", "dirname", "getconf", "mkdir", "tail", "tee", "wc", "xargs"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    done = run_all(tmp_path, PATH=str(tmp_path / "bin"), OUT="third")
    assert (done.returncode, done.stderr) == (0, "") and "the tables" in done.stdout


@in_background
def test_run_all_with_the_real_program(tmp_path):
    """A run, a failed one and the tables; started again, what is finished is skipped."""
    real, folder = {"pkdgan": (HERE / "pkdgan.py").read_text()}, tmp_path / "my runs/digits-0-seed0"
    done = run_all(tmp_path, *FAST, NORMALS="0 99", JOBS="2", **real)
    assert done.returncode == 1
    assert re.fullmatch(r"no result: .*99-seed0.log: pkdgan.py: --normal 99: .*\n", done.stderr)
    step2 = json.loads((folder / "result.json").read_text())["auroc"]["step2"]
    assert names_in(folder) == FILES and re.search(rf"\| 0 \| .*\| {step2:.2f} \|", done.stdout)
    again = run_all(tmp_path, *FAST, NORMALS="0", **real)
    assert again.returncode == 0 and "finished before" in Path(f"{folder}.log").read_text()


def test_readme_names_what_there_is_and_line_endings_stay():
    """Git for Windows would give scripts CR LF, a syntax error to bash."""
    assert "*.sh text eol=lf" in (HERE / ".gitattributes").read_text().splitlines()
    readme = (HERE / "README.md").read_text()
    named = set(re.findall(r"`([a-z_]+)\(", readme))
    assert {name for name in named if not hasattr(pk, name)} == set()
    losses = {name for name in vars(pk) if name.endswith("_loss")}
    assert losses <= named and len(losses) == 7
    known = {"--" + name.replace("_", "-") for name in vars(pk.parse([]))} | {"--array", "--help"}
    assert set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", readme)) <= known


def test_one_thread_unless_told_otherwise(monkeypatch):
    """More of them wait for one another where two runs share the cores."""
    seen = []
    monkeypatch.setattr(pk, "run", lambda args: seen.append(torch.get_num_threads()))
    for told in (None, "2"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if told:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        torch.set_num_threads(2)
        assert pk.main([]) is None
    torch.set_num_threads(1)
    assert seen == [1, 2]


def test_everything_public_has_a_docstring():
    for name, item in vars(pk).items():
        if getattr(item, "__module__", "") == "pkdgan" and name != "Task":
            assert item.__doc__, name
