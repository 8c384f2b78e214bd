# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "scikit-learn>=1.5"]
# ///
"""P-KDGAN: one-class novelty detection by a tiny GAN that learned from a wide one.

    python pkdgan.py                                                # scikit-learn's digits
    python pkdgan.py --dataset cifar10 --normal 3                   # the paper's experiment
    python pkdgan.py --dataset folder --data parts --normal good    # your own images
    python pkdgan.py --score runs/parts-good-seed0/student.pt new   # how anomalous are these?

Zhang, Chen, Sun: "P-KDGAN: Progressive Knowledge Distillation with GANs for One-class Novelty
Detection", IJCAI 2020 (arXiv 2007.06963). Its full text was not at hand: [paper] marks what its
abstract, its follow-up's (arXiv 2109.07295) and public listings say, [ours] what was decided here.
What comes from elsewhere is cited. README.md lists it all, with figures.

A wide teacher (suffix _t) and a narrow student (_s), two GANs of one architecture, see images of
one normal class only:

    x --encoder--> z --decoder--> x_hat --second encoder--> z_hat      and a discriminator D

They learn to reconstruct normal images and their codes. An anomaly's two codes disagree:
||z - z_hat||_2 is the anomaly score [paper], here whitened by what normal images have [ours].
Four stages; generators learn by L_G (gan_losses) or L_KD (distillation_losses):

    teacher         train_gan: L_G, for epochs; D tells x (real) from x_hat (fake)
    student alone   train_gan: the same, for epochs1 + epochs2: the baseline
    step 1          distill: a fresh student, L_KD, for epochs1; D tells x_hat_t (real) from x_hat_s
                    (fake); the teacher is frozen
    step 2          distill, joint, for epochs2: the student goes on by L_KD + L_G and both tasks
                    of D; the teacher goes on as in its own stage, at a much lower rate
"""

import argparse
import copy
import json
import math
import os
import sys
import tempfile
import time
import timeit
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from sklearn import covariance, datasets, decomposition, metrics, model_selection
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on CUDA, too
VERSION = 5  # of the method and the files: raised when a change makes earlier results incomparable

# ----------------------------------------------------------------------------------------- settings
SETTINGS = {  # each is a flag; where PER_DATASET has a value, that is the default
    "dataset": "digits",  # digits, mnist, fmnist, cifar10 or folder
    "normal": "0",  # the normal class, by index or name
    "data": "data",  # where data sets are or go to; for folder, what has train/ and test/
    "out": "runs",  # where each run makes a folder for its results
    "seed": 0,  # random seed of weights and batch order; the split is fixed
    "device": "cuda" if torch.cuda.is_available() else "cpu",  # or cuda:1, mps
    "val": False,  # evaluate on held-out training images instead of the test split
    "teacher": "",  # a teacher.pt of the same task and --holdout, or its --out; "": train one
    "curve": False,  # evaluate after every epoch, too (counted in the images per second)
    "whiten": True,  # student.pt scores by the whitened z - z_hat; --no-whiten: the plain [paper]
    "holdout": 0.0,  # share of the normal training images to hold out for p-values
    "alpha": 0.05,  # share of false alarms that --score accepts
    "ablation": False,  # also the single-step rival: joint from random weights, at full rates
    "size": 32,  # images become size x size, a power of two; all are held in memory
    "teacher_width": 128,  # channels of the teacher's first block
    "student_width": 0,  # of the student's; 0: a twelfth of the teacher's, 80 times cheaper or more
    "z_dim": 256,  # numbers in a code z or z_hat, teacher and student alike
    "batch": 64,  # images per update
    "epochs": 8,  # of the teacher; 16 gained nothing on CIFAR-10
    "epochs1": 20,  # of step 1; after 8, CIFAR-10 students were a point worse whitened, not plain
    "epochs2": 4,  # of step 2; the student alone gets epochs1 + epochs2
    "epoch_images": 1,  # small sets are repeated within an epoch, up to this many images
    "lr_teacher": 0.032,  # the teacher's learning rate * teacher_width: 2.5e-4 at 128, 1e-3 at 32
    "lr_student": 2e-3,  # the student's learning rate
    "lr_step2": 0.5,  # share of lr_student in step 2; 0.2 was as good
    "lr_step2_teacher": 0.01,  # share of the teacher's rate in step 2; higher, its AUROC falls
    "w_adv": 1.0,  # weight of a GAN's adversarial loss
    "w_con": 1.0,  # weight of a GAN's contextual loss
    "w_lat": 1.0,  # weight of a GAN's latent loss
    "kd_inter": 100.0,  # weight of the intermediate distillation loss; 10 did as well
    "kd_latent": 100.0,  # weight of the latent distillation loss
    "kd_adv": 10.0,  # weight of the adversarial distillation loss; at 100 it outweighs the others
}
PER_DATASET = {  # FLOPs ratios at least the paper's: CIFAR-10 24.45, MNIST 311.11, Fashion 700
    "digits": {"epochs": 20, "epochs1": 40, "epochs2": 10, "lr_student": 5e-3, "batch": 16}
    | {"normal": "8", "teacher_width": 32, "student_width": 4, "w_con": 10.0},
    "mnist": {"student_width": 5, "lr_student": 5e-3, "w_con": 10.0},
    "fmnist": {"student_width": 3, "epochs1": 8, "epochs2": 2},
    "cifar10": {"student_width": 16},
    "folder": {"holdout": 0.1, "epoch_images": 4000},
}


def parse(argv=None):
    """Settings (a namespace) from a command line, sys.argv by default. Bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        "pkdgan.py", argparse.SUPPRESS, "What the flags mean: SETTINGS, at the top of pkdgan.py."
    )
    parser.add_argument("--score", nargs="+", help="STUDENT.PT, then images and folders to score")
    choices = {"dataset": PER_DATASET, "size": (16, 32, 64, 128, 256, 512)}
    for name, default in SETTINGS.items():
        options = {"type": type(default), "choices": choices.get(name)}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **options)
    parser.set_defaults(**PER_DATASET[parser.parse_args(argv).dataset])
    args = parser.parse_args(argv)
    args.student_width = args.student_width or max(1, args.teacher_width // 12)
    return args


# ----------------------------------------------------------------------------------------- networks
# nn.GroupNorm(c, c) normalises each channel of each image by itself: instance normalisation
# (Ulyanov et al. 2016) [ours]. The authors had their best results at batch size 1 (arXiv
# 2109.07295), where batch normalisation in training would compute just this. There are no running
# statistics: training mode is evaluation mode, and no score depends on a batch.


class Blocks(nn.Sequential):
    """A chain of blocks, the last of them its head; it returns their outputs, too."""

    def forward(self, h):
        """-> the head's output in float32, [the output of each block before it]."""
        hidden = []
        for block in self:
            h = block(h)
            hidden.append(h)
        return h.float(), hidden[:-1]


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
    2x2 convolution to four sub-pixels (Shi et al. 2016), the border cropped: 3 to 7 times faster
    on a CPU; and at the image nn.ConvTranspose2d's initial weights saturate wide nets."""
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


class Generated(NamedTuple):
    """What a generator makes of a batch: all that losses, distillation and score need."""

    z: torch.Tensor  # (B, z_dim), of norm sqrt(z_dim)
    x_hat: torch.Tensor  # (B, C, size, size) in [-1, 1]
    z_hat: torch.Tensor  # (B, z_dim), of norm sqrt(z_dim)
    q: torch.Tensor  # (B, all blocks' h * w), of first encoder and decoder, if asked for: to distil


class Generator(nn.Module):
    """Encoder-decoder-encoder x -> z -> x_hat -> z_hat [paper], as in GANomaly (Akcay et al. 2018).
    Codes lie on a sphere [ours]: else the latent loss falls when both codes merely shrink."""

    def __init__(self, *form):
        super().__init__()
        self.radius = form[-1] ** 0.5  # form: size, channels, width, z_dim
        self.encode = encoder(*form)
        self.decode = decoder(*form)
        self.encode_again = encoder(*form)

    def forward(self, x, maps=False):
        """(B, C, size, size) -> Generated, with attention_maps() if asked for."""
        z, hidden_encoder = self.encode(x)
        z = self.radius * F.normalize(z)
        x_hat, hidden_decoder = self.decode(z[..., None, None])
        x_hat = x_hat.tanh()
        z_hat = self.radius * F.normalize(self.encode_again(x_hat)[0])
        q = attention_maps(hidden_encoder + hidden_decoder) if maps else None
        return Generated(z, x_hat, z_hat, q)


class GAN(nn.Module):
    """A generator g, a discriminator d and the score. Only widths tell teacher from student."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.form = size, channels, width, z_dim  # GAN(*gan.form) is another one like gan
        self.g = Generator(*self.form)
        self.d = encoder(size, channels, width, 1)  # to the logit, high for real
        self.register_buffer("mean", torch.zeros(z_dim))  # these two leave the score plain,
        self.register_buffer("white", torch.eye(z_dim))  # until save() puts whitening() here

    def residual(self, x):
        """r = z - z_hat (B, z_dim) of images x (B, C, size, size) in [-1, 1]."""
        out = self.g(x)
        return out.z - out.z_hat

    def forward(self, x):
        """Anomaly scores (B,), high is anomalous: ||z - z_hat||_2 [paper], or whitened [ours],
        sqrt((r - m)' S^-1 (r - m)) with mean m and covariance S of normal images' r."""
        return ((self.residual(x) - self.mean) @ self.white).norm(dim=1)


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


def attention_maps(hidden):
    """Q (B, all blocks' height * width) = A / ||A||_2 of each block, side by side and divided by
    sqrt(blocks), A = mean over channels of h^2 (Zagoruyko and Komodakis 2017): where a block's
    output h (B, channels, height, width) responds.
    By hand, one block of two 1 x 2 channels [1, 2] and [1, 0]: A = [1, 2], Q = [1, 2] / sqrt(5)"""
    maps = [F.normalize(h.float().square().mean(1).flatten(1)) for h in hidden]
    return torch.cat(maps, 1) / len(maps) ** 0.5


def intermediate_distillation_loss(q_t, q_s, x_hat_t, x_hat_s):
    """L_inter = E over images of ||Q_t - Q_s||_2^2 [ours] + E[|x_hat_t - x_hat_s|] [paper]. The
    first is a mean over blocks.
    By hand, with one block, Q_t = [1, 0], Q_s = [0, 1], x_hat_t = [1.], x_hat_s = [0.5]: 2.5"""
    return (q_s - q_t.detach()).square().sum(1).mean() + F.l1_loss(x_hat_s, x_hat_t.detach())


def latent_distillation_loss(z_t, z_s, z_hat_t, z_hat_s):
    """L_latent = E[(z_t - z_s)^2] + E[(z_hat_t - z_hat_s)^2]: the student's codes are the
    teacher's [paper]. By hand: latent_distillation_loss([1.], [0.], [1.], [3.]) = 1 + 4 = 5"""
    return F.mse_loss(z_s, z_t.detach()) + F.mse_loss(z_hat_s, z_hat_t.detach())


def adversarial_distillation_loss(f_t, f_s):
    """L_adv_kd = E[(f(x_hat_t) - f(x_hat_s))^2], f of the student's D, which tells x_hat_t from
    x_hat_s [ours]. By hand: adversarial_distillation_loss([1., 2.], [0., 2.]) = 0.5"""
    return F.mse_loss(f_s, f_t.detach())


# ----------------------------------------------------------------------------------------- training
def train_gan(gan, x, args, *, lr, **how):
    """Train a GAN by itself on images x (N, C, size, size). how: epochs, stage and watch of fit().
    Raises as fit()."""

    def losses(i):
        """Indices of images (B,) -> scalars L_D and L_G, see gan_losses()."""
        return gan_losses(gan, x[i], gan.g(x[i]), args)

    fit({gan: lr}, losses, x, args, **how)


def distill(teacher, student, x, args, *, joint, share=1.0, share_t=1.0, **how):
    """Train a student from a teacher on images x (N, C, size, size). Step 1: the teacher is frozen,
    the student learns from distillation losses alone. Step 2, joint: the student adds its own GAN
    losses; the teacher trains on by its own. share, share_t: of the student's and the teacher's
    learning rates in args. how: epochs, stage and watch of fit(). Raises as fit()."""
    teacher.requires_grad_(joint)  # frozen in step 1: no gradient reaches it
    rates = {student: share * args.lr_student}
    if joint:
        rates[teacher] = share_t * args.lr_teacher / args.teacher_width
    else:  # what a frozen teacher makes of an image is the same in every epoch
        parts = [teacher.g(part, maps=True) for part in x.split(128)]
        made_t = list(map(torch.cat, zip(*parts)))  # the fields of Generated, of all images

    def losses(i):
        """Indices of images (B,) -> scalars for all D's and all G's."""
        out_s = student.g(x[i], maps=True)
        out_t = teacher.g(x[i], maps=True) if joint else Generated(*(field[i] for field in made_t))
        terms = [distillation_losses(student, out_t, out_s, args)]
        if joint:
            terms.append(gan_losses(student, x[i], out_s, args))
            terms.append(gan_losses(teacher, x[i], out_t, args))
        return map(sum, zip(*terms))  # over the terms: what is for D, what is for G

    fit(rates, losses, x, args, **how)


def gan_losses(gan, x, out, args):
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
    return loss_d, args.w_adv * adv + args.w_con * con + args.w_lat * lat


def distillation_losses(student, out_t, out_s, args):
    """The losses (for D, for G) of a student, given what both generators made of an x."""
    logit_t, hidden_t = student.d(out_t.x_hat.detach())
    logit_s, hidden_s = student.d(out_s.x_hat)

    # ---- D of the student: minimise kd_adv L_D; x_hat_t is real, x_hat_s is fake (in step 1, where
    # ---- it is the only loss of D, Adam cancels the weight)
    loss_d = args.kd_adv * discriminator_loss(logit_t, logit_s)

    # ---- G of the student: minimise L_KD = kd_inter L_inter + kd_latent L_latent + kd_adv L_adv_kd
    inter = intermediate_distillation_loss(out_t.q, out_s.q, out_t.x_hat, out_s.x_hat)
    latent = latent_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
    adv_kd = adversarial_distillation_loss(hidden_t[-1], hidden_s[-1])
    return loss_d, args.kd_inter * inter + args.kd_latent * latent + args.kd_adv * adv_kd


def fit(rates, losses, x, args, epochs, stage, watch):
    """Train the GANs of rates, {GAN: highest learning rate}, on images x (N, C, size, size) by
    losses(indices of images (B,)) -> (loss for their discriminators, loss for their generators).
    The rates rise, then fall as a cosine to zero (Smith and Topin 2018) [ours]. The order of the
    images comes from seed and epoch alone. After each epoch calls watch(stage, first GAN, images
    per second). Raises FloatingPointError if a loss is not finite."""
    n = len(x) * max(1, args.epoch_images // len(x))  # a small set is shown several times an epoch
    updates = max(1, epochs * math.ceil(n / args.batch))
    # the weights of all discriminators, gan.d, and of all generators, gan.g
    d, g = ([p for gan in rates for p in getattr(gan, net).parameters()] for net in "dg")
    opt = torch.optim.Adam(
        [{"params": gan.parameters()} for gan in rates], betas=(0.5, 0.999), fused=True
    )  # betas: DCGAN's
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, list(rates.values()), updates, pct_start=0.15, cycle_momentum=False
    )  # pct_start: at 0.1 torch divides by 0 where there are 10 updates
    # convolutions in bfloat16 where native; weights are cast anew at each use (no cache), so that
    # their gradients are summed in float32
    kind = x.device.type
    amp = torch.autocast(kind, torch.bfloat16, native_bf16(kind), cache_enabled=False)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)
        log = []
        for index in torch.randperm(n).to(x.device).split(args.batch):
            with amp:
                loss_d, loss_g = losses(index % len(x))
            # D's descend loss_d, G's loss_g, no other net moves. Both gradients are taken before
            # either moves (as GANomaly's are), so L_D and L_adv share D(x_hat).
            opt.zero_grad()
            loss_d.backward(inputs=d, retain_graph=True)
            loss_g.backward(inputs=g)
            opt.step()
            schedule.step()
            log.append(torch.stack([loss_d, loss_g]).detach())
        loss_d, loss_g = torch.stack(log).mean(0).tolist()  # only now: reading waits for the device
        if not math.isfinite(loss_d + loss_g):
            raise FloatingPointError(f"{stage} {epoch}/{epochs}: overflow; lower rates (--lr-*)")
        seconds = (time.perf_counter() - start) / epoch
        print(
            f"{stage} {epoch}/{epochs}: loss_D {loss_d:.3f} loss_G {loss_g:.3f} | "
            f"{n / seconds:.0f} images/s, {seconds * (epochs - epoch):.0f} s left"
        )
        watch(stage, next(iter(rates)), n / seconds)


def native_bf16(kind):
    """Whether a kind of device, "cpu" or "cuda", has bfloat16 in hardware."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # dict: an older torch does not tell
    return kind == "cpu" and any(has for name, has in flags.items() if "bf16" in name)


# --------------------------------------------------------------------------------------- evaluation
@torch.inference_mode()
def in_parts(f, x):
    """f(x), computed part by part, of images x (N, C, size, size) in [-1, 1]."""
    return torch.cat([f(part) for part in x.split(128)])  # 128 stay in a CPU's cache


def score(gan, x):
    """Anomaly scores (N,) of images x (N, C, size, size) in [-1, 1], each image by itself."""
    return in_parts(gan, x)


def whitening(gan, x):
    """(m (z_dim,), W (z_dim, z_dim)) of the residuals r of training images x: their mean, and a
    root of their inverse covariance, W W' = S^-1. S is shrunk (Ledoit and Wolf 2004)."""
    r = in_parts(gan.residual, x)
    model = covariance.LedoitWolf().fit(r.cpu().double())
    white = torch.linalg.cholesky(torch.tensor(model.precision_))
    return torch.tensor(model.location_).to(r), white.to(r).contiguous()


def p_values(scores, calibration):
    """p = (1 + number of calibration scores >= score) / (n + 1), conformal (Vovk et al. 2005, Bates
    et al. 2023), of scores (N,), given the sorted ones (n,) of normal images that no net saw. Over
    draws of images, P(p <= alpha) <= alpha. By hand: p_values([2.5], [1., 2., 3.]) = 2 / 4"""
    n = len(calibration)
    below = torch.searchsorted(calibration, scores * (1 - 1e-5))  # nearly equal is equal: rounding
    return (1 + n - below).double() / (n + 1)


def auroc(gan, x, x_test, y_test):
    """AUROC in percent, anomaly = 1, of a GAN's plain and its whitened scores. x are its training
    images. Raises ValueError if a score is NaN."""
    mean, white = whitening(gan, x)
    r = in_parts(gan.residual, x_test)
    scores = r.norm(dim=1), ((r - mean) @ white).norm(dim=1)
    return [100 * metrics.roc_auc_score(y_test, values.cpu()) for values in scores]


def pca_auroc(x, x_test, y_test):
    """AUROC in percent of PCA's reconstruction error (90 % of the variance, at 32 x 32)."""
    x, x_test = (F.adaptive_avg_pool2d(t, 32).flatten(1).cpu().numpy() for t in (x, x_test))
    pca = decomposition.PCA(0.9, svd_solver="covariance_eigh").fit(x)  # fast on many images
    errors = x_test - pca.inverse_transform(pca.transform(x_test))
    return 100 * metrics.roc_auc_score(y_test, (errors**2).sum(1))


def cost(gan, x):
    """What a GAN costs: params and flops (of one image) of generator and discriminator. The
    generator is all that scoring takes: MB of weights, and microseconds per image on the device of
    x (N, C, size, size), alone (us_1) and of 256 in parts (us_256). And l1 = E[|x - x_hat|]."""
    with FlopCounterMode(display=False) as counter:
        gan.d(gan.g(x[:1]).x_hat)
    params, params_g = (sum(map(torch.numel, net.parameters())) for net in (gan, gan.g))
    found = {"params": params, "flops": counter.get_total_flops(), "MB": 4e-6 * params_g}
    for n in (1, 256):
        some = x[torch.arange(n) % len(x)]
        seconds = timeit.repeat(lambda: score(gan, some).cpu(), number=1, repeat=11)
        found[f"us_{n}"] = 1e6 / n * min(seconds)  # the least disturbed
    return found | {"l1": contextual_loss(x, in_parts(lambda part: gan.g(part).x_hat, x)).item()}


# --------------------------------------------------------------------------------------------- data
def read_image(path, size):
    """An image file, turned upright by its EXIF flag, as uint8 (3, size, size). Raises OSError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # grey beyond 8 bits, which Pillow would clip to 255
                raise ValueError("it has more than 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise all sorts on broken bytes
        raise OSError(f"{path} cannot be used as an image ({error}): mend or remove it") from error
    return TF.resize(TF.pil_to_tensor(image), [size, size])


def load_folder(root, size):
    """load_images() of root/train/<class>/* and root/test/<class>/*, MVTec AD's layout."""
    train, test = (
        torchvision.datasets.ImageFolder(root / split, loader=lambda path: read_image(path, size))
        for split in ("train", "test")
    )
    x, x_test = (torch.stack([image for image, _ in split]) for split in (train, test))
    c_test = [train.class_to_idx.get(test.classes[k], -1) for k in test.targets]  # -1: not in train
    return x, torch.tensor(train.targets), x_test, torch.tensor(c_test), train.classes


def load_images(dataset, root, size):
    """All of a data set: (x, c, x_test, c_test, classes). x, x_test: (N, C, size, size), 0 to 255,
    with C = 3 for CIFAR-10 and folders, else 1; c, c_test: int64 (N,), indices into `classes`, a
    list, -1 for a class that is in test only. Raises OSError for what cannot be used."""
    if dataset == "folder":
        return load_folder(root, size)
    classes = list("0123456789")
    if dataset == "digits":  # scikit-learn's, 8 x 8, come without a split: a fixed one
        digits = datasets.load_digits()
        x, c = (digits.images * 15.9375).astype("uint8"), digits.target  # 0..16 -> 0..255
        parts = model_selection.train_test_split(x, c, test_size=1 / 3, stratify=c, random_state=0)
    else:
        name = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10"}[dataset]
        source = getattr(torchvision.datasets, name)
        try:
            train, test = source(root, download=True), source(root, train=False)
        except Exception as error:  # no network, a missing file, broken bytes
            raise OSError(f"{name} in {root}: {error}; delete it, run again online") from error
        parts = train.data, test.data, train.targets, test.targets
        if dataset != "mnist":
            classes = train.classes
    x, x_test, c, c_test = map(torch.as_tensor, parts)  # x: (N, h, w), or (N, h, w, 3)
    x, x_test = (t.reshape(*t.shape[:3], -1).permute(0, 3, 1, 2) for t in (x, x_test))
    return TF.resize(x, size), c, TF.resize(x_test, size), c_test, classes


def load_task(args, device):
    """The task that the settings name: (x, x_test, y_test, name of the normal class): its images in
    the training split and the whole test split, float32 in [-1, 1] on the device; y_test (N,) is
    true for an anomaly. With args.val, a fixed tenth of the training split is the test split.
    Raises ValueError for an unknown class, OSError for unusable data."""
    x, c, x_test, c_test, classes = load_images(args.dataset, Path(args.data), args.size)
    names = classes + [str(i) for i in range(len(classes))]
    if args.normal not in names:
        raise ValueError(f"--normal {args.normal}: the classes are {', '.join(classes)}")
    normal = names.index(args.normal) % len(classes)  # by name or index
    if args.val:
        x, x_test, c, c_test = model_selection.train_test_split(x, c, test_size=0.1, random_state=0)
    y_test = c_test != normal
    if len(y_test.unique()) < 2:
        raise ValueError(f"--normal {args.normal}: no AUROC without normal images and anomalies")
    x, x_test = ((images.float() / 127.5 - 1).to(device) for images in (x[c == normal], x_test))
    return x, x_test, y_test, classes[normal]


# ---------------------------------------------------------------------------------------------- run
def run(args):
    """Train, evaluate, save. Returns what result.json has; raises as load_task, load_gan, fit."""
    began = time.perf_counter()
    x, x_test, y_test, name = load_task(args, args.device)
    folder = make_folder(args, name)
    x_held = x[:0]
    if args.holdout:
        x, x_held = model_selection.train_test_split(x, test_size=args.holdout, random_state=0)
    print(f"{folder.name}: {len(x)} images, held out {len(x_held)}, on {args.device}")

    def fresh(width):
        """A GAN whose initial weights depend on its form and the seed alone."""
        torch.manual_seed(args.seed)
        return GAN(args.size, x.shape[1], width, args.z_dim).to(args.device)

    plain, whitened, curve, speed = {}, {}, {}, {}

    def evaluate(stage, gan):
        """Note a GAN's AUROCs after a stage or an epoch of it."""
        plain[stage], whitened[stage] = auroc(gan, x, x_test, y_test)

    def watch(stage, gan, images_per_second):
        """Note the mean speed so far and, with --curve, the AUROCs."""
        speed[stage] = images_per_second
        if args.curve:
            evaluate(stage, gan)
            curve.setdefault(stage, []).append([plain[stage], whitened[stage]])

    teacher, student = fresh(args.teacher_width), fresh(args.student_width)
    alone = fresh(args.student_width)
    epochs_both = args.epochs1 + args.epochs2
    common = {"x": x, "args": args, "watch": watch}
    if args.teacher:
        path = Path(args.teacher)
        trained, _ = load_gan(path / folder.name / "teacher.pt" if path.is_dir() else path)
        teacher.load_state_dict(trained.state_dict() | dict(teacher.named_buffers()))  # unwhitened
    else:
        lr = args.lr_teacher / args.teacher_width
        train_gan(teacher, epochs=args.epochs, lr=lr, stage="teacher", **common)
    evaluate("teacher", teacher)
    train_gan(alone, epochs=epochs_both, lr=args.lr_student, stage="student_alone", **common)
    evaluate("student_alone", alone)
    distill(teacher, student, epochs=args.epochs1, joint=False, stage="step1", **common)
    evaluate("step1", student)
    teacher2 = copy.deepcopy(teacher)  # step 2 trains it on; teacher.pt can start other runs
    shares = {"share": args.lr_step2, "share_t": args.lr_step2_teacher}
    distill(teacher2, student, epochs=args.epochs2, joint=True, stage="step2", **shares, **common)
    evaluate("step2", student)
    evaluate("teacher_step2", teacher2)
    if args.ablation:
        rival_t, rival_s = fresh(args.teacher_width), fresh(args.student_width)
        distill(rival_t, rival_s, epochs=epochs_both, joint=True, stage="joint_only", **common)
        evaluate("joint_only", rival_s)
    result = {"normal": name, "auroc": plain, "auroc_whitened": whitened, "curve": curve}
    result |= {"images_per_second": speed, "seconds": time.perf_counter() - began}
    result |= describe(args, teacher, student, x, x_test, y_test)
    print_tables(result)
    save(folder, result, teacher, student, x, x_held.cpu(), x_test.cpu(), y_test)
    print(f"RESULT {json.dumps(result)}")
    return result


def make_folder(args, name):
    """The folder for the results of a task, given its normal class's name. Raises OSError."""
    dataset = Path(args.data).resolve().name if args.dataset == "folder" else args.dataset
    folder = Path(
        args.out, f"{dataset}-{name}-seed{args.seed}{'-val' * args.val}".replace("/", "-")
    )
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # rather fail now than after the training
    return folder


def describe(args, teacher, student, x, x_test, y_test):
    """What a result says beside AUROCs: cost() on the normal test images, baselines, origin."""
    normal = x_test[~y_test]
    of_t, of_s = cost(teacher, normal), cost(student, normal)
    found = {key: {"teacher": of_t[key], "student": of_s[key]} for key in of_t}
    median = x.median(0).values.expand_as(normal)
    found["l1"]["median_image"] = contextual_loss(normal, median).item()
    return found | {
        "ratio": of_t["flops"] / of_s["flops"],
        "baselines": {"pca": pca_auroc(x, x_test, y_test)},
        "images": {"train": len(x), "test": len(x_test), "normal": len(normal)},
        "dataset": args.dataset,
        "seed": args.seed,
        "settings": vars(args),
        "split": "validation" if args.val else "test",
        "version": VERSION,
        "versions": {"torch": torch.__version__},
        "device": f"{args.device}, {torch.get_num_threads()} threads",
        "bf16": native_bf16(x.device.type),
    }


def print_tables(result):
    """AUROC of each stage and what it is above the student alone; then what the nets cost."""
    plain, whitened = result["auroc"], result["auroc_whitened"]
    print("\nAUROC in %          plain    gain    whitened    gain")
    for stage in plain:
        row = f"{stage.replace('_', ' '):13}"
        for values in plain, whitened:
            row += f"{values[stage]:12.2f}{values[stage] - values['student_alone']:+8.2f}"
        print(row)
    print(f"PCA{result['baselines']['pca']:22.2f}")
    print("\ncost                   teacher     student   ratio")
    for key in ("params", "flops", "us_1", "us_256"):  # as cost() explains them
        teacher, student = result[key].values()
        print(f"{key:18}{teacher:12,.0f}{student:12,.0f}{teacher / student:8.1f}")


def save(folder, result, teacher, student, x, x_held, x_test, y_test):
    """Write the nets, with the whitening of training images x, the pictures and the result. The
    last use of the nets: leaves them on the CPU, the student without D. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=folder) as new:  # files appear whole or not at all
        new = Path(new)
        (new / "result.json").write_text(json.dumps(result, indent=1))
        for name, gan in ("teacher.pt", teacher), ("student.pt", student):
            if result["settings"]["whiten"]:
                gan.mean, gan.white = whitening(gan, x)
            gan.cpu()
            scores = torch.cat([score(gan, image) for image in x_held.split(1)])  # as --score
            content = {"version": VERSION, "form": gan.form, "weights": gan.state_dict()}
            torch.save(content | {"calibration": scores.sort().values}, new / name)
        some = torch.cat([x_test[~y_test][:8], x_test[y_test][:8]])
        rows = torch.cat([some, teacher.g(some).x_hat, student.g(some).x_hat])
        torchvision.utils.save_image(rows / 2 + 0.5, new / "samples.png", nrow=16)
        for file in sorted(new.iterdir(), reverse=True):  # result.json last
            file.replace(folder / file.name)
        # the export is last: if this torch fails at it, the rest is there (and an old student.pt2)
        student.requires_grad_(False)
        del student.d  # scoring takes the generator alone
        any_batch = {0: torch.export.Dim.AUTO}
        exported = torch.export.export(student, (x_test[:2].clone(),), dynamic_shapes=(any_batch,))
        torch.export.save(exported, new / "student.pt2")
        (new / "student.pt2").replace(folder / "student.pt2")
    print(f"\nin {folder}: result.json, samples.png, teacher.pt, student.pt, student.pt2")
    print(f"to score images: python pkdgan.py --score '{folder}/student.pt' IMAGE_OR_FOLDER")


# -------------------------------------------------------------------------- using a trained student
def load_gan(path):
    """(GAN, calibration scores) of a student.pt or teacher.pt, on the CPU. Raises OSError."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
        saved = torch.load(path, map_location="cpu", weights_only=True)
        gan, calibration = GAN(*saved["form"]), saved["calibration"]
        gan.load_state_dict(saved["weights"])
        numbers = torch.cat([calibration, *map(torch.flatten, gan.state_dict().values())])
        if damaged or saved["version"] != VERSION or not numbers.isfinite().all():
            raise ValueError("damaged, or of another version")
    except Exception as error:  # torch raises all sorts on what is foreign
        raise OSError(f"{path} is no whole student.pt or teacher.pt ({error!r:.80})") from error
    return gan, calibration


def score_files(args):
    """Print a line for each image file, in folders too: path, score, p-value, and "anomaly" if
    p <= args.alpha. One that cannot be read is named on stderr; then, OSError at the end."""
    gan, calibration = load_gan(args.score[0])
    size, channels, *_ = gan.to(args.device).form
    if channels == 1:
        note("this student sees in grey: colour is dropped")
    note(f"{len(calibration)} images held out (--holdout): p >= 1 / {len(calibration) + 1}")
    files = []
    for path in map(Path, args.score[1:]):
        inside = (f for f in path.rglob("*") if torchvision.datasets.folder.is_image_file(f.name))
        files += sorted(inside) if path.is_dir() else [path]
    failed = not files
    print("path\tscore\tp-value\tverdict")
    for file in files:
        try:
            x = read_image(file, size)[None].float()
        except OSError as error:
            note(error)
            failed = True
            continue
        if channels == 1:
            x = x.mean(1, keepdim=True)
        value = score(gan, (x / 127.5 - 1).to(args.device)).cpu()
        p = p_values(value, calibration).item()
        line = f"{repr(str(file))[1:-1]}\t{value.item():.5g}\t{p:.4g}"  # no tabs in the name
        print(f"{line}\t{'anomaly' if p <= args.alpha else '-'}")
    if failed:
        raise OSError(f"no images, or not all of these {len(files)} could be read")


def note(message):
    """A line on stderr."""
    print(f"pkdgan.py: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv=None):
    """The command-line program; returns its exit code: 0, 1 failure, 2 bad value, 130 Ctrl-C."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any file name; at once
    try:
        (score_files if args.score else run)(args)
    except BrokenPipeError:  # "| head" has seen enough: end quietly
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
