"""Ridge regression of shares, for many penalties at once."""

import numpy as np


def ridge(train_inputs, train_shares, inputs, penalties):
    """
    Predicts shares by ridge regression on standardised inputs, in float64. All penalties and labels share one
    eigendecomposition, of the size of the number of clips or of inputs, whichever is smaller.

    Args:
        train_inputs: (clips, inputs).
        train_shares: (clips, labels), NaN where unknown.
        inputs: a list of (clips, inputs), such as those of devel and test.
        penalties: penalties on the squared weights; 0 would be least squares.

    Returns:
        `list[np.ndarray]`: predicted shares (penalties, clips, labels) for each entry of `inputs`. Labels without a
        known share are predicted as 0.
    """
    predictions = [np.zeros((len(penalties), len(rows), train_shares.shape[1])) for rows in inputs]
    known = ~np.isnan(train_shares)
    for pattern in np.unique(known, axis=1).T:  # one pattern, if all shares are known
        labels = np.flatnonzero((known == pattern[:, None]).all(axis=0))
        if pattern.any():
            fit = _Fit(np.asarray(train_inputs, np.float64)[pattern], train_shares[pattern][:, labels])
            for of_entry, rows in zip(predictions, inputs, strict=True):
                of_entry[:, :, labels] = fit.predict(rows, penalties)
    return predictions


class _Fit:
    """Ridge regressions of shares (clips, labels), all of them known, on inputs (clips, inputs)."""

    def __init__(self, inputs, shares):
        self.mean, self.deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-9
        self.offset = shares.mean(axis=0)
        inputs, residuals = self._standardized(inputs), shares - self.offset
        if inputs.shape[0] < inputs.shape[1]:
            eigenvalues, vectors = np.linalg.eigh(inputs @ inputs.T)
            self.basis = inputs.T @ vectors  # (inputs, clips)
            self.weights = vectors.T @ residuals
        else:
            eigenvalues, vectors = np.linalg.eigh(inputs.T @ inputs)
            self.basis = vectors  # (inputs, inputs)
            self.weights = vectors.T @ (inputs.T @ residuals)
        self.eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding makes some slightly negative

    def _standardized(self, inputs):
        return (inputs - self.mean) / self.deviation

    def predict(self, inputs, penalties):
        """Predicted shares (penalties, clips, labels) from inputs (clips, inputs)."""
        on_basis = self._standardized(np.asarray(inputs, np.float64)) @ self.basis
        return np.stack(
            [on_basis @ (self.weights / (self.eigenvalues + penalty)[:, None]) + self.offset for penalty in penalties]
        )
