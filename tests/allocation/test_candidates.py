"""What the solver picks from."""

import torch
from format_sizes import SOME

from lowrank.allocation.candidates import merged


def test_a_merged_menu_has_no_point_that_another_beats(tiny_bert, bert_stats):
    from lowrank import CompressionConfig
    from lowrank.allocation.candidates import QuantizationLoss, candidates_of
    from lowrank.allocation.planner import drafted
    from lowrank.inspection.inspection import Inspection
    from lowrank.linalg import ErrorCurve

    layer = drafted(Inspection(tiny_bert), CompressionConfig(metric="weight"), None).targeted[0]
    error_curve = ErrorCurve(torch.linspace(1, 0, 65, dtype=torch.float64) ** 2)
    candidates = [
        candidates_of(
            [layer], [error_curve], [1.0], 8, form, [QuantizationLoss(0.01 * number, 0.001 * number)]
        )
        for number, form in enumerate(SOME[:3])
    ]
    whole = merged(candidates)
    assert (whole.costs[1:] > whole.costs[:-1]).all()
    assert (whole.losses[1:] < whole.losses[:-1]).all()
    for candidate_list in candidates:
        for cost, loss in zip(candidate_list.costs, candidate_list.losses, strict=True):
            assert (whole.losses[whole.costs <= cost] <= loss).any()
