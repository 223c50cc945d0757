"""Sweeps: many trainings over one base model, with one compiled program."""
