"""Ablations: arms that differ in what their file says, under one budget, compared at the end."""
