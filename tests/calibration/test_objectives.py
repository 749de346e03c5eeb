"""Objectives without labels."""

import torch
from random_tensors import gaussian, summed
from torch import nn

from lowrank import (
    calibrate,
)


def test_gradients_are_those_of_the_users_loss_for_each_sample(mlp, data):
    stats = calibrate(mlp, data, loss=summed)
    outputs = mlp(torch.cat(data)).detach().double()
    expected = 4 * outputs.T @ outputs / len(outputs)  # ∂/∂y of |y|² is 2y
    torch.testing.assert_close(stats.gradients["2"].products / stats.tokens, expected, rtol=1e-4, atol=1e-4)


def test_the_fisher_of_a_classifier_is_that_of_its_own_predictions():
    """With labels drawn from the prediction p, E[ggᵀ] at the logits is diag(p) − ppᵀ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = model

        def forward(self, x):
            return {"logits": self.only(x)}

    classifier = Classifier()
    data = [gaussian(1, 4).expand(4000, 4)]
    stats = calibrate(classifier, data)
    p = classifier(data[0][:1])["logits"].softmax(-1)[0].detach().double()
    expected = torch.diag(p) - torch.outer(p, p)
    # Frequencies of 4,000 draws: standard deviations of at most 0.5/√4000 = 0.008.
    torch.testing.assert_close(stats.gradients["only.0"].products / stats.tokens, expected, rtol=0, atol=0.05)
