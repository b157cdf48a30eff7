"""What training leaves to be done with concentrations: heads fit the votes of their training clips too closely."""

import numpy as np
from scipy.optimize import minimize_scalar

from ..evaluation.predictions import predict_votes
from ..votes_emoshare import log_likelihood

LARGEST_FACTOR = 20.0


def fit_concentrations(model, loader, accelerator):
    """
    Multiplies all concentrations of a trained model by one factor, with which the votes of devel are most likely: the
    shares of clips that a model was not trained on are less sure than those of its training clips. Shares stay as they
    are. Nothing happens if no number of listeners is known.

    Args:
        model: `EmoShareModel`; changed in place.
        loader: `FeatureLoader` of devel.
        accelerator: `accelerate.Accelerator`.
    """
    store, predicted = loader.store, predict_votes(model, loader, accelerator)
    listeners = np.broadcast_to(store.listeners[:, None], store.shares.shape).astype(np.float64)
    known = ~np.isnan(store.shares) & ~np.isnan(listeners)
    if not known.any():
        return
    listeners, true = listeners[known], store.shares[known].astype(np.float64)
    shares, concentrations = predicted.shares[known], predicted.concentrations[known]

    def loss(log_factor):
        return -log_likelihood(true * listeners, listeners, shares, concentrations * np.exp(log_factor)).mean()

    limit = np.log(LARGEST_FACTOR)
    factor = float(np.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))
    for head in model.heads:
        head.scale_concentrations(factor)
    accelerator.print(f"Concentrations are multiplied by {factor:.2f}, with which the votes of devel are most likely")
