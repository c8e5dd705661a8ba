"""Configuration of an experiment as frozen dataclasses: every option once, each a typed option of the command line."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from flax_hmog.em.options import EMOptions, PseudoCounts, check_used
from flax_hmog.heads.modules import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.networks.augment import Augmentation

Kind = Literal["scale", "diagonal", "full"]
HeadName = Literal["differentiable", "symmetric", "analytic"]


def _check_counts(group: Any, *names: str) -> None:
    """ValueError for numbers below 1; None stands for no limit."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(group).__name__}: `{name}` must be at least 1; got {value}. Raise it.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The samples and their preprocessing; everything is fitted on the training part.

    Example:
        >>> Data("file", path="rows.csv", scale="standard").test_share
        0.2
    """

    name: str = "digits"
    """The data set: `digits`, `synthetic`, `file`, or another that is registered."""
    folder: str = "data"
    """Folder in which image sets are prepared once, and where files are looked for."""
    downloads: str | None = None
    """Folder with the files of an image set as its publisher names them; None downloads them."""
    path: str | None = None
    """For `file`: .npy (memory-mapped), .npz (`X`, or scipy's sparse matrix; `y` and `n_train` if there are any),
    .h5ad, .csv or .parquet."""
    labels: str | None = None
    """For `file`: an .npy file of labels, or the column of an .h5ad's obs or of a table; for evaluation only."""
    layer: str | None = None
    """For an .h5ad: take this layer instead of X."""
    obsm: str | None = None
    """For an .h5ad: take this entry of obsm instead of X, as X_pca."""
    title: str | None = None
    """For `file`: name of the data in a report."""
    test_share: float = 0.2
    """Share of the rows that is held out, where the data have no split of their own."""
    rows: int | None = None
    """Keep this many training rows, drawn by the seed; None keeps all."""
    size_factor: bool = False
    """Scale every row to the mean total, as counts of single cells need."""
    log1p: bool = False
    """Take log(1 + x)."""
    columns: int | None = None
    """Keep this many columns, those of largest variance."""
    scale: Literal["none", "range", "standard"] = "none"
    """All entries to [0, 1], or every column to mean 0 and standard deviation 1."""
    whitened: int | None = None
    """Replace the columns by this many principal components of variance 1."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"Data: `test_share` must lie between 0 and 1; got {self.test_share}. Hold out a part.")
        if self.layer is not None and self.obsm is not None:
            raise ValueError(
                f"Data: `layer` must be None where `obsm` is given; got {self.layer!r} and {self.obsm!r}. "
                "Give one of them."
            )
        _check_counts(self, "rows", "columns", "whitened")


@dataclasses.dataclass(frozen=True)
class Model:
    """The size of the model and the kinds of its matrices.

    Example:
        >>> Model(lat_dim=10, n_components=200, n_clusters=10).obs_rep
        'diagonal'
    """

    lat_dim: int = 10
    """Latent dimension L."""
    n_components: int = 10
    """Number of components K."""
    n_clusters: int | None = None
    """Merge the components to so many clusters, without labels; None: every component is a cluster."""
    obs_rep: Kind = "diagonal"
    """Kind of the noise covariance."""
    pst_rep: Kind = "diagonal"
    """Kind of the posterior precisions of the differentiable head."""
    lat_rep: Kind = "full"
    """Kind of the differences between component precisions of the symmetric head."""

    def __post_init__(self) -> None:
        _check_counts(self, "n_clusters")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The network before the head, if any.

    Example:
        >>> Encoder("mlp", features=32).lat_dim
        16
    """

    name: str = "none"
    """`none`, `mlp`, `conv`, `autoencoder`, or the import path MODULE:CLASS of a linen module."""
    features: int = 64
    """Number of features, the head's D; given to the module as `features`."""
    normalization: Literal["none", "layer", "batch"] = "batch"
    """Normalisation of the layers' outputs."""
    lat_dim: int = 16
    """Latent dimension of the head on the features."""

    def __post_init__(self) -> None:
        _check_counts(self, "features", "lat_dim")
        if self.name not in ("none", "mlp", "conv", "autoencoder") and ":" not in self.name:
            raise ValueError(
                f"Encoder: `name` must be none, mlp, conv, autoencoder or MODULE:CLASS; got {self.name!r}. "
                "Name a class."
            )


@dataclasses.dataclass(frozen=True)
class EM(EMOptions):
    """The warm start by exact EM.

    Example:
        >>> EM(max_steps=50, n_restarts=3).tolerance
        0.001
    """

    init: Literal["pca", "fa"] = "pca"
    regularizer: PseudoCounts = PseudoCounts()
    rows: int | None = None
    """Fit only so many training rows, drawn by the seed, where all do not fit the devices; None takes all."""

    def __post_init__(self) -> None:
        check_used("fit_em", self)
        super().__post_init__()
        _check_counts(self, "rows")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Training with an encoder: in every round EM finds clusters, which encoder and head learn and then improve.

    Example:
        >>> Rounds(count=2, early_clusters=20).clusters_features
        True
    """

    count: int = 1
    """Number of rounds."""
    early_clusters: int | None = None
    """Clusters of all rounds but the last: more than in the end, so that features still separate what a merge has put
    together; at most the components of EM. None: as in the end."""
    start: Literal["inputs", "features", "nothing"] = "inputs"
    """Data of the first round's clusters: the inputs, the features of the untrained encoder, or none at all.
    Later rounds take those of the learnt features."""
    n_components: int = 80
    """Components of EM on features, before they are merged to clusters."""
    refit: bool = True
    """Later rounds find clusters by EM on the learnt features; if not, they merge those of the head as they are."""
    em: EM = EM(max_steps=30, tolerance=1e-2, regularizer=PseudoCounts(components=10.0, noise_share=0.01))
    """EM on features, of which those of one cluster are nearly alike; it takes the rows of EM on the inputs."""
    fresh: bool = True
    """Every round starts with an untrained encoder; if not, with that of the round before."""
    distil_epochs: int = 2
    """Epochs in which an untrained encoder learns the clusters of EM, and nothing else."""
    mixed_epochs: int = 1
    """Epochs of every round in which they count half, and information half; after these information alone counts."""
    information_weight: float = 1.0
    """Weight of the mutual information of the assignments of two views."""
    marginal_weight: float = 1.0
    """Weight of the balance of clusters in it, above 1/2; below 1 for clusters of unequal size."""
    likelihood_weight: float = 0.05
    """Weight of the head's likelihood of the features, in nats per feature; the encoder does not see it."""
    adversarial_radius: float = 0.0
    """Length of the virtual adversarial perturbation of an input, whose consistency counts as much as information; 0:
    none. For inputs that cannot be distorted."""
    reconstruction_weight: float = 0.0
    """Weight of the squared distance of inputs from what an `autoencoder` makes of their features, per column."""

    def __post_init__(self) -> None:
        _check_counts(self, "count", "early_clusters", "n_components")
        if self.em.rows is not None:
            raise ValueError(f"Rounds: `em.rows` must be None; got {self.em.rows}. Give --em.rows.")
        if self.early_clusters is not None and self.count == 1:
            raise ValueError(
                "Rounds: `early_clusters` must be None for one round, which has the clusters of the end; got "
                f"{self.early_clusters}. Add --rounds.early-clusters None, or raise --rounds.count."
            )
        names = [
            field.name for field in dataclasses.fields(self) if field.name.endswith(("epochs", "weight", "radius"))
        ]
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"Rounds: `{name}` must be at least 0; got {getattr(self, name)}. Raise it.")
        if not self.marginal_weight > 0.5:
            raise ValueError(
                "Rounds: `marginal_weight` must be above 1/2, below which a single cluster is best; got "
                f"{self.marginal_weight}. Raise it."
            )

    @property
    def clusters_features(self) -> bool:
        """True if any round has clusters of features."""
        return (self.count > 1 and self.refit) or self.start == "features"


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Training by gradients.

    Example:
        >>> Gradient(epochs=40).learning_rate
        0.001
    """

    epochs: int = 20
    """Passes over the training part; with an encoder, in each round."""
    batch_size: int = 256
    """Samples per step over all devices; a multiple of their number."""
    learning_rate: float = 1e-3
    """Adam's learning rate, decayed to 0 by a cosine."""
    max_fall: float = 1.0
    """A run has diverged when an epoch's loss is above the best so far, or that of the first batch, by this many nats
    per column of the inputs; with an encoder, by this many nats."""

    def __post_init__(self) -> None:
        _check_counts(self, "epochs", "batch_size")
        for name in ("learning_rate", "max_fall"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Gradient: `{name}` must be positive; got {getattr(self, name)}. Raise it.")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh."""

    model: int = 1
    """Devices along the axis that splits large leaves; all others split the batch."""
    min_sharded: int = 2**14
    """Entries of a leaf below which it is replicated."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Connection of several processes."""

    coordinator: str | None = None
    """Address HOST:PORT of the first process; `auto` asks the cluster (SLURM, TPU pods, MPI); None: one process."""
    count: int | None = None
    """Number of processes, with an address."""
    index: int | None = None
    """Number of this process from 0, with an address."""
    heartbeat_seconds: int = 60
    """Silence after which a process counts as lost and the others stop."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run."""

    em_steps: int = 20
    """Steps of EM between checkpoints."""
    gradient_steps: int = 500
    """Steps of gradient training after which the end of the epoch is saved, or within epochs that are longer."""
    keep: int = 2
    """Latest checkpoints that stay; that of the EM step or epoch with the best objective stays as well."""

    def __post_init__(self) -> None:
        _check_counts(self, "em_steps", "gradient_steps", "keep")


@dataclasses.dataclass(frozen=True)
class Logs:
    """Destinations of metrics besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder (needs tensorboardX)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (needs wandb)."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: data, model, EM, gradients, and how it runs.

    Example:
        >>> Experiment("runs/digits", Data("digits"), Model(10, 20), Encoder("mlp")).rounds.count
        1
    """

    workdir: str
    """Folder of the run: config, checkpoints, metrics and report. A run that is there is resumed."""
    data: Data = Data()
    model: Model = Model()
    encoder: Encoder = Encoder()
    rounds: Rounds = Rounds()
    em: EM = EM()
    gradient: Gradient = Gradient()
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    heads: tuple[HeadName, ...] = ("differentiable",)
    """Heads that are trained; the first is the one that a report describes. None: EM on the inputs is all."""
    first_seed: int = 0
    """The first seed."""
    n_seeds: int = 1
    """Number of seeds in a row, each with its own initialisation and batches, and its own split where there is none."""
    baselines: bool = False
    """Also score two-stage baselines from scikit-learn."""
    devices: Devices = Devices()
    processes: Processes = Processes()
    checkpoints: Checkpoints = Checkpoints()
    logs: Logs = Logs()
    dry_run: bool = False
    """Print configuration, parameters, mesh, shardings, floating-point operations and memory per device, and stop."""

    def __post_init__(self) -> None:
        _check_counts(self, "n_seeds")
        if self.first_seed < 0:
            raise ValueError(f"Experiment: `first_seed` must be at least 0; got {self.first_seed}. Raise it.")
        if self.encoder.name == "none" and "analytic" in self.heads:
            raise ValueError(
                "Experiment: `heads` may hold analytic only with an encoder; got none. EM is the first stage as it is."
            )
        if not self.has_encoder and self.rounds != Rounds():
            changed = [f.name for f in dataclasses.fields(Rounds) if getattr(self.rounds, f.name) != f.default]
            raise ValueError(
                f"Experiment: `rounds` must be left out without an encoder; got {', '.join(changed)}. Add "
                "--encoder.name, or leave them out."
            )
        if (self.rounds.early_clusters or self.n_clusters) < self.n_clusters:
            raise ValueError(
                f"Experiment: `rounds.early_clusters` must be at least the {self.n_clusters} clusters of the end; got "
                f"{self.rounds.early_clusters}. Raise it or leave it out."
            )
        if self.model.n_clusters is not None and self.model.n_clusters > self.model.n_components:
            raise ValueError(
                f"Experiment: `model.n_clusters` must be at most the {self.model.n_components} components; got "
                f"{self.model.n_clusters}. Raise --model.n-components."
            )
        if self.has_encoder and self.rounds.clusters_features and self.rounds.n_components < self.n_clusters:
            raise ValueError(
                f"Experiment: `rounds.n_components` must be at least the {self.n_clusters} clusters of the end; got "
                f"{self.rounds.n_components}. Raise it."
            )
        is_taught = self.rounds.start != "nothing" or self.rounds.count > 1
        taught_epochs = self.rounds.distil_epochs + self.rounds.mixed_epochs
        if self.has_encoder and is_taught and taught_epochs >= self.gradient.epochs:
            raise ValueError(
                "Experiment: `gradient.epochs` must be above rounds.distil_epochs + rounds.mixed_epochs, "
                f"{taught_epochs}; got {self.gradient.epochs}. Raise it."
            )
        if self.has_encoder and self.encoder.lat_dim > self.encoder.features:
            raise ValueError(
                f"Experiment: `encoder.lat_dim` must be at most the {self.encoder.features} features; got "
                f"{self.encoder.lat_dim}. Lower it."
            )
        self.analytic, [self.trainable(name, self.n_clusters) for name in self.heads]

    @property
    def has_encoder(self) -> bool:
        """True if heads sit on an encoder."""
        return self.encoder.name != "none"

    @property
    def n_clusters(self) -> int:
        """Number of clusters in the end."""
        return self.model.n_clusters or self.model.n_components

    @property
    def seeds(self) -> range:
        """All seeds."""
        return range(self.first_seed, self.first_seed + self.n_seeds)

    def round_clusters(self, number: int) -> int:
        """Number of clusters in a round, counted from 1; 0 stands for training without rounds."""
        if number in (0, self.rounds.count) or self.rounds.early_clusters is None:
            return self.n_clusters
        of_inputs = number == 1 and self.rounds.start == "inputs"
        available = self.model.n_components if of_inputs else self.rounds.n_components
        return min(self.rounds.early_clusters, available)

    @property
    def analytic(self) -> AnalyticHMoG:
        """The head that EM fits to the inputs."""
        return AnalyticHMoG(self.model.lat_dim, self.model.n_components, obs_rep=self.model.obs_rep)

    def feature_head(self, n_components: int) -> AnalyticHMoG:
        """A head that EM fits to features."""
        return AnalyticHMoG(self.encoder.lat_dim, n_components, obs_rep=self.model.obs_rep)

    def trainable(self, name: HeadName, n_clusters: int) -> Any:
        """A head that is trained: on features for so many clusters, or on the inputs."""
        m = self.model
        sizes = (self.encoder.lat_dim, n_clusters) if self.has_encoder else (m.lat_dim, m.n_components)
        every: dict[str, Any] = {
            "differentiable": DifferentiableHMoG(*sizes, obs_rep=m.obs_rep, pst_rep=m.pst_rep),
            "symmetric": SymmetricHMoG(*sizes, obs_rep=m.obs_rep, lat_rep=m.lat_rep),
            "analytic": AnalyticHMoG(*sizes, obs_rep=m.obs_rep, step_delay=100.0, min_rate=0.01),
        }
        return every[name]

    def result_options(self) -> dict[str, Any]:
        """The options that a result follows from, in which a resumed run must agree."""
        free = ("workdir", "heads", "first_seed", "n_seeds", "devices", "processes", "checkpoints", "logs", "dry_run")
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return options | {"data": {k: v for k, v in options["data"].items() if k not in ("folder", "downloads")}}


def flat_options(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
