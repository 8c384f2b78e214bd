# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "scikit-learn"]
# ///
"""P-KDGAN: one-class novelty detection by a tiny GAN that learned from a wide one.

    python pkdgan.py                                                # scikit-learn's digits, nothing to download
    python pkdgan.py --dataset cifar10 --normal 3                   # the paper's experiment, one class
    python pkdgan.py --dataset folder --data parts --normal good    # your own images
    python pkdgan.py --score runs/parts-good-seed0/student.pt new   # how anomalous are the images in the folder new?

Zhang, Chen, Sun: "P-KDGAN: Progressive Knowledge Distillation with GANs for One-class Novelty Detection",
IJCAI 2020 (arXiv 2007.06963). A wide teacher (suffix _t) and a narrow student (_s), two GANs of the same
architecture, see images of one normal class only:

    x --encoder--> z --decoder--> x_hat --second encoder--> z_hat        and a discriminator D

They learn to reconstruct normal images and their codes. An anomaly's two codes disagree: ||z - z_hat||_2 is the
anomaly score. Four stages, each evaluated after its last epoch:

    teacher         the wide GAN by itself
    student alone   the narrow GAN by itself, the baseline
    step 1          a fresh student learns from the frozen teacher, and from nothing else
    step 2          both go on training, jointly, with their own GAN losses and the distillation losses

Choices are marked [paper], [ours] where it leaves them open, or cited. README.md lists them and has the figures.
"""
import argparse
import contextlib
import copy
import io
import json
import logging
import math
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import sklearn
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from sklearn import datasets, metrics, model_selection
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

# ------------------------------------------------------------------------------------------------ settings
SETTINGS = {  # name: (default, what it is). Each is a command-line flag, --teacher-width for teacher_width
    "dataset": ("digits", "digits, mnist, fmnist, cifar10 or folder"),
    "normal": ("0", "the normal class, by index or name"),
    "data": ("data", "where the data sets are or go to; for `folder`, the folder with train/ and test/"),
    "out": ("runs", "where each run makes a folder for its results"),
    "seed": (0, "of weights and batches, never of the split"),
    "device": ("auto", "cpu, cuda, cuda:1, mps, or auto for the fastest there is"),
    "val": (False, "evaluate on held-out training images instead of the test split, to choose settings"),
    "holdout": (0.0, "share of the normal training images that is not trained on, for the p-values of --score"),
    "ablation": (False, "also train both jointly from random weights, the single-step rival"),
    "size": (32, "images become size x size; a power of two from 16"),
    "teacher_width": (128, "channels of the teacher's first stage"),
    "student_width": (24, "channels of the student's first stage"),
    "z_dim": (100, "numbers in a code z or z_hat, teacher and student alike"),
    "batch": (64, "images per update"),
    "epochs": (8, "epochs of the teacher; 16 gained nothing on CIFAR-10"),
    "epochs1": (8, "epochs of step 1"),
    "epochs2": (4, "epochs of step 2; the student alone gets epochs1 + epochs2"),
    "lr_teacher": (1e-4, "the teacher's learning rate at width 128; in inverse proportion to the width"),
    "lr_student": (2e-3, "learning rate of the student"),
    "lr_step2": (0.2, "both learning rates in step 2, as a share of the above; 0.5 was worse for the student"),
    "w_adv": (1.0, "weight of a GAN's adversarial loss"),
    "w_con": (1.0, "weight of a GAN's contextual loss; 10 on digits and MNIST"),
    "w_lat": (1.0, "weight of a GAN's latent loss"),
    "kd_inter": (1.0, "weight of the intermediate distillation loss"),
    "kd_latent": (1.0, "weight of the latent distillation loss"),
    "kd_adv": (0.1, "weight of the adversarial distillation loss; at 1 it outweighs the others"),
    "flip": (True, "mirror training images left-right at random"),
}
PER_DATASET = {  # where one differs; widths reach the paper's ratios: CIFAR-10 24.45, MNIST 311.11, Fashion-MNIST 700
    "digits": dict(normal="8", teacher_width=32, student_width=4, batch=16, epochs=20, epochs1=20, epochs2=10,
                   lr_teacher=2.5e-4, w_con=10.0, flip=False),
    "mnist": dict(student_width=6, w_con=10.0, flip=False),
    "fmnist": dict(student_width=3), "cifar10": {}, "folder": dict(holdout=0.1),
}
VERSION = 1  # of the files student.pt and teacher.pt


class UsageError(ValueError):
    """The command line asks for what does not exist. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on: data missing or broken, or a loss not finite. Exit code 1."""


# ---------------------------------------------------------------------------------------------------- data
TORCHVISION = {  # name: (class, its files under --data)
    "mnist": (torchvision.datasets.MNIST, "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "fmnist": (torchvision.datasets.FashionMNIST, "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
}


def load_torchvision(dataset, root):
    """torchvision's (training, test) split of `dataset` under the Path root, downloaded if absent. Raises RunError."""
    cls, files = TORCHVISION[dataset]
    folder = files.split("/")[0]
    try:
        if not (root / folder).exists():
            print(f"downloading {dataset} to {root}", flush=True)
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as part:  # Ctrl-C leaves nothing half-written
                cls(part, download=True)
                with contextlib.suppress(OSError):  # another run was faster
                    Path(part, folder).replace(root / folder)
        return cls(root, train=True), cls(root, train=False)
    except Exception as error:  # torchvision raises all sorts: no network, a missing file, broken bytes
        raise RunError(f"{dataset}: {error}: put {root / files} there, or delete {root / folder} and run again online")


def read_image(path, size):
    """An image file as uint8 (3, size, size). Raises RunError with the path if it cannot be used."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip these to 255; colour it scales
                raise ValueError("it has more than 8 bits a channel")
            return TF.resize(TF.pil_to_tensor(image.convert("RGB")), [size, size])
    except Exception as error:  # decoders raise all sorts on broken bytes
        raise RunError(f"{path} cannot be used as an image ({error}): mend or remove it")


def load_images(dataset, root, size):
    """All of a data set: (x, c, x_test, c_test, classes). x, x_test: uint8 (N, channels, size, size), channels 1
    for grey and 3 for colour; c, c_test: int64 (N,), indices into `classes`, a list of names. Raises RunError."""
    if dataset == "folder":  # train/<class>/* and test/<class>/*, the layout of MVTec AD
        try:
            train, test = (torchvision.datasets.ImageFolder(Path(root, split)) for split in ("train", "test"))
        except OSError as error:
            raise RunError(f"{root} is not an image folder with train/<class>/* and test/<class>/*: {error}")
        classes = train.classes + [name for name in test.classes if name not in train.classes]
        x, x_test = (torch.stack([read_image(path, size) for path, _ in split.samples]) for split in (train, test))
        c, c_test = (torch.tensor([classes.index(split.classes[k]) for k in split.targets]) for split in (train, test))
        if (x == x[:, :1]).all():  # one channel if those in train are all grey
            x, x_test = x[:, :1], x_test.float().mean(1, keepdim=True).round().byte()
        return x, c, x_test, c_test, classes
    if dataset == "digits":  # scikit-learn's, 8 x 8, come without a split: a fixed one
        x, c = datasets.load_digits(return_X_y=True)
        x = (x.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")  # of grey levels 0 to 16
        x, x_test, c, c_test = model_selection.train_test_split(x, c, test_size=1 / 3, stratify=c, random_state=0)
    else:
        train, test = load_torchvision(dataset, Path(root))
        x, x_test, c, c_test = train.data, test.data, train.targets, test.targets
    classes = train.classes if dataset in ("fmnist", "cifar10") else list("0123456789")
    x, x_test, c, c_test = map(torch.as_tensor, (x, x_test, c, c_test))
    x, x_test = (TF.resize(t[:, None] if t.ndim == 3 else t.permute(0, 3, 1, 2), [size, size]) for t in (x, x_test))
    return x, c, x_test, c_test, classes


def one_class_split(x, c, x_test, c_test, normal, val=False):
    """The one-class task of class index `normal`: (x_train, x_test, y_test), its training images and the whole test
    split, y = 1 for an anomaly. With `val` a fixed tenth of the training split is held out and evaluated instead."""
    if val:
        held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) < len(x) // 10  # a tenth are True
        x, c, x_test, c_test = x[~held], c[~held], x[held], c[held]
    return x[c == normal], x_test, (c_test != normal).long()


def load_task(s, device):
    """The task that the settings name: (x_train, x_test, y_test, name of the normal class), images as float32 in
    [-1, 1] on the device. Raises UsageError for an unknown class, RunError for data that cannot be used."""
    x, c, x_test, c_test, classes = load_images(s.dataset, s.data, s.size)
    known = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    normal = known.get(s.normal, -1)
    if not (c == normal).any():
        have = ", ".join(f"{i} ({classes[i]})" for i in c.unique())
        raise UsageError(f"--normal {s.normal}: no such class in the training split; there are {have}")
    x, x_test, y_test = one_class_split(x, c, x_test, c_test, normal, s.val)
    if len(x) == 0 or y_test.unique().numel() < 2:
        raise RunError("no AUROC: training needs normal images, the "
                       f"{'validation' if s.val else 'test'} split those and anomalies")
    return *((t.float() / 127.5 - 1).to(device) for t in (x, x_test)), y_test, classes[normal]


# ------------------------------------------------------------------------------------------------ networks
# nn.GroupNorm(c, c) normalises each channel of each image by itself: instance normalisation (Ulyanov et al. 2016)
# [ours]. The authors had their best results at batch size 1 (arXiv 2109.07295), where batch normalisation in training
# would compute just this. There are no running statistics, and an image's score cannot depend on its batch.

def stage_widths(size, width):
    """Channels of the stages down to 4 x 4, doubling up to 8 times (DCGAN): stage_widths(32, 128) = [128, 256, 512]."""
    return [width * 2 ** min(i, 3) for i in range(int(math.log2(size)) - 2)]


class Encoder(nn.Module):
    """DCGAN's: convolutions of stride 2 down to 4 x 4, and a linear head."""
    def __init__(self, size, channels, width, n_out):
        super().__init__()
        widths = stage_widths(size, width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1, bias=i == 0),  # a norm cancels a bias
                          nn.GroupNorm(c_out, c_out) if i else nn.Identity(),  # DCGAN: none next to the image
                          nn.LeakyReLU(0.2, inplace=True))
            for i, (c_in, c_out) in enumerate(zip([channels] + widths, widths)))
        self.head = nn.Linear(widths[-1] * 4 * 4, n_out)

    def forward(self, x):
        """(B, C, size, size) -> (B, n_out) in float32, stages [(B, width, size/2, size/2), ... down to 4 x 4]."""
        stages = [x := stage(x) for stage in self.stages]
        return self.head(x.flatten(1)).float(), stages


class Upsample(nn.Conv2d):
    """(B, c_in, h, h) -> (B, c_out, 2h, 2h): DCGAN's transposed 4x4 convolution of stride 2, as a 2x2 convolution to
    four sub-pixels (Shi et al. 2016), each with a bias of its own if any. For few channels a CPU is 3 to 7 times faster
    so, and the initial weights suit c_in: nn.ConvTranspose2d's are of 1 / sqrt(16 c_out), which saturates wide nets."""
    def __init__(self, c_in, c_out, bias=False):
        super().__init__(c_in, 4 * c_out, 2, padding=1, bias=bias)

    def forward(self, x):
        """A pixel_shuffle of the (h + 1)^2 windows; its outermost rows and columns are beyond the image."""
        return F.pixel_shuffle(super().forward(x), 2)[..., 1:-1, 1:-1]


class Decoder(nn.Module):
    """DCGAN's: transposed convolutions of stride 2 up to the image."""
    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        widths = stage_widths(size, width)[::-1]
        self.stages = nn.ModuleList(
            nn.Sequential(Upsample(c_in, c_out) if i else nn.ConvTranspose2d(c_in, c_out, 4, bias=False),
                          nn.GroupNorm(c_out, c_out), nn.ReLU(inplace=True))
            for i, (c_in, c_out) in enumerate(zip([z_dim] + widths, widths)))
        self.head = Upsample(widths[-1], channels, bias=True)

    def forward(self, z):
        """(B, z_dim) -> image (B, C, size, size) in [-1, 1] in float32, stages [(B, c, 4, 4), ... up to size/2]."""
        h = z[:, :, None, None]
        stages = [h := stage(h) for stage in self.stages]
        return self.head(h).float().contiguous().tanh(), stages  # tanh of the crop as it lies is slow


class Generated(NamedTuple):
    """What a generator makes of a batch: all that the losses, the distillation and the score need."""
    z: torch.Tensor      # (B, z_dim), of norm sqrt(z_dim)
    x_hat: torch.Tensor  # (B, C, size, size) in [-1, 1]
    z_hat: torch.Tensor  # (B, z_dim), of norm sqrt(z_dim)
    stages: list         # the first encoder's and the decoder's, each (B, channels, h, h)

    def detach(self):
        """The same values, through which no gradient flows."""
        return Generated(self.z.detach(), self.x_hat.detach(), self.z_hat.detach(), [h.detach() for h in self.stages])


class Generator(nn.Module):
    """Encoder-decoder-encoder x -> z -> x_hat -> z_hat [paper], as in GANomaly (Akcay et al. 2018).
    Codes lie on the sphere of radius sqrt(z_dim) [ours]: without it the latent loss falls when both codes merely
    shrink, and a score depends on the norms of the codes as much as on their disagreement."""
    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        form, self.radius = (size, channels, width, z_dim), z_dim ** 0.5
        self.encode, self.decode, self.encode_again = Encoder(*form), Decoder(*form), Encoder(*form)

    def forward(self, x):
        """(B, C, size, size) -> Generated."""
        z, stages_down = self.encode(x)
        z = self.radius * F.normalize(z)
        x_hat, stages_up = self.decode(z)
        z_hat = self.radius * F.normalize(self.encode_again(x_hat)[0])
        return Generated(z, x_hat, z_hat, stages_down + stages_up)


class Discriminator(Encoder):
    """An encoder to one number, the logit, high for real. Its last stage is the features f."""
    def forward(self, x):
        """(B, C, size, size) -> logit (B,), features (B, channels, 4, 4), both in float32."""
        logit, stages = super().forward(x)
        return logit[:, 0], stages[-1].float()


class GAN(nn.Module):
    """A generator g and a discriminator d. Teacher and student differ in their width alone."""
    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.form = dict(size=size, channels=channels, width=width, z_dim=z_dim)  # GAN(**form) rebuilds it
        self.g, self.d = Generator(**self.form), Discriminator(size, channels, width, 1)


# -------------------------------------------------------------------------------------------------- losses
# E[] is the mean over images and elements, so that a weight means the same at any size.

def discriminator_loss(logit_real, logit_fake):
    """L_D = -1/2 E[log sigmoid(D(real))] - 1/2 E[log(1 - sigmoid(D(fake)))] of logits (B,) (Goodfellow et al. 2014).
    By hand: discriminator_loss([0.], [0.]) = -log(1/2) = 0.6931"""
    return (F.softplus(-logit_real).mean() + F.softplus(logit_fake).mean()) / 2


def adversarial_loss(f_x, f_x_hat):
    """L_adv = E[(f(x) - f(x_hat))^2], f are D's features: feature matching (Salimans et al. 2016).
    By hand: adversarial_loss([1., 2.], [1., 0.]) = (0 + 4) / 2 = 2"""
    return F.mse_loss(f_x_hat, f_x)


def contextual_loss(x, x_hat):
    """L_con = E[|x - x_hat|]: the reconstruction is the image.
    By hand: contextual_loss([1., -1.], [0., 1.]) = (1 + 2) / 2 = 1.5"""
    return F.l1_loss(x_hat, x)


def latent_loss(z, z_hat):
    """L_lat = E[(z - z_hat)^2]: the two codes of a normal image agree.
    By hand: latent_loss([1., 1.], [0., -1.]) = (1 + 4) / 2 = 2.5"""
    return F.mse_loss(z_hat, z)


def attention_map(stage):
    """Q = A / ||A||_2 (B, h * w), A = mean over channels of stage^2 (Zagoruyko and Komodakis 2017): where a stage
    (B, channels, h, w) responds. By hand, of two 1 x 2 channels [1, 2] and [1, 0]: A = [1, 2], Q = [1, 2] / sqrt(5)"""
    return F.normalize(stage.float().square().mean(1).flatten(1))


def intermediate_distillation_loss(stages_t, stages_s, x_hat_t, x_hat_s):
    """L_inter = mean over stages of E over images of ||Q_t - Q_s||_2^2 [ours] + E[|x_hat_t - x_hat_s|] [paper].
    By hand, with one stage, Q_t = [1, 0], Q_s = [0, 1], x_hat_t = [1.], x_hat_s = [0.5]: 2 + 0.5 = 2.5"""
    maps = zip(map(attention_map, stages_t), map(attention_map, stages_s), strict=True)
    return sum((q_t - q_s).square().sum(1).mean() for q_t, q_s in maps) / len(stages_t) + F.l1_loss(x_hat_s, x_hat_t)


def latent_distillation_loss(z_t, z_s, z_hat_t, z_hat_s):
    """L_latent = E[(z_t - z_s)^2] + E[(z_hat_t - z_hat_s)^2]: the student's codes are the teacher's [paper].
    By hand: latent_distillation_loss([1.], [0.], [1.], [3.]) = 1 + 4 = 5"""
    return F.mse_loss(z_s, z_t) + F.mse_loss(z_hat_s, z_hat_t)


def adversarial_distillation_loss(f_t, f_s):
    """L_adv_kd = E[(f(x_hat_t) - f(x_hat_s))^2], f of the student's D, which tells x_hat_t from x_hat_s [ours].
    By hand: adversarial_distillation_loss([1., 2.], [0., 2.]) = (1 + 0) / 2 = 0.5"""
    return F.mse_loss(f_s, f_t)


# ------------------------------------------------------------------------------------------------ training
@lru_cache
def native_bf16(device_type):
    """Whether the device, "cpu", "cuda" or "mps", has bfloat16 in hardware; not asked of MPS."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    return any(cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def amp(net, x):
    """net(x) for training, with convolutions in bfloat16 where that is native. Codes, images, logits and features
    come back in float32; stages do not, attention_map converts them."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=native_bf16(x.device.type)):
        return net(x)


def update(loss, optimizer):
    """Descend the loss in the parameters that the optimizer holds, and touch no other net."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


def train_step(x, trained, pair, own, opt_d, opt_g, s):
    """One update of the discriminators, then one of the generators, on the batch x (B, C, size, size).
    trained: the GANs to update; own: whether they have GAN losses of their own; pair: (teacher, student) for
    distillation, or (). Distillation moves the student only [ours]: a teacher that its gradient reached could
    lower the loss by becoming as poor as the student. Returns what to log, {name: scalar}: loss_D and loss_G, summed
    over the GANs, and their parts, of two GANs' own losses those of the last in `trained`, the student."""
    out = {gan: amp(gan.g, x) for gan in dict.fromkeys([*pair, *trained])}  # each once, a frozen teacher too
    if pair:
        teacher, student = pair
        out_t, out_s = out[teacher].detach(), out[student]

    # ---- D: x is real, x_hat is fake; for distillation, to the student's D, x_hat_t is real and x_hat_s is fake
    loss_d, log = 0, {}
    logit_fake = {gan: amp(gan.d, out[gan].x_hat.detach())[0] for gan in trained}
    for gan in trained if own else ():
        logit_real = amp(gan.d, x)[0]
        loss_d = loss_d + discriminator_loss(logit_real, logit_fake[gan])
        log |= {"D(x)": logit_real.sigmoid().mean(), "D(x_hat)": logit_fake[gan].sigmoid().mean()}
    if pair:
        logit_real = amp(student.d, out_t.x_hat)[0]
        loss_d = loss_d + s.kd_adv * discriminator_loss(logit_real, logit_fake[student])
        log |= {"D(x_hat_t)": logit_real.sigmoid().mean(), "D(x_hat_s)": logit_fake[student].sigmoid().mean()}
    update(loss_d, opt_d)

    # ---- G: L_G = w_adv L_adv + w_con L_con + w_lat L_lat
    # ---- and for distillation L_KD = kd_inter L_inter + kd_latent L_latent + kd_adv L_adv_kd
    loss_g = 0
    f_x_hat = {gan: amp(gan.d, out[gan].x_hat)[1] for gan in trained}
    for gan in trained if own else ():
        adv = adversarial_loss(amp(gan.d, x)[1].detach(), f_x_hat[gan])
        con, lat = contextual_loss(x, out[gan].x_hat), latent_loss(out[gan].z, out[gan].z_hat)
        loss_g = loss_g + s.w_adv * adv + s.w_con * con + s.w_lat * lat
        log |= {"adv": adv, "con": con, "lat": lat}
    if pair:
        inter = intermediate_distillation_loss(out_t.stages, out_s.stages, out_t.x_hat, out_s.x_hat)
        latent = latent_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
        adv_kd = adversarial_distillation_loss(amp(student.d, out_t.x_hat)[1].detach(), f_x_hat[student])
        loss_g = loss_g + s.kd_inter * inter + s.kd_latent * latent + s.kd_adv * adv_kd
        log |= {"inter": inter, "latent": latent, "adv_kd": adv_kd}
    update(loss_g, opt_g)
    return {"loss_D": loss_d, "loss_G": loss_g} | log


def fit(stage, rates, x, epochs, s, pair=(), own=True, first_epoch=0):
    """Train the GANs in rates, {GAN: learning rate}, and no others, on images x (N, C, size, size); pair and own as in
    train_step. Returns images per second; raises RunError if a loss is not finite. Batches and mirroring come from
    s.seed and the epoch's number alone: stages that count from the same first_epoch see the same batches."""
    opt_d, opt_g = (torch.optim.Adam([dict(params=getattr(gan, net).parameters(), lr=lr) for gan, lr in rates.items()],
                                     betas=(0.5, 0.999), fused=x.device.type != "mps") for net in "dg")  # DCGAN's betas
    updates = epochs * math.ceil(len(x) / s.batch)
    warmup = min(100, math.ceil(updates / 10))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(  # [ours] warm-up, then a cosine to 0: the last epoch is settled
        opt, lambda i: min(1, (i + 1) / warmup) * (1 + math.cos(math.pi * i / updates)) / 2) for opt in (opt_d, opt_g)]
    nn.ModuleList(rates).train()
    live, start = sys.stdout.isatty(), time.perf_counter()
    for epoch in range(1, epochs + 1):
        rng = torch.Generator().manual_seed(10_000 * s.seed + first_epoch + epoch)
        batches = torch.randperm(len(x), generator=rng).to(x.device).split(s.batch)
        mirrored = (s.flip & (torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5)).to(x.device)
        sums = 0  # stays on the device: reading a number there at each step would stall it
        for i, index in enumerate(batches):
            batch = torch.where(mirrored[index], x[index].flip(-1), x[index])
            log = train_step(batch, list(rates), pair, own, opt_d, opt_g, s)
            sums = sums + torch.stack([value.detach() for value in log.values()])
            for scheduler in schedulers:
                scheduler.step()
            if live:
                print(f"\r{stage} {epoch}/{epochs}, batch {i + 1}/{len(batches)} ", end="", flush=True)
        log = dict(zip(log, (sums / len(batches)).tolist()))
        if not all(map(math.isfinite, log.values())):
            raise RunError(f"{stage}, epoch {epoch}: NaN or Inf in {log}; lower the learning rates")
        seconds = time.perf_counter() - start
        print("\r" * live + f"{stage} {epoch}/{epochs}:", *(f"{key} {value:.3f}" for key, value in log.items()),
              f"| {epoch * len(x) / seconds:.0f} images/s, {seconds / epoch * (epochs - epoch):.0f} s left", flush=True)
    return epochs * len(x) / seconds


# ---------------------------------------------------------------------------------------------- evaluation
class Detector(nn.Sequential):
    """Detector(g) is what is deployed: images x (N, C, size, size) in [-1, 1] -> anomaly scores (N,)."""
    def forward(self, x):
        """||z - z_hat||_2 [paper] of each image, from 0 to 2 sqrt(z_dim), higher is more anomalous."""
        out = super().forward(x)  # what the generator makes of it
        return (out.z - out.z_hat).norm(dim=1)


@torch.inference_mode()
def score(g, x):
    """Anomaly scores (N,), float32, of images x (N, C, size, size) in [-1, 1] by generator g, put into eval mode."""
    torch.backends.cudnn.allow_tf32 = False  # float32 on CUDA too
    detector = Detector(g.eval())
    onednn, *_ = torch.backends.mkldnn.set_flags(len(x) > 1)  # a single image is not worth its preparations
    try:
        return torch.cat([detector(part) for part in x.split(128)])  # 128 at a time stay in a CPU's cache
    finally:
        torch.backends.mkldnn.set_flags(onednn)


def p_values(scores, calibration):
    """p = (1 + number of calibration scores >= score) / (n + 1), conformal (Vovk et al. 2005, Bates et al. 2023), of
    scores (N,), given the sorted scores (n,) of normal images that no net was trained on. A normal image has p <= alpha
    with a probability of at most alpha, over draws of all of these. By hand: p_values([2.5], [1., 2., 3.]) = 2 / 4"""
    return (1 + len(calibration) - torch.searchsorted(calibration, scores)).double() / (len(calibration) + 1)


def auroc(gan, x_test, y_test):
    """AUROC of a GAN's scores in percent, anomaly = 1. Raises RunError if a score is not finite."""
    scores = score(gan.g, x_test).cpu()
    if not scores.isfinite().all():
        raise RunError("NaN or Inf in the scores; lower the learning rates")
    return 100 * float(metrics.roc_auc_score(y_test, scores))


def cost(gan, x):
    """What a GAN costs, by torch's own counter and timer. Params and flops (of one image) are of generator and
    discriminator. The generator is all that scoring takes: MB of weights, and microseconds per image on the device of
    x (N, C, size, size), for an image by itself (us_1) and in a batch of 256 (us_256)."""
    logging.getLogger("torch.utils.cpp_extension").setLevel("ERROR")  # the timer's import may miss a compiler
    from torch.utils.benchmark import Timer
    with FlopCounterMode(display=False) as counter:
        gan.g(x[:1]), gan.d(x[:1])
    params_g, params_d = (sum(p.numel() for p in net.parameters()) for net in (gan.g, gan.d))
    result = {"params": params_g + params_d, "flops": counter.get_total_flops(), "MB": 4e-6 * params_g}
    for n in (1, 256):
        timer = Timer("score(g, x).cpu()", globals={"score": score, "g": gan.g, "x": x[torch.arange(n) % len(x)]},
                      num_threads=torch.get_num_threads())
        result[f"us_{n}"] = 1e6 / n * timer.blocked_autorange(min_run_time=0.2).median
    return result


@torch.inference_mode()
def save_samples(file, x, y, teacher, student):
    """Write to file a picture of test images x (N, C, size, size): the 8 that the student scores highest, 8 anomalies
    and 8 normal ones in the middle of their kind, the 8 lowest; under each what teacher and student make of it."""
    order = score(student.g, x).cpu().argsort(descending=True)
    anomalies, normal = (kind[max(0, len(kind) // 2 - 4):][:8] for kind in (order[y[order] == 1], order[y[order] == 0]))
    groups = {"highest": order[:8], "anomalies, median": anomalies, "normal, median": normal, "lowest": order[-8:]}
    rows, labels = [], []
    for name, index in groups.items():
        images = x[index.to(x.device)]
        for net, made in ("input", images), ("teacher", teacher.g(images).x_hat), ("student", student.g(images).x_hat):
            rows.append(F.pad(made, (0, 0, 0, 0, 0, 0, 0, 8 - len(made)), value=1))
            labels.append(f"{name} score: {net}" + f" ({int(y[index].sum())} anomalies)" * (net == "input"))
    grid = torchvision.utils.make_grid(torch.cat(rows), nrow=8, normalize=True, value_range=(-1, 1), pad_value=1)
    picture = TF.to_pil_image(F.pad(grid, (110, 0), value=1).repeat_interleave(2, 1).repeat_interleave(2, 2))
    for i, label in enumerate(labels):
        ImageDraw.Draw(picture).text((4, (i + 0.4) * picture.height / len(labels)), label, fill="black")
    picture.save(file, "png")


# ----------------------------------------------------------------------------------------------------- run
def run(s):
    """The whole method on the task that the settings name: train, evaluate, print, write; returns the result.
    result.json, student.pt and teacher.pt, as step 2 left them, go to a folder of this task in s.out."""
    began, device = time.perf_counter(), torch.device(s.device)
    x, x_test, y_test, name = load_task(s, device)
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) < int(s.holdout * len(x))
    x, x_held = x[~held], x[held]  # calibration takes normal images that no net has seen
    dataset = Path(s.data).resolve().name if s.dataset == "folder" else s.dataset
    folder = Path(s.out, f"{dataset}-{name}-seed{s.seed}{'-val' * s.val}".replace("/", "-"))
    folder.mkdir(parents=True, exist_ok=True)  # now, rather than fail after the training
    times = max(1, 4000 // len(x)) if s.dataset == "folder" else 1  # the default epochs suit about 4000 images
    images = {"train": len(x), "held out": len(x_held), "test": len(x_test), "anomalies": int(y_test.sum())}
    print(f"{folder.name}: training images {len(x)}{f', {times} times an epoch' * (times > 1)}, "
          f"held out {len(x_held)}, {'validation' if s.val else 'test'} {len(x_test)}, "
          f"of these anomalies {images['anomalies']}; on {device}", flush=True)
    x = x.repeat(times, 1, 1, 1)
    if s.batch > len(x):
        print(f"--batch {s.batch} is more than the {len(x)} training images: one update an epoch, with all of them")

    auc, speed, both_steps = {}, {}, s.epochs1 + s.epochs2

    def stage(key, rates, epochs, pair=(), **how):
        """Train a stage and note its speed and the AUROC of the last GAN in rates."""
        speed[key] = fit(key.replace("_", " "), rates, x, epochs, s, pair, **how)
        auc[key] = auroc(list(rates)[-1], x_test, y_test)

    torch.manual_seed(s.seed)
    teacher = GAN(s.size, x.shape[1], s.teacher_width, s.z_dim).to(device)
    torch.manual_seed(s.seed)  # again: a student's initial weights do not depend on the teacher
    student = GAN(s.size, x.shape[1], s.student_width, s.z_dim).to(device)
    alone, rival, rival_teacher = map(copy.deepcopy, (student, student, teacher))  # equal starts
    lr_teacher = s.lr_teacher * 128 / s.teacher_width  # Adam's good rates fall with width (Yang et al. 2021)
    stage("teacher", {teacher: lr_teacher}, s.epochs)
    stage("student_alone", {alone: s.lr_student}, both_steps)

    teacher.eval().requires_grad_(False)  # frozen; it has no buffers, since no norm keeps statistics
    stage("step1", {student: s.lr_student}, s.epochs1, (teacher, student), own=False)
    teacher.requires_grad_(True)
    rates = {teacher: s.lr_step2 * lr_teacher, student: s.lr_step2 * s.lr_student}
    stage("step2", rates, s.epochs2, (teacher, student), first_epoch=s.epochs1)
    auc["teacher_step2"] = auroc(teacher, x_test, y_test)

    if s.ablation:  # single step: jointly from random weights, as many updates of the student as both steps
        stage("joint_only", {rival_teacher: lr_teacher, rival: s.lr_student}, both_steps, (rival_teacher, rival))

    costs = {"teacher": cost(teacher, x_test), "student": cost(student, x_test)}
    columns = {"params": "parameters", "flops": "FLOPs per image", "MB": "MB to score", "us_1": "us per image, batch 1",
               "us_256": "batch 256"}
    print("\n| | AUROC % |", " | ".join(f"{name} | ratio" for name in columns.values()), "|\n|" + "---|" * 12)
    for key, value in auc.items():
        mine = costs["teacher" if key.startswith("teacher") else "student"]
        cells = [f"{mine[c]:,.{2 * (c == 'MB')}f} | {costs['teacher'][c] / mine[c]:.2f}" for c in columns]
        print(f"| {key.replace('_', ' ')} | {value:.2f} |", " | ".join(cells), "|")
    result = {
        "dataset": s.dataset, "normal": name, "seed": s.seed, "split": "validation" if s.val else "test",
        "images": images, "auroc": auc, **{c: {net: costs[net][c] for net in costs} for c in columns},
        "ratio": costs["teacher"]["flops"] / costs["student"]["flops"], "images_per_second": speed,
        "seconds": time.perf_counter() - began, "settings": vars(s),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"{device.type}, {torch.get_num_threads()} threads", "versions": {"python": sys.version.split()[0]}
        | {module.__name__: module.__version__ for module in (torch, torchvision, sklearn)}}
    # in memory first: on a full disk torch's functions raise no OSError
    files = {file: io.BytesIO() for file in ("samples.png", "teacher.pt", "student.pt", "student.pt2", "result.json")}
    save_samples(files["samples.png"], x_test, y_test, teacher, student)
    for net, gan in ("teacher", teacher), ("student", student):
        torch.save({"version": VERSION, "form": gan.form, "weights": gan.cpu().state_dict(), "settings": vars(s),
                    "calibration": score(gan.g, x_held.cpu()).sort().values}, files[f"{net}.pt"])
    batch = {0: torch.export.Dim("batch")}  # of any size
    exported = torch.export.export(Detector(student.g), (torch.zeros(2, *x.shape[1:]),), dynamic_shapes=(batch,))
    torch.export.save(exported, files["student.pt2"])
    files["result.json"].write(json.dumps(result, indent=1).encode())
    with tempfile.TemporaryDirectory(dir=s.out) as part:  # files appear whole or not at all
        for file, content in files.items():
            Path(part, file).write_bytes(content.getvalue())
        (folder / "result.json").unlink(missing_ok=True)  # of an earlier run: it must not describe the new nets
        for file in files:  # the result last: where it is, everything is
            Path(part, file).replace(folder / file)
    print(f"\nin {folder}: {', '.join(sorted(files))}\nRESULT {json.dumps(result)}", flush=True)
    return result


# ------------------------------------------------------------------------------------- using a trained student
def load_gan(path):
    """(GAN, calibration scores) of a student.pt or teacher.pt, on the CPU. Raises RunError if it is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["version"] > VERSION:
            raise ValueError("a newer pkdgan.py wrote it; use that one")
        gan = GAN(**saved["form"])
        gan.load_state_dict(saved["weights"])
        return gan.eval(), saved["calibration"]
    except Exception as error:  # torch raises all sorts, with long texts, on what is foreign or cut short
        reason = error if isinstance(error, (OSError, ValueError)) else type(error).__name__
        raise RunError(f"{path} is not a whole student.pt or teacher.pt of this program ({reason})")


def score_files(checkpoint, paths, alpha, device):
    """Print a line for each image file, in folders too: path, score, p-value, and "anomaly" if p <= alpha. One that
    cannot be read gets a line on stderr instead; if there was any, RunError is raised at the end."""
    gan, calibration = load_gan(checkpoint)
    gan.to(device)
    files = [file for path in map(Path, paths) for file in (sorted(
        f for f in path.rglob("*") if torchvision.datasets.folder.is_image_file(f.name)) if path.is_dir() else [path])]
    n, broken = len(calibration), 0
    verdicts = 1 / (n + 1) <= alpha  # the smallest p-value that there is
    if not verdicts:
        print(f"pkdgan.py: no verdicts at --alpha {alpha}: {n} normal images were held out of the training "
              f"(--holdout), {math.ceil(1 / alpha) - 1 if alpha > 0 else 'no number'} would do", file=sys.stderr)
    print("path\tscore\tp-value\tverdict")
    for file in files:
        try:
            x = read_image(file, gan.form["size"])[None].float()
        except RunError as error:
            print("pkdgan.py:", *str(error).split(), file=sys.stderr)
            broken += 1
            continue
        x = x.mean(1, keepdim=True).round() if gan.form["channels"] == 1 else x  # as load_images does
        value = score(gan.g, (x / 127.5 - 1).to(device)).cpu()
        p = p_values(value, calibration).item()
        verdict = ("anomaly" if p <= alpha else "normal") if verdicts else ""
        print(f"{file}\t{value.item():.5g}\t{f'{p:.4g}' if n else ''}\t{verdict}", flush=True)
    if broken or not files:
        raise RunError(f"{broken} of {len(files)} images could not be scored" if files else "no image there")


# -------------------------------------------------------------------------------------------- command line
def parse(argv=None):
    """Settings (a namespace) from a command line, sys.argv by default. Raises UsageError."""
    def usage_error(message):
        """argparse's error handler, for one line instead of the list of flags."""
        raise UsageError(message)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.error = usage_error
    for name, (default, what) in SETTINGS.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        kind |= {"choices": list(PER_DATASET)} if name == "dataset" else {}
        own = "".join(f", {dataset} {own[name]}" for dataset, own in PER_DATASET.items() if name in own)
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{what} ({default}{own})", **kind)
    parser.add_argument("--score", nargs="+", metavar=("STUDENT.PT", "IMAGE_OR_FOLDER"),
                        help="score images with a trained student instead of training")
    parser.add_argument("--alpha", type=float, help="share of false alarms that --score accepts (0.05)")
    given, defaults = vars(parser.parse_args(argv)), {name: default for name, (default, _) in SETTINGS.items()}
    s = argparse.Namespace(**defaults | PER_DATASET[given.get("dataset", defaults["dataset"])] | given)
    for name, value in vars(s).items():
        least, end = int(type(value) is int and name != "seed"), 1 if name in ("holdout", "alpha") else 2 ** 31
        if type(value) in (int, float) and not least <= value < end:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least} and less than {end}")
    if s.size < 16 or s.size & (s.size - 1):
        raise UsageError(f"--size {s.size}: must be a power of two from 16, such as 32 or 64")
    if s.device == "auto":
        s.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {s.device} cannot be used here: {error}")
    return s


def main(argv=None):
    """The command-line program; returns its exit code: 0, 1 failure, 2 usage, 130 Ctrl-C."""
    try:
        s = parse(argv)
        if "score" in s:
            score_files(s.score[0], s.score[1:], getattr(s, "alpha", 0.05), s.device)
        else:
            run(s)
        return 0
    except (UsageError, RunError) as error:
        message, code = str(error), 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        message, code = f"cannot write: {error}; free some space or choose another --out", 1
    except torch.OutOfMemoryError:
        message, code = "out of memory on the device; lower --batch, --size or the widths", 1
    except KeyboardInterrupt:
        message, code = "interrupted; nothing half-written is left", 130
    print("\n" * sys.stdout.isatty() + "pkdgan.py:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
