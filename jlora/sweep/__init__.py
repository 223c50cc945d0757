"""Sweeps: many trainings over one base model, which share programs and steps."""
