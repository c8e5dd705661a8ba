"""Analysis of a fitted model: clusters, hierarchies, merges, loadings, metrics, figures and reports.

Figures need matplotlib (`pip install "flax-hmog[plots]"`), merges and metrics scikit-learn (extra `cluster`), reports
all of these and jinja2 (extra `report`).
"""

from flax_hmog.analysis.affinity import component_affinity
from flax_hmog.analysis.calibration import fit_temperature, scale_temperature
from flax_hmog.analysis.clusters import (
    ComponentSummary,
    cluster_differences,
    cluster_hierarchy,
    cluster_prototypes,
    co_assignment,
    component_distances,
    component_summary,
    merge_clusters,
    merged_responsibilities,
)
from flax_hmog.analysis.coherence import ClusterLinks, cluster_links, refine_modularity
from flax_hmog.analysis.criteria import InformationCriteria, information_criteria, n_parameters
from flax_hmog.analysis.elements import (
    Cell,
    Gallery,
    Map,
    Picture,
    Section,
    Table,
    format_cell,
    mean_and_sd,
)
from flax_hmog.analysis.flow import merge_by_flow
from flax_hmog.analysis.loadings import CanonicalLoadings, LatentAxes, canonical_loadings, discriminant_axes
from flax_hmog.analysis.merging import information_hierarchy, merge_components, refine_information
from flax_hmog.analysis.metrics import clustering_metrics, contingency_table, fit_agreement
from flax_hmog.analysis.plots import plot_latent_space, plot_loadings, plot_objective, plot_prototypes
from flax_hmog.analysis.relations import plot_co_assignment, plot_contingency, plot_dendrogram
from flax_hmog.analysis.report import write_report

__all__ = [
    "CanonicalLoadings",
    "Cell",
    "ClusterLinks",
    "ComponentSummary",
    "Gallery",
    "InformationCriteria",
    "LatentAxes",
    "Map",
    "Picture",
    "Section",
    "Table",
    "canonical_loadings",
    "cluster_differences",
    "cluster_hierarchy",
    "cluster_links",
    "cluster_prototypes",
    "clustering_metrics",
    "co_assignment",
    "component_affinity",
    "component_distances",
    "component_summary",
    "contingency_table",
    "discriminant_axes",
    "fit_agreement",
    "fit_temperature",
    "format_cell",
    "information_criteria",
    "information_hierarchy",
    "mean_and_sd",
    "merge_by_flow",
    "merge_clusters",
    "merge_components",
    "merged_responsibilities",
    "n_parameters",
    "plot_co_assignment",
    "plot_contingency",
    "plot_dendrogram",
    "plot_latent_space",
    "plot_loadings",
    "plot_objective",
    "plot_prototypes",
    "refine_information",
    "refine_modularity",
    "scale_temperature",
    "write_report",
]
