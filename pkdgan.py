"""P-KDGAN: one-class novelty detection by a tiny GAN that learned from a wide one.

    python pkdgan.py                                 # scikit-learn's digits, half a minute
    python pkdgan.py --dataset cifar10 --normal 3    # the paper's experiment; --help has the rest

Zhang, Chen, Sun: "P-KDGAN: Progressive Knowledge Distillation with GANs for One-class Novelty
Detection", IJCAI 2020 (arXiv 2007.06963). Its full text was not at hand: [paper] marks what its
abstract, its follow-up's (arXiv 2109.07295) and public listings say, [ours] what was decided here;
what comes from elsewhere is cited.

A wide teacher (suffix _t) and a narrow student (_s), two GANs of one architecture, see images of
one normal class only:

    x --encoder--> z --decoder--> x_hat --second encoder--> z_hat      and a discriminator D

They learn to reconstruct normal images and their codes. An anomaly's two codes disagree:
||z - z_hat||_2 is the anomaly score [paper], here whitened by what normal images have [ours].
train_stages() trains both, t and s, their generators t.g, s.g and discriminators t.d, s.d:

    stage           moves      discriminator tells           generator learns by    peak rate
    teacher         t.g t.d    x from x_hat_t                L_G                    lr_teacher
    student alone   s.g s.d    x from x_hat_s                L_G                    lr_student
    step 1          s.g s.d    x_hat_t from x_hat_s          L_KD                   lr_student
    step 2          all four   t.d: x from x_hat_t           t.g: L_G               shares of
                               s.d: both of the above two    s.g: L_KD + L_G        both rates

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
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn import covariance, metrics
from torch import nn

torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on CUDA, too

# ----------------------------------------------------------------------------------------- settings
METHOD = """
networks            default  range
    teacher_width        32  1..    channels of the teacher's first block
    student_width         2  1..    channels of the student's first block
    z_dim               256  1..    numbers in a code z or z_hat, teacher and student alike
epochs
    epochs                8  0..    epochs of the teacher
    epochs1              20  0..    epochs of step 1
    epochs2               4  0..    epochs of step 2; the student alone gets epochs1 + epochs2
    epoch_images          1  1..    small sets are shown several times an epoch, up to this number
    batch                64  1..    images in an update
    seed                  0  0..    random seed of weights and batch order
rates
    lr_teacher         1e-3  0..    learning rate of the teacher, times 32 / teacher_width
    lr_student         2e-3  0..    learning rate of the student
    lr_step2            0.2  0..    share of the student's rate in step 2
    lr_step2_teacher    0.1  0..    share of the teacher's rate in step 2; at more, its AUROC falls
weights
    w_adv               1.0  0..    of a GAN's adversarial loss
    w_con               1.0  0..    of a GAN's contextual loss
    w_lat               1.0  0..    of a GAN's latent loss
    kd_inter          100.0  0..    of the intermediate distillation loss
    kd_latent         100.0  0..    of the latent distillation loss
    kd_adv             10.0  0..    of the adversarial distillation loss, and of its D's loss
"""


def rows_of(table):
    """The settings in a table such as METHOD: [name, default, range, what it is] of each."""
    rows = [line.split(maxsplit=3) for line in table.splitlines() if line.startswith(" ")]
    return [(name, json.loads(default), *rest) for name, default, *rest in rows]


DEFAULTS = SimpleNamespace(**{name: default for name, default, *_ in rows_of(METHOD)})

# ----------------------------------------------------------------------------------------- networks
# Shapes at size 32 and width w; C is 1 or 3 channels. Other sizes have more or fewer blocks.
#
#     encoder, D    x (C, 32, 32) -> (w, 16, 16) -> (2w, 8, 8) -> (4w, 4, 4) -> z (z_dim), logit (1)
#     decoder       z (z_dim, 1, 1) -> (4w, 4, 4) -> (2w, 8, 8) -> (w, 16, 16) -> x_hat (C, 32, 32)
#
# nn.GroupNorm(c, c) normalises each channel of each image by itself: instance normalisation
# (Ulyanov et al. 2016) [ours]. The authors had their best results at batch size 1 (arXiv
# 2109.07295), where batch normalisation in training would compute just this. There are no running
# statistics: training mode is evaluation mode, and no score depends on a batch.


class Blocks(nn.Sequential):
    """A chain of blocks, the last of them its head."""

    def forward(self, h):
        """-> the head's output in float32, [the output of each block before it]."""
        hidden = []
        for block in self:
            h = block(h)
            hidden.append(h)
        h = h.float() if h.dtype == torch.bfloat16 else h  # else an export would keep a device
        return h, hidden[:-1]


def block_widths(size, width):
    """Channels of the blocks down to 4 x 4: doubling, at most 8 * width (Radford et al. 2016).
    By hand: block_widths(32, 128) = [128, 256, 512]"""
    return [width * 2 ** min(i, 3) for i in range(int(math.log2(size)) - 2)]


def encoder(size, channels, width, n_out):
    """DCGAN's: convolutions of stride 2 down to 4 x 4, and a linear head.
    x (B, C, size, size) -> (B, n_out), [(B, width, size/2, size/2), ... (B, c, 4, 4)]"""
    blocks = []
    for c_out in block_widths(size, width):
        first = not blocks  # no norm next to the image (DCGAN); elsewhere, a norm cancels a bias
        conv = nn.Conv2d(channels, c_out, 4, stride=2, padding=1, bias=first)
        norm = nn.Identity() if first else nn.GroupNorm(c_out, c_out)
        blocks.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2, inplace=True)))
        channels = c_out
    return Blocks(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(channels * 4 * 4, n_out)))


def upsample(c_in, c_out, bias=False):
    """(B, c_in, h, h) -> (B, c_out, 2h, 2h): DCGAN's transposed 4x4 convolution of stride 2, as a
    2x2 convolution to four sub-pixels (Shi et al. 2016), the border cropped: faster on a CPU, and
    nn.ConvTranspose2d's initial weights saturate wide nets at the image."""
    conv = nn.Conv2d(c_in, 4 * c_out, 2, padding=1, bias=bias)
    return nn.Sequential(conv, nn.PixelShuffle(2), nn.ZeroPad2d(-1))


def decoder(size, channels, width, z_dim):
    """DCGAN's: transposed convolutions up to the image, before its tanh.
    z (B, z_dim, 1, 1) -> (B, C, size, size), [(B, c, 4, 4), ... (B, width, size/2, size/2)]"""
    blocks = []
    c_in = z_dim
    for c_out in reversed(block_widths(size, width)):
        up = upsample(c_in, c_out) if blocks else nn.ConvTranspose2d(c_in, c_out, 4, bias=False)
        blocks.append(nn.Sequential(up, nn.GroupNorm(c_out, c_out), nn.ReLU(inplace=True)))
        c_in = c_out
    return Blocks(*blocks, upsample(c_in, channels, bias=True))


def attention_maps(hidden):
    """Q (B, all blocks' height * width) = A / ||A||_2 of each block, side by side and divided by
    sqrt(blocks), A = mean over channels of h^2 (Zagoruyko and Komodakis 2017): where a block's
    output h (B, channels, height, width) responds, whatever its number of channels.
    By hand, one block of two 1 x 2 channels [1, 2] and [1, 0]: A = [1, 2], Q = [1, 2] / sqrt(5)"""
    maps = [F.normalize(h.float().square().mean(1).flatten(1)) for h in hidden]
    return torch.cat(maps, 1) / len(maps) ** 0.5


class Generated(NamedTuple):
    """What a generator makes of a batch: all that losses, distillation and score need."""

    z: torch.Tensor  # (B, z_dim), of norm sqrt(z_dim)
    x_hat: torch.Tensor  # (B, C, size, size) in [-1, 1]
    z_hat: torch.Tensor  # (B, z_dim), of norm sqrt(z_dim)
    attention: torch.Tensor | None  # Q of first encoder and decoder, to distil, if asked for


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
        self.g = Generator(size, channels, width, z_dim)
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
# E[] is the mean over images and elements, so that a weight means the same at any size. The losses
# of distillation detach what is the teacher's: they move the student only [ours]. A teacher that
# their gradient reached could lower them by becoming as poor as the student.


def discriminator_loss(logit_real, logit_fake):
    """L_D = -1/2 E[log sigmoid(D(real))] - 1/2 E[log(1 - sigmoid(D(fake)))] of logits (B, 1)
    (Goodfellow et al. 2014). By hand: discriminator_loss([0.], [0.]) = -log(1/2) = 0.6931"""
    return (F.softplus(-logit_real).mean() + F.softplus(logit_fake).mean()) / 2


def adversarial_loss(f_x, f_x_hat):
    """L_adv = E[(f(x) - f(x_hat))^2], f is D's last block: feature matching (Salimans et al. 2016),
    here image by image, as in GANomaly.
    By hand: adversarial_loss([1., 2.], [1., 0.]) = (0 + 4) / 2 = 2"""
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
    """L_inter = E over images of ||Q_t - Q_s||_2^2 [ours] + E[|x_hat_t - x_hat_s|] [paper]. The
    first is a mean over blocks.
    By hand, with one block, Q_t = [1, 0], Q_s = [0, 1], x_hat_t = [1.], x_hat_s = [0.5]: 2.5"""
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


def gan_losses(gan, x, out, *, w_adv, w_con, w_lat):
    """The losses (for D, for G) of a GAN by itself, whose generator made `out` of images x:
    GANomaly's, our weights [ours]."""
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
def fit(losses, rates, n, *, epochs, epoch_images, batch, seed, report):
    """Train GANs on n images. rates: {GAN: its peak learning rate}, which rise, then fall as a
    cosine to zero (Smith and Topin 2018) [ours]. losses(indices of images (B,)) -> (loss for D's,
    loss for G's). Seed and epoch alone give the images' order. After each epoch: report(epoch, mean
    loss for D's, mean loss for G's). Raises FloatingPointError if they overflow."""
    d_weights = [p for gan in rates for p in gan.d.parameters()]
    g_weights = [p for gan in rates for p in gan.g.parameters()]
    groups = [{"params": gan.parameters()} for gan in rates]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)  # betas: DCGAN's
    shown = n * max(1, epoch_images // n)
    updates = max(1, epochs * math.ceil(shown / batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(rates.values()), updates, pct_start=0.15, cycle_momentum=False
    )  # pct_start: at 0.1 torch divides by 0 where there are 10 updates
    # bfloat16 where native; no cache of cast weights: gradients of their uses are summed in float32
    device = d_weights[0].device
    bf16 = native_bf16(device.type)
    autocast = torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(10_000 * seed + epoch)
        log = []
        for indices in torch.randperm(shown).to(device).split(batch):
            with autocast:
                loss_d, loss_g = losses(indices % n)
            # D's descend loss_d, G's loss_g, no other net moves. Both gradients are taken before
            # either moves (as GANomaly's are), so L_D and L_adv share D(x_hat).
            optimizer.zero_grad()
            loss_d.backward(inputs=d_weights, retain_graph=True)
            loss_g.backward(inputs=g_weights)
            optimizer.step()
            schedule.step()
            log.append(torch.stack([loss_d, loss_g]).detach())
        mean_d, mean_g = torch.stack(log).mean(0).tolist()  # once an epoch: it waits for the device
        if not math.isfinite(mean_d + mean_g):
            raise FloatingPointError(f"a loss overflows in epoch {epoch}: lower the learning rates")
        report(epoch, mean_d, mean_g)


def native_bf16(kind):
    """Whether a kind of device, "cpu" or "cuda", has bfloat16 in hardware."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # dict: an older torch does not tell
    return kind == "cpu" and any(has for name, has in flags.items() if "bf16" in name)


# ------------------------------------------------------------------------------------------- stages
# of a training: each gives the losses(indices of images) -> (for D's, for G's) that fit() takes


def gan_stage(gan, x, gan_weights):
    """A GAN by itself on images x (N, C, size, size)."""
    return lambda i: gan_losses(gan, x[i], gan.g(x[i]), **gan_weights)


def step1_stage(teacher, student, x, kd_weights):
    """The student learns from the frozen teacher alone."""
    with torch.no_grad():  # what a frozen teacher makes of an image never changes: made once
        parts = [teacher.g(part, attention=True) for part in x.split(128)]
        of_teacher = [torch.cat(field) for field in zip(*parts, strict=True)]

    def losses(i):
        """Indices of images (B,) -> the loss for s.d and the loss for s.g."""
        out_t = Generated(*(field[i] for field in of_teacher))
        return distillation_losses(student, out_t, student.g(x[i], attention=True), **kd_weights)

    return losses


def joint_stage(teacher, student, x, gan_weights, kd_weights):
    """The teacher learns by its own losses, the student by its own and distillation's."""

    def losses(i):
        """Indices of images (B,) -> the loss for both D's and the loss for both G's."""
        out_t, out_s = teacher.g(x[i], attention=True), student.g(x[i], attention=True)
        kd_d, kd_g = distillation_losses(student, out_t, out_s, **kd_weights)
        own_d, own_g = gan_losses(student, x[i], out_s, **gan_weights)
        teacher_d, teacher_g = gan_losses(teacher, x[i], out_t, **gan_weights)
        return kd_d + own_d + teacher_d, kd_g + own_g + teacher_g

    return losses


def train_stages(x, settings=DEFAULTS, report=lambda *progress: None):
    """Train all stages on the normal images x (N, C, size, size) in [-1, 1], size a power of two,
    16 or more. After each epoch: report(stage, gan, epoch, mean loss_d, mean loss_g). Returns
    {stage: GAN}, all whitened: "teacher" (as its own stage left it), "student_alone", "step1" and
    "step2". Raises as fit()."""
    gan_weights = {key: getattr(settings, key) for key in ("w_adv", "w_con", "w_lat")}
    kd_weights = {key: getattr(settings, key) for key in ("kd_inter", "kd_latent", "kd_adv")}
    lr_t, lr_s = settings.lr_teacher * 32 / settings.teacher_width, settings.lr_student
    both = settings.epochs1 + settings.epochs2
    nets = {}

    def fresh(width):
        """A GAN of a width: its initial weights come from the seed alone."""
        torch.manual_seed(settings.seed)
        return GAN(x.shape[3], x.shape[1], width, settings.z_dim).to(x.device)

    def train(stage, gan, losses, rates, epochs):
        """fit() of a stage, whose net is gan, with the settings that all stages share."""
        nets[stage] = gan
        order = {"batch": settings.batch, "epoch_images": settings.epoch_images}
        say = partial(report, stage, gan)
        fit(losses, rates, len(x), epochs=epochs, seed=settings.seed, report=say, **order)

    teacher, alone = fresh(settings.teacher_width), fresh(settings.student_width)
    train("teacher", teacher, gan_stage(teacher, x, gan_weights), {teacher: lr_t}, settings.epochs)
    train("student_alone", alone, gan_stage(alone, x, gan_weights), {alone: lr_s}, both)

    step1 = fresh(settings.student_width)
    losses = step1_stage(teacher, step1, x, kd_weights)
    train("step1", step1, losses, {step1: lr_s}, settings.epochs1)

    moving, step2 = copy.deepcopy(teacher), copy.deepcopy(step1)  # the teacher as it was is kept
    rates = {step2: settings.lr_step2 * lr_s, moving: settings.lr_step2_teacher * lr_t}
    losses = joint_stage(moving, step2, x, gan_weights, kd_weights)
    train("step2", step2, losses, rates, settings.epochs2)

    for gan in nets.values():
        whiten(gan, x)
    return nets


# -------------------------------------------------------------------------------------------- score
@torch.inference_mode()
def in_parts(f, x):
    """f(x), computed part by part, of images x (N, C, size, size) in [-1, 1]."""
    return torch.cat([f(part) for part in x.split(128)])  # 128 stay in a CPU's cache


def score(gan, x):
    """Anomaly scores (N,) of images x (N, C, size, size) in [-1, 1], each image by itself."""
    return in_parts(gan, x)


def whiten(gan, x):
    """Have a GAN score by the whitened distance sqrt((r - m)' S^-1 (r - m)), m the mean and S the
    covariance, shrunk (Ledoit and Wolf 2004), of the residuals r of training images x."""
    r = in_parts(gan.residual, x)
    model = covariance.LedoitWolf().fit(r.cpu().double())
    root = torch.linalg.cholesky(torch.tensor(model.precision_))  # W W' = S^-1
    gan.residual_mean = torch.tensor(model.location_).to(r)
    gan.residual_whitener = root.to(r).contiguous()


def auroc(scores, y):
    """AUROC in percent of scores (N,), y (N,) true for an anomaly, None if all are of one kind.
    Raises ValueError if a score is NaN."""
    return 100 * metrics.roc_auc_score(y, scores.cpu()) if len(y.unique()) == 2 else None


# ==== the program: data, files, command line ====
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "scikit-learn>=1.5"]
# ///
import argparse
import contextlib
import glob
import os
import signal
import statistics
import sys
import tempfile
import time
import timeit
import warnings
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import torchvision
from PIL import Image, ImageOps
from sklearn import datasets, decomposition, model_selection
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

VERSION = 6  # of the method and the files: raised when a change makes earlier results incomparable
PROGRAM = """
the task            default  range
    dataset        "digits"  digits|mnist|fmnist|cifar10|folder   what to train and test on
    normal              "0"  -      the normal class, by name or index
    data             "data"  -      where data sets are or go to; for folder, what has train/, test/
    size                 32  16|32|64|128|256|512   images become size x size
    holdout             0.0  0..1   share of normal training images, the last, held out for p-values
    val               false  -      evaluate on a tenth of the training split, not on the test split
the run
    out              "runs"  -      where each run makes a folder; other settings: another one
    device               ""  -      such as cpu, cuda:1, mps; a GPU if there is one
    skip_finished     false  -      do nothing if there is a result of the same settings and version
    alpha              0.05  1e-9..1   share of false alarms that a verdict accepts
"""
PER_DATASET = {  # flags put before the user's; student_width: the paper's ratio of FLOPs or more
    "digits": "--normal 8 --epochs 20 --epochs1 40 --epochs2 10 --batch 16 "
    "--student-width 1 --lr-student 0.02 --w-con 10",
    "mnist": "--teacher-width 40 --student-width 1 --lr-student 0.02 --w-con 10",
    "fmnist": "--teacher-width 56 --student-width 1",
    "cifar10": "--teacher-width 64 --student-width 8",
    "folder": "--holdout 0.1 --epoch-images 4000 --lr-step2-teacher 0.01",
}
OF_NO_EFFECT = {"out", "device", "skip_finished", "alpha", "score", "table"}  # on a run's figures


# --------------------------------------------------------------------------------------------- data
def image_files(root):
    """All images below a folder in the order of their paths, links followed, but not what is hidden
    (.x, @x). What is left out, but for .x, is counted on stderr."""
    images, others = [], []
    for name in glob.glob("**", root_dir=root, recursive=True):  # ** leaves out .x
        path = Path(root, name)
        if path.is_file():
            wanted = "/@" not in f"/{name}" and can_open(path)
            (images if wanted else others).append(path)
    if others:
        note(f"{root}: left out {len(others)} files that are no images, such as {others[0]}")
    return sorted(images)


def can_open(path):
    """Whether a file is an image to Pillow, whatever its name."""
    with contextlib.suppress(Exception):  # decoders raise all sorts
        Image.open(path).close()
        return True
    return False


def read_image(path, size):
    """An image file, turned upright by its EXIF flag, on white where it is transparent, as uint8
    (3, size, size). Raises OSError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF" or ";16" in str(image.tile):  # Pillow would clip or cut them
                raise ValueError("it has more than 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGBA")
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    except Exception as error:
        raise OSError(f"{path} cannot be used as an image ({error}): mend or remove it") from error
    return TF.pil_to_tensor(image.convert("RGB"))


def load_images(dataset, root, size):
    """All of a data set: (x, c, x_test, c_test, classes). x, x_test: (N, C, size, size), 0 to 255,
    with C = 3 for CIFAR-10 and folders, else 1; c, c_test: int64 (N,), indices into the list
    `classes`, which has those of the training split first. Raises OSError for what is unusable."""
    if dataset == "folder":  # root/train/<class>/* and, if there, root/test/<class>/*: MVTec AD's
        splits = image_files(f"{root}/train"), image_files(f"{root}/test")
        train, test = ([f for f in files if len(f.relative_to(root).parts) > 2] for files in splits)
        if not train:
            raise OSError(f"{root}: no images in train/CLASS/, CLASS being any name")
        files, n = train + test, len(train)
        names = [file.relative_to(root).parts[1] for file in files]
        classes = list(dict.fromkeys(names))
        x = torch.stack([read_image(file, size) for file in files])
        c = torch.tensor([classes.index(name) for name in names])
        return x[:n], c[:n], x[n:], c[n:], classes
    if dataset == "digits":  # scikit-learn's, 8 x 8, come without a split: a fixed one
        digits = datasets.load_digits()
        x, c, classes = (digits.images * 15.9375).astype("uint8"), digits.target, list("0123456789")
        parts = model_selection.train_test_split(x, c, test_size=1 / 3, stratify=c, random_state=0)
    else:
        name = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
        source = getattr(torchvision.datasets, name)
        try:
            train, test = source(root, download=True), source(root, train=False)
        except Exception as error:  # no network, a missing file, broken bytes
            what = "go online once, or, if it is there but damaged, delete it"
            raise OSError(f"no {name} in {root} ({error}): {what}") from error
        parts = train.data, test.data, train.targets, test.targets
        classes = [text.split(" - ")[0] for text in train.classes]  # MNIST: "0 - zero"
    x, x_test, c, c_test = map(torch.as_tensor, parts)  # x: (N, h, w), or (N, h, w, 3)
    x, x_test = (TF.resize(t.reshape(*t.shape[:3], -1).movedim(3, 1), size) for t in (x, x_test))
    return x, c, x_test, c_test, classes


Task = namedtuple("Task", "x x_held x_test y_test kinds normal classes")


def load_task(args):
    """The task that the settings name: x, the normal images of the training split, but for the last
    ones, x_held, held out; x_test, the test split, or with args.val a fixed tenth of the training
    split; y_test (N,), true for an anomaly; kinds, the class of each test image; normal, the normal
    class; classes, all of the training split. Images are float32 (N, C, size, size) in [-1, 1].
    Raises ValueError for an unknown class or too few images, OSError for unusable data."""
    x, c, x_test, c_test, names = load_images(args.dataset, args.data, args.size)
    classes = names[: int(c.max()) + 1]
    indices = [] if any(map(str.isdecimal, names)) else map(str, range(len(classes)))
    words = [*classes, *indices]  # a number is a name or an index, never both
    if args.normal not in words:
        raise ValueError(f"--normal {args.normal}: the classes are {', '.join(classes)}")
    normal = words.index(args.normal) % len(classes)
    if args.val:
        x, x_test, c, c_test = model_selection.train_test_split(x, c, test_size=0.1, random_state=0)
    x = x[c == normal]
    n = len(x) - math.ceil(args.holdout * len(x))  # the last, not random: neighbours may be alike
    if len({hash(image.numpy().tobytes()) for image in x[:n]}) < 10:
        raise ValueError(f"{n} images to train on: at least 10 different ones are needed")
    x, x_test = ((t.float() / 127.5 - 1).to(args.device) for t in (x, x_test))
    kinds = [names[k] for k in c_test]
    return Task(x[:n], x[n:], x_test, c_test != normal, kinds, classes[normal], classes)


# ------------------------------------------------------------------------------------------- report
def progress(args):
    """A report for train_stages(): a line an epoch, with the time left of all stages."""
    narrow = 0.15 + args.student_width / args.teacher_width  # an epoch's time, roughly as measured
    cost_of = {"teacher": 1, "student_alone": narrow, "step1": narrow, "step2": 1.5}
    epochs = {"teacher": args.epochs, "student_alone": args.epochs1 + args.epochs2}
    epochs |= {"step1": args.epochs1, "step2": args.epochs2}
    total = sum(epochs[stage] * cost_of[stage] for stage in epochs)
    done, began = 0, time.monotonic()

    def report(stage, gan, epoch, loss_d, loss_g):
        """Print the line of an epoch."""
        nonlocal done
        done += cost_of[stage]
        left = (time.monotonic() - began) * max(0, total / done - 1)
        losses = f"loss_D {loss_d:.3f} loss_G {loss_g:.3f}"
        print(f"{stage} {epoch}/{epochs[stage]}: {losses} | {left:.0f} s left of the whole run")

    return report


def pca_auroc(task):
    """AUROC in percent of PCA's reconstruction error (90 % of the variance, at 32 x 32)."""
    images = task.x, task.x_test
    x, x_test = (F.adaptive_avg_pool2d(t, 32).flatten(1).cpu().numpy() for t in images)
    pca = decomposition.PCA(0.9, svd_solver="covariance_eigh").fit(x)  # fast on many images
    errors = x_test - pca.inverse_transform(pca.transform(x_test))
    return auroc(torch.tensor(errors).square().sum(1), task.y_test)


def cost(gan, x):
    """What a GAN costs: params and flops (of one image) of generator and discriminator; and of a
    score, which the generator alone takes, microseconds per image on the device of x (N, C, size,
    size), of one by itself (us_1) and of 256 in parts (us_256)."""
    with FlopCounterMode(display=False) as counter:
        gan.d(gan.g(x[:1]).x_hat)
    params = sum(p.numel() for p in gan.parameters())
    costs = {"params": params, "flops": counter.get_total_flops()}
    for n in (1, 256):
        names = {"score": score, "gan": gan, "some": x[torch.arange(n) % len(x)]}
        seconds = timeit.repeat("score(gan, some).cpu()", number=1, repeat=11, globals=names)
        costs[f"us_{n}"] = 1e6 / n * min(seconds)  # the least disturbed
    return costs


def verdicts(args, task, student, calibration):
    """What verdicts on the test images would be worth: {alpha: threshold, or None if too few images
    are held out for it}, and for "normal", "anomalies" and each kind of these [number, AUROC, % of
    them flagged at each alpha]."""
    scores, y = score(student, task.x_test).cpu(), task.y_test
    p, thresholds, flagged = p_values(scores, calibration), {}, {}
    for alpha in sorted({0.01, 0.05, 0.1, args.alpha}):
        k = int(alpha * (len(calibration) + 1) + 1e-9)  # flagged is what is above the k-th highest
        thresholds[alpha] = calibration[-k].item() if k else None
    groups = {"normal": ~y, "anomalies": y}
    for kind in sorted(set(task.kinds) - {task.normal}):
        groups[f"- {kind}"] = torch.tensor([name == kind for name in task.kinds])
    for name, its in groups.items():
        if its.any():
            shares = [100 * (p[its] <= alpha).double().mean().item() for alpha in thresholds]
            flagged[name] = [int(its.sum()), auroc(scores[its | ~y], y[its | ~y]), *shares]
    return thresholds, flagged


def print_result(args, result):
    """AUROC of each stage and what it is above the student alone; what the nets cost; what verdicts
    would be worth; and a line for each reason for caution."""
    plain, whitened, pca = result["auroc"], result["auroc_whitened"], result["baselines"].get("pca")
    print("\nAUROC in %          plain    gain    whitened    gain")
    for stage in plain:
        row = f"{stage.replace('_', ' '):13}"
        for values in plain, whitened:
            row += f"{values[stage]:12.2f}{values[stage] - values['student_alone']:+8.2f}"
        print(row)
    print(f"PCA{pca:22.2f}" if plain else "none: the test images are all normal or all anomalies")
    print("\ncost                   teacher     student   ratio")
    for key in ("params", "flops", "us_1", "us_256"):  # as cost() explains them
        teacher, student = result[key].values()
        print(f"{key:18}{teacher:12,.0f}{student:12,.0f}{teacher / student:8.1f}")
    thresholds = result["thresholds"]
    if thresholds:
        cells = (f"{value:8.4g}" if value else f"{'-':>8}" for value in thresholds.values())
        print(
            "\nalpha           ", *(f"{alpha:8}" for alpha in thresholds), "  (-: too few held out)"
        )
        print("threshold       ", *cells)
        for name, (n, area, *shares) in result["flagged"].items():
            row = " ".join(f"{share:6.1f} %" for share in shares)
            text = "" if area is None else f", AUROC {area:.2f}"
            print(f"{name:16} {row} flagged of {n}{text}")
    cautions = {
        "fewer than 100 images to train on": result["images"]["train"] < 100,
        "too few held out for --alpha": args.holdout and not thresholds[args.alpha],
        "PCA is as good": plain and whitened["step2"] <= pca,
        "an AUROC below 75 misses most anomalies": plain and whitened["step2"] < 75,
        "the student alone is as good": plain and whitened["step2"] <= whitened["student_alone"],
    }
    for text, applies in cautions.items():
        if applies:
            print(f"caution: {text}")


def print_tables(args):
    """The results in a folder of runs as Markdown, a table for each pair of nets and score: a row a
    class and their mean, ± standard deviation over n seeds."""
    tables = {}  # {(title, classes): {seed: {class: {stage: AUROC}}}}
    for file in sorted(Path(args.table).glob("*/result.json")):
        result = json.loads(file.read_text())
        usable = result["version"] == VERSION and result["auroc"]
        for key in ("auroc", "auroc_whitened") if usable else ():
            values = result[key]
            values["gain"] = values["step2"] - values["student_alone"]
            table = tables.setdefault((f"{result['pair']}, {key}", *result["classes"]), {})
            table.setdefault(result["seed"], {})[result["normal"]] = values
    for (title, *classes), seeds in tables.items():
        print(f"\n{title}\n\n| class | {' | '.join(values)} | n |\n{'|---' * (len(values) + 2)}|")
        for name, group in [*((name, [name]) for name in classes), ("mean", classes)]:
            found = [runs for runs in seeds.values() if runs.keys() >= set(group)]
            cells = []
            for stage in values:
                means = [statistics.mean(runs[k][stage] for k in group) for runs in found]
                cells.append(f"{statistics.mean(means):.2f}" if means else "missing")
                cells[-1] += f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
            print(f"| {name} | {' | '.join(cells)} | {len(found)} |")


def run(args):
    """Train, evaluate, print, save. Raises as load_task() and train_stages()."""
    began, out = time.monotonic(), Path(args.out)
    settings = {key: value for key, value in vars(args).items() if key not in OF_NO_EFFECT}
    bf16 = native_bf16(torch.device(args.device).type)
    result = {"settings": settings, "version": VERSION, "bf16": bf16}
    for file in out.glob("*/result.json") if args.skip_finished else ():
        if result.items() <= json.loads(file.read_text()).items():
            return print(f"finished before: {file}")
    task = load_task(args)
    source = Path(args.data).name if args.dataset == "folder" else args.dataset
    source += "-val" * args.val
    folder = out / f"{source}-{task.normal}-seed{args.seed}".replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{folder.name}: {len(task.x)} images, {len(task.x_held)} held out, on {args.device}")
    counts = Counter(task.kinds)
    normal = counts.pop(task.normal, 0)
    kinds = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    print(f"test: {normal} normal, {counts.total()} anomalies ({kinds})")
    nets = train_stages(task.x, args, progress(args))
    teacher, student = nets["teacher"], nets["step2"]
    images = {"train": len(task.x), "held": len(task.x_held), "test": len(task.kinds)}
    result |= {"images": images, "auroc": {}, "auroc_whitened": {}, "baselines": {}}
    if len(task.y_test.unique()) == 2:
        result["baselines"]["pca"] = pca_auroc(task)
        for stage, gan in nets.items():
            r = in_parts(gan.residual, task.x_test)
            result["auroc"][stage] = auroc(r.norm(dim=1), task.y_test)
            result["auroc_whitened"][stage] = auroc(gan.distance(r), task.y_test)
    held = [score(student, image) for image in task.x_held.split(1)]  # one by one: as score_files()
    calibration = torch.cat(held).cpu().sort().values
    worth = verdicts(args, task, student, calibration) if len(calibration) else ({}, {})
    result["thresholds"], result["flagged"] = worth
    costs_t, costs_s = cost(teacher, task.x), cost(student, task.x)
    result |= {key: {"teacher": costs_t[key], "student": costs_s[key]} for key in costs_t}
    result |= {"ratio": costs_t["flops"] / costs_s["flops"], "classes": task.classes}
    result |= {"dataset": args.dataset, "normal": task.normal, "seed": args.seed}
    result["pair"] = f"{source}, {args.teacher_width} : {args.student_width}"
    result["device"] = f"{args.device}, {torch.get_num_threads()} threads"
    result["torch"] = torch.__version__
    result["seconds"] = time.monotonic() - began
    print_result(args, result)
    save(args, task, teacher.cpu(), student.cpu(), calibration, folder, result)


# ----------------------------------------------------------------------------------------- detector
def p_values(scores, calibration):
    """p = (1 + number of calibration scores >= score) / (n + 1), conformal (Vovk et al. 2005, Bates
    et al. 2023), of scores (N,), given the sorted ones (n,) of normal images that no net saw. Over
    draws of images, P(p <= alpha) <= alpha. By hand: p_values([2.5], [1., 2., 3.]) = 2 / 4"""
    n = len(calibration)
    below = torch.searchsorted(calibration, scores * (1 - 1e-5))  # nearly equal is equal: rounding
    return (1 + n - below).double() / (n + 1)


def save_samples(path, task, teacher, student):
    """A picture of 8 normal test images (or training images, if there are none) and, after a gap, 8
    anomalies, taken evenly from all, by falling score; below, what each net makes of them."""
    x, y = task.x_test.cpu(), task.y_test
    if not len(x):
        x, y = task.x.cpu(), torch.zeros(len(task.x), dtype=torch.bool)
    some = [its[:: math.ceil(len(its) / 8) or 1] for its in (x[~y], x[y])]
    normal, anomalies = (its[score(student, its).argsort(descending=True)] for its in some)
    row = torch.cat([normal, x[:1], anomalies])  # x[:1]: where the gap will be
    tiles = torch.cat([row, teacher.g(row).x_hat, student.g(row).x_hat])
    tiles[len(normal) :: len(row)] = -1
    tiles = F.interpolate(tiles, scale_factor={32: 3, 64: 2}.get(x.shape[3], 1))  # to be seen
    torchvision.utils.save_image(tiles / 2 + 0.5, path, nrow=len(row))


def save(args, task, teacher, student, calibration, folder, result):
    """Write the student, the pictures and the result. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=folder) as new:  # files appear whole or not at all
        save_samples(Path(new, "samples.png"), task, teacher, student)
        saved = {"version": VERSION, "form": student.form, "calibration": calibration}
        torch.save(saved | {"weights": student.state_dict()}, Path(new, "student.pt"))
        student.requires_grad_(False)
        del student.d  # scoring takes the generator alone
        any_batch = {0: torch.export.Dim.AUTO}
        exported = torch.export.export(student, (task.x[:2].cpu(),), dynamic_shapes=(any_batch,))
        about = {"size": args.size, "alpha": args.alpha, "calibration": calibration.tolist()}
        extra = {"about.json": json.dumps(about)}  # what a verdict needs
        torch.export.save(exported, Path(new, "student.pt2"), extra_files=extra)
        Path(new, "result.json").write_text(json.dumps(result, indent=1))
        (folder / "result.json").unlink(missing_ok=True)  # the mark of a whole run: last to come
        for name in ("samples.png", "student.pt", "student.pt2", "result.json"):
            Path(new, name).replace(folder / name)
    print(f"\nin {folder}: result.json, samples.png, student.pt, student.pt2")
    print(f"to score images: python pkdgan.py --score '{folder}/student.pt' IMAGE_OR_FOLDER")


def load_gan(path):
    """(GAN, its calibration scores) of a student.pt, on the CPU. Raises OSError."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        gan, calibration = GAN(*saved["form"]), saved["calibration"]
        gan.load_state_dict(saved["weights"])
        numbers = torch.cat([calibration, *map(torch.flatten, gan.state_dict().values())])
        if damaged or saved["version"] != VERSION or not numbers.isfinite().all():
            raise ValueError("damaged, or of another version")
    except Exception as error:  # torch raises all sorts on what is foreign
        raise OSError(f"{path} is no whole student.pt ({error!r:.80})") from error
    return gan, calibration


def score_files(args):
    """Print a line for each image file, in folders too: path, score, p-value and verdict, "anomaly"
    if p <= args.alpha, "?" if too few were held out to tell. One that cannot be read is named on
    stderr; then, OSError at the end."""
    gan, calibration = load_gan(args.score[0])
    size, channels, *_ = gan.form
    few = 1 / (len(calibration) + 1) > args.alpha
    if few:
        note(f"no verdicts: --alpha {args.alpha} needs more than the {len(calibration)} held out")
    files, failed = [], False
    for path in map(Path, args.score[1:]):
        files += image_files(path) if path.is_dir() else [path]
    print("path\tscore\tp-value\tverdict")
    for file in files:
        try:
            x = read_image(file, size)[None] / 127.5 - 1
        except OSError as error:
            note(error)
            failed = True
            continue
        value = score(gan, x if channels == 3 else x.mean(1, keepdim=True))
        p = p_values(value, calibration).item()
        verdict = "?" if few else "anomaly" if p <= args.alpha else "-"
        name = repr(str(file))[1:-1]  # without tabs
        print(f"{name}\t{value.item():.4g}\t{p:.4g}\t{verdict}")
    if failed or not files:
        raise OSError(f"no images, or not all of these {len(files)} could be read")


# ------------------------------------------------------------------------------------- command line
def parse(argv=None):
    """Settings (a namespace) from a command line, sys.argv by default. Bad usage exits with 2."""
    about = f"Other defaults of data sets: {PER_DATASET}"
    quiet = {"usage": argparse.SUPPRESS, "allow_abbrev": False}
    parser = argparse.ArgumentParser("pkdgan.py", epilog=about, **quiet)
    parser.add_argument("--score", nargs="+", help="STUDENT.PT, then images and folders to score")
    parser.add_argument("--table", help="a folder of runs: print its results as Markdown tables")
    rows = rows_of(PROGRAM + METHOD)
    for name, default, span, text in rows:
        kind, words = type(default), span.split("|")
        options = {"type": kind, "choices": [*map(kind, words)] if words[1:] else None}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=default, help=f"{text} ({default})", **options)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([*PER_DATASET[parser.parse_args(argv).dataset].split(), *argv])
    for name, _, span, _ in rows:
        low, dots, high = span.partition("..")
        if dots and not float(low) <= getattr(args, name) < float(high or "inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not in {span}")
    args.data = str(Path(args.data).resolve())  # one folder has one name
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def note(message):
    """A line on stderr."""
    print(f"pkdgan.py: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv=None):
    """The command-line program; returns its exit code: 0, 1 failure, 2 bad value, 130 Ctrl-C."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any file name; at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
    warnings.simplefilter("default" if sys.flags.dev_mode else "ignore")  # of libraries
    # more threads are hardly faster on nets this small, and wait for one another on a busy machine
    if "OMP_NUM_THREADS" not in os.environ:
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
