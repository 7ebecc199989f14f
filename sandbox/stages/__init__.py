"""Ladders of training stages: several arms and seeds as one command, compared at the end."""
