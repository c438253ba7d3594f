"""The settings of one distillation run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from stablekd_fast.blocks.reused import name_of
from stablekd_fast.cache import CacheSettings
from stablekd_fast.data import BATCHES_AHEAD, SourceName
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings, Interpolation
from stablekd_fast.engine.schedule import RECIPES, Optimizer, Stage
from stablekd_fast.errors import ConfigError
from stablekd_fast.models.registry import REUSING
from stablekd_fast.objectives import Objectives, SynthesisObjective, method_named, objective


@dataclass
class DistillConfig:
    """Everything that decides a run's numbers, and where they go."""

    data: str = "digits"
    """A data set: `digits` (embedded), cifar10, cifar100, fashion-mnist, imagenette, imagewoof, imagenet, or a path: a
    folder of images, of WebDataset tars or of TFRecords, a CIFAR / MNIST archive, or an .npz file. Images need no
    labels: any folder that has some in it, a .txt file of paths, a .tar. Several of these with commas between them are
    one data set."""
    teacher: str = "resnet56"
    """The teacher's name: that of a CIFAR model, torchvision/NAME or timm/NAME. With published weights, which are
    fetched unless they are on this machine: torchvision/NAME@WEIGHTS, timm/NAME@WEIGHTS (`pretrained` are the default
    ones), hf:OWNER/NAME or hf:FOLDER."""
    teacher_weights: str | None = None
    """The teacher's weights: a safetensors file or a PyTorch one. All methods but ce need them, or published ones."""
    student: str = "resnet20"
    """The student's name, as for the teacher; with published weights, it starts from them."""
    teacher_mean: list[float] | None = None
    """By which the teacher's images are normalised, per channel of 0 to 1; None takes what its weight file or timm
    says, else the data set's."""
    teacher_std: list[float] | None = None
    """As `teacher_mean`, the standard deviations."""
    teacher_image_size: int | None = None
    """The side in pixels of the teacher's images; None takes the size that the teacher is tied to or was trained at,
    else the student's."""
    student_weights: str | None = None
    """Start the student from these weights instead of at random."""
    head: Literal["classifier", "embedding", "none"] = "classifier"
    """What both networks end in. `classifier`: logits. `embedding`: the classifier of networks by name is taken off,
    and the student's embedding is compared with the teacher's. `none`: it is taken off, and features at cuts are all
    that is compared. Networks that are given as modules are taken as they are; no label is read but of a classifier."""
    method: str = "stablekd"
    """stablekd, kd, kd+features, blocks, ce, or a method of the field by its name; docs/objectives.md lists them."""
    recipe: str = "default"
    """`default`, `progressive` for merging neighbours two by two, `paper` for the schedule of the authors' draft,
    `paper-end-to-end` for its extension."""
    epochs: float = 8.0
    """How often the training images are gone through; fractions are allowed."""
    subset: float | None = None
    """Training images to use, with the classes in the proportions of the whole: a count above 1, or a fraction."""
    subset_seed: int = 0
    """Decides which images are held out, and which make the subset."""
    validation: float = 0.04
    """Training images held out for the live metric, a count or a fraction; 0 for none. A data set that has validation
    images of its own beside a test split holds out those instead."""
    batch_size: int = 64
    """Images of a batch, of all ranks together."""
    image_size: int | None = None
    """The side in pixels to which all images are brought; None keeps small ones (up to 64 pixels) as they are, and
    trains on large ones at 224."""
    views: int | None = None
    """Distinct augmented views per image, reused in turn; None draws a new one each epoch."""
    mean: list[float] | None = None
    """By which images are normalised, per channel of 0 to 1; None takes those of the data set. The student keeps
    them on its card."""
    std: list[float] | None = None
    """As `mean`, the standard deviations."""
    flip: bool | None = None
    """Mirror one half of the training images; None does it where it suits the data set (not to digits)."""
    crop: CropSettings = field(default_factory=CropSettings)
    """How training images are cropped."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """Random operations on training images."""
    interpolation: Interpolation = "bilinear"
    """How large images are scaled, for training and evaluation; always with antialiasing."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """How large images are made ready for evaluation."""
    jitter: float = 0.0
    """Strength of colour jitter: 0.4 varies brightness, contrast and saturation by 40%."""
    mix: Literal["mixup", "cutmix"] | None = None
    """Mix every training image with another one, and their labels alike."""
    mix_alpha: float = 1.0
    """The mix weights are drawn from Beta(alpha, alpha)."""
    scaled_decode: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size where the crop allows: faster, other
    pixels."""
    seed: int = 0
    """Decides the first weights and the order of images."""
    view_seed: int | None = None
    """Names the views; the seed does if it is None. Runs of other seeds can share a cache if they share this."""
    cuts: list[Any] | None = None
    """Modules after which to cut; None finds cuts automatically."""
    blocks: int | None = None
    """How many blocks to cut into; None makes one per spatial size, and the classifier."""
    bridge: str = "select"
    """How the map between different widths is fitted: select, average or pca; none, where no loss needs it."""
    align: Literal["ends", "all"] = "all"
    """After a merge, align features at the group's end only, or at the cuts inside it too."""
    copy_classifier: bool = True
    """Start the head of a student that is made by name from the teacher's where shapes agree (not for ce)."""
    optimizer: Optimizer | None = None
    """The optimizer of the first stage, from which the recipe makes those of later ones; None takes the recipe's."""
    stages: list[Stage] | None = None
    """The stages themselves, in place of those of recipe and optimizer."""
    feature: str | None = None
    """The loss at the cuts, by name; None takes the method's, `mse` for most."""
    feature_options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss at the cuts."""
    logits: str | None = None
    """The loss at the head, by name; None takes the method's, `kd` for most."""
    logits_options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss at the head."""
    auxiliary: str | None = None
    """A further loss, by name; None takes the method's, most have none."""
    auxiliary_options: dict[str, Any] = field(default_factory=dict)
    """Options of the further loss."""
    synthesis: str | None = None
    """What makes the training images in place of the data set's, by name; None takes the method's, most have none."""
    synthesis_options: dict[str, Any] = field(default_factory=dict)
    """Options of what makes the training images."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """The number format of forward passes, the teacher's too. `auto`: bf16 where the hardware has it, on CPUs where a
    trial shows that it pays."""
    capture: Literal["auto", "eager", "cudagraph", "compile", "cudagraph+compile", "emulate"] = "auto"
    """How steps run. `auto`: as CUDA graphs on a GPU, eagerly elsewhere and where capture fails; `compile`: by
    torch.compile, which rounds otherwise; `cudagraph+compile`: the same, as CUDA graphs; `emulate`: recorded and
    replayed as a graph would be, to look for faults."""
    deterministic: bool = False
    """Make a run on a GPU repeatable to the bit, on the same machine with the same versions: operations that add in any
    order are replaced by slower ones, and one that has no such form ends the run. The kernels of this package add in
    one order anyway, and so do CPUs, where it changes nothing that was seen."""
    fuse_norms: Literal["auto", "on", "off"] = "auto"
    """Whether batch norm, residual and ReLU of the student are one operator while it trains. `auto`: where there is a
    fast kernel for it."""
    fold_teacher: Literal["auto", "on", "off"] = "auto"
    """Whether the teacher's batch norms are folded into its convolutions, which saves passes over memory and rounds
    otherwise. `auto`: on GPUs. What fills a cache is what runs live: rows of the other form are not used."""
    ema: float | None = None
    """Decay of a moving average of the student's weights, which is then what is evaluated and exported."""
    cache: CacheSettings = field(default_factory=CacheSettings)
    """Which of the teacher's outputs are kept, where, and how exactly."""
    bn_images: int = 2048
    """Training images over which batch-norm statistics are re-estimated for evaluation and export; 0 leaves them as
    training left them."""
    accumulate: int = 1
    """Go through each batch in so many parts and add up their gradients: memory of a part, gradients of the batch."""
    parallel: Literal["auto", "blocks", "data"] = "auto"
    """Under torchrun: whether ranks divide blocks among them, or images. `auto` does what is fastest by measured costs;
    where blocks alone can be divided and the teacher is cached, images for a gain of 10% or more."""
    sync_norms: bool = False
    """Where ranks divide images: batch-norm statistics are those of the whole batch."""
    timeout: float = 600.0
    """Seconds after which a rank that does not answer is given up."""
    device: str = "auto"
    """cpu, cuda, or cuda:N; `auto` takes a GPU if there is one."""
    source: SourceName = "auto"
    """What makes batches: `resident` keeps small images in the device's memory, `dali` and `torchvision` decode large
    ones. `auto` chooses and says why. `dali-stream` leaves order and crops to DALI's own readers."""
    workers: int | None = None
    """Threads that decode large images; `null` takes as many as there are cores for this process."""
    prefetch: int = BATCHES_AHEAD
    """Batches of large images that are decoded ahead. More of them even out images that take long, and cost memory."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Whether an image that cannot be read stops the run, or is left out and named in the event log."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on the held-out images; 0 for none."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None writes one per epoch."""
    log_every: int = 20
    """Steps between two lines of losses in the event log."""
    out: str = "runs/distill"
    """The folder for checkpoint, student, results, report and event log."""
    resume: bool = False
    """Go on from the checkpoint in `out`; the bare option means true."""
    extend: bool = False
    """With `resume`: where `epochs` is more than the run had, train on to it in a further stage like the last one, with
    its own cycle of the learning rate; the bare option means true."""

    def __post_init__(self) -> None:
        method_named(self.method)
        _one_of("head", self.head, ("classifier", "embedding", "none"))
        if self.head != "classifier" and self.cache.logits.startswith("top"):
            raise ConfigError(
                f"cache.logits={self.cache.logits} was given, but head={self.head} leaves no logits; choose fp32 or "
                "fp16."
            )
        _one_of("recipe", self.recipe, RECIPES)
        for name in ("epochs", "batch_size", "log_every", "prefetch", "accumulate", "timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must be greater than 0.")
        for name in ("validation", "bn_images", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} was given; it must not be negative.")
        if self.teacher_image_size is not None and self.teacher_image_size < 1:
            raise ConfigError(f"teacher_image_size={self.teacher_image_size} was given; it must be at least 1 pixel.")
        if self.bridge == "none" and self.feeds_blocks:
            raise ConfigError(
                "bridge=none was given, but blocks are to be fed by the teacher, whose widths must then fit the "
                "student's; choose select, average or pca."
            )
        if self.reuses_classifier:
            self._check_reuse()
        if self.extend and not self.resume:
            raise ConfigError("extend was given without resume; give both, and the epochs that there are to be in all.")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size={self.batch_size} was given; it must be a multiple of accumulate={self.accumulate}."
            )
        if self.subset is not None and self.subset <= 0:
            raise ConfigError(f"subset={self.subset} was given; give a count, or a fraction up to 1.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema={self.ema} was given; it must be at least 0 and less than 1.")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={self.checkpoint_every} was given; it must be at least 1.")

    def _check_reuse(self) -> None:
        """Raise ConfigError for settings that a student with its teacher's classifier cannot follow."""
        refused = {
            "cuts": self.cuts is not None,
            "blocks": self.blocks is not None,
            "stages": self.feeds_blocks,
        }
        given = [name for name, asked in refused.items() if asked]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} was given, but the method {self.method} cuts both networks before the "
                "classifier and trains the student as one; leave it out."
            )
        if self.student.startswith(REUSING):
            raise ConfigError(
                f"student={self.student!r} was given, but the method {self.method} adds projector and classifier "
                "itself; name the student that is to be their encoder."
            )

    @property
    def reuses_classifier(self) -> bool:
        """Whether the student ends in the teacher's classifier."""
        return method_named(self.method).reuses_classifier

    @property
    def has_teacher(self) -> bool:
        """Whether the method needs a teacher."""
        return method_named(self.method).needs_teacher

    @property
    def feeds_blocks(self) -> bool:
        """Whether blocks train that are fed by the teacher."""
        if self.stages is not None:
            return any(len(stage.groups) > 1 for stage in self.stages)
        return method_named(self.method).stages != "end to end"


WITHOUT_EFFECT_ON_NUMBERS = (
    "out", "resume", "extend", "checkpoint_every", "log_every", "workers", "prefetch", "source", "cache", "capture",
    "parallel", "timeout", "fold_teacher",
)  # fmt: skip
"""What the cache stores inexactly, compiling, folding, and how images are decoded do have one; the plan, whether steps
are compiled, whether the teacher is folded, and the source that was chosen are part of the identity instead."""


def exported_name(method: str, student: str, teacher: str) -> str:
    """Return the name of what a run exports, by which `models.build` makes it; the arguments are the run's settings."""
    return name_of(student, teacher) if method_named(method).reuses_classifier else student


def identity(config: DistillConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues, as plain values."""
    values = dataclasses.asdict(config) | losses_of(config)
    return {name: value for name, value in values.items() if name not in WITHOUT_EFFECT_ON_NUMBERS}


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} was given; choose one of {', '.join(choices)}.")


def losses_of(config: DistillConfig) -> dict[str, Any]:
    """The losses of a run, what makes its images, and their options, by the names of the settings: the method's where
    the settings have none, with the method's options."""
    method, found = method_named(config.method), {}
    for place in ("feature", "logits", "auxiliary", "synthesis"):
        of_method, asked = getattr(method, place), getattr(config, place)
        options = method.options.get(place, {}) if asked in (None, of_method) else {}
        found[place] = asked or of_method
        found[f"{place}_options"] = {**options, **getattr(config, f"{place}_options")}
    if config.head != "classifier":
        found |= {"logits": config.logits or "none", "logits_options": config.logits_options}
        if config.head == "embedding" and found["auxiliary"] is None:
            found["auxiliary"] = "embedding"
    return found


def _check_head(config: DistillConfig, objectives: Objectives) -> None:
    """Raise ConfigError for losses that do not fit what the networks end in."""
    method, auxiliary = method_named(config.method), objectives.auxiliary
    some = 9  # asked as if there were so many cuts
    reads_last = auxiliary is not None and some in auxiliary.kind.student_outputs(auxiliary.config, some)
    if auxiliary is not None and reads_last and auxiliary.kind.reads_head != config.head:
        raise ConfigError(
            f"{auxiliary.name} reads the networks' last output as that of head={auxiliary.kind.reads_head}, but "
            f"head={config.head} is set; give that head, or another loss."
        )
    if config.head == "classifier":
        return
    fault = None
    if not method.needs_teacher:
        fault = "has no teacher, and labels are not read"
    elif method.synthesis or config.synthesis:
        fault = "makes its images by the teacher's logits"
    elif method.logits not in ("kd", "none") or objectives.logits.name != "none":
        fault = f"compares logits ({objectives.logits.name if config.logits else method.logits})"
    elif config.head == "embedding" and not reads_last:
        fault = "has no loss of the embedding"
    elif config.head == "none" and not objectives.needs_cuts:
        fault = "has no loss at a cut"
    if fault:
        raise ConfigError(
            f"head={config.head} was given, but the method {config.method}, as it is set, {fault}. Use stablekd, "
            "blocks or kd+features, or kd with head=embedding."
        )


def objectives_of(config: DistillConfig) -> Objectives:
    """What the student is trained towards. Raises ConfigError for an unknown objective or option."""
    method, losses = method_named(config.method), losses_of(config)
    if losses["auxiliary"] is None and losses["auxiliary_options"]:
        raise ConfigError("auxiliary_options were given without auxiliary; name the loss too.")
    found = Objectives(
        feature=objective("feature", losses["feature"], losses["feature_options"]),
        logits=objective("logits", losses["logits"], losses["logits_options"]),
        align=method.align or config.align,
        use_teacher_logits=method.needs_teacher and config.head == "classifier",
        use_labels=config.head == "classifier",
        head=config.head,
        auxiliary=objective("auxiliary", losses["auxiliary"], losses["auxiliary_options"])
        if losses["auxiliary"]
        else None,
    )
    _check_head(config, found)
    return found


def synthesis_of(config: DistillConfig) -> SynthesisObjective | None:
    """What makes the training images; None where they are the data set's. Raises ConfigError for an unknown one."""
    losses = losses_of(config)
    if losses["synthesis"] is None:
        if losses["synthesis_options"]:
            raise ConfigError("synthesis_options were given without synthesis; name what makes the images too.")
        return None
    return objective("synthesis", losses["synthesis"], losses["synthesis_options"])
