"""From a trained model to predictions, scores, and the files, card and figures that report them."""
