"""P-KDGAN: one-class novelty detection by a tiny GAN that learned from a wide one.

    python pkdgan.py                                 # scikit-learn's digits, half a minute
    python pkdgan.py --dataset cifar10 --normal 3    # the paper's experiment; --help has the rest

Zhang, Chen, Sun: "P-KDGAN: Progressive Knowledge Distillation with GANs for One-class Novelty
Detection", IJCAI 2020 (arXiv 2007.06963). We had no full text: [paper] marks what its abstract, its
follow-up's (arXiv 2109.07295) and public listings say, [ours] what we decided; the rest is cited.

A wide teacher (suffix _t) and a narrow student (_s), two GANs of one architecture, see images of
one normal class only and learn to reconstruct these and their codes:

    x --encoder--> z --decoder--> x_hat --second encoder--> z_hat      and a discriminator D

An anomaly's two codes disagree: ||z - z_hat||_2 is the anomaly score [paper], here whitened by the
mean and covariance of z - z_hat on normal images [ours]. train_stages() trains both, t and s, with
generators t.g, s.g and discriminators t.d, s.d, which tell what is real, named first, from fakes:

    stage           moves      discriminator tells           generator learns by    peak rate
    teacher         t.g t.d    x from x_hat_t                L_G                    lr_teacher
    student alone   s.g s.d    x from x_hat_s                L_G                    lr_student
    step 1          s.g s.d    x_hat_t from x_hat_s          L_KD                   lr_student
    step 2          all four   t.d: x from x_hat_t           t.g: L_G               shares of
                               s.d: as alone and in step 1   s.g: L_KD + L_G        both rates

Each stage has a new Adam, warm-up and cosine. The student alone is the baseline: the same net, from
the same weights, as many updates as both steps. In step 1 the student is fresh and the teacher
frozen [paper]; step 2 goes on with step 1's nets, s.d included. A single joint step, the rival, is
a step 2 of fresh nets: epochs = epochs1 = 0, lr_step2 = lr_step2_teacher = 1.

The first half of this file, down to "# ====", is the method; pasted alone, it trains:

    nets = train_stages(x)  # normal images (N, C, 32, 32) in [-1, 1]; then score(nets["step2"], x)
"""

import copy
import json
import math
import re
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sklearn import covariance, metrics
from torch import nn

torch.backends.cudnn.allow_tf32 = False  # scores on CUDA are true float32, as on a CPU

# ----------------------------------------------------------------------------------------- settings
METHOD = """
networks            default  range
    teacher_width        32  1..inf channels of the teacher's first block
    student_width         2  1..inf channels of the student's first block
    z_dim               256  2..inf numbers in a code z or z_hat, teacher and student alike
epochs
    epochs                8  0..inf epochs of the teacher
    epochs1              20  0..inf epochs of step 1
    epochs2               4  0..inf epochs of step 2; the student alone gets epochs1 + epochs2
    epoch_images          1  1..inf small sets are shown several times an epoch, up to this number
    batch                64  1..inf images in an update
    seed                  0  0..1e12 random seed of weights and batch order
rates
    lr_teacher         1e-3  0..inf learning rate of the teacher, times 32 / teacher_width
    lr_student         2e-3  0..inf learning rate of the student
    lr_step2            0.2  0..inf share of the student's rate in step 2
    lr_step2_teacher    0.1  0..inf share of the teacher's rate in step 2; at more, its AUROC falls
weights
    w_adv               1.0  0..inf of a GAN's adversarial loss
    w_con               1.0  0..inf of a GAN's contextual loss
    w_lat               1.0  0..inf of a GAN's latent loss
    kd_inter          100.0  0..inf of the intermediate distillation loss
    kd_latent         100.0  0..inf of the latent distillation loss
    kd_adv             10.0  0..inf of the adversarial distillation loss, and of its D's loss
"""


def rows_of(table):
    """The settings in a table such as METHOD: [name, default, range, what it is] of each."""
    rows = re.findall(r"^ +(\S+) +(\S+) +(\S+) +(.+)", table, re.MULTILINE)
    return [(name, json.loads(default), *rest) for name, default, *rest in rows]


DEFAULTS = SimpleNamespace(**{name: default for name, default, *_ in rows_of(METHOD)})

# ----------------------------------------------------------------------------------------- networks
# Shapes at size 32 and width w; C is 1 or 3 channels. Other sizes have more or fewer blocks.
#     encoder, D    x (C, 32, 32) -> (w, 16, 16) -> (2w, 8, 8) -> (4w, 4, 4) -> z (z_dim), logit (1)
#     decoder       z (z_dim, 1, 1) -> (4w, 4, 4) -> (2w, 8, 8) -> (w, 16, 16) -> x_hat (C, 32, 32)
# nn.GroupNorm(c, c) normalises each channel of each image by itself: instance normalisation
# (Ulyanov et al. 2016) [ours]; batch normalisation in training computes just this at batch size 1,
# where the authors had their best results (arXiv 2109.07295). There are no running statistics:
# training mode is evaluation mode, and no score depends on a batch.


class Blocks(nn.Sequential):
    """A chain of blocks, the last of them its head."""

    def forward(self, h):
        """-> the head's output, float32, [the output of each block before it]."""
        hidden = []
        for block in self:
            h = block(h)
            hidden.append(h)
        h = h.float() if h.dtype == torch.bfloat16 else h  # float() alone ties exports to a device
        return h, hidden[:-1]


def block_widths(size, width):
    """Channels of the blocks down to 4 x 4: doubling, at most 8 * width (Radford et al. 2016).
    By hand: block_widths(32, 128) = [128, 256, 512]"""
    return [width * 2 ** min(i, 3) for i in range(size.bit_length() - 3)]


def encoder(size, channels, width, n_out):
    """DCGAN's: convolutions of stride 2 down to 4 x 4, and a linear head.
    x (B, C, size, size) -> (B, n_out), [(B, width, size/2, size/2), ... (B, c, 4, 4)]"""
    blocks = []
    for c_out in block_widths(size, width):
        first = not blocks  # no norm next to the image (DCGAN); elsewhere, a norm cancels a bias
        conv = nn.Conv2d(channels, c_out, 4, 2, 1, bias=first)
        norm = nn.Identity() if first else nn.GroupNorm(c_out, c_out)
        blocks.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
        channels = c_out
    return Blocks(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(channels * 4 * 4, n_out)))


def upsample(c_in, c_out, bias=False):
    """(B, c_in, h, h) -> (B, c_out, 2h, 2h): DCGAN's transposed 4x4 convolution of stride 2, as a
    2x2 one to four sub-pixels (Shi et al. 2016): faster, and wide nets do not start saturated."""
    conv = nn.Conv2d(c_in, 4 * c_out, 2, padding=1, bias=bias)
    return nn.Sequential(conv, nn.PixelShuffle(2), nn.ZeroPad2d(-1))


def decoder(size, channels, width, z_dim):
    """DCGAN's: transposed convolutions up to the image, before its tanh.
    z (B, z_dim, 1, 1) -> (B, C, size, size), [(B, c, 4, 4), ... (B, width, size/2, size/2)]"""
    blocks = []
    c_in = z_dim
    for c_out in reversed(block_widths(size, width)):
        up = upsample(c_in, c_out) if blocks else nn.ConvTranspose2d(c_in, c_out, 4, bias=False)
        blocks.append(nn.Sequential(up, nn.GroupNorm(c_out, c_out), nn.ReLU()))
        c_in = c_out
    return Blocks(*blocks, upsample(c_in, channels, bias=True))


def attention_maps(hidden):
    """Q (B, all blocks' height * width) = A / ||A||_2 of each block, side by side and divided by
    sqrt(blocks), A = mean over channels of h^2 (Zagoruyko and Komodakis 2017): where a block's
    output h (B, channels, height, width) responds, whatever its number of channels.
    By hand, one block of two 1 x 2 channels [1, 2] and [1, 0]: A = [1, 2], Q = [1, 2] / sqrt(5)"""
    maps = [F.normalize(h.float().square().mean(1).flatten(1)) for h in hidden]
    return torch.cat(maps, 1) / len(maps) ** 0.5


# What a generator makes of a batch: z and z_hat (B, z_dim), of norm sqrt(z_dim); x_hat
# (B, C, size, size) in [-1, 1]; attention, Q of first encoder and decoder, if asked for.
Generated = namedtuple("Generated", "z x_hat z_hat attention")


class Generator(nn.Module):
    """Encoder-decoder-encoder x -> z -> x_hat -> z_hat [paper], as in GANomaly (Akcay et al. 2018).
    Codes lie on a sphere [ours]: else the latent loss falls when both codes merely shrink."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.radius = z_dim**0.5
        self.encode = encoder(size, channels, width, z_dim)
        self.decode = decoder(size, channels, width, z_dim)
        self.encode_again = encoder(size, channels, width, z_dim)

    def forward(self, x, attention=False):
        """(B, C, size, size) -> Generated, with attention_maps() if asked for."""
        z, hidden_encoder = self.encode(x)
        z = self.radius * F.normalize(z)
        x_hat, hidden_decoder = self.decode(z[..., None, None])
        x_hat = x_hat.tanh()
        z_hat = self.radius * F.normalize(self.encode_again(x_hat)[0])
        maps = attention_maps(hidden_encoder + hidden_decoder) if attention else None
        return Generated(z, x_hat, z_hat, maps)


class GAN(nn.Module):
    """A generator g, a discriminator d and the score. Only widths tell teacher from student."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.form = size, channels, width, z_dim  # GAN(*gan.form) is another one like gan
        self.g = Generator(*self.form)
        self.d = encoder(size, channels, width, 1)  # to the logit, high for real
        self.register_buffer("residual_mean", torch.zeros(z_dim))  # m and W of distance(): plain
        self.register_buffer("residual_whitener", torch.eye(z_dim))  # until whiten() sets them

    def residual(self, x):
        """r = z - z_hat (B, z_dim) of images x (B, C, size, size) in [-1, 1]."""
        out = self.g(x)
        return out.z - out.z_hat

    def distance(self, r):
        """||(r - m) W||_2 (B,) of residuals r (B, z_dim): with m = 0 and W = I, as in a new GAN,
        ||z - z_hat||_2 [paper]; with those of whiten(), a Mahalanobis distance [ours]."""
        return ((r - self.residual_mean) @ self.residual_whitener).norm(dim=1)

    def forward(self, x):
        """Anomaly scores (B,), high is anomalous, of images x (B, C, size, size) in [-1, 1]."""
        return self.distance(self.residual(x))


# ------------------------------------------------------------------------------------------- losses
# E[] is the mean over images and elements: a weight means the same at any size. In distillation,
# what is the teacher's is detached [ours]: it could lower the losses by getting as poor as the
# student.


def discriminator_loss(logit_real, logit_fake):
    """L_D = -1/2 E[log sigmoid(D(real))] - 1/2 E[log(1 - sigmoid(D(fake)))] of logits (B, 1)
    (Goodfellow et al. 2014). By hand: discriminator_loss([0.], [0.]) = -log(1/2) = 0.6931"""
    return (F.softplus(-logit_real).mean() + F.softplus(logit_fake).mean()) / 2


def adversarial_loss(f_x, f_x_hat):
    """L_adv = E[(f(x) - f(x_hat))^2], f is D's last block: feature matching (Salimans et al. 2016),
    image by image, as in GANomaly. By hand: adversarial_loss([1., 2.], [1., 0.]) = 4 / 2 = 2"""
    return F.mse_loss(f_x_hat, f_x.detach())


def contextual_loss(x, x_hat):
    """L_con = E[|x - x_hat|]: the reconstruction is the image.
    By hand: contextual_loss([1., -1.], [0., 1.]) = (1 + 2) / 2 = 1.5"""
    return F.l1_loss(x_hat, x)


def latent_loss(z, z_hat):
    """L_lat = E[(z - z_hat)^2]: the two codes of a normal image agree.
    By hand: latent_loss([1., 1.], [0., -1.]) = (1 + 4) / 2 = 2.5"""
    return F.mse_loss(z_hat, z)


def intermediate_distillation_loss(attention_t, attention_s, x_hat_t, x_hat_s):
    """L_inter = E over images ||Q_t - Q_s||_2^2 [ours] + E[|x_hat_t - x_hat_s|] [paper]. By hand,
    one block, Q_t = [1, 0], Q_s = [0, 1], x_hat_t = [1.], x_hat_s = [0.5]: 2 + 0.5 = 2.5"""
    apart = (attention_s - attention_t.detach()).square().sum(1).mean()
    return apart + F.l1_loss(x_hat_s, x_hat_t.detach())


def latent_distillation_loss(z_t, z_s, z_hat_t, z_hat_s):
    """L_latent = E[(z_t - z_s)^2] + E[(z_hat_t - z_hat_s)^2]: the student's codes are the
    teacher's [paper]. By hand: latent_distillation_loss([1.], [0.], [1.], [3.]) = 1 + 4 = 5"""
    return F.mse_loss(z_s, z_t.detach()) + F.mse_loss(z_hat_s, z_hat_t.detach())


def adversarial_distillation_loss(f_t, f_s):
    """L_adv_kd = E[(f(x_hat_t) - f(x_hat_s))^2], f of the student's D, which tells x_hat_t from
    x_hat_s [ours]. By hand: adversarial_distillation_loss([1., 2.], [0., 2.]) = 0.5"""
    return F.mse_loss(f_s, f_t.detach())


def gan_losses(gan, x, out=None, *, w_adv, w_con, w_lat):
    """The losses (for D, for G) of a GAN by itself on images x (B, C, size, size): GANomaly's, our
    weights [ours]. out: what gan.g makes of x, if that is known."""
    out = out or gan.g(x)
    logit_real, hidden_x = gan.d(x)
    logit_fake, hidden_x_hat = gan.d(out.x_hat)
    # ---- D: minimise L_D; x is real, x_hat is fake
    loss_d = discriminator_loss(logit_real, logit_fake)
    # ---- G: minimise L_G = w_adv L_adv + w_con L_con + w_lat L_lat
    adv = adversarial_loss(hidden_x[-1], hidden_x_hat[-1])
    con = contextual_loss(x, out.x_hat)
    lat = latent_loss(out.z, out.z_hat)
    return loss_d, w_adv * adv + w_con * con + w_lat * lat


def distillation_losses(student, out_t, out_s, *, kd_inter, kd_latent, kd_adv):
    """The losses (for D, for G) of a student, given what both generators made of images."""
    logit_t, hidden_t = student.d(out_t.x_hat.detach())
    logit_s, hidden_s = student.d(out_s.x_hat)
    # ---- D of the student: minimise kd_adv L_D; x_hat_t is real, x_hat_s is fake
    loss_d = kd_adv * discriminator_loss(logit_t, logit_s)
    # ---- G of the student: minimise L_KD = kd_inter L_inter + kd_latent L_latent + kd_adv L_adv_kd
    maps = out_t.attention, out_s.attention
    inter = intermediate_distillation_loss(*maps, out_t.x_hat, out_s.x_hat)
    latent = latent_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
    adv_kd = adversarial_distillation_loss(hidden_t[-1], hidden_s[-1])
    return loss_d, kd_inter * inter + kd_latent * latent + kd_adv * adv_kd


# ----------------------------------------------------------------------------------------- training
def fit(losses, data, rates, *, epochs, epoch_images, batch, seed, report):
    """Train GANs. rates: {GAN: its peak learning rate}, which rise, then fall as a cosine to zero
    (Smith and Topin 2018) [ours]. data: tensors (N, ...), images first. losses(*GANs, *a batch's
    rows of data) -> (loss for D's, loss for G's). The images' order: by torch's generator, seeded
    anew each epoch; after it, report(epoch, *mean losses). An overflow is a FloatingPointError."""
    n, device = len(data[0]), data[0].device
    d_weights = [p for gan in rates for p in gan.d.parameters()]
    g_weights = [p for gan in rates for p in gan.g.parameters()]
    groups = [{"params": gan.parameters()} for gan in rates]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)  # betas: DCGAN's
    shown = n * max(1, epoch_images // n)
    updates = math.ceil(shown / batch)  # of an epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [*rates.values()], max(1, epochs * updates), pct_start=0.15, cycle_momentum=False
    )  # pct_start: at 0.1 torch divides by 0 where there are 10 updates
    # bfloat16 where native; no cache of cast weights: gradients of their uses are summed in float32
    bf16 = native_bf16(device.type)
    autocast = torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(10_000 * seed + epoch)
        total = 0
        for indices in torch.randperm(shown).to(device).split(batch):
            with autocast:
                loss_d, loss_g = losses(*rates, *(rows[indices % n] for rows in data))
            # D's descend loss_d, G's loss_g, no other net moves. Both gradients are taken before
            # either moves (as GANomaly's are), so L_D and L_adv share D(x_hat).
            optimizer.zero_grad()
            loss_d.backward(inputs=d_weights, retain_graph=True)
            loss_g.backward(inputs=g_weights)
            optimizer.step()
            schedule.step()
            total += torch.stack([loss_d, loss_g]).detach()
        means = (total / updates).tolist()  # once an epoch: it waits for the device
        if not math.isfinite(sum(means)):
            raise FloatingPointError(f"a loss overflows in epoch {epoch}: lower the learning rates")
        report(epoch, *means)


def native_bf16(kind):
    """Whether a kind of device, "cpu" or "cuda", has bfloat16 in hardware."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # dict: an older torch does not tell
    return kind == "cpu" and any(has for name, has in flags.items() if "bf16" in name)


# ------------------------------------------------------------------------------------------- stages
def step1_losses(kd_weights, student, x, *of_teacher):
    """(for s.d, for s.g) of a student, given images x and what the frozen teacher made of them."""
    out_t, out_s = Generated(*of_teacher), student.g(x, attention=True)
    return distillation_losses(student, out_t, out_s, **kd_weights)


def step2_losses(gan_weights, kd_weights, student, teacher, x):
    """(for both D's, for both G's): a student as in step 1 and by itself, its teacher by itself."""
    out_t, out_s = teacher.g(x, attention=True), student.g(x, attention=True)
    kd_d, kd_g = distillation_losses(student, out_t, out_s, **kd_weights)
    own_d, own_g = gan_losses(student, x, out_s, **gan_weights)
    teacher_d, teacher_g = gan_losses(teacher, x, out_t, **gan_weights)
    return kd_d + own_d + teacher_d, kd_g + own_g + teacher_g


def train_stages(x, settings=DEFAULTS, report=lambda *progress: None):
    """Train all stages on the normal images x (N, C, size, size) in [-1, 1], size a power of two,
    16 or more. After each epoch: report(stage, epoch, mean loss_d, mean loss_g). Returns
    {stage: GAN}, all whitened: "teacher" (as its own stage left it), "student_alone", "step1" and
    "step2". Raises as fit()."""
    lr_t, lr_s = settings.lr_teacher * 32 / settings.teacher_width, settings.lr_student
    nets = {}

    def of_settings(*names):
        """Some settings, by name."""
        return {name: getattr(settings, name) for name in names}

    def fresh(width):
        """A GAN of a width: its initial weights come from the seed alone."""
        torch.manual_seed(settings.seed)
        return GAN(x.shape[3], x.shape[1], width, settings.z_dim).to(x.device)

    def train(stage, losses, rates, epochs, *given):
        """fit() of a stage on x and what else is given; then, its net, first in rates, whitened."""
        how = of_settings("epoch_images", "batch", "seed")
        fit(losses, [x, *given], rates, epochs=epochs, report=partial(report, stage), **how)
        nets[stage], *_ = rates
        whiten(nets[stage], x)

    gan_weights = of_settings("w_adv", "w_con", "w_lat")
    kd_weights = of_settings("kd_inter", "kd_latent", "kd_adv")
    own_losses = partial(gan_losses, **gan_weights)
    teacher, alone = fresh(settings.teacher_width), fresh(settings.student_width)
    train("teacher", own_losses, {teacher: lr_t}, settings.epochs)
    train("student_alone", own_losses, {alone: lr_s}, settings.epochs1 + settings.epochs2)

    step1 = fresh(settings.student_width)
    with torch.no_grad():  # what a frozen teacher makes of an image never changes: made once
        parts = [teacher.g(part, attention=True) for part in x.split(128)]
        of_teacher = map(torch.cat, zip(*parts, strict=True))
    train("step1", partial(step1_losses, kd_weights), {step1: lr_s}, settings.epochs1, *of_teacher)

    moving, step2 = copy.deepcopy((teacher, step1))  # the teacher as it was is kept
    rates = {step2: settings.lr_step2 * lr_s, moving: settings.lr_step2_teacher * lr_t}
    train("step2", partial(step2_losses, gan_weights, kd_weights), rates, settings.epochs2)
    return nets


# -------------------------------------------------------------------------------------------- score
@torch.inference_mode()
def in_parts(f, x):
    """f(x), computed part by part, of images x (N, C, size, size) in [-1, 1]."""
    return torch.cat([f(part) for part in x.split(128)])  # 128 stay in a CPU's cache


def score(gan, x):
    """Anomaly scores (N,) on the CPU of images x (N, C, size, size) in [-1, 1], each by itself."""
    return in_parts(gan, x).cpu()


def whiten(gan, x):
    """Have a GAN score by the whitened distance sqrt((r - m)' S^-1 (r - m)) = ||(r - m) W||_2, m
    mean and S the covariance of training images' r, shrunk (Ledoit and Wolf 2004); W W' = S^-1."""
    r = in_parts(gan.residual, x)
    model = covariance.LedoitWolf().fit(r.cpu().double())
    gan.residual_mean = torch.tensor(model.location_).to(r)
    gan.residual_whitener = torch.linalg.cholesky(torch.tensor(model.precision_)).to(r).contiguous()


def auroc(scores, y):
    """AUROC in percent of scores (N,), y (N,) true for an anomaly. Raises ValueError for NaN."""
    return 100 * metrics.roc_auc_score(y, scores.cpu())


# ==== the program: data, files, command line ====
import argparse
import contextlib
import glob
import os
import signal
import statistics
import sys
import tempfile
import timeit
import warnings
from collections import Counter
from pathlib import Path
from time import monotonic

import torchvision
from PIL import Image, ImageOps
from sklearn import datasets, decomposition, model_selection
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor, resize

VERSION = 7  # of the method and the files: raised when a change makes earlier results incomparable
PROGRAM = """
what a result depends on, with METHOD, default, range
    dataset        "digits"  digits|mnist|fmnist|cifar10|folder   what to train and test on
    normal              "0"  -      the normal class, by name, or, but for a folder, by index
    data             "data"  -      where data sets are or go to; for folder, what has train/, test/
    size                 32  16|32|64|128|256|512   images become size x size
    holdout             0.0  0..1   share of normal training images, the last, held out for p-values
what its AUROCs do not depend on (--skip-finished ignores it)
    out              "runs"  -      where each run makes a folder; other settings: another one
    device               ""  -      to train on: cpu, cuda:1, mps, ...; cuda if there is one
    alpha              0.05  1e-9..1   share of false alarms accepted; not kept for --score
"""
PER_DATASET = {  # flags put before the user's; student_width: the paper's ratio of FLOPs or more
    "digits": "--normal 8 --epochs 20 --epochs1 40 --epochs2 10 --batch 16 "
    "--student-width 1 --lr-student 0.02 --w-con 10",
    "mnist": "--teacher-width 40 --student-width 1 --lr-student 0.02 --w-con 10",
    "fmnist": "--teacher-width 56 --student-width 1",
    "cifar10": "--teacher-width 64 --student-width 8",
    "folder": "--holdout 0.1 --epoch-images 4000 --lr-step2-teacher 0.01",
}
Task = namedtuple("Task", "x x_held x_test y_test kinds normal classes")  # see load_task()


# --------------------------------------------------------------------------------------------- data
def image_files(root, pattern="**"):
    """The images that a pattern finds in a folder, in the order of their paths, links followed, but
    not what is hidden (.x, @x). What is left out, but for .x, is counted on stderr."""
    images, files = [], 0
    for name in glob.glob(pattern, root_dir=root, recursive=True):  # leaves out .x
        path = Path(root, name)
        files += path.is_file()
        if "/@" not in f"/{name}":
            with contextlib.suppress(Exception):  # a folder, or what decoders raise: all sorts
                Image.open(path)
                images.append(path)
    if files > len(images):
        note(f"{root}: left out {files - len(images)} files, hidden or no images")
    return sorted(images)


def read_image(path, size):
    """An image file, turned upright by its EXIF flag, on white where it is transparent, as uint8
    (3, size, size). Raises OSError."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":  # grey, which Pillow would clip to 255
            raise ValueError("it has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGBA").resize((size, size), Image.BILINEAR)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    except Exception as error:
        raise OSError(f"{path} cannot be used as an image ({error}): mend or remove it") from error
    return pil_to_tensor(image.convert("RGB"))


def load_split(args, split):
    """The split "train" or "test": images x (N, C, size, size), 0 to 255, with C = 3 for CIFAR-10
    and folders, else 1; the class of each; all classes. No test/: all empty. Raises OSError."""
    if args.dataset == "folder":  # as MVTec AD: train/<class>/* and, if there, test/<class>/*
        files = image_files(args.data, f"{split}/*/**")
        kinds = [file.relative_to(args.data).parts[1] for file in files]
        x = [read_image(file, args.size) for file in files]
        return torch.stack(x) if x else torch.empty(0), kinds, sorted(set(kinds))
    if args.dataset == "digits":  # scikit-learn's, 8 x 8, come without a split: a fixed one
        digits = datasets.load_digits()
        x, c, classes = (digits.images * 15.9375).astype("uint8"), digits.target, list("0123456789")
        parts = model_selection.train_test_split(x, c, test_size=1 / 3, stratify=c, random_state=0)
        x, c = parts[split == "test" :: 2]  # of x, x_test, c, c_test
    else:
        name = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10"}[args.dataset]
        try:
            data = getattr(torchvision.datasets, name)(args.data, split == "train", download=True)
        except Exception as error:  # no network, a missing file, broken bytes
            what = "go online once, or, if it is there but damaged, delete it"
            raise OSError(f"no {name} in {args.data} ({error}): {what}") from error
        x, c, classes = data.data, data.targets, data.classes
    x = torch.as_tensor(x)  # (N, h, w), or (N, h, w, 3)
    x = resize(x.reshape(*x.shape[:3], -1).movedim(3, 1), args.size)
    return x, [classes[k] for k in c], classes


def load_task(args):
    """A Task: x, normal training images; x_held, the last of them, held out; x_test, y_test, kinds:
    test images, whether each is an anomaly, its class; normal, the class; classes of training. All
    images are float32 (N, C, size, size) in [-1, 1]. Raises ValueError for an unknown class or too
    few images, OSError for unusable data."""
    x, names, classes = load_split(args, "train")
    x_test, kinds, _ = load_split(args, "test")
    normal = args.normal
    if args.dataset != "folder":  # whose classes may be named by numbers
        normal = dict(zip("0123456789", classes, strict=False)).get(normal, normal)
    if normal not in classes:
        found = f"{', '.join(classes) or 'none: no images in train/CLASS/'}"
        raise ValueError(f"--normal {normal}: the classes are {found}")
    x = x[[name == normal for name in names]]
    n = int((1 - args.holdout) * len(x))  # the last, not random: neighbours may be alike
    if len(x[:n].unique(dim=0)) < 10:
        raise ValueError(f"{n} images to train on: at least 10 different ones are needed")
    x, x_test = ((t.float() / 127.5 - 1).to(args.device) for t in (x, x_test))
    return Task(x[:n], x[n:], x_test, [kind != normal for kind in kinds], kinds, normal, classes)


# ------------------------------------------------------------------------------------------- report
def progress(args):
    """A report for train_stages(): a line an epoch, with the time left of all stages."""
    took = {"teacher": 10, "student_alone": 2, "step1": 2, "step2": 15}  # an epoch, roughly
    total = 10 * args.epochs + 4 * args.epochs1 + 17 * args.epochs2
    done, began = 0, monotonic()

    def report(stage, epoch, loss_d, loss_g):
        """Print the line of an epoch."""
        nonlocal done
        done += took[stage]
        left = (monotonic() - began) * (total / done - 1)
        print(f"{stage} {epoch}: loss_D {loss_d:.3f} loss_G {loss_g:.3f} | {left:.0f} s left")

    return report


def pca_auroc(task):
    """AUROC in percent of PCA's reconstruction error (90 % of the variance, at 32 x 32)."""
    x, x_test = (F.adaptive_avg_pool2d(t, 32).flatten(1).cpu() for t in (task.x, task.x_test))
    pca = decomposition.PCA(0.9, svd_solver="covariance_eigh").fit(x)  # fast on many images
    errors = x_test - torch.tensor(pca.inverse_transform(pca.transform(x_test)))
    return auroc(errors.square().sum(1), task.y_test)


def cost(gan, x):
    """What a GAN costs: params and flops (of an image) of generator and discriminator; microseconds
    of a score on the device of x, of one image (us_1) and of each of 256 (us_256)."""
    with FlopCounterMode(display=False) as counter:
        gan.d(gan.g(x[:1]).x_hat)
    costs = {"params": sum(p.numel() for p in gan.parameters()), "flops": counter.get_total_flops()}
    for n in (1, 256):
        call = partial(score, gan, x[torch.arange(n) % len(x)])
        costs[f"us_{n}"] = 1e6 / n * min(timeit.repeat(call, number=1, repeat=11))
    return costs


def shares_flagged(args, task, student, calibration):
    """{class: {alpha: % of its test images flagged}} for alphas that the number held out allows."""
    alphas = [a for a in (0.01, 0.05, 0.1, args.alpha) if a * (1 + len(calibration)) >= 1]
    flagged = {}
    for kind in sorted({*task.kinds}) if alphas else ():
        p = p_values(score(student, task.x_test[[k == kind for k in task.kinds]]), calibration)
        flagged[kind] = {a: round(100 * statistics.mean((p <= a).tolist()), 1) for a in alphas}
    return flagged


def print_tables(args):
    """Print the results of a folder of runs in Markdown: mean ± standard deviation of n seeds."""
    tables = {}  # {(title, *classes): {seed: {class: {stage: AUROC}}}}
    for file in sorted(Path(args.table).glob("*/result.json")):
        result = json.loads(file.read_text())
        if not result["auroc"] or result["version"] != VERSION:
            continue
        for key in ("auroc", "auroc_whitened"):
            table = tables.setdefault((f"{result['pair']}, {key}", *result["classes"]), {})
            table.setdefault(result["seed"], {})[result["normal"]] = result[key]
    stages = ["teacher", "student_alone", "step1", "step2", "gain"]
    for (title, *classes), seeds in tables.items():
        print(f"\n{title}\n\n| class | {' | '.join(stages)} | n |\n{'|---' * 7}|")
        for name, group in [*((name, [name]) for name in classes), ("mean", classes)]:
            found = [runs for runs in seeds.values() if runs.keys() >= set(group)]
            cells = []
            for stage in stages:
                means = [statistics.mean(runs[k][stage] for k in group) for runs in found]
                spread = f" ± {statistics.stdev(means):.2f}" if means[1:] else ""
                cells.append(f"{statistics.mean(means):.2f}{spread}" if means else "missing")
            print(f"| {name} | {' | '.join(cells)} | {len(found)} |")


def run(args):
    """Train, evaluate, print, save. Raises as load_task(), train_stages() and save()."""
    began = monotonic()
    source = Path(args.data).name if args.dataset == "folder" else args.dataset
    folder = Path(args.out, f"{source}-{args.normal}-seed{args.seed}".replace("/", "-"))
    result, file = {"version": VERSION}, folder / "result.json"
    depends_on = rows_of(PROGRAM.split("not depend")[0] + METHOD)  # the rows above that heading
    result["settings"] = {name: getattr(args, name) for name, *_ in depends_on}
    result["bf16"] = native_bf16(torch.device(args.device).type)
    before = json.loads(file.read_text()) if args.skip_finished and file.exists() else {}
    if result.items() <= before.items():
        return print(f"finished before: {file}")
    task = load_task(args)
    os.makedirs(folder, exist_ok=True)
    print(f"{folder.name}: {len(task.x)} images, {len(task.x_held)} held out, on {args.device}")
    print(f"test: {dict(Counter(task.kinds))}")
    nets = train_stages(task.x, args, progress(args))
    student = nets["step2"]
    plain, whitened = {}, {}
    if len(set(task.y_test)) == 2:
        for stage, gan in nets.items():
            r = in_parts(gan.residual, task.x_test)
            plain[stage] = auroc(r.norm(dim=1), task.y_test)
            whitened[stage] = auroc(gan.distance(r), task.y_test)
        for values in (plain, whitened):
            values["gain"] = values["step2"] - values["student_alone"]
    calibration = score(student, task.x_held).sort().values
    k = int(args.alpha * (1 + len(calibration)) + 1e-9)  # flagged is what is above the k-th highest
    costs_t, costs_s = cost(nets["teacher"], task.x), cost(student, task.x)
    result |= {key: {"teacher": costs_t[key], "student": costs_s[key]} for key in costs_t}
    result |= {"ratio": costs_t["flops"] / costs_s["flops"], "seconds": monotonic() - began}
    result |= {"dataset": args.dataset, "normal": task.normal, "seed": args.seed}
    result |= {"auroc": plain, "auroc_whitened": whitened, "images": {"test": len(task.kinds)}}
    result |= {"baselines": {"pca": pca_auroc(task)} if plain else {}, "classes": task.classes}
    result["flagged"] = shares_flagged(args, task, student, calibration)
    result |= {"alpha": args.alpha, "threshold": calibration[-k].item() if k else None}
    result["pair"] = f"{source}, {args.teacher_width} : {args.student_width}"
    result["device"] = f"{args.device}, {torch.get_num_threads()} threads, {torch.__version__}"
    if plain:
        print("\nAUROC in %         plain    whitened")
        for stage, value in plain.items():
            print(f"{stage:13}{value:11.2f}{whitened[stage]:12.2f}")
        print(f"PCA {result['baselines']['pca']:20.2f}")
    else:
        print("\nno AUROC: the test images are all normal, all anomalies, or none")
    print(f"The teacher has {result['ratio']:.0f} times as many FLOPs as the student.")
    for kind, shares in result["flagged"].items():
        print(f"% flagged of {kind}, by alpha: {shares}")
    print(f"threshold at {args.alpha}: {result['threshold'] or math.nan:.4g} (nan: few held out)")
    save(args, task, student.cpu(), calibration, folder, result)


# ----------------------------------------------------------------------------------------- detector
def p_values(scores, calibration):
    """p = (1 + number of calibration scores >= score) / (n + 1), conformal (Vovk et al. 2005, Bates
    et al. 2023), of scores (N,), given the sorted ones (n,) of normal images that no net saw. Over
    draws of images, P(p <= alpha) <= alpha. By hand: p_values([2.5], [1., 2., 3.]) = 2 / 4"""
    n = len(calibration)
    below = torch.searchsorted(calibration, scores * (1 - 1e-5))  # nearly equal is equal: rounding
    return (1 + n - below).double() / (n + 1)


def save(args, task, student, calibration, folder, result):
    """Write the student and the result. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=folder) as new:  # files appear whole or not at all
        new = Path(new)
        about = {"version": VERSION, "form": student.form, "alpha": args.alpha}
        about["calibration"] = calibration.tolist()
        torch.save(about | {"weights": student.state_dict()}, new / "student.pt")
        del student.d  # scoring takes the generator alone
        batch = {0: torch.export.Dim.AUTO}  # of any size
        net = torch.export.export(student, (task.x[:2].cpu(),), dynamic_shapes=(batch,))
        torch.export.save(net, new / "student.pt2", extra_files={"about.json": json.dumps(about)})
        (new / "result.json").write_text(json.dumps(result, indent=1))
        (folder / "result.json").unlink(missing_ok=True)  # the mark of a whole run: last to come
        for name in ("student.pt", "student.pt2", "result.json"):
            (new / name).replace(folder / name)
    print(f"next: python pkdgan.py --alpha {args.alpha} --score '{folder}/student.pt' IMAGES")


def load_gan(path):
    """(GAN, its calibration scores) of a student.pt, on the CPU. Raises OSError."""
    try:
        saved = torch.load(path, weights_only=True)
        gan = GAN(*saved["form"])
        gan.load_state_dict(saved["weights"])
        if saved["version"] != VERSION:
            raise ValueError("of another version")
    except Exception as error:  # torch raises all sorts on what is foreign
        raise OSError(f"{path} is no whole student.pt ({error!r:.80})") from error
    return gan, torch.tensor(saved["calibration"])


def score_files(args):
    """Print a line for each image file, in folders too: path, score, p-value and verdict, "anomaly"
    if p <= args.alpha, "?" if too few were held out to tell. Raises OSError."""
    gan, calibration = load_gan(args.score[0])
    size, channels, *_ = gan.form
    few = args.alpha * (1 + len(calibration)) < 1
    if few:
        note(f"no verdicts: --alpha {args.alpha} needs more than the {len(calibration)} held out")
    files = []
    for path in args.score[1:]:
        files += image_files(path) if os.path.isdir(path) else [path]
    if not files:
        raise OSError("no images to score")
    print("path\tscore\tp-value\tverdict")
    for file in files:
        x = read_image(file, size)[None] / 127.5 - 1
        value = score(gan, x if channels == 3 else x.mean(1, keepdim=True))
        p = p_values(value, calibration).item()
        verdict = "?" if few else "anomaly" if p <= args.alpha else "-"
        print(f"{file}\t{value.item():.4g}\t{p:.4g}\t{verdict}")


# ------------------------------------------------------------------------------------- command line
def parse(argv):
    """Settings (a namespace) from a command line. Bad usage exits with 2."""
    parser = argparse.ArgumentParser("pkdgan.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.epilog = f"Other defaults of data sets: {PER_DATASET}"
    parser.add_argument("--score", nargs="+", help="STUDENT.PT, then images and folders to score")
    parser.add_argument("--table", help="a folder of runs: print its results as Markdown tables")
    parser.add_argument("--skip-finished", action="store_true", help="make no run a second time")
    rows = rows_of(PROGRAM + METHOD)
    for name, default, span, text in rows:
        kind, flag = type(default), f"--{name.replace('_', '-')}"
        words = [*map(kind, span.split("|"))] if "|" in span else None
        what = f"{text} ({default})"
        parser.add_argument(flag, type=kind, choices=words, default=default, help=what)
    args = parser.parse_args([*PER_DATASET[parser.parse_args(argv).dataset].split(), *argv])
    for name, _, span, _ in rows:
        low, dots, high = span.partition("..")
        if dots and not float(low) <= getattr(args, name) < float(high):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not in {span}")
    args.data = os.path.abspath(args.data)  # one folder has one name
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def note(message):
    """A line on stderr."""
    print(f"pkdgan.py: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv):
    """The program. Returns its exit code: None if all went well, 1 failure, 2 usage, 130 Ctrl-C."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any name; at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
    warnings.simplefilter("ignore")  # of libraries
    if "OMP_NUM_THREADS" not in os.environ:  # more are hardly faster, and wait for one another
        torch.set_num_threads(1)
    try:
        (print_tables if args.table else score_files if args.score else run)(args)
    except BrokenPipeError:  # "| head" has seen enough; sys.exit() would try to write again
        os._exit(1)
    except KeyboardInterrupt:
        note("interrupted; no result is half-written")
        return 130
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        note(error)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
