"""A run as one page to read. It knows facts and pictures, and nothing of training."""
