"""Configuration of an experiment as frozen dataclasses: every option once, each a typed option of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from flax_hmog.em.options import EMOptions, PseudoCounts, check_used
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.networks.augment import Augmentation
from flax_hmog.recipe.running import Checkpoints, Devices, Logs, Processes, check_counts
from flax_hmog.recipe.template import REQUIRED, Template, parameters

Kind = Literal["scale", "diagonal", "full"]
RUNNING = ("workdir", "first_seed", "n_seeds", "scores", "devices", "processes", "checkpoints", "logs", "dry_run")
"""Options that change no result."""
FEATURES = 64  # of an encoder that is not told how many
FEATURE_LAT_DIM = 16  # of a head on an encoder that is not told otherwise


@dataclasses.dataclass(frozen=True)
class Data:
    """The samples and their preprocessing; everything is fitted on the training part.

    Example:
        >>> Data("file", path="rows.csv", scale="standard").test_share
        0.2
    """

    name: str = "digits"
    """The data set: `digits`, `synthetic`, `file`, another that is registered, or the import path MODULE:FUNCTION of a
    function that returns `File(rows, labels)` for these options."""
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
        if not 0 <= self.test_share < 1:
            raise ValueError(f"Data: `test_share` must be at least 0 and below 1; got {self.test_share}. Lower it.")
        if self.layer is not None and self.obsm is not None:
            raise ValueError(
                f"Data: `layer` must be None where `obsm` is given; got {self.layer!r} and {self.obsm!r}. "
                "Give one of them."
            )
        check_counts(self, "rows", "columns", "whitened")


@dataclasses.dataclass(frozen=True)
class Model:
    """The mixture that EM fits to the inputs. Heads without an encoder have its size, and all have its kind of noise.

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
    projection_dtype: str | None = None
    """Dtype in which inputs are multiplied by the D x L projection, as bfloat16; None for float32."""

    def __post_init__(self) -> None:
        check_counts(self, "n_clusters")
        AnalyticHMoG(self.lat_dim, self.n_components, obs_rep=self.obs_rep, projection_dtype=self.projection_dtype)


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
        check_counts(self, "rows")


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
    adversarial_radius: float | Literal["measured"] = 0.0
    """Length of the virtual adversarial perturbation of an input, whose consistency counts as much as information; 0:
    none. `measured`: by `perturbation_radius`, a quarter of the distance between neighbours. For inputs that cannot be
    distorted."""
    reconstruction_weight: float = 0.0
    """Weight of the squared distance of inputs from what an `autoencoder` makes of their features, per column."""

    def __post_init__(self) -> None:
        check_counts(self, "count", "early_clusters", "n_components")
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
            if getattr(self, name) != "measured" and getattr(self, name) < 0:
                raise ValueError(f"Rounds: `{name}` must be at least 0; got {getattr(self, name)}. Raise it.")
        if not self.marginal_weight > 0.5:
            raise ValueError(
                "Rounds: `marginal_weight` must be above 1/2, below which a single cluster is best; got "
                f"{self.marginal_weight}. Raise it."
            )

    @property
    def is_adversarial(self) -> bool:
        """True if samples are perturbed."""
        return self.adversarial_radius != 0

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
    """The largest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The course of the learning rate: decayed to 0 by a cosine or a line, or constant."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from 0 before that."""
    max_fall: float = 1.0
    """A run has diverged when an epoch's loss is above the best so far, or that of the first batch, by this many nats
    per column of the inputs; with an encoder, by this many nats."""
    least_steps: int = 0
    """With an encoder, steps of a round at least: where the epochs have fewer, these, and those of distillation, are
    multiplied by a whole number."""

    def __post_init__(self) -> None:
        check_counts(self, "epochs", "batch_size")
        if self.least_steps < 0:
            raise ValueError(f"Gradient: `least_steps` must be at least 0; got {self.least_steps}. Raise it.")
        for name in ("learning_rate", "max_fall"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Gradient: `{name}` must be positive; got {getattr(self, name)}. Raise it.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Gradient: `warmup` must be at least 0 and below 1; got {self.warmup}. Lower it.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: data, model, EM, gradients, and how it runs.

    Example:
        >>> heads = (Template("symmetric", lat_rep="diagonal"),)
        >>> Experiment("runs/digits", Data("digits"), Model(10, 20), Template("mlp"), heads=heads).rounds.count
        1
    """

    workdir: str
    """Folder of the run: config, checkpoints, metrics and report. A run that is there is resumed."""
    data: Data = Data()
    model: Model = Model()
    encoder: Template | None = None
    """The network before the heads, if any; a linen class that gives features (B, F) of inputs (B, D)."""
    rounds: Rounds = Rounds()
    em: EM = EM()
    gradient: Gradient = Gradient()
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    optimizer: Template = dataclasses.field(default_factory=lambda: Template("adam"))
    """The optimiser: a function of optax, or of a user's own, with an argument `learning_rate`."""
    heads: tuple[Template, ...] = dataclasses.field(default_factory=lambda: (Template("differentiable"),))
    """Heads that are trained; the first is the one that a report describes. None: EM on the inputs is all."""
    first_seed: int = 0
    """The first seed."""
    n_seeds: int = 1
    """Number of seeds in a row, each with its own initialisation and batches, and its own split where there is none."""
    scores: tuple[str, ...] = ()
    """Further scores of the test part: import paths MODULE:FUNCTION of functions of `HMoGOutput` and labels (N,)."""
    baselines: bool = False
    """Also score two-stage baselines from scikit-learn."""
    devices: Devices = Devices()
    processes: Processes = Processes()
    checkpoints: Checkpoints = Checkpoints()
    logs: Logs = Logs()
    dry_run: bool = False
    """Print configuration, parameters, mesh, shardings, floating-point operations and memory per device, and stop."""

    def __post_init__(self) -> None:
        check_counts(self, "n_seeds")
        encoder, heads = with_sizes(self.encoder, self.heads)
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "heads", heads)
        rounds, least, labels = self.rounds, self.n_clusters, self.labels
        changed = [f.name for f in dataclasses.fields(Rounds) if getattr(rounds, f.name) != f.default]
        is_taught = self.has_encoder and (rounds.start != "nothing" or rounds.count > 1)
        taught = rounds.distil_epochs + rounds.mixed_epochs
        alone, early = not self.has_encoder, rounds.early_clusters
        is_analytic = any(head.target is AnalyticHMoG for head in self.heads)
        n_components, n_clusters = self.model.n_components, self.model.n_clusters
        broken = {
            f"`first_seed` must be at least 0; got {self.first_seed}. Raise it.": self.first_seed < 0,
            f"`heads` must have different names, none em; got {labels}. Leave one out.": len({*labels, "em"})
            <= len(labels),
            "`heads` must hold analytic only with an encoder; got none. EM comes first as it is.": alone
            and is_analytic,
            f"`rounds` must be left out without an encoder; got {', '.join(changed)}. Drop them.": alone
            and bool(changed),
            f"`rounds.early_clusters` must be at least the {least} clusters of the end; got {early}. Raise "
            "it or leave it out.": (early or least) < least,
            f"`model.n_clusters` must be at most the {n_components} components; got {n_clusters}. Raise "
            "--model.n-components.": least > n_components,
            f"`rounds.n_components` must be at least the {least} clusters of the end; got {rounds.n_components}. Raise "
            "it.": self.has_encoder and rounds.clusters_features and rounds.n_components < least,
            f"`gradient.epochs` must be above rounds.distil_epochs + rounds.mixed_epochs, {taught}; got "
            f"{self.gradient.epochs}. Raise it.": is_taught and taught >= self.gradient.epochs,
        }
        for rule, is_broken in broken.items():
            if is_broken:
                raise ValueError(f"Experiment: {rule}")

    @property
    def has_encoder(self) -> bool:
        """True if heads sit on an encoder."""
        return self.encoder is not None

    @property
    def labels(self) -> list[str]:
        """Names of the heads, as in the folders of their checkpoints."""
        return [head.label for head in self.heads]

    @property
    def n_clusters(self) -> int:
        """Number of clusters in the end."""
        return self.model.n_clusters or self.model.n_components

    @property
    def seeds(self) -> range:
        """All seeds."""
        return range(self.first_seed, self.first_seed + self.n_seeds)

    def with_least_steps(self, per_epoch: int) -> Experiment:
        """The experiment with so many more epochs that rounds have the steps that they need, for steps of an epoch."""
        gradient, rounds = self.gradient, self.rounds
        factor = -(-gradient.least_steps // max(gradient.epochs * per_epoch, 1))
        if not self.has_encoder or factor <= 1:
            return dataclasses.replace(self, gradient=dataclasses.replace(gradient, least_steps=0))
        longer = {name: factor * getattr(rounds, name) for name in ("distil_epochs", "mixed_epochs")}
        return dataclasses.replace(
            self,
            gradient=dataclasses.replace(gradient, epochs=factor * gradient.epochs, least_steps=0),
            rounds=dataclasses.replace(rounds, **longer),
        )

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
        m = self.model
        return AnalyticHMoG(m.lat_dim, m.n_components, obs_rep=m.obs_rep, projection_dtype=m.projection_dtype)

    def head(self, label: str, n_clusters: int, obs_dim: int) -> Any:
        """A head that is trained: on features (B, obs_dim) for so many clusters, or on the inputs."""
        (template,) = (head for head in self.heads if head.label == label)
        m = self.model
        sizes = {"n_components": n_clusters}
        if not self.has_encoder:
            sizes = {"lat_dim": m.lat_dim, "n_components": m.n_components}
        return template.given(**sizes).make(
            {"obs_dim": obs_dim, "obs_rep": m.obs_rep, "projection_dtype": m.projection_dtype}
        )

    def options(self) -> dict[str, Any]:
        """All options, nested as on the command line, as JSON values; of heads by their names."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        groups = {n: dataclasses.asdict(v) for n, v in fields.items() if hasattr(v, "__dataclass_fields__")}
        follow = ("n_components",) if self.has_encoder else ("n_components", "lat_dim")
        heads = {h.label: {k: v for k, v in h.options().items() if k not in follow} for h in self.heads}
        encoder = {"name": "none"} if self.encoder is None else self.encoder.options()
        return fields | groups | {"encoder": encoder, "optimizer": self.optimizer.options(), "heads": heads}

    def result_options(self) -> dict[str, Any]:
        """The options that a result follows from, in which a resumed run must agree."""
        options = {name: value for name, value in self.options().items() if name not in RUNNING}
        return options | {"data": {k: v for k, v in options["data"].items() if k not in ("folder", "downloads")}}

    def default_options(self) -> dict[str, Any]:
        """`result_options` with the defaults of all options, for the encoder, heads and optimiser that are there."""
        encoder = {} if self.encoder is None else self.encoder.bare().options()
        plain = Experiment("").result_options()
        optimizer = self.optimizer.bare().options() | {"name": plain["optimizer"]["name"]}
        heads = {head.label: head.bare().options() for head in self.heads}
        return plain | {"encoder": encoder, "optimizer": optimizer, "heads": heads}


def with_sizes(encoder: Template | None, heads: Iterable[Template]) -> tuple[Template | None, tuple[Template, ...]]:
    """Encoder and heads with the sizes that they have where nothing else is said."""
    if encoder is None:
        return None, tuple(heads)
    features = parameters(encoder.target).get("features")
    if features is not None and features.default is REQUIRED:
        encoder = encoder.given(**{"features": FEATURES} | encoder.arguments)
    return encoder, tuple(head.given(**{"lat_dim": FEATURE_LAT_DIM} | head.arguments) for head in heads)


def flat_options(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flat_options(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
