"""P-KDGAN: one-class novelty detection by a tiny GAN that learned from a wide one.

    python pkdgan.py                                 # digits, a minute: step 2's AUROC is about 96
    python pkdgan.py --dataset mnist --normal 3      # some ten minutes: about 96
    python pkdgan.py --dataset cifar10 --normal 3    # some twenty minutes; --help has the flags

It needs Python 3.10, torch 2.6, torchvision 0.21, scikit-learn 1.5, Pillow 10.1, or newer.

The method is that of Zhang, Chen, Sun: "P-KDGAN: Progressive Knowledge Distillation with GANs for
One-class Novelty Detection", IJCAI 2020 (arXiv 2007.06963). We did not have its text. [paper] means
that its abstract, its follow-up's (arXiv 2109.07295), Papers with Code or a second-hand summary
says so; [ours] means that we decided it. What comes from elsewhere is cited.

A GAN has a generator G and a discriminator D. It sees images x of one normal class only. G
learns to encode an image as a vector, its code, to rebuild the image from the code, and then to
encode the rebuilt image:

    x --encode--> z --decode--> x_hat --encode_again--> z_hat

On an anomaly the two codes should disagree more than on a normal image: the anomaly score is
||z - z_hat||_2 [paper]. A wide teacher (suffix _t) learns this by itself. A narrow student (suffix
_s) learns it from the teacher, at first from the frozen teacher alone, then together with it
[paper]. train_stages() runs all stages:

    stage            trains     its D minimises                 its G minimises
    teacher          teacher    L_D(x, x_hat_t)                 L_G
    student_alone    student    L_D(x, x_hat_s)                 L_G
    step1            student    kd_adv L_D(x_hat_t, x_hat_s)    L_KD
    step2            student    kd_adv L_D(x_hat_t, x_hat_s)    L_KD + kd_residual L_residual
                                + w_own L_D(x, x_hat_s)         + w_own L_G
                     teacher    L_D(x, x_hat_t)                 L_G

    L_D(real, fake)                                                   D tells real from fake
    L_G  = w_adv L_adv + w_con L_con + w_lat L_lat                    a GAN's own losses
    L_KD = kd_inter L_inter + kd_latent L_lat_kd + kd_adv L_adv_kd    the student's, in both steps
    L_residual = E[(r_t - r_s)^2], r = z - z_hat                      in step 2 only

Each loss is a function below. L_G is the sum in gan_losses(), L_KD that in distillation_losses().
L_adv, L_con and L_lat compare an image with its reconstruction: their features in D, their pixels,
their codes. L_inter compares x_hat_t with x_hat_s, L_lat_kd z_t with z_s and z_hat_t with
z_hat_s, L_adv_kd the features of x_hat_t and x_hat_s in the student's D. L_residual compares r_t
with r_s; the score is the length of r.

The stages and who trains in each are [paper]. What the student's D tells apart in the two steps,
the form of L_adv_kd, the student's own losses in step 2, L_residual and all weights are [ours].
Also [ours], as marked below, are codes scaled to one norm, instance normalisation, detaching what
comes from the teacher, updating G and D at once, and the schedule.

By default, the four stages take 700, 2,160, 1,800 and 360 updates (digits: fewer). The student
alone is the baseline: the same net, from the same initial weights, trained for as many updates as
both steps together [ours]. Step 2 goes on with step 1's student (its G and its D) and with the
trained teacher, but with a new Adam.

The learning rates rise over the first 15 % of the updates, then fall to zero as half a cosine: once
for the teacher, once for the student alone, and once over both steps together. So step 2 is a
fine-tuning [ours]: with the lengths below, its rates, the student's and the teacher's, begin at
about a tenth of their peaks, and end at 0. The student's add up to 1 to 2 % of those of step 1.

The program prints an AUROC of each stage, by the score above. For use, it saves a Detector [ours]:
step 2's student with a Mahalanobis score.

The method ends at the line "# ====". What stands above it needs torch alone:

    nets = train_stages(x, EXPERIMENTS["mnist"])    # x: normal images (N, C, 32, 32) in [-1, 1]
    scores = score(nets["step2"], x_new)            # (N,), high is anomalous
"""

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


# ----------------------------------------------------------------------------------------- settings
def setting(default, text, low=0, high=math.inf):
    """A dataclass field with its default; text and range [low, high) are for the command line."""
    return field(default=default, metadata={"text": text, "low": low, "high": high})


@dataclass
class Settings:
    """Everything that the training depends on besides the images."""

    # the networks
    teacher_width: int = setting(32, "channels of the teacher's first block", low=1)
    student_width: int = setting(2, "channels of the student's first block", low=1)
    z_dim: int = setting(256, "dimension of z and z_hat, teacher and student alike", low=2)
    # the length of each stage. To compare, give the student alone as many updates as both steps.
    teacher_updates: int = setting(700, "updates of the teacher")
    alone_updates: int = setting(2160, "updates of the student alone; 0 leaves it out")
    step1_updates: int = setting(1800, "updates of step 1")
    step2_updates: int = setting(360, "updates of step 2")
    batch: int = setting(64, "images in an update", low=1)
    # the peak learning rates. Both steps share one schedule, whose peak lies in step 1: step 2
    # begins at a tenth of it.
    lr_teacher: float = setting(1e-3, "learning rate of the teacher by itself")
    lr_student: float = setting(2e-3, "learning rate of the student, alone and in both steps")
    lr_step2_teacher: float = setting(2e-4, "peak learning rate of the teacher in step 2")
    # the weights of the losses
    w_adv: float = setting(1.0, "weight of a GAN's adversarial loss")
    w_con: float = setting(1.0, "weight of a GAN's contextual loss")
    w_lat: float = setting(1.0, "weight of a GAN's latent loss")
    w_own: float = setting(1.0, "weight of the student's own losses in step 2")
    kd_inter: float = setting(100.0, "weight of the intermediate distillation loss")
    kd_latent: float = setting(100.0, "weight of the latent distillation loss")
    kd_adv: float = setting(10.0, "weight of the adversarial distillation loss, G's and D's")
    kd_residual: float = setting(1000.0, "weight of the residual distillation loss, in step 2")
    # chance
    seed: int = setting(0, "random seed of initial weights and of the images' order", high=2**32)


# The settings of each data set. Comments give the ratio of FLOPs, teacher to student, and the
# paper's. How some of the values were chosen:
#   lr_student, w_con             on a validation split of the training images, with earlier nets
#   step2_updates, kd_residual    on that split, with these nets
#   batch                         on test images, with a prototype
#   lr_teacher                    about 0.032 / teacher_width
EXPERIMENTS = {
    "digits": Settings(  # 230; small, to try the program
        student_width=1,
        teacher_updates=160,
        alone_updates=400,
        step1_updates=320,
        step2_updates=80,
        batch=16,
        lr_student=0.02,
        w_con=10.0,
    ),
    "mnist": Settings(  # 352 (paper 311)
        teacher_width=40,
        student_width=1,
        lr_teacher=8e-4,
        lr_student=0.02,
        w_con=10.0,
    ),
    "fmnist": Settings(teacher_width=58, student_width=1, lr_teacher=6e-4),  # 719 (paper 700)
    "cifar10": Settings(teacher_width=64, student_width=8, lr_teacher=5e-4),  # 40 (paper 24)
    "folder": Settings(),  # 76
}

# ----------------------------------------------------------------------------------------- networks
# Comments give the shapes for images of 32 x 32 and a width of w; C is 1 or 3 channels.
#
# The authors had their best results at batch size 1 (arXiv 2109.07295). At batch size 1, batch
# normalisation normalises each channel of each image by itself, which is instance normalisation
# (Ulyanov et al. 2016): we take that, at any batch size [ours]. It keeps no running statistics, so
# training and evaluation mode are the same, and no score depends on an image's batch.

SIZES = [16, 32, 64, 128, 256, 512]  # heights of images, which are square


def block_widths(size, width):
    """The channels of each block. Blocks halve an image of size x size, down to 4 x 4, and double
    the channels, up to 8 * width, as in DCGAN (Radford et al. 2016).
    By hand: block_widths(32, 64) = [64, 128, 256]"""
    if size not in SIZES:
        raise ValueError(f"images are {size} x {size}: resize them to one of {SIZES}")
    blocks = int(math.log2(size)) - 2
    return [width * min(2**block, 8) for block in range(blocks)]


class Encoder(nn.Module):
    """Like DCGAN's discriminator, with instance normalisation: convolutions that halve the image
    down to 4 x 4, then a linear layer with n_out outputs. A GAN has three: two encode, with
    n_out = z_dim, in its generator; one, with n_out = 1, is its discriminator."""

    def __init__(self, size, channels, width, n_out):
        super().__init__()
        widths = block_widths(size, width)
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]  # x -> (w, 16, 16)
        for c_in, c_out in pairwise(widths):  # -> (2w, 8, 8) -> (4w, 4, 4)
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)]
            layers += [nn.InstanceNorm2d(c_out, affine=True), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4 * 4, n_out)

    def forward(self, x):
        """x (B, C, size, size) -> output (B, n_out), features of the last block (B, 4w, 4, 4)."""
        features = self.blocks(x)
        return self.head(features.flatten(1)), features


class Decoder(nn.Module):
    """DCGAN's generator: transposed convolutions from a code up to an image."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        widths = block_widths(size, width)[::-1]
        layers = [nn.ConvTranspose2d(z_dim, widths[0], 4, bias=False)]  # z -> (4w, 4, 4)
        layers += [nn.InstanceNorm2d(widths[0], affine=True), nn.ReLU()]
        for c_in, c_out in pairwise(widths):  # -> (2w, 8, 8) -> (w, 16, 16)
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
            layers += [nn.InstanceNorm2d(c_out, affine=True), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]  # -> (C, 32, 32)
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        """Codes z (B, z_dim) -> images (B, C, size, size) in [-1, 1]."""
        return self.layers(z[:, :, None, None])


class Generated(NamedTuple):
    """What a generator makes of a batch of images."""

    z: torch.Tensor  # (B, z_dim), the codes of the images, of norm sqrt(z_dim)
    x_hat: torch.Tensor  # (B, C, size, size) in [-1, 1], the reconstructed images
    z_hat: torch.Tensor  # (B, z_dim), the codes of the reconstructed images, of norm sqrt(z_dim)


class Generator(nn.Module):
    """Encoder-decoder-encoder x -> z -> x_hat -> z_hat [paper], as in GANomaly (Akcay et al. 2018).
    Codes are scaled to one norm [ours]: else G could lower L_lat by shrinking z and z_hat. So the
    score depends only on the angle between z and z_hat."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.encode = Encoder(size, channels, width, z_dim)
        self.decode = Decoder(size, channels, width, z_dim)
        self.encode_again = Encoder(size, channels, width, z_dim)
        self.code_norm = math.sqrt(z_dim)

    def forward(self, x):
        """Images x (B, C, size, size) in [-1, 1] -> Generated."""
        code, _ = self.encode(x)
        z = self.code_norm * F.normalize(code, dim=1)
        x_hat = self.decode(z)
        code_hat, _ = self.encode_again(x_hat)
        z_hat = self.code_norm * F.normalize(code_hat, dim=1)
        return Generated(z, x_hat, z_hat)


class GAN(nn.Module):
    """A generator g and a discriminator d, whose output is a logit, high for what is real. Teacher
    and student differ in width alone."""

    def __init__(self, size, channels, width, z_dim):
        super().__init__()
        self.g = Generator(size, channels, width, z_dim)
        self.d = Encoder(size, channels, width, n_out=1)  # its one output is the logit


# ------------------------------------------------------------------------------------------- losses
# E[] is the mean over images and elements, so that a weight means the same at any size. In the
# distillation losses, whatever comes from the teacher is detached [ours]: else the teacher could
# lower them by becoming as poor as the student. Lists in "by hand" stand for tensors.


def discriminator_loss(logit_real, logit_fake):
    """L_D = -1/2 E[log sigmoid(D(real))] - 1/2 E[log(1 - sigmoid(D(fake)))] of logits (B, 1)
    (Goodfellow et al. 2014). By hand: discriminator_loss([0.], [0.]) = -log(1/2) = 0.6931"""
    # -log sigmoid(a) = softplus(-a), and -log(1 - sigmoid(a)) = softplus(a)
    return (F.softplus(-logit_real).mean() + F.softplus(logit_fake).mean()) / 2


def adversarial_loss(f_x, f_x_hat):
    """L_adv = E[(f(x) - f(x_hat))^2], where f(x) is what the last block of D makes of x: feature
    matching (Salimans et al. 2016), image by image, as in GANomaly. f(x) is the target, so it is
    detached. By hand: adversarial_loss([1., 2.], [1., 0.]) = 2"""
    return F.mse_loss(f_x_hat, f_x.detach())


def contextual_loss(x, x_hat):
    """L_con = E[|x - x_hat|]. By hand: contextual_loss([1., -1.], [0., 1.]) = (1 + 2) / 2 = 1.5"""
    return F.l1_loss(x_hat, x)


def latent_loss(z, z_hat):
    """L_lat = E[(z - z_hat)^2]. By hand: latent_loss([1., 1.], [0., -1.]) = (1 + 4) / 2 = 2.5"""
    return F.mse_loss(z_hat, z)


def intermediate_distillation_loss(x_hat_t, x_hat_s):
    """L_inter = E[|x_hat_t - x_hat_s|]: the intermediate representation is x_hat [paper].
    By hand: intermediate_distillation_loss([1.], [0.5]) = 0.5"""
    return F.l1_loss(x_hat_s, x_hat_t.detach())


def latent_distillation_loss(z_t, z_s, z_hat_t, z_hat_s):
    """L_lat_kd = E[(z_t - z_s)^2] + E[(z_hat_t - z_hat_s)^2] [paper].
    By hand: latent_distillation_loss([1.], [0.], [1.], [3.]) = 1 + 4 = 5"""
    return F.mse_loss(z_s, z_t.detach()) + F.mse_loss(z_hat_s, z_hat_t.detach())


def adversarial_distillation_loss(f_x_hat_t, f_x_hat_s):
    """L_adv_kd = E[(f(x_hat_t) - f(x_hat_s))^2], where f belongs to the student's D [ours].
    By hand: adversarial_distillation_loss([1., 2.], [0., 2.]) = 0.5"""
    return F.mse_loss(f_x_hat_s, f_x_hat_t.detach())


def residual_distillation_loss(z_t, z_s, z_hat_t, z_hat_s):
    """L_residual = E[(r_t - r_s)^2] [ours], r = z - z_hat, whose length is the anomaly score.
    By hand: residual_distillation_loss([1.], [0.], [1.], [3.]) = (0 - -3)^2 = 9"""
    return F.mse_loss(z_s - z_hat_s, (z_t - z_hat_t).detach())


def gan_losses(gan, x, out, settings):
    """A GAN's own losses (for its D, for its G) on images x, given out = gan.g(x). They are
    GANomaly's, with our weights [ours].

    loss_d has gradients for D alone. loss_g depends on D's parameters, too: backpropagate it into
    G's alone, by loss_g.backward(inputs=list(gan.g.parameters())), as update_weights() does."""
    # ---- D: minimise L_D; x is real, x_hat is fake, and detached: L_D does not move G
    logit_x, f_x = gan.d(x)
    logit_x_hat, _ = gan.d(out.x_hat.detach())
    loss_d = discriminator_loss(logit_x, logit_x_hat)
    # ---- G: minimise L_G = w_adv L_adv + w_con L_con + w_lat L_lat
    _, f_x_hat = gan.d(out.x_hat)
    adv = adversarial_loss(f_x, f_x_hat)
    con = contextual_loss(x, out.x_hat)
    lat = latent_loss(out.z, out.z_hat)
    loss_g = settings.w_adv * adv + settings.w_con * con + settings.w_lat * lat
    return loss_d, loss_g


def distillation_losses(student, out_t, out_s, settings):
    """The distillation losses (for the student's D, for its G), given what the generators of
    teacher and student made of the same images. As with gan_losses(), loss_d has gradients for D
    alone, and loss_g is for G."""
    # ---- D of the student: minimise kd_adv L_D; x_hat_t is real, x_hat_s is fake. (In step 2,
    # kd_adv weighs this loss against L_D(x, x_hat_s). In step 1 it only has to be above 0: Adam
    # hardly notices a common factor.)
    logit_x_hat_t, f_x_hat_t = student.d(out_t.x_hat.detach())
    logit_x_hat_s, _ = student.d(out_s.x_hat.detach())
    loss_d = settings.kd_adv * discriminator_loss(logit_x_hat_t, logit_x_hat_s)
    # ---- G of the student: minimise L_KD = kd_inter L_inter + kd_latent L_lat_kd + kd_adv L_adv_kd
    _, f_x_hat_s = student.d(out_s.x_hat)
    inter = intermediate_distillation_loss(out_t.x_hat, out_s.x_hat)
    lat_kd = latent_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
    adv_kd = adversarial_distillation_loss(f_x_hat_t, f_x_hat_s)
    loss_g = settings.kd_inter * inter + settings.kd_latent * lat_kd + settings.kd_adv * adv_kd
    return loss_d, loss_g


# ----------------------------------------------------------------------------------------- training
def shuffled_batches(x, updates, settings):
    """For each update, the indices of its images in x: random orders of all of x, one after the
    other, cut into batches regardless of where an order ends. The seed fixes them. Step 2 goes on
    where step 1 ended; every other stage begins with the first batch."""
    rng = torch.Generator().manual_seed(settings.seed)
    passes = 1 + (updates * settings.batch) // len(x)  # at least as many as are needed
    orders = [torch.randperm(len(x), generator=rng) for _ in range(passes)]
    return torch.cat(orders).to(x.device).split(settings.batch)[:updates]


def rate_factor(update, updates):
    """The factor on the peak learning rates in an update, counted from 1: it rises linearly over
    the first 15 % of the updates, then falls to 0 as half a cosine [ours]. It is taken at the
    update's midpoint, so that the first is not 0."""
    progress = (update - 0.5) / updates
    if progress < 0.15:
        return progress / 0.15
    return (1 + math.cos(math.pi * (progress - 0.15) / 0.85)) / 2


def new_optimizer(gans_and_rates):
    """One Adam for all GANs of a stage, each with its own peak learning rate, which
    update_weights() scales. The betas are DCGAN's; fused changes only the speed."""
    groups = [{"params": gan.parameters(), "peak_rate": rate} for gan, rate in gans_and_rates]
    return torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)


def update_weights(gans, loss_d, loss_g, optimizer, factor):
    """One update of GANs, in place, at the peak rates of new_optimizer() times factor.
    Discriminators get the gradient of loss_d alone, generators that of loss_g alone. Both are taken
    before any weight changes [ours]. GANs often update D first: loss_g has then to be computed
    anew, since it depends on D."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_rate"]
    # Parameters that are frozen by requires_grad_(False) are left out: they would be refused.
    g_params = [p for gan in gans for p in gan.g.parameters() if p.requires_grad]
    optimizer.zero_grad()
    loss_d.backward()  # reaches discriminators alone, since x_hat is detached in it
    loss_g.backward(inputs=g_params)  # without inputs, discriminators would get its gradient, too
    optimizer.step()


def check_and_report(stage, gan, update, updates, loss_d, loss_g, report):
    """After each tenth of a stage's updates, check that the losses are finite, and call
    report(stage, gan, update, updates, loss_d, loss_g) unless it is None. More often would be
    slower, since .item() waits for a GPU. The losses are the weighted sums that update_weights()
    gets: in step 2 they contain the teacher's. Raises FloatingPointError for a loss that is not
    finite."""
    tenth = (10 * update) // updates
    previous_tenth = (10 * (update - 1)) // updates
    if tenth == previous_tenth:
        return
    value_d, value_g = loss_d.item(), loss_g.item()
    if not math.isfinite(value_d + value_g):
        raise FloatingPointError(f"{stage}: a loss is not finite: lower the learning rates")
    if report is not None:
        report(stage, gan, update, updates, value_d, value_g)


# ------------------------------------------------------------------------------------------- stages
def new_gan(x, width, settings):
    """A GAN of a width for images like x. It seeds torch first: all students of a seed begin with
    the same weights."""
    torch.manual_seed(settings.seed)
    _, channels, size, _ = x.shape
    return GAN(size, channels, width, settings.z_dim).to(x.device)


def train_gan(stage, gan, x, rate, updates, settings, report=None):
    """Train a GAN by itself on images x, in place: the stages "teacher" and "student_alone", which
    differ in rate and updates alone."""
    optimizer = new_optimizer([(gan, rate)])
    for update, indices in enumerate(shuffled_batches(x, updates, settings), start=1):
        images = x[indices]
        out = gan.g(images)
        loss_d, loss_g = gan_losses(gan, images, out, settings)
        factor = rate_factor(update, updates)
        update_weights([gan], loss_d, loss_g, optimizer, factor)
        check_and_report(stage, gan, update, updates, loss_d, loss_g, report)


def small_batches(x):
    """Images x in batches of at most 128 * 32 * 32 pixels (but at least one image): what the nets
    make of a batch then takes little memory."""
    pixels = x.shape[2] * x.shape[3]
    return x.split(max(1, 128 * 32 * 32 // pixels))


@torch.no_grad()
def generate_all(gan, x):
    """What a GAN's generator makes of all images x, without a graph: Generated."""
    outs = [gan.g(batch) for batch in small_batches(x)]
    return Generated(
        z=torch.cat([out.z for out in outs]),
        x_hat=torch.cat([out.x_hat for out in outs]),
        z_hat=torch.cat([out.z_hat for out in outs]),
    )


def train_step1(student, teacher, x, settings, report=None):
    """Step 1: the student learns from the frozen teacher alone, in place."""
    # What a frozen teacher makes of an image never changes. So it is made once, and kept: the
    # teacher costs tens to hundreds of times as much as the student.
    all_t = generate_all(teacher, x)

    updates = settings.step1_updates
    both_steps = settings.step1_updates + settings.step2_updates
    optimizer = new_optimizer([(student, settings.lr_student)])
    for update, indices in enumerate(shuffled_batches(x, updates, settings), start=1):
        out_t = Generated(all_t.z[indices], all_t.x_hat[indices], all_t.z_hat[indices])
        out_s = student.g(x[indices])
        loss_d, loss_g = distillation_losses(student, out_t, out_s, settings)
        factor = rate_factor(update, both_steps)  # the rates fall on through step 2
        update_weights([student], loss_d, loss_g, optimizer, factor)
        check_and_report("step1", student, update, updates, loss_d, loss_g, report)


def step2_losses(student, teacher, images, settings):
    """The losses of step 2 (for both discriminators, for both generators) on images (B, C, size,
    size), for update_weights(). One sum is enough for both nets: what comes from the teacher is
    detached in the student's losses, so no loss of one has a gradient for the other. Distillation
    moves the student only.

    Nets of your own need a g that gives Generated and a d that gives logits and features, as GAN
    has them, and no batch normalisation: d sees real and fake images in calls of their own, whose
    statistics would differ."""
    out_t = teacher.g(images)
    out_s = student.g(images)
    distill_loss_d, distill_loss_g = distillation_losses(student, out_t, out_s, settings)
    residual = residual_distillation_loss(out_t.z, out_s.z, out_t.z_hat, out_s.z_hat)
    own_loss_d, own_loss_g = gan_losses(student, images, out_s, settings)
    teacher_loss_d, teacher_loss_g = gan_losses(teacher, images, out_t, settings)
    student_loss_d = distill_loss_d + settings.w_own * own_loss_d
    student_loss_g = distill_loss_g + settings.kd_residual * residual + settings.w_own * own_loss_g
    return student_loss_d + teacher_loss_d, student_loss_g + teacher_loss_g


def train_step2(student, teacher, x, settings, report=None):
    """Step 2: student and teacher train on together, in place.

    By a second-hand summary, the paper compares with four ways to distil in a single step: with a
    frozen or a moving teacher, with or without the student's own losses. For these, call it with a
    new student, step2_updates = alone_updates, kd_residual = 0 and step1_updates = 0 (else the
    rates would begin at a tenth of their peaks); lr_step2_teacher = 0 freezes the teacher, and
    w_own = 0 leaves out the student's own losses."""
    updates = settings.step2_updates
    both_steps = settings.step1_updates + settings.step2_updates
    start = settings.step1_updates
    gans_and_rates = [(student, settings.lr_student), (teacher, settings.lr_step2_teacher)]
    optimizer = new_optimizer(gans_and_rates)
    batches = shuffled_batches(x, both_steps, settings)[start:]  # after step 1's
    for update, indices in enumerate(batches, start=1):
        loss_d, loss_g = step2_losses(student, teacher, x[indices], settings)
        factor = rate_factor(start + update, both_steps)  # the rates go on where step 1 ended
        update_weights([student, teacher], loss_d, loss_g, optimizer, factor)
        check_and_report("step2", student, update, updates, loss_d, loss_g, report)


def train_stages(x, settings, report=None, teacher=None):
    """Train all stages on normal images x (N, C, size, size) in [-1, 1], size one of SIZES.
    report: see check_and_report(). teacher: a trained GAN; without one, the first stage trains it.
    Returns a dict of GANs: "teacher", "student_alone", "step1" and "step2" (the student after each
    of these), and "teacher_step2" (the teacher after step 2)."""
    if teacher is None:
        teacher = new_gan(x, settings.teacher_width, settings)
        rate, updates = settings.lr_teacher, settings.teacher_updates
        train_gan("teacher", teacher, x, rate, updates, settings, report)

    student_alone = new_gan(x, settings.student_width, settings)
    rate, updates = settings.lr_student, settings.alone_updates
    train_gan("student_alone", student_alone, x, rate, updates, settings, report)

    student_step1 = new_gan(x, settings.student_width, settings)
    train_step1(student_step1, teacher, x, settings, report)

    # Step 2 goes on with copies: what the earlier stages made stays as it is.
    student_step2, teacher_step2 = copy.deepcopy(student_step1), copy.deepcopy(teacher)
    train_step2(student_step2, teacher_step2, x, settings, report)
    return {
        "teacher": teacher,
        "student_alone": student_alone,
        "step1": student_step1,
        "step2": student_step2,
        "teacher_step2": teacher_step2,
    }


# -------------------------------------------------------------------------------------------- score
@torch.no_grad()
def residuals(gan, x):
    """z - z_hat (N, z_dim) of at least one image x (N, C, size, size) in [-1, 1]."""
    outs = [gan.g(batch) for batch in small_batches(x)]
    return torch.cat([out.z - out.z_hat for out in outs])


def score(gan, x):
    """The anomaly score ||z - z_hat||_2 [paper] of images x (N, C, size, size) in [-1, 1]: (N,),
    high is anomalous."""
    if len(x) == 0:
        return x.new_empty(0)
    return residuals(gan, x).norm(dim=1)


# ==== the program: data, detector, evaluation, files, command line ====
import argparse
import hashlib
import io
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from time import monotonic

import torchvision
from PIL import Image, ImageDraw, ImageOps
from sklearn import covariance, datasets, decomposition, metrics, model_selection
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

VERSION = 9  # of the method and of the files: raised when earlier results become incomparable
STAGES = ["teacher", "student_alone", "step1", "step2"]
ALPHAS = [0.01, 0.05, 0.1]  # the shares of false alarms in the table of kinds, beside --alpha
HOLDOUT_OF_A_FOLDER = 0.2
FILES = ["nets.pt", "student.pt", "student.pt2", "samples.png", "result.json"]  # result.json last
DESCRIPTION = """Learn from images of one normal class, and score any image by how anomalous it is.

  python pkdgan.py --dataset mnist --normal 3
  python pkdgan.py --dataset folder --data parts --normal good
  python pkdgan.py --score runs/parts-good-seed0/student.pt new/*.jpg"""


class UsageError(Exception):
    """What the command line asks for is not possible: the exit code is 2."""


def warn(message):
    """Print a line on stderr."""
    print(f"pkdgan.py: {' '.join(str(message).split())}", file=sys.stderr)


@dataclass
class Options:
    """What a run needs to know besides its Settings: its images, and where its files go."""

    dataset: str = setting("digits", "digits, mnist, fmnist, cifar10, or folder: your own images")
    normal: str = setting("8", "the normal class: its name, or its number (not of a folder)")
    data: str = setting("data", "where data sets are or go to; folder: what has train/ and test/")
    size: int = setting(32, "images become size x size: 16, 32, 64, 128, 256 or 512")
    holdout: float = setting(0.0, "share of normal training images, the last, held out", high=1)
    teacher: str = setting("", "take the teacher from a nets.pt, or from a folder of runs")
    out: str = setting("", "folder of the run; else runs/DATA-CLASS-seedSEED")
    device: str = setting("", "to train on: cpu, cuda:1, mps, ...; else cuda, if there is one")
    alpha: float = setting(0.05, "share of false alarms that you accept", low=1e-9, high=0.5)


# --------------------------------------------------------------------------------------------- data
@dataclass
class Task:
    """The images of a run. All are float32 (N, C, size, size) in [-1, 1]."""

    x: torch.Tensor  # normal images to train on
    x_held: torch.Tensor  # normal images that no net is trained on
    x_test: torch.Tensor  # all test images
    y_test: list  # for each test image, whether it is an anomaly
    kinds: list  # for each test image, its class
    normal: str  # the normal class
    source: str  # the name of the data set or folder
    training_images: str  # a hash of x: runs with one hash have trained on the same images
    evaluation_images: str  # a hash of x_held, x_test and kinds


FORMATS = Image.registered_extensions().items()
IMAGE_SUFFIXES = {suffix for suffix, name in FORMATS if name in Image.OPEN}


def image_files(folder, inside=()):
    """A folder's images and its subfolders', sorted: files whose names end as those that Pillow
    reads. Names that begin with "." are skipped; names that begin with "@" (hidden on a NAS) and
    other files are skipped and counted on stderr. Links are followed, but not into a folder that is
    being walked (inside): that would have no end."""
    real = os.path.realpath(folder)
    if real in inside:
        return []
    images, left_out = [], 0
    for name in sorted(os.listdir(folder)):
        path = Path(folder, name)
        if name.startswith("."):
            continue
        if name.startswith("@"):
            left_out += 1
        elif path.is_dir():
            images += image_files(path, (*inside, real))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            images.append(path)
        else:
            left_out += 1
    if left_out:
        warn(f"{folder}: left out {left_out}, hidden or not named as an image")
    return images


def read_image(path, size):
    """An image file as uint8 (3, size, size), turned upright by its EXIF flag, on white where it is
    transparent. Raises OSError."""
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):  # grey, which Pillow would clip to 255
            raise ValueError("it has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGBA").resize((size, size), Image.BILINEAR)
        white = Image.new("RGBA", image.size, "white")
        return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))
    except Exception as error:  # decoders raise exceptions of many kinds
        raise OSError(f"{path} cannot be used as an image ({error}): mend or remove it") from error


def load_folder(root, size):
    """The images in root/CLASS/, as MVTec AD has them: uint8 (N, 3, size, size), the class of each.
    Raises OSError."""
    files = image_files(root) if root.is_dir() else []
    x = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    kinds = []
    for index, file in enumerate(files):
        if file.parent == root:
            raise OSError(f"{file} is in no class: move it into a folder {root}/CLASS")
        x[index] = read_image(file, size)
        kinds.append(file.relative_to(root).parts[0])
    return x, kinds


def load_digits(split):
    """scikit-learn's digits, grey (N, 8, 8), the target of each, and all classes. They come as one:
    a third of each class is for the test."""
    digits = datasets.load_digits()
    x = (digits.images * 255 / 16).astype("uint8")  # of 0 to 16
    x_train, x_test, targets_train, targets_test = model_selection.train_test_split(
        x, digits.target, test_size=1 / 3, stratify=digits.target, random_state=0
    )
    if split == "train":
        return x_train, targets_train, list("0123456789")
    return x_test, targets_test, list("0123456789")


def load_torchvision(name, root, split):
    """A split of a torchvision data set: grey (N, height, width) or colour (N, height, width, 3),
    the target of each image, and all classes. Raises OSError."""
    try:
        load = getattr(torchvision.datasets, name)
        data = load(root, train=split == "train", download=True)
    except Exception as error:  # no network, a missing file, broken bytes
        what = "go online once, or, if it is there but damaged, delete it"
        raise OSError(f"no {name} in {root} ({error}): {what}") from error
    return data.data, data.targets, data.classes


def load_split(options, split):
    """The split "train" or "test" of a data set: images, uint8 (N, C, size, size), C is 3 for
    CIFAR-10 and folders, else 1; the class of each; all classes. Raises OSError."""
    if options.dataset == "folder":
        x, kinds = load_folder(Path(options.data, split), options.size)
        return x, kinds, sorted(set(kinds))
    if options.dataset == "digits":
        x, targets, classes = load_digits(split)
    else:
        names = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10"}
        x, targets, classes = load_torchvision(names[options.dataset], options.data, split)
    x = torch.as_tensor(x)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    x = resize(x, [options.size, options.size])
    return x, [classes[target] for target in targets], classes


def without_copies(x):
    """Images without those that equal an earlier one, which are counted on stderr. If an image were
    trained on and its copy held out, the p-values would be wrong."""
    seen, kept = set(), []
    for index, image in enumerate(x):
        pixels = image.numpy().tobytes()
        if pixels not in seen:
            seen.add(pixels)
            kept.append(index)
    if len(kept) < len(x):
        warn(f"{len(x) - len(kept)} training images equal another one: they are left out")
    return x[kept]


def hash_of(*things):
    """A hash of tensors and lists, of 16 letters."""
    sha = hashlib.sha256()
    for thing in things:
        sha.update(str(thing).encode() if isinstance(thing, list) else thing.numpy().tobytes())
    return sha.hexdigest()[:16]


def load_task(options):
    """The Task of a run. Raises UsageError for an unknown class or too few images, OSError for
    unusable data."""
    x, kinds, classes = load_split(options, "train")
    x_test, test_kinds, _ = load_split(options, "test")
    normal = options.normal
    source = where = options.dataset
    if options.dataset == "folder":
        source = Path(options.data).resolve().name
        where = Path(options.data, "train").resolve()
    elif normal.isdecimal() and int(normal) < len(classes):
        normal = classes[int(normal)]
    if normal not in classes:
        hint = "" if options.dataset == "folder" else "; for your own images: --dataset folder"
        names = ", ".join(classes) or "none"
        raise UsageError(f"--normal {normal}: the classes in {where} are: {names}{hint}")
    x = x[[kind == normal for kind in kinds]]
    if options.dataset == "folder":
        x = without_copies(x)
    # The last images are held out, not some at random: neighbours may be alike. (Rounded, since
    # 1 - 0.9 is less than 0.1.)
    n = int(round((1 - options.holdout) * len(x), 6))
    if n < 10:
        counts = f"{len(x)} different images of {normal}, {n} of them to train on"
        raise UsageError(f"{counts}: at least 10 are needed")
    scaled = x.float() / 127.5 - 1
    return Task(
        x=scaled[:n].to(options.device),
        x_held=scaled[n:].to(options.device),
        x_test=(x_test.float() / 127.5 - 1).to(options.device),
        y_test=[kind != normal for kind in test_kinds],
        kinds=test_kinds,
        normal=normal,
        source=source,
        training_images=hash_of(x[:n]),
        evaluation_images=hash_of(x[n:], x_test, test_kinds),
    )


# ----------------------------------------------------------------------------------------- detector
class Detector(nn.Module):
    """What is used of a student in the end [ours]: its generator, whose r = z - z_hat is made into
    a score and a p-value. The files student.pt and student.pt2 hold one.

    The score is r's Mahalanobis length sqrt((r - m)' S^-1 (r - m)) = ||(r - m) W||_2, where m and S
    are the mean and covariance of r on the training images, and W W' = S^-1 ("whitening"). S is
    shrunk (Ledoit, Wolf 2004): there may be fewer images than numbers in r.
    The p-value is (1 + number of held-out images that score at least as high) / (1 + number of
    held-out images): conformal prediction (Vovk et al. 2005, Bates et al. 2023). For new images
    drawn like the held-out ones, P(p <= alpha) <= alpha. If none are held out, p is 1.
    """

    def __init__(self, size, channels, width, z_dim, held_out):
        super().__init__()
        self.config = {"size": size, "channels": channels, "width": width, "z_dim": z_dim}
        self.config |= {"held_out": held_out}
        self.g = Generator(size, channels, width, z_dim)
        self.register_buffer("mean", torch.zeros(z_dim))
        self.register_buffer("whitener", torch.eye(z_dim))
        self.register_buffer("held_out_scores", torch.zeros(held_out))  # sorted
        # p_values[k] is the p-value of a score that is higher than exactly k of the held-out ones.
        # It is looked up: if forward() computed it in float64, an exported file would be bound to
        # one device.
        at_least_as_high = torch.arange(held_out, -1, -1, dtype=torch.float64)
        self.register_buffer("p_values", (1 + at_least_as_high) / (1 + held_out))
        self.requires_grad_(False)

    def forward(self, x):
        """Images x (B, C, size, size) in [-1, 1] -> scores (B,), high is anomalous, and their
        p-values (B,), float64."""
        out = self.g(x)
        scores = ((out.z - out.z_hat - self.mean) @ self.whitener).norm(dim=1)
        # Scores that differ by rounding alone, on another device, count as equal.
        below = torch.searchsorted(self.held_out_scores, scores * (1 - 1e-5))
        return scores, self.p_values[below]


def make_detector(student, x, x_held, settings):
    """The Detector (on the CPU) of a student that was trained on x; x_held: images held out."""
    detector = Detector(x.shape[3], x.shape[1], settings.student_width, settings.z_dim, len(x_held))
    detector.g.load_state_dict(student.g.state_dict())
    r = residuals(student, x).cpu().double()
    if not r.isfinite().all():
        raise FloatingPointError("codes are no numbers: lower the learning rates")
    model = covariance.LedoitWolf().fit(r)
    whitener = torch.linalg.cholesky(torch.tensor(model.precision_))
    detector.mean.copy_(torch.tensor(model.location_))
    detector.whitener.copy_(whitener)
    scores, _ = detect(detector, x_held)  # its p-values mean nothing yet
    detector.held_out_scores.copy_(scores.sort().values)
    return detector


def detect(detector, x):
    """A detector's scores and p-values of any number of images, computed in parts on the CPU."""
    if len(x) == 0:
        return torch.empty(0), torch.empty(0, dtype=torch.float64)
    outs = [detector(batch) for batch in small_batches(x.cpu())]
    return torch.cat([scores for scores, _ in outs]), torch.cat([p for _, p in outs])


def held_out_needed(alpha):
    """How many images have to be held out for p-values to reach alpha: 1 / (1 + n) <= alpha.
    By hand: held_out_needed(0.05) = 19"""
    return math.ceil(round(1 / alpha, 6)) - 1


def too_few_message(alpha, held_out):
    """What to tell the user if too few images are held out for verdicts at alpha."""
    needed = held_out_needed(alpha)
    return f"no verdicts: alpha {alpha} needs {needed} held out (--holdout), only {held_out} are"


def false_alarms(rank, held_out):
    """The 5 % and 95 % quantiles, found by sampling, of the percentage of new normal images that
    score above the rank-th highest of the held-out scores: their share is distributed as
    Beta(rank, held_out + 1 - rank)."""
    shares = torch.distributions.Beta(float(rank), held_out + 1.0 - rank).sample((100_000,))
    return (100 * shares.quantile(torch.tensor([0.05, 0.95]))).tolist()


# --------------------------------------------------------------------------------------- evaluation
def auroc(scores, y):
    """AUROC in percent of scores (N,), given y (N,): true for an anomaly, false for a normal image,
    and both occur. Raises FloatingPointError for scores that are no numbers."""
    if not scores.isfinite().all():
        raise FloatingPointError("scores are no numbers: lower the learning rates")
    return 100 * metrics.roc_auc_score(y, scores.cpu())


class Progress:
    """Prints a line at each tenth of a stage, and keeps the same numbers in curve."""

    def __init__(self, task, stages):
        every = max(1, math.ceil(len(task.x_test) / 1000))  # spread over the test images
        self.x_test, self.y_test = task.x_test[::every], task.y_test[::every]
        self.stages, self.curve = stages, []
        self.began = monotonic()

    def report(self, stage, net, update, updates, loss_d, loss_g):
        """What train_stages() calls. The AUROC is that of at most 1,000 test images."""
        point = {"stage": stage, "update": update, "loss_d": loss_d, "loss_g": loss_g}
        text = ""
        if len(set(self.y_test)) == 2:
            point["auroc"] = auroc(score(net, self.x_test), self.y_test)
            text = f"AUROC {point['auroc']:.2f} | "
        self.curve.append(point)
        number = f"{self.stages.index(stage) + 1}/{len(self.stages)}"
        losses = f"loss_D {loss_d:.3f} loss_G {loss_g:.3f}"
        seconds = (monotonic() - self.began) * (updates / update - 1)
        left = f"{seconds:.0f} s left of stage {number}"
        print(f"{stage}: update {update}/{updates} | {losses} | {text}{left}")
        if update == updates:
            self.began = monotonic()


def pca_scores(task):
    """The scores of x_test by a baseline without nets, and their p-values: PCA's reconstruction
    error (90 % of the variance, at 32 x 32), compared with that of the held-out images."""
    x, x_held, x_test = [
        F.adaptive_avg_pool2d(images, 32).flatten(1).cpu()
        for images in (task.x, task.x_held, task.x_test)
    ]
    x_new = torch.cat([x_held, x_test])
    pca = decomposition.PCA(0.9, svd_solver="covariance_eigh").fit(x)
    errors = x_new - torch.tensor(pca.inverse_transform(pca.transform(x_new)))
    held_out_scores, scores = errors.square().sum(1).split([len(x_held), len(x_test)])
    below = torch.searchsorted(held_out_scores.sort().values, scores)
    return scores, (1 + len(x_held) - below).double() / (1 + len(x_held))


def cost(gan, x):
    """The number of a GAN's parameters, and the FLOPs of its convolutions and linear layers on one
    image; G's and D's together."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gan.d(gan.g(x[:1]).x_hat)
    return sum(weight.numel() for weight in gan.parameters()), counter.get_total_flops()


def table_of_kinds(task, scores, p_values, alphas):
    """For each class in the test: the number of its images, the AUROC in percent of telling it from
    the normal class, and the percentage flagged at each alpha for which enough are held out."""
    table = {}
    for kind in sorted(set(task.kinds)):
        is_kind = torch.tensor([k == kind for k in task.kinds])
        is_normal = torch.tensor([k == task.normal for k in task.kinds])
        row = {"images": int(is_kind.sum()), "auroc": None, "flagged": {}}
        if kind != task.normal and is_normal.any():
            both = is_kind | is_normal
            row["auroc"] = auroc(scores[both], is_kind[both])
        for alpha in alphas:
            if len(task.x_held) >= held_out_needed(alpha):
                flagged = (p_values[is_kind] <= alpha).double().mean()
                row["flagged"][str(alpha)] = round(100 * flagged.item(), 1)
        table[kind] = row
    return table


def evaluate(nets, scores, detector, task, options):
    """A run's figures, as they stand in result.json. scores: those of the test images, by stage."""
    held_out = len(task.x_held)
    result = {"auroc": {}, "auroc_detector": None, "baselines": {}, "kinds": {}, "kinds_pca": {}}
    if len(task.x_test):
        alphas = sorted({*ALPHAS, options.alpha})
        detector_scores, detector_p_values = detect(detector, task.x_test)
        scores_of_pca, p_values_of_pca = pca_scores(task)
        result["kinds"] = table_of_kinds(task, detector_scores, detector_p_values, alphas)
        result["kinds_pca"] = table_of_kinds(task, scores_of_pca, p_values_of_pca, alphas)
    if len(set(task.y_test)) == 2:
        for stage in scores:
            result["auroc"][stage] = auroc(scores[stage], task.y_test)
        if "student_alone" in scores and "step2" in scores:
            result["auroc"]["gain"] = result["auroc"]["step2"] - result["auroc"]["student_alone"]
        result["auroc_detector"] = auroc(detector_scores, task.y_test)
        result["baselines"]["pca"] = auroc(scores_of_pca, task.y_test)
    result["images"] = {"train": len(task.x), "held_out": held_out, "test": len(task.x_test)}
    # A score is flagged if it is higher than the rank-th highest of the held-out ones. (Rounded,
    # since 0.29 * 100 is 28.999999999999996.)
    rank = int(round(options.alpha * (1 + held_out), 6))
    result["threshold"] = detector.held_out_scores[-rank].item() if rank else None
    result["false_alarms"] = false_alarms(rank, held_out) if rank else None
    params_t, flops_t = cost(nets["teacher"], task.x)
    params_s, flops_s = cost(nets["step2"], task.x)
    result["params"] = {"teacher": params_t, "student": params_s}
    result["flops"] = {"teacher": flops_t, "student": flops_s}
    result["ratio"] = flops_t / flops_s
    result["device"] = f"{options.device}, {torch.get_num_threads()} threads, {torch.__version__}"
    return result


def print_columns(name, values):
    """Print a line of a table: a name and values, aligned."""
    print(f"{name:13}" + "".join(f"{value:>7}" for value in values))


def print_kinds(name, table, result):
    """Print a table of kinds: that of the detector or of PCA, by name."""
    alphas = sorted({*ALPHAS, result["alpha"]}) if result["images"]["held_out"] else []
    title = f"{name} by kind of test image ({result['normal']} is normal)"
    if alphas:
        title += ", % flagged at alpha"
    print(f"\n{title}:")
    print_columns("kind", ["images", "AUROC", *alphas])
    for kind, row in table.items():
        auroc_text = "-" if row["auroc"] is None else f"{row['auroc']:.2f}"
        flagged = [row["flagged"].get(str(a), "-") for a in alphas]
        print_columns(kind, [row["images"], auroc_text, *flagged])


def print_result(result):
    """Print what a run found."""
    if result["auroc"]:
        print("\nAUROC in %")
        for stage in STAGES:
            if stage in result["auroc"]:
                print_columns(stage, [f"{result['auroc'][stage]:.2f}"])
        print_columns("detector", [f"{result['auroc_detector']:.2f}", "  step2, whitened"])
        print_columns("PCA", [f"{result['baselines']['pca']:.2f}", "  a baseline without nets"])
    else:
        print("\nno AUROC: the test images are all normal, all anomalies, or none")
    print(f"The teacher takes {result['ratio']:.0f} times as many FLOPs as the student.")

    held_out, alpha = result["images"]["held_out"], result["alpha"]
    if result["kinds"]:
        print_kinds("The detector", result["kinds"], result)
    if held_out and result["threshold"] is None:
        print(too_few_message(alpha, held_out))
    elif held_out:
        low, high = result["false_alarms"]
        print(f"{held_out} held out: alpha {alpha} flags scores above {result['threshold']:.4g},")
        print(f"{low:.0f} to {high:.0f} % of new normal images (nine times in ten).")
    if result["kinds_pca"] and held_out:
        print_kinds("PCA", result["kinds_pca"], result)


def four_of(items):
    """At most four items, spread over a list: folders are sorted by class."""
    n = min(4, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def draw_samples(nets, task):
    """A picture: normal test images on the left, anomalies on the right, four each, in three rows:
    the image, the teacher's reconstruction, the student's; below, class and the student's score."""
    normal = [i for i, anomaly in enumerate(task.y_test) if not anomaly]
    anomalies = [i for i, anomaly in enumerate(task.y_test) if anomaly]
    shown = four_of(normal) + four_of(anomalies)
    x, kinds = task.x_test[shown], [task.kinds[i] for i in shown]
    if not normal:  # then some of those that were trained on
        x, kinds = torch.cat([task.x[:4], x]), [task.normal] * 4 + kinds
    student = nets["step2"]
    scores = score(student, x).tolist()
    with torch.no_grad():
        rows = torch.stack([x, nets["teacher"].g(x).x_hat, student.g(x).x_hat], dim=1)
    side = max(96, task.x.shape[3])  # of an image in the picture
    pitch, margin = side + 4, 95  # from image to image; at the left, for the names of the rows
    picture = Image.new("RGB", (margin + len(x) * pitch + 12, 3 * pitch + 58), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(["image", "teacher", "student"]):
        draw.text((4, row * pitch + side // 2 - 13), name, fill="black", font_size=22)
    draw.text((4, 3 * pitch), "class\nscore", fill="black", font_size=22)
    for column, images in enumerate(rows.cpu()):
        left = margin + column * pitch + (12 if kinds[column] != task.normal else 0)
        for row, image in enumerate(images):
            tile = to_pil_image(image / 2 + 0.5).resize((side, side), Image.NEAREST)
            picture.paste(tile, (left, row * pitch))
        label = f"{kinds[column][:9]}\n{scores[column]:.2f}"
        draw.text((left + 4, 3 * pitch), label, fill="black", font_size=22)
    return picture


# -------------------------------------------------------------------------------------------- files
def describe(options, settings, task):
    """What a run is. Runs of one description have one result, on one CPU with one version of torch
    and one number of threads, as long as the file that --teacher names is the same."""
    return {
        "version": VERSION,
        "dataset": options.dataset,
        "source": task.source,
        "normal": task.normal,
        "seed": settings.seed,
        "size": options.size,
        "holdout": options.holdout,
        "training_images": task.training_images,
        "evaluation_images": task.evaluation_images,
        "teacher": options.teacher,
        "alpha": options.alpha,
        "settings": asdict(settings),
    }


def flattened(run):
    """A run's describe(), or a result that holds it, with each setting as an entry of its own."""
    return {name: value for name, value in run.items() if name != "settings"} | run["settings"]


def differences(one, other):
    """["NAME VALUE, not VALUE"] of what differs between two dicts, for the names in the first."""
    return [f"{k} {one[k]}, not {other.get(k)}" for k in one if one[k] != other.get(k)]


def read_result(file):
    """The content of a result.json; None, and a line on stderr, if it is no run's."""
    try:
        result = json.loads(file.read_text())
        if not {"version", "settings", "auroc", "source"} <= result.keys():
            raise ValueError("it is of no run")
        return result
    except (OSError, ValueError, AttributeError) as error:
        warn(f"{file} cannot be read ({error})")


def claim_folder(folder, description):
    """Make the folder of a run of a description, and check that it is writable. Raises UsageError
    if the folder has the result of another run, OSError if it is not writable."""
    before = read_result(folder / "result.json") if (folder / "result.json").exists() else None
    if before is not None:
        others = differences(flattened(description), flattened(before))
        if others:
            raise UsageError(f"{folder} has another run ({'; '.join(others)}): name another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} is not writable ({error}): name another --out") from error


def save(folder, nets, scores, detector, task, description, result):
    """Write the files of a run. Each appears whole. result.json marks a whole run: the old one is
    deleted first, and the new one moved in last. Raises OSError."""
    files = {name: io.BytesIO() for name in FILES}
    weights = {}
    for name, gan in nets.items():
        weights[name] = {key: value.cpu() for key, value in gan.state_dict().items()}
    saved = description | {"file": "nets.pt", "channels": task.x.shape[1], "nets": weights}
    saved |= {"test_scores": scores, "test_labels": task.y_test}
    torch.save(saved, files["nets.pt"])

    saved = {"file": "student.pt", "version": VERSION, "config": detector.config}
    torch.save(saved | {"weights": detector.state_dict()}, files["student.pt"])

    example = torch.zeros(2, *task.x.shape[1:])
    shapes = ({0: torch.export.Dim.DYNAMIC},)  # any number of images
    program = torch.export.export(detector, (example,), dynamic_shapes=shapes)
    config = {"config.json": json.dumps(detector.config)}
    torch.export.save(program, files["student.pt2"], extra_files=config)

    draw_samples(nets, task).save(files["samples.png"], format="png")
    files["result.json"].write(json.dumps(result, indent=1).encode())

    with tempfile.TemporaryDirectory(dir=folder) as new:
        for name, content in files.items():
            Path(new, name).write_bytes(content.getvalue())
        Path(folder, "result.json").unlink(missing_ok=True)
        for name in FILES:
            Path(new, name).replace(folder / name)


def load_file(path, name):
    """The content of a run's file nets.pt or student.pt. Raises OSError for anything else."""
    if Path(path).suffix == ".pt2":
        raise OSError(f"{path} is for torch.export.load(): here, name the {name} beside it")
    try:
        with open(path, "rb") as file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["file"] != name or saved["version"] != VERSION:
            raise ValueError(f"it is a {saved['file']} of version {saved['version']}")
    except Exception as error:  # torch raises exceptions of many kinds on what is foreign
        raise OSError(f"{path} is no {name} of version {VERSION} ({error!r:.80})") from error
    return saved


def load_nets(path):
    """The GANs in a nets.pt, named as by train_stages(), on the CPU; and a dict of what else is in
    there: the run's describe(), test_scores and test_labels. Raises OSError."""
    saved = load_file(path, "nets.pt")
    settings = Settings(**saved["settings"])
    nets = {}
    for name, weights in saved.pop("nets").items():
        width = settings.teacher_width if name.startswith("teacher") else settings.student_width
        nets[name] = GAN(saved["size"], saved["channels"], width, settings.z_dim)
        nets[name].load_state_dict(weights)
    return nets, saved


def load_detector(path):
    """The Detector in a student.pt, on the CPU. Raises OSError."""
    saved = load_file(path, "student.pt")
    detector = Detector(**saved["config"])
    detector.load_state_dict(saved["weights"])
    return detector


def load_teacher(place, subfolders, description):
    """The teacher of an earlier run, and the Settings of that run.

    place: the nets.pt of that run, its folder, or the folder of many runs
    subfolders: where that run may be in the folder of many runs
    description: that of the run which needs a teacher
    Raises OSError, and UsageError for a teacher of other images or another size.
    """
    places = [Path(place), Path(place, "nets.pt")]
    places += [Path(place, name, "nets.pt") for name in subfolders]
    found = [path for path in places if path.is_file()]
    if not found:
        raise OSError(f"no nets.pt in {place}, nor in {' or '.join(subfolders)} below it")
    file = found[0]
    nets, saved = load_nets(file)
    names = ["normal", "size", "teacher_width", "z_dim", "training_images"]
    needed = {name: flattened(description)[name] for name in names}
    others = differences(needed, flattened(saved))
    if others:
        raise UsageError(f"{file}: this run needs a teacher of {'; '.join(others)}")
    return nets["teacher"], Settings(**saved["settings"])


# ----------------------------------------------------------------------------------------- program
def check_device(device):
    """Raises UsageError for a device that cannot be used."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {error}") from error


def run(options, settings):
    """Train, evaluate, print and save. Raises UsageError, OSError and FloatingPointError."""
    check_device(options.device)
    task = load_task(options)
    name = f"{task.source}-{options.normal}-seed{settings.seed}".replace("/", "-")
    folder = Path(options.out or f"runs/{name}")
    n, held_out, test = len(task.x), len(task.x_held), len(task.x_test)
    counts = f"{n + held_out} images of {task.normal}: {n} to train on, {held_out} held out"
    print(f"{counts}; {test} test images; on {options.device}, into {folder}")
    description = describe(options, settings, task)
    teacher, stages = None, STAGES
    if options.teacher:
        teacher, earlier = load_teacher(options.teacher, [name, folder.name], description)
        teacher, stages = teacher.to(options.device), STAGES[1:]
        settings = replace(  # the result is to tell how long and at what rate its teacher trained
            settings, teacher_updates=earlier.teacher_updates, lr_teacher=earlier.lr_teacher
        )
        description = describe(options, settings, task)
    both_steps = settings.step1_updates + settings.step2_updates
    if both_steps and settings.alone_updates not in (0, both_steps):
        lengths = f"{settings.alone_updates} updates, both steps for {both_steps}"
        warn(f"the student alone trains for {lengths}: the gain compares unequal lengths")
    claim_folder(folder, description)

    began = monotonic()
    progress = Progress(task, stages)
    nets = train_stages(task.x, settings, progress.report, teacher)
    updates = {
        "teacher": settings.teacher_updates,
        "student_alone": settings.alone_updates,
        "step1": settings.step1_updates,
        "step2": both_steps,
    }
    scores = {}
    for stage in STAGES:
        if updates[stage] > 0:  # the score of an untrained net would say nothing
            scores[stage] = score(nets[stage], task.x_test).cpu()
    detector = make_detector(nets["step2"], task.x, task.x_held, settings)
    result = description | evaluate(nets, scores, detector, task, options)
    result |= {"seconds": monotonic() - began, "curve": progress.curve}
    print_result(result)
    save(folder, nets, scores, detector, task, description, result)
    student = shlex.quote(f"{folder}/student.pt")
    print(f"next: python pkdgan.py --score {student} --alpha {options.alpha} IMAGES")


def score_images(student, paths, alpha):
    """Print path, score, p-value and verdict of image files, also of those in folders. The verdict
    is "anomaly" if p <= alpha, else "-"; "?" if too few images were held out to tell. Returns the
    exit code: 1 if a file could not be read, else 0. Raises OSError."""
    detector, failed = load_detector(student), 0
    held_out = detector.config["held_out"]
    enough = held_out >= held_out_needed(alpha)
    if not enough:
        warn(too_few_message(alpha, held_out))
    files = []
    for path in paths:
        files += image_files(path) if os.path.isdir(path) else [path]
    if not files:
        raise OSError("no images to score: name files or folders")
    print("path\tscore\tp-value\tverdict")
    for file in files:
        try:
            x = read_image(file, detector.config["size"])[None] / 127.5 - 1
        except OSError as error:
            warn(error)
            failed = 1
            continue
        if detector.config["channels"] == 1:
            x = x.mean(1, keepdim=True)
        scores, p_values = detector(x)
        p = p_values.item()
        verdict = "-"
        if not enough:
            verdict = "?"
        elif p <= alpha:
            verdict = "anomaly"
        print(f"{file}\t{scores.item():.4g}\t{p:.4g}\t{verdict}")
    return failed


def table_title(result):
    """The title of a run's table: its data, by name, and the settings that are not the data set's
    own. Runs of one title differ only in class, seed, device and alpha. (Folders of the same name
    are not told apart.)"""
    values, defaults = flattened(result), asdict(EXPERIMENTS[result["dataset"]])
    defaults |= {"version": VERSION, "size": 32, "holdout": 0.0, "teacher": ""}
    title = result["source"]
    if result["dataset"] == "folder":
        defaults["holdout"] = HOLDOUT_OF_A_FOLDER
        title = f"folder {title}"
    for name, default in defaults.items():
        if name != "seed" and values.get(name) != default:
            title += f", {name} {values.get(name)}"
    return title


def print_tables(folder):
    """Print the results in a folder, at any depth, as tables in Markdown: a table for each set of
    settings, a row for each class, the mean over its seeds ± their standard deviation, and n. The
    last row has the mean over classes, of the seeds that have all of them. Raises OSError."""
    tables = {}  # {title: {class: {seed: {column: AUROC}}}}
    for file in sorted(Path(folder).rglob("result.json")):
        result = read_result(file)
        if result is None or not result["auroc"]:
            continue
        figures = dict(result["auroc"])
        figures["detector"], figures["PCA"] = result["auroc_detector"], result["baselines"]["pca"]
        rows = tables.setdefault(table_title(result), {})
        runs = rows.setdefault(result["normal"], {})
        if result["seed"] in runs:
            warn(f"{file} is the second of its class, seed and settings: left out")
            continue
        runs[result["seed"]] = figures
    if not tables:
        raise OSError(f"no results with an AUROC in {folder}")
    columns = [*STAGES, "gain", "detector", "PCA"]
    for title, rows in tables.items():
        print(f"\n{title}\n\n| class | {' | '.join(columns)} | n |")
        print("|---" * (len(columns) + 2) + "|")
        for kind in sorted(rows):
            print_row(kind, columns, list(rows[kind].values()))
        means = []
        for seed in set.intersection(*[set(seeds) for seeds in rows.values()]):
            figures = [seeds[seed] for seeds in rows.values()]
            known = [c for c in columns if all(c in figure for figure in figures)]
            means.append({c: statistics.mean(figure[c] for figure in figures) for c in known})
        print_row(f"mean of {len(rows)}", columns, means)


def print_row(name, columns, runs):
    """Print a row of a table in Markdown: mean ± standard deviation over runs {column: value}."""
    cells = []
    for column in columns:
        values = [figures[column] for figures in runs if column in figures]
        cell = f"{statistics.mean(values):.2f}" if values else "-"
        if len(values) > 1:
            cell += f" ± {statistics.stdev(values):.2f}"
        cells.append(cell)
    print(f"| {name} | {' | '.join(cells)} | {len(runs)} |")


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        """Exit with 2."""
        self.exit(2, f"pkdgan.py: {message}\n")


def flag_of(name):
    """The flag of a field of Options or Settings."""
    return f"--{name.replace('_', '-')}"


def add_flags(group, values):
    """Give a parser a flag for each field of Options or Settings; values has their defaults."""
    for item in fields(values):
        default = getattr(values, item.name)
        text = item.metadata["text"]
        if default != "":
            text += f" ({default})"
        group.add_argument(flag_of(item.name), type=item.type, default=default, help=text)


def values_from(args, values, parser):
    """Options or Settings with the values in args. Exits with 2 if one is out of its range."""
    given = {}
    for item in fields(values):
        value = getattr(args, item.name)
        low, high = item.metadata["low"], item.metadata["high"]
        if item.type is not str and not low <= value < high:
            parser.error(f"{flag_of(item.name)} {value}: give at least {low}, and less than {high}")
        given[item.name] = value
    return replace(values, **given)


def parse(argv):
    """What a command line says: its arguments, and the Options and Settings of a run. Flags that
    are not given keep the values of the data set, which --help shows. Bad usage exits with 2."""
    dataset_parser = Parser(add_help=False, allow_abbrev=False)
    dataset_parser.add_argument("--dataset", choices=EXPERIMENTS, default="digits")
    dataset = dataset_parser.parse_known_args(argv)[0].dataset
    options, settings = Options(dataset), EXPERIMENTS[dataset]
    if dataset == "folder":
        options.holdout = HOLDOUT_OF_A_FOLDER
    parser = Parser(
        usage="python pkdgan.py [FLAGS] [IMAGES]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("instead of training")
    group.add_argument("images", metavar="IMAGES", nargs="*", help="of --score")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--score", metavar="STUDENT.PT", help="score IMAGES: files and folders")
    modes.add_argument("--table", metavar="FOLDER", help="print the results of a folder of runs")
    add_flags(parser.add_argument_group("a run"), options)
    add_flags(parser.add_argument_group(f"the method, with the values of {dataset}"), settings)
    args = parser.parse_intermixed_args(argv)
    if args.images and args.score is None:
        parser.error(f"{args.images[0]}: images are for --score STUDENT.PT")
    if args.size not in SIZES:
        parser.error(f"--size {args.size} is not one of {SIZES}")
    options, settings = values_from(args, options, parser), values_from(args, settings, parser)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args, options, settings


def main(argv):
    """The program. Returns its exit code: 0, 1 for a failure, 2 for bad usage, 130 for Ctrl-C."""
    args, options, settings = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 on CUDA, too, as on a CPU
    if "OMP_NUM_THREADS" not in os.environ:  # more are hardly faster, and wait for one another
        torch.set_num_threads(1)
    try:
        if args.table is not None:
            print_tables(args.table)
        elif args.score is not None:
            return score_images(args.score, args.images, options.alpha)
        else:
            run(options, settings)
    except BrokenPipeError:  # "| head" has seen enough
        os._exit(1)  # sys.exit() would try to write again
    except KeyboardInterrupt:
        warn("interrupted; no file is half-written")
        return 130
    except UsageError as error:
        warn(error)
        return 2
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        warn(error)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
    sys.exit(main(sys.argv[1:]))
