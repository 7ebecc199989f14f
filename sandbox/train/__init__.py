"""One objective, one LightningModule, one file."""
