"""What is made of trained models: predictions, scores, and what reports them."""
