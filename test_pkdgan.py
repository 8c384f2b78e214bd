"""Tests of pkdgan.py and run_all.sh: offline, a minute on two cores, by `pytest`. First the method,
by values found by hand and code written a second time from the equations, then the program, some
of whose tests need Linux."""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from itertools import accumulate, pairwise
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
LENGTHS = ["--teacher-updates", "10", "--alone-updates", "14"]
LENGTHS += ["--step1-updates", "10", "--step2-updates", "4"]
NETS = ["--size", "16", "--teacher-width", "4", "--student-width", "2", "--batch", "16"]
FAST = [*NETS, *LENGTHS]  # a run on digits with these takes seconds
IDLE = [*NETS, "--teacher-updates", "0", "--alone-updates", "0"]
IDLE += ["--step1-updates", "0", "--step2-updates", "0"]
PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"PATH": PYTHON, "OMP_NUM_THREADS": "1"}
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
torch.set_num_threads(1)  # these nets are too small for more

SMALL = pk.Settings(
    teacher_width=4,
    student_width=2,
    z_dim=10,
    teacher_updates=6,
    alone_updates=9,
    step1_updates=6,
    step2_updates=3,
    batch=4,
    lr_teacher=3e-3,
    lr_student=2e-3,
    lr_step2_teacher=5e-4,
    w_adv=2.0,
    w_con=3.0,
    w_lat=5.0,
    w_own=0.7,
    kd_inter=100.0,
    kd_latent=50.0,
    kd_adv=10.0,
    kd_residual=20.0,
)


def tensor(*values):
    """tensor(1.0, 2.0) and tensor([1.0, 2.0]) are the same."""
    return torch.tensor(values[0] if isinstance(values[0], list) and len(values) == 1 else values)


def small_gan(width=4, size=16, channels=1, seed=0):
    torch.manual_seed(seed)
    return pk.GAN(size, channels, width, 10)


def teacher_and_student():
    return small_gan(4), small_gan(2)


def images(n=4, size=16, channels=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


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

    def test(background):
        background[scenario.__name__].result()

    return test


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    wanted = [item.name for item in request.session.items if item.name in SCENARIOS]
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(SCENARIOS[n], tmp_path_factory.mktemp(n)) for n in wanted}


# ==================================================================================================
# THE METHOD: losses, networks, an update, what each stage moves, the stages, the score
# ==================================================================================================

BY_HAND = [
    (pk.discriminator_loss, [[0.0], [0.0]], math.log(2)),
    (pk.discriminator_loss, [[3.0], [0.0]], 0.3708673),
    (pk.discriminator_loss, [[0.0], [3.0]], 1.8708673),
    (pk.adversarial_loss, [[1.0, 2.0], [1.0, 0.0]], 2),
    (pk.contextual_loss, [[1.0, -1.0], [0.0, 1.0]], 1.5),
    (pk.latent_loss, [[1.0, 1.0], [0.0, -1.0]], 2.5),
    (pk.intermediate_distillation_loss, [[1.0], [0.5]], 0.5),
    (pk.latent_distillation_loss, [[1.0], [0.0], [1.0], [3.0]], 5),
    (pk.adversarial_distillation_loss, [[1.0, 2.0], [0.0, 2.0]], 0.5),
    (pk.residual_distillation_loss, [[1.0], [0.0], [1.0], [3.0]], 9),
]


@pytest.mark.parametrize("loss, values, by_hand", BY_HAND)
def test_loss_by_hand(loss, values, by_hand):
    assert loss(*map(tensor, values)).item() == pytest.approx(by_hand, abs=1e-6)


def test_no_gradient_reaches_what_is_real_or_the_teachers():
    t, s = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    total = pk.adversarial_loss(t, s)
    total += pk.intermediate_distillation_loss(t, s)
    total += pk.latent_distillation_loss(t, s, t, 2 * s)
    total += pk.adversarial_distillation_loss(t, s)
    total += pk.residual_distillation_loss(t, s, t, 2 * s)
    total.backward()
    assert t.grad is None and s.grad is not None
    (teacher, student), x = teacher_and_student(), images()
    sum(pk.distillation_losses(student, teacher.g(x), student.g(x), SMALL)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 3), (64, 1)])
def test_shapes(size, channels):
    net, x = small_gan(3, size, channels), images(2, size, channels)
    out, (logit, features) = net.g(x), net.d(x)
    assert out.z.shape == out.z_hat.shape == (2, 10) and out.x_hat.shape == x.shape
    assert logit.shape == (2, 1) and out.x_hat.abs().max() <= 1
    assert features.shape == (2, pk.block_widths(size, 3)[-1], 4, 4)
    for code in (out.z, out.z_hat):
        assert torch.allclose(code.norm(dim=1), torch.tensor(10.0).sqrt())
    assert torch.allclose(pk.score(net, x), (out.z - out.z_hat).square().sum(1).sqrt())


@pytest.mark.parametrize("size", [28, 24, 8, 33, 1024])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=f"{size} x {size}: resize them to one of .16, 32"):
        pk.train_stages(images(2, size), SMALL)


def test_channels_double_up_to_eight_times_the_width():
    assert pk.block_widths(16, 5) == [5, 10]
    assert pk.block_widths(256, 2) == [2, 4, 8, 16, 16, 16]


def test_norm_is_that_of_a_batch_of_one_and_its_mode_changes_nothing():
    norms = [m for m in small_gan().modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    assert len(norms) == 5  # two blocks a net, less those at images
    for norm in norms:
        x = torch.randn(3, norm.num_features, 4, 4)
        alone = [F.batch_norm(image[None], None, None, training=True) for image in x]
        assert torch.allclose(norm(x), torch.cat(alone), atol=1e-5)
        assert torch.equal(norm.eval()(x), norm.train()(x)) and norm.affine
        assert not [*norm.buffers()]


# -------------------------------------------------------------------------------------- one update


def naive_rate(peak, update, updates):
    """The learning rate of an update, the first is 0: up to the peak in a straight line during the
    first 15 %, then down on half a cosine; as it is in the middle of the update."""
    done = (update + 0.5) / updates
    warm_up = done / 0.15
    cosine = 0.5 + 0.5 * math.cos((done - 0.15) / (1 - 0.15) * math.pi)
    return peak * (warm_up if done < 0.15 else cosine)


def naive_discriminator_loss(d, real, fake):
    """Cross-entropy of real, 1, and fake, 0. Images are detached: no generator moves by it."""
    real_is_1 = d(real.detach())[0].sigmoid().log().mean()
    fake_is_0 = (1 - d(fake.detach())[0].sigmoid()).log().mean()
    return -(real_is_1 + fake_is_0) / 2


def naive_generator_loss(gan, x, out):
    """L_G with SMALL's weights."""
    feature, feature_hat = gan.d(x)[1].detach(), gan.d(out.x_hat)[1]
    adv = ((feature - feature_hat) ** 2).mean()
    return 2 * adv + 3 * (x - out.x_hat).abs().mean() + 5 * ((out.z - out.z_hat) ** 2).mean()


def naive_distillation_loss(d, out_t, out_s):
    """L_KD with SMALL's weights; everything of the teacher's is detached."""
    z, x_hat, z_hat = (value.detach() for value in out_t)
    inter = (x_hat - out_s.x_hat).abs().mean()
    latent = ((z - out_s.z) ** 2).mean() + ((z_hat - out_s.z_hat) ** 2).mean()
    feature_t, feature_s = d(x_hat)[1].detach(), d(out_s.x_hat)[1]
    return 100 * inter + 50 * latent + 10 * ((feature_t - feature_s) ** 2).mean()


def naive_residual_loss(out_t, out_s):
    """L_residual; everything of the teacher's is detached."""
    return (((out_t.z - out_t.z_hat).detach() - (out_s.z - out_s.z_hat)) ** 2).mean()


def naive_training(stage, teacher, student, x, rates, before=0, after=0, w_own=0.7, w_residual=20):
    """An epoch as one would write it from the equations: an Adam for the discriminators, one for
    the generators, and both losses are known before either moves. The schedule of the rates has
    some updates before and after the epoch."""
    rate_t, rate_s = rates
    moving = [(student, rate_s), (teacher, rate_t)] if stage == "step 2" else [(student, rate_s)]
    d_groups = [{"params": gan.d.parameters(), "peak": rate} for gan, rate in moving]
    g_groups = [{"params": gan.g.parameters(), "peak": rate} for gan, rate in moving]
    adams = [torch.optim.Adam(groups, betas=(0.5, 0.999)) for groups in (d_groups, g_groups)]
    rng = torch.Generator().manual_seed(0)
    epochs = [torch.randperm(len(x), generator=rng).split(4) for _ in range(2)]
    indices = [*epochs[0], *epochs[1]]
    updates = len(epochs[0])
    for update in range(before, before + updates):
        part, loss_d, loss_g = x[indices[update]], 0, 0
        out_t, out_s = teacher.g(part), student.g(part)
        if stage != "alone":
            loss_d = 10 * naive_discriminator_loss(student.d, out_t.x_hat, out_s.x_hat)
            loss_g = naive_distillation_loss(student.d, out_t, out_s)
        if stage != "step 1":
            w = 1 if stage == "alone" else w_own
            loss_d = loss_d + w * naive_discriminator_loss(student.d, part, out_s.x_hat)
            loss_g = loss_g + w * naive_generator_loss(student, part, out_s)
        if stage == "step 2":
            loss_d = loss_d + naive_discriminator_loss(teacher.d, part, out_t.x_hat)
            loss_g = loss_g + naive_generator_loss(teacher, part, out_t)
            loss_g = loss_g + w_residual * naive_residual_loss(out_t, out_s)
        for adam, loss in zip(adams, (loss_d, loss_g), strict=True):
            adam.zero_grad()
            loss.backward(inputs=[p for group in adam.param_groups for p in group["params"]])
        for adam in adams:
            for group in adam.param_groups:
                group["lr"] = naive_rate(group["peak"], update, before + updates + after)
            adam.step()


@pytest.mark.parametrize("updates", [1, 12])
@pytest.mark.parametrize("stage", ["alone", "step 1", "step 2"])
def test_a_naive_update_gives_the_same_weights(stage, updates):
    """The stages against naive_training(). A stage of a single update learns, too."""
    x, rate_t, rate_s = images(4 * updates), 1e-3, 2e-3
    s = replace(SMALL, step1_updates=updates, step2_updates=updates)
    s = replace(s, lr_student=rate_s, lr_step2_teacher=rate_t)
    before, after = {"alone": (0, 0), "step 1": (0, updates), "step 2": (updates, 0)}[stage]
    (teacher, student), (t, naive) = teacher_and_student(), teacher_and_student()
    initial_t, initial_s = weights(t), weights(naive)
    if stage == "alone":
        pk.train_gan("student_alone", student, x, rate_s, updates, s)
    elif stage == "step 1":
        pk.train_step1(student, teacher, x, s)
    else:
        pk.train_step2(student, teacher, x, s)
    naive_training(stage, t, naive, x, (rate_t, rate_s), before, after)
    assert close(weights(teacher), weights(t)) and close(weights(student), weights(naive))
    assert not close(initial_s, weights(student))
    if stage == "step 2":
        assert not close(initial_t, weights(teacher))
    else:  # the teacher is as it was, bit by bit, and never had a gradient
        assert same(initial_t, weights(teacher))
        assert all(p.grad is None for p in teacher.parameters())


def test_single_step_structures_are_step_2_with_other_arguments():
    """At a rate of 0 the teacher stays as it is, bit by bit; with w_own = 0 step 2 is step 1."""
    x = images(16)
    s = replace(SMALL, step1_updates=0, step2_updates=4, lr_student=1e-3, lr_step2_teacher=0.0)
    alike, again = small_gan(2), small_gan(4)
    pk.train_step1(alike, again, x, replace(s, step1_updates=4, step2_updates=0))
    for w_own in (0.0, 0.7):
        (teacher, student), (t, by_hand) = teacher_and_student(), teacher_and_student()
        pk.train_step2(student, teacher, x, replace(s, w_own=w_own, kd_residual=0.0))
        assert same(weights(teacher), weights(small_gan(4)))
        naive_training("step 2", t, by_hand, x, (0.0, 1e-3), w_own=w_own, w_residual=0)
        assert close(weights(student), weights(by_hand))
        assert close(weights(student), weights(alike)) == (w_own == 0)


def test_a_teacher_frozen_by_torch_is_as_one_at_a_rate_of_0():
    s = replace(SMALL, step2_updates=4, lr_student=1e-3, lr_step2_teacher=0.0)
    (teacher, student), (frozen, same_student) = teacher_and_student(), teacher_and_student()
    pk.train_step2(student, teacher, images(16), s)
    pk.train_step2(same_student, frozen.requires_grad_(False), images(16), s)
    assert same(weights(student), weights(same_student))


def test_rate_by_hand():
    """Of ten updates, the first stands at 5 % of the way, the second at 15 %: at its peak."""
    shares = [pk.rate_factor(update, 10) for update in range(1, 11)]
    assert shares[:2] == pytest.approx([1 / 3, 1])
    assert shares[1:] == sorted(shares[1:], reverse=True) and 0 < shares[-1] < 0.01
    assert 0.5 < pk.rate_factor(1, 1) < 0.7


# ---------------------------------------------------------------------------- update and the stages


def batches_of(n, updates, **changes):
    return pk.shuffled_batches(images(n), updates, replace(SMALL, **changes))


def test_every_image_once_a_pass_and_every_batch_is_whole():
    batches = batches_of(10, 8)
    assert [len(batch) for batch in batches] == [4] * 8
    order = torch.cat(batches).tolist()
    passes = order[:10], order[10:20], order[20:30]
    assert all(sorted(one) == [*range(10)] for one in passes) and passes[0] != passes[1]
    state = torch.random.get_rng_state()  # the seed decides, not torch's state
    assert torch.equal(torch.cat(batches_of(10, 8)), tensor(*order))
    assert not torch.equal(torch.cat(batches_of(10, 8, seed=1)), tensor(*order))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(batch) for batch in batches_of(3, 2, batch=8)] == [8, 8]
    assert batches_of(3, 0) == ()


@pytest.mark.parametrize("updates, told", [(20, [*range(2, 21, 2)]), (3, [1, 2, 3]), (0, [])])
def test_losses_are_reported_ten_times_a_stage(updates, told):
    reports = []

    def report(*what):
        reports.append(what)

    for k in range(1, updates + 1):
        pk.check_and_report("a stage", "its net", k, updates, tensor(k), tensor(2 * k), report)
    assert reports == [("a stage", "its net", k, updates, k, 2 * k) for k in told]


@pytest.mark.parametrize("d, g", [(math.inf, 1.0), (1.0, math.nan)])
def test_a_stage_stops_at_an_overflow(d, g):
    pk.check_and_report("a stage", None, 3, 20, tensor(d), tensor(g), None)
    with pytest.raises(FloatingPointError, match="a stage.*learning rates"):
        pk.check_and_report("a stage", None, 4, 20, tensor(d), tensor(g), None)


def stages_by_hand(x, s):
    """What the header's table says of the stages: fresh nets, who learns from whom, copies."""
    teacher, alone, step1 = (small_gan(width, seed=s.seed) for width in (4, 2, 2))
    pk.train_gan("teacher", teacher, x, s.lr_teacher, s.teacher_updates, s)
    pk.train_gan("student_alone", alone, x, s.lr_student, s.alone_updates, s)
    pk.train_step1(step1, teacher, x, s)
    step2, teacher_step2 = small_gan(2), small_gan(4)
    step2.load_state_dict(step1.state_dict())  # copies: step 2 changes no earlier net
    teacher_step2.load_state_dict(teacher.state_dict())
    pk.train_step2(step2, teacher_step2, x, s)
    nets = {"teacher": teacher, "student_alone": alone, "step1": step1, "step2": step2}
    return nets | {"teacher_step2": teacher_step2}


@pytest.mark.parametrize("seed", [0, 7])
def test_stages_are_those_of_the_table(seed):
    x, s, reports = images(12), replace(SMALL, seed=seed), []
    nets = pk.train_stages(x, s, lambda *what: reports.append(what))
    expected = stages_by_hand(x, s)
    assert list(nets) == list(expected)
    for stage in nets:
        assert same(weights(nets[stage]), weights(expected[stage])), stage
    ends = {stage: update for stage, net, update, updates, *_ in reports if update == updates}
    assert ends == {"teacher": 6, "student_alone": 9, "step1": 6, "step2": 3}
    assert all(net.g(x[:1]).x_hat.shape == (1, 1, 16, 16) for _, net, *_ in reports)


def test_a_stage_that_is_skipped_changes_no_other():
    """Neither a teacher that was trained before nor a student alone of no updates."""
    x = images(12)
    nets = pk.train_stages(x, SMALL)
    kept = weights(nets["teacher"])
    torch.manual_seed(5)
    again = pk.train_stages(x, replace(SMALL, alone_updates=0), teacher=nets["teacher"])
    for stage in ("teacher", "step1", "step2", "teacher_step2"):
        assert same(weights(nets[stage]), weights(again[stage])), stage
    assert same(kept, weights(nets["teacher"]))
    assert same(weights(again["student_alone"]), weights(small_gan(2)))


def test_what_the_frozen_teacher_makes_is_made_once_and_keeps_no_graph(monkeypatch):
    seen, calls, losses = [], [], pk.distillation_losses

    def spy(student, out_t, out_s, settings):
        seen.append(out_t)
        return losses(student, out_t, out_s, settings)

    monkeypatch.setattr(pk, "distillation_losses", spy)
    (teacher, student), x = teacher_and_student(), images(12)
    teacher.g.register_forward_hook(lambda *call: calls.append(1))
    pk.train_step1(student, teacher, x, replace(SMALL, batch=12))
    assert len(seen) == 6 and len(calls) == 1
    assert not any(value.requires_grad for out_t in seen for value in out_t)
    [first] = batches_of(12, 1, batch=12)
    for value, by_hand in zip(seen[0], teacher.g(x[first]), strict=True):
        assert torch.allclose(value, by_hand, atol=1e-5)


def test_training_does_what_it_is_for():
    """On digits, a teacher tells eights from the rest, and step 1 brings a student near to it."""
    task = task_of("--size", "16", "--normal", "8")
    s = replace(pk.EXPERIMENTS["digits"], teacher_width=8, student_width=2, lr_teacher=4e-3)
    s = replace(s, teacher_updates=60, alone_updates=0, step1_updates=80, step2_updates=10)
    nets = pk.train_stages(task.x, s)
    aurocs = {name: pk.auroc(pk.score(net, task.x_test), task.y_test) for name, net in nets.items()}
    assert aurocs["teacher"] > 85 and aurocs["step1"] > 80 and aurocs["step2"] > 80
    with torch.no_grad():
        out = {name: net.g(task.x) for name, net in nets.items()}
    for field in pk.Generated._fields:
        of_teacher = getattr(out["teacher"], field)
        before = (getattr(out["student_alone"], field) - of_teacher).abs().mean()
        after = (getattr(out["step1"], field) - of_teacher).abs().mean()
        assert after < 0.8 * before, field


def flops(width, size, channels, z_dim):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = pk.GAN(size, channels, width, z_dim)
        net.d(net.g(torch.zeros(1, channels, size, size)).x_hat)
    return counter.get_total_flops()


RATIOS = [("cifar10", 40, 24.45), ("mnist", 352, 311.11), ("fmnist", 719, 700)]
RATIOS += [("folder", 76, 0), ("digits", 230, 0)]


@pytest.mark.parametrize("dataset, ratio, papers", RATIOS)
def test_experiments_are_fair_and_reach_the_papers_ratios(dataset, ratio, papers):
    """The ratios are those of the comments behind EXPERIMENTS."""
    s, channels = pk.EXPERIMENTS[dataset], 3 if dataset in ("cifar10", "folder") else 1
    assert s.alone_updates == s.step1_updates + s.step2_updates
    both = [flops(width, 32, channels, s.z_dim) for width in (s.teacher_width, s.student_width)]
    assert both[0] / both[1] >= papers and round(both[0] / both[1]) == ratio
    assert re.search(rf'"{dataset}": Settings.*  # {ratio}\b', (HERE / "pkdgan.py").read_text())


@in_background
def test_upper_half_pasted_alone_trains(tmp_path):
    """The method knows nothing of files, flags, pictures and printing."""
    method, *program = re.split("^# ====", (HERE / "pkdgan.py").read_text(), flags=re.MULTILINE)
    assert len(program) == 1
    assert not re.search(r"(import|from) +(argparse|torchvision|PIL|pathlib)", method)
    assert "print(" not in method and "open(" not in method
    (tmp_path / "method.py").write_text(method)
    code = f"""
import sys
sys.modules["torchvision"] = sys.modules["PIL"] = None
import torch
from method import Settings, score, train_stages
nets = train_stages(x := torch.rand(12, 1, 16, 16) * 2 - 1, {SMALL})
assert " ".join(nets) == "teacher student_alone step1 step2 teacher_step2"
assert score(nets["step2"], x).shape == (12,)
"""
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------- the score


def test_score_depends_on_the_image_alone():
    net, x, order = small_gan(), images(300), torch.randperm(300)
    scores = pk.score(net.train(), x)
    assert torch.equal(scores, pk.score(net.eval(), x))  # there is nothing that the mode changes
    assert scores.std() > 0 and scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.allclose(pk.score(net, x[order]), scores[order], rtol=1e-5)
    alone = torch.cat([pk.score(net, image[None]) for image in x[:20]])
    assert torch.allclose(alone, scores[:20], rtol=1e-5)
    assert pk.score(net, x[:0]).shape == (0,)


def test_parts_take_as_much_memory_at_any_size():
    for size, at_a_time in ((16, 512), (32, 128), (128, 8), (512, 1)):
        parts = pk.small_batches(
            torch.empty(1100 if size < 64 else 9, 3, size, size, device="meta")
        )
        assert len(parts[0]) == at_a_time


def test_auroc_is_in_percent_with_anomalies_high():
    y = tensor(0, 0, 1, 1)
    assert pk.auroc(tensor(1.0, 2.0, 3.0, 4.0), y) == 100
    assert pk.auroc(tensor(1.0, 3.0, 2.0, 4.0), y) == 75
    assert pk.auroc(tensor(1.0, 2.0, 3.0, 4.0), 1 - y) == 0
    with pytest.raises(FloatingPointError, match="learning rates"):
        pk.auroc(tensor(1.0, 2.0, math.nan, 4.0), y)


def make_detector(x, x_held, width=2):
    net = small_gan(width)
    return net, pk.make_detector(net, x, x_held, SMALL)


def test_detectors_score_is_the_mahalanobis_length_of_the_residual():
    x = images(400)
    net, detector = make_detector(x, images(0))
    r = pk.residuals(net, x).double()
    m, inverse = r.mean(0), torch.linalg.inv(torch.cov(r.T, correction=0))
    by_hand = torch.stack([((v - m) @ inverse @ (v - m)).sqrt() for v in r])
    scores, p_values = detector(x)
    assert torch.allclose(scores.double(), by_hand, rtol=0.1)  # the covariance is shrunk a little
    assert torch.corrcoef(torch.stack([scores.double(), by_hand]))[0, 1] > 0.99
    assert scores.square().mean().item() == pytest.approx(10, rel=0.1)  # unit variance, z_dim 10
    assert (p_values == 1).all() and pk.detect(detector, x[:0])[0].shape == (0,)
    assert p_values.dtype == pk.detect(detector, x[:0])[1].dtype == torch.float64
    scores.numpy(), p_values.numpy()  # neither has a gradient


def test_a_student_whose_codes_overflow_is_named():
    net = small_gan(2)
    net.g.encode.head.bias.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="codes are no numbers: lower the learning rates"):
        pk.make_detector(net, images(), images(0), SMALL)


def test_whitening_of_directions_that_hardly_vary(monkeypatch):
    r = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    r[:, 1:] *= 1e-3  # inverted in float32, such a covariance has no root
    monkeypatch.setattr(pk, "residuals", lambda generator, x: r)
    net, s = pk.GAN(16, 1, 2, 256), replace(SMALL, z_dim=256)
    detector = pk.make_detector(net, images(1), images(0), s)
    spread = ((r - detector.mean) @ detector.whitener).std(0)[0]
    assert spread.item() == pytest.approx(1, abs=0.05) and spread.dtype == torch.float32


class Given(torch.nn.Module):
    """Stands for a generator whose r = z - z_hat is the "image" itself."""

    def forward(self, x):
        return pk.Generated(x, None, torch.zeros_like(x))


def of_scores(*held_out):
    """A function that gives the p-values of scores, as a Detector with held-out scores does."""
    detector = pk.Detector(16, 1, 2, 1, len(held_out))
    detector.g = Given()
    detector.held_out_scores.copy_(torch.tensor(held_out))
    return lambda *scores: detector(torch.tensor(scores)[:, None])[1]


def test_p_values_by_hand():
    p = of_scores(1.0, 2.0, 2.0, 3.0)(0.0, 1.0, 1.5, 2.0, 3.0, 3.5)
    assert p.tolist() == [1, 1, 4 / 5, 4 / 5, 2 / 5, 1 / 5]  # exact: p <= alpha is right at alpha
    assert of_scores(1.0, 2.0, 3.0)(2.5) == 0.5 and of_scores()(7.0) == 1
    ties = of_scores(*[2.0] * 99)  # rounded otherwise on another device
    assert ties(2 + 2e-6, 2 + 2e-3).tolist() == [1, 0.01]


def test_p_values_of_held_out_images_are_theirs():
    """Each held-out image, seen again, has as many scores as high as its rank."""
    x_held = images(30, seed=1)
    _, detector = make_detector(images(100), x_held)
    scores, p_values = detector(x_held)
    ranks = (scores[:, None] <= scores[None]).sum(1)
    assert torch.equal(p_values, (1 + ranks).double() / 31)
    assert torch.equal(detector.held_out_scores, scores.sort().values)


# ==================================================================================================
# THE PROGRAM: flags, data, bad input, a run and its files, scoring, tables, run_all.sh, the README
# ==================================================================================================


def exit_code(*flags):
    try:
        return pk.main([str(flag) for flag in flags])
    except SystemExit as end:  # argparse
        return end.code


def one_line(stderr):
    assert len(stderr.splitlines()) == 1 and stderr.startswith("pkdgan.py: "), stderr
    return stderr


@pytest.mark.parametrize("dataset", pk.EXPERIMENTS)
def test_help_explains_every_flag_with_the_values_of_the_data_set(dataset, capsys):
    assert exit_code("--dataset", dataset, "--help") == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    _, options, settings = pk.parse(["--dataset", dataset])
    assert settings == pk.EXPERIMENTS[dataset] and options.dataset == dataset
    options.device = ""  # its default; parse() has found one
    assert options.holdout == (0.2 if dataset == "folder" else 0)
    for values in (options, settings):
        for item in fields(values):
            flag, value = item.name.replace("_", "-"), getattr(values, item.name)
            explained = item.metadata["text"] + (f" ({value})" if value != "" else "")
            assert f" --{flag} " in text and explained in text and len(explained) > 15
    assert text.count("python pkdgan.py") == 4 and "--score" in text and "--table" in text


def test_flags_change_what_they_name():
    words = "--dataset mnist --step2-updates 0 --holdout 0 --batch 1 --lr-student 1e-4 --seed 3"
    _, options, settings = pk.parse(words.split())
    changed = {"step2_updates": 0, "batch": 1, "lr_student": 1e-4, "seed": 3}
    assert settings == replace(pk.EXPERIMENTS["mnist"], **changed)
    assert options.holdout == 0 and pk.EXPERIMENTS["mnist"].batch == 64  # which is left alone


OUT_OF_RANGE = """--step1-updates -1, --teacher-updates 1.5, --batch 0, --z-dim 1, --teacher-width 0
--student-width -3, --holdout 1, --holdout -0.1, --alpha 0, --alpha 1, --alpha nan, --w-own inf
--lr-student -1, --lr-student inf, --lr-teacher nan, --w-adv nan, --seed -1, --seed x, --size 24
--dataset nosuch"""


@pytest.mark.parametrize("words", re.split(r", |\n", OUT_OF_RANGE))
def test_a_value_out_of_range_gets_one_line_that_names_the_flag(words, capsys):
    flag, value = words.split()
    assert exit_code(flag, value) == 2
    out, err = capsys.readouterr()
    assert flag in one_line(err) and value in err and out == ""


@pytest.mark.parametrize("flag", ["--teacher-wid", "--epochs", "--dat"])
def test_an_unknown_flag_is_refused(flag, capsys):
    """Flags are not guessed from their beginnings."""
    assert exit_code(flag, "8") == 2 and flag in one_line(capsys.readouterr().err)


def test_pca_knows_images_unlike_the_training_images():
    x = images(1, 32) * torch.linspace(-1, 1, 120).view(-1, 1, 1, 1)
    other = images(1, 32, seed=1) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(-1, 1, 1, 1)
    x_test, y = torch.cat([x[100:], other[1:]]), torch.arange(23) > 19
    scores, p_values = pk.pca_scores(SimpleNamespace(x=x[:100], x_held=x[:0], x_test=x_test))
    assert pk.auroc(scores, y) == 100 and torch.equal(p_values, torch.ones(23).double())
    held_out = torch.cat([other[2:3], x[100:103]])  # one scores as high as one of the anomalies
    scores, p_values = pk.pca_scores(SimpleNamespace(x=x[:100], x_held=held_out, x_test=x_test))
    assert p_values[-3:].tolist() == [2 / 5, 2 / 5, 1 / 5] and (p_values[:-3] >= 2 / 5).all()


# -------------------------------------------------------------------------------------------- data


def task_of(*flags):
    return pk.load_task(pk.parse([*FAST, *map(str, flags)])[1])


def test_training_set_is_the_normal_class_and_the_test_set_everything():
    """Held out are the last images: neighbours are often alike, such as photographs of one part. A
    random choice would hold out siblings of images that were trained on."""
    options = pk.parse(FAST)[1]
    x, names, classes = pk.load_split(options, "train")
    x_test, kinds, _ = pk.load_split(options, "test")
    assert x.shape == (1198, 1, 16, 16) and x_test.shape == (599, 1, 16, 16)
    every = x[[name == "7" for name in names]] / 127.5 - 1
    for share in (0, 0.1, 0.5):
        task = task_of("--normal", "7", "--holdout", share)
        assert torch.equal(torch.cat([task.x, task.x_held]), every)
        assert len(task.x_held) == math.ceil(share * len(every))
    assert len(task_of("--normal", "9", "--holdout", 0.9).x) == 12  # 10 % of 120, rounded or not
    assert task.normal == "7" and classes == list("0123456789")
    assert torch.equal(task.x_test, x_test / 127.5 - 1) and task.x.dtype == torch.float32
    assert task.y_test == [kind != "7" for kind in kinds] and task.kinds == kinds
    whole = task_of("--normal", "7")
    assert task.training_images != whole.training_images
    assert task.evaluation_images != whole.evaluation_images


@pytest.mark.parametrize("normal", ["3", "Coat"])
def test_grey_data_sets_of_torchvision(normal, monkeypatch):
    """Classes by number or name."""
    pixels, targets = torch.randint(0, 256, (80, 28, 28)).byte(), torch.arange(80) % 4

    def split(root, train, download):
        half = slice(0, 60) if train else slice(60, None)
        names = ["a", "b", "c", "Coat"]
        return SimpleNamespace(data=pixels[half], classes=names, targets=targets[half])

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", split)
    task = task_of("--dataset", "fmnist", "--normal", normal, "--size", "32")
    assert task.normal == "Coat" and task.kinds == ["a", "b", "c", "Coat"] * 5
    assert task.y_test == [True, True, True, False] * 5
    assert task.x.shape == (15, 1, 32, 32) and task.x_test.shape == (20, 1, 32, 32)


def test_cifar10_pickles(tmp_path, monkeypatch):
    """The real archive's layout: five training batches and one of test, planes R, G, B by rows."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    names = [f"class {k}" for k in range(10)]

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
    options = pk.parse(["--dataset", "cifar10", "--data", str(tmp_path)])[1]
    x, kinds, classes = pk.load_split(options, "train")
    x_test, kinds_test, _ = pk.load_split(options, "test")
    assert classes == kinds_test == names and kinds == names * 5
    assert x.shape == (50, 3, 32, 32) and x_test.shape == (10, 3, 32, 32)
    assert x[7, :, 5, 5].tolist() == [255, 0, 128]


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


def folder_task(root, normal="good", holdout=0):
    return task_of(*FOLDER, root, "--normal", normal, "--holdout", holdout)


def test_image_folder_as_of_mvtec(tmp_path):
    """In test/, "bent" is before "good", but classes are matched by name."""
    make_folder(tmp_path, classes=("good", "bent", "scratch"))
    make_folder(tmp_path / "ground_truth", train=0)
    task = folder_task(tmp_path, holdout=0.1)
    assert task.normal == "good" and task.source == tmp_path.name
    assert task.kinds == ["bent"] * 3 + ["good"] * 3 + ["scratch"] * 3
    assert task.y_test == [kind != "good" for kind in task.kinds]
    assert len(task.x) == 10 and len(task.x_held) == 2
    for file, x in (("train/good/00", task.x[0]), ("test/good/02", task.x_test[5])):
        image = Image.open(tmp_path / f"{file}.png").resize((16, 16), Image.Resampling.BILINEAR)
        assert torch.equal(x, TF.pil_to_tensor(image) / 127.5 - 1)


def test_classes_are_folders_and_those_named_by_numbers_are_names_alone(tmp_path):
    make_folder(tmp_path, classes=("1", "2", "3"), trained=3)
    assert [folder_task(tmp_path, name).normal for name in "123"] == ["1", "2", "3"]
    message = f"--normal 0: the classes in {tmp_path}/train are: 1, 2, 3"
    with pytest.raises(pk.UsageError, match=message):
        folder_task(tmp_path, "0")
    picture(1).save(tmp_path / "test" / "contact-sheet.png")
    with pytest.raises(pk.UsageError, match="--normal ²: the classes"):  # int("²") fails
        task_of("--normal", "²")
    with pytest.raises(OSError, match="contact-sheet.png is in no class"):
        folder_task(tmp_path, "1")


def test_a_folder_is_walked_in_one_way(tmp_path, capsys):
    """Links are followed, but not in circles; hidden is left out; what is named as no image is
    counted; case and other signs in names do not matter."""
    good = make_folder(tmp_path / "parts", train=10) / "train" / "good"
    link = make_folder(tmp_path / "elsewhere", classes=("linked",), train=1) / "train" / "linked"
    root = tmp_path / "parts"
    names = {
        "z1.PNG": "PNG",
        "z2.bmp": "BMP",
        "z3.gif": "GIF",
        "z4.jfif": "JPEG",
        "z[5].tif": "TIFF",
    }
    for name, kind in names.items():
        picture(name).save(good / name, kind)
    (good / "zlink").symlink_to(link)
    (good / "again").symlink_to(".")
    (link / "back").symlink_to(good)
    (good / "zz.png").mkdir()  # a folder named like an image
    for hidden in (".ipynb_checkpoints", "@eaDir", ".@__thumb"):
        for place in (good, root / "test", root / "test" / "scratch"):
            (place / hidden / "00.png").mkdir(parents=True)
            picture(0).save(place / hidden / "a.png")
            picture(0).save(place / hidden / "00.png" / "thumb.jpg")
    for other in (good / "Thumbs.db", root / "test" / "notes.txt", good / ".hidden.png"):
        other.write_text("no image")
    task = folder_task(root)
    assert len(task.x) == 10 + 5 + 1 and task.normal == "good"
    assert task.kinds == ["good"] * 3 + ["scratch"] * 3
    notes = [line.rpartition("/")[2] for line in capsys.readouterr().err.splitlines()]
    counts = [note.removesuffix(", hidden or not named as an image") for note in notes]
    assert counts == ["good: left out 2", "scratch: left out 1", "test: left out 2"]
    files = [str(file.relative_to(good)) for file in pk.image_files(good)]
    assert files == [f"{i:02}.png" for i in range(10)] + [*names, "zlink/00.png"]


def test_equal_images_count_once_before_the_split(tmp_path, capsys):
    root = make_folder(tmp_path / "parts", train=20)
    for i in range(0, 20, 2):
        shutil.copy(root / f"train/good/{i:02}.png", root / f"train/good/Copy of {i:02}.png")
    task = folder_task(root, holdout=0.25)
    assert (len(task.x), len(task.x_held)) == (15, 5)
    assert "10 training images equal another one" in one_line(capsys.readouterr().err)
    assert len(torch.cat([task.x, task.x_held]).unique(dim=0)) == 20
    last = Image.open(root / "train/good/19.png").resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(task.x_held[-1], TF.pil_to_tensor(last) / 127.5 - 1)  # the order stays


@pytest.mark.parametrize("count, pictures", [(2, 2), (30, 1), (30, 9), (12, 12)])
def test_too_few_or_equal_images_are_refused_before_the_training(count, pictures, tmp_path):
    """Dots at different places make different images."""
    (tmp_path / "train" / "good").mkdir(parents=True)
    for i in range(count):
        dot = Image.new("L", (16, 16))
        dot.putpixel((i % pictures, 5), 255)
        dot.save(tmp_path / "train" / "good" / f"{i}.png")
    message = f"^{pictures} different images of good.* 10 are needed"
    refused = pytest.raises(pk.UsageError, match=message)
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


def test_grey_images_of_16_bits_are_refused(tmp_path):
    """Pillow would clip them to 255."""
    Image.new("I;16", (16, 16), 0x1234).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="deep.png.*more than 8 bits"):
        pk.read_image(tmp_path / "deep.png", 16)


BAD_INPUT = [  # exit code, words of the message, flags
    (2, ["--normal cat", "0", "9", "--dataset folder"], ["--normal", "cat"]),
    (2, ["--normal 12", "digits"], ["--normal", "12"]),
    (2, ["--score STUDENT.PT", "x.png"], ["x.png"]),
    (2, ["--score", "not allowed with", "--table"], ["--table", "folder", "--score", "x.pt"]),
    (2, ["--device nosuch"], ["--device", "nosuch"]),
    (2, ["--device cuda"], ["--device", "cuda"]),
    (1, ["no MNIST in", "none", "online"], ["--dataset", "mnist", "--data", "none"]),
    (1, ["no MNIST in", "broken", "delete"], ["--dataset", "mnist", "--data", "broken"]),
    (2, ["none/train are: none"], [*FOLDER, "none"]),
    (2, ["scratch", "good", "folder/train"], [*FOLDER, "folder", "--normal", "scratch"]),
    (
        2,
        ["12 different images", "6 of them"],
        [*FOLDER, "folder", "--normal", "good", "--holdout", "0.5"],
    ),
    (1, ["truncated/train/good/01.png"], [*FOLDER, "truncated", "--normal", "good"]),
    (1, ["not finite", "learning rates"], ["--lr-teacher", "1e25"]),
    (1, ["a file", "--out"], ["--out", "a file/run"]),
    (1, ["/proc", "--out"], ["--out", "/proc/runs"]),
    (1, ["missing.pt", "No such file"], ["--score", "missing.pt", "folder"]),
    (1, ["no nets.pt in folder"], ["--teacher", "folder"]),
    (1, ["no nets.pt in none"], ["--teacher", "none"]),
    (1, ["no results", "folder"], ["--table", "folder"]),
    (1, ["no results"], ["--table", ""]),
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
    monkeypatch.setattr(pk, "evaluate", None)  # none of these may come to the end of the training
    assert exit_code(*NETS, *flags) == code
    stderr = one_line(capsys.readouterr().err)
    assert all(word in stderr for word in words), stderr
    assert not [*Path("runs").rglob("*.*")]


# ------------------------------------------------------------------------------ a run and its files


def names_in(folder):
    return sorted(file.name for file in folder.rglob("*") if not file.is_dir())


def result_in(folder):
    text = (folder / "result.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON


def run_here(folder, *flags):
    stdout = io.StringIO()  # as a notebook's, which cannot be reconfigured
    with contextlib.redirect_stdout(stdout):
        assert exit_code(*flags, "--out", folder) == 0
    return stdout.getvalue(), result_in(folder)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on digits with images held out: (stdout, result, folder, task)."""
    flags = [*FAST, "--normal", "0", "--holdout", "0.4"]
    folder = tmp_path_factory.mktemp("digits") / "digits-0-seed0"
    return *run_here(folder, *flags), folder, task_of(*flags)


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A run on coloured images without test/: (stdout, result, folder)."""
    root = make_folder(tmp_path_factory.mktemp("own") / "my parts", train=40, test=0)
    flags = [*FAST, *FOLDER, root, "--normal", "good", "--holdout", "0.5", "--alpha", "0.2"]
    return *run_here(root / "out", *flags), root / "out"


def test_a_run_prints_and_writes_what_it_found(digits_run):
    stdout, result, folder, task = digits_run
    lines, rows = stdout.splitlines(), [*map(str.split, stdout.splitlines())]
    assert lines[0].startswith(
        "119 images of 0: 71 to train on, 48 held out; 599 test images; on cpu"
    )
    assert list(result["auroc"]) == [*pk.STAGES, "gain"]
    assert result["auroc"]["gain"] == result["auroc"]["step2"] - result["auroc"]["student_alone"]
    for stage in pk.STAGES:
        assert [stage, f"{result['auroc'][stage]:.2f}"] in rows
    assert ["detector", f"{result['auroc_detector']:.2f}", "step2,", "whitened"] in rows
    assert ["PCA", f"{result['baselines']['pca']:.2f}"] in [row[:2] for row in rows]
    assert f"{result['ratio']:.0f} times as many FLOPs" in stdout
    z_dim = pk.EXPERIMENTS["digits"].z_dim
    assert [*result["flops"].values()] == [flops(w, 16, 1, z_dim) for w in (4, 2)]
    assert result["params"]["student"] < result["params"]["teacher"]
    assert result["images"] == {"train": 71, "held_out": 48, "test": 599}
    assert result["settings"] == asdict(pk.parse(FAST)[2]) and result["version"] == pk.VERSION
    of_detector, of_pca = stdout.split("\nPCA by kind of test image (0 is normal), % flagged")
    for table, printed in ((result["kinds"], of_detector), (result["kinds_pca"], of_pca)):
        rows = [line.split() for line in printed.splitlines()]
        for kind, row in table.items():
            area = "-" if kind == "0" else f"{row['auroc']:.2f}"
            flagged = f"- {row['flagged']['0.05']} {row['flagged']['0.1']}"  # .01 is out of reach
            assert f"{kind} {task.kinds.count(kind)} {area} {flagged}".split() in rows
    assert "48 held out: alpha 0.05 flags scores above" in stdout
    assert names_in(folder) == sorted(pk.FILES) and f"--score {folder}/student.pt " in lines[-1]


def test_progress_is_a_line_a_tenth_and_the_curve(digits_run):
    stdout, result, _, _ = digits_run
    lengths = {"teacher": 10, "student_alone": 14, "step1": 10, "step2": 4}
    for number, (stage, updates) in enumerate(lengths.items(), 1):
        line = rf"{stage}: update \d+/{updates} \| loss_D .* loss_G .* \| AUROC .*stage {number}/4"
        curve = [point for point in result["curve"] if point["stage"] == stage]
        lines = re.findall(f"^{line}$", stdout, re.MULTILINE)
        assert len(lines) == len(curve) == min(10, updates)
        assert curve[-1]["update"] == updates and curve[-1]["loss_d"] > 0
        assert curve[-1]["auroc"] == pytest.approx(result["auroc"][stage])  # of all 599 images
    assert len(result["curve"]) == 34


def test_time_left_is_that_of_the_stage_and_the_auroc_of_a_thousand_images(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(pk, "monotonic", lambda: now[0])
    x, y = torch.arange(2500.0), [k % 5 > 0 for k in range(2500)]
    progress = pk.Progress(SimpleNamespace(x_test=x, y_test=y), pk.STAGES)
    assert torch.equal(progress.x_test, x[::3]) and progress.y_test == y[::3]
    monkeypatch.setattr(pk, "score", lambda net, x: x)
    steps = [("teacher", 5, 10), ("teacher", 10, 10), ("student_alone", 4, 6)]
    for stage, update, seconds in steps:
        now[0] += seconds
        progress.report(stage, None, update, 10, 0.0, 0.0)
    left = [line.split(" | ")[-1] for line in capsys.readouterr().out.splitlines()]
    ends = ["10 s left of stage 1/4", "0 s left of stage 1/4", "9 s left of stage 2/4"]
    assert left == ends
    assert progress.curve[0]["auroc"] == pk.auroc(x[::3], y[::3])


def test_nets_and_detector_are_those_of_the_result(digits_run):
    _, result, folder, task = digits_run
    nets, saved = pk.load_nets(folder / "nets.pt")
    assert list(nets) == [*pk.STAGES, "teacher_step2"] and saved["test_labels"] == task.y_test
    for stage in pk.STAGES:
        scores = pk.score(nets[stage], task.x_test)
        assert pk.auroc(scores, task.y_test) == result["auroc"][stage]
        assert torch.equal(scores, saved["test_scores"][stage])
    detector = pk.load_detector(folder / "student.pt")
    scores, _ = pk.detect(detector, task.x_test)
    assert pk.auroc(scores, task.y_test) == result["auroc_detector"]
    assert same(weights(detector.g), weights(nets["step2"].g))
    expected = pk.make_detector(nets["step2"], task.x, task.x_held, pk.parse(FAST)[2])
    assert same(weights(detector), weights(expected)) and detector.config["held_out"] == 48


def test_a_teacher_can_be_taken_from_an_earlier_run(digits_run, tmp_path):
    """The student again: with the same settings, the same figures."""
    _, result, folder, _ = digits_run
    flags = [*FAST, "--normal", "0", "--holdout", "0.4", "--teacher", folder.parent]
    stdout, again = run_here(tmp_path / "again", *flags, "--teacher-updates", "7")
    assert again["auroc"] == result["auroc"] and again["kinds"] == result["kinds"]
    assert again["settings"] == result["settings"]  # the teacher's are its own
    assert "left of stage 1/3" in stdout and "teacher: update" not in stdout
    for place in (folder.parent, folder, folder / "nets.pt"):
        teacher, its_settings = pk.load_teacher(place, ["none", folder.name], result)
        assert same(weights(teacher), weights(pk.load_nets(folder / "nets.pt")[0]["teacher"]))
        assert its_settings == pk.parse(FAST)[2]


OTHER_TASKS = [("normal 1, not 0", ["--normal", "1"]), ("training_images", ["--holdout", "0.1"])]
OTHER_TASKS += [("size 32, not 16", ["--size", "32"]), ("z_dim 9, not 256", ["--z-dim", "9"])]
OTHER_TASKS += [("teacher_width 5, not 4", ["--teacher-width", "5"])]


@pytest.mark.parametrize("words, flags", OTHER_TASKS)
def test_a_teacher_of_another_task_is_refused(words, flags, digits_run, tmp_path, capsys):
    same_task = [*FAST, "--normal", "0", "--holdout", "0.4", "--out", tmp_path / "new"]
    assert exit_code(*same_task, *flags, "--teacher", digits_run[2]) == 2
    assert words in one_line(capsys.readouterr().err) and not (tmp_path / "new").exists()


def test_nothing_is_overwritten_in_silence(digits_run, tmp_path, monkeypatch, capsys):
    """The same run may be made anew; another one is refused before it trains."""
    trained = []

    def train_stages(*given):
        trained.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(pk, "train_stages", train_stages)
    folder = shutil.copytree(digits_run[2], tmp_path / "run")
    flags = [*FAST, "--normal", "0", "--holdout", "0.4", "--out", folder]
    assert exit_code(*flags) == 130 and len(trained) == 1
    capsys.readouterr()
    others = {"w_own 0.5, not 1.0": ["--w-own", "0.5"], "seed 3, not 0": ["--seed", "3"]}
    others |= {"alpha 0.1, not 0.05": ["--alpha", "0.1"], "holdout 0.3": ["--holdout", "0.3"]}
    others |= {"normal 5, not 0": ["--normal", "5"], "size 32, not 16": ["--size", "32"]}
    for words, more in others.items():
        assert exit_code(*flags, *more) == 2 and len(trained) == 1
        err = one_line(capsys.readouterr().err)
        assert words in err and "--out" in err and str(folder) in err
    assert names_in(folder) == sorted(pk.FILES)
    for text in ("", "[1]", '{"accuracy": 1}', "{}"):  # a broken result is made anew
        (folder / "result.json").write_text(text)
        assert exit_code(*flags) == 130
        assert "result.json cannot be read" in capsys.readouterr().err
    assert len(trained) == 5


@pytest.mark.parametrize("alone, told", [("5", True), ("14", False), ("0", False)])
def test_a_student_alone_of_another_length_than_both_steps_is_told(
    alone, told, tmp_path, monkeypatch, capsys
):
    """Its AUROC is what the gain is measured from. 0 means that it is left out."""

    def train_stages(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(pk, "train_stages", train_stages)
    flags = [*FAST, "--alone-updates", alone, "--out", tmp_path / "run"]
    assert exit_code(*flags) == 130
    assert ("unequal lengths" in capsys.readouterr().err) == told


LEFT_OUT = [  # updates of: teacher, student alone, step 1, step 2; what has figures
    ([2, 0, 2, 1], ["teacher", "step1", "step2"]),
    ([0, 0, 0, 3], ["step2"]),
    ([0, 2, 0, 0], ["student_alone"]),
    ([2, 2, 0, 0], ["teacher", "student_alone"]),
    ([2, 3, 3, 0], ["teacher", "student_alone", "step1", "step2", "gain"]),
]


@pytest.mark.parametrize("updates, trained", LEFT_OUT)
def test_a_stage_that_is_left_out_has_no_figure(updates, trained, tmp_path, capsys):
    """That of an untrained net would be taken for a baseline, and a gain of 40 points printed."""
    names = ["--teacher-updates", "--alone-updates", "--step1-updates", "--step2-updates"]
    flags = [word for pair in zip(names, map(str, updates), strict=True) for word in pair]
    stdout, result = run_here(tmp_path / "run", *NETS, *flags)
    assert list(result["auroc"]) == trained
    printed = [line.split()[0] for line in stdout.split("AUROC in %\n")[1].splitlines()[:4]]
    assert [stage for stage in pk.STAGES if stage in printed] == [t for t in trained if t != "gain"]
    capsys.readouterr()
    assert exit_code("--table", tmp_path) == 0
    for row in capsys.readouterr().out.splitlines()[-2:]:  # the class's and the mean
        cells = row.strip("| ").split(" | ")[1:6]
        columns = zip([*pk.STAGES, "gain"], cells, strict=True)
        assert [column for column, cell in columns if cell != "-"] == trained


def test_samples_are_spread_over_a_list():
    for n, four in [(0, []), (3, [0, 1, 2]), (7, [0, 1, 3, 5]), (400, [0, 100, 200, 300])]:
        assert pk.four_of(range(n)) == four


def test_good_photographs_alone_make_a_detector(folder_run):
    stdout, result, folder = folder_run
    assert result["auroc"] == result["kinds"] == {} and result["auroc_detector"] is None
    assert names_in(folder) == sorted(pk.FILES) and result["images"]["test"] == 0
    assert stdout.count("no AUROC: ") == 1 and "AUROC in %" not in stdout
    assert "40 images of good: 20 to train on, 20 held out; 0 test images" in stdout
    assert result["threshold"] > 0 and "nan" not in stdout


def test_samples_show_normal_images_left_and_anomalies_right(digits_run, folder_run):
    """Rows: the image, what the teacher makes of it, what the student makes; scores below."""
    _, _, folder, task = digits_run
    nets, _ = pk.load_nets(folder / "nets.pt")
    picture = Image.open(folder / "samples.png")
    assert picture.size == (95 + 8 * 100 + 12, 3 * 100 + 58)
    x = task.x_test[[task.y_test.index(False), task.y_test.index(True)]]
    for column, image in ((0, x[0]), (4, x[1])):
        left = 95 + column * 100 + (12 if column else 0)
        for row, net in enumerate((None, "teacher", "step2")):
            shown = image if net is None else nets[net].g(image[None]).x_hat[0]
            tile = TF.pil_to_tensor(picture.crop((left, row * 100, left + 96, row * 100 + 96)))
            expected = TF.resize(shown / 2 + 0.5, [96, 96], TF.InterpolationMode.NEAREST)
            assert torch.allclose(tile / 255, expected, atol=0.01)
        below = picture.crop((left, 300, left + 96, 358))
        assert below.getextrema()[0][0] < 100  # there is text
    assert Image.open(folder_run[2] / "samples.png").size == (95 + 4 * 100 + 12, 358)


@pytest.mark.parametrize("earlier", [{}, dict.fromkeys(pk.FILES[:-1], "earlier")])
def test_a_stop_in_the_export_leaves_no_mix_of_runs(earlier, tmp_path, monkeypatch, capsys):
    """An earlier run's files stay as they are; no new file, and no temporary folder."""
    for name in earlier:
        (tmp_path / name).write_text("earlier")

    def stopped(*given, **named):  # here the export would go on for a second
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", stopped)
    assert exit_code(*IDLE, "--normal", "0", "--out", tmp_path) == 130
    assert "interrupted" in one_line(capsys.readouterr().err)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == earlier


def test_a_stop_between_two_files_leaves_no_result(digits_run, tmp_path, monkeypatch, capsys):
    """result.json is the mark of a whole run: the first to go and the last to come."""
    folder = shutil.copytree(digits_run[2], tmp_path / "run")

    def stopped(file, to):
        shutil.copy(file, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(pk.Path, "replace", stopped)
    monkeypatch.setattr(pk, "train_stages", lambda *given: pk.load_nets(folder / "nets.pt")[0])
    monkeypatch.setattr(torch.export, "export", lambda *given, **named: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file, **named: file.write(b"x"))
    assert exit_code(*FAST, "--normal", "0", "--holdout", "0.4", "--out", folder) == 130
    assert names_in(folder) == sorted(pk.FILES[:-1])


@in_background
def test_a_signal_a_full_disk_and_a_closed_pipe_leave_no_file(tmp_path):
    def started(*flags, before=None):
        call = [HERE / "pkdgan.py", *FAST, "--normal", "0", *flags]
        return python(*call, cwd=tmp_path, start=subprocess.Popen, preexec_fn=before)

    process = started("--teacher-updates", "50000")
    while not process.stdout.readline().startswith("119 images"):
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert stderr == "pkdgan.py: interrupted; no file is half-written\n"
    assert process.returncode == 130
    import resource  # Windows has none

    limit = [10_000] * 2  # bytes a file may have: less than a student.pt
    full = started(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    piped = started("--teacher-updates", "2000")
    piped.stdout.readline()
    piped.stdout.close()
    stdout, stderr = full.communicate()
    assert full.returncode == 1 and one_line(stderr)
    assert re.search(r"step2 +\d", stdout)  # the figures are not lost
    assert piped.wait(timeout=60) == 1 and len(piped.stderr.read().splitlines()) <= 1
    assert names_in(tmp_path) == []


def test_a_class_of_any_name_and_a_folder_that_takes_no_files(tmp_path, monkeypatch, capsys):
    """A name that is no UTF-8 is trained on and saved; a link into /sys is refused before."""
    monkeypatch.chdir(tmp_path)
    root, name = make_folder(tmp_path / "parts"), os.fsdecode(b"caf\xe9")
    (root / "train" / "good").rename(root / "train" / name)
    flags = [*FAST, *FOLDER, "parts", "--normal", name, "--holdout", "0"]
    folder = Path("runs", f"parts-{name}-seed0")
    stdout, result = run_here(folder, *flags)
    assert "verdict" not in stdout  # nothing is held out, as asked for
    assert names_in(folder) == sorted(pk.FILES) and result["normal"] == name
    Path("runs", "locked").symlink_to("/sys")
    assert exit_code(*flags, "--out", "runs/locked") == 1
    out, err = capsys.readouterr()
    assert "runs/locked is not writable" in one_line(err) and "update" not in out


# ------------------------------------------------------------------------- the detector's verdicts


def test_table_of_kinds_by_hand():
    scores = tensor(3.0, 18.5, 19.5, 12.0, 17.0, 19.5, 1.0, 20.0, 20.0, 18.5, 18.5)
    kinds = ["good"] * 4 + ["notch"] * 3 + ["scratch"] * 4
    p_values = of_scores(*torch.arange(1.0, 20.0).tolist())(*scores)
    task = SimpleNamespace(kinds=kinds, normal="good")
    task.x_held = range(19)
    table = pk.table_of_kinds(task, scores, p_values, pk.ALPHAS)
    assert list(table) == ["good", "notch", "scratch"]
    assert table["good"] == {"images": 4, "auroc": None, "flagged": {"0.05": 25, "0.1": 50}}
    assert table["notch"]["flagged"] == {"0.05": 33.3, "0.1": 33.3}  # .01 is out of reach
    assert table["scratch"]["flagged"] == {"0.05": 50, "0.1": 100}
    assert table["notch"]["auroc"] == pytest.approx(100 * 5.5 / 12)
    assert table["scratch"]["auroc"] == pytest.approx(100 * 13 / 16)
    task.x_held = range(8)
    few = pk.table_of_kinds(task, scores, p_values, pk.ALPHAS)
    assert few["good"]["flagged"] == {} and few["notch"]["auroc"] == table["notch"]["auroc"]
    no_normal = SimpleNamespace(kinds=["a"], normal="b", x_held=[])
    assert pk.table_of_kinds(no_normal, scores[:1], p_values[:1], pk.ALPHAS)


def test_how_many_held_out_an_alpha_needs():
    alphas = (0.5, 0.1, 0.05, 0.03, 0.01, 0.001)
    assert [pk.held_out_needed(alpha) for alpha in alphas] == [1, 9, 19, 33, 99, 999]
    message = "no verdicts: alpha 0.03 needs 33 held out (--holdout), only 30 are"
    assert pk.too_few_message(0.03, 30) == message


def test_false_alarms_against_a_simulation():
    """The share of a uniform distribution above the fifth highest of a hundred draws from it."""
    draws = torch.rand(20_000, 100).sort(descending=True).values
    expected = 100 * (1 - draws[:, 4]).quantile(tensor(0.05, 0.95))
    assert torch.tensor(pk.false_alarms(5, 100)) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("alpha, rank", [(0.05, 0), (0.1, 1), (0.19, 2)])
def test_threshold_is_that_of_the_verdicts_or_too_few_are_held_out(alpha, rank, digits_run, capsys):
    """Ten of them: 1 / 11 is the least p-value."""
    task, (nets, saved) = digits_run[3], pk.load_nets(digits_run[2] / "nets.pt")
    task = replace(task, x_held=task.x_held[:10])
    settings, options = pk.Settings(**saved["settings"]), pk.Options(alpha=alpha)
    detector = pk.make_detector(nets["step2"], task.x, task.x_held, settings)
    result = pk.evaluate(nets, saved["test_scores"], detector, task, options)
    pk.print_result(result | {"normal": "0", "alpha": alpha})
    stdout, held_out = capsys.readouterr().out, detector.held_out_scores
    assert result["threshold"] == (held_out[-rank].item() if rank else None)
    if rank == 0:
        assert f"no verdicts: alpha {alpha} needs 19 held out (--holdout), only 10 are" in stdout
        assert result["false_alarms"] is None and "0.05" not in result["kinds"]["8"]["flagged"]
    else:
        assert str(alpha) in result["kinds_pca"]["8"]["flagged"]  # a column of its own
        assert f"{alpha:>7}\n" in stdout
        threshold = result["threshold"]
        assert f"10 held out: alpha {alpha} flags scores above {threshold:.4g}," in stdout
        p_values = of_scores(*held_out.tolist())(threshold, threshold * 1.001)
        assert (p_values <= alpha).tolist() == [False, True]


def save_student(path, held_out=0):
    torch.manual_seed(0)
    config = {"size": 16, "channels": 1, "width": 2, "z_dim": 10, "held_out": held_out}
    detector = pk.Detector(**config)
    saved = {"file": "student.pt", "version": pk.VERSION, "config": config}
    torch.save(saved | {"weights": detector.state_dict()}, path)
    return detector


def scored(stdout):
    """The lines of --score as lists."""
    header, *lines = stdout.splitlines()
    assert header == "path\tscore\tp-value\tverdict"
    return [line.split("\t") for line in lines]


def test_scores_of_a_folder_and_what_cannot_be_read(digits_run, tmp_path, monkeypatch, capsys):
    """Flags and images in any order; what fails is named, the others are scored, exit code 1."""
    _, _, folder, task = digits_run
    monkeypatch.chdir(tmp_path)
    Path("in/@eaDir/000.png").mkdir(parents=True)
    files = [f"in/{i:03}.png" for i in range(60)] + ["alone.png"]
    for file, x in zip(files, [*task.x_test[:60], task.x_test[7]], strict=True):
        TF.to_pil_image((x + 1) / 2).save(file)
    for file in ("in/notes.txt", "in/@eaDir/000.png/x.db"):
        Path(file).write_text("no image")
    student = folder / "student.pt"
    assert exit_code("--score", student, "--alpha", "0.1", "in", "alone.png") == 0
    out, err = capsys.readouterr()
    assert "in: left out 2, hidden" in one_line(err)
    lines, detector = scored(out), pk.load_detector(student)
    for file, (name, value, p, verdict) in zip(files, lines, strict=True):
        scores, p_values = detector(pk.read_image(file, 16)[None, :1] / 127.5 - 1)
        assert name == file and verdict == ("anomaly" if p_values <= 0.1 else "-")
        assert [value, p] == [f"{scores.item():.4g}", f"{p_values.item():.4g}"]
    assert lines[-1][1:] == lines[7][1:] and len({line[1] for line in lines}) > 50
    Path("in/050.png").write_bytes(Path("in/050.png").read_bytes()[:60])
    Path("in/999.png").symlink_to("/gone/x.png")
    assert exit_code("in", "--alpha", "0.1", "--score", student, "alone.png", "no.png") == 1
    out, err = capsys.readouterr()
    assert scored(out) == lines[:50] + lines[51:]
    named = [line.split()[1] for line in err.splitlines()[1:]]
    assert named == ["in/050.png", "in/999.png", "no.png"]
    assert exit_code("--score", student) == 1 and "no images" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("n, verdict", [(0, "?"), (18, "?"), (19, "anomaly")])
def test_verdict_at_alpha_itself_and_where_too_few_are_held_out(n, verdict, tmp_path, capsys):
    detector = save_student(tmp_path / "student.pt", n)
    Image.new("RGB", (40, 30), (200, 100, 0)).save(tmp_path / "a.png")  # grey: the mean of these
    assert exit_code("--score", tmp_path / "student.pt", tmp_path / "a.png") == 0
    out, err = capsys.readouterr()
    value = detector(torch.full((1, 1, 16, 16), 100 / 127.5 - 1))[0].item()
    assert float(scored(out)[0][1]) == pytest.approx(value, rel=1e-3)
    assert scored(out)[0][2:] == [f"{1 / (n + 1):.4g}", verdict]
    assert ("alpha 0.05 needs 19 held out" in one_line(err)) if verdict == "?" else err == ""


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_checkpoint_that_is_none(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, folder = tmp_path / "file.pt", digits_run[2]
    whole = (folder / "student.pt").read_bytes()
    saved = torch.load(folder / "student.pt", weights_only=True)
    bad = [b"text", whole[: len(whole) // 2], {"weights": 1}, saved | {"more": Trap()}]
    bad += [saved | {"version": pk.VERSION - 1}, (folder / "nets.pt").read_bytes()]
    for content in bad:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert exit_code("--score", path, "x.png") == 1
        out, err = capsys.readouterr()
        assert out == "" and "file.pt is no student.pt" in one_line(err) and len(err) < 400
    assert not Path("sprung").exists()  # nothing in a file is run
    assert exit_code("--score", folder / "student.pt2", "x.png") == 1
    assert "name the student.pt beside it" in one_line(capsys.readouterr().err)


def test_on_a_device_torch_and_pillow_give_the_programs_scores(folder_run, monkeypatch, capsys):
    """By README.md's Python that loads a student.pt2: called with images, beside that file, it
    prints path, score and p-value, to the digit, and refuses 16 bits a channel as --score does."""
    monkeypatch.chdir(folder_run[2])
    script, exif = python_block("student.pt2"), Image.Exif()
    assert len([line for line in script.splitlines() if line]) <= 12
    imports = re.findall(r"^(?:from|import) (.+?)(?: import.*)?$", script, re.MULTILINE)
    assert set(", ".join(imports).split(", ")) <= {"sys", "torch", "PIL"}
    Path("script.py").write_text(script.replace("(32, 32)", "(16, 16)"))
    exif[0x0112] = 6
    picture(0, (50, 30)).save("turned.jpg", exif=exif)
    picture(1, (50, 30), "RGBA").save("clear.png")
    Image.new("RGB", (16, 16)).save("black.png")
    Image.new("I;16", (16, 16)).save("deep.png")
    files = ["turned.jpg", "clear.png", "black.png", "../train/good/03.png"]
    assert exit_code("--score", "student.pt", *files) == 0
    expected = [row[:3] for row in scored(capsys.readouterr().out)]
    monkeypatch.setattr(sys, "argv", ["script.py", *files])
    runpy.run_path("script.py")
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == expected
    assert len({p_value for _, _, p_value in expected}) > 1
    assert exit_code("--score", "student.pt", "deep.png") == 1
    monkeypatch.setattr(sys, "argv", ["script.py", "deep.png"])
    with pytest.raises(AssertionError, match="8 bits"):
        runpy.run_path("script.py")


def python_block(word):
    """The block of Python in README.md that has a word."""
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return block


def test_photographs_are_parted_by_the_readme(tmp_path, monkeypatch):
    """Each stands in one place; photographs of one part stay together, in a random order."""
    monkeypatch.chdir(tmp_path)
    for kind, parts in (("good", 60), ("bad", 3)):
        Path("photographs", kind).mkdir(parents=True)
        for part, view in [(part, view) for part in range(parts) for view in "ab"]:
            Path("photographs", kind, f"P_{part:02}.{view}.jpg").write_text(f"{kind} {part} {view}")
    Path("split.py").write_text(python_block("photographs"))
    runpy.run_path("split.py")
    files = sorted(Path("parts").rglob("*.jpg"))
    texts = [file.read_text().split() for file in files]
    assert len(texts) == 2 * 63 and len({tuple(text) for text in texts}) == 2 * 63
    folders = {}
    for file, (kind, part, _) in zip(files, texts, strict=True):
        folders.setdefault((kind, int(part)), []).append(file.parent.as_posix())
    assert all(a == b for a, b in folders.values())
    assert {a for (kind, _), (a, _) in folders.items() if kind == "bad"} == {"parts/test/bad"}
    trained = [p for (kind, p), (a, _) in folders.items() if a == "parts/train/good"]
    assert len(trained) == 20 and trained != sorted(trained)  # they are in the files' order


def test_pca_by_the_readme_flags_what_is_unlike_the_good_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("parts/train/good").mkdir(parents=True)
    x = 0.5 + images(51, 32, 3) / 20  # grey, with a little noise
    for n in range(50):
        TF.to_pil_image(x[n]).save(f"parts/train/good/{n:02}.png")
    Path("new").mkdir()
    TF.to_pil_image(x[50]).save("new/alike.png")
    TF.to_pil_image(0.5 + images(1, 32, 3)[0] / 2).save("new/unlike.png")
    script = python_block("PCA(0.9)")
    assert "0.05" in script
    Path("pca.py").write_text(script.replace("0.05", "0.1"))
    runpy.run_path("pca.py")
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [Path(row[0]).name for row in rows] == ["alike.png", "unlike.png"]
    assert [row[3] for row in rows] == ["-", "anomaly"]
    alike, unlike = [float(row[2]) for row in rows]
    assert unlike == pytest.approx(1 / 11, abs=1e-4)  # 10 are held out
    assert alike > 0.2


def test_a_teacher_of_ones_own_by_the_readme_teaches_the_student(tmp_path):
    """In step 1 and in step 2; its codes may have any length."""
    teacher = pk.GAN(32, 3, 2, 256)

    def your_teacher(x):
        out = teacher.g(x)
        return 3 * out.z, out.x_hat, out.z_hat

    script = python_block("your_teacher")
    for long, short in [
        ("(500, 3, 32, 32)", "(8, 3, 32, 32)"),
        ("2160", "60"),
        ("> 1800", "> 50"),
    ]:
        assert long in script
        script = script.replace(long, short)
    file = tmp_path / "script.py"
    file.write_text(script)
    torch.manual_seed(0)
    made = runpy.run_path(file, {"your_teacher": your_teacher, "x_new": images(5, 32, 3, seed=1)})
    assert made["scores"].shape == (5,)
    with torch.no_grad():
        z_t, z_s = teacher.g(made["images"]).z, made["student"].g(made["images"]).z
    assert F.mse_loss(z_s, z_t) < 0.5  # codes that know nothing of one another: 2


def test_exported_detector_is_whole_and_names_no_device(digits_run, tmp_path):
    """So that it can be moved; it gives p-values by itself, and holds no images."""
    files, folder, x = {"config.json": ""}, digits_run[2], digits_run[3].x_test[:300]
    exported = torch.export.load(folder / "student.pt2", extra_files=files)
    for node in exported.graph.nodes:
        assert "device" not in node.kwargs and torch.device not in map(type, node.args)
    program, detector = exported.module(), pk.load_detector(folder / "student.pt")
    config = {"size": 16, "channels": 1, "width": 2, "z_dim": 256, "held_out": 48}
    assert json.loads(files["config.json"]) == config
    sizes = [(folder / name).stat().st_size for name in ("student.pt", "student.pt2")]
    assert sizes[1] < sizes[0] + 250_000
    for n in (300, 1, 3, 7):
        for value, expected in zip(program(x[:n]), detector(x[:n]), strict=True):
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5)
            assert value.shape == (n,) and value.dtype == expected.dtype
            value.numpy()  # needs no gradient


# -------------------------------------------------------------------------------------- the tables


def write_result(folder, normal="0", seed=0, changed=(), more=(), **auroc):
    """A result.json of digits, with changed settings, or more than these change."""
    auroc = {"teacher": 90.0, "student_alone": 80.0, "step1": 85.0, "step2": 88.0} | auroc
    auroc["gain"] = auroc["step2"] - auroc["student_alone"]
    options = pk.Options(normal=normal)
    task = SimpleNamespace(source="digits", normal=normal, training_images="", evaluation_images="")
    result = pk.describe(options, replace(pk.EXPERIMENTS["digits"], seed=seed), task)
    result["settings"] |= dict(changed)
    result |= {"auroc": auroc, "auroc_detector": 91.0, "baselines": {"pca": 70.0}} | dict(more)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def tables_of(folder, capsys):
    """{title: rows} of --table."""
    assert exit_code("--table", folder) == 0
    parts, tables = capsys.readouterr().out.split("\n\n"), {}
    for title, table in zip(parts[::2], parts[1::2], strict=True):
        rows = table.splitlines()[2:]
        tables[title.strip()] = [row.strip("| ").split(" | ") for row in rows]
    return tables


def test_table_by_hand(tmp_path, capsys):
    """A row for each class, at any depth, and their mean over the seeds that have all."""
    write_result(tmp_path / "a" / "0-0", "0", 0, student_alone=80, step2=90)
    write_result(tmp_path / "a" / "b" / "0-1", "0", 1, student_alone=84, step2=92)
    write_result(tmp_path / "1-0", "1", 0, student_alone=70, step2=60)
    write_result(tmp_path / "no anomalies", "2", 0, more={"auroc": {}})
    [(title, rows)] = tables_of(tmp_path, capsys).items()
    assert title == "digits" and [row[0] for row in rows] == ["0", "1", "mean of 2"]
    assert rows[0][1:3] == ["90.00 ± 0.00", "82.00 ± 2.83"]
    assert rows[0][4:] == ["91.00 ± 1.41", "9.00 ± 1.41", "91.00 ± 0.00", "70.00 ± 0.00", "2"]
    assert rows[1][1:] == ["90.00", "70.00", "85.00", "60.00", "-10.00", "91.00", "70.00", "1"]
    assert rows[2][1:] == ["90.00", "75.00", "85.00", "75.00", "0.00", "91.00", "70.00", "1"]
    write_result(tmp_path / "1-1", "1", 1, step2=82)
    rows = tables_of(tmp_path, capsys)["digits"]
    assert rows[2][4:] == ["81.00 ± 8.49", "2.50 ± 3.54", "91.00 ± 0.00", "70.00 ± 0.00", "2"]


def test_each_set_of_settings_has_a_table_whose_title_says_what_differs(tmp_path, capsys):
    folder = {"dataset": "folder", "holdout": 0.2, "source": "digits"}  # named as a data set
    folder |= {"settings": asdict(pk.EXPERIMENTS["folder"])}
    write_result(tmp_path / "1")
    write_result(tmp_path / "2", changed={"batch": 4, "lr_student": 0.5})
    write_result(tmp_path / "3", more={"size": 64, "holdout": 0.1})
    write_result(tmp_path / "4", more={"version": 99})
    write_result(tmp_path / "5", more=folder)
    write_result(tmp_path / "6", more={"teacher": "runs"})
    write_result(tmp_path / "7")
    assert exit_code("--table", tmp_path) == 0
    assert "7/result.json is the second of its class" in one_line(capsys.readouterr().err)
    tables = tables_of(tmp_path, capsys)
    assert all(row[-1] == "1" for rows in tables.values() for row in rows)
    changes = ["", ", batch 4, lr_student 0.5", ", size 64, holdout 0.1", ", version 99"]
    changes.append(", teacher runs")
    assert set(tables) == {"folder digits", *[f"digits{change}" for change in changes]}


def test_a_result_that_cannot_be_read_is_named_and_left_out(tmp_path, capsys):
    write_result(tmp_path / "whole")
    for k, text in enumerate(("", '{"vers', '{"accuracy": 1}', "[1]")):
        (tmp_path / f"broken {k}").mkdir()
        (tmp_path / f"broken {k}" / "result.json").write_text(text)
    assert exit_code("--table", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "| 0 |" in out and [f"broken {k}/result.json" in err for k in range(4)] == [True] * 4
    shutil.rmtree(tmp_path / "whole")
    assert exit_code("--table", tmp_path) == 1 and "no results" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- run_all.sh

STUB = """
import os, sys, time
with open("calls.txt", "a") as calls:
    print(os.getpid(), *sys.argv[1:], sep="|", file=calls)
if "--table" in sys.argv:
    sys.exit(print("the tables"))
time.sleep(60 if "--slow" in sys.argv else 0.3)
with open("calls.txt", "a") as calls:
    print(os.getpid(), "done", sep="|", file=calls)
print("first line")
if "99" in sys.argv:
    sys.exit("no such class")
out = sys.argv[sys.argv.index("--out") + 1]
os.makedirs(out, exist_ok=True)
for name in ("result.json", "student.pt"):
    open(os.path.join(out, name), "w").close()
"""  # stands for pkdgan.py


def hear_signals():
    """Bash cannot trap what its caller ignores: SIGHUP after nohup, SIGINT in the background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def run_all(tmp_path, *flags, start=subprocess.run, pkdgan=STUB, **variables):
    """run_all.sh beside a pkdgan.py in a folder with a blank, called from the folder above."""
    home = tmp_path / "of mine"
    home.mkdir(exist_ok=True)
    script = shutil.copy(HERE / "run_all.sh", home)
    (home / "pkdgan.py").write_text(pkdgan)
    env = ENVIRONMENT | {"DATASETS": "digits", "NORMALS": "0 1", "OUT": "my runs"} | variables
    how = PIPES | {"start_new_session": True, "preexec_fn": hear_signals}
    return start(["bash", script, *flags], cwd=tmp_path, env=env, **how)


def lines_of_calls(tmp_path):
    """Two lines a call of the stub: its process and flags, and its process and "done"."""
    file = tmp_path / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def calls(tmp_path, word="--normal"):
    """The stub's calls with a word: [process, flags...] of each."""
    lines = [line.split("|") for line in lines_of_calls(tmp_path)]
    return [words for words in lines if word in words]


def runs_of(tmp_path):
    """(data set, seed, class, folder) of each run, in order."""
    flags = [dict(pairwise(words)) for words in calls(tmp_path)]
    return [
        tuple(its[f"--{name}"] for name in ("dataset", "seed", "normal", "out")) for its in flags
    ]


def test_run_all_runs_each_once_then_prints_the_tables(tmp_path):
    done = run_all(tmp_path, DATASETS="digits folder", SEEDS="0 5", NORMALS="0 o'b a/b")
    assert (done.returncode, done.stderr) == (0, "")
    every = [(d, s, n) for d in ("digits", "folder") for s in "05" for n in ("0", "o'b", "a/b")]
    folders = [f"my runs/{d}-{n.replace('/', '-')}-seed{s}" for d, s, n in every]
    assert runs_of(tmp_path) == [(*run, out) for run, out in zip(every, folders, strict=True)]
    assert done.stdout.splitlines() == [*folders, "the tables"]
    assert calls(tmp_path, "--table")[0][1:] == ["--table", "my runs"]
    assert (tmp_path / f"{folders[0]}.log").read_text() == "first line\n"
    again = run_all(tmp_path, DATASETS="digits folder", SEEDS="0 5", NORMALS="0 o'b a/b")
    assert again.stdout == "the tables\n" and len(calls(tmp_path)) == 12
    shutil.rmtree(tmp_path / folders[4])
    (tmp_path / folders[3] / "student.pt").unlink()  # a lost file: the run is made anew
    assert run_all(tmp_path, DATASETS="digits", SEEDS="5", NORMALS="0 o'b").returncode == 0
    assert len(calls(tmp_path)) == 14


def test_run_all_with_flags_has_a_folder_of_its_own(tmp_path):
    """So that two sets of settings never mix; words stay whole."""
    done = run_all(tmp_path, "--data", "a b/c", "--w-own", "0", NORMALS="1")
    assert (done.returncode, done.stderr) == (0, "")
    out = "my runs/--data a b_c --w-own 0"
    assert runs_of(tmp_path) == [("digits", "0", "1", f"{out}/digits-1-seed0")]
    assert calls(tmp_path)[0][1:5] == ["--data", "a b/c", "--w-own", "0"]
    assert calls(tmp_path, "--table")[0][1:] == ["--table", out]


def test_run_all_does_not_take_a_single_run_for_one_of_its_own(tmp_path):
    """That may have been made with other flags, by the program alone."""
    single = tmp_path / "runs" / "digits-1-seed0"
    single.mkdir(parents=True)
    for name in ("result.json", "student.pt"):
        (single / name).touch()
    assert run_all(tmp_path, NORMALS="1", OUT="").returncode == 0
    assert runs_of(tmp_path) == [("digits", "0", "1", "runs/all/digits-1-seed0")]


REFUSED_FLAGS = [["--seed", "5"], ["--w-own", "0", "--dataset=mnist"], ["-h"], ["--table", "runs"]]


@pytest.mark.parametrize("flags", REFUSED_FLAGS)
def test_run_all_explains_itself_instead_of_taking_flags_that_its_loops_set(flags, tmp_path):
    """It would train on something else than the folder's name says."""
    done = run_all(tmp_path, *flags)
    assert (done.returncode, done.stdout, lines_of_calls(tmp_path)) == (2, "", [])
    assert 'NORMALS="3 8"' in done.stderr and "variables stand for the flags" in done.stderr


def test_run_all_two_at_a_time_names_what_failed(tmp_path):
    done = run_all(tmp_path, JOBS="2", NORMALS="99 0 1 2 3 4")
    assert done.returncode == 1
    changes = [-1 if "done" in line else 1 for line in lines_of_calls(tmp_path)]
    assert max(accumulate(changes)) == 2  # so many ran at a time
    assert done.stderr == "failed: see my runs/digits-99-seed0.log\n"
    assert len(runs_of(tmp_path)) == 6 and done.stdout.splitlines()[-1] == "the tables"


def test_run_all_fails_if_a_run_fails_whose_earlier_result_is_still_there(tmp_path):
    folder = tmp_path / "my runs" / "digits-99-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").touch()  # but student.pt is lost
    assert run_all(tmp_path, NORMALS="99").returncode == 1


def alive(process):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_run_all_ends_with_all_its_runs(name, tmp_path):
    started = run_all(tmp_path, "--slow", JOBS="2", NORMALS="0 1 2 3", start=subprocess.Popen)
    while len(calls(tmp_path)) < 2:
        assert started.poll() is None
        time.sleep(0.01)
    running = [words[0] for words in calls(tmp_path)]
    assert all(map(alive, running))
    started.send_signal(getattr(signal, name))
    assert "tables" not in started.communicate(timeout=20)[0] and started.returncode != 0
    time.sleep(0.5)
    assert len(calls(tmp_path)) == 2 and not any(map(alive, running))


def test_run_all_goes_on_if_nobody_reads_what_it_prints(tmp_path):
    """As with `| tee log` after the terminal is gone."""
    started = run_all(tmp_path, NORMALS="0 1 2 3", start=subprocess.Popen)
    started.stdout.close()
    started.communicate(timeout=60)
    assert len(runs_of(tmp_path)) == 4


@in_background
def test_run_all_with_the_real_program(tmp_path):
    """A run, a failed one and the tables."""
    real = {"pkdgan": (HERE / "pkdgan.py").read_text(), "DATASETS": "digits"}
    out = tmp_path / "my runs" / " ".join(FAST)
    done = run_all(tmp_path, *FAST, NORMALS="0 99", JOBS="2", **real)
    assert done.returncode == 1 and re.fullmatch(r"failed: see .*-99-seed0.log\n", done.stderr)
    folder = out / "digits-0-seed0"
    assert names_in(folder) == sorted(pk.FILES)
    step2 = result_in(folder)["auroc"]["step2"]
    assert re.search(rf"\| 0 \| .*\| {step2:.2f} \|", done.stdout)


# -------------------------------------------------------------------------------------- the project


def test_readme_names_what_there_is_and_line_endings_stay():
    """Git for Windows would give scripts CR LF, a syntax error to bash."""
    assert "*.sh text eol=lf" in (HERE / ".gitattributes").read_text().splitlines()
    readme = (HERE / "README.md").read_text()
    named = set(re.findall(r"`([a-z0-9_]+)\(", readme)) | set(re.findall(r"`(\w+_loss)`", readme))
    assert {name for name in named if not hasattr(pk, name)} == set()
    losses = {name for name in vars(pk) if name.endswith("_loss")}
    assert losses <= named and len(losses) == 8
    known = {item.name for values in (pk.Options, pk.Settings) for item in fields(values)}
    known = {"--" + name.replace("_", "-") for name in known | {"score", "table", "help", "array"}}
    assert set(re.findall(r"(?<=[ `])--[a-z][a-z0-9-]+", readme)) <= known


def test_one_thread_unless_told_otherwise(monkeypatch):
    """More of them wait for one another where two runs share the cores."""
    monkeypatch.setattr(pk, "run", lambda *given: seen.append(torch.get_num_threads()))
    seen = []
    for told in ({}, {"OMP_NUM_THREADS": "2"}):
        monkeypatch.setattr(os, "environ", told)
        torch.set_num_threads(2)
        assert pk.main([]) == 0
    torch.set_num_threads(1)
    assert seen == [1, 2]


def test_everything_public_has_a_docstring():
    for name, item in vars(pk).items():
        if getattr(item, "__module__", "") == "pkdgan":
            assert item.__doc__, name
