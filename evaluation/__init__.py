"""From a trained model to predictions, scores, and the files, model card and figures that report them."""
