"""Which experts take which source (arXiv 2401.04088, figure 7).

Shapes: T tokens, B sequences, E experts, C sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe.analysis.observe import LayerChoices, Observed
from moe.analysis.statistics import binomial_error, ratio


@dataclass(slots=True)
class Assignment:
    """One layer, one source: each expert's share of the choices (`which="all"`) or of the first ones (`"first"`).

    `errors_E` are standard errors over sequences (`statistics.ratio`). `random_error` is one expert's standard
    deviation under uniform routing of independent tokens; `design_effect` is the mean over experts of
    (error / random error)², by which tokens of one sequence being alike inflates the variance.
    """

    layer: int
    source: str
    which: str
    choices: int
    shares_E: list[float]
    errors_E: list[float]
    uniform: float
    random_error: float
    design_effect: float


def assignments(observed: Observed) -> list[Assignment]:
    """Every layer × source × {all, first}, in this order."""
    found = []
    for layer in observed.layers:
        every_TE, first_TE = layer.taken_TE(), layer.taken_TE(1)
        for source, name in enumerate(observed.source_names):
            for which, taken_TE in (("all", every_TE), ("first", first_TE)):
                found.append(_assignment(observed, layer, taken_TE, source, name, which))
    return found


def _assignment(
    observed: Observed, layer: LayerChoices, taken_TE: np.ndarray, source: int, name: str, which: str
) -> Assignment:
    members_B = observed.sources_B == source
    counts_BE = count_by(observed.sequences_T, taken_TE, len(observed.sources_B))[members_B]
    totals_B = counts_BE.sum(1)
    estimates = [ratio(counts_BE[:, expert], totals_B) for expert in range(layer.num_experts)]
    tokens, choices = int((observed.sources_T == source).sum()), int(totals_B.sum())
    random_error = binomial_error(layer.num_experts, choices / tokens if tokens else 0.0, tokens)
    errors_E = [estimate.error for estimate in estimates]
    inflation = float(np.mean(np.square(errors_E))) / random_error**2 if random_error > 0 else float("nan")
    return Assignment(
        layer=layer.layer,
        source=name,
        which=which,
        choices=choices,
        shares_E=[estimate.value for estimate in estimates],
        errors_E=errors_E,
        uniform=1 / layer.num_experts,
        random_error=random_error,
        design_effect=inflation,
    )


def count_by(groups_T: np.ndarray, taken_TE: np.ndarray, groups: int) -> np.ndarray:
    """int64 [groups, E]: how many tokens of each group each expert took."""
    counts = np.zeros((groups, taken_TE.shape[1]), np.int64)
    tokens_N, experts_N = taken_TE.nonzero()
    np.add.at(counts, (groups_T[tokens_N], experts_N), 1)
    return counts
